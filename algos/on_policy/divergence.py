"""Divergence to a reference: estimators of the log-ratio, where they enter, and what each one's gradient is.

    d (b, t)  log pi - log ref of the sampled action, nats            u = exp(d) = pi / ref
In the reward (detached) only k1 has the optimum ref exp(R / beta) / Z over whole sequences; as a loss k1 has gradient 0, k2 that of KL(pi||ref)
per state and k3 that of KL(ref||pi). Value and gradient of an estimator are different things; the value of k3 is what is logged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from markovia.algos.on_policy.schedules import BetaSchedule, Steady
from markovia.envs.exact.divergences import f_divergence

Reference = Literal["ref", "old", "teacher", "min-p"]


def k1(d: Tensor) -> Tensor:
    """d: unbiased, can be negative."""
    return d


def k2(d: Tensor) -> Tensor:
    """d^2 / 2: biased in value; as a loss its expected gradient on-policy is grad KL(pi || ref) of the state."""
    return 0.5 * d.square()


def k3(d: Tensor) -> Tensor:
    """exp(-d) + d - 1 >= 0: unbiased in value; as a loss its expected gradient on-policy is grad KL(ref || pi) of the state."""
    return torch.expm1(-d) + d


def rho_k3(d: Tensor, log_ratio: Tensor) -> Tensor:
    """rho (exp(-d) + d - 1): the ratio to the sampling policy makes k3's expected gradient as a loss that of KL(pi || ref).

    E[k3 grad l + (1 - e^-d) grad l] = E[d grad l] = grad KL(pi || ref) of the state, on-policy and off it.         [arXiv 2512.02556, section 3]
    """
    return log_ratio.exp() * k3(d)


def absolute(d: Tensor) -> Tensor:
    """|d|, and flat within 1e-5. On the first pass over a record d is rounding, whose sign would decide the gradient."""
    return torch.where(d.abs() > 1e-5, d.abs(), 0.0)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}


def summed(x: Tensor, mask: Tensor) -> Tensor:
    """The sum over a row's decisions, at every one of them: x (b, t) -> (b, t)."""
    return (x * mask.to(x.dtype)).sum(1, keepdim=True).expand_as(x)


def f_reward(d: Tensor, *, f: str, alpha: float | None = None, clamp: float = 20.0) -> Tensor:
    """f'(u) of the whole response: what is taken from its reward times beta, detached; d (B,) sequence log-ratios -> (B,).

    grad D_f(pi || ref) = E_pi[f'(u) grad log pi(y)],  u = pi(y) / ref(y)                                            [arXiv 2302.08215, eq. 3]
    log u is clamped to +-clamp. A constant in f' is harmless (it is a baseline), its scale is not.
    """
    return f_divergence(f, alpha).df(d.clamp(-clamp, clamp).exp())


def f_policy_loss(d: Tensor, *, f: str, alpha: float | None = None, clamp: float = 20.0) -> Tensor:
    """sg(f'(u)) d: a loss on the policy's own samples with the expected gradient grad D_f(pi || ref) = E_pi[f'(u) grad log pi].

    Its value means nothing.                                                                                        [arXiv 2302.08215, eq. 3]
    """
    return f_reward(d.detach(), f=f, alpha=alpha, clamp=clamp) * d


def f_reference_loss(d: Tensor, *, f: str, alpha: float | None = None, clamp: float = 20.0) -> Tensor:
    """f(u) on samples of the reference, u differentiable: value and gradient of D_f(pi || ref) = E_ref[f(u)].        [arXiv 2509.07430, eq. 5]

    Beyond +-clamp the gradient of log u is zero.
    """
    return f_divergence(f, alpha).f(d.clamp(-clamp, clamp).exp())


