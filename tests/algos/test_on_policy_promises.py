"""What single on-policy methods promise: trust regions, closed forms, penalties that adapt, references that follow."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from gymnasium import spaces
from on_policy_pieces import F64, SMALL, TREE, Given, Watched, after_step, by_rows, record, tree

from markovia.agents.distributions import Categorical, kl, with_params
from markovia.agents.records import Rollout, masked_mean
from markovia.agents.tabular import TabularAgent
from markovia.algos.advantages import GAE, BatchReturn, MovingBaseline
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.fixup import Price
from markovia.algos.on_policy.loss import policy_loss
from markovia.algos.on_policy.method import Constant, Descent, Doubling, DualAscent, NaturalGradient, ValueLoss
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.natural import fisher_product, flatten, natural_step
from markovia.algos.on_policy.references import EMA
from markovia.algos.on_policy.surrogates import Clip, KLDrift, PolicyGradient
from markovia.algos.presets import configure, override


def old_new(agent: Any, rollout: Rollout, old: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        dist = agent.evaluate(rollout, ("dist",)).dist
        return torch.where(rollout.mask, kl(with_params(dist, old), dist), 0.0)


@pytest.mark.parametrize("method_id", ["trpo", "fixpo", "fixpo that stops early", "fixpo without fix-up"])
def test_trust_regions_hold_after_every_iteration(method_id: str) -> None:
    """TRPO bounds the mean KL, FixPO the largest of the batch's states; without the fix-up phase some iterations break the bound."""
    limit = 0.02
    if method_id == "trpo":
        method, setup = tree("trpo", solver=NaturalGradient(kl_limit_nats=limit, damping=1e-3))
    else:
        controller = DualAscent(kl_limit_nats=limit, fixup=method_id != "fixpo without fix-up")
        solver = Descent(lr=0.1, epochs=3, minibatch=None)
        if method_id == "fixpo that stops early":  # after the second of the first epoch's steps
            solver = dataclasses.replace(solver, lr=0.3, minibatch=8, kl_stop_nats=1e-6)
        method, setup = tree("fixpo", solver=solver, controller=controller)
    watched = Watched(setup.collector)
    driver = OnPolicyDriver(method, setup.agent, watched)
    found = []
    for _ in range(6):
        before = setup.agent.net["policy"].table.detach().clone()
        driver.step()
        value = old_new(setup.agent, watched.last, {"logits": before[watched.last.obs]})
        found.append(float(masked_mean(value, watched.last.mask) if method_id == "trpo" else value.max()))
    assert max(found) > 0.0
    assert (max(found) <= limit) == (method_id != "fixpo without fix-up")


