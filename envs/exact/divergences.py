"""The one f-divergence table: D_f(pi || ref) = sum_y ref(y) f(u(y)), u = pi / ref, at the scale of f below.

    name       f(u)                             f'(u)           (f')^-1(s)        s range     what it is
    kl_pi_ref  u log u                          1 + log u       e^(s-1)           all         KL(pi || ref)
    kl_ref_pi  -log u                           -1/u            -1/s              s < 0       KL(ref || pi)
    js         u log u - (u+1) log((u+1)/2)     log(2u/(1+u))   e^s / (2 - e^s)   s < log 2   2 x Jensen-Shannon
    chi2       (u-1)^2                          2 (u-1)         max(0, 1 + s/2)   all         Pearson chi^2
    alpha      ((1-a)u - u^(1-a) + a)/(a(1-a))  (1 - u^-a) / a  (1 - a s)^(-1/a)  a s < 1     a = alpha
    hellinger  (sqrt u - 1)^2                   1 - u^(-1/2)    (1 - s)^-2        s < 1       sum (sqrt pi - sqrt ref)^2
    tv         |u-1| / 2                        sign(u-1) / 2   a step            |s| <= 1/2  half the L1 distance

alpha -> 0 is KL(pi || ref) and alpha -> 1 is KL(ref || pi), up to a multiple of u - 1, which no divergence sees.
Every function takes and returns numpy arrays or torch tensors; use float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from markovia.envs.exact.arrays import Array, exp, like, log, to_numpy, where, xlogy
from markovia.envs.names import nearest


@dataclass(frozen=True)
class FDivergence:
    """One row of the table: f, f', its inverse and f'' as functions of arrays, and the bound of the inverse."""

    name: str
    f: Callable[[Array], Array]  # convex, f(1) = 0
    df: Callable[[Array], Array]  # f'
    df_inverse: Callable[[Array], Array]  # (f')^-1, clipped to u >= 0 where f'(0) is finite
    d2f: Callable[[Array], Array]  # f''
    s_upper: float = math.inf  # (f')^-1 is finite below s_upper

    def __call__(self, logp: Array, logp_ref: Array) -> Array:
        """D_f(pi || ref) = sum_y ref(y) f(pi(y) / ref(y)) over the last axis; logp, logp_ref: (..., M) nats -> (...)."""
        return (exp(logp_ref) * self.f(exp(logp - logp_ref))).sum(-1)


def _sign(u: Array) -> Array:
    return where(u > 1, 0.5, where(u < 1, -0.5, 0.0 * u))


def _alpha(alpha: float) -> FDivergence:
    """The alpha family, with its two logarithmic limits written out."""
    a = float(alpha)
    if not math.isfinite(a):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}; 0 is KL(pi || ref) and 1 is KL(ref || pi)")
    if a == 0.0:
        return FDivergence("alpha", lambda u: xlogy(u, u) - u + 1, log, exp, lambda u: 1 / u)
    if a == 1.0:
        return FDivergence("alpha", lambda u: u - 1 - log(u), lambda u: 1 - 1 / u, lambda s: 1 / (1 - s), lambda u: u**-2.0, 1.0)
    return FDivergence(
        "alpha",
        lambda u: ((1 - a) * u - u ** (1 - a) + a) / (a * (1 - a)),
        lambda u: (1 - u**-a) / a,
        # for a < 0, f'(0) = 1/a is finite, and below it the optimum has no mass
        lambda s: where(1 - a * s > 0, 1 - a * s, 0.0 * s) ** (-1 / a),
        lambda u: u ** (-a - 1),
        1 / a if a > 0 else math.inf,
    )


_TABLE = {
    "kl_pi_ref": FDivergence("kl_pi_ref", lambda u: xlogy(u, u), lambda u: 1 + log(u), lambda s: exp(s - 1), lambda u: 1 / u),
    "kl_ref_pi": FDivergence("kl_ref_pi", lambda u: -log(u), lambda u: -1 / u, lambda s: -1 / s, lambda u: u**-2.0, 0.0),
    "js": FDivergence(
        "js",
        lambda u: xlogy(u, u) - (u + 1) * log((u + 1) / 2),
        lambda u: log(2 * u / (1 + u)),
        lambda s: exp(s) / (2 - exp(s)),
        lambda u: 1 / (u * (1 + u)),
        math.log(2.0),
    ),
    "chi2": FDivergence(
        "chi2",
        lambda u: (u - 1) ** 2,
        lambda u: 2 * (u - 1),
        lambda s: where(s > -2, 1 + s / 2, 0.0 * s),
        lambda u: 2 + 0.0 * u,
    ),
    "hellinger": FDivergence(
        "hellinger",
        lambda u: (u**0.5 - 1) ** 2,
        lambda u: 1 - u**-0.5,
        lambda s: (1 - s) ** -2.0,
        lambda u: u**-1.5 / 2,
        1.0,
    ),
    "tv": FDivergence(
        "tv",
        lambda u: abs(u - 1) / 2,
        _sign,
        # a step: u = 1 inside (-1/2, 1/2), nothing below; the mass at s = 1/2 is not a function of s (see `f_optimum`)
        lambda s: where(s > -0.5, 1 + 0.0 * s, 0.0 * s),
        lambda u: 0.0 * u,
        0.5,
    ),
}
NAMES = (*_TABLE, "alpha")


