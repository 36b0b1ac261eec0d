"""The front benchmark of denoising methods: what it counts, what it can pay, which points are on a front."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
torch.set_num_threads(1)
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("diffusion_benchmark", FOLDER / "diffusion.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


MIXTURE = "markovia/Mixture2D-v0"


def test_the_meter_counts_samples_of_every_copy(bench):
    value = bench.settings(MIXTURE, "adjoint-matching", 1.0)
    setup, driver, meter = bench.prepared(MIXTURE, value, 0)
    driver.step()
    # 128 chains of 20 steps: sampled by the policy, back through the reference, then policy and reference in the loss
    assert meter.count == 128 * 20 * 4
    meter.counting = False
    setup.agent.generate(setup.task.starts(3, torch.Generator()), torch.Generator())
    assert meter.count == 128 * 20 * 4


@pytest.mark.parametrize("method", ["ddpo", "rebel-diffusion"])
def test_a_run_spends_its_budget(bench, method):
    budget = 60_000
    value = bench.settings(MIXTURE, method, 1.0)
    from markovia.algos.presets import override

    chains = bench.affordable(MIXTURE, value, 0, budget)
    _, driver, meter = bench.prepared(MIXTURE, override(value, {"num_env_steps": chains}), 0)
    while not driver.finished:
        driver.step()
    assert 0.7 * budget < meter.count < 1.3 * budget


def test_strengths_multiply_the_presets(bench):
    assert bench.settings(MIXTURE, "ddpo", 3.0).divergence.beta == pytest.approx(0.3)
    assert bench.settings("markovia/Digits-v0", "adjoint-matching", 0.3).lam == pytest.approx(9.0)
    assert bench.settings(MIXTURE, "diffusion-dpo", 3.0).loss.beta == pytest.approx(15.0)
    assert bench.settings(MIXTURE, "diffusion-dpo", 1.0, budget=8_000).source.num_pairs == 100  # 2 samples of 20 steps each: half of 8,000


def test_the_front_holds_what_no_other_point_beats(bench):
    points = [{"kl_nats": k, "sample_return": r} for k, r in ((1.0, 0.5), (2.0, 0.4), (2.0, 0.6), (3.0, 0.6), (4.0, 0.9))]
    assert [(p["kl_nats"], p["sample_return"]) for p in bench.front(points)] == [(1.0, 0.5), (2.0, 0.6), (4.0, 0.9)]


@pytest.mark.parametrize("method, strength", [("d3po", 1.0), ("rlg", 1.0), ("fk-steering", 4.0)])
def test_cells_table_and_picture(bench, method, strength, tmp_path):
    cell = bench.cell(MIXTURE, method, strength, 0, 8_000, 32)
    json.dumps(cell, allow_nan=False)
    assert all(p.keys() >= {"sample_return", "kl_nats", "diversity", "nearest_data", "evaluations"} for p in cell["points"])
    bench.picture([cell], tmp_path / "found.png")
    assert method in bench.table([cell]) and (tmp_path / "found.png").stat().st_size > 5000
