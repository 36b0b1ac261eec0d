"""What a run of preference learning is judged by: held-out items under the policy and its start, and sampled texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import masked_mean
from markovia.algos.preference.data import tied, token_rows, totals, with_logps
from markovia.algos.preference.metrics import top_k
from markovia.algos.preference.token_level import kl_ref_policy
from markovia.envs.text.preferences import Item, Kind, PreferenceData
from markovia.envs.text.tasks import TextTask
from markovia.envs.text.tokens import added_bos


def ordered(items: Sequence[Item], kind: Kind) -> list[Item]:
    """The items less the lists of equal scores, which have no better and no worse response."""
    return [i for i in items if kind != "lists" or not tied(i)]


class HeldOut:
    """Items that are not trained on, with the log-probs of the policy at the start. `agent` at construction is that policy.

    Lists of equal scores are left out. Raises ValueError where nothing remains.
    """

    def __init__(self, agent: Agent, items: Sequence[Item], kind: Kind) -> None:
        self.kind, self.pad = kind, agent.tokenizer.pad_token_id  # type: ignore[attr-defined]
        if not (told := ordered(items, kind)):
            raise ValueError("there is nothing to judge by: every list has equal scores")
        self.items = with_logps(agent, told, self.pad, anchor="start")
        # Adapters off is the start again; a second copy of a whole network would be too dear for a statistic.
        self.start = agent.reference() if getattr(agent.options, "lora", None) else None  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(self, agent: Agent) -> dict[str, Any]:
        """returns: of pairs and lists 1 where the implicit margin of (best, worst) is above 0, of labelled responses 1 where the sign of their
        log-ratio is the label's, else the log-ratio in nats. Beside it means over the items: ranking accuracy now and at the start, log-ratios,
        entropy and mass of the 10 likeliest tokens, and with adapters the exact KL(pi || start) of the next token, all per token of the data."""
        rows: list[dict[str, float]] = []
        for item in self.items:
            at = self._sides(item)
            record = token_rows([item.prompt] * len(at), [item.responses[k] for k in at], self.pad, agent.device)
            out = agent.evaluate(record, ("logp", "dist", "entropy"))
            assert out.logp is not None and out.dist is not None and out.entropy is not None
            logits: Tensor = out.dist.logits  # type: ignore[union-attr]
            now, start = out.logp.sum(1).tolist(), [sum(item.logps["start"][k]) for k in at]
            found = {"entropy": float(masked_mean(out.entropy, record.mask))}
            found["top10_mass"] = float(top_k(logits, record.mask, k=min(10, logits.shape[-1])).mass)
            if self.start is not None:
                before: Tensor = self.start.evaluate(record, ("dist",)).dist.logits  # type: ignore[union-attr]
                found["kl_ref"] = float(masked_mean(kl_ref_policy(before, logits), record.mask))
            rows.append(found | self._verdict(item, now, start))
        means = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0] if k != "return"} if rows else {}
        return {"returns": [r["return"] for r in rows], **means}

    def _sides(self, item: Item) -> list[int]:
        if self.kind == "lists":
            score = totals(item)
            return [score.index(max(score)), score.index(min(score))]
        return [0, 1] if self.kind == "pairs" else [0]

    def _verdict(self, item: Item, now: list[float], start: list[float]) -> dict[str, float]:
        ratio = [a - b for a, b in zip(now, start, strict=True)]
        if self.kind == "single":
            label = item.values.get("label")
            return {"return": ratio[0] if label is None else float((ratio[0] > 0) == (label > 0.5)), "log_ratio": ratio[0]}
        return {
            "return": float(ratio[0] > ratio[1]),
            "ranking_accuracy": float(now[0] >= now[1]),
            "ranking_accuracy_before": float(start[0] >= start[1]),
            "log_ratio_chosen": ratio[0],
            "log_ratio_rejected": ratio[1],
        }


def unscored(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward function for texts that nobody judges: 0."""
    return [0.0] * len(completions)


SAMPLE_TOKENS = 64  # of a sampled text, where the data's responses are not shorter


def prompt_task(
    data: PreferenceData, tokenizer: Any, judge: Any, held_out: Sequence[Item], limit: int | None = None, max_new_tokens: int | None = None
) -> TextTask | None:
    """The data's prompts as a text task, for samples and for rounds; None where they have none of their own. `limit` prompts at most.

    The judge gets the file's other columns, of the first row with a prompt. Prompts that had to be cut are left out, since a task reads texts whole.
    Texts have at most `max_new_tokens`, or are as long as the data's responses, up to SAMPLE_TOKENS.
    """
    bos = added_bos(tokenizer)

    def texts(items: Sequence[Item]) -> dict[str, Item]:
        # A template wrote the BOS token as text; some tokenizers put it there by themselves.
        found: dict[str, Item] = {}
        for item in items:
            if item.prompt_text and not item.prompt_cut:
                found.setdefault(item.prompt_text.removeprefix(bos), item)
        return dict(list(found.items())[:limit])

    def columns(found: dict[str, Item]) -> dict[str, Sequence[Any]]:
        return {c: [i.told[c] for i in found.values()] for c in data.items[0].told} if found else {}

    away = {id(i) for i in held_out}
    train, rest = texts([i for i in data.items if id(i) not in away]), texts(held_out)
    if not train:
        return None
    longest = max((len(r) for i in data.items for r in i.responses), default=SAMPLE_TOKENS)
    return TextTask(
        list(train), tokenizer, judge, max_new_tokens=max_new_tokens or min(SAMPLE_TOKENS, longest), columns=columns(train),
        held_out=list(rest), held_out_columns=columns(rest),
    )  # fmt: skip
