"""Fronts of several returns: their metrics, an archive, and C-MORL's two stages with the constrained problems solved exactly.

    points     (k, n)  returns of k policies in n objectives, larger is better        reference  (n,)  the worst corner that counts
    weights    (w, n)  preferences on the simplex
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.tabular import TabularMDP


def _points(points: np.ndarray) -> np.ndarray:
    out = np.asarray(points, dtype=np.float64)
    if out.ndim != 2 or not np.isfinite(out).all():
        raise ValueError(f"points must be finite and of shape (policies, objectives), got shape {out.shape}")
    return out


def nondominated(points: np.ndarray) -> np.ndarray:
    """(k,) bool: no other point is at least as good in all objectives and better in one; of equal points the first counts."""
    p = _points(points)
    no_worse = (p[None] >= p[:, None]).all(-1)
    better = no_worse & (p[None] > p[:, None]).any(-1)
    twin = no_worse & no_worse.T & (np.arange(len(p))[None] < np.arange(len(p))[:, None])
    return np.asarray(~(better | twin).any(1))


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume between `reference` and the front: the measure of all vectors that some point dominates, by slicing along the last objective."""
    p, ref = _points(points), np.asarray(reference, dtype=np.float64)
    p = p[(p > ref).all(-1)]
    if not len(p):
        return 0.0
    if p.shape[1] == 1:
        return float(p.max() - ref[0])
    p = p[np.argsort(-p[:, -1], kind="stable")]
    floors = np.append(p[1:, -1], ref[-1])
    slices = (hypervolume(p[: i + 1, :-1], ref[:-1]) * (top - floor) for i, (top, floor) in enumerate(zip(p[:, -1], floors, strict=True)))
    return float(sum(slices))


def expected_utility(points: np.ndarray, weights: np.ndarray) -> float:
    """mean over weights w of max over points G of w.G: what a user with a random preference gets."""
    return float((np.asarray(weights) @ _points(points).T).max(-1).mean())


def sparsity(points: np.ndarray) -> float:
    """sum over objectives of sum (gaps between neighbours)^2 / (k - 1), gaps in the sorted values; 0 for one point.    [arXiv 2410.02236]"""
    p = _points(points)
    return 0.0 if len(p) < 2 else float(np.square(np.diff(np.sort(p, axis=0), axis=0)).sum() / (len(p) - 1))


def crowding_distance(points: np.ndarray) -> np.ndarray:
    """(k,): sum over objectives of the distance between a point's two neighbours, over the objective's range; infinite at both ends. [Deb 2002]"""
    p = _points(points)
    out = np.zeros(len(p))
    for column in p.T:
        order = np.argsort(column, kind="stable")
        out[order[[0, -1]]] = np.inf
        span = column[order[-1]] - column[order[0]]
        if span > 0:
            out[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return out


def simplex_grid(n: int, step: float) -> np.ndarray:
    """(w, n) all weights that are multiples of `step` and sum to 1. Raises ValueError when 1 is no multiple of it."""
    parts = round(1 / step)
    if abs(parts * step - 1) > 1e-9:
        raise ValueError(f"step must divide 1, got {step}; a grid filtered by its sums would drop points by rounding")
    # stars and bars in integers
    bars = itertools.combinations(range(parts + n - 1), n - 1)
    edges = np.array([(-1, *b, parts + n - 1) for b in bars])
    return (np.diff(edges, axis=1) - 1) / parts


def floors(returns: np.ndarray, beta: float) -> np.ndarray:
    """What an extension must keep of each return: G - (1 - beta) |G|, which is beta G for G > 0 and lies below G for negative ones too."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    return np.asarray(returns) - (1 - beta) * np.abs(returns)


@dataclass(frozen=True)
class Front:
    """Policies with non-dominated returns, and how many linear programs found them."""

    points: np.ndarray  # (k, n)
    policies: np.ndarray  # (k, S, A)
    solved: int = 0

    def merged(self, points: np.ndarray, policies: np.ndarray, capacity: int = 200) -> Front:
        """With new candidates; dominated ones leave, then those in the densest places until `capacity` are left."""
        p, q = np.concatenate([self.points, points]), np.concatenate([self.policies, policies])
        keep = nondominated(p)
        p, q = p[keep], q[keep]
        if len(p) > capacity:
            chosen = np.sort(np.argsort(-crowding_distance(p), kind="stable")[:capacity])
            p, q = p[chosen], q[chosen]
        return Front(p, q, self.solved + len(points))


def _returns(mdp: TabularMDP, rewards: np.ndarray, policy: np.ndarray) -> np.ndarray:
    return np.array([replace(mdp, R=r).J(policy) for r in rewards])


def weighted_optima(mdp: TabularMDP, rewards: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stage 1: returns (w, n) and policies (w, S, A) that are optimal for each fixed preference; rewards (n, S, A)."""
    policies = np.stack([replace(mdp, R=np.tensordot(w, rewards, axes=1)).policy_iteration()[0] for w in weights])
    return np.stack([_returns(mdp, rewards, p) for p in policies]), policies


def extend(mdp: TabularMDP, rewards: np.ndarray, returns: np.ndarray, objective: int, *, beta: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Stage 2: max G_l subject to G_j >= G_j - (1 - beta) |G_j| of a policy with `returns` (n,), j != l, by the occupancy LP.

    Returns the new returns (n,) and policy (S, A).                                                 [arXiv 2410.02236]
    """
    others = [j for j in range(len(rewards)) if j != objective]
    problem = CMDP(replace(mdp, R=rewards[objective]), -rewards[others], -floors(returns, beta)[others])
    policy = problem.solve().policy
    return _returns(mdp, rewards, policy), policy


def c_morl(
    mdp: TabularMDP,
    rewards: np.ndarray,
    weights: np.ndarray,
    *,
    rounds: int = 4,
    picks: int = 5,
    beta: float = 0.9,
    capacity: int = 200,
) -> Front:
    """C-MORL: optima of a few fixed preferences, then rounds of constrained extensions from the least crowded points not yet used."""
    points, policies = weighted_optima(mdp, rewards, weights)
    front = Front(points[:0], policies[:0]).merged(points, policies, capacity)
    used: set[tuple[float, ...]] = set()
    for _ in range(rounds):
        order = np.argsort(-crowding_distance(front.points), kind="stable")
        chosen = [i for i in order if tuple(front.points[i]) not in used][:picks]
        found = [extend(mdp, rewards, front.points[i], l, beta=beta) for i in chosen for l in range(len(rewards))]
        used |= {tuple(front.points[i]) for i in chosen}
        if found:
            front = front.merged(np.stack([f[0] for f in found]), np.stack([f[1] for f in found]), capacity)
    return front
