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

ENVS += [
    {
        "id": "markovia/PointMass2D-v0",
        "entry_point": "markovia.envs.exact.offline.pointmass:PointMass2D",
        "max_episode_steps": 40,
    },
    {
        "id": "markovia/PointObstacle-v0",
        "entry_point": "markovia.envs.exact.offline.obstacle:PointObstacle",
        "max_episode_steps": 60,
    },
    {"id": "markovia/OfflineReplay-v0", "entry_point": "markovia.envs.offline.replay:OfflineReplayEnv"},
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
        ("DigitsConditional", "digits_conditional", {"guidance": 1.0}),
        ("LinearGaussian", "linear_gaussian", {}),
        ("Pipeline", "pipeline", {"folder": "example", "reward": "brightness"}),
    )
]

ENVS += [
    {
        "id": f"markovia/{name}-v0",
        "entry_point": "markovia.envs.text.env:TokenEnv",
        "vector_entry_point": "markovia.envs.text.env:TokenVectorEnv",
        "kwargs": {"task": task, **kwargs},
    }
    for name, task, kwargs in (
        ("Arithmetic", "arithmetic", {"digits": 2}),
        ("Sentiment", "sentiment", {}),
        ("LengthControl", "length_control", {}),
        ("GSM8K", "gsm8k", {}),
        ("Prompts", "prompts", {}),
    )
]

_SAFE = "markovia.envs.safe."
ENVS += [
    {"id": f"markovia/Safe{robot}Velocity-v0", "entry_point": f"{_SAFE}velocity:Safe{robot}VelocityEnv", "max_episode_steps": 1000}
    for robot in ("Hopper", "Walker2d", "HalfCheetah", "Swimmer", "Ant", "Humanoid")
]
ENVS += [
    {"id": f"markovia/Safe{name}-v0", "entry_point": f"{_SAFE}{entry}", "max_episode_steps": steps}
    for name, entry, steps in (
        ("PointGoal", "point:PointGoalEnv", 1000),
        ("PointCircle", "point:PointCircleEnv", 500),
        ("PointRun", "point:PointRunEnv", 500),
        ("Pendulum", "pendulum:SafePendulumEnv", 200),
        ("Grid", "tabular:SafeGridEnv", 60),
        ("TwoState", "tabular:SafeTwoStateEnv", 100),
    )
]

ENVS += [{"id": "markovia/TwoGoals-v0", "entry_point": "markovia.envs.control.multi_objective:TwoGoalsEnv", "max_episode_steps": 25}]

# What kind of MDP an id is, for our own agents; ids that are not listed are control tasks.
KINDS: dict[str, str] = {
    "markovia/Tabular-v0": "tabular",
    "markovia/TabularCMDP-v0": "tabular",
    "markovia/TokenTree-v0": "tabular",
    "markovia/SafeGrid-v0": "tabular",
    "markovia/SafeTwoState-v0": "tabular",
    "markovia/Mixture2D-v0": "denoising",
    "markovia/Digits-v0": "denoising",
    "markovia/DigitsConditional-v0": "denoising",
    "markovia/LinearGaussian-v0": "denoising",
    "markovia/Pipeline-v0": "denoising",
    **{f"markovia/{name}-v0": "language" for name in ("Arithmetic", "Sentiment", "LengthControl", "GSM8K", "Prompts")},
}


def kind_of(env_id: str) -> str:
    """control, tabular, language or denoising."""
    return KINDS.get(env_id.rpartition(":")[2], "control")


def register_all() -> None:
    """Register each row once; calling it again does nothing (Gymnasium warns about a second registration)."""
    for row in ENVS:
        if row["id"] not in gym.registry:
            gym.register(**row)
