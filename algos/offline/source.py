"""A dataset as the driver's source of transitions: all rows as tensors on the device, drawn by index tensors."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from markovia.agents.control import ControlAgent
from markovia.agents.networks import is_image
from markovia.agents.normalizer import ObsNorm
from markovia.algos.off_policy.replay import Batch, Replay
from markovia.algos.offline.method import Logged
from markovia.envs.offline.transforms import ObsTransform, Transform, reward_transform
from markovia.envs.offline.transitions import Transitions, box_like, columns, space_columns

TOLERANCE = 1e-4  # of the Box's width, by which a logged action may leave it through rounding


class DatasetSource:
    """Rows that stay as they are: a step adds nothing and counts one update. `transform` is what was done to rewards and observations."""

    def __init__(self, rows: Batch, transform: Transform) -> None:
        self.transform = transform
        self.replay = Replay(len(rows.reward))
        self.replay.add(rows)
        self.episodes: list[float] = []
        self._checksum = checksum(rows)

    def step(self, agent: Any, generator: torch.Generator, uniform: bool = False) -> int:
        return 1

    def reset(self, seed: int) -> None:
        """There is nothing to reset."""

    def close(self) -> None:
        """There is nothing to close."""

    def state(self) -> dict[str, Tensor]:
        """A checksum of the rows alone: they are read again from the dataset."""
        return {"checksum": torch.tensor(self._checksum)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError when the run was begun on other rows."""
        if int(state["checksum"]) != self._checksum:
            raise ValueError("the dataset has changed since this run began, so it can't go on with the same numbers; train into another folder")


def checksum(rows: Batch) -> int:
    """CRC-32 of every column, in order."""
    found = 0
    for column in rows.named().values():
        found = zlib.crc32(column.cpu().numpy().tobytes(), found)
    return found


def make_source(data: Transitions, settings: Logged, agent: ControlAgent, gamma: float) -> DatasetSource:
    """The rows that `settings` leave, as `agent` sees them; its normaliser is set to the data's mean and std + 1e-3, and stays so.

    Raises ValueError when observations or actions are not those of the agent's spaces.
    """
    check_fits(data, agent)
    data = data.best(settings.fraction, settings.fraction_gamma)
    norm: Any = agent.net["normalizer"] if "normalizer" in agent.net else None
    transform = Transform(reward_transform(settings.reward, data), ObsTransform.fit(data, keys=norm.keys) if norm is not None and norm.keys else None)
    if transform.obs is not None:
        fix_normalizer(norm, transform.obs, len(data))
    data = replace(data, reward=transform.reward(data.reward))

    def view(rows: Transitions) -> Transitions:
        return rows.view(settings.compat, settings.next_action)

    rows = view(data)
    extra: dict[str, np.ndarray] = {}
    if settings.next_action:
        extra["next_action"] = unit(rows.next_action, agent)
    if settings.returns_to_go is not None:
        extra["ret"] = view(replace(data, reward=data.returns_to_go(gamma, cut=settings.returns_to_go))).reward
    return DatasetSource(as_batch(rows, agent, extra), transform)


def as_batch(rows: Transitions, agent: ControlAgent, extra: dict[str, np.ndarray]) -> Batch:
    """Every row as tensors on the agent's device: observations as its networks see them, actions in [-1, 1]."""
    like = next(agent.net.parameters())

    def number(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device=like.device, dtype=like.dtype)

    return Batch(
        obs=agent.observe(rows.obs),
        action=number(unit(rows.action, agent)),
        reward=number(rows.reward),
        next_obs=agent.observe(rows.next_obs),
        continuation=number(~rows.terminated),
        truncated=torch.from_numpy(rows.truncated.copy()).to(like.device),
        extra={k: number(v) for k, v in extra.items()},
    )


def unit(action: np.ndarray, agent: ControlAgent) -> np.ndarray:
    """Logged actions (n, *shape) of the Box as (n, d) in [-1, 1]."""
    space = agent.action_space
    assert isinstance(space, spaces.Box)
    scaled = 2.0 * (action.astype(np.float64) - space.low) / (space.high - space.low).astype(np.float64) - 1.0
    return np.clip(scaled, -1.0, 1.0).reshape(len(action), -1)


def fix_normalizer(normalizer: ObsNorm, fitted: ObsTransform, count: int) -> None:
    """Give the agent's normaliser the data's moments: (s - mean) / std, where std already holds what keeps it from 0."""
    for key, norm in zip(normalizer.keys, normalizer.norms, strict=True):
        mean, std = (part[key] if isinstance(part, dict) else part for part in (fitted.mean, fitted.std))
        norm.set_moments(torch.from_numpy(mean), torch.from_numpy(std), count)  # type: ignore[operator]


def check_fits(data: Transitions, agent: ControlAgent) -> None:
    """Refuse data that the agent can't take, with a ValueError that says what differs."""
    space, name, own = agent.action_space, data.about.name, data.about.action_space
    assert isinstance(space, spaces.Box)
    parts, obs = space_columns(agent.observation_space), columns(data.obs)
    wanted, given = {k: tuple(s.shape or ()) for k, s in parts.items()}, {k: v.shape[1:] for k, v in obs.items()}
    if wanted != given:
        raise ValueError(f"{name} has observations {given}, but the environment gives {wanted}; name the environment that the data were recorded in")
    scaled = [k for k, s in parts.items() if is_image(s) != is_image(box_like(obs[k]))]
    if scaled:
        told = f"{name} has {scaled[0]} of {obs[scaled[0]].dtype}, but the environment gives {parts[scaled[0]].dtype}"
        raise ValueError(f"{told}: the same number is another brightness there; convert the images, bytes run from 0 to 255")
    if data.action.shape[1:] != space.shape:
        raise ValueError(f"{name} has actions of shape {data.action.shape[1:]}, but the environment takes {space.shape}; name its own environment")
    if own is not None and not isinstance(own, spaces.Box):
        raise ValueError(f"{name} was recorded with actions in {own}, and the environment takes {space}; name its own environment")
    # D4RL's files do not say their bounds; Minari's datasets do, and so do rows that come with their environment.
    declared = own if own is not None and (data.about.declared or data.about.env_spec is not None) else space
    if declared.shape != space.shape or not (np.allclose(declared.low, space.low) and np.allclose(declared.high, space.high)):
        raise ValueError(f"{name} was recorded with actions in {own}, and the environment takes {space}: the same number is another action there")
    slack = TOLERANCE * (space.high - space.low)
    if (data.action < space.low - slack).any() or (data.action > space.high + slack).any():
        raise ValueError(f"{name} has actions from {data.action.min()} to {data.action.max()}, outside the environment's {space}; rescale them")
