"""What the policy of a finished run costs per episode, against the limit that it was trained for (`markovia cost-of`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from markovia.settings import from_json


def cost_of(run: str | Path, episodes: int = 10, seed: int = 1000) -> dict[str, Any]:
    """Episode costs and returns of a run's newest checkpoint, sampling actions as in training ("sampled") and greedily ("greedy"); of a run with a
    shield also of sampled actions behind it ("shielded"), which is what training executed.

    Costs are plain sums over an episode. `limit` is the sum of the run's own limits, else the task's `cost_limit`, else None; `over` the share of
    episodes above it. Both are None where that limit bounds a discounted cost (`cost_gamma` < 1), of which plain sums say nothing.
    Raises ValueError for text and denoising runs, and for tasks that tell no cost.
    """
    import torch

    from markovia.algos.setup import evaluate_stepped
    from markovia.envs.control.vector import make_env
    from markovia.loaded import load_run

    loaded = load_run(run)
    env_id, env_kwargs = loaded.config["env"], from_json(dict[str, Any], loaded.config["env_kwargs"])
    if loaded.task is not None:
        raise ValueError(f"{env_id} is generated and not stepped; its cost is what the collector was given, see the run's metrics ('cost')")
    limit = _limit(loaded.config, make_env(env_id, **env_kwargs))
    out: dict[str, Any] = {"run": str(run), "env": env_id, "limit": limit}
    policies: list[tuple[str, Any, bool]] = [("sampled", loaded.agent, False), ("greedy", loaded.agent, True)]
    if (loaded.config["settings"].get("constraint") or {}).get("shield") is not None:
        policies.append(("shielded", loaded.shielded(), False))
    for name, policy, deterministic in policies:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = evaluate_stepped(policy, env_id, episodes, seed, env_kwargs, deterministic)
        if "costs" not in found:
            raise ValueError(f"{env_id} puts no 'cost' into info, so there is nothing to report; `markovia envs` lists the Safe... tasks")
        costs = np.array(found["costs"])
        out[name] = {
            "cost": float(costs.mean()),
            "cost_std": float(costs.std()),
            "cost_max": float(costs.max()),
            "over": None if limit is None else float((costs > limit).mean()),
            "return": float(np.mean(found["returns"])),
            "costs": costs.tolist(),
        }
    return out


def _limit(config: dict[str, Any], env: Any) -> float | None:
    constraint = config["settings"].get("constraint")
    task = {name: env.get_wrapper_attr(name) for name in ("cost_limit", "cost_gamma") if env.has_wrapper_attr(name)}
    env.close()
    told = task if constraint is None else constraint
    return float(np.sum(told["cost_limit"])) if "cost_limit" in told and told.get("cost_gamma", 1.0) == 1 else None
