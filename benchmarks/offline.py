"""Scores of the offline methods, one process per (dataset, method, seed), resumable: `python benchmarks/offline.py --seeds 0 1 2`.

Recorded sets that are not on this machine yet are made first, by the recipes of `markovia collect`, and stay in Minari's own folder; a collection
that was killed goes on. Tasks are recorded --jobs at a time, and the MAIN methods run on their sets before the next ones are recorded; at the end
come the fixtures, and OTHERS on the first set. The first cells of all are MAIN on the medium-replay set of the first task, which decide whether
offline methods beat cloning. Each cell is an ordinary run folder under --runs with the presets of the command line and --steps updates on recorded
sets; what is in the results already is not run again. Recordings of two machines differ, because training does: results of another recording of a
set are refused, and a grid of one's own set wants --out and --runs of its own. offline_second.json is such a grid, of a second
recording of Hopper and one of HalfCheetah; offline_pendulum.json and offline_pendulum_second.json are of two recordings of Pendulum's medium-replay,
with `--steps 20000`, its presets' number.

A score is 0 at the mean return of the random tier and 100 at that of the expert tier. benchmarks/results/offline.json holds every cell: returns of 10
greedy episodes after training (last) and at each checkpoint (the best of them is told apart). offline.md is the table; `--table` makes it anew.

How long it takes on one of two busy cores of an EPYC of 2024, in minutes: recording Hopper or HalfCheetah 60 (500k steps of SAC and 100 evaluations),
Pendulum 3; 100k updates of bc 2, td3-bc 8, iql 11, rebrac 50 (its batch is 1024 and its networks are deeper). So after the first recording the 12
deciding cells take 3.5 hours of a core, MAIN on all nine sets 30. `--recipe '{"num_env_steps": 300000}'` records sooner, with a weaker best policy as
100, where nothing is recorded yet; medium-replay is training up to the medium policy, be it 55k steps, and where it took longer about 100k of them
in whole episodes drawn evenly. On a Xeon at 2.5 GHz without matrix units, both cores busy: recording by 300k steps 68, 100k updates of bc and
filtered-bc 3, td3-bc 12, mcep 16, iql 17, mcep/awac 22, awac 30, spot 36, rebrac 84, rebrac+batch-256 23.
20k updates on Pendulum, on an EPYC with AVX2 alone: bc and filtered-bc 1, td3-bc 3, iql 4, awac 7, decision-transformer 39, cql and cql/cal-ql 75;
recording it 2.
`--tiers medium-replay` leaves the other tiers' cells out.

`--again 100` trains nothing: it takes the last policy of every cell in --out whose run folder lies under --runs through so many more episodes, and
writes their mean score beside that of the ten, which vary much where a policy falls.

`--methods rebrac+batch-256` runs ReBRAC with td3-bc's batch in place of its own, in under a third of the time, as a row of its own.

`--tasks` with nothing after it records nothing and runs the fixtures alone, 5 to 80 s a cell, decision-transformer 400.

`--d4rl FILE.hdf5 ...` runs the same on D4RL files, scored by D4RL's references and evaluated in Gymnasium's v4 task; published numbers stand beside.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from grid import Cell, arguments, cells, folder, measure, over_seeds, record, settings_of, train_cell, workers  # type: ignore[import-not-found]  # run as a script

RESULTS = Path(__file__).parent / "results" / "offline.json"
PUBLISHED = Path(__file__).parent / "published_offline.json"
TASKS = ["Hopper-v5", "HalfCheetah-v5", "Pendulum-v1"]
TIERS = ("medium-replay", "medium", "medium-expert")
MAIN = ["bc", "td3-bc", "iql", "rebrac"]
OTHERS = [
    "filtered-bc", "awac", "cql", "cql/cal-ql", "edac", "edac/sac-n", "spot", "a2pr", "mcep", "mcep/awac", "cfpi", "cfpi/sg", "decision-transformer",
]  # fmt: skip
# Rows of a method with other settings, which only --methods asks for: ReBRAC with the batch that td3-bc and iql have
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"rebrac+batch-256": ("rebrac", {"batch_size": 256})}
FIXTURES = {f"fixture:pointmass2d/{tier}": "markovia/PointMass2D-v0" for tier in ("medium", "mix", "blend")}
KEY = ("dataset", "method", "seed")
COLUMNS = (
    "dataset", "mean of the data", "method", "updates", "last: mean ± std", "of each seed", "IQM", "95 % interval", "above bc", "best",
    "over more episodes", "above bc", "minutes a seed", "published",
)  # fmt: skip
UPDATES = 100_000
AGAIN_SEED = 2000  # of more episodes; those after training have another
D4RL_TASKS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
# (weight in the actor, penalty in the target) of ReBRAC, as published for D4RL's tiers                                          [arXiv 2305.09836]
REBRAC = {
    ("hopper", "medium"): (0.01, 0.01), ("hopper", "medium-replay"): (0.05, 0.5), ("hopper", "medium-expert"): (0.1, 0.01),
    ("halfcheetah", "medium"): (0.001, 0.01), ("halfcheetah", "medium-replay"): (0.01, 0.001), ("halfcheetah", "medium-expert"): (0.01, 0.1),
    ("walker2d", "medium"): (0.05, 0.1), ("walker2d", "medium-replay"): (0.05, 0.01), ("walker2d", "medium-expert"): (0.01, 0.01),
}  # fmt: skip
# Weight of SPOT's bound, as in its authors' configurations for D4RL's tiers                                                      [arXiv 2202.06239]
SPOT = {
    ("hopper", "medium"): 0.1, ("hopper", "medium-replay"): 0.1, ("hopper", "medium-expert"): 0.2,
    ("halfcheetah", "medium"): 0.05, ("halfcheetah", "medium-replay"): 0.05, ("halfcheetah", "medium-expert"): 1.0,
    ("walker2d", "medium"): 0.2, ("walker2d", "medium-replay"): 0.2, ("walker2d", "medium-expert"): 0.5,
}  # fmt: skip
# The larger of the two returns that Decision Transformer is asked for on D4RL's tiers                                            [arXiv 2106.01345]
TARGET_RETURN = {"hopper": 3600.0, "halfcheetah": 12000.0, "walker2d": 5000.0}
# Critics of EDAC and SAC-N, as in CORL's runs on D4RL's tiers; ten elsewhere                                                      [arXiv 2110.01548]
NUM_CRITICS = {
    ("hopper", "medium"): (50, 500), ("hopper", "medium-replay"): (50, 200), ("hopper", "medium-expert"): (50, 200),
    ("walker2d", "medium"): (10, 20), ("walker2d", "medium-replay"): (10, 20), ("walker2d", "medium-expert"): (10, 20),
}  # fmt: skip

# What CORL's runs on D4RL's tiers have otherwise than the rest of theirs; its other runs of IQL and CQL leave rewards as they are
_DETERMINISTIC: dict[str, Any] = {"policy": {"type": "Deterministic"}, "polyak": 0.001}
CORL: dict[tuple[str, str, str], dict[str, Any]] = {
    ("iql", "hopper", "medium"): _DETERMINISTIC, ("iql", "hopper", "medium-replay"): _DETERMINISTIC,
    ("iql", "hopper", "medium-expert"): {"value": {"tau": 0.5}, "actor": {"beta": 6.0}, "data": {"reward": "none"}},
    ("cql", "hopper", "medium"): {"data": {"reward": "return_range"}},
}  # fmt: skip


def _is_file(dataset: str) -> bool:
    return dataset.endswith((".hdf5", ".h5"))


def parts_of(dataset: str) -> tuple[str, str] | None:
    """(hopper, medium-replay) of markovia/hopper/medium-replay-v0 or of a file hopper_medium_replay-v2.hdf5; None for anything else."""
    stem = Path(dataset).stem.replace("_", "-") if _is_file(dataset) else dataset.replace("/", "-")
    found = re.search(r"(hopper|halfcheetah|walker2d)-(medium-replay|medium-expert|medium)-v\d+$", stem)
    return (found[1], found[2]) if found else None


def settings(method: str, dataset: str, updates: int | None) -> dict[str, Any]:
    """What a cell changes in the presets: the budget, SPOT's model in its first tenth beside it, ReBRAC's and SPOT's weights by tier.

    On D4RL files also the return that Decision Transformer is asked for, EDAC's ensembles and weights by task, and what CORL's scores of IQL and CQL
    have otherwise than the presets; recorded sets keep ten critics, because fifty take a core some hours a cell.
    """
    changes: dict[str, Any] = {}
    if updates is not None:
        before = max(1, updates // 10) if method == "spot" else 0
        changes = {"num_env_steps": updates + before, "num_steps": min(1000, updates)}
        changes |= {"behaviour": {"steps": before}} if before else {}
    parts = parts_of(dataset)
    if method == "rebrac" and parts in REBRAC:
        weight, penalty = REBRAC[parts]
        changes |= {"actor": {"weight": weight}, "target": {"penalty": penalty}}
    if method == "spot" and parts in SPOT:
        changes |= {"actor": {"weight": SPOT[parts]}}
    if _is_file(dataset) and parts is not None and method == "decision-transformer":
        changes |= {"target_return": TARGET_RETURN[parts[0]]}
    if _is_file(dataset) and parts is not None and method in ("edac", "edac/sac-n"):
        changes |= {"critic": {"num": NUM_CRITICS.get(parts, (10, 10))[method == "edac/sac-n"]}}
        if method == "edac" and parts[1] == "medium-expert" and parts[0] != "hopper":
            changes |= {"regulariser": {"eta": 5.0}}
    if _is_file(dataset) and parts is not None and (method, *parts) in CORL:
        changes |= CORL[method, *parts]
    elif _is_file(dataset) and parts is not None and method == "iql":
        changes |= {"data": {"reward": "none"}}
    return changes


def _variant(method: str, dataset: str, updates: int | None) -> tuple[str, dict[str, Any]]:
    """The row that a name of the grid stands for, and what a cell changes in its presets."""
    name, changes = VARIANTS.get(method, (method, {}))
    return name, settings(name, dataset, updates) | changes


@cache
def scale_of(dataset: str) -> dict[str, Any]:
    """The returns that count as 0 and 100: means of the random and the expert tier beside the set, else what the set itself refers to."""
    from markovia.envs.offline import load
    from markovia.envs.offline.minari_io import dataset_root

    beside = re.fullmatch(r"(.+/)[\w-]+-v\d+", dataset)
    ends = [f"{beside[1]}{tier}-v0" for tier in ("random", "expert")] if beside and not dataset.startswith("fixture:") else []
    if ends and all((dataset_root() / e).is_dir() for e in ends):
        low, high = (float(load(e).returns().mean()) for e in ends)
        return {"minimum": low, "maximum": high, "source": "mean returns of the random and the expert tier"}
    reference = load(dataset).about.reference
    if reference is None:
        raise ValueError(f"nothing says which returns count as 0 and 100 for {dataset}; record its random and expert tiers too")
    return {"minimum": reference.minimum, "maximum": reference.maximum, "source": reference.source}


def score(dataset: str, mean_return: float) -> float:
    """A mean return on the set's scale."""
    scale = scale_of(dataset)
    return 100.0 * (mean_return - scale["minimum"]) / (scale["maximum"] - scale["minimum"])


