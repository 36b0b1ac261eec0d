"""Returns and advantages of arbitrary records, against loops and definitions written here."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from markovia.algos.advantages import gae, group_normalised, leave_one_out, normalise
from markovia.algos.reward_scale import RewardScale

torch.set_num_threads(1)
UNIT = st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.999)
SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def records(draw):
    """(reward, value, terminated, truncated, boot_value), float64 (B, T): any flags, a row's last step cut unless it terminates."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    flag = np.array(draw(st.lists(st.integers(0, 2), min_size=B * T, max_size=B * T))).reshape(B, T)  # goes on, terminated, truncated
    flag[:, -1] = np.where(flag[:, -1] == 0, 2, flag[:, -1])
    rng = np.random.default_rng(draw(SEEDS))
    reward, value, boot = (rng.normal(scale=3.0, size=(B, T)) for _ in range(3))
    return reward, value, flag == 1, flag == 2, np.where(flag == 2, boot, 0.0)


def called(record, gamma, lam):
    reward, value, terminated, truncated, boot = (torch.from_numpy(x) for x in record)
    adv, ret = gae(reward, value, 1.0 - terminated.double(), truncated, boot, gamma=gamma, lam=lam)
    return adv.numpy(), ret.numpy()


def segments(ended):
    """(row, first step, last step) of every episode's stretch."""
    for b, row in enumerate(ended):
        first = 0
        for t in np.flatnonzero(row):
            yield b, first, int(t)
            first = int(t) + 1


def by_definition(record, gamma, lam):
    """The average of n-step returns with weights (1 - lam) lam^(n-1), what is left of the weights on the longest; no recursion."""
    reward, value, terminated, truncated, boot = record
    adv = np.full_like(reward, np.nan)
    for b, first, last in segments(terminated | truncated):
        for t in range(first, last + 1):
            longest, total = last - t + 1, 0.0
            for n in range(1, longest + 1):
                paid = sum(gamma**k * reward[b, t + k] for k in range(n))
                behind = value[b, t + n] if n < longest else boot[b, last]  # boot is 0 where terminated
                weight = lam ** (n - 1) * (1.0 if n == longest else 1.0 - lam)
                total += weight * (paid + gamma**n * behind - value[b, t])
            adv[b, t] = total
    return adv


@given(records(), UNIT, UNIT)
def test_gae_is_the_average_of_n_step_returns(record, gamma, lam):
    adv, ret = called(record, gamma, lam)
    np.testing.assert_allclose(adv, by_definition(record, gamma, lam), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ret, adv + record[1], rtol=1e-12, atol=1e-12)


@given(records(), UNIT)
def test_limits_of_gae(record, gamma):
    reward, value, terminated, truncated, boot = record
    ended = terminated | truncated
    following = np.where(ended, boot, np.concatenate([value[:, 1:], value[:, :1]], 1))
    np.testing.assert_allclose(called(record, gamma, 0.0)[0], reward + gamma * following - value, rtol=1e-9, atol=1e-9)  # one-step TD error
    np.testing.assert_allclose(called(record, 0.0, 1.0)[1], reward, rtol=1e-9, atol=1e-9)  # nothing but the step's own reward
    monte_carlo = np.zeros_like(reward)  # lam = 1: rewards to the episode's end, values only where it was cut
    for b, first, last in segments(ended):
        tail = boot[b, last]
        for t in range(last, first - 1, -1):
            tail = reward[b, t] + gamma * tail
            monte_carlo[b, t] = tail
    np.testing.assert_allclose(called(record, gamma, 1.0)[1], monte_carlo, rtol=1e-9, atol=1e-9)


@given(records(), UNIT, UNIT, st.data())
def test_nothing_flows_over_an_end_of_an_episode(record, gamma, lam, data):
    reward, value, terminated, truncated, boot = record
    b, first, last = data.draw(st.sampled_from(list(segments(terminated | truncated))))
    outside = np.ones_like(reward)
    outside[b, first : last + 1] = 0.0
    changed = (reward + 100.0 * outside, value - 50.0 * outside, terminated, truncated, np.where(truncated, boot + 7.0 * outside, 0.0))
    inside = outside == 0.0
    np.testing.assert_array_equal(called(record, gamma, lam)[0][inside], called(changed, gamma, lam)[0][inside])


