"""The f-divergence table and its optimum, against numbers worked by hand, scipy's optimisers and linear programs."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from markovia.envs.exact import f_divergence, f_optimum
from markovia.envs.exact.divergences import NAMES

ORDERS = [(name, None) for name in NAMES if name != "alpha"] + [("alpha", a) for a in (-1.0, 0.0, 0.5, 1.0, 2.0)]
SMOOTH = [row for row in ORDERS if row[0] != "tv"]
U = np.array([0.2, 0.7, 1.0, 1.9, 4.0])

# pi = (1/4, 3/4), ref = (1/2, 1/2): u = (1/2, 3/2), D = (f(1/2) + f(3/2)) / 2
HAND = {
    "kl_pi_ref": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
    "kl_ref_pi": 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3),
    # the mixture is m = (3/8, 5/8); KL(pi || m) + KL(ref || m)
    "js": 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5),
    "chi2": 0.25,
    "hellinger": (math.sqrt(0.25) - math.sqrt(0.5)) ** 2 + (math.sqrt(0.75) - math.sqrt(0.5)) ** 2,
    "tv": 0.25,
}


def instance(seed=0, size=6):
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.ones(size))), rng.random(size)


@pytest.mark.parametrize("name", HAND)
def test_values_by_hand(name):
    value = f_divergence(name)(np.log([0.25, 0.75]), np.log([0.5, 0.5]))
    assert value == pytest.approx(HAND[name], abs=1e-15)


def test_alpha_half_is_twice_hellinger_and_minus_one_half_of_chi2_and_its_limits_are_the_two_kls():
    logp, ref = instance(1)[0], instance(2)[0]
    value = {a: f_divergence("alpha", a)(logp, ref) for a in (-1.0, 0.0, 1e-6, 0.5, 1 - 1e-6, 1.0)}
    assert value[0.5] == pytest.approx(2 * f_divergence("hellinger")(logp, ref), abs=1e-13)
    assert value[-1.0] == pytest.approx(f_divergence("chi2")(logp, ref) / 2, abs=1e-13)
    assert value[0.0] == pytest.approx(f_divergence("kl_pi_ref")(logp, ref), abs=1e-13)
    assert value[1.0] == pytest.approx(f_divergence("kl_ref_pi")(logp, ref), abs=1e-13)
    assert value[1e-6] == pytest.approx(value[0.0], rel=1e-4) and value[1 - 1e-6] == pytest.approx(value[1.0], rel=1e-4)


@pytest.mark.parametrize(("name", "alpha"), SMOOTH)
def test_derivatives_and_inverse_fit_together(name, alpha):
    f = f_divergence(name, alpha)
    h = 1e-5
    np.testing.assert_allclose(f.df(U), (f.f(U + h) - f.f(U - h)) / (2 * h), atol=1e-7)
    np.testing.assert_allclose(f.d2f(U), (f.df(U + h) - f.df(U - h)) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(f.df_inverse(f.df(U)), U, rtol=1e-12)
    assert f.f(np.ones(1))[0] == pytest.approx(0, abs=1e-15)
    assert f.df(U).max() < f.s_upper


@pytest.mark.parametrize(("name", "alpha"), ORDERS)
def test_torch_and_numpy_agree_and_gradient_is_f_prime(name, alpha):
    f = f_divergence(name, alpha)
    u = torch.tensor([0.2, 0.7, 1.3, 1.9, 4.0], dtype=torch.float64, requires_grad=True)
    s = f.df(U) - 0.01
    for function, x in ((f.f, U), (f.df, U), (f.d2f, U), (f.df_inverse, s)):
        np.testing.assert_allclose(function(torch.from_numpy(x)).numpy(), function(x), rtol=1e-13)
    (slope,) = torch.autograd.grad(f.f(u).sum(), u)
    torch.testing.assert_close(slope, f.df(u.detach()))
    logp, r = instance()
    optimum = f_optimum(torch.from_numpy(logp), torch.from_numpy(r), 0.3, name, alpha)
    assert isinstance(optimum, torch.Tensor)
    np.testing.assert_array_equal(optimum.numpy(), f_optimum(logp, r, 0.3, name, alpha))


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
@pytest.mark.parametrize(("name", "alpha"), SMOOTH)
def test_optimum_beats_scipys_and_agrees_with_it(name, alpha, beta):
    logp, r = instance(3, 4)
    f, p0 = f_divergence(name, alpha), np.exp(logp)

    def loss(pi):
        return -(pi @ r - beta * p0 @ f.f(np.maximum(pi, 1e-300) / p0))

    ours = f_optimum(logp, r, beta, name, alpha)
    assert ours.sum() == pytest.approx(1, abs=1e-14) and (ours >= 0).all()
    found = minimize(
        loss, p0, method="SLSQP", bounds=[(1e-10, 1)] * 4, constraints={"type": "eq", "fun": lambda pi: pi.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    )  # fmt: skip
    assert loss(ours) <= found.fun + 1e-9
    np.testing.assert_allclose(ours, found.x, atol=2e-4)


@pytest.mark.parametrize(("name", "alpha"), SMOOTH)
def test_optimum_has_one_multiplier(name, alpha):
    """KKT: R - beta f'(u) is the same lam wherever pi > 0, and not above lam where pi = 0."""
    logp, r = instance(4, 40)
    u = f_optimum(logp, r, 0.2, name, alpha) / np.exp(logp)
    with np.errstate(divide="ignore"):
        lam = r - 0.2 * f_divergence(name, alpha).df(u)
    assert np.ptp(lam[u > 0]) < 1e-8
    if (u == 0).any():
        assert (lam[u == 0] <= lam[u > 0].max() + 1e-8).all()


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.6, 2.0])
def test_tv_optimum_against_a_linear_program(beta):
    """max pi.R - beta sum t, t >= |pi - p0| / 2: variables (pi, t)."""
    for seed in range(5):
        logp, r = instance(seed)
        n, p0, eye = 6, np.exp(logp), np.eye(6)
        lp = linprog(
            np.concatenate([-r, beta * np.ones(n)]),
            A_ub=np.block([[eye / 2, -eye], [-eye / 2, -eye]]), b_ub=np.concatenate([p0, -p0]) / 2,
            A_eq=np.concatenate([np.ones(n), np.zeros(n)])[None], b_eq=[1.0],
        )  # fmt: skip
        np.testing.assert_allclose(f_optimum(logp, r, beta, "tv"), lp.x[:n], atol=1e-9)


