"""Reward functions with TRL's signature, `fn(prompts, completions, **columns) -> list[float]`, called and checked in one place."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from markovia.envs.untrusted import check_code, check_found

RewardFn = Callable[..., Sequence[float]]
# "scheme:rest" that is no module's name: which function, called with the rest, gives the reward function.
SCHEMES = {"run": "markovia.agents.reward_model:reward_of_run"}


class RewardError(ValueError):
    """A reward function that failed; the message names it and the sample."""


def resolve(fn: Any) -> Callable[..., Any]:
    """A callable itself, the one that "module:function" names, or the trained reward model of "run:FOLDER".

    Raises ValueError when the name has another form, leads nowhere, or stands in a file that may not name it (`envs.untrusted`).
    """
    if callable(fn):
        return fn
    module, colon, name = str(fn).partition(":")
    if not colon or not name:
        raise ValueError(f"{fn!r} is neither a callable nor of the form 'module:function' (or 'run:FOLDER' of a trained reward model)")
    if module in SCHEMES:
        made: Callable[..., Any] = resolve(SCHEMES[module])(name)
        return made
    check_code(module, str(fn))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        raise ValueError(f"{fn!r} can't be resolved: {e}; expected 'module:function' of an importable module") from e
    check_found(found, module, str(fn))
    if not callable(found):
        raise ValueError(f"{fn!r} is a {type(found).__name__}, expected a function")
    return found


def name_of(fn: Callable[..., Any]) -> str:
    """How a reward function is called in messages and in the log."""
    return str(getattr(fn, "__name__", type(fn).__name__))


def names_of(fns: Sequence[Callable[..., Any]]) -> list[str]:
    """One name per function, numbered where several have the same."""
    plain = [name_of(f) for f in fns]
    return [n if plain.count(n) == 1 else f"{n}-{plain[: i + 1].count(n)}" for i, n in enumerate(plain)]


def _short(text: str, most: int = 160) -> str:
    return repr(text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}")


def sample(i: int, prompts: Sequence[str], completions: Sequence[str]) -> str:
    """ (prompt ..., text ...), the texts of the sample that a message is about, shortened."""
    return f" (prompt {_short(prompts[i])}, text {_short(completions[i])})"


def _within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """What `call` returns. Raises TimeoutError when it takes longer: Python can't end it, so its thread is left behind."""
    if seconds is None:
        return call()
    out: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            out.append(call())
        except BaseException as e:  # handed over to the caller's thread
            failed.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not out:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return out[0]


def _ask(
    fn: Callable[..., Any], prompts: Sequence[str], completions: Sequence[str], extra: Mapping[str, Sequence[Any]], timeout: float | None
) -> Any:
    """The function's own answer. What it raises, and a time-out, become a RewardError on the first sample that fails alone."""

    def call(rows: Sequence[int]) -> Any:
        picked = {k: [v[i] for i in rows] for k, v in extra.items()}
        return _within(timeout, lambda: fn(prompts=[prompts[i] for i in rows], completions=[completions[i] for i in rows], **picked))

    everything = range(len(completions))
    try:
        return call(everything)
    except Exception as error:
        for i in everything:
            try:
                call([i])
            except Exception as alone:
                what = "took too long" if isinstance(alone, TimeoutError) else "failed"
                raise RewardError(
                    f"reward function {name_of(fn)!r} {what} on completion {i}{sample(i, prompts, completions)}: {type(alone).__name__}: {alone}"
                ) from error
        together = f"failed on {len(completions)} completions together, on none of them alone"
        raise RewardError(f"reward function {name_of(fn)!r} {together}: {type(error).__name__}: {error}") from error


def _checked(fn: Callable[..., Any], values: Any, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """The values of one function as (n,) float64; raises RewardError that names the function and the sample."""
    name, n, which = name_of(fn), len(completions), partial(sample, prompts=prompts, completions=completions)
    if not isinstance(values, list | tuple) and (values is None or np.ndim(values) == 0):
        raise RewardError(f"reward function {name!r} returned {values!r}, expected a list of {n} numbers, one per completion")
    values = list(values)
    if len(values) != n:
        missing = f"; the first without one is completion {len(values)}{which(len(values))}" if len(values) < n else ""
        raise RewardError(f"reward function {name!r} returned {len(values)} values for {n} completions; return one per completion{missing}")
    out = np.empty(n, dtype=np.float64)
    for i, value in enumerate(values):
        if value is None:
            raise RewardError(f"reward function {name!r} returned None for completion {i}; return 0.0 where it does not apply{which(i)}")
        try:
            out[i] = float(value)
        except (TypeError, ValueError) as e:
            raise RewardError(f"reward function {name!r} returned {value!r}, which is no number, for completion {i}{which(i)}") from e
        if not np.isfinite(out[i]):
            raise RewardError(f"reward function {name!r} returned {out[i]} for completion {i}; rewards must be finite{which(i)}")
    return out


def call_rewards(
    fns: Sequence[RewardFn | str], prompts: Sequence[str], completions: Sequence[str], timeout: float | None = None, **columns: Sequence[Any]
) -> np.ndarray:
    """What each of k reward functions says of n completions, (n, k) float64; each has `timeout` seconds for all of them (None: as long as it takes).

    Columns that a function does not take are not passed to it, unless it takes **kwargs (TRL's functions do).
    Raises RewardError, naming function and sample, for one that raises or takes too long, for a wrong length, None, NaN or a non-number.
    """
    out = np.empty((len(completions), len(fns)), dtype=np.float64)
    for k, fn in enumerate(map(resolve, fns)):
        taken = inspect.signature(fn).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        extra = {name: v for name, v in columns.items() if every or name in taken}
        out[:, k] = _checked(fn, _ask(fn, prompts, completions, extra, timeout), prompts, completions)
    return out


def check_weights(fns: Sequence[Any], weights: Sequence[float] | None) -> np.ndarray:
    """One weight per function, (k,) float64; None: 1 each. Raises ValueError for another number of them."""
    found = np.ones(len(fns)) if weights is None else np.asarray(list(weights), dtype=np.float64)
    if len(found) != len(fns):
        raise ValueError(f"{len(fns)} reward functions came with {len(found)} weights; give one weight per function")
    return found


def call_reward(
    fns: Sequence[RewardFn | str],
    prompts: Sequence[str],
    completions: Sequence[str],
    weights: Sequence[float] | None = None,
    timeout: float | None = None,
    **columns: Sequence[Any],
) -> np.ndarray:
    """Weighted sum of several reward functions, r_i = sum_k w_k f_k(prompts, completions, **columns)_i, shape (n,) float64; see `call_rewards`."""
    weighted = check_weights(fns, weights)
    return np.asarray(call_rewards(fns, prompts, completions, timeout, **columns) @ weighted)


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


def written(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion holds a letter or digit; else 0: what is right of a text that has only its length to get right."""
    return [float(any(c.isalnum() for c in text)) for text in completions]
