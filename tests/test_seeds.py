"""Several seeds from one command: run folders like those of separate runs, killed at different places, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from markovia import cli
from markovia.algos.presets import configure, override
from markovia.loaded import load_run
from markovia.runs import train
from markovia.seeds import train_seeds

torch.set_num_threads(1)
POINT = "markovia/PointMass2D-v0"
DATASET = "fixture:pointmass2d/blend"
OPTIONS: dict[str, Any] = {
    "dataset": DATASET, "num_checkpoints": 4, "eval_episodes": 3, "eval_checkpoints": True, "progress": False, "compile": False,
}  # fmt: skip


def short() -> Any:
    small = {"num_env_steps": 20, "num_steps": 5, "batch_size": 8, "policy": {"hidden": [8]}, "critic": {"hidden": [8]}}
    return override(configure("td3-bc", POINT), small)


def weights(run: Path) -> np.ndarray:
    return np.concatenate([v.numpy().ravel() for v in load_run(run).agent.state().values()])


def test_run_folders_are_those_of_separate_runs(tmp_path: Path) -> None:
    """And a run that was stopped behind the others catches up."""
    found = train_seeds(short(), POINT, num_seeds=2, seed=3, out=tmp_path / "all", **OPTIONS)
    alone = [train(short(), POINT, seed=3 + k, out=tmp_path / f"alone{k}", **OPTIONS) for k in range(2)]
    assert [r.run.name for r in found] == ["seed3", "seed4"]
    for a, b in zip(found, alone, strict=True):
        assert a.done["num_env_steps"] == 20 and a.done["evaluation"]["mean"] == pytest.approx(b.done["evaluation"]["mean"], rel=1e-4)
        assert a.done["best_eval_return"] == pytest.approx(b.done["best_eval_return"], rel=1e-4)
        np.testing.assert_allclose(weights(a.run), weights(b.run), rtol=1e-4, atol=1e-5)
        config = [json.loads((r.run / "config.json").read_text()) for r in (a, b)]
        assert {**config[0], "commit": None} == {**config[1], "commit": None}
        assert len((a.run / "metrics.jsonl").read_text().splitlines()) == 4
    stop = {"callbacks": [lambda info: not (info.run.name == "seed4" and info.iteration == 2)]}
    parts = train_seeds(short(), POINT, num_seeds=2, seed=3, out=tmp_path / "parts", **OPTIONS, **stop)
    assert [r.done["ended"] for r in parts] == ["budget", "callback"] and [r.done["num_env_steps"] for r in parts] == [20, 10]
    resumed = train_seeds(short(), POINT, num_seeds=2, seed=3, out=tmp_path / "parts", resume=True, **OPTIONS)
    for a, b in zip(resumed, alone, strict=True):
        np.testing.assert_allclose(weights(a.run), weights(b.run), rtol=1e-4, atol=1e-5)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-env-steps", "4", "--num-steps", "2", "--eval-episodes", "1", "--no-progress", "--policy.hidden", "8", "--critic.hidden", "8"]
    out = str(tmp_path / "all")
    assert cli.run(["train", "td3-bc", "--env", POINT, "--dataset", DATASET, "--num-seeds", "2", "--out", out, *flags]) == 0
    assert [line.partition(":")[0].rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == ["seed0", "seed1"]
    assert cli.run(["eval", f"{out}/seed0", f"{out}/seed1", "--episodes", "2"]) == 0
    assert cli.run(["train", "ppo", "--env", "CartPole-v1", "--num-seeds", "2", "--out", str(tmp_path / "no")]) == 2
    assert "learn from a dataset" in capsys.readouterr().err


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_seeds must be >= 1, got 0"):
        train_seeds(short(), POINT, num_seeds=0, dataset=DATASET)
    with pytest.raises(ValueError, match="serve the actor-critic update on a dataset, not ReturnConditioned"):
        small = override(configure("decision-transformer", POINT), {"num_env_steps": 2})
        train_seeds(small, POINT, num_seeds=2, out=tmp_path / "a", **OPTIONS)
    with pytest.raises(ValueError, match="a tracker follows one run"):
        train_seeds(short(), POINT, num_seeds=2, out=tmp_path / "a", track="wandb", **OPTIONS)
    assert not (tmp_path / "a").exists()
    assert cli.run(["train", "td3-bc", "--env", POINT, "--dataset", DATASET, "--num-seeds", "0", "--out", str(tmp_path / "no")]) == 2
