"""What a language agent is made of: its options, adapters on a network, the hash of a network's weights, tokenizers as JSON."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from markovia.agents.adapters import lora_config
from markovia.envs.text.tokens import CharTokenizer


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and bytes of all weights; tells whether an adapter meets the base that it was trained on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class LanguageOptions:
    """How a language agent samples and what is trained; JSON-able.

    temperature > 0 and 0 < top_p <= 1 shape the policy itself; `max_new_tokens` holds where the starts name no length.
    `lora` (e.g. {"r": 16, "alpha": 32, "target_modules": [...]}) trains adapters only. `value_head` adds a linear head on the last
    hidden state with 1 + num_costs columns. `bf16` runs the network under autocast. `packed` evaluates rows in succession that share a
    prompt with the prompt read once and without padding (agents.packing), where the model allows it. `gradient_checkpointing` keeps only the
    inputs of the model's layers for the backward pass and computes each layer again there: the same gradients for less memory and about a third
    more time. Raises ValueError outside of these ranges.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 24
    lora: dict[str, Any] | None = None
    value_head: bool = False
    num_costs: int = 0
    bf16: bool = False
    packed: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; for greedy text use generate(..., deterministic=True)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1 or self.num_costs < 0:
            raise ValueError(f"expected max_new_tokens >= 1 and num_costs >= 0, got {self.max_new_tokens} and {self.num_costs}")


def matrices(network: nn.Module) -> list[nn.Parameter]:
    """What the linear layers hold, a weight that is an embedding's too left out: autocast converts the one and leaves the other alone."""
    embedded = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    return [p for m in network.modules() if isinstance(m, nn.Linear) and id(m.weight) not in embedded for p in m.parameters()]


def matrices_in_bfloat16(network: nn.Module) -> None:
    """Convert the linear layers of a frozen network in place."""
    for p in matrices(network):
        p.data = p.data.bfloat16()


def with_lora(model: nn.Module, lora: dict[str, Any]) -> nn.Module:
    """The model with trainable low-rank adapters, its own weights frozen; `lora` holds peft's settings. Encoders are adapted like causal models.

    Raises ValueError for a setting that peft's LoraConfig lacks, ImportError without peft.
    """
    task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION"
    config = lora_config({"target_modules": "all-linear", **lora}, task_type=task)
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft reads an attribute that transformers renamed; nothing that a user could mend.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, config)


def plain_model(policy: Any) -> Any:
    """The transformers model itself, whether or not adapters were put around it."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer as JSON: our characters, or a fast tokenizer's own serialisation with its special tokens."""
    if isinstance(tokenizer, CharTokenizer):
        return {"alphabet": tokenizer.alphabet, "eos": tokenizer.eos}
    backend = getattr(tokenizer.inner, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer.inner).__name__} can't be written as JSON; name the base model: LanguageAgent(..., base='name')")
    special = {k: str(v) for k, v in tokenizer.inner.special_tokens_map.items() if isinstance(v, str)}
    return {"json": backend.to_str(), "special": special}


def tokenizer_from(config: dict[str, Any]) -> Any:
    """The tokenizer that `tokenizer_config` wrote down."""
    if "alphabet" in config:
        return CharTokenizer(config["alphabet"], config["eos"])
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(config["json"]), **config["special"])
