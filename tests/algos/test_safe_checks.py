"""Every constrained row: gradients and invariances of those that train; those solved on tables do not depend on the numbering of states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from on_policy_pieces import Given, all_params, by_rows, check_gradient, flatten, shake

from markovia.agents.records import Rollout
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.presets import configure, override
from markovia.algos.safe.conservative import optimal
from markovia.algos.safe.exact import reload
from markovia.algos.safe.methods import SAFE
from markovia.algos.safe.pareto import c_morl
from markovia.algos.safe.shield import shielded_policy
from markovia.algos.setup import build
from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.tabular import TabularMDP

GRID = "markovia/SafeGrid-v0"
TRAINED = [k for k, row in SAFE.items() if isinstance(row.value, OnPolicy) and "tabular" in row.kinds]


def small(method_id: str) -> tuple[OnPolicy, Any]:
    """The row on the grid with 4 x 12 decisions, and its setup in float64; the cost has a price from the start."""
    changes = {"num_envs": 4, "num_steps": 12, "num_env_steps": 1000, "constraint": {"cost_limit": [0.5]}}
    method = override(configure(method_id, GRID), changes)
    return method, build(GRID, method, 0, agent_options={"dtype": "float64"})


def driver_on(method: OnPolicy, setup: Any) -> OnPolicyDriver:
    """A driver whose constraint was measured once, above its limit."""
    driver = OnPolicyDriver(method, setup.agent, setup.collector, seed=2)
    driver.constraint.measure([[2.0]], [12])  # type: ignore[union-attr]
    return driver


@pytest.mark.parametrize("method_id", TRAINED)
@pytest.mark.check("gradient")
def test_gradient_of_the_whole_loss_matches_finite_differences(method_id: str) -> None:
    check_gradient(driver_on(*small(method_id)))


def after_step(method: OnPolicy, rollout: Rollout) -> torch.Tensor:
    """All parameters after one iteration on a given record, from one and the same shaken start."""
    setup = small("ppo-lag")[1]
    shake(setup.agent)
    driver = driver_on(method, setup)
    driver.collector = Given(rollout)
    driver.step()
    return flatten([p.detach() for p in all_params(driver.agent)])


@pytest.mark.parametrize("method_id", TRAINED)
@pytest.mark.check("invariance")
def test_order_of_rows_and_micro_batches_change_nothing(method_id: str) -> None:
    method, setup = small(method_id)
    method = by_rows(method)
    shake(setup.agent)
    rollout = setup.collector.collect(setup.agent, torch.Generator().manual_seed(1))
    assert rollout.cost is not None and rollout.cost.any()
    start = after_step(method, rollout)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(after_step(method, rollout.rows(order)), start, rtol=0, atol=1e-9)
    torch.testing.assert_close(after_step(by_rows(method, micro=3), rollout), start, rtol=0, atol=1e-9)


# -- solved on tables ------------------------------------------------------------------------------------------------------------------------

STATES = np.array([2, 0, 3, 1])
ACTIONS = np.array([1, 0, 2])


def renumbered(mdp: TabularMDP) -> TabularMDP:
    """State i of the result is state STATES[i], its action j is ACTIONS[j]."""
    return replace(mdp, P=mdp.P[STATES][:, ACTIONS][..., STATES], R=mdp.R[STATES][:, ACTIONS], rho=mdp.rho[STATES])


@pytest.mark.check("invariance", "reload")
def test_reload_does_not_depend_on_the_numbering() -> None:
    problem = CMDP.random(4, 3, seed=1)
    other = CMDP(renumbered(problem.mdp), problem.C[:, STATES][:, :, ACTIONS], problem.budgets)
    a, b = (reload(p, step=0.3, dual_step=0.05, iterations=200) for p in (problem, other))
    np.testing.assert_allclose(a.value, b.value, atol=1e-10)
    np.testing.assert_allclose(a.policy[STATES][:, ACTIONS], b.policy, atol=1e-9)


@pytest.mark.check("bad_input", "reload")
def test_reload_refuses_problems_that_are_none() -> None:
    mdp = TabularMDP.random(3, 2)
    with pytest.raises(ValueError, match="C must have shape"):
        SAFE["reload"].value.solve(CMDP(mdp, np.ones((2, 2)), np.ones(1)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        SAFE["reload"].value.solve(CMDP(mdp, np.full((3, 2), np.nan), np.ones(1)))


@pytest.mark.parametrize("method_id", ["stepmix", "epsmix"])
@pytest.mark.check("invariance")
def test_problems_explored_side_by_side_do_not_touch_each_other(method_id: str) -> None:
    """What is played in one problem is what is played there alone: floors and counts are its own."""
    rng = np.random.default_rng(0)
    P, reward, start = rng.dirichlet(np.ones(4), (3, 4, 3)), rng.random((3, 4, 3)), np.eye(4)[[0, 1, 2]]
    baseline = 0.6 * optimal(P, reward, 3)[0] + 0.4 / 3
    found = SAFE[method_id].value.run(P, reward, start, baseline, np.zeros(3), episodes=1)
    swapped = np.array([2, 0, 1])
    again = SAFE[method_id].value.run(P[swapped], reward[swapped], start[swapped], baseline[swapped], np.zeros(3), episodes=1)
    np.testing.assert_allclose(again.value[0], found.value[0, swapped])


@pytest.mark.check("invariance", "c-morl")
def test_fronts_do_not_depend_on_the_numbering() -> None:
    mdp = TabularMDP.random(4, 3, seed=2)
    rewards, weights = np.random.default_rng(1).random((2, 4, 3)), np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    a = c_morl(mdp, rewards, weights, rounds=1, picks=2)
    b = c_morl(renumbered(mdp), rewards[:, STATES][:, :, ACTIONS], weights, rounds=1, picks=2)
    order = [np.lexsort(x.points.T) for x in (a, b)]
    np.testing.assert_allclose(a.points[order[0]], b.points[order[1]], atol=1e-7)


def shielded(P: np.ndarray, uniform: np.ndarray, unsafe: np.ndarray, **changes: float) -> np.ndarray:
    return shielded_policy(P, uniform, unsafe, 5, **{"alpha": 0.8, "epsilon": 0.3, **changes})


@pytest.mark.check("invariance", "acs")
@pytest.mark.check("limit", "acs")
def test_the_shield_does_not_depend_on_the_numbering_and_lets_everything_pass_where_nothing_is_unsafe() -> None:
    rng = np.random.default_rng(3)
    P, policy, unsafe = rng.dirichlet(np.ones(4), (4, 3)), rng.dirichlet(np.ones(3), 4), np.array([False, True, False, False])
    a = shielded(P, policy, unsafe)
    b = shielded(P[STATES][:, ACTIONS][..., STATES], policy[STATES][:, ACTIONS], unsafe[STATES])
    np.testing.assert_allclose(a[:, STATES][:, :, ACTIONS], b, atol=1e-12)
    np.testing.assert_allclose(shielded(P, policy, np.zeros(4, bool)), np.broadcast_to(policy, (5, 4, 3)))
