"""The on-policy proximal loop, once for control, tokens and denoising.

An iteration: collect -> constraint -> reference log-probs -> penalised reward -> advantage -> solver's inner steps -> controller -> refresh.
This is the only place with loops, optimisers and side effects.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout, masked_mean
from markovia.algos.advantages import normalise
from markovia.algos.finite import Watch
from markovia.algos.on_policy.auxiliary import record_for
from markovia.algos.on_policy.divergence import k3
from markovia.algos.on_policy.filters import filled
from markovia.algos.on_policy.fixup import Price, old_new_kl
from markovia.algos.on_policy.loss import critic_loss, policy_loss
from markovia.algos.on_policy.merging import Merger
from markovia.algos.on_policy.method import Descent, Doubling, DualAscent, MirrorStep, NaturalGradient, OnPolicy
from markovia.algos.on_policy.natural import natural_step
from markovia.algos.on_policy.optimism import Judge
from markovia.algos.on_policy.prepare import fill
from markovia.algos.on_policy.references import EMA, Fixed, HardReset, Soup, mix, put
from markovia.algos.on_policy.tokens import Unlikely
from markovia.algos.on_policy.update import LossFn, Update
from markovia.algos.optimizer import Optimizer, make_optimizer
from markovia.algos.safe.guard import Guard
from markovia.algos.safe.handler import ConstraintHandler, drain_costs, finished
from markovia.algos.statistics import Statistics, explained_variance
from markovia.algos.streams import stream_seed
from markovia.algos.trainer import Budget, part

Role = Literal["policy", "value"]


class Collector(Protocol):
    """What the driver needs of its source of records; `StepCollector` and `SequenceCollector` are the two."""

    episodes: list[float]  # and, where the task has costs, `episode_costs` and `episode_lengths` of the same episodes

    def collect(self, agent: Any, generator: torch.Generator) -> Rollout: ...
    def reset(self, seed: int) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor]) -> None: ...
    def close(self) -> None: ...


class OnPolicyDriver(Budget):
    """Trains `agent` with `method` on what `collector` brings. Raises ValueError at construction when the three do not fit.

    `references` are frozen policies that the method reads by name beside its own reference: "teacher", "dpo", "other".
    """

    method: OnPolicy

    def __init__(
        self,
        method: OnPolicy,
        agent: Agent,
        collector: Collector,
        seed: int = 0,
        compile: bool = False,
        references: Mapping[str, Agent] | None = None,
        texts: Rollout | None = None,
    ) -> None:
        self.method, self.agent, self.collector, self.seed = method, agent, collector, seed
        self.iteration = 0
        self.num_env_steps = 0
        self.coef = float(method.controller.coef)
        self.beta = 0.0 if method.divergence is None else method.divergence.schedule.start(method.divergence.beta)
        self.advantage_state: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}  # of reward transforms and the entropy anchor
        self.outcome: dict[str, Any] = {}  # what the last batch was, for those who want to see it: texts or samples, and returns
        self._check()
        self.constraint = None if method.constraint is None else ConstraintHandler.for_agent(method.constraint, method.advantage, agent)
        optimistic = self.constraint is not None and self.constraint.constraint.optimistic
        self.judge = Judge(method, agent, self.constraint) if self.constraint is not None and optimistic else None
        self.guard: Guard | None = None
        if method.constraint is not None and method.constraint.shield is not None:
            self.guard = Guard(method.constraint, agent, seed, compile)
            collector.shield = self.guard.act  # type: ignore[attr-defined]
        self.references: dict[str, Agent] = {"ref": agent.reference(isinstance(method.refresh, Fixed))} if "ref" in method.references else {}
        self._given = dict(references or {})
        self._check_references()
        self.extra = None if method.aux is None else record_for(method.aux, agent, collector, texts, self.generator("presample"))
        self.merger = None if method.merge is None else Merger(method.merge, agent.parameters("policy"))
        joint_value = method.trains_critic and method.value.separate is None
        self.updates: dict[str, Update] = {}
        if isinstance(method.solver, Descent):
            self._add_update("main", method.solver, policy_loss, ("policy", "value") if joint_value else ("policy",), compile)
        if method.advantage.needs_critic and method.value.separate is not None:
            self._add_update("value", method.value.separate, critic_loss, ("value",), compile)
        self.price = Price(method.controller) if isinstance(method.controller, DualAscent) else None
        self.watch = Watch(agent.device, every=0)  # looked at after each part of an iteration: a minibatch is too short to wait for
        self.collector.reset(stream_seed(seed, "env", 0))

    def _make_optimizer(self, solver: Descent, groups: Sequence[tuple[list[nn.Parameter], float]]) -> Optimizer:
        return make_optimizer(solver, groups)

    def _add_update(self, name: str, solver: Descent, loss: LossFn, roles: tuple[Role, ...], compile: bool) -> None:
        lrs = {"policy": solver.lr, "value": solver.lr if solver.value_lr is None else solver.value_lr}
        optimizer = self._make_optimizer(solver, [(self.agent.parameters(role), lrs[role]) for role in roles])
        extra, joint = self.extra if name == "main" else None, "value" in roles and name == "main"
        self.updates[name] = Update(name, self.method, self.agent, solver, loss, joint, optimizer, compile, extra)

    def _check(self) -> None:
        m, agent = self.method, self.agent
        if m.advantage.needs_critic and agent.critic is None:
            raise ValueError(
                f"{type(m.advantage).__name__} needs values, but this {agent.kind} agent has no critic; "
                "build it with a value head, or choose LeaveOneOut / BatchReturn"
            )
        if agent.kind == "language":
            if isinstance(m.solver, NaturalGradient):
                raise ValueError("natural-gradient steps are not offered for language models; use ppo, rloo or ppo-rlhf")
            for s in (m.solver, m.value.separate):
                if isinstance(s, Descent) and s.unit != "row":
                    raise ValueError("a language agent is evaluated a response at a time: set solver.unit='row' (and value.separate.unit)")
        self._check_softmax()
        if "greedy" in getattr(m.advantage, "needs", ()):
            if not hasattr(self.collector, "greedy"):
                raise ValueError(f"{type(m.advantage).__name__} needs greedy responses to the prompts; {type(self.collector).__name__} makes none")
            self.collector.greedy = True

    def _check_softmax(self) -> None:
        """What reads the logits of one softmax needs an agent that has them."""
        m, space = self.method, getattr(self.agent, "action_space", None)
        if self.agent.kind == "language" or isinstance(space, spaces.Discrete):
            return
        wants = {
            "anchor=EntropyAnchor(...)": m.anchor is not None,
            "tokens=Unlikely(...)": isinstance(m.tokens, Unlikely),
            "surrogate=KLDrift(needs_kl='tsallis')": m.surrogate.needs_kl == "tsallis",
        }
        found = [slot for slot, wanted in wants.items() if wanted]
        if found:
            actions = "" if space is None else f", its action space is {space}"
            raise ValueError(
                f"{found[0]} is written for categorical policies, but this {self.agent.kind} agent has none{actions}; "
                "take a task with Discrete actions, or a method without it"
            )

    def _check_references(self) -> None:
        m, refresh = self.method, self.method.refresh
        names = [*(n for n in m.references if n != "ref"), *(["other"] if isinstance(refresh, Soup) else [])]
        missing = [n for n in names if n not in self._given]
        if missing:
            raise ValueError(f"the method reads policies that were not given, {missing}: OnPolicyDriver(..., references={{{missing[0]!r}: agent}})")
        if not isinstance(refresh, Fixed) and any(ref.net is self.agent.net for ref in self.references.values()):
            raise ValueError(
                f"a {type(refresh).__name__} reference needs weights of its own, but a LoRA agent's reference is its base model; "
                "train all weights (the agent option lora=null, and a smaller learning rate), or use refresh=Fixed()"
            )
        if isinstance(refresh, Soup):
            mix(self.references["ref"], self._given["other"], share=refresh.share)

    @property
    def compile_seconds(self) -> float:
        """What tracing and compiling the updates has taken so far."""
        return sum(u.compiled.seconds for u in self.updates.values() if u.compiled is not None)

    # -- one iteration ------------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """Collect a batch, improve the policy on it, and return the iteration's statistics."""
        self.watch.begin(self.iteration)
        rollout, drawn = self._collect()
        found: dict[str, float] = {}
        if self.constraint is not None:
            self.constraint.measure(*finished(self.collector))
        self.outcome = {}
        if rollout.shape[0]:
            self.outcome = {**rollout.outcome, "returns": rollout.returns()} if rollout.outcome else {}
            reward = self.prepare(rollout)
            guarded = {} if self.guard is None else self.guard.learn(rollout, self.generator("guard"))
            self.advantages(rollout, reward)
            self._set_lr()
            if self.judge is not None:
                self.judge.seen()
            found = self.improve(rollout, reward)
            if self.judge is not None:
                self.judge.next()
            found = {**self.describe(rollout), **guarded, **found}
        self.iteration += 1
        self.num_env_steps += drawn
        self._after_iteration(found, rollout.shape[0])
        return {**found, "iteration": float(self.iteration), "num_env_steps": float(self.num_env_steps)}

    def _collect(self) -> tuple[Rollout, int]:
        """A batch, and what it cost of the budget: dropped groups count."""
        generator, m = self.generator("action"), self.method

        def draw() -> Rollout:
            return self.collector.collect(self.agent, generator)

        if m.filter is not None:
            return filled(draw, m.filter, m.num_envs, self._cost)
        rollout = draw()
        return rollout, self._cost(rollout)

    def _cost(self, rollout: Rollout) -> int:
        """A sequence is one decision of the outer problem; a step task counts its valid steps, unless the record says how many (`env_steps`)."""
        if "env_steps" in rollout.outcome:
            return int(rollout.outcome["env_steps"].sum())
        return rollout.shape[0] if self.counts_rows(rollout) else int(rollout.valid.sum())

    def counts_rows(self, rollout: Rollout) -> bool:
        return rollout.per_row or self.agent.kind == "denoising"

    @torch.no_grad()
    def prepare(self, rollout: Rollout) -> Tensor:
        """Fill what the method reads and return the reward (B, T) after transforms and penalty."""
        policies = {**self.references, **self._given}
        reward = fill(self.method, self.agent, policies, rollout, self.beta, self.memory, self.generator("selection"))
        return reward if self.constraint is None else self.constraint.soften(rollout, reward, self.progress)

    @torch.no_grad()
    def advantages(self, rollout: Rollout, reward: Tensor) -> None:
        """Put `adv` and `ret` into the record."""
        adv, ret = self.method.advantage(reward, rollout, self.advantage_state)
        if self.method.normalize_advantage == "batch":
            adv = normalise(adv, rollout.mask)
        if self.constraint is not None:
            adv = self.constraint.mix(rollout, adv, self.method.advantage)
        if self.judge is not None:
            adv = self.judge.optimistic(rollout, reward, adv, self.advantage_state)
        rollout.columns["adv"], rollout.columns["ret"] = adv, ret

    def improve(self, rollout: Rollout, reward: Tensor) -> dict[str, float]:
        """The solver's inner steps."""
        m, stats = self.method, Statistics()
        out: dict[str, float] = {}
        pretraining = self.iteration < m.value.pretrain
        if isinstance(m.solver, NaturalGradient) and not pretraining:
            out.update(natural_step(m, m.solver, self.agent, rollout, None if self.constraint is None else self.constraint.step_violation))
            self.watch.add({"grad_norm": out["grad_norm"]}, rollout)
            self.watch.look()
        for name in self.updates:
            if pretraining if name == "main" else not (pretraining or m.trains_critic):
                continue
            self._descend(name, rollout, reward, stats)
            self.watch.look()
        if isinstance(m.controller, Doubling) and not pretraining:
            # Measured after the last step: during a pass it lags behind, and before the first one it is 0.
            with torch.no_grad():
                out["kl_mean"] = float(masked_mean(old_new_kl(self.agent, rollout), rollout.mask))
        return {**stats.means(), **out}

    def _descend(self, name: str, rollout: Rollout, reward: Tensor, stats: Statistics) -> None:
        """Epochs of minibatch steps."""
        update, generator, chance = self.updates[name], self.generator(f"minibatch-{name}"), self.generator("auxiliary")
        solver, price, stopped = update.solver, self.price if name == "main" else None, False
        old = [p.detach().clone() for p in self.agent.parameters("policy")] if price is not None else []
        for epoch in range(solver.epochs):
            if epoch and solver.recompute_advantage:
                self._refresh_values(rollout, reward)
            update.begin(rollout, chance)
            for index in update.minibatches(generator):
                step_stats = update.step(index, torch.tensor(self.coef, device=index.device))
                stats.add(step_stats)
                self.watch.add(step_stats, partial(update.minibatch, index))
                if price is not None:
                    self.coef = price.step(step_stats["kl_max"])
                if solver.kl_stop_nats is not None and "approx_kl" in step_stats and float(step_stats["approx_kl"]) > 1.5 * solver.kl_stop_nats:
                    stopped = True
                    break
            if price is not None and price.controller.fixup:
                stats.add({"fixup_steps": torch.tensor(float(price.fix_up(self.agent, update, rollout, old)))})
                self.coef = price.coef
            if stopped:
                return

    @torch.no_grad()
    def _refresh_values(self, rollout: Rollout, reward: Tensor) -> None:
        """Recompute V and the advantages with the current critic (boot values keep those of the collection)."""
        if self.method.advantage.needs_critic:
            rollout.value = self.agent.evaluate(rollout, ("value",)).value
        state, constraint = dict(self.advantage_state), self.constraint
        costs = [] if constraint is None else copy.deepcopy(constraint.advantage_states)
        self.advantages(rollout, reward)
        self.advantage_state = state
        if constraint is not None:
            constraint.advantage_states = costs

    # -- between iterations ------------------------------------------------------------------------------------------------------------

    def _set_lr(self) -> None:
        """Warmup and annealing, of each run that is merged on its own: the average weighs them alike."""
        iteration, progress = (self.iteration, self.progress) if self.merger is None else self.merger.within(self.progress)
        for update in self.updates.values():
            rising = min(1.0, (iteration + 1) / max(1, update.solver.warmup))
            update.optimizer.scale_lr(rising * (1.0 - progress if update.solver.anneal else 1.0))
        if isinstance(self.method.controller, MirrorStep):
            self.coef = self.method.controller.coef / max(self.method.controller.floor, 1.0 - progress)

    def _after_iteration(self, stats: dict[str, float], num_rows: int) -> None:
        controller = self.method.controller
        if isinstance(controller, Doubling) and "kl_mean" in stats:  # a policy that was not stepped says nothing about the step size
            if stats["kl_mean"] > 1.5 * controller.kl_target_nats:
                self.coef *= 2.0
            elif stats["kl_mean"] < controller.kl_target_nats / 1.5:
                self.coef /= 2.0
        divergence = self.method.divergence
        if divergence is not None and num_rows:
            kl_nats = stats.get(f"kl_{divergence.reference}", 0.0)
            self.beta = divergence.schedule.after(self.beta, divergence.beta, self.progress, kl_nats, num_rows)
        if "ref" in self.references:
            self._refresh(stats.get("kl_ref", 0.0))
        if self.merger is not None and self.merger.end_of_part(self.progress):
            self._start_over()

    @torch.no_grad()
    def _start_over(self) -> None:
        """A new run from where the policy stands now: fresh optimisers, and the policy as its own reference."""
        for update in self.updates.values():
            update.optimizer.forget()
        if "ref" in self.references and self.references["ref"].net is not self.agent.net:
            put(self.references["ref"].net, [p.detach() for p in self.agent.net.parameters()])

    @torch.no_grad()
    def _refresh(self, kl_nats: float) -> None:
        """Move the reference as the method says."""
        refresh, ref = self.method.refresh, self.references["ref"].net
        if isinstance(refresh, EMA):
            for p, q in zip(ref.parameters(), self.agent.net.parameters(), strict=True):
                p.lerp_(q.to(p), refresh.rate)
        elif isinstance(refresh, HardReset) and (self.iteration % refresh.every == 0 or (refresh.kl_nats is not None and kl_nats > refresh.kl_nats)):
            put(ref, [p.to(q) for p, q in zip(self.agent.net.parameters(), ref.parameters(), strict=True)])
            for update in self.updates.values():
                update.optimizer.forget()

    @torch.no_grad()
    def describe(self, rollout: Rollout) -> dict[str, float]:
        """What is logged about the batch: returns of finished episodes, length, KL to the reference, explained variance, coefficient.

        The entropy of text is the mean of -log pi over the tokens drawn, in nats: unbiased and free (the exact one where the loss reads it).
        """
        out: dict[str, float] = {"coef": self.coef} | ({"beta": self.beta} if self.method.divergence is not None else {})
        if self.collector.episodes:
            out["return"] = sum(self.collector.episodes) / len(self.collector.episodes)
            self.collector.episodes.clear()
        out |= drain_costs(self.collector) | ({} if self.constraint is None else self.constraint.describe())
        logp_ref = {name: rollout.logp_ref[name] for name in ("ref", "teacher") if name in rollout.logp_ref}
        log_ratio = {name: torch.where(rollout.mask, rollout.logp_old - logp, 0.0) for name, logp in logp_ref.items()}
        out |= {f"kl_{name}": float(d.sum(1).mean()) for name, d in log_ratio.items()}
        if "ref" in log_ratio:
            out["kl_ref_k3"] = float((k3(log_ratio["ref"]) * rollout.mask).sum(1).mean())
            out["logp_ref_mean"] = float(masked_mean(torch.where(rollout.mask, rollout.logp_ref["ref"], 0.0), rollout.mask))
        if rollout.value is not None:
            out["explained_variance"] = explained_variance(rollout.columns["ret"], rollout.value[..., 0], rollout.mask)
            costs = rollout.columns["cost_ret"].unbind(-1) if "cost_ret" in rollout.columns else ()
            for i, target in enumerate(costs):
                name = "explained_variance/cost" + (f"/{i}" if len(costs) > 1 else "")
                out[name] = explained_variance(target, rollout.value[..., 1 + i], rollout.mask)
        if rollout.per_row:
            out["length"] = float(rollout.mask.sum(1).float().mean())
            out["entropy"] = -float(masked_mean(rollout.logp_old, rollout.mask))
        told = rollout.outcome.get("rewards", {})  # of several reward functions each one's mean, before weights
        return out | ({f"reward/{name}": float(x.mean()) for name, x in told.items()} if len(told) > 1 else {})

    # -- checkpoints --------------------------------------------------------------------------------------------------------------------

    def boundary(self) -> None:
        """Reseed and reset the environments; called at every checkpoint, so that resuming needs no simulator state."""
        self.collector.reset(stream_seed(self.seed, "env", self.iteration))
        if self.guard is not None:
            self.guard.restart()

    def _optimizers(self) -> dict[str, Optimizer]:
        out = {name: update.optimizer for name, update in self.updates.items()}
        return out | ({} if self.price is None else {"dual": self.price.optimizer})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state().items()}
        for name, ref in self.references.items():
            if ref.net is not self.agent.net:
                tensors |= {f"reference.{name}.{k}": v for k, v in ref.net.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state().items()}
        tensors |= {f"collector.{k}": v for k, v in self.collector.state().items()}
        tensors |= {} if self.judge is None else {f"judge.{k}": v for k, v in self.judge.state().items()}
        merging, merging_meta = ({}, None) if self.merger is None else self.merger.state()
        tensors |= {f"merger.{k}": v for k, v in merging.items()}
        if self.price is not None:
            tensors["dual"] = self.price.value.detach()
        meta = {
            "iteration": self.iteration,
            "num_env_steps": self.num_env_steps,
            "coef": self.coef,
            "beta": self.beta,
            "advantage_state": self.advantage_state,
            "memory": self.memory,
            "episodes": list(self.collector.episodes),
            "constraint": None if self.constraint is None else self.constraint.state(),
            "merger": merging_meta,
        }
        if self.guard is not None:
            guard, meta["guard"] = self.guard.state()
            tensors |= {f"guard.{k}": v for k, v in guard.items()}
        return tensors, meta

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""

        self.agent.load_state(part(tensors, "agent."))
        for name, ref in self.references.items():
            if ref.net is not self.agent.net:
                ref.net.load_state_dict(part(tensors, f"reference.{name}."))
        for name, optimizer in self._optimizers().items():
            optimizer.load_state(part(tensors, f"optimizer.{name}."))
        if self.price is not None:
            with torch.no_grad():
                self.price.value.copy_(tensors["dual"])
        self.collector.load_state(part(tensors, "collector."))
        self.iteration, self.num_env_steps = meta["iteration"], meta["num_env_steps"]
        self.coef, self.advantage_state = meta["coef"], meta["advantage_state"]
        self.beta, self.memory = meta["beta"], meta["memory"]
        self.collector.episodes[:] = meta["episodes"]
        if self.constraint is not None:
            self.constraint.load_state(meta["constraint"])
        if self.guard is not None:
            self.guard.load_state(part(tensors, "guard."), meta["guard"])
        if self.judge is not None:
            self.judge.load_state(part(tensors, "judge."))
        if self.merger is not None:
            self.merger.load_state(part(tensors, "merger."), meta["merger"])
