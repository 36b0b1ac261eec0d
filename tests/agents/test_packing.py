"""Packed evaluation equals the padded one, in values and gradients, and is left alone where a model can't do it."""

import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from markovia.agents import language, packing
from markovia.agents.language import LanguageAgent
from markovia.agents.packing import make_packs, unfit
from markovia.agents.records import Rollout
from markovia.envs.text.tokens import CharTokenizer

torch.set_num_threads(1)
LETTERS = "abcdefghi"  # 12 tokens with pad, bos and eos


def model(family="llama", vocab=12, **changes):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **sizes, **changes))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, initializer_range=0.5, **changes))


def agents(network, **options):
    """The same weights evaluated padded and packed."""
    tokenizer = CharTokenizer(LETTERS)
    return LanguageAgent(network, tokenizer, **options), LanguageAgent(network, tokenizer, packed=True, **options)


def record():
    """Three prompts of different lengths; the first with three responses, the second with two, the third with one."""
    generator = torch.Generator().manual_seed(1)
    lengths, prompts = [5, 1, 3, 4, 2, 5], [0, 0, 0, 1, 1, 2]
    prompt_ids, prompt_mask = torch.zeros(6, 4, dtype=torch.int64), torch.zeros(6, 4, dtype=torch.bool)
    words = [torch.randint(3, 12, (n,), generator=generator) for n in (4, 1, 2)]
    for i, which in enumerate(prompts):
        prompt_ids[i, 4 - len(words[which]) :], prompt_mask[i, 4 - len(words[which]) :] = words[which], True
    action = torch.randint(2, 12, (6, 5), generator=generator)
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    zero = torch.zeros(6, 5)
    return Rollout(
        obs={"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}, action=action, logp_old=zero, reward=zero, valid=valid, mask=valid,
        continuation=zero, truncated=~valid, per_row=True,
    )  # fmt: skip


def test_a_pack_holds_each_prompt_once_and_no_padding():
    rollout = record()
    (pack,) = make_packs(rollout.obs["prompt_ids"], rollout.obs["prompt_mask"], rollout.action, rollout.valid)
    # Prompts of 4, 1 and 2 tokens; responses of 5, 1, 3 | 4, 2 | 5 tokens, each without its last one: 7 + 4 + 0 + 2 + 3 + 1 + 4.
    assert pack.ids.shape == (1, 21)
    assert pack.position[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 0, 1, 2, 3, 1, 0, 1, 2, 3, 4, 5]
    assert len(pack.at) == int(rollout.valid.sum()) and torch.equal(rollout.valid.nonzero(), torch.stack([pack.row, pack.column], 1))
    # The second token of the third response sees the four prompt tokens, the first token of its own response and itself, nothing else.
    assert pack.allowed[9].nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 8, 9]
    assert pack.allowed.diagonal().all() and not pack.allowed.triu(1).any()
    bias = pack.bias(torch.float32)
    assert bias.shape == (1, 1, 21, 21) and set(bias.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_packs_keep_to_their_size():
    rollout = record()
    obs = rollout.obs
    packs = make_packs(obs["prompt_ids"], obs["prompt_mask"], rollout.action, rollout.valid, limit=11)
    assert [p.ids.shape[1] for p in packs] == [10, 11]
    packs = make_packs(obs["prompt_ids"], obs["prompt_mask"], rollout.action, rollout.valid, limit=1)
    assert [p.ids.shape[1] for p in packs] == [10, 5, 6]  # a prompt and its responses are never torn apart
    assert make_packs(obs["prompt_ids"], obs["prompt_mask"], rollout.action, torch.zeros_like(rollout.valid)) == []


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"lora": {"r": 2}, "value_head": True}], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_padded_in_values_and_gradients(family, attention, options):
    agent = LanguageAgent(model(family, attn_implementation=attention), CharTokenizer(LETTERS), **options)
    rollout, found = record(), []
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    for agent.options.packed in (False, True):
        agent.net.zero_grad()
        out = agent.evaluate(rollout, ["logp", "entropy", *(["value"] if "value_head" in options else [])])
        ((out.logp + 0.3 * out.entropy) * weight * rollout.valid).sum().backward()
        gradient = {n: p.grad.clone() for n, p in agent.net.named_parameters() if p.grad is not None}
        found.append((out, gradient))
    (one, gradient), (two, gradient2) = found
    assert agent._packs is True
    assert (one.logp - two.logp).abs().max() < 1e-5 and (one.entropy - two.entropy).abs().max() < 1e-5
    assert (two.logp[~rollout.valid] == 0.0).all()
    assert gradient.keys() == gradient2.keys() and gradient
    for name in gradient:
        assert (gradient[name] - gradient2[name]).abs().max() < 1e-5 * max(1.0, float(gradient[name].abs().max())), name


def test_attention_goes_prompt_by_prompt():
    class Seen(TorchFunctionMode):
        lengths: ClassVar[list[int]] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                query = args[0] if args else kwargs["query"]
                self.lengths.append(query.shape[-2])
            return func(*args, **(kwargs or {}))

    agent = LanguageAgent(model("llama", attn_implementation="sdpa"), CharTokenizer(LETTERS), packed=True)
    agent.evaluate(record(), ["logp"])  # tries packing out
    with Seen():
        agent.evaluate(record(), ["logp"])
    # One pack of 10 + 5 + 6 tokens, in each of the layers.
    assert Seen.lengths == [10, 5, 6] * agent.net["policy"].config.num_hidden_layers


