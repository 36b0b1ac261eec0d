"""Speed and peak memory of DPO on SmolLM2-135M against TRL's DPOTrainer, for benchmarks/preference.py.

Each side runs in a process of its own, the sides of a comparison in alternation, on the same texts: 4 pairs a step, prompts of about 40 and responses
of 20 to 80 tokens. TRL runs without gradient checkpointing, which is its faster setting. Peak memory is that of the training steps alone, model
loading left out. As a script: `python benchmarks/preference_speed.py SIDE --adapters --precision bf16 --stored --steps 6` prints one side's figures.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import apart  # type: ignore[import-not-found]  # run as a script: its folder is on the path
from apart import peak_mb, reset_peak, step_times

PAIRS = 4  # of a step
WARM = 2  # steps before the clock starts
TEXT = """the film was a long story about people who lived near the sea and wanted to leave it for the city with their old car but never did because
of rain money love work and fear so we saw them talk eat laugh sleep again while music played over every scene in this slow but warm picture"""
# name -> (what is trained, precision of ours and of TRL, whether the anchor's log-probs are computed beforehand)
COMPARISONS: dict[str, tuple[bool, str, str, bool]] = {
    "full-float32": (False, "float32", "float32", False),
    "lora-float32": (True, "float32", "float32", False),
    "full-bf16": (False, "bf16", "float32", False),
    "lora-bf16": (True, "bf16", "float32", False),
    "full-bf16-both": (False, "bf16", "bf16", False),
    "lora-bf16-both": (True, "bf16", "bf16", False),
    "full-stored": (False, "float32", "float32", True),
    "lora-stored": (True, "float32", "float32", True),
}


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of about 40 and of 20 to 80 tokens; a word of the list is a token or a little more."""
    rng, words = random.Random(seed), TEXT.split()

    def text(n: int) -> str:
        return " " + " ".join(rng.choice(words) for _ in range(n))

    return [{"prompt": text(40).strip(), "chosen": text(rng.randint(20, 78)), "rejected": text(rng.randint(20, 78))} for _ in range(count)]


def ours(adapters: bool, precision: str, stored: bool, steps: int) -> dict[str, Any]:
    """Our preference loop on a file of pairs."""
    from markovia.algos.preference.methods import PREFERENCE
    from markovia.algos.presets import override
    from markovia.algos.setup import build, make_driver

    total = PAIRS * (steps + WARM)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        file.write_text("".join(json.dumps(p) + "\n" for p in pairs(total)))
        settings = override(PREFERENCE["dpo"].value, {"num_envs": PAIRS, "num_env_steps": total, "stored_reference": stored, "solver": {"lr": 1e-6}})
        agent = {"model": "smollm2", "bf16": precision == "bf16", **({"lora": {"r": 16}} if adapters else {})}
        made = build(None, settings, agent_options=agent, data={"path": str(file), "options": {"held_out": 0}})
        driver = make_driver(settings, made)
    losses = [driver.step()["loss"] for _ in range(WARM)]
    reset_peak()
    began = time.perf_counter()
    losses += [driver.step()["loss"] for _ in range(steps)]
    return {"pairs_per_second": PAIRS * steps / (time.perf_counter() - began), "peak_mb": peak_mb(), "loss": losses}


def theirs(adapters: bool, precision: str, stored: bool, steps: int) -> dict[str, Any]:
    """TRL's DPOTrainer on the same pairs."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from markovia.envs.text.pretrained import load_model, load_tokenizer

    marks, clock = step_times(WARM)
    tokenizer = load_tokenizer("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, per_device_train_batch_size=PAIRS, max_steps=steps + WARM, learning_rate=1e-6, bf16=precision == "bf16", use_cpu=True,
            gradient_checkpointing=False, precompute_ref_log_probs=stored, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
            max_grad_norm=1.0, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DPOTrainer(
            load_model("smollm2"), args=config, train_dataset=Dataset.from_list(pairs(PAIRS * (steps + WARM))), processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"pairs_per_second": PAIRS * steps / (marks[-1] - marks[WARM - 1]), "peak_mb": peak_mb(), "loss": losses}


SIDES = {"markovia": ours, "TRL": theirs}


def measure(name: str, steps: int, turns: int, threads: int) -> dict[str, Any]:
    """Both sides in alternation, each in a fresh process; the figures are medians over turns of ratios within a turn."""
    adapters, precision, their_precision, stored = COMPARISONS[name]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(turns):
        for side in SIDES:
            flags = ["--precision", precision if side == "markovia" else their_precision, "--steps", str(steps)]
            flags += (["--adapters"] if adapters else []) + (["--stored"] if stored else [])
            found[side].append(apart.side(__file__, side, *flags, threads=threads))
    return {
        "adapters": adapters, "precision": {"markovia": precision, "TRL": their_precision}, "stored_anchors": stored, "steps": steps,
        "threads": threads, "sides": found,
        "speed_ratio": apart.median_ratio(*found.values(), "pairs_per_second"),
        "memory_ratio": apart.median_ratio(*found.values(), "peak_mb"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES, help="whose trainer runs")
    parser.add_argument("--adapters", action="store_true", help="train LoRA adapters instead of all weights")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="bf16 is autocast on both sides")
    parser.add_argument("--stored", action="store_true", help="log-probs of the anchor are computed before training")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of 4 pairs")
    args = parser.parse_args()
    print(json.dumps(SIDES[args.side](args.adapters, args.precision, args.stored, args.steps)))


if __name__ == "__main__":
    main()
