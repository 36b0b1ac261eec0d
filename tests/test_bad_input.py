"""Bad input through the front door (`train`): one clear message, and a run folder that holds whole files or is not there at all.

The same mistakes at their own level, and those that no run can meet:
    wrong environment id, wrong method        test_runs.py, test_cli.py; envs/test_vector.py (modules, nearest names)
    method on a kind that it does not serve   algos/test_on_policy.py (every row x every kind)
    reward of the wrong length, or NaN        algos/test_collect.py, envs/test_text.py (TRL's signature), envs/test_denoising_envs.py
    tokenizer without EOS                     envs/test_text.py
    action Box with infinite bounds           agents/test_control.py (with and without squash), agents/test_sb3.py (SB3's policies as agents)
    unsupported action space                  agents/test_control.py
    damaged checkpoint, pickle in its place   agents/test_checkpoint.py (agents and tensors)
    full disk                                 agents/test_checkpoint.py, test_runs.py (in a later checkpoint, and the run goes on)
"""

import dataclasses
import errno
import json
import os
import pickle
import stat

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.checkpoint import CheckpointError
from markovia.algos.presets import configure, override
from markovia.envs.denoising import tasks as denoising_tasks
from markovia.envs.text.tasks import TextTask, arithmetic
from markovia.loaded import load_run
from markovia.rundir import Metrics, RunError, checkpoints
from markovia.runs import train

torch.set_num_threads(1)
VECTOR = spaces.Box(-1.0, 1.0, (2,), np.float32)
QUIET = {"eval_episodes": 0, "num_checkpoints": 1, "progress": False}


class Plain(gym.Env):
    """Two steps; the reward of the second one is `reward`, which a test may mend."""

    observation_space, reward = VECTOR, 1.0

    def __init__(self, action=None):
        self.action_space = spaces.Discrete(2) if action is None else action

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.n += 1
        return np.zeros(2, np.float32), Plain.reward if self.n == 2 else 0.0, self.n == 2, False, {}


PLAIN = "BadInput/Plain-v0"
gym.register(PLAIN, Plain) if PLAIN not in gym.registry else None


def small(env, method="ppo"):
    changes = {"num_env_steps": 16, "num_envs": 4, "num_steps": 4, "group_size": 1}
    return override(configure(method, env), changes)


def run(env, out, method="ppo", **options):
    return train(small(env, method), env, out=out, method_id=method, **{**QUIET, **options})


def control(action):
    return lambda out: run(PLAIN, out, env_kwargs={"action": action})


def without_eos(**kwargs):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1}, unk_token="[UNK]")), unk_token="[UNK]")
    return TextTask(prompts=["good"], tokenizer=inner, rewards=lambda prompts, completions: [0.0], max_new_tokens=2)


# -- refused before anything is written ----------------------------------------------------------------------------------------------------

