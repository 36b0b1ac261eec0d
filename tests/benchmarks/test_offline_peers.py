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


def test_updates_that_are_no_tenths_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        compared(monkeypatch, tmp_path / "peers.json", "--updates", "15")
    assert "--updates must be a multiple of 10, got 15" in capsys.readouterr().err
