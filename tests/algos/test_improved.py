"""The closed-form operators against a numeric optimiser, their limits, and the agent that acts by them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy.optimize import minimize

from markovia.agents.critics import QuantileEnsemble
from markovia.agents.improved import (
    ImprovedAgent,
    SquashedMixture,
    ellipsoid_step,
    improve,
    jensen_ellipsoid,
    lower_bound,
    mode_budgets,
)
from markovia.agents.interface import Agent

torch.set_num_threads(1)
F64 = torch.float64
OBS = spaces.Box(-1.0, 1.0, (3,), np.float32)
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))


def t(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def problem(seed: int, d: int = 3, m: int = 3) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn((m, d, d), generator=g, dtype=F64)
    cov = root @ root.mT + 0.3 * torch.eye(d, dtype=F64)
    log_weight = torch.log_softmax(torch.randn(m, generator=g, dtype=F64), 0)
    return log_weight, 0.3 * torch.randn((m, d), generator=g, dtype=F64), cov, torch.randn(d, generator=g, dtype=F64)


def test_one_gaussian_by_hand() -> None:
    # Sigma diag(4, 1), g (3, 4): Sigma g = (12, 4), g'Sigma g = 52; radius sqrt(2 * 0.5) = 1
    found = ellipsoid_step(t(1, 2), torch.diag(t(4, 1)), t(3, 4), math.sqrt(2 * 0.5))
    torch.testing.assert_close(found, t(1 + 12 / 52**0.5, 2 + 4 / 52**0.5))
    assert torch.equal(ellipsoid_step(t(1, 2), torch.diag(t(4, 1)), t(0, 0), 1.0), t(1, 2))


def test_budgets_by_hand() -> None:
    # peaks: log 0.8 - log(2 pi 0.25), log 0.2 - log(2 pi): the second lies log 16 below the first
    log_weight, cov = t(0.8, 0.2).log(), torch.stack([0.25 * torch.eye(2, dtype=F64), torch.eye(2, dtype=F64)])
    torch.testing.assert_close(mode_budgets(log_weight, cov, log_tau=3.0), t(3.0, 3.0 - math.log(16)))
    torch.testing.assert_close(mode_budgets(log_weight, cov, log_tau=0.5), t(0.5, 0.0))


@pytest.mark.parametrize("seed", range(4))
def test_jensen_set_is_the_ellipsoid(seed: int) -> None:
    """The quadratic form at any point equals the weighted sum of the modes' own; its best point is what a constrained optimiser finds."""
    log_weight, mean, cov, grad = problem(seed)
    center, whole, square = jensen_ellipsoid(log_weight, mean, cov, log_tau=2.0)

    def given(mu: torch.Tensor) -> torch.Tensor:
        away = mu - mean
        return (log_weight.exp() * 0.5 * torch.einsum("md,mde,me->m", away, torch.linalg.inv(cov), away)).sum()

    point = torch.randn(3, generator=torch.Generator().manual_seed(9), dtype=F64)
    ours = 0.5 * (point - center) @ torch.linalg.inv(whole) @ (point - center) + 2.0 - 0.5 * square
    torch.testing.assert_close(ours, given(point))
    assert float(square) > 0
    found = ellipsoid_step(center, whole, grad, square.sqrt())
    limit = {"type": "ineq", "fun": lambda x: 2.0 - float(given(torch.as_tensor(x)))}
    best = minimize(lambda x: -float(grad @ torch.as_tensor(x)), center.numpy(), constraints=[limit], method="SLSQP", options={"ftol": 1e-12})
    assert float(grad @ found) == pytest.approx(-best.fun, abs=1e-5)


def test_narrow_modes_keep_their_ellipsoid_in_float32() -> None:
    """Modes that lie close together and far from 0, as those of actions logged at their bound: the set is as small as in float64."""
    g = torch.Generator().manual_seed(0)
    mean = 6.1 + 0.001 * torch.randn((200, 4, 2), generator=g, dtype=F64)
    cov = torch.diag_embed(torch.full((200, 4, 2), math.exp(-10.0), dtype=F64))
    log_weight = torch.log_softmax(torch.randn((200, 4), generator=g, dtype=F64), -1)
    exact = jensen_ellipsoid(log_weight, mean, cov, log_tau=0.5)[2]
    found = jensen_ellipsoid(log_weight.float(), mean.float(), cov.float(), log_tau=0.5)[2]
    assert float(exact.max()) <= 1.0
    torch.testing.assert_close(found.double(), exact, atol=2e-2, rtol=0)
    assert make().distribution(torch.full((1, 10), -50.0)).log_std.eq(-5.0).all()  # no mode narrower than published code allows


