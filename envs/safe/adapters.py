"""Safety-Gymnasium's step has six values, Gymnasium's five with the cost in `info["cost"]`; these two translate."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from markovia.envs.safe.cost import check_limit, checked_cost


class FromSafetyGymnasium(gym.Env):
    """A six-value environment (obs, reward, cost, terminated, truncated, info) as a Gymnasium one: the cost moves to info["cost"].

    `env` needs `reset`, `step`, `close` and the two spaces; nothing of safety-gymnasium is imported, so any version serves.
    """

    def __init__(self, env: Any, cost_limit: float = 25.0) -> None:
        self.env, self.cost_limit = env, check_limit(cost_limit)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.metadata = dict(getattr(env, "metadata", None) or {"render_modes": []})
        self.render_mode = getattr(env, "render_mode", None)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Raises ValueError for a step of another length and for a cost that is not a finite number >= 0."""
        values = tuple(self.env.step(action))
        if len(values) != 6:
            raise ValueError(f"expected safety-gymnasium's six values from step, got {len(values)}; a five-value environment needs no adapter")
        obs, reward, cost, terminated, truncated, info = values
        return obs, float(reward), bool(terminated), bool(truncated), {**info, "cost": checked_cost(cost)}

    def render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


class ToSafetyGymnasium:
    """A Gymnasium environment with info["cost"] behind safety-gymnasium's six-value step."""

    def __init__(self, env: gym.Env) -> None:
        self.env = env
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.metadata, self.render_mode = env.metadata, env.render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, float, bool, bool, dict[str, Any]]:
        """Raises ValueError when the environment tells no cost."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if "cost" not in info:
            raise ValueError(f"{self.env} put no 'cost' into info (keys {sorted(info)}); write the step's cost to info['cost']")
        return obs, float(reward), checked_cost(info["cost"]), terminated, truncated, info

    def render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        self.env.close()
