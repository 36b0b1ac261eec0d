"""Networks for control: an observation encoder, an orthogonally initialised MLP, and a convolutional trunk for pixels.

All take observations with any leading shape (..., *obs shape) and give features (..., width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.records import Obs

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


def is_image(space: spaces.Space) -> bool:
    """A Box of bytes with 2 or 3 axes, at least 8 x 8 pixels: what the convolutional trunk takes."""
    if not isinstance(space, spaces.Box) or space.dtype != "uint8" or len(space.shape) not in (2, 3):
        return False
    return sorted(space.shape)[-2] >= 8


def linear(n_in: int, n_out: int, gain: float = math.sqrt(2.0)) -> nn.Linear:
    """A linear layer with orthogonal weights of the given gain and zero bias."""
    layer = nn.Linear(n_in, n_out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def check_layers(hidden: Sequence[int], activation: str) -> None:
    """Raises ValueError for an unknown activation and for hidden layers that are no list of sizes >= 1 (an empty one will do)."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if not isinstance(hidden, Sequence) or not all(isinstance(n, int) and n >= 1 for n in hidden):
        raise ValueError(f"hidden lists the sizes of the hidden layers, whole numbers >= 1, e.g. (64, 64); got {hidden!r}")


def mlp(n_in: int, hidden: Sequence[int], activation: str = "tanh") -> nn.Sequential:
    """Hidden layers with gain sqrt(2), an activation after each. Raises what `check_layers` raises."""
    check_layers(hidden, activation)
    layers: list[nn.Module] = []
    for n in hidden:
        layers += [linear(n_in, n), ACTIVATIONS[activation]()]
        n_in = n
    return nn.Sequential(*layers)


class ImageEncoder(nn.Module):
    """Convolutional trunk on bytes / 255 -> `width` features.

    From 36 pixels on the network of Mnih 2015 (8x8/4, 4x4/2, 3x3/1; 32, 64, 64 channels); smaller images get 3x3 kernels with stride 2.
    The axis with fewer entries among the first and the last is the channel.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 256) -> None:
        super().__init__()
        self.axes = len(shape)
        self.channels_last = self.axes == 3 and shape[-1] < shape[0]
        if self.axes == 2:
            channels, height, cols = 1, *shape
        elif self.channels_last:
            height, cols, channels = shape
        else:
            channels, height, cols = shape
        if min(height, cols) >= 36:
            plan = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)]
        else:
            plan = [(32, 3, 2, 1), (64, 3, 2, 1)]
        layers: list[nn.Module] = []
        for out, kernel, stride, pad in plan:
            conv = nn.Conv2d(channels, out, kernel, stride, pad)
            nn.init.orthogonal_(conv.weight, math.sqrt(2.0))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.ReLU()]
            height, cols = ((n + 2 * pad - kernel) // stride + 1 for n in (height, cols))
            channels = out
        self.conv = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(linear(channels * height * cols, width), nn.ReLU())
        self.width = width

    def forward(self, image: Tensor) -> Tensor:
        lead = image.shape[: -self.axes]
        x = image.reshape(-1, *image.shape[-self.axes :])
        if self.axes == 2:
            x = x.unsqueeze(1)
        elif self.channels_last:
            x = x.permute(0, 3, 1, 2)
        x = x.to(self.head[0].weight.dtype) / 255.0  # type: ignore[arg-type]
        return self.head(self.conv(x)).reshape(*lead, self.width)


class Flat(nn.Module):
    """A Box flattened, or MultiBinary flattened, a Discrete or MultiDiscrete as (concatenated) one-hot vectors; (..., width), integers as float32."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.axes = len(space.shape or ())
        if isinstance(space, spaces.Discrete):
            self.sizes = [int(space.n)]
        elif isinstance(space, spaces.MultiDiscrete):
            self.sizes = [int(n) for n in space.nvec.reshape(-1)]
        self.width = sum(self.sizes) or int(math.prod(space.shape or ()))

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.dim() - self.axes]
        x = x.reshape(*lead, -1)
        if not self.sizes:
            return x if x.is_floating_point() else x.to(torch.float32)
        hot = [F.one_hot(x[..., i].long(), n) for i, n in enumerate(self.sizes)]
        return torch.cat(hot, -1).to(torch.float32)


class ObsEncoder(nn.Module):
    """Observation -> features: images through `ImageEncoder`, the rest through `Flat`, a Dict's parts concatenated in the space's order.

    Raises ValueError for spaces that it can't take (nested Dict, Tuple, Text, Graph, Sequence).
    """

    def __init__(self, space: spaces.Space) -> None:
        super().__init__()
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        known = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        for key, part in parts.items():
            if not isinstance(part, known):
                where = f" (key {key!r})" if key else ""
                raise ValueError(
                    f"an observation space of type {type(part).__name__}{where} is not supported; expected Box, Discrete, MultiDiscrete, "
                    "MultiBinary or one flat Dict of these. Wrap the environment in gymnasium.wrappers.FlattenObservation"
                )
        self.keys = list(parts)
        self.parts = nn.ModuleList([ImageEncoder(s.shape) if is_image(s) else Flat(s) for s in parts.values()])  # type: ignore[arg-type]
        self.width: int = sum(p.width for p in self.parts)  # type: ignore[misc]

    def forward(self, obs: Obs) -> Tensor:
        if not isinstance(obs, dict):
            return self.parts[0](obs)
        return torch.cat([part(obs[k]) for k, part in zip(self.keys, self.parts, strict=True)], -1)


class Trunk(nn.Module):
    """Encoder and hidden layers, or the user's own module; `width` features."""

    def __init__(
        self, space: spaces.Space, hidden: Sequence[int], activation: str, network: nn.Module | None = None, width: int = 0
    ) -> None:
        super().__init__()
        if network is not None:
            self.body: nn.Module = network
            self.width = width
        else:
            encoder = ObsEncoder(space)
            self.body = nn.Sequential(encoder, mlp(encoder.width, hidden, activation))
            self.width = hidden[-1] if hidden else encoder.width

    def forward(self, obs: Obs) -> Tensor:
        return self.body(obs)


class PolicyNet(nn.Module):
    """Trunk, then a head of gain 0.01 for the distribution's parameters; `log_std` is a state-independent parameter (Gaussian only).

    Without a head (`n_out` None) the trunk's own output is the parameters.
    """

    def __init__(self, trunk: Trunk, n_out: int | None, log_std: Tensor | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head: nn.Module = nn.Identity() if n_out is None else linear(trunk.width, n_out, 0.01)
        self.log_std = None if log_std is None else nn.Parameter(log_std)

    def forward(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """Distribution parameters (..., n_out) and the trunk's features (..., width)."""
        hidden = self.trunk(obs)
        return self.head(hidden), hidden


class ValueNet(nn.Module):
    """Trunk, then a head of gain 1: values (..., 1 + m), reward first, then one column per cost."""

    def __init__(self, trunk: Trunk, num_costs: int = 0) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = linear(trunk.width, 1 + num_costs, 1.0)

    def forward(self, obs: Obs) -> Tensor:
        return self.head(self.trunk(obs))


def network_name(network: nn.Module) -> dict[str, Any]:
    """How a checkpoint names a module that it can't rebuild."""
    return {"class": f"{type(network).__module__}:{type(network).__qualname__}"}
