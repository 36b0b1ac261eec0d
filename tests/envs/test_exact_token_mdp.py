"""The enumerable token-MDP: E1 to E9 against sums, brute force, autograd and scipy, none of them the formula under test."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from markovia.envs.exact import EnumerableTokenMDP, best_of_n_kl_bound, binary_fixed_point, f_divergence
from markovia.envs.exact.token_tree import tree_size

TREES = {"fixed": dict(V=3, H=3), "eos": dict(V=3, H=3, eos=1), "bandit": dict(V=5, H=1)}  # noqa: C408


@pytest.fixture(params=TREES)
def tree(request):
    return EnumerableTokenMDP.random(**TREES[request.param], seed=1)


def policy(tree, seed=0):
    return np.random.default_rng(seed).standard_normal((tree.num_prefixes, tree.V))


# ---- the tree ------------------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    assert tree_size(4, 4) == (1 + 4 + 16 + 64, 256)
    # eos: prefixes never hold it, 1 + 2 + 4; sequences end with it after 1, 2 or 3 tokens, or are cut: 1 + 2 + 4 * 3
    assert tree_size(3, 3, eos=1) == (7, 15)
    assert tree_size(2, 60, eos=0) == (60, 61)


def test_every_sequence_once_and_its_probability_is_the_product(tree):
    logits = policy(tree)
    logp = log_softmax(logits, axis=-1)
    written = set()
    for y in range(tree.M):
        tokens, at, total = tuple(tree.tokens[y, : tree.lengths[y]]), 0, 0.0
        for t, token in enumerate(tokens):
            assert at == tree.prefix_index[y, t]
            total += logp[at, token]
            at, done = tree.child[at, token], tree.leaf[at, token]
        assert done == y and at == -1
        assert tree.sequence_logp(logits)[y] == pytest.approx(total, abs=1e-13)
        written.add(tokens)
    assert len(written) == tree.M
    assert np.exp(tree.sequence_logp(logits)).sum() == pytest.approx(1, abs=1e-13)
    np.testing.assert_array_equal(tree.sequence_index(tree.tokens), np.arange(tree.M))


def test_torch_equals_numpy_and_carries_gradient(tree):
    logits = policy(tree)
    theta = torch.from_numpy(logits).requires_grad_()
    for f in (
        tree.sequence_logp, tree.expected_reward, tree.entropy, lambda x: tree.gap(x, 0.5),
        lambda x: tree.kl_to_optimum(x, 0.5), lambda x: tree.objective(x, 0.5, "js"),
    ):  # fmt: skip
        value = f(theta)
        assert value.requires_grad and value.dtype == torch.float64
        np.testing.assert_allclose(value.detach().numpy(), f(logits), atol=1e-13)


def test_sampling_follows_the_law(tree):
    logits = policy(tree)
    counts = np.bincount(tree.sample(logits, 40000, np.random.default_rng(0)), minlength=tree.M) / 40000
    assert np.abs(counts - np.exp(tree.sequence_logp(logits))).max() < 0.012


def test_policy_of_inverts_sequence_logp(tree):
    logits = policy(tree)
    np.testing.assert_allclose(tree.policy_of(np.exp(tree.sequence_logp(logits))), log_softmax(logits, axis=-1), atol=1e-12)
    one = np.eye(tree.M)[2]  # a point mass: prefixes off its path keep p0
    np.testing.assert_allclose(np.exp(tree.sequence_logp(tree.policy_of(one))), one, atol=1e-15)


def test_values_and_occupancy_by_summing_over_continuations(tree):
    logits = policy(tree)
    probs = np.exp(tree.sequence_logp(logits))
    q, v = tree.values(logits)
    occupancy = tree.prefix_occupancy(logits)
    assert v[0] == pytest.approx(tree.expected_reward(logits), abs=1e-13)
    for s in range(tree.num_prefixes):
        passes = ((tree.prefix_index == s) & tree.mask).any(-1)
        assert occupancy[s] == pytest.approx(probs[passes].sum(), abs=1e-13)
        assert v[s] == pytest.approx(probs[passes] @ tree.R[passes] / probs[passes].sum(), abs=1e-12)
        for a in range(tree.V):
            takes = ((tree.prefix_index == s) & (tree.tokens == a) & tree.mask).any(-1)
            assert q[s, a] == pytest.approx(probs[takes] @ tree.R[takes] / probs[takes].sum(), abs=1e-12)


# ---- E1 to E5 ------------------------------------------------------------------------------------------------------


def test_e1_e2_by_hand_and_against_each_other(tree):
    two = EnumerableTokenMDP(2, 1, np.zeros((1, 2)), np.array([1.0, 0.0]))
    logp, value = two.kl_optimum(1.0)  # Z = (e + 1) / 2
    np.testing.assert_allclose(np.exp(logp), [math.e / (1 + math.e), 1 / (1 + math.e)], atol=1e-15)
    assert value == pytest.approx(math.log((1 + math.e) / 2), abs=1e-15)
    logp, value = tree.kl_optimum(0.4)
    table, values = tree.token_optimum(0.4)
    np.testing.assert_allclose(tree.sequence_logp(table), logp, atol=1e-13)
    assert values[0] == pytest.approx(value, abs=1e-13)
    assert tree.objective(table, 0.4) == pytest.approx(value, abs=1e-13)


def test_e2_with_token_rewards_is_the_tilt_by_their_sum(tree):
    extra = 0.3 * policy(tree, 4)
    total = tree.R + np.where(tree.mask, extra[tree.prefix_index, tree.tokens], 0).sum(-1)
    other = EnumerableTokenMDP(tree.V, tree.H, tree.logits_ref, total, tree.eos)
    np.testing.assert_allclose(tree.token_optimum(0.4, extra)[0], other.token_optimum(0.4)[0], atol=1e-12)


def test_e3_gap_is_beta_kl_and_pythagoras(tree):
    star = tree.token_optimum(0.4)[0]
    for seed in range(20):
        logits = star + policy(tree, seed)
        assert tree.gap(logits, 0.4) == pytest.approx(0.4 * tree.kl_to_optimum(logits, 0.4), abs=1e-12)
        if tree.expected_reward(logits) >= tree.expected_reward(star):
            bound = tree.divergence(logits) - tree.divergence(star)
            assert tree.kl_to_optimum(logits, 0.4) <= bound + 1e-12
    assert tree.kl_to_optimum(star, 0.4) == pytest.approx(0, abs=1e-13)


def test_kl_to_optimum_of_a_deterministic_policy_is_minus_its_log_probability(tree):
    with np.errstate(divide="ignore"):
        logits = np.log(np.exp(tree.policy_of(np.eye(tree.M)[3])))
    expected = -tree.kl_optimum(0.5)[0][3]
    assert tree.kl_to_optimum(logits, 0.5) == pytest.approx(expected, abs=1e-12)
    assert tree.kl_to_optimum(torch.from_numpy(logits), 0.5).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["kl_pi_ref", "kl_ref_pi", "js", "chi2", "hellinger", "tv"])
def test_e4_optimum_is_not_improved_by_any_policy(tree, name):
    best = tree.policy_of(tree.f_optimum(0.3, name))
    value = tree.objective(best, 0.3, name)
    p0, row = np.exp(tree.logp_ref), f_divergence(name)
    p = np.exp(tree.sequence_logp(best))
    for seed in range(30):
        other = np.exp(tree.sequence_logp(policy(tree, seed)))
        for mix in (0.001, 0.1, 1.0):  # the objective is concave in the law
            law = (1 - mix) * p + mix * other
            assert law @ tree.R - 0.3 * (p0 @ row.f(law / p0)) <= value + 1e-12


def test_token_penalty_is_e1_for_kl_and_another_optimum_for_other_f():
    tree = EnumerableTokenMDP.random(3, 2, seed=2)
    np.testing.assert_allclose(tree.token_f_optimum(0.4, "kl_pi_ref"), tree.token_optimum(0.4)[0], atol=1e-10)

    def loss(flat, name):
        logits = flat.reshape(tree.num_prefixes, tree.V)
        penalty = f_divergence(name)(log_softmax(logits, axis=-1), tree.logits_ref)
        return 0.4 * tree.prefix_occupancy(logits) @ penalty - tree.expected_reward(logits)

    for name in ("js", "chi2", "kl_ref_pi"):
        ours = tree.token_f_optimum(0.4, name)
        found = minimize(loss, tree.logits_ref.ravel(), args=(name,), options={"gtol": 1e-9}).fun
        assert loss(ours.ravel(), name) == pytest.approx(found, abs=1e-7)
        assert np.abs(np.exp(tree.sequence_logp(ours)) - tree.f_optimum(0.4, name)).max() > 1e-3


@pytest.mark.parametrize("reward", ["uniform", "binary"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_e5_best_and_worst_of_n_by_brute_force(n, reward):
    tree = EnumerableTokenMDP.random(3, 2, seed=3, reward=reward)
    p, best, worst = np.exp(tree.logp_ref), np.zeros(tree.M), np.zeros(tree.M)
    for group in itertools.product(range(tree.M), repeat=n):
        r, mass = tree.R[list(group)], math.prod(p[i] for i in group)
        for law, chosen in ((best, r == r.max()), (worst, r == r.min())):
            for i, c in zip(group, chosen, strict=True):
                law[i] += mass * c / chosen.sum()
    np.testing.assert_allclose(tree.best_of_n(n), best, atol=1e-14)
    np.testing.assert_allclose(tree.worst_of_n(n), worst, atol=1e-14)
    kl = best @ (np.log(np.maximum(best, 1e-300)) - tree.logp_ref)
    assert kl <= best_of_n_kl_bound(n) + 1e-12


# ---- E6: expected gradients ----------------------------------------------------------------------------------------


def test_exact_gradient_against_autograd_and_finite_differences(tree):
    logits = policy(tree)
    for beta, name in ((0.0, "kl_pi_ref"), (0.4, "kl_pi_ref"), (0.4, "kl_ref_pi"), (0.4, "chi2")):
        theta = torch.from_numpy(logits).requires_grad_()
        (auto,) = torch.autograd.grad(tree.objective(theta, beta, name), theta)
        ours = tree.exact_gradient(logits, beta, name)
        np.testing.assert_allclose(ours, auto.numpy(), atol=1e-12)
        h = np.zeros_like(logits)
        h[0, 1] = 1e-6
        slope = (tree.objective(logits + h, beta, name) - tree.objective(logits - h, beta, name)) / 2e-6
        assert ours[0, 1] == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_e6_score_function_estimators_are_unbiased(group_size):
    tree = EnumerableTokenMDP.random(4, 2, seed=4)
    logits, beta = policy(tree, 1), 0.3
    reward, logp_ref = torch.from_numpy(tree.R), torch.from_numpy(tree.logp_ref)

    def leave_one_out(theta, index):
        logp = tree.sequence_logp(theta)
        ret = (reward - beta * (logp.detach() - logp_ref))[index]
        baseline = 0.0 if group_size == 1 else (ret.sum(-1, keepdim=True) - ret) / (group_size - 1)
        return -((ret - baseline) * logp[index]).mean(-1)

    gradient = tree.expected_gradient(leave_one_out, logits, group_size)
    np.testing.assert_allclose(gradient, -tree.exact_gradient(logits, beta), atol=1e-12)


def test_e6_rows_of_the_divergence_table(tree):
    """k1 as a loss has no gradient; k3 as a loss has that of KL(ref || pi) and k2 that of KL(pi || ref), for sequences."""
    logits, logp_ref = policy(tree, 2), torch.from_numpy(tree.logp_ref)

    def k(kind):
        def loss(theta, index):
            d = (tree.sequence_logp(theta) - logp_ref)[index[:, 0]]
            return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) + d - 1}[kind]

        return tree.expected_gradient(loss, logits)

    def slope(name):
        return tree.exact_gradient(logits, 0.0) - tree.exact_gradient(logits, 1.0, name)

    np.testing.assert_allclose(k("k1"), 0, atol=1e-13)
    np.testing.assert_allclose(k("k2"), slope("kl_pi_ref"), atol=1e-12)
    np.testing.assert_allclose(k("k3"), slope("kl_ref_pi"), atol=1e-12)


def test_e6_importance_weights_correct_another_behaviour(tree):
    logits, behaviour = policy(tree, 1), policy(tree, 2)
    reward = torch.from_numpy(tree.R)

    def loss(theta, index):
        ratio = torch.exp(tree.sequence_logp(theta) - torch.from_numpy(tree.sequence_logp(behaviour)))
        return -(ratio * reward)[index[:, 0]]

    gradient = tree.expected_gradient(loss, torch.from_numpy(logits), logits_behaviour=behaviour)
    assert isinstance(gradient, torch.Tensor)
    np.testing.assert_allclose(gradient.numpy(), -tree.exact_gradient(logits), atol=1e-12)


# ---- E7 to E9 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_e7_expected_gradient_vanishes_at_the_fixed_point(tree, estimator, std):
    """Infinite group: advantage R - E R (over its standard deviation), penalty per token, written out here."""
    beta = 2.0 if std else 0.3
    table = tree.fixed_point(beta, estimator, std=std)
    p = np.exp(tree.sequence_logp(table))
    mean = p @ tree.R
    adv = torch.from_numpy((tree.R - mean) / (np.sqrt(p @ (tree.R - mean) ** 2) if std else 1.0))
    at, token, mask = (torch.from_numpy(x) for x in (tree.prefix_index, tree.tokens, tree.mask))
    ref = torch.from_numpy(tree.logits_ref)

    def loss(theta, index):
        y = index[:, 0]
        logp = theta.log_softmax(-1)[at[y], token[y]]
        d = logp - ref[at[y], token[y]]
        penalty = d**2 / 2 if estimator == "k2" else torch.exp(-d) + d - 1
        return ((-adv[y, None] * logp + beta * penalty) * mask[y]).sum(-1)

    np.testing.assert_allclose(tree.expected_gradient(loss, table), 0, atol=1e-7)


def test_e7_finite_groups_scale_beta():
    tree, beta = EnumerableTokenMDP.random(4, 1, seed=5), 0.3
    reward, ref = torch.from_numpy(tree.R), torch.from_numpy(tree.logp_ref)

    def loss(theta, index):
        logp = tree.sequence_logp(theta)[index]
        d, ret = logp - ref[index], reward[index]
        return (-(ret - ret.mean(-1, keepdim=True)) * logp + beta * (torch.exp(-d) + d - 1)).mean(-1)

    table = tree.fixed_point(beta, "k3", group_size=3)
    np.testing.assert_allclose(tree.expected_gradient(loss, table, 3), 0, atol=1e-9)
    assert np.abs(tree.expected_gradient(loss, tree.fixed_point(beta, "k3"), 3)).max() > 1e-3


def test_e7_k1_is_the_kl_optimum_and_binary_rewards_have_closed_forms(tree):
    np.testing.assert_allclose(tree.fixed_point(0.3, "k1"), tree.token_optimum(0.3)[0], atol=1e-15)
    for seed in range(3):
        bandit = EnumerableTokenMDP.random(6, 1, seed=seed, reward="binary", success=0.4)
        q = np.exp(bandit.logp_ref) @ bandit.R
        for estimator in ("k1", "k2", "k3"):
            p = np.exp(bandit.sequence_logp(bandit.fixed_point(0.2, estimator))) @ bandit.R
            assert p == pytest.approx(binary_fixed_point(q, 0.2, estimator), abs=1e-9)


def test_e8_repeated_tilting_by_solving_again_and_again():
    tree, beta = EnumerableTokenMDP.random(5, 1, seed=6), 0.7
    for rate in (1.0, 0.25):
        ref = tree.logits_ref
        for _ in range(4):
            pi = EnumerableTokenMDP(5, 1, ref, tree.R).token_optimum(beta)[0]
            ref = (1 - rate) * ref + rate * pi
        np.testing.assert_allclose(tree.sequence_logp(pi), tree.repeated_tilting(beta, 4, rate), atol=1e-12)
    np.testing.assert_allclose(tree.repeated_tilting(beta, 4), tree.kl_optimum(beta / 4)[0], atol=1e-13)
    np.testing.assert_allclose(tree.repeated_tilting(beta, 0), tree.logp_ref, atol=1e-15)
    # interpolating logits between p0 and the optimum is the optimum of beta / eta, for one step
    blend = 0.4 * tree.token_optimum(beta)[0] + 0.6 * tree.logits_ref
    np.testing.assert_allclose(tree.sequence_logp(blend), tree.kl_optimum(beta / 0.4)[0], atol=1e-13)


def test_e9_entropy_derivative_against_finite_differences(tree):
    logits, direction, h = policy(tree, 1), policy(tree, 2), 1e-5
    slope = (tree.entropy(logits + h * direction) - tree.entropy(logits - h * direction)) / (2 * h)
    np.testing.assert_allclose(tree.entropy_derivative(logits, direction), slope, atol=1e-9)


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: EnumerableTokenMDP.random(5, 6), "more than 4096"),
        (lambda t: EnumerableTokenMDP.random(50000, 50), "more than 4096"),
        (lambda t: EnumerableTokenMDP.random(1, 3), "V >= 2"),
        (lambda t: EnumerableTokenMDP.random(3, 3, eos=3), "eos must be a token"),
        (lambda t: EnumerableTokenMDP.random(3, 3, reward="gauss"), "'uniform' or 'binary'"),
        (lambda t: EnumerableTokenMDP.random(3, 3, reward="binary", success=2.0), "probability"),
        (lambda t: EnumerableTokenMDP(2, 1, np.zeros((1, 2)), np.array([1.0, np.nan])), "NaN"),
        (lambda t: EnumerableTokenMDP(2, 1, np.zeros((1, 2)), np.ones(3)), "one entry per sequence"),
        (lambda t: EnumerableTokenMDP(2, 1, np.zeros((2, 2)), np.ones(2)), "num_prefixes, V"),
        (lambda t: t.kl_optimum(0.0), "beta"),
        (lambda t: t.best_of_n(0), ">= 1"),
        (lambda t: best_of_n_kl_bound(0), ">= 1"),
        (lambda t: t.fixed_point(0.1, "k4"), "estimator"),
        (lambda t: t.fixed_point(0.1, "k3", std=True, group_size=4), "drop group_size"),
        (lambda t: t.fixed_point(0.1, "k3", group_size=1), "at least 2"),
        (lambda t: t.fixed_point(0.1, "k2", std=True), "collapses.*raise beta"),
        (lambda t: t.repeated_tilting(0.1, -1), "rounds"),
        (lambda t: t.expected_gradient(None, t.logits_ref, 9), "cannot be enumerated"),
        (lambda t: t.expected_gradient(lambda x, i: x.sum(), t.logits_ref), "one value per group"),
    ],
)
def test_bad_input_is_taught(call, message):
    with pytest.raises(ValueError, match=message):
        call(EnumerableTokenMDP.random(3, 3))
