"""Small networks of the ready denoising tasks, each rebuilt from a JSON config.

Denoiser signature: network(x (*batch, *sample_shape), timestep (*batch), cond (*batch, C) or None) -> model output, shaped as x.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from markovia.envs.denoising.pipeline_network import PipelineDenoiser
from markovia.envs.denoising.unet import UNetDenoiser

WEIGHTS = Path(__file__).parent / "weights"


class MLPDenoiser(nn.Module):
    """A residual MLP on the flat sample with a sinusoidal time embedding; predicts eps, x0 or v as it was trained.

    time_scale is the number of training timesteps; cond_dim > 0 adds a condition vector to the input.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        hidden: int = 128,
        depth: int = 3,
        time_features: int = 32,
        time_scale: float = 1000.0,
        cond_dim: int = 0,
    ) -> None:
        super().__init__()
        self.sample_shape = tuple(int(n) for n in sample_shape)
        self._config = {
            "sample_shape": list(self.sample_shape),
            "hidden": hidden,
            "depth": depth,
            "time_features": time_features,
            "time_scale": time_scale,
            "cond_dim": cond_dim,
        }
        self.time_scale, self.cond_dim = time_scale, cond_dim
        size = math.prod(self.sample_shape)
        half = time_features // 2
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2 * math.pi * 2.0 ** torch.linspace(-2, 6, half), persistent=False)
        self.time = nn.Linear(2 * half, hidden)
        self.inp = nn.Linear(size + cond_dim, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.out = nn.Linear(hidden, size)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        return dict(self._config)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        """Model output, shaped as x (*batch, *sample_shape)."""
        if (cond is None) != (self.cond_dim == 0):
            raise ValueError(
                f"cond is {'missing' if cond is None else 'given'}, but this network has cond_dim={self.cond_dim}."
            )
        flat = x.flatten(x.ndim - len(self.sample_shape))
        angle = (timestep.to(x.dtype) / self.time_scale)[..., None] * self.frequencies
        time = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], -1)))
        hidden = self.inp(flat if cond is None else torch.cat([flat, cond.to(x.dtype)], -1)) + time
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden = hidden + F.silu(block(norm(hidden) + time))
        return self.out(hidden).reshape(x.shape)


