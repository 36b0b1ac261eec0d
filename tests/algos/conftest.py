"""Fixtures of the preference tests: a batch with every column filled, and the few columns that a row wants in another form."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from markovia.agents.records import Views
from markovia.algos.preference.scores import TokenScores

# What several test files share lies beside them; nothing else of the checkout is put on the path.
sys.path.insert(0, str(Path(__file__).parent / "pieces"))

F64 = torch.float64
B, T = 12, 4


def _random(seed: int = 0, scale: float = 0.7) -> tuple[TokenScores, Views]:
    """12 rows of 1 to 4 tokens, every column filled; scores are win rates."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, T + 1, (B,), generator=g)
    mask = torch.arange(T) < length[:, None]

    def logs(around: torch.Tensor | float) -> torch.Tensor:
        return around - scale * torch.rand(B, T, generator=g, dtype=F64)

    logp = logs(-0.2)
    scores = TokenScores(
        logp, mask, {name: logs(-0.2) for name in ("ref", "old", "target", "proposal", "stage0", "stage1")},
        kl_ref=torch.rand(B, T, generator=g, dtype=F64), collision=logs(-0.2), value=torch.rand(B, generator=g, dtype=F64),
        mismatched=torch.randn(B, generator=g, dtype=F64) + 0.5, progress=0.6,
    )  # fmt: skip
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    views = Views(
        pairs=pairs, groups=torch.tensor([[0, 1, 2, 3], [4, 5, 6, -1], [7, 8, 9, 10]]), gold=torch.tensor([8, 9, 10, 11]), unpaired=torch.arange(B),
        q=torch.rand(4, generator=g, dtype=F64), score=torch.rand(B, generator=g, dtype=F64), label=torch.rand(B, generator=g) > 0.5,
        keep=mask & (torch.rand(B, T, generator=g) > 0.3), diff=mask & (torch.rand(B, T, generator=g) > 0.5),
    )  # fmt: skip
    return scores, views


def _fitting(method_id: str, scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """The few columns that a row wants in another form."""
    if method_id == "modpo":  # two rewards per row; those of the second dimension are .2, 1, 0
        second = torch.linspace(0.2, 1.0, len(scores.logp), dtype=F64) if len(scores.logp) > 3 else torch.tensor([0.2, 1.0, 0.0], dtype=F64)
        return scores, dataclasses.replace(views, score=torch.stack([views.score, second], 1))
    if method_id == "iopo":  # rows y1|x1, y2|x2, y2|x1, y1|x2
        full = torch.tensor([[0, 2, 1, 1]]) if len(scores.logp) == 3 else views.groups.clamp(min=0)
        return scores, dataclasses.replace(views, groups=full)
    return scores, views


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., tuple[TokenScores, Views]]:
    """random_batch(seed): 12 rows of 1 to 4 tokens."""
    return _random


@pytest.fixture(scope="session")
def fitting() -> Callable[..., tuple[TokenScores, Views]]:
    """fitting(method_id, scores, views)."""
    return _fitting