def test_no_budget_gives_the_best_mode() -> None:
    log_weight, mean, cov, grad = (x[None] for x in problem(1))
    q = lambda a: (a * grad[:, None]).sum(-1)  # noqa: E731
    found = improve(q, log_weight, mean, cov, log_tau=0.0, min_weight=0.0)
    torch.testing.assert_close(found, mean[:, q(torch.tanh(mean)).argmax(1)[0]])
    # one that is too light does not count
    light = torch.log_softmax(torch.tensor([[5.0, 0.0, 0.0]], dtype=F64), 1)
    torch.testing.assert_close(improve(q, light, mean, cov, log_tau=0.0, min_weight=0.05), mean[:, 0])


@pytest.mark.check("limit", "cfpi", "cfpi/sg")
def test_one_mode_is_the_single_gaussian() -> None:
    """Jensen's bound of one mode is the mode, so both candidates agree; invariant to the order of states."""
    _, mean, cov, grad = problem(2)
    means, covs = mean[:, None], cov[:, None]
    q = lambda a: (a * grad).sum(-1)  # noqa: E731
    slope = grad * (1 - torch.tanh(mean) ** 2)
    found = improve(q, torch.zeros(3, 1, dtype=F64), means, covs, log_tau=0.5, min_weight=0.05)
    torch.testing.assert_close(found, ellipsoid_step(mean, cov, slope, 1.0))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(improve(q, torch.zeros(3, 1, dtype=F64), means[order], covs[order], log_tau=0.5, min_weight=0.05), found[order])


def test_lower_bound_by_hand() -> None:
    q = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    torch.testing.assert_close(lower_bound(q, pessimism=2.0), torch.tensor([2.0 - 2.0 * 2**0.5, 2.0]))
    assert torch.equal(lower_bound(q[:1], pessimism=2.0), q[0])


def test_samples_follow_the_mixture() -> None:
    dist = SquashedMixture(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[[-2.0], [2.0]]]), torch.full((1, 2, 1), -1.0))
    many = SquashedMixture(*(x.expand(4000, *x.shape[1:]) for x in dist.params().values()))
    drawn = many.sample(torch.Generator().manual_seed(0))
    assert float((drawn > 0).float().mean()) == pytest.approx(0.75, abs=0.03) and dist.mode().item() == 2.0
    assert float(drawn[drawn > 0].std()) == pytest.approx(math.exp(-1), rel=0.1)


def make() -> ImprovedAgent:
    torch.manual_seed(0)
    improvement = {"modes": 2, "log_tau": 0.5, "pessimism": 1.0, "min_weight": 0.05}
    q = {"num": 2, "embedding": 8, "hidden": [16, 16], "activation": "relu"}
    return ImprovedAgent.improved(OBS, BOX, improvement, q, hidden=(16,), activation="relu", normalize_obs=True)


def test_greedy_actions_are_better_than_the_modes_and_survive_saving(tmp_path: Any) -> None:
    agent = make()
    obs = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    seen = agent.observe(obs)
    action, logp = agent.act(seen, deterministic=True)
    dist = agent.distribution(agent.net["policy"](seen)[0])
    values = agent.value(seen, torch.tanh(torch.cat([dist.mean, action[:, None]], 1))).detach()
    assert float(values[:, 2].mean()) > float(values[:, :2].amax(1).mean()) and logp.shape == (20,)
    taken = agent.predict(obs, deterministic=True)[0]
    assert taken.shape == (20, 2) and BOX.contains(taken[0])
    agent.save(tmp_path / "a")
    again = Agent.load(tmp_path / "a")
    np.testing.assert_array_equal(again.predict(obs, deterministic=True)[0], taken)
    one = agent.predict(obs[0], deterministic=True)[0]
    np.testing.assert_allclose(one, taken[0], rtol=1e-5)
    assert agent.predict(obs)[0].shape == (20, 2)


def test_quantile_critics_refuse_what_can_not_be() -> None:
    with pytest.raises(ValueError, match="at least 1 member, 1 cosine and 2 hidden layers"):
        QuantileEnsemble(OBS, 2, hidden=(8,))