@cache
def data_score(dataset: str) -> float:
    """The mean score of the episodes in the set."""
    from markovia.envs.offline import load

    return score(dataset, float(load(dataset).returns().mean()))


def check_recordings(rows: list[Cell], datasets: Iterable[str]) -> None:
    """Raises SystemExit where results belong to another recording of a set than this machine has (side by side they would compare different data), or
    the set is missing."""
    told = {r["dataset"]: r["data_score"] for r in rows}
    for dataset in dict.fromkeys(d for d in datasets if d in told):
        try:
            here = data_score(dataset)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        if not math.isclose(told[dataset], here, rel_tol=1e-6):
            raise SystemExit(
                f"the results are of another recording of {dataset} (mean score {told[dataset]:.3f}, here {here:.3f}): use other --out and --runs"
            )


def run_of(dataset: str, method: str, seed: int, runs: Path) -> Path:
    """Where the run of a cell lies."""
    return folder(runs, re.sub(r"[^\w.-]+", "-", dataset), method, seed)


def cell(dataset: str, method: str, seed: int, task: str, updates: int | None, runs: Path) -> Cell:
    """Train one cell and put it on the scale of its tiers."""
    name, changes = _variant(method, dataset, updates)
    found = train_cell(task, name, seed, run_of(dataset, method, seed, runs), changes, dataset=dataset)
    evaluation = found["done"]["evaluation"]
    return {
        **found,
        "dataset": dataset,
        "method": method,
        "scale": scale_of(dataset),
        "data_score": data_score(dataset),
        "last": score(dataset, evaluation["mean"]),
        "best": score(dataset, found["done"]["best_eval_return"]),
        "scores": [score(dataset, r) for r in evaluation["returns"]],
    }


