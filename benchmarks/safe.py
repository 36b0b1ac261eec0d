"""Return and cost on tasks with a cost limit, one process per (task, method, seed), resumable: `python benchmarks/safe.py --seeds 0 1 2`.

Cells are run folders under --runs, as in benchmarks/control.py. What counts is training itself, with sampled actions: return and episode cost over
the last tenth of the steps, and the mean violation per episode over all of them. benchmarks/results/safe.json holds every cell, safe.md the table
beside published numbers, safe.png the curves with the limit drawn; `--table` makes both anew without running anything.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grid import Cell, arguments, budget, folder, measure, settings_of, train_cell  # type: ignore[import-not-found]  # run as a script, so its folder is on the path

RESULTS = Path(__file__).parent / "results" / "safe.json"
PUBLISHED = Path(__file__).parent / "published_safe.json"
TASKS = ["markovia/SafeHalfCheetahVelocity-v0", "markovia/SafeHopperVelocity-v0", "markovia/SafePointGoal-v0"]
METHODS = ["ppo", "ppo-lag", "ppo-lag/pid", "cpo", "trpo-lag", "cat", "reload/ppo", "cal", "acs/ppo"]
FIRST = METHODS[:4]  # what is compared at 1M steps on the first task
LIMIT = 25.0
# Return of running at the speed limit for a whole episode: 1000 (v_max + bonus for staying up), with nothing paid for control.
AT_LIMIT = {"markovia/SafeHalfCheetahVelocity-v0": 1000 * 3.2096, "markovia/SafeHopperVelocity-v0": 1000 * (0.7402 + 1.0)}


def plan(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """The grid, the most important cells first: those of `FIRST` on the first task, then one seed of everything, then the others."""

    def rank(entry: tuple[str, str, int]) -> tuple[int, int, int, int]:
        task, method, seed = entry
        return (task != TASKS[0] or method not in FIRST, seed, tasks.index(task), METHODS.index(method))

    return sorted(itertools.product(tasks, methods, seeds), key=rank)


def _asked(task: str, method: str, seed: int, steps: int | None, runs: Path) -> Cell:
    """The settings that a cell asks for."""
    found: Cell = settings_of(method, task, budget(steps))
    return found


def cell(task: str, method: str, seed: int, steps: int | None, runs: Path) -> Cell:
    """Train one cell and summarise its training; the curves (200 points) go into the results, so that the picture needs no run folder."""
    import numpy as np

    from markovia.rundir import Metrics

    run = folder(runs, task, method, seed)
    found = train_cell(task, method, seed, run, budget(steps))
    rows = [r for r in Metrics(run).read() if r.get("cost") is not None]
    x, cost, value = (np.array([r[k] for r in rows], dtype=float) for k in ("num_env_steps", "cost", "return"))
    late = x > 0.9 * x[-1]
    grid = np.linspace(x[0], x[-1], min(200, len(x)))
    curves = {name: np.interp(grid, x, y).round(2).tolist() for name, y in (("cost", cost), ("return", value))}
    return {
        **found,
        "return": float(value[late].mean()),
        "cost": float(cost[late].mean()),
        "violation": float(np.maximum(cost - LIMIT, 0.0).mean()),
        "curves": {"num_env_steps": grid.round().tolist(), **curves},
    }


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Cells by task and method."""
    out: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in sorted(rows, key=lambda r: (TASKS.index(r["task"]) if r["task"] in TASKS else 99, METHODS.index(r["method"]), r["seed"])):
        out.setdefault((r["task"], r["method"]), []).append(r)
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: return and cost over the last tenth, mean and standard deviation over seeds, beside published numbers."""
    import numpy as np

    published = json.loads(PUBLISHED.read_text())
    lines = [
        f"Return and episode cost (limit {LIMIT:.0f}) over the last tenth of training, sampled actions; mean ± std over seeds. Published: "
        f"{published['source']}.",
        "",
        "| task | method | seeds | steps | return | of running at the limit | cost | mean violation in training | greedy: return / cost "
        "| minutes a seed | published |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, method), members in groups(rows).items():
        spread = lambda key: (lambda v: f"{v.mean():,.1f} ± {v.std():,.1f}")(np.array([m[key] for m in members]))  # noqa: B023, E731
        greedy = [(np.mean(m["done"]["evaluation"]["returns"]), np.mean(m["done"]["evaluation"]["costs"])) for m in members]
        share = f"{np.mean([m['return'] for m in members]) / AT_LIMIT[task]:.0%}" if task in AT_LIMIT else ""
        told = published.get(task.removeprefix("markovia/").rpartition("-")[0], {}).get(method, "")
        lines.append(
            f"| {task} | {method} | {len(members)} | {min(m['done']['num_env_steps'] for m in members) / 1e6:.2g}M | {spread('return')} "
            f"| {share} | {spread('cost')} | {spread('violation')} | {np.mean([g for g, _ in greedy]):,.0f} / {np.mean([c for _, c in greedy]):,.1f} "
            f"| {np.mean([m['seconds'] for m in members]) / 60:.1f} | {told} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], out: Path) -> None:
    """A column per task: return above, cost below with the limit as a dashed line; mean and range over seeds of running means over 5 % of a curve,
    since a point of an off-policy run is a single episode."""
    import numpy as np
    from matplotlib.figure import Figure
    from scipy.ndimage import uniform_filter1d

    found = groups(rows)
    tasks = list(dict.fromkeys(task for task, _ in found))
    figure = Figure(figsize=(5.0 * len(tasks), 6.5), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    for (task, method), members in found.items():
        for ax, key in zip(axes[:, tasks.index(task)], ("return", "cost"), strict=True):
            x = np.array(min((m["curves"]["num_env_steps"] for m in members), key=lambda g: g[-1]))
            y = np.stack([np.interp(x, m["curves"]["num_env_steps"], m["curves"][key]) for m in members])
            y = uniform_filter1d(y, max(1, len(x) // 20), mode="nearest")
            (line,) = ax.plot(x / 1e6, y.mean(0), label=method, linewidth=1.4)
            ax.fill_between(x / 1e6, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    for column, task in enumerate(tasks):
        axes[0, column].set(title=task.removeprefix("markovia/"), ylabel="return")
        axes[1, column].set(xlabel="million steps", ylabel="cost an episode", yscale="symlog")
        axes[1, column].axhline(LIMIT, color="black", linestyle="--", linewidth=1.0)
    lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines()}  # one legend, below: curves are everywhere
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)


def told(found: Cell) -> str:
    """One line on a cell that has ended."""
    return f"{found['task']} {found['method']} seed {found['seed']}: return {found['return']:.1f}, cost {found['cost']:.1f}"


def main() -> None:
    parser = arguments(__doc__, tasks=TASKS, methods=METHODS, runs="runs/safe", out=RESULTS)
    args = parser.parse_args()
    if unknown := [m for m in args.methods if m not in METHODS]:
        parser.error(f"no method {unknown[0]!r} here; choose from {', '.join(METHODS)}")
    grid = [] if args.table else [(*entry, args.steps, args.runs) for entry in plan(args.tasks, args.methods, args.seeds)]
    measure(cell, grid, jobs=args.jobs, out=args.out, told=told, table=table, picture=picture, asked=_asked)


if __name__ == "__main__":
    main()
