"""Running mean and variance of observations; buffers, so that they are saved with the agent."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.networks import is_image
from markovia.agents.records import Obs

EPS = 1e-8  # added to the variance


class RunningNorm(nn.Module):
    """Standardise by the moments of all data seen so far: clip((x - mean) / sqrt(var + 1e-8), -clip, clip).

    Moments are float64 and merged batch by batch (Chan, Golub, LeVeque 1979): with d = mean_b - mean and n = count + n_b,
    mean += d n_b / n,  var = (count var + n_b var_b + d^2 count n_b / n) / n. Before any data it only clips.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge a batch x (n, *shape); an empty batch changes nothing."""
        n = x.shape[0]
        if n == 0:
            return
        if self.mean.is_cpu:
            self.update_array(x.numpy().astype(np.float64))
            return
        x = x.to(torch.float64)
        mean, total = x.mean(0), self.count + n
        delta = mean - self.mean
        m2 = self.var * self.count + (x - mean).square().sum(0) + delta.square() * (self.count * n / total)
        self.mean.add_(delta * (n / total))
        self.var.copy_(m2 / total)
        self.count.copy_(total)

    @torch.no_grad()
    def set_moments(self, mean: Tensor, std: Tensor, count: int) -> None:
        """Standardise by these from now on: (x - mean) / std, std > 0; `count` says of how many rows they are."""
        self.mean.copy_(mean)
        self.var.copy_(std.square() - EPS)
        self.count.fill_(count)

    def update_array(self, x: np.ndarray) -> None:
        """The same merge of float64 rows on the buffers' own memory; numpy's overhead per operation is a fraction of torch's."""
        mean, var, count = self.mean.numpy(), self.var.numpy(), self.count.numpy()
        n = len(x)
        before, total = float(count), float(count) + n
        batch = np.add.reduce(x, 0) / n
        away, delta = x - batch, batch - mean
        var *= before
        var += np.add.reduce(away * away, 0) + delta * delta * (before * n / total)
        var /= total
        mean += delta * (n / total)
        count[...] = total

    def standardise(self, x: np.ndarray) -> np.ndarray:
        """float64 x (..., *shape) standardised in its own memory, then as float32; buffers on the CPU."""
        x -= self.mean.numpy()
        x *= 1.0 / np.sqrt(self.var.numpy() + EPS)
        return np.minimum(np.maximum(x, -self.clip), self.clip).astype(np.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., *shape) standardised, float32."""
        if self.mean.is_cpu and not x.requires_grad:
            return torch.from_numpy(self.standardise(x.numpy().astype(np.float64)))
        z = (x.to(torch.float64) - self.mean) * torch.rsqrt(self.var + EPS)
        return z.clamp(-self.clip, self.clip).to(torch.float32)


class ObsNorm(nn.Module):
    """A `RunningNorm` for every Box that is not an image, per key for a Dict; everything else passes unchanged."""

    def __init__(self, space: spaces.Space, clip: float = 10.0) -> None:
        super().__init__()
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self.keys = [k for k, s in parts.items() if isinstance(s, spaces.Box) and not is_image(s)]
        self.norms = nn.ModuleList([RunningNorm(parts[k].shape or (), clip) for k in self.keys])

    def update(self, obs: Obs) -> None:
        """Merge a batch of raw observations (n, ...)."""
        for key, norm in zip(self.keys, self.norms, strict=True):
            norm.update(obs[key] if isinstance(obs, dict) else obs)  # type: ignore[operator]

    def forward(self, obs: Obs) -> Obs:
        """Raw observations (n, ...) as the networks see them."""
        if not isinstance(obs, dict):
            return self.norms[0](obs) if self.keys else obs
        normed = {k: norm(obs[k]) for k, norm in zip(self.keys, self.norms, strict=True)}
        return {k: normed.get(k, v) for k, v in obs.items()}
