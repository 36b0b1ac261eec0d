"""Reward over KL of every way to align a denoiser, at equal compute, resumable: `python benchmarks/diffusion.py --seeds 0 1`.

Compute is the number of samples that pass through a denoiser (policy, reference or the task's own; forward passes of sampling and training),
the same for every cell: a first iteration tells what a chain costs, and the length of the run follows. A training method is measured at five
points of its run, for three strengths of its own regulariser; rlg trains by adjoint matching and goes on beyond it; fk-steering trains nothing
and pays particles x steps for each sample instead. All methods see one kernel (final="mid", every step has a density), one reward and the
presets of the task. itps steers paths by a sketch, which neither task has.

KL is that of whole chains to the start's, nats: |u|^2/2 summed over the steps (algos/denoising/measure.py). For fk-steering it is that of the
tilted law which the particles approach, lam E r - log Z with log Z the integral of E r from 0 to lam, drawn hollow: four particles are not yet there.
benchmarks/results/diffusion.json holds every cell, diffusion.md the table, diffusion.png the fronts; `--table` makes both anew.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grid import measure  # type: ignore[import-not-found]  # run as a script, so its folder is on the path

RESULTS = Path(__file__).parent / "results" / "diffusion.json"
KEY = ("task", "method", "strength", "seed")
TASKS = ("markovia/Digits-v0", "markovia/Mixture2D-v0")
KL_LIMIT = {"markovia/Digits-v0": 5.0, "markovia/Mixture2D-v0": 2.0}  # nats; the table gives the best reward below it
# Where a method's strength stands in its settings; the factors of `STRENGTHS` multiply what the presets have there.
TRAINED = {
    "ddpo": "divergence.beta",
    "ppo": "divergence.beta",
    "adjoint-matching": "lam",
    "diffusion-dpo": "loss.beta",
    "d3po": "loss.beta",
    "spo-step": "loss.beta",
    "se-ppo": "loss.beta",
    "rebel-diffusion": "loss.beta",
}
DECODED = {"rlg": (0.5, 1.0, 1.5, 2.0, 3.0), "fk-steering": (0.0, 0.5, 1.0, 2.0, 4.0, 7.0, 10.0, 15.0, 20.0)}  # w, lam
METHODS = (*TRAINED, *DECODED)
STRENGTHS = (0.3, 1.0, 3.0)
POINTS = 5
NUM_STEPS = 20  # of both tasks' chains
LOOKS = 4  # of fk-steering at its particles' clean estimates, a call of the network each
PENALTY = {"type": "KL", "estimator": "exact", "place": "loss", "beta": 0.1}  # of ddpo and ppo where the task's preset has none


class Meter:
    """Counts the samples that pass through a network and its copies, and can look away."""

    def __init__(self) -> None:
        self.count, self.counting = 0, True

    def attach(self, network: Any) -> None:
        """Copies made later count too: a hook is copied with its module."""
        network.register_forward_pre_hook(self._hook)

    def _hook(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.count += len(inputs[0]) if self.counting else 0

    def __deepcopy__(self, memo: Any) -> Meter:
        return self


def settings(task: str, method: str, factor: float, budget: int = 400_000) -> Any:
    """The presets' settings with the strength times `factor`; data that a method draws first may cost half the budget."""
    from markovia.algos.presets import configure, override

    value = configure(method, task)
    if method in ("ddpo", "ppo") and value.divergence is None:
        value = override(value, {"divergence": PENALTY})
    if method == "diffusion-dpo":
        value = override(value, {"source": {"num_pairs": max(1, min(value.source.num_pairs, budget // (4 * NUM_STEPS)))}})
    path = TRAINED[method].split(".")
    now: Any = value
    for name in path:
        now = getattr(now, name)
    changes: Any = factor * now
    for name in reversed(path):
        changes = {name: changes}
    return override(value, changes)


def prepared(task: str, value: Any, seed: int) -> tuple[Any, Any, Meter]:
    """(setup, driver, meter) of a run; what the driver spends on its own data is counted."""
    from markovia.algos.setup import build, make_driver

    meter, setup = Meter(), build(task, value, seed, env_kwargs={"final": "mid"})
    for network in (setup.task.network, setup.agent.net["policy"]):
        meter.attach(network)
    return setup, make_driver(value, setup, seed), meter


def affordable(task: str, value: Any, seed: int, budget: int) -> int:
    """How many chains (num_env_steps) the budget pays, from what the first iteration costs."""
    _, driver, meter = prepared(task, value, seed)
    own = meter.count
    driver.step()
    each = (meter.count - own) / driver.num_env_steps
    return max(driver.num_env_steps, int((budget - own) / each))


def measured(setup: Any, agent: Any, data: Any, n: int, seed: int = 12345) -> dict[str, float]:
    """Reward, judge, KL, diversity and distance to the data of n samples."""
    import torch

    from markovia.algos.denoising.measure import describe
    from markovia.algos.setup import sample_sequences

    with torch.no_grad():
        return describe(agent, setup.task, sample_sequences(agent, setup.task, n, seed), data)


def trained(task: str, method: str, factor: float, seed: int, budget: int, n: int) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """(setup, data, point) at equal parts of a run that spends the budget."""
    from markovia.algos.denoising.measure import real_samples
    from markovia.algos.presets import override

    value = settings(task, method, factor, budget)
    value = override(value, {"num_env_steps": affordable(task, value, seed, budget)})
    setup, driver, meter = prepared(task, value, seed)
    data, part = real_samples(setup.agent, setup.task, seed), 0
    while not driver.finished:
        driver.step()
        if driver.finished or int(POINTS * driver.progress) > part:
            part = int(POINTS * driver.progress)
            meter.counting = False
            yield setup, data, {"evaluations": meter.count, "chains": driver.num_env_steps, **measured(setup, setup.agent, data, n)}
            meter.counting = True


def guided(task: str, seed: int, budget: int, n: int) -> list[dict[str, Any]]:
    """rlg: adjoint matching to the end of the budget, then each w."""
    import copy

    from torch import nn

    from markovia.envs.denoising.networks import extrapolate

    class Beyond(nn.Module):
        """The start's output, and w times the way to the tuned one."""

        def __init__(self, start: nn.Module, tuned: nn.Module, scale: float) -> None:
            super().__init__()
            self.start, self.tuned, self.scale = start, tuned, scale

        def forward(self, x: Any, timestep: Any, cond: Any = None) -> Any:
            return extrapolate(self.start(x, timestep, cond), self.tuned(x, timestep, cond), self.scale)

    *_, (setup, data, last) = trained(task, "adjoint-matching", 1.0, seed, budget, n)
    points = []
    for w in DECODED["rlg"]:
        agent = copy.copy(setup.agent)
        agent.net = nn.ModuleDict({"policy": Beyond(setup.task.network, setup.agent.net["policy"], w)})
        points.append({"scale": w, "evaluations": last["evaluations"], **measured(setup, agent, data, n)})
    return points


def steered(task: str, particles: int, seed: int, n: int) -> list[dict[str, Any]]:
    """fk-steering with so many particles: one sample drawn from each of n populations, for each lam."""
    from markovia.algos.denoising.measure import diversity, nearest, real_samples
    from markovia.algos.denoising.particles import FKSteering
    from markovia.algos.streams import stream

    setup, _, _ = prepared(task, settings(task, "adjoint-matching", 1.0), seed)
    data, points = real_samples(setup.agent, setup.task, seed), []
    for lam in DECODED["fk-steering"]:
        found = FKSteering(num_particles=particles, lam=lam).sample(setup.task, n, stream(seed, "steer"))
        x = found.draw(stream(seed, "draw"))["x"]
        judged = {} if setup.task.judge is None else {"sample_judge": setup.task.judged(x).mean()}
        values = {
            "sample_return": setup.task.rewards(x).mean(), "kl_nats": 0.0, **judged,
            "diversity": diversity(x, data), "nearest_data": nearest(x, data),
        }  # fmt: skip
        points.append({"scale": lam, "evaluations": 0, **{k: float(v) for k, v in values.items()}})
    log_z = 0.0  # d log Z/d lam = E r: an integral over the sweep has far less noise than the particles' own weights
    for before, now in itertools.pairwise(points):
        log_z += 0.5 * (now["scale"] - before["scale"]) * (now["sample_return"] + before["sample_return"])
        now["kl_nats"] = now["scale"] * now["sample_return"] - log_z
    return points[1:]


def cell(task: str, method: str, strength: float, seed: int, budget: int, n: int) -> dict[str, Any]:
    """One cell; `strength` multiplies that of the presets, and is the number of particles for fk-steering."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    if method == "rlg":
        points = guided(task, seed, budget, n)
    elif method == "fk-steering":
        points = steered(task, int(strength), seed, n)
    else:
        points = [point for _, _, point in trained(task, method, strength, seed, budget, n)]
    head = {"task": task, "method": method, "strength": strength, "seed": seed, "budget": budget, "samples": n}
    return {**head, "seconds": round(time.perf_counter() - began, 1), "points": points}


def entries(args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """Every cell with budget and samples; first each method with the strength of its presets, so that a grid stopped early has all of them."""
    others = {"rlg": (), "fk-steering": (16.0,)}
    first = {"fk-steering": 4.0}
    for seed, turn, task, method in itertools.product(args.seeds, range(len(STRENGTHS)), args.tasks, args.methods):
        strengths = (first.get(method, 1.0), *others.get(method, [s for s in STRENGTHS if s != 1.0]))
        if turn < len(strengths):
            yield task, method, strengths[turn], seed, args.budget, args.samples


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Cells by task and method; fk-steering by its number of particles too."""
    out: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in sorted(rows, key=lambda r: (TASKS.index(r["task"]), METHODS.index(r["method"]), r["strength"], r["seed"])):
        name = f"fk-steering, {r['strength']:.0f} particles" if r["method"] == "fk-steering" else r["method"]
        out.setdefault((r["task"], name), []).append(r)
    return out


def front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other beats in both reward and KL, by KL."""
    best, out = -math.inf, []
    for p in sorted(points, key=lambda p: (p["kl_nats"], -p["sample_return"])):
        if p["sample_return"] > best:
            best = p["sample_return"]
            out.append(p)
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the end of the run with the strength of the presets, and the best reward below a KL, over all strengths."""
    import numpy as np

    lines = [
        f"Budget {rows[0]['budget']:,} network evaluations a run; {rows[0]['samples']} samples a point; mean over seeds. At the end of the run, "
        "strength of the presets (rlg: w = 2; fk-steering: lam = 10, evaluations of one sample). `best`: highest reward at a KL of at most "
        + ", ".join(f"{limit:g} nats ({task.removeprefix('markovia/')})" for task, limit in KL_LIMIT.items()) + ", any strength and point.",
        "",
        "| task | method | seeds | evaluations | reward | KL, nats | judge | diversity | distance to data | best | seconds a run |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (task, name), members in groups(rows).items():
        usual = [m for m in members if m["strength"] == 1.0] or members
        scale = {"rlg": 2.0}.get(name, 10.0 if name.startswith("fk") else None)
        ends = [m["points"][-1] if scale is None else next(p for p in m["points"] if p["scale"] == scale) for m in usual]
        mean = lambda key: float(np.mean([p[key] for p in ends]))  # noqa: B023, E731
        low = {seed: [p["sample_return"] for m in members if m["seed"] == seed for p in m["points"] if p["kl_nats"] <= KL_LIMIT[task]]
               for seed in {m["seed"] for m in members}}  # fmt: skip
        below = [max(values) for values in low.values() if values]
        paid = (NUM_STEPS + LOOKS) * usual[0]["strength"] if name.startswith("fk") else mean("evaluations")
        best = f"{np.mean(below):.3f}" if below else "none"
        judge = f"{mean('sample_judge'):.3f}" if "sample_judge" in ends[0] else ""
        lines.append(
            f"| {task.removeprefix('markovia/')} | {name} | {len({m['seed'] for m in members})} | {paid:,.0f} | {mean('sample_return'):.3f} "
            f"| {mean('kl_nats'):.2f} | {judge} | {mean('diversity'):.2f} | {mean('nearest_data'):.2f} | {best} "
            f"| {np.mean([m['seconds'] for m in members]):.0f} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], out: Path) -> None:
    """A panel per task: every measured point, and each method's front as a line; hollow where the KL is that of a limit."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = groups(rows)
    tasks = [t for t in TASKS if any(task == t for task, _ in found)]
    names = list(dict.fromkeys(name for _, name in found))
    figure = Figure(figsize=(6.8 * len(tasks), 5.4), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for (task, name), members in found.items():
        ax, colour = axes[tasks.index(task)], colormaps["tab20"](names.index(name) / 20 + 0.01)
        points = [p for m in members for p in m["points"]]
        hollow = name.startswith("fk")
        ax.scatter([p["kl_nats"] for p in points], [p["sample_return"] for p in points], s=9, alpha=0.35, color=colour, linewidths=0)
        line = front(points)
        ax.plot(
            [p["kl_nats"] for p in line], [p["sample_return"] for p in line], label=name, color=colour, linewidth=1.5, marker="o", markersize=4,
            markerfacecolor="white" if hollow else colour, linestyle="--" if hollow or name == "rlg" else "-",
        )  # fmt: skip
    for ax, task in zip(axes, tasks, strict=True):
        ax.set(title=task.removeprefix("markovia/"), xlabel="KL to the start, nats", ylabel="mean reward", xscale="log")
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_xlim(left=0.05)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)


def told(found: dict[str, Any]) -> str:
    """A line about a finished cell."""
    last = found["points"][-1]
    name = f"{found['task']} {found['method']} x {found['strength']:g} seed {found['seed']}"
    return f"{name}: reward {last['sample_return']:.3f} at {last['kl_nats']:.2f} nats in {found['seconds']} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="default all")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default 0 1")
    parser.add_argument("--budget", type=int, default=400_000, help="network evaluations of a run (default 400,000)")
    parser.add_argument("--samples", type=int, default=1000, help="samples of a point (default 1000)")
    parser.add_argument("--table", action="store_true", help="only make table and picture from what has been measured")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results, one entry per cell; table and picture are written beside it")
    args = parser.parse_args()
    measure(cell, () if args.table else entries(args), jobs=args.jobs, out=args.out, told=told, table=table, picture=picture, key=KEY)


if __name__ == "__main__":
    main()
