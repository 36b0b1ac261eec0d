"""A policy that reads the last steps and the return that is still asked for: a causal transformer over (return-to-go, observation, action) tokens.

    to_go (n, K)  return from here to the end, in units of `return_scale` per reward unit      step (n, K) int64, from the episode's start
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.control import StepAgent, batch_obs, check_action_space, obs_tensor
from markovia.agents.interface import Evaluation, Kind
from markovia.agents.networks import ObsEncoder
from markovia.agents.normalizer import ObsNorm
from markovia.agents.records import Obs, Rollout, map_obs
from markovia.agents.spaces import space_from_json, space_to_json


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x); each position sees itself and what came before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        rate = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate).transpose(1, 2).flatten(-2)
        x = x + F.dropout(self.out(seen), rate)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), rate)


class SequencePolicy(nn.Module):
    """Actions (n, K, d) in [-1, 1] for K steps: a_t = tanh(W h_t), h_t the transformer's output at the observation token of step t.

    Tokens R_1, s_1, a_1, R_2, ...; the embedding of the step is added to all three of it.                          [Chen 2021, arXiv 2106.01345]
    """

    def __init__(self, space: spaces.Space, action_size: int, horizon: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.encoder = ObsEncoder(space)
        self.embed_step = nn.Embedding(horizon, width)
        self.embed_return, self.embed_obs = nn.Linear(1, width), nn.Linear(self.encoder.width, width)
        self.embed_action = nn.Linear(action_size, width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.head = nn.Linear(width, action_size)
        self.dropout = dropout
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, to_go: Tensor, obs: Obs, action: Tensor, step: Tensor) -> Tensor:
        when = self.embed_step(step.clamp(max=self.embed_step.num_embeddings - 1))
        parts = (self.embed_return(to_go[..., None]), self.embed_obs(self.encoder(obs)), self.embed_action(action))
        x = self.norm_in(torch.stack([part + when for part in parts], 2).flatten(1, 2))
        x = F.dropout(x, self.dropout if self.training else 0.0)
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.head(self.norm_out(x[:, 1::3])))


@dataclass
class History:
    """What `predict` carries from step to step: the last K steps of n environments, aligned at the left.

    obs (n, K, ...) normalised, action (n, K, d) in [-1, 1], to_go and step (n, K); count (n,) int: steps so far in the window
    """

    obs: Obs
    action: Tensor
    to_go: Tensor
    step: Tensor
    count: Tensor
    left: Tensor  # (n,) return that is still asked for, reward units


class ReturnConditionedAgent(StepAgent):
    """Acts so as to reach `target_return`: `predict` carries a `History`, and `rewarded(history, reward)` tells it what a step has paid.

    Without being told, the return asked for stays the target at every step. Actions are deterministic, so there are no log-probabilities.
    """

    kind: Kind = "control"

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = copy.deepcopy(config)
        self.observation_space, self.action_space = (space_from_json(config[k]) for k in ("observation_space", "action_space"))
        self.window, self.return_scale, self.target_return = config["window"], config["return_scale"], config["target_return"]
        sizes = {k: config[k] for k in ("horizon", "width", "layers", "heads", "dropout")}
        self.net = nn.ModuleDict({"policy": SequencePolicy(self.observation_space, self.action_size, **sizes)})
        if config["normalize_obs"]:
            self.net["normalizer"] = ObsNorm(self.observation_space)
        self.net.eval()

    @classmethod
    def from_spaces(
        cls,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        horizon: int,
        target_return: float,
        return_scale: float = 1e-3,
        window: int = 20,
        width: int = 128,
        layers: int = 3,
        heads: int = 1,
        dropout: float = 0.1,
        normalize_obs: bool = True,
        device: str | torch.device = "cpu",
    ) -> ReturnConditionedAgent:
        """An agent for one environment's spaces and time limit. Raises ValueError for actions that are no finite Box, and for sizes that can't be."""
        check_action_space(action_space)
        if not isinstance(action_space, spaces.Box):
            raise ValueError(f"this agent predicts continuous actions, but the action space is {action_space}; use a method for discrete actions")
        if min(horizon, window, width, layers, heads) < 1 or width % heads or not 0.0 <= dropout < 1.0:
            raise ValueError(
                f"horizon, window, width, layers and heads must be >= 1, heads divide width and dropout lie in [0, 1), got {horizon}, {window}, "
                f"{width}, {layers}, {heads} and {dropout}"
            )
        config = {
            "observation_space": space_to_json(observation_space), "action_space": space_to_json(action_space), "horizon": int(horizon),
            "target_return": float(target_return), "return_scale": float(return_scale), "window": int(window), "width": int(width),
            "layers": int(layers), "heads": int(heads), "dropout": float(dropout), "normalize_obs": bool(normalize_obs),
        }  # fmt: skip
        agent = cls(config)
        agent.to(device)
        return agent

    def config(self) -> dict[str, Any]:
        return copy.deepcopy(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> ReturnConditionedAgent:
        return cls(config)

    @property
    def action_size(self) -> int:
        return int(np.prod(self.action_space.shape or (1,)))

    def observe(self, observation: Any, update: bool | np.ndarray = False) -> Obs:
        """Batched raw observations as the network sees them; their moments are the data's and stay."""
        obs = obs_tensor(observation, self.observation_space, self.device)
        return self.net["normalizer"](obs) if "normalizer" in self.net else obs  # type: ignore[no-any-return]

    def env_action(self, action: Tensor) -> np.ndarray:
        """Actions in [-1, 1] stretched to the Box."""
        space = self.action_space
        assert isinstance(space, spaces.Box)
        raw = space.low + 0.5 * (action.detach().cpu().numpy().reshape(-1, *space.shape) + 1.0) * (space.high - space.low)
        return np.minimum(np.maximum(raw, space.low), space.high).astype(space.dtype, copy=False)

    def start(self, obs: Obs) -> History:
        """An empty window for observations (n, ...) as the network sees them."""
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        n, like = len(first), next(self.net.parameters())
        room = lambda *shape: like.new_zeros((n, self.window, *shape))  # noqa: E731
        return History(
            map_obs(obs, lambda x: x.new_zeros((n, self.window, *x.shape[1:]))), room(self.action_size), room(), room().long(),
            torch.zeros(n, dtype=torch.long, device=like.device), torch.full((n,), self.target_return, device=like.device, dtype=like.dtype),
        )  # fmt: skip

    @torch.no_grad()
    def _advance(self, history: History, obs: Obs, starts: Tensor) -> Tensor:
        """Put the observations behind the windows, which lose their first step where they are full, and fill in the action; (n, d)."""
        h, rows = history, torch.arange(len(history.count), device=history.count.device)
        h.left[starts] = self.target_return
        full = (h.count == self.window) & ~starts
        following = h.step[rows, h.count.clamp(min=1) - 1] + 1
        for x in (*(h.obs.values() if isinstance(h.obs, dict) else (h.obs,)), h.action, h.to_go, h.step):
            x[full] = x[full].roll(-1, 1)
            x[starts] = 0
        now = torch.where(starts, 0, h.count.clamp(max=self.window - 1))
        h.step[rows, now] = torch.where(starts | (h.count == 0), 0, following)
        h.count = now + 1
        h.to_go[rows, now] = self.return_scale * h.left
        h.action[rows, now] = 0
        if isinstance(h.obs, dict):
            assert isinstance(obs, dict)
            for key, window in h.obs.items():
                window[rows, now] = obs[key]
        else:
            assert isinstance(obs, Tensor)
            h.obs[rows, now] = obs
        action: Tensor = self.net["policy"](h.to_go, h.obs, h.action, h.step)[rows, now]
        h.action[rows, now] = action
        return action

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        batch, single = batch_obs(observation, self.observation_space)
        obs = self.observe(batch)
        history = self.start(obs) if state is None else state
        starts = torch.zeros_like(history.count, dtype=torch.bool) if episode_start is None else torch.as_tensor(episode_start, device=self.device)
        action = self.env_action(self._advance(history, obs, starts.reshape(-1)))
        return (action[0] if single else action), history

    def asked_for(self, target_return: float) -> ReturnConditionedAgent:
        """The same policy, weights shared, that acts so as to reach another return."""
        other = copy.copy(self)
        other.target_return, other._config = float(target_return), {**self._config, "target_return": float(target_return)}
        return other

    def rewarded(self, history: History, reward: Any) -> None:
        """R <- R - r: what is left to reach after the step that `predict` was asked for paid `reward` (n,)."""
        history.left -= torch.as_tensor(np.asarray(reward), device=history.left.device, dtype=history.left.dtype).reshape(-1)

    def act(self, obs: Obs, deterministic: bool = False, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Actions of an episode's first step; their log-probability is that of a certain event."""
        history = self.start(obs)
        action = self._advance(history, obs, torch.ones_like(history.count, dtype=torch.bool))
        return action, torch.zeros(len(action), device=action.device, dtype=action.dtype)

    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        raise ValueError(f"{type(self).__name__} is deterministic and reads a history, so it can't give {sorted(set(want))} for single steps")
