"""Gymnasium's v5 MuJoCo tasks as one batch: physics on MuJoCo's own thread pool, the rest of a step as array operations.

A task is a row of `TASKS`. Its formulas are Gymnasium's, over (n, ...) arrays in place of one simulation's; constants are read from a scalar
environment, so that every keyword of the task works. That environment also does the resets, with Gymnasium's own code and draws.

Why `mujoco.batch` (MuJoCo 3.17 and later): physics of one step, 2 cores, us a call for 8 HalfCheetahs / 8 Hoppers
    loop over MjData        193 / 565
    two Python threads      150 / 350    sharing the MjData out between them; mj_step releases the interpreter's lock
    mujoco.rollout          180 / 381    two threads; it forgets the solver's warm start between calls: HalfCheetah parts from Gymnasium's
    mujoco.batch            105 / 300    two threads; equal to the loop to the last bit, since a simulation's row holds its warm start
Whole steps against SyncVectorEnv (benchmarks/stepping.py, benchmarks/results/stepping.json), two threads: 1.9 to 2.8 times as fast over the tasks at
8 environments (HalfCheetah 2.5, Hopper 2.3), 2.3 to 4.0 at 64, and 0.98 to 1.15 at one. One thread gives 1.2 to 1.6 at 8, which is the Python of
each environment that is gone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from markovia.envs import machine
from markovia.envs.checks import box_action
from markovia.envs.control.vector import make_env
from markovia.envs.names import nearest
from markovia.envs.seeded import SeededVectorEnv

Array = np.ndarray
Info = dict[str, Array]
Step = tuple[Array, Array, Array, Info]


@dataclass(frozen=True)
class Task:
    """How one task reads a batch. `env` is Gymnasium's scalar environment and `data` the batch's MjData fields, each (n, ...)."""

    step: Callable[[Any, Any, Array, Array], Step]  # (env, data, velocity (n, k), action (n, nu)) -> observation, reward, terminated, info
    position: Callable[[Any, Any], Array]  # (env, data) -> (n, k) that is no view of data; its change over a step is the velocity
    fields: tuple[str, ...] = ()  # fields of MjData that are read beside qpos and qvel
    contact_forces: bool = False  # cfrc_ext is read, which MuJoCo computes on request only


def _joined(*parts: Array) -> Array:
    """(n, ...) arrays as one (n, sum of sizes)."""
    return np.concatenate([p.reshape(len(p), -1) for p in parts], axis=1)


def _squares(x: Array) -> Array:
    """(n, ...) -> (n,) sums of squares."""
    return np.square(x).reshape(len(x), -1).sum(1)


def _never(data: Any) -> Array:
    return np.zeros(len(data.qpos), dtype=bool)


def _joints(env: Any, data: Any, skip: int, velocity: Array) -> Array:
    """Joint positions, without the first `skip` unless the task was told to keep them, then velocities."""
    return _joined(data.qpos[:, skip:] if env._exclude_current_positions_from_observation else data.qpos, velocity)


def _survival(env: Any, healthy: Array) -> tuple[Array, Array]:
    """Reward for being healthy, and whether the episode ends."""
    return healthy * env._healthy_reward, ~healthy & env._terminate_when_unhealthy


def _nothing(env: Any, data: Any) -> Array:
    """The position of tasks that ask for no velocity."""
    return np.zeros((len(data.qpos), 0))


def _x(env: Any, data: Any) -> Array:
    return data.qpos[:, :1].copy()


def _xy(env: Any, data: Any) -> Array:
    return data.qpos[:, :2].copy()


def _plane(data: Any, velocity: Array) -> Info:
    """Info of the tasks that move in the plane."""
    return {
        "x_position": data.qpos[:, 0].copy(),
        "y_position": data.qpos[:, 1].copy(),
        "distance_from_origin": np.linalg.norm(data.qpos[:, :2], axis=1),
        "x_velocity": velocity[:, 0],
        "y_velocity": velocity[:, 1],
    }


def _half_cheetah(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    forward, control = env._forward_reward_weight * velocity[:, 0], env._ctrl_cost_weight * _squares(action)
    info = {"x_position": data.qpos[:, 0].copy(), "x_velocity": velocity[:, 0], "reward_forward": forward, "reward_ctrl": -control}
    return _joints(env, data, 1, data.qvel), forward - control, _never(data), info


def _swimmer(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    forward, control = env._forward_reward_weight * velocity[:, 0], env._ctrl_cost_weight * _squares(action)
    info = {**_plane(data, velocity), "reward_forward": forward, "reward_ctrl": -control}
    return _joints(env, data, 2, data.qvel), forward - control, _never(data), info


def _on_legs(env: Any, data: Any, velocity: Array, action: Array, healthy: Array) -> Step:
    """Hopper and Walker2d, which differ in what is healthy."""
    forward, control = env._forward_reward_weight * velocity[:, 0], env._ctrl_cost_weight * _squares(action)
    alive, terminated = _survival(env, healthy)
    info = {
        "x_position": data.qpos[:, 0].copy(),
        "z_distance_from_origin": data.qpos[:, 1] - env.init_qpos[1],
        "x_velocity": velocity[:, 0],
        "reward_forward": forward,
        "reward_ctrl": -control,
        "reward_survive": alive,
    }
    return _joints(env, data, 1, np.clip(data.qvel, -10, 10)), forward + alive - control, terminated, info


def _between(x: Array, bounds: tuple[float, float]) -> Array:
    return (bounds[0] < x) & (x < bounds[1])


def _upright(env: Any, data: Any) -> Array:
    return _between(data.qpos[:, 1], env._healthy_z_range) & _between(data.qpos[:, 2], env._healthy_angle_range)


def _hopper(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    state = _joined(data.qpos[:, 2:], data.qvel)
    return _on_legs(env, data, velocity, action, _upright(env, data) & _between(state, env._healthy_state_range).all(1))


def _walker2d(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    return _on_legs(env, data, velocity, action, _upright(env, data))


def _main_body(env: Any, data: Any) -> Array:
    return data.xpos[:, env.model.body(env._main_body).id, :2].copy()


def _ant(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    low, high = env._healthy_z_range
    healthy = np.isfinite(data.qpos).all(1) & np.isfinite(data.qvel).all(1) & (low <= data.qpos[:, 2]) & (data.qpos[:, 2] <= high)
    force = np.clip(data.cfrc_ext, *env._contact_force_range)
    forward, control = env._forward_reward_weight * velocity[:, 0], env._ctrl_cost_weight * _squares(action)
    contact = env._contact_cost_weight * _squares(force)
    alive, terminated = _survival(env, healthy)
    info = {
        **_plane(data, velocity),
        "reward_forward": forward,
        "reward_ctrl": -control,
        "reward_contact": -contact,
        "reward_survive": alive,
    }
    observation = _joints(env, data, 2, data.qvel)
    if env._include_cfrc_ext_in_observation:
        observation = _joined(observation, force[:, 1:])
    return observation, forward + alive - (control + contact), terminated, info


def _mass_center(env: Any, data: Any) -> Array:
    mass = env.model.body_mass
    return (np.einsum("b,nbj->nj", mass, data.xipos) / mass.sum())[:, :2]


def _humanoid(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    forward, control = env._forward_reward_weight * velocity[:, 0], env._ctrl_cost_weight * _squares(action.astype(np.float64))
    contact = np.clip(env._contact_cost_weight * _squares(data.cfrc_ext), *env._contact_cost_range)
    alive, terminated = _survival(env, _between(data.qpos[:, 2], env._healthy_z_range))
    info = {
        **_plane(data, velocity),
        "tendon_length": data.ten_length.copy(),
        "tendon_velocity": data.ten_velocity.copy(),
        "reward_survive": alive,
        "reward_forward": forward,
        "reward_ctrl": -control,
        "reward_contact": -contact,
    }
    parts = [_joints(env, data, 2, data.qvel)]
    parts += [data.cinert[:, 1:]] if env._include_cinert_in_observation else []
    parts += [data.cvel[:, 1:]] if env._include_cvel_in_observation else []
    parts += [data.qfrc_actuator[:, 6:]] if env._include_qfrc_actuator_in_observation else []
    parts += [data.cfrc_ext[:, 1:]] if env._include_cfrc_ext_in_observation else []
    return _joined(*parts), forward + alive - (control + contact), terminated, info


def _body(env: Any, data: Any, name: str) -> Array:
    """(n, 3) positions of a body's frame."""
    return data.xpos[:, env.model.body(name).id]