@given(records(), UNIT, UNIT, st.floats(0.0, 1.0))
def test_a_fractional_continuation_is_the_mean_over_coin_flips_of_the_end(record, gamma, lam, c):
    """E over an end at step 0 with probability 1 - c of A_0; the flip is apart from everything behind it."""
    reward, value, terminated, truncated, boot = (torch.from_numpy(x[:1]) for x in record)
    truncated[0, 0] = truncated[0, 0] and reward.shape[1] == 1
    found = []
    for continuation in (c, 0.0, 1.0):
        kept = 1.0 - terminated.double()
        kept[0, 0] = continuation
        found.append(float(gae(reward, value, kept, truncated, boot, gamma=gamma, lam=lam)[0][0, 0]))
    assert np.isclose(found[0], (1.0 - c) * found[1] + c * found[2], rtol=1e-9, atol=1e-9)


@st.composite
def groups(draw):
    """(returns (B,), group (B,)) with at least two rows in each group, rows in any order."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    names = draw(st.lists(st.integers(0, 1000), min_size=len(sizes), max_size=len(sizes), unique=True))
    rows = draw(st.permutations([n for n, size in zip(names, sizes, strict=True) for _ in range(size)]))
    rng = np.random.default_rng(draw(SEEDS))
    return torch.from_numpy(rng.normal(size=len(rows))), torch.tensor(rows)


@given(groups())
def test_leave_one_out_is_the_mean_of_the_others(given_groups):
    returns, group = given_groups
    adv = leave_one_out(returns, group)
    for i in range(len(returns)):
        others = [float(returns[j]) for j in range(len(returns)) if j != i and group[j] == group[i]]
        assert np.isclose(float(adv[i]), float(returns[i]) - sum(others) / len(others), rtol=1e-9, atol=1e-9)
    assert all(abs(float(adv[group == g].sum())) < 1e-9 for g in group.unique())


@given(groups(), st.floats(-100.0, 100.0), st.floats(0.1, 10.0))
def test_group_advantages_see_neither_level_nor_scale_of_a_group(given_groups, level, scale):
    returns, group = given_groups
    first = group == group[0]
    moved = torch.where(first, scale * returns + level, returns)
    for kind, factor in (("group", 1.0), ("none", scale)):
        before, after = (group_normalised(r, group, scale=kind, eps=0.0) for r in (returns, moved))
        torch.testing.assert_close(after, torch.where(first, factor * before, before), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 4), st.integers(1, 6), SEEDS)
def test_standardised_advantages_have_mean_zero_and_deviation_one_over_the_mask(B, T, seed):
    rng = np.random.default_rng(seed)
    adv, mask = torch.from_numpy(rng.normal(5.0, 3.0, (B, T))), torch.from_numpy(rng.random((B, T)) < 0.7)
    out = normalise(adv, mask)[mask]
    if len(out) > 1:
        assert abs(float(out.mean())) < 1e-7 and abs(float(out.std()) - 1.0) < 1e-5
    elif len(out):
        assert torch.equal(out, adv[mask])


@given(records(), UNIT, st.integers(1, 8))
def test_reward_scale_does_not_see_where_a_row_is_cut(record, gamma, cut):
    """Two collections of a row's two parts leave the running return and the moments where one collection leaves them."""
    reward, _, terminated, truncated, _ = record
    done, valid = terminated | truncated, np.ones_like(terminated)
    whole, parts = (RewardScale(len(reward), gamma) for _ in range(2))
    whole(reward, done, valid)
    for piece in (slice(0, cut), slice(cut, None)):
        if reward[:, piece].shape[1]:
            parts(reward[:, piece], done[:, piece], valid[:, piece])
    for name, tensor in whole.state().items():
        torch.testing.assert_close(parts.state()[name], tensor, rtol=1e-9, atol=1e-9)
