"""Packed evaluation equals the padded one for any lengths, shared prompts and order of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from markovia.agents.language import LanguageAgent
from markovia.agents.packing import make_packs
from markovia.agents.records import Rollout
from markovia.envs.text.tokens import CharTokenizer

torch.set_num_threads(1)
LETTERS = "abcdefghi"  # 12 tokens with pad, bos and eos
TOKENS = st.integers(3, 11)


@pytest.fixture(scope="module")
def agent():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    return LanguageAgent(LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes, initializer_range=0.5)), CharTokenizer(LETTERS), value_head=True)


@st.composite
def rollouts(draw):
    """Rows of prompts (some in common, in succession or not) with responses of 0 to 6 tokens and more padding on both sides."""
    prompts = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=3))
    rows = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), st.lists(TOKENS, max_size=6)), min_size=1, max_size=6))
    B, P, T = len(rows), max(len(p) for p in prompts) + draw(st.integers(0, 2)), max(1, *(len(y) for _, y in rows)) + draw(st.integers(0, 2))
    ids, seen = torch.zeros(B, P, dtype=torch.int64), torch.zeros(B, P, dtype=torch.bool)
    action, valid = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.bool)
    for i, (which, response) in enumerate(rows):
        x = prompts[which]
        ids[i, P - len(x) :], seen[i, P - len(x) :] = torch.tensor(x), True
        action[i, : len(response)], valid[i, : len(response)] = torch.tensor(response, dtype=torch.int64), True
    zero = torch.zeros(B, T)
    return Rollout(
        obs={"prompt_ids": ids, "prompt_mask": seen}, action=action, logp_old=zero, reward=zero, valid=valid, mask=valid, continuation=zero,
        truncated=~valid, per_row=True,
    )  # fmt: skip


@given(rollouts(), st.integers(1, 40))
def test_packs_hold_every_token_once_and_no_padding(rollout, limit):
    obs = rollout.obs
    packs = make_packs(obs["prompt_ids"], obs["prompt_mask"], rollout.action, rollout.valid, limit)
    places = [(r, c) for p in packs for r, c in zip(p.row.tolist(), p.column.tolist(), strict=True)]
    assert sorted(places) == [tuple(x) for x in rollout.valid.nonzero().tolist()]
    for pack in packs:
        assert pack.ids.shape[1] == sum(pack.sizes) and (pack.ids.shape[1] <= limit or len(pack.sizes) == 1)
        assert pack.allowed.diagonal().all() and not pack.allowed.triu(1).any()


@settings(max_examples=25)
@given(rollouts(), st.data())
def test_packed_equals_padded(agent, rollout, data):
    want = {"logp", "entropy", "value"}
    with torch.no_grad():
        padded, packed = agent.evaluate_padded(rollout, want), agent._evaluate_packed(rollout, want) if rollout.valid.any() else None
    if packed is None:
        return
    for name in want:
        torch.testing.assert_close(packed[name], padded[name], rtol=0, atol=2e-5, msg=name)
    order = torch.tensor(data.draw(st.permutations(range(rollout.shape[0]))))
    with torch.no_grad():
        again = agent._evaluate_packed(rollout.rows(order), want)
    for name in want:
        torch.testing.assert_close(again[name], packed[name][order], rtol=0, atol=2e-5, msg=name)
    assert not packed["logp"][~rollout.valid].any()
