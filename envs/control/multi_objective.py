"""Several rewards at once: a bundled task, and tasks of mo-gymnasium, with a preference that makes one reward of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from markovia.envs.checks import box_action


def preference(weights: Sequence[float], n: int) -> np.ndarray:
    """(n,) weights. Raises ValueError for another number of them, for negative ones and where all are 0."""
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (n,) or not (w >= 0).all() or not w.sum() > 0:
        raise ValueError(f"weights must be {n} numbers >= 0, not all 0, one per objective, got {weights!r}")
    return w


class Scalarised(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """An environment whose reward is a vector (mo-gymnasium's) as a Gymnasium one: the reward is weights . r.

    `info["rewards"]` is r (n,) and `info["cost"]` the shortfall best - r >= 0, one column per objective, so that a floor under a return G of T steps
    is the cost limit T best - floor. `best` (n,) is what a step can pay at most; where it is None, `reward_space.high` must say so.
    Where episodes terminate early, `length` = T charges the steps that are missing: the cost of a termination at step t < T is
    best - r + (T - t) best, so that an episode's costs add up to T best - G whatever its end, and a fall meets no floor.
    Raises ValueError for weights that do not fit, for unknown bounds, for a reward above its bound, for a charge below 0, and for episodes that the
    environment cuts off before `length`.
    """

    def __init__(self, env: gym.Env, weights: Sequence[float], best: Sequence[float] | None = None, length: int | None = None) -> None:
        plain = {"weights": np.asarray(weights).tolist(), "best": None if best is None else np.asarray(best).tolist()}
        gym.utils.RecordConstructorArgs.__init__(self, **plain, length=length)
        gym.Wrapper.__init__(self, env)
        reward_space: Any = getattr(env.unwrapped, "reward_space", None)
        if not isinstance(reward_space, spaces.Box):
            raise ValueError(f"{env} has no Box as reward_space, so its reward is no vector; a task of mo-gymnasium has one")
        self.weights = preference(weights, int(np.prod(reward_space.shape)))
        self.best = np.asarray(reward_space.high if best is None else best, dtype=np.float64)
        if self.best.shape != self.weights.shape or not np.isfinite(self.best).all():
            raise ValueError(f"best must be {len(self.weights)} finite numbers, what a step pays at most, got {self.best.tolist()}; pass best=[...]")
        if length is not None and not (length >= 1 and (self.best >= 0).all()):
            raise ValueError(
                f"length must be >= 1, the steps of a full episode, and charges missing steps with best >= 0, got length={length} and "
                f"best={self.best.tolist()}; pass a bound that is not negative"
            )
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, rewards, terminated, truncated, info = self.env.step(action)
        r = np.asarray(rewards, dtype=np.float64)
        if (r > self.best + 1e-9).any():
            raise ValueError(f"a step paid {r.tolist()}, more than best={self.best.tolist()}; raise best")
        cost = np.maximum(self.best - r, 0.0)
        self._steps += 1
        missing = 0 if self.length is None else max(self.length - self._steps, 0)
        if terminated:
            cost += missing * self.best
        elif truncated and missing:
            raise ValueError(f"{self.env} cut an episode off after {self._steps} steps, but length={self.length}; pass its own limit as length")
        return obs, float(self.weights @ r), bool(terminated), bool(truncated), {**info, "rewards": r, "cost": cost}


def from_mo_gymnasium(
    task: str, weights: Sequence[float], best: Sequence[float] | None = None, length: int | None = None, **kwargs: Any
) -> Scalarised:
    """`mo_gymnasium.make(task)` with a preference. Raises ImportError naming the package where it is not installed."""
    try:
        import mo_gymnasium
    except ImportError as missing:
        raise ImportError("tasks of mo-gymnasium need it: pip install mo-gymnasium") from missing
    return Scalarised(mo_gymnasium.make(task, **kwargs), weights, best, length)


class TwoGoalsEnv(gym.Env):
    """Two goals that one point can't reach at once.

    ## Description
    A point moves in a square and is paid for its closeness to each of two goals; a preference says what each is worth. Where it stays between the
    goals is the whole trade-off: at (p, 0) it earns 1 - (p + 1)^2 / 4 and 1 - (p - 1)^2 / 4 a step.

    ## Action Space
    Box(-1, 1, (2,)): the point moves by 0.2 times the action, which is clipped, and stops at the edge of the square.

    ## Observation Space
    Box((2,), float32): position, each coordinate in [-1.5, 1.5].

    ## Rewards
    weights . r with r_i = 1 - |x - goal_i|^2 / 4 after the step, goals (-1, 0) and (1, 0). `info["rewards"]` is r, `info["cost"]` the two shortfalls
    1 - r_i >= 0.

    ## Starting State
    Uniform in [-0.1, 0.1]^2.

    ## Episode End
    Never terminates; the registered id is truncated after 25 steps.

    ## Arguments
    `weights=(0.5, 0.5)`: the preference, two numbers >= 0.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]
    GOALS = np.array([[-1.0, 0.0], [1.0, 0.0]])
    best = np.ones(2)

    def __init__(self, weights: Sequence[float] = (0.5, 0.5), render_mode: str | None = None) -> None:
        self.weights, self.render_mode = preference(weights, 2), render_mode
        self.observation_space = spaces.Box(-1.5, 1.5, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-0.1, 0.1, 2)
        return self.position.astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.position = np.clip(self.position + 0.2 * box_action(action, (2,)).clip(-1.0, 1.0), -1.5, 1.5)
        rewards = 1.0 - np.square(self.position - self.GOALS).sum(-1) / 4.0
        return self.position.astype(np.float32), float(self.weights @ rewards), False, False, {"rewards": rewards, "cost": 1.0 - rewards}
