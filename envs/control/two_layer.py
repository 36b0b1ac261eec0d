"""The two-layer MDP of a chunk-denoising policy as an environment: inside the denoising steps of a chunk, outside the steps that it makes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from markovia.envs.control.chunks import ChunkEnv


class TwoLayerEnv(gym.Env, gym.utils.RecordConstructorArgs):
    """Every denoising step of a chunk of actions is a decision of its own; the inner environment moves when a chunk is clean.

    ## Description
    A state is (window, x_k, k). For k < K - 1 the action x' takes the place of x and nothing else happens: reward 0. At k = K - 1 the first
    `act_steps` actions of x' are carried out, their rewards added up, and a new chunk begins from standard normal noise.
    [Ren 2024, arXiv 2409.00588, section 4.1]
    `dppo` does not step it: its collector denoises whole chunks and unrolls them into the same record.

    ## Action Space
    Box(-bound, bound, (horizon, d)): the next sample x'; what is carried out is clipped to [-1, 1] and stretched to the inner Box.

    ## Observation Space
    Dict: `obs`, the window of inner observations; `sample`, x_k; `step`, k.

    ## Rewards
    0.0 within a chunk, the sum of the inner rewards at its end.

    ## Starting State
    The inner one, with x_0 ~ N(0, I).

    ## Episode End
    That of the inner environment, which can only come at the end of a chunk.
    """

    def __init__(self, env: gym.Env, num_steps: int, horizon: int = 1, act_steps: int = 1, obs_steps: int = 1, bound: float = 10.0) -> None:
        gym.utils.RecordConstructorArgs.__init__(
            self, num_steps=num_steps, horizon=horizon, act_steps=act_steps, obs_steps=obs_steps, bound=bound
        )
        if num_steps < 1 or not act_steps <= horizon:
            raise ValueError(f"expected num_steps >= 1 and act_steps <= horizon, got {num_steps}, {act_steps} and {horizon}")
        self.env, self.num_steps, self.act_steps = ChunkEnv(env, act_steps, obs_steps), num_steps, act_steps
        self._inner: Any = env.action_space
        self._shape = (horizon, int(spaces.flatdim(self._inner)))
        self.action_space = spaces.Box(-bound, bound, self._shape, np.float32)
        self.observation_space = spaces.Dict(
            obs=self.env.observation_space, sample=spaces.Box(-np.inf, np.inf, self._shape, np.float32), step=spaces.Discrete(num_steps)
        )

    def _observed(self) -> dict[str, Any]:
        return {"obs": self._window.copy(), "sample": self._sample.copy(), "step": self._step}

    def _begin(self, window: np.ndarray) -> None:
        self._window, self._step = window, 0
        self._sample = self.np_random.standard_normal(self._shape).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        window, info = self.env.reset(seed=seed, options=options)
        self._begin(window)
        return self._observed(), info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        if self._step < self.num_steps - 1:
            self._sample, self._step = np.asarray(action, dtype=np.float32).reshape(self._shape), self._step + 1
            return self._observed(), 0.0, False, False, {}
        low, high = self._inner.low, self._inner.high
        unit = np.asarray(action)[: self.act_steps].reshape(self.act_steps, *self._inner.shape)
        chunk = np.clip(low + 0.5 * (unit + 1.0) * (high - low), low, high).astype(self._inner.dtype)
        window, reward, terminated, truncated, info = self.env.step(chunk)
        self._begin(window)
        return self._observed(), reward, terminated, truncated, info

    def close(self) -> None:
        self.env.close()
