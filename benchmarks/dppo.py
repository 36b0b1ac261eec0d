"""A diffusion policy and a Gaussian one, cloned from the same data and fine-tuned by dppo and by ppo: `python benchmarks/dppo.py --seeds 0 1 2`.

Four ordinary run folders for every task and seed: the two clones (diffusion-policy; bc with a Gaussian), then dppo and ppo from them, each with the
presets of its command line, the same number of environment steps and at most 15 minutes. A killed grid goes on where it stopped. What counts is the
mean return of 100 greedy episodes before and after: improvement = (after - before)/|before|. benchmarks/results/dppo.json holds every cell, dppo.md
the table and dppo.png the curves of training; `--table` makes both anew without running anything.

    obstacle    a point has to pass an obstacle on either side; data of both ways, 44 % successes
    pointmass   a point is pushed to a goal, data of a noisy controller of medium skill
    hopper      Hopper-v5; episodes of a ppo policy that was stopped after 150,000 steps, recorded by `markovia collect`
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from grid import Cell, arguments, measure  # type: ignore[import-not-found]  # run as a script, so its folder is on the path

RESULTS = Path(__file__).parent / "results" / "dppo.json"
TASKS = {
    "obstacle": ("markovia/PointObstacle-v0", "fixture:obstacle"),
    "pointmass": ("markovia/PointMass2D-v0", "fixture:pointmass2d/medium"),
    "hopper": ("Hopper-v5", "markovia-dppo/hopper/medium-v0"),
}
METHODS = {"dppo": "diffusion-policy", "ppo": "bc"}  # and what each starts from
GAUSSIAN: dict[str, Any] = {"activation": "relu", "tanh_mean": True, "std": "shared", "log_std_init": 0.0, "normalize_obs": True}
EPISODES, MINUTES, MEDIUM_STEPS = 100, 15.0, 150_000


def hopper_medium(dataset: str, runs: Path, steps: int | None) -> None:
    """Make the dataset unless it is there: ppo's policy after 150,000 steps, 100,000 recorded steps with sampled actions."""
    from markovia.algos.presets import configure, override
    from markovia.collect import collect
    from markovia.envs.offline.minari_io import local_ids
    from markovia.recipes import recipe
    from markovia.runs import train

    if dataset in local_ids():
        return
    env, folder = TASKS["hopper"][0], runs / "hopper"
    budget = MEDIUM_STEPS if steps is None else steps
    method = override(configure("ppo", env), {"num_env_steps": budget})
    run = train(method, env, out=folder / "behaviour", resume=(folder / "behaviour").exists(), progress=False, method_id="ppo").run
    changes = {"num_steps": 100_000 if steps is None else steps, "num_reference": 10}
    collect(
        recipe(env, **changes), out=folder / "collect", resume=(folder / "collect").exists(), tiers=["medium"], namespace=dataset.partition("/")[0],
        medium_run=run, expert_run=run, progress=False,
    )  # fmt: skip


def from_clone(clone: Any) -> Any:
    """What `train` does before the first step of ppo: the cloned policy and its normaliser take the place of the fresh ones."""

    def prepare(setup: Any) -> None:
        for name in ("policy", "normalizer"):
            setup.agent.net[name].load_state_dict(clone.net[name].state_dict())

    return prepare


def run(method_id: str, env: str, seed: int, out: Path, changes: dict[str, Any], **options: Any) -> Any:
    """A run with the presets and changes, from its newest checkpoint if it has one; a finished one is read."""
    from markovia.algos.presets import configure, override
    from markovia.runs import train

    method = override(configure(method_id, env), changes)
    resume = (out / "config.json").is_file()
    return train(method, env, seed=seed, out=out, resume=resume, eval_episodes=EPISODES, progress=False, method_id=method_id, **options)


def cell(task: str, method: str, seed: int, steps: int | None, runs: Path) -> Cell:
    """Clone, then fine-tune. With `steps` both take so few (a trial of the script)."""
    import numpy as np
    import torch

    from markovia.algos.presets import configure
    from markovia.rundir import Metrics

    torch.set_num_threads(1)
    env, dataset = TASKS[task]
    folder = runs / task / f"seed{seed}"
    cut = {} if steps is None else {"num_env_steps": steps}
    # As many updates of both clones, and as many environment steps of both, whatever their presets say.
    updates = cut or {"num_env_steps": configure("diffusion-policy", env).num_env_steps}
    budget = cut or {"num_env_steps": configure("dppo", env).num_env_steps}
    if method == "dppo":
        clone = run("diffusion-policy", env, seed, folder / "clone-diffusion", updates, dataset=dataset)
        tuned = run("dppo", env, seed, folder / "dppo", {**budget, "chain": {"start": str(folder / "clone-diffusion")}}, max_seconds=60 * MINUTES)
    else:
        hidden = configure("bc", env).policy.hidden
        gaussian = {"policy": {"type": "Bounded", "hidden": hidden}}
        clone = run("bc", env, seed, folder / "clone-gaussian", {**updates, **gaussian}, dataset=dataset)
        options = {"agent_options": {**GAUSSIAN, "hidden": hidden}, "prepare": from_clone(clone.agent)}
        tuned = run("ppo", env, seed, folder / "ppo", budget, max_seconds=60 * MINUTES, **options)
    before, after = (found.done["evaluation"]["mean"] for found in (clone, tuned))
    rows = [r for r in Metrics(tuned.run).read() if r.get("return") is not None]
    x, y, clock = (np.array([r[k] for r in rows], dtype=float) for k in ("num_env_steps", "return", "seconds"))
    grid = np.linspace(x[0], x[-1], min(200, len(x)))
    curve = {"num_env_steps": grid.round().tolist(), "return": np.interp(grid, x, y).round(4).tolist()}
    return {
        "task": task, "method": method, "seed": seed, "before": before, "after": after, "improvement": (after - before) / max(abs(before), 1e-9),
        "num_env_steps": tuned.done["num_env_steps"], "seconds": round(float(clock[-1]), 1), "curve": curve,
    }  # fmt: skip


