"""Which returns count as 0 and as 100, with their provenance: references of D4RL, and those that a dataset brings with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from markovia.envs.names import nearest

TABLE = Path(__file__).parent / "references.json"


@dataclass(frozen=True)
class Reference:
    """Returns that count as 0 and as 100 for one task under one time limit. Raises ValueError unless minimum < maximum."""

    env_id: str
    horizon: int | None
    minimum: float
    maximum: float
    source: str

    def __post_init__(self) -> None:
        if not self.minimum < self.maximum:
            raise ValueError(f"{self.env_id}: the reference minimum {self.minimum} must lie below the maximum {self.maximum}")

    def score_pct(self, returns: Any) -> np.ndarray:
        """100 (R - minimum) / (maximum - minimum) of undiscounted returns, untransformed rewards        [Fu 2020; arXiv 2004.07219]."""
        return 100.0 * (np.asarray(returns, dtype=np.float64) - self.minimum) / (self.maximum - self.minimum)


@cache
def references() -> dict[tuple[str, int], Reference]:
    """Every known reference by (env id, horizon)."""
    data = json.loads(TABLE.read_text())
    out = {}
    for row in data["rows"]:
        for env_id in row["env_ids"]:
            key = (env_id, row["horizon"])
            if key in out:
                raise ValueError(f"{TABLE.name} has two references for {key}")
            out[key] = Reference(*key, row["min"], row["max"], data["sources"][row["source"]])
    return out


def reference(env_id: str, horizon: int) -> Reference:
    """The reference of one task. Raises ValueError for an unknown id (with the nearest) and for another time limit than the one it was made with."""
    known = references()
    if (env_id, horizon) in known:
        return known[env_id, horizon]
    limits = sorted(h for e, h in known if e == env_id)
    if limits:
        made = " or ".join(map(str, limits))
        raise ValueError(
            f"the reference returns of {env_id} were made with episodes of at most {made} steps, not {horizon}; returns of another "
            f"time limit can't be put on that scale: evaluate with max_episode_steps={limits[0]}"
        )
    hint = nearest(env_id, sorted({e for e, _ in known}))
    raise ValueError(f"no reference returns are known for {env_id!r}{hint} (a dataset may bring its own: ref_min_score and ref_max_score)")


def score_pct(returns: Any, env_id: str, horizon: int) -> np.ndarray:
    """`returns` on the scale of `reference(env_id, horizon)`, 0 to 100 and beyond; raises what that raises."""
    return reference(env_id, horizon).score_pct(returns)
