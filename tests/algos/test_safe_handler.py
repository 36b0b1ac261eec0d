"""The constraint's bookkeeping in a training loop: what is measured when, how a record is priced, state that survives JSON."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from markovia.agents.records import Rollout
from markovia.algos.advantages import (
    GAE,
    BatchReturn,
    ConflictAware,
    Consistency,
    Greedy,
    GroupNormalised,
    LeaveOneOut,
    MovingBaseline,
)
from markovia.algos.safe.constraint import Constraint
from markovia.algos.safe.dual import FixedDual, PIDDual, TrustRegionDual
from markovia.algos.safe.handler import PATIENCE, ConstraintHandler
from markovia.algos.safe.termination import SoftTermination

INTEGRAL = PIDDual(ki=0.5, init=0.0)


def record(cost, reward=None, value=None):
    """One or more rows that end by termination."""
    cost = torch.as_tensor(cost, dtype=torch.float64)
    B, T = cost.shape[:2]
    continuation = torch.ones(B, T, dtype=torch.float64)
    continuation[:, -1] = 0.0
    yes, no = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    zeros = torch.zeros(B, T, dtype=torch.float64)
    return Rollout(
        obs=zeros, action=zeros, logp_old=zeros, reward=zeros if reward is None else torch.as_tensor(reward, dtype=torch.float64), valid=yes,
        mask=yes, continuation=continuation, truncated=no, cost=cost, group=torch.zeros(B, dtype=torch.long),
        value=torch.zeros(B, T, 1 + cost.shape[2], dtype=torch.float64) if value is None else torch.as_tensor(value, dtype=torch.float64),
    )  # fmt: skip


def test_only_finished_episodes_move_the_weight():
    handler = ConstraintHandler(Constraint(cost_limit=2.0, dual=INTEGRAL), gamma=0.99)
    handler.measure([], [])
    assert handler.weight.tolist() == [0.0] and np.isnan(handler.cost).all() and "violation" not in handler.describe()
    handler.measure([[3.0], [7.0]], [10, 30])  # mean 5, violation 3, weight 0.5 * 3
    assert handler.weight.tolist() == [1.5] and handler.horizon == 20.0
    handler.measure([], [])
    assert handler.weight.tolist() == [1.5]
    assert handler.describe() == {"cost_weight": 1.5, "violation": 3.0}


def test_mixing_a_record_by_hand():
    # gamma 1/2, lam 1, all values 0: advantages are the discounted sums. Costs (0, 4): A_c = (2, 4), centred (-1, 1). Rewards (1, 2): A = (2, 2).
    handler = ConstraintHandler(Constraint(cost_limit=0.0, dual=FixedDual(1.0)), gamma=0.5)
    rollout, advantage = record([[[0.0], [4.0]]], [[1.0, 2.0]]), GAE(gamma=0.5, lam=1.0)
    adv, _ = advantage(rollout.reward, rollout, {})
    out = handler.mix(rollout, adv, advantage)
    assert torch.allclose(rollout.columns["cost_adv"][0, :, 0], torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert torch.allclose(out, torch.tensor([[(2 + 1) / 2, (2 - 1) / 2]], dtype=torch.float64))
    # The critic's targets are (1 - gamma) times the discounted costs.
    assert torch.allclose(rollout.columns["cost_ret"][0, :, 0], torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_a_right_critic_leaves_no_cost_advantage():
    # Costs (1, 1), gamma 1/2: discounted costs-to-go 1.5 and 1, the critic's unit is half of that.
    handler = ConstraintHandler(Constraint(dual=FixedDual(1.0)), gamma=0.5)
    rollout = record([[[1.0], [1.0]]], value=[[[9.0, 0.75], [9.0, 0.5]]])
    handler.mix(rollout, torch.zeros(1, 2, dtype=torch.float64), GAE(gamma=0.5))
    assert torch.allclose(rollout.columns["cost_adv"], torch.zeros(1, 2, 1, dtype=torch.float64))


def test_several_costs_and_critic_free_estimators():
    handler = ConstraintHandler(Constraint(cost_limit=(1.0, 1.0), dual=FixedDual(0.5)), gamma=1.0)
    rollout = record([[[1.0, 0.0]], [[3.0, 2.0]]], [[4.0], [4.0]])  # leave-one-out: -2, 2 and -2, 2
    out = handler.mix(rollout, torch.zeros(2, 1, dtype=torch.float64), LeaveOneOut())
    assert torch.allclose(rollout.columns["cost_adv"][:, 0], torch.tensor([[-2.0, -2.0], [2.0, 2.0]], dtype=torch.float64))
    assert torch.allclose(out, torch.tensor([[1.0], [-1.0]], dtype=torch.float64)) and "cost_ret" not in rollout.columns  # (0 - 2) / (1 + 1)
    handler.measure([[2.0, 0.0]], [1])
    assert handler.describe() == {"cost_weight/0": 0.5, "cost_weight/1": 0.5, "violation/0": 1.0, "violation/1": -1.0}


@pytest.mark.check("limit", "ppo-lag", "ppo-lag/pid")
def test_weight_zero_leaves_the_advantage_bit_for_bit():
    handler, rng = ConstraintHandler(Constraint(dual=FixedDual(0.0)), gamma=0.9), torch.Generator().manual_seed(0)
    rollout, adv = record(torch.rand(2, 5, 1, generator=rng)), torch.randn(2, 5, generator=rng, dtype=torch.float64)
    assert torch.equal(handler.mix(rollout, adv, GAE()), adv)


def test_soft_termination_cuts_reward_and_continuation():
    handler = ConstraintHandler(Constraint(dual=FixedDual(0.0), termination=SoftTermination(p_max=0.5)), gamma=0.9)
    rollout = record([[[0.0], [2.0], [1.0]]], [[1.0, 1.0, -1.0]])
    reward = handler.soften(rollout, rollout.reward, 1.0)
    # scales 1e-6, 0.05 * 2 (nearly), 0.95 * 0.1 + 0.05: shares 0, 1, 1
    assert torch.allclose(reward, torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64))
    assert torch.allclose(rollout.continuation, torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64))
    plain = ConstraintHandler(Constraint(), gamma=0.9)
    rollout = record([[[0.0], [2.0]]], [[1.0, 1.0]])
    assert plain.soften(rollout, rollout.reward, 1.0) is rollout.reward


def test_state_is_json_and_goes_on_to_the_same_numbers():
    constraint = Constraint(cost_limit=1.0, dual=PIDDual(kp=1.0, ki=0.5, kd=1.0, ema_d=0.5, delay=2))
    soft = Constraint(cost_limit=1.0, dual=FixedDual(0.0), termination=SoftTermination())
    for settings in (constraint, soft):
        whole, first = ConstraintHandler(settings, 0.9), ConstraintHandler(settings, 0.9)
        costs = [[[4.0]], [[2.0]], [[3.0]], [[0.0]]]
        rollout = record([[[0.5], [2.0]]])
        for c in costs:
            whole.measure(c, [5])
            whole.soften(rollout, rollout.reward, 1.0)
        for c in costs[:2]:
            first.measure(c, [5])
            first.soften(rollout, rollout.reward, 1.0)
        second = ConstraintHandler(settings, 0.9)
        second.load_state(json.loads(json.dumps(first.state())))
        for c in costs[2:]:
            second.measure(c, [5])
            second.soften(rollout, rollout.reward, 1.0)
        assert json.dumps(second.state()) == json.dumps(whole.state())


def test_a_margin_and_an_aim_tighten_what_cpo_sees():
    handler = ConstraintHandler(Constraint(cost_limit=10.0, aim=0.8, dual=TrustRegionDual(margin_lr=0.5)), gamma=0.9)
    # aim 8: violations 4 and 2, so that the margin is 2, then 3; an episode of 100 steps
    for cost, expected in ((12.0, (4.0 + 2.0) / 100), (10.0, (2.0 + 3.0) / 100)):
        handler.measure([[cost]], [100])
        assert handler.step_violation == pytest.approx(expected)
    assert handler.violation.tolist() == [0.0]  # what is reported is against the limit itself
    handler.measure([[0.0]], [100])  # 3 - 4 < 0
    assert handler.step_violation == pytest.approx(-0.08) and handler.state()["dual"] == {"margin": [0.0]}


def test_a_discounted_violation_is_spread_over_the_discounted_steps():
    handler = ConstraintHandler(Constraint(cost_limit=0.5, cost_gamma=0.95, dual=TrustRegionDual()), gamma=0.95)
    handler.measure([[1.0]], [60])
    assert handler.step_violation == pytest.approx(0.5 * 0.05 / (1 - 0.95**60)) == pytest.approx(0.0262, abs=1e-4)


@pytest.mark.parametrize(
    "advantage",
    [
        GAE(), LeaveOneOut(), MovingBaseline(), BatchReturn(), BatchReturn(reward_to_go=True), GroupNormalised(), GroupNormalised("batch"), Greedy(),
        Consistency(), ConflictAware(),
    ],
    ids=lambda a: f"{type(a).__name__}-{getattr(a, 'scale', '')}",
)  # fmt: skip
def test_cost_advantages_grow_with_the_cost(advantage):
    """Else the multiplier's unit would depend on the batch."""
    handler, rng = ConstraintHandler(Constraint(dual=FixedDual(1.0)), gamma=1.0), torch.Generator().manual_seed(0)
    cost, found = torch.rand(6, 3, 1, generator=rng), []
    for size in (1.0, 100.0):
        rollout = replace(record(size * cost), group=torch.tensor([0, 0, 0, 1, 1, 1]), outcome={"completion_text": list("abacca")})
        rollout.columns |= {"greedy": torch.rand(6, 1, generator=rng).expand(6, 3), "entropy": torch.full((6, 3), 0.5)}
        handler.mix(rollout, torch.zeros(6, 3, dtype=torch.float64), advantage)
        found.append(rollout.columns["cost_adv"].std())
        assert "adv_other" not in rollout.columns
    assert found[0] > 0 and found[1] / found[0] == pytest.approx(100.0)


