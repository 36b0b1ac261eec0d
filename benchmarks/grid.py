"""What grids of runs share: one process per cell, results that land as each cell ends, cells that are there already left alone.

A cell is a JSON object with a key (task, method, seed, ...) that names it; a grid that was killed goes on where it stopped, because each cell
trains in a run folder of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from markovia.envs.durable import write_whole

Cell = dict[str, Any]
KEY = ("task", "method", "seed")


def folder(runs: Path, task: str, method: str, seed: int) -> Path:
    """Where the run of a cell lies."""
    return runs / task / method.replace("/", "-") / f"seed{seed}"


def budget(steps: int | None) -> Cell:
    """What --steps changes in the presets."""
    return {} if steps is None else {"num_env_steps": steps}


def settings_of(method: str, task: str, changes: dict[str, Any] | None = None) -> Cell:
    """What a cell is trained with, as config.json of its run has it: the presets of the task with `changes`."""
    from markovia.algos.presets import configure, override
    from markovia.settings import to_json

    found: Cell = to_json(override(configure(method, task), changes or {}))
    return found


def train_cell(
    task: str, method: str, seed: int, run: Path, changes: dict[str, Any] | None = None, like: str | None = None, **options: Any
) -> Cell:
    """Train one cell to its end on one thread, from its newest checkpoint if it has one.

    Settings are the presets of the task, or of the one that it is `like`, with `changes`; `options` go to `markovia.train`. Each checkpoint is
    evaluated too, so that the best of them can be told apart from the last.
    """
    import torch

    from markovia.algos.presets import configure, override
    from markovia.runs import train
    from markovia.settings import to_json

    torch.set_num_threads(1)
    settings = override(configure(method, like or task), changes or {})
    done = train(settings, task, seed=seed, out=run, resume=run.exists(), eval_checkpoints=True, progress=False, method_id=method, **options).done
    what = {"task": task, "method": method, "seed": seed, "settings": to_json(settings)}
    return {**what, "seconds": round(done["seconds"], 1), "done": done}


def cells(path: Path) -> list[Cell]:
    """The cells of a results file, none where there is no file yet."""
    rows: list[Cell] = json.loads(path.read_text()) if path.is_file() else []
    return rows


def record(found: Cell, path: Path, key: Sequence[str] = KEY) -> None:
    """Put one cell into the results file, in place of an older one of the same key; the file is whole at every moment."""
    rows = [r for r in cells(path) if any(r[k] != found[k] for k in key)] + [found]
    rows.sort(key=lambda r: [str(r[k]) for k in key])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(rows, indent=1) + "\n").encode())


def arguments(doc: str | None, *, tasks: Sequence[str], methods: Sequence[str], runs: str, out: Path) -> argparse.ArgumentParser:
    """The flags that every grid has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(tasks), help=f"default {' '.join(tasks)}")
    parser.add_argument("--methods", nargs="+", default=list(methods), help=f"default {' '.join(methods)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--steps", type=int, help="steps of a run, in place of the preset's")
    parser.add_argument("--table", action="store_true", help="only make the tables from what has been measured")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where the run folders lie")
    parser.add_argument("--out", type=Path, default=out, help="results, one entry per cell; tables are written beside it")
    return parser


def _begin_work(cores: Any) -> None:
    """Keep this worker to one core, if there are any to share out: simulations that start a thread for every core would wait for those of the others.

    It ends with the script: a worker that outlives it would go on with its cell, beside the grid that was started again.
    """
    if cores is not None:
        os.sched_setaffinity(0, {cores.get()})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def workers(jobs: int) -> ProcessPoolExecutor:
    """`jobs` fresh processes, each on a core of its own where the system can say so and there are as many."""
    context = multiprocessing.get_context("spawn")
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    cores = context.Queue() if 1 < jobs <= len(allowed) else None
    if cores is not None:
        for core in allowed[:jobs]:
            cores.put(core)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_work, initargs=(cores,))


