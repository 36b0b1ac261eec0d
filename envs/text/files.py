"""Text tasks from files of one JSON object per line: any prompts with reward functions of one's own, and questions with a number for an answer."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from markovia.envs.text.preference_rows import BadRow, records, render
from markovia.envs.text.rewards import RewardFn
from markovia.envs.text.tasks import TextTask
from markovia.envs.text.tokens import Tokenizer, added_bos, as_tokenizer

# A sign counts unless it stands behind a letter, a digit or a bracket, where it joins or subtracts; commas count between groups of three digits.
_NUMBER = re.compile(r"((?<![\w)])[-\u2212])?[$€£]?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
MARK = "####"  # stands before the final number, as in GSM8K


def final_number(text: str) -> Decimal | None:
    """The first number after the last "####", else the last number of the text; None where there is none.

    "$1,234.50" is 1234.5, "-3" and "\u22123" are -3, "10-5" ends in 5, "42." in 42.
    """
    if MARK in text and (behind := _numbers(text.rpartition(MARK)[2])):
        return behind[0]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(size.replace(",", "")) * (-1 if sign else 1) for sign, size in _NUMBER.findall(text)]


def same_number(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion's final number equals that of the column `answer` (42 = 42.0 = "#### 42"); else 0."""
    return [float(final_number(c) is not None and final_number(c) == final_number(a)) for c, a in zip(completions, answer, strict=True)]


def marked(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion ends in "#### " and a number, which a program can find without guessing; else 0."""
    return [float(re.search(rf"{MARK}\s*\S*\d\S*\s*$", c) is not None) for c in completions]


def read_rows(path: str | Path, needed: Sequence[str], limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a .jsonl (.gz) file or of a saved Hugging Face dataset, each with the columns of the first one.

    Raises ValueError, with the line, for what is no JSON object, lacks a column, or has an empty text for one of `needed`.
    """
    out: list[dict[str, Any]] = []
    for line, row in records(Path(path)):
        if limit is not None and len(out) == limit:
            break
        if row is None:
            raise ValueError(f"{path}, line {line} is not a JSON object; write one per line")
        columns = out[0].keys() if out else dict.fromkeys(needed)
        missing = sorted(set(columns) - row.keys())
        if missing:
            raise ValueError(f"{path}, line {line} has no column {missing[0]!r}; its columns are {sorted(row)}, expected {sorted(columns)}")
        empty = [n for n in needed if not row[n]]
        if empty:
            raise ValueError(f"{path}, line {line}: {empty[0]!r} is empty; give it a text or leave the line out")
        out.append({k: row[k] for k in columns} if out else dict(row))
    if not out:
        raise ValueError(f"{path} has no rows; write one JSON object per line with {' and '.join(needed)}")
    return out


def apart(rows: Sequence[dict[str, Any]], held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, held-out) rows, always the same: `held_out` of them, at most a tenth; rows of one prompt stay together."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    groups, most = list(by_prompt.values()), min(held_out, len(rows) // 10)
    random.Random(0).shuffle(groups)
    train: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in groups:
        (rest if len(rest) + len(group) <= most else train).extend(group)
    return train, rest


def prompt_text(tokenizer: Tokenizer, prompt: Any, chat: bool, where: str) -> str:
    """A prompt in the words that the model reads: a list of messages, or with `chat` a text as the user's, through the chat template."""
    messages = [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
    try:
        text = render(tokenizer, messages, [])[0]
    except BadRow as e:
        raise ValueError(f"{where}: {e}") from e
    # A template writes the BOS token as text; some tokenizers put it there by themselves.
    return text.removeprefix(added_bos(tokenizer)) if messages is not prompt or isinstance(prompt, list) else text


def _task(rows: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]], **settings: Any) -> TextTask:
    columns = [k for k in rows[0] if k != "prompt"]

    def part(which: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, Sequence[Any]]]:
        return [r["prompt"] for r in which], {c: [r[c] for r in which] for c in columns}

    (prompts, told), (others, told_others) = part(rows), part(held)
    return TextTask(prompts=prompts, columns=told, held_out=others, held_out_columns=told_others if held else {}, **settings)


