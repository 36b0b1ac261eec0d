"""A point robot that pushes itself forward and turns: Goal, Circle and Run, each with regions that cost.

The tasks follow the definitions of Safety-Gymnasium's SafetyPointGoal, -Circle and -Run (rewards, sizes, limits, time scales); the model is our
own and simpler: no collisions and no vases.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from markovia.envs.checks import box_action
from markovia.envs.safe.cost import check_limit
from markovia.envs.safe.point_model import BINS, FRAME_SKIP, TIMESTEP, disc, point_model, pseudo_lidar, scatter, wall

try:
    import mujoco
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
except (ImportError, gym.error.DependencyNotInstalled) as missing:
    raise ImportError("the point robot needs MuJoCo: pip install markovia[control]") from missing

GREEN, BLUE = "0.2 0.7 0.3 0.5", "0.2 0.35 0.85 0.6"


class _PointEnv(gym.Env):
    """The robot, its sensors and the picture; a task adds its regions, its layout, what it sees of them, reward and cost."""

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["human", "rgb_array", "depth_array"],
        "render_fps": round(1 / (FRAME_SKIP * TIMESTEP)),
    }
    camera: ClassVar[dict[str, Any]] = {"distance": 5.5, "elevation": -75.0, "azimuth": 90.0, "lookat": np.zeros(3)}

    def __init__(
        self,
        regions: list[str],
        floor: float,
        seen: tuple[np.ndarray, np.ndarray],  # bounds of what the task lets the robot see
        render_mode: str | None,
        width: int,
        height: int,
        cost_limit: float,
    ) -> None:
        self.cost_limit = check_limit(cost_limit)
        self.model = mujoco.MjModel.from_xml_string(point_model(regions, floor))
        self.model.vis.global_.offwidth = max(self.model.vis.global_.offwidth, width)
        self.model.vis.global_.offheight = max(self.model.vis.global_.offheight, height)
        self.data = mujoco.MjData(self.model)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        low, high = (np.concatenate([np.full(12, bound), part]) for bound, part in zip((-np.inf, np.inf), seen, strict=True))
        self.observation_space = spaces.Box(low, high, dtype=np.float64)
        self.render_mode = render_mode
        self.mujoco_renderer = MujocoRenderer(self.model, self.data, {**self.camera}, width, height)

    # -- what a task fills in ---------------------------------------------------------------------------------------------------------

    def _start(self) -> tuple[np.ndarray, float]:
        """Draw the layout; position (2,) and heading of the robot."""
        raise NotImplementedError

    def _seen(self) -> np.ndarray:
        """What the robot observes besides its own sensors."""
        raise NotImplementedError

    def _reward(self) -> tuple[float, dict[str, Any]]:
        """Reward of the step and what `info` says of it."""
        raise NotImplementedError

    def _cost(self) -> float:
        raise NotImplementedError

    # -- the robot --------------------------------------------------------------------------------------------------------------------

    @property
    def position(self) -> np.ndarray:
        """(2,) m, of the robot's centre."""
        return self.data.qpos[:2].copy()

    @property
    def velocity(self) -> np.ndarray:
        """(2,) m/s, in the world's axes."""
        return self.data.qvel[:2].copy()

    @property
    def heading(self) -> float:
        """rad, counter-clockwise from x."""
        return float(self.data.qpos[2])

    def _place(self, name: str, at: np.ndarray) -> None:
        self.model.geom(name).pos[:2] = at

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.data.sensordata, self._seen()])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:2], self.data.qpos[2] = self._start()
        mujoco.mj_forward(self.model, self.data)
        if self.render_mode == "human":
            self.render()
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.data.ctrl[:] = box_action(action, (2,))
        mujoco.mj_step(self.model, self.data, nstep=FRAME_SKIP)
        mujoco.mj_forward(self.model, self.data)  # sensors of the state that was reached, not of the one before
        cost = self._cost()  # before a new goal is drawn
        reward, info = self._reward()
        if self.render_mode == "human":
            self.render()
        return self._observe(), float(reward), False, False, {"cost": float(cost), **info}

    def render(self) -> Any:
        return self.mujoco_renderer.render(self.render_mode)

    def close(self) -> None:
        self.mujoco_renderer.close()


