"""Every environment id of markovia in one table; registration is by string, so that importing this costs nothing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

# One row per id: gymnasium.register's arguments. Entry points are strings and kwargs plain data, so that Minari can store the spec.
ENVS: list[dict[str, Any]] = []


def register_all() -> None:
    """Register each row once; calling it again does nothing (Gymnasium warns about a second registration)."""
    for row in ENVS:
        if row["id"] not in gym.registry:
            gym.register(**row)
