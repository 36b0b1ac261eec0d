"""What counts and what does not: weights of decisions, minibatches, kept sets of tokens, padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from markovia.agents.records import Rollout, masked_mean
from markovia.agents.tokens import draw, keep_only, nucleus, pack, positions, response_valid, token_logp, unpack
from markovia.algos.on_policy.loss import clip_fraction, sequence_ratio, weights
from markovia.algos.systems import find
from markovia.envs.text.tokens import left_pad

torch.set_num_threads(1)
HOW = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def masks(draw):
    """(B, T) bool with at least one True."""
    B, T = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    mask = np.array(draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).reshape(B, T)
    mask[draw(st.integers(0, B - 1)), draw(st.integers(0, T - 1))] = True
    return torch.from_numpy(mask)


def numbers(shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(shape)))


def by_definition(how, x, mask, longest):
    """The aggregation of x (B, T) as a sentence would say it."""
    rows = [[float(v) for v, m in zip(values, counts, strict=True) if m] for values, counts in zip(x, mask, strict=True)]
    rows = [r for r in rows if r]
    if how == "token-mean":
        return float(np.mean([v for r in rows for v in r]))
    of_row = {"seq-mean-token-mean": np.mean, "seq-mean-token-sum": np.sum, "seq-mean-token-sum-norm": lambda r: np.sum(r) / longest}[how]
    return float(np.mean([of_row(r) for r in rows]))


@pytest.mark.parametrize("how", HOW)
@given(masks(), SEEDS, st.none() | st.integers(1, 20))
def test_aggregation_is_its_definition(how, mask, seed, max_length):
    x = numbers(mask.shape, seed)
    got = float((weights(mask, how, max_length, torch.float64) * x).sum())
    assert np.isclose(got, by_definition(how, x, mask, max_length or mask.shape[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", HOW)
@given(masks(), SEEDS, st.data())
def test_aggregation_sees_neither_order_nor_padding_nor_pieces(how, mask, seed, data):
    x = numbers(mask.shape, seed)
    omega = weights(mask, how, 10, torch.float64)
    total = float((omega * x).sum())
    order = torch.tensor(data.draw(st.permutations(range(len(mask)))))
    assert np.isclose(float((weights(mask[order], how, 10, torch.float64) * x[order]).sum()), total, rtol=1e-9, atol=1e-12)
    more = torch.nn.functional.pad(mask, (2, 3, 0, 1))  # columns on both sides and an empty row
    padded = weights(more, how, 10, torch.float64)
    assert torch.equal(padded[: len(mask), 2 : 2 + mask.shape[1]], omega) and float(padded.sum()) == pytest.approx(float(omega.sum()))
    cut = data.draw(st.integers(0, len(mask)))  # micro-batches weighted by the whole minibatch add up
    assert np.isclose(float((omega[:cut] * x[:cut]).sum() + (omega[cut:] * x[cut:]).sum()), total, rtol=1e-9, atol=1e-12)
    assert not omega[~mask].any()


@given(masks(), SEEDS)
def test_what_is_masked_out_has_no_say(mask, seed):
    x = numbers(mask.shape, seed)
    other = torch.where(mask, x, 1e6)
    assert torch.equal(masked_mean(torch.where(mask, other, 0.0), mask), masked_mean(torch.where(mask, x, 0.0), mask))
    for mean in (False, True):
        torch.testing.assert_close(sequence_ratio(other, mask, mean=mean), sequence_ratio(x, mask, mean=mean), rtol=1e-9, atol=1e-9)
    method = find("ppo").value
    assert clip_fraction(method, other, mask) == clip_fraction(method, x, mask)


def numbered(mask):
    """A record whose actions number its decisions."""
    B, T = mask.shape
    zero = torch.zeros(B, T)
    return Rollout(
        obs=zero[..., None], action=torch.arange(B * T).view(B, T), logp_old=zero, reward=zero, valid=torch.ones_like(mask), mask=mask,
        continuation=zero, truncated=~torch.ones_like(mask),
    )  # fmt: skip


@given(masks(), st.integers(1, 9), SEEDS)
def test_minibatches_hold_each_decision_that_counts_once(mask, size, seed):
    rollout = numbered(mask)
    for unit in ("decision", "row"):
        parts = list(rollout.minibatches(unit, size, torch.Generator().manual_seed(seed)))
        held = torch.cat([p.action[p.mask] for p in parts])
        assert sorted(held.tolist()) == rollout.action[mask].tolist()
        assert all(p.shape[0] == size for p in parts[:-1]) and 1 <= parts[-1].shape[0] <= size


# -- tokens ----------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 30), SEEDS, st.floats(0.01, 1.0))
def test_a_nucleus_is_the_smallest_set_of_likely_tokens_that_holds_the_mass(rows, vocab, seed, top_p):
    logits = 3.0 * numbers((rows, vocab), seed)
    p, kept = logits.softmax(-1), nucleus(logits, top_p)
    for probability, inside in zip(p, kept, strict=True):
        held = probability[inside]
        assert len(held) and held.sum() >= top_p - 1e-9 and held.sum() - held.min() < top_p + 1e-9
        assert not (~inside).any() or held.min() >= probability[~inside].max()


@given(masks(), SEEDS)
def test_log_probs_are_renormalised_over_the_kept_set(kept, seed):
    kept = kept.clone()
    kept[:, 0] |= ~kept.any(1)
    logits = numbers(kept.shape, seed)
    cut = keep_only(logits, kept)
    for v in range(kept.shape[1]):
        expected = (logits.exp()[:, v] / (logits.exp() * kept).sum(1)).log()
        found = token_logp(cut, torch.full((len(kept),), v))
        torch.testing.assert_close(found[kept[:, v]], expected[kept[:, v]], rtol=1e-9, atol=1e-9)
    u = torch.from_numpy(np.random.default_rng(seed).random(len(kept)))
    assert kept[torch.arange(len(kept)), draw(cut, u)].all()  # no token outside is ever drawn


@given(masks())
def test_bits_of_a_kept_set_round_trip(kept):
    assert torch.equal(unpack(pack(kept), kept.shape[1]), kept) and pack(kept).shape[-1] == -(-kept.shape[1] // 8)


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5), st.integers(0, 3))
def test_left_padding_keeps_every_row(rows, spare):
    ids, mask = left_pad(rows, max(len(r) for r in rows) + spare, pad=7)
    assert [i[m].tolist() for i, m in zip(ids, mask, strict=True)] == rows and (ids[~mask] == 7).all()
    where = positions(torch.from_numpy(mask))
    assert [p[m].tolist() for p, m in zip(where, torch.from_numpy(mask), strict=True)] == [list(range(len(r))) for r in rows]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_response_is_valid_up_to_its_first_eos(tokens):
    end = tokens.index(2) + 1 if 2 in tokens else len(tokens)
    assert response_valid(torch.tensor([tokens]), 2)[0].tolist() == [t < end for t in range(len(tokens))]
