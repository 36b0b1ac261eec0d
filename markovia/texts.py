"""What a text run shows of its batches: texts with their rewards at every checkpoint, and the spread of the rewards at every iteration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from markovia.rundir import write_text

BINS = 10
SHOWN = 8  # texts of a batch


@dataclass(frozen=True)
class TextBatch:
    """The texts of one training batch, (n) prompts, completions and rewards; `apart` holds each reward function's own, by name."""

    prompts: list[str]
    completions: list[str]
    rewards: np.ndarray
    apart: dict[str, np.ndarray]

    def histogram(self) -> dict[str, Any]:
        """How many rewards lie in each of ten equal parts between the lowest and the highest: {"low", "high", "counts"}."""
        low, high = float(self.rewards.min()), float(self.rewards.max())
        counts, _ = np.histogram(self.rewards, BINS, (low, high) if high > low else (low - 0.5, low + 0.5))
        return {"low": low, "high": high, "counts": counts.tolist()}

    def shown(self) -> list[dict[str, Any]]:
        """Some of the texts, evenly spaced over the batch: prompt, completion, reward and, of several functions, each one's."""
        rows = np.unique(np.linspace(0, len(self.prompts) - 1, min(SHOWN, len(self.prompts))).round().astype(int))
        several = self.apart if len(self.apart) > 1 else {}
        return [
            {"prompt": self.prompts[i], "completion": self.completions[i], "reward": float(self.rewards[i])}
            | {f"reward/{name}": float(x[i]) for name, x in several.items()}
            for i in rows.tolist()
        ]

    def write(self, path: Path) -> None:
        """`shown` as JSON lines. Raises RunError when the disk refuses."""
        path.parent.mkdir(exist_ok=True)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.shown()))

    def markdown(self) -> str:
        """`shown` for TensorBoard: a paragraph per text, the completion set off."""
        return "\n\n".join(f"`{row['reward']:+.3f}` {row['prompt']} **{row['completion']}**" for row in self.shown())


def text_batch(driver: Any) -> TextBatch | None:
    """What the driver's last iteration was about; None for drivers and tasks without texts, and when no text was kept."""
    outcome = getattr(driver, "outcome", None) or {}
    if not outcome.get("completion_text"):
        return None
    apart = {name: np.asarray(x.cpu(), dtype=float) for name, x in outcome.get("rewards", {}).items()}
    return TextBatch(list(outcome["prompt_text"]), list(outcome["completion_text"]), np.asarray(outcome["returns"].cpu(), dtype=float), apart)
