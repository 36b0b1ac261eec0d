"""Training speed against other projects with the same hyper-parameters: `python benchmarks/throughput.py [--only ppo-8x256 ...] [--device cuda]`.

The sides of a comparison run in turns in one process, each with the number of threads (1 or 2) that was faster for it in a short first try, and
the figure is the median over turns of the ratio ours / theirs: that is what a shared and noisy machine measures best. Speed counts collection and
update (for off-policy methods one step with one update); compile time is not in it. Peak memory is that of a process of its own for each side,
libraries included; ours is measured compiled and eager, since the compiler's own code is most of the difference. Writes
benchmarks/results/throughput.json and the table throughput.md beside it.

An offline comparison takes one to two minutes of processor time, and many times that on a core that others use: each side is built anew in every
turn, ours compiles for each number of threads, and memory takes a process per side. What each call took is told on stderr.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import apart
import numpy as np
import peers
import peers_offline
import torch

from markovia.envs.durable import write_whole

RESULTS = Path(__file__).parent / "results" / "throughput.json"
SHORT = 6  # part of a turn that a first try is
Side = Callable[[str], float]  # device -> speed


@dataclass(frozen=True)
class Comparison:
    """Our speed and that of others at the same work."""

    about: str
    unit: str
    ours: Side
    theirs: dict[str, Side]


def on_policy(
    method_id: str, vectorization: str, env_id: str, num_envs: int, num_steps: int, batches: int, device: str, compile: bool = True
) -> float:
    """Environment steps per second of a row of the on-policy table, its updates compiled unless told otherwise."""
    from markovia.algos.on_policy.driver import OnPolicyDriver
    from markovia.algos.presets import override
    from markovia.algos.setup import build
    from markovia.algos.systems import find

    total = num_envs * num_steps * batches
    method = override(find(method_id).value, {"num_envs": num_envs, "num_steps": num_steps, "num_env_steps": 10**9})
    setup = build(env_id, method, seed=0, vectorization=vectorization, device=device)
    driver = OnPolicyDriver(method, setup.agent, setup.collector, seed=0, compile=compile)
    driver.step()  # compiles
    began = time.perf_counter()
    for _ in range(batches):
        driver.step()
    speed = total / (time.perf_counter() - began)
    setup.collector.close()
    return speed


def off_policy(method_id: str, changes: dict[str, Any], env_id: str, updates: int, device: str, compile: bool = True) -> float:
    """Steps per second, each with one update of batch 256 on 256-256 networks."""
    from markovia.algos.presets import override
    from markovia.algos.setup import build, make_driver
    from markovia.algos.systems import find

    method = override(find(method_id).value, {"num_envs": 1, "num_steps": 100, "learning_starts": 500, "num_env_steps": 10**6, **changes})
    setup = build(env_id, method, seed=0, device=device)
    driver = make_driver(method, setup, seed=0, compile=compile)
    while driver.num_env_steps < 600:
        driver.step()
    before, began = driver.num_env_steps, time.perf_counter()
    while driver.num_env_steps < before + updates:
        driver.step()
    speed = (driver.num_env_steps - before) / (time.perf_counter() - began)
    setup.collector.close()
    return speed


def logged_rows(n: int = 100_000, obs: int = 17, action: int = 6) -> dict[str, np.ndarray]:
    """Random rows of HalfCheetah's sizes in episodes of 1000 steps; what is in them does not change what an update costs."""
    rng = np.random.default_rng(0)
    seen = rng.standard_normal((n + 1, obs), dtype=np.float32)
    done = (np.arange(n) % 1000 == 999).astype(np.float32)
    acted, reward = np.tanh(rng.standard_normal((n, action), dtype=np.float32)), rng.standard_normal(n, dtype=np.float32)
    return {"obs": seen[:-1], "action": acted, "reward": reward, "next_obs": seen[1:], "done": done}


