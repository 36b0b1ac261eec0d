"""The estimate of a preference run's memory: sizes by hand, against the allocator, and a run that is refused with the figure."""

import json
import types

import pytest
import torch

from markovia.agents.language import LanguageAgent
from markovia.algos.on_policy import memory as arithmetic
from markovia.algos.preference.driver import PreferenceDriver
from markovia.algos.preference.memory import estimate, sizes
from markovia.algos.preference.sources import FileItems, JudgedSamples, OwnSamples
from markovia.algos.presets import override
from markovia.algos.systems import find
from markovia.envs.text.preferences import Item
from markovia.envs.text.tokens import CharTokenizer
from markovia.runs import train

torch.set_num_threads(1)


def tiny(layers=2, hidden=16, inner=24, vocab=12, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=128
    )
    return LanguageAgent(LlamaForCausalLM(config), CharTokenizer("".join(chr(200 + i) for i in range(vocab - 3))), **options)


def items(*lengths, count=6):
    """So many items with a prompt of 5 tokens and responses of these lengths."""
    return [Item([3] * 5, [[4 + i % 2] * n for i, n in enumerate(lengths)]) for _ in range(count)]


def settings(name, **changes):
    return override(find(name).value, {"num_envs": 4, **changes})


def test_sizes_of_files_and_rounds_by_hand():
    assert sizes(settings("dpo"), FileItems(items(7, 9), "pairs")) == (5, 9, 2)
    assert sizes(settings("dpo"), FileItems(items(7, 9, 20), "pairs")) == (5, 9, 2)  # gold that is not read
    assert sizes(settings("dpo"), OwnSamples(items(7, 9), "pairs")) == (5, 9, 3)
    task = types.SimpleNamespace(prompt_length=11, max_new_tokens=13)
    for name, rows in (("ipo/online", 2), ("ipo/nash-md", 1), ("sppo", 2)):  # sppo learns from the best and the worst of five
        assert sizes(settings(name), JudgedSamples(task, settings(name))) == (11, 13, rows), name


def test_what_a_method_holds():
    source, agent = FileItems(items(7, 9), "pairs"), tiny()
    plain = estimate(agent, settings("dpo", solver={"micro": 2}), source)
    assert (plain.part, plain.rows, plain.prompt, plain.new, plain.samples) == (4, 4, 5, 9, False) and plain.sampling == 0
    assert plain.reference == plain.weights and plain.trainable == sum(p.numel() for p in agent.net.parameters())
    assert estimate(agent, settings("dpo", stored_reference=True), source).reference == 0
    assert estimate(tiny(lora={"r": 2}), settings("dpo"), source).reference == 0
    assert estimate(agent, settings("simpo"), source).reference == 0  # reads no anchor
    assert estimate(agent, settings("dpo"), source).part == 8


@pytest.mark.parametrize("options", [{}, {"lora": {"r": 4}}, {"packed": True}, {"gradient_checkpointing": True}], ids=str)
def test_estimate_meets_the_allocator(allocated, options):
    agent, method = tiny(layers=6, hidden=64, inner=160, vocab=400, **options), settings("dpo")
    source = FileItems(items(40, 40, count=4), "pairs")
    told = estimate(agent, method, source)
    driver = PreferenceDriver(method, agent, source)
    driver.iteration = 1  # the first iteration also looks at whole distributions
    measured = allocated(lambda: driver.improve(source.items))
    assert 0.7 < measured / max(told.update, told.step) < 1.2, (measured, told)


def test_a_run_that_exceeds_the_machine_is_refused_with_the_figure_and_goes_on_when_told_to(tmp_path, monkeypatch):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "9"} for a in range(4) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("markovia.algos.memory.available", lambda device: (1e5, 2e5))  # a machine of 200 KB
    options = {"data": path, "model": "arithmetic", "out": tmp_path / "run", "eval_episodes": 0, "progress": False}
    with pytest.raises(ValueError, match=r"this run needs about 0\.\d+ GB: weights .* are free of 0.0002; try smaller solver.micro.* --over-memory"):
        train(settings("dpo"), **options)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="this run needs about"):
        done = train(settings("dpo"), over_memory=True, **options).done
    assert done["ended"] == "budget"


def test_8_000_tokens_of_a_large_vocabulary_are_told_before_they_are_met(monkeypatch):
    """A pair of 8,000 tokens each over 150,000: 9.6 GB of logits, 38 with log-softmax and gradients; in pieces a gigabyte."""
    agent, source = tiny(vocab=150_000, hidden=8), FileItems(items(8000, 8000, count=1), "pairs")
    monkeypatch.setattr("markovia.algos.preference.memory.activation_bytes", lambda agent, length: (0, 0))
    monkeypatch.setattr(agent, "packable", lambda: False)
    assert estimate(agent, settings("dpo", num_envs=1), source).update == 4 * 4 * 2 * 8000 * 150_000
    monkeypatch.undo()
    monkeypatch.setattr("markovia.algos.preference.memory.activation_bytes", lambda agent, length: (0, 0))
    assert estimate(agent, settings("dpo", num_envs=1), source).update == 4 * 4 * arithmetic.CHUNK_LOGITS
