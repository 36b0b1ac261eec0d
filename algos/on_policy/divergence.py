"""Divergence to a reference: three estimators of one log-ratio, and where they enter.

    d (b, t)  log pi - log ref of the sampled action, nats
In the reward (detached) only k1 has the optimum ref exp(R / beta) / Z over whole sequences; as a loss k1 has gradient 0, k2 that of KL(pi||ref)
per state and k3 that of KL(ref||pi). Value and gradient of an estimator are different things; the value of k3 is what is logged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def k1(d: Tensor) -> Tensor:
    """d: unbiased, can be negative."""
    return d


def k2(d: Tensor) -> Tensor:
    """d^2 / 2: biased in value; as a loss its expected gradient on-policy is grad KL(pi || ref) of the state."""
    return 0.5 * d.square()


def k3(d: Tensor) -> Tensor:
    """exp(-d) + d - 1 >= 0: unbiased in value; as a loss its expected gradient on-policy is grad KL(ref || pi) of the state."""
    return torch.expm1(-d) + d


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class KL:
    """Penalty beta k(d) against the frozen reference policy."""

    beta: float = 0.05  # strength, reward units per nat
    estimator: Literal["k1", "k2", "k3", "exact"] = "k1"  # which estimator of d; "exact": KL(pi || ref) of the action distributions
    place: Literal["reward", "loss"] = "reward"  # subtracted from the reward (detached) or added to the loss

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("k1 as a loss has zero expected gradient; use estimator='k2' (KL to the reference) or place='reward'")
        if self.place == "reward" and self.estimator == "exact":
            raise ValueError("the exact KL is a penalty on the loss; use place='loss', or estimator='k1' in the reward")

    def penalty(self, d: Tensor) -> Tensor:
        return self.beta * ESTIMATORS[self.estimator](d)


@dataclass(frozen=True)
class Fixed:
    """The reference never changes."""


@dataclass(frozen=True)
class EMA:
    """theta_ref <- (1 - rate) theta_ref + rate theta after every iteration.                         [Xu 2024, arXiv 2404.10719]"""

    rate: float = 0.001


Refresh = Fixed | EMA
