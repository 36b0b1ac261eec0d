"""The constraint slot: limits in cost per episode, the multiplier, how reward and cost advantages mix, and soft termination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from markovia.algos.safe.dual import Dual, FixedDual, TrustRegionDual, gradient
from markovia.algos.safe.termination import SoftTermination
from markovia.envs.registry import kind_of

Mix = Literal["sum", "plain", "difference"]


def limits(cost_limit: float | Sequence[float]) -> np.ndarray:
    """(m,) limits. Raises ValueError for none, for a negative and for NaN."""
    out = np.atleast_1d(np.asarray(cost_limit, dtype=np.float64))
    if out.ndim != 1 or not len(out):
        raise ValueError(f"cost_limit must be a number, or one number per cost, got {cost_limit!r}")
    if not (out >= 0).all():
        raise ValueError(f"cost_limit must be >= 0, got {cost_limit}; costs are >= 0, so that no policy meets a lower limit")
    return out


def effective_horizon(gamma: float, horizon: float) -> float:
    """What a cost of 1 a step comes to, in steps: H(gamma, T) = sum_{t<T} gamma^t = (1 - gamma^T) / (1 - gamma); T for gamma = 1."""
    if not (0 <= gamma <= 1 and horizon >= 1):
        raise ValueError(f"expected gamma in [0, 1] and horizon >= 1, got gamma={gamma}, horizon={horizon}")
    return horizon if gamma == 1 else (1 - gamma**horizon) / (1 - gamma)


def discounted_limit(limit: float | np.ndarray, gamma: float, horizon: int, cost_gamma: float = 1.0) -> float | np.ndarray:
    """The limit of an episode, itself one of a cost discounted by cost_gamma, as a limit of the discounted cost, for an even stream of cost.

    D(d, gamma, T) = d H(gamma, T) / H(cost_gamma, T); d itself where both discounts are the same
    """
    return limit * (effective_horizon(gamma, horizon) / effective_horizon(cost_gamma, horizon))


def mix_advantages(adv: Tensor, cost_adv: Tensor, weight: Tensor, how: Mix = "sum") -> Tensor:
    """One advantage of reward and costs; adv (B, T), cost_adv (B, T, m), weight (m,) >= 0.

    sum         (A_r - sum_i w_i A_i) / (1 + sum_i w_i)      keeps the size of a step as the weights grow
    plain       A_r - sum_i w_i A_i
    difference  (1 - sum_i w_i) A_r - sum_i w_i A_i          needs sum_i w_i <= 1
    Raises ValueError for another name, for negative weights, and for `difference` with a sum over 1.
    """
    if (weight < 0).any():
        raise ValueError(f"weights must be >= 0, got {weight.tolist()}; a negative one would reward cost")
    total, priced = weight.sum(), cost_adv @ weight.to(cost_adv)
    if how == "sum":
        return (adv - priced) / (1.0 + total)
    if how == "plain":
        return adv - priced
    if how == "difference":
        if total > 1:
            raise ValueError(f"mix='difference' needs weights that sum to at most 1, got {float(total)}; set the dual's weight_max=1")
        return (1.0 - total) * adv - priced
    raise ValueError(f"mix must be 'sum', 'plain' or 'difference', got {how!r}")


def optimistic_advantage(adv: Tensor, before: Tensor) -> Tensor:
    """2 A_k - A_{k-1}, (B, T): A_k as it will be next if it changes as it just did; `before` is what the critic and the weights of the iteration
    before say of the same batch.                                                                                          [arXiv 2302.01275]"""
    return 2.0 * adv - before


@dataclass(frozen=True)
class ChanceShield:
    """Actions on their way to the environment are moved until they spend no more than a share of the state's chance to stay safe (acs)."""

    alpha: float = 0.8  # share of the safety margin that one step may spend
    epsilon: float = 0.3  # tolerated chance of an unsafe episode, in the end
    epsilon_first: float = 4.0  # at the start; above 1 nothing is moved
    epsilon_fall: float = 0.3  # fall per iteration
    step: float = 0.05  # of a correction, the Box reaching from -1 to 1
    iterations: int = 20  # corrections at most
    hidden: tuple[int, ...] = (64, 64)  # widths of both networks
    lr: float = 1e-3
    memory: int = 50_000  # steps of finished episodes, the newest, that both networks learn from
    epochs: int = 5  # of V_s, each over as many steps as have just finished; A_s takes twice as many
    minibatch: int = 256

    def __post_init__(self) -> None:
        if not (0 < self.alpha <= 1 and 0 <= self.epsilon <= 1 and self.epsilon_fall >= 0 and self.step > 0):
            raise ValueError(f"expected alpha in (0, 1], epsilon in [0, 1], epsilon_fall >= 0 and step > 0, got {self}")
        if min(self.iterations, self.epochs, self.minibatch, self.memory) < 1 or not self.lr > 0:
            raise ValueError(f"iterations, epochs, minibatch and memory must be >= 1 and lr > 0, got {self}")


