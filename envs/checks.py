"""What environments refuse in the same words."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_horizon(max_episode_steps: int | None, horizon: int) -> None:
    """A batched form has no time limit of its own. Raises ValueError for one that would end an episode before its horizon."""
    if max_episode_steps is not None and max_episode_steps < horizon:
        raise ValueError(f"max_episode_steps {max_episode_steps} would cut episodes of {horizon} steps; leave it out")


def box_action(action: Any, shape: tuple[int, ...] | None, dtype: type | None = np.float64) -> np.ndarray:
    """The action, in float64 or another dtype (None: its own). Raises ValueError for another shape, which would broadcast, and for numbers that are
    not finite."""
    a = np.asarray(action, dtype=dtype)
    if a.shape != shape or not np.isfinite(a).all():
        raise ValueError(f"expected an action of {shape} finite numbers, got {action!r}")
    return a


def whole_numbers(actions: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Discrete actions in int64. Raises ValueError for another shape, and for numbers that a conversion would round."""
    a = np.asarray(actions)
    whole = a.dtype.kind in "iub" or (a.dtype.kind == "f" and bool((np.isfinite(a) & (a == np.trunc(a))).all()))
    if a.shape != shape or not whole:
        raise ValueError(f"expected {shape} whole numbers as actions, () for a single one, got {actions!r}")
    return a.astype(np.int64, copy=False)


def discrete_action(action: Any, count: int) -> int:
    """One action in 0..count - 1. Raises ValueError for others."""
    a = action if isinstance(action, int | np.integer) else whole_numbers(action, ())  # the usual case is quick
    if not 0 <= a < count:
        raise ValueError(f"expected an integer in 0..{count - 1} as action, got {action!r}")
    return int(a)