def _differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    """The settings that both name, and not alike. Those that only one of them has came or went since, and say nothing."""
    if isinstance(was, dict) and isinstance(now, dict):
        for k in was:
            if k in now and not (name == "" and k == "num_env_steps"):
                yield from _differences(was[k], now[k], f"{name}.{k}" if name else k)
    elif was != now:
        yield f"{name} {was} where {now} is asked for"


def _check(known: Cell, asked: Cell, told: str) -> None:
    """Raises SystemExit, which begins with `told`, where a cell was trained for fewer steps than are asked for now, or with other settings."""
    steps, wanted = known.get("done", {}).get("num_env_steps"), asked.get("num_env_steps")
    if steps is not None and wanted is not None and steps < wanted:
        raise SystemExit(f"{told} after {steps:,} steps, and {wanted:,} are asked for: use other --out and --runs")
    other = list(_differences(known.get("settings", {}), asked))
    if other:
        raise SystemExit(f"{told} with {'; '.join(other)}: use other --out and --runs, or take the cell and its run folder away")


def measure(
    cell: Callable[..., Cell],
    grid: Iterable[tuple[Any, ...]],
    *,
    jobs: int,
    out: Path,
    told: Callable[[Cell], str],
    table: Callable[[list[Cell]], str],
    picture: Callable[[list[Cell], Path], None] | None = None,
    key: Sequence[str] = KEY,
    asked: Callable[..., Cell] = lambda *entry: {},
) -> None:
    """Call `cell` with each entry of the grid, the most important first, in processes of its own; record and tell each as it ends, and write the
    table and the picture of all beside the results.

    The first entries of a grid's tuples are the key; what is recorded under it is not run again. With an empty grid tables are made anew.
    A cell that fails, or whose process is killed, is told and the others go on; the exit status then is 1. `asked` gives the settings that an entry
    asks for, as far as they are known: one that is recorded with others, or after fewer steps, ends the script before anything runs.
    """

    def named(entry: tuple[Any, ...]) -> str:
        return " ".join(map(str, entry[: len(key)]))

    def write() -> None:
        rows = cells(out)
        out.with_suffix(".md").write_text(table(rows))
        if picture is not None:
            picture(rows, out.with_suffix(".png"))

    known = {tuple(r[k] for k in key): r for r in cells(out)}
    left, silent, failed = [], [], []
    for entry in grid:
        name = tuple(entry[: len(key)])
        if name not in known:
            left.append(entry)
            continue
        wanted = asked(*entry)
        _check(known[name], wanted, f"{out} holds {named(entry)}")
        silent += [named(entry)] * (wanted.keys() > {"num_env_steps"} and "settings" not in known[name])
    if silent:
        some = ", ".join(silent[:3]) + f" and {len(silent) - 3} more" * (len(silent) > 3)
        print(f"{out} does not tell the settings of {some}; they are taken to be those asked for", flush=True)
    total = len(left)
    while left:
        lost = []  # by a process that was killed, with whatever else its pool had to do
        with workers(jobs) as pool:
            entries = {pool.submit(cell, *entry): entry for entry in left}
            try:
                for future in as_completed(entries):
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        lost.append(entries[future])
                    elif error is not None:
                        failed.append(f"{named(entries[future])}: {type(error).__name__}: {error}")
                        print(f"failed, the others go on: {failed[-1]}", flush=True)
                    else:
                        record(future.result(), out, key)
                        print(told(future.result()), flush=True)
                        write()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if len(lost) == len(left):
            failed += [f"{named(entry)}: its process was killed, as for want of memory" for entry in lost]
            break
        lost.sort(key=left.index)
        left = lost[jobs:] + lost[:jobs]  # those that were running are suspect: they go last
    if cells(out):
        write()
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {total} cells failed:", *failed]))


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, interquartile mean and a 95 % bootstrap interval of the mean over seeds."""
    import numpy as np
    from scipy import stats

    x = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).choice(x, size=(10_000, len(x))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": float(x.mean()), "std": float(x.std()), "iqm": float(stats.trim_mean(x, 0.25)), "low": float(low), "high": float(high)}
