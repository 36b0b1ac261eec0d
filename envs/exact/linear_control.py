"""A point that is pulled to 0 by linear control at quadratic cost: the return of every linear-Gaussian policy, and the best one, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

START = 0.2  # standard deviation of the first state: six of them lie within the reach of an action


class LinearControl(gym.Env):
    """s' = s + a, r = -(s'^2 + c a^2), over a fixed number of steps.

    ## Action Space
    Box(-1, 1, (1,)): a; sensible policies stay far inside, so that the bound does not matter.

    ## Observation Space
    Box (horizon,): s at the place of the current step, 0 elsewhere, so that a linear policy may have a gain for each step.

    ## Starting State
    s ~ N(0, 0.2^2).

    ## Episode End
    Terminates after `horizon` steps, which is the task's own horizon.
    """

    def __init__(self, horizon: int = 2, cost: float = 0.5) -> None:
        self.horizon, self.cost = horizon, cost
        self.observation_space = spaces.Box(-np.inf, np.inf, (horizon,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def _obs(self) -> np.ndarray:
        out = np.zeros(self.horizon, np.float32)
        if self._time < self.horizon:
            out[self._time] = self._state
        return out

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._state, self._time = START * float(self.np_random.standard_normal()), 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        push = float(np.asarray(action).reshape(()))
        self._state, self._time = self._state + push, self._time + 1
        return self._obs(), -(self._state**2 + self.cost * push**2), self._time == self.horizon, False, {}


def linear_return(gains: Sequence[float], variance: float, cost: float) -> float:
    """E[return] of a_t = -k_t s_t + noise of the given variance.

    V_t(s) = -p_t s^2 - q_t:  p_t = (1 + p_{t+1})(1 - k_t)^2 + c k_t^2,  q_t = (1 + p_{t+1} + c) variance + q_{t+1};  E = -p_0 E s_0^2 - q_0
    """
    p, q = 0.0, 0.0
    for k in reversed(gains):
        p, q = (1 + p) * (1 - k) ** 2 + cost * k**2, (1 + p + cost) * variance + q
    return -p * START**2 - q


def best_gains(horizon: int, cost: float) -> list[float]:
    """Gains of the optimal policy, whatever its noise: k_t = (1 + p_{t+1})/(1 + p_{t+1} + c), p_t = c k_t (Riccati)."""
    p = 0.0
    gains: list[float] = []
    for _ in range(horizon):
        k = (1 + p) / (1 + p + cost)
        gains.insert(0, k)
        p = cost * k
    return gains
