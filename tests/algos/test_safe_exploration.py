"""Conservative exploration and fronts of several returns: by enumeration, by hand, and against exact values."""

import itertools

import numpy as np
import pytest

from markovia.algos.safe.conservative import empirical, episode_mixture, evaluate, explore, from_transitions, optimal, step_mixture
from markovia.algos.safe.pareto import (
    Front,
    c_morl,
    crowding_distance,
    expected_utility,
    extend,
    floors,
    hypervolume,
    nondominated,
    simplex_grid,
    sparsity,
    weighted_optima,
)
from markovia.envs.exact.tabular import TabularMDP


def instances(R=6, S=3, A=2, H=3, seed=0):
    rng = np.random.default_rng(seed)
    P, reward, start = rng.dirichlet(np.ones(S), (R, S, A)), rng.random((R, S, A)), rng.dirichlet(np.ones(S), R)
    greedy, V, _ = optimal(P, reward, H)
    baseline = 0.6 * greedy + 0.4 / A
    return P, reward, start, baseline, (start * evaluate(P, reward, baseline)[:, 0]).sum(-1), (start * V[:, 0]).sum(-1)


# -- finite horizons ---------------------------------------------------------------------------------------------------------------------


def test_value_and_optimum_by_enumeration():
    P, reward, start, baseline, worth, best = instances(R=1)
    total = 0.0
    for s0, a0, s1, a1, s2, a2 in itertools.product(*[range(3), range(2)] * 3):
        path = start[0, s0] * baseline[0, 0, s0, a0] * P[0, s0, a0, s1] * baseline[0, 1, s1, a1] * P[0, s1, a1, s2] * baseline[0, 2, s2, a2]
        total += path * (reward[0, s0, a0] + reward[0, s1, a1] + reward[0, s2, a2])
    assert worth[0] == pytest.approx(total)
    every = [np.eye(2)[list(choice)].reshape(1, 3, 3, 2) for choice in itertools.product(range(2), repeat=9)]
    assert best[0] == pytest.approx(max(float(start[0] @ evaluate(P, reward, p)[0, 0]) for p in every))


def test_bonus_and_pessimism_by_hand():
    # One state, two actions with reward 1 and 0, one step left; P is certain, so the bonus is 0.5 * 14 * H * L / n with H = 1, L = 2.
    P, reward = np.ones((1, 2, 1)), np.array([[1.0, 0.0]])
    greedy, V, bonus = optimal(P, reward, 1, 2.0, np.array([[28.0, 56.0]]), scale=0.5)
    np.testing.assert_allclose(bonus[0, 0], [0.5, 0.25])
    assert greedy[0, 0].tolist() == [1.0, 0.0] and V[0, 0] == 1.0  # 1.5 is cut at H - h = 1
    lower = evaluate(P, reward, np.full((1, 1, 2), 0.5), bonus)
    assert lower[0, 0] == pytest.approx(0.5 * 0.5 + 0.5 * 0.0)  # [1 - 0.5]_+ and [0 - 0.25]_+
    # From state 0 the next is 0 or 1 (chance 1/4), worth 0 and 1 then; 280 visits make the bonus of the last step 14 * 2 * 3 / 280 = 0.3, so the
    # optimistic values there are 0.3 and 1: mean 0.475, variance 0.75 * 0.09 + 0.25 - 0.475^2 = 0.091875.
    P = np.array([[[0.75, 0.25]], [[0.0, 1.0]]])
    _, V, bonus = optimal(P, np.array([[0.0], [1.0]]), 2, 3.0, np.array([[280.0], [1e9]]), scale=1.0)
    assert bonus[1, 0, 0] == pytest.approx(0.3) and bonus[0, 0, 0] == pytest.approx(3.0 * np.sqrt(0.091875 * 3.0 / 280.0) + 0.3)
    assert V[0, 0] == pytest.approx(0.475 + bonus[0, 0, 0])


