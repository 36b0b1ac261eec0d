"""Logged episodes as chunks of actions with their observation windows, cut on the fly; nothing crosses the border of an episode."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from markovia.agents.diffusion_policy import DiffusionPolicyAgent
from markovia.algos.offline.method import Logged
from markovia.algos.offline.source import check_fits, fix_normalizer, unit
from markovia.envs.offline.transforms import ObsTransform
from markovia.envs.offline.transitions import About, Transitions


@dataclass(frozen=True)
class ChunkData:
    """Rows of whole episodes, one after the other, and for every row the first and the last row of its episode."""

    obs: Tensor  # (N, ...) raw observations
    action: Tensor  # (N, d) in [-1, 1]
    first: Tensor  # (N,) int64
    last: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.action)

    def chunks(self, rows: Tensor, horizon: int) -> Tensor:
        """(b, H, d): the actions from each row on; after the episode's end its last action is repeated."""
        index = torch.minimum(rows[:, None] + torch.arange(horizon), self.last[rows, None])
        return self.action[index]

    def windows(self, rows: Tensor, length: int) -> Tensor:
        """(b, length, ...): the observations up to each row, that one included and last; before the episode's begin its first one is repeated."""
        index = torch.maximum(rows[:, None] - torch.arange(length - 1, -1, -1), self.first[rows, None])
        return self.obs[index]

    def checksum(self) -> int:
        """CRC-32 of every column, in order."""
        found = 0
        for column in (self.obs, self.action, self.last):
            found = zlib.crc32(column.numpy().tobytes(), found)
        return found


def chunk_data(data: Transitions, settings: Logged, agent: DiffusionPolicyAgent) -> ChunkData:
    """The episodes that `settings` leave, for `agent`, whose normaliser is set to the data's mean and std + 1e-3, and stays so.

    Raises ValueError when observations or actions are not those of the agent's spaces.
    """
    check_fits(data, agent)  # type: ignore[arg-type]
    data = data.best(settings.fraction, settings.fraction_gamma)
    if "normalizer" in agent.net:
        fix_normalizer(agent.net["normalizer"], ObsTransform.fit(data), len(data))  # type: ignore[arg-type]
    assert isinstance(data.obs, np.ndarray)
    first, end = data.bounds()
    lengths = end - first
    return ChunkData(
        obs=torch.from_numpy(np.ascontiguousarray(data.obs, dtype=np.float32)),
        action=torch.from_numpy(unit(data.action, agent).astype(np.float32)),  # type: ignore[arg-type]
        first=torch.from_numpy(np.repeat(first, lengths)),
        last=torch.from_numpy(np.repeat(end - 1, lengths)),
    )


def chunk_transitions(data: Transitions, horizon: int, obs_steps: int) -> Transitions:
    """Every row with its window as the observation and its chunk as the action: what a policy that chooses chunks at once is cloned from.

    obs (N, obs_steps, ...), action (N, H, *shape); next observations are the windows one step later. Made as `ChunkData` does.
    """
    assert isinstance(data.obs, np.ndarray) and isinstance(data.next_obs, np.ndarray)
    first, end = data.bounds()
    rows = torch.arange(len(data))
    begin, last = (torch.from_numpy(np.repeat(x, end - first)) for x in (first, end - 1))
    rows_of = ChunkData(torch.from_numpy(data.obs), torch.from_numpy(data.action), begin, last)
    window = rows_of.windows(rows, obs_steps).numpy()
    after = np.concatenate([window[:, 1:], data.next_obs[:, None]], 1)
    return replace(data, obs=window, action=rows_of.chunks(rows, horizon).numpy(), next_obs=after, about=About(data.about.name))
