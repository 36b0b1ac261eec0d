"""The anchor over time, and where responses come from: slots of the preference loop, and the pure functions behind them.

The anchor `ref` is what scores are compared with; `old` is the policy that sampled the round's responses; `target` follows the policy at a distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from markovia.algos.preference.scores import positive


def soft_sync(anchor: Tensor, policy: Tensor, *, rate: float) -> Tensor:
    """TR-DPO: th_ref <- rate th + (1 - rate) th_ref in weight space; rate 1 is a hard sync.                              [arXiv 2404.09656]"""
    return torch.lerp(anchor, policy.to(anchor), rate)


def extrapolate(new: Tensor, previous: Tensor, *, momentum: float) -> Tensor:
    """Accelerated PO: th_(t+1) = th^_(t+1) + a (th^_(t+1) - th^_t), th^ the iterates before momentum.                    [arXiv 2410.06293]

    On weights or logits; on log-probs it is pi ~ pi^_(t+1) (pi^_(t+1) / pi^_t)^a and needs a log-softmax after it.
    """
    return new + momentum * (new - previous)


def mixture_logits(logits: Tensor, logits_ref: Tensor, *, mix: float) -> Tensor:
    """IPO-MD's sampler, token by token: pi_mix ~ pi^(1 - b) ref^b.                                                       [arXiv 2403.08635]"""
    return (1.0 - mix) * torch.log_softmax(logits, -1) + mix * torch.log_softmax(logits_ref, -1)


@dataclass(frozen=True)
class Frozen:
    """The anchor is the policy that training started from."""


@dataclass(frozen=True)
class Sync:
    """The anchor's weights move towards the policy's every so many steps."""

    rate: float = 0.6  # 1: hard
    every: int = 512  # optimiser steps

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0 or self.every < 1:
            raise ValueError(f"rate must lie in (0, 1] and every be >= 1, got rate={self.rate}, every={self.every}")


@dataclass(frozen=True)
class EachRound:
    """When a round (or a stage of the data) ends, the policy becomes the anchor."""


@dataclass(frozen=True)
class Extrapolated:
    """As EachRound, the new policy and anchor being extrapolated beyond the fitted one."""

    momentum: float = 0.3  # a; the log-ratio grows by 1 / (1 - a) per round in the end

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}; at 1 and above the extrapolation diverges")


Reference = Frozen | Sync | EachRound | Extrapolated


@dataclass(frozen=True)
class Dataset:
    """Responses of the data."""


@dataclass(frozen=True)
class FromPolicy:
    """Responses of the present policy, labelled by a judge."""

    per_prompt: int = 2

    def __post_init__(self) -> None:
        positive(per_prompt=self.per_prompt)


@dataclass(frozen=True)
class FromMixture:
    """Responses of pi^(1 - b) ref^b, token by token."""

    mix: float = 0.5  # b
    both: bool = True  # False: the first response is the policy's own (Nash-MD)

    def __post_init__(self) -> None:
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"mix must lie in [0, 1], got {self.mix}")


Sampler = Dataset | FromPolicy | FromMixture