REFUSED = {
    "environment id": (lambda out: train("ppo", "markovia/Digit-v0", out=out), "did you mean 'markovia/Digits-v0'"),
    "method": (lambda out: train("rlo", "markovia/Arithmetic-v0", out=out), "did you mean 'rloo'"),
    "kind of the method": (lambda out: train("ddpo", "CartPole-v1", out=out), "ddpo serves denoising, tabular; CartPole-v1 is a control task"),
    "natural gradient on text": (lambda out: train("trpo", "markovia/Arithmetic-v0", out=out), "trpo serves"),
    "endless actions": (control(spaces.Box(-np.inf, np.inf, (2,))), "infinite bounds.*TransformAction"),
    "half-endless actions": (control(spaces.Box(np.array([-1.0, -np.inf], np.float32), np.ones(2, np.float32))), "infinite bounds"),
    "text actions": (control(spaces.Text(3)), "Text; a control agent serves Box, Discrete, MultiDiscrete and MultiBinary"),
    "tuple actions": (control(spaces.Tuple([spaces.Discrete(2)])), "Tuple; a control agent serves"),
    "tokenizer without EOS": (lambda out: run("markovia/Arithmetic-v0", out, env_kwargs={"task": without_eos}), "no EOS token.*eos_token ="),
    "argument of a task": (lambda out: run("markovia/Digits-v0", out, env_kwargs={"wantd": 3}), "does not know .*keyword argument 'wantd'"),
    "argument of an environment": (lambda out: run("CartPole-v1", out, env_kwargs={"gravty": 1}), "keyword argument 'gravty'"),
    "option of the agent": (lambda out: run("CartPole-v1", out, agent_options={"hiden": [8]}), "keyword argument 'hiden'"),
    "checkpoints": (lambda out: run("CartPole-v1", out, num_checkpoints=0), "num_checkpoints must be >= 1"),
    "seed": (lambda out: run("CartPole-v1", out, seed=-1), "seed must be >= 0, got -1"),
    "evaluation": (lambda out: run("CartPole-v1", out, eval_episodes=-1), "eval_episodes must be >= 0, got -1"),
    "device": (lambda out: run("CartPole-v1", out, device="gpu"), "device 'gpu' can't be used here .*'cpu' always can"),
    "environment object": (lambda out: train("ppo", Plain(), out=out), "env is an id such as 'CartPole-v1', got <.*Plain.*gym.register.*:Name-v0"),
    "environment class": (lambda out: train("ppo", Plain, out=out), "env is an id such as 'CartPole-v1', got <class .*Plain"),
    "environment maker": (lambda out: train("ppo", lambda: Plain(), out=out), "env is an id such as 'CartPole-v1', got <function"),
    "environment spec": (lambda out: train("ppo", gym.spec("CartPole-v1"), out=out), r"env is an id such as 'CartPole-v1', got EnvSpec\("),
    "half a seed": (lambda out: run("CartPole-v1", out, seed=1.5), "seed must be a whole number, got 1.5"),
    "no seed": (lambda out: run("CartPole-v1", out, seed=None), "seed must be a whole number, got None"),
    "true as a seed": (lambda out: run("CartPole-v1", out, seed=True), "seed must be a whole number, got True"),
    "list of arguments": (lambda out: run("CartPole-v1", out, env_kwargs=[1]), r"env_kwargs must be a dictionary by name, got \[1\]"),
    "list of options": (lambda out: run("CartPole-v1", out, agent_options=[1]), r"agent_options must be a dictionary by name, got \[1\]"),
    "clock": (lambda out: run("CartPole-v1", out, max_seconds=float("nan")), "max_seconds must be >= 0, got nan"),
    "judge of nothing": (lambda out: run("CartPole-v1", out, judge="a:b"), "judge and data_options go with a file of preferences .*CartPole-v1"),
    "options of nothing": (lambda out: run("CartPole-v1", out, data_options={"held_out": 3}), "judge and data_options go with a file of preferences"),
    "tracker": (lambda out: run("CartPole-v1", out, track="wandbb"), "'wandb' or 'trackio'"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_before_a_folder_is_made(mistake, tmp_path):
    ask, message = REFUSED[mistake]
    with pytest.raises(ValueError, match=message):
        ask(tmp_path / "run")
    assert not list(tmp_path.iterdir())


# -- found out while training --------------------------------------------------------------------------------------------------------------


def scored(value):
    """The arithmetic task with a reward function that returns `value` of the batch's size."""

    def broken(prompts, completions, **columns):
        return value(len(completions))

    return lambda **kwargs: dataclasses.replace(arithmetic(1), rewards=[broken])


def denoised(value):
    """The linear Gaussian chain with such a reward."""
    task = denoising_tasks.linear_gaussian()
    task.reward = lambda x, cond: value(len(x))
    return lambda **kwargs: task


TEXT, CHAINS = "markovia/Arithmetic-v0", "markovia/LinearGaussian-v0"
WRONG_LENGTH, NOT_A_NUMBER = (lambda n: [0.0] * (n - 1)), (lambda n: [0.0] * (n - 1) + [float("nan")])
FOUND = {
    "text, length": (TEXT, WRONG_LENGTH, "'broken' returned 3 values for 4 completions"),
    "text, NaN": (TEXT, NOT_A_NUMBER, "'broken' returned nan for completion 3; rewards must be finite"),
    "chains, length": (CHAINS, WRONG_LENGTH, r"returned shape \(3,\) for 4 samples; expected \(4,\)"),
    "chains, NaN": (CHAINS, NOT_A_NUMBER, "returned nan for sample 3"),
}


def assert_whole(folder, made):
    """Nothing but whole files: configuration, metrics, events, and as many checkpoints as were made."""
    assert not [p for p in folder.rglob("*") if "tmp" in p.name and "tfevents" not in p.name]
    assert json.loads((folder / "config.json").read_text())["env"]
    assert len(checkpoints(folder)) == made and not (folder / "done.json").exists()
    text = (folder / "metrics.jsonl").read_text()
    assert len(text.splitlines()) == len(Metrics(folder).read()) and (not text or text.endswith("\n"))


def test_a_run_with_a_python_task_says_why_it_cannot_be_evaluated_from_its_folder(tmp_path):
    run(TEXT, tmp_path / "run", env_kwargs={"task": scored(lambda n: [1.0] * n)})
    with pytest.raises(ValueError, match=r"Python object \(.*scored.*lambda.*\).*use the agent that train\(\) returned"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("mistake", FOUND)
def test_a_broken_reward_of_sequences_leaves_whole_files(mistake, tmp_path, monkeypatch):
    env, value, message = FOUND[mistake]
    if env == CHAINS:
        monkeypatch.setitem(denoising_tasks.TASKS, "linear_gaussian", denoised(value))
    kwargs = {"task": scored(value)} if env == TEXT else {}
    with pytest.raises(ValueError, match=message):
        run(env, tmp_path / "run", env_kwargs=kwargs)
    assert_whole(tmp_path / "run", made=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_reward_of_a_step_is_found_and_the_mended_run_goes_on(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(Plain, "reward", bad)
    with pytest.raises(ValueError, match=f"environment 0 returned the reward {bad} at step 1; rewards must be finite"):
        run(PLAIN, tmp_path / "run")
    assert_whole(tmp_path / "run", made=0)
    with pytest.raises(RunError, match="no checkpoint yet; train on with --resume"):
        load_run(tmp_path / "run")
    monkeypatch.undo()
    assert run(PLAIN, tmp_path / "run", resume=True).done["ended"] == "budget"


# -- the disk ------------------------------------------------------------------------------------------------------------------------------

# What is flushed to the disk, in order: of a checkpoint its four files and the metrics that lead to it, in any order.
WRITES = ["config.json", "metrics.jsonl", *(f"checkpoint: {n} of 5" for n in range(5)), "done.json"]


@pytest.mark.parametrize("file", WRITES)
def test_a_full_disk_leaves_no_half_file_and_the_run_goes_on(file, tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.extend([descriptor] * stat.S_ISREG(os.fstat(descriptor).st_mode))
        if len(calls) > WRITES.index(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    folder = tmp_path / "run"
    with pytest.raises(RunError, match=rf"could not (write|save).*{file.partition(':')[0]}.*No space left.*--resume"):
        run(PLAIN, folder)
    monkeypatch.undo()
    if file == "config.json":
        assert not list(folder.iterdir())
    elif file == "metrics.jsonl":
        assert [p.name for p in folder.iterdir()] == ["config.json"]
    else:
        assert_whole(folder, made=int(file == "done.json"))
    assert run(PLAIN, folder, resume=True).done["iteration"] == 1


# -- checkpoints ---------------------------------------------------------------------------------------------------------------------------


def damaged(file, how, thing):
    """Overwrite a checkpoint's file."""
    data = file.read_bytes()
    if how == "torch":
        torch.save({"w": torch.ones(2)}, file)
    else:
        file.write_bytes({"cut": data[: len(data) // 2], "flip": data[:-1] + bytes([data[-1] ^ 1]), "pickle": pickle.dumps(thing)}[how])


@pytest.mark.parametrize("how", ["cut", "flip", "pickle", "torch"])
def test_a_damaged_or_foreign_checkpoint_is_not_resumed(how, tmp_path, trap):
    folder, (thing, proof) = tmp_path / "run", trap
    run(PLAIN, folder)
    damaged(checkpoints(folder)[-1] / "driver.safetensors", how, thing)
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        run(PLAIN, folder, resume=True)
    assert sorted(folder.rglob("*")) == before and not proof.exists()


@pytest.mark.parametrize(("how", "message"), [("cut", "damaged"), ("flip", "does not match the hash"), ("pickle", "nothing in it was run")])
def test_a_damaged_or_foreign_agent_is_not_evaluated(how, message, tmp_path, trap):
    folder, (thing, proof) = tmp_path / "run", trap
    run(PLAIN, folder)
    damaged(checkpoints(folder)[-1] / "agent" / "agent.safetensors", how, thing)
    with pytest.raises(CheckpointError, match=message):
        load_run(folder)
    assert not proof.exists()
