"""What collecting costs besides rewards takes: `python benchmarks/cost_speed.py`.

The same policy collects from a robot without and with a cost, in turns, so that whatever else the machine does slows both alike; the ratio is the
median over turns of the speed with cost (two critic columns, the cost's column, episode costs) over that without. `--priority` and `--rest` as in
stepping.py. Writes benchmarks/results/cost_speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from stepping import priority, turn_arguments  # type: ignore[import-not-found]  # run as a script, so its folder is on the path

from markovia.agents.control import ControlAgent
from markovia.algos.collect import StepCollector
from markovia.algos.streams import stream
from markovia.envs.control import make_vec

RESULTS = Path(__file__).parent / "results" / "cost_speed.json"


def collector(env_id: str, num_envs: int, num_steps: int, num_costs: int) -> StepCollector:
    venv = make_vec(env_id, num_envs, seed=0)
    agent = ControlAgent.from_spaces(venv.single_observation_space, venv.single_action_space, num_costs=num_costs)
    made = StepCollector(venv, agent, num_steps)
    made.trained = agent  # type: ignore[attr-defined]
    return made


def steps_per_second(made: StepCollector, seconds: float) -> float:
    """Of whole records, over about `seconds`."""
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        made.collect(made.trained, stream(0, "action", calls))  # type: ignore[attr-defined]
        calls += 1
    return calls * made.venv.num_envs * made.num_steps / (time.perf_counter() - began)


def measure(robot: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one robot, in turns; the first turn warms up."""
    names = {"without": (f"{robot}-v5", 0), "with": (f"markovia/Safe{robot}Velocity-v0", 1)}
    made = {side: collector(env_id, args.num_envs, args.num_steps, costs) for side, (env_id, costs) in names.items()}
    found: dict[str, list[float]] = {side: [] for side in made}
    for turn in range(-1, args.turns):
        for side, one in made.items():
            with priority(args.priority):
                speed = steps_per_second(one, args.seconds)
            time.sleep(args.rest)
            found[side] += [speed] if turn >= 0 else []
    for one in made.values():
        one.close()
    ratio = statistics.median(b / a for a, b in zip(found["without"], found["with"], strict=True))
    return {"robot": robot, "num_envs": args.num_envs, "ratio": round(ratio, 3), **{k: [round(x) for x in v] for k, v in found.items()}}


def main() -> None:
    parser = turn_arguments(__doc__, what="collecting", seconds=1.0, out=RESULTS)
    parser.add_argument("--robots", nargs="+", default=["HalfCheetah", "Hopper"])
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for robot in args.robots:
        rows.append(measure(robot, args))
        print(f"{robot}: with cost {rows[-1]['ratio']:.2f} of the speed without")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"turns": args.turns, "seconds": args.seconds, "priority": args.priority, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
