"""Rewards in units of the spread of returns: what a policy-gradient loop may see in place of a task's own unit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CLIP = 10.0


class RewardScale:
    """r / sqrt(var(G) + 1e-8) clipped to +-10, with G <- gamma G + r the running discounted return of each row, forgotten at an episode's end.

    The variance is that of all G so far, the current step's included (float64); before the second G it is taken as 1.
    """

    def __init__(self, num_rows: int, gamma: float) -> None:
        self.gamma = gamma
        self.mean, self.var, self.count = 0.0, 1.0, 0.0
        self.restart(num_rows)

    def restart(self, num_rows: int) -> None:
        """Episodes begin anew; the moments stay."""
        self.running = np.zeros(num_rows)

    def __call__(self, reward: np.ndarray, ended: np.ndarray, live: np.ndarray) -> np.ndarray:
        """(B, T) rewards with `ended` after which an episode is over and `live` steps that exist, scaled; the moments move on."""
        returns = np.empty_like(reward)
        for t in range(reward.shape[1]):  # a recursion over time only; rows are one vector
            self.running = self.running * self.gamma + reward[:, t]
            returns[:, t] = self.running
            self.running = np.where(ended[:, t], 0.0, self.running)
        # Moments after each step from sums about a point near the mean, so that nothing is lost to cancellation.
        point = self.mean if self.count else float(returns[live].mean()) if live.any() else 0.0
        away = np.where(live, returns - point, 0.0)
        count = self.count + np.cumsum(live.sum(0))
        first = np.cumsum(away.sum(0)) / np.maximum(count, 1.0)
        second = (self.count * self.var + np.cumsum(np.square(away).sum(0))) / np.maximum(count, 1.0)
        var = second - np.square(first)
        if count[-1]:
            self.mean, self.var, self.count = point + float(first[-1]), float(var[-1]), float(count[-1])
        scale = np.where(count >= 2, np.sqrt(np.maximum(var, 0.0) + 1e-8), 1.0)
        return np.where(count >= 2, np.clip(reward / scale, -CLIP, CLIP), reward)

    def state(self) -> dict[str, Tensor]:
        """The moments."""
        return {"moments": torch.tensor([self.mean, self.var, self.count], dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back."""
        self.mean, self.var, self.count = state["moments"].tolist()
