"""Chance-constrained safeguards: the bound and the correction by hand, the exact shield by simulation of the law."""

import numpy as np
import pytest
import torch

from markovia.algos.safe.shield import chance_safe, correct, least_advantage, safest, shielded_policy


@pytest.mark.check("value", "acs")
@pytest.mark.check("bad_input", "acs")
def test_bound_by_hand():
    # epsilon 0.2: at psi 0.9 half of the margin 0.1 may be spent, at 0.6 half of the missing 0.2 must come back.
    bound = least_advantage(torch.tensor([0.9, 0.8, 0.6]), alpha=0.5, epsilon=0.2)
    assert torch.allclose(bound, torch.tensor([-0.05, 0.0, 0.1]))
    with pytest.raises(ValueError, match="alpha"):
        least_advantage(bound, alpha=0.0, epsilon=0.2)


def test_correction_by_hand():
    # A(a) = a_0 - 2 a_1: the largest component of its gradient is a_1's, so a step moves a by (0.05, -0.1) * 0.5 = (0.025, -0.05).
    advantage = lambda a: a[:, 0] - 2 * a[:, 1]  # noqa: E731
    start = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 1.0]])
    out = correct(start, advantage, torch.tensor([0.2, 0.2, 9.0]), iterations=2)
    assert torch.allclose(out.action, torch.tensor([[0.05, -0.1], [0.5, 0.0], [0.05, 0.9]]))
    assert out.intervened.tolist() == [True, False, True]
    assert torch.allclose(out.margin, torch.tensor([0.05, 0.3, -10.75]))
    stays = correct(torch.tensor([[1.0, -1.0]]), advantage, torch.tensor([9.0]))  # the best corner: nothing is left to gain
    assert torch.equal(stays.action, torch.tensor([[1.0, -1.0]])) and not stays.intervened.any()
    flat = correct(torch.zeros(1, 2), lambda a: 0 * a.sum(1), torch.tensor([1.0]))
    assert torch.equal(flat.action, torch.zeros(1, 2))


def test_a_step_never_lowers_the_advantage_to_first_order():
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(8, 3, generator=rng, dtype=torch.float64)
    advantage = lambda a: torch.tanh(a @ W.T).sum(1)  # noqa: E731
    a = 0.5 * torch.rand(50, 3, generator=rng, dtype=torch.float64)
    out = correct(a, advantage, torch.full((50,), 1e9, dtype=torch.float64), step=1e-4, iterations=1)
    assert (advantage(out.action) >= advantage(a)).all()


def random_mdp(seed):
    """12 states of which two are absorbing and unsafe; how likely they are to be entered differs by action."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.ones(10), (12, 3))
    hazard = rng.uniform(0.0, 0.2, (12, 3, 1))
    P = np.concatenate([P * (1 - hazard), hazard * rng.dirichlet(np.ones(2), (12, 3))], -1)
    P[10:] = np.eye(12)[10:, None]
    return P, np.arange(12) >= 10, np.eye(12)[0]


def test_exact_shield_orders_the_chances():
    for seed in range(5):
        P, unsafe, start = random_mdp(seed)
        uniform = np.full((12, 3), 1 / 3)
        free = chance_safe(P, np.broadcast_to(uniform, (30, 12, 3)), unsafe, start)
        loose, strict = (chance_safe(P, shielded_policy(P, uniform, unsafe, 30, alpha=a, epsilon=0.2), unsafe, start) for a in (0.8, 0.2))
        psi, actions = safest(P, unsafe, 30)
        assert free < loose < strict <= psi[0, 0] + 1e-12
        assert chance_safe(P, np.eye(3)[actions], unsafe, start) == pytest.approx(psi[0, 0])  # psi is what its policy reaches


def test_chance_is_that_of_sampled_episodes():
    P, unsafe, start = random_mdp(7)
    policy = shielded_policy(P, np.full((12, 3), 1 / 3), unsafe, 10, alpha=0.5, epsilon=0.3)
    rng, n = np.random.default_rng(0), 20_000
    state = np.zeros(n, dtype=int)
    for t in range(10):
        action = (rng.random((n, 1)) > policy[t][state].cumsum(-1)).sum(-1).clip(max=2)
        state = (rng.random((n, 1)) > P[state, action].cumsum(-1)).sum(-1).clip(max=11)
    assert (~unsafe[state]).mean() == pytest.approx(chance_safe(P, policy, unsafe, start), abs=0.012)
