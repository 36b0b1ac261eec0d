"""From items of text to what a loss reads: rows of tokens, the views that index them, and the log-probs that the data brought along.

Which rows an item becomes depends on what the method needs: a pair is (chosen, rejected) and, where it is asked for, gold; a ranked list is all its
responses, or its best and worst for a method of pairs; a method of demonstrations gets the chosen or best response alone. A method that crosses two
prompts gets four rows of each pair: chosen and rejected under its own prompt, then under the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout, Views
from markovia.algos.preference.anchors import Dataset, FromPolicy
from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.listwise import LambdaRank
from markovia.algos.preference.method import Preference
from markovia.algos.preference.pairwise import Crossed, Pairwise
from markovia.algos.preference.pieces import OtherRewards
from markovia.algos.preference.scores import NEEDS
from markovia.algos.preference.token_level import differing, shared_subset
from markovia.algos.preference.unpaired import WinRate
from markovia.envs.text.preferences import Item, Kind, PreferenceData
from markovia.envs.text.tokens import left_pad

COMPUTED = {"kl_ref", "collision", "value", "mismatched", "progress"}  # by the trainer, from any data
_MEND: dict[str, dict[str, str]] = {
    "pairs": {"": "chosen and rejected"},
    "groups": {"pairs": "score_chosen and score_rejected", "": "completions and scores"},
    "gold": {"pairs": "gold", "": "chosen, rejected and gold"},
    "unpaired": {"": "completion"},
    "q": {"": "q"},
    "margin": {"": "margin"},
    "score": {"pairs": "score_chosen and score_rejected", "lists": "scores", "": "score"},
    "label": {"": "label"},
    "c": {"pairs": "chosen_weights and rejected_weights", "": "weights"},
    "keep": {"": "chosen and rejected"},
    "diff": {"": "chosen and rejected"},
}


def offered(kind: Kind, columns: Collection[str]) -> set[str]:
    """Fields of `Views` that items of this kind and these columns can fill."""
    pairs = {"pairs", "unpaired", "label", "keep", "diff"}
    own = {
        "pairs": pairs | ({"groups"} if "score" in columns else set()),
        "lists": {"pairs", "groups", "unpaired", "score", "keep", "diff"},
        "single": {"unpaired"},
        "prompts": set(),
    }[kind]
    return own | (set(columns) & NEEDS.keys())


def samples_beside(method: Preference, data: PreferenceData) -> bool:
    """Whether a response of the policy is set beside each pair of the file (SPAC)."""
    one = isinstance(method.sampler, FromPolicy) and method.sampler.per_prompt == 1
    return one and data.kind == "pairs" and "gold" not in data.columns


def check_needs(method: Preference, data: PreferenceData) -> None:
    """Raises ValueError naming the column that a file lacks for this method, and what the trainer does not offer."""
    if method.target is not None and "target" in data.anchors:
        raise ValueError(
            f"{data.report.source} holds log-probs of an anchor 'target', but the method moves its own anchor 'target'; "
            "drop or rename the columns"
        )
    there, anchors = offered(data.kind, data.columns) | COMPUTED, {"ref", "target", *data.anchors}
    if isinstance(method.loss, Pairwise) and isinstance(method.loss.diff, Crossed):
        if "crossed" not in data.columns:
            raise ValueError(
                f"{data.report.source} holds {data.report.format} rows{_with(data.columns)}; the method crosses two prompts with each other's "
                "answers: add the column other_prompt, a second prompt for which rejected is the good response"
            )
        there, anchors = there | {"groups"}, {"ref"}
    if samples_beside(method, data):
        there, anchors = there | {"gold"}, anchors | {"old"}
    for need in method.needs:
        anchor = need.partition(".")[2]
        if need in there or anchor in anchors:
            continue
        if anchor:
            columns = f"{anchor}_chosen_logps and {anchor}_rejected_logps" if data.kind == "pairs" else f"{anchor}_logps"
        else:
            columns = _MEND[need].get(data.kind) or _MEND[need][""]
        raise ValueError(
            f"{data.report.source} holds {data.report.format} rows{_with(data.columns)}; the method reads {need} "
            f"({NEEDS.get(need, NEEDS['logp_ref.NAME'])}): add the column{'s' if ' and ' in columns else ''} {columns}"
            + ("" if isinstance(method.sampler, Dataset) else ", or let it sample: --judge module:function")
        )


def reads_win_rates(method: Preference) -> bool:
    """Whether scores are probabilities P(y beats an opponent) to the loss, not rewards."""
    loss = method.loss
    parts = (loss, getattr(loss, "point", None), getattr(loss, "loss", None))
    return "score" in method.needs and any(isinstance(p, SelfPlay | WinRate | LambdaRank) for p in parts)


def prepare(method: Preference, data: PreferenceData) -> None:
    """`check_needs`, and without what the method can't learn from, which joins the report: lists that have no best and worst response where it is
    about pairs, responses that are labelled bad where it imitates. Lists with several rewards are ranked by the one that the method's labels are of.

    Raises ValueError where nothing is left, and for scores that are no win rates where the method reads them as such.
    """
    check_needs(method, data)
    if reads_win_rates(method):
        for item in data.items:
            if not all(0.0 <= s <= 1.0 for s in totals(item)):
                raise ValueError(
                    f"{data.report.source}, line {item.line} has the scores {item.score}; the method reads win rates, probabilities in [0, 1] "
                    "that a response beats its opponent's: bring the scores there (of rewards r, the mean of s(r - r') over the others)"
                )
    margin = getattr(method.loss, "margin", None)
    if data.kind == "lists" and isinstance(margin, OtherRewards):
        _rank(data, margin.weights)
    if data.kind == "lists" and select(method.needs, data.kind) == "extremes":
        _leave_out(data, tied, "all scores are equal", "no list has a best and a worst response")
    if data.kind == "single" and select(method.needs, "pairs") == "demo":
        bad = "labelled bad, and the method imitates"
        _leave_out(data, lambda i: i.values.get("label", 1.0) < 0.5, bad, "no response is labelled good")


def _rank(data: PreferenceData, weights: Sequence[float]) -> None:
    """Order the responses of each list by the dimension of weight 0, which MODPO's labels are of."""
    labelled = [k for k, w in enumerate(weights) if w == 0.0]
    if len(labelled) != 1:
        raise ValueError(
            f"the best and the worst response of a list are those of the labelled dimension; the labelled dimension is the one whose weight is 0 in "
            f"loss.margin.weights, got {tuple(weights)}; set one of them to 0, or write pairs"
        )
    for item in data.items:
        if any(not isinstance(s, list) or len(s) != len(weights) for s in item.score or ()):
            raise ValueError(f"loss.margin.weights weigh {len(weights)} rewards per response, line {item.line} has the scores {item.score}")
    data.items = [replace(i, rank=[s[labelled[0]] for s in i.score or ()]) for i in data.items]


