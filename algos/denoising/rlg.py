"""RL guidance: how far to follow a fine-tuned denoiser, chosen when sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from markovia.algos.denoising.sampling import Network, Predict, denoise, predictor
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.networks import extrapolate


def tuned_beyond_reference(tuned: Predict, reference: Predict, scale: float) -> Predict:
    """Sample between, at, or beyond a reference and its fine-tuned version without training again.

    m = m_ref + w (m_theta - m_ref), in control terms u -> w u;  score-wise p_ref^(1 - w) p_theta^w          [Jin 2025, 2508.21016]
    When p_theta is the tilt p_ref exp(r/beta), w stands for the strength beta/w: exactly for Gaussian data with a linear reward; with a
    curved reward w > 1 goes too far, because the product of noised laws is not the noised product. Both networks predict the same thing,
    with the same classifier-free guidance.
    """

    def predict(x: Tensor, k: int) -> Tensor:
        return extrapolate(reference(x, k), tuned(x, k), scale)

    return predict


@dataclass(frozen=True)
class RLGuidance:
    """Settings of RL guidance."""

    scale: float = 2.0  # w: 0 the reference, 1 the tuned model, > 1 beyond it (1 to 3 usual)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale}; expected a finite number, 0 for the reference and 1 for the tuned model.")

    def sample(self, task: DenoisingTask, tuned: Network, n: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """n clean samples {"x", "cond"}: the task's network is the reference, `tuned` (x, timestep, cond) the fine-tuned one."""
        starts = task.starts(n, generator)
        x, cond = starts["x"], starts["cond"]
        assert x is not None
        reference, towards = (predictor(task.kernel, network, cond) for network in (task.network, tuned))
        return {"x": denoise(task.kernel, tuned_beyond_reference(towards, reference, self.scale), x, generator), "cond": cond}
