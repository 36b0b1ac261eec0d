"""F1-F4: the small offline problems against formulas written here, and the facts that the claims stand on."""

import numpy as np
import pytest
import torch

import markovia  # noqa: F401  (registers the ids)
from markovia.envs.exact import GMMDenoiser
from markovia.envs.exact.offline import Bandit2D, EmpiricalMDP, fixture, maze, maze_data, pointmass_data, success
from markovia.envs.exact.offline.pointmass import TIERS, evaluate, expert
from markovia.envs.offline import check_transitions

# -- F1 -------------------------------------------------------------------------------------------------------------------------------


def test_bandit_density_is_the_mixtures():
    bandit = Bandit2D()
    action = bandit.sample(200, seed=1)
    oracle = GMMDenoiser(bandit.modes, 0.08)
    one, none = torch.ones(200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    np.testing.assert_allclose(bandit.log_mu(action), oracle.log_density(torch.from_numpy(action), one, none).numpy(), atol=1e-10)
    # the centre is 0.7 from every mode: -0.49 / (2 * 0.0064) - log(2 pi 0.0064)
    assert bandit.log_mu(np.zeros(2)) == pytest.approx(-0.49 / 0.0128 - np.log(2 * np.pi * 0.0064))
    between = (bandit.modes[0] + bandit.modes[1]) / 2
    assert bandit.log_mu(between) == pytest.approx(-3.8, abs=0.05)


def test_bandit_values_by_hand():
    bandit = Bandit2D()
    np.testing.assert_allclose(bandit.q(bandit.modes + 0.01), np.arange(8) / 7)
    # far out on the ray of mode 2 the softmax is all on it; in the middle of modes 2 and 3 these two share evenly, up to the others
    assert bandit.q_smooth(np.array([0.0, 5.0])) == pytest.approx(2 / 7, abs=1e-6)
    near = np.array([np.exp(-np.sum((bandit.modes[k] - bandit.modes[[2, 3]].mean(0)) ** 2) / 0.045) for k in range(8)])
    assert bandit.q_smooth(bandit.modes[[2, 3]].mean(0)) == pytest.approx((near * np.arange(8) / 7).sum() / near.sum())


def test_bandit_gradient_and_both_libraries():
    bandit = Bandit2D()
    point = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bandit.q_smooth(point), point)
    at, h = point.detach().numpy(), 1e-6
    numeric = [(bandit.q_smooth(at + h * e) - bandit.q_smooth(at - h * e)) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-8)
    action = bandit.sample(50)
    for fn in (bandit.q, bandit.q_smooth, bandit.log_mu):
        np.testing.assert_allclose(fn(torch.from_numpy(action)).numpy(), fn(action), atol=1e-12)


def test_bandit_optimum_on_the_grid():
    bandit = Bandit2D()
    for smooth in (False, True):
        points, p = bandit.grid(), bandit.optimum(0.5, smooth)
        q = bandit.q_smooth(points) if smooth else bandit.q(points)
        weight = np.exp(bandit.log_mu(points)) * np.exp(q / 0.5)
        np.testing.assert_allclose(p, weight / weight.sum(), atol=1e-14)
        mu = bandit.optimum(1e9)

        def objective(policy, q=q, mu=mu):
            return (policy * q).sum() - 0.5 * (policy * np.log(policy / mu)).sum()

        other = p * np.exp(0.1 * np.random.default_rng(0).standard_normal(p.shape))
        assert objective(p) > objective(other / other.sum()) and objective(p) > objective(mu)
    with pytest.raises(ValueError, match="beta"):
        bandit.optimum(0.0)


def test_bandit_data():
    data = fixture("bandit2d")
    log_mu = Bandit2D().log_mu(data.action.astype(np.float64))
    assert data.reward.mean() == pytest.approx(0.5, abs=0.01)
    assert np.median(log_mu) == pytest.approx(0.44, abs=0.03) and np.quantile(log_mu, 0.01) == pytest.approx(-3.4, abs=0.2)
    assert data.terminated.all() and data.num_episodes == len(data) and check_transitions(data).faults == ()


# -- F2 -------------------------------------------------------------------------------------------------------------------------------


def test_maze_transitions_by_hand():
    mdp = maze()
    # action 3 (right) from (0, 0): 0.75 + 0.25/5 to (0, 1), 0.05 down, the three others stay
    expected = np.zeros(49)
    expected[[1, 7, 0]] = 0.8, 0.05, 0.15
    np.testing.assert_allclose(mdp.P[0, 3], expected)
    assert mdp.R[47, 3] == pytest.approx(8.0) and mdp.R[48].sum() == 0 and mdp.R[:40].sum() == 0  # 0.8 * 10 when stepping into the goal
    assert (mdp.P[48, :, 48] == 1).all()