class PointGoalEnv(_PointEnv):
    """Reach one goal after the other; hazards lie around.

    ## Description
    A goal region appears at random; when the robot's centre enters it, the next one appears. Hazards don't move during an episode and don't
    obstruct: being in one costs. Definition of Safety-Gymnasium's SafetyPointGoal, without vases.

    ## Action Space
    Box(-1, 1, (2,)): force forward, turning velocity (counter-clockwise).

    ## Observation Space
    Box((44,), float64): accelerometer, velocimeter, gyro, magnetometer (3 each, in the robot's frame), then 16 sectors of closeness to the goal and
    16 to the hazards, counter-clockwise from straight ahead, 1 - distance / 3 m.

    ## Rewards
    The decrease of the distance to the goal in m, and 1 on reaching it. `info["cost"]` is 1.0 while the robot's centre is in a hazard (radius 0.2),
    else 0.0; `info["goal_met"]` tells that a goal was reached.

    ## Starting State
    Robot, goal and hazards anywhere in the square, apart from each other; no start costs. The layout is drawn from the reset's seed.

    ## Episode End
    Never terminates; the registered id is truncated after 1000 steps of 0.02 s.

    ## Arguments
    `level=1`: 8 hazards in a square of 3 m; `level=2`: 10 in 4 m. `cost_limit=25.0`: what an episode may cost, the bound that `markovia cost-of`
    reports against where a run has none of its own; a learner's is `Constraint.cost_limit`. `render_mode`, `width=480`, `height=480`.
    """

    GOAL_RADIUS, HAZARD_RADIUS, REACH = 0.3, 0.2, 3.0
    _ROBOT, _GOAL, _HAZARD = 0.4, 0.305, 0.18  # keep-outs
    LEVELS: ClassVar[dict[int, tuple[int, float]]] = {1: (8, 1.5), 2: (10, 2.0)}  # hazards, half of the square

    def __init__(self, level: int = 1, cost_limit: float = 25.0, render_mode: str | None = None, width: int = 480, height: int = 480) -> None:
        if level not in self.LEVELS:
            raise ValueError(f"level must be 1 or 2, got {level!r}")
        self.num_hazards, self.half = self.LEVELS[level]
        regions = [disc("goal", self.GOAL_RADIUS, GREEN, 0.15)]
        regions += [disc(f"hazard{i}", self.HAZARD_RADIUS, BLUE) for i in range(self.num_hazards)]
        super().__init__(regions, self.half + 1.0, (np.zeros(2 * BINS), np.ones(2 * BINS)), render_mode, width, height, cost_limit)

    def _start(self) -> tuple[np.ndarray, float]:
        robot, *rest = scatter(self.np_random, [self._ROBOT, self._GOAL, *[self._HAZARD] * self.num_hazards], self.half)
        self.goal, self.hazards = rest[0], np.array(rest[1:])
        for i, at in enumerate(self.hazards):
            self._place(f"hazard{i}", at)
        self._place("goal", self.goal)
        self._distance = float(np.hypot(*(self.goal - robot)))
        return robot, float(self.np_random.uniform(-np.pi, np.pi))

    def _next_goal(self) -> None:
        fixed = np.vstack([[*self.position, self._ROBOT], np.column_stack([self.hazards, np.full(self.num_hazards, self._HAZARD)])])
        self.goal = scatter(self.np_random, [self._GOAL], self.half, fixed)[0]
        self._place("goal", self.goal)
        self._distance = float(np.hypot(*(self.goal - self.position)))

    def _seen(self) -> np.ndarray:
        return np.concatenate([pseudo_lidar(self.position, self.heading, x, self.REACH) for x in (self.goal, self.hazards)])

    def _reward(self) -> tuple[float, dict[str, Any]]:
        before, self._distance = self._distance, float(np.hypot(*(self.goal - self.position)))
        reward, met = before - self._distance, self._distance <= self.GOAL_RADIUS
        if met:
            self._next_goal()
        return reward + met, {"goal_met": met}

    def _cost(self) -> float:
        return float((np.hypot(*(self.hazards - self.position).T) <= self.HAZARD_RADIUS).any())


