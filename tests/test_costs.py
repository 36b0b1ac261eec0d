"""`markovia cost-of`: what a run's policy costs, against the limit it was trained for."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from markovia import cli
from markovia.agents.checkpoint import CheckpointError
from markovia.algos.presets import configure, override
from markovia.costs import cost_of
from markovia.loaded import load_run
from markovia.runs import train

ONE_ITERATION = {"eval_episodes": 0, "progress": False, "compile": False, "callbacks": [lambda info: False]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = override(
        configure("ppo-lag", "markovia/SafeGrid-v0"),
        {"num_env_steps": 320, "num_envs": 4, "num_steps": 40, "constraint": {"cost_limit": [3.0], "cost_gamma": 1.0}},
    )
    folder = tmp_path_factory.mktemp("runs") / "grid"
    return train(settings, "markovia/SafeGrid-v0", out=folder, method_id="ppo-lag", eval_episodes=2, progress=False).run


def test_costs_are_told_for_sampled_and_greedy_actions(run, capsys):
    found = cost_of(run, episodes=5)
    assert found["limit"] == 3.0 and found == json.loads(json.dumps(cost_of(run, episodes=5)))  # plain, and the same again
    sampled = found["sampled"]
    assert len(sampled["costs"]) == 5 and sampled["cost"] == pytest.approx(sum(sampled["costs"]) / 5)
    assert sampled["over"] == sum(c > 3.0 for c in sampled["costs"]) / 5 and sampled["cost"] > 0
    assert found["greedy"]["costs"] != sampled["costs"]
    cli.run(["cost-of", str(run), "--episodes", "3"])
    out = capsys.readouterr().out
    assert "sampled: cost" in out and "limit 3" in out and "greedy: cost" in out
    assert "costs" in json.loads((run / "done.json").read_text())["evaluation"]


def test_an_evaluation_in_which_no_cost_is_told_cost_nothing(run, monkeypatch):
    """An environment may write the cost only where there is one."""
    monkeypatch.setattr("markovia.algos.setup.cost_of", lambda *_: None)
    assert cost_of(run, episodes=3)["greedy"]["costs"] == [0.0] * 3


def test_behind_its_shield(tmp_path, capsys, monkeypatch):
    changes = {
        "num_env_steps": 1280, "num_envs": 2, "num_steps": 320, "solver": {"minibatch": 80, "epochs": 1},
        "constraint": {"shield": {"epsilon_first": 0.3, "alpha": 0.01, "hidden": [8], "iterations": 2, "step": 0.5}},
    }  # fmt: skip
    settings = override(configure("acs/ppo", "markovia/SafePendulum-v0"), changes)
    run = train(settings, "markovia/SafePendulum-v0", out=tmp_path / "acs", method_id="acs/ppo", eval_episodes=0, progress=False, compile=False).run
    found = cost_of(run, episodes=2)
    assert found["shielded"]["costs"] != found["sampled"]["costs"]
    cli.run(["cost-of", str(run), "--episodes", "1"])
    assert "shielded: cost" in capsys.readouterr().out
    policy, env = load_run(run).shielded(), gym.make("markovia/SafePendulum-v0")
    obs, _ = env.reset(seed=0)
    action, _ = policy.predict(obs, deterministic=True)
    assert action.shape == (1,) and policy.guard.iteration == 2
    np.testing.assert_array_equal(policy.predict(obs[None], deterministic=True)[0], action[None])
    many = np.random.default_rng(0).normal(0.0, 3.0, (50, 3)).astype(np.float32)
    bare, moved = (p.predict(many, deterministic=True)[0] for p in (policy.guard.agent, policy))
    assert bare.shape == moved.shape == (50, 1) and (bare != moved).any()
    loaded = load_run(run)
    monkeypatch.setattr("markovia.agents.checkpoint.load_tensors", lambda path: ({}, {}))
    with pytest.raises(CheckpointError, match="does not hold the shield of this run"):
        loaded.shielded()


def test_a_run_without_a_shield_has_none(run):
    with pytest.raises(ValueError, match="trained without a shield"):
        load_run(run).shielded()


def test_the_tasks_own_limit_counts_where_the_method_has_none(tmp_path):
    out = train("ppo", "markovia/SafePendulum-v0", out=tmp_path / "plain", **ONE_ITERATION)
    assert cost_of(out.run, episodes=1)["limit"] == 25.0


def test_a_limit_of_the_discounted_cost_is_none_of_plain_sums(tmp_path, capsys):
    """Neither the run's own nor the task's says anything of the costs that are told."""
    small = {"num_env_steps": 60, "num_envs": 1, "num_steps": 60}
    for method_id in ("ppo-lag", "ppo"):
        settings = override(configure(method_id, "markovia/SafeGrid-v0"), small)
        out = train(settings, "markovia/SafeGrid-v0", out=tmp_path / method_id, method_id=method_id, **ONE_ITERATION)
        found = cost_of(out.run, episodes=2)
        assert found["limit"] is None and found["sampled"]["over"] is None and found["sampled"]["cost"] >= 0
    cli.run(["cost-of", str(out.run), "--episodes", "1"])
    assert "no limit known" in capsys.readouterr().out


class Below(gym.Env):
    """Ends above `high`, which is never where that is infinite; every step costs 1."""

    observation_space, action_space = spaces.Box(-1.0, 1.0, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, high=0.0):
        self.high = high

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), 1.0, self.high < 1.0, False, {"cost": 1.0}


gym.register("test/Below-v0", Below, max_episode_steps=3)


def test_infinite_arguments_of_the_task_reach_every_command(tmp_path, monkeypatch):
    run = train("a2c", "test/Below-v0", out=tmp_path / "run", env_kwargs={"high": float("inf")}, **ONE_ITERATION).run
    loaded = load_run(run)
    assert loaded.evaluate(loaded.agent, 2, 0)["lengths"] == [3, 3]
    assert cost_of(run, episodes=2)["greedy"]["costs"] == [3.0, 3.0]
    drawn = []
    monkeypatch.setattr("markovia.pictures.record_video", lambda agent, env, env_kwargs, *_: drawn.append(env_kwargs) or [])
    assert cli.run(["video", str(run)]) == 0 and drawn == [{"high": float("inf")}]


def test_a_task_without_a_cost_is_refused(tmp_path):
    out = train("a2c", "CartPole-v1", out=tmp_path / "pole", **ONE_ITERATION)
    with pytest.raises(ValueError, match="puts no 'cost' into info"):
        cost_of(out.run, episodes=1)
