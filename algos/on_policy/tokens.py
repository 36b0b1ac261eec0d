"""Token weights: which decisions count how much, from statistics of the whole minibatch; pure functions on tensors, no gradient.

    logp (b, t)  nats, current policy      logp_old (b, t)  sampling policy      adv (b, t)      mask (b, t) bool
    entropy (b, t)  of the action distribution, nats

A rule is called with a whole minibatch before its loss is taken in pieces, and gives columns of the record: `weight` multiplies the surrogate's
term, `selected` (bool) says where the divergence applies. Selections are ranks, so nothing depends on values in Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from markovia.agents.interface import Evaluation
from markovia.agents.records import Rollout, masked_mean
from markovia.algos.on_policy.divergence import summed


def covariance(logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """cov_t = (A_t - mean A)(l_t - mean l), each sample's part of the covariance that lowers the entropy, (b, t).    [arXiv 2505.22617, eq. 8]"""
    return (adv - masked_mean(adv, mask)) * (logp - masked_mean(logp, mask))


def rank(score: Tensor, among: Tensor) -> Tensor:
    """Place of each entry by falling score among those of `among` (b, t) bool, 0 first; entries outside come last. (b, t) int64."""
    flat = score.masked_fill(~among, -torch.inf).reshape(-1)
    return flat.argsort(descending=True, stable=True).argsort(stable=True).view(score.shape)


def how_many(rate: float, among: Tensor) -> Tensor:
    """max(1, floor(rate n)), n the entries of `among`; () int64."""
    return (rate * among.sum()).floor().long().clamp(min=1)


def entropy_change(logp: Tensor, logp_old: Tensor, adv: Tensor, entropy: Tensor) -> Tensor:
    """Omega = A / b(a) * p (1 - p) (log p + H): the estimated change of the entropy that a token's update makes, (b, t). [arXiv 2510.10150, eq. 9]

    On-policy it lacks the factor p of an exact softmax step, so it weighs rare tokens more.
    """
    p = logp.exp()
    return adv * (-logp_old).exp() * p * (1.0 - p) * (logp + entropy)


def damped(omega: Tensor, mask: Tensor, *, w_min: float, floor: float = 0.02) -> Tensor:
    """w = exp(-k |Omega|), k = -log(w_min) / max(max |Omega|, floor), in [w_min, 1]; (b, t).                        [arXiv 2510.10150, eq. 11]

    Also damps tokens that raise the entropy, and one outlier sets the scale.
    """
    size = omega.abs()
    largest = size.masked_fill(~mask, 0.0).max().clamp(min=floor)
    return torch.exp(size * (torch.log(torch.tensor(w_min, dtype=omega.dtype, device=omega.device)) / largest)).clamp(w_min, 1.0)


def conflict_weights(action: Tensor, adv: Tensor, mask: Tensor, group: Tensor, *, boost: float) -> Tensor:
    """Tokens that a positive and a negative response share at the same place are not pushed down, and pushed up `boost` times as much, (B, T).

    lambda = 0 for negative and `boost` for positive responses on conflict tokens, 1 elsewhere; tokens are compared by their place from the
    start and from the end, each only along an unbroken run of conflicts, and both factors multiply.                 [arXiv 2508.03772, section 4.1]
    adv (B,) signs the responses (zero: neither side); group (B,) int64.
    """
    forward = _shared_run(action, adv, mask, group)
    shift = mask.sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    # The last token of a row first: place t of the reversed row is place L - 1 - t of the row (and padding stays where it was).
    back = torch.where(places < shift[:, None], shift[:, None] - 1 - places, places)
    backward = _shared_run(action.gather(1, back), adv, mask, group).gather(1, back)
    factor = torch.where(adv < 0, 0.0, boost).to(adv.dtype)[:, None]
    one = torch.ones_like(factor)
    return torch.where(forward, factor, one) * torch.where(backward, factor, one)


