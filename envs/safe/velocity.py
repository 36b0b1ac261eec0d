"""Robots with a speed limit: Gymnasium's v5 tasks with cost 1 for every step above the published speed.

The limits are half of what PPO reaches in 10 million steps (Safety-Gymnasium's Safety...Velocity-v1). The published tasks stand on the v4
robots; here the v5 robots are set to them (no contact terms). What remains different: Hopper, Walker2d, Ant and Humanoid don't get the healthy
reward in the step in which they fall, Walker2d's two feet have equal friction, and Humanoid observes 348 numbers and not 376 (v4's constants).
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle

from markovia.envs.control.vector import quiet_mujoco
from markovia.envs.safe.cost import check_limit

try:
    from gymnasium.envs.mujoco.ant_v5 import AntEnv
    from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
    from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
    from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
    from gymnasium.envs.mujoco.swimmer_v5 import SwimmerEnv
    from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
except (ImportError, gym.error.DependencyNotInstalled) as missing:
    raise ImportError("the velocity tasks need MuJoCo: pip install markovia[control]") from missing

_DOC = """{robot} that runs as fast as it is allowed to.

    ## Description
    Gymnasium's {robot}-v5 ({settings}) with a limit on the speed. The cost counts the steps above the limit; an episode may cost `cost_limit`.
    Published task: Safety-Gymnasium's Safety{robot}Velocity-v1.

    ## Action Space
    That of {robot}-v5.

    ## Observation Space
    That of {robot}-v5.

    ## Rewards
    That of {robot}-v5, unchanged. `info["cost"]` is 1.0 when the speed of the step, {speed}, exceeds `max_speed`, else 0.0.

    ## Starting State
    That of {robot}-v5.

    ## Episode End
    Terminates like {robot}-v5; the registered id is truncated after 1000 steps.

    ## Arguments
    `max_speed={limit}` m/s (the older v0 task: {older}{older_note}). `cost_limit=25.0`: what an episode may cost, the bound that `markovia cost-of`
    reports against where a run has none of its own; a learner's is `Constraint.cost_limit`. All other arguments are {robot}-v5's.
    """


class _SpeedLimit(EzPickle):
    """Adds the cost to a MuJoCo robot that reports its velocity in `info`; stands before the robot's class among the bases."""

    published_speed: ClassVar[float]
    settings: ClassVar[dict[str, Any]] = {}
    in_plane: ClassVar[bool] = False  # the speed is the length of (x, y), else that along x with its sign

    def __init_subclass__(cls, older: float, older_note: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__doc__ = _DOC.format(
            robot=cls.__name__.removeprefix("Safe").removesuffix("VelocityEnv"),
            settings=", ".join(f"{k}={v}" for k, v in cls.settings.items()) or "its default arguments",
            speed="the length of its velocity in the plane" if cls.in_plane else "its velocity along x with the sign",
            limit=cls.published_speed,
            older=older,
            older_note=older_note,
        )

    def __init__(self, *args: Any, max_speed: float | None = None, cost_limit: float = 25.0, **kwargs: Any) -> None:
        self.max_speed = self.published_speed if max_speed is None else float(max_speed)
        self.cost_limit = check_limit(cost_limit)
        with quiet_mujoco():
            super().__init__(*args, **{**self.settings, **kwargs})
        EzPickle.__init__(self, *args, max_speed=max_speed, cost_limit=cost_limit, **kwargs)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)  # type: ignore[misc]
        speed = np.hypot(info["x_velocity"], info["y_velocity"]) if self.in_plane else info["x_velocity"]
        info["cost"] = float(speed > self.max_speed)
        return obs, float(reward), bool(terminated), bool(truncated), info


class SafeHopperVelocityEnv(_SpeedLimit, HopperEnv, older=0.37315):
    published_speed = 0.7402


class SafeWalker2dVelocityEnv(_SpeedLimit, Walker2dEnv, older=1.7075):
    published_speed = 2.3415


class SafeHalfCheetahVelocityEnv(_SpeedLimit, HalfCheetahEnv, older=2.8795):
    published_speed = 3.2096


class SafeSwimmerVelocityEnv(_SpeedLimit, SwimmerEnv, older=0.04845, older_note=", on the length of the velocity"):
    published_speed = 0.2282


class SafeAntVelocityEnv(_SpeedLimit, AntEnv, older=2.5745):
    published_speed = 2.6222
    settings: ClassVar[dict[str, Any]] = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}
    in_plane = True


class SafeHumanoidVelocityEnv(_SpeedLimit, HumanoidEnv, older=2.3475):
    published_speed = 1.4149
    settings: ClassVar[dict[str, Any]] = {"contact_cost_weight": 0}
    in_plane = True
