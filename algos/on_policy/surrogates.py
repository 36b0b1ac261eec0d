"""Surrogates and drifts: what a decision contributes to the objective (to be maximised), as pure functions.

    log_ratio (b, t)  log pi - log pi_old of the action taken, nats       adv (b, t)  advantage, no gradient
    kl        (b, t)  exact KL of the action distributions, nats          coef ()     penalty coefficient, no gradient

objective = rho A - D with rho = exp(log_ratio) and a drift D >= 0 that is zero with zero gradient at log_ratio = 0 (mirror learning,
arXiv 2201.02373); therefore one full-batch step is the same for every smooth drift: the A2C step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

NeedsKL = Literal["none", "new_old", "old_new", "tsallis"]


def clip_drift(log_ratio: Tensor, adv: Tensor, *, low: float | Tensor, high: float | Tensor) -> Tensor:
    """PPO's clipping as a drift: rho A - D = min(rho A, clip(rho, 1 - low, 1 + high) A).

    D = ReLU((rho - clip(rho, 1 - low, 1 + high)) A)                                   [Schulman 2017, eq. 7; arXiv 1707.06347]
    The gradient is zero for A > 0, rho > 1 + high and for A < 0, rho < 1 - low.
    """
    rho = log_ratio.exp()
    return torch.relu((rho - torch.clamp(rho, 1.0 - low, 1.0 + high)) * adv)  # type: ignore[arg-type]


def discovered_drift(log_ratio: Tensor, adv: Tensor, *, alpha: float, beta: float) -> Tensor:
    """The closed form found by meta-learning a drift (DPO there: discovered policy optimisation).

    A >= 0: D = ReLU((rho - 1) A - alpha tanh((rho - 1) A / alpha));  A < 0: D = ReLU(A lr - beta tanh(A lr / beta))
    with lr = log rho.                                                                     [Lu 2022, section 6; arXiv 2210.05639]
    Its constants assume standardised advantages.
    """
    up = (log_ratio.exp() - 1.0) * adv
    down = log_ratio * adv
    return torch.where(
        adv >= 0, torch.relu(up - alpha * torch.tanh(up / alpha)), torch.relu(down - beta * torch.tanh(down / beta))
    )


def drift_features(log_ratio: Tensor, adv: Tensor) -> Tensor:
    """Input of a learnt drift, (..., 8): x = [lr, lr^2, 1 - rho, (1 - rho)^2] and A x.            [arXiv 2210.05639, section 4]"""
    one_minus = 1.0 - log_ratio.exp()
    x = torch.stack([log_ratio, log_ratio.square(), one_minus, one_minus.square()], dim=-1)
    return torch.cat([x, adv[..., None] * x], dim=-1)


def learnt_drift(log_ratio: Tensor, adv: Tensor, *, w1: Tensor, w2: Tensor, clip: float, dead_zone: float = 1e-4) -> Tensor:
    """A drift network without biases on top of PPO's drift, so that it vanishes around rho = 1.

    D = ReLU(ReLU((rho - clip rho) A) + w2 tanh(w1 x) - 1e-4),   x the 8 drift features            [Lu 2022, arXiv 2210.05639]
    """
    net = (torch.tanh(drift_features(log_ratio, adv) @ w1.T) @ w2.T).squeeze(-1)
    return torch.relu(clip_drift(log_ratio, adv, low=clip, high=clip) + net - dead_zone)


def chain_clip(stage: Tensor, *, clip: float, base: float, rate: float) -> Tensor:
    """PPO's range for each denoising step: small where the sample is noisy, `clip` at the last step.

    e_i = base + (clip - base) (exp(rate u_i) - 1)/(exp(rate) - 1),  u_i = i/(K'-1), u = 1 for K' = 1        [Ren 2024, arXiv 2409.00588, code]
    stage (b, t) holds u; base = clip is no schedule.
    """
    return base + (clip - base) * torch.expm1(rate * stage) / math.expm1(rate)


def ratio_objective(log_ratio: Tensor, adv: Tensor) -> Tensor:
    """rho A, the importance-sampled policy gradient; value A and gradient A grad log pi at rho = 1."""
    return log_ratio.exp() * adv


def dual_clip(objective: Tensor, adv: Tensor, *, c: float) -> Tensor:
    """max(objective, c A) where A < 0: a ratio above c no longer pushes a bad action down.                          [Ye 2020, arXiv 1912.09729]"""
    return torch.where(adv < 0, torch.maximum(objective, c * adv), objective)


def regress(log_ratio: Tensor, adv: Tensor, *, lam: float) -> Tensor:
    """-(l - l_anchor - A / lam)^2, l - l_anchor = log_ratio.                                                      [Zhu 2023, arXiv 2306.02231]

    On exact data (weights b, anchor b) its minimum u = pi / b solves log u - c u = A / lam with c < 0 such that E_b u = 1, close to
    b exp(A / lam) / Z for small A / lam; an advantage however large gives a finite step.
    """
    return -(log_ratio - adv / lam).square()


@dataclass(frozen=True)
class PolicyGradient:
    """rho A without any drift (A2C, RLOO, REINFORCE, DDPO with one update per batch)."""

    needs_kl: ClassVar[NeedsKL] = "none"

    def __call__(self, log_ratio: Tensor, adv: Tensor, kl: Tensor | None, coef: Tensor) -> Tensor:
        return ratio_objective(log_ratio, adv)


@dataclass(frozen=True)
class LogRatio:
    """A log rho: the policy gradient whose size does not change with rho. Off the sampling policy a token rule weights it."""

    needs_kl: ClassVar[NeedsKL] = "none"

    def __call__(self, log_ratio: Tensor, adv: Tensor, kl: Tensor | None, coef: Tensor) -> Tensor:
        return adv * log_ratio


@dataclass(frozen=True)
class Clip:
    """PPO's pessimistic clipped ratio."""

    clip: float = 0.2  # range below 1, and above when clip_high is None
    clip_high: float | None = None  # range above 1
    dual: float | None = None  # bound of the ratio for negative advantages, > 1; None: none
    needs_kl: ClassVar[NeedsKL] = "none"

    def __post_init__(self) -> None:
        if not self.clip > 0.0:
            raise ValueError(f"clip must be > 0 (it is the allowed change of the probability ratio), got {self.clip}")
        if self.dual is not None and not self.dual > 1.0:
            raise ValueError(f"dual bounds the ratio of negative advantages and must be > 1, got {self.dual}")

    @property
    def high(self) -> float:
        return self.clip if self.clip_high is None else self.clip_high

    def __call__(self, log_ratio: Tensor, adv: Tensor, kl: Tensor | None, coef: Tensor) -> Tensor:
        objective = ratio_objective(log_ratio, adv) - clip_drift(log_ratio, adv, low=self.clip, high=self.high)
        return objective if self.dual is None else dual_clip(objective, adv, c=self.dual)

    def clipped(self, log_ratio: Tensor, adv: Tensor) -> Tensor:
        """(b, t) bool: the clipped term is the smaller one, so the decision has no gradient."""
        return clip_drift(log_ratio, adv, low=self.clip, high=self.high) > 0


@dataclass(frozen=True)
class ChainClip:
    """Clipped ratio with a range that grows over the denoising steps (`chain_clip`); for records with the column `stage`."""

    clip: float = 0.01  # at the last step
    base: float = 0.01  # at the noisiest one
    rate: float = 3.0  # how late it grows
    needs_kl: ClassVar[NeedsKL] = "none"

    def __post_init__(self) -> None:
        if not (0.0 < self.base <= self.clip and self.rate > 0.0):
            raise ValueError(f"a clipping schedule needs 0 < base <= clip and rate > 0, got base={self.base}, clip={self.clip}, rate={self.rate}")

    def __call__(self, log_ratio: Tensor, adv: Tensor, kl: Tensor | None, coef: Tensor, stage: Tensor | None = None) -> Tensor:
        if stage is None:
            raise ValueError("ChainClip is a schedule over denoising steps, but this record has no column `stage`; use Clip")
        e = chain_clip(stage, clip=self.clip, base=self.base, rate=self.rate)
        return ratio_objective(log_ratio, adv) - clip_drift(log_ratio, adv, low=e, high=e)


@dataclass(frozen=True)
class Regress:
    """APA: the log-ratio to an anchor is regressed on A / lam instead of being clipped."""

    lam: float = 1.0  # temperature: advantage units per nat
    anchor: Literal["old", "ref"] = "old"  # the sampling policy (official code) or the initial one (the paper's derivation)
    needs_kl: ClassVar[NeedsKL] = "none"

    def __post_init__(self) -> None:
        if not self.lam > 0.0:
            raise ValueError(f"lam divides the advantage and must be > 0, got {self.lam}")

    def __call__(self, log_ratio: Tensor, adv: Tensor, kl: Tensor | None, coef: Tensor) -> Tensor:
        return regress(log_ratio, adv, lam=self.lam)


@dataclass(frozen=True)
class KLDrift:
    """rho A - coef KL: direction old_new is PPO's penalty and FixPO, new_old is mirror descent, tsallis its generalisation."""

    needs_kl: NeedsKL = "old_new"
    q: float = 1.0  # Tsallis entropy index for needs_kl = "tsallis"; 1 is KL(new || old)

    def __call__(self, log_ratio: Tensor, adv: Tensor, kl: Tensor | None, coef: Tensor) -> Tensor:
        assert kl is not None
        return ratio_objective(log_ratio, adv) - coef * kl


@dataclass(frozen=True)
class Discovered:
    """The closed-form discovered drift."""

    alpha: float = 2.0  # scale of the drift where the advantage is positive
    beta: float = 0.6  # scale where it is negative
    needs_kl: ClassVar[NeedsKL] = "none"

    def __call__(self, log_ratio: Tensor, adv: Tensor, kl: Tensor | None, coef: Tensor) -> Tensor:
        return ratio_objective(log_ratio, adv) - discovered_drift(log_ratio, adv, alpha=self.alpha, beta=self.beta)


@dataclass(frozen=True)
class Learnt:
    """A frozen drift network, by default the small one that ships with the package."""

    weights: str = "lpo"  # name of a shipped file or path of a safetensors file with w1 (h, 8) and w2 (1, h)
    clip: float = 0.2  # PPO's range in its initialisation
    needs_kl: ClassVar[NeedsKL] = "none"

    def __call__(self, log_ratio: Tensor, adv: Tensor, kl: Tensor | None, coef: Tensor) -> Tensor:
        from markovia.algos.on_policy.lpo import drift_weights

        w1, w2 = (w.to(log_ratio) for w in drift_weights(self.weights))
        return ratio_objective(log_ratio, adv) - learnt_drift(log_ratio, adv, w1=w1, w2=w2, clip=self.clip)


def tsallis_bregman(logits: Tensor, logits_old: Tensor, *, q: float) -> Tensor:
    """Bregman divergence of Tsallis' entropy between categorical policies, (b, t); KL(new || old) at q = 1.

    B = E_pi[log_q pi - q log_q pi_old] + (q - 1) E_old[log_q pi_old],   log_q x = (x^(q-1) - 1)/(q - 1)      [arXiv 2005.09814, appendix]
    Raises ValueError for q outside [1, 2].
    """
    if not 1.0 <= q <= 2.0:
        raise ValueError(f"Tsallis index q must lie in [1, 2], got {q}")
    lp, lo = torch.log_softmax(logits, -1), torch.log_softmax(logits_old, -1)
    if q == 1.0:
        return (lp.exp() * (lp - lo)).sum(-1)

    def log_q(logx: Tensor) -> Tensor:
        return torch.expm1((q - 1.0) * logx) / (q - 1.0)

    return (lp.exp() * (log_q(lp) - q * log_q(lo)) + (q - 1.0) * lo.exp() * log_q(lo)).sum(-1)


Surrogate = PolicyGradient | LogRatio | Clip | ChainClip | Regress | KLDrift | Discovered | Learnt
