"""Speed of PPO against Stable-Baselines3 with the same hyper-parameters, measured in turns in one process: `python benchmarks/throughput.py`.

Both train for the same steps on the same task with one thread; the figure is environment steps per second over collection and update, and
the ratio ours / theirs, which is what a shared and noisy machine measures best. Writes benchmarks/results/throughput.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "throughput.json"


def ours(env_id: str, num_envs: int, num_steps: int, batches: int) -> float:
    """Steps per second of markovia's ppo."""
    from markovia.algos.on_policy.driver import OnPolicyDriver
    from markovia.algos.presets import override
    from markovia.algos.setup import build
    from markovia.algos.systems import find

    total = num_envs * num_steps * batches
    method = override(find("ppo").value, {"num_envs": num_envs, "num_steps": num_steps, "num_env_steps": total, "solver": {"anneal": False}})
    setup = build(env_id, method, seed=0)
    driver = OnPolicyDriver(method, setup.agent, setup.collector, seed=0)
    driver.step()  # warm-up
    began = time.perf_counter()
    for _ in range(batches):
        driver.step()
    return total / (time.perf_counter() - began)


def stable_baselines3(env_id: str, num_envs: int, num_steps: int, batches: int) -> float:
    """Steps per second of SB3's PPO, its defaults being the same: 10 epochs of minibatches of 64, Adam 3e-4, two 64-unit tanh networks."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    from markovia.envs.control import make_env

    venv = DummyVecEnv([lambda: make_env(env_id) for _ in range(num_envs)])
    model = PPO("MlpPolicy", venv, n_steps=num_steps, batch_size=64, n_epochs=10, device="cpu", seed=0)
    size = num_envs * num_steps
    model.learn(size)
    began = time.perf_counter()
    model.learn(size * batches)
    return size * batches / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=256)
    parser.add_argument("--batches", type=int, default=4, help="batches timed in each turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of (ours, theirs)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = (args.env, args.num_envs, args.num_steps, args.batches)
    pairs = []
    for turn in range(args.turns):
        pairs.append((ours(*shape), stable_baselines3(*shape)))
        print(f"turn {turn + 1}: markovia {pairs[-1][0]:,.0f} steps/s, SB3 {pairs[-1][1]:,.0f} steps/s, ratio {pairs[-1][0] / pairs[-1][1]:.2f}")
    ratio = statistics.median(a / b for a, b in pairs)
    result: dict[str, Any] = {
        "env": args.env, "num_envs": args.num_envs, "num_steps": args.num_steps, "batches": args.batches, "threads": 1,
        "markovia_steps_per_s": [a for a, _ in pairs], "sb3_steps_per_s": [b for _, b in pairs], "median_ratio": ratio, "torch": torch.__version__,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"median ratio {ratio:.2f}; written to {args.out}")


if __name__ == "__main__":
    main()
