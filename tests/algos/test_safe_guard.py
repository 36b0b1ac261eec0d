"""acs/ppo: labels of safe episodes, the shield on its way to the environment, and what a run keeps of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from on_policy_pieces import check_resume

from markovia.agents.records import Rollout
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.presets import configure, override
from markovia.algos.safe.constraint import ChanceShield
from markovia.algos.safe.guard import safe_labels, safety_gains
from markovia.algos.safe.shield import least_advantage
from markovia.algos.setup import build

torch.set_num_threads(1)
ENV = "markovia/SafePendulum-v0"
SMALL: dict[str, Any] = {
    "num_envs": 2, "num_steps": 210, "num_env_steps": 100_000, "solver": {"minibatch": 105, "epochs": 1},
    "constraint": {"shield": {"epsilon_first": 0.5, "hidden": [8], "iterations": 2, "epochs": 1, "step": 0.3}},
}  # fmt: skip


def driver(compile: bool = False, **changes: Any) -> OnPolicyDriver:
    method: OnPolicy = override(override(configure("acs/ppo", ENV), SMALL), changes)
    setup = build(ENV, method, 0, agent_options={"hidden": (8,)})
    return OnPolicyDriver(method, setup.agent, setup.collector, 0, compile)


@pytest.mark.check("value", "acs/ppo")
def test_labels_by_hand():
    nan = np.nan
    cost = np.array([[1.0, 0.0, 1.0, 3.0, 0.0], [0.0, 1.0, 0.0, 0.0, 1.0]])[..., None]
    ended = np.array([[False, True, False, False, False], [False, False, False, True, False]])
    labels, running = safe_labels(cost, ended, np.array([[1.0], [2.0]]), np.array([2.0]))
    # row 0: 1 + 1 stays at the limit; 1 + 3 is over it, but has not ended. Row 1: 2 + 1 over; then nobody knows yet.
    np.testing.assert_array_equal(labels, [[1, 1, nan, nan, nan], [0, 0, 0, 0, nan]])
    assert running.tolist() == [[4.0], [1.0]]
    assert safe_labels(cost[:1], ended[:1], np.zeros((1, 1)), np.array([9.0]))[0].tolist()[0][:2] == [1.0, 1.0]


@pytest.mark.check("value", "acs/ppo")
def test_gains_by_hand():
    psi, label = torch.tensor([0.5, 0.75, 0.25, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    gains = safety_gains(psi, label, torch.tensor([False, True, False, True]))
    # .75 - .5, then the label 1 - .75; the next episode .5 - .25, then 0 - .5
    assert gains.tolist() == [0.25, 0.25, 0.25, -0.5]
    assert gains[:2].sum() == 1.0 - psi[0] and gains[2:].sum() == 0.0 - psi[2]  # they sum to label - V_s of the first step


@pytest.mark.check("invariance", "acs/ppo")
def test_rows_are_labelled_alone_and_parts_go_on():
    rng = np.random.default_rng(0)
    cost, ended, limit = rng.random((3, 12, 2)), rng.random((3, 12)) < 0.3, np.array([1.5, 2.0])
    labels, running = safe_labels(cost, ended, np.zeros((3, 2)), limit)
    order = [2, 0, 1]
    again, moved = safe_labels(cost[order], ended[order], np.zeros((3, 2)), limit)
    np.testing.assert_array_equal(again, labels[order])
    np.testing.assert_allclose(moved, running[order])
    early, first = safe_labels(cost[:, :5], ended[:, :5], np.zeros((3, 2)), limit)
    late, second = safe_labels(cost[:, 5:], ended[:, 5:], first, limit)
    np.testing.assert_allclose(second, running)
    # what had no label in the first part gets that of the first step of the second
    np.testing.assert_array_equal(np.concatenate([np.where(np.isnan(early), late[:, :1], early), late], 1), labels)


@pytest.mark.check("invariance", "acs/ppo")
def test_an_episode_is_learnt_from_whole_wherever_the_record_was_cut():
    rng, limit = np.random.default_rng(1), 1.5
    ended = torch.from_numpy(rng.random((2, 12)) < 0.25)
    ended[:, 0], ended[:, -1] = False, True
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 3] = False
    step = torch.arange(24.0).view(2, 12)  # names the steps
    cost = torch.from_numpy(rng.random((2, 12)))

    def learnt(cuts: list[int]) -> dict[float, float]:
        guard, found = driver().guard, {}
        guard.limit = np.array([limit])
        guard._fit = lambda *_: None
        finish = guard._finished
        guard._finished = lambda *a: seen.append(finish(*a)) or seen[-1]
        seen: list[Any] = []
        for a, b in zip([0, *cuts], [*cuts, 12], strict=True):
            part = slice(a, b)
            x = step[:, part, None]
            zero = torch.zeros(2, b - a)
            record = Rollout(
                x.expand(-1, -1, 3), x, zero, zero, valid[:, part], valid[:, part], zero, valid[:, part], cost=cost[:, part, None],
                columns={"executed": x, "ended": ended[:, part]},
            )  # fmt: skip
            guard.learn(record, torch.Generator())
        for steps in seen:
            assert torch.equal(steps.obs[:, 0], steps.action[:, 0])
            new = dict(zip(steps.action[:, 0].tolist(), steps.label.tolist(), strict=True))
            assert not found.keys() & new.keys()
            found |= new
        assert not len(guard.open.row)
        return found

    whole = learnt([])
    assert len(whole) == 23 and {0.0, 1.0} == set(whole.values())
    assert learnt([5]) == learnt([1, 2, 9]) == whole


@pytest.mark.check("gradient", "acs/ppo")
def test_moved_actions_gain_safety_and_are_what_the_environment_gets():
    run = driver()
    guard, obs = run.guard, np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    with torch.no_grad():
        guard.net["value"].head.bias += 3.0  # psi near 0.95 > 1 - epsilon: a step may spend little
    guard.shield = replace(guard.shield, alpha=0.01, step=1e-3)
    before = np.linspace(-1.5, 1.5, 6, dtype=np.float32)[:, None]
    after, unit = guard.act(obs, before)
    with torch.no_grad():
        judged = [guard.net["advantage"](torch.from_numpy(obs), torch.from_numpy(a / 2.0).float())[0] for a in (before, after)]
        bound = least_advantage(guard.psi(torch.from_numpy(obs)), alpha=0.01, epsilon=0.5)
    moved = (after != before)[:, 0]
    assert (moved == (judged[0] < bound).numpy()).all() and (judged[1] >= judged[0] - 1e-6).all()
    np.testing.assert_allclose(unit, after / 2.0, atol=1e-6)  # torque in [-2, 2]
    assert after.dtype == before.dtype


@pytest.mark.slow
def test_compiled_corrections_are_the_eager_ones():
    check_compiled()


def test_traced_corrections_are_the_eager_ones(traced_only):
    check_compiled()


def check_compiled() -> None:
    eager, compiled = driver().guard, driver(compile=True).guard
    obs, action = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), np.linspace(-1.5, 1.5, 6, dtype=np.float32)[:, None]
    for guard in (eager, compiled):
        guard.shield = replace(guard.shield, alpha=0.05, step=1e-3, iterations=20)
        with torch.no_grad():
            guard.net["value"].head.bias += 3.0
    for seen in (obs, obs + 0.1, -obs):
        (a, _), (b, _) = eager.act(seen, action), compiled.act(seen, action)
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert 0 < eager.moved == compiled.moved < eager.asked


@pytest.mark.check("limit", "acs/ppo")
def test_a_shield_that_tolerates_everything_is_the_penalty_alone():
    off, bare = driver(constraint={"shield": {"epsilon_first": 50.0}}), driver()
    bare.method = replace(bare.method, constraint=replace(bare.method.constraint, shield=None))
    bare = OnPolicyDriver(bare.method, (setup := build(ENV, bare.method, 0, agent_options={"hidden": (8,)})).agent, setup.collector, 0)
    for _ in range(2):
        a, b = off.step(), bare.step()
    assert a["shielded"] == 0.0 and "shielded" not in b and {k: a[k] for k in b} == b
    for p, q in zip(off.agent.net.parameters(), bare.agent.net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_networks_learn_which_actions_are_safe():
    """One state, episodes of one step: safe exactly when the action is positive."""
    run = driver(constraint={"shield": {"epochs": 40, "hidden": [16], "lr": 0.01, "epsilon_first": 0.5}})
    rollout, _ = run._collect()
    assert rollout.columns["executed"].shape == (2, 210, 1) and rollout.columns["ended"].sum() == 2
    rollout.obs = torch.zeros_like(rollout.obs)
    rollout.columns["executed"] = torch.linspace(-1, 1, 420, dtype=torch.float64).view(2, 210, 1)
    rollout.columns["ended"] = torch.ones_like(rollout.columns["ended"])
    rollout.cost = 100.0 * (rollout.columns["executed"] <= 0).to(rollout.reward)
    found = run.guard.learn(rollout, torch.Generator().manual_seed(0))
    assert found["safe"] == 0.5 and "executed" not in rollout.columns
    state = torch.zeros(2, 3)
    assert run.guard.psi(state)[0].item() == pytest.approx(0.5, abs=0.1)
    bad, good = run.guard.net["advantage"](state, torch.tensor([[-0.7], [0.7]]))[0].tolist()
    assert bad < -0.3 and good > 0.3


@pytest.mark.check("resume", "acs/ppo")
def test_resumed_runs_give_the_same_numbers(tmp_path):
    expected = check_resume(driver, tmp_path)
    assert any(s["shielded"] > 0 for s in expected) and expected[-1]["epsilon"] == 0.3


@pytest.mark.check("bad_input", "acs/ppo")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChanceShield(alpha=0.0), "alpha in"),
        (lambda: ChanceShield(epsilon=2.0), "epsilon in"),
        (lambda: ChanceShield(iterations=0), "must be >= 1"),
        (lambda: driver(constraint={"cost_limit": [-1.0]}), "no policy meets"),
        (lambda: OnPolicyDriver(m := configure("acs/ppo", ENV), build("CartPole-v1", m, 0).agent, None, 0), "needs a Box of actions"),
    ],
)
def test_bad_input_is_taught(call, message):
    with pytest.raises(ValueError, match=message):
        call()
