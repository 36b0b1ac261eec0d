"""diffusers' networks as denoisers: a small UNet of our own, and whatever denoiser a pipeline folder holds.

Both have the signature of every denoiser here: network(x (n, *sample_shape), timestep (n,), cond (n, C) or None) -> model output, shaped as x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def chosen_row(cond: Tensor) -> Tensor:
    """Number of the condition that a one-hot row marks, counted from 1; 0 for a row of zeros, which stands for "none".    (n, C) -> (n,)"""
    return (cond.argmax(-1) + 1) * (cond.sum(-1) > 0)


class UNetDenoiser(nn.Module):
    """diffusers' UNet2DModel for small images (h, w) or (c, h, w); cond_dim > 0 adds a class embedding for one-hot conditions.

    channels  of each resolution, halved from level to level (multiples of 8); attention at the lowest one
    A row of zeros in `cond` is a class of its own, "none": train with some conditions dropped, and guide with `GuidedDenoiser`.
    """

    def __init__(self, sample_shape: Sequence[int], channels: Sequence[int] = (16, 32), layers: int = 1, cond_dim: int = 0) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError("a UNet needs diffusers: pip install markovia[diffusion]") from error
        self.sample_shape, self.cond_dim = tuple(int(n) for n in sample_shape), cond_dim
        if len(self.sample_shape) not in (2, 3):
            raise ValueError(f"sample_shape={self.sample_shape}; a UNet takes images (height, width) or (channels, height, width).")
        if not channels or any(c % 8 for c in channels):
            raise ValueError(f"channels={tuple(channels)}; expected one multiple of 8 for each resolution, e.g. (16, 32).")
        self._config = {"sample_shape": list(self.sample_shape), "channels": list(channels), "layers": layers, "cond_dim": cond_dim}
        plain, depth = len(self.sample_shape) == 2, len(channels)
        planes = 1 if plain else self.sample_shape[0]
        self.model: Any = UNet2DModel(
            sample_size=self.sample_shape[-2:],
            in_channels=planes,
            out_channels=planes,
            layers_per_block=layers,
            block_out_channels=tuple(channels),
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
            num_class_embeds=cond_dim + 1 if cond_dim else None,
        )

    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        return dict(self._config)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        """Model output, shaped as x (n, *sample_shape)."""
        if (cond is None) != (self.cond_dim == 0):
            raise ValueError(f"cond is {'missing' if cond is None else 'given'}, but this network has cond_dim={self.cond_dim}.")
        image = x.unsqueeze(1) if len(self.sample_shape) == 2 else x
        out: Tensor = self.model(image, timestep, class_labels=None if cond is None else chosen_row(cond), return_dict=False)[0]
        return out.reshape(x.shape)
