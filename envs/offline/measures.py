"""What a dataset is worth before anything is learnt from it: returns, coverage of states and actions.

Counts are over cells: every dimension of (s, a) is cut into `bins` equal parts between limits that all compared datasets share; integers
(discrete states and actions, pixels) count as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gymnasium import spaces

from markovia.envs.offline.transitions import Transitions, columns

BINS = 100
MOST_SHARES = 2**20  # actions of a discrete space whose shares are listed


def trajectory_quality(data: Transitions, minimum: float, maximum: float) -> float:
    """TQ: where the mean return lies between a random policy's and the best online policy's.

    TQ(D) = (g(D) - g_min) / (g_max - g_min),  g the mean undiscounted return of the complete episodes           [Schweighofer 2022; arXiv 2111.04714]
    minimum, maximum: g_min and g_max in the task's reward unit; can lie outside [0, 1]. An episode cut by the file's end does not count.
    Raises ValueError unless minimum < maximum, and when no episode is complete.
    """
    if not minimum < maximum:
        raise ValueError(f"TQ needs minimum < maximum, got {minimum} and {maximum}")
    complete = data.complete()
    if not complete.any():
        raise ValueError(f"{data.about.name} has no complete episode, so it has no mean return")
    return float((data.returns()[complete].mean() - minimum) / (maximum - minimum))


def state_action_coverage(data: Transitions, reference: Transitions, bins: int = BINS) -> float:
    """SACo: how many different (s, a) a dataset holds against the replay data of an online run.

    SACo(D) = u(D) / u(D_ref),  u the number of different cells, over equally many rows of both            [Schweighofer 2022; arXiv 2111.04714]
    Can exceed 1. Of the longer one min(N, N_ref) rows are counted, evenly from its first to its last; every dimension is cut into `bins` parts
    between the limits of both together.
    e^H(occupancy) <= u, and in a deterministic MDP u is what a policy's occupancy can reach. Raises ValueError for rows of other shapes.
    """
    n = min(len(data), len(reference))
    first, second = (state_actions(d.rows(np.linspace(0, len(d) - 1, n).astype(np.int64))) for d in (data, reference))
    whole = whole_numbers(data)
    if first.shape[1] != second.shape[1]:
        widths = f"{data.about.name} has {first.shape[1]} numbers per (s, a), {reference.about.name} {second.shape[1]}"
        raise ValueError(f"{widths}; only data of one task can be compared")
    limits = shared_limits([first, second])
    return distinct(first, limits, bins, whole) / distinct(second, limits, bins, whole)


def state_actions(data: Transitions) -> np.ndarray:
    """(N, d) float64: observation and action of every row, side by side."""
    parts = [*columns(data.obs).values(), data.action]
    return np.concatenate([p.reshape(len(data), -1).astype(np.float64) for p in parts], axis=1)


def whole_numbers(data: Transitions) -> np.ndarray:
    """(d,) bool: which columns of `state_actions` are integers."""
    parts = [*columns(data.obs).values(), data.action]
    return np.concatenate([np.full(p.reshape(len(data), -1).shape[1], np.issubdtype(p.dtype, np.integer)) for p in parts])


def shared_limits(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(d,) smallest and (d,) largest value of every column over all tables."""
    return np.min([t.min(axis=0) for t in tables], axis=0), np.max([t.max(axis=0) for t in tables], axis=0)


def distinct(table: np.ndarray, limits: tuple[np.ndarray, np.ndarray], bins: int = BINS, whole: np.ndarray | None = None) -> int:
    """u: different cells among the rows of table (N, d), every value of a `whole` (d,) column a cell of its own.

    Raises ValueError for bins outside 1..65535.
    """
    if not 1 <= bins <= 65535:
        raise ValueError(f"bins must lie in 1..65535, got {bins}")
    low, high = limits
    width = np.where(high > low, high - low, 1.0)
    cells = np.clip((table - low) / width * bins, 0, bins - 1)
    if whole is not None:
        cells = np.where(whole, table - low, cells)
    cells = cells.astype(np.uint32 if cells.max() < 2**32 else np.uint64)
    packed = np.ascontiguousarray(cells).view(np.dtype((np.void, cells.dtype.itemsize * cells.shape[1])))
    return len(np.unique(packed))


@dataclass(frozen=True)
class ActionCoverage:
    """How much of the action space was tried. Discrete: `share` (n,) of each action, for at most 2^20 of them; Box: per dimension."""

    covered: np.ndarray  # (d,) share of equal cells with at least one action; one entry, over all actions, when discrete
    at_bound: np.ndarray  # (d,) share of actions within 1 % of the range from a bound; nothing to measure, so zeros, when discrete
    share: np.ndarray | None = None


def action_coverage(data: Transitions, bins: int = 20) -> ActionCoverage:
    """Share of `bins` equal cells per action dimension that hold an action; of the actions of a discrete space, how often each occurs.

    A Box without finite bounds is measured between the smallest and largest logged action. Raises ValueError for other spaces.
    """
    space, action = data.about.action_space, data.action
    if isinstance(space, spaces.Discrete) and space.n > MOST_SHARES:
        return ActionCoverage(np.array([len(np.unique(action)) / int(space.n)]), np.zeros(1))
    if isinstance(space, spaces.Discrete):
        share = np.bincount((action - space.start).astype(np.int64), minlength=int(space.n)) / len(data)
        return ActionCoverage(np.array([(share > 0).mean()]), np.zeros(1), share)
    if space is not None and not isinstance(space, spaces.Box):
        raise ValueError(f"action coverage is defined for Box and Discrete spaces, got {space}")
    flat = action.reshape(len(data), -1).astype(np.float64)
    low, high = (np.asarray(x, dtype=np.float64) for x in shared_limits([flat]))
    if space is not None and np.isfinite(space.low).all() and np.isfinite(space.high).all():
        low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
    width = np.where(high > low, high - low, 1.0)
    place = np.clip((flat - low) / width, 0.0, 1.0)
    cells = np.minimum((place * bins).astype(int), bins - 1)
    covered = np.array([len(np.unique(column)) / bins for column in cells.T])
    return ActionCoverage(covered, ((place < 0.01) | (place > 0.99)).mean(axis=0))


def returns_histogram(data: Transitions, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(bins,) episodes per interval of the return and (bins + 1,) its edges; cut episodes are left out where there are complete ones."""
    complete = data.complete()
    returns = data.returns()[complete] if complete.any() else data.returns()
    return np.histogram(returns, bins=bins, range=histogram_range(returns))


def histogram_range(values: np.ndarray) -> tuple[float, float]:
    """(smallest, largest) value; a wider range around values that differ by rounding alone, between which no bin edges fit."""
    low, high = float(values.min()), float(values.max())
    size = max(1.0, abs(low), abs(high))
    margin = 0.0 if high - low > 1e-9 * size else max(0.5, 1e-6 * size)
    return low - margin, high + margin