def _asked(dataset: str, method: str, seed: int, task: str, updates: int | None, runs: Path) -> Cell:
    """The settings that a cell asks for."""
    name, changes = _variant(method, dataset, updates)
    found: Cell = settings_of(name, task, changes)
    return found


def again(found: Cell, episodes: int, runs: Path) -> Cell:
    """The cell with the mean score of `episodes` more greedy episodes of its last policy, and the standard error of that mean.

    Raises ValueError where its folder holds another run than the cell was made of.
    """
    import numpy as np
    import torch

    from markovia.loaded import load_run
    from markovia.rundir import read_json

    torch.set_num_threads(1)
    run = run_of(found["dataset"], found["method"], found["seed"], runs)
    if read_json(run / "done.json")["evaluation"]["returns"] != found["done"]["evaluation"]["returns"]:
        raise ValueError(f"{run} ended with other returns than the results tell; it is another run")
    loaded = load_run(run)
    returns = np.asarray(loaded.evaluate(loaded.agent, episodes, AGAIN_SEED)["returns"])
    low, high = found["scale"]["minimum"], found["scale"]["maximum"]
    scores = 100.0 * (returns - low) / (high - low)
    return {**found, "again": {"episodes": episodes, "mean": float(scores.mean()), "error": float(scores.std(ddof=1) / len(scores) ** 0.5)}}