def _shared_run(action: Tensor, adv: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """(B, T) bool: from the first place on, without a break, the token also stands there in a response of the same group and the other sign."""
    same = (action[:, None] == action[None]) & mask[:, None] & mask[None]
    other = (group[:, None] == group[None]) & (adv[:, None] * adv[None] < 0)
    conflict = (same & other[:, :, None]).any(1)
    return conflict.long().cumprod(1).bool()


def partner_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """sg(rho) of the other response of each pair: rows 2k and 2k + 1 are a pair; (b, t).                            [arXiv 2310.00212, eq. 10]"""
    rho = summed(log_ratio, mask).exp()
    return rho.view(-1, 2, rho.shape[1]).flip(1).reshape(rho.shape)


def joint_weight(log_ratio: Tensor, adv: Tensor, mask: Tensor, *, clip: float) -> Tensor:
    """sg(rho_1 rho_2) of a pair, and 0 once the pair is apart: sign(A) omega > log((1 + e) / (1 - e)), omega = log rho_1 / rho_2; (b, t).

    With A log rho this is -(R_1 - R_2) / 2 omega sg(rho_1 rho_2), the pairwise gradient off the sampling policy, with a trust region on the pair.
    The sign keeps the region independent of the reward's size.                              [arXiv 2310.00212, section 4; the clip reconstructed]
    """
    own = summed(log_ratio, mask)
    other = own.view(-1, 2, own.shape[1]).flip(1).reshape(own.shape)
    apart = adv.sign() * (own - other) > math.log((1.0 + clip) / (1.0 - clip))
    return torch.where(apart, 0.0, (own + other).exp())


@dataclass(frozen=True)
class Steer:
    """Tokens whose update would change the entropy much count less."""

    w_min: float = 0.8  # weight of the token with the largest change
    want: ClassVar[tuple[str, ...]] = ("logp", "entropy")

    def __post_init__(self) -> None:
        if not 0.0 < self.w_min <= 1.0:
            raise ValueError(f"w_min is a weight in (0, 1], got {self.w_min}")

    def __call__(self, part: Rollout, ev: Evaluation, surrogate: Any) -> dict[str, Tensor]:
        assert ev.logp is not None and ev.entropy is not None
        omega = entropy_change(ev.logp, part.logp_old, part.columns["adv"], ev.entropy)
        return {"weight": damped(torch.where(part.mask, omega, 0.0), part.mask, w_min=self.w_min)}


@dataclass(frozen=True)
class ClipCov:
    """Random tokens of high covariance are left out of the loss (they still count in its mean)."""

    rate: float = 2e-4  # left out, as a fraction of all tokens, at least one
    low: float = 1.0  # covariance above which a token may be left out
    high: float = 5.0  # and below which
    want: ClassVar[tuple[str, ...]] = ("logp",)

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if not self.low < self.high:
            raise ValueError(f"low must be < high, got {self.low} and {self.high}")

    def __call__(self, part: Rollout, ev: Evaluation, surrogate: Any) -> dict[str, Tensor]:
        assert ev.logp is not None
        adv, m = part.columns["adv"], part.mask
        cov = covariance(ev.logp, adv, m)
        clipped = surrogate.clipped(torch.where(m, ev.logp - part.logp_old, 0.0), adv) if hasattr(surrogate, "clipped") else torch.zeros_like(m)
        candidate = m & ~clipped & (cov > self.low) & (cov < self.high)
        out = candidate & (rank(part.columns["chance"], candidate) < how_many(self.rate, m))
        return {"weight": (~out).to(adv.dtype)}


@dataclass(frozen=True)
class TopCov:
    """The divergence applies to the tokens of highest covariance."""

    rate: float = 2e-3  # of all tokens, at least one
    want: ClassVar[tuple[str, ...]] = ("logp",)

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def __call__(self, part: Rollout, ev: Evaluation, surrogate: Any) -> dict[str, Tensor]:
        assert ev.logp is not None
        cov = covariance(ev.logp, part.columns["adv"], part.mask)
        return {"selected": part.mask & (rank(cov, part.mask) < how_many(self.rate, part.mask))}


@dataclass(frozen=True)
class Unlikely:
    """The divergence to the min-p proxy applies to the least likely tokens of negative advantage, unless they are noise (outside the proxy)."""

    rate: float = 0.01  # of the tokens with negative advantage, at least one
    kappa: float = 0.02  # tokens below kappa times the likeliest one's probability are noise
    want: ClassVar[tuple[str, ...]] = ("logp",)

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if not 0.0 < self.kappa <= 1.0:
            raise ValueError(f"kappa is a fraction of the largest probability, in (0, 1], got {self.kappa}")

    def __call__(self, part: Rollout, ev: Evaluation, surrogate: Any) -> dict[str, Tensor]:
        assert ev.logp is not None
        negative = part.mask & (part.columns["adv"] < 0)
        least = negative & (rank(-ev.logp, negative) < how_many(self.rate, negative))
        return {"selected": least & (ev.logp < part.logp_ref["min-p"])}


@dataclass(frozen=True)
class Partner:
    """Each response's term is multiplied by the detached ratio of the other response of its pair."""

    want: ClassVar[tuple[str, ...]] = ("logp",)

    def __call__(self, part: Rollout, ev: Evaluation, surrogate: Any) -> dict[str, Tensor]:
        assert ev.logp is not None
        return {"weight": partner_ratio(torch.where(part.mask, ev.logp - part.logp_old, 0.0), part.mask)}


@dataclass(frozen=True)
class JointClip(Partner):
    """Each response's term is multiplied by both detached ratios of its pair, and dropped once the pair is apart by more than the clip."""

    clip: float = 0.2  # e: each of two ratios may have moved by that much, one up, one down

    def __post_init__(self) -> None:
        if not 0.0 < self.clip < 1.0:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}")

    def __call__(self, part: Rollout, ev: Evaluation, surrogate: Any) -> dict[str, Tensor]:
        assert ev.logp is not None
        log_ratio = torch.where(part.mask, ev.logp - part.logp_old, 0.0)
        return {"weight": joint_weight(log_ratio, part.columns["adv"], part.mask, clip=self.clip)}


def _check_rate(rate: float) -> None:
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate is a fraction of the tokens, in (0, 1], got {rate}")


TokenRule = Steer | ClipCov | TopCov | Unlikely | Partner | JointClip
