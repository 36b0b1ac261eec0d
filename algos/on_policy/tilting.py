"""Exact formulas of KL-regularised RL and of best-of-N on finite outcomes: what RL with KL penalties infers, and what decoding wants instead.

    logp, logp_ref (M,)  log-probabilities of all outcomes, nats           reward (M,)           beta  weight of the KL, reward units per nat
Outcomes of `win_rate` and what follows are sorted by rising reward, without ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from markovia.algos.table import Row, table


def evidence_bound(logp: np.ndarray, logp_ref: np.ndarray, reward: np.ndarray, *, beta: float) -> tuple[float, float]:
    """Both sides of E_pi R - beta KL(pi || p0) = beta log Z - beta KL(pi || p*): RL maximises an evidence lower bound.   [arXiv 2205.11275, eq. 5]

    p* = p0 exp(R / beta) / Z is the posterior. Raises ValueError for beta <= 0: without the KL all mass goes to the best outcome.
    """
    _check_beta(beta)
    p, posterior = np.exp(logp), logp_ref + reward / beta
    log_z = float(logsumexp(posterior))
    left = float(p @ reward - beta * (p @ (logp - logp_ref)))
    return left, beta * log_z - beta * float(p @ (logp - posterior + log_z))


def exponent_of_kl(logp_ref: np.ndarray, reward: np.ndarray, *, kl_nats: float) -> float:
    """alpha with KL(p0 e^(alpha R) / Z || p0) = kl_nats, by bisection: the KL-constrained optimum.                    [arXiv 2404.01730, eq. 3]

    Raises ValueError for a KL that no tilt reaches (above -log of the best outcomes' mass).
    """
    most = -float(logsumexp(logp_ref[reward == reward.max()]))
    if not 0.0 <= kl_nats < most:
        raise ValueError(f"a tilt of this reference has a KL in [0, {most:.4g}) nats, got {kl_nats}")
    low, high = 0.0, 1.0
    while tilt_kl(logp_ref, reward, alpha=high) < kl_nats:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if tilt_kl(logp_ref, reward, alpha=middle) < kl_nats else (low, middle)
    return low


def tilt(logp_ref: np.ndarray, reward: np.ndarray, *, alpha: float) -> np.ndarray:
    """log of p0 e^(alpha R) / Z, (M,)."""
    tilted = logp_ref + alpha * reward
    return np.asarray(tilted - logsumexp(tilted))


def tilt_kl(logp_ref: np.ndarray, reward: np.ndarray, *, alpha: float) -> float:
    """KL(p0 e^(alpha R) / Z || p0), nats."""
    logp = tilt(logp_ref, reward, alpha=alpha)
    return float(np.exp(logp) @ (logp - logp_ref))


def win_rate(p: np.ndarray, ref: np.ndarray, *, n: int) -> float:
    """W = P(best of n of pi beats best of n of ref), ties counting half: sum_k (S_k^n - S_{k-1}^n) h_k, h_k = (R_k^n + R_{k-1}^n) / 2.

    S, R are the cumulative masses of pi and ref.                                                                   [arXiv 2412.19792]
    """
    S, h = _cumulated(p) ** n, _half(ref, n)
    return float(np.diff(S) @ h)


def win_rate_variation(p: np.ndarray, ref: np.ndarray, *, n: int) -> np.ndarray:
    """Phi_j = dW / dp_j = -n sum_{k >= j} S_k^(n-1) (h_{k+1} - h_k), (M,), up to a constant: the reward that the decoding asks for.

    For n = 1 it is the calibrated reward, the share of ref below plus half of its ties.                            [arXiv 2412.19792]
    """
    S, h = _cumulated(p)[1:], _half(ref, n)
    steps = np.append(S[:-1] ** (n - 1) * np.diff(h), 0.0)
    return np.asarray(-n * steps[::-1].cumsum()[::-1])


def aligned_for_best_of_n(ref: np.ndarray, *, beta: float, n: int, start: np.ndarray | None = None, rounds: int = 4000) -> np.ndarray:
    """argmax of W(pi) - beta KL(pi || ref): the fixed point of pi <- ref e^(Phi(pi) / beta) / Z, by damped steps in log space. [arXiv 2412.19792]

    W is concave for best-of-n, so the fixed point is unique. Raises ValueError for beta <= 0 and n < 1.
    """
    _check_beta(beta)
    if n < 1:
        raise ValueError(f"n counts samples: it must be >= 1, got {n}")
    logp = np.log(ref if start is None else start)
    step = min(0.5, beta / (2.0 * n))
    for _ in range(rounds):
        wanted = np.log(ref) + win_rate_variation(np.exp(logp), ref, n=n) / beta
        logp = (1 - step) * logp + step * (wanted - logsumexp(wanted))
        logp -= logsumexp(logp)
    return np.asarray(np.exp(logp))


def _cumulated(p: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(p)])


def _half(ref: np.ndarray, n: int) -> np.ndarray:
    R = _cumulated(ref) ** n
    return np.asarray((R[1:] + R[:-1]) / 2)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta weighs the KL and must be > 0, got {beta}; without it all mass goes to the best outcome")


@dataclass(frozen=True)
class Formula:
    """A row that trains nothing: an exact formula, by the name of its function."""

    function: str  # "module:function"


def _row(id: str, paper: str, new: str, functions: str) -> Row:
    where = tuple(f"markovia.algos.on_policy.{f}" for f in functions.split())
    checks, why = ("value", "limit", "bad_input"), "a formula is not descended on, has no padding and holds no state"
    return Row(id, Formula(where[0]), None, paper, new, ("language",), where, id, checks, why)


TILTING = table(
    [
        _row("rl-kl-bayes", "2205.11275", "RL with a KL penalty maximises an evidence lower bound", "tilting:evidence_bound"),
        _row("bon-asymptotics", "2404.01730", "best-of-N and the KL-constrained optimum meet as sequences grow",
             "tilting:exponent_of_kl tilting:tilt_kl"),
        _row("inf-align", "2412.19792", "the reward that the decoding procedure asks for, on calibrated rewards",
             "tilting:win_rate_variation tilting:aligned_for_best_of_n rewards:calibrated"),
        _row("rm-ensemble", "2310.02743", "several reward models as one reward", "rewards:combine"),
    ]
)  # fmt: skip
