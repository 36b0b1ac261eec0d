"""Logged episodes as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from markovia.envs.offline.sources import load
from markovia.envs.offline.transitions import Obs, Transitions


class OfflineReplayEnv(gym.Env):
    """Replay the episodes of an offline dataset, whatever action is given.

    ## Description
    `reset` picks a logged episode (uniformly, or `options={"episode": k}`), `step` moves on in it. The action changes nothing: it is only compared
    with the logged one. For looking at data with the tools made for environments, and for off-policy evaluation by importance weights, which need
    the logged action at every step. A method "trained" here sees what the dataset holds, but learns nothing about other actions.

    ## Action Space
    That of the dataset.

    ## Observation Space
    That of the dataset, as the rows are stored (images as float64 become float32).

    ## Rewards
    The logged reward, a float.

    ## Starting State
    The first observation of the chosen episode.

    ## Episode End
    As logged; an episode that the file cut is truncated at its last row, one whose last successor the file does not hold a row before that. The
    observation after a termination that was logged without one is that before it.

    ## Info
    `logged_episode` and `logged_step` (ints; "episode" alone belongs to Gymnasium's statistics), `logged_action` (the action logged at the
    observation just returned; absent after the last row), and after a step `action_distance` (Euclidean distance of the given action to the
    logged one; 0 or 1 when discrete).

    ## Arguments
    `dataset="fixture:pointmass2d/medium"`: a Minari id, a D4RL file `*.hdf5`, or `fixture:<name>`; or `data=` own `Transitions`.
    `env_id=None`, `horizon=None`: of a D4RL file whose name does not tell them.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's protocol)

    def __init__(
        self,
        dataset: str = "fixture:pointmass2d/medium",
        data: Transitions | None = None,
        env_id: str | None = None,
        horizon: int | None = None,
    ) -> None:
        data = load(dataset, env_id=env_id, horizon=horizon) if data is None else data
        self.data = data.view()
        about = self.data.about
        if about.observation_space is None or about.action_space is None:
            raise ValueError(f"{about.name} does not say its observation and action space; set them in `about`")
        self.observation_space, self.action_space = about.observation_space, about.action_space
        self._first, self._end = self.data.bounds()
        ids, kept = (d.episode[d.bounds()[0]] for d in (data, self.data))
        self._logged, self._count = np.flatnonzero(np.isin(ids, kept)), len(ids)  # number in the dataset of every episode here
        self._row: int | None = None
        self._episode = 0

    def _observation(self, obs: Obs, row: int) -> Any:
        if isinstance(self.observation_space, spaces.Discrete):
            return np.int64(obs[row])  # type: ignore[index]
        parts = self.observation_space.spaces if isinstance(self.observation_space, spaces.Dict) else None
        if isinstance(obs, dict):
            return {k: _typed(v[row], None if parts is None else parts.get(k)) for k, v in obs.items()}
        return _typed(obs[row], self.observation_space)

    def _info(self, row: int) -> dict[str, Any]:
        step = row - int(self._first[self._episode])
        here = {"logged_episode": int(self._logged[self._episode]), "logged_step": step}
        return {**here, "logged_action": self.data.action[row].copy()} if row < self._end[self._episode] else here

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        wanted = (options or {}).get("episode")
        if wanted is None:
            episode = int(self.np_random.integers(len(self._first)))
        else:
            episode = self._place(int(wanted))
        self._episode, self._row = episode, int(self._first[episode])
        return self._observation(self.data.obs, self._row), self._info(self._row)

    def _place(self, wanted: int) -> int:
        """Where the dataset's episode stands here. Raises ValueError for one that it does not have or whose rows can't be replayed."""
        if not 0 <= wanted < self._count:
            raise ValueError(f"episode must lie in 0..{self._count - 1}, got {wanted}")
        place = int(np.searchsorted(self._logged, wanted))
        if place == len(self._logged) or self._logged[place] != wanted:
            raise ValueError(f"no step of episode {wanted} can be replayed: nobody logged the observation after it; choose another one")
        return place

    def _distance(self, action: Any, logged: np.ndarray) -> float:
        if isinstance(self.action_space, spaces.Discrete):
            return float(int(action) != int(logged))
        return float(np.linalg.norm(np.asarray(action, dtype=np.float64) - logged))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._row is None:
            raise ValueError("step before reset, or after the episode has ended: call env.reset() first")
        row, last = self._row, int(self._end[self._episode]) - 1
        terminated = bool(self.data.terminated[row])
        truncated = row == last and not terminated
        distance = self._distance(action, self.data.action[row])
        self._row = None if row == last else row + 1
        obs = self._observation(self.data.next_obs if self.data.next_known[row] else self.data.obs, row)
        return obs, float(self.data.reward[row]), terminated, truncated, {**self._info(row + 1), "action_distance": distance}


def _typed(value: np.ndarray, space: spaces.Space | None) -> np.ndarray:
    """A copy in the space's own type, which Minari does not hold files to."""
    return np.array(value, dtype=value.dtype if space is None or space.dtype is None else space.dtype)
