"""What an update tells about itself: detached scalars, kept as one vector per step until somebody asks for their means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from markovia.agents.records import masked_mean


def explained_variance(target: Tensor, value: Tensor, mask: Tensor) -> float:
    """1 - mean (target - value)^2 / Var target over mask (B, T); nan where the targets do not vary."""
    y = torch.where(mask, target, 0.0)
    variance = masked_mean((y - masked_mean(y, mask)).square(), mask)
    error = masked_mean(torch.where(mask, target - value, 0.0).square(), mask)
    return float(1.0 - error / variance) if variance > 1e-12 else math.nan


@dataclass(frozen=True)
class Stats:
    """Named scalars of one step as a vector (k,), which costs an update one tensor however many there are."""

    names: tuple[str, ...]
    values: Tensor

    @staticmethod
    def of(scalars: Mapping[str, Tensor]) -> Stats:
        """From tensors of shape ()."""
        dtype = next(iter(scalars.values())).dtype
        return Stats(tuple(scalars), torch.stack([s.detach().to(dtype) for s in scalars.values()]))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Tensor:
        return self.values[self.names.index(name)]


class Statistics:
    """Means over the steps of an iteration (the largest value for names that end in _max); no step waits for `.item()`."""

    def __init__(self) -> None:
        self.steps: dict[tuple[str, ...], list[Tensor]] = {}

    def add(self, stats: Stats | Mapping[str, Tensor]) -> None:
        stats = stats if isinstance(stats, Stats) else Stats.of(stats)
        self.steps.setdefault(stats.names, []).append(stats.values)

    def means(self) -> dict[str, float]:
        columns: dict[str, list[Tensor]] = {}
        for names, vectors in self.steps.items():
            for name, column in zip(names, torch.stack(vectors).unbind(1), strict=True):
                columns.setdefault(name, []).append(column)
        joined = {name: torch.cat(parts) for name, parts in columns.items()}
        return {name: float(x.max() if name.endswith("_max") else x.mean()) for name, x in joined.items()}