def _leave_out(data: PreferenceData, useless: Callable[[Item], bool], reason: str, nothing: str) -> None:
    """Drop items, and tell it in the report. Raises ValueError with `nothing` where none is left."""
    if lines := [i.line for i in data.items if useless(i)]:
        data.report.dropped[reason] = lines
        data.items = [i for i in data.items if not useless(i)]
        data.report.kept = len(data.items)
    if not data.items:
        raise ValueError(f"{nothing}. {data.report}")


def crosses(needs: Collection[str]) -> bool:
    """Whether a loss reads groups that cross two prompts, not lists of scored responses."""
    return "groups" in needs and "score" not in needs


def halves(items: Sequence[Item], needs: Collection[str]) -> list[Item]:
    """The items, each followed by its two responses under the other prompt where the loss crosses them."""
    return [half for item in items for half in (item, item.other) if half is not None] if crosses(needs) else list(items)


def _with(columns: Collection[str]) -> str:
    return f" with {', '.join(sorted(columns))}" if columns else ""


def select(needs: Collection[str], kind: Kind) -> str:
    """Which responses of an item are used: "demo" (the good one), "pair", "pair+gold", "extremes" (best and worst of a list) or "all"."""
    if kind in ("single", "prompts"):
        return "all"
    if "unpaired" in needs and not {"label", "score", "pairs", "groups"} & set(needs):
        return "demo"
    if kind == "pairs":
        return "pair+gold" if "gold" in needs else "pair"
    return "all" if {"groups", "unpaired"} & set(needs) else "extremes"


def chosen_responses(item: Item, which: str, kind: Kind) -> list[int]:
    """Indices into the item's responses, in the order of its rows."""
    if which == "pair":
        return [0, 1]
    if which in ("pair+gold", "all"):
        return list(range(len(item.responses)))
    if kind == "pairs":
        return [0]
    total = totals(item)
    best, worst = (pick(range(len(total)), key=total.__getitem__) for pick in (max, min))
    return [best] if which == "demo" else [best, worst]


def totals(item: Item) -> list[float]:
    """One score per response of a list: the sum over dimensions, or what the list is ranked by."""
    return item.rank or [float(sum(s)) if isinstance(s, list) else float(s) for s in item.score or ()]


def tied(item: Item) -> bool:
    """Whether all responses of a list are equally good."""
    return len(set(totals(item))) == 1


def entries(items: Sequence[Item], kind: Kind, needs: Collection[str]) -> int:
    """How many losses a method has on these items: one per item, or one per response where they stand alone."""
    return sum(len(chosen_responses(i, select(needs, kind), kind)) for i in items) if "unpaired" in needs else len(items)


@dataclass
class Batch:
    """Rows of tokens (B, T), their views, and stored log-probs (B, T) by anchor."""

    record: Rollout
    views: Views
    logps: dict[str, Tensor] = field(default_factory=dict)


