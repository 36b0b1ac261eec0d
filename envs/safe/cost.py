"""Checks that every task with a cost shares."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_limit(cost_limit: float) -> float:
    """The limit of an episode's cost as a float. Raises ValueError for a negative one: costs are >= 0, so no policy could meet it."""
    if not float(cost_limit) >= 0:
        raise ValueError(f"cost_limit must be >= 0, got {cost_limit}; costs are >= 0, so that no policy meets a lower limit")
    return float(cost_limit)


def checked_cost(value: Any) -> float:
    """A step's cost as a float. Raises ValueError when it is no number, not finite or negative."""
    try:
        cost = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the cost must be one number, got {value!r}; several costs need a column each, as an array in info['cost']") from error
    if not np.isfinite(cost) or cost < 0:
        raise ValueError(f"the cost must be finite and >= 0, got {cost}; a return that must stay high is the cost (best possible - reward)")
    return cost
