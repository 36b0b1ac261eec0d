"""Critics of state and action: ensembles whose members run as one batched product per layer."""

from __future__ import annotations

import itertools
import math
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
        if self.weight.shape[-1] == 1:  # one column is a sum, which costs a fraction of BLAS's product and fuses with what comes before it
            y = (x * self.weight[:n].transpose(1, 2)).sum(-1, keepdim=True) + self.bias[:n]
        else:
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


VALUE_LEVELS = 32  # even levels over which a quantile network's value is the mean


class QuantileEnsemble(nn.Module):
    """N implicit quantile networks Z_j(s, a; tau) [Dabney 2018, arXiv 1806.06923]: obs (b, ...), actions (b, d) in [-1, 1].

    The features of (s, a) after all hidden layers but the last are multiplied by features of cos(pi i tau), i = 1 .. embedding. Each hidden layer is
    normalised before its activation, and a sigmoid keeps the features of tau in (0, 1), as in the code of closed-form policy improvement.
    Raises ValueError for what `QEnsemble` refuses, and for fewer than two hidden layers or one cosine.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_size: int,
        num: int = 2,
        embedding: int = 64,
        hidden: Sequence[int] = (256, 256, 256),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if num < 1 or embedding < 1 or len(hidden) < 2:
            raise ValueError(f"quantile critics need at least 1 member, 1 cosine and 2 hidden layers, got {num}, {embedding}, {hidden}")
        check_layers(hidden, activation)
        self.num, self.embedding = num, embedding
        self.encoder = ObsEncoder(observation_space)
        sizes = [self.encoder.width + action_size, *hidden]
        self.hidden = nn.ModuleList(StackedLinear(num, a, b, layer_norm=True) for a, b in itertools.pairwise(sizes[:-1]))
        self.levels = StackedLinear(num, embedding, sizes[-2], layer_norm=True)
        self.merge = StackedLinear(num, sizes[-2], sizes[-1], layer_norm=True)
        self.activation = ACTIVATIONS[activation]()
        self.head = StackedLinear(num, sizes[-1], 1, gain=1.0)

    def forward(self, obs: Obs, action: Tensor, members: int | None = None, tau: Tensor | None = None) -> Tensor:
        """Quantiles (N, k, b) at levels tau (k, b) or (k, 1) in (0, 1); without tau their mean over even levels, the value (N, b)."""
        n = members or self.num
        x = torch.cat([self.encoder(obs), action], -1).expand(n, -1, -1)
        for layer in self.hidden:
            x = self.activation(layer(x))
        at = (torch.arange(VALUE_LEVELS, device=x.device, dtype=x.dtype)[:, None] + 0.5) / VALUE_LEVELS if tau is None else tau
        cosines = torch.cos(math.pi * torch.arange(1, self.embedding + 1, device=x.device, dtype=at.dtype) * at[..., None])
        level = torch.sigmoid(self.levels(cosines.flatten(0, 1).expand(n, -1, -1))).unflatten(1, tuple(at.shape))
        z = self.activation(self.merge((x[:, None] * level).flatten(1, 2)))
        z = self.head(z).squeeze(-1).unflatten(1, (at.shape[0], x.shape[1]))
        return z.mean(1) if tau is None else z
