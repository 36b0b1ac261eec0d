"""LinearGaussianDenoising and GMMDenoiser against independent computations."""

import pytest
import torch

from markovia.envs.exact.denoisers import GMMDenoiser, LinearGaussianDenoising


def random_chain(seed=0, d=3, k=4):
    g = torch.Generator().manual_seed(seed)
    A, b, W, q = (torch.randn(s, dtype=torch.float64, generator=g) for s in ((k, d, d), (k, d), (d, d), (d,)))
    return LinearGaussianDenoising(0.5 * A, 0.3 * b, [0.2, 0.4, 0.3, 0.5], W @ W.T, q, beta=0.7, num_steps=k)


def test_fixture_numbers():
    problem = LinearGaussianDenoising()
    assert float(problem.expected_reward(*problem.reference())) == pytest.approx(-0.434, abs=5e-4)
    best = problem.optimal()
    assert float(problem.expected_reward(*best)) == pytest.approx(0.573, abs=5e-4)
    assert float(problem.kl(*best).sum()) == pytest.approx(0.794, abs=5e-4)
    assert float(problem.objective(*best)) == pytest.approx(0.175, abs=1e-3)
    assert problem.gap_fraction(*best) == pytest.approx(0.0, abs=1e-12)
    assert problem.gap_fraction(*problem.reference()) == pytest.approx(1.0)


@pytest.mark.parametrize("problem", [LinearGaussianDenoising(), random_chain()], ids=["fixture", "random"])
def test_the_gradient_vanishes_at_the_optimum_and_only_there(problem):
    assert all(g.abs().max() < 1e-12 for g in problem.gradient(*problem.optimal()))
    assert max(float(g.abs().max()) for g in problem.gradient(*problem.reference())) > 1e-2


def test_scalar_recursion():
    # d = 1: P_k = A^2 P/(1 + s^2 P/beta), p_k = A (p - b P)/(1 + s^2 P/beta)
    problem = LinearGaussianDenoising([[0.8]], [0.1], 0.4, [[1.5]], [0.7], beta=0.6, num_steps=5)
    P, p = 1.5, 0.7
    for k in reversed(range(5)):
        shrink = 1 + 0.16 * P / 0.6
        P, p = 0.64 * P / shrink, 0.8 * (p - 0.1 * P) / shrink
        got = problem.soft_values()
        assert (float(got[0][k]), float(got[1][k, 0])) == pytest.approx((P, p))


def test_values_by_recursion_equal_the_objective_by_moments():
    problem = random_chain(1)
    g = torch.Generator().manual_seed(3)
    G = problem.A + 0.1 * torch.randn(problem.A.shape, dtype=torch.float64, generator=g)
    h = problem.b + 0.1 * torch.randn(problem.b.shape, dtype=torch.float64, generator=g)
    P, _, c = problem.policy_values(G, h)
    assert float(c[0] - 0.5 * P[0].trace()) == pytest.approx(float(problem.objective(G, h)), rel=1e-12)


def test_policy_value_of_the_optimum_has_the_soft_values_curvature():
    problem = random_chain(2)
    P, p = problem.soft_values()
    P_pi, p_pi, _ = problem.policy_values(*problem.optimal())
    torch.testing.assert_close(P_pi, P, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(p_pi, p, rtol=1e-10, atol=1e-12)


def test_moments_agree_with_sampled_chains():
    problem = LinearGaussianDenoising()
    G, h = problem.optimal()
    chain = problem.sample(G, h, 40_000, torch.Generator().manual_seed(0))
    m, C = problem.moments(G, h)
    assert (chain.mean(0) - m).abs().max() < 0.03
    assert (torch.cov(chain[:, -1].T) - C[-1]).abs().max() < 0.03
    assert float(problem.reward(chain[:, -1]).mean()) == pytest.approx(float(problem.expected_reward(G, h)), abs=0.02)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"A": [[1.0]]}, r"A has shape \(8, 1, 1\); expected \(8, 2, 2\)"),
        ({"s": 0.0}, "std must be positive"),
        ({"beta": 0.0}, "positive KL strength"),
        ({"Q": ((1.0, 1.0), (0.0, 1.0))}, "symmetric"),
    ],
)
def test_bad_problems_are_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LinearGaussianDenoising(**kwargs)


# ------------------------------------------------------------------------------------------------------------------ GMM
@pytest.fixture
def mixture():
    return GMMDenoiser([[1.0, 0.0], [-1.0, 0.5], [0.2, -0.8]], tau=0.3, weights=[0.5, 0.3, 0.2])


LEVELS = torch.tensor([0.05, 0.4, 0.9, 0.999], dtype=torch.float64)


def test_gmm_score_is_the_gradient_of_the_log_density(mixture):
    x = torch.randn(5, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    a, s = LEVELS.sqrt(), (1 - LEVELS).sqrt()
    (grad,) = torch.autograd.grad(mixture.log_density(x, a, s).sum(), x)
    torch.testing.assert_close(mixture.score(x, a, s), grad, rtol=1e-9, atol=1e-9)
    # Tweedie: x0 = (x + s^2 score)/a; then x = a x0 + s eps, v = a eps - s x0
    torch.testing.assert_close(mixture.x0(x, a, s), (x + s[:, None] ** 2 * grad) / a[:, None], rtol=1e-9, atol=1e-9)
    x0, eps = mixture.x0(x, a, s), mixture.eps(x, a, s)
    torch.testing.assert_close(a[:, None] * x0 + s[:, None] * eps, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixture.v(x, a, s), a[:, None] * eps - s[:, None] * x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixture.flow(x, a, s), eps - x0)


def test_gmm_density_is_the_mixture_density(mixture):
    x = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [
        torch.distributions.MultivariateNormal(0.6 * m, (0.36 * 0.09 + 0.64) * torch.eye(2, dtype=torch.float64))
        for m in mixture.means
    ]
    expected = sum(w * part.log_prob(x).exp() for w, part in zip(mixture.weights, parts, strict=True))
    torch.testing.assert_close(mixture.log_density(x, 0.6, 0.8).exp(), expected)
    torch.testing.assert_close(mixture.responsibilities(x, 0.6, 0.8).sum(-1), torch.ones(7, dtype=torch.float64))


def test_gmm_network_reads_the_noise_level_from_the_timestep(mixture):
    x = torch.randn(4, 2, dtype=torch.float64)
    network = mixture.network(LEVELS)
    torch.testing.assert_close(network(x, torch.arange(4)), mixture.eps(x, LEVELS.sqrt(), (1 - LEVELS).sqrt()))
    with pytest.raises(ValueError, match="prediction_type"):
        mixture.network(LEVELS, "noise")


def test_gmm_rejects_bad_shapes():
    with pytest.raises(ValueError, match=r"components, dimension"):
        GMMDenoiser([1.0, 2.0], 0.1)
    with pytest.raises(ValueError, match="positive"):
        GMMDenoiser([[1.0]], -1.0)
