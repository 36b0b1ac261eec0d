"""Samples of a sequence agent: texts as a file of lines, denoised samples as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw(agent: Any, task: Any, n: int, seed: int) -> tuple[Any, np.ndarray]:
    """(n samples with their record's outcome, rewards (n,)); text starts from held-out prompts."""
    from markovia.algos.setup import sample_sequences

    rollout = sample_sequences(agent, task, n, seed)
    return rollout.outcome, task.score(rollout).cpu().numpy()


def write_samples(agent: Any, task: Any, folder: Path, n: int, seed: int) -> Path:
    """Write samples.txt (reward, prompt, completion) or samples.png to `folder`."""
    from markovia.pictures import samples_png

    outcome, reward = draw(agent, task, n, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if agent.kind == "language":
        path = folder / "samples.txt"
        rows = zip(reward, outcome["prompt_text"], outcome["completion_text"], strict=True)
        path.write_text("".join(f"{r:+.3f}  {p} >>> {c}\n" for r, p, c in rows))
        return path
    path = folder / "samples.png"
    path.write_bytes(samples_png(outcome["x"].cpu().numpy(), f"mean reward {reward.mean():.3f}"))
    return path
