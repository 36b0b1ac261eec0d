"""A pendulum with a limit on its angular velocity: the cheapest control task on which a cost limit binds."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from markovia.envs.checks import box_action
from markovia.envs.safe.cost import check_limit


class SafePendulumEnv(PendulumEnv):
    """Swing up, but slowly.

    ## Description
    Gymnasium's Pendulum-v1 with cost 1 for every step whose angular velocity exceeds `max_velocity`; an episode may cost `cost_limit`.
    Random actions cost 0 to 174 an episode (100 episodes), 85 % of them over 80, so that the limit binds from the start.

    ## Action Space
    That of Pendulum-v1: a torque in [-2, 2].

    ## Observation Space
    That of Pendulum-v1: cos and sin of the angle, angular velocity.

    ## Rewards
    That of Pendulum-v1, unchanged. `info["cost"]` is 1.0 when |angular velocity| > `max_velocity` after the step, else 0.0.

    ## Starting State
    That of Pendulum-v1.

    ## Episode End
    Never terminates; the registered id is truncated after 200 steps.

    ## Arguments
    `max_velocity=2.0` rad/s. `cost_limit=25.0`: what an episode may cost, the bound that `markovia cost-of` reports against where a run has none of
    its own; a learner's is `Constraint.cost_limit`. `g` and `render_mode` as in Pendulum-v1.
    """

    def __init__(self, render_mode: str | None = None, g: float = 10.0, max_velocity: float = 2.0, cost_limit: float = 25.0) -> None:
        super().__init__(render_mode=render_mode, g=g)
        self.max_velocity, self.cost_limit = float(max_velocity), check_limit(cost_limit)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, _, _, _ = super().step(box_action(action, self.action_space.shape, None))
        return obs, float(reward), False, False, {"cost": float(abs(self.state[1]) > self.max_velocity)}