def test_kl_and_reverse_kl_optima_by_hand():
    """p0 = (1/2, 1/2), R = (1, 0), beta = 1: KL(pi||p0) gives e/(1+e); KL(p0||pi) gives pi_1 = 1/(2 (lam - 1)) with
    1/(2(lam-1)) + 1/(2 lam) = 1, so lam = 1 + 1/sqrt 2 and pi_1 = 1/sqrt 2."""
    logp, r = np.log([0.5, 0.5]), np.array([1.0, 0.0])
    assert f_optimum(logp, r, 1.0, "kl_pi_ref")[0] == pytest.approx(math.e / (1 + math.e), abs=1e-14)
    assert f_optimum(logp, r, 1.0, "kl_ref_pi")[0] == pytest.approx(math.sqrt(0.5), abs=1e-14)
    # chi^2: u = 1 + (R - lam)/2 with mean 1, so lam = 1/2 and u_1 = 5/4
    assert f_optimum(logp, r, 1.0, "chi2")[0] == pytest.approx(0.625, abs=1e-14)


def test_optimum_keeps_zero_reference_mass_at_zero_and_equal_rewards_at_the_reference():
    logp = np.array([-np.inf, math.log(0.4), math.log(0.6)])
    for name, alpha in ORDERS:
        assert f_optimum(logp, np.array([9.0, 1.0, 0.0]), 0.3, name, alpha)[0] == 0
        np.testing.assert_allclose(f_optimum(logp, np.full(3, 0.7), 0.3, name, alpha), [0, 0.4, 0.6], atol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f_divergence("kl_pi_reff"), "did you mean 'kl_pi_ref'"),
        (lambda: f_divergence("alpha"), "needs its order"),
        (lambda: f_divergence("js", 0.5), "has no order"),
        (lambda: f_divergence("alpha", math.nan), "finite"),
        (lambda: f_optimum(np.log([0.5, 0.5]), np.ones(2), 0.0, "js"), "beta"),
        (lambda: f_optimum(np.log([0.5, 0.5]), np.ones(3), 1.0, "js"), "one length"),
        (lambda: f_optimum(np.zeros(2), np.ones(2), 1.0, "js"), "normalised"),
        (lambda: f_optimum(np.log([0.5, 0.5]), np.array([1.0, math.nan]), 1.0, "js"), "NaN"),
    ],
)
def test_bad_input_is_taught(call, message):
    with pytest.raises(ValueError, match=message):
        call()