def verdict(rows: list[Cell], task: str) -> dict[str, Any] | None:
    """Whether dppo improves its clone by at least half within 15 minutes, and by more than ppo improves the Gaussian one; None without both.

    improvement = (after - before)/|before| of the means over seeds.
    """
    import numpy as np

    found = {m: [r for r in rows if r["task"] == task and r["method"] == m] for m in METHODS}
    if not all(found.values()):
        return None
    mean = lambda m, key: float(np.mean([r[key] for r in found[m]]))  # noqa: E731
    improvement = {m: (mean(m, "after") - mean(m, "before")) / max(abs(mean(m, "before")), 1e-9) for m in METHODS}
    in_time = max(r["seconds"] for r in found["dppo"]) <= 60 * MINUTES * 1.05
    holds = in_time and improvement["dppo"] >= 0.5 and improvement["dppo"] > improvement["ppo"]
    return {"task": task, "improvement": improvement, "holds": bool(holds)}


def table(rows: list[Cell]) -> str:
    """Markdown: returns before and after, mean and standard deviation over seeds, and the verdict of each task."""
    import numpy as np

    lines = [
        f"Mean return of {EPISODES} greedy episodes before and after fine-tuning, mean ± std over seeds; data and environment steps are the same.",
        "",
        "| task | method | seeds | steps | cloned | fine-tuned | minutes a seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, method in itertools.product(TASKS, METHODS):
        members = [r for r in rows if r["task"] == task and r["method"] == method]
        if not members:
            continue
        spread = lambda key: (lambda v: f"{v.mean():,.2f} ± {v.std():,.2f}")(np.array([m[key] for m in members]))  # noqa: B023, E731
        steps, minutes = min(m["num_env_steps"] for m in members), np.mean([m["seconds"] for m in members]) / 60
        lines.append(f"| {task} | {method} | {len(members)} | {steps:,} | {spread('before')} | {spread('after')} | {minutes:.1f} |")
    lines.append("")
    for found in filter(None, (verdict(rows, task) for task in TASKS)):
        told, gain = "holds" if found["holds"] else "does not hold", found["improvement"]
        measured = f"{gain['dppo']:+.0%}, ppo {gain['ppo']:+.0%}"
        lines.append(f"- {found['task']}: at least 50 % better within 15 minutes, and more than ppo: {told} ({measured})")
    return "\n".join(lines) + "\n"


def picture(rows: list[Cell], out: Path) -> None:
    """A panel per task: return of sampled actions over training, mean and range over seeds; dots at the ends are greedy returns."""
    import numpy as np
    from matplotlib.figure import Figure

    tasks = [t for t in TASKS if any(r["task"] == t for r in rows)]
    figure = Figure(figsize=(4.6 * len(tasks), 3.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for ax, task in zip(axes, tasks, strict=True):
        for method in METHODS:
            members = [r for r in rows if r["task"] == task and r["method"] == method]
            if not members:
                continue
            x = np.array(min((m["curve"]["num_env_steps"] for m in members), key=lambda g: g[-1]))
            y = np.stack([np.interp(x, m["curve"]["num_env_steps"], m["curve"]["return"]) for m in members])
            (line,) = ax.plot(x / 1e3, y.mean(0), label=f"{method} from {METHODS[method]}", linewidth=1.4)
            ax.fill_between(x / 1e3, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
            ends = [np.mean([m[k] for m in members]) for k in ("before", "after")]
            ax.plot([0, x[-1] / 1e3], ends, "o", color=line.get_color(), markersize=5)
        ax.set(title=task, xlabel="thousand environment steps", ylabel="return")
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)


def told(found: Cell) -> str:
    return (
        f"{found['task']} {found['method']} seed {found['seed']}: {found['before']:.3g} -> {found['after']:.3g} ({found['improvement']:+.0%}) in "
        f"{found['num_env_steps']:,} steps, {found['seconds']:.0f} s"
    )


def main() -> None:
    args = arguments(__doc__, tasks=list(TASKS), methods=list(METHODS), runs="runs/dppo", out=RESULTS).parse_args()
    if unknown := set(args.tasks) - set(TASKS) or set(args.methods) - set(METHODS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; tasks are {', '.join(TASKS)}, methods {', '.join(METHODS)}")
    grid = [] if args.table else [(*c, args.steps, args.runs) for c in itertools.product(args.tasks, args.methods, args.seeds)]
    if any(c[0] == "hopper" for c in grid):
        hopper_medium(TASKS["hopper"][1], args.runs, args.steps)
    measure(cell, grid, jobs=args.jobs, out=args.out, told=told, table=table, picture=picture)


if __name__ == "__main__":
    main()
