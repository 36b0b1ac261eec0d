"""The arithmetic benchmark's table and verdicts, on cells that are given."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("arithmetic_benchmark", FOLDER / "arithmetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("grid", None)


def given(method, seed, one, eight, seconds=100.0):
    start, end = {"pass@1": 0.3, "pass@8": 0.9}, {"pass@1": one, "pass@8": eight}
    return {"task": "t", "method": method, "seed": seed, "start": start, "end": end, "done": {"seconds": seconds}}


def test_verdicts(bench):
    rows = [given("grpo", 0, 0.9, 0.85), given("grpo", 1, 0.86, 0.87), given("rloo", 0, 0.84, 0.9), given("ppo", 0, 0.9, 0.9, 400.0)]
    rows += [given("clip-cov", 0, 0.9, 0.89), given("kl-cov", 0, 0.9, 0.87), given("steer", 0, 0.9, 0.9)]
    found = bench.summary(rows)
    assert found["grpo"]["worst"] == 0.86 and found["grpo"]["pass@8"] == pytest.approx(0.86) and found["grpo"]["seeds"] == 2
    told = {m: bench.verdict(m, found) for m in found}
    assert told["grpo"] == "holds" and told["rloo"] == told["ppo"] == told["kl-cov"] == "does not hold"  # too little, too long, lost
    assert told["clip-cov"] == "holds" and told["steer"] == ""
    again = bench.summary([given("grpo", 0, 0.9, 0.95), given("clip-cov", 0, 0.9, 0.95)])
    assert bench.verdict("clip-cov", again) == "kept, but so it is by grpo"


def test_the_table_has_a_line_per_method(bench):
    lines = bench.table([given("siren", 0, 0.9, 0.9), given("grpo", 0, 0.9, 0.8)]).splitlines()
    assert lines[-2].startswith("| grpo | 1 | 90.0 % | 90.0 % | 80.0 % | 90.0 % | 80.0 % | 100 | holds |")
    assert lines[-1].startswith("| siren | 1 |") and lines[-1].endswith("| holds |")