def _reacher(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    gap = _body(env, data, "fingertip") - _body(env, data, "target")
    distance, control = -np.linalg.norm(gap, axis=1) * env._reward_dist_weight, -_squares(action) * env._reward_control_weight
    theta = data.qpos[:, :2]
    observation = _joined(np.cos(theta), np.sin(theta), data.qpos[:, 2:], data.qvel[:, :2], gap[:, :2])
    return observation, distance + control, _never(data), {"reward_dist": distance, "reward_ctrl": control}


def _pusher(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    thing, tip, goal = (_body(env, data, name) for name in ("object", "tips_arm", "goal"))
    near = -np.linalg.norm(thing - tip, axis=1) * env._reward_near_weight
    distance, control = -np.linalg.norm(thing - goal, axis=1) * env._reward_dist_weight, -_squares(action) * env._reward_control_weight
    observation = _joined(data.qpos[:, :7], data.qvel[:, :7], tip, thing, goal)
    return observation, distance + control + near, _never(data), {"reward_dist": distance, "reward_ctrl": control, "reward_near": near}


def _inverted_pendulum(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    observation = _joined(data.qpos, data.qvel)
    terminated = ~np.isfinite(observation).all(1) | (np.abs(observation[:, 1]) > 0.2)
    alive = (~terminated).astype(int)
    return observation, alive.astype(np.float64), terminated, {"reward_survive": alive}


def _inverted_double_pendulum(env: Any, data: Any, velocity: Array, action: Array) -> Step:
    x, y = data.site_xpos[:, 0, 0], data.site_xpos[:, 0, 2]
    v1, v2 = data.qvel[:, 1], data.qvel[:, 2]
    terminated = y <= 1
    alive, off, fast = env._healthy_reward * (~terminated).astype(int), 0.01 * x**2 + (y - 2) ** 2, 1e-3 * v1**2 + 5e-3 * v2**2
    angles = data.qpos[:, 1:]
    observation = _joined(
        data.qpos[:, :1], np.sin(angles), np.cos(angles), np.clip(data.qvel, -10, 10), np.clip(data.qfrc_constraint[:, :1], -10, 10)
    )
    return observation, alive - off - fast, terminated, {"reward_survive": alive, "distance_penalty": -off, "velocity_penalty": -fast}


TASKS = {
    "HalfCheetah-v5": Task(_half_cheetah, _x),
    "Hopper-v5": Task(_hopper, _x),
    "Walker2d-v5": Task(_walker2d, _x),
    "Swimmer-v5": Task(_swimmer, _xy),
    "Ant-v5": Task(_ant, _main_body, ("xpos",), contact_forces=True),
    "Humanoid-v5": Task(_humanoid, _mass_center, ("xipos", "cinert", "cvel", "qfrc_actuator", "ten_length", "ten_velocity"), contact_forces=True),
    "Reacher-v5": Task(_reacher, _nothing, ("xpos",)),
    "Pusher-v5": Task(_pusher, _nothing, ("xpos",)),
    "InvertedPendulum-v5": Task(_inverted_pendulum, _nothing),
    "InvertedDoublePendulum-v5": Task(_inverted_double_pendulum, _nothing, ("site_xpos", "qfrc_constraint")),
}


def _speed_limited(plain: Task) -> Task:
    """The robot with the cost of markovia's velocity tasks (envs/safe/velocity.py): 1 where the step was faster than the limit."""

    def step(env: Any, data: Any, velocity: Array, action: Array) -> Step:
        observation, reward, terminated, info = plain.step(env, data, velocity, action)
        speed = np.hypot(velocity[:, 0], velocity[:, 1]) if env.in_plane else velocity[:, 0]
        return observation, reward, terminated, {**info, "cost": (speed > env.max_speed).astype(np.float64)}

    return replace(plain, step=step)


TASKS |= {
    f"markovia/Safe{robot}Velocity-v0": _speed_limited(TASKS[f"{robot}-v5"])
    for robot in ("HalfCheetah", "Hopper", "Walker2d", "Swimmer", "Ant", "Humanoid")
}


def _masked(info: Info, who: Array) -> dict[str, Array]:
    """Gymnasium's batched info of the environments `who` (n,) bool: every entry, zero elsewhere, beside its mask `_name`."""
    count = np.count_nonzero(who)
    if count == 0:
        return {}
    out: dict[str, Array] = {}
    for key, value in info.items():
        if count < len(who):
            value = value.copy()
            value[~who] = 0
        out[key], out[f"_{key}"] = value, who.copy()
    return out


class MujocoVectorEnv(SeededVectorEnv):
    """`num_envs` simulations of one of `TASKS`, equal to Gymnasium's environments under SyncVectorEnv with SAME_STEP autoreset.

    Sub-environment i is seeded with seed + i and draws what Gymnasium's scalar environment draws; states and observations are equal to the last
    bit, rewards to rounding (sums run in another order), at any number of threads. `kwargs` go to the task. It does not render.
    `threads` is by default the number of cores that this process may use. Where other processes want the same cores, one thread (or an affinity
    of one core) is faster: the batch waits for its slowest thread, and eight processes on two cores made two threads 1.4 times slower than one.
    Raises ValueError for ids that are not in the table, for a render mode and for actions of a wrong shape; ImportError without mujoco >= 3.17.
    """

    def __init__(self, env_id: str, num_envs: int, kwargs: dict[str, Any] | None = None, threads: int | None = None) -> None:
        super().__init__(num_envs)
        self._task = find_task(env_id)
        kwargs = dict(kwargs or {})
        if kwargs.get("render_mode") is not None:
            raise ValueError(f"a batch of simulations does not render, got render_mode={kwargs['render_mode']!r}; vectorization='sync' does")
        if not has_batch():
            raise ImportError("vectorization='mujoco' needs mujoco >= 3.17: pip install -U markovia[control] 'mujoco>=3.17'")
        batch, self._mujoco = importlib.import_module("mujoco.batch"), importlib.import_module("mujoco")
        made: Any = make_env(env_id, **kwargs)
        self._env = made.unwrapped
        self._limit = made.get_wrapper_attr("_max_episode_steps") if made.has_wrapper_attr("_max_episode_steps") else np.inf
        self.metadata = {**self._env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = self._env.observation_space, self._env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # Contact forces are those of a simulation's own last step, so that each then needs an MjData of its own.
        self._batch = batch.Batch(self._env.model, num_envs, threads or default_threads(num_envs), persistent=self._task.contact_forces)
        self._data = SimpleNamespace(**{name: self._batch.bind(name) for name in ("qpos", "qvel", *self._task.fields)})
        if self._task.contact_forces:
            self._scratch = self._mujoco.MjData(self._env.model)
            self._data.cfrc_ext = np.zeros((num_envs, *self._scratch.cfrc_ext.shape))
        self._ctrl = self._batch.bind("ctrl")
        self._frame_skip, self._dt = self._env.frame_skip, self._env.dt  # the batch has its own copy of the model, so these are fixed
        self._position = self._task.position(self._env, self._data)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._started = False

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start every simulation anew; a seed s makes seeds s, s + 1, ..., a list gives one each. Resetting some (reset_mask) is refused."""
        if options and "reset_mask" in options:
            raise ValueError("MujocoVectorEnv starts all its environments in reset(), got a reset_mask; ended episodes restart by themselves")
        observation = np.zeros(self.observation_space.shape or ())
        infos: dict[str, Any] = {}
        self._seed(seed)
        self._started = True
        for i in range(self.num_envs):
            observation[i], info = self._restart(i)
            infos = self._add_info(infos, info, i)
        return observation, infos

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        actions = box_action(actions, self.action_space.shape, None)
        if not self._started:
            raise ResetNeeded("step before reset: call envs.reset() first")
        self._ctrl[:] = actions
        self._batch.step(nstep=self._frame_skip)
        if self._task.contact_forces:
            self._read_contact_forces()
        before, self._position = self._position, self._task.position(self._env, self._data)
        velocity = (self._position - before) / self._dt
        observation, reward, terminated, info = self._task.step(self._env, self._data, velocity, actions)
        self._elapsed += 1
        truncated = self._elapsed >= self._limit
        done = terminated | truncated
        infos: dict[str, Any] = _masked(info, ~done)
        if np.count_nonzero(done):
            final = np.full(self.num_envs, None, dtype=object)
            infos |= {"final_obs": final, "_final_obs": done.copy(), "final_info": _masked(info, done), "_final_info": done.copy()}
            for i in np.flatnonzero(done):
                final[i] = observation[i].copy()
                observation[i], started = self._restart(int(i))
                infos = self._add_info(infos, started, int(i))
        return observation, reward, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        if hasattr(self, "_env"):  # gymnasium closes what was refused at its making, too
            self._env.close()

    def _restart(self, i: int) -> tuple[Array, dict[str, Any]]:
        """Gymnasium's own reset on simulation i's random stream, and its state put into the batch."""
        env = self._env
        env.np_random = self._streams[i][0]
        observation, info = env.reset()
        self._mujoco.mj_getState(env.model, env.data, self._batch.state[i], self._mujoco.mjtState.mjSTATE_INTEGRATION)
        # Derived fields of the batch follow at its next call, so the start is read where it was computed.
        fields = ("qpos", *self._task.fields)
        self._position[i] = self._task.position(env, SimpleNamespace(**{f: getattr(env.data, f)[None] for f in fields}))[0]
        self._elapsed[i] = 0
        return observation, info

    def _read_contact_forces(self) -> None:
        """External contact forces of every simulation; as in Gymnasium they are computed once a step, after its last substep."""
        for i in range(self.num_envs):
            self._batch.get_data(i, self._scratch)
            self._mujoco.mj_rnePostConstraint(self._env.model, self._scratch)
            self._data.cfrc_ext[i] = self._scratch.cfrc_ext


def has_batch() -> bool:
    """Whether MuJoCo is installed with its batch interface (3.17 and later)."""
    try:
        return importlib.util.find_spec("mujoco.batch") is not None
    except ImportError:
        return False


def find_task(env_id: str) -> Task:
    """The row of an id; an id without one raises ValueError with those that have."""
    if env_id not in TASKS:
        raise ValueError(
            f"vectorization='mujoco' has no {env_id!r}{nearest(env_id, TASKS)} (it has {', '.join(TASKS)}); "
            "vectorization='sync' takes any Gymnasium id"
        )
    return TASKS[env_id]


def default_threads(num_envs: int) -> int:
    """One thread for every core that this process may use (two already pay for two simulations), at most one for a simulation."""
    return min(machine.cores(), num_envs)
