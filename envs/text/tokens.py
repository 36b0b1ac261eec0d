"""Tokenizers behind one small face: a character tokenizer of our own, and a view on any Hugging Face tokenizer (never changed).

    encode(text) -> list[int]    decode(ids) -> str (special tokens dropped)    eos_token_id, pad_token_id, vocab_size
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Tokenizer(Protocol):
    """What token environments and language agents use of a tokenizer."""

    eos_token_id: int
    pad_token_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, as the prompt of a continuation (no closing EOS is added)."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens."""
        ...


class CharTokenizer:
    """One id per character of a fixed alphabet after three special ids: pad 0, bos 1, eos 2; `eos` is how EOS is written in a text.

    Raises ValueError for an alphabet with repeated characters or one that holds `eos`, and for text outside the alphabet.
    """

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, alphabet: str, eos: str = "\n") -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet) or len(eos) != 1 or eos in alphabet:
            raise ValueError(
                f"alphabet {alphabet!r} with eos {eos!r}: expected different characters and a single eos character outside of them"
            )
        self.alphabet, self.eos = alphabet, eos
        self._id = {eos: self.eos_token_id} | {c: i + 3 for i, c in enumerate(alphabet)}
        self._char = dict(enumerate(alphabet, start=3))
        self.vocab_size = 3 + len(alphabet)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self._id.keys())
        if unknown:
            raise ValueError(f"{text!r} holds {unknown}, which the alphabet {self.alphabet!r} lacks; add them to CharTokenizer(alphabet=...)")
        return [self._id[c] for c in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._char.get(int(i), "") for i in ids)


class HFTokenizer:
    """A read-only view on a Hugging Face tokenizer; `inner` keeps every setting that its owner gave it.

    The pad id is the tokenizer's own, else EOS: masks tell padding apart, the id itself is never trusted.
    Raises ValueError for a tokenizer without EOS, since no response could end.
    """

    def __init__(self, inner: Any) -> None:
        if getattr(inner, "eos_token_id", None) is None:
            raise ValueError(
                f"the tokenizer {type(inner).__name__} has no EOS token, so a response could not end; "
                "give it one before you pass it, e.g. tokenizer.eos_token = '</s>'"
            )
        self.inner = inner
        self.eos_token_id = int(inner.eos_token_id)
        pad = inner.pad_token_id
        self.pad_token_id = self.eos_token_id if pad is None else int(pad)
        self.vocab_size = len(inner)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        # Some tokenizers close every text with EOS; a prompt that ends so could not be continued.
        ids = list(self.inner(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.eos_token_id else ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizer itself when it already has our face, else a view on a Hugging Face tokenizer."""
    if isinstance(tokenizer, CharTokenizer | HFTokenizer):
        return tokenizer
    return HFTokenizer(tokenizer)


def added_bos(tokenizer: Tokenizer) -> str:
    """How the BOS token is written that the tokenizer puts in front of every text by itself; "" where it puts none there.

    A tokenizer may name a BOS token and leave it to the chat template: SmolLM2's is the <|im_start|> that opens each message.
    """
    inner = getattr(tokenizer, "inner", None)
    if inner is None or not inner.bos_token:
        return ""
    return str(inner.bos_token) if list(inner("x")["input_ids"])[:1] == [inner.bos_token_id] else ""


def left_pad(rows: Sequence[Sequence[int]], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n, width) int64 with the rows at the right edge, and the mask (n, width) bool of real tokens.

    Raises ValueError when a row is longer than `width`.
    """
    longest = max((len(r) for r in rows), default=0)
    if longest > width:
        raise ValueError(f"a prompt of {longest} tokens does not fit into {width}; raise the width or shorten the prompt")
    ids, mask = np.full((len(rows), width), pad, dtype=np.int64), np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        if len(row):
            ids[i, -len(row) :], mask[i, -len(row) :] = row, True
    return ids, mask
