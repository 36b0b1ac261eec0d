"""The study of benchmarks/preference.py on human preferences from a file, with SmolLM2."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from markovia.algos.preference.data import with_logps
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.presets import override
from markovia.claims.preference_sentiment import LORA, has_bf16
from markovia.envs.text.preferences import DataOptions, Item, PreferenceData, load_preferences

# -- human preferences ---------------------------------------------------------------------------------------------------------------------


def apart(data: PreferenceData, count: int) -> tuple[list[Item], list[Item]]:
    """(`count` items to train on, the others), no prompt on both sides; always the same."""
    by_prompt: dict[tuple[int, ...], list[Item]] = {}
    for item in data.items:
        by_prompt.setdefault(tuple(item.prompt), []).append(item)
    groups = list(by_prompt.values())
    random.Random(0).shuffle(groups)
    train: list[Item] = []
    rest: list[Item] = []
    for group in groups:
        (train if len(train) + len(group) <= count else rest).extend(group)
    return train, rest


def interval(right: int, total: int) -> list[float]:
    """The 95 % Wilson interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(right, total).proportion_ci(0.95, method="wilson")
    return [float(found.low), float(found.high)]


def human_run(
    path: Path, runs: Path, seed: int = 0, train_pairs: int = 1800, held_out: int | None = None, max_length: int = 384, batch: int = 8,
    lr: float = 1e-4, beta: float = 0.1, bf16: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """DPO with adapters, one epoch over `train_pairs` pairs of a file in the form of hh-rlhf, as an ordinary run that goes on after a kill.

    On the other pairs: the implicit accuracy (l_w > l_l) after training and the ranking accuracy (sums of log-probs) before and after, each with its
    95 % interval.
    """
    from markovia.agents.language import LanguageAgent
    from markovia.loaded import load_run
    from markovia.runs import train

    began = time.perf_counter()
    use_bf16 = has_bf16() if bf16 is None else bf16
    options = {"max_length": max_length, "max_prompt_length": max_length * 2 // 3, "prompt_end": "\n\nAssistant:", "held_out": 0}
    start = LanguageAgent.from_name("smollm2", packed=True, bf16=use_bf16)
    data = load_preferences(path, start.tokenizer, DataOptions(**options))  # type: ignore[arg-type]
    learnt, held = apart(data, train_pairs)
    held, pad = held[:held_out], start.tokenizer.pad_token_id
    file = runs / "human-train.jsonl"
    _write_lines(path, {item.line for item in learnt}, file)
    changes = {"loss": {"beta": beta}, "num_envs": batch, "stored_reference": True, "solver": {"lr": lr, "micro": 4, "warmup": 10}}
    settings, folder = override(PREFERENCE["dpo"].value, changes), runs / f"human-seed{seed}"
    # The run has adapters and the start policy has none: the same numbers, and no second copy while it trains.
    held = with_logps(start, held, pad)
    del start
    done = train(
        settings, data=file, model="smollm2", out=folder, seed=seed, resume=(folder / "config.json").is_file(), num_checkpoints=6, eval_episodes=0,
        progress=False, method_id="dpo", data_options=options, agent_options={"lora": LORA, "bf16": use_bf16},
    ).done  # fmt: skip
    now = with_logps(load_run(folder).agent, held, pad, "now")
    sums = torch.tensor([[[sum(row) for row in item.logps[name]] for name in ("ref", "now")] for item in now])  # (n, before or after, response)
    gap, n = sums[..., 0] - sums[..., 1], len(now)
    counts = {
        "implicit_accuracy": int((gap[:, 1] > gap[:, 0]).sum()), "ranking_accuracy_before": int((gap[:, 0] >= 0).sum()),
        "ranking_accuracy": int((gap[:, 1] >= 0).sum()),
    }  # fmt: skip
    ratio = (sums[:, 1] - sums[:, 0]).mean(0).tolist()
    return {
        "file": path.name, "report": str(data.report).partition("\n")[2], "train_pairs": len(learnt), "held_out_pairs": n,
        **{k: {"share": c / n, "interval_95": interval(c, n)} for k, c in counts.items()},
        "log_ratio_chosen": ratio[0], "log_ratio_rejected": ratio[1], "training_seconds": done["seconds"],
        "seconds": round(time.perf_counter() - began, 1),
        "settings": {"lr": lr, "beta": beta, "batch": batch, "max_length": max_length, "bf16": use_bf16, "lora": LORA},
    }  # fmt: skip


def _write_lines(source: Path, lines: set[int], target: Path) -> None:
    """The rows of some lines of a .jsonl file as a file of its own."""
    from markovia.envs.text.preference_rows import records

    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for number, row in records(source) if number in lines)
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")
