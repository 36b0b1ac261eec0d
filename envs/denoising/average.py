"""An exponential average of a network's weights: what samples, while the weights themselves learn."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """w_avg <- d w_avg + (1 - d) w after each update, d = min(decay, (n + 1)/(n + 10)), so that early weights are soon forgotten.

    `network` is the averaged copy, in eval mode and without gradient; buffers (running statistics) are copied as they are.
    [the sampling weights of Ho 2020, arXiv 2006.11239, appendix B]
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}; expected the share of the old average that stays, in [0, 1), e.g. 0.999.")
        self.decay, self.count = decay, 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards `network`, whose parameters have the same names and shapes."""
        self.count += 1
        rate = 1.0 - min(self.decay, self.count / (self.count + 9))
        for average, now in zip(self.network.parameters(), network.parameters(), strict=True):
            average.lerp_(now, rate)
        for held, current in zip(self.network.buffers(), network.buffers(), strict=True):
            held.copy_(current)