def test_a_batch_enters_the_costs_baseline_once():
    handler = ConstraintHandler(Constraint(cost_limit=(1.0, 1.0), dual=FixedDual(0.5)), gamma=1.0)
    rollout, adv = record([[[2.0, 4.0]]]), torch.zeros(1, 1, dtype=torch.float64)
    handler.mix(rollout, adv, MovingBaseline())
    once = json.dumps(handler.advantage_states)
    assert handler.advantage_states == [{"baseline": 2.0, "batches": 1}, {"baseline": 4.0, "batches": 1}]
    handler.mix(rollout, adv, MovingBaseline(), before=True)
    assert json.dumps(handler.advantage_states) == once


def test_a_limit_that_is_never_met_is_told_once():
    handler = ConstraintHandler(Constraint(cost_limit=1.0, dual=INTEGRAL), gamma=0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2 * PATIENCE):
            handler.measure([[3.0]], [10])
    assert len(caught) == 1 and "raise cost_limit" in str(caught[0].message) and "measured [3.0], limit [1.0]" in str(caught[0].message)


def test_missing_and_broken_costs_are_taught():
    handler = ConstraintHandler(Constraint(), gamma=0.9)
    rollout = record([[[0.0]]])
    rollout.cost = None
    with pytest.raises(ValueError, match="puts no 'cost' into info"):
        handler.soften(rollout, rollout.reward, 1.0)
    with pytest.raises(ValueError, match=r"2 cost\(s\) meet 1 limit"):
        handler.measure([[1.0, 2.0]], [3])
    with pytest.raises(ValueError, match="must be finite"):
        handler.measure([[float("nan")]], [3])
