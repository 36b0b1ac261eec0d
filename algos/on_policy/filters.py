"""Which prompts a batch is made of: groups of responses are kept or dropped by their rewards, and the batch is filled up again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from markovia.agents.records import Rollout, joined


def group_means(returns: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean return of each group (K,) and which group each row belongs to (B,), groups numbered 0..K-1."""
    _, index = torch.unique(group, return_inverse=True)
    count = torch.zeros(int(index.max()) + 1, dtype=returns.dtype, device=returns.device).index_add_(0, index, torch.ones_like(returns))
    return torch.zeros_like(count).index_add_(0, index, returns) / count, index


@dataclass(frozen=True)
class AccuracyBand:
    """Keep a prompt when the share of solved responses lies in the band; draw more prompts until the batch is full.

    DAPO's dynamic sampling drops shares of exactly 0 and 1 (strict bounds), the balanced filter keeps [0.25, 0.75]. [arXiv 2503.14476, eq. 11;
    2504.03380, eq. 4]. Prompts then come with weight P(kept): 1 - p^G - (1 - p)^G for strict bounds, a success rate of p and G responses.
    Where the task doesn't tell what is solved, the band is one of mean rewards; but strict bounds of 0 and 1 then keep prompts whose responses'
    rewards differ, as DAPO's code does for any metric, for rewards have no scale of their own.
    """

    low: float = 0.0
    high: float = 1.0
    strict: bool = True  # means equal to a bound are dropped
    max_rounds: int = 8  # batches that are drawn at most; then the batch stays smaller

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"the band must have low < high, got low={self.low} and high={self.high}")
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be >= 1, got {self.max_rounds}")

    def keep(self, returns: Tensor, group: Tensor, solved: Tensor | None = None) -> Tensor:
        """(B,) bool; `solved` (B,) bool says which responses are right, None: the task can't tell."""
        mean, index = group_means(returns if solved is None else solved.to(returns), group)
        if solved is None and self.strict and (self.low, self.high) == (0.0, 1.0):
            least, most = (torch.zeros_like(mean).scatter_reduce(0, index, returns, how, include_self=False) for how in ("amin", "amax"))
            return (least < most)[index]
        inside = (mean > self.low) & (mean < self.high) if self.strict else (mean >= self.low) & (mean <= self.high)
        return inside[index]


def join(parts: Sequence[Rollout]) -> Rollout:
    """Records of one width as one record; groups of different parts stay apart."""
    if len(parts) == 1:
        return parts[0]
    out: dict[str, Any] = {}
    for f in fields(Rollout):
        values = [getattr(p, f.name) for p in parts]
        if isinstance(values[0], Tensor):
            out[f.name] = torch.cat(values)
        elif isinstance(values[0], dict):
            out[f.name] = {k: joined([v[k] for v in values]) for k in values[0]}
    start, groups = 0, []
    for p in parts:
        if p.group is not None:
            groups.append(p.group + start)
            start += int(p.group.max()) + 1 if len(p.group) else 0
    return replace(parts[0], **{**out, "group": torch.cat(groups) if groups else None})


def chosen(rollout: Rollout, keep: Tensor) -> Rollout:
    """The rows `keep` (n,) of a record, with what the task told about them."""
    rows = keep.tolist()

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[keep.to(value.device)]
        return {k: pick(v) for k, v in value.items()} if isinstance(value, dict) else [value[i] for i in rows]

    return replace(rollout.rows(keep), outcome=pick(rollout.outcome))


def filled(collect: Callable[[], Rollout], band: AccuracyBand, num_rows: int, count: Callable[[Rollout], int]) -> tuple[Rollout, int]:
    """A record of `num_rows` kept rows (fewer after max_rounds; possibly none), and `count` summed over all that were drawn for it.

    Raises ValueError for records without groups.
    """
    parts: list[Rollout] = []
    kept, drawn = 0, 0
    for _ in range(band.max_rounds):
        rollout = collect()
        if rollout.group is None:
            raise ValueError("a group filter needs several responses per prompt: set group_size >= 2 and use a task with prompts")
        drawn += count(rollout)
        keep = band.keep(rollout.returns(), rollout.group, rollout.outcome.get("solved"))
        index = torch.nonzero(keep).squeeze(1)[: num_rows - kept]
        parts.append(chosen(rollout, index))
        kept += len(index)
        if kept >= num_rows:
            break
    return join(parts), drawn