class LinearDenoiser(nn.Module):
    """A per-step linear mean m = G_k x + h_k, with the step index as its time: every policy of LinearGaussianDenoising."""

    def __init__(self, G: Sequence[Sequence[Sequence[float]]], h: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.G: Tensor = nn.Parameter(torch.as_tensor(G, dtype=torch.float32).clone())
        self.h: Tensor = nn.Parameter(torch.as_tensor(h, dtype=torch.float32).clone())

    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values: zeros of the right shape, the parameters travel apart."""
        return {"G": torch.zeros_like(self.G).tolist(), "h": torch.zeros_like(self.h).tolist()}

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        """G_k x + h_k for x (*batch, d) and integer step k (*batch)."""
        return torch.einsum("...ij,...j->...i", self.G[timestep], x) + self.h[timestep]


def extrapolate(base: Tensor, towards: Tensor, scale: float) -> Tensor:
    """Move a prediction along the line from one network's output to another's; both of one parametrisation and one noise level.

    m = m_base + scale (m_towards - m_base):  0 base, 1 the other, > 1 beyond it
    Classifier-free guidance: unconditional to conditional [Ho 2022, 2207.12598, eq. 6]; RL guidance: reference to tuned [Jin 2025, 2508.21016].
    In control terms u -> scale u. Affine means keep the identity exactly, a clip of x0 breaks it.
    """
    return base + scale * (towards - base)


class GuidedDenoiser(nn.Module):
    """Classifier-free guidance inside the network, so that sampling and training see one and the same policy.

    `inner` is a conditional network (or its config) that was trained with some conditions replaced by zeros, which stand for "none";
    scale 1 is the conditional network itself.                                                            [Ho 2022, 2207.12598]
    """

    def __init__(self, inner: nn.Module | dict[str, Any], scale: float = 2.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale={scale}; expected a finite guidance scale >= 0 (1: no guidance, 2 to 5 usual).")
        self.inner = build_network(inner) if isinstance(inner, dict) else inner
        self.guidance = float(scale)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        return {"inner": network_config(self.inner), "scale": self.guidance}

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        """Guided output for x (n, *sample_shape), timestep (n,), cond (n, C): both predictions in one pass of 2n rows."""
        if cond is None:
            raise ValueError("guidance needs a condition: pass cond (n, C), or use the inner network for unconditional samples.")
        if self.guidance == 1.0:
            alone: Tensor = self.inner(x, timestep, cond)
            return alone
        both = self.inner(torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([torch.zeros_like(cond), cond]))
        none, given = both.chunk(2)
        return extrapolate(none, given, self.guidance)


class MLPClassifier(nn.Module):
    """Class logits of a sample by a two-layer MLP."""

    def __init__(self, sample_shape: Sequence[int], num_classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.sample_shape = tuple(int(n) for n in sample_shape)
        self._config = {"sample_shape": list(self.sample_shape), "num_classes": num_classes, "hidden": hidden}
        size = math.prod(self.sample_shape)
        self.layers = nn.Sequential(
            nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, num_classes)
        )

    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        return dict(self._config)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (*batch, num_classes)."""
        return self.layers(x.flatten(x.ndim - len(self.sample_shape)))


NETWORKS: dict[str, type[nn.Module]] = {
    c.__name__: c for c in (MLPDenoiser, UNetDenoiser, PipelineDenoiser, LinearDenoiser, GuidedDenoiser, MLPClassifier)
}


def is_known(network: nn.Module) -> bool:
    """Whether a network can be rebuilt from JSON."""
    return is_known(network.inner) if isinstance(network, GuidedDenoiser) else isinstance(network, tuple(NETWORKS.values()))


def network_config(network: nn.Module) -> dict[str, Any]:
    """{"network": class name, **constructor arguments}: what `build_network` takes; ValueError for a foreign module."""
    if not is_known(network):
        raise ValueError(
            f"{type(network).__name__} has no JSON config; expected one of {', '.join(NETWORKS)}. "
            "Save its parameters yourself and pass the module when loading."
        )
    return {"network": type(network).__name__, **network.config()}  # type: ignore[operator]


def build_network(config: dict[str, Any]) -> nn.Module:
    """The network of a config with fresh parameters; ValueError for an unknown class."""
    arguments = dict(config)
    name = arguments.pop("network", None)
    if name not in NETWORKS:
        raise ValueError(f"network={name!r} is unknown; expected one of {', '.join(NETWORKS)}.")
    if name == "PipelineDenoiser":
        return PipelineDenoiser.from_folder(**arguments)
    return NETWORKS[name](**arguments)


def save_network(path: Path, network: nn.Module) -> None:
    """Write parameters (as float16, half the size) and config to one safetensors file."""
    from safetensors.torch import save_file

    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"config": json.dumps(network_config(network))})
    path.chmod(0o644)  # safetensors writes it for the owner only; package data is for everyone


def load_pretrained(name: str) -> nn.Module:
    """A shipped network in float32 and eval mode: mixture2d, digits, digits_unet, digits_conditional, digits_classifier or digits_judge.

    Raises ValueError for a name that is not shipped.
    """
    from safetensors import safe_open

    path = WEIGHTS / f"{name}.safetensors"
    if path.parent != WEIGHTS or not path.is_file():
        known = ", ".join(sorted(p.stem for p in WEIGHTS.glob("*.safetensors")))
        raise ValueError(f"no shipped weights named {name!r}; expected one of: {known}.")
    with safe_open(path, "pt") as file:
        network = build_network(json.loads(file.metadata()["config"]))
        # cloned: tensors from safetensors may be unaligned, which changes results in the last bit
        network.load_state_dict({key: file.get_tensor(key).float().clone() for key in file.keys()})  # noqa: SIM118
    return network.eval()
