"""Every environment id of markovia in one table; registration is by string, so that importing this costs nothing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

# One row per id: gymnasium.register's arguments. Entry points are strings and kwargs plain data, so that Minari can store the spec.
ENVS: list[dict[str, Any]] = [
    {
        "id": "markovia/Tabular-v0",
        "entry_point": "markovia.envs.exact.gym_envs:TabularMDPEnv",
        "max_episode_steps": 100,
    },
    {
        "id": "markovia/TabularCMDP-v0",
        "entry_point": "markovia.envs.exact.gym_envs:CMDPEnv",
        "max_episode_steps": 100,
    },
    {
        "id": "markovia/TokenTree-v0",
        "entry_point": "markovia.envs.exact.gym_envs:TokenTreeEnv",
        "vector_entry_point": "markovia.envs.exact.gym_envs:TokenTreeVectorEnv",
    },
]

_DENOISING = "markovia.envs.denoising.tasks:"
ENVS += [
    {
        "id": f"markovia/{name}-v0",
        "entry_point": f"{_DENOISING}make_env",
        "vector_entry_point": f"{_DENOISING}make_vector_env",
        "kwargs": {"task": task, **kwargs},
    }
    for name, task, kwargs in (
        ("Mixture2D", "mixture2d", {"wanted": 0}),
        ("Digits", "digits", {"wanted": 3}),
        ("LinearGaussian", "linear_gaussian", {}),
    )
]


def register_all() -> None:
    """Register each row once; calling it again does nothing (Gymnasium warns about a second registration)."""
    for row in ENVS:
        if row["id"] not in gym.registry:
            gym.register(**row)