def test_values_hidden_states_and_distributions_too():
    plain, packed = agents(model(), value_head=True)
    torch.nn.init.normal_(plain.net["critic"].weight)
    packed.net["critic"].load_state_dict(plain.net["critic"].state_dict())
    rollout, want = record(), ["value", "hidden", "dist"]
    one, two = plain.evaluate(rollout, want), packed.evaluate(rollout, want)
    v = rollout.valid
    assert torch.allclose(one.value, two.value, atol=1e-5) and torch.allclose(one.hidden[v], two.hidden[v], atol=1e-5)
    assert torch.allclose(one.dist.logits[v], two.dist.logits[v], atol=1e-5)


@pytest.mark.parametrize("want", [["logp"], ["logp", "entropy"]], ids=str)
def test_many_logits_are_made_in_chunks_and_again_for_the_gradient(monkeypatch, want):
    plain, packed = agents(model())
    whole = packed.evaluate(record(), want).logp
    monkeypatch.setattr(language, "CHUNK_LOGITS", 36)  # three tokens at a time
    sizes, product = [], F.linear

    def seen(x, weight, bias=None):
        if len(weight) == packed.tokenizer.vocab_size:
            sizes.append(len(x))
        return product(x, weight, bias)

    monkeypatch.setattr(F, "linear", seen)
    packed.net.zero_grad()
    logp = packed.evaluate(record(), want).logp
    forward = len(sizes)
    logp.sum().backward()
    gradient = [p.grad.clone() for p in packed.net.parameters()]
    assert max(sizes) <= 3 and len(sizes) > forward and torch.allclose(logp, whole, atol=1e-6)
    monkeypatch.undo()
    plain.net.zero_grad()
    plain.evaluate(record(), ["logp"]).logp.sum().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-4) for a, p in zip(gradient, plain.net.parameters(), strict=True))


def test_a_sampled_record_with_a_nucleus_is_evaluated_over_its_kept_set():
    plain, packed = agents(model(), top_p=0.8)
    starts = {"prompt_ids": record().obs["prompt_ids"], "prompt_mask": record().obs["prompt_mask"], "max_new_tokens": 5}
    rollout = packed.generate(starts, torch.Generator().manual_seed(0))
    found = packed.evaluate(rollout, ["logp"]).logp
    assert packed._packs and torch.allclose(found, plain.evaluate(rollout, ["logp"]).logp, atol=1e-5)
    assert torch.allclose(found, rollout.logp_old, atol=1e-5)


def test_autocast_is_near():
    plain, packed = agents(model(), bf16=True)
    v, logp = record().valid, [a.evaluate(record(), ["logp"]).logp for a in (plain, packed)]
    assert packed._packs and (logp[0] - logp[1])[v].abs().max() < 0.1


@pytest.mark.parametrize("family", ["bloom", "windowed"])
def test_models_that_can_not_are_evaluated_padded_and_said_so(family):
    """Bloom's ALiBi reads distances off the mask, not off position_ids; a window would have to be cut into the blocks."""
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    if family == "bloom":
        network = BloomForCausalLM(BloomConfig(vocab_size=12, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5))
    else:
        config = MistralConfig(
            vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, sliding_window=4
        )
        network = MistralForCausalLM(config)
    plain, packed = agents(network)
    with pytest.warns(UserWarning, match="is evaluated padded, not packed: "):
        found = packed.evaluate(record(), ["logp"]).logp
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(packed.evaluate(record(), ["logp"]).logp, found)
    assert torch.equal(found, plain.evaluate(record(), ["logp"]).logp)


def test_a_wrong_result_is_noticed():
    right = torch.tensor([-1.0, -2.0, -3.0, 0.0])
    network = model()
    assert unfit(network, lambda: right, lambda: right) is None
    assert "off by" in unfit(network, lambda: right + torch.tensor([0.0, 0.5, 0.0, 0.0]), lambda: right)
    assert "IndexError" in unfit(network, lambda: [][0], lambda: right)


@pytest.mark.parametrize("packed", [False, True])
def test_a_compact_copy_says_the_same_to_the_bit(packed):
    agent = LanguageAgent(model("llama", tie_word_embeddings=True), CharTokenizer(LETTERS), bf16=True, packed=packed)
    reference = agent.reference()
    before = reference.evaluate(record(), ["logp", "entropy"])
    kinds = {p.dtype for p in reference.compact().net.parameters()}
    after = reference.evaluate(record(), ["logp", "entropy"])
    assert kinds == {torch.float32, torch.bfloat16} and torch.equal(before.logp, after.logp) and torch.equal(before.entropy, after.entropy)
    assert {p.dtype for p in agent.net.parameters()} == {torch.float32}
    fixed = [p.dtype for p in agent.reference(fixed=True).net.parameters()]
    assert torch.bfloat16 in fixed and {p.dtype for p in agent.reference().net.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="bf16=True"):
        LanguageAgent(model(), CharTokenizer(LETTERS)).reference().compact()


@pytest.mark.parametrize(("short", "long"), [(64, 1024), (4, 1024), (4, 8)], ids=["kept", "made again", "float32"])
def test_attention_in_bfloat16_is_that_of_the_fused_kernel(monkeypatch: pytest.MonkeyPatch, short: int, long: int) -> None:
    """Values and gradients to bfloat16's rounding, whichever way a block of 12 tokens is computed."""
    monkeypatch.setattr(packing, "SHORT", short)
    monkeypatch.setattr(packing, "LONG", long)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, 12, 8, generator=g).requires_grad_() for _ in range(3))
    mask = torch.zeros(12, 12).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = packing.attend(q, k, v, mask, is_causal=False)
    torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.03)
    for a, b in zip(torch.autograd.grad(found.float().square().sum(), (q, k, v)), torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)
