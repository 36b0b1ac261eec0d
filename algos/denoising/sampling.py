"""The sampling loop that every way of steering shares: it sees a kernel and what to predict, never a method.

    x          (n, *sample_shape) at the noise level of step k
    predict    (x, k) -> model output shaped as x: a network, two networks combined, or one that is pushed along a gradient
    generator  every noise is drawn from it, in the order of the steps
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from markovia.envs.denoising.kernel import GaussianKernel

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Predict = Callable[[Tensor, int], Tensor]


def predictor(kernel: GaussianKernel, network: Network, cond: Tensor | None = None) -> Predict:
    """A network (x, timestep (n,), cond) as a function of (x, k)."""

    def predict(x: Tensor, k: int) -> Tensor:
        return network(x, kernel.timestep(torch.full((len(x),), k, device=x.device)), cond)

    return predict


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of x's shape, dtype and device."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


@torch.no_grad()
def denoise(
    kernel: GaussianKernel, predict: Predict, x: Tensor, generator: torch.Generator | None = None, start: int = 0, repeats: int = 1
) -> Tensor:
    """The clean samples of chains that stand at step `start`, x_{k+1} = mean(predict(x, k), x, k) + std_k z.

    repeats > 1 visits every noise level so often: before the step that leaves it, the x0 estimate is noised again to the same level with a fresh
    noise, x <- signal_k x0 + noise_k z, which lets a guided chain settle there (a Langevin-like corrector).     [Wang 2024, 2411.16627]
    """
    if not 0 <= start < kernel.num_steps:
        raise ValueError(f"start={start}; expected a step of the kernel, 0 to {kernel.num_steps - 1}.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; expected at least 1 visit of each noise level.")
    for k in range(start, kernel.num_steps):
        for _ in range(repeats - 1):
            x = kernel.add_noise(kernel.x0_from(predict(x, k), x, k), noise_like(x, generator), k)
        mean, std = kernel.mean_std(predict(x, k), x, k)
        x = mean + std * noise_like(x, generator)
    return x
