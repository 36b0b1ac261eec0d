"""Exported agents are plain Hugging Face folders: same logits, same ids, same sampling law."""

import json

import pytest
import torch

from markovia.agents.export import hf_tokenizer
from markovia.agents.language import LanguageAgent
from markovia.envs.text.tasks import arithmetic
from markovia.envs.text.tokens import CharTokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
IDS = torch.tensor([[4, 13, 5, 14], [3, 3, 13, 14]])


def moved(**options):
    """The shipped adder with every trainable weight moved."""
    torch.manual_seed(0)
    agent = LanguageAgent.from_name("arithmetic", **options)
    with torch.no_grad():
        for p in agent.parameters("policy"):
            p.add_(0.05 * torch.randn_like(p))
    return agent


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("lora", "merge"), [(None, True), ({"r": 2}, True), ({"r": 2}, False)])
def test_folder_has_the_logits_and_ids_of_the_agent(lora, merge, tmp_path):
    agent = moved(lora=lora, temperature=0.7, value_head=True)
    want = logits(agent.net["policy"])
    model, tokenizer = loaded(agent.export(tmp_path / "out", merge))
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    assert torch.equal(logits(agent.net["policy"]), want)
    if not merge:
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and not (tmp_path / "out" / "model.safetensors").exists()
    for text in ("12+7=", "12+7=19\n", "0"):
        assert tokenizer(text)["input_ids"] == agent.tokenizer.encode(text)
    assert tokenizer.decode(agent.tokenizer.encode("12+7=19")) == "12+7=19"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 0, agent.tokenizer.vocab_size)


def test_generate_of_the_folder_draws_from_the_trained_policy(tmp_path):
    agent = moved(temperature=0.7, top_p=0.9)
    model, tokenizer = loaded(agent.export(tmp_path / "out"))
    config = model.generation_config
    assert (config.temperature, config.top_p, config.top_k, config.do_sample) == (0.7, 0.9, 0, True)
    starts = arithmetic(1).starts(1, torch.Generator().manual_seed(0))
    prompt = starts["prompt_ids"][starts["prompt_mask"]][None]
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, temperature=None, top_p=None, max_new_tokens=3)
    ours = agent.generate(starts, deterministic=True)
    assert tokenizer.decode(greedy[0, prompt.shape[1] :], skip_special_tokens=True) == ours.outcome["completion_text"][0]


def test_a_moved_adapter_folder_is_loaded_on_its_base(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    agent = moved(lora={"r": 2})
    agent.export(tmp_path / "out", merge=False)
    there = (tmp_path / "out").rename(tmp_path / "elsewhere")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(there / "base"), there)
    torch.testing.assert_close(logits(model), logits(agent.net["policy"]), rtol=0, atol=1e-5)


def test_a_base_with_a_name_of_its_own_is_not_copied(tmp_path):
    base = moved().export(tmp_path / "base")
    agent = LanguageAgent.from_name(str(base), lora={"r": 2})
    out = agent.export(tmp_path / "out", merge=False)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base) and not (out / "base").exists()
    torch.testing.assert_close(logits(loaded(out)[0]), logits(agent.net["policy"]), rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_told(tmp_path):
    agent = moved()
    with pytest.raises(ValueError, match="no adapters to keep apart"):
        agent.export(tmp_path / "out", merge=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        agent.export(tmp_path / "full")
    with pytest.raises(ValueError, match="transformers tokenizer"):
        hf_tokenizer(object())


def test_characters_outside_of_the_alphabet_are_refused_by_both():
    ours = CharTokenizer("ab")
    for tokenize in (ours.encode, hf_tokenizer(ours)):
        with pytest.raises(Exception, match=r"UNK|alphabet"):
            tokenize("c")
