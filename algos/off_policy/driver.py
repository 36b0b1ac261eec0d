"""The off-policy actor-critic loop: step the environments into a replay, update on minibatches of it.

An iteration is `num_steps` times: one environment step -> the updates that are due by `utd` -> pi_k <- pi when that is due.
This is the only place with loops and side effects.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

import torch
from gymnasium import spaces
from torch import Tensor

from markovia.agents.control import ControlAgent
from markovia.algos.finite import Watch
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.costs import cost_names
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.replay import Batch, Replay
from markovia.algos.off_policy.slots import Ascent, Behaviour, Weighted
from markovia.algos.off_policy.update import Update
from markovia.algos.safe.handler import drain_costs, finished
from markovia.algos.safe.replayed import ReplayHandler
from markovia.algos.statistics import Statistics
from markovia.algos.streams import stream_seed
from markovia.algos.trainer import Budget, part


class Source(Protocol):
    """What the driver needs of its source of transitions: a replay, and steps of the budget; those of a fixed dataset add nothing and count one."""

    replay: Replay
    episodes: list[float]

    def step(self, agent: Any, generator: torch.Generator, uniform: bool = False) -> int: ...
    def reset(self, seed: int) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor]) -> None: ...
    def close(self) -> None: ...


def check_action_box(space: Any, instead: str = "use ppo, a2c or mdpo-on for it, or an environment with a Box of actions") -> None:
    """Refuse action spaces that a policy with reparameterised actions can't serve, with a ValueError that says what to do `instead`."""
    if not isinstance(space, spaces.Box):
        raise ValueError(
            f"off-policy and offline actor-critics (sac, td3, bc, iql, ...) have continuous actions, but the action space is {space}; {instead}"
        )