@pytest.mark.check("value", "trpo", "trpo/natural")
def test_natural_step_equals_a_direct_solve_with_the_hessian_of_the_mean_kl() -> None:
    delta, damping = 0.01, 0.05
    solver = NaturalGradient(kl_limit_nats=delta, damping=damping, cg_iterations=60, cg_tolerance=1e-26, line_search=False)
    method, setup = tree("trpo/natural", solver=solver)
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    rollout = record(method, setup)
    driver.advantages(rollout, rollout.reward)
    table = setup.agent.net["policy"].table
    start, shape = table.detach().clone().reshape(-1), table.shape

    def mean_kl(flat: torch.Tensor) -> torch.Tensor:
        return kl(Categorical(start.view(shape)[rollout.obs]), Categorical(flat.view(shape)[rollout.obs])).mean()

    def objective(flat: torch.Tensor) -> torch.Tensor:
        logp = flat.view(shape).log_softmax(-1)[rollout.obs, rollout.action]
        return (rollout.columns["adv"] * logp).mean()

    hessian = torch.autograd.functional.hessian(mean_kl, start)
    g = torch.autograd.functional.jacobian(objective, start)
    matrix = hessian + damping * torch.eye(len(start), dtype=F64)
    product = fisher_product(setup.agent, rollout, damping=damping)
    v = torch.randn(len(start), generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(product(v).detach(), matrix @ v, rtol=1e-9, atol=1e-12)
    x = torch.linalg.solve(matrix, g)
    step = torch.sqrt(2 * delta / (x @ matrix @ x)) * x
    natural_step(method, solver, setup.agent, rollout)
    torch.testing.assert_close(table.detach().reshape(-1) - start, step, rtol=1e-7, atol=1e-10)


def test_natural_step_stays_without_a_gradient() -> None:
    method, setup = tree("trpo")
    rollout = record(method, setup)
    rollout.columns["adv"] = torch.zeros_like(rollout.reward)
    before = flatten(setup.agent.parameters("policy")).clone()
    stats = natural_step(method, method.solver, setup.agent, rollout)  # type: ignore[arg-type]
    assert stats["accepted"] == 0.0 and torch.equal(flatten(setup.agent.parameters("policy")), before)


def bandit() -> tuple[TabularAgent, Rollout, torch.Tensor, torch.Tensor]:
    """A bandit of 5 arms with every arm once in the record; weights pi_old make sums over it exact expectations."""
    old = torch.tensor([0.3, -0.5, 0.1, 0.8, -0.2], dtype=F64).log_softmax(-1)
    value = torch.tensor([1.0, 0.2, -0.4, 0.5, 2.0], dtype=F64)
    agent = TabularAgent.from_spaces(spaces.Discrete(1), spaces.Discrete(5), logits=old[None], dtype="float64", critic=False)
    ones = torch.ones(5, 1, dtype=F64)
    rollout = Rollout(
        obs=torch.zeros(5, 1, dtype=torch.long), action=torch.arange(5)[:, None], logp_old=old[:, None], reward=value[:, None], valid=ones > 0,
        mask=ones > 0, continuation=0 * ones, truncated=ones < 0, dist_old={"logits": old.expand(5, 1, 5).clone()},
    )  # fmt: skip
    adv = value - old.exp() @ value
    rollout.columns["adv"] = adv[:, None]
    return agent, rollout, old, adv


@pytest.mark.check("value", "mdpo-on")
def test_mirror_descent_on_a_bandit_reaches_its_closed_form() -> None:
    """With exact advantages the inner problem's optimum is pi_old exp(t A) / Z, for t = 1 / coef."""
    agent, rollout, old, adv = bandit()
    t, steps = 0.5, 250
    method = dataclasses.replace(ON_POLICY["mdpo-on"].value, controller=Constant())
    params = agent.parameters("policy")
    optimizer = torch.optim.Adam(params, lr=0.1)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / steps)
        optimizer.zero_grad()
        policy_loss(method, agent, rollout, old.exp()[:, None], torch.tensor(1 / t), False)[0].backward()
        optimizer.step()
    target = (old + t * adv).softmax(-1)
    assert float((params[0][0].detach().softmax(-1) - target).abs().sum() / 2) < 1e-3


def test_mirror_steps_raise_the_penalty_as_the_budget_is_spent() -> None:
    method, setup = tree("mdpo-on", num_env_steps=64)
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    coefs = [driver.step()["coef"] for _ in range(4)]  # 16 of 64 steps each
    assert coefs == pytest.approx([1.0, 4 / 3, 2.0, 4.0])


@pytest.mark.parametrize(("target", "factor"), [(1e-6, 2.0), (10.0, 0.5)])
@pytest.mark.check("value", "ppo/kl")
def test_adaptive_penalty_doubles_and_halves(target: float, factor: float) -> None:
    method, setup = tree("ppo/kl", solver=Descent(lr=0.05, epochs=4), controller=Doubling(coef=3.0, kl_target_nats=target))
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    driver.step()
    assert driver.coef == 3.0 * factor


def test_adaptive_penalty_measures_the_policy_after_its_last_step() -> None:
    """One full-batch step starts at KL 0; only the KL after it can say whether the step was too large."""
    method, setup = tree("ppo/kl", solver=Descent(lr=0.5, epochs=1, minibatch=None), controller=Doubling(coef=1.0, kl_target_nats=1e-4))
    watched = Watched(setup.collector)
    before = setup.agent.net["policy"].table.detach().clone()
    driver = OnPolicyDriver(method, setup.agent, watched)
    stats = driver.step()
    measured = masked_mean(old_new(setup.agent, watched.last, {"logits": before[watched.last.obs]}), watched.last.mask)
    assert stats["kl_mean"] == pytest.approx(float(measured)) and driver.coef == 2.0