def prompts(
    data: str | None = None,
    rewards: Sequence[RewardFn | str] | RewardFn | str | None = None,
    weights: Sequence[float] | None = None,
    model: str = "smollm2",
    max_new_tokens: int = 64,
    group_size: int = 1,
    chat: bool = False,
    held_out: int = 32,
    limit: int | None = None,
    solved: str | None = None,
    timeout: float | None = None,
    temperature: float = 1.0,
) -> TextTask:
    """Any file of prompts, scored by any reward functions (TRL's signature, "module:function", "run:FOLDER"), with weights.

    Each row of `data` has `prompt`, a text or a list of messages; its other columns are handed to the reward functions. `held_out` prompts (at most
    a tenth) are kept for evaluations. Without a file: the openings of film reviews, and VADER's sentiment.
    Raises ValueError for a file without reward functions and for rows that can't be used, with their line.
    """
    from markovia.envs.text.openings import TRAIN
    from markovia.envs.text.pretrained import load_tokenizer

    if rewards is None and data is not None:
        raise ValueError(f"prompts of {data} came without a reward function: --reward module:function, called as (prompts, completions, **columns)")
    tokenizer = as_tokenizer(load_tokenizer(model))
    rows = [{"prompt": p} for p in TRAIN] if data is None else read_rows(data, ["prompt"], limit)
    rows = [{**r, "prompt": prompt_text(tokenizer, r["prompt"], chat, f"row {i} of {data}")} for i, r in enumerate(rows, start=1)]
    train, held = apart(rows, held_out)
    task = _task(
        train, held, tokenizer=tokenizer, rewards="markovia.envs.text.rewards:vader_compound" if rewards is None else rewards, weights=weights,
        max_new_tokens=max_new_tokens, group_size=group_size, model=model, temperature=temperature, solved=solved, reward_timeout=timeout,
    )  # fmt: skip
    if task.solved != solved:
        raise ValueError(f"solved names the reward function {solved!r}, the task has {', '.join(task.reward_names)}")
    return task


INSTRUCTION = f"Think step by step. Write the final number behind {MARK} in the last line."


def gsm8k(
    data: str | None = None,
    test: str | None = None,
    model: str = "smollm2",
    max_new_tokens: int = 128,
    group_size: int = 1,
    format_weight: float = 0.0,
    chat: bool = True,
    held_out: int = 100,
    limit: int | None = None,
    eval_samples: int = 8,
    temperature: float = 1.0,
) -> TextTask:
    """Questions whose answer is a number, in GSM8K's format: rows with `question` and `answer`, whose final number stands behind "####".

    Reward 1 where the completion's final number is the answer's, plus `format_weight` where it stands behind "####" at the end. `test` is a file of
    held-out questions, without it `held_out` of `data` (at most a tenth). Without a file: generated problems of one step.
    Raises ValueError for an answer without a number, with its row.                                                            [arXiv 2110.14168]
    """
    from markovia.envs.text.pretrained import load_tokenizer
    from markovia.envs.text.word_problems import word_problems

    tokenizer = as_tokenizer(load_tokenizer(model))
    chat = chat and bool(getattr(getattr(tokenizer, "inner", None), "chat_template", None))

    def rows_of(path: str | None) -> list[dict[str, Any]]:
        found = word_problems() if path is None else read_rows(path, ["question", "answer"], limit)
        out = []
        for i, row in enumerate(found, start=1):
            if final_number(str(row["answer"])) is None:
                raise ValueError(f"row {i} of {path}: the answer {row['answer']!r} holds no number")
            text = f"{row['question']}\n{INSTRUCTION}" if chat else f"Question: {row['question']}\n{INSTRUCTION}\nAnswer:"
            out.append({"prompt": prompt_text(tokenizer, text, chat, f"row {i} of {path}"), "answer": str(row["answer"])})
        return out

    train, held = apart(rows_of(data), held_out) if test is None else (rows_of(data), rows_of(test))
    here = f"{__name__}:"
    return _task(
        train, held, tokenizer=tokenizer, rewards=[here + "same_number", here + "marked"], weights=[1.0, format_weight],
        max_new_tokens=max_new_tokens, group_size=group_size, model=model, temperature=temperature, solved="same_number", eval_samples=eval_samples,
    )  # fmt: skip
