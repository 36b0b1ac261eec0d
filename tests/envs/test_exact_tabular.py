"""Tabular and constrained MDPs, against hand-solved cases, finite differences, brute force and independent programs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import softmax

from markovia.envs.exact import CMDP, TabularMDP


def two_states():
    """State 0: stay (reward 0) or go (reward 1) to state 1, which returns nothing for ever. gamma 0.9."""
    P = np.zeros((2, 2, 2))
    P[0, 0, 0] = P[0, 1, 1] = P[1, :, 1] = 1
    return TabularMDP(P, np.array([[0.0, 1.0], [0.0, 0.0]]), 0.9, np.array([1.0, 0.0]))


def test_values_by_hand():
    """Uniform policy: V0 = (0 + 0.9 V0)/2 + 1/2, so V0 = 0.5/0.55 = 10/11."""
    mdp = two_states()
    policy = mdp.uniform_policy()
    np.testing.assert_allclose(mdp.V(policy), [10 / 11, 0], atol=1e-14)
    np.testing.assert_allclose(mdp.Q(policy), [[9 / 11, 1], [0, 0]], atol=1e-14)
    np.testing.assert_allclose(mdp.A(policy), [[-1 / 11, 1 / 11], [0, 0]], atol=1e-14)
    # visits to state 0: 1/(1 - 0.45) = 20/11 of 10 in all
    np.testing.assert_allclose(mdp.occupancy(policy), [2 / 11, 9 / 11], atol=1e-14)
    assert mdp.J(policy) == pytest.approx(10 / 11, abs=1e-14)
    best, values = mdp.policy_iteration()
    np.testing.assert_allclose(values, [1, 0], atol=1e-14)
    np.testing.assert_array_equal(best[0], [0, 1])


def test_return_is_the_occupancys_mean_reward_and_a_long_rollout_of_the_chain():
    mdp = TabularMDP.random(5, 3, 0.8, seed=1)
    policy = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    d = mdp.occupancy(policy)
    assert d.sum() == pytest.approx(1, abs=1e-13)
    assert mdp.J(policy) == pytest.approx((d[:, None] * policy * mdp.R).sum() / 0.2, abs=1e-12)
    state, total = mdp.rho, 0.0
    for t in range(200):
        total += 0.8**t * (state[:, None] * policy * mdp.R).sum()
        state = np.einsum("s,sa,sat->t", state, policy, mdp.P)
    assert mdp.J(policy) == pytest.approx(total, abs=1e-12)


def test_optimum_against_every_deterministic_policy():
    for seed in range(3):
        mdp = TabularMDP.random(4, 3, 0.9, seed)
        brute = max(mdp.J(np.eye(3)[list(choice)]) for choice in itertools.product(range(3), repeat=4))
        policy, values = mdp.policy_iteration()
        assert mdp.J(policy) == pytest.approx(brute, abs=1e-12)
        np.testing.assert_allclose(mdp.value_iteration()[1], values, atol=1e-9)
        np.testing.assert_array_equal(mdp.value_iteration()[0], policy)


def test_policy_iteration_ends_on_ties():
    mdp = replace(TabularMDP.random(5, 3, 0.99, 0), R=np.ones((5, 3)))
    np.testing.assert_allclose(mdp.policy_iteration()[1], 100, atol=1e-9)


def test_soft_optimum_is_stationary_and_has_its_limits():
    mdp = TabularMDP.random(5, 3, 0.9, seed=2)
    ref = np.random.default_rng(1).dirichlet(np.ones(3), 5)
    policy, values = mdp.soft_value_iteration(0.3, ref)

    def soft_values(pi):  # regularised values by plain linear algebra, the penalty as a cost
        return replace(mdp, R=mdp.R - 0.3 * (pi * np.log(pi / ref)).sum(-1, keepdims=True)).V(pi)

    np.testing.assert_allclose(soft_values(policy), values, atol=1e-8)
    rng = np.random.default_rng(3)
    for _ in range(20):
        other = softmax(np.log(policy) + 0.3 * rng.standard_normal(policy.shape), axis=-1)
        assert (soft_values(other) <= values + 1e-8).all()
    np.testing.assert_allclose(mdp.soft_value_iteration(1e-4, ref)[1], mdp.policy_iteration()[1], atol=0.01)
    np.testing.assert_allclose(mdp.soft_value_iteration(1e5, ref)[0], ref, atol=1e-4)
    # without a reference entropy is paid: KL to the uniform policy, and 0.3 log 3 more in every one of the 1 / (1 - 0.9) steps
    plain, uniform = mdp.soft_value_iteration(0.3), mdp.soft_value_iteration(0.3, mdp.uniform_policy())
    np.testing.assert_allclose(plain[0], uniform[0], atol=1e-8)
    np.testing.assert_allclose(plain[1], uniform[1] + 0.3 * np.log(3) * 10, atol=1e-8)


def test_gradient_and_hessian_against_finite_differences():
    mdp = TabularMDP.random(4, 3, 0.9, seed=5)
    logits = np.random.default_rng(5).standard_normal((4, 3))
    gradient, hessian = np.zeros(12), np.zeros((12, 12))
    for i in range(12):
        step = (1e-5 * np.eye(12)[i]).reshape(4, 3)
        up, down = logits + step, logits - step
        gradient[i] = (mdp.J(softmax(up, axis=-1)) - mdp.J(softmax(down, axis=-1))) / 2e-5
        hessian[i] = (mdp.policy_gradient(up) - mdp.policy_gradient(down)).ravel() / 2e-5
    np.testing.assert_allclose(mdp.policy_gradient(logits).ravel(), gradient, atol=1e-8)
    ours = mdp.policy_hessian(logits)
    np.testing.assert_allclose(ours, hessian, atol=1e-8)
    np.testing.assert_allclose(ours, ours.T, atol=1e-12)


def test_gradient_against_autograd():
    torch = pytest.importorskip("torch")
    mdp = TabularMDP.random(3, 2, 0.7, seed=6)
    logits = np.random.default_rng(6).standard_normal((3, 2))

    def J(theta):
        pi, P, R = theta.softmax(-1), torch.from_numpy(mdp.P), torch.from_numpy(mdp.R)
        flow = torch.eye(3, dtype=torch.float64) - 0.7 * torch.einsum("sa,sat->st", pi, P)
        return torch.from_numpy(mdp.rho) @ torch.linalg.solve(flow, (pi * R).sum(-1))

    theta = torch.from_numpy(logits).requires_grad_()
    np.testing.assert_allclose(mdp.policy_gradient(logits), torch.autograd.grad(J(theta), theta)[0].numpy(), atol=1e-12)
    hessian = torch.autograd.functional.hessian(J, theta).reshape(6, 6).numpy()
    np.testing.assert_allclose(mdp.policy_hessian(logits), hessian, atol=1e-12)


def test_cmdp_by_hand():
    """One state, gamma 0: reward (1, 0), cost (1, 0), budget 0.3: go 30 % of the time, price 1."""
    mdp = TabularMDP(np.ones((1, 2, 1)), np.array([[1.0, 0.0]]), 0.0, np.ones(1))
    solution = CMDP(mdp, np.array([[1.0, 0.0]]), np.array([0.3])).solve()
    np.testing.assert_allclose(solution.policy, [[0.3, 0.7]], atol=1e-12)
    assert solution.value == pytest.approx(0.3, abs=1e-12)
    np.testing.assert_allclose(solution.multipliers, [1.0], atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_cmdp_optimum_against_its_dual_program(seed):
    """The dual LP in (V, lam): min rho.V + lam d, V >= R - lam C + gamma P V, lam >= 0, has the same value."""
    cmdp = CMDP.random(5, 3, 0.9, seed)
    mdp, solution = cmdp.mdp, cmdp.solve()
    A_ub = np.concatenate([mdp.gamma * mdp.P.reshape(15, 5) - np.repeat(np.eye(5), 3, axis=0), -cmdp.C.reshape(1, 15).T], axis=1)
    dual = linprog(np.concatenate([mdp.rho, cmdp.budgets]), A_ub=A_ub, b_ub=-mdp.R.ravel(), bounds=[(None, None)] * 5 + [(0, None)])
    assert solution.value == pytest.approx(dual.fun, abs=1e-8)
    np.testing.assert_allclose(solution.multipliers, dual.x[5:], atol=1e-7)
    np.testing.assert_allclose(solution.costs, cmdp.budgets, atol=1e-8)  # the random budget binds
    assert solution.occupancy.sum() == pytest.approx(10, abs=1e-8)
    # strong duality: no policy does better in the MDP with the priced cost
    priced = cmdp.lagrangian(solution.multipliers)
    assert priced.rho @ priced.policy_iteration()[1] + solution.multipliers @ cmdp.budgets == pytest.approx(solution.value, abs=1e-8)


def test_multiplier_is_the_derivative_of_the_value_in_each_budget():
    mdp, rng = TabularMDP.random(5, 3, 0.9, 7), np.random.default_rng(7)
    C = rng.random((2, 5, 3))
    free = CMDP(mdp, C, [1e3, 1e3])
    slack = free.solve()
    np.testing.assert_array_equal(slack.multipliers, [0, 0])
    assert slack.value == pytest.approx(mdp.rho @ mdp.policy_iteration()[1], abs=1e-9)
    safe = free.costs(replace(mdp, R=-C.sum(0)).policy_iteration()[0])
    budgets = (slack.costs + safe) / 2  # occupancies are convex, so halfway is feasible
    prices = replace(free, budgets=budgets).solve().multipliers
    assert prices.max() > 0.01
    for k in range(2):
        h = 1e-4 * np.eye(2)[k]
        up, down = (replace(free, budgets=budgets + sign * h).solve().value for sign in (1, -1))
        assert (up - down) / 2e-4 == pytest.approx(prices[k], abs=1e-6)


def test_one_cost_against_a_scan_of_mixtures():
    """With one constraint an optimum mixes two deterministic policies' occupancies: scan every pair."""
    cmdp = CMDP.random(3, 2, 0.8, seed=3)
    points = [(cmdp.mdp.J(p), cmdp.costs(p)[0]) for p in (np.eye(2)[list(c)] for c in itertools.product(range(2), repeat=3))]
    best = max(value for value, cost in points if cost <= cmdp.budgets[0])
    for (v1, c1), (v2, c2) in itertools.permutations(points, 2):
        if c1 < cmdp.budgets[0] < c2:
            w = (cmdp.budgets[0] - c1) / (c2 - c1)
            best = max(best, (1 - w) * v1 + w * v2)
    assert cmdp.solve().value == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TabularMDP(np.ones((2, 2, 2)), np.ones((2, 2)), 0.9, np.ones(2) / 2), "P must hold probabilities"),
        (lambda: TabularMDP(np.ones((2, 2)), np.ones((2, 2)), 0.9, np.ones(2) / 2), r"P must have shape \(S, A, S\)"),
        (lambda: replace(two_states(), gamma=1.0), "gamma"),
        (lambda: replace(two_states(), R=np.full((2, 2), np.nan)), "NaN"),
        (lambda: two_states().J(np.zeros((2, 2))), "apply softmax"),
        (lambda: two_states().J(np.ones((3, 2)) / 2), r"shape \(S, A\)"),
        (lambda: two_states().soft_value_iteration(0.0), "beta"),
        (lambda: CMDP(two_states(), np.ones((2, 3)), [1.0]), "C must have shape"),
        (lambda: CMDP(two_states(), np.ones((2, 2)), [1.0]).solve(), r"least reachable discounted costs are \[10.0\]"),
        (lambda: CMDP.random(3, 2, tightness=1.5), "tightness"),
    ],
)
def test_bad_input_is_taught(call, message):
    with pytest.raises(ValueError, match=message):
        call()