@pytest.mark.check("value", "stepmix")
@pytest.mark.check("limit", "stepmix")
def test_step_mixture_is_worth_its_floor_and_has_its_ends():
    P, reward, _, _, _, _ = instances()
    start = np.eye(3)[np.zeros(6, dtype=int)]
    rng = np.random.default_rng(1)
    good, _, _ = optimal(P, reward, 3)
    bad, _, _ = optimal(P, -reward, 3)
    baseline, greedy = 0.9 * good + 0.05, bad  # what the learner believes in is worse than the baseline
    prefix = (np.arange(3)[None] < np.arange(4)[:, None])[..., None, None]
    exact = np.einsum("rs,rjs->rj", start, evaluate(P[:, None], reward[:, None], np.where(prefix, baseline[:, None], greedy[:, None]))[..., 0, :])
    floor = exact[:, 0] + rng.uniform(0.1, 0.9, 6) * (exact[:, 3] - exact[:, 0])
    played = step_mixture(exact, baseline, greedy, floor)
    np.testing.assert_allclose(played.sum(-1), 1.0)
    np.testing.assert_allclose((start * evaluate(P, reward, played)[:, 0]).sum(-1), floor)  # exact bounds: the mixture's value is the floor
    mixed = ((played != baseline) & (played != greedy)).any((2, 3))
    assert (mixed.sum(1) == 1).all()  # in one step only
    np.testing.assert_array_equal(step_mixture(exact, baseline, greedy, exact.min(1)), greedy)
    np.testing.assert_array_equal(step_mixture(exact, baseline, greedy, exact.max(1) + 1.0), baseline)


@pytest.mark.check("value", "epsmix")
@pytest.mark.check("limit", "epsmix")
def test_episode_mixture_by_hand():
    # safe already | half-way | not even the baseline is certain
    p = episode_mixture(np.array([0.9, 0.2, 0.2]), np.array([0.5, 1.0, 0.5]), np.array([0.8, 0.6, 0.8]))
    np.testing.assert_allclose(p, [1.0, 0.5, 0.0])


def test_floors_hold_in_every_episode_where_the_free_learner_breaks_them():
    P, reward, start, baseline, worth, best = instances(R=8, S=4, A=3, H=4)
    floor, found = 0.95 * worth, {}
    for rule in ("step-mixture", "episode-mixture", "none"):
        found[rule] = explore(P, reward, start, baseline, floor, rule=rule, episodes=500, bonus_scale=0.02)
        assert found[rule].value.shape == (500, 8) and found[rule].counts.sum() == 500 * 8 * 4
    broken = {rule: (h.value < floor - 1e-12).sum(0) for rule, h in found.items()}
    assert not broken["step-mixture"].any() and not broken["episode-mixture"].any() and broken["none"].mean() > 10
    late = best - found["step-mixture"].value[-50:].mean(0)
    assert late.mean() < 0.5 * (best - worth).mean()  # and it learns


def test_offline_start_by_hand_and_it_saves_episodes():
    counts, behaviour = from_transitions(np.array([0, 0, 1]), np.array([0, 0, 1]), np.array([1, 0, 1]), np.array([1, 0, 0]), 2, 2, 2)
    assert counts[0, 1, 1] == counts[0, 0, 0] == counts[1, 1, 0] == 1 and counts.sum() == 3
    np.testing.assert_allclose(behaviour, [[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.0, 1.0]]])
    np.testing.assert_allclose(empirical(counts)[0, 1], [0.0, 1.0])
    np.testing.assert_allclose(empirical(counts)[1, 0], [0.5, 0.5])
    P, reward, start, baseline, worth, _ = instances(R=4)
    first = explore(P, reward, start, baseline, 0.9 * worth, episodes=200, bonus_scale=0.02)
    after = explore(P, reward, start, baseline, 0.9 * worth, episodes=200, bonus_scale=0.02, counts=first.counts, seed=1)
    assert after.value.mean() > first.value.mean() and after.baseline_only.mean() < first.baseline_only.mean()
    assert (after.value >= 0.9 * worth - 1e-12).all()


@pytest.mark.check("bad_input", "stepmix", "epsmix")
def test_runs_repeat_and_bad_input_is_taught():
    P, reward, start, baseline, worth, _ = instances(R=2)
    a, b = (explore(P, reward, start, baseline, 0.9 * worth, episodes=20, seed=3) for _ in range(2))
    np.testing.assert_array_equal(a.value, b.value)
    with pytest.raises(ValueError, match="rule must be"):
        explore(P, reward, start, baseline, worth, rule="stepmix")
    with pytest.raises(ValueError, match="less than its floor"):
        explore(P, reward, start, baseline, worth + 0.1)