def all_again(out: Path, episodes: int, runs: Path, jobs: int) -> None:
    """`again` for every cell of the results that does not tell as many episodes yet and whose run is there; each lands as it ends."""
    left = [r for r in cells(out) if r.get("again", {}).get("episodes", 0) < episodes]
    there = [r for r in left if run_of(r["dataset"], r["method"], r["seed"], runs).is_dir()]
    if len(there) < len(left):
        print(f"{len(left) - len(there)} of {len(left)} cells have no run under {runs} and are left as they are", flush=True)
    with workers(jobs) as pool:
        for found in pool.map(again, there, itertools.repeat(episodes), itertools.repeat(runs)):
            record(found, out, KEY)
            more = found["again"]
            print(f"{told(found)}; {episodes} more episodes: {more['mean']:.1f} ± {more['error']:.1f}", flush=True)


def told(found: Cell) -> str:
    """One line on a cell that has ended."""
    return f"{found['dataset']} {found['method']} seed {found['seed']}: last {found['last']:.1f}, best {found['best']:.1f} ({found['seconds']:.0f} s)"


def groups(rows: list[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells by dataset and method, in the order of the grid."""
    order = [*MAIN, *VARIANTS, *OTHERS]
    out: dict[tuple[str, str], list[Cell]] = {}
    for r in sorted(rows, key=lambda r: (r["dataset"], order.index(r["method"]) if r["method"] in order else 99, r["method"], r["seed"])):
        out.setdefault((r["dataset"], r["method"]), []).append(r)
    return out


def table(rows: list[Cell]) -> str:
    """Markdown: last and best score over seeds, every seed, the gain on behavioural cloning; published numbers where the data are D4RL's."""
    published = json.loads(PUBLISHED.read_text())
    found = groups(rows)
    cloned = {dataset: over_seeds([m["last"] for m in members])["mean"] for (dataset, method), members in found.items() if method == "bc"}
    longer = {place: [m["again"]["mean"] for m in members] for place, members in found.items() if all("again" in m for m in members)}
    lines = [
        "Scores of 10 greedy episodes: 0 is the mean return of the random tier, 100 that of the expert tier (D4RL files: D4RL's references).",
        "Last is after the last update, best the best of its checkpoints, which nobody knows without the task itself.",
        "More episodes are other ones of the last policy, by `--again`: their mean over seeds, in brackets that of each seed and how many each has.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for (dataset, method), members in found.items():
        last = over_seeds([m["last"] for m in members])
        best = over_seeds([m["best"] for m in members])["mean"]
        gain = f"{last['mean'] - cloned[dataset]:+.1f}" if dataset in cloned and method != "bc" else ""
        more = over = ""
        if (dataset, method) in longer:
            means, count = longer[dataset, method], min(m["again"]["episodes"] for m in members)
            mean = sum(means) / len(means)
            more = f"{mean:.1f} ({', '.join(format(x, '.1f') for x in means)}; {count})"
            if method != "bc" and (dataset, "bc") in longer:
                over = f"{mean - sum(longer[dataset, 'bc']) / len(longer[dataset, 'bc']):+.1f}"
        is_file = _is_file(dataset)
        name = Path(dataset).stem.replace("_", "-") if is_file else ""
        beside = "; ".join(
            f"{'best ' if t.get('best') else ''}{t['scores'][name][method]}" for t in published["tables"] if method in t["scores"].get(name, {})
        )
        each, minutes = ", ".join(format(m["last"], ".1f") for m in members), over_seeds([m["seconds"] for m in members])["mean"] / 60.0
        lines.append(
            f"| {Path(dataset).name if is_file else dataset} | {members[0]['data_score']:.1f} | {method} "
            f"| {min(m['done']['num_env_steps'] for m in members):,} "
            f"| {last['mean']:.1f} ± {last['std']:.1f} | {each} | {last['iqm']:.1f} | {last['low']:.1f} to {last['high']:.1f} | {gain} "
            f"| {best:.1f} | {more} | {over} | {minutes:.1f} | {beside} |"
        )
    lines += ["", "## Published", "", published["note"]]
    for t in published["tables"]:
        methods = list(next(iter(t["scores"].values())))
        lines += ["", t["source"], "", f"| dataset | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(scores[m] for m in methods)} |" for name, scores in t["scores"].items()]
    return "\n".join(lines) + "\n"


def make_sets(task: str, seed: int, namespace: str, runs: Path, changes: dict[str, Any], asked: Sequence[str] = TIERS) -> list[str]:
    """Ids of the task's sets that are asked for; where any tier is not on this machine, it is recorded into Minari's folder, after training where the
    recipe trains."""
    import torch

    from markovia.collect import collect
    from markovia.envs.offline.minari_io import dataset_root
    from markovia.envs.offline.sources import tier_id
    from markovia.recipes import recipe

    torch.set_num_threads(1)  # the same numbers however many are recorded side by side
    tiers = ("random", "expert", *TIERS)
    ids = {tier: tier_id(task, tier, namespace) for tier in tiers}
    if not all((dataset_root() / i).is_dir() for i in ids.values()):
        work = runs / "collect" / f"{task}-seed{seed}"
        begun = (work / "collect.json").is_file()
        collect(recipe(task, **changes), seed=seed, out=work, resume=begun, tiers=tiers, namespace=namespace, progress=False)
    return [ids[tier] for tier in asked]


def plan(
    sets: dict[str, str], seeds: list[int], main: list[str], others: list[str], steps: int | None, fixtures: dict[str, str] = FIXTURES
) -> list[tuple[Any, ...]]:
    """(dataset, method, seed, task, updates), the most important first; `sets` and `fixtures` give the task of each.

    1. `main` on the first set   2. `main` on the other sets   3. everything on the fixtures   4. `others` on the first set. Within each, all cells
    of one seed come before those of the next, and those of one set before those of the next.
    """
    updates, first = UPDATES if steps is None else steps, dict(list(sets.items())[:1])
    rest = {d: t for d, t in sets.items() if d not in first}
    blocks = ((first, main, updates), (rest, main, updates), (fixtures, [*main, *others], steps), (first, others, updates))
    return [(d, m, s, t, u) for place, methods, u in blocks for s, (d, t), m in itertools.product(seeds, place.items(), methods)]


def recorded(tasks: list[str], args: argparse.Namespace) -> dict[str, str]:
    """Ids of the tasks' sets and their tasks; what is missing is recorded, side by side."""
    with workers(args.jobs) as pool:
        jobs = [(task, pool.submit(make_sets, task, 0, args.namespace, args.runs, args.recipe, args.tiers)) for task in tasks]
        return {dataset: task for task, job in jobs for dataset in job.result()}


def main() -> None:
    from markovia.envs.offline.sources import tier_id

    parser = arguments(__doc__, tasks=TASKS, methods=[*MAIN, *OTHERS], runs="runs/offline", out=RESULTS)
    parser.add_argument("--d4rl", nargs="+", metavar="FILE", help="D4RL files; nothing else is run then")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS), help=f"of the recorded sets (default {' '.join(TIERS)})")
    parser.add_argument("--no-fixtures", dest="fixtures", action="store_false", help="leave the fixtures out")
    parser.add_argument("--no-collect", dest="collect", action="store_false", help="stop where a set is missing, in place of recording it")
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON object of changes to the recipes, e.g. '{\"num_steps\": 1000}'")
    parser.add_argument("--again", type=int, metavar="EPISODES", help="only take what has been trained through so many more episodes")
    parser.add_argument("--namespace", default="markovia", help="first part of the sets' ids (default markovia)")
    args = parser.parse_args()
    main_methods, others = ([m for m in args.methods if m in group] for group in ((*MAIN, *VARIANTS), OTHERS))
    others += [m for m in args.methods if m not in (*MAIN, *VARIANTS, *OTHERS)]
    fixtures = FIXTURES if args.fixtures else {}

    def run(grid: list[tuple[Any, ...]]) -> None:
        check_recordings(cells(args.out), (entry[0] for entry in grid))
        measure(cell, [(*entry, args.runs) for entry in grid], jobs=args.jobs, out=args.out, told=told, table=table, key=KEY, asked=_asked)

    if args.again is not None and args.again < 2:
        parser.error(f"--again {args.again}: a mean and its error take two episodes or more")
    if args.again is not None:
        all_again(args.out, args.again, args.runs, args.jobs)
    if args.table or args.again is not None:
        run([])
    elif args.d4rl:
        known = {f: parts_of(f) for f in args.d4rl}
        if strange := [f for f, p in known.items() if p is None]:
            parser.error(f"{strange[0]} is not named like a D4RL locomotion file, e.g. hopper_medium_replay-v2.hdf5")
        tasks = {f: D4RL_TASKS[p[0]] for f, p in known.items() if p is not None}
        run(plan(tasks, args.seeds, args.methods, [], args.steps, {}))
    else:
        sets: dict[str, str] = {}
        for k in range(0, len(args.tasks), args.jobs):
            now = args.tasks[k : k + args.jobs]
            sets |= recorded(now, args) if args.collect else {tier_id(t, tier, args.namespace): t for t in now for tier in args.tiers}
            run(plan(sets, args.seeds, main_methods, [], args.steps, {}))
        run(plan(sets, args.seeds, main_methods, others, args.steps, fixtures))


if __name__ == "__main__":
    main()
