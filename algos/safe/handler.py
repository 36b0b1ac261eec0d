"""What a loop keeps of its constraint from one iteration to the next: measure the cost, price it, mix the advantages."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.agents.records import Rollout
from markovia.algos.advantages import Advantage, BatchReturn, ConflictAware, Consistency, Greedy, GroupNormalised
from markovia.algos.safe.constraint import Constraint, centred, checked_cost, effective_horizon, mix_advantages
from markovia.algos.safe.dual import FixedDual, TrustRegionDual
from markovia.algos.safe.termination import soften

PATIENCE = 50  # measured iterations in a row above the limit, after which a user is told


class ConstraintHandler:
    """One per run. Each iteration: `measure` (new weight), `soften` (constraints as terminations), `mix` (advantages), in this order.

    Cost critics learn the discounted cost times 1 - gamma, a mean cost per step: costs of 1 a step would else reach 1 / (1 - gamma) and drown the
    reward's critic. Advantages are brought back to the cost's own unit, in which the limit is given.
    """

    def __init__(self, constraint: Constraint, gamma: float) -> None:
        self.constraint, self.unit = constraint, 1.0 - gamma if gamma < 1 else 1.0
        m = constraint.num_costs
        self.dual_state = constraint.dual.start(m)
        self.weight = self.weight_before = constraint.dual.initial(m)  # now, and in the iteration before
        self.cost = np.full(m, np.nan)  # last measured, nan before the first episode has ended
        self.horizon = 1.0  # mean length of the episodes that it was measured on
        self.above = 0  # measured iterations in a row with a violation
        self.scale: Tensor | None = None
        self.advantage_states: list[dict[str, Any]] = [{} for _ in range(m)]

    @classmethod
    def for_agent(cls, constraint: Constraint, advantage: Advantage, agent: Any) -> ConstraintHandler:
        """Raises ValueError when the agent's critic has not one column for each cost."""
        columns = getattr(agent, "num_costs", 0)
        if advantage.needs_critic and columns != constraint.num_costs:
            raise ValueError(
                f"{constraint.num_costs} cost limit(s) need as many cost columns in the critic, this {agent.kind} agent has {columns}; "
                "build it with num_costs equal to the number of limits, or choose an advantage without a critic"
            )
        return cls(constraint, float(getattr(advantage, "gamma", 1.0)))

    @property
    def step_violation(self) -> float | None:
        """What CPO's step must make up for, margin included, in the cost surrogate's unit (a mean per step, so that of a discounted episode cost an
        even stream); None for other duals and before any episode ended."""
        if not isinstance(self.constraint.dual, TrustRegionDual) or np.isnan(self.cost[0]):
            return None
        steps = effective_horizon(self.constraint.cost_gamma, self.horizon)
        return float(self.cost[0] - self.constraint.aims[0] + self.dual_state["margin"][0]) / steps

    @property
    def violation(self) -> np.ndarray:
        """(m,) cost - limit per episode; nan before anything was measured."""
        return self.cost - self.constraint.limits

    def measure(self, costs: Sequence[Sequence[float]], lengths: Sequence[int], move: bool = True) -> None:
        """Update the weight from the costs (k, m) and lengths (k,) of the episodes that have just finished; without any, nothing moves.

        With move=False the costs are only noted: the weight follows another estimate.
        """
        self.weight_before = self.weight
        if not len(costs):
            return
        self.cost = np.asarray(costs, dtype=np.float64).mean(0)
        self.horizon = float(np.mean(lengths))
        if move:
            self.dual_state, self.weight = self.constraint.dual.update(self.dual_state, self.cost, self.constraint.aims)
        # An unpaid or terminating constraint makes no promise about the limit.
        self.above = self.above + 1 if (self.violation > 0).any() and not isinstance(self.constraint.dual, FixedDual) else 0
        if self.above == PATIENCE:
            warnings.warn(
                f"the cost has stayed above its limit for {PATIENCE} iterations in a row: measured {np.round(self.cost, 3).tolist()}, limit "
                f"{self.constraint.limits.tolist()}. Either learning needs longer, or no policy meets the limit: look at the least cost that "
                "training for low cost alone reaches, and raise cost_limit above it",
                RuntimeWarning,
                stacklevel=2,
            )

    def soften(self, rollout: Rollout, reward: Tensor, progress: float) -> Tensor:
        """Checks the record's costs; with soft termination, cuts its continuation by 1 - delta and returns the reward times 1 - delta."""
        cost = checked_cost(rollout.cost, self.constraint.num_costs)
        if self.constraint.termination is None:
            return reward
        delta, self.scale = self.constraint.termination.delta(cost, self.scale, progress)
        reward, rollout.continuation = soften(reward, rollout.continuation, delta)
        return reward

    def mix(self, rollout: Rollout, adv: Tensor, advantage: Advantage, before: bool = False) -> Tensor:
        """The advantage (B, T) to improve on; the record gets `cost_adv` (B, T, m), centred, and the cost critics' targets `cost_ret`.

        `before` mixes with the weights of the iteration before, and leaves what the estimators keep between batches as it is.
        """
        assert rollout.cost is not None
        estimator, states = cost_estimator(advantage), copy.deepcopy(self.advantage_states) if before else self.advantage_states
        pairs = [estimator(rollout.cost[..., i] * self.unit, _column(rollout, 1 + i), state) for i, state in enumerate(states)]
        cost_adv = centred(torch.stack([a for a, _ in pairs], -1) / self.unit, rollout.mask)
        rollout.columns["cost_adv"] = cost_adv
        if advantage.needs_critic:
            rollout.columns["cost_ret"] = torch.stack([r for _, r in pairs], -1)
        weight = torch.as_tensor(self.weight_before if before else self.weight, device=adv.device)
        return mix_advantages(adv, cost_adv, weight, self.constraint.mix)

    def describe(self) -> dict[str, float]:
        """What is logged: weight and violation, one entry per cost."""
        names = [""] if self.constraint.num_costs == 1 else [f"/{i}" for i in range(self.constraint.num_costs)]
        out = {f"cost_weight{n}": float(w) for n, w in zip(names, self.weight, strict=True)}
        if np.isfinite(self.cost).all():
            out |= {f"violation{n}": float(v) for n, v in zip(names, self.violation, strict=True)}
        return out

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "dual": self.dual_state,
            "weight": self.weight.tolist(),
            "weight_before": self.weight_before.tolist(),
            "cost": [None if np.isnan(c) else c for c in self.cost.tolist()],
            "horizon": self.horizon,
            "above": self.above,
            "scale": None if self.scale is None else self.scale.tolist(),
            "advantage_states": self.advantage_states,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put `state()` back."""
        self.dual_state, self.weight, self.weight_before = state["dual"], np.array(state["weight"]), np.array(state["weight_before"])
        self.cost = np.array([np.nan if c is None else c for c in state["cost"]])
        self.horizon, self.above, self.advantage_states = state["horizon"], state["above"], state["advantage_states"]
        self.scale = None if state["scale"] is None else torch.tensor(state["scale"], dtype=torch.float64)


def cost_estimator(advantage: Advantage) -> Advantage:
    """The method's estimator as it serves costs, whose advantages keep their unit (`centred`): not divided by a deviation, not clipped, and without
    what it makes of the reward alone (entropies, agreement of answers, the greedy response's reward)."""
    if isinstance(advantage, BatchReturn):
        return replace(advantage, scale=False, clip=math.inf)
    if isinstance(advantage, GroupNormalised | Consistency | ConflictAware):
        return GroupNormalised(scale="none")
    return BatchReturn(scale=False, clip=math.inf, reward_to_go=True) if isinstance(advantage, Greedy) else advantage


def finished(collector: Any) -> tuple[Sequence[Sequence[float]], Sequence[int]]:
    """Costs (k, m) and lengths (k,) of the episodes that a collector has seen end since they were last read; none where the task has no costs."""
    costs = getattr(collector, "episode_costs", ())
    return costs, list(getattr(collector, "episode_lengths", ()))[-len(costs) :]


def drain_costs(collector: Any) -> dict[str, float]:
    """{"cost": mean total cost of the finished episodes}, which are forgotten; nothing where none has ended."""
    costs = getattr(collector, "episode_costs", None)
    if not costs:
        return {}
    mean = sum(map(sum, costs)) / len(costs)
    costs.clear()
    collector.episode_lengths.clear()
    return {"cost": mean}


def _column(rollout: Rollout, i: int) -> Rollout:
    """The record as it looks to an estimator of column i: that value and boot value come first."""
    pick = lambda x: None if x is None else x[..., i : i + 1]  # noqa: E731
    return replace(rollout, value=pick(rollout.value), boot_value=pick(rollout.boot_value))
