"""What a chunk-denoising network is fitted to: noised chunks in, squared errors out; nothing here draws or loops.

    x0, eps   (b, H, d)   clean chunk in [-1, 1], standard normal noise         timestep  (b,)   as the network takes it
    target    (b, H, d)   what the network should give for the noised chunk     step      (b,)   index of a kernel's noise level
"""

from __future__ import annotations

import torch
from torch import Tensor

from markovia.envs.denoising.kernel import GaussianKernel


def diffused(kernel: GaussianKernel, x0: Tensor, eps: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noised chunk, timestep and target of a diffusion at the kernel's noise levels.

    x = sqrt(ab) x0 + sqrt(1 - ab) eps;   target: eps (epsilon), x0 (sample), sqrt(ab) eps - sqrt(1 - ab) x0 (v_prediction)
    [Ho 2020, arXiv 2006.11239, eq. 14; v: 2202.00512, appendix D]                                              (GaussianKernel.target)
    """
    return kernel.add_noise(x0, eps, step), kernel.timestep(step), kernel.target(x0, eps, step)


def flowed(x0: Tensor, eps: Tensor, sigma: Tensor, *, time_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noised chunk, timestep and target of flow matching along straight lines; data at sigma = 0, noise at sigma = 1.

    x = (1 - sigma) x0 + sigma eps,   target eps - x0;   sigma (b,) in [0, 1], the network's time is time_scale sigma
    [Lipman 2022, arXiv 2210.02747, eq. 23, with time turned round as in diffusers]
    """
    s = sigma[:, None, None]
    return (1.0 - s) * x0 + s * eps, time_scale * sigma, eps - x0


def noise_level(uniform: Tensor, *, times: str) -> Tensor:
    """sigma (b,) from uniform numbers in (0, 1): themselves, or the logistic function of the normal with that quantile.

    logit-normal: sigma = 1/(1 + exp(-Phi^-1(u)))                                                                [Esser 2024, arXiv 2403.03206]
    """
    if times == "uniform":
        return uniform
    return torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-6, 1.0 - 1e-6)))


def denoising_error(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over the batch of w |output - target|^2 / (H d), ().

    The minimiser is E[target | noised chunk, timestep, window], weights of the data (b,) included: advantages or feasibility may tilt what is
    cloned.                                                                                                             [Chi 2023, arXiv 2303.04137]
    """
    error = (output - target).square().flatten(1).mean(1)
    return error.mean() if weight is None else (weight * error).mean()