class OffPolicyDriver(Budget):
    """Trains `agent` with `method` on what `collector` puts into its replay. Raises ValueError at construction when the three do not fit."""

    method: OffPolicy
    agent: ControlAgent

    def __init__(self, method: OffPolicy, agent: ControlAgent, collector: Source, seed: int = 0, compile: bool = False) -> None:
        self.method, self.agent, self.collector, self.seed = method, agent, collector, seed
        self.iteration = self.num_env_steps = self.num_updates = 0
        self.watch = Watch(agent.device)
        self._check()
        self.nets = ActorCritic(method, agent, seed)
        self.update = Update(self.nets, compile)
        self.constraint = None if method.constraint is None else ReplayHandler(method.constraint, method.gamma)
        self.collector.reset(stream_seed(seed, "env", 0))

    def _check(self) -> None:
        check_action_box(self.agent.action_space)
        if not (self.agent.squash or self.agent.tanh_mean):
            raise ValueError("an off-policy agent needs bounded actions; build it with squash=True (sac, mdpo-off) or tanh_mean=True (td3)")
        behaviour, budget = self.method.behaviour, self.method.num_env_steps
        if not self.method.num_optimizer_steps:
            starts = self.method.learning_starts
            what = f"num_env_steps={budget} ends before learning_starts={starts}"
            warnings.warn(f"nothing is learnt: {what}; raise the one or lower the other", stacklevel=2)
        if isinstance(behaviour, Behaviour) and behaviour.steps >= budget:
            raise ValueError(
                f"the model of the data alone takes behaviour.steps={behaviour.steps} of num_env_steps={budget} updates, "
                "so the policy would learn nothing; lower the first or raise the second"
            )
        norm = self.agent.net["normalizer"] if "normalizer" in self.agent.net else None
        if norm is not None and not self.method.fixed_data and any(float(n.count) == 0.0 for n in norm.norms):  # type: ignore[union-attr]
            raise ValueError(
                "a replay keeps observations as they were stored, so a normaliser has to be fixed before, as those of datasets are; "
                "build with normalize_obs=False"
            )

    @property
    def compile_seconds(self) -> float:
        """What compiling the update has taken so far."""
        return 0.0 if self.update.compiled is None else self.update.compiled.seconds

    # -- one iteration ----------------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """Step the environments `num_steps` times with the updates that belong to them; the iteration's statistics."""
        m, stats = self.method, Statistics()
        self.watch.begin(self.iteration)
        action, minibatch = self.generator("action"), self.generator("minibatch")
        for _ in range(m.num_steps):
            before = self.num_env_steps
            self.num_env_steps += self.collector.step(self.agent, action, uniform=before < m.learning_starts and m.start == "uniform")
            while self.num_updates < self.updates_due():
                stats.add(self.improve(minibatch))
            self.refresh_if_due(before)
            if self.finished:
                break
        return self.report(stats)

    def refresh_if_due(self, before: int) -> None:
        """pi_k <- pi when the steps since `before` passed a multiple of refresh_steps."""
        actor = self.method.actor
        if isinstance(actor, Ascent) and self.method.mirrors and self.num_env_steps // actor.refresh_steps > before // actor.refresh_steps:
            self.update.refresh()

    def report(self, stats: Statistics) -> dict[str, float]:
        """Count the iteration; its statistics."""
        self.watch.look()
        self.iteration += 1
        if self.constraint is not None:
            self.constraint.measure(*finished(self.collector), move=self.constraint.constraint.estimator == "episodes")
        return {**self.describe(), **stats.means(), "iteration": float(self.iteration), "num_env_steps": float(self.num_env_steps)}

    def updates_due(self) -> int:
        """How many updates belong to the environment steps so far."""
        return int(self.method.utd * max(0, self.num_env_steps - self.method.learning_starts))

    def improve(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One update on one minibatch. A gradient that is not finite raises NotFinite."""
        batch, noise = self.draw(generator)
        self.num_updates += 1
        stats = self._update(batch, noise)
        self.watch.add(stats, batch)
        return stats

    def _update(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        """Fit what is due on a minibatch."""
        if self.models_behaviour:
            return self.update.fit_behaviour(batch, noise)
        self.set_lr()
        if self.constraint is None:
            return self.update(batch, noise, self.moves_actor)
        stats = self.update(self.constraint.prepare(batch, self.progress), noise, self.moves_actor)
        if self.constraint.constraint.estimator == "critic":
            self.constraint.observe([float(stats[name]) for name in cost_names(self.constraint.constraint.num_costs)])
        return stats

    def draw(self, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """A minibatch and the noise of its update."""
        batch = self.collector.replay.sample(self.method.batch_size, generator)
        return batch, torch.randn((self.method.num_noises, *batch.action.shape), generator=generator).to(batch.action)

    @property
    def models_behaviour(self) -> bool:
        """Does this update fit the behaviour model alone?"""
        return isinstance(self.method.behaviour, Behaviour) and self.num_updates <= self.method.behaviour.steps

    @property
    def moves_actor(self) -> bool:
        """Does this update move the actor?"""
        return self.num_updates % self.method.policy_delay == 0

    def set_lr(self) -> None:
        """Learning rate of this update's actor step."""
        if isinstance(self.method.actor, Weighted) and self.method.actor.cosine:
            self.update.optimizers["actor"].scale_lr(0.5 * (1.0 + math.cos(math.pi * self.progress)))

    def describe(self) -> dict[str, float]:
        """What is logged beside the update's statistics: returns of finished episodes, number of updates."""
        out = {"num_updates": float(self.num_updates)}
        if self.collector.episodes:
            out["return"] = sum(self.collector.episodes) / len(self.collector.episodes)
            self.collector.episodes.clear()
        return out | drain_costs(self.collector) | ({} if self.constraint is None else self.constraint.describe())

    # -- checkpoints ------------------------------------------------------------------------------------------------------------------

    def boundary(self) -> None:
        """Reseed and reset the environments; called at every checkpoint, so that resuming needs no simulator state."""
        self.collector.reset(stream_seed(self.seed, "env", self.iteration))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, the written part of the replay included, as tensors and JSON."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state().items()}
        tensors |= {f"net.{k}": v for k, v in self.nets.state().items()}
        for name, optimizer in self.update.optimizers.items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state().items()}
        tensors |= {f"collector.{k}": v for k, v in self.collector.state().items()}
        meta = {
            "iteration": self.iteration,
            "num_env_steps": self.num_env_steps,
            "num_updates": self.num_updates,
            "episodes": list(self.collector.episodes),
            "constraint": None if self.constraint is None else self.constraint.state(),
        }
        return tensors, meta

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""
        self.agent.load_state(part(tensors, "agent."))
        self.nets.load_state(part(tensors, "net."))
        for name, optimizer in self.update.optimizers.items():
            optimizer.load_state(part(tensors, f"optimizer.{name}."))
        self.collector.load_state(part(tensors, "collector."))
        self.iteration, self.num_env_steps, self.num_updates = meta["iteration"], meta["num_env_steps"], meta["num_updates"]
        self.collector.episodes[:] = meta["episodes"]
        if self.constraint is not None:
            self.constraint.load_state(meta["constraint"])
