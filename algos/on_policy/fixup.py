"""FixPO: a bound on the KL in every state of a batch, held by the price of an ascending multiplier and by a phase that mends what is left."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from markovia.agents.distributions import kl, with_params
from markovia.agents.interface import Agent
from markovia.agents.records import Rollout, masked_mean
from markovia.algos.on_policy.method import DualAscent
from markovia.algos.on_policy.update import Update
from markovia.algos.optimizer import Optimizer, Rule


def old_new_kl(agent: Agent, chunk: Rollout) -> Tensor:
    """KL(old || new) of every decision that counts, (B, T) nats; 0 elsewhere."""
    dist = agent.evaluate(chunk, ("dist",)).dist
    assert dist is not None and chunk.dist_old is not None
    return torch.where(chunk.mask, kl(with_params(dist, chunk.dist_old), dist), 0.0)


class Price:
    """The multiplier of the bound, with its optimiser."""

    def __init__(self, controller: DualAscent) -> None:
        self.controller = controller
        self.value = nn.Parameter(torch.tensor(float(controller.coef), dtype=torch.float64))
        self.optimizer = Optimizer([([self.value], controller.lr)], Rule(eps=1e-8), math.inf)

    @property
    def coef(self) -> float:
        return float(self.value.detach())

    def step(self, kl_max: Tensor) -> float:
        """One Adam step on coef (limit - safety max KL), coef kept >= 0; the new coef.                                     [arXiv 2312.05405]"""
        assert self.value.grad is not None
        self.value.grad.copy_(self.controller.kl_limit_nats - self.controller.safety * kl_max)
        self.optimizer.step()
        with torch.no_grad():
            self.value.clamp_(min=0.0)
        return self.coef

    def fix_up(self, agent: Agent, update: Update, rollout: Rollout, old: list[Tensor]) -> int:
        """Steps on coef KL alone, over the chunks with max KL > limit, until one sweep is clean; otherwise back to the old policy. Their number."""
        optimizer, steps = update.optimizer, 0
        for _ in range(self.controller.max_sweeps):
            clean = True
            for chunk in rollout.minibatches(update.solver.unit, self.controller.chunk, shuffle=False):
                value = old_new_kl(agent, chunk)
                worst = value.detach().max()
                if worst <= self.controller.kl_limit_nats:
                    continue
                clean, steps = False, steps + 1
                optimizer.zero_grad()
                (max(self.coef, 1e-3) * masked_mean(value, chunk.mask)).backward()
                optimizer.step(groups=1)  # the policy's; the critic has no say here
                self.step(worst)
            if clean:
                return steps
        with torch.no_grad():
            for p, start in zip(agent.parameters("policy"), old, strict=True):
                p.copy_(start)
        return steps