def f_divergence(name: str, alpha: float | None = None) -> FDivergence:
    """The row of the table called `name`; `alpha` is given for, and only for, the alpha family.

    Raises ValueError for an unknown name (with the nearest one), and for a missing or needless alpha.
    """
    if name == "alpha":
        if alpha is None:
            raise ValueError("the alpha divergence needs its order: f_divergence('alpha', alpha=0.5)")
        return _alpha(alpha)
    if name not in _TABLE:
        raise ValueError(f"unknown f-divergence {name!r}{nearest(name, NAMES)} (known: {', '.join(NAMES)})")
    if alpha is not None:
        raise ValueError(f"{name!r} has no order; alpha={alpha} belongs to f_divergence('alpha', alpha={alpha})")
    return _TABLE[name]


def check_beta(beta: float) -> float:
    """beta as a float; raises ValueError unless it is positive and finite."""
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta, the weight of the divergence, must be positive and finite, got {beta!r}")
    return float(beta)


def f_optimum(logp_ref: Array, reward: Array, beta: float, divergence: str | FDivergence, alpha: float | None = None) -> Array:
    """The distribution that maximises E_pi R - beta D_f(pi || ref).

    pi(y) = ref(y) max(0, (f')^-1((R(y) - lam) / beta)), lam by bisection so that pi sums to 1.                  (E4)
    TV has no inverse: all mass with R_max - R(y) > beta moves to the best y (ties share it as ref does), the rest stays.
    logp_ref: (M,) nats, normalised (-inf allowed: such y keep probability 0); reward: (M,) -> (M,) probabilities,
    detached, in logp_ref's library.
    Raises ValueError for shapes that differ, values that are not finite, or a beta that is not positive.
    """
    div = f_divergence(divergence, alpha) if isinstance(divergence, str) else divergence
    beta = check_beta(beta)
    logp0, r = to_numpy(logp_ref), to_numpy(reward)
    if logp0.shape != r.shape or logp0.ndim != 1:
        raise ValueError(f"logp_ref and reward must be vectors of one length, got shapes {logp0.shape} and {r.shape}")
    if not np.isfinite(r).all():
        raise ValueError("reward holds NaN or infinity; every outcome needs a finite reward")
    p0 = np.exp(logp0)
    if not abs(p0.sum() - 1) < 1e-6:
        raise ValueError(f"logp_ref must be normalised (log_softmax): its probabilities sum to {p0.sum():.6g}, not 1")
    support = p0 > 0
    pi = np.zeros_like(p0)
    pi[support] = _solve(p0[support], r[support], beta, div)
    return like(pi, logp_ref)


def _solve(p0: np.ndarray, r: np.ndarray, beta: float, div: FDivergence) -> np.ndarray:
    """f_optimum on the support of ref (p0 > 0)."""
    if div.name == "tv":
        best = r == r.max()
        leaves = r.max() - r > beta
        return np.where(best, p0 * (1 + p0[leaves].sum() / p0[best].sum()), np.where(leaves, 0.0, p0))

    def tilted(lam: float) -> np.ndarray:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return p0 * div.df_inverse((r - lam) / beta)

    # At lam = max R - beta f'(1) every u <= 1, at min R - beta f'(1) every u >= 1; and s must stay below its bound.
    slope = float(div.df(np.ones(1))[0])
    high = r.max() - beta * slope
    low = max(r.min() - beta * slope, r.max() - beta * div.s_upper)
    for _ in range(200):
        mid = (low + high) / 2
        if mid in (low, high):
            break
        if tilted(mid).sum() > 1:
            low = mid
        else:
            high = mid
    pi = tilted(high)
    return pi / pi.sum()  # the rest of the bisection is rounding
