"""Kills while training and while writing (benchmarks/kill.py has 50 of each), full disks, folders that refuse, clocks that go back."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.algos.presets import configure, override
from markovia.loaded import load_run
from markovia.rundir import Metrics, RunError, checkpoints, save_checkpoint, sweep
from markovia.runs import train

torch.set_num_threads(1)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TREE = "markovia/TokenTree-v0"
SMALL = override(configure("ppo", TREE), {"num_env_steps": 64, "num_envs": 8, "num_steps": 2})
OPTIONS: dict[str, Any] = {"num_checkpoints": 4, "eval_episodes": 0, "progress": False, "method_id": "ppo", "env_kwargs": {"V": 3, "H": 2}}


def run(out: Path, **more: Any) -> Any:
    """Four iterations with a checkpoint after each."""
    return train(SMALL, TREE, out=out, **{**OPTIONS, **more})


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script benchmarks/kill.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("kill")
    sys.modules.pop("kill", None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_killed_runs_lose_what_was_not_saved_and_go_on_to_the_same_bits(kill: Any, tmp_path: Path) -> None:
    case = kill.Case("ppo", TREE, {"num_env_steps": 1600, "num_envs": 8, "num_steps": 2}, 50, {"env_kwargs": {"V": 3, "H": 2}})
    found = kill.trial(case, 4, tmp_path, seed=0, spread=0.3)
    assert found.kills == 4 and kill.holds(found) and found.iterations_between_checkpoints == 2


def test_the_script_counts_what_is_lost_and_what_differs(kill: Any, tmp_path: Path) -> None:
    run(tmp_path / "a"), run(tmp_path / "b"), run(tmp_path / "c", seed=1)
    assert kill.equal(tmp_path / "a", tmp_path / "b") and not kill.equal(tmp_path / "a", tmp_path / "c")
    last = checkpoints(tmp_path / "a")[-1]
    last.rename(last.with_name(f".tmp-{last.name}"))
    found = kill.Found()
    kill.look(tmp_path / "a", found)
    assert (found.kills, found.while_writing, found.most_lost_iterations) == (1, 1, 1)
    assert not kill.holds(found) and kill.holds(kill.Found(most_lost_iterations=2, iterations_between_checkpoints=2))
    with pytest.raises(RuntimeError, match="could not be resumed"):
        kill.finished(kill.start(lambda: run(tmp_path / "b")))  # there is a run already, and it was not asked to go on


def test_the_page_shows_the_results(kill: Any) -> None:
    results = json.loads((BENCHMARKS / "results" / "kill.json").read_text())
    assert kill.table(results) in (BENCHMARKS.parent / "docs" / "trust.md").read_text()
    assert results.keys() == kill.CASES.keys() and all(found["kills"] >= 50 and found["holds"] for found in results.values())


@pytest.mark.parametrize("which", ["old", "same"])
def test_a_kill_while_a_checkpoint_is_removed_leaves_no_part_of_it(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """shutil.rmtree is stopped after its first file: of the checkpoint before the last two, or of one that is written again."""
    from markovia import rundir

    class Killed(BaseException):
        """What a signal would do here."""

    class Driver:
        iteration = 1

        def state(self) -> Any:
            return {"x": torch.ones(1)}, {}

    class Agent:
        def save(self, folder: Path) -> None:
            folder.mkdir()

    def stopped(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
            raise Killed

    for iteration in (1, 2):
        Driver.iteration = iteration
        save_checkpoint(tmp_path, Agent(), Driver(), {})
    monkeypatch.setattr(rundir.shutil, "rmtree", stopped)
    Driver.iteration = 3 if which == "old" else 2
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, Agent(), Driver(), {})
    monkeypatch.undo()
    assert all((p / "driver.safetensors").is_file() and (p / "config.json").is_file() for p in checkpoints(tmp_path))
    assert int(checkpoints(tmp_path)[-1].name) == (3 if which == "old" else 1)
    sweep(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".tmp-")]


def refusing(number: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the call `after` on, nothing can be opened for writing any more."""
    opened, calls = os.open, []
    import builtins
    import io

    def refuse() -> None:
        calls.append(0)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))

    def low(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            refuse()
        return opened(path, flags, *rest, **more)

    real = io.open

    def high(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wax+") and not isinstance(file, int) and "/run/" in str(file):
            refuse()
        return real(file, mode, *rest, **more)

    monkeypatch.setattr(os, "open", low)
    monkeypatch.setattr(io, "open", high)
    monkeypatch.setattr(builtins, "open", high)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the thread that writes events
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=["full", "read-only", "not allowed"])
@pytest.mark.parametrize("after", [0, 1, 3, 6, 11])
def test_a_disk_that_refuses_from_some_write_on_costs_nothing(number: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    refusing(number, after, monkeypatch)
    with pytest.raises(RunError, match=rf"could not|can't be written.*{os.strerror(number)}"):
        run(tmp_path / "run")
    monkeypatch.undo()
    rows = len(Metrics(tmp_path / "run").read())
    newest = int(checkpoints(tmp_path / "run")[-1].name) if checkpoints(tmp_path / "run") else 0
    assert rows - newest <= 1
    run(tmp_path / "run", resume=True)
    states = [load_run(tmp_path / name).agent.state() for name in ("whole", "run")]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_folders_that_are_none_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"is a file.*--out"):
        run(tmp_path / "file")
    with pytest.raises(RunError, match=r"could not make the run folder.*--out"):
        run(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"
    run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"could not write .*metrics.jsonl"):
        run(tmp_path / "run", resume=True)


@pytest.mark.parametrize("change", [lambda t, m: ({}, m), lambda t, m: (t, {}), lambda t, m: ({k: v[:0] for k, v in t.items() if v.ndim}, m)])
def test_a_whole_checkpoint_of_something_else_is_told(change: Any, tmp_path: Path) -> None:
    run(tmp_path / "run")
    file = checkpoints(tmp_path / "run")[-1] / "driver.safetensors"
    save_tensors(file, *change(*load_tensors(file)))
    with pytest.raises(ValueError, match=r"not of this run|does not fit|differ"):
        run(tmp_path / "run", resume=True)


def test_links_out_of_a_run_are_not_followed(tmp_path: Path) -> None:
    run(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("mine")
    (tmp_path / "run" / "checkpoints" / "000099").symlink_to(outside)
    (tmp_path / "run" / ".tmp-link").symlink_to(outside)
    (tmp_path / "run" / "checkpoints" / ".tmp-other").symlink_to(outside / "keep")
    assert int(checkpoints(tmp_path / "run")[-1].name) == 4
    run(tmp_path / "run", resume=True)
    assert (outside / "keep").read_text() == "mine" and not (tmp_path / "run" / ".tmp-link").is_symlink()


def test_a_clock_that_goes_backwards_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    now, steps = time.time(), iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now - 3600.0 * next(steps))
    back = run(tmp_path / "run", max_seconds=600.0)
    assert back.done["ended"] == "budget" and 0.0 <= back.done["seconds"] < 600.0
    rows = [Metrics(tmp_path / name).read() for name in ("whole", "run")]
    clock = {"seconds", "steps_per_second"}
    assert [{k: v for k, v in r.items() if k not in clock} for r in rows[0]] == [{k: v for k, v in r.items() if k not in clock} for r in rows[1]]
    seconds = [r["seconds"] for r in rows[1]]
    assert seconds == sorted(seconds) and all(r["steps_per_second"] > 0 for r in rows[1])
    assert all(torch.equal(v, back.agent.state()[k]) for k, v in whole.agent.state().items())
