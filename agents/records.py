"""The one record: rows of decisions with named columns, plus index views (design of every method's data).

A `Rollout` holds B rows of up to T decisions. A row is an environment's stretch of time (control), one response (tokens) or one denoising chain.
`valid` says that the step exists, `mask` that it counts in losses and statistics. No merged `done`: `continuation` (1 - terminated, or softer)
stops the value recursion's target, `truncated` cuts the recursion while `boot_value` still carries V(final observation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

Obs = Tensor | dict[str, Tensor]


def map_obs(obs: Obs, fn: Callable[[Tensor], Tensor]) -> Obs:
    """Apply `fn` to the tensor, or to every tensor of the dictionary."""
    return {k: fn(v) for k, v in obs.items()} if isinstance(obs, dict) else fn(obs)


def joined(values: Sequence[Any]) -> Any:
    """Tensors, lists, or dictionaries of them, one behind the other."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if isinstance(values[0], dict):
        return {k: joined([v[k] for v in values]) for k in values[0]}
    return [x for v in values for x in v]


@dataclass
class Rollout:
    """Rows of decisions, leading shape (B, T) unless said otherwise. Rewards in the task's unit, log-probs in nats."""

    obs: Obs  # what the network saw; (B, T, ...), or (B, ...) per key when `per_row` (tokens: the prompt once, never a prefix per step)
    action: Tensor  # (B, T, ...) policy coordinates
    logp_old: Tensor  # (B, T) of the distribution actually sampled
    reward: Tensor  # (B, T)
    valid: Tensor  # (B, T) bool: the step exists
    mask: Tensor  # (B, T) bool, a subset of valid: counts in losses and statistics
    continuation: Tensor  # (B, T) in [0, 1]
    truncated: Tensor  # (B, T) bool: outside interruption after this step
    boot_value: Tensor | None = None  # (B, T, 1 + m), read where truncated or at the end of a cut row
    value: Tensor | None = None  # (B, T, 1 + m)
    cost: Tensor | None = None  # (B, T, m)
    discount: Tensor | None = None  # (B, T), where it differs from the method's gamma
    dist_old: dict[str, Tensor] | None = None  # parameters of the sampling distribution, only for methods that need KL
    dist_ref: dict[str, Tensor] | None = None  # parameters of the reference's distribution, only for an exact penalty
    logp_ref: dict[str, Tensor] = field(default_factory=dict)  # (B, T) per named reference
    group: Tensor | None = None  # (B,) rows of one start share a number
    columns: dict[str, Tensor] = field(default_factory=dict)  # (B, T) extras of a driver: adv, ret, weight
    outcome: dict[str, Any] = field(default_factory=dict)  # what the task scores: final samples or texts; a list or tensor per row
    per_row: bool = False  # obs is stored once per row

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return int(self.valid.shape[0]), int(self.valid.shape[1])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Rollout:
        """A record with `fn` applied to every tensor column; `outcome` is dropped, it belongs to whole rollouts."""
        out: dict[str, Any] = {"outcome": {}}
        for f in fields(self):
            v = getattr(self, f.name)
            if f.name == "obs":
                out["obs"] = map_obs(v, fn)
            elif isinstance(v, Tensor):
                out[f.name] = fn(v)
            elif isinstance(v, dict) and f.name != "outcome":
                out[f.name] = {k: fn(x) for k, x in v.items()}
        return replace(self, **out)

    def tensors(self) -> list[Tensor]:
        """Every tensor column, in the order in which `map` visits them."""
        out: list[Tensor] = []

        def keep(t: Tensor) -> Tensor:
            out.append(t)
            return t

        self.map(keep)
        return out

    def rows(self, index: Tensor) -> Rollout:
        """The rows `index` (b,), in that order."""
        return self.map(lambda t: t[index])

    def to(self, device: torch.device | str) -> Rollout:
        """The record on another device (`outcome` is kept)."""
        return replace(self.map(lambda t: t.to(device)), outcome=self.outcome)

    def decisions(self) -> Rollout:
        """Every decision as its own row, (B * T, 1), row-major. Raises ValueError for records whose obs is stored per row."""
        if self.per_row:
            raise ValueError(
                "this rollout keeps its observations once per row (tokens), so it can't be cut into single decisions; use unit='row'"
            )
        B, T = self.shape
        group = None if self.group is None else self.group.repeat_interleave(T)
        flat = replace(self, group=None).map(lambda t: t.reshape(B * T, 1, *t.shape[2:]))
        return replace(flat, group=group)

    def minibatches(
        self, unit: Literal["decision", "row"], size: int, generator: torch.Generator | None = None, shuffle: bool = True
    ) -> Iterator[Rollout]:
        """One pass over the record in equal parts of `size` units; a short remainder joins as a last, smaller part.

        unit "decision" gives (b, 1) rows of decisions that count (mask), unit "row" gives (b, T).
        """
        base = self.decisions() if unit == "decision" else self
        index = torch.nonzero(base.mask.any(dim=1)).squeeze(1)
        if size < 1:
            raise ValueError(f"minibatch size must be >= 1, got {size}")
        if shuffle:
            index = index[torch.randperm(len(index), generator=generator).to(index.device)]
        for start in range(0, len(index), size):
            yield base.rows(index[start : start + size])

    def returns(self) -> Tensor:
        """(B,) undiscounted sum of the rewards of the valid steps of each row."""
        return (self.reward * self.valid).sum(dim=1)


