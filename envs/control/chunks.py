"""Chunks of actions as the actions of an environment: what a policy that plans several steps at once is stepped in."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import batch_space

from markovia.envs.control.vector import env_spec, make_env


class ChunkEnv(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray], gym.utils.RecordConstructorArgs):
    """One step carries out `act_steps` actions of the inner environment, fewer where the episode ends before.

    Observations are windows of the last `obs_steps` inner ones, oldest first (the first one repeated at the beginning); the reward is the sum of
    the inner rewards, and so is info["cost"] where any step tells one. `num_env_steps` counts inner steps since construction.
    """

    def __init__(self, env: gym.Env, act_steps: int, obs_steps: int = 1) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, act_steps=act_steps, obs_steps=obs_steps)
        gym.Wrapper.__init__(self, env)
        if act_steps < 1 or obs_steps < 1:
            raise ValueError(f"act_steps and obs_steps must be >= 1, got {act_steps} and {obs_steps}")
        for name, space in (("action", env.action_space), ("observation", env.observation_space)):
            if not isinstance(space, spaces.Box):
                raise ValueError(f"chunks are made of Boxes, but the {name} space is {space}; choose an environment with continuous actions")
        self.act_steps, self.obs_steps, self.num_env_steps = act_steps, obs_steps, 0
        self.action_space = batch_space(env.action_space, act_steps)
        self.observation_space = batch_space(env.observation_space, obs_steps)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._window = [obs] * self.obs_steps
        return np.stack(self._window), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        total, costs = 0.0, list[Any]()
        for one in action:
            obs, reward, terminated, truncated, info = self.env.step(one)
            self.num_env_steps += 1
            self._window = [*self._window[1:], obs]
            total += float(reward)
            if "cost" in info:
                costs.append(info["cost"])
            if terminated or truncated:
                break
        return np.stack(self._window), total, terminated, truncated, ({**info, "cost": sum(costs, 0.0)} if costs else info)


def _chunked(env_id: str, act_steps: int, obs_steps: int, kwargs: dict[str, Any]) -> gym.Env:
    return ChunkEnv(make_env(env_id, **kwargs), act_steps, obs_steps)


def make_chunk_vec(env_id: str, num_envs: int, act_steps: int, obs_steps: int, seed: int | None = None, kwargs: dict[str, Any] | None = None) -> Any:
    """`num_envs` copies of an id behind `ChunkEnv`, one after the other, since their episodes may end within a chunk; SAME_STEP autoreset."""
    make = partial(_chunked, env_id, act_steps, obs_steps, dict(kwargs or {}))
    venv = SyncVectorEnv([make] * num_envs, autoreset_mode="SameStep")
    venv.spec = env_spec(env_id)
    if seed is not None:
        venv.reset(seed=seed)
    return venv
