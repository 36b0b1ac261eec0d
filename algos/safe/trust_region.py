"""CPO's step in closed form: the best move inside a trust region that meets the linearised cost limit.

    max_D g.D  s.t.  c + b.D <= 0,  D'HD / 2 <= delta          g, b  gradients of the reward and cost surrogates, both as increases
                                                                c     violation J_c - d in the surrogate's unit (> 0: violated)
    q = g'H^-1 g,   r = g'H^-1 b,   s = b'H^-1 b                x = H^-1 g,  p = H^-1 b;   the answer is D = along_x x + along_p p
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Case = Literal["free", "inactive", "active", "edge", "recovery", "stay"]


class TrustRegionStep(NamedTuple):
    """D = along_x x + along_p p, the multipliers of both constraints, and how it was found.

    free      the whole trust region meets the limit (or there is no cost gradient): TRPO's step
    inactive  the limit cuts the region, but the best point lies inside
    active    the best point lies on the limit
    edge      on the limit every point is as good (g parallel to b, a linear program's edge): the shortest step to it
    recovery  no point of the region meets the limit: the step that lowers the cost most
    stay      the limit is missed and nothing is known to lower the cost
    """

    case: Case
    along_x: float
    along_p: float
    kappa: float = 0.0  # multiplier of the trust region
    nu: float = 0.0  # multiplier of the cost limit


def trust_region_dual(q: float, r: float, s: float, c: float, *, delta: float, tiny: float = 1e-10) -> TrustRegionStep:
    """Both multipliers of CPO's quadratic program, and the step.                                [Achiam 2017, thm. 2; arXiv 1705.10528]

    D = (x - nu p) / kappa,  nu = [kappa c + r]_+ / s,  with kappa the better of two candidates, each within its own range:
    limit active (kappa c + r > 0): sqrt(A / B), value -(A / kappa + B kappa) / 2 + r c / s,  A = q - r^2 / s,  B = 2 delta - c^2 / s
    limit inactive:                 sqrt(q / 2 delta), value -(q / kappa + 2 delta kappa) / 2
    The paper minimises, so that its r has the other sign; here r enters as the derivation for increases gives it.
    Raises ValueError for q or s that are negative or not finite (H is not positive definite: raise the damping), and for delta <= 0.
    """
    if not (math.isfinite(q + r + s + c) and q >= 0 and s >= 0):
        raise ValueError(f"expected finite q, s >= 0, got q={q}, r={r}, s={s}, c={c}; the Fisher matrix is not positive definite, raise its damping")
    if delta <= 0:
        raise ValueError(f"delta must be > 0, got {delta}")
    free = TrustRegionStep("free", math.sqrt(2 * delta / q) if q > 0 else 0.0, 0.0, math.sqrt(q / (2 * delta)))
    if s <= tiny:
        return free if c < 0 else TrustRegionStep("stay", 0.0, 0.0)
    B = 2 * delta - c * c / s
    if B < 0:
        return free if c < 0 else TrustRegionStep("recovery", 0.0, -math.sqrt(2 * delta / s))
    A = q - r * r / s if q * s - r * r > 1e-12 * q * s else 0.0  # 0: g parallel to b, up to rounding
    turn = -r / c if c else (0.0 if r > 0 else math.inf)  # kappa at which the limit changes between active and inactive
    low, high = (0.0, turn) if c < 0 else (turn, math.inf)  # range of the active candidate
    best = (-math.inf, free._replace(case="inactive"))
    if high > max(low, 0.0):
        kappa = _clip(math.sqrt(A / B) if B > 0 else math.inf, max(low, 0.0), high)
        best = max(best, (_value(A, B, kappa) + r * c / s, _active(kappa, r, s, c, A)), key=lambda v: v[0])
    low, high = (max(turn, 0.0), math.inf) if c < 0 else (0.0, turn)
    if high >= low and high >= 0:
        kappa = _clip(math.sqrt(q / (2 * delta)), low, high)
        best = max(best, (_value(q, 2 * delta, kappa), TrustRegionStep("inactive", 1 / kappa if kappa else 0.0, 0.0, kappa)), key=lambda v: v[0])
    return best[1]


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _value(a: float, b: float, kappa: float) -> float:
    """-(a / kappa + b kappa) / 2, with a / 0 = 0 for a = 0."""
    if kappa == 0:
        return 0.0 if a == 0 else -math.inf
    if math.isinf(kappa):
        return 0.0 if b == 0 else -math.inf
    return -0.5 * (a / kappa + b * kappa)


def _active(kappa: float, r: float, s: float, c: float, A: float) -> TrustRegionStep:
    """The step on the limit: (x - (r / s) p) / kappa - (c / s) p; its first part vanishes with A."""
    nu = max(kappa * c + r, 0.0) / s if math.isfinite(kappa) else math.inf
    if A == 0 or math.isinf(kappa):
        return TrustRegionStep("edge", 0.0, -c / s, kappa, nu)
    return TrustRegionStep("active", 1 / kappa, -r / (s * kappa) - c / s, kappa, nu)


def acceptable(kl: float, gain: float, cost_change: float, violation: float, *, delta: float, tolerance: float) -> bool:
    """CPO's line search: KL <= delta, the cost surrogate rises by at most max(-violation, 0) + tolerance, and while the limit is met the reward
    surrogate gains. All but kl (nats) in the surrogate's unit.

    tolerance 0 can hold an exact learner at the limit for ever: a step along it raises the cost to second order.
    """
    return kl <= delta and cost_change <= max(-violation, 0.0) + tolerance and (gain > 0 or violation >= 0)