def centred(cost_adv: Tensor, mask: Tensor) -> Tensor:
    """Cost advantages (B, T, m) minus their mean over mask, each column. Not divided by a deviation: that would make the multiplier's unit
    depend on the batch."""
    m = mask.to(cost_adv.dtype)[..., None]
    return cost_adv - (cost_adv * m).sum((0, 1)) / m.sum().clamp(min=1.0)


@dataclass(frozen=True)
class Constraint:
    """max J(pi) subject to J_c^i(pi) <= cost_limit_i for every cost column i.

    J_c is measured as the mean over the episodes that finished since the last iteration. Cost advantages come from the method's own advantage
    estimator without its scale, on one critic column per cost. Raises ValueError for a negative limit.
    """

    cost_limit: tuple[float, ...] = (25.0,)  # what an episode may cost, one number per cost of info["cost"]; a plain number is taken as one
    aim: float = 1.0  # share of the limit that learning aims at; below 1 leaves room for the noise of sampled costs
    dual: Dual = field(default_factory=gradient)
    mix: Mix = "sum"
    cost_gamma: float = 1.0  # discount of the measured episode cost, in which the limit is given; 1: the plain sum
    termination: SoftTermination | None = None
    shield: ChanceShield | None = None  # moves actions of a Box on their way to the environment while learning
    optimistic: bool = False  # improve on 2 A_k - A_{k-1}, A_{k-1} the mixed advantage by the critic and weights of the iteration before (ReLOAD)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cost_limit", tuple(limits(self.cost_limit).tolist()))
        if not 0 < self.aim <= 1:
            raise ValueError(f"aim is a share of the limit in (0, 1], got {self.aim}")
        if not 0 <= self.cost_gamma <= 1:
            raise ValueError(f"cost_gamma must lie in [0, 1], got {self.cost_gamma}")
        if self.shield is not None and self.cost_gamma < 1:
            raise ValueError(f"a shield learns from episodes whose plain sum of costs meets the limit; set cost_gamma=1, got {self.cost_gamma}")
        if self.termination is not None and not isinstance(self.dual, FixedDual):
            raise ValueError("constraints as terminations need no multiplier: set dual=FixedDual(0.0)")
        if isinstance(self.dual, TrustRegionDual) and self.optimistic:
            raise ValueError("CPO mixes no advantages, so none can be optimistic; set dual=optimistic(lr), a PIDDual")
        if isinstance(self.dual, TrustRegionDual) and self.num_costs > 1:
            raise ValueError(f"CPO's closed form serves one cost, but {self.num_costs} limits are set; use a PIDDual")

    @property
    def limits(self) -> np.ndarray:
        """(m,)."""
        return np.array(self.cost_limit)

    @property
    def aims(self) -> np.ndarray:
        """(m,) what learning aims at: `aim` of each limit."""
        return self.aim * self.limits

    @property
    def num_costs(self) -> int:
        return len(self.cost_limit)


def check_task_limit(constraint: Constraint | None, env_id: str, env_kwargs: dict[str, Any]) -> None:
    """Raises ValueError where the task's arguments name another limit than the learner keeps to (`limit` is what the tabular tasks call it).

    Of several limits nobody knows which one is meant.
    """
    name = "limit" if kind_of(env_id) == "tabular" else "cost_limit"
    if constraint is None or constraint.num_costs > 1 or name not in env_kwargs:
        return
    told, kept = float(env_kwargs[name]), constraint.cost_limit[0]
    if told != kept:
        raise ValueError(
            f"the task is given {name}={told:g}, but the learner keeps to the limit of its constraint, {kept:g}; give both the same number: "
            f"--constraint.cost-limit {told:g}, or leave {name} out"
        )


def checked_cost(cost: Tensor | None, num_costs: int) -> Tensor:
    """The record's cost column (B, T, m). Raises ValueError when the environment told none, another number of them, or NaN."""
    if cost is None:
        raise ValueError(
            "a constraint needs a cost, but the environment puts no 'cost' into info; use a task with one (`markovia envs` lists Safe... ids), "
            "or write the step's cost to info['cost']"
        )
    if cost.shape[-1] != num_costs:
        raise ValueError(f"info['cost'] has {cost.shape[-1]} column(s) but {num_costs} limit(s) are set; give one cost_limit per cost")
    if not torch.isfinite(cost).all():
        raise ValueError("info['cost'] holds NaN or infinity; costs must be finite numbers")
    return cost
