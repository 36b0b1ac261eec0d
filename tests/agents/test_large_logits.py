"""A vocabulary of 150,000 and responses of 8,000 tokens: logits are made in pieces, so that memory does not grow with them."""

import pytest
import torch

from markovia.agents import language
from markovia.agents.language import CHUNK_LOGITS, LanguageAgent
from markovia.agents.records import Rollout
from markovia.algos.on_policy.memory import SAMPLED
from markovia.algos.preference.data import make_batch
from markovia.envs.text.preferences import Item
from markovia.envs.text.tokens import CharTokenizer

torch.set_num_threads(1)
VOCAB, PROMPT = 150_000, 8
CHUNK = 4 * CHUNK_LOGITS  # bytes


def agent(vocab=VOCAB, length=8192, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=length + PROMPT
    )
    return LanguageAgent(LlamaForCausalLM(config), CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + vocab - 3)))), **options)


def record(rows, length, vocab=VOCAB):
    generator = torch.Generator().manual_seed(0)
    prompt, action = (torch.randint(3, vocab, (rows, n), generator=generator) for n in (PROMPT, length))
    valid, zero = torch.ones(rows, length, dtype=torch.bool), torch.zeros(rows, length)
    return Rollout(
        obs={"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt, dtype=torch.bool)}, action=action, logp_old=zero, reward=zero, valid=valid,
        mask=valid, continuation=zero, truncated=~valid, per_row=True,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"value_head": True}], ids=str)
def test_pieces_say_the_same_as_a_whole(options, monkeypatch):
    plain, rollout = agent(40, 12, **options), record(3, 12, 40)
    want = ["logp", "entropy", *(["value"] if options.get("value_head") else [])]

    def gradient():
        plain.net.zero_grad()
        out = plain.evaluate(rollout, want)
        (out.logp.sum() + 0.1 * out.entropy.sum()).backward()
        return out, [p.grad.clone() for p in plain.parameters("policy")]

    whole, wanted = gradient()
    assert plain._packs is None  # nothing large has been met yet
    monkeypatch.setattr(language, "CHUNK_LOGITS", 80)
    monkeypatch.setattr(language, "MOST_LOGITS", 100)
    pieces, found = gradient()
    assert plain._packs is True
    with torch.no_grad():
        silent = plain.evaluate(rollout, want)
    for name in want:
        for out in (pieces, silent):
            torch.testing.assert_close(getattr(out, name), getattr(whole, name), rtol=0, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    assert plain.evaluate(rollout, ["dist"]).dist.logits.shape == (3, 12, 40)  # whole distributions are what was asked for


def test_a_vocabulary_of_150_000_is_scored_in_pieces(allocated):
    """1,000 tokens have 600 MB of logits; held are a piece of them, its log-softmax, and little else."""
    plain, rollout = agent(length=1000), record(1, 1000)
    with torch.no_grad():
        plain.evaluate(record(1, 500), ["logp"])  # and what is set up once
        most = allocated(lambda: plain.evaluate(rollout, ["logp"]))
    assert 4 * 1000 * VOCAB > 2.2 * CHUNK > most


@pytest.mark.slow
def test_8192_tokens_of_150_000_are_scored_and_learnt_in_pieces(allocated):
    """4.9 GB of logits, four times as much with log-softmax and gradients; held are four pieces, and the masks of 8,200 x 8,200 tokens."""
    plain, rollout = agent(), record(1, 8192)
    masks = 16 * (8192 + PROMPT) ** 2
    with torch.no_grad():
        silent = allocated(lambda: plain.evaluate(rollout, ["logp"]))
    assert silent < 2.2 * CHUNK + masks
    learnt = allocated(lambda: plain.evaluate(rollout, ["logp"]).logp.sum().backward())
    assert learnt < 4.5 * CHUNK + masks < 4 * 8192 * VOCAB


def test_sampling_holds_one_step_of_logits(allocated):
    plain = agent(length=64, max_new_tokens=4)
    ids = torch.randint(3, VOCAB, (8, PROMPT), generator=torch.Generator().manual_seed(0))
    starts = {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids, dtype=torch.bool), "max_new_tokens": 4}
    most = allocated(lambda: plain.generate(starts, torch.Generator().manual_seed(0)))
    # Of a step are held: logits as the model gave them and by row, probabilities, these in float64, and their sums.
    assert most < 1.05 * 8 * VOCAB * SAMPLED


def test_items_of_8_000_tokens_become_a_batch():
    long = Item([3] * PROMPT, [[4] * 8000, [5] * 20])
    batch = make_batch([long], "pairs", set(), 0, torch.device("cpu"))
    assert batch.record.shape == (2, 8000) and batch.record.valid.sum() == 8020
