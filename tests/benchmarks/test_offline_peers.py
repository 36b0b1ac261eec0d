"""benchmarks/offline_peers.py: returns of ours beside single-file loops."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import offline_peers

DATA = ["--dataset", "fixture:pointmass2d/medium", "--task", "markovia/PointMass2D-v0"]


def compared(monkeypatch, out, *options):
    monkeypatch.setattr(sys, "argv", ["offline_peers.py", *DATA, "--out", str(out), *options])
    offline_peers.main()
    return json.loads(out.read_text())


def test_both_sides_are_evaluated_at_every_tenth_and_a_cell_is_replaced(tmp_path, monkeypatch):
    out = tmp_path / "peers.json"
    first = compared(monkeypatch, out, "--updates", "10")
    assert [c["method"] for c in first] == ["td3-bc", "iql"] and all(len(c[side]) == 10 for c in first for side in ("markovia", "single_file"))
    again = compared(monkeypatch, out, "--updates", "20", "--methods", "iql")
    assert [(c["method"], c["every"]) for c in again] == [("td3-bc", 1), ("iql", 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--updates", "15"], "--updates must be a multiple of 10, got 15"),
        (["--task", "Pendulum-v1"], "the loops act in [-1, 1], but actions of Pendulum-v1 are Box(-2.0, 2.0"),
        (["--task", "FrozenLake-v1"], "the loops take vectors, but observations of FrozenLake-v1 are Discrete(16)"),
    ],
)
def test_what_the_loops_cannot_learn_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        compared(monkeypatch, tmp_path / "peers.json", *options)
    assert message in capsys.readouterr().err and not (tmp_path / "peers.json").exists()
