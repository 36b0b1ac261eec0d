"""Environment steps per second of every vectorisation, without policy or learning: `python benchmarks/stepping.py`.

Random actions; the backends of a cell step in turns in one process, so that whatever else the machine does slows them alike, and the ratio to
SyncVectorEnv is the median over turns. `mujoco/k` is the batch with k threads; envpool is measured where it is installed, with its default threads.
On a machine that others use too, `--priority` runs each turn at real-time priority and rests between turns (Linux, root); the results say so.
Writes benchmarks/results/stepping.json. For a quick look: `--envs HalfCheetah-v5 Hopper-v5 --num-envs 8 --turns 3`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from markovia.envs.control import make_vec
from markovia.envs.control.mujoco_batch import TASKS

RESULTS = Path(__file__).parent / "results" / "stepping.json"


def backends(threads: list[int]) -> dict[str, Callable[[str, int], VectorEnv]]:
    """What is compared, by name; the first is the measure of the others."""
    found: dict[str, Callable[[str, int], VectorEnv]] = {"sync": lambda env_id, n: make_vec(env_id, n, "sync", seed=0)}
    for k in threads:
        found[f"mujoco/{k}"] = lambda env_id, n, k=k: make_vec(env_id, n, "mujoco", seed=0, vector_kwargs={"threads": k})  # type: ignore[misc]
    if importlib.util.find_spec("envpool"):
        found["envpool"] = lambda env_id, n: make_vec(env_id, n, "envpool", seed=0)
    return found


def seconds_per_call(venv: VectorEnv, actions: np.ndarray, seconds: float) -> float:
    """Mean time of one `step` call over about `seconds`."""
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        venv.step(actions[calls % len(actions)])
        calls += 1
    return (time.perf_counter() - began) / calls


def schedule(policy: int, level: int) -> None:
    """Put every thread of this process, pools of the environments included, under a scheduling policy."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # a thread that has ended meanwhile
            os.sched_setscheduler(int(thread), policy, os.sched_param(level))


@contextlib.contextmanager
def priority(wanted: bool) -> Iterator[None]:
    """This process before all others for the length of the block."""
    if not wanted:
        yield
        return
    schedule(os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


def turn_arguments(doc: str | None, *, what: str, seconds: float, out: Path) -> argparse.ArgumentParser:
    """The flags of a comparison in turns; `what` is done for `seconds` in each."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of {what} in each turn")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds between turns")
    parser.add_argument("--priority", action="store_true", help="turns at real-time priority")
    parser.add_argument("--out", type=Path, default=out)
    return parser


def cell(env_id: str, num_envs: int, made: dict[str, Callable[[str, int], VectorEnv]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every backend on one task and number of environments, in turns."""
    venvs = {name: make(env_id, num_envs) for name, make in made.items()}
    space = next(iter(venvs.values())).action_space
    space.seed(0)
    actions = np.stack([space.sample() for _ in range(64)])
    times: dict[str, list[float]] = {name: [] for name in venvs}
    for turn in range(-1, args.turns):
        for name, venv in venvs.items():
            if turn < 0:
                venv.reset(seed=0)
            with priority(args.priority):
                took = seconds_per_call(venv, actions, args.seconds)
            time.sleep(args.rest)
            if turn >= 0:  # the first turn warms up
                times[name].append(took)
    for venv in venvs.values():
        venv.close()
    base = times["sync"]
    return [
        {
            "env": env_id,
            "num_envs": num_envs,
            "backend": name,
            "us_per_call": round(1e6 * statistics.median(t), 1),
            "steps_per_s": round(num_envs / statistics.median(t)),
            "ratio_to_sync": round(statistics.median(b / x for b, x in zip(base, t, strict=True)), 3),
            "turns_us": [round(1e6 * x, 1) for x in t],
        }
        for name, t in times.items()
    ]


def line(row: dict[str, Any]) -> str:
    speed = f"{row['us_per_call']:8.1f} us a call {row['steps_per_s']:8,} steps/s {row['ratio_to_sync']:6.2f}x"
    return f"{row['env']:>16} x{row['num_envs']:<3} {row['backend']:>9} {speed}"


def main() -> None:
    parser = turn_arguments(__doc__, what="stepping", seconds=0.3, out=RESULTS)
    parser.add_argument("--envs", nargs="+", default=list(TASKS))
    parser.add_argument("--num-envs", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    made: dict[str, Callable[[str, int], VectorEnv]] = backends(args.threads)
    rows: list[dict[str, Any]] = []
    for env_id in args.envs:
        for n in args.num_envs:
            rows += cell(env_id, n, made, args)
            print(*map(line, rows[-len(made) :]), sep="\n")
    versions = {name: importlib.metadata.version(name) for name in ("mujoco", "gymnasium", "numpy", *(["envpool"] if "envpool" in made else []))}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    how = {"cpus": os.cpu_count(), "turns": args.turns, "seconds": args.seconds, "rest": args.rest, "priority": args.priority, "versions": versions}
    lines = ",\n".join(json.dumps(row) for row in rows)
    args.out.write_text(json.dumps(how)[:-1] + f', "rows": [\n{lines}\n]}}\n')
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
