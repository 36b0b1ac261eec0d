"""Final returns on control tasks, one process per (task, method, seed), resumable: `python benchmarks/control.py --seeds 0 1 2`.

Every cell is an ordinary run folder under --runs, with the presets of the command line; a killed grid goes on where it stopped. Raw per-seed
scores land in benchmarks/results/control.json as each cell ends: the greedy policy at the end of training, 10 episodes, and the wall time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "control.json"


def cell(task: str, method: str, seed: int, runs: Path) -> dict[str, Any]:
    """Train one cell to its end, from its newest checkpoint if it has one."""
    import torch

    from markovia.runs import train

    torch.set_num_threads(1)
    folder = runs / task / method.replace("/", "-") / f"seed{seed}"
    began = time.perf_counter()
    # The committed scores were measured with 20 checkpoints; environments are reset at each, so the number belongs to the protocol.
    result = train(method, task, seed=seed, out=folder, resume=(folder / "config.json").is_file(), num_checkpoints=20, progress=False)
    return {"task": task, "method": method, "seed": seed, "seconds": round(time.perf_counter() - began, 1), "done": result.done}


def record(found: dict[str, Any], path: Path) -> None:
    """Put one cell into the results file, in place of an older one of the same cell."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    key = ("task", "method", "seed")
    rows = [r for r in rows if any(r[k] != found[k] for k in key)] + [found]
    rows.sort(key=lambda r: [str(r[k]) for k in key])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["HalfCheetah-v5"])
    parser.add_argument("--methods", nargs="+", default=["ppo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="where the run folders lie")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    grid = [(t, m, s) for s in args.seeds for t in args.tasks for m in args.methods]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(cell, *c, args.runs) for c in grid]):
            found = future.result()
            record(found, args.out)
            print(f"{found['task']} {found['method']} seed {found['seed']}: {json.dumps(found['done'])[:200]}", flush=True)


if __name__ == "__main__":
    main()
