"""How the weight beta of the divergence to the reference changes over training: pure functions, called once per iteration.

    beta0         weight that the method names                 progress in [0, 1]  fraction of the budget that is spent
    kl_nats       measured KL to the reference, mean over responses of the sum over tokens
"""

from __future__ import annotations

from dataclasses import dataclass


def adaptive(beta: float, kl_nats: float, *, kl_target_nats: float, horizon: float, num_samples: int, limit: float = 0.2) -> float:
    """Proportional control of the KL in log space: beta <- beta (1 + e n / horizon), e = clip(KL / target - 1, -limit, limit).

    n responses since the last change; the KL is that of whole responses, not the mean per token.                   [arXiv 1909.08593, section 2.2]
    """
    error = min(max(kl_nats / kl_target_nats - 1.0, -limit), limit)
    return beta * (1.0 + error * num_samples / horizon)


def down_then_up(progress: float, *, low: float, high: float, turn: float) -> float:
    """Explore first: from the middle m = (low + high) / 2 down to `low` at `turn`, then up to `high` at the end, linearly.

    beta(s) = m - (m - low) s / w for s <= w,  low + (high - low) (s - w) / (n - w) after                          [arXiv 2503.16081, eqs. 3-5]
    with s / n = progress, w / n = turn.
    """
    middle = 0.5 * (low + high)
    if progress <= turn:
        return middle - (middle - low) * progress / turn
    return low + (high - low) * (progress - turn) / (1.0 - turn)


def linear(progress: float, *, start: float, end: float) -> float:
    """start + (end - start) progress: annealed distillation.                                                        [arXiv 2506.02208]"""
    return start + (end - start) * progress


@dataclass(frozen=True)
class Steady:
    """beta stays."""

    def start(self, beta: float) -> float:
        return beta

    def after(self, beta: float, beta0: float, progress: float, kl_nats: float, num_samples: int) -> float:
        return beta


@dataclass(frozen=True)
class AdaptiveKL:
    """beta follows the measured KL to a target."""

    kl_target_nats: float = 6.0  # of whole responses
    horizon: float = 10_000.0  # responses over which beta can change by the factor 1 + limit
    limit: float = 0.2  # bound of the relative error

    def __post_init__(self) -> None:
        if not (self.kl_target_nats > 0 and self.horizon > 0 and self.limit > 0):
            raise ValueError(f"kl_target_nats, horizon and limit must be > 0, got {self.kl_target_nats}, {self.horizon} and {self.limit}")

    def start(self, beta: float) -> float:
        return beta

    def after(self, beta: float, beta0: float, progress: float, kl_nats: float, num_samples: int) -> float:
        rule = {"kl_target_nats": self.kl_target_nats, "horizon": self.horizon, "limit": self.limit}
        return adaptive(beta, kl_nats, num_samples=num_samples, **rule)


@dataclass(frozen=True)
class DownThenUp:
    """beta starts in the middle of [low, high], falls to low, and rises to high; the divergence's own beta is not read."""

    low: float = 0.04
    high: float = 0.1
    turn: float = 0.3  # fraction of the budget at which beta is lowest

    def __post_init__(self) -> None:
        if not (0.0 <= self.low <= self.high and 0.0 < self.turn < 1.0):
            raise ValueError(f"expected 0 <= low <= high and 0 < turn < 1, got low={self.low}, high={self.high}, turn={self.turn}")

    def start(self, beta: float) -> float:
        return down_then_up(0.0, low=self.low, high=self.high, turn=self.turn)

    def after(self, beta: float, beta0: float, progress: float, kl_nats: float, num_samples: int) -> float:
        return down_then_up(progress, low=self.low, high=self.high, turn=self.turn)


@dataclass(frozen=True)
class Anneal:
    """beta goes linearly from the divergence's own to `end`."""

    end: float = 0.0  # beta when the budget is spent

    def __post_init__(self) -> None:
        if self.end < 0:
            raise ValueError(f"end is a weight and must be >= 0, got {self.end}")

    def start(self, beta: float) -> float:
        return beta

    def after(self, beta: float, beta0: float, progress: float, kl_nats: float, num_samples: int) -> float:
        return linear(progress, start=beta0, end=self.end)


BetaSchedule = Steady | AdaptiveKL | DownThenUp | Anneal
