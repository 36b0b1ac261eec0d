"""Claims on the arithmetic task: from a supervised start at about 30 % to 85 % on held-out sums, with pass@8 beside pass@1."""

from __future__ import annotations

import time
from typing import Any

import torch

from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.presets import agent_options, configure
from markovia.algos.setup import build
from markovia.envs.text.tasks import is_held_out
from markovia.envs.text.train_arithmetic import answer_logp, encode

ENV = "markovia/Arithmetic-v0"


@torch.no_grad()
def pass_rates(agent: Any, k: int = 8) -> tuple[float, float]:
    """Exact pass@1 and pass@k on the held-out sums: the means of p and 1 - (1 - p)^k, p the probability of the right answer with its end."""
    pairs = [(a, b) for a in range(100) for b in range(100) if is_held_out(a, b)]
    p = answer_logp(agent.net["policy"], *encode(pairs, agent.tokenizer)).double().exp()
    return float(p.mean()), float((1.0 - (1.0 - p) ** k).mean())


def arithmetic(method: str, bound: float = 0.85, seconds: float = 300.0, seeds: int = 3) -> dict[str, Any]:
    """Held-out pass@1 after the preset's budget, worst of 3 seeds, each within 5 minutes; pass@8 beside it."""
    found: dict[str, list[float]] = {"pass@1": [], "pass@8": [], "seconds": []}
    start: tuple[float, float] = (0.0, 0.0)
    for seed in range(seeds):
        settings = configure(method, ENV)
        setup = build(ENV, settings, seed, agent_options=agent_options(method, ENV))
        start = pass_rates(setup.agent)
        driver = OnPolicyDriver(settings, setup.agent, setup.collector, seed)
        began = time.perf_counter()
        while not driver.finished and time.perf_counter() - began < seconds:
            driver.step()
        found["seconds"].append(round(time.perf_counter() - began, 1))
        one, eight = pass_rates(setup.agent)
        found["pass@1"].append(one)
        found["pass@8"].append(eight)
    worst = min(found["pass@1"])
    return {"measured": worst, "bound": bound, "holds": bool(worst >= bound), "start": {"pass@1": start[0], "pass@8": start[1]}, **found}
