"""Functions of the mean and std of denoising steps: log-probability, the control pair, and what methods read from it.

    x, x_next, mean   (*batch, *sample_shape)
    std               (*batch, 1, ..., 1), broadcasts against x; 0 where a step is deterministic

Functions that reduce over the sample take `batch_ndim`, the number of leading batch axes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from markovia.envs.denoising.tables import choose

Reduce = Literal["sum", "mean"]


def reduce_entries(entries: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1) -> Tensor:
    """Sum or mean over the entries of a sample: (*batch, *sample_shape) -> (*batch,). ValueError for another name."""
    choose("reduce", reduce, ("sum", "mean"))
    flat = entries.flatten(batch_ndim) if entries.ndim > batch_ndim else entries.unsqueeze(-1)
    return flat.sum(-1) if reduce == "sum" else flat.mean(-1)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1) -> Tensor:
    """Log-density of a step in nats; 0 where std = 0, because a deterministic step has no density and is masked out.

    log p = sum_d [ -(x'_d - mean_d)^2 / (2 std^2) - log std - log(2 pi)/2 ];  reduce="mean" divides by D, as the papers' code
    does (it changes the meaning of clip ranges and of beta by the factor D).                       Returns (*batch,).
    """
    safe = torch.where(std > 0, std, torch.ones_like(std))
    entry = -0.5 * ((x_next - mean) / safe).square() - safe.log() - 0.5 * math.log(2 * math.pi)
    return reduce_entries(torch.where(std > 0, entry, torch.zeros_like(entry)), reduce, batch_ndim)


def control_pair(mean: Tensor, mean_ref: Tensor, x_next: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The change of mean and the drawn noise, both in units of the std under the reference; zeros where std = 0.

    u = (mean - mean_ref)/std,   z = (x' - mean_ref)/std                              Shapes as x: (*batch, *sample_shape).
    """
    scale = torch.where(std > 0, 1.0 / torch.where(std > 0, std, torch.ones_like(std)), torch.zeros_like(std))
    return (mean - mean_ref) * scale, (x_next - mean_ref) * scale


def delta(u: Tensor, z: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1) -> Tensor:
    """Log-ratio of policy to reference for a step, in nats: log p_theta(x'|x)/p_ref(x'|x) = <u, z> - |u|^2/2.  (*batch,)."""
    return reduce_entries(u * z - 0.5 * u.square(), reduce, batch_ndim)


def step_kl(u: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1) -> Tensor:
    """KL(policy || reference) of a step, in nats: |u|^2/2.  Returns (*batch,)."""
    return reduce_entries(0.5 * u.square(), reduce, batch_ndim)
