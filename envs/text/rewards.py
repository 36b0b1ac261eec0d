"""Reward functions with TRL's signature, `fn(prompts, completions, **columns) -> list[float]`, called and checked in one place."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

RewardFn = Callable[..., Sequence[float]]


def resolve(fn: Any) -> Callable[..., Any]:
    """A callable itself, or the one that "module:function" names.

    Raises ValueError when the name has another form or leads nowhere.
    """
    if callable(fn):
        return fn
    module, colon, name = str(fn).partition(":")
    if not colon or not name:
        raise ValueError(f"{fn!r} is neither a callable nor of the form 'module:function'")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"{fn!r} can't be resolved: {e}; expected 'module:function' of an importable module") from e
    if not callable(found):
        raise ValueError(f"{fn!r} is a {type(found).__name__}, expected a function")
    return found


def _checked(fn: Callable[..., Any], values: Any, n: int) -> np.ndarray:
    """The values of one function as (n,) float64; raises ValueError that names the function."""
    name = getattr(fn, "__name__", type(fn).__name__)
    if values is None or np.ndim(values) == 0:
        raise ValueError(f"reward function {name!r} returned {values!r}, expected a list of {n} numbers, one per completion")
    values = list(values)
    if len(values) != n:
        raise ValueError(f"reward function {name!r} returned {len(values)} values for {n} completions; return one per completion")
    missing = [i for i, v in enumerate(values) if v is None]
    if missing:
        raise ValueError(f"reward function {name!r} returned None for completion {missing[0]}; return 0.0 where it does not apply")
    try:
        out = np.asarray([float(v) for v in values], dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise ValueError(f"reward function {name!r} returned a value that is no number: {e}") from e
    bad = np.flatnonzero(~np.isfinite(out))
    if len(bad):
        raise ValueError(f"reward function {name!r} returned {out[bad[0]]} for completion {bad[0]}; rewards must be finite")
    return out


def call_reward(
    fns: Sequence[RewardFn | str],
    prompts: Sequence[str],
    completions: Sequence[str],
    weights: Sequence[float] | None = None,
    **columns: Sequence[Any],
) -> np.ndarray:
    """Weighted sum of several reward functions, r_i = sum_k w_k f_k(prompts, completions, **columns)_i, shape (n,) float64.

    Columns that a function does not take are not passed to it, unless it takes **kwargs (TRL's functions do).
    Raises ValueError, naming the function, for a wrong length, None, NaN or a non-number; and for a wrong number of weights.
    """
    weights = [1.0] * len(fns) if weights is None else list(weights)
    if len(weights) != len(fns):
        raise ValueError(f"{len(fns)} reward functions came with {len(weights)} weights; give one weight per function")
    total = np.zeros(len(completions), dtype=np.float64)
    for fn, weight in zip(map(resolve, fns), weights, strict=True):
        taken = inspect.signature(fn).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        extra = {k: list(v) for k, v in columns.items() if every or k in taken}
        values = fn(prompts=list(prompts), completions=list(completions), **extra)
        total += weight * _checked(fn, values, len(completions))
    return total


@lru_cache(maxsize=1)
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as e:
        raise ImportError("the VADER reward needs vaderSentiment: pip install markovia[text]") from e
    return SentimentIntensityAnalyzer()


def vader_compound(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """VADER's compound sentiment in [-1, 1] of each completion, the prompt left out (Hutto & Gilbert 2014, lexicon and rules)."""
    return [float(_vader().polarity_scores(text)["compound"]) for text in completions]


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion, spaces at the ends aside, is the column `answer`; else 0."""
    return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]
