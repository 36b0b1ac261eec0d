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
from markovia.algos.denoising.loop import ChainTrainer
from markovia.algos.denoising.sampling import predictor
from markovia.algos.statistics import Statistics
from markovia.envs.denoising.likelihood import step_kl

_QUANTILE_DECAY = 0.9  # of the moving average of `drop_quantile`


class AdjointDriver(ChainTrainer):
    """Trains a denoising agent with adjoint matching on the collector's task.

    Raises ValueError at construction when the agent is of another kind, or its kernel has noiseless steps or remembers its start.
    """

    method: AdjointMatching

    def __init__(self, method: AdjointMatching, agent: DenoisingAgent, collector: SequenceCollector, seed: int = 0) -> None:
        super().__init__(method, agent, collector, seed)
        check_memoryless(agent.kernel)
        self.root_loss_limit: float | None = None

    def step(self) -> dict[str, float]:
        """Collect a batch of chains, take the solver's steps on it, and return the iteration's statistics."""
        rollout = self.collector.collect(self.agent, self.generator("action"))
        self.prepare(rollout)
        self.set_lr()
        stats = self.improve(rollout)
        episodes, self.collector.episodes = self.collector.episodes, []
        return {"return": sum(episodes) / len(episodes), **stats, **self.advance(rollout.shape[0])}

    def prepare(self, rollout: Rollout) -> None:
        """Put the adjoint that each step is matched with into columns["adjoint"], and leave the drawn steps in the mask."""
        kernel, cond = self.agent.kernel, rollout.outcome["cond"]
        predict = predictor(kernel, self.reference.network, cond)
        gradient = reward_gradient(self.task, rollout.outcome["x"], cond)
        adjoint = lean_adjoint(lambda x, k: kernel.mean_std(predict(x, k), x, k)[0], chain_of(rollout), gradient, self.method.lam)
        rollout.columns["adjoint"] = adjoint[:, 1:] if self.method.index == "next" else adjoint[:, :-1]
        if self.method.steps_per_chain is not None:
            drawn = strata(*rollout.shape, self.method.steps_per_chain, self.generator("strata"))
            rollout.mask = rollout.mask & drawn.to(rollout.mask.device)

    def improve(self, rollout: Rollout) -> dict[str, float]:
        """Epochs of minibatch steps."""
        solver, stats = self.method.solver, Statistics()
        size = solver.minibatch or rollout.shape[0] * rollout.shape[1]
        generator = self.generator("minibatch")
        for _ in range(solver.epochs):
            for batch in rollout.minibatches(solver.unit, size, generator, shuffle=solver.minibatch is not None):
                loss, found = self.loss(batch)
                stats.add({**found, "grad_norm": self.descend(loss, batch)})
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

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors, meta = super().state()
        return tensors, meta | {"root_loss_limit": self.root_loss_limit}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""
        super().load_state(tensors, meta)
        self.root_loss_limit = meta["root_loss_limit"]
