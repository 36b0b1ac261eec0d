"""What is done to rewards and observations before learning, as values that are saved with the policy. Evaluation always uses raw rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from markovia.envs.durable import write_whole
from markovia.envs.offline.transitions import Obs, Transitions, columns, map_obs
from markovia.envs.untrusted import read_json

OBS_EPS = 1e-3


@dataclass(frozen=True)
class RewardTransform:
    """r' = scale r + shift. Raises ValueError for a scale that is not positive: order and sign of differences must stay."""

    name: str
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not (self.scale > 0 and np.isfinite(self.scale) and np.isfinite(self.shift)):
            raise ValueError(f"a reward transform needs a positive finite scale and a finite shift, got scale={self.scale}, shift={self.shift}")

    def __call__(self, reward: np.ndarray) -> np.ndarray:
        return (self.scale * reward + self.shift).astype(reward.dtype)

    def inverse(self, reward: np.ndarray) -> np.ndarray:
        """The raw reward again."""
        return ((reward - self.shift) / self.scale).astype(reward.dtype)


def _return_range(data: Transitions) -> RewardTransform:
    """The time limit (1000 where there is none) over the largest less the smallest return of a true, complete episode.

    Returns then differ by at most the time limit, a reward of about 1 a step.                                   [code of arXiv 2110.06169]
    """
    returns = data.whole().returns()
    spread = float(returns.max() - returns.min())
    if spread == 0:
        raise ValueError(f"{data.about.name}: every episode has the return {returns[0]}, so 'return_range' has nothing to scale by; use 'none'")
    return RewardTransform("return_range", (data.about.horizon or 1000) / spread)


# name -> transform for a dataset; who uses it on which D4RL suite is the comment
REWARD_TRANSFORMS: dict[str, Callable[[Transitions], RewardTransform]] = {
    "none": lambda data: RewardTransform("none"),  # TD3+BC, ReBRAC, EDAC and SPOT, locomotion
    "return_range": _return_range,  # IQL, EDA, MCEP, locomotion
    "antmaze_minus1": lambda data: RewardTransform("antmaze_minus1", 1.0, -1.0),  # IQL, SPOT, EDA
    "cql_antmaze": lambda data: RewardTransform("cql_antmaze", 10.0, -5.0),  # Cal-QL, WSRL
    "cql_antmaze_old": lambda data: RewardTransform("cql_antmaze_old", 4.0, -2.0),  # (r - 0.5) 4, first CQL code
    "x100": lambda data: RewardTransform("x100", 100.0),  # ReBRAC, MCEP, AntMaze
    "adroit_binary": lambda data: RewardTransform("adroit_binary", 10.0, 5.0),  # WSRL, rewards -1 and 0
    "kitchen_minus4": lambda data: RewardTransform("kitchen_minus4", 1.0, -4.0),  # WSRL
}


def reward_transform(name: str, data: Transitions) -> RewardTransform:
    """The named transform, fitted to `data` where it depends on it. Raises ValueError for an unknown name, with the known ones."""
    if name not in REWARD_TRANSFORMS:
        raise ValueError(f"unknown reward transform {name!r}; choose one of {', '.join(REWARD_TRANSFORMS)}")
    return REWARD_TRANSFORMS[name](data)


@dataclass(frozen=True, eq=False)
class ObsTransform:
    """(s - mean) / std per entry; std already holds what keeps it from 0. Dictionary observations have one array per key."""

    mean: Obs
    std: Obs

    @classmethod
    def fit(cls, data: Transitions, eps: float = OBS_EPS, keys: Sequence[str] | None = None) -> ObsTransform:
        """mean and std + eps of the observations of `data` alone (next_obs not counted twice), float64       [TD3+BC; arXiv 2106.06860].

        Of dictionaries only the given `keys` (None: all); the others stay as they are.
        """
        obs = {k: data.obs[k] for k in keys} if isinstance(data.obs, dict) and keys is not None else data.obs
        mean = map_obs(obs, lambda x: x.mean(axis=0, dtype=np.float64))
        return cls(mean, map_obs(obs, lambda x: x.std(axis=0, dtype=np.float64) + eps))

    def __call__(self, obs: Obs) -> Obs:
        if isinstance(obs, dict):
            assert isinstance(self.mean, dict) and isinstance(self.std, dict)
            mean, std = self.mean, self.std
            return {k: ((v - mean[k]) / std[k]).astype(np.float32) if k in mean else v for k, v in obs.items()}
        return ((obs - self.mean) / self.std).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Transform:
    """Reward and observation transform of one policy; None leaves observations as they are."""

    reward: RewardTransform
    obs: ObsTransform | None = None

    def __call__(self, data: Transitions) -> Transitions:
        """`data` with both applied; s and s' by the same statistics. The reference goes where rewards change: it is one of raw returns."""
        raw = (self.reward.scale, self.reward.shift) == (1.0, 0.0)
        changed = replace(data, reward=self.reward(data.reward), about=data.about if raw else replace(data.about, reference=None))
        return changed if self.obs is None else replace(changed, obs=self.obs(data.obs), next_obs=self.obs(data.next_obs))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON that `from_json` reads back to the same numbers."""
        out: dict[str, Any] = {"reward": {"name": self.reward.name, "scale": self.reward.scale, "shift": self.reward.shift}}
        if self.obs is not None:
            out["obs"] = {part: {k: v.tolist() for k, v in columns(getattr(self.obs, part)).items()} for part in ("mean", "std")}
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Transform:
        """What `to_json` wrote."""
        if "obs" not in data:
            return cls(RewardTransform(**data["reward"]))
        mean, std = ({k: np.asarray(v) for k, v in data["obs"][part].items()} for part in ("mean", "std"))
        if list(mean) == ["obs"]:
            return cls(RewardTransform(**data["reward"]), ObsTransform(mean["obs"], std["obs"]))
        bare = [{k.removeprefix("obs/"): v for k, v in part.items()} for part in (mean, std)]
        return cls(RewardTransform(**data["reward"]), ObsTransform(*bare))

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all."""
        path = Path(path)
        write_whole(path, (json.dumps(self.to_json()) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Transform:
        """Read what `save` wrote. Raises ValueError for a file that is something else."""
        try:
            return cls.from_json(read_json(path))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no saved transform ({error!r})") from error


def terminate_at(data: Transitions, reward: float = 1.0) -> Transitions:
    """Rows with at least this raw reward terminate, and what was logged after one counts as a new episode: AntMaze as D4RL's v2 files have it.

    For tasks that go on after success; evaluation must then stop there too.
    """
    done = data.reward >= reward
    starts = np.append(True, done[:-1] | (data.episode[1:] != data.episode[:-1]))
    changed = replace(data, terminated=data.terminated | done, episode=np.cumsum(starts) - 1)
    keep = np.append(changed.episode[1:] == changed.episode[:-1], False)
    return replace(changed, has_next_action=data.has_next_action & keep)