def test_adaptive_penalty_waits_until_the_policy_is_stepped() -> None:
    value = ValueLoss(separate=Descent(epochs=1), pretrain=2)
    method, setup = tree("ppo/kl", controller=Doubling(coef=3.0, kl_target_nats=10.0), value=value)
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    coefs = []
    for _ in range(3):
        driver.step()
        coefs.append(driver.coef)
    assert coefs == [3.0, 3.0, 1.5]
    driver.collector = Given(record(method, setup).rows(torch.arange(0)))  # a filter that keeps no rows
    driver.step()
    assert driver.coef == 1.5


def test_adaptive_penalty_needs_a_penalty() -> None:
    with pytest.raises(ValueError, match=r"Clip has none; use surrogate=KLDrift\(\)"):
        dataclasses.replace(ON_POLICY["ppo"].value, controller=Doubling())


def test_reference_follows_by_an_exponential_average() -> None:
    method, setup = tree("ppo-rlhf", solver=Descent(lr=0.1, epochs=1), refresh=EMA(rate=0.25))
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    start = setup.agent.net["policy"].table.detach().clone()
    driver.step()
    now = setup.agent.net["policy"].table.detach()
    assert not torch.equal(now, start)
    torch.testing.assert_close(driver.references["ref"].net["policy"].table, 0.75 * start + 0.25 * now)


def test_epochs_stop_at_the_kl_limit() -> None:
    steps = {}
    for limit in (None, 1e-6):
        method, setup = tree("ppo", solver=Descent(lr=0.1, epochs=5, minibatch=None, kl_stop_nats=limit))
        driver = OnPolicyDriver(method, setup.agent, setup.collector)
        driver.step()
        steps[limit] = float(driver.updates["main"].optimizer.groups[0].count)
    assert steps[None] == 5 and steps[1e-6] == 2  # the first gradient is taken at ratio 1, the second one sees the change


def test_advantages_are_recomputed_before_each_later_epoch() -> None:
    found = {}
    for again in (False, True):
        method, setup = tree("ppo", advantage=GAE(gamma=0.9), solver=Descent(lr=0.1, epochs=3, minibatch=None, recompute_advantage=again))
        watched = Watched(setup.collector)
        OnPolicyDriver(method, setup.agent, watched).step()
        found[again] = watched.last.columns["adv"]
    assert not torch.allclose(found[False], found[True])


def test_learning_rates_fall_linearly_and_roles_keep_their_own() -> None:
    method, setup = tree("ppo", num_env_steps=64, solver=Descent(lr=0.1, value_lr=0.4))
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    rates = []
    for _ in range(4):
        driver.step()
        rates.append([float(g.lr) for g in driver.updates["main"].optimizer.groups])
    assert rates == [pytest.approx([0.1 * x, 0.4 * x]) for x in (1.0, 0.75, 0.5, 0.25)]
    assert driver.finished


@pytest.mark.check("limit", "ppo")
def test_wide_clip_and_policy_gradient_agree_over_several_epochs() -> None:
    _, setup = tree("ppo")
    rollout = record(ON_POLICY["ppo"].value, setup)
    method = by_rows(override(configure("ppo", TREE), SMALL))
    a, b = (after_step(dataclasses.replace(method, surrogate=s), rollout) for s in (Clip(clip=1e6), PolicyGradient()))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    drifted = after_step(dataclasses.replace(method, surrogate=KLDrift()), rollout)
    assert float((a - drifted).abs().max()) > 1e-8


