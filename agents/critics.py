"""Critics of state and action: an ensemble whose members run as one batched product per layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.networks import ACTIVATIONS, ObsEncoder, check_layers, linear
from markovia.agents.records import Obs


class StackedLinear(nn.Module):
    """N linear layers side by side, x (N, b, n_in) -> (N, b, n_out), each initialised like `linear`; optional layer norm of each member."""

    def __init__(self, num: int, n_in: int, n_out: int, gain: float = 2.0**0.5, layer_norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([linear(n_in, n_out, gain).weight.detach().T for _ in range(num)]))
        self.bias = nn.Parameter(torch.zeros(num, 1, n_out))
        self.scale = nn.Parameter(torch.ones(num, 1, n_out)) if layer_norm else None
        self.shift = nn.Parameter(torch.zeros(num, 1, n_out)) if layer_norm else None

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]  # fewer than N: the first members alone
        y = torch.baddbmm(self.bias[:n], x, self.weight[:n])
        if self.scale is None or self.shift is None:
            return y
        return F.layer_norm(y, y.shape[-1:]) * self.scale[:n] + self.shift[:n]


class QEnsemble(nn.Module):
    """N action values Q_j(s, a): obs (b, ...) and actions (b, d) in [-1, 1] -> (N, b). Image encoders, where there are any, are shared.

    Raises ValueError for unknown activations and layer sizes, fewer than one member, and observations that no encoder takes.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_size: int,
        num: int = 2,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if num < 1:
            raise ValueError(f"an ensemble needs at least 1 critic, got {num}")
        check_layers(hidden, activation)
        self.num = num
        self.encoder = ObsEncoder(observation_space)
        sizes = [self.encoder.width + action_size, *hidden]
        self.hidden = nn.ModuleList(StackedLinear(num, a, b, layer_norm=layer_norm) for a, b in itertools.pairwise(sizes))
        self.activation = ACTIVATIONS[activation]()
        self.head = StackedLinear(num, sizes[-1], 1, gain=1.0)

    def forward(self, obs: Obs, action: Tensor, members: int | None = None) -> Tensor:
        """(N, b), or of the first `members` alone, which costs only these. Actions (N, b, d) give each member its own."""
        n = members or self.num
        if action.dim() == 2:
            x = torch.cat([self.encoder(obs), action], -1).expand(n, -1, -1)
        else:
            x = torch.cat([self.encoder(obs).expand(n, -1, -1), action], -1)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return self.head(x).squeeze(-1)
