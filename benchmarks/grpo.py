"""Speed and peak memory of GRPO on SmolLM2-135M against TRL's GRPOTrainer: `python benchmarks/grpo.py [--only full-float32 ...]`.

The same work on both sides: a step samples 16 completions of 32 tokens (2 prompts, groups of 8), scores them, and takes one step on all weights with
beta 0.04, so there is a second frozen model. Each side runs in a process of its own, in alternation; speed is completion tokens per second over
whole steps, peak memory that of the steps alone. TRL runs without gradient checkpointing, which is its faster setting. Writes
benchmarks/results/grpo.json and the table grpo.md beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from apart import median_ratio, peak_mb, reset_peak, side, step_times  # type: ignore[import-not-found]  # run as a script: its folder is on the path

RESULTS = Path(__file__).parent / "results" / "grpo.json"
ROWS, GROUP, TOKENS, BETA = 16, 8, 32, 0.04
WARM = 1  # steps before the clock starts
PROMPTS = ["The weather in the mountains today is", "My favourite dish to cook at home is", "The old lighthouse keeper looked at the sea and",
           "When the train finally arrived, the passengers"]  # fmt: skip
# name -> precision of ours and of TRL
COMPARISONS = {"full-float32": ("float32", "float32"), "full-bf16": ("bf16", "float32"), "full-bf16-both": ("bf16", "bf16")}


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Share of vowels: cheap, and never the same for a whole group."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def ours(precision: str, steps: int) -> dict[str, Any]:
    """The on-policy loop with the row `grpo`."""
    from markovia.agents.language import LanguageAgent
    from markovia.algos.collect import SequenceCollector
    from markovia.algos.on_policy.driver import OnPolicyDriver
    from markovia.algos.presets import override
    from markovia.algos.systems import find
    from markovia.envs.text.tasks import TextTask

    changes = {"num_envs": ROWS, "group_size": GROUP, "divergence": {"beta": BETA}, "num_env_steps": 10**6}
    method = override(find("grpo").value, {**changes, "solver": {"lr": 1e-6, "minibatch": None, "epochs": 1, "anneal": False}})
    agent = LanguageAgent.from_name("smollm2", bf16=precision == "bf16", max_new_tokens=TOKENS, temperature=1.0, packed=True)
    task = TextTask(PROMPTS, agent.tokenizer, reward, TOKENS, group_size=GROUP)
    driver = OnPolicyDriver(method, agent, SequenceCollector(task, ROWS))
    tokens, seconds = 0.0, 0.0
    for step in range(WARM + steps):
        began = time.perf_counter()
        found = driver.step()
        if step >= WARM:
            tokens, seconds = tokens + ROWS * found["length"], seconds + time.perf_counter() - began
        elif step == WARM - 1:
            reset_peak()
    return {"tokens_per_second": tokens / seconds, "tokens_per_step": tokens / steps, "peak_mb": peak_mb()}


def theirs(precision: str, steps: int) -> dict[str, Any]:
    """TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from markovia.envs.text.pretrained import load_model, load_tokenizer

    marks, clock = step_times(WARM)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=ROWS, gradient_accumulation_steps=1, num_generations=GROUP, max_completion_length=TOKENS,
            beta=BETA, learning_rate=1e-6, max_steps=WARM + steps, temperature=1.0, bf16=precision == "bf16", use_cpu=True,
            gradient_checkpointing=False, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            load_model("smollm2"), reward_funcs=reward, args=config, train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS * 50]),
            processing_class=load_tokenizer("smollm2"), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row][WARM:]
    tokens = ROWS * sum(lengths)
    return {"tokens_per_second": tokens / (marks[-1] - marks[WARM - 1]), "tokens_per_step": tokens / steps, "peak_mb": peak_mb()}


SIDES = {"markovia": ours, "TRL": theirs}


def measure(name: str, steps: int, turns: int, threads: int) -> dict[str, Any]:
    """Both sides in alternation; ratios are medians over turns."""
    precision = dict(zip(SIDES, COMPARISONS[name], strict=True))
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in SIDES}
    for _ in range(turns):
        for who in SIDES:
            found[who].append(side(__file__, "--side", who, "--precision", precision[who], "--steps", str(steps), threads=threads))
    a, b = found.values()
    ratios = {"speed_ratio": median_ratio(a, b, "tokens_per_second"), "memory_ratio": median_ratio(a, b, "peak_mb")}
    return {"precision": precision, "steps": steps, "threads": threads, "sides": found, **ratios}


def table(results: dict[str, Any]) -> str:
    """Markdown, one line per comparison."""
    lines = ["| precision, ours / TRL | tokens/s, ours | TRL | ratio | peak memory, ours | TRL | ratio |", "|---|---|---|---|---|---|---|"]
    for r in results.values():
        cells = []
        for key, ratio, unit in (("tokens_per_second", "speed_ratio", ""), ("peak_mb", "memory_ratio", " MB")):
            cells += [f"{statistics.median(x[key] for x in r['sides'][who]):,.0f}{unit}" for who in SIDES] + [f"**{r[ratio]:.2f}**"]
        lines.append(f"| {' / '.join(r['precision'].values())} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), help="some of the comparisons")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of (ours, theirs)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--side", choices=list(SIDES), help="run one side alone and print its figures")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of --side; bf16 is autocast")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args.precision, args.steps)))
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.only or COMPARISONS:
        results[name] = found = measure(name, args.steps, args.turns, args.threads)
        print(f"{name}: {found['speed_ratio']:.2f} x TRL's speed, {found['memory_ratio']:.2f} x its memory", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
