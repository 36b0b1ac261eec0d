"""The preference benchmark's own arithmetic: problems at a given KL, levels of a curve, pairs of scores, tables of cells."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from markovia.algos.preference.population import total_variation
from markovia.claims.preference_sentiment import chosen_at, wins
from markovia.envs.text.preferences import Item, PreferenceData, Report

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """script(name): a module beside the benchmark, found as when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in [n for n in sys.modules if n == "preference" or n.startswith("preference_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["bandit", "tree", "game"])
def test_the_optimum_of_a_bed_has_the_kl_at_which_policies_are_compared(script, name):
    bed = script("preference_exact").BEDS[name]()
    found = bed.measures(bed.best)
    assert found["kl_ref"] == pytest.approx(bed.nats, rel=1e-4) and abs(found["kl_optimum"]) < 1e-9
    start = bed.measures(bed.logp_ref)
    assert start["kl_ref"] == pytest.approx(0.0, abs=1e-12) and start["chosen"] == 0.0
    # The reference beats itself in half of the cases, and less often than the optimum does.
    assert start["win_rate"] == pytest.approx(0.5) and found["win_rate"] > 0.5


def test_the_population_loss_of_dpo_is_least_at_the_optimum(script):
    exact = script("preference_exact")
    bed = exact.bandit()
    population, beta = exact.Population("dpo", bed), 0.7
    loss = exact.with_strength(exact.PREFERENCE["dpo"].value.loss, beta)
    optimum = bed.optimum(beta).view(4, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(population(loss, optimum, 0.0), optimum)
    assert gradient.abs().max() < 1e-9
    end = exact.path(population, loss, 400, 400)[-1]
    assert total_variation(end.view(4, 8), optimum.detach()) < 1e-2


def test_levels_wins_and_intervals(script):
    curve = {"win_rate": [0.5, 0.54, 0.6], "chosen": [0.0, -0.1, -0.4]}
    main, text = script("preference"), script("preference_text")
    assert main.at_level({"curve": curve, "every": 10}, 0.55) == (-0.4, 20) and main.at_level({"curve": curve, "every": 10}, 0.7) is None
    assert wins([1.0, 0.0, 0.5], [0.0, 1.0, 0.5]) == 0.5
    points = [{"win_rate": w, "chosen": c} for w, c in ((0.5, 0.0), (0.6, -1.0), (0.8, -3.0))]
    assert chosen_at(points, 0.75) == pytest.approx(-2.5) and math.isnan(chosen_at(points, 0.9))
    # Wilson, n = 100, k = 60: (0.6 + 1.9208/100 -+ 1.96 sqrt(0.24/100 + 0.9604/100^2)) / (1 + 3.8416/100) = 0.5020, 0.6906
    assert text.interval(60, 100) == pytest.approx([0.5020, 0.6906], abs=1e-4)


def test_no_prompt_is_trained_on_and_held_out(script):
    items = [Item([i // 2], [[1], [2]], line=i) for i in range(20)]
    train, rest = script("preference_text").apart(PreferenceData("pairs", items, frozenset(), frozenset(), Report("x", "preference")), 12)
    assert len(train) == 12 and len(rest) == 8
    assert not {tuple(i.prompt) for i in train} & {tuple(i.prompt) for i in rest}


def test_tables_of_cells(script):
    main, exact = script("preference"), script("preference_exact")
    cell = {"method": "dpo", "seed": 0, "kl_optimum": 0.01, "win_rate": 0.65, "chosen": -0.2, "stopped": None, "reached": True}
    lines = main.equal_kl_table([{**cell, "bed": "bandit"}, {**cell, "bed": "game", "reached": False}])
    assert "| dpo | 0.010 / 65.0 / -0.20 |  | 0.010 / 65.0 / -0.20 † |  |" in lines
    assert "dpo" in exact.methods() and not set(exact.LEFT_OUT) & set(exact.methods())
    side = {"pairs_per_second": 2.0, "peak_mb": 1000.0}
    row = {"adapters": True, "stored_anchors": False, "precision": {"markovia": "bf16", "TRL": "float32"}, "speed_ratio": 2.0, "memory_ratio": 0.5}
    told = main.speed_table([{**row, "sides": {"markovia": [side], "TRL": [{"pairs_per_second": 1.0, "peak_mb": 2000.0}]}}])
    assert told[-2] == "| adapters | computed | bf16 | float32 | 2.00 | 1.00 | **2.00** | 1,000 | 2,000 | **0.50** |"
