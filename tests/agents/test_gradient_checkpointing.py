"""Gradient checkpointing: the same gradients to the last bit, fewer tensors kept."""

import copy

import pytest
import torch

from markovia.agents.checkpointing import layers_of
from markovia.agents.language import LanguageAgent
from markovia.envs.text.tasks import TextTask
from markovia.envs.text.tokens import CharTokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft's, of GPT-2's transposed layers


def model(family, layers=4):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=16, n_layer=layers, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2))
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, initializer_range=0.3, **shape))


def agent(family="llama", **options):
    torch.manual_seed(1)
    made = LanguageAgent(model(family), CharTokenizer("abcdefghi"), value_head=True, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def record(made):
    task = TextTask(["a", "bcd", "efghi"], CharTokenizer("abcdefghi"), lambda prompts, completions, **_: [0.0] * len(prompts), 6)
    return made.generate(task.all_starts("train", 3), torch.Generator().manual_seed(0))


def gradients(made, rollout):
    """Gradients of a loss of log-probs, entropies and values, and how many numbers were kept for the backward pass."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
        return x

    weights = {p.untyped_storage().data_ptr() for p in made.net.parameters()}
    made.net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        got = made.evaluate(rollout, ["logp", "entropy", "value"])
        loss = (got.logp * torch.linspace(-1, 1, got.logp.numel()).view_as(got.logp)).sum() + got.entropy.mean() + got.value.square().sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in made.net.named_parameters() if p.grad is not None}
    return found, sum(size for at, (_, size) in kept.items() if at not in weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"packed": True}, {"lora": {"r": 2}}, {"bf16": True}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
def test_the_gradients_are_the_same(family, options):
    plain, saving = agent(family, **options), agent(family, **options, gradient_checkpointing=True)
    rollout = record(plain)
    (want, kept), (got, kept_saving) = gradients(plain, rollout), gradients(saving, rollout)
    assert want.keys() == got.keys() and any(g.abs().max() > 1e-3 for g in want.values())
    assert [n for n in want if not torch.equal(want[n], got[n])] == []
    assert kept_saving < 0.5 * kept


def test_nothing_stays_on_the_model():
    saving = agent(gradient_checkpointing=True)
    rollout = record(saving)
    before = saving.evaluate(rollout, ["logp"]).logp
    twin = copy.deepcopy(saving)
    assert all("forward" not in vars(layer) for layer in layers_of(saving.net["policy"]))
    with torch.no_grad():
        for p in saving.net.parameters():
            p.zero_()
    assert torch.equal(twin.evaluate(rollout, ["logp"]).logp, before)


def test_a_model_without_layers_to_compute_again_is_refused():
    odd = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no layers for gradient checkpointing"):
        layers_of(odd)