# -- fronts --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "c-morl")
def test_domination_and_crowding_by_hand():
    points = np.array([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0], [3.0, 0.0], [2.0, 2.0]])
    assert nondominated(points).tolist() == [True, True, False, True, False]  # the twin counts once
    # Inner point: (3 - 1) / 2 + (3 - 0) / 3 = 2.
    np.testing.assert_allclose(crowding_distance(points[[0, 1, 3]]), [np.inf, 2.0, np.inf])
    front = Front(np.zeros((0, 2)), np.zeros((0, 1, 1))).merged(points, np.ones((5, 1, 1)), capacity=2)
    np.testing.assert_array_equal(front.points, points[[0, 3]])
    assert front.solved == 5


@pytest.mark.check("value", "c-morl")
def test_hypervolume_by_hand_in_two_and_three_dimensions():
    # Staircase of (1, 3), (2, 2), (3, 0) over (0, 0): 3 + 2 + 0.
    assert hypervolume(np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 0.0]]), np.zeros(2)) == pytest.approx(5.0)
    assert hypervolume(np.array([[1.0, 3.0], [2.0, 2.0], [-1.0, 9.0]]), np.array([0.0, 1.0])) == pytest.approx(2.0 + 1.0)
    # Boxes of volume 6 and 2 that share 1.
    assert hypervolume(np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 1.0]]), np.zeros(3)) == pytest.approx(7.0)
    rng = np.random.default_rng(0)
    points = rng.random((6, 4))
    inside = (rng.random((200_000, 1, 4)) <= points).all(-1).any(1).mean()
    assert hypervolume(points, np.zeros(4)) == pytest.approx(inside, abs=0.005)
    assert hypervolume(points, np.zeros(4)) == pytest.approx(hypervolume(points[::-1], np.zeros(4)))  # the order does not matter


@pytest.mark.check("bad_input", "c-morl")
def test_utility_sparsity_grid_and_floors_by_hand():
    points = np.array([[0.0, 4.0], [3.0, 3.0], [4.0, 0.0]])
    weights = simplex_grid(2, 0.5)  # (0, 1), (1/2, 1/2), (1, 0) -> 4, 3, 4
    assert expected_utility(points, weights) == pytest.approx(11 / 3)
    assert sparsity(points) == pytest.approx((9 + 1 + 1 + 9) / 2) and sparsity(points[:1]) == 0.0
    assert len(simplex_grid(3, 0.01)) == 5151 and np.allclose(simplex_grid(3, 0.01).sum(-1), 1)
    np.testing.assert_allclose(floors(np.array([10.0, -10.0]), 0.9), [9.0, -11.0])
    for call, message in (
        (lambda: simplex_grid(2, 0.3), "divide 1"),
        (lambda: floors(points, 1.1), "beta"),
        (lambda: nondominated(np.zeros(3)), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.check("limit", "c-morl")
def test_extension_keeps_the_other_return_and_fills_the_front():
    rng = np.random.default_rng(3)
    mdp, u = TabularMDP.random(4, 3, 0.8, seed=4), rng.random((4, 3))
    rewards = np.stack([u**2, (1 - u) ** 2])
    corners, _ = weighted_optima(mdp, rewards, np.eye(2))
    moved, policy = extend(mdp, rewards, corners[0], 1, beta=0.9)
    assert moved[0] == pytest.approx(0.9 * corners[0, 0]) and moved[1] > corners[0, 1]
    np.testing.assert_allclose(policy.sum(-1), 1.0)
    same, _ = extend(mdp, rewards, corners[0], 1, beta=1.0)
    assert same[0] == pytest.approx(corners[0, 0])  # nothing may be given up
    front = c_morl(mdp, rewards, np.eye(2), rounds=3, picks=3)
    assert hypervolume(front.points, np.zeros(2)) > 1.1 * hypervolume(corners, np.zeros(2)) and sparsity(front.points) < sparsity(corners)
    assert nondominated(front.points).all()