class PointCircleEnv(_PointEnv):
    """Run fast on a circle that sticks out of the allowed strip.

    ## Description
    The reward asks for speed along a circle of radius 1.5 m around the origin, counter-clockwise; the strip |x| <= 1.125 is all that is free.
    Definition of Safety-Gymnasium's SafetyPointCircle.

    ## Action Space
    Box(-1, 1, (2,)): force forward, turning velocity (counter-clockwise).

    ## Observation Space
    Box((28,), float64): accelerometer, velocimeter, gyro, magnetometer (3 each, in the robot's frame), then 16 sectors of closeness to the circle's
    centre, counter-clockwise from straight ahead, 1 - distance / 6 m.

    ## Rewards
    0.1 ((x v_y - y v_x) / rho) / (1 + |rho - 1.5|) with rho the distance to the centre, m and m/s. `info["cost"]` is 1.0 outside of the strip,
    else 0.0.

    ## Starting State
    Anywhere with |x|, |y| <= 0.8, at rest, any heading.

    ## Episode End
    Never terminates; the registered id is truncated after 500 steps of 0.02 s.

    ## Arguments
    `level=1`: the strip |x| <= 1.125; `level=2`: |y| <= 1.125 too. `cost_limit=25.0`: what an episode may cost, the bound that `markovia
    cost-of` reports against where a run has none of its own; a learner's is `Constraint.cost_limit`. `render_mode`, `width=480`, `height=480`.
    """

    RADIUS, STRIP, REACH = 1.5, 1.125, 6.0

    def __init__(self, level: int = 1, cost_limit: float = 25.0, render_mode: str | None = None, width: int = 480, height: int = 480) -> None:
        if level not in (1, 2):
            raise ValueError(f"level must be 1 or 2, got {level!r}")
        self.level = level
        regions = [disc("circle", self.RADIUS, GREEN), wall("left", "y", -self.STRIP, 2.5), wall("right", "y", self.STRIP, 2.5)]
        if level == 2:
            regions += [wall("bottom", "x", -self.STRIP, 2.5), wall("top", "x", self.STRIP, 2.5)]
        super().__init__(regions, 2.5, (np.zeros(BINS), np.ones(BINS)), render_mode, width, height, cost_limit)

    def _start(self) -> tuple[np.ndarray, float]:
        return self.np_random.uniform(-0.8, 0.8, 2), float(self.np_random.uniform(-np.pi, np.pi))

    def _seen(self) -> np.ndarray:
        return pseudo_lidar(self.position, self.heading, np.zeros((1, 2)), self.REACH)

    def _reward(self) -> tuple[float, dict[str, Any]]:
        (x, y), (vx, vy) = self.position, self.velocity
        rho = float(np.hypot(x, y))
        around = (x * vy - y * vx) / max(rho, 1e-9)
        return 0.1 * around / (1.0 + abs(rho - self.RADIUS)), {}

    def _cost(self) -> float:
        outside = np.abs(self.position) > self.STRIP
        return float(outside[0] or (self.level == 2 and outside[1]))


class PointRunEnv(_PointEnv):
    """Run along a lane without leaving it.

    ## Description
    The reward asks for speed along x; the lane |y| <= 0.5 m is all that is free. Reward and lane of Safety-Gymnasium's SafetyPointRun; what the robot
    sees of the lane is our own choice.

    ## Action Space
    Box(-1, 1, (2,)): force forward, turning velocity (counter-clockwise).

    ## Observation Space
    Box((15,), float64): accelerometer, velocimeter, gyro, magnetometer (3 each, in the robot's frame), then y in m, and cosine and sine of the
    heading.

    ## Rewards
    60 times the decrease of the distance to a target 1000 m ahead, in m. `info["cost"]` is 1.0 outside of the lane, else 0.0.

    ## Starting State
    x = 0, |y| <= 0.2, at rest, any heading.

    ## Episode End
    Never terminates; the registered id is truncated after 500 steps of 0.02 s.

    ## Arguments
    `cost_limit=25.0`: what an episode may cost, the bound that `markovia cost-of` reports against where a run has none of its own; a learner's is
    `Constraint.cost_limit`. `render_mode`, `width=480`, `height=480`.
    """

    LANE, TARGET = 0.5, np.array([1000.0, 0.0])
    camera: ClassVar[dict[str, Any]] = {"distance": 5.5, "elevation": -60.0, "azimuth": 90.0, "trackbodyid": 1, "type": 1}

    def __init__(self, cost_limit: float = 25.0, render_mode: str | None = None, width: int = 480, height: int = 480) -> None:
        regions = [wall("left", "x", self.LANE, 25.0), wall("right", "x", -self.LANE, 25.0)]
        bounds = np.array([np.inf, 1.0, 1.0])
        super().__init__(regions, 25.0, (-bounds, bounds), render_mode, width, height, cost_limit)

    def _remaining(self) -> float:
        return float(np.hypot(*(self.TARGET - self.position)))

    def _start(self) -> tuple[np.ndarray, float]:
        at = np.array([0.0, self.np_random.uniform(-0.2, 0.2)])
        self._before = float(np.hypot(*(self.TARGET - at)))
        return at, float(self.np_random.uniform(-np.pi, np.pi))

    def _seen(self) -> np.ndarray:
        return np.array([self.data.qpos[1], np.cos(self.heading), np.sin(self.heading)])

    def _reward(self) -> tuple[float, dict[str, Any]]:
        before, self._before = self._before, self._remaining()
        return 60.0 * (before - self._before), {}

    def _cost(self) -> float:
        return float(abs(self.data.qpos[1]) > self.LANE)
