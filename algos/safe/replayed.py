"""Cost limits for a learner from a replay: critics of the cost say what the present policy costs, long before its episodes do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import Critics
from markovia.algos.safe.constraint import Constraint, Mix, checked_cost, discounted_limit
from markovia.algos.safe.dual import Dual, TrustRegionDual, log_augmented
from markovia.algos.safe.handler import ConstraintHandler
from markovia.algos.safe.termination import soften


@dataclass(frozen=True)
class ReplayConstraint(Constraint):
    """max J(pi) subject to J_c^i(pi) <= cost_limit_i, the violation measured by an ensemble of cost critics on replayed actions.

    A critic's cost is discounted, so the limit of an episode becomes D(d, gamma, T) (`discounted_limit`). With estimator="episodes" the violation
    is that of finished episodes, in cost per episode, and the multiplier moves once an iteration; with "critic" it moves with every update.
    `shield` and `optimistic` belong to the on-policy loop.
    """

    dual: Dual = field(default_factory=log_augmented)
    mix: Mix = "plain"  # "sum" divides the actor's whole objective by 1 + weights
    critic: Critics = field(default_factory=lambda: Critics(num=4))  # of each cost; `coef` weighs its loss
    conservatism: float = 0.5  # k: standard deviations of the ensemble above its mean
    estimator: Literal["critic", "episodes"] = "critic"
    horizon: int | None = None  # T, steps of an episode; None: the mean length of those that ended, no multiplier moves before the first

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.dual, TrustRegionDual):
            raise ValueError("TrustRegionDual belongs to natural-gradient steps (cpo); a learner from a replay takes a PIDDual")
        if self.mix == "difference":
            raise ValueError("mix='difference' is not offered for learners from a replay; use 'plain' or 'sum'")
        if self.shield is not None or self.optimistic:
            raise ValueError("shield and optimistic are parts of the on-policy loop (acs/ppo, reload/ppo); a learner from a replay reads neither")
        if self.conservatism < 0 or (self.conservatism > 0 and self.critic.num < 2):
            raise ValueError(f"conservatism must be >= 0, and a spread needs 2 critics, got {self.conservatism} with critic.num={self.critic.num}")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon must be >= 1 or None, got {self.horizon}")


class ReplayHandler(ConstraintHandler):
    """One per run: `prepare` each minibatch, `observe` what the cost critics said of it, `measure` the episodes that ended in an iteration."""

    constraint: ReplayConstraint

    def __init__(self, constraint: ReplayConstraint, gamma: float) -> None:
        super().__init__(constraint, gamma)
        self.gamma = gamma

    @property
    def discounted_limits(self) -> np.ndarray | None:
        """(m,) limits of the critics' discounted costs, what learning aims at; None while nobody knows how long an episode is."""
        horizon = self.constraint.horizon
        if horizon is None:
            if np.isnan(self.cost[0]):
                return None
            horizon = max(1, round(self.horizon))
        return np.asarray(discounted_limit(self.constraint.aims, self.gamma, horizon, self.constraint.cost_gamma))

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """The minibatch with the weights as its column `cost_weight` (b, m), and softly terminated where the constraint does that.

        Raises ValueError where the transitions hold no cost, another number of them, or NaN.
        """
        cost = checked_cost(batch.extra.get("cost"), self.constraint.num_costs)
        weight = torch.as_tensor(self.weight).to(cost).repeat(len(cost), 1)
        batch = replace(batch, extra={**batch.extra, "cost_weight": weight})
        if self.constraint.termination is None:
            return batch
        delta, self.scale = self.constraint.termination.delta(cost[:, None], self.scale, progress)
        reward, continuation = soften(batch.reward, batch.continuation, delta[:, 0])
        return replace(batch, reward=reward, continuation=continuation)

    def observe(self, discounted_cost: Sequence[float]) -> None:
        """New weights from the critics' mean cost (m,) of the minibatch."""
        limit = self.discounted_limits
        if self.constraint.estimator == "critic" and limit is not None:
            self.dual_state, self.weight = self.constraint.dual.update(self.dual_state, discounted_cost, limit)