def token_rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> Rollout:
    """A record of responses given as ids; rows that share a prompt should stand in succession, so that packs share it."""
    ids, mask = (torch.from_numpy(x).to(device) for x in left_pad(prompts, max(map(len, prompts)), pad))
    T = max(map(len, responses))
    action = torch.tensor([[*r, *[pad] * (T - len(r))] for r in responses], device=device)
    valid = torch.arange(T, device=device) < torch.tensor([len(r) for r in responses], device=device)[:, None]
    zero = torch.zeros(action.shape, device=device)
    return Rollout(
        obs={"prompt_ids": ids, "prompt_mask": mask}, action=action, logp_old=zero, reward=zero, valid=valid, mask=valid.clone(),
        continuation=zero + 1.0, truncated=torch.zeros_like(valid), per_row=True,
    )  # fmt: skip


def make_batch(
    items: Sequence[Item],
    kind: Kind,
    needs: Collection[str],
    pad: int,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Batch:
    """The rows and views of some items; `generator` draws SamPO's subset."""
    which, items = select(needs, kind), halves(items, needs)
    picks = [chosen_responses(item, which, kind) for item in items]
    rows = [(item, k) for item, pick in zip(items, picks, strict=True) for k in pick]
    record = token_rows([i.prompt for i, _ in rows], [i.responses[k] for i, k in rows], pad, device)
    starts = torch.tensor([0, *[len(p) for p in picks[:-1]]], device=device).cumsum(0)
    views = _views(items, picks, starts, kind, set(needs))
    if crosses(needs):  # rows y1|x1, y2|x1, y2|x2, y1|x2
        views.pairs = views.groups
        views.groups = starts[::2, None] + torch.tensor([0, 2, 1, 3], device=device)
        views.weight = None if views.weight is None else views.weight[::2]
    if views.pairs is not None:
        if "keep" in needs:
            views.keep = shared_subset(record.mask.cpu(), views.pairs.cpu(), generator).to(device)
        if "diff" in needs:
            views.diff = differing(record.action, record.mask, views.pairs)
    views.check(len(rows))
    anchors = set.intersection(*(set(i.logps) for i in items))
    if "c" in needs:
        views.c = _filled([i.weights[k] for i, k in rows if i.weights is not None], record.valid)
    return Batch(record, views, {name: _filled([i.logps[name][k] for i, k in rows], record.valid) for name in sorted(anchors)})


def _views(items: Sequence[Item], picks: Sequence[list[int]], starts: Tensor, kind: Kind, needs: set[str]) -> Views:
    device, width = starts.device, max(map(len, picks))
    place = torch.arange(width, device=device)
    count = torch.tensor([len(p) for p in picks], device=device)
    views = Views()
    if width > 1 and needs & {"pairs", "keep", "diff"}:
        views.pairs = starts[:, None] + place[:2]
    if "gold" in needs:
        views.gold = starts + 2
    if "groups" in needs:
        views.groups = torch.where(place < count[:, None], starts[:, None] + place, -1)
    if "unpaired" in needs:
        views.unpaired = torch.arange(int(count.sum()), device=device)
    for name in ("q", "margin", "weight"):
        if name in items[0].values and (name == "weight" or name in needs):
            values = torch.tensor([i.values[name] for i in items], device=device)
            # A weight belongs to the item of the loss: to each of its rows where they stand alone.
            setattr(views, name, values.repeat_interleave(count) if "unpaired" in needs else values)
    if "score" in needs:
        found = [i.score[k] for i, pick in zip(items, picks, strict=True) for k in pick if i.score is not None]
        views.score = torch.tensor(found, device=device)
    if "label" in needs:
        good = [k == 0 if kind == "pairs" else i.values["label"] > 0.5 for i, pick in zip(items, picks, strict=True) for k in pick]
        views.label = torch.tensor(good, device=device)
    return views


def _filled(rows: Sequence[Sequence[float]], valid: Tensor) -> Tensor:
    """(B, T) with the rows' numbers where valid, zero elsewhere."""
    out = torch.zeros(valid.shape, device=valid.device)
    out[valid] = torch.tensor([v for row in rows for v in row], device=valid.device)
    return out


@torch.no_grad()
def with_logps(agent: Agent, items: Sequence[Item], pad: int, anchor: str = "ref", size: int = 8) -> list[Item]:
    """The items with the agent's log-probs per token of every response under the name `anchor`, `size` items at a time."""
    out: list[Item] = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        rows = [(i, k) for i in part for k in range(len(i.responses))]
        record = token_rows([i.prompt for i, _ in rows], [i.responses[k] for i, k in rows], pad, agent.device)
        logp = agent.evaluate(record, ("logp",)).logp
        assert logp is not None
        found = iter([x[v].tolist() for x, v in zip(logp, record.valid, strict=True)])
        out += [replace(i, logps={**i.logps, anchor: [next(found) for _ in i.responses]}) for i in part]
    if any(i.other for i in out):
        others = iter(with_logps(agent, [i.other for i in out if i.other], pad, anchor, size))
        out = [replace(i, other=next(others)) if i.other else i for i in out]
    return out