def offline(method_id: str, changes: dict[str, Any], rows: dict[str, np.ndarray], updates: int, device: str, compile: bool = True) -> float:
    """Updates per second of a row of the offline table on such rows, its sampling in it; batch 256 on 256-256 networks."""
    from gymnasium import spaces

    from markovia.algos.off_policy.driver import OffPolicyDriver
    from markovia.algos.offline.setup import make_agent
    from markovia.algos.offline.source import make_source
    from markovia.algos.presets import override
    from markovia.algos.systems import find
    from markovia.envs.offline import Transitions

    method = override(find(method_id).value, {"num_steps": 50, **changes})
    boxes = (spaces.Box(low, -low, (rows[k].shape[1],), np.float32) for k, low in (("obs", -np.inf), ("action", -1.0)))
    agent = make_agent(method, *boxes, normalize_obs=True, device=device)
    flags = rows["done"].astype(bool)
    episode = np.cumsum(np.append(0, flags[:-1]))
    data = Transitions(rows["obs"], rows["action"], rows["reward"], rows["next_obs"], flags, np.zeros_like(flags), episode)
    driver = OffPolicyDriver(method, agent, make_source(data, method.data, agent, method.gamma), seed=0, compile=compile)
    driver.step()  # compiles
    before, began = driver.num_updates, time.perf_counter()
    while driver.num_updates < before + updates:
        driver.step()
    return (driver.num_updates - before) / (time.perf_counter() - began)


def comparisons(env_id: str, batches: int, updates: int) -> dict[str, Comparison]:
    """Every comparison by name."""
    out: dict[str, Comparison] = {}
    for num_envs, num_steps, single_file in ((8, 256, True), (64, 32, False), (1, 2048, False)):
        shape = (env_id, num_envs, num_steps, batches)
        theirs: dict[str, Side] = {"SB3": partial(peers.sb3_ppo, *shape)}
        if single_file:
            theirs["single file"] = partial(peers.single_file_ppo, *shape)
        about = f"PPO, {env_id}, {num_envs} envs x {num_steps} steps, minibatch 64, 10 epochs"
        for name, vectorization in (("", "sync"), ("-fast", "auto")):
            told = f"{about}, {'Gymnasium vector env' if vectorization == 'sync' else 'batched MuJoCo'}"
            out[f"ppo-{num_envs}x{num_steps}{name}"] = Comparison(told, "steps/s", partial(on_policy, "ppo", vectorization, *shape), theirs)
    shape = (env_id, 1, 2048, batches)
    trpo = {"sb3-contrib": partial(peers.sb3_trpo, *shape)}
    out["trpo"] = Comparison(f"TRPO, {env_id}, 1 env x 2048 steps", "steps/s", partial(on_policy, "trpo", "auto", *shape), trpo)
    for name, peer in (("sac", peers.sb3_sac), ("td3", peers.sb3_td3)):
        for precision in ("float32", "bfloat16"):
            about = f"{name.upper()}, {env_id}, batch 256, 256-256, one update a step, {precision}"
            ours = partial(off_policy, name, {"precision": precision}, env_id, updates)
            out[f"{name}-{precision}"] = Comparison(about, "updates/s", ours, {"SB3": partial(peer, env_id, updates)})
    rows = logged_rows()
    for name, kind, loop in (("td3-bc", "TD3PlusBC", peers_offline.td3_bc), ("iql", "IQL", peers_offline.iql)):
        others: dict[str, Side] = {"single file": partial(peers_offline.single_file, loop, rows, updates)}
        if peers_offline.has_d3rlpy():
            others["d3rlpy"] = partial(peers_offline.d3rlpy, kind, rows, updates)
        for precision in ("float32", "bfloat16"):
            about = f"{name} on a dataset, batch 256, 256-256, {precision}"
            out[f"{name}-{precision}"] = Comparison(about, "updates/s", partial(offline, name, {"precision": precision}, rows, updates), others)
    return out


