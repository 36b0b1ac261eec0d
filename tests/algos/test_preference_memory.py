"""The estimate of a preference run's memory: sizes by hand, against the allocator, and a run that is refused with the figure."""

import dataclasses
import json
import types

import pytest
import torch

from markovia.agents.language import LanguageAgent
from markovia.agents.memory import Kept
from markovia.agents.reward_model import RewardModel
from markovia.algos.families import family_of
from markovia.algos.memory import estimate as estimate_run
from markovia.algos.on_policy import memory as arithmetic
from markovia.algos.preference.driver import PreferenceDriver
from markovia.algos.preference.memory import estimate, estimate_scores, sizes
from markovia.algos.preference.method import Preference
from markovia.algos.preference.reward_model import RewardModelDriver, RewardTraining
from markovia.algos.preference.sources import FileItems, JudgedSamples, OwnSamples
from markovia.algos.presets import override
from markovia.algos.systems import find, rows
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
    for name, several in (("ipo/online", 2), ("ipo/nash-md", 1), ("sppo", 2)):  # sppo learns from the best and the worst of five
        assert sizes(settings(name), JudgedSamples(task, settings(name))) == (11, 13, several), name


def test_what_a_method_holds():
    source, agent = FileItems(items(7, 9), "pairs"), tiny()
    plain = estimate(agent, settings("dpo", solver={"micro": 2}), source)
    assert (plain.part, plain.rows, plain.prompt, plain.new, plain.samples) == (4, 4, 5, 9, False) and plain.sampling == 0
    assert plain.reference == plain.weights and plain.trainable == sum(p.numel() for p in agent.net.parameters())
    assert estimate(agent, settings("dpo", stored_reference=True), source).reference == 0
    assert estimate(tiny(lora={"r": 2}), settings("dpo"), source).reference == 0
    assert estimate(agent, settings("simpo"), source).reference == 0  # reads no anchor
    ranked = FileItems([dataclasses.replace(i, score=[1.0, 0.0]) for i in items(7, 9)], "lists")
    assert estimate(agent, settings("nash-mp"), ranked).reference == plain.weights + 4 * plain.trainable  # and the target
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
    lines = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "9"} for a in range(4) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    monkeypatch.setattr("markovia.algos.memory.available", lambda device: (1e5, 2e5))  # a machine of 200 KB
    options = {"data": path, "model": "arithmetic", "out": tmp_path / "run", "eval_episodes": 0, "progress": False}
    with pytest.raises(ValueError, match=r"this run needs about 0\.\d+ GB: weights .* are free of 0.0002; try smaller solver.micro.* --over-memory"):
        train(settings("dpo"), **options)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="this run needs about"):
        done = train(settings("dpo"), over_memory=True, **options).done
    assert done["ended"] == "budget"


def test_8_000_tokens_of_a_large_vocabulary_are_told_before_they_are_met(monkeypatch):
    """A pair of 8,000 tokens each over 150,000: 9.6 GB of logits, 38 with log-softmax and gradients; in pieces a quarter of one."""
    agent, source = tiny(vocab=150_000, hidden=8), FileItems(items(8000, 8000, count=1), "pairs")
    monkeypatch.setattr("markovia.algos.preference.memory.activation_bytes", lambda agent, length: Kept(0))
    monkeypatch.setattr(agent, "packable", lambda: False)
    assert estimate(agent, settings("dpo", num_envs=1), source).update == 4 * 4 * 2 * 8000 * 150_000
    monkeypatch.undo()
    monkeypatch.setattr("markovia.algos.preference.memory.activation_bytes", lambda agent, length: Kept(0))
    assert estimate(agent, settings("dpo", num_envs=1), source).update == 4 * arithmetic.CHUNK_LOGITS


# -- reward models -----------------------------------------------------------------------------------------------------------------------


def scorer(kind="llama", layers=2, hidden=16, inner=24, **options):
    """A head on a language model, or on an encoder as sentence models have."""
    from transformers import BertConfig, BertModel

    tokenizer = CharTokenizer("".join(chr(200 + i) for i in range(9)))
    if kind == "llama":
        return RewardModel(tiny(layers, hidden, inner).net["policy"], tokenizer, base="tiny", **options)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=12, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2)
    return RewardModel(BertModel(config, add_pooling_layer=False), tokenizer, base="tiny", **options)


