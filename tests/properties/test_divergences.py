"""The f-divergence table at arbitrary points, orders and distributions."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from markovia.envs.exact.divergences import NAMES, f_divergence, f_optimum

SMOOTH = [name for name in NAMES if name != "tv"]  # tv's f' is a step, without an inverse
ORDERS = st.sampled_from([0.0, 1.0, 0.5, -1.0]) | st.floats(-3.0, 3.0).filter(lambda a: min(abs(a), abs(a - 1.0)) > 0.02)
RATIOS = st.floats(1e-3, 1e3)


def row(name, alpha):
    return f_divergence(name, alpha if name == "alpha" else None)


def at(function, *points):
    return function(np.array(points, dtype=np.float64))


@pytest.mark.parametrize("name", NAMES)
@given(ORDERS)
def test_f_is_zero_at_one(name, alpha):
    assert abs(float(at(row(name, alpha).f, 1.0)[0])) < 1e-12


@pytest.mark.parametrize("name", NAMES)
@given(ORDERS, RATIOS, RATIOS, st.floats(0.0, 1.0))
def test_f_is_convex(name, alpha, u, v, weight):
    f = row(name, alpha).f
    middle, (left, right) = float(at(f, weight * u + (1.0 - weight) * v)[0]), at(f, u, v)
    chord = weight * left + (1.0 - weight) * right
    assert middle <= chord + 1e-9 * (1.0 + abs(left) + abs(right))


@pytest.mark.parametrize("name", NAMES)
@given(ORDERS, RATIOS, RATIOS)
def test_slope_and_curvature_are_those_of_f(name, alpha, u, v):
    """The tangent at u lies below f everywhere: that f' is a slope of a convex f; f'' >= 0, and f' grows by its integral."""
    div = row(name, alpha)
    (fu, fv), slope = at(div.f, u, v), float(at(div.df, u)[0])
    assert fv >= fu + slope * (v - u) - 1e-9 * (1.0 + abs(fu) + abs(fv) + abs(slope * (v - u)))
    assert float(at(div.d2f, u)[0]) >= 0.0
    if name != "tv":
        step = 1e-5 * u
        up, down = at(div.df, u + step, u - step)
        assert np.isclose((up - down) / (2 * step), float(at(div.d2f, u)[0]), rtol=1e-4, atol=1e-9 * (abs(up) + abs(down)) / step)


@pytest.mark.parametrize("name", SMOOTH)
@given(ORDERS, RATIOS)
def test_the_inverse_undoes_the_slope(name, alpha, u):
    div = row(name, alpha)
    s = at(div.df, u)
    # Where f' saturates, u can't be seen in it: an error of a rounding in s is eps |s| / f''(u) in u.
    lost = 4.0 * np.finfo(np.float64).eps * (1.0 + abs(s[0])) / float(at(div.d2f, u)[0])
    assume(lost < 0.1 * u)
    assert np.isclose(float(div.df_inverse(s)[0]), u, rtol=1e-9, atol=10.0 * lost)
    assert s[0] < div.s_upper


@pytest.mark.parametrize("name", SMOOTH)
@given(ORDERS, st.floats(-50.0, 50.0))
def test_the_slope_undoes_the_inverse(name, alpha, s):
    """(f')^-1 gives 0 below f'(0), where the optimum has no mass."""
    div = row(name, alpha)
    assume(s < div.s_upper - 1e-3)
    u = div.df_inverse(np.array([s]))
    assert u[0] >= 0.0
    assume(1e-100 < u[0] < 1e100)
    assert np.isclose(float(div.df(u)[0]), s, rtol=1e-7, atol=1e-7)


@st.composite
def pairs(draw):
    """Two distributions of full support over the same outcomes, as log-probs."""
    size = draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    logits = spread * rng.normal(size=(2, size))
    logps = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return logps[0], logps[1]


@pytest.mark.parametrize("name", NAMES)
@given(ORDERS, pairs())
def test_divergences_are_not_negative_and_zero_for_equals(name, alpha, given_pair):
    logp, logp_ref = given_pair
    div = row(name, alpha)
    assert float(div(logp, logp_ref)) >= -1e-9
    assert abs(float(div(logp, logp))) < 1e-9


@pytest.mark.parametrize("name", NAMES)
@given(ORDERS, pairs(), st.floats(0.05, 5.0))
def test_no_mixture_with_another_policy_beats_the_optimum(name, alpha, given_pair, beta):
    """E_pi R - beta D_f(pi || ref) falls from the optimum towards any policy: it is concave, so small steps say all."""
    logp, logp_ref = given_pair
    div, reward = row(name, alpha), logp  # any numbers
    best = f_optimum(logp_ref, reward, beta, div)
    assert np.isclose(best.sum(), 1.0, atol=1e-9) and (best >= 0.0).all()

    def objective(p):
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.exp(logp_ref) * div.f(p / np.exp(logp_ref))
        return float(p @ reward - beta * terms.sum())

    top = objective(best)
    for step in (1e-3, 0.1, 1.0):
        assert objective((1.0 - step) * best + step * np.exp(logp)) <= top + 1e-7 * (1.0 + abs(top))