@dataclass(frozen=True)
class KL:
    """Penalty beta k(d) against a reference policy."""

    beta: float = 0.05  # strength, reward units per nat; where it starts when a schedule moves it
    estimator: Literal["k1", "k2", "k3", "rho-k3", "abs", "exact"] = "k1"  # of d; "exact": KL(pi || ref) of the action distributions
    place: Literal["reward", "loss"] = "reward"  # subtracted from the reward (detached) or added to the loss
    level: Literal["token", "sequence"] = "token"  # d of each decision, or summed over the response (one term per response, loss only)
    reference: Reference = "ref"  # frozen (and refreshed) copy, sampling policy, a teacher, or the sampling policy's likely tokens
    rows: Literal["all", "failed"] = "all"  # penalised responses; "failed": those whose reward is not positive
    schedule: BetaSchedule = field(default_factory=Steady)  # how beta changes over training

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("k1 as a loss has zero expected gradient; use estimator='k2' (KL to the reference) or place='reward'")
        if self.place == "reward" and self.estimator in ("exact", "rho-k3"):
            raise ValueError(f"estimator={self.estimator!r} is a penalty on the loss; use place='loss', or estimator='k1' in the reward")
        if self.estimator == "exact" and (self.reference != "ref" or self.level != "token"):
            raise ValueError(
                f"the exact KL is that of each decision to the reference 'ref', got reference={self.reference!r}, level={self.level!r}; "
                "use estimator='k2'"
            )
        if self.place == "reward" and (self.level == "sequence" or self.reference in ("old", "min-p")):
            raise ValueError(
                f"a penalty in the reward is taken per token against ref or teacher, got level={self.level!r}, reference={self.reference!r}"
            )

    def term(self, d: Tensor, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """k(d) for the loss, (b, t); beta is the driver's."""
        if self.level == "sequence":
            d, log_ratio = summed(d, mask), summed(log_ratio, mask)
        return rho_k3(d, log_ratio) if self.estimator == "rho-k3" else ESTIMATORS[self.estimator](d)


@dataclass(frozen=True)
class FDivergence:
    """Penalty beta D_f(pi || ref) for a generator of the f-divergence table, from samples of the policy or of the reference."""

    beta: float = 0.05  # strength, reward units
    f: str = "js"  # generator: kl_pi_ref, kl_ref_pi, js, chi2, alpha, hellinger, tv
    alpha: float | None = None  # order of the alpha family
    place: Literal["reward", "loss"] = "reward"
    sampler: Literal["policy", "reference"] = "policy"  # whose samples: f'(u) log pi of the policy's own, f(u) of the reference's
    level: Literal["token", "sequence"] = "sequence"  # only a sequence-level u has the optimum of the whole responses
    clamp: float = 20.0  # bound of |log u|
    reference: Reference = "ref"
    rows: Literal["all", "failed"] = "all"  # penalised responses; "failed": those whose reward is not positive
    schedule: BetaSchedule = field(default_factory=Steady)

    def __post_init__(self) -> None:
        f_divergence(self.f, self.alpha)  # an unknown name or a missing order is told here
        if self.beta < 0:
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        if self.sampler == "reference" and self.place == "reward":
            raise ValueError("samples of the reference have no reward to be penalised in; use place='loss'")
        if self.clamp <= 0:
            raise ValueError(f"clamp bounds |log u| and must be > 0, got {self.clamp}")

    def term(self, d: Tensor, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """The loss whose gradient is that of D_f, (b, t); beta is the driver's."""
        d = summed(d, mask) if self.level == "sequence" else d
        loss = f_reference_loss if self.sampler == "reference" else f_policy_loss
        return loss(d, f=self.f, alpha=self.alpha, clamp=self.clamp)


Divergence = KL | FDivergence


def min_p_logp(logits: Tensor, action: Tensor, *, kappa: float) -> Tensor:
    """log-probs (b, t) of `action` under the distribution restricted to {a: p(a) >= kappa max p} and renormalised; -1e4 outside of it.

    logits (b, t, n) of the sampling policy.                                                                        [arXiv 2510.03222, eq. 4]
    """
    logp = torch.log_softmax(logits, -1)
    likely = logp >= logp.max(-1, keepdim=True).values + torch.log(torch.tensor(kappa, dtype=logp.dtype))
    mass = torch.logsumexp(logp.masked_fill(~likely, -torch.inf), -1)
    taken = action.unsqueeze(-1)
    inside = likely.gather(-1, taken).squeeze(-1)
    return torch.where(inside, logp.gather(-1, taken).squeeze(-1) - mass, -1e4)
