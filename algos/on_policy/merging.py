"""Runs that are merged: WARP's outer loop as a slot of the on-policy loop, on the weights that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from markovia.algos.on_policy.references import lerp, slerp


@dataclass(frozen=True)
class Warp:
    """The budget is cut into `rounds` of `runs` equal parts. Each part is a run of its own from the round's start, with a fresh optimiser and
    reference; a round ends with the runs merged on the sphere and pulled back to the start, where the next one begins.

    theta_start <- (1 - eta) theta_start + eta slerp(theta_1, ..., theta_M), recursively for M > 2                  [arXiv 2406.16768, algorithm 1]
    """

    runs: int = 2  # M
    rounds: int = 2  # I
    eta: float = 0.3  # share of the merged weights in the next start, and in the result

    def __post_init__(self) -> None:
        if self.runs < 1 or self.rounds < 1 or not 0.0 < self.eta <= 1.0:
            raise ValueError(f"expected runs >= 1, rounds >= 1 and eta in (0, 1], got {self.runs}, {self.rounds} and {self.eta}")


def merged(start: list[Tensor], ends: list[list[Tensor]]) -> list[Tensor]:
    """The runs' ends on the sphere around the start: the k-th is taken in by 1 / k of its angle to what the others made."""
    out = ends[0]
    for k, end in enumerate(ends[1:], start=2):
        out = slerp(start, out, end, fraction=1.0 / k)
    return out


class Merger:
    """What WARP keeps between parts: the round's start, the ends of the runs since, and how far the present one has come."""

    def __init__(self, warp: Warp, trained: list[nn.Parameter]) -> None:
        self.warp, self.trained = warp, trained
        self.start = [p.detach().clone() for p in trained]
        self.ends: list[list[Tensor]] = []
        self.part, self.iterations = 0, 0  # parts that have ended, and iterations of the present one

    def within(self, progress: float) -> tuple[int, float]:
        """Iterations of the present part, and the share of its budget that is spent; `progress` is that of the whole budget."""
        return self.iterations, self.warp.runs * self.warp.rounds * progress - self.part

    @torch.no_grad()
    def end_of_part(self, progress: float) -> bool:
        """Whether a part of the budget has just ended; the policy then stands at the start of the next."""
        part = int(self.warp.runs * self.warp.rounds * progress)
        self.iterations += 1
        if part == self.part:
            return False
        self.part, self.iterations = part, 0
        self.ends.append([p.detach().clone() for p in self.trained])
        if len(self.ends) == self.warp.runs:
            self.start = lerp(self.start, merged(self.start, self.ends), eta=self.warp.eta)
            self.ends = []
        for p, w in zip(self.trained, self.start, strict=True):
            p.copy_(w)
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors = {f"start.{i}": w for i, w in enumerate(self.start)}
        tensors |= {f"end.{k}.{i}": w for k, end in enumerate(self.ends) for i, w in enumerate(end)}
        return tensors, {"part": self.part, "ends": len(self.ends), "iterations": self.iterations}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back."""
        count = range(len(self.start))
        self.start = [tensors[f"start.{i}"].to(w) for i, w in zip(count, self.start, strict=True)]
        self.ends = [[tensors[f"end.{k}.{i}"].to(self.start[i]) for i in count] for k in range(meta["ends"])]
        self.part, self.iterations = meta["part"], meta.get("iterations", 0)  # which checkpoints of before did not keep
