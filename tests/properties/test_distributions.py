"""Densities integrate to one; entropy, KL and metric are those of the density: by quadrature, by sums, and by samples."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from markovia.agents.distributions import Categorical, FixedStdGaussian, Gaussian, MultiCategorical, SquashedGaussian, kl

torch.set_num_threads(1)
POINTS = 4001  # of the trapezoid rule, which converges faster than any power on a density that falls off so fast
MEANS, LOG_STDS, SEEDS = st.floats(-5.0, 5.0), st.floats(-3.0, 2.0), st.integers(0, 2**31 - 1)


def scalar(value):
    return torch.tensor([value], dtype=torch.float64)


def line(dist):
    """(points (n, 1), the weight of each in an integral) over 12 standard deviations on either side of the mean."""
    std = math.exp(float(dist.log_std))
    u = torch.linspace(float(dist.mean) - 12.0 * std, float(dist.mean) + 12.0 * std, POINTS, dtype=torch.float64)[:, None]
    return u, 24.0 * std / (POINTS - 1)


@given(MEANS, LOG_STDS, MEANS, LOG_STDS)
def test_a_gaussian_is_a_density_with_its_entropy_and_kl(m, s, m2, s2):
    p, q = Gaussian(scalar(m), scalar(s)), Gaussian(scalar(m2), scalar(s2))
    u, step = line(p)
    logp = p.log_prob(u)
    mass = logp.exp() * step
    assert mass.sum() == pytest.approx(1.0, rel=1e-9)
    assert -(mass * logp).sum() == pytest.approx(float(p.entropy()), rel=1e-9, abs=1e-9)
    assert (mass * (logp - q.log_prob(u))).sum() == pytest.approx(float(kl(p, q)), rel=1e-8, abs=1e-9)
    assert float(kl(p, q)) >= -1e-12 and float(kl(p, p)) == 0.0


@given(st.floats(-2.0, 2.0), st.floats(-3.0, 0.5), st.floats(-2.0, 2.0), st.floats(-3.0, 0.5))
def test_a_squashed_gaussian_is_a_density_of_the_squashed_action(m, s, m2, s2):
    """With a = tanh(u) the integral over (-1, 1) is that of exp(log_prob(u)) (1 - tanh(u)^2) over u; KL does not see the squash."""
    p, q = SquashedGaussian(scalar(m), scalar(s)), SquashedGaussian(scalar(m2), scalar(s2))
    u, step = line(p)
    inside = u.abs()[:, 0] < 18.0  # beyond, 1 - tanh^2 is 0 in float64
    logp, slope = p.log_prob(u), 1.0 / u[:, 0].cosh().square()
    mass = torch.where(inside, logp.exp() * slope * step, 0.0)
    assert mass.sum() == pytest.approx(1.0, rel=1e-8)
    assert (mass * (logp - q.log_prob(u))).sum() == pytest.approx(float(kl(p, q)), rel=1e-7, abs=1e-8)


@given(SEEDS, st.integers(1, 4))
def test_entries_of_a_gaussian_are_independent(seed, d):
    mean, log_std, action = torch.randn(3, 5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for kind in (Gaussian, SquashedGaussian):
        parts = [kind(mean[:, i : i + 1], log_std[:, i : i + 1]) for i in range(d)]
        whole = kind(mean, log_std)
        torch.testing.assert_close(whole.log_prob(action), sum(p.log_prob(action[:, i : i + 1]) for i, p in enumerate(parts)))
        torch.testing.assert_close(whole.entropy(), sum(p.entropy() for p in parts))


@st.composite
def logits(draw, size=None):
    """(n,) float64, of any spread; some may be masked out with the least number, never all."""
    n = size or draw(st.integers(2, 6))
    values = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(SEEDS))) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    masked = torch.tensor([False, *draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))])
    return values.masked_fill(masked, torch.finfo(torch.float64).min) if draw(st.booleans()) else values


@given(logits(size=5), logits(size=5))
def test_a_categorical_by_sums(a, b):
    b = torch.where(a == torch.finfo(a.dtype).min, a, b)  # what one has masked out the other has too
    a = torch.where(b == torch.finfo(a.dtype).min, b, a)
    if bool((a == torch.finfo(a.dtype).min).all()):
        a = b = torch.zeros(5, dtype=torch.float64)
    p, q = Categorical(a), Categorical(b)
    every = torch.arange(5)
    logp = Categorical(a.expand(5, 5)).log_prob(every)
    weight = logp.exp()
    assert weight.sum() == pytest.approx(1.0, rel=1e-9)
    lives = weight > 0
    logq = Categorical(b.expand(5, 5)).log_prob(every)
    assert -(weight * logp)[lives].sum() == pytest.approx(float(p.entropy()), rel=1e-9, abs=1e-9)
    assert (weight * (logp - logq))[lives].sum() == pytest.approx(float(kl(p, q)), rel=1e-9, abs=1e-9)
    assert float(kl(p, q)) >= -1e-12 and float(p.entropy()) + 1e-12 >= 0.0 and float(p.entropy()) <= math.log(5) + 1e-9


@given(st.lists(st.integers(2, 4), min_size=1, max_size=3), SEEDS)
def test_independent_categoricals_by_enumeration(sizes, seed):
    one, two = torch.randn(2, sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p, q = MultiCategorical(one, tuple(sizes)), MultiCategorical(two, tuple(sizes))
    actions = torch.tensor(list(itertools.product(*[range(n) for n in sizes])))
    logp, logq = (MultiCategorical(x.expand(len(actions), -1), tuple(sizes)).log_prob(actions) for x in (one, two))
    assert logp.exp().sum() == pytest.approx(1.0, rel=1e-9)
    assert -(logp.exp() * logp).sum() == pytest.approx(float(p.entropy()), rel=1e-9)
    assert (logp.exp() * (logp - logq)).sum() == pytest.approx(float(kl(p, q)), rel=1e-9, abs=1e-12)


@given(MEANS, LOG_STDS, MEANS, st.integers(1, 3))
def test_a_step_of_a_denoiser_is_a_density_and_a_mean_of_entries_where_it_is_scaled(m, s, m2, d):
    std = math.exp(s)
    p, q = (FixedStdGaussian(torch.full((1, 1, d), x, dtype=torch.float64), torch.full((1, 1), std, dtype=torch.float64)) for x in (m, m2))
    u, step = line(Gaussian(scalar(m), scalar(s)))
    each = FixedStdGaussian(p.mean[..., :1].expand(POINTS, 1, 1), p.std.expand(POINTS, 1))
    logp = each.log_prob(u[:, None])[:, 0]
    assert (logp.exp() * step).sum() == pytest.approx(1.0, rel=1e-9)
    assert -d * (logp.exp() * logp * step).sum() == pytest.approx(float(p.entropy()), rel=1e-9, abs=1e-9)
    assert float(kl(p, q)) == pytest.approx(d * 0.5 * ((m - m2) / std) ** 2, rel=1e-9, abs=1e-12)
    mean = FixedStdGaussian(p.mean, p.std, scale=1.0 / d)
    for quantity in (lambda x: x.log_prob(q.mean), lambda x: x.entropy()):
        assert float(quantity(mean)) == pytest.approx(float(quantity(p)) / d, rel=1e-9, abs=1e-12)


KINDS = {
    "gaussian": lambda x: Gaussian(x[..., :2], 0.5 * x[..., 2:]),
    "squashed": lambda x: SquashedGaussian(x[..., :2], 0.5 * x[..., 2:]),
    "categorical": Categorical,
    "multi": lambda x: MultiCategorical(x, (2, 2)),
    "fixed": lambda x: FixedStdGaussian(x, torch.full(x.shape[:-1], 0.7, dtype=x.dtype)),
}


@pytest.mark.parametrize("kind", KINDS)
@given(SEEDS)
def test_the_metric_is_the_curvature_of_kl(kind, seed):
    """KL(theta || theta + e v) = e^2/2 v'Mv + O(e^3)."""
    point, direction = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p, e = KINDS[kind](point), 1e-4
    tangent = {name: (x - p.params()[name]) for name, x in KINDS[kind](point + direction).params().items()}
    product = sum((tangent[name] * m).sum() for name, m in p.fisher(tangent).items())
    both = (kl(p, KINDS[kind](point + e * direction)) + kl(p, KINDS[kind](point - e * direction))).sum()
    assert float(both) / e**2 == pytest.approx(float(product), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(SEEDS)
@settings(max_examples=8)
def test_samples_follow_the_density(kind, seed):
    """Over 20,000 draws the mean of log p - log q is KL(p || q) within five standard errors, and the mean of q / p is 1."""
    generator, n = torch.Generator().manual_seed(seed), 20_000
    point, near = torch.randn(4, dtype=torch.float64, generator=generator), 0.3 * torch.randn(4, dtype=torch.float64, generator=generator)
    p, q = KINDS[kind](point.expand(n, 4)), KINDS[kind]((point + near).expand(n, 4))
    action = p.sample(generator)
    log_ratio = p.log_prob(action) - q.log_prob(action)
    for found, expected in ((log_ratio, float(kl(p, q)[0])), (torch.exp(-log_ratio), 1.0)):
        assert abs(float(found.mean()) - expected) < 5.0 * float(found.std()) / math.sqrt(n) + 1e-9
