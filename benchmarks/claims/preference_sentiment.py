"""Claims on SmolLM2 with pairs of its own responses that VADER labels: DPO's win rate within ten minutes, SquaredPO's displacement beside DPO's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.algos.preference.data import with_logps
from markovia.algos.preference.driver import PreferenceDriver
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.sources import FileItems, item_of
from markovia.algos.presets import override
from markovia.algos.streams import stream
from markovia.claims.sentiment import text_metrics
from markovia.envs.text.preferences import Item

LORA = {"r": 16, "alpha": 32}  # on all linear layers
ROWS = 128  # responses sampled at once


def has_bf16() -> bool:
    """Whether this machine's processor or accelerator multiplies in bfloat16."""
    return torch.cuda.is_available() or bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# -- pairs labelled by a scorer ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def judged_pairs(agent: Any, task: Any, split: str, per_prompt: int, pairs: int, seed: int) -> list[Item]:
    """Pairs of the agent's own responses to every opening of a split: the best with the worst, the second with the last but one, ...

    Responses of equal score or of the same tokens make no pair.
    """
    starts = task.all_starts(split, group_size=per_prompt)
    out: list[Item] = []
    total = len(starts["group"])
    for begin in range(0, total, ROWS // per_prompt * per_prompt):
        index = range(begin, min(begin + ROWS // per_prompt * per_prompt, total))
        rollout = agent.generate(_rows(starts, index), stream(seed, "action", begin))
        out += _pairs(rollout, task.score(rollout), per_prompt, pairs)
    return out


def _rows(starts: dict[str, Any], index: Sequence[int]) -> dict[str, Any]:
    """Some rows of a task's starts."""
    at = list(index)
    taken = {k: v[at] if isinstance(v, Tensor) else v for k, v in starts.items()}
    return {**taken, "prompt_text": [starts["prompt_text"][i] for i in at], "columns": {k: [v[i] for i in at] for k, v in starts["columns"].items()}}


def _pairs(rollout: Rollout, score: Tensor, per_prompt: int, pairs: int) -> list[Item]:
    out = []
    for begin in range(0, len(score), per_prompt):
        order = score[begin : begin + per_prompt].sort(descending=True).indices + begin
        for w, l in zip(order[:pairs].tolist(), order.flip(0)[:pairs].tolist(), strict=True):
            item = item_of(rollout, [w, l])
            if score[w] > score[l] and item.responses[0] != item.responses[1]:
                out.append(dataclasses.replace(item, score=[float(score[w]), float(score[l])], logps={}))
    return out


def wins(own: Sequence[float], other: Sequence[float]) -> float:
    """Share of places where the first score is higher, ties counting half."""
    return sum(float(a > b) + 0.5 * float(a == b) for a, b in zip(own, other, strict=True)) / len(own)


@torch.no_grad()
def moved(agent: Agent, items: Sequence[Item], pad: int) -> dict[str, float]:
    """Mean log-ratio of chosen and rejected responses against the log-probs that the items hold as `ref`, nats, and the implicit accuracy."""
    now = with_logps(agent, items, pad, "now")
    ratio = torch.tensor([[sum(a) - sum(b) for a, b in zip(i.logps["now"], i.logps["ref"], strict=True)] for i in now])
    w, l = ratio[:, 0], ratio[:, 1]
    return {"chosen": float(w.mean()), "rejected": float(l.mean()), "accuracy": float((w > l).float().mean())}


def sentiment_run(
    method_id: str, seed: int, steps: int = 48, every: int = 8, batch: int = 8, lr: float = 5e-4, beta: float = 0.1, per_prompt: int = 8,
    max_seconds: float = 420.0, bf16: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train adapters on pairs that VADER labels; held-out openings every so many steps, against the reference on common random numbers.

    A point of `curve`: win rate and mean score over four responses to each held-out opening, KL and log-prob per token under the reference,
    distinct-2, and log-ratios of held-out pairs. No step begins after `max_seconds` of sampling and training together; evaluations are not counted
    there, but in `seconds`.
    """
    from markovia.agents.language import LanguageAgent
    from markovia.envs.text.tasks import sentiment

    began = time.perf_counter()
    task = sentiment()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"temperature": task.temperature, "max_new_tokens": task.max_new_tokens, "bf16": has_bf16() if bf16 is None else bf16}
        agent = LanguageAgent.from_name("smollm2", lora=LORA, packed=True, **options)
    reference, pad = agent.reference(), agent.tokenizer.pad_token_id
    start = time.perf_counter()
    items = judged_pairs(agent, task, "train", per_prompt, per_prompt // 4, seed)
    sampling = time.perf_counter() - start
    held = with_logps(agent, judged_pairs(agent, task, "held_out", 4, 1, seed + 1), pad)
    before = text_metrics(agent, reference, task, 4, seed)
    changes = {"loss": {"beta": beta}, "num_envs": batch, "num_env_steps": steps * batch, "stored_reference": True, "solver": {"lr": lr, "warmup": 4}}
    driver = PreferenceDriver(override(PREFERENCE[method_id].value, changes), agent, FileItems(items, "pairs"), seed)
    spent, logged, curve = sampling, [], [_point(before, before, 0, moved(agent, held, pad))]
    while driver.steps < steps and spent < max_seconds:
        start = time.perf_counter()
        logged.append({k: v for k, v in driver.step().items() if k in ("loss", "log_ratio_chosen", "log_ratio_rejected", "accuracy")})
        spent += time.perf_counter() - start
        if driver.steps % every == 0 or driver.steps == steps or spent >= max_seconds:
            after = text_metrics(agent, reference, task, 4, seed)
            curve.append(_point(after, before, driver.steps, moved(agent, held, pad)))
    settings = {"lr": lr, "beta": beta, "batch": batch, "steps": driver.steps, "bf16": agent.options.bf16, "lora": LORA}
    texts = after["texts"][:8] if len(curve) > 1 else []
    return {
        "pairs": len(items), "held_out_pairs": len(held), "settings": settings, "curve": curve, "training": logged, "texts": texts,
        "training_seconds": round(spent, 1), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _point(now: dict[str, Any], before: dict[str, Any], step: int, displacement: dict[str, float]) -> dict[str, Any]:
    rewards = [[t["reward"] for t in found["texts"]] for found in (now, before)]
    return {"step": step, "win_rate": wins(*rewards), **{k: v for k, v in now.items() if k != "texts"}, **displacement}


# -- claims --------------------------------------------------------------------------------------------------------------------------------

_run = functools.cache(sentiment_run)


def dpo_wins(seed: int = 0, wanted: float = 0.75, within: float = 600.0) -> dict[str, Any]:
    """DPO with adapters wins against the reference on at least three quarters of the responses to held-out openings within ten minutes, the
    evaluations counted."""
    run = _run("dpo", seed)
    end = run["curve"][-1]
    shown = {k: end[k] for k in ("win_rate", "kl", "logp_ref_per_token", "distinct_2", "reward")}
    return {
        "measured": {**shown, "seconds": run["seconds"]}, "bound": {"win_rate": wanted, "seconds": within},
        "holds": end["win_rate"] >= wanted and run["seconds"] <= within, "curve": run["curve"], "settings": run["settings"],
    }  # fmt: skip


def chosen_at(curve: Sequence[dict[str, Any]], win_rate: float) -> float:
    """The mean log-ratio of chosen responses where the win rate first passes a level, linear between evaluations; NaN where it never does."""
    for before, after in itertools.pairwise(curve):
        if after["win_rate"] >= win_rate:
            share = (win_rate - before["win_rate"]) / (after["win_rate"] - before["win_rate"])
            return float(before["chosen"] + share * (after["chosen"] - before["chosen"]))
    return float("nan")


def squared_po_displacement(seeds: int = 3, win_rate: float = 0.75) -> dict[str, Any]:
    """At equal win rate SquaredPO displaces the chosen log-prob less than DPO, in the mean over seeds.                  [arXiv 2602.06788]"""
    found = {m: [chosen_at(_run(m, seed)["curve"], win_rate) for seed in range(seeds)] for m in ("squared-po", "dpo")}
    ours, theirs = (sum(values) / seeds for values in found.values())
    return {"measured": ours, "bound": theirs, "holds": ours > theirs, "chosen_log_ratio": found, "win_rate": win_rate}
