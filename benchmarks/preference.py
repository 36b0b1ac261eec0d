"""What preference losses do, measured; resumable, one cell after another: `python benchmarks/preference.py --studies equal-kl displacement`.

    equal-kl      every loss of one round on four test beds, where its policy has a given KL to the reference: KL to the known optimum, win rate,
                  displacement (minutes)
    displacement  chosen and rejected log-probs along training on a token tree with shared parameters, SquaredPO beside others (a minute)
    sentiment     SmolLM2 on pairs that VADER labels: DPO and SquaredPO (about 10 minutes a cell on two cores)
    human         DPO with adapters on human preferences: `--data hh-harmless-test.jsonl.gz` (an hour on two cores)
    speed         pairs per second and peak memory against TRL's DPOTrainer (half an hour on two cores)

Cells land in benchmarks/results/preference.json as each ends, and cells that are there are not run again; preference.md beside it has the tables,
preference_*.png the pictures. `--table` makes both anew without running anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "preference.json"
Cell = dict[str, Any]
BEDS = ("bandit", "tree", "game", "sequences")


# -- studies: the cells of each, and how one is measured -------------------------------------------------------------------------------------


def equal_kl_cells(args: argparse.Namespace) -> list[Cell]:
    from preference_exact import methods

    seeds = {bed: args.seeds or (0, 1, 2) if bed == "sequences" else [0] for bed in BEDS}  # the others are exact
    return [{"bed": bed, "method": m, "seed": s} for bed in args.beds for m in args.methods or methods() for s in seeds[bed]]


def equal_kl(cell: Cell, args: argparse.Namespace) -> Cell:
    from preference_exact import BEDS as EXACT
    from preference_exact import equal_kl as measure
    from preference_sampled import letters

    return letters(cell["method"], cell["seed"]) if cell["bed"] == "sequences" else measure(EXACT[cell["bed"]](), cell["method"])


def displacement_cells(args: argparse.Namespace) -> list[Cell]:
    from preference_sampled import DISPLACEMENT

    return [{"method": m, "seed": s} for m in args.methods or DISPLACEMENT for s in args.seeds or range(8)]


def displacement(cell: Cell, args: argparse.Namespace) -> Cell:
    from preference_sampled import tree_displacement

    return tree_displacement(cell["method"], cell["seed"])


def sentiment_cells(args: argparse.Namespace) -> list[Cell]:
    return [{"method": m, "seed": s} for m in args.methods or ("dpo", "squared-po") for s in args.seeds or (0,)]


def sentiment(cell: Cell, args: argparse.Namespace) -> Cell:
    from markovia.claims.preference_sentiment import sentiment_run

    changes = {k: v for k, v in {"steps": args.steps, "lr": args.lr, "beta": args.beta}.items() if v is not None}
    return sentiment_run(cell["method"], cell["seed"], **changes)


def human_cells(args: argparse.Namespace) -> list[Cell]:
    return [{"method": "dpo", "seed": s} for s in args.seeds or (0,)] if args.data else []


def human(cell: Cell, args: argparse.Namespace) -> Cell:
    from preference_text import human_run

    changes = {k: v for k, v in {"train_pairs": args.pairs, "held_out": args.held_out, "lr": args.lr, "beta": args.beta}.items() if v is not None}
    return human_run(args.data, args.runs, cell["seed"], **changes)


def speed_cells(args: argparse.Namespace) -> list[Cell]:
    from preference_speed import COMPARISONS

    return [{"comparison": name} for name in args.comparisons or COMPARISONS]


def speed(cell: Cell, args: argparse.Namespace) -> Cell:
    from preference_speed import measure

    return measure(cell["comparison"], args.steps or 6, args.turns, args.threads)


STUDIES: dict[str, tuple[Callable[[argparse.Namespace], list[Cell]], Callable[[Cell, argparse.Namespace], Cell]]] = {
    "equal-kl": (equal_kl_cells, equal_kl),
    "displacement": (displacement_cells, displacement),
    "sentiment": (sentiment_cells, sentiment),
    "human": (human_cells, human),
    "speed": (speed_cells, speed),
}


def load(path: Path) -> dict[str, list[Cell]]:
    """Cells by study."""
    return json.loads(path.read_text()) if path.is_file() else {}


def record(study: str, cell: Cell, path: Path) -> None:
    """Add one cell to the results."""
    found = load(path)
    found.setdefault(study, []).append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rounded(found), separators=(",", ":")).replace('},{"', '},\n{"') + "\n")
    os.replace(temporary, path)


def rounded(x: Any) -> Any:
    """Numbers to five digits after the point."""
    if isinstance(x, float):
        return round(x, 5)
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else x


# -- tables ----------------------------------------------------------------------------------------------------------------------------------


def mean(rows: list[Cell], key: str) -> float:
    return statistics.fmean(r[key] for r in rows)


def by_method(rows: list[Cell]) -> dict[str, list[Cell]]:
    """Cells by method, seeds together."""
    out: dict[str, list[Cell]] = {}
    for r in rows:
        out.setdefault(r["method"], []).append(r)
    return out


def equal_kl_table(rows: list[Cell]) -> list[str]:
    from preference_exact import LEFT_OUT

    grid = {bed: by_method([r for r in rows if r["bed"] == bed]) for bed in BEDS}
    lines = [
        "## Every loss at equal KL to the reference", "",
        "Compared where KL(policy || reference) is 0.5 nats (bandit), 1 (tree), 0.1 (game), 3 (sequences, mean of its seeds). A cell: KL to the "
        "optimum of that KL, nats / win rate against the reference, % / mean log-ratio of chosen responses, nats. Losses of the first three beds are "
        "population means with their strength tuned; *n*: descent stopped where it passed, after so many steps; †: never gets there, its end is "
        "told. On bandit and game a response is one decision, so sums and means agree.", "",
        "| method | " + " | ".join(BEDS) + " |", "|---|" + "---|" * len(BEDS),
    ]  # fmt: skip
    for method in dict.fromkeys(m for found in grid.values() for m in found):
        lines.append(f"| {method} | " + " | ".join(_cell(grid[bed].get(method)) for bed in BEDS) + " |")
    return [*lines, "", "Left out: " + "; ".join(f"`{k}` ({v})" for k, v in LEFT_OUT.items()) + ".", ""]


def _cell(rows: list[Cell] | None) -> str:
    if not rows:
        return ""
    told = f"{mean(rows, 'kl_optimum'):.3f} / {100 * mean(rows, 'win_rate'):.1f} / {mean(rows, 'chosen'):+.2f}"
    stopped = [r["stopped"] for r in rows if r["stopped"] is not None]
    mark = "" if all(r["reached"] for r in rows) else " †"
    return told + (f" *{statistics.fmean(stopped):.0f}*" if stopped else "") + mark


def at_level(cell: Cell, level: float) -> tuple[float, int] | None:
    """(chosen log-ratio, step) where the win rate first reaches a level; None where it never does."""
    curve = cell["curve"]
    for i, rate in enumerate(curve["win_rate"]):
        if rate >= level:
            return curve["chosen"][i], i * cell["every"]
    return None


def displacement_table(rows: list[Cell], level: float = 0.55) -> list[str]:
    lines = [
        "## Displacement on a token tree", "",
        "16 pairs of sequences, a network whose prefixes share parameters, 1000 steps; means over seeds. Log-ratios to the reference in nats: where "
        f"the win rate against the reference first is {100 * level:.0f} %, the lowest on the way, and at the end. Unseen: mass of sequences in no "
        "pair.", "",
        f"| method | seeds | reach {100 * level:.0f} % | chosen there | chosen, lowest | chosen, end | rejected, end | win rate: best / end "
        "| unseen, end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method, cells in by_method(rows).items():
        there = [found[0] for c in cells if (found := at_level(c, level)) is not None]
        end = {k: statistics.fmean(c["curve"][k][-1] for c in cells) for k in cells[0]["curve"]}
        lowest, best = (statistics.fmean(f(c["curve"][k]) for c in cells) for f, k in ((min, "chosen"), (max, "win_rate")))
        told = f"{statistics.fmean(there):+.2f}" if there else ""
        lines.append(
            f"| {method} | {len(cells)} | {len(there)} | {told} | {lowest:+.2f} | {end['chosen']:+.2f} | {end['rejected']:+.2f} "
            f"| {100 * best:.1f} / {100 * end['win_rate']:.1f} | {end['unseen']:.2f} |"
        )
    return [*lines, ""]


def sentiment_table(rows: list[Cell], level: float = 0.75) -> list[str]:
    lines = [
        "## SmolLM2 on pairs labelled by VADER", "",
        "Adapters; 16 held-out openings, 4 responses each, against the reference's on common random numbers, at the end of training. Displacement is "
        f"the mean log-ratio of held-out pairs; the last column but one tells it where the win rate first is {100 * level:.0f} %.", "",
        "| method | seed | pairs | steps | win rate | VADER | KL, nats | log-prob per token under the reference | distinct-2 | chosen / rejected | "
        f"chosen at {100 * level:.0f} % | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        first, end = r["curve"][0], r["curve"][-1]
        there = next((f"{p['chosen']:+.2f} (step {p['step']})" for p in r["curve"] if p["win_rate"] >= level), "not reached")
        lines.append(
            f"| {r['method']} | {r['seed']} | {r['pairs']} | {r['settings']['steps']} | {100 * end['win_rate']:.0f} % | {first['reward']:+.2f} to "
            f"{end['reward']:+.2f} | {end['kl']:.1f} | {first['logp_ref_per_token']:.2f} to {end['logp_ref_per_token']:.2f} "
            f"| {first['distinct_2']:.2f} to {end['distinct_2']:.2f} | {end['chosen']:+.2f} / {end['rejected']:+.2f} | {there} "
            f"| {r['seconds'] / 60:.1f} |"
        )
    return [*lines, ""]


def human_table(rows: list[Cell]) -> list[str]:
    lines = [
        "## Human preferences", "",
        "One epoch of DPO with adapters on SmolLM2. Shares of held-out pairs with 95 % intervals: ranking accuracy is that of the model's own sums "
        "of log-probs, implicit accuracy that of the log-ratio to the start.", "",
        "| file | pairs: trained / held out | ranking before | implicit after | ranking after | chosen / rejected log-ratio | minutes |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        told = [
            f"{100 * r[k]['share']:.1f} % ({100 * r[k]['interval_95'][0]:.1f} to {100 * r[k]['interval_95'][1]:.1f})"
            for k in ("ranking_accuracy_before", "implicit_accuracy", "ranking_accuracy")
        ]
        lines.append(
            f"| {r['file']} | {r['train_pairs']} / {r['held_out_pairs']} | {' | '.join(told)} | {r['log_ratio_chosen']:+.2f} / "
            f"{r['log_ratio_rejected']:+.2f} | {r['seconds'] / 60:.0f} |"
        )
    return [*lines, ""]


def speed_table(rows: list[Cell]) -> list[str]:
    lines = [
        "## Speed and peak memory against TRL's DPOTrainer", "",
        "SmolLM2-135M, 4 pairs a step, prompts of about 40 and responses of 20 to 80 tokens; medians over turns.", "",
        "| trained | anchors | ours | TRL | pairs/s, ours | TRL | ratio | peak memory, MB, ours | TRL | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        figures = {side: {k: statistics.median(x[k] for x in r["sides"][side]) for k in ("pairs_per_second", "peak_mb")} for side in r["sides"]}
        a, b = figures["markovia"], figures["TRL"]
        lines.append(
            f"| {'adapters' if r['adapters'] else 'all weights'} | {'stored' if r['stored_anchors'] else 'computed'} | {r['precision']['markovia']} "
            f"| {r['precision']['TRL']} | {a['pairs_per_second']:.2f} | {b['pairs_per_second']:.2f} | **{r['speed_ratio']:.2f}** "
            f"| {a['peak_mb']:,.0f} | {b['peak_mb']:,.0f} | **{r['memory_ratio']:.2f}** |"
        )
    return [*lines, ""]


TABLES: dict[str, Callable[[list[Cell]], list[str]]] = {
    "equal-kl": equal_kl_table, "displacement": displacement_table, "sentiment": sentiment_table, "human": human_table, "speed": speed_table,
}  # fmt: skip


def main() -> None:
    from preference_pictures import PICTURES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=["equal-kl", "displacement"], help="default: the two exact ones")
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=list(BEDS), help="of equal-kl (default all)")
    parser.add_argument("--methods", nargs="+", help="ids of the preference table (default: those of the study)")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2 for sequences, 0 to 7 for displacement, else 0")
    parser.add_argument("--data", type=Path, help="file of human preferences in the form of hh-rlhf")
    parser.add_argument("--pairs", type=int, help="pairs that human trains on (default 1800)")
    parser.add_argument("--held-out", type=int, help="held-out pairs of human (default: all others)")
    parser.add_argument("--steps", type=int, help="optimiser steps of sentiment and speed")
    parser.add_argument("--lr", type=float, help="learning rate of sentiment and human")
    parser.add_argument("--beta", type=float, help="beta of sentiment and human (default 0.1)")
    parser.add_argument("--comparisons", nargs="+", help="of speed, e.g. full-float32 lora-bf16 (default all)")
    parser.add_argument("--turns", type=int, default=3, help="turns of (ours, theirs) of speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each side of speed")
    parser.add_argument("--runs", type=Path, default=Path("runs/preference"), help="where the run of human lies")
    parser.add_argument("--table", action="store_true", help="only make tables and pictures from what has been measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results; tables and pictures are written beside it")
    args = parser.parse_args()
    if "human" in args.studies and not args.data and not args.table:
        parser.error("the study human needs a file: --data hh-harmless-test.jsonl.gz")
    for study in () if args.table else args.studies:
        cells, run = STUDIES[study]
        known = load(args.out).get(study, [])
        for cell in cells(args):
            if any(all(k in old and old[k] == v for k, v in cell.items()) for old in known):
                continue
            record(study, {**cell, **run(cell, args)}, args.out)
            print(study, *cell.values(), flush=True)
    found = load(args.out)
    if found:
        args.out.with_suffix(".md").write_text("\n".join(line for study in STUDIES if study in found for line in TABLES[study](found[study])))
    for study, picture in PICTURES.items():
        if study in found:
            picture(found[study], args.out.with_name(f"{args.out.stem}_{study.replace('-', '_')}.png"))


if __name__ == "__main__":
    main()
