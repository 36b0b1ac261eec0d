"""What it brings to keep freed memory (`markovia.envs.machine.keep_freed_memory`): `python benchmarks/allocation.py`.

Short eager runs with and without it, each in a process of its own, in turns. Seconds are the process's own time, in the program and in the system, so
that other programs on the machine count little; pages are the page faults of training. Writes benchmarks/results/allocation.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

from apart import median_ratio, peak_mb, side  # type: ignore[import-not-found]  # run as a script, so its folder is on the path

from markovia.envs.durable import write_whole

RESULTS = Path(__file__).parent / "results" / "allocation.json"
POINT_MASS = {"env": "markovia/PointMass2D-v0", "dataset": "fixture:pointmass2d/medium"}
# name -> (method, steps, what else `markovia.train` is told)
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "cql-pointmass": ("cql", 1000, POINT_MASS),
    "td3-bc-pointmass": ("td3-bc", 3000, POINT_MASS),
    "ppo-digits": ("ppo", 2048, {"env": "markovia/Digits-v0"}),
    "rloo-smollm2": ("rloo", 64, {"env": "markovia/Sentiment-v0"}),
}


def run(name: str, keep: bool) -> dict[str, Any]:
    """One run in this process."""
    from markovia import train
    from markovia.algos.presets import configure, override
    from markovia.envs import machine

    if not keep:
        machine.keep_freed_memory = lambda: False
    method, steps, options = RUNS[name]
    settings = override(configure(method, options["env"]), {"num_env_steps": steps})
    marks = []

    def mark(info: Any) -> None:
        marks.append(resource.getrusage(resource.RUSAGE_SELF))

    with tempfile.TemporaryDirectory() as folder:
        train(settings, out=Path(folder) / "run", compile=False, progress=False, eval_episodes=0, callbacks=[mark], **options)
    first, last = marks[0], marks[-1]  # between them nothing is loaded or built any more
    seconds = last.ru_utime + last.ru_stime - first.ru_utime - first.ru_stime
    return {"seconds": seconds, "system": last.ru_stime - first.ru_stime, "pages": last.ru_minflt - first.ru_minflt, "peak_mb": peak_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the runs")
    parser.add_argument("--turns", type=int, default=3, help="default 3")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args.side[0], args.side[1] == "keep")))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in args.only:
        both: dict[str, list[dict[str, Any]]] = {"leave": [], "keep": []}
        for _ in range(args.turns):
            for which, done in both.items():
                done.append(side(__file__, "--side", name, which, threads=1))
        ratios = {key: round(median_ratio(both["keep"], both["leave"], key), 3) for key in ("seconds", "pages", "peak_mb")}
        print(f"{name}: keeping takes {ratios['seconds']} of the time, {ratios['pages']} of the page faults, {ratios['peak_mb']} of the peak memory")
        found[name] = {"ratios": ratios, **both}
        write_whole(RESULTS, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
