"""Advantage estimators: hand-computed values, truncation, soft termination, steps that do not count."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from markovia.agents.records import Rollout
from markovia.algos.advantages import GAE, FrozenQ, gae, leave_one_out, normalise

F64 = torch.float64


def tensor(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


@pytest.mark.check("value", "a2c", "ppo")
def test_gae_by_hand() -> None:
    # gamma .5, lam .5, V = 1, 2; delta_1 = 3 - 2 = 1 (terminal), delta_0 = 1 + .5 * 2 - 1 = 1; A_0 = 1 + .25 * 1
    adv, ret = gae(tensor(1, 3)[None], tensor(1, 2)[None], tensor(1, 0)[None], torch.zeros(1, 2, dtype=torch.bool), None, gamma=0.5, lam=0.5)
    assert adv.tolist() == [[1.25, 1.0]]
    assert ret.tolist() == [[2.25, 3.0]]


def test_truncation_bootstraps_and_cuts_the_recursion() -> None:
    # step 0 is truncated: V(final) = 10 enters its target, step 1 (another episode) does not reach back
    trunc = torch.tensor([[True, True]])
    boot = tensor(10, 4)[None]
    adv, _ = gae(tensor(1, 1)[None], tensor(2, 3)[None], tensor(1, 1)[None], trunc, boot, gamma=0.5, lam=0.9)
    assert adv[0].tolist() == pytest.approx([1 + 5 - 2, 1 + 2 - 3])


def test_soft_termination_is_the_mean_over_coin_flips() -> None:
    rng = np.random.default_rng(0)
    T, gamma, lam = 4, 0.9, 0.8
    r, v, boot = (torch.tensor(rng.normal(size=(1, T))) for _ in range(3))
    keep = torch.tensor(rng.uniform(size=(1, T)))
    trunc = torch.zeros(1, T, dtype=torch.bool)
    trunc[0, -1] = True
    soft, _ = gae(r, v, keep, trunc, boot, gamma=gamma, lam=lam)
    mean = torch.zeros_like(soft)
    for flips in itertools.product([0.0, 1.0], repeat=T):
        c = torch.tensor(flips)[None].double()
        p = torch.where(c == 1, keep, 1 - keep).prod()
        hard, _ = gae(r, v, c, trunc, boot, gamma=gamma, lam=lam)
        mean += p * hard
    torch.testing.assert_close(soft, mean, rtol=1e-12, atol=1e-12)


def chain(value: list[float], mask: list[bool], reward: list[float], *, truncated: bool = False, boot: float = 0.0) -> Rollout:
    """One row whose steps all exist; it ends with the last one, or is cut there."""
    v, m = tensor(*value)[None], torch.tensor([mask])
    last = torch.arange(len(value))[None] == len(value) - 1
    ends, flat = (last & truncated), torch.zeros_like(v)
    return Rollout(
        flat, flat, flat, tensor(*reward)[None], torch.ones_like(m), m, (~last | truncated).double(), ends, value=v[..., None],
        boot_value=torch.where(ends, boot, 0.0).double()[..., None],
    )  # fmt: skip


@pytest.mark.check("value", "a2c", "ppo")
def test_gae_goes_over_steps_that_do_not_count_by_hand() -> None:
    # the last step of a chain, its noise 0, pays 2: d_1 = 2 - .5, d_0 = .5 - 1, whatever the critic says there
    chained = chain([1, 0.5, 99], [True, True, False], [0, 0, 2])
    for lam, expected in ((0.0, [-0.5, 1.5]), (0.5, [-0.5 + 0.5 * 1.5, 1.5]), (1.0, [1.0, 1.5])):
        adv, ret = GAE(1.0, lam)(chained.reward, chained, {})
        assert adv[0, :2].tolist() == expected and ret[0, :2].tolist() == [1 + expected[0], 2.0]
    # in the middle, gamma .5 and lam .5: V_1 = .5 + .5 * 3 = 2, d_0 = .5 * 2 - 1 = 0, A_1 = .5 A_2 (lam is not applied twice)
    adv, _ = GAE(0.5, 0.5)((middle := chain([1, 99, 3], [True, False, True], [0, 0.5, 2])).reward, middle, {})
    assert adv[0, [0, 2]].tolist() == [0.5 * 0.5 * 0.5 * (2 - 3), -1.0]
    # cut behind it: the value of the final observation is what it leads to, 1 + .5 (2 + .5 * 4) - 1
    cut = chain([1, 99], [True, False], [1, 2], truncated=True, boot=4.0)
    assert GAE(0.5, 0.5)(cut.reward, cut, {})[0][0, 0] == 2.0
    q, _ = FrozenQ(lam=0.0)(chained.reward, chained, {})
    assert q[0, :2].tolist() == [0.5, 2.0]


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_values_of_steps_that_do_not_count_are_not_read(lam: float) -> None:
    rng = np.random.default_rng(1)
    mask = [True, False, True, True, False, False, True, False]
    value, reward = rng.normal(size=8), rng.normal(size=8).tolist()
    shifted = np.where(mask, value, value + 7.0)
    counted = [chain(v.tolist(), mask, reward, truncated=True, boot=0.3) for v in (value, shifted)]
    (adv, ret), (again, ret_again) = (GAE(0.9, lam)(r.reward, r, {}) for r in counted)
    assert torch.equal(adv[counted[0].mask], again[counted[0].mask]) and torch.equal(ret[counted[0].mask], ret_again[counted[0].mask])
    # where every step counts the old numbers come out to the last bit
    whole = chain(value.tolist(), [True] * 8, reward, truncated=True, boot=0.3)
    assert whole.value is not None and whole.boot_value is not None
    args = (whole.reward, whole.value[..., 0], whole.continuation, whole.truncated, whole.boot_value[..., 0])
    plain = gae(*args, gamma=0.9, lam=lam)
    assert all(torch.equal(a, b) for a, b in zip(GAE(0.9, lam)(whole.reward, whole, {}), plain, strict=True))


@pytest.mark.check("value", "rloo")
def test_leave_one_out_by_hand_and_against_the_group_mean() -> None:
    returns, group = tensor(1, 2, 6, 0, 4), torch.tensor([0, 0, 0, 7, 7])
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2, 0 - 4, 4 - 0
    assert leave_one_out(returns, group).tolist() == [-3.0, -1.5, 4.5, -4.0, 4.0]
    centred = returns[:3] - returns[:3].mean()
    torch.testing.assert_close(leave_one_out(returns, group)[:3], centred * 3 / 2)
    with pytest.raises(ValueError, match="at least 2 responses"):
        leave_one_out(returns, torch.arange(5))


def test_normalise_uses_the_mask_and_leaves_single_decisions() -> None:
    adv, mask = tensor(1, 3, 100)[None], torch.tensor([[True, True, False]])
    assert normalise(adv, mask)[0, :2].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    one = torch.tensor([[True, False, False]])
    assert normalise(adv, one)[0, 0] == 1.0
