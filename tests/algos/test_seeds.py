"""Several seeds stepped as one batched update: the numbers of separate runs, checkpoints that each seed keeps, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.algos import optimizer
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.seeds import SeedGroup
from markovia.algos.off_policy.slots import Behaviour, QuantileCritics
from markovia.algos.offline.methods import OFFLINE
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver

torch.set_num_threads(1)
POINT = "markovia/PointMass2D-v0"
FAST = ("td3-bc", "iql")


def short(method_id: str) -> Any:
    method = override(configure(method_id, POINT), {"num_steps": 4, "num_env_steps": 8, "batch_size": 16, "policy": {"hidden": [8]}})
    if method.critic is not None:
        method = override(method, {"critic": {"hidden": [8, 8]}})
    if isinstance(method.critic, QuantileCritics):
        method = override(method, {"critic": {"quantiles": 2, "embedding": 4}})
    if isinstance(method.behaviour, Behaviour):
        method = override(method, {"behaviour": {"steps": 3}})
    return method


def drivers(method: Any, seeds: int = 3) -> list[Any]:
    return [make_driver(method, build(POINT, method, s, dataset="fixture:pointmass2d/blend"), s) for s in range(seeds)]


@pytest.mark.parametrize("method_id", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in OFFLINE])
def test_seeds_together_equal_separate_runs(method_id: str) -> None:
    """Every tensor of agent, networks and optimisers after two iterations, and what is reported of them."""
    alone, together = drivers(short(method_id)), drivers(short(method_id))
    group = SeedGroup(together)
    for _ in range(2):
        left, right = [d.step() for d in alone], group.step()
        for a, b in zip(left, right, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    for a, b in zip(alone, together, strict=True):
        assert b.finished and b.num_updates == 8
        before, after = a.state(), b.state()
        assert before[1] == after[1]
        for name, tensor in before[0].items():
            torch.testing.assert_close(after[0][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_seeds_of_large_networks_leave_the_fused_optimiser_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused Adam, which long vectors take on the CPU, can't be mapped over seeds."""
    monkeypatch.setattr(optimizer, "LONG", 8)
    alone, together = drivers(short("td3-bc"), 2), drivers(short("td3-bc"), 2)
    group = SeedGroup(together)
    for a, b in zip([d.step() for d in alone], group.step(), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_each_seed_keeps_its_own_checkpoint(tmp_path: Any) -> None:
    """Saved after one iteration, loaded into drivers that are then stepped together: the same as going on, and as one seed alone."""
    method = short("td3-bc")
    first = drivers(method)
    group = SeedGroup(first)
    group.step()
    second = drivers(method)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        save_tensors(tmp_path / f"{i}.safetensors", *a.state())
        b.load_state(*load_tensors(tmp_path / f"{i}.safetensors"))
    resumed = SeedGroup(second)
    single = drivers(method, 1)[0]
    single.load_state(*load_tensors(tmp_path / "0.safetensors"))
    for a, b in zip(group.step(), resumed.step(), strict=True):
        assert a == b
    single.step()
    for name, tensor in single.state()[0].items():
        torch.testing.assert_close(second[0].state()[0][name], tensor, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    pair = drivers(short("td3-bc"), 2)
    pair[1].method = dataclasses.replace(pair[1].method, batch_size=8)
    with pytest.raises(ValueError, match="need one method and equally many updates"):
        SeedGroup(pair)
    pair[0].method = OffPolicy()
    with pytest.raises(ValueError, match="serve methods that learn from a dataset, got OffPolicy"):
        SeedGroup(pair)
