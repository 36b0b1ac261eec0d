"""Advantage estimators: a record in, `adv` and `ret` (B, T) out; nothing here carries gradient.

Each slot value is callable as `advantage(reward, rollout) -> (adv, ret)`; `reward` (B, T) is the record's reward after penalties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from markovia.agents.records import Rollout


def gae(
    reward: Tensor, value: Tensor, continuation: Tensor, truncated: Tensor, boot_value: Tensor | None, *, gamma: float | Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with termination and truncation kept apart.

    delta_t = r_t + gamma c_t V'_t - V_t,   A_t = delta_t + gamma lam c_t (1 - trunc_t) A_{t+1},   ret = A + V        [arXiv 1506.02438, eq. 16]
    c = continuation; V'_t is V_{t+1}, or boot_value_t (value of the final observation) where truncated. A fractional c is the mean over coin
    flips that end the episode. All (B, T); gamma a number or (B, T).
    """
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    if boot_value is not None:
        next_value = torch.where(truncated, boot_value, next_value)
    flow = gamma * continuation
    delta = reward + flow * next_value - value
    decay = flow * lam * (~truncated).to(reward.dtype)
    adv = torch.empty_like(delta)
    last = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):  # the recursion is over time only; rows are one vector
        last = delta[:, t] + decay[:, t] * last
        adv[:, t] = last
    return adv, adv + value


def leave_one_out(returns: Tensor, group: Tensor) -> Tensor:
    """R_i - mean of the other returns of the group, (B,).            [Kool 2019; Ahmadian 2024, arXiv 2402.14740]

    Raises ValueError for a group of one: it has no baseline.
    """
    _, index = torch.unique(group, return_inverse=True)
    size = torch.zeros(int(index.max()) + 1, dtype=returns.dtype, device=returns.device).index_add_(0, index, torch.ones_like(returns))
    if (size < 2).any():
        raise ValueError("leave-one-out needs at least 2 responses per prompt, got a group of 1; raise group_size")
    total = torch.zeros_like(size).index_add_(0, index, returns)
    n = size[index]
    return returns - (total[index] - returns) / (n - 1)


def normalise(adv: Tensor, mask: Tensor) -> Tensor:
    """(A - mean) / (std + 1e-8) over mask, std with divisor n - 1; a single decision is left as it is."""
    m = mask.to(adv.dtype)
    n = m.sum()
    mean = (adv * m).sum() / n.clamp(min=1)
    var = ((adv - mean).square() * m).sum() / (n - 1).clamp(min=1)
    return torch.where(n > 1, (adv - mean) / (var.sqrt() + 1e-8), adv)


@dataclass(frozen=True)
class GAE:
    """Discounted TD errors, exponentially averaged; needs a critic."""

    gamma: float = 0.99  # discount per decision
    lam: float = 0.95  # exponential average over horizons; 1 is Monte Carlo minus V
    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0.0 <= self.gamma <= 1.0 and 0.0 <= self.lam <= 1.0):
            raise ValueError(f"gamma and lam must lie in [0, 1], got gamma={self.gamma}, lam={self.lam}")

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        assert rollout.value is not None
        gamma = self.gamma if rollout.discount is None else rollout.discount
        boot = None if rollout.boot_value is None else rollout.boot_value[..., 0]
        return gae(reward, rollout.value[..., 0], rollout.continuation, rollout.truncated, boot, gamma=gamma, lam=self.lam)


def _row_returns(reward: Tensor, rollout: Rollout) -> Tensor:
    """(B,) sums, checked: each row must hold exactly one episode."""
    last = rollout.valid & ~torch.cat([rollout.valid[:, 1:], torch.zeros_like(rollout.valid[:, :1])], dim=1)
    ends = (rollout.continuation == 0) & rollout.valid
    if not torch.equal(ends, last):
        raise ValueError(
            "this advantage treats a row as one whole response, but the rows hold cut or several episodes; "
            "set num_steps to the episode's length, or use GAE"
        )
    return (reward * rollout.valid).sum(dim=1)


@dataclass(frozen=True)
class LeaveOneOut:
    """The whole row is one action; the baseline is the mean of the other rows of its group."""

    needs_critic: ClassVar[bool] = False

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        returns = _row_returns(reward, rollout)
        group = rollout.group if rollout.group is not None else torch.zeros(len(returns), dtype=torch.long, device=returns.device)
        adv = leave_one_out(returns, group)[:, None].expand_as(reward)
        return adv, returns[:, None].expand_as(reward)


@dataclass(frozen=True)
class MovingBaseline:
    """REINFORCE: the baseline is the mean of the returns of all earlier batches (0 before the first)."""

    needs_critic: ClassVar[bool] = False

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        returns = _row_returns(reward, rollout)
        baseline, n = state.get("baseline", 0.0), state.get("batches", 0)
        state["baseline"], state["batches"] = (baseline * n + float(returns.mean())) / (n + 1), n + 1
        return (returns - baseline)[:, None].expand_as(reward), returns[:, None].expand_as(reward)


@dataclass(frozen=True)
class BatchReturn:
    """DDPO: the row's return, standardised over the batch and clipped, the same for all its decisions.     [arXiv 2305.13301]"""

    scale: bool = True  # divide by the batch's standard deviation
    clip: float = 5.0  # bound on the absolute advantage
    reward_to_go: bool = False  # from each decision on, against the batch's mean of that step; exact for penalties inside the reward
    needs_critic: ClassVar[bool] = False

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        returns = _row_returns(reward, rollout)[:, None].expand_as(reward)
        if self.reward_to_go:
            returns = (reward * rollout.valid).flip(1).cumsum(1).flip(1)
        adv = returns - returns.mean(dim=0, keepdim=True)
        if self.scale:
            adv = adv / (returns.std(dim=0, keepdim=True) + 1e-8)
        return adv.clamp(-self.clip, self.clip), returns


Advantage = GAE | LeaveOneOut | MovingBaseline | BatchReturn
