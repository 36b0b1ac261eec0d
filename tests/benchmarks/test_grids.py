"""What grids of runs are made of: which cells run, how results land, what the tables say. Nothing is trained here."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of benchmarks/ by name, as Python finds it when it runs one."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("grid", "offline", "safe"):
        sys.modules.pop(name, None)


def done(score: float, steps: int = 100_000) -> dict[str, Any]:
    return {"num_env_steps": steps, "evaluation": {"mean": score, "returns": [score]}, "best_eval_return": score + 5.0}


def a_cell(dataset: str, method: str, seed: int, last: float) -> dict[str, Any]:
    return {
        "dataset": dataset, "method": method, "seed": seed, "task": "Hopper-v5", "seconds": 60.0, "done": done(last), "data_score": 30.0,
        "last": last, "best": last + 5.0, "scores": [last],
    }  # fmt: skip


def fake(task: str, method: str, seed: int, out: Path) -> dict[str, Any]:
    """A cell that trains nothing; runs in another process."""
    with (out / "calls").open("a") as f:
        f.write(f"{method}{seed}\n")
    return {"task": task, "method": method, "seed": seed}


def test_results_land_one_by_one_and_are_not_run_again(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = module("grid")
    out = tmp_path / "results" / "x.json"
    seen: list[tuple[str, int]] = []
    options = {
        "jobs": 1, "out": out, "told": lambda found: found["method"], "table": lambda rows: "".join(r["method"] for r in rows),
        "picture": lambda rows, path: seen.append((path.name, len(rows))),
    }  # fmt: skip
    grid.record({"task": "t", "method": "a", "seed": 0, "old": True}, out)
    grid.measure(fake, [("t", m, s, tmp_path) for m in "ab" for s in (0, 1)], **options)
    assert (tmp_path / "calls").read_text().split() == ["a1", "b0", "b1"] and seen == [("x.png", n) for n in (2, 3, 4, 4)]
    assert [(r["method"], r["seed"]) for r in grid.cells(out)] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] and grid.cells(out)[0]["old"]
    assert out.with_suffix(".md").read_text() == "aabb"
    grid.measure(fake, [("t", "a", 0, tmp_path)], **options)
    assert (tmp_path / "calls").read_text().count("a0") == 0 and capsys.readouterr().out.split() == ["a", "b", "b"]
    grid.record({"task": "t", "method": "a", "seed": 0}, out)
    assert "old" not in grid.cells(out)[0] and len(grid.cells(out)) == 4


def fails_for_b(task: str, method: str, seed: int, out: Path) -> dict[str, Any]:
    if method == "b":
        raise FloatingPointError("a gradient is nan")
    return fake(task, method, seed, out) | {"done": done(1.0, 100)}


def test_a_cell_that_fails_is_told_and_the_others_are_recorded(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out = module("grid"), tmp_path / "x.json"
    options = {"jobs": 1, "out": out, "told": lambda found: found["method"], "table": lambda rows: ""}
    with pytest.raises(SystemExit, match="1 of 3 cells failed:\nt b 0: FloatingPointError: a gradient is nan"):
        grid.measure(fails_for_b, [("t", m, 0, tmp_path) for m in "bac"], **options)
    assert [r["method"] for r in grid.cells(out)] == ["a", "c"] and "the others go on" in capsys.readouterr().out
    # What was recorded after fewer steps than are asked for now is not passed off as the same cell.
    grid.measure(fails_for_b, [("t", "a", 0, tmp_path)], asked=lambda *entry: {"num_env_steps": 100}, **options)
    with pytest.raises(SystemExit, match=r"holds t a 0 after 100 steps, and 1,000 are asked for: use other --out and --runs"):
        grid.measure(fails_for_b, [("t", "a", 0, tmp_path)], asked=lambda *entry: {"num_env_steps": 1000}, **options)
    assert (tmp_path / "calls").read_text().split() == ["a0", "c0"]


def test_cells_of_other_settings_are_not_passed_off_as_the_same(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out = module("grid"), tmp_path / "x.json"
    was = {"num_env_steps": 100, "gone": 1, "actor": {"type": "Cloned", "weight": 2.5, "hidden": [256, 256]}, "value": None}
    grid.record({"task": "t", "method": "a", "seed": 0, "settings": was, "done": done(1.0, 100)}, out)

    def ask(changes: dict[str, Any]) -> None:
        options = {"jobs": 1, "out": out, "told": str, "table": lambda rows: ""}
        grid.measure(fake, [("t", "a", 0, tmp_path)], asked=lambda *entry: was | changes, **options)

    ask({"num_env_steps": 50, "new": 3})  # longer than asked for, and with an option that was not there yet
    with pytest.raises(SystemExit, match=r"holds t a 0 with actor.weight 2.5 where 1.0 is asked for; value None where 1 is asked"):
        ask({"actor": {"type": "Cloned", "weight": 1.0, "hidden": [256, 256]}, "value": 1})
    assert capsys.readouterr().out == ""
    grid.record({"task": "t", "method": "a", "seed": 0, "done": done(1.0, 100)}, out)
    ask({})
    assert "does not tell the settings of t a 0; they are taken to be those asked for" in capsys.readouterr().out
    assert not (tmp_path / "calls").exists()


def dies_for_b(task: str, method: str, seed: int, out: Path) -> dict[str, Any]:
    if method == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return fake(task, method, seed, out)


def test_a_cell_whose_process_is_killed_takes_no_other_with_it(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out = module("grid"), tmp_path / "x.json"
    options = {"jobs": 1, "out": out, "told": lambda found: found["method"], "table": lambda rows: ""}
    with pytest.raises(SystemExit, match="1 of 4 cells failed:\nt b 0: its process was killed"):
        grid.measure(dies_for_b, [("t", m, 0, tmp_path) for m in "abcd"], **options)
    assert [r["method"] for r in grid.cells(out)] == ["a", "c", "d"] and (tmp_path / "calls").read_text().split() == ["a0", "c0", "d0"]


LASTING = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import grid

def lasting(task, method, seed, out):
    (out / f"worker{os.getpid()}").touch()
    while True:
        time.sleep(0.1)

if __name__ == "__main__":
    out = Path(sys.argv[2])
    grid.measure(lasting, [("t", "a", 0, out), ("t", "b", 0, out)], jobs=1, out=out / "x.json", told=str, table=str)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_grid_leaves_no_worker_behind(tmp_path: Path) -> None:
    script = tmp_path / "lasting.py"
    script.write_text(LASTING)
    running = subprocess.Popen([sys.executable, str(script), str(FOLDER), str(tmp_path)])

    def until(what: Callable[[], bool]) -> None:
        end = time.monotonic() + 60.0
        while not what():
            assert time.monotonic() < end
            time.sleep(0.05)

    try:
        until(lambda: bool(list(tmp_path.glob("worker*"))))
    finally:
        running.kill()
        running.wait()
    (worker,) = (int(p.name.removeprefix("worker")) for p in tmp_path.glob("worker*"))
    until(lambda: not Path(f"/proc/{worker}").exists() or "(zombie)" in Path(f"/proc/{worker}/status").read_text())


def test_over_seeds_by_hand(module: Any) -> None:
    found = module("grid").over_seeds([1.0, 2.0, 3.0, 100.0])
    assert found["mean"] == 26.5 and found["iqm"] == 2.5 and found["low"] <= found["mean"] <= found["high"]


def test_offline_plan_starts_with_what_matters_most(module: Any) -> None:
    offline = module("offline")
    replay, medium, other = sets = ("ns/hopper/medium-replay-v0", "ns/hopper/medium-v0", "ns/halfcheetah/medium-replay-v0")
    tasks = dict(zip(sets, ("Hopper-v5", "Hopper-v5", "HalfCheetah-v5"), strict=True))
    entries = offline.plan(tasks, [0, 1], ["bc", "iql"], ["cql"], None)
    assert entries[:4] == [(replay, m, s, "Hopper-v5", 100_000) for s in (0, 1) for m in ("bc", "iql")]
    assert [(d, s, m) for d, m, s, *_ in entries[4:12]] == [(d, s, m) for s in (0, 1) for d in (medium, other) for m in ("bc", "iql")]
    fixtures = [e for e in entries if e[0].startswith("fixture:")]
    assert entries[12:-2] == fixtures and len(fixtures) == 3 * 2 * len(offline.FIXTURES) and all(e[4] is None for e in fixtures)
    assert entries[-2:] == [(replay, "cql", s, "Hopper-v5", 100_000) for s in (0, 1)]
    assert len({e[:3] for e in entries}) == len(entries)
    assert offline.plan(tasks, [0, 1], ["bc", "iql"], [], None, {}) == entries[:12]
    assert offline.TASKS[0] == "Hopper-v5" and offline.TIERS[0] == "medium-replay" and set(offline.MAIN) == {"bc", "td3-bc", "iql", "rebrac"}


def test_settings_of_a_cell(module: Any) -> None:
    offline = module("offline")
    assert offline.settings("td3-bc", "ns/hopper/medium-v0", 100_000) == {"num_env_steps": 100_000, "num_steps": 1000}
    assert offline.settings("bc", "fixture:pointmass2d/mix", None) == {}
    assert offline.settings("spot", "ns/halfcheetah/medium-expert-v0", 1000)["actor"] == {"weight": 1.0}
    assert offline.settings("decision-transformer", "walker2d_medium-v2.hdf5", None) == {"target_return": 5000.0}
    assert offline.settings("decision-transformer", "ns/walker2d/medium-v0", None) == {}
    spot = offline.settings("spot", "ns/hopper/medium-v0", 100_000)
    assert spot["num_env_steps"] == 110_000 and spot["behaviour"] == {"steps": 10_000}
    for name in ("markovia/hopper/medium-replay-v0", "hopper_medium_replay-v2.hdf5"):
        assert offline.parts_of(name) == ("hopper", "medium-replay")
        assert offline.settings("rebrac", name, 10)["actor"] == {"weight": 0.05}
    assert offline.parts_of("markovia/pendulum/medium-v0") is None
    assert offline.settings("edac", "hopper_medium_replay-v2.hdf5", 10)["critic"] == {"num": 50}
    assert offline.settings("edac", "walker2d_medium_expert-v2.hdf5", 10)["regulariser"] == {"eta": 5.0}
    assert "critic" not in offline.settings("edac", "markovia/hopper/medium-replay-v0", 10)
    from markovia.algos.presets import configure, override

    own, few = (offline._asked("markovia/hopper/medium-v0", m, 0, "Hopper-v5", 1000, None) for m in ("rebrac", "rebrac+batch-256"))
    assert own == few | {"batch_size": 1024} and few["batch_size"] == 256 and few["actor"]["weight"] == 0.01
    for method in (*offline.MAIN, *offline.OTHERS):
        changed = override(configure(method, "Hopper-v5"), offline.settings(method, "markovia/hopper/medium-v0", 100_000))
        assert changed.num_env_steps == (110_000 if method == "spot" else 100_000)


def test_a_variant_is_a_row_of_its_own(module: Any, tmp_path: Path) -> None:
    offline = module("offline")
    dataset, task = next(iter(offline.FIXTURES.items()))
    asked = offline.plan({}, [0], [*offline.VARIANTS], [], 4)
    assert [(d, m) for d, m, *_ in asked] == [(d, "rebrac+batch-256") for d in offline.FIXTURES]
    found = offline.cell(dataset, "rebrac+batch-256", 0, task, 4, tmp_path)
    assert found["method"] == "rebrac+batch-256" and found["settings"]["batch_size"] == 256 and found["settings"]["critic"]["layer_norm"]
    assert list(offline.groups([found | {"method": "cql"}, found])) == [(dataset, "rebrac+batch-256"), (dataset, "cql")]


def test_scores_are_those_of_the_tiers(module: Any) -> None:
    offline = module("offline")
    scale = offline.scale_of("fixture:pointmass2d/medium")
    assert -41 < scale["minimum"] < -37 and -6 < scale["maximum"] < -4
    with pytest.raises(ValueError, match="nothing says which returns count as 0 and 100 for fixture:bandit2d"):
        offline.scale_of("fixture:bandit2d")


def test_results_of_another_recording_are_refused(module: Any) -> None:
    offline, here = module("offline"), "fixture:pointmass2d/medium"
    found = {"dataset": here, "data_score": offline.data_score(here)}
    offline.check_recordings([found, {"dataset": "ns/gone-v0", "data_score": 1.0}], [here, "ns/not-measured-v0"])
    with pytest.raises(SystemExit, match=r"another recording of fixture:pointmass2d/medium .mean score 50.000, here [\d.]+.: use other"):
        offline.check_recordings([found | {"data_score": 50.0}], [here])
    with pytest.raises(SystemExit, match="no dataset ns/gone-v0"):
        offline.check_recordings([{"dataset": "ns/gone-v0", "data_score": 1.0}], ["ns/gone-v0"])


def test_more_episodes_of_a_trained_policy_stand_beside_the_ten(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline, loaded = module("offline"), importlib.import_module("markovia.loaded")
    seen: list[tuple[Any, ...]] = []

    def evaluate(*asked: Any) -> dict[str, Any]:
        seen.append(asked)
        return {"returns": [30.0, 70.0, 50.0]}

    monkeypatch.setattr(loaded, "load_run", lambda run: SimpleNamespace(agent=run.parent.name, evaluate=evaluate))
    rows = [a_cell("ns/hopper/medium-v0", m, 0, 40.0) | {"scale": {"minimum": 10.0, "maximum": 110.0}} for m in ("bc", "iql")]
    folders = [offline.run_of(r["dataset"], r["method"], 0, tmp_path) for r in rows]
    for path, row in zip(folders, rows, strict=True):
        path.mkdir(parents=True)
        (path / "done.json").write_text(json.dumps(row["done"]))
    found = [offline.again(r, 3, tmp_path) for r in rows]
    assert seen == [("bc", 3, offline.AGAIN_SEED), ("iql", 3, offline.AGAIN_SEED)]
    assert found[1]["again"] == {"episodes": 3, "mean": 40.0, "error": pytest.approx(20.0 / 3**0.5)} and found[1]["last"] == 40.0
    found[1]["again"]["mean"] = 47.0
    assert "| 45.0 | 47.0 (47.0; 3) | +7.0 | 1.0 |" in next(line for line in offline.table(found).splitlines() if "| iql |" in line)
    assert "| +0.0 | 45.0 |  |  | 1.0 |" in next(line for line in offline.table([found[0], rows[1]]).splitlines() if "| iql |" in line)
    (folders[0] / "done.json").write_text(json.dumps(done(41.0)))
    with pytest.raises(ValueError, match="it is another run"):
        offline.again(rows[0], 3, tmp_path)


def test_offline_table_tells_every_seed_and_the_gain_on_cloning(module: Any) -> None:
    offline = module("offline")
    rows = [a_cell("ns/hopper/medium-v0", m, s, x) for m, x in (("td3-bc", 60.0), ("bc", 40.0)) for s, x in enumerate((x, x + 2.0))]
    rows.append(a_cell("hopper_medium-v2.hdf5", "td3-bc", 0, 50.0))
    text = offline.table(rows)
    lines = [line for line in text.splitlines() if line.startswith("| ns/")]
    assert "| bc | 100,000 | 41.0 ± 1.0 | 40.0, 42.0 |" in lines[0] and "| td3-bc | 100,000 | 61.0 ± 1.0 | 60.0, 62.0 |" in lines[1]
    assert "| +20.0 | 66.0 |  |  | 1.0 |  |" in lines[1]
    assert "| 60.4±3.5; best 70.4±1.2 |" in next(line for line in text.splitlines() if line.startswith("| hopper_medium-v2.hdf5"))
    published = json.loads((FOLDER / "published_offline.json").read_text())
    for t in published["tables"]:
        assert len(t["scores"]) >= 7 and all(list(s) == list(next(iter(t["scores"].values()))) for s in t["scores"].values())
        for method, mean in t["scores"].get("average", {}).items():
            each = [float(s[method].split("±")[0]) for name, s in t["scores"].items() if name != "average"]
            assert np.mean(each) == pytest.approx(float(mean), abs=0.1), (t["source"], method)


def test_the_safe_plan_starts_with_what_the_first_task_is_compared_on(module: Any) -> None:
    safe = module("safe")
    entries = safe.plan(safe.TASKS, safe.METHODS, [0, 1])
    first = entries[: 2 * len(safe.FIRST)]
    assert first == [(safe.TASKS[0], m, s) for s in (0, 1) for m in safe.FIRST]
    after = entries[len(first) :]
    assert [s for *_, s in after] == sorted(s for *_, s in after) and len(set(entries)) == len(safe.TASKS) * len(safe.METHODS) * 2
    assert safe.AT_LIMIT[safe.TASKS[0]] == pytest.approx(3209.6)
