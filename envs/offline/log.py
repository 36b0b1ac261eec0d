"""Writing down what happens in a vector environment: every step of a training run, or whole episodes of one policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from markovia.envs.control.stepping import Policy, first_episodes
from markovia.envs.offline.transitions import About, Obs, Transitions, concatenate, map_obs

FIELDS = ("action", "reward", "terminated", "truncated", "starts", "env")


@dataclass(frozen=True, eq=False)
class Steps:
    """K raw steps in the order in which they were taken, of several environments mixed.

    starts  (K,) bool: the first step after a reset        env  (K,) int: whose step it is
    """

    obs: Obs
    next_obs: Obs
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    starts: np.ndarray
    env: np.ndarray

    def __len__(self) -> int:
        return len(self.reward)

    def arrays(self) -> dict[str, np.ndarray]:
        """Flat named arrays, to be saved; `from_arrays` reads them."""
        out = {name: getattr(self, name) for name in FIELDS}
        for name in ("obs", "next_obs"):
            value = getattr(self, name)
            out |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        return out

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Steps:
        """What `arrays` gave."""
        obs: dict[str, Any] = {}
        for name in ("obs", "next_obs"):
            keyed = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{name}/")}
            obs[name] = keyed or arrays[name]
        return cls(**obs, **{name: arrays[name] for name in FIELDS})


def join(parts: Sequence[Steps]) -> Steps:
    """Steps after each other. Raises ValueError when there are none."""
    if not parts:
        raise ValueError("no steps were logged")
    names = parts[0].arrays()
    return Steps.from_arrays({k: np.concatenate([p.arrays()[k] for p in parts]) for k in names})


class StepLog(VectorWrapper):
    """A vector environment that writes down every step with its true next observation; `take` hands the steps over and forgets them."""

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self._same_step = env.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP
        self._parts: list[Steps] = []
        self._starts = np.ones(env.num_envs, dtype=bool)
        self._resetting = np.zeros(env.num_envs, dtype=bool)  # NEXT_STEP: this environment's next step only resets
        self._obs: Any = None

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._obs = map_obs(obs, np.copy)
        self._starts[:], self._resetting[:] = True, False
        return obs, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, terminated, truncated, infos = self.env.step(actions)
        done = terminated | truncated
        live = np.flatnonzero(~self._resetting)
        following = _with_final(obs, infos, np.flatnonzero(done)) if self._same_step and done.any() else obs
        row = Steps(
            obs=map_obs(self._obs, lambda x: x[live]),
            next_obs=map_obs(following, lambda x: x[live]),
            action=np.array(actions)[live],
            reward=np.array(reward, dtype=np.float64)[live],
            terminated=np.array(terminated)[live],
            truncated=np.array(truncated)[live],
            starts=self._starts[live],
            env=live,
        )
        self._parts.append(row)
        # A row that only reset begins an episode as well as one that has just ended (SAME_STEP).
        self._starts = done.copy() if self._same_step else self._resetting.copy()
        self._resetting = np.zeros_like(done) if self._same_step else done & ~self._resetting
        self._obs = map_obs(obs, np.copy)
        return obs, reward, terminated, truncated, infos

    def take(self) -> Steps | None:
        """The steps since the last call; None where there were none."""
        parts, self._parts = self._parts, []
        return join(parts) if parts else None


def _with_final(obs: Any, infos: dict[str, Any], who: np.ndarray) -> Any:
    """A copy of the batched observation in which the environments that ended have their final one."""
    final, out = infos["final_obs"], map_obs(obs, np.copy)
    for i in who:
        if isinstance(out, dict):
            for k, v in out.items():
                v[i] = final[k][i] if isinstance(final, dict) else final[i][k]
        else:
            out[i] = final[i]
    return out


def as_transitions(steps: Steps, about: About) -> Transitions:
    """Whole episodes, environment by environment; one that was left by a reset from outside, or by the log's end, is truncated there.

    Observations and rewards become float32 where they were float64 (images stay what they are), so do the observation space's.
    """
    order = np.argsort(steps.env, kind="stable")
    take = lambda x: _single(x[order])  # noqa: E731
    ends = steps.terminated | steps.truncated
    starts = steps.starts[order] | np.append(True, np.diff(steps.env[order]) != 0)
    last = np.append(starts[1:], True)
    return Transitions(
        obs=map_obs(steps.obs, take),
        action=steps.action[order],
        reward=take(steps.reward),
        next_obs=map_obs(steps.next_obs, take),
        terminated=steps.terminated[order],
        truncated=(steps.truncated | ~ends)[order] & last,
        episode=np.cumsum(starts) - 1,
        about=replace(about, observation_space=single_space(about.observation_space)),
    )


def _single(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype == np.float64 else x


def single_space(space: Any) -> Any:
    """A Box of float64 as one of float32, in dictionaries too; other spaces, and None, as they are."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict([(k, single_space(v)) for k, v in space.spaces.items()])
    if isinstance(space, spaces.Box) and space.dtype == np.float64:
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    return space


def record(
    venv: VectorEnv,
    policy: Callable[[int], Policy],
    about: About,
    *,
    seed: int,
    deterministic: bool = False,
    num_steps: int = 0,
    episodes: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Transitions:
    """Whole episodes in order of their seeds, seed, seed + 1, ..., until there are `num_steps` steps or `episodes` episodes, whichever is later.

    venv      environments that reset in the same step; each plays one episode of a wave, and waits until all have ended
    policy    wave -> policy of that wave, so that its random numbers depend on the wave alone
    progress  called with the steps and the mean return so far
    """
    log, have = StepLog(venv), 0
    waves: list[Transitions] = []
    while have < num_steps or sum(w.num_episodes for w in waves) < episodes:
        wave, n = len(waves), venv.num_envs
        for _ in first_episodes(log, policy(wave), [seed + wave * n + i for i in range(n)], deterministic):
            pass
        steps = log.take()
        assert steps is not None
        data = as_transitions(steps, about)
        first = np.unique(np.sort(steps.env, kind="stable")[data.bounds()[0]], return_index=True)[1]
        waves.append(data.episodes(first))
        have += len(waves[-1])
        if progress is not None:
            progress(have, float(np.concatenate([w.returns() for w in waves]).mean()))
    return _head(concatenate(waves), num_steps, episodes)


def _head(data: Transitions, num_steps: int, episodes: int) -> Transitions:
    """The first whole episodes that hold at least so many steps and are at least so many."""
    enough = max(int(np.searchsorted(np.cumsum(data.lengths()), num_steps)) + 1 if num_steps else 0, episodes)
    return data.episodes(np.arange(min(enough, data.num_episodes)))