@dataclass
class Views:
    """Which of B rows make a pair, a list or a single item, and what is known of them: all that a preference loss reads besides scores.

    Row fields have leading shape (B,); fields of items are parallel to the index view that the loss is about.
    """

    pairs: Tensor | None = None  # (P, 2) int64: rows of the chosen and of the rejected response
    groups: Tensor | None = None  # (G, K) int64: rows of ranked or scored lists; -1 fills the end of a short list
    gold: Tensor | None = None  # (P,) int64, a third row of each pair: gold response, second positive, or a sample to calibrate on
    unpaired: Tensor | None = None  # (U,) int64: rows that stand alone
    q: Tensor | None = None  # (P,) in [0, 1]: probability that `chosen` is preferred
    margin: Tensor | None = None  # (P,) by how much, on the logit scale
    weight: Tensor | None = None  # (N,) factor of each item's loss
    score: Tensor | None = None  # (B,) reward or win rate of each row, or (B, D) for D dimensions
    label: Tensor | None = None  # (B,) bool: the row is desirable
    c: Tensor | None = None  # (B, T) weight of each decision in the score: credit of steps or turns, discounts, critiques
    keep: Tensor | None = None  # (B, T) bool: decisions that enter the score, a subset of the mask
    diff: Tensor | None = None  # (B, T) bool: decisions in which the two responses of a pair differ

    def check(self, num_rows: int) -> None:
        """Raises ValueError for an index outside the rows, a pair of one row with itself, an empty list, and labels or q of a wrong kind.

        It reads the values, so on a GPU it waits for them: once per batch where data is loaded, not in a loss.
        """
        for name in ("pairs", "groups", "gold", "unpaired"):
            index = getattr(self, name)
            lowest = -1 if name == "groups" else 0
            if index is not None and index.numel() and not (int(index.min()) >= lowest and int(index.max()) < num_rows):
                raise ValueError(f"views.{name} points at rows {int(index.min())} to {int(index.max())}, but there are rows 0 to {num_rows - 1}")
        if self.pairs is not None and bool((self.pairs[:, 0] == self.pairs[:, 1]).any()):
            raise ValueError("views.pairs holds a pair of a row with itself; the chosen and the rejected response are two rows")
        if self.groups is not None and bool(((self.groups >= 0).sum(1) < 2).any()):
            raise ValueError("views.groups holds a list with fewer than 2 rows; a list compares at least two responses")
        if self.label is not None and self.label.dtype != torch.bool:
            raise ValueError(f"views.label must be bool (True: desirable), got {self.label.dtype}; convert +1 / -1 by label > 0")
        if self.q is not None and self.q.numel() and not (float(self.q.min()) >= 0.0 and float(self.q.max()) <= 1.0):
            raise ValueError(f"views.q are probabilities in [0, 1], got values from {float(self.q.min()):.4g} to {float(self.q.max()):.4g}")


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) over mask (B, T); 0 where nothing is masked in."""
    m = mask.to(x.dtype)
    return (x * m).sum() / m.sum().clamp(min=1.0)
