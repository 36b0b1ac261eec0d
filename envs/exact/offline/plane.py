"""What the fixtures F3 and F5 share: a point in the square that is pushed about, with a little noise."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from markovia.envs.checks import box_action

SPEED, NOISE = 0.1, 0.01


def pushed(state: np.ndarray, action: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """s' = clip(s + 0.1 clip(a) + noise); any leading shape."""
    return np.clip(state + SPEED * np.clip(action, -1.0, 1.0) + noise, -1.0, 1.0)


def square() -> spaces.Box:
    """The space of positions, and that of pushes."""
    return spaces.Box(-1.0, 1.0, (2,), np.float32)


class Plane(gym.Env):
    """Position and push in [-1, 1]^2; a task says where the point starts, and what an arrival pays and whether it ends the episode."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = square(), square()
        self._state: np.ndarray | None = None

    @abstractmethod
    def _start(self) -> np.ndarray: ...

    @abstractmethod
    def _arrived(self, state: np.ndarray) -> tuple[float, bool]:
        """Reward, and whether the episode ends."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._state = self._start()
        return self._state.astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._state is None:
            raise ValueError("step before reset: call env.reset() first")
        self._state = pushed(self._state, box_action(action, (2,)), NOISE * self.np_random.standard_normal(2))
        reward, ended = self._arrived(self._state)
        return self._state.astype(np.float32), reward, ended, False, {}
