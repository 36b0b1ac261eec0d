"""Final returns on control tasks, one process per (task, method, seed), resumable: `python benchmarks/control.py --seeds 0 1 2`.

Every cell is an ordinary run folder under --runs, with the presets of the command line; a killed grid goes on where it stopped, and cells that
are in the results already are not run again. Raw per-seed scores land in benchmarks/results/control.json as each cell ends: 10 episodes of the
greedy policy at the end of training (last) and at each checkpoint (the best of them is told apart), and the wall time. The table beside it,
control.md, is made from them and from the published numbers in benchmarks/published.json; `--table` makes it anew without running anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "control.json"
PUBLISHED = Path(__file__).parent / "published.json"


def cell(task: str, method: str, seed: int, steps: int | None, runs: Path) -> dict[str, Any]:
    """Train one cell to its end, from its newest checkpoint if it has one; "sb3-ppo" is the peer of the same protocol."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    done = _peer(task, seed, steps or 1_000_000) if method == "sb3-ppo" else _ours(task, method, seed, steps, runs)
    return {"task": task, "method": method, "seed": seed, "seconds": round(time.perf_counter() - began, 1), "done": done}


def _ours(task: str, method: str, seed: int, steps: int | None, runs: Path) -> dict[str, Any]:
    from markovia.algos.presets import configure, override
    from markovia.runs import train

    folder = runs / task / method.replace("/", "-") / f"seed{seed}"
    settings = override(configure(method, task), {} if steps is None else {"num_env_steps": steps})
    resume = (folder / "config.json").is_file()
    return train(settings, task, seed=seed, out=folder, resume=resume, eval_checkpoints=True, progress=False, method_id=method).done


def _peer(task: str, seed: int, steps: int) -> dict[str, Any]:
    """Stable-Baselines3's PPO with its defaults on one environment, observations and rewards normalised as in our presets; 10 greedy episodes."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from markovia.envs.control import make_env
    from markovia.runs import summary

    venv = VecNormalize(DummyVecEnv([lambda: make_env(task)]))
    began = time.perf_counter()
    model = PPO("MlpPolicy", venv, seed=seed, device="cpu").learn(steps)
    seconds = time.perf_counter() - began
    venv.training = venv.norm_reward = False
    venv.seed(seed + 1)
    returns, _ = evaluate_policy(model, venv, n_eval_episodes=10, return_episode_rewards=True)
    return {"ended": "budget", "num_env_steps": model.num_timesteps, "seconds": round(seconds, 1), "evaluation": summary({"returns": returns})}


def record(found: dict[str, Any], path: Path) -> None:
    """Put one cell into the results file, in place of an older one of the same cell."""
    rows = cells(path)
    key = ("task", "method", "seed")
    rows = [r for r in rows if any(r[k] != found[k] for k in key)] + [found]
    rows.sort(key=lambda r: [str(r[k]) for k in key])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)


def cells(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: last and best return over seeds, with the interquartile mean and a 95 % bootstrap interval of the mean over seeds."""
    import numpy as np
    from scipy import stats

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["task"], r["method"]), []).append(r)
    published = json.loads(PUBLISHED.read_text())
    lines = [
        "| task | method | seeds | steps | last: mean ± std | IQM | 95 % interval | best checkpoint | minutes a seed | published, mean ± std |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, method), members in sorted(groups.items()):
        last = np.array([m["done"]["evaluation"]["mean"] for m in members])
        draws = np.random.default_rng(0).choice(last, size=(10_000, len(last))).mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        found = [m["done"].get("best_eval_return") for m in members]
        best = f"{np.mean([b for b in found if b is not None]):,.0f}" if any(b is not None for b in found) else ""
        steps = min(m["done"]["num_env_steps"] for m in members)
        minutes = np.mean([m["seconds"] for m in members]) / 60.0
        sources = published.get(method.removeprefix("sb3-"), {}).get(task.rpartition("-")[0], {})
        told = "; ".join(f"{source} {value}" for source, value in sources.items())
        lines.append(
            f"| {task} | {method} | {len(last)} | {steps / 1e6:.2g}M | {last.mean():,.0f} ± {last.std():,.0f} | {stats.trim_mean(last, 0.25):,.0f} "
            f"| {low:,.0f} to {high:,.0f} | {best} | {minutes:.1f} | {told} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["HalfCheetah-v5"], help="environment ids (default HalfCheetah-v5)")
    parser.add_argument("--methods", nargs="+", default=["ppo"], help="ids of methods, or sb3-ppo (default ppo)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--steps", type=int, help="environment steps, in place of the preset's")
    parser.add_argument("--table", action="store_true", help="only make the table from what has been measured")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="where the run folders lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results, one entry per cell; the table is written beside it")
    args = parser.parse_args()
    known = {(r["task"], r["method"], r["seed"]) for r in cells(args.out)}
    grid = [] if args.table else [c for c in itertools.product(args.tasks, args.methods, args.seeds) if c not in known]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(cell, *c, args.steps, args.runs) for c in grid]):
            found = future.result()
            record(found, args.out)
            args.out.with_suffix(".md").write_text(table(cells(args.out)))
            print(f"{found['task']} {found['method']} seed {found['seed']}: {json.dumps(found['done'])[:200]}", flush=True)
    if args.table:
        args.out.with_suffix(".md").write_text(table(cells(args.out)))


if __name__ == "__main__":
    main()
