"""The loop of adjoint matching: collect chains, carry the reward's gradient back through the reference, regress the control on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.agents.records import Rollout, masked_mean
from markovia.algos.collect import SequenceCollector
from markovia.algos.denoising.adjoint import (
    AdjointMatching,
    chain_of,
    check_memoryless,
    lean_adjoint,
    matching_loss,
    reward_gradient,
    strata,
)
from markovia.algos.denoising.sampling import predictor
from markovia.algos.on_policy.driver import Statistics
from markovia.algos.optimizer import make_optimizer
from markovia.algos.streams import stream, stream_seed
from markovia.envs.denoising.likelihood import step_kl

_QUANTILE_DECAY = 0.9  # of the moving average of `drop_quantile`


class AdjointDriver:
    """Trains a denoising agent with adjoint matching on the collector's task.

    Raises ValueError at construction when the agent is of another kind, or its kernel has noiseless steps or remembers its start.
    """

    def __init__(self, method: AdjointMatching, agent: DenoisingAgent, collector: SequenceCollector, seed: int = 0) -> None:
        if agent.kind != "denoising":
            raise ValueError(f"adjoint matching trains denoising agents, got kind {agent.kind!r}")
        check_memoryless(agent.kernel)
        self.method, self.agent, self.collector, self.seed = method, agent, collector, seed
        self.task: Any = collector.task
        self.reference = agent.reference()
        self.optimizer = make_optimizer(method.solver, [(agent.parameters("policy"), method.solver.lr)])
        self.iteration = self.num_env_steps = 0
        self.root_loss_limit: float | None = None
        self.compile_seconds = 0.0  # nothing is compiled
        self.boundary()

    @property
    def finished(self) -> bool:
        return self.num_env_steps >= self.method.num_env_steps

    def step(self) -> dict[str, float]:
        """Collect a batch of chains, take the solver's steps on it, and return the iteration's statistics."""
        rollout = self.collector.collect(self.agent, stream(self.seed, "action", self.iteration, self.agent.device))
        self.prepare(rollout)
        done = min(1.0, self.num_env_steps / self.method.num_env_steps)
        self.optimizer.scale_lr(1.0 - done if self.method.solver.anneal else 1.0)
        stats = self.improve(rollout)
        self.iteration += 1
        self.num_env_steps += rollout.shape[0]
        episodes, self.collector.episodes = self.collector.episodes, []
        return {"return": sum(episodes) / len(episodes), **stats, "iteration": float(self.iteration), "num_env_steps": float(self.num_env_steps)}

    def prepare(self, rollout: Rollout) -> None:
        """Put the adjoint that each step is matched with into columns["adjoint"], and leave the drawn steps in the mask."""
        kernel, cond = self.agent.kernel, rollout.outcome["cond"]
        predict = predictor(kernel, self.reference.net["policy"], cond)
        gradient = reward_gradient(self.task, rollout.outcome["x"], cond)
        adjoint = lean_adjoint(lambda x, k: kernel.mean_std(predict(x, k), x, k)[0], chain_of(rollout), gradient, self.method.lam)
        rollout.columns["adjoint"] = adjoint[:, 1:] if self.method.index == "next" else adjoint[:, :-1]
        if self.method.steps_per_chain is not None:
            drawn = strata(*rollout.shape, self.method.steps_per_chain, stream(self.seed, "strata", self.iteration))
            rollout.mask = rollout.mask & drawn.to(rollout.mask.device)

    def improve(self, rollout: Rollout) -> dict[str, float]:
        """Epochs of minibatch steps."""
        solver, stats = self.method.solver, Statistics()
        size = solver.minibatch or rollout.shape[0] * rollout.shape[1]
        generator = stream(self.seed, "minibatch", self.iteration)
        for _ in range(solver.epochs):
            for batch in rollout.minibatches(solver.unit, size, generator, shuffle=solver.minibatch is not None):
                self.optimizer.zero_grad()
                loss, found = self.loss(batch)
                loss.backward()
                stats.add({**found, "grad_norm": self.optimizer.step()})
        return stats.means()

    def loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean matching loss over the steps that count, and the mean KL of a step."""
        dist = self.agent.evaluate(batch, ("dist",)).dist
        with torch.no_grad():
            ref = self.reference.evaluate(batch, ("dist",)).dist
        assert dist is not None and ref is not None
        mean, std = dist.params()["mean"], dist.params()["std"]
        std = std.reshape(*std.shape, *[1] * (mean.ndim - 2))
        u = (mean - ref.params()["mean"]) / std
        each = matching_loss(u, batch.columns["adjoint"], std, self.agent.reduce, batch_ndim=2)
        mask = batch.mask & self._kept(each.detach().sqrt(), batch.mask)
        return masked_mean(each, mask), {
            "loss": masked_mean(each.detach(), mask),
            "kl_step": masked_mean(step_kl(u.detach(), batch_ndim=2), batch.mask),
        }

    def _kept(self, root: Tensor, mask: Tensor) -> Tensor:
        """Decisions whose root loss is not above the moving average of its quantile, which this batch then moves."""
        if self.method.drop_quantile is None:
            return torch.ones_like(mask)
        now = float(torch.quantile(root[mask], self.method.drop_quantile))
        limit = now if self.root_loss_limit is None else self.root_loss_limit
        self.root_loss_limit = _QUANTILE_DECAY * limit + (1 - _QUANTILE_DECAY) * now
        return root <= limit

    # -- checkpoints --------------------------------------------------------------------------------------------------------------------

    def boundary(self) -> None:
        """Called at every checkpoint; nothing of a chain outlives its batch."""
        self.collector.reset(stream_seed(self.seed, "env", self.iteration))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state().items()}
        tensors |= {f"reference.{k}": v for k, v in self.reference.net.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.state().items()}
        return tensors, {"iteration": self.iteration, "num_env_steps": self.num_env_steps, "root_loss_limit": self.root_loss_limit}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.agent.load_state(part("agent."))
        self.reference.net.load_state_dict(part("reference."))
        self.optimizer.load_state(part("optimizer."))
        self.iteration, self.num_env_steps, self.root_loss_limit = meta["iteration"], meta["num_env_steps"], meta["root_loss_limit"]
