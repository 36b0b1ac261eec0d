"""Runs on files of preferences: the command line, the run folder, resume, evaluation."""

import json

import pytest
import torch

from markovia.agents.checkpoint import load_tensors
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.presets import override
from markovia.algos.setup import build
from markovia.cli import run
from markovia.envs.untrusted import TRUST
from markovia.loaded import load_run
from markovia.rundir import Metrics, RunError, checkpoints
from markovia.runs import train

torch.set_num_threads(1)
CLOCK = {"seconds", "steps_per_second"}


@pytest.fixture
def prefs(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(6) for b in range(7)]
    rows.insert(3, {"prompt": "1+1=", "chosen": "", "rejected": "3"})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def small_number_first(prompts, completions, **columns):
    """A judge: the smaller the first digit, the better."""
    return [9.0 - int(c[0]) if c[:1].isdigit() else -5.0 for c in completions]


def failure(argv, capsys):
    code = run(argv)
    return code, capsys.readouterr().err


def test_train_evaluate_and_sample_from_the_command_line(prefs, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ["--model", "arithmetic", "--out", str(folder), "--num-envs", "4", "--solver.lr", "1e-3", "--loss.beta", "0.2", "--eval-episodes", "3"]
    flags += ["--data-options", '{"held_out": 4}', "--agent-options", '{"lora": {"r": 2}}']
    assert run(["train", "dpo", "--data", str(prefs), *flags]) == 0
    out = capsys.readouterr().out
    report = f"{prefs}: preference, 42 of 43 rows used\n  dropped 1: empty response (line 4)\n"
    assert report in out and (folder / "data.txt").read_text() == report
    config, done = (json.loads((folder / name).read_text()) for name in ("config.json", "done.json"))
    assert config["data"]["path"] == str(prefs) and len(config["data"]["sha256"]) == 64 and config["settings"]["loss"]["beta"] == 0.2
    assert config["env"] is None and config["agent_options"]["model"] == "arithmetic"
    assert done["num_env_steps"] == 38 and done["iteration"] == 10 and done["ended"] == "budget"  # 42 less 4 held out, the last batch has 2
    assert len(done["evaluation"]["returns"]) == 4 and done["evaluation"]["held_out"] is True and len(done["evaluation"]["completions"]) == 3
    assert {"ranking_accuracy", "ranking_accuracy_before", "log_ratio_chosen", "entropy", "top10_mass", "kl_ref"} <= done["evaluation"].keys()
    rows = Metrics(folder).read()
    assert {"loss", "logp_chosen", "log_ratio_chosen", "margin", "accuracy", "ranking_accuracy", "kl_ref", "length_chosen"} <= rows[0].keys()
    assert {"entropy", "top10_mass"} <= rows[0].keys()
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[-1]["num_env_steps"] == 38
    assert run(["eval", str(folder), "--episodes", "3"]) == 0 and "4 episodes" in capsys.readouterr().out
    assert run(["video", str(folder)]) == 0 and ">>>" in (folder / "video" / "samples.txt").read_text()


def outcome(folder):
    tensors, meta = load_tensors(checkpoints(folder)[-1] / "driver.safetensors")
    return tensors, meta, [{k: v for k, v in row.items() if k not in CLOCK} for row in Metrics(folder).read()]


@pytest.mark.parametrize("row", ["dpo", "tr-dpo"])
def test_a_stopped_run_goes_on_to_the_same_numbers(prefs, tmp_path, row):
    changes = {"num_envs": 4, "num_env_steps": 32, "solver": {"lr": 1e-3}} | ({"reference": {"rate": 0.5, "every": 1}} if row == "tr-dpo" else {})
    method = override(PREFERENCE[row].value, changes)
    quiet = {"data": prefs, "model": "arithmetic", "num_checkpoints": 4, "eval_episodes": 0, "progress": False, "method_id": row}
    train(method, out=tmp_path / "whole", **quiet)
    train(method, out=tmp_path / "half", callbacks=[lambda info: info.iteration < 3], **quiet)
    train(method, out=tmp_path / "half", resume=True, **quiet)
    (a, meta, rows), (b, meta2, rows2) = outcome(tmp_path / "whole"), outcome(tmp_path / "half")
    assert rows == rows2 and meta == meta2 and a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert load_run(tmp_path / "half").config["method"] == row
    prefs.write_text(prefs.read_text().replace('"2"', '"9"'))
    with pytest.raises(RunError, match=r"other settings.*data.sha256"):
        train(method, out=tmp_path / "half", resume=True, **quiet)


@pytest.mark.parametrize(
    ("env", "judge"),
    [("markovia/Arithmetic-v0", None), (None, f"{__name__}:small_number_first"), (None, small_number_first)],
    ids=["task", "name", "function"],
)
def test_rounds_need_prompts_and_a_judge(prefs, tmp_path, env, judge, monkeypatch):
    method = override(PREFERENCE["rebel"].value, {"num_envs": 4, "num_env_steps": 8, "solver": {"lr": 1e-4}})
    file = {} if env else {"data": prefs, "model": "arithmetic", "judge": judge}
    options = {"temperature": 3.0}
    done = train(method, env, out=tmp_path / "run", eval_episodes=4, progress=False, method_id="rebel", agent_options=options, **file).done
    assert done["num_env_steps"] == 8 and len(done["evaluation"]["returns"]) == 4
    assert all("return" in row and "tied" in row for row in Metrics(tmp_path / "run").read())
    if callable(judge):
        with pytest.raises(ValueError, match="was a Python object"):
            load_run(tmp_path / "run")
        return
    if judge is not None:  # code that a run's folder names is not run unasked
        with pytest.raises(ValueError, match="not run because a file says so"):
            load_run(tmp_path / "run")
        monkeypatch.setenv(TRUST, __name__)
    assert load_run(tmp_path / "run").task is not None


@pytest.mark.parametrize("given", [{}, {"max_new_tokens": 2}], ids=["as the data", "given"])
def test_rounds_on_a_file_follow_its_options_and_its_judge_reads_its_columns(tmp_path, given):
    path, seen = tmp_path / "prompts.jsonl", []
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": a + b, "topic": "sums"}) + "\n" for a in range(8) for b in range(5)))

    def judge(prompts, completions, answer, **columns):
        seen.append((prompts, completions, answer, columns))
        return [float(c == str(a)) for c, a in zip(completions, answer, strict=True)]

    def built(method, **options):
        agent = {"model": "arithmetic", "temperature": 9.0} | given
        return build(None, method, 0, agent_options=agent, data={"path": str(path), "judge": judge, "options": options})

    method = PREFERENCE["brain"].value
    assert len(built(method, held_out=2).task.held_out) == 2 and len(built(method, held_out=0).task.held_out) == 0
    setup = built(method)
    assert len(setup.task.prompts) == 36 and len(setup.task.held_out) == 4 and setup.task.max_new_tokens == given.get("max_new_tokens", 64)
    items, _ = setup.collector.draw(setup.agent, None, 0, 2, 0, torch.Generator().manual_seed(0))
    assert max(len(r) for i in items for r in i.responses) <= setup.task.max_new_tokens
    setup.evaluate(setup.agent, 4, 0)
    for prompts, completions, answer, columns in seen:
        assert len(prompts) == len(completions) and all(eval(p[:-1]) == a for p, a in zip(prompts, answer, strict=True))
        assert columns["topic"] == ["sums"] * len(prompts) and columns.keys() == {"topic", "completion_ids"}
    assert len(seen) == 2


def test_own_samples_beside_a_file(prefs, tmp_path):
    method = override(PREFERENCE["spac"].value, {"num_envs": 4, "num_env_steps": 8, "solver": {"lr": 1e-4, "epochs": 1}})
    quiet = {"eval_episodes": 0, "progress": False, "method_id": "spac"}
    train(method, data=prefs, model="arithmetic", out=tmp_path / "run", **quiet)
    rows = Metrics(tmp_path / "run").read()
    assert rows[0]["loss"] == pytest.approx(6.93147, abs=1e-3) and rows[-1]["num_env_steps"] == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "dpo"], "learns from preferences: `markovia train dpo --data prefs.jsonl"),
        (["train", "dpo", "--env", "markovia/Arithmetic-v0"], "learns from preferences, not from rewards"),
        (["train", "ppo", "--data", "FILE"], "ppo learns from rewards: name an environment"),
        (["train", "dpo", "--data", "FILE"], "say which model is to be trained: --model"),
        (["train", "dpo", "--data", "nowhere.jsonl", "--model", "arithmetic"], "there is no file nowhere.jsonl"),
        (["train", "dpo", "--data", "FILE", "--model", "arithmetic", "--data-options", '{"max_lenght": 3}'], "did you mean 'max_length'"),
        (["train", "mmpo", "--data", "FILE", "--model", "arithmetic"], "add the columns score_chosen and score_rejected"),
        (["train", "rebel", "--data", "FILE", "--model", "arithmetic"], "old_chosen_logps"),
        (["train", "rebel"], "learns from preferences"),
        (["train", "dpo", "--env", "CartPole-v1", "--data", "FILE", "--model", "arithmetic"], "CartPole-v1 is a control task"),
        (["train", "d3po", "--env", "markovia/Digits-v0", "--data", "FILE"], "markovia/Digits-v0 takes no --data"),
    ],
)
def test_what_does_not_fit_is_taught_in_one_line(prefs, tmp_path, capsys, argv, message):
    out = ["--out", str(tmp_path / "run")]
    code, err = failure([str(prefs) if a == "FILE" else a for a in argv] + out, capsys)
    assert code == 2 and message in err and "Traceback" not in err and not (tmp_path / "run").exists()


def test_a_file_that_changed_or_left_is_told_when_the_run_is_read(prefs, tmp_path, capsys, monkeypatch):
    """What is held out is drawn from the file, so a changed one may hold out what was trained on."""
    folder = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "arithmetic", "--out", str(folder), "--num-envs", "4", "--num-env-steps", "8", "--eval-episodes", "2", "--no-progress"]
    assert run(["train", "dpo", "--data", prefs.name, *flags]) == 0
    load_run(folder)
    prefs.write_text(prefs.read_text().replace('"chosen"', '"x"').replace('"rejected"', '"chosen"').replace('"x"', '"rejected"'))
    with pytest.warns(UserWarning, match=r"sums\.jsonl has changed since .* what it holds out now may have been trained on"):
        load_run(folder)
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert run(["eval", str(folder)]) == 2
    assert "was trained on sums.jsonl, which is not there: put it back, or be in the folder that the run was started in" in capsys.readouterr().err
