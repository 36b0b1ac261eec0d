"""Returns of TD3+BC and IQL, ours beside single-file loops on the same data: `python benchmarks/offline_peers.py --dataset ID --task Hopper-v5`.

A low score may be the set's doing, the method's, or a mistake; a loop written apart tells the last from the others. Both sides get the same
normalised observations and scaled rewards, IQL's actor keeps its learning rate, and every tenth of the updates 10 greedy episodes are played. The
loops have the settings of MuJoCo's presets. Writes benchmarks/results/offline_peers.json, one entry per (dataset, method, seed), replacing an older.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import peers_offline
import torch
from torch import nn

from markovia import train
from markovia.algos.presets import configure, override
from markovia.envs.durable import write_whole
from markovia.envs.offline.sources import load
from markovia.envs.offline.transforms import Transform

RESULTS = Path(__file__).parent / "results" / "offline_peers.json"
LOOPS: dict[str, peers_offline.Loop] = {"td3-bc": peers_offline.td3_bc, "iql": peers_offline.iql}
CONSTANT: dict[str, dict[str, Any]] = {"td3-bc": {}, "iql": {"actor": {"cosine": False}}}
EVALUATIONS, EPISODES = 10, 10


def ours(method: str, dataset: str, task: str, seed: int, updates: int, run: Path) -> list[float]:
    """Mean returns at each tenth of the updates; leaves the transform of the data in the run folder."""
    settings = override(configure(method, task), {"num_env_steps": updates, "num_steps": updates // EVALUATIONS, **CONSTANT[method]})
    train(settings, task, dataset=dataset, seed=seed, out=run, method_id=method, progress=False, eval_checkpoints=True, eval_episodes=EPISODES)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_return"] for line in lines if "eval_return" in line]


def played(actor: nn.Module, task: str, transform: Transform, seed: int) -> float:
    """Mean return of greedy episodes."""
    env, returns = gymnasium.make(task), []
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=1000 * seed + episode)
        total, over = 0.0, False
        while not over:
            seen = torch.as_tensor(np.asarray(obs if transform.obs is None else transform.obs(obs), np.float32))
            with torch.no_grad():
                action = actor(seen[None])[0].numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return float(np.mean(returns))


def theirs(method: str, dataset: str, task: str, seed: int, updates: int, transform: Transform) -> list[float]:
    """The same of the single-file loop."""
    data = transform(load(dataset))
    rows = {"obs": data.obs, "action": data.action, "reward": data.reward, "next_obs": data.next_obs, "done": data.terminated}
    torch.manual_seed(seed)
    update, actor = LOOPS[method]({k: np.asarray(v, np.float32) for k, v in rows.items()}, "cpu")
    returns = []
    for k in range(updates):
        update(k)
        if (k + 1) % (updates // EVALUATIONS) == 0:
            returns.append(played(actor, task, transform, seed))
    return returns


def misfit(task: str) -> str | None:
    """Why the loops can't learn this task, which take vectors and act in [-1, 1]; None where they can."""
    env = gymnasium.make(task)
    seen, acts = env.observation_space, env.action_space
    env.close()
    if not isinstance(seen, gymnasium.spaces.Box) or len(seen.shape) != 1:
        return f"the loops take vectors, but observations of {task} are {seen}"
    if not isinstance(acts, gymnasium.spaces.Box) or len(acts.shape) != 1 or (acts.low != -1.0).any() or (acts.high != 1.0).any():
        return f"the loops act in [-1, 1], but actions of {task} are {acts}"
    return None


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--dataset", required=True, help="a Minari id whose observations are vectors, or a fixture")
    parser.add_argument("--task", required=True)
    parser.add_argument("--methods", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.updates < EVALUATIONS or args.updates % EVALUATIONS:
        parser.error(f"--updates must be a multiple of {EVALUATIONS}, got {args.updates}")
    why = misfit(args.task)
    if why is not None:
        parser.error(why)
    for method in args.methods:
        for seed in args.seeds:
            cell = {"dataset": args.dataset, "task": args.task, "method": method, "seed": seed}
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                mine = ours(method, args.dataset, args.task, seed, args.updates, run)
                other = theirs(method, args.dataset, args.task, seed, args.updates, Transform.load(run / "transform.json"))
            cell |= {"every": args.updates // EVALUATIONS, "markovia": [round(r, 1) for r in mine], "single_file": [round(r, 1) for r in other]}
            name = [cell[k] for k in ("dataset", "method", "seed")]
            known = json.loads(args.out.read_text()) if args.out.exists() else []
            cells = [c for c in known if [c[k] for k in ("dataset", "method", "seed")] != name] + [cell]
            write_whole(args.out, (json.dumps(cells, indent=1) + "\n").encode())
            print(f"{args.dataset} {method} seed {seed}: {np.mean(mine):.0f} by markovia, {np.mean(other):.0f} by the single file", flush=True)


if __name__ == "__main__":
    main()