def test_what_training_a_reward_model_holds():
    source, plain = FileItems(items(7, 9), "pairs"), scorer()
    told = estimate_scores(plain, RewardTraining(num_envs=8), source)
    moving = sum(p.numel() for p in plain.net.parameters())
    # 8 pairs of texts of at most 5 + 9 tokens; Adam's two averages; no reference, nothing is sampled
    assert (told.part, told.prompt, told.trainable, told.slots, told.reference, told.sampling) == (16, 14, moving, 2, 0, 0)
    assert told.weights >= 4 * moving and told.update == 16 * told.kept.row + told.kept.once + 4 * 4 * 16
    assert estimate_scores(plain, override(RewardTraining(num_envs=8), {"solver": {"micro": 2}}), source).part == 4
    assert estimate_scores(plain, RewardTraining(num_envs=8), FileItems(items(7, 9, 4), "lists")).part == 24
    assert estimate_scores(scorer(max_length=10), RewardTraining(), source).prompt == 10
    frozen, lora = (estimate_scores(scorer(**options), RewardTraining(), source) for options in ({"frozen": True}, {"lora": {"r": 2}}))
    assert frozen.trainable == 16 + 1 and lora.trainable < 0.5 * moving and frozen.kept.row < 0.6 * told.kept.row
    assert not any(p.requires_grad for p in scorer(frozen=True).net["body"].parameters())


FROZEN, LORA = {"frozen": True}, {"lora": {"r": 4}}


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("llama", LORA), ("llama", FROZEN), ("bert", {}), ("bert", FROZEN)], ids=str)
def test_estimate_of_a_reward_model_meets_the_allocator(allocated, kind, options):
    agent, source = scorer(kind, layers=6, hidden=64, inner=160, **options), FileItems(items(40, 44, count=8), "pairs")
    method = RewardTraining(num_envs=8)
    told = estimate_scores(agent, method, source)
    driver = RewardModelDriver(method, agent, source)
    measured = allocated(driver.step)
    # Of a frozen body the estimate is what lies inside one layer at once, at most.
    assert (0.5 if "frozen" in options else 0.75) < measured / max(told.update, told.step) < 1.2, (measured, told)


def test_a_reward_model_that_exceeds_the_machine_is_refused_with_the_figure(tmp_path, monkeypatch):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "99"}) + "\n" for a in range(8)))
    monkeypatch.setattr("markovia.algos.memory.available", lambda device: (1e5, 2e5))
    options = {"data": path, "model": "arithmetic", "out": tmp_path / "run", "eval_episodes": 0, "progress": False}
    with pytest.raises(ValueError, match=r"this run needs about 0\.\d+ GB: weights .*; try smaller solver.micro, lora or frozen.* --over-memory"):
        train("reward-model", **options)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="this run needs about"):
        assert train("reward-model", over_memory=True, **options).done["ended"] == "budget"


TEXT = sorted(row.id for row in rows().values() if "language" in row.kinds and hasattr(row.value, "num_envs"))


@pytest.mark.parametrize("name", TEXT)
def test_every_method_that_trains_on_texts_has_an_estimate(name):
    method = find(name).value
    family_of(method)
    agent = scorer() if isinstance(method, RewardTraining) else _AGENT
    source = FileItems(items(7, 9), "pairs") if isinstance(method, (Preference, RewardTraining)) else None
    task = types.SimpleNamespace(prompt_length=6, max_new_tokens=5)
    told = estimate_run(method, types.SimpleNamespace(kind="reward" if agent is not _AGENT else "language", agent=agent, task=task, collector=source))
    assert told is not None and told.total > told.weights > 0 and told.update > 0


def test_runs_that_are_merged_hold_their_ends():
    task = types.SimpleNamespace(prompt_length=6, max_new_tokens=5)
    merged = next(row.value for row in rows().values() if getattr(row.value, "merge", None) is not None)
    told = estimate_run(merged, types.SimpleNamespace(kind="language", agent=_AGENT, task=task))
    assert told.copies == (1 + merged.merge.runs) * 4 * sum(p.numel() for p in _AGENT.parameters("policy")) and told.lasting > told.copies


_AGENT = tiny(value_head=True)
