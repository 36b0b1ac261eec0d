"""Models of the policy that wrote a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.networks import ObsEncoder, linear, mlp
from markovia.agents.records import Obs

LOG_STD_RANGE = (-4.0, 15.0)  # of the latent variable, as in the published code


class ConditionalVAE(nn.Module):
    """Encoder q(z|s, a) and decoder of actions in [-1, 1] from (s, z), z with 2 d entries; obs (b, ...), actions (b, d)."""

    def __init__(self, observation_space: spaces.Space, action_size: int, hidden: Sequence[int] = (750, 750), activation: str = "relu") -> None:
        super().__init__()
        self.encoder = ObsEncoder(observation_space)
        self.latent = 2 * action_size
        width = [*hidden][-1] if hidden else self.encoder.width + action_size
        self.encode = nn.Sequential(mlp(self.encoder.width + action_size, hidden, activation), linear(width, 2 * self.latent, 1.0))
        width = [*hidden][-1] if hidden else self.encoder.width + self.latent
        self.decode = nn.Sequential(mlp(self.encoder.width + self.latent, hidden, activation), linear(width, action_size, 1.0), nn.Tanh())

    def forward(self, obs: Obs, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The action decoded from z = mean + std noise, noise (b, 2 d); and mean and log std of z, (b, 2 d)."""
        seen = self.encoder(obs)
        mean, log_std = self.encode(torch.cat([seen, action], -1)).chunk(2, -1)
        log_std = log_std.clamp(*LOG_STD_RANGE)
        return self.decode(torch.cat([seen, mean + log_std.exp() * noise], -1)), mean, log_std
