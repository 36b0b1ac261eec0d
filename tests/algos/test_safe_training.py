"""The constrained methods in the on-policy loop: parents as limit cases, CPO's step, sequences with costs, and what training promises."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.records import Rollout, masked_mean
from markovia.agents.tabular import TabularAgent
from markovia.algos.advantages import LeaveOneOut, MovingBaseline
from markovia.algos.collect import SequenceCollector, StepCollector, check_cost
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.loss import critic_error
from markovia.algos.on_policy.method import Descent, NaturalGradient, OnPolicy
from markovia.algos.on_policy.natural import natural_step
from markovia.algos.presets import configure, override
from markovia.algos.safe.constraint import Constraint
from markovia.algos.safe.dual import FixedDual, PIDDual, TrustRegionDual
from markovia.algos.safe.methods import SAFE
from markovia.algos.setup import build, evaluate_stepped
from markovia.algos.systems import find
from markovia.envs.control.vector import make_vec
from markovia.envs.exact.cmdps import cmdp_two_state
from markovia.envs.exact.tabular import TabularMDP

torch.set_num_threads(1)
TRAINED = [k for k, row in SAFE.items() if isinstance(row.value, OnPolicy) and "tabular" in row.kinds]
GRID, GAUSSIAN = "markovia/SafeGrid-v0", "markovia/LinearGaussian-v0"
SMALL: dict[str, Any] = {"num_envs": 4, "num_steps": 40, "num_env_steps": 100_000}


def driver(method: OnPolicy, env_id: str = GRID, seed: int = 0, **options: Any) -> OnPolicyDriver:
    setup = build(env_id, method, seed, **options)
    return OnPolicyDriver(method, setup.agent, setup.collector, seed)


def small(method_id: str, **changes: Any) -> OnPolicy:
    method = override(configure(method_id, GRID), {**SMALL, "constraint": {"cost_limit": [0.5]}, **changes})
    if isinstance(method.solver, Descent):
        method = override(method, {"solver": {"minibatch": 80, "epochs": 2}})
    return method


@pytest.mark.parametrize("method_id", TRAINED)
def test_rows_say_where_they_come_from_and_train(method_id):
    row = SAFE[method_id]
    find(row.parent)
    run = driver(small(method_id))
    seen = [run.step() for _ in range(3)]
    assert all(np.isfinite(s["policy_loss"]) for s in seen) and any("cost" in s for s in seen)
    assert {"cost_weight", "violation", "explained_variance", "explained_variance/cost"} <= seen[-1].keys()


@pytest.mark.check("limit", "trpo-lag", "cat")
def test_weight_zero_is_the_parent_bit_for_bit():
    free = Constraint(cost_limit=(0.5,), dual=FixedDual(0.0))
    for child, parent in (("trpo-lag", "trpo"), ("cat", "ppo")):
        settings = replace(small(child), constraint=free, value=find("trpo").value.value)
        plain = replace(override(configure(parent, GRID), SMALL), normalize_advantage="batch", value=settings.value, solver=settings.solver)
        a, b = driver(settings), driver(plain)
        for _ in range(2):
            a.step(), b.step()
        assert torch.equal(a.agent.net["policy"].table, b.agent.net["policy"].table)
        assert a.agent.net["critic"].table[:, 1].abs().max() > 0  # the cost critic learns beside


def test_a_price_on_cost_lowers_it():
    def late_cost(dual: Any) -> float:
        settings = small("ppo-lag", num_envs=16, num_steps=60)
        run = driver(replace(settings, constraint=Constraint(cost_limit=(0.0,), dual=dual), solver=Descent(lr=0.05, minibatch=None, epochs=4)))
        return float(np.mean([run.step().get("cost", np.nan) for _ in range(14)][-5:]))

    assert late_cost(FixedDual(5.0)) < 0.5 * late_cost(FixedDual(0.0))


def test_a_policy_that_has_become_safe_trains_on(monkeypatch):
    """An environment may write the cost only where there is one: silence after a told cost is a cost of 0, in a resumed run too."""
    run, resumed = driver(small("ppo-lag")), driver(small("ppo-lag"))
    run.step()
    run.boundary()
    state = run.state()
    monkeypatch.setattr("markovia.algos.collect.cost_of", lambda *_: None)
    resumed.load_state(*state)
    for again in (run, resumed):
        assert [again.step() for _ in range(2)][-1]["cost"] == 0.0


def test_critic_error_sums_the_columns():
    zeros, yes = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    part = Rollout(zeros, zeros, zeros, zeros, yes, yes, zeros, ~yes, value=torch.zeros(1, 1, 3))
    part.columns |= {"ret": torch.tensor([[1.0]]), "cost_ret": torch.tensor([[[2.0, 4.0]]])}
    value = torch.tensor([[[3.0, 3.0, 3.0]]])
    assert critic_error(OnPolicy(), value, part).item() == 0.5 * (4.0 + 1.0 + 1.0)
    part.columns.pop("cost_ret")
    assert critic_error(OnPolicy(), value, part).item() == 2.0


def test_rows_solved_on_tables_run_with_their_settings():
    trace = replace(SAFE["reload"].value, step=0.3, dual_step=0.05, iterations=600).solve(cmdp_two_state())
    assert trace.cost[-1, 0] == pytest.approx(5.0, abs=1e-3)
    rng = np.random.default_rng(0)
    P, reward, start = rng.dirichlet(np.ones(3), (2, 3, 2)), rng.random((2, 3, 2)), np.eye(3)[[0, 0]]
    baseline = np.full((2, 3, 3, 2), 0.5)
    for method_id in ("stepmix", "epsmix"):
        history = SAFE[method_id].value.run(P, reward, start, baseline, np.zeros(2), episodes=10)
        assert not history.baseline_only.any()  # with a floor of 0 the optimistic policy is always safe enough
    rewards = rng.random((2, 3, 2))
    front = SAFE["c-morl"].value.search(TabularMDP(P[0], rewards[0], 0.5, start[0]), rewards, np.eye(2))
    assert len(front.points) >= 2
    guard = SAFE["acs"].value
    psi = torch.tensor([0.9, 0.5])  # may spend 0.16; must win back 0.16
    moved = guard.act(torch.zeros(2, 1), lambda a: a[:, 0], psi)
    assert moved.intervened.tolist() == [False, True] and moved.action[1, 0] == pytest.approx(0.2)
    assert guard.policy(P[0], np.full((3, 2), 0.5), np.array([False, False, True]), 4).shape == (4, 3, 2)
    with pytest.raises(ValueError, match="trains nothing"):
        configure("reload", GRID)


# -- CPO's step ------------------------------------------------------------------------------------------------------------------------


def bandit(reward: list[float], cost: list[float]) -> tuple[TabularAgent, Rollout]:
    """One state, three actions, each taken as often as the uniform policy does."""
    agent = TabularAgent.from_spaces(spaces.Discrete(1), spaces.Discrete(3), critic=False, dtype="float64")
    n = len(reward)
    one = torch.ones(n, 1, dtype=torch.float64)
    yes = torch.ones(n, 1, dtype=torch.bool)
    action = torch.arange(n)[:, None]
    rollout = Rollout(torch.zeros(n, 1, dtype=torch.int64), action, one * np.log(1 / 3), one, yes, yes, 0 * one, ~yes)
    rollout.columns["adv"] = torch.tensor(reward, dtype=torch.float64)[:, None]
    rollout.columns["cost_adv"] = torch.tensor(cost, dtype=torch.float64)[:, None, None]
    return agent, rollout


@pytest.mark.parametrize(("violation", "case"), [(-1.0, "free"), (-0.02, "active"), (0.0, "active"), (0.02, "active"), (0.5, "recovery")])
def test_cpo_step_obeys_the_limit_or_recovers(violation, case):
    agent, rollout = bandit([1.0, 0.0, -1.0], [1.0, -1.0, 0.0])
    method = OnPolicy(
        advantage=LeaveOneOut(), normalize_advantage="none", solver=NaturalGradient(kl_limit_nats=0.01, damping=1e-6),
        surrogate=find("trpo").value.surrogate, constraint=Constraint(dual=TrustRegionDual(tolerance=1e-3)),
    )  # fmt: skip
    stats = natural_step(method, method.solver, agent, rollout, violation)
    logp = agent.evaluate(rollout, ("logp",)).logp
    ratio = (logp.detach() - rollout.logp_old).exp()
    gain, rise = (float(masked_mean(ratio * c, rollout.mask)) for c in (rollout.columns["adv"], rollout.columns["cost_adv"][..., 0]))
    assert stats["accepted"] == 1.0 and stats["approx_kl"] <= 0.01
    assert stats["recovery"] == (case == "recovery") and stats["limit_active"] == (case == "active")
    if case == "free":  # TRPO's own step
        other, record = bandit([1.0, 0.0, -1.0], [1.0, -1.0, 0.0])
        natural_step(method, method.solver, other, record)
        assert torch.allclose(agent.net["policy"].table, other.net["policy"].table)
    elif case == "active":
        assert rise <= max(-violation, 0.0) + 1e-3 and rise + violation < 5e-3 and gain > 0
    else:
        assert rise < -0.05


def test_cpo_without_a_finished_episode_is_a_plain_step():
    run = driver(small("cpo", num_steps=2))
    assert np.isnan(run.constraint.cost).all() and run.constraint.step_violation is None
    assert "recovery" not in run.step()


# -- sequences -------------------------------------------------------------------------------------------------------------------------


def test_a_length_cost_shortens_texts():
    transformers = pytest.importorskip("transformers")
    from markovia.agents.language import LanguageAgent
    from markovia.envs.text.tasks import TextTask
    from markovia.envs.text.tokens import CharTokenizer

    tokenizer = CharTokenizer("ab")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    task = TextTask(prompts=["a", "b"], tokenizer=tokenizer, rewards=lambda completions, **_: [0.1 * len(t) for t in completions], max_new_tokens=8)
    lengths = {}
    for name, weight in (("free", 0.0), ("priced", 1.0)):
        torch.manual_seed(1)
        agent = LanguageAgent(transformers.LlamaForCausalLM(config), tokenizer, max_new_tokens=8)
        method = OnPolicy(
            num_env_steps=10_000, num_envs=32, advantage=LeaveOneOut(), group_size=4, normalize_advantage="none",
            surrogate=find("rloo").value.surrogate, aggregation="seq-mean-token-sum",
            solver=Descent(lr=3e-3, epochs=1, minibatch=None, unit="row", anneal=False),
            constraint=Constraint(cost_limit=(2.0,), dual=FixedDual(weight), mix="plain"),
        )  # fmt: skip
        collector = SequenceCollector(replace(task, group_size=4), 32, cost=lambda r: r.valid.sum(1))
        run = OnPolicyDriver(method, agent, collector)
        seen = [run.step() for _ in range(15)]
        assert seen[0]["cost"] == pytest.approx(seen[0]["length"])
        lengths[name] = np.mean([s["cost"] for s in seen[-3:]])
    assert lengths["priced"] < 0.6 * lengths["free"]


@pytest.mark.parametrize("method_id", ["ddpo", "ppo"])
def test_a_distance_cost_holds_samples_back(method_id):
    far = {}
    for name, weight in (("free", 0.0), ("priced", 3.0)):
        method = override(configure(method_id, "markovia/LinearGaussian-v0"), {"num_env_steps": 100_000, "num_envs": 64})
        constraint = Constraint(cost_limit=(0.5,), dual=FixedDual(weight), mix="plain")
        method = replace(method, constraint=constraint, normalize_advantage="batch" if method_id == "ppo" else "none")
        setup = build("markovia/LinearGaussian-v0", method, 0)
        setup.collector.cost = lambda r: r.outcome["x"].square().sum(-1)  # squared distance from the origin
        run = OnPolicyDriver(method, setup.agent, setup.collector)
        far[name] = np.mean([run.step()["cost"] for _ in range(12)][-3:])
    assert far["priced"] < 0.8 * far["free"]


# -- collection and evaluation -----------------------------------------------------------------------------------------------------------


def test_episode_costs_are_discounted_on_request_and_told_per_column():
    venv = make_vec("markovia/SafeTwoState-v0", 2, seed=0)
    agent = TabularAgent.from_spaces(venv.single_observation_space, venv.single_action_space, num_costs=1)
    agent.net["policy"].table.data[:] = torch.tensor([[50.0, 0.0], [0.0, 0.0]])  # always stays in state 0, cost 1 a step
    for gamma, expected in ((1.0, 100.0), (0.9, (1 - 0.9**100) / 0.1)):
        collector = StepCollector(venv, agent, 120, scale_reward=False, cost_gamma=gamma)
        collector.collect(agent, torch.Generator().manual_seed(0))
        assert list(collector.episode_costs) == [[pytest.approx(expected)]] * 2 and list(collector.episode_lengths) == [100, 100]
    found = evaluate_stepped(agent, "markovia/SafeTwoState-v0", 3, 0)
    assert found["costs"] == [100.0] * 3 == found["returns"]
    plain = TabularAgent.from_spaces(venv.single_observation_space, venv.single_action_space)
    assert "costs" not in evaluate_stepped(plain, "markovia/Tabular-v0", 1, 0, {"S": 2, "A": 2})


@pytest.mark.parametrize("method_id", TRAINED)
def test_presets_know_the_limits_of_the_exact_tasks(method_id):
    for env_id, limit, gamma in ((GRID, 0.5, 0.95), ("markovia/SafeTwoState-v0", 5.0, 0.9)):
        constraint, env = configure(method_id, env_id).constraint, make_vec(env_id).envs[0].unwrapped
        assert constraint.cost_limit == (limit,) == (env.cost_limit,) and constraint.cost_gamma == gamma == env.cost_gamma


def test_the_tasks_limit_and_the_learners_are_the_same():
    settings = small("ppo-lag")
    build(GRID, settings, env_kwargs={"limit": 0.5}), build(GRID, configure("ppo", GRID), env_kwargs={"limit": 0.7})
    two = override(settings, {"constraint": {"cost_limit": [1.0, 2.0]}})
    build(GRID, two, env_kwargs={"limit": 0.7})  # of several limits nobody knows which one is meant
    with pytest.raises(ValueError, match=r"limit=0.7.*0\.5.*--constraint.cost-limit 0.7"):
        build(GRID, settings, env_kwargs={"limit": 0.7})
    with pytest.raises(ValueError, match=r"cost_limit=10.*25.*--constraint.cost-limit 10"):
        build("markovia/SafePendulum-v0", configure("ppo-lag", "markovia/SafePendulum-v0"), env_kwargs={"cost_limit": 10.0})


def test_each_pass_over_a_batch_leaves_the_baselines_alone():
    settings = configure("ppo", GAUSSIAN)
    constraint = Constraint(cost_limit=(0.5,), dual=PIDDual(ki=0.1), optimistic=True)
    solver = replace(settings.solver, epochs=3, recompute_advantage=True)
    settings = replace(settings, num_envs=16, advantage=MovingBaseline(), normalize_advantage="none", constraint=constraint, solver=solver)
    setup = build(GAUSSIAN, settings)
    setup.collector.cost = lambda r: r.outcome["x"].square().sum(-1)
    run = OnPolicyDriver(settings, setup.agent, setup.collector)
    for batches in (1, 2):
        run.step()
        assert [s["batches"] for s in (run.advantage_state, *run.constraint.advantage_states)] == [batches] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: driver(override(small("ppo-lag"), {"constraint": {"cost_limit": [1.0, 2.0]}})).step(), r"1 column\(s\), expected 2"),
        (lambda: driver(small("ppo-lag"), "markovia/Tabular-v0").step(), "puts no 'cost' into info"),
        (lambda: override(configure("ppo-lag", GRID), {"normalize_advantage": "minibatch"}), "before it is mixed"),
        (lambda: override(configure("ppo-lag", GRID), {"constraint": {"dual": {"type": "TrustRegionDual"}}}), "set solver=NaturalGradient"),
        (lambda: override(configure("ppo-lag", GRID), {"constraint": {"cost_limit": [-1.0]}}), "no policy meets"),
        (lambda: configure("trpo-lag", "markovia/Sentiment-v0"), "serves control"),
        (lambda: build(GAUSSIAN, override(configure("ppo-lag", GAUSSIAN), {"constraint": {"cost_gamma": 0.9}})), "no steps to discount"),
        (lambda: OnPolicyDriver(small("ppo-lag"), build(GRID, configure("ppo", GRID)).agent, None), "num_costs equal to the number of limits"),
        (lambda: check_cost([1.0, float("nan")], 2), "sequence 1"),
        (lambda: check_cost([1.0], 2), "2 numbers"),
    ],
)
@pytest.mark.check("bad_input", "ppo-lag", "trpo-lag")
def test_bad_input_is_taught(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_plain_run_on_a_task_with_costs_logs_them():
    run = driver(override(configure("ppo", GRID), SMALL))
    assert any("cost" in run.step() for _ in range(3))


@pytest.mark.slow
def test_pid_holds_the_pendulum_at_its_limit():
    settings = override(
        configure("ppo-lag/pid", "markovia/SafePendulum-v0"),
        {"num_env_steps": 60_000, "advantage": {"gamma": 0.95}, "constraint": {"dual": {"kp": 0.05, "ki": 0.005, "ema_p": 0.0}}},
    )
    run, costs = driver(settings, "markovia/SafePendulum-v0"), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while not run.finished:
            costs.append(run.step()["cost"])
    assert np.mean(costs[:3]) > 100.0 and np.mean(costs[-4:]) < 30.0
