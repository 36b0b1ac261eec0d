"""Final returns on control tasks, one process per (task, method, seed), resumable: `python benchmarks/control.py --seeds 0 1 2`.

Every cell is an ordinary run folder under --runs, with the presets of the command line; a killed grid goes on where it stopped, and cells that
are in the results already are not run again. Raw per-seed scores land in benchmarks/results/control.json as each cell ends: 10 episodes of the
greedy policy at the end of training (last) and at each checkpoint (the best of them is told apart), and the wall time. The table beside it,
control.md, is made from them and from the published numbers in benchmarks/published.json; `--table` makes it anew without running anything.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from grid import Cell, arguments, budget, folder, measure, over_seeds, settings_of, train_cell  # type: ignore[import-not-found]  # run as a script: its folder is on the path

RESULTS = Path(__file__).parent / "results" / "control.json"
PUBLISHED = Path(__file__).parent / "published.json"


def cell(task: str, method: str, seed: int, steps: int | None, runs: Path) -> Cell:
    """Train one cell to its end, from its newest checkpoint if it has one; "sb3-ppo" is the peer of the same protocol, and "sac+bfloat16" is sac with
    its products in that precision."""
    if method == "sb3-ppo":
        return _peer(task, seed, steps or 1_000_000)
    name, changes = _row(method, steps)
    return train_cell(task, name, seed, folder(runs, task, method, seed), changes) | {"method": method}


def _row(method: str, steps: int | None) -> tuple[str, dict[str, Any]]:
    """The method's id, and what the cell changes in its presets."""
    name, _, precision = method.partition("+")
    return name, budget(steps) | ({"precision": precision} if precision else {})


def _asked(task: str, method: str, seed: int, steps: int | None, runs: Path) -> Cell:
    """The settings that a cell asks for."""
    if method == "sb3-ppo":
        return {"num_env_steps": steps or 1_000_000}
    name, changes = _row(method, steps)
    found: Cell = settings_of(name, task, changes)
    return found


def _peer(task: str, seed: int, steps: int) -> Cell:
    """Stable-Baselines3's PPO with its defaults on one environment, observations and rewards normalised as in our presets; 10 greedy episodes."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from markovia.envs.control import make_env
    from markovia.summary import summary

    torch.set_num_threads(1)
    venv = VecNormalize(DummyVecEnv([lambda: make_env(task)]))
    began = time.perf_counter()
    model = PPO("MlpPolicy", venv, seed=seed, device="cpu").learn(steps)
    seconds = time.perf_counter() - began
    venv.training = venv.norm_reward = False
    venv.seed(seed + 1)
    returns, _ = evaluate_policy(model, venv, n_eval_episodes=10, return_episode_rewards=True)
    done = {"ended": "budget", "num_env_steps": model.num_timesteps, "seconds": round(seconds, 1), "evaluation": summary({"returns": returns})}
    return {"task": task, "method": "sb3-ppo", "seed": seed, "seconds": done["seconds"], "done": done}


def table(rows: list[Cell]) -> str:
    """Markdown: last and best return over seeds, with the interquartile mean and a 95 % bootstrap interval of the mean over seeds."""
    import numpy as np

    groups: dict[tuple[str, str], list[Cell]] = {}
    for r in rows:
        groups.setdefault((r["task"], r["method"]), []).append(r)
    published = json.loads(PUBLISHED.read_text())
    lines = [
        f"Published: {published['note'][0].lower()}{published['note'][1:]}",
        "",
        "| task | method | seeds | steps | last: mean ± std | IQM | 95 % interval | best checkpoint | minutes a seed | published, mean ± std |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, method), members in sorted(groups.items()):
        last = over_seeds([m["done"]["evaluation"]["mean"] for m in members])
        found = [m["done"].get("best_eval_return") for m in members]
        best = f"{np.mean([b for b in found if b is not None]):,.0f}" if any(b is not None for b in found) else ""
        steps = min(m["done"]["num_env_steps"] for m in members)
        minutes = np.mean([m["done"]["seconds"] for m in members]) / 60.0
        sources = published.get(method.removeprefix("sb3-").partition("+")[0], {}).get(task.rpartition("-")[0], {})
        told = "; ".join(f"{source} {value}" for source, value in sources.items())
        lines.append(
            f"| {task} | {method} | {len(members)} | {steps / 1e6:.2g}M | {last['mean']:,.0f} ± {last['std']:,.0f} | {last['iqm']:,.0f} "
            f"| {last['low']:,.0f} to {last['high']:,.0f} | {best} | {minutes:.1f} | {told} |"
        )
    return "\n".join(lines) + "\n"


def told(found: Cell) -> str:
    """A finished cell in one line."""
    return f"{found['task']} {found['method']} seed {found['seed']}: {json.dumps(found['done'])[:200]}"


def main() -> None:
    parser = arguments(__doc__, tasks=["HalfCheetah-v5"], methods=["ppo"], runs="runs/benchmark", out=RESULTS)
    args = parser.parse_args()
    grid = [] if args.table else [(*c, args.steps, args.runs) for c in itertools.product(args.tasks, args.methods, args.seeds)]
    measure(cell, grid, jobs=args.jobs, out=args.out, told=told, table=table, asked=_asked)


if __name__ == "__main__":
    main()
