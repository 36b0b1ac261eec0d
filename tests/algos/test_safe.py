"""Constraint handling: multipliers, mixing, soft termination and CPO's program by hand and against the linear program's optimum and its dual."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from markovia.algos.advantages import gae
from markovia.algos.safe.constraint import (
    ChanceShield,
    Constraint,
    centred,
    checked_cost,
    discounted_limit,
    effective_horizon,
    limits,
    mix_advantages,
)
from markovia.algos.safe.dual import BarrierDual, FixedDual, PIDDual, TrustRegionDual, augmented, gradient, optimistic, pid
from markovia.algos.safe.exact import (
    action_values,
    constrained_policy_optimisation,
    descent_ascent,
    fisher,
    mean_kl,
    primal_dual,
    reload,
    terminating,
)
from markovia.algos.safe.termination import SoftTermination, running_scale, soft_probability, soften, termination_probability
from markovia.algos.safe.trust_region import acceptable, trust_region_dual
from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.cmdps import GRID_HAZARDS, cmdp_grid, cmdp_two_state
from markovia.envs.exact.tabular import TabularMDP


def weights(dual, costs, limit):
    state, out = dual.start(len(np.atleast_1d(limit))), []
    for c in costs:
        state, w = dual.update(json.loads(json.dumps(state)), np.atleast_1d(c), np.atleast_1d(limit))  # the state is plain JSON
        out.append(w)
    return np.array(out)


# -- multipliers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "ppo-lag", "ppo-lag/pid")
def test_pid_by_hand():
    dual = PIDDual(kp=1.0, ki=0.5, kd=2.0, ema_p=0.5, ema_d=0.5, delay=2, init=0.0)
    # cost 3: e 2, I 1.0, P 1, E 1.5,  D 1.5 - 0    -> 1 + 1.0 + 3.0 = 5
    # cost 2: e 1, I 1.5, P 1, E 1.75, D 1.75 - 0   -> 1 + 1.5 + 3.5 = 6
    # cost 0: e-1, I 1.0, P 0, E .875, D [.875-1.5] -> 0 + 1.0 + 0   = 1
    np.testing.assert_allclose(weights(dual, [3.0, 2.0, 0.0], 1.0)[:, 0], [5.0, 6.0, 1.0])
    np.testing.assert_allclose(weights(replace(dual, weight_max=2.0), [3.0, 2.0, 0.0], 1.0)[:, 0], [2.0, 2.0, 1.0])
    assert weights(dual, [0.0], 1.0)[0, 0] == 0.0  # never negative


def test_gradient_is_torchs_adam_with_a_clamp():
    costs, lam = [40.0, 10.0, 60.0, 0.0, 0.0, 0.0, 30.0], torch.tensor(0.001, dtype=torch.float64, requires_grad=True)
    optimizer, expected = torch.optim.Adam([lam], lr=0.035), []
    for c in costs:
        optimizer.zero_grad()
        (-lam * (c - 25.0)).backward()
        optimizer.step()
        lam.data.clamp_(min=0.0)
        expected.append(lam.item())
    np.testing.assert_allclose(weights(gradient(), costs, 25.0)[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(weights(gradient(0.1, 0.0, "sgd"), [3.0, 0.0, 5.0], 1.0)[:, 0], [0.2, 0.1, 0.5])


@pytest.mark.check("limit", "ppo-lag/pid")
def test_optimistic_and_augmented_are_gains_of_the_controller():
    costs, eta = np.array([3.0, 1.5, 2.0, 4.0, 0.5]), 0.1
    lam, last, expected = 0.0, 0.0, []
    for e in costs - 1.0:
        lam, last = lam + eta * (2 * e - last), e
        expected.append(lam)
    np.testing.assert_allclose(weights(optimistic(eta), costs, 1.0)[:, 0], expected)
    lam, expected = 0.0, []
    for e in costs - 2.0:
        lam = max(lam + eta * e, 0.0)
        expected.append(max(lam + 10.0 * e, 0.0))
    np.testing.assert_allclose(weights(augmented(10.0, eta), costs, 2.0)[:, 0], expected)


def test_log_space_stays_positive_and_follows_its_gradient():
    found = weights(PIDDual(ki=0.1, init=0.5, space="log"), [3.0, -1.0], 1.0)[:, 0]
    first = 0.5 * np.exp(0.1 * 0.5 * 2.0)
    np.testing.assert_allclose(found, [first, first * np.exp(0.1 * first * -2.0)])


def test_barrier_fixed_and_several_costs():
    np.testing.assert_allclose(weights(BarrierDual(t=20.0, floor=1e-3), [[0.0, 4.0]], [0.5, 2.0])[0], [0.1, 50.0])
    np.testing.assert_allclose(weights(FixedDual(0.1), [[9.0, 9.0]], [1.0, 1.0])[0], [0.1, 0.1])
    both = weights(pid(), [[3.0, 0.0], [1.0, 2.0]], [1.0, 1.0])
    np.testing.assert_allclose(both[:, 0], weights(pid(), [3.0, 1.0], 1.0)[:, 0])
    np.testing.assert_allclose(both[:, 1], weights(pid(), [0.0, 2.0], 1.0)[:, 0])


def test_a_proportional_part_ends_the_swing_of_a_linear_problem():
    """max x on [0, 1] with x <= 0.5, by ascent on x - w (x - 0.5)."""
    swing = {}
    for penalty in (0.0, 1.0, 10.0):
        dual, x, seen = augmented(penalty, 0.02), 0.0, []
        state = dual.start(1)
        for _ in range(3000):
            state, (w,) = dual.update(state, [x], [0.5])
            x = min(max(x + 0.02 * (1.0 - w), 0.0), 1.0)
            seen.append(x)
        swing[penalty] = np.abs(np.array(seen[-500:]) - 0.5).max()
    assert swing[0.0] > 0.4 and swing[1.0] < 1e-2 and swing[10.0] < 1e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PIDDual(ki=-1.0), "gains"),
        (lambda: PIDDual(ema_p=1.0), r"\[0, 1\)"),
        (lambda: PIDDual(space="log", init=0.0), "log space"),
        (lambda: PIDDual(weight_max=0.0), "weight_max"),
        (lambda: BarrierDual(t=0.0), "t and floor"),
        (lambda: FixedDual(-1.0), "reward cost"),
        (lambda: weights(pid(), [float("nan")], 1.0), "NaN in info"),
        (lambda: weights(pid(), [[1.0, 2.0]], 1.0), "one limit per cost"),
        (lambda: limits(-1.0), "no policy meets"),
        (lambda: limits((25.0, float("nan"))), "must be >= 0"),
        (lambda: limits(()), "one number per cost"),
        (lambda: Constraint(cost_limit=-5.0), "no policy meets"),
        (lambda: Constraint(cost_gamma=1.5), "cost_gamma must lie"),
        (lambda: Constraint(cost_gamma=0.9, shield=ChanceShield()), "plain sum"),
        (lambda: Constraint(aim=0.0), "share of the limit"),
        (lambda: Constraint(cost_limit=(1.0, 2.0), dual=TrustRegionDual()), "serves one cost"),
        (lambda: TrustRegionDual(tolerance=-1.0), "tolerance and margin_lr"),
        (lambda: Constraint(termination=SoftTermination()), "FixedDual"),
        (lambda: discounted_limit(25.0, 1.5, 10), "gamma in"),
        (lambda: checked_cost(None, 1), "puts no 'cost' into info"),
        (lambda: checked_cost(torch.zeros(2, 3, 2), 1), r"2 column\(s\) but 1 limit"),
        (lambda: checked_cost(torch.full((2, 3, 1), torch.nan), 1), "NaN or infinity"),
        (lambda: mix_advantages(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.tensor([-1.0])), "must be >= 0"),
        (lambda: mix_advantages(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.tensor([2.0]), "difference"), "weight_max=1"),
        (lambda: mix_advantages(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.tensor([2.0]), "product"), "must be 'sum'"),
        (lambda: SoftTermination(p_max=1.5), "p_max"),
        (lambda: trust_region_dual(-1.0, 0.0, 1.0, 0.0, delta=0.1), "raise its damping"),
        (lambda: trust_region_dual(1.0, 0.0, 1.0, 0.0, delta=0.0), "delta must be > 0"),
        (lambda: constrained_policy_optimisation(CMDP(TabularMDP.random(2, 2), np.ones((2, 2, 2)), [9.0, 9.0])), "one constraint"),
    ],
)
@pytest.mark.check("bad_input", "ppo-lag", "ppo-lag/pid", "cpo", "cat")
def test_bad_input_is_taught(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- limits and mixing -------------------------------------------------------------------------------------------------------------------


def test_limits_and_their_discounted_form_by_hand():
    assert discounted_limit(10.0, 0.5, 2) == 7.5  # 10 (1 - 1/4) / (1/2 * 2)
    assert discounted_limit(25.0, 1.0, 1000) == 25.0
    # It is the discounted cost of an even stream: 25 / 100 a step for 100 steps.
    assert discounted_limit(25.0, 0.9, 100) == pytest.approx(sum(0.25 * 0.9**t for t in range(100)))
    assert effective_horizon(0.5, 2) == 1.5 and effective_horizon(1.0, 7.5) == 7.5 and effective_horizon(0.0, 9) == 1.0
    # A limit of a discounted cost: the same stream, so nothing is left to do where both discounts are the same.
    assert discounted_limit(100.0, 0.99, 1000, cost_gamma=0.99) == 100.0
    assert discounted_limit(3.0, 1.0, 2, cost_gamma=0.5) == 4.0  # 2 a step cost 2 + 1
    assert Constraint(cost_limit=(25.0, 0.0)).num_costs == 2 and Constraint().limits.tolist() == [25.0]


@pytest.mark.check("value", "ppo-lag", "trpo-lag")
@pytest.mark.check("limit", "ppo-lag", "trpo-lag")
def test_mixing_by_hand_and_its_limit_cases():
    adv, cost_adv = torch.tensor([[2.0]]), torch.tensor([[[1.0, -1.0]]])
    w = torch.tensor([0.5, 1.0])  # priced: 0.5 - 1 = -0.5
    assert mix_advantages(adv, cost_adv, w).item() == pytest.approx(2.5 / 2.5)
    assert mix_advantages(adv, cost_adv, w, "plain").item() == pytest.approx(2.5)
    assert mix_advantages(adv, cost_adv, w / 4, "difference").item() == pytest.approx(0.625 * 2.0 + 0.125)
    for how in ("sum", "plain", "difference"):
        assert torch.equal(mix_advantages(adv, cost_adv, torch.zeros(2), how), adv)  # weight 0 is the parent, bit for bit
    rng = torch.Generator().manual_seed(0)
    adv, cost_adv = torch.randn(3, 4, generator=rng), torch.randn(3, 4, 2, generator=rng)
    assert torch.allclose(mix_advantages(adv, cost_adv, w), (adv - 0.5 * cost_adv[..., 0] - cost_adv[..., 1]) / 2.5)


def test_cost_advantages_are_centred_over_the_mask_only():
    cost_adv = torch.tensor([[[1.0, 10.0], [3.0, 30.0]], [[5.0, 50.0], [99.0, 99.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    out = centred(cost_adv, mask)
    assert torch.equal(out[mask], torch.tensor([[-2.0, -20.0], [0.0, 0.0], [2.0, 20.0]]))


# -- constraints as terminations -----------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "cat")
def test_termination_probability_by_hand():
    cost, scale, p_max = torch.tensor([[0.0, -1.0], [1.0, -5.0], [8.0, 1.0]]), torch.tensor([4.0, 2.0]), torch.tensor([1.0, 0.3])
    # 0 | 0.25 * 1 | max(1 (clipped), 0.5 * 0.3)
    assert torch.allclose(termination_probability(cost, scale, p_max), torch.tensor([0.0, 0.25, 1.0]))
    # p_min 0.1: 0.1 + 0.25 * 0.9 = 0.325
    assert torch.allclose(termination_probability(cost, scale, p_max, p_min=0.1), torch.tensor([0.0, 0.325, 1.0]))


def test_scale_curriculum_and_record_by_hand():
    first = running_scale(None, torch.tensor([[1.0, -3.0], [4.0, -1.0]]))
    assert torch.allclose(first, torch.tensor([4.0, 1e-6]))
    assert running_scale(first, torch.tensor([[2.0, 0.0]]), tau=0.5)[0].item() == 3.0
    # signed costs that hold count as none: 4 / 2, not (4 - 6) / 2
    assert running_scale(first, torch.tensor([[-6.0, 0.0]]), tau=0.5)[0].item() == pytest.approx(2.0, abs=1e-5)
    assert soft_probability(0.0) == pytest.approx(0.05) and soft_probability(1.0) == pytest.approx(0.25)
    assert soft_probability(0.5) == pytest.approx(1 / 12)  # 1/p half-way from 20 to 4
    # Two environments, two steps: scales 2 and 0.5 * 2 + 0.5 * 6 = 4.
    delta, scale = SoftTermination(tau=0.5).delta(torch.tensor([[[2.0], [1.0]], [[1.0], [6.0]]]), None)
    assert torch.allclose(delta, torch.tensor([[1.0, 0.25], [0.5, 1.0]])) and scale.item() == 4.0
    half = SoftTermination(p_max=0.25, curriculum=True).probabilities(2, 0.5)
    assert torch.allclose(half.double(), torch.full((2,), 1 / 12, dtype=torch.float64))


@pytest.mark.check("limit", "cat")
def test_soft_termination_is_the_mean_over_coin_flips():
    rng = torch.Generator().manual_seed(1)
    reward, value, delta = (torch.rand(1, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    cut, boot = torch.tensor([[False, False, False, True]]), torch.full((1, 4), 0.7, dtype=torch.float64)
    soft_reward, soft_continuation = soften(reward, torch.ones(1, 4, dtype=torch.float64), delta)
    soft = gae(soft_reward, value, soft_continuation, cut, boot, gamma=0.9, lam=0.8)[0]
    mean = torch.zeros(1, 4, dtype=torch.float64)
    for flips in itertools.product([0.0, 1.0], repeat=4):
        z = torch.tensor([flips], dtype=torch.float64)
        chance = torch.where(z == 1, delta, 1 - delta).prod()
        mean += chance * gae(reward * (1 - z), value, 1 - z, cut, boot, gamma=0.9, lam=0.8)[0]
    assert torch.allclose(soft, mean, atol=1e-12)
    negative, _ = soften(torch.tensor([-1.0]), torch.ones(1), torch.tensor([0.0]))
    assert negative.item() == 0.0  # or ending would pay


def test_certain_termination_is_an_mdp_with_terminal_hazards():
    problem = cmdp_grid()
    unsafe = np.isin(np.arange(25), GRID_HAZARDS)
    soft = terminating(problem, unsafe, 1.0)
    policy = TabularMDP.random(25, 4, seed=3).policy_iteration()[0] * 0.7 + 0.075
    found = soft.V(np.vstack([policy, np.full((1, 4), 0.25)]))[:25]
    # Independently: V = r_pi + gamma P_pi (V without the hazards' values).
    P_pi = np.einsum("sa,sat->st", policy, problem.mdp.P) * ~unsafe
    expected = np.linalg.solve(np.eye(25) - 0.95 * P_pi, (policy * problem.mdp.R).sum(-1))
    np.testing.assert_allclose(found, expected, atol=1e-8)
    free = terminating(problem, unsafe, 0.0)
    np.testing.assert_allclose(free.V(np.vstack([policy, np.full((1, 4), 0.25)]))[:25], problem.mdp.V(policy), atol=1e-12)


# -- CPO's program -------------------------------------------------------------------------------------------------------------------------


def best_in_disc(g, b, c, delta):
    """Independent solution in 2-D with H = I: the tip along g if it is allowed, else the better end of the chord; None where nothing is allowed."""
    radius, size = np.sqrt(2 * delta), np.linalg.norm(b)
    tip = radius * g / np.linalg.norm(g)
    if c + b @ tip <= 1e-12:
        return tip
    foot, along = -c * b / size**2, np.array([-b[1], b[0]]) / size
    half = radius**2 - foot @ foot
    if half < 0:
        return None
    return max((foot + sign * np.sqrt(half) * along for sign in (1, -1)), key=lambda d: g @ d)


def test_closed_form_equals_the_disc_and_half_plane_in_2000_instances():
    rng, delta, cases = np.random.default_rng(0), 0.02, set()
    for _ in range(2000):
        g, b, c = rng.normal(size=2), rng.normal(size=2), rng.normal(0.0, 0.2)
        L = np.linalg.cholesky((m := rng.normal(size=(2, 2))) @ m.T + 0.3 * np.eye(2))
        H = L @ L.T
        x, p = np.linalg.solve(H, g), np.linalg.solve(H, b)
        found = trust_region_dual(g @ x, g @ p, b @ p, c, delta=delta)
        step = found.along_x * x + found.along_p * p
        cases.add(found.case)
        # In the coordinates L' D the trust region is a disc.
        expected = best_in_disc(np.linalg.solve(L, g), np.linalg.solve(L, b), c, delta)
        assert 0.5 * step @ H @ step <= delta * (1 + 1e-6)
        if expected is None:
            assert found.case == "recovery" and c > 0
            assert b @ step == pytest.approx(-np.sqrt(2 * delta * (b @ p)))  # the steepest fall of the cost
        else:
            assert found.case in ("free", "inactive", "active")
            assert c + b @ step <= 1e-9
            assert g @ step == pytest.approx(np.linalg.solve(L, g) @ expected, abs=1e-9)
            # The Lagrangian is stationary: g = kappa H D + nu b, and the multiplier is 0 off the limit.
            np.testing.assert_allclose(g, found.kappa * H @ step + found.nu * b, atol=1e-7)
            assert found.nu >= 0 and abs(found.nu * (c + b @ step)) < 1e-9
    assert cases == {"free", "inactive", "active", "recovery"}


@pytest.mark.check("limit", "cpo")
def test_the_special_cases_of_the_program():
    g = b = np.array([2.0, 0.0])
    q = float(g @ g)
    for c, case in ((-0.1, "edge"), (0.1, "edge")):  # parallel gradients: on the limit nothing is better than anything else
        found = trust_region_dual(q, q, q, c, delta=0.02)
        assert found.case == case and c + b @ (found.along_x * g + found.along_p * b) == pytest.approx(0.0, abs=1e-12)
    opposed = trust_region_dual(q, -q, q, -0.1, delta=0.02)  # rewards and safety agree: plain trust-region step
    assert opposed.case == "inactive" and opposed.along_x == pytest.approx(np.sqrt(0.04 / q)) and opposed.nu == 0.0
    assert trust_region_dual(q, 0.0, 0.0, -1.0, delta=0.02).case == "free"  # no cost gradient, limit met
    assert trust_region_dual(q, 0.0, 0.0, 1.0, delta=0.02)[:3] == ("stay", 0.0, 0.0)  # no cost gradient, limit missed
    assert trust_region_dual(q, 0.0, 4.0, -9.0, delta=0.02).case == "free"  # the limit is out of reach
    assert trust_region_dual(q, 0.0, 4.0, 9.0, delta=0.02).case == "recovery"
    still = trust_region_dual(0.0, 0.0, 4.0, 0.1, delta=0.02)  # no reward gradient: only what safety needs
    assert still.along_x == 0.0 and 0.1 + 4.0 * still.along_p == pytest.approx(0.0)
    assert trust_region_dual(0.0, 0.0, 4.0, -0.1, delta=0.02)[1:3] == (0.0, 0.0)
    touching = trust_region_dual(4.0, 0.0, 1.0, 0.2, delta=0.02)  # c^2 / s = 2 delta: one point is left
    assert touching.along_p == pytest.approx(-0.2) and abs(touching.along_x) < 1e-6


@pytest.mark.check("value", "cpo")
def test_line_search_conditions_by_hand():
    ok = {"kl": 0.01, "gain": 1.0, "cost_change": 0.0, "violation": -0.5, "delta": 0.01, "tolerance": 0.0}
    assert acceptable(**ok)
    assert not acceptable(**{**ok, "kl": 0.011})
    assert not acceptable(**{**ok, "gain": 0.0})
    assert acceptable(**{**ok, "gain": -1.0, "violation": 0.0})  # while the limit is missed, safety goes first
    assert acceptable(**{**ok, "cost_change": 0.5}) and not acceptable(**{**ok, "cost_change": 0.6})
    missed = {**ok, "cost_change": 0.1, "violation": 0.2}
    assert not acceptable(**missed) and acceptable(**{**missed, "tolerance": 0.1})


# -- on problems with a known optimum --------------------------------------------------------------------------------------------------------


def test_fisher_is_the_curvature_of_the_mean_kl():
    rng = np.random.default_rng(0)
    logits, d = rng.normal(size=(3, 4)), rng.dirichlet(np.ones(3))
    policy = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    move = rng.normal(size=(3, 4))
    kl = lambda t: mean_kl(policy, (z := np.exp(logits + t * move)) / z.sum(-1, keepdims=True), d)  # noqa: E731
    curvature = (kl(1e-3) + kl(-1e-3)) / 1e-6
    assert move.ravel() @ fisher(policy, d, 0.0) @ move.ravel() == pytest.approx(curvature, rel=1e-5)


def test_proportional_gain_reaches_the_programs_optimum_and_multiplier():
    problem = cmdp_grid()
    swinging = primal_dual(problem, PIDDual(ki=0.05, init=0.0), iterations=500)
    settled = primal_dual(problem, PIDDual(kp=0.5, ki=0.05, init=0.0), iterations=500)
    assert np.abs(swinging.cost[-200:, 0] - 0.5).max() > 0.3
    assert np.abs(settled.cost[200:, 0] - 0.5).max() < 1e-3
    assert settled.value[-1] == pytest.approx(0.678001, abs=1e-3) and settled.weight[-1, 0] == pytest.approx(0.300297, abs=1e-3)


def test_several_constraints_reach_their_prices():
    mdp = TabularMDP.random(4, 3, 0.8, seed=6)
    rng = np.random.default_rng(2)
    problem = CMDP(mdp, rng.random((2, 4, 3)), np.array([9.0, 9.0]))
    free = problem.costs(mdp.policy_iteration()[0])
    problem = replace(problem, budgets=free * np.array([0.85, 0.9]))
    oracle = problem.solve()
    assert (oracle.multipliers > 0.05).all()
    trace = primal_dual(problem, PIDDual(kp=3.0, ki=0.3, init=0.0), iterations=1000)
    np.testing.assert_allclose(trace.cost[-1], problem.budgets, atol=1e-5)
    np.testing.assert_allclose(trace.weight[-1], oracle.multipliers, atol=1e-5)
    assert trace.value[-1] == pytest.approx(oracle.value, abs=1e-5)


@pytest.mark.check("value", "reload")
@pytest.mark.check("limit", "reload")
def test_reload_settles_where_descent_ascent_cycles():
    problem = cmdp_two_state()
    plain = descent_ascent(problem, step=0.3, dual_step=0.05, iterations=800)
    optimistic_ = reload(problem, step=0.3, dual_step=0.05, iterations=800)
    assert np.abs(plain.cost[-200:, 0] - 5.0).max() > 4.0
    assert np.abs(optimistic_.cost[-200:, 0] - 5.0).max() < 1e-3 and np.abs(optimistic_.value[-200:] - 5.0).max() < 1e-3
    # The first step has no memory, so both begin alike.
    np.testing.assert_array_equal(plain.value[:2], optimistic_.value[:2])


def test_cpo_recovers_meets_the_limit_and_finds_the_price():
    problem = cmdp_grid()
    _, (q_c,) = action_values(problem, problem.mdp.uniform_policy())
    reckless = q_c - q_c.mean(-1, keepdims=True)  # prefers what costs
    trace = constrained_policy_optimisation(problem, iterations=120, damping=1e-6, logits=reckless)
    assert trace.cost[0, 0] > 1.0 and "recovery" in trace.cases
    assert (trace.cost[40:, 0] <= 0.52).all()
    assert trace.value[-1] == pytest.approx(0.678001, abs=2e-3) and trace.weight[-1, 0] == pytest.approx(0.300297, abs=1e-3)