def timed(name: str, side: Side, device: str, threads: int) -> float:
    """Speed of one side with so many threads; tells on stderr what the call took."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    speed = side(device)
    print(f"  {name}, {threads} thread(s): {speed:,.0f}/s, {time.perf_counter() - began:.1f} s in all", file=sys.stderr, flush=True)
    return speed


def measure(comparison: Comparison, short: Comparison, turns: int, device: str) -> dict[str, Any]:
    """Speeds of all sides over alternating turns, and the median ratio against each; `short` is less of the same, to choose the threads by."""
    threads = {name: max((1, 2), key=lambda t: timed(name, side, device, t)) for name, side in racers(short).items()}
    speeds: dict[str, list[float]] = {name: [] for name in threads}
    for _ in range(turns):
        for name, side in racers(comparison).items():
            speeds[name].append(timed(name, side, device, threads[name]))
    ratios = {name: statistics.median(a / b for a, b in zip(speeds["markovia"], speeds[name], strict=True)) for name in comparison.theirs}
    return {"about": comparison.about, "unit": comparison.unit, "threads": threads, "speeds": speeds, "median_ratio": ratios}


def racers(comparison: Comparison) -> dict[str, Side]:
    """Who takes turns, by name."""
    return {"markovia": comparison.ours, **comparison.theirs}


def sides(comparison: Comparison) -> dict[str, Side]:
    """Whose memory is measured, by name."""
    return {**racers(comparison), "markovia, eager": partial(comparison.ours, compile=False)}


def peak_memory(name: str, comparison: Comparison, args: argparse.Namespace) -> dict[str, float]:
    """MB that a process of each side holds at its peak, in a short run of its own."""
    flags = ["--env", args.env, "--device", args.device, "--batches", "2", "--updates", "200"]
    return {who: apart.side(__file__, *flags, "--peak", name, who, threads=1)["peak_mb"] for who in sides(comparison)}


def table(results: dict[str, Any]) -> str:
    """Markdown, one line per comparison and peer."""
    lines = ["| what | ours, median | peer | theirs, median | ratio | peak memory, ours (eager) | theirs |", "|---|---|---|---|---|---|---|"]
    for r in results["comparisons"].values():
        for peer, ratio in r["median_ratio"].items():
            ours, theirs = (f"{statistics.median(r['speeds'][s]):,.0f} {r['unit']}" for s in ("markovia", peer))
            peak = r.get("peak_mb", {})
            memory = f"{peak['markovia']:.0f} ({peak['markovia, eager']:.0f}) MB | {peak[peer]:.0f} MB" if peak else " | "
            lines.append(f"| {r['about']} | {ours} | {peer} | {theirs} | **{ratio:.2f}** | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--only", nargs="+", help="names of comparisons, e.g. ppo-8x256 sac-float32")
    parser.add_argument("--batches", type=int, default=8, help="batches timed in each turn")
    parser.add_argument("--updates", type=int, default=600, help="off-policy and offline updates timed in each turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of (ours, theirs)")
    parser.add_argument("--device", default="cpu", help="where networks and updates live: cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "SIDE"), help="run one side once and print its peak memory in MB")
    args = parser.parse_args()
    found = comparisons(args.env, args.batches, args.updates)
    short = comparisons(args.env, max(1, args.batches // SHORT), max(1, args.updates // SHORT))
    if unknown := set(args.only or ()) - set(found):
        parser.error(f"no comparison is called {', '.join(sorted(unknown))}; choose from {', '.join(found)}")
    if args.peak:
        name, side = args.peak
        torch.set_num_threads(1)
        sides(found[name])[side](args.device)
        print(json.dumps({"peak_mb": apart.peak_mb()}))
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"comparisons": {}}
    here = {"device": args.device, "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    if results["comparisons"] and any(results[k] != v for k, v in here.items()):
        there = ", ".join(str(results[k]) for k in here)
        parser.error(f"{args.out} holds measurements of {there}, this is {', '.join(here.values())}: use another --out")
    results |= here
    for name in args.only or found:
        measured = measure(found[name], short[name], args.turns, args.device) | {"batches": args.batches, "updates": args.updates}
        measured["peak_mb"] = peak_memory(name, found[name], args)
        results["comparisons"][name] = measured
        print(f"{name}: " + ", ".join(f"{ratio:.2f} x {peer}" for peer, ratio in measured["median_ratio"].items()), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, (json.dumps(results, indent=1) + "\n").encode())
        args.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