@pytest.mark.check("limit", "trpo")
def test_a_small_region_needs_no_line_search() -> None:
    """Where the quadratic model is exact the first candidate passes, and TRPO's step is the natural gradient's."""
    found = {}
    for method_id in ("trpo", "trpo/natural"):
        method, setup = tree(method_id)
        rollout = record(method, setup)
        OnPolicyDriver(method, setup.agent, Given(rollout)).advantages(rollout, rollout.reward)
        solver = dataclasses.replace(method.solver, kl_limit_nats=1e-8, damping=1e-1)
        stats = natural_step(method, solver, setup.agent, rollout)  # type: ignore[arg-type]
        found[method_id] = flatten(setup.agent.parameters("policy"))
        assert stats["accepted"] == 1.0 and stats["line_search_steps"] == 0.0
    torch.testing.assert_close(found["trpo"], found["trpo/natural"], rtol=0, atol=0)


@pytest.mark.check("limit", "trpo/natural")
def test_with_much_damping_the_natural_step_points_along_the_gradient() -> None:
    """(F + damping I)^-1 g -> g / damping: the direction of a2c's step, scaled to the region."""
    method, setup = tree("trpo/natural")
    rollout = record(method, setup)
    OnPolicyDriver(method, setup.agent, Given(rollout)).advantages(rollout, rollout.reward)
    params = setup.agent.parameters("policy")
    before = flatten(params).clone()
    logp = setup.agent.evaluate(rollout, ("logp",)).logp
    gradient = flatten(list(torch.autograd.grad((rollout.columns["adv"] * logp).mean(), params)))  # type: ignore[operator]
    solver = dataclasses.replace(method.solver, kl_limit_nats=0.01, damping=1e9)
    natural_step(method, solver, setup.agent, rollout)  # type: ignore[arg-type]
    # s = sqrt(2 delta / (g' g / damping)) g / damping = sqrt(2 delta / damping) g / |g|
    expected = math.sqrt(2 * 0.01 / 1e9) * gradient / gradient.norm()
    torch.testing.assert_close(flatten(params) - before, expected, rtol=1e-6, atol=1e-14)


def two_rows() -> Rollout:
    """Two rows of two decisions with returns 3 and 1."""
    zeros, yes = torch.zeros(2, 2, dtype=F64), torch.ones(2, 2, dtype=torch.bool)
    reward = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=F64)
    return Rollout(zeros.long(), zeros.long(), zeros, reward, yes, yes, torch.tensor([[1.0, 0.0]] * 2, dtype=F64), ~yes)


@pytest.mark.check("value", "rloo/reinforce")
def test_moving_baseline_by_hand() -> None:
    # first batch: no baseline; second: the mean 2 of the first; third: (2 + 2) / 2
    rollout, state = two_rows(), {}
    for baseline in (0.0, 2.0, 2.0):
        adv, ret = MovingBaseline()(rollout.reward, rollout, state)
        assert adv.tolist() == [[3 - baseline] * 2, [1 - baseline] * 2] and ret.tolist() == [[3.0, 3.0], [1.0, 1.0]]


@pytest.mark.check("value", "ddpo")
def test_batch_return_by_hand() -> None:
    # returns 3 and 1: mean 2, deviation sqrt((1 + 1) / (2 - 1))
    rollout = two_rows()
    assert BatchReturn(scale=False)(rollout.reward, rollout, {})[0].tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    assert BatchReturn()(rollout.reward, rollout, {})[0][:, 0].tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])
    assert BatchReturn(scale=False, clip=0.5)(rollout.reward, rollout, {})[0].tolist() == [[0.5, 0.5], [-0.5, -0.5]]
    assert BatchReturn(scale=False, reward_to_go=True)(rollout.reward, rollout, {})[0].tolist() == [[1.0, 0.5], [-1.0, -0.5]]


@pytest.mark.check("value", "fixpo")
def test_dual_step_by_hand() -> None:
    """The gradient is limit - safety max KL = 0.2 - 3 = -2.8, and Adam's first step the learning rate against its sign; never below 0."""
    price = Price(DualAscent(kl_limit_nats=0.2, safety=3.0, lr=0.1))
    assert price.step(torch.tensor(1.0, dtype=F64)) == pytest.approx(1.1, abs=1e-6)
    for _ in range(60):  # no KL at all: the first step's momentum fades, and the price falls to 0
        price.step(torch.tensor(0.0, dtype=F64))
    assert price.coef == 0.0
