"""A vector environment for any Gymnasium id: sync, async, envpool, a batch of MuJoCo simulations, or the id's own batched form."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from markovia.envs.names import nearest
from markovia.envs.untrusted import check_code

PACKAGES = {"gymnasium_robotics": "markovia[robotics] (gymnasium-robotics)"}  # what brings modules that recipes name


@contextlib.contextmanager
def quiet_mujoco(needed: bool = True) -> Iterator[None]:
    """Hold MuJoCo's warnings while models are built: `settotalmass` is dropped, others follow as Python warnings.

    MuJoCo 4.0 deprecates an option that Gymnasium's HalfCheetah uses; it would print that at every creation and write MUJOCO_LOG.TXT.
    """
    try:
        mujoco = importlib.import_module("mujoco") if needed else None
    except ImportError:
        mujoco = None
    if mujoco is None:
        yield
        return
    held: list[Any] = []
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(held.append)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
        # Raised here and not in the callback, where a warning turned into an error would abort the process.
        for message in held:
            if "settotalmass" not in str(message):
                warnings.warn(f"MuJoCo: {message}", RuntimeWarning, stacklevel=3)


def env_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The registered spec of "Name-v0", "ns/Name-v0" or "module:ns/Name-v0"; ValueError with the nearest names when there is none."""
    if not isinstance(env_id, str):
        raise ValueError(f"env is an id such as 'CartPole-v1', got {env_id!r:.80}; register yours with gym.register and pass 'module:Name-v0'")
    module, _, name = env_id.rpartition(":")
    if module and module != "markovia":
        check_code(module, env_id)
    if module:
        try:
            importlib.import_module(module)
        except (ImportError, TypeError, ValueError) as error:
            mend = f"; pip install {PACKAGES[module]}" if module in PACKAGES else ""
            raise ValueError(f"the module {module!r} of the environment id {env_id!r} can't be imported ({error}){mend}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return gym.spec(env_id if env_id in gym.registry else name)
    except gym.error.Error as error:
        hint = nearest(name, gym.registry) or "; gymnasium.pprint_registry() lists all"
        raise ValueError(f"no environment has the id {env_id!r}{hint}") from error


def make_env(env_id: str, **kwargs: Any) -> gym.Env:
    """`gym.make` without MuJoCo's chatter; an id that is not registered raises ValueError."""
    spec = env_spec(env_id)
    with quiet_mujoco("mujoco" in str(spec.entry_point) or "mujoco" in sys.modules):
        return gym.make(env_id if env_id in gym.registry else spec.id, **kwargs)


def served_autoreset(mode: Any, owner: str) -> AutoresetMode:
    """The mode, given as enum or as its string. Raises ValueError for an unknown one, and for "Disabled"."""
    try:
        found = AutoresetMode(mode)
    except ValueError:
        raise ValueError(f"unknown autoreset_mode {mode!r} of {owner}; expected 'SameStep' or 'NextStep'") from None
    if found is AutoresetMode.DISABLED:
        raise ValueError(
            f"{owner} has autoreset mode {found.value!r}; collectors take 'SameStep' or 'NextStep', "
            "so that no final observation is lost. Pass vector_kwargs={'autoreset_mode': 'SameStep'}"
        )
    return found


def each_seed(seed: Any, num_envs: int) -> list[int | None]:
    """One seed for each environment: s, s + 1, ... of a number, those of a list, None of None. Raises ValueError for a list of another length."""
    seeds = list(seed) if isinstance(seed, list | tuple) else [None if seed is None else int(seed) + i for i in range(num_envs)]
    if len(seeds) != num_envs:
        raise ValueError(f"got {len(seeds)} seeds for {num_envs} environments; give one each, or a single number")
    return seeds


class EnvPool(VectorEnv):
    """envpool behind `reset(seed=)`: a pool takes its seed only when it is made, so a seeded reset makes a new one. NEXT_STEP autoreset."""

    def __init__(self, make: Callable[[int], VectorEnv], seed: int) -> None:
        self._make, self._pool = make, make(seed)
        self.num_envs = self._pool.num_envs
        self.single_observation_space = self._pool.single_observation_space
        self.single_action_space = self._pool.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {**self._pool.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._pool.close()
            self._pool = self._make(int(seed) % 2**31)  # envpool's seed is a C int
        return self._pool.reset()

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        return self._pool.step(actions)

    def close_extras(self, **kwargs: Any) -> None:
        self._pool.close()


def _envpool(env_id: str, num_envs: int, seed: int, kwargs: dict[str, Any]) -> VectorEnv:
    try:
        envpool = importlib.import_module("envpool")
    except ImportError as error:
        raise ImportError("vectorization='envpool' needs envpool: pip install markovia[fast]") from error
    if env_id not in envpool.list_all_envs():
        raise ValueError(f"envpool has no {env_id!r}{nearest(env_id, envpool.list_all_envs())} (vectorization='sync' takes any Gymnasium id)")
    return EnvPool(lambda s: envpool.make_gymnasium(env_id, num_envs=num_envs, seed=s, **kwargs), seed)


def _prefers_batch(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether "auto" takes the MuJoCo batch: a task that it has, on Gymnasium's model, since others may use what a batch lacks (sleep)."""
    from markovia.envs.control.mujoco_batch import TASKS, has_batch

    return name in TASKS and "xml_file" not in kwargs and has_batch()


def _mujoco(name: str, num_envs: int, kwargs: dict[str, Any], vector_kwargs: dict[str, Any]) -> VectorEnv:
    from markovia.envs.control.mujoco_batch import MujocoVectorEnv

    if unknown := set(vector_kwargs) - {"threads"}:
        raise ValueError(f"vectorization='mujoco' takes the vector_kwargs 'threads', got {', '.join(sorted(unknown))}; it resets in the same step")
    return MujocoVectorEnv(name, num_envs, kwargs, **vector_kwargs)


def make_vec(
    env_id: str,
    num_envs: int = 1,
    vectorization: str = "auto",
    seed: int | None = None,
    kwargs: dict[str, Any] | None = None,
    vector_kwargs: dict[str, Any] | None = None,
) -> VectorEnv:
    """`num_envs` copies of an id as one vector environment, reset once when `seed` is given.

    "auto" takes the id's own batched form when it registers one, the MuJoCo batch for its tasks, which is faster and equal, else "sync"; with
    vector_kwargs or a render mode always "sync". sync and async reset in the step that ends an episode (SAME_STEP) unless
    vector_kwargs={"autoreset_mode": "NextStep"}; for "mujoco" they may hold "threads".
    Raises ValueError for unknown ids (with the nearest names), for ids that a vectorisation does not have, for unknown vectorisations and for
    autoreset mode "Disabled"; ImportError for envpool and MuJoCo when they are not installed.
    """
    kwargs, vector_kwargs = dict(kwargs or {}), dict(vector_kwargs or {})
    if num_envs < 1:
        raise ValueError(f"num_envs must be >= 1, got {num_envs}")
    if vectorization not in ("auto", "sync", "async", "mujoco", "envpool"):
        raise ValueError(f"unknown vectorization {vectorization!r}; choose 'auto', 'sync', 'async', 'mujoco' or 'envpool'")
    if vectorization == "envpool":
        return _envpool(env_id, num_envs, 0 if seed is None else seed, kwargs)
    spec = env_spec(env_id)
    plain = vectorization == "auto" and not vector_kwargs and kwargs.get("render_mode") is None
    if plain and spec.vector_entry_point is not None:
        venv = gym.make_vec(spec.id, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
    elif vectorization == "mujoco" or (plain and _prefers_batch(spec.id, kwargs)):
        venv = _mujoco(spec.id, num_envs, kwargs, vector_kwargs)
    else:
        venv = _stacked(spec.id, env_id, num_envs, vectorization == "async", kwargs, vector_kwargs)
    try:
        served_autoreset(venv.metadata.get("autoreset_mode"), env_id)
    except ValueError:
        venv.close()
        raise
    venv.spec = spec
    if seed is not None:
        venv.reset(seed=seed)
    return venv


def _stacked(
    name: str, env_id: str, num_envs: int, workers: bool, kwargs: dict[str, Any], vector_kwargs: dict[str, Any]
) -> VectorEnv:
    mode = served_autoreset(vector_kwargs.pop("autoreset_mode", "SameStep"), env_id)
    # A worker process imports nothing but this module, so it gets the id with the module that registers it.
    make: Callable[[], gym.Env] = partial(make_env, env_id if ":" in env_id else name, **kwargs)
    return (AsyncVectorEnv if workers else SyncVectorEnv)([make] * num_envs, autoreset_mode=mode, **vector_kwargs)
