"""F5: a point that must pass an obstacle on either side; its data hold both ways, and succeed half of the time."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from markovia.envs.exact.offline.plane import NOISE, Plane, pushed, square
from markovia.envs.offline.scores import Reference
from markovia.envs.offline.transitions import About, Transitions

START, GOAL, CENTRE = np.array([-0.8, 0.0]), np.array([0.8, 0.0]), np.array([0.0, 0.0])
RADIUS = 0.35  # of the obstacle
REACHED = 0.15  # distance at which the goal counts as reached
SPREAD = 0.05
HORIZON = 60
ENV_ID = "markovia/PointObstacle-v0"
NUM_EPISODES = 400


def outcome(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether the goal is reached, and whether the obstacle is hit; any leading shape."""
    return np.linalg.norm(state - GOAL, axis=-1) < REACHED, np.linalg.norm(state - CENTRE, axis=-1) < RADIUS


class PointObstacle(Plane):
    """A point in the plane has to reach a goal behind a round obstacle.

    ## Description
    s' = clip(s + 0.1 a + N(0, 0.01^2)); the way above the obstacle is as good as the way below, their mean leads into it. Fixture F5 of the
    offline methods: `fixture:obstacle` holds episodes of both ways, of which about half succeed.

    ## Action Space
    Box(-1, 1, (2,)): the push.

    ## Observation Space
    Box(-1, 1, (2,)): the position.

    ## Rewards
    1.0 when the goal is reached, 0.0 otherwise: an episode's return says whether it succeeded.

    ## Starting State
    N((-0.8, 0), 0.05^2), left of the obstacle; the goal is at (0.8, 0).

    ## Episode End
    Terminates at the goal and at the obstacle; the registered id is truncated after 60 steps.
    """

    def _start(self) -> np.ndarray:
        return np.clip(START + SPREAD * self.np_random.standard_normal(2), -1.0, 1.0)

    def _arrived(self, state: np.ndarray) -> tuple[float, bool]:
        reached, hit = outcome(state)
        return float(reached), bool(reached or hit)


def passing(state: np.ndarray, height: float, noise: np.ndarray) -> np.ndarray:
    """A push towards (0, height) until the point is past it, then to the goal; with noise on it."""
    target = np.array([0.05, height]) if state[0] < 0.0 else GOAL
    away = target - state
    return np.clip(0.6 * away / max(np.linalg.norm(away), 0.1) + noise, -1.0, 1.0)


def obstacle_data(seed: int = 0, episodes: int = NUM_EPISODES, noise: float = 0.3) -> Transitions:
    """Episodes of a clumsy controller: each takes one side, and a detour whose width is drawn anew, so that about half of them hit the obstacle.

    noise  standard deviation of its actions; 0.3 fills the space of actions, with 0.03 they lie close to a surface
    """
    rng = np.random.default_rng([seed, 5])
    found: dict[str, list[Any]] = {k: [] for k in ("obs", "action", "reward", "next_obs", "terminated", "truncated", "episode")}
    for number in range(episodes):
        side, width = rng.choice([-1.0, 1.0]), rng.uniform(0.28, 0.7)
        state = np.clip(START + SPREAD * rng.standard_normal(2), -1.0, 1.0)
        for step in range(HORIZON):
            action = passing(state, side * width, noise * rng.standard_normal(2))
            new = pushed(state, action, NOISE * rng.standard_normal(2))
            reached, hit = outcome(new)
            end = bool(reached or hit)
            row = (state, action, float(reached), new, end, step == HORIZON - 1 and not end, number)
            for column, value in zip(found.values(), row, strict=True):
                column.append(value)
            if end:
                break
            state = new
    floats = {k: np.asarray(found[k], dtype=np.float32) for k in ("obs", "action", "reward", "next_obs")}
    flags = {k: np.asarray(found[k], dtype=bool) for k in ("terminated", "truncated")}
    reference = Reference(ENV_ID, HORIZON, 0.0, 1.0, "success rate: no episode and every episode")
    about = About("obstacle" if noise == 0.3 else f"obstacle with noise {noise:g}", ENV_ID, HORIZON, square(), square(), gym.spec(ENV_ID), reference)
    return Transitions(**floats, **flags, episode=np.asarray(found["episode"]), about=about)
