"""Random streams of a batched environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import VectorEnv

from markovia.envs.control.vector import each_seed


class SeededVectorEnv(VectorEnv):
    """Every row has a random stream of its own, seeded and told as those of SyncVectorEnv are."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self._streams = [seeding.np_random() for _ in range(num_envs)]

    def _seed(self, seed: Any) -> None:
        """Begin the streams that are given a seed anew. Raises ValueError for a list of another length."""
        for i, one in enumerate(each_seed(seed, self.num_envs)):
            if one is not None:
                self._streams[i] = seeding.np_random(one)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        return tuple(rng for rng, _ in self._streams)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(seed for _, seed in self._streams)
