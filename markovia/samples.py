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


def write_samples(agent: Any, task: Any, folder: Path, n: int, seed: int, run: Path | None = None) -> list[Path]:
    """Write samples.txt (reward, prompt, completion) to `folder`, or samples.png, chain.gif (noise to samples) and training.gif (the samples at each
    checkpoint of `run`, always from one noise)."""
    outcome, reward = draw(agent, task, n, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if agent.kind == "language":
        path = folder / "samples.txt"
        rows = zip(reward, outcome["prompt_text"], outcome["completion_text"], strict=True)
        path.write_text("".join(f"{r:+.3f}  {p} >>> {c}\n" for r, p, c in rows))
        return [path]
    from markovia.chains import chain_gif, png, sheet, training_gif

    data = None if task.data is None else task.data().numpy()
    files = {
        "samples.png": png(sheet(task, outcome["x"], f"mean reward {reward.mean():.3f}", data)),
        "chain.gif": chain_gif(agent, task, n, seed),
        "training.gif": None if run is None else training_gif(run),
    }
    written = []
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
            written.append(folder / name)
    return written
