"""Networks that denoise chunks of actions, given an observation window: network(x (N, H, d), timestep (N,), window (N, C)) -> (N, H, d)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from markovia.envs.denoising.networks import NETWORKS, build_network, network_config


class UNet1DChunk(nn.Module):
    """diffusers' UNet1DModel along the chunk's time axis; the window joins as constant channels beside the actions.

    The chunk is repeated at its end up to a multiple of 2^(levels - 1), which the halvings of the time axis need, and cut again.
    """

    def __init__(self, horizon: int, action_size: int, cond_dim: int, channels: Sequence[int] = (64, 128), time_scale: float = 1000.0) -> None:
        super().__init__()
        try:
            from diffusers import UNet1DModel
        except ImportError as error:
            raise ImportError("a UNet along the chunk needs diffusers: pip install markovia[diffusion]") from error
        if len(channels) < 2 or any(c % 8 for c in channels):
            raise ValueError(f"channels lists the width of each level, at least two multiples of 8, e.g. (64, 128); got {tuple(channels)}")
        self._config = {"horizon": horizon, "action_size": action_size, "cond_dim": cond_dim, "channels": list(channels), "time_scale": time_scale}
        self.time_scale, levels = time_scale, len(channels)
        multiple = 2 ** (levels - 1)
        self.pad = -horizon % multiple
        self.inner: Any = UNet1DModel(
            sample_size=horizon + self.pad,
            in_channels=action_size + cond_dim,
            out_channels=action_size,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            down_block_types=("DownResnetBlock1D",) * levels,
            up_block_types=("UpResnetBlock1D",) * (levels - 1),
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            block_out_channels=tuple(channels),
            act_fn="mish",
        )

    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        return dict(self._config)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        """Model output, shaped as x (N, H, d)."""
        horizon = x.shape[1]
        padded = torch.cat([x, x[:, -1:].expand(-1, self.pad, -1)], 1)
        given = cond.to(x.dtype)[:, None].expand(-1, padded.shape[1], -1)
        # The embedding is made for timesteps up to 1,000.
        out: Tensor = self.inner(torch.cat([padded, given], -1).mT, timestep.to(x.dtype) * (1000.0 / self.time_scale)).sample
        return out.mT[:, :horizon]


def chunk_network_config(network: nn.Module) -> dict[str, Any]:
    """{"network": class name, **constructor arguments}, or {"network": "custom"} for a class of the user's own."""
    if isinstance(network, UNet1DChunk):
        return {"network": "UNet1DChunk", **network.config()}
    return network_config(network) if type(network).__name__ in NETWORKS else {"network": "custom"}


def build_chunk_network(config: dict[str, Any]) -> nn.Module:
    """The network of a config with fresh parameters. Raises ValueError for one of the user's own class, which must be passed."""
    if config["network"] == "custom":
        raise ValueError("this checkpoint's network is a class of its author's own; pass it: Agent.load(folder, network=...)")
    if config["network"] == "UNet1DChunk":
        return UNet1DChunk(**{k: v for k, v in config.items() if k != "network"})
    return build_network(config)
