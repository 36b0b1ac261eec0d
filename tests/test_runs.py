"""Run folders: kill and resume, callbacks, full disk, what a folder refuses."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from markovia.agents.checkpoint import load_tensors
from markovia.algos.presets import configure, override
from markovia.loaded import load_run
from markovia.pictures import curve
from markovia.rundir import Metrics, RunError, checkpoints, held
from markovia.runs import train
from markovia.settings import differences, from_json, to_json

ROOT = Path(__file__).resolve().parent.parent
CONTROL = "Pendulum-v1"
CLOCK = {"seconds", "steps_per_second"}
SMALL = {
    CONTROL: {"num_env_steps": 1000, "num_envs": 1, "num_steps": 50, "solver": {"epochs": 2}},  # five episodes of full length
    "markovia/TokenTree-v0": {"num_env_steps": 640, "num_envs": 16, "num_steps": 4},
    "markovia/Arithmetic-v0": {"num_env_steps": 80, "num_envs": 8, "solver": {"epochs": 1, "minibatch": 8}},
    "markovia/Digits-v0": {"num_env_steps": 80, "num_envs": 8, "solver": {"epochs": 1}},
}
QUIET = {"num_checkpoints": 5, "eval_episodes": 0, "progress": False}

CHILD = """
import json, sys, time
from markovia.algos.presets import configure, override
from markovia.runs import train
env, changes, out, options = json.loads(sys.argv[1])
train(override(configure("ppo", env), changes), env, out=out, callbacks=[lambda info: time.sleep(0.1)], **options)
"""


def small(env):
    return override(configure("ppo", env), SMALL[env])


def outcome(run):
    """Everything that must be equal: the newest checkpoint's tensors, and the statistics without the clock's."""
    tensors, meta = load_tensors(checkpoints(run)[-1] / "driver.safetensors")
    return tensors, meta, [{k: v for k, v in row.items() if k not in CLOCK} for row in Metrics(run).read()]


def assert_same(a, b):
    (tensors, meta, rows), (tensors2, meta2, rows2) = outcome(a), outcome(b)
    assert rows == rows2
    assert meta == meta2
    assert tensors.keys() == tensors2.keys()
    assert [k for k in tensors if not torch.equal(tensors[k], tensors2[k])] == []


@pytest.mark.parametrize("env", SMALL)
def test_killed_and_resumed_equals_uninterrupted(env, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    method = small(env)
    train(method, env, out=whole, **QUIET)
    argument = json.dumps([env, SMALL[env], str(killed), QUIET])
    child = subprocess.Popen([sys.executable, "-c", CHILD, argument], cwd=ROOT, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 180
    # Between two checkpoints: lines past the last one must be cut off again.
    while len(Metrics(killed).read()) < 5 and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (killed / "done.json").exists()
    assert len(Metrics(killed).read()) >= 5
    assert checkpoints(killed)
    train(method, env, out=killed, resume=True, **QUIET)
    assert_same(whole, killed)


def test_seconds_count_what_the_run_took_before_it_was_resumed(tmp_path):
    env, run = CONTROL, tmp_path / "run"
    train(small(env), env, out=run, callbacks=[lambda info: info.iteration < 4], **QUIET)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) | {"seconds": 1000.0 + k} for k, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(small(env), env, out=run, resume=True, **QUIET).done
    seconds = [row["seconds"] for row in Metrics(run).read()]
    assert seconds[:4] == [1000.0, 1001.0, 1002.0, 1003.0] and seconds == sorted(seconds) and done["seconds"] >= seconds[-1] > 1003.0
    assert len(seconds) > 4


def test_killed_before_the_first_checkpoint(tmp_path):
    env = CONTROL
    train(small(env), env, out=tmp_path / "whole", **QUIET)
    run = tmp_path / "killed"
    train(small(env), env, out=run, **QUIET)
    for path in checkpoints(run):  # what a kill in the first part leaves: configuration, some lines, a half-written checkpoint
        path.rename(path.with_name(f".tmp-{path.name}"))
    (run / "done.json").unlink()
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"iteration": 99, "ret')
    train(small(env), env, out=run, resume=True, **QUIET)
    assert_same(tmp_path / "whole", run)
    assert not list((run / "checkpoints").glob(".tmp-*"))


def test_a_damaged_line_of_the_metrics_is_refused_unless_it_is_the_last(tmp_path):
    env, run = CONTROL, tmp_path / "run"
    train(small(env), env, out=run, **QUIET)
    path = run / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    for bad in (b'{"iteration": 3, "ret\n', b'["iteration"]\n'):
        path.write_bytes(b"".join([*whole[:2], bad, *whole[3:]]))
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        for use in (lambda: train(small(env), env, out=run, resume=True, **QUIET), lambda: curve(run, "return")):
            with pytest.raises(RunError, match=r"metrics.jsonl, line 3 of 20 is damaged.*restore the file, or take that line out"):
                use()
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    path.write_bytes(b"".join(whole[:2] + whole[3:]))  # the mend that the message tells
    assert train(small(env), env, out=run, resume=True, **QUIET).done["ended"] == "budget"
    assert path.read_bytes() == b"".join(whole[:2] + whole[3:])


@pytest.mark.parametrize("answer", [False, np.False_, torch.tensor(False), np.array(False)])
def test_a_callback_that_answers_false_ends_the_run(answer, tmp_path):
    """Whatever library its comparison comes from; 0 and an empty list are no answers."""
    result = train(small(CONTROL), CONTROL, out=tmp_path / "run", callbacks=[lambda info: 0, lambda info: [], lambda info: answer], **QUIET)
    assert result.done["ended"] == "callback" and result.done["iteration"] == 1


def test_one_callback_needs_no_list(tmp_path):
    result = train(small(CONTROL), CONTROL, out=tmp_path / "run", callbacks=lambda info: info.iteration < 2, **QUIET)
    assert result.done["ended"] == "callback" and result.done["iteration"] == 2


def test_callback_stops_the_run(tmp_path):
    seen = []

    def stop(info):
        seen.append((info.iteration, info.num_env_steps))
        return info.iteration < 2

    result = train(small(CONTROL), CONTROL, out=tmp_path / "run", callbacks=[stop], **QUIET)
    assert [iteration for iteration, _ in seen] == [1, 2]
    assert 0 < seen[0][1] < seen[1][1] <= 128
    assert result.done["ended"] == "callback"
    assert int(checkpoints(result.run)[-1].name) == 2


def test_folder_holds_what_it_promises(tmp_path):
    result = train(small(CONTROL), CONTROL, out=tmp_path / "run", **{**QUIET, "eval_episodes": 3})
    config = json.loads((result.run / "config.json").read_text())
    assert config["seed"] == 0 and config["device"] == "cpu" and config["versions"]["torch"]
    assert list(result.run.glob("events.out.tfevents.*"))
    assert len(checkpoints(result.run)) == 2
    assert len(json.loads((result.run / "done.json").read_text())["evaluation"]["returns"]) == 3
    again = load_run(result.run)
    assert all(torch.equal(v, again.agent.state()[k]) for k, v in result.agent.state().items())


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    write, calls = Path.write_bytes, []

    def full(path, data):
        calls.extend([path] * ("checkpoints" in path.parts))
        if len(calls) > 5:  # some files into a later checkpoint
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    run, env = tmp_path / "run", CONTROL
    with pytest.raises(RunError, match=r"No space left.*intact.*--resume"):
        train(small(env), env, out=run, **QUIET)
    assert len(checkpoints(run)) == 1
    assert not [p for p in run.rglob("*") if "tmp" in p.name]
    monkeypatch.undo()
    train(small(env), env, out=run, resume=True, **QUIET)
    train(small(env), env, out=tmp_path / "whole", **QUIET)
    assert_same(run, tmp_path / "whole")


def test_a_folder_is_not_overwritten(tmp_path):
    env = CONTROL
    train(small(env), env, out=tmp_path / "run", **QUIET)
    with pytest.raises(RunError, match="already holds a run"):
        train(small(env), env, out=tmp_path / "run", **QUIET)
    with pytest.raises(RunError, match=r"other settings.*seed: 0 -> 1"):
        train(small(env), env, out=tmp_path / "run", seed=1, resume=True, **QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match="not the folder of a markovia run"):
        train(small(env), env, out=tmp_path / "other", resume=True, **QUIET)


@pytest.mark.skipif(os.name == "nt", reason="there are no locks of folders")
def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    env, run = CONTROL, tmp_path / "run"
    refused = []

    def second(info):
        if info.iteration == 9:  # past the first checkpoint, so that there is something to sweep and to cut
            before = sorted(run.rglob("*"))
            with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="another run is writing"):
                patch.setattr("markovia.asked.Asked.build", lambda asked: pytest.fail("it was built"))
                train(small(env), env, out=run, resume=True, **QUIET)
            refused.append(before == sorted(run.rglob("*")))

    train(small(env), env, out=run, callbacks=[second], **QUIET)
    assert refused == [True]
    train(small(env), env, out=tmp_path / "alone", **QUIET)
    assert_same(run, tmp_path / "alone")
    train(small(env), env, out=run, resume=True, **QUIET)  # it has been let go


def test_a_folder_that_another_run_took_while_this_one_was_built_is_refused(tmp_path, monkeypatch):
    """The first look comes minutes before the folder is held: another run may begin and end between the two."""
    from markovia.asked import Asked

    env, run, build = CONTROL, tmp_path / "run", Asked.build

    def slow(asked):
        monkeypatch.undo()
        train(small(env), env, out=run, seed=1, **QUIET)
        return build(asked)

    for resume, message in ((False, "already holds a run"), (True, "other settings.*seed: 1 -> 0")):
        monkeypatch.setattr(Asked, "build", slow)
        with pytest.raises(RunError, match=message):
            train(small(env), env, out=run, resume=resume, **QUIET)
        assert json.loads((run / "config.json").read_text())["seed"] == 1 and len(Metrics(run).read()) == 20
        shutil.rmtree(run)


@pytest.mark.skipif(os.name == "nt", reason="there are no locks of folders")
def test_a_process_forked_by_a_run_does_not_keep_its_folder(tmp_path):
    child = None
    try:
        with held(tmp_path):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        with held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_edited_or_foreign_configuration_is_refused(tmp_path):
    env, run = CONTROL, tmp_path / "run"
    train(small(env), env, out=run, method_id="ppo", **QUIET)
    config = json.loads((run / "config.json").read_text())
    changes = [
        ({"method": "a2c"}, "method: ppo -> a2c"),
        ({"env": "Acrobot-v1"}, "env: Pendulum-v1 -> Acrobot-v1"),
        ({"settings": {**config["settings"], "num_steps": 64}}, "settings.num_steps: 50 -> 64"),
        ({"agent_options": {"hidden": [8]}}, "agent_options.hidden"),
    ]
    for change, told in changes:
        (run / "config.json").write_text(json.dumps(config | change))
        for use in (lambda: train(small(env), env, out=run, method_id="ppo", resume=True, **QUIET), lambda: load_run(run)):
            with pytest.raises(RunError, match=rf"edited or belongs to another run.*{told}.*checkpoints.*in its place"):
                use()
    (run / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json is damaged.*restore it"):
        load_run(run)
    shutil.copy(checkpoints(run)[-1] / "config.json", run)  # the mend that the message tells
    assert train(small(env), env, out=run, method_id="ppo", resume=True, **QUIET).done["ended"] == "budget"


def test_python_objects_in_the_arguments_are_told_without_their_address():
    assert to_json({"task": small, "net": torch.nn.Identity()}) == {"task": {"python": "<function small>"}, "net": {"python": "Identity()"}}


@pytest.mark.slow
def test_lora_on_a_real_language_model_resumes_exactly(tmp_path):
    env = "markovia/Sentiment-v0"
    changes = {"num_env_steps": 8, "num_envs": 4, "solver": {"micro": None}}
    method = override(configure("rloo", env), changes)
    options = {**QUIET, "num_checkpoints": 2, "method_id": "rloo", "env_kwargs": {"max_new_tokens": 6}}
    whole = train(method, env, out=tmp_path / "whole", **options)
    train(method, env, out=tmp_path / "cut", callbacks=[lambda info: False], **options)
    assert int(checkpoints(tmp_path / "cut")[-1].name) == 1
    resumed = train(method, env, out=tmp_path / "cut", resume=True, **options)
    assert whole.done["iteration"] == resumed.done["iteration"] == 2
    assert_same(tmp_path / "whole", tmp_path / "cut")
    tensors = load_tensors(checkpoints(tmp_path / "cut")[-1] / "driver.safetensors")[0]
    lora_b = [v for k, v in tensors.items() if k.startswith("agent.") and "lora_B" in k]
    assert lora_b and all(v.abs().max() > 0 for v in lora_b)  # adapters start at zero


def test_corrupted_checkpoint_is_refused(tmp_path):
    env = CONTROL
    train(small(env), env, out=tmp_path / "run", **QUIET)
    file = checkpoints(tmp_path / "run")[-1] / "driver.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    older, newest = checkpoints(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"damaged.*; {older} is whole: remove {newest} to go on from it"):
        train(small(env), env, out=tmp_path / "run", resume=True, **QUIET)
    shutil.copytree(tmp_path / "run", tmp_path / "both")
    load_run(tmp_path / "run")  # only the driver's part is damaged
    (newest / "agent" / "agent.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"damaged.*; {older} is whole: remove {newest} to go on from it"):
        load_run(tmp_path / "run")
    (checkpoints(tmp_path / "both")[0] / "driver.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged(?!.*is whole)"):
        train(small(env), env, out=tmp_path / "both", resume=True, **QUIET)
    shutil.rmtree(newest)  # the mend that the message tells
    train(small(env), env, out=tmp_path / "run", resume=True, **QUIET)
    train(small(env), env, out=tmp_path / "whole", **QUIET)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_wrong_names():
    with pytest.raises(ValueError, match="did you mean 'ppo'"):
        train("ppoo", "CartPole-v1")
    with pytest.raises(ValueError, match="did you mean 'CartPole-v1'"):
        train("ppo", "CartPol-v1")
    with pytest.raises(ValueError, match="ddpo serves"):
        train("ddpo", "CartPole-v1")


def test_missing_tracker(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        train(small(CONTROL), CONTROL, out=tmp_path / "run", track="wandb", **QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["wandb", "trackio"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_tracker_gets_the_configuration_and_every_iteration(package, fails, tmp_path, monkeypatch):
    calls, run = [], tmp_path / "mine"
    stub = types.ModuleType(package)  # what both packages offer
    stub.init = lambda *, project, name, config: calls.append((project, name, config))
    stub.log = calls.append
    stub.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, package, stub)

    def look(info):
        if fails and info.iteration == 2:
            raise KeyError("of the user's own")

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        train(small(CONTROL), CONTROL, out=run, track=package, callbacks=[look], **QUIET)
    (project, name, config), *logs, last = calls
    assert (project, name) == ("markovia", "mine") and config == json.loads((run / "config.json").read_text())
    rows = Metrics(run).read()
    assert len(logs) == len(rows) == (1 if fails else 20) and last == "finished"
    for log, row in zip(logs, rows, strict=True):
        assert log == {k: v for k, v in row.items() if v is not None}


def test_numbers_that_are_not_finite_are_refused_where_they_mean_nothing():
    from markovia.algos.systems import rows
    from markovia.config_check import check_finite

    for row in rows().values():
        check_finite(to_json(row.value))
    for change, told in (
        ({"solver": {"lr": float("inf")}}, "solver.lr is inf"),
        ({"entropy_coef": float("nan")}, "entropy_coef is nan"),
        ({"solver": {"max_grad_norm": float("nan")}}, "solver.max_grad_norm is nan"),
    ):
        with pytest.raises(ValueError, match=f"{told}; give a finite number"):
            check_finite(to_json(override(small(CONTROL), change)))
    check_finite(to_json(override(small(CONTROL), {"solver": {"max_grad_norm": float("inf")}})))  # no clipping


def test_a_value_of_another_type_is_told_with_its_field():
    method = small(CONTROL)
    for change, told in (
        ({"num_envs": "8"}, "OnPolicy.num_envs must be int, got '8' of type str"),
        ({"num_envs": 8.5}, "OnPolicy.num_envs must be int, got 8.5 of type float"),
        ({"num_envs": True}, "OnPolicy.num_envs must be int, got True of type bool"),
        ({"entropy_coef": None}, "OnPolicy.entropy_coef must be float, got None of type NoneType"),
        ({"solver": {"lr": "fast"}}, "Descent.lr must be float, got 'fast' of type str"),
    ):
        with pytest.raises(ValueError, match=told):
            override(method, change)
    taken = override(method, {"num_envs": np.int64(8), "num_env_steps": 1e6, "entropy_coef": 1, "solver": {"lr": np.float32(0.5)}})
    assert type(taken.num_envs) is type(taken.num_env_steps) is int and type(taken.solver.lr) is float
    assert taken.num_envs == 8 and taken.entropy_coef == 1


def test_a_seed_of_numpy_is_a_seed(tmp_path):
    result = train(small(CONTROL), CONTROL, out=tmp_path / "run", seed=np.int64(3), callbacks=lambda info: False, **QUIET)
    assert json.loads((result.run / "config.json").read_text())["seed"] == 3


def test_settings_round_trip_through_json():
    from markovia.algos.systems import rows

    for row in rows().values():
        data = json.loads(json.dumps(to_json(row.value)))
        assert from_json(type(row.value), data) == row.value
    with pytest.raises(ValueError, match="Python object"):
        from_json(float, to_json(lambda: 0))


def test_infinite_floats_survive_whatever_the_hint():
    kwargs = {"healthy_z_range": [0.7, float("inf")], "low": -float("inf"), "inner": {"name": "inf", "rows": [{"x": float("inf")}]}}
    data = json.loads(json.dumps(to_json(kwargs), allow_nan=False))
    assert from_json(dict[str, Any], data) == kwargs
    assert from_json(float, to_json(float("-inf"))) == from_json(float, "-inf") == -float("inf")  # "-inf": as runs wrote it at first
    assert str(from_json(float | None, to_json(float("nan")))) == "nan"
    old = {"healthy_z_range": [0.7, "inf"], "low": "-inf", "inner": {"name": "inf", "rows": [{"x": "inf"}]}}
    assert differences(old, data) == []  # so that such a run can be resumed
    assert differences({"a": 1.0}, to_json({"a": float("inf")})) == ["a: 1.0 -> {'float': 'inf'}"]
