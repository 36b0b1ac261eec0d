"""Preference data of text: rows of a file become prompts and responses of tokens, and every row that is not used is counted.

Formats and columns are those of `envs.text.preference_rows`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from markovia.envs.text.preference_rows import FORMATS, BadRow, Kind, detect, encode, encode_response, implicit_prompt, is_chat, records, render
from markovia.envs.text.tokens import Tokenizer, as_tokenizer

LARGE = 1e308  # numbers are below it: neither infinite nor an integer that no float holds
NUMBERS: dict[Kind, tuple[str, ...]] = {"pairs": ("q", "margin", "weight"), "lists": ("weight",), "single": ("weight",), "prompts": ()}


@dataclass(frozen=True)
class DataOptions:
    """How a file is read; JSON-able. Raises ValueError for lengths that leave no room."""

    max_length: int = 1024  # tokens of prompt and response together
    max_prompt_length: int = 512  # a longer prompt loses its beginning
    over_long: Literal["cut", "drop"] = "cut"  # a response that is cut still ends in EOS
    prompt_end: str | None = None  # an implicit prompt ends with the last of these texts, e.g. "\n\nAssistant:", not where the responses part
    split: str | None = None  # of a Hugging Face dataset with several
    limit: int | None = None  # only the first so many rows
    held_out: int = 32  # items kept from training for the evaluation, at most a tenth; all items of a prompt stay on one side

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1 or self.max_length < self.max_prompt_length + 2:
            raise ValueError(
                f"max_prompt_length must be >= 1 and leave 2 tokens of max_length to the response, got {self.max_prompt_length} of {self.max_length}"
            )
        if self.over_long not in ("cut", "drop"):
            raise ValueError(f"over_long must be 'cut' or 'drop', got {self.over_long!r}")
        if self.held_out < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"expected held_out >= 0 and limit >= 1, got {self.held_out} and {self.limit}")


@dataclass
class Item:
    """A prompt and what is known of its responses (a pair: chosen, rejected and, where there is one, gold), each ending in EOS."""

    prompt: list[int]
    responses: list[list[int]] = field(default_factory=list)
    prompt_text: str = ""
    values: dict[str, float] = field(default_factory=dict)  # q, margin, weight, label
    score: list[Any] | None = None  # a number, or one per dimension, for each response
    logps: dict[str, list[list[float]]] = field(default_factory=dict)  # by anchor, per response and token
    weights: list[list[float]] | None = None  # of each token of each response
    line: int = 0  # of the file, from 1
    prompt_cut: bool = False  # the prompt lost its beginning
    other: Item | None = None  # the two responses the other way round, under the prompt for which the rejected one is good
    rank: list[float] | None = None  # what the responses of a list are ordered by, where that is not the sum of their scores' dimensions
    told: dict[str, Any] = field(default_factory=dict)  # the row's columns that nothing here reads, for a judge


@dataclass
class Report:
    """What became of the rows of a file: reason -> line numbers (from 1)."""

    source: str
    format: str
    read: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    changed: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.format or 'no known format'}, {self.kept} of {self.read} rows used"]
        for what, found in (("dropped", self.dropped), ("kept", self.changed)):
            for reason, rows in sorted(found.items(), key=lambda item: -len(item[1])):
                places = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
                lines.append(f"  {what} {len(rows)}: {reason} (line {places})")
        return "\n".join(lines)


@dataclass
class PreferenceData:
    """The usable items of one file, all of one kind and with the same columns."""

    kind: Kind
    items: list[Item]
    columns: frozenset[str]  # of q, margin, weight, score, label, gold, crossed (two prompts), c (weights per token)
    anchors: frozenset[str]  # whose log-probs are stored
    report: Report

    def parts(self, held_out: int) -> tuple[list[Item], list[Item]]:
        """(training, held-out) items: whole prompts are drawn, always the same, until `held_out` items or a tenth are reached.

        Two prompts that an item crosses count as one.
        """
        same: dict[tuple[int, ...], tuple[int, ...]] = {}  # prompt -> one that it is joined with, in the end itself

        def first(prompt: tuple[int, ...]) -> tuple[int, ...]:
            while (to := same.setdefault(prompt, prompt)) != prompt:
                same[prompt] = prompt = same[to]  # halves the way for the next one
            return prompt

        for item in self.items:
            if item.other is not None:
                same[first(tuple(item.other.prompt))] = first(tuple(item.prompt))
        by_prompt: dict[tuple[int, ...], list[Item]] = {}
        for item in self.items:
            by_prompt.setdefault(first(tuple(item.prompt)), []).append(item)
        groups = list(by_prompt.values())
        rest: list[Item] = []
        out: list[Item] = []
        random.Random(0).shuffle(groups)
        for group in groups:
            (out if len(out) + len(group) <= min(held_out, len(self.items) // 10) else rest).extend(group)
        return rest, out


# -- rows ---------------------------------------------------------------------------------------------------------------------------------


def _parts(row: Mapping[str, Any], format: str, options: DataOptions) -> tuple[Any, list[Any]]:
    """(prompt, responses) of a row, as texts or chats."""
    if format == "preference":
        chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
        if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
            raise BadRow("chosen and rejected are not two texts or two chats")
        gold = [row["gold"]] if "gold" in row else []
        if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1):
            prompt, chosen, rejected = implicit_prompt(chosen, rejected, options.prompt_end)
            if any(not isinstance(g, type(prompt)) or g[: len(prompt)] != prompt for g in gold):
                raise BadRow("gold does not begin with the prompt of chosen and rejected")
            gold = [g[len(prompt) :] for g in gold]
        elif isinstance(prompt, str) and isinstance(chosen, list):
            prompt = [{"role": "user", "content": prompt}]
        return prompt, [chosen, rejected, *gold]
    if format == "ranked":
        if not isinstance(row["completions"], list) or len(row["completions"]) < 2:
            raise BadRow("fewer than two completions")
        return row["prompt"], list(row["completions"])
    if format == "language modelling":
        return "", [row["text"]]
    if "messages" in FORMATS[format][0]:
        if not is_chat(row["messages"]) or len(row["messages"]) < 2 or row["messages"][-1]["role"] != "assistant":
            raise BadRow("messages do not end with an answer of the assistant")
        return row["messages"][:-1], [row["messages"][-1:]]
    return row["prompt"], [row["completion"]] if "completion" in FORMATS[format][0] else []


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGE:
        raise BadRow(f"{name} is not a number")
    return float(value)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = _finite(row[name], name)
    if name == "q" and not 0.0 <= value <= 1.0:
        raise BadRow("q is not a probability")
    return value


def _scores(row: Mapping[str, Any], kind: Kind, count: int) -> list[Any] | None:
    if kind == "pairs":
        if "score_chosen" not in row or "score_rejected" not in row:
            return None
        first = row["score_chosen"]
        nothing = [0.0] * len(first) if isinstance(first, list) else 0.0
        found = [first, row["score_rejected"], *([row.get("score_gold", nothing)] if count == 3 else [])]
    elif kind == "lists":
        found = row["scores"]
    elif "score" in row:
        found = [row["score"]]
    else:
        return None
    if not isinstance(found, list) or len(found) != count:
        raise BadRow("scores are not one number per response")
    what = "scores are not one number per response: one of them"
    scores = [[_finite(x, what) for x in s] if isinstance(s, list) else _finite(s, what) for s in found]
    if any(s == [] or _dimensions(s) != _dimensions(scores[0]) for s in scores):
        raise BadRow(_UNEQUAL)
    return scores


_UNEQUAL = "a score has another number of dimensions than the first one"


def _dimensions(score: Any) -> int | None:
    """How many numbers a score has; None: it is one."""
    return len(score) if isinstance(score, list) else None


def anchor_columns(columns: set[str], kind: Kind) -> dict[str, list[str]]:
    """Anchor -> columns that hold its log-probs per token, one per response (a ranked row has them in one)."""
    sides = {"pairs": ["_chosen_logps", "_rejected_logps", *(["_gold_logps"] if "gold" in columns else [])]}.get(kind, ["_logps"])
    names = {c.removesuffix(sides[0]) for c in columns if c.endswith(sides[0])}
    return {n: [n + s for s in sides] for n in sorted(names) if all(n + s in columns for s in sides)}


def weight_columns(columns: set[str], kind: Kind) -> list[str]:
    """Columns that hold a weight per token of each response, empty where there are none."""
    sides = {"pairs": ["chosen_weights", "rejected_weights", *(["gold_weights"] if "gold" in columns else [])]}.get(kind, ["weights"])
    return sides if all(s in columns for s in sides) else []


def _per_token(row: Mapping[str, Any], columns: Sequence[str], kind: Kind, lengths: list[int], cut: bool, what: str) -> list[list[float]]:
    found = row[columns[0]] if kind == "lists" else [row[c] for c in columns]
    if not isinstance(found, list) or any(not isinstance(x, list) for x in found):
        raise BadRow(f"{columns[0]} is a sum, one number per token is needed")
    if cut:
        raise BadRow(f"{what} of a row that had to be cut")
    if [len(x) for x in found] != lengths:
        raise BadRow(f"{what} do not fit the tokens")
    return [[_finite(v, what) for v in x] for x in found]


def _item(row: Mapping[str, Any], format: str, tokenizer: Tokenizer, options: DataOptions, changed: list[str]) -> Item:
    kind = FORMATS[format][1]
    prompt_text, texts, templated = render(tokenizer, *_parts(row, format, options))
    if prompt_text:
        prompt = encode(tokenizer, prompt_text, not templated)
    else:  # something has to stand before the first token
        bos = getattr(getattr(tokenizer, "inner", tokenizer), "bos_token_id", None)
        prompt = [tokenizer.eos_token_id if bos is None else int(bos)]
    if not prompt or (not prompt_text and format != "language modelling"):
        raise BadRow("empty prompt")
    responses = [encode_response(tokenizer, prompt_text, prompt, t, templated) for t in texts]
    if len(responses) > 1 and all(r == responses[0] for r in responses[: 2 if kind == "pairs" else None]):
        raise BadRow("chosen equals rejected" if kind == "pairs" else "all responses are equal")
    long_prompt = len(prompt) > options.max_prompt_length
    room = options.max_length - min(len(prompt), options.max_prompt_length)
    long_response = any(len(r) > room for r in responses)
    if (long_prompt or long_response) and options.over_long == "drop":
        raise BadRow("over-long")
    if long_prompt:
        prompt = prompt[-options.max_prompt_length :]
        changed.append("over-long, the prompt lost its beginning")
    if long_response:
        responses = [r if len(r) <= room else [*r[: room - 1], tokenizer.eos_token_id] for r in responses]
        changed.append("over-long, a response was cut before its EOS")
        if kind == "pairs" and responses[0] == responses[1]:
            raise BadRow("chosen equals rejected once they are cut")
    values = {n: _number(row, n) for n in NUMBERS[kind] if n in row}
    item = Item(prompt, responses, prompt_text, values, _scores(row, kind, len(responses)), prompt_cut=long_prompt)
    if format == "unpaired preference":
        if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
            raise BadRow("label is neither true nor false")
        item.values["label"] = float(row["label"])
    lengths, cut = [len(r) for r in responses], long_prompt or long_response
    for name, columns in anchor_columns(set(row), kind).items():
        item.logps[name] = _per_token(row, columns, kind, lengths, cut, "stored log-probs")
    if weights := weight_columns(set(row), kind):
        item.weights = _per_token(row, weights, kind, lengths, cut, "token weights")
    if kind == "pairs" and "other_prompt" in row:
        if "prompt" not in row or row["other_prompt"] == row["prompt"]:
            raise BadRow("other_prompt without a prompt, or equal to it")
        turned = {"prompt": row["other_prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
        item.other = replace(_item(turned, format, tokenizer, options, changed), values=item.values)
    return item


def load_preferences(path: str | Path, tokenizer: Any, options: DataOptions | None = None) -> PreferenceData:
    """Read a file of preferences, in one of the formats of `envs.text.preference_rows`.

    The first row tells format and columns. Raises ValueError when no row is usable, with the counts of what is wrong.
    """
    path, options, tokenizer = Path(path), options or DataOptions(), as_tokenizer(tokenizer)
    items: list[Item] = []
    report = Report(str(path), "")
    wanted: set[str] = set()
    for number, row in records(path, options.split):
        if options.limit is not None and report.read == options.limit:
            break
        report.read += 1
        changed: list[str] = []
        try:
            if row is None:
                raise BadRow("not a JSON object")
            row = {k: v for k, v in row.items() if v is not None}
            if not report.format:
                report.format = detect(set(row))
                wanted = set(row)
            read = {c for c in wanted if c in _READ or c.endswith(("_logps", "weights"))}
            if missing := sorted(read - row.keys()):
                raise BadRow(f"no column {missing[0]!r}")
            item = _item({k: v for k, v in row.items() if k in wanted}, report.format, tokenizer, options, changed)
            if item.score and items and items[0].score and _dimensions(item.score[0]) != _dimensions(items[0].score[0]):
                raise BadRow(_UNEQUAL)
            items.append(replace(item, line=number, told={c: row.get(c) for c in sorted(wanted - read)}))
        except BadRow as reason:
            report.dropped.setdefault(str(reason), []).append(number)
            continue
        for what in changed:
            report.changed.setdefault(what, []).append(number)
    report.kept = len(items)
    if not items:
        raise ValueError(f"no row of {path} can be used. {report}" if report.read else f"{path} is empty")
    kind = FORMATS[report.format][1]
    columns = set(items[0].values) | ({"gold"} & wanted if kind == "pairs" else set()) | ({"crossed"} if items[0].other else set())
    columns |= {name for name, found in (("score", items[0].score), ("c", items[0].weights)) if found is not None}
    return PreferenceData(kind, items, frozenset(columns), frozenset(items[0].logps), report)


_READ = frozenset().union(*(needed for needed, _ in FORMATS.values())) | {
    "q", "margin", "weight", "score", "score_chosen", "score_rejected", "gold", "other_prompt",
}  # fmt: skip


def save_logps(items: Sequence[Item], path: str | Path, source: str | Path, anchor: str = "ref") -> None:
    """Write the rows of the .jsonl `source` again with the log-probs of `anchor` that its items hold; every row of it must have been kept.

    Raises ValueError where rows were dropped, since items and rows then no longer correspond.
    """
    rows = [row for _, row in records(Path(source))]
    if len(rows) != len(items):
        raise ValueError(f"{source} has {len(rows)} rows, {len(items)} were usable; mend or remove the others first (see the report)")
    with Path(path).open("w", encoding="utf-8") as f:
        for row, item in zip(rows, items, strict=True):
            found = item.logps[anchor]
            if "chosen" in row:
                sides = ("chosen", "rejected", "gold")
                row |= {f"{anchor}_{side}_logps": values for side, values in zip(sides, found, strict=False)}
            else:
                row[f"{anchor}_logps"] = found if "completions" in row else found[0]
            f.write(json.dumps(row) + "\n")
