"""Runs on text tasks from the command line: files of prompts, several rewards, pass@k, policies that a method reads, rewards that fail."""

import json

import pytest
import torch

from markovia.agents.checkpoint import load_tensors
from markovia.algos.text_metrics import pass_at_k, pass_curve
from markovia.cli import run
from markovia.rundir import Metrics, checkpoints
from markovia.runs import train

torch.set_num_threads(1)
CLOCK = {"seconds", "steps_per_second"}
BROKEN: dict[str, int] = {}  # a reward function fails from the call of this number on


def even(prompts, completions, **columns):
    return [float(c[-1:] in "02468") for c in completions]


def short(prompts, completions):
    return [-float(len(c)) for c in completions]


def breaking(prompts, completions):
    BROKEN["calls"] = BROKEN.get("calls", 0) + 1
    if BROKEN["calls"] >= BROKEN.get("from", 10**9):
        raise RuntimeError("the judge is not there")
    return even(prompts, completions)


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(8) for b in range(8)))
    return path


def outcome(folder):
    tensors, meta = load_tensors(checkpoints(folder)[-1] / "driver.safetensors")
    return tensors, meta, [{k: v for k, v in row.items() if k not in CLOCK} for row in Metrics(folder).read()]


# -- pass@k --------------------------------------------------------------------------------------------------------------------------


def test_pass_at_k_by_hand_and_against_binomials():
    from math import comb

    # 2 of 4 right: of two draws both are wrong with 1/6
    assert pass_at_k(torch.tensor([2, 0, 4, 3]), 4, 2).tolist() == pytest.approx([5 / 6, 0.0, 1.0, 1.0])
    for n, k in ((10, 1), (10, 7), (16, 8)):
        expected = [1.0 - comb(n - c, k) / comb(n, k) for c in range(n + 1)]
        torch.testing.assert_close(pass_at_k(torch.arange(n + 1), n, k), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"pass@5 is estimated from at least 5 responses per prompt, got 4"):
        pass_at_k(torch.tensor([1]), 4, 5)


def test_pass_at_k_is_unbiased():
    # the mean of the estimate over all outcomes of n draws with probability p of being right is 1 - (1 - p)^k
    n, k, p = 5, 3, 0.3
    outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * n)
    weight = torch.where(outcomes > 0, p, 1 - p).prod(1)
    assert float((weight * pass_at_k(outcomes.sum(1), n, k)).sum()) == pytest.approx(1 - 0.7**3)
    assert pass_curve(outcomes[3:4] > 0) == pytest.approx([0.4, 0.7, 0.9, 1.0, 1.0])


