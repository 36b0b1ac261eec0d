"""A trained language agent as a plain Hugging Face folder: the policy's weights and tokenizer, without value head, optimiser or anything of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markovia.envs.text.tokens import CharTokenizer, HFTokenizer

if TYPE_CHECKING:
    from markovia.agents.language import LanguageAgent

OWN_NAMES = ("smollm2", "arithmetic")  # bases that only this package knows by name
BASE = "base"  # folder of the base model inside an adapter's folder


def hf_tokenizer(tokenizer: Any) -> Any:
    """The Hugging Face tokenizer that gives the same ids: its own for `HFTokenizer`, one built from the alphabet for `CharTokenizer`."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.inner
    if not isinstance(tokenizer, CharTokenizer):
        raise ValueError(f"{type(tokenizer).__name__} can't be written as a Hugging Face tokenizer; give the agent a transformers tokenizer")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": tokenizer.pad_token_id, "<s>": tokenizer.bos_token_id, tokenizer.eos: tokenizer.eos_token_id}
    backend = Tokenizer(models.WordLevel(special | {c: tokenizer.encode(c)[0] for c in tokenizer.alphabet}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token=tokenizer.eos)


def export(agent: LanguageAgent, folder: str | Path, merge: bool = True) -> Path:
    """Write `folder` so that `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer` give this policy back.

    merge=True    adapters are added into the weights (a copy's: the agent stays as it is)
    merge=False   a PEFT folder with the adapters alone. A base that has no public name lies beside them in `folder`/base, under its absolute path in
                  adapter_config.json; once moved it is loaded by PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    The generation settings say how the agent samples (temperature, top_p, no top-k), so that `generate` draws from the trained policy.
    Raises ValueError for a folder that holds something, and for merge=False where there are no adapters.
    """
    policy: Any = agent.net["policy"]
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not empty; export to a new folder")
    if agent.options.lora is None:
        if not merge:
            raise ValueError("this agent trained all its weights, there are no adapters to keep apart; leave merge at True")
        _save(policy, agent, folder)
    elif merge:
        _save(copy.deepcopy(policy).merge_and_unload(), agent, folder)
    else:
        _save_adapter(policy, agent, folder)
    hf_tokenizer(agent.tokenizer).save_pretrained(folder)
    return folder


def _save(model: Any, agent: LanguageAgent, folder: Path) -> None:
    from transformers import GenerationConfig

    usual, options, tokenizer = model.generation_config, agent.options, agent.tokenizer
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=options.temperature, top_p=options.top_p, top_k=0, max_new_tokens=options.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = usual


def _save_adapter(policy: Any, agent: LanguageAgent, folder: Path) -> None:
    base = agent.base
    if base is None or base in OWN_NAMES:
        _save(copy.deepcopy(policy).unload(), agent, folder / BASE)
        base = str((folder / BASE).resolve())
    settings = policy.peft_config["default"]
    usual, settings.base_model_name_or_path = settings.base_model_name_or_path, base
    try:
        policy.save_pretrained(folder)
    finally:
        settings.base_model_name_or_path = usual
