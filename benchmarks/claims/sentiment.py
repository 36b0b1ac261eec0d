"""Claim on language: RLOO makes a language model praise films without spoiling its English."""

from __future__ import annotations

import time
from typing import Any

import torch

from markovia.agents.interface import Agent
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.presets import agent_options, configure, override
from markovia.algos.setup import build
from markovia.algos.streams import stream
from markovia.algos.text_metrics import distinct, logp_per_token, sequence_kl

SENTIMENT = "markovia/Sentiment-v0"


@torch.no_grad()
def text_metrics(agent: Agent, reference: Agent, task: Any, per_prompt: int, seed: int) -> dict[str, Any]:
    """Reward, distinct-2, log-prob per token under the reference and KL of `per_prompt` responses to every held-out prompt, and the texts.

    The same seed gives the same uniforms, so two agents are compared on common random numbers.
    """
    starts = task.all_starts("held_out", group_size=per_prompt)
    rollout = agent.generate(starts, stream(seed, "evaluation", device=agent.device))
    score = task.score(rollout)
    logp, logp_ref = (a.evaluate(rollout, ("logp",)).logp for a in (agent, reference))
    assert logp is not None and logp_ref is not None
    texts = rollout.outcome["completion_text"]
    return {
        "reward": float(score.mean()),
        "reward_se": float(score.std() / len(score) ** 0.5),
        "distinct_2": distinct(texts, 2),
        "logp_ref_per_token": logp_per_token(logp_ref, rollout.mask),
        "kl": sequence_kl(logp, logp_ref, rollout.mask),
        "texts": [{"prompt": p, "completion": c, "reward": float(r)} for p, c, r in zip(rollout.outcome["prompt_text"], texts, score, strict=True)],
    }


def sentiment_run(
    method: str = "rloo", updates: int = 30, seconds: float = 480.0, seed: int = 0, per_prompt: int = 4, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train on the sentiment task until `updates` or `seconds` of training are used up; held-out metrics before and after."""
    settings = override(configure(method, SENTIMENT), changes or {})
    made = build(SENTIMENT, settings, seed, agent_options=agent_options(method, SENTIMENT))
    reference = made.agent.reference()
    before = text_metrics(made.agent, reference, made.task, per_prompt, seed)
    driver = OnPolicyDriver(settings, made.agent, made.collector, seed)
    start = time.perf_counter()
    curve: list[dict[str, float]] = []
    while len(curve) < updates and time.perf_counter() - start < seconds:
        cpu = time.process_time()
        stats = driver.step()
        keep: dict[str, float] = {k: v for k, v in stats.items() if k in ("return", "kl_ref", "logp_ref_mean")}
        curve.append({**keep, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu})
    after = text_metrics(made.agent, reference, made.task, per_prompt, seed)
    return {"method": method, "seed": seed, "updates": len(curve), "before": before, "after": after, "curve": curve}


def _sentiment_verdict(run: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The four bounds on a run: reward, plausibility, variety, time."""
    before, after = run["before"], run["after"]
    measured = {
        "gain": after["reward"] - before["reward"],
        "logp_ref_fall_per_token": before["logp_ref_per_token"] - after["logp_ref_per_token"],
        "distinct_2_ratio": after["distinct_2"] / before["distinct_2"],
        "kl": after["kl"],
        "updates": run["updates"],
        "seconds": seconds,
    }
    bound = {"gain": 0.4, "logp_ref_fall_per_token": 0.5, "distinct_2_ratio": 0.6, "updates": 60, "seconds": 600.0}
    holds = (
        measured["gain"] >= bound["gain"]
        and measured["logp_ref_fall_per_token"] <= bound["logp_ref_fall_per_token"]
        and measured["distinct_2_ratio"] > bound["distinct_2_ratio"]
        and measured["updates"] <= bound["updates"]
        and measured["seconds"] <= bound["seconds"]
    )
    return {"measured": measured, "bound": bound, "holds": bool(holds)}


def sentiment_rloo() -> dict[str, Any]:
    """VADER's mean over held-out openings rises by 0.4 in 60 updates and 10 minutes, and the text stays plausible and varied (class slow)."""
    start = time.perf_counter()
    run = sentiment_run("rloo")
    return {**_sentiment_verdict(run, time.perf_counter() - start), "raw": run}
