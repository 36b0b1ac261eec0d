"""Rows of preference files in TRL's formats, as prompts and responses in words.

    format               columns                               becomes
    preference           (prompt,) chosen, rejected            a pair; without `prompt` the common beginning is the prompt
    ranked               prompt, completions, scores           a list
    unpaired preference  prompt, completion, label             a single response
    prompt-completion    prompt, completion                    a single response, a demonstration
    language modelling   text, or messages                     the same; a text follows the BOS token, a chat's prompt is all before its last answer
    prompt-only          prompt                                a prompt for online rounds

A text is a string, or a list of {"role", "content"} messages that the tokenizer's chat template turns into one. Optional columns: `weight`;
of pairs `q` (probability that chosen is preferred), `margin`, `score_chosen` and `score_rejected`, `gold` (a third response), `other_prompt` (a
second prompt, for which `rejected` is the good response: IOPO crosses the two); of single responses `score`; and numbers per token, the closing EOS
included: log-probs under a named anchor (ref_chosen_logps and ref_rejected_logps, or ref_logps) and weights in the score (chosen_weights and
rejected_weights, or weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from markovia.envs.text.tokens import HFTokenizer, Tokenizer
from markovia.envs.untrusted import lines, parse_json

Kind = Literal["pairs", "lists", "single", "prompts"]
FORMATS: dict[str, tuple[frozenset[str], Kind]] = {
    "preference": (frozenset({"chosen", "rejected"}), "pairs"),
    "ranked": (frozenset({"prompt", "completions", "scores"}), "lists"),
    "unpaired preference": (frozenset({"prompt", "completion", "label"}), "single"),
    "prompt-completion": (frozenset({"prompt", "completion"}), "single"),
    "language modelling (messages)": (frozenset({"messages"}), "single"),
    "language modelling": (frozenset({"text"}), "single"),
    "prompt-only": (frozenset({"prompt"}), "prompts"),
}


class BadRow(ValueError):
    """Why one row can't be used; caught and counted."""


# -- files ---------------------------------------------------------------------------------------------------------------------------------


def records(path: Path, split: str | None = None) -> Iterator[tuple[int, Any]]:
    """(line number, row) of a .jsonl or .jsonl.gz file (None where a line is no JSON object), or of a Hugging Face dataset saved to a folder.

    Raises FileNotFoundError and ValueError with the mend.
    """
    if path.is_dir():
        yield from enumerate(_saved_dataset(path, split), start=1)
        return
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a .jsonl or .jsonl.gz file, or a folder written by datasets' save_to_disk")
    if not {".jsonl", ".json"} & set(path.suffixes):
        raise ValueError(f"{path.name} is neither .jsonl (.gz) nor a folder; write one JSON object per line")
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line, path)
        except ValueError:
            row = None
        yield number, row if isinstance(row, dict) else None


def _saved_dataset(path: Path, split: str | None) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as e:
        raise ImportError(f"{path} is a folder; reading a saved Hugging Face dataset needs: pip install datasets (or write it as .jsonl)") from e
    found = load_from_disk(str(path))
    if not isinstance(found, Mapping):
        return found
    name = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
    if name not in found:
        raise ValueError(f"{path} has the splits {sorted(found)}, asked for {split!r}; name one with split")
    return found[name]


def detect(columns: set[str]) -> str:
    """The format of a row with these columns. Raises ValueError for columns that make none."""
    if {"completions", "labels"} <= columns:
        raise ValueError("stepwise supervision (prompt, completions, labels) trains process reward models, which is not done here")
    for name, (needed, _) in FORMATS.items():
        if needed <= columns:
            return name
    raise ValueError(
        f"the first row has the columns {sorted(columns)}, which make none of the formats: "
        + "; ".join(f"{name} ({', '.join(sorted(needed))})" for name, (needed, _) in FORMATS.items())
    )


# -- texts ---------------------------------------------------------------------------------------------------------------------------------


def common_length(texts: Sequence[Sequence[Any]]) -> int:
    """How many characters or messages the texts have in common at their beginning."""
    return next((i for i, x in enumerate(zip(*texts, strict=False)) if any(y != x[0] for y in x)), min(map(len, texts)))


def implicit_prompt(chosen: Any, rejected: Any, prompt_end: str | None = None) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of two texts or chats that begin alike. Strings part before the first word that differs, or after `prompt_end`.

    Raises BadRow where they have no beginning in common.
    """
    same = common_length([chosen, rejected])
    if isinstance(chosen, str) and prompt_end is not None:
        same = chosen.rfind(prompt_end, 0, same) + len(prompt_end) if prompt_end in chosen[:same] else 0
    elif isinstance(chosen, str):
        while same and not chosen[same - 1].isspace():
            same -= 1
        same = len(chosen[:same].rstrip())  # the space belongs to the word after it
    if not same:
        raise BadRow("no common prompt")
    return chosen[:same], chosen[same:], rejected[same:]


def is_chat(text: Any) -> bool:
    """Whether this is a list of messages."""
    return isinstance(text, list) and bool(text) and all(isinstance(m, dict) and "role" in m and "content" in m for m in text)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is neither a text nor a list of messages")
    return value


def _chat_template(tokenizer: Tokenizer) -> Any:
    inner = getattr(tokenizer, "inner", None)
    if not getattr(inner, "chat_template", None):
        raise ValueError("rows are conversations, but the tokenizer has no chat template; use a chat model's, or write prompt and responses as texts")
    return inner


def render(tokenizer: Tokenizer, prompt: Any, responses: Sequence[Any]) -> tuple[str, list[str], bool]:
    """(prompt, responses, whether a chat template wrote them) as strings."""
    if not is_chat(prompt):
        return _string(prompt, "the prompt"), [_string(r, "a response") for r in responses], False
    inner = _chat_template(tokenizer)
    chats = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
    if not all(is_chat(c) for c in chats):
        raise BadRow("a response is neither a text nor a list of messages")
    if any(not m["content"].strip() for c in chats for m in c if isinstance(m["content"], str)):
        raise BadRow("empty response")
    go_on = prompt[-1]["role"] == "assistant"
    start = inner.apply_chat_template(prompt, tokenize=False, add_generation_prompt=not go_on, continue_final_message=go_on)
    whole = [inner.apply_chat_template(prompt + c, tokenize=False) for c in chats]
    same = common_length([start, *whole])
    return start[:same], [w[same:] for w in whole], True


def encode(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    """Ids of a text; `special` lets the tokenizer open it as it does (BOS): not where a template has done so, nor in the middle of a text."""
    if special or not isinstance(tokenizer, HFTokenizer):
        return tokenizer.encode(text)
    return list(tokenizer.inner(text, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: Tokenizer, prompt_text: str, prompt: list[int], text: str, templated: bool) -> list[int]:
    """Ids of a response as they follow the prompt, closed by EOS. Where text merges with the prompt's last token it is encoded alone."""
    if not text.strip():
        raise BadRow("empty response")
    whole = encode(tokenizer, prompt_text + text, not templated)
    ids = whole[len(prompt) :] if prompt_text and whole[: len(prompt)] == prompt else encode(tokenizer, text, False)
    eos = tokenizer.eos_token_id
    if eos in ids:  # what a template writes behind the last EOS is the next turn's
        return ids[: len(ids) - ids[::-1].index(eos)]
    return [*ids, eos]
