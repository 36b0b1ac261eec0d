"""N + N iterations are 2N to the bit, the same seed gives the same numbers and another seed others: every row that trains, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import OTHER_KINDS, TRAINED, driver, on_other_kinds

from markovia.agents.checkpoint import load_tensors, save_tensors

torch.set_num_threads(1)
def parameters(run: Any) -> list[torch.Tensor]:
    """Everything that is trained, copied."""
    return [p.detach().clone() for p in run.agent.net.parameters()]


def same(x: dict[str, float], y: dict[str, float]) -> bool:
    """Equal statistics, NaN being equal to itself."""
    return x.keys() == y.keys() and all(x[k] == y[k] or (math.isnan(x[k]) and math.isnan(y[k])) for k in x)


def part(run: Any, iterations: int) -> list[dict[str, float]]:
    """Iterations up to a checkpoint."""
    stats = [run.step() for _ in range(iterations)]
    run.boundary()
    return stats


def differing(a: tuple[dict[str, torch.Tensor], Any], b: tuple[dict[str, torch.Tensor], Any]) -> list[str]:
    """Names of what differs between two states."""
    names = [k for k in a[0].keys() | b[0].keys() if k not in a[0] or k not in b[0] or not torch.equal(a[0][k], b[0][k])]
    return names + (["meta"] if a[1] != b[1] else [])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what several rows start from."""
    return tmp_path_factory.mktemp("shared")


def check(make: Callable[[int], Any], folder: Path, n: int = 1) -> None:
    """Three runs of one seed, one of which is stopped and read back into the second, and a run of another seed."""
    stopped, resumed, whole, other = map(make, (5, 5, 5, 6))
    for run in (stopped, whole, other):
        part(run, n)
    assert differing(stopped.state(), whole.state()) == []
    a, b = parameters(stopped), parameters(other)
    assert len(a) == len(b) and any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(a, b, strict=True))
    save_tensors(folder / "state.safetensors", *stopped.state())
    resumed.load_state(*load_tensors(folder / "state.safetensors"))
    resumed.boundary()
    assert all(map(same, part(whole, n), part(resumed, n)))
    assert differing(whole.state(), resumed.state()) == []


@pytest.mark.check("resume")
@pytest.mark.parametrize("method_id", TRAINED)
def test_n_and_n_are_2n_and_the_seed_is_all_that_counts(method_id: str, shared: Path, tmp_path: Path) -> None:
    check(lambda seed: driver(method_id, seed, shared), tmp_path)


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_the_on_policy_loop_on_other_kinds(kind: str, tmp_path: Path) -> None:
    check(lambda seed: on_other_kinds(kind, seed), tmp_path)
