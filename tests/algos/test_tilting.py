"""Exact formulas of KL-regularised RL and of best-of-N: by hand, against each other, and refused input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from markovia.algos.on_policy.rewards import calibrated, combine
from markovia.algos.on_policy.tilting import aligned_for_best_of_n, evidence_bound, exponent_of_kl, tilt_kl, win_rate, win_rate_variation


@pytest.mark.check("value", "rl-kl-bayes")
def test_evidence_bound_by_hand() -> None:
    # two outcomes, p0 = 1/2 each, R = log 3 and 0, beta 1: Z = 2, p* = 3/4, 1/4; for pi = p0: E R = log 3 / 2
    half = np.log([0.5, 0.5])
    left, right = evidence_bound(half, half, np.array([math.log(3), 0.0]), beta=1.0)
    assert left == pytest.approx(0.5 * math.log(3)) and right == pytest.approx(math.log(2) - 0.5 * math.log(4 / 3))


@pytest.mark.check("limit", "rl-kl-bayes")
def test_at_the_posterior_the_evidence_bound_is_tight() -> None:
    rng = np.random.default_rng(3)
    ref, reward, beta = np.log(rng.dirichlet(np.ones(6))), rng.normal(size=6), 0.7
    posterior = ref + reward / beta
    log_z = np.log(np.exp(posterior).sum())
    assert evidence_bound(posterior - log_z, ref, reward, beta=beta) == pytest.approx((beta * log_z, beta * log_z))


@pytest.mark.check("value", "bon-asymptotics")
@pytest.mark.check("limit", "bon-asymptotics")
def test_exponent_of_a_kl() -> None:
    # p0 = 1/2: the tilt 3/4, 1/4 has KL log 2 - H(1/4), and needs e^alpha = 3
    half = np.log([0.5, 0.5])
    kl = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert exponent_of_kl(half, np.array([1.0, 0.0]), kl_nats=kl) == pytest.approx(math.log(3))
    assert tilt_kl(half, np.array([1.0, 0.0]), alpha=0.0) == 0.0


@pytest.mark.check("value", "inf-align")
def test_win_rate_by_hand_and_its_variation_by_differences() -> None:
    p, ref = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    # one sample: .25 (.25) + .75 (.75); best of two: the better outcome with 15/16 against 3/4
    assert win_rate(p, ref, n=1) == pytest.approx(0.25 * 0.25 + 0.75 * 0.75)
    assert win_rate(p, ref, n=2) == pytest.approx(1 / 16 * 1 / 8 + 15 / 16 * (1 / 4 + 3 / 8))
    rng = np.random.default_rng(0)
    p, ref = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    found = win_rate_variation(p, ref, n=4)
    for j in range(5):  # moving mass from the last outcome to outcome j
        d = np.zeros(6)
        d[j], d[-1] = 1e-6, -1e-6
        slope = (win_rate(p + d, ref, n=4) - win_rate(p - d, ref, n=4)) / 2e-6
        assert found[j] - found[-1] == pytest.approx(slope, rel=1e-6)


@pytest.mark.check("limit", "inf-align")
def test_one_sample_asks_for_the_calibrated_reward() -> None:
    ref = np.random.default_rng(1).dirichlet(np.ones(5))
    share = np.concatenate([[0.0], np.cumsum(ref)])
    phi = win_rate_variation(ref, ref, n=1)
    np.testing.assert_allclose(phi - phi[0], (share[1:] + share[:-1]) / 2 - ref[0] / 2, atol=1e-12)


def test_calibration_counts_ties_half_and_sees_ranks_only() -> None:
    samples = torch.tensor([[0.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    assert calibrated(torch.tensor([1.0], dtype=torch.float64), samples).tolist() == [0.5]  # one below, two ties: (1 + 1) / 4
    again = calibrated(torch.tensor([1.0], dtype=torch.float64).exp(), samples.exp())
    assert again.tolist() == [0.5]


@pytest.mark.check("value", "rm-ensemble")
@pytest.mark.check("limit", "rm-ensemble")
def test_ensembles_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    # mean 3, variance 7
    assert [combine(rewards, how=h, lam=0.5).item() for h in ("mean", "worst", "uncertainty")] == [3.0, 1.0, -0.5]
    assert combine(rewards, how="uncertainty", lam=0.0).item() == 3.0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: evidence_bound(np.zeros(1), np.zeros(1), np.zeros(1), beta=0.0), "beta weighs the KL"),
        (lambda: exponent_of_kl(np.log([0.5, 0.5]), np.array([1.0, 0.0]), kl_nats=0.7), r"KL in \[0, 0.6931\)"),
        (lambda: aligned_for_best_of_n(np.array([0.5, 0.5]), beta=1.0, n=0), "n counts samples"),
        (lambda: combine(torch.zeros(2, 1), how="uncertainty"), "at least 2 models"),
        (lambda: combine(torch.zeros(2, 2), how="median"), "mean, worst or uncertainty"),
    ],
)
@pytest.mark.check("bad_input", "rl-kl-bayes", "bon-asymptotics", "inf-align", "rm-ensemble")
def test_bad_input_is_told(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