def test_maze_facts():
    mdp = maze()
    policy, values = mdp.policy_iteration()
    assert values[0] == pytest.approx(4.78, abs=0.005)
    # by repeated squaring against stepping the state law
    law = mdp.rho
    for _ in range(50):
        law = law @ np.einsum("sa,sat->st", policy, mdp.P)
    assert success(mdp, policy) == pytest.approx(law[-1]) and law[-1] > 0.999
    for seed in range(3):
        data = maze_data(seed)
        empirical = EmpiricalMDP.from_data(data, 49, 5)
        assert 4700 < len(data) < 5000 and data.num_episodes == 100 and 3 <= data.terminated.sum() <= 11
        # nearly all of the 240 pairs: 235 to 239 of them, depending on the seed
        assert (empirical.counts[:48].sum(1) > 0).all() and (empirical.counts[:48] > 0).sum() >= 234
        assert data.lengths().max() == 50 and data.returns()[-1] == 10 and check_transitions(data).faults == ()


def test_empirical_mdp_counts_and_solves_in_sample():
    data = maze_data(1)
    empirical = EmpiricalMDP.from_data(data, 49, 5)
    s, a = int(data.obs[10]), int(data.action[10])
    rows = (data.obs == s) & (data.action == a)
    assert empirical.counts[s, a] == rows.sum()
    np.testing.assert_allclose(empirical.mdp.P[s, a], np.bincount(data.next_obs[rows], minlength=49) / rows.sum())
    assert empirical.behaviour[s, a] == pytest.approx(rows.sum() / (data.obs == s).sum())
    np.testing.assert_allclose(empirical.behaviour.sum(-1), 1.0)
    policy, values = empirical.in_sample_optimum()
    # Bellman's equation over the covered pairs, in a loop of its own
    for state in range(48):
        tried = np.unique(data.action[data.obs == state])
        best = max(empirical.mdp.R[state, k] + 0.95 * empirical.mdp.P[state, k] @ values for k in tried)
        assert values[state] == pytest.approx(best, abs=1e-8)
    assert values[48] == 0.0 and ((policy > 0) <= empirical.covered).all()
    with pytest.raises(ValueError, match="integer states"):
        EmpiricalMDP.from_data(pointmass_data("mix", episodes=1), 2, 2)
    with pytest.raises(ValueError, match="at least one action"):
        empirical.mdp.value_iteration(allowed=empirical.counts > 0)


# -- F3 -------------------------------------------------------------------------------------------------------------------------------


def test_pointmass_rows_follow_the_dynamics():
    data = pointmass_data("blend")
    assert len(data) == 10_000 and data.num_episodes == 250 and not data.terminated.any() and data.truncated.sum() == 250
    move = data.next_obs.astype(np.float64) - np.clip(data.obs + 0.1 * data.action, -1, 1)
    inside = (np.abs(data.next_obs) < 0.9).all(1)
    assert move[inside].std() == pytest.approx(0.01, rel=0.03) and np.abs(move[inside].mean(0)).max() < 5e-4
    np.testing.assert_allclose(data.reward, -np.sqrt(((data.next_obs - 0.5) ** 2).sum(1)), atol=1e-6)
    assert check_transitions(data).faults == ()


def test_pointmass_scores():
    tiers = {tier: pointmass_data(tier) for tier in TIERS}
    means = {tier: data.about.reference.score_pct(data.returns().mean()) for tier, data in tiers.items()}
    assert means["random"] == pytest.approx(0.0, abs=1e-6) and means["expert"] == pytest.approx(100.0, abs=1e-6)
    assert 67 <= means["medium"] <= 75 and 66 <= means["blend"] <= 73 and 15 <= means["mix"] <= 30
    ref = tiers["random"].about.reference
    assert ref.minimum == pytest.approx(-39.7, abs=2.5) and ref.maximum == pytest.approx(-4.9, abs=0.6)
    assert evaluate(expert).mean() == pytest.approx(ref.maximum, abs=0.8)


def test_pointmass_tiers_by_their_actions():
    data = pointmass_data("expert")
    np.testing.assert_allclose(data.action, expert(data.obs.astype(np.float64)), atol=1e-5)
    mix = pointmass_data("mix")
    follows = np.abs(mix.action - expert(mix.obs)).max(1).reshape(250, 40).max(1) < 1e-4
    assert follows.sum() == 50
    medium = pointmass_data("medium")
    noise = medium.action - 0.35 * expert(medium.obs)
    assert np.median(np.abs(noise[(np.abs(medium.action) < 1).all(1)])) == pytest.approx(0.4 * 0.674, rel=0.1)
    np.testing.assert_array_equal(pointmass_data("random").obs[::40], data.obs[::40])  # tiers of one seed share their starts
    np.testing.assert_array_equal(pointmass_data("random", 3).reward, pointmass_data("random", 3).reward)
    with pytest.raises(ValueError, match="random, medium, expert, mix, blend"):
        pointmass_data("best")


def test_unknown_fixtures_and_unrecorded_pendulum(monkeypatch, tmp_path):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(ValueError, match="markovia collect"):
        fixture("pendulum/medium")
    with pytest.raises(ValueError, match="bandit2d, maze"):
        fixture("bandit")
