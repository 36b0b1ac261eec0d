"""Runs that are killed (SIGKILL) again and again and go on each time: what a kill costs, and whether the numbers stay those of a run never killed.

    python benchmarks/kill.py --kills 50 --out benchmarks/results/kill.json

A run is started in a process of its own, killed after a random time, looked at, and resumed; when it comes to its end, the next run begins, until
there were `kills` kills. Checkpoints are written every few iterations, so that many kills fall into writing one: what is left under a temporary
name tells which. Each finished run is compared with an uninterrupted one: parameters, optimiser, everything else in the checkpoint, every statistic.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from markovia.agents.checkpoint import load_tensors
from markovia.algos.presets import configure, override
from markovia.rundir import DRIVER, TEMPORARY, Metrics, checkpoints
from markovia.runs import train

CLOCK = {"seconds", "steps_per_second", "compile_seconds"}


@dataclass(frozen=True)
class Case:
    """A small run: method, environment, changes to the settings, and how many checkpoints."""

    method: str
    env: str
    changes: dict[str, Any]
    num_checkpoints: int
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, out: Path) -> None:
        """Train, or go on training."""
        settings = override(configure(self.method, self.env), self.changes)
        options: dict[str, Any] = {"num_checkpoints": self.num_checkpoints, "eval_episodes": 0, "progress": False, "compile": False, **self.options}
        train(settings, self.env, out=out, resume=True, method_id=self.method, **options)


_SAC = {"num_env_steps": 4000, "num_envs": 1, "num_steps": 50, "utd": 0.1, "learning_starts": 100, "batch_size": 16, "replay_size": 1000}
_PPO = {"num_env_steps": 8000, "num_envs": 1, "num_steps": 40, "solver": {"epochs": 1}}
CASES: dict[str, Case] = {
    "ppo on a point mass": Case("ppo", "markovia/PointMass2D-v0", _PPO, 200),
    "sac on the pendulum": Case("sac", "Pendulum-v1", _SAC, 20, {"agent_options": {"hidden": (16, 16)}}),
    "grpo on sums": Case("grpo", "markovia/Arithmetic-v0", {"num_env_steps": 480, "num_envs": 8, "group_size": 4, "solver": {"epochs": 1}}, 60),
}


@dataclass
class Found:
    """What the kills of one case did. Iterations are lost where metrics.jsonl went further than the newest checkpoint."""

    kills: int = 0
    while_writing: int = 0  # kills that left something under a temporary name
    before_a_checkpoint: int = 0
    most_lost_iterations: int = 0
    iterations_between_checkpoints: int = 0
    runs: int = 0
    not_resumed: int = 0
    not_equal: int = 0


def start(work: Callable[[], None]) -> int:
    """`work` in a process of its own: its id. Exit status 0 when it came to its end."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException as error:  # the parent counts it, here it is shown
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def finished(child: int) -> bool:
    """Wait for a process. Raises RuntimeError when it failed by itself; False when it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status > 0:
        raise RuntimeError("a run could not be resumed; its message stands above")
    return status == 0


def killed(work: Callable[[], None], seconds: float) -> bool:
    """Whether the work was killed after so long; False when it had come to its end before. Raises RuntimeError when it failed."""
    child, limit = start(work), time.monotonic() + seconds
    while time.monotonic() < limit:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return not finished(child)
        time.sleep(max(0.0, min(0.002, limit - time.monotonic())))
    os.kill(child, signal.SIGKILL)
    return not finished(child)


def temporary(run: Path) -> list[Path]:
    """What lies half-written in a run's folder."""
    return [p for p in run.rglob("*") if p.name.startswith(TEMPORARY)]


def look(run: Path, found: Found) -> None:
    """Count what a kill left."""
    done, rows = checkpoints(run), Metrics(run).read()
    newest = int(done[-1].name) if done else 0
    found.kills += 1
    found.while_writing += bool(temporary(run))
    found.before_a_checkpoint += not done
    found.most_lost_iterations = max(found.most_lost_iterations, (rows[-1]["iteration"] if rows else 0) - newest)


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Everything that must be equal: the last checkpoint, and the statistics without the clock's."""
    tensors, meta = load_tensors(checkpoints(run)[-1] / DRIVER)
    return tensors, meta, [{k: v for k, v in row.items() if k not in CLOCK} for row in Metrics(run).read()]


def equal(a: Path, b: Path) -> bool:
    """Whether two runs ended in the same bits."""
    (x, meta, rows), (y, meta_y, rows_y) = outcome(a), outcome(b)
    return rows == rows_y and meta == meta_y and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def trial(case: Case, kills: int, folder: Path, seed: int, spread: float = 1.0) -> Found:
    """Kill runs of a case `kills` times, each time after 0 to `spread` seconds.

    The uninterrupted run is made in this process: those that are killed are forked from it, have all modules at hand, and spend their time at work.
    """
    found, rng, whole = Found(), np.random.default_rng(seed), folder / "whole"
    case.run(whole)
    iterations = len(Metrics(whole).read())
    found.iterations_between_checkpoints = -(-iterations // case.num_checkpoints)
    while found.kills < kills:
        run = folder / f"run-{found.runs}"
        try:
            while found.kills < kills and killed(lambda run=run: case.run(run), rng.uniform(0.0, spread)):
                look(run, found)
            if found.kills >= kills and not (run / "done.json").exists():
                finished(start(lambda run=run: case.run(run)))
            found.not_equal += not equal(run, whole)
        except RuntimeError:
            found.not_resumed += 1
        found.runs += 1
    return found


def holds(found: Found) -> bool:
    """At most the iterations since the last checkpoint are lost, every run goes on, and to the same bits."""
    return found.not_resumed == 0 == found.not_equal and found.most_lost_iterations <= found.iterations_between_checkpoints


def table(results: dict[str, Any]) -> str:
    """The results in Markdown, as docs/trust.md shows them."""
    rows = ["| run | kills | while a checkpoint was written | iterations between checkpoints | most iterations lost | not resumed | other numbers |"]
    rows.append("|---|---|---|---|---|---|---|")
    names = ("kills", "while_writing", "iterations_between_checkpoints", "most_lost_iterations", "not_resumed", "not_equal")
    rows += [f"| {case} | " + " | ".join(str(found[name]) for name in names) + " |" for case, found in results.items()]
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each case")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out is not None and args.out.is_file() else {}
    for name in args.case:
        with tempfile.TemporaryDirectory() as folder:
            found = trial(CASES[name], args.kills, Path(folder), args.seed)
        results[name] = {**asdict(found), "holds": holds(found)}
        print(name, json.dumps(results[name]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(not all(results[name]["holds"] for name in args.case))


if __name__ == "__main__":
    sys.exit(main())
