"""The one loop that steps a policy through whole episodes: evaluations, recordings of datasets and videos all act by it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

LONGEST = 100_000  # steps of an episode that no time limit ends


class Policy(Protocol):
    """Whatever acts by Stable-Baselines3's signature.

    A policy that also has `rewarded(state, reward)` is told what each step has paid.
    """

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> tuple[np.ndarray, Any]: ...


class Step(NamedTuple):
    """What one step of n environments brought (n = 1 for a single one)."""

    running: np.ndarray  # (n,) bool: the step belongs to the environment's first episode
    reward: np.ndarray  # (n,)
    terminated: np.ndarray  # (n,) bool
    truncated: np.ndarray  # (n,) bool
    infos: dict[str, Any]


def first_episodes(
    env: gym.Env | VectorEnv, policy: Policy, seed: int | Sequence[int] | None = None, deterministic: bool = False, longest: int | None = None
) -> Iterator[Step]:
    """Steps of `env`, one environment or a vector of them, from a reset with `seed` until each has ended an episode.

    What the policy carries (the rest of a chunk of actions, a history) goes from one `predict` to the next, and `episode_start` says where an
    observation begins an episode: the first, the one of a step that ended one (SAME_STEP), or the one of the step after it (NEXT_STEP).
    Without a time limit an episode may never end: it is cut after `longest` steps (None: LONGEST), with a warning.
    """
    longest = LONGEST if longest is None else longest
    n, next_step = getattr(env, "num_envs", 1), env.metadata.get("autoreset_mode") is AutoresetMode.NEXT_STEP
    tell = getattr(policy, "rewarded", None)
    obs, _ = env.reset(seed=seed)  # type: ignore[arg-type]
    state, starting, running, resetting = None, np.ones(n, dtype=bool), np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    for num_steps in itertools.count():
        if not running.any():
            return
        if num_steps == longest and not _limited(env):
            name = env.spec.id if env.spec else env
            warnings.warn(
                f"{name} has no time limit, and an episode that had not ended after {longest} steps was cut there; train with "
                """--env-kwargs '{"max_episode_steps": 1000}', or register the environment with max_episode_steps""",
                stacklevel=2,
            )
            return
        action, state = policy.predict(obs, state, starting, deterministic)
        obs, reward, terminated, truncated, infos = env.step(action)
        if tell is not None:
            tell(state, reward)
        step = Step(running.copy(), np.atleast_1d(np.asarray(reward)), np.atleast_1d(terminated), np.atleast_1d(truncated), infos)
        done = (step.terminated | step.truncated) & ~resetting
        starting, resetting = (resetting, done) if next_step else (done, resetting)
        running &= ~done
        yield step


def _limited(env: gym.Env | VectorEnv) -> bool:
    """Whether a time limit ends every episode, be it of the registration or of the arguments."""
    from markovia.envs.control.mujoco_batch import MujocoVectorEnv

    within: Any = env.unwrapped
    if isinstance(within, MujocoVectorEnv):  # whose spec is the registration's
        return bool(np.isfinite(within._limit))
    specs = within.get_attr("spec") if isinstance(within, SyncVectorEnv | AsyncVectorEnv) else [env.spec]
    return all(spec is not None and spec.max_episode_steps is not None for spec in specs)
