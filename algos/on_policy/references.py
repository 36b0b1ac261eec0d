"""What becomes of the reference policy, and arithmetic on weights: averages, soups, spherical and linear interpolation.

Weights are lists of tensors in one order (`module.parameters()`), all from one initialisation; functions return new tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from markovia.agents.interface import Agent

Weights = Sequence[Tensor]


def lerp(start: Weights, end: Weights, *, eta: float) -> list[Tensor]:
    """(1 - eta) start + eta end: EMA step, soup, LITI. On logits it is the normalised geometric mean of the policies. [arXiv 2406.16768, eq. 4]"""
    return [torch.lerp(a, b.to(a), eta) for a, b in zip(start, end, strict=True)]


def slerp(start: Weights, first: Weights, second: Weights, *, fraction: float = 0.5) -> list[Tensor]:
    """Spherical interpolation of the task vectors d = theta - start, layer by layer.

    start + sin((1 - l) w)/sin(w) d1 + sin(l w)/sin(w) d2,  cos w = d1 d2 / (|d1| |d2|)                             [arXiv 2406.16768, eq. 3]
    Keeps the norm where the norms are equal; linear where the angle (or its distance from pi) is below 1e-4.
    """
    out = []
    for a, b, c in zip(start, first, second, strict=True):
        d1, d2 = b - a, c - a
        cosine = (d1 * d2).sum() / (d1.norm() * d2.norm()).clamp(min=1e-30)
        angle = torch.arccos(cosine.clamp(-1.0, 1.0))
        if float(angle) < 1e-4 or float(torch.pi - angle) < 1e-4 or not float(d1.norm() * d2.norm()) > 0:
            out.append(a + (1.0 - fraction) * d1 + fraction * d2)
        else:
            out.append(a + (torch.sin((1.0 - fraction) * angle) * d1 + torch.sin(fraction * angle) * d2) / torch.sin(angle))
    return out


def policy_weights(agent: Agent) -> list[nn.Parameter]:
    """The weights of an agent's policy, trained or not; a value network's are left out."""
    return [p for name in agent.policy_names if name in agent.net for p in agent.net[name].parameters()]


@torch.no_grad()
def mix(agent: Agent, other: Agent, *, share: float) -> None:
    """agent <- share agent + (1 - share) other, in place. Raises ValueError for policies of two architectures."""
    own, theirs = policy_weights(agent), policy_weights(other)
    if [p.shape for p in own] != [p.shape for p in theirs]:
        raise ValueError(f"a soup needs two policies of one architecture, got {len(own)} and {len(theirs)} tensors of different shapes")
    for p, w in zip(own, lerp(own, theirs, eta=1.0 - share), strict=True):
        p.copy_(w)


@torch.no_grad()
def put(module: nn.Module, weights: Weights) -> None:
    """Write weights into a module, in place."""
    for p, w in zip(module.parameters(), weights, strict=True):
        p.copy_(w)


@dataclass(frozen=True)
class Fixed:
    """The reference never changes."""


@dataclass(frozen=True)
class EMA:
    """theta_ref <- (1 - rate) theta_ref + rate theta after every iteration.                         [Xu 2024, arXiv 2404.10719]"""

    rate: float = 0.001

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"rate must lie in [0, 1] (1: the reference is the policy of the last iteration), got {self.rate}")


@dataclass(frozen=True)
class HardReset:
    """theta_ref <- theta and a fresh optimiser, every so many iterations or when the KL to the reference has grown too large. [arXiv 2505.24864]

    K resets after exact solves give p0 exp(K R / beta) / Z. The logged KL to the reference falls to 0 at a reset.
    """

    every: int = 100  # iterations
    kl_nats: float | None = None  # reset as soon as the mean KL of a response exceeds this

    def __post_init__(self) -> None:
        if self.every < 1 or (self.kl_nats is not None and not self.kl_nats > 0):
            raise ValueError(f"every must be >= 1 and kl_nats > 0, got {self.every} and {self.kl_nats}")


@dataclass(frozen=True)
class Soup:
    """theta_ref = share theta_start + (1 - share) theta_other, once, before the first iteration.                    [arXiv 2411.01798]

    The other supervised model comes to the driver as the reference named "other"; both must stem from one initialisation.
    """

    share: float = 0.5  # weight of the policy that training starts from

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")


Refresh = Fixed | EMA | HardReset | Soup
