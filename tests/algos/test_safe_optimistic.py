"""reload/ppo: advantages that are optimistic in critic and multiplier, on sampled records."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from on_policy_pieces import check_resume

from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.optimism import Judge
from markovia.algos.presets import configure, override
from markovia.algos.safe.constraint import Constraint, optimistic_advantage
from markovia.algos.safe.dual import PIDDual, TrustRegionDual
from markovia.algos.setup import build

torch.set_num_threads(1)
GRID, GAUSSIAN = "markovia/SafeGrid-v0", "markovia/LinearGaussian-v0"
SMALL: dict[str, Any] = {
    "num_envs": 4, "num_steps": 70, "num_env_steps": 100_000, "constraint": {"cost_limit": [0.5], "dual": {"kp": 0.05, "ki": 0.05}},
    "solver": {"minibatch": 80, "epochs": 2},
}  # fmt: skip


def driver(**changes: Any) -> OnPolicyDriver:
    method: OnPolicy = override(override(configure("reload/ppo", GRID), SMALL), changes)
    setup = build(GRID, method, 0, agent_options={"dtype": "float64"})
    return OnPolicyDriver(method, setup.agent, setup.collector, 0)


@pytest.mark.check("value", "reload/ppo")
@pytest.mark.check("gradient", "reload/ppo")
def test_optimism_by_hand():
    adv, before = torch.tensor([[1.0, -2.0]], requires_grad=True), torch.tensor([[0.5, 1.0]])
    out = optimistic_advantage(adv, before)
    assert out.tolist() == [[1.5, -5.0]]
    (slope,) = torch.autograd.grad(out.sum(), adv)
    assert slope.tolist() == [[2.0, 2.0]]


@pytest.mark.check("limit", "reload/ppo")
def test_the_first_iteration_is_plain_and_later_ones_look_back():
    optimist, plain = driver(), driver(constraint={"optimistic": False})
    optimist.step(), plain.step()
    assert torch.equal(optimist.agent.net["policy"].table, plain.agent.net["policy"].table)
    assert optimist.constraint.weight.tolist() == plain.constraint.weight.tolist()
    # The second batch, judged with the critic and the weight of the first: independently of the driver, from the parts.
    rollout, _ = optimist._collect()
    optimist.constraint.measure([[3.0]], [60])
    old, new = optimist.constraint.weight_before, optimist.constraint.weight
    assert old != new
    optimist.advantages(rollout, optimist.prepare(rollout))
    found = rollout.columns["adv"].clone()
    standard = lambda x: (x - x.mean()) / (x.std() + 1e-8)  # noqa: E731
    table, mixed = optimist.agent.net["critic"].table, []
    first = torch.zeros_like(table)  # a critic starts at 0
    gae = optimist.method.advantage
    for weights, w in ((table.detach(), new), (first, old)):
        value = weights[rollout.obs]
        columns = [gae(r, replace(rollout, value=value[..., i : i + 1], boot_value=rollout.boot_value[..., i : i + 1]), {})[0]
                   for i, r in enumerate((rollout.reward, 0.01 * rollout.cost[..., 0]))]  # fmt: skip
        priced = 100.0 * columns[1]
        mixed.append((standard(columns[0][rollout.mask]) - w[0] * (priced[rollout.mask] - priced[rollout.mask].mean())) / (1 + w[0]))
    assert torch.allclose(found[rollout.mask], 2 * mixed[0] - mixed[1], atol=1e-6)


@pytest.mark.check("invariance", "reload/ppo")
def test_nothing_changes_where_critic_and_weight_stay():
    run = driver()
    rollout, _ = run._collect()
    reward = run.prepare(rollout)
    run.advantages(rollout, reward)
    plain = rollout.columns["adv"].clone()
    run.judge.seen(), run.judge.next()
    run.advantages(rollout, reward)
    assert torch.allclose(rollout.columns["adv"], plain, atol=1e-12)


@pytest.mark.check("resume", "reload/ppo")
def test_resumed_runs_give_the_same_numbers(tmp_path):
    expected = check_resume(driver, tmp_path)
    assert all(np.isfinite(s["policy_loss"]) for s in expected)


def test_a_run_without_a_critic_goes_on_looking_back(tmp_path):
    def make() -> OnPolicyDriver:
        settings = configure("ddpo", GAUSSIAN)
        constraint = Constraint(cost_limit=0.5, dual=PIDDual(kp=0.5, ki=0.5), mix="plain", optimistic=True)
        method = replace(settings, num_envs=16, num_env_steps=1000, constraint=constraint, normalize_advantage="none")
        setup = build(GAUSSIAN, method, 0)
        setup.collector.cost = lambda r: r.outcome["x"].square().sum(-1)
        return OnPolicyDriver(method, setup.agent, setup.collector, 0)

    check_resume(make, tmp_path)
    fresh = make()
    fresh.judge.load_state(fresh.judge.state())
    assert fresh.judge.before is None  # nothing to look back on


def test_estimators_find_their_columns_and_mixing_again_leaves_the_record_alone():
    rollout, _ = driver()._collect()
    rollout.columns["told"] = told = torch.rand(rollout.shape)

    def mix(older: Any, adv: torch.Tensor, advantage: Any, before: bool) -> torch.Tensor:
        older.columns["cost_adv"] = adv
        return adv

    method: Any = SimpleNamespace(advantage=lambda reward, older, state: (older.columns["told"], None), normalize_advantage="none")
    judge = Judge(method, SimpleNamespace(parameters=lambda part: []), SimpleNamespace(mix=mix))  # type: ignore[arg-type]
    judge.before = []
    torch.testing.assert_close(judge.optimistic(rollout, rollout.reward, 3.0 * told, {}), 5.0 * told)
    assert "cost_adv" not in rollout.columns


@pytest.mark.check("bad_input", "reload/ppo")
def test_bad_input_is_taught():
    with pytest.raises(ValueError, match="none can be optimistic"):
        Constraint(dual=TrustRegionDual(), optimistic=True)
    with pytest.raises(ValueError, match="no policy meets"):
        driver(constraint={"cost_limit": [-1.0]})
