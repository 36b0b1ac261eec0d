"""Tasks with a cost: every step's `info["cost"]` is a float >= 0, and `cost_limit` on the environment is what an episode may cost, the bound that
`markovia cost-of` reports against where a run has none of its own; where it bounds a discounted cost, `cost_gamma` is the discount.

velocity.py   robots with a speed limit          point.py    a point robot among hazards (Goal, Circle, Run)
tabular.py    problems with an exact optimum     adapters.py safety-gymnasium's six-value step, both ways
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "FromSafetyGymnasium": "adapters",
    "ToSafetyGymnasium": "adapters",
    "SafeGridEnv": "tabular",
    "SafeTwoStateEnv": "tabular",
    "PointGoalEnv": "point",
    "PointCircleEnv": "point",
    "PointRunEnv": "point",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Lazy, because the point robot loads MuJoCo.
    if name in _HOME:
        return getattr(importlib.import_module(f"markovia.envs.safe.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