def test_evaluation_log_and_plot_tell_pass_at_k(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ["--num-envs", "16", "--num-env-steps", "32", "--group-size", "4", "--eval-episodes", "6", "--eval-checkpoints"]
    assert run(["train", "grpo", "--env", "markovia/Arithmetic-v0", "--out", str(folder), "--no-progress", *flags]) == 0
    done = json.loads((folder / "done.json").read_text())["evaluation"]
    assert len(done["returns"]) == 6 and len(done["pass_curve"]) == 16
    assert done["pass@1"] == pytest.approx(done["mean"]) and done["pass@1"] <= done["pass@8"] == pytest.approx(done["pass_curve"][7])
    rows = Metrics(folder).read()
    assert {"eval_return", "eval_pass@1", "eval_pass@8"} <= rows[-1].keys()
    capsys.readouterr()
    assert run(["eval", str(folder), "--episodes", "4"]) == 0
    assert "pass@1" in (out := capsys.readouterr().out) and "pass@8" in out
    assert run(["plot", str(folder), "--y", "pass@k", "-o", str(tmp_path / "k.png")]) == 0 and (tmp_path / "k.png").stat().st_size > 5000


# -- files of prompts ------------------------------------------------------------------------------------------------------------------


def test_prompts_of_a_file_with_two_rewards(sums, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "own_rewards", __import__("types").SimpleNamespace(even=even, short=short))
    folder = tmp_path / "run"
    flags = ["--reward", "own_rewards:even", "--reward", "own_rewards:short", "--reward-weights", "1", "0.5", "--model", "arithmetic"]
    flags += ["--num-envs", "8", "--num-env-steps", "16", "--env-kwargs", '{"max_new_tokens": 3}', "--eval-episodes", "2", "--no-progress"]
    command = ["train", "rloo", "--env", "markovia/Prompts-v0", "--data", str(sums), "--out", str(folder), *flags]
    assert run(command) == 0
    row, config = Metrics(folder).read()[-1], json.loads((folder / "config.json").read_text())
    assert row["return"] == pytest.approx(row["reward/even"] + 0.5 * row["reward/short"])
    assert config["env_kwargs"]["rewards"] == ["own_rewards:even", "own_rewards:short"] and list(config["read"]) == [str(sums)]
    assert json.loads((folder / "done.json").read_text())["evaluation"]["reward/short"] <= 0.0
    capsys.readouterr()
    sums.write_text(sums.read_text().replace("7+7", "7+6"))
    assert run([*command, "--resume"]) == 2 and "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ppo", "--env", "CartPole-v1", "--data", "SUMS"], "CartPole-v1 takes no --data; a text task that does is markovia/Prompts-v0"),
        (["rloo", "--env", "markovia/Sentiment-v0", "--reward", "x:y"], "takes no --reward"),
        (["rloo", "--env", "markovia/Prompts-v0", "--data", "SUMS"], "came without a reward function"),
        (["rloo", "--env", "markovia/Prompts-v0", "--data", "none.jsonl", "--reward", "markovia.envs.text.rewards:written"], "there is no file"),
        (["rloo", "--env", "markovia/Prompts-v0", "--reward", "markovia.envs.text.rewards:written", "--reward-weights", "1", "2"], "2 weights"),
        (["kdrl", "--env", "markovia/Arithmetic-v0"], "policies that were not given, ['teacher']"),
        (["kdrl", "--env", "markovia/Arithmetic-v0", "--reference", "teacher"], "takes NAME=FOLDER"),
        (["kdrl", "--env", "markovia/Arithmetic-v0", "--reference", "teachr=x"], "did you mean 'teacher'"),
        (["grpo", "--env", "markovia/Arithmetic-v0", "--reference", "teacher=x"], "it reads none beside its own reference"),
        (["kdrl", "--env", "markovia/Arithmetic-v0", "--reference", "teacher=no/such/run"], "there is no agent in no/such/run"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_taught_in_one_line(sums, tmp_path, capsys, argv, message):
    argv = [str(sums) if word == "SUMS" else word for word in argv]
    assert run(["train", *argv, "--out", str(tmp_path / "run"), "--no-progress"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# -- rewards that fail -------------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_a_reward_function_failed(sums, tmp_path):
    from markovia.algos.presets import override
    from markovia.algos.systems import find
    from markovia.envs.text.rewards import RewardError

    method = override(find("rloo").value, {"num_envs": 8, "num_env_steps": 32, "group_size": 2, "solver": {"unit": "row", "lr": 1e-3}})
    quiet = {"data": sums, "reward": [breaking], "model": "arithmetic", "env_kwargs": {"max_new_tokens": 3}, "num_checkpoints": 4}
    quiet |= {"eval_episodes": 0, "progress": False, "method_id": "rloo"}
    BROKEN.clear()
    train(method, "markovia/Prompts-v0", out=tmp_path / "whole", **quiet)
    BROKEN.clear()
    BROKEN["from"] = 3
    with pytest.raises(RewardError, match=r"'breaking' failed on completion 0 \(prompt '.*', text '.*'\): RuntimeError: the judge.*--resume"):
        train(method, "markovia/Prompts-v0", out=tmp_path / "broken", **quiet)
    BROKEN.clear()
    train(method, "markovia/Prompts-v0", out=tmp_path / "broken", resume=True, **quiet)
    (a, meta, rows), (b, meta2, rows2) = outcome(tmp_path / "whole"), outcome(tmp_path / "broken")
    assert rows == rows2 and meta == meta2 and [k for k in a if not torch.equal(a[k], b[k])] == []


def test_presets_change_parts_of_a_tuple_by_number():
    from markovia.algos.on_policy.rewards import LengthBudget
    from markovia.algos.presets import configure, override

    assert configure("lcpo", "markovia/LengthControl-v0").reward == (LengthBudget("exact", 0.05),)  # budgets of tens of tokens, not of thousands
    with pytest.raises(ValueError, match="has no field 'rates'; did you mean 'rate'"):
        override(configure("lcpo", "markovia/LengthControl-v0"), {"reward": {"0": {"rates": 1.0}}})


# -- policies that a method reads ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    small = ["--num-envs", "8", "--num-env-steps", "8", "--eval-episodes", "0", "--no-progress"]
    assert run(["train", "rloo", "--env", "markovia/Arithmetic-v0", "--out", str(folder), "--solver.lr", "1e-2", *small]) == 0
    return folder


@pytest.mark.parametrize(("method", "name"), [("kdrl", "teacher"), ("rto", "dpo"), ("salsa", "other")])
def test_policies_are_read_from_run_folders(teacher, tmp_path, method, name):
    folder = tmp_path / "run"
    flags = ["--num-envs", "8", "--num-env-steps", "8", "--eval-episodes", "0", "--no-progress", "--out", str(folder)]
    flags += [] if method != "kdrl" else ["--group-size", "4"]
    assert run(["train", method, "--env", "markovia/Arithmetic-v0", "--reference", f"{name}={teacher}", *flags]) == 0
    assert json.loads((folder / "config.json").read_text())["references"] == {name: str(teacher)}


def test_a_policy_comes_frozen_at_the_temperature_of_the_one_that_is_trained(teacher, tmp_path):
    from markovia.agents.language import LanguageAgent
    from markovia.algos.policies import load_policy

    like = LanguageAgent.from_name("arithmetic", temperature=0.6)
    policy = load_policy(teacher, like)
    assert policy.options.temperature == 0.6 and not any(p.requires_grad for p in policy.net.parameters())
    again = load_policy(str(checkpoints(teacher)[-1] / "agent"), like)
    assert all(torch.equal(p, q) for p, q in zip(policy.net.parameters(), again.net.parameters(), strict=True))
    assert load_policy("arithmetic", like).base == "arithmetic"
    from markovia.algos.tree_records import TreeCollector
    from markovia.envs.exact.token_mdp import EnumerableTokenMDP

    with pytest.raises(ValueError, match="holds a language agent, the one that is trained is of kind tabular"):
        load_policy(teacher, TreeCollector([EnumerableTokenMDP.random(2, 2, seed=0)], 2).agent())


# -- texts that are kept, prompts that are rehearsed, runs that are merged -----------------------------------------------------------------


def test_texts_prompts_and_merged_runs_from_the_command_line(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a in range(6) for b in range(6)))
    small = ["--env", "markovia/Arithmetic-v0", "--eval-episodes", "0", "--no-progress", "--num-envs", "16"]
    # the critic alone is fitted at first, so the second batch is the first that the policy is moved by
    assert run(["train", "ppo-max/ptx", *small, "--num-env-steps", "32", "--texts", str(texts), "--out", str(tmp_path / "ptx")]) == 0
    assert Metrics(tmp_path / "ptx").read()[-1]["aux_loss"] > 0 and "texts" in json.loads((tmp_path / "ptx" / "config.json").read_text())
    dph = ["--num-env-steps", "32", "--group-size", "4", "--aux.threshold", "0.5", "--aux.prompts", "32", "--aux.rows", "4"]
    assert run(["train", "dph-rl", *small, *dph, "--out", str(tmp_path / "dph")]) == 0
    assert "aux_loss" in Metrics(tmp_path / "dph").read()[-1]
    assert run(["train", "warp", *small, "--num-env-steps", "64", "--out", str(tmp_path / "warp")]) == 0
    capsys.readouterr()
    for argv, message in (
        (["grpo", *small, "--num-env-steps", "32", "--texts", str(texts)], "reads no texts"),
        (["ppo-max/ptx", *small, "--num-env-steps", "32"], "--texts FILE"),
    ):
        assert run(["train", *argv, "--out", str(tmp_path / "bad")]) == 2 and message in capsys.readouterr().err
