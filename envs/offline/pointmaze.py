"""A scripted expert for the point mazes of gymnasium-robotics: shortest way through the cells, and a spring towards the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def next_cells(free: np.ndarray) -> np.ndarray:
    """(C, C) int: from cell i the neighbour on a shortest way to cell j, i itself where i = j or there is no way.

    free (R, K) bool; cells are counted row by row, C = R K.
    """
    from scipy.sparse.csgraph import shortest_path  # heavy, and needed by few

    rows, columns = free.shape
    index = np.arange(free.size).reshape(free.shape)
    linked = np.zeros((free.size, free.size))
    for r, c in np.argwhere(free):
        for dr, dc in NEIGHBOURS:
            if 0 <= r + dr < rows and 0 <= c + dc < columns and free[r + dr, c + dc]:
                linked[index[r, c], index[r + dr, c + dc]] = 1.0
    length = shortest_path(linked, unweighted=True)  # value iteration with a cost of one per cell ends in these
    onward = np.where(linked[:, :, None] > 0, length[None], np.inf)  # (from, neighbour, to)
    best = onward.argmin(axis=1)
    stay = ~np.isfinite(length) | (length == 0)
    return np.where(stay, np.arange(free.size)[:, None], best)


class MazeController:
    """a = clip(10 (w - x) - v + N(0, noise^2)), w the middle of the next cell, or the goal itself when x is in its cell.

    maze_map  rows of 0 (free), 1 (wall) or letters (free), as the environments' spec holds it; cells have edge length 1, (0, 0) is the middle
    It has `predict` like an agent; `deterministic=True` leaves the noise out.
    """

    def __init__(self, maze_map: Sequence[Sequence[Any]], noise: float = 0.0, seed: int = 0, gain: float = 10.0, damping: float = 1.0) -> None:
        free = np.array([[cell != 1 for cell in row] for row in maze_map])
        self.shape, self.next = free.shape, next_cells(free)
        self.noise, self.gain, self.damping = noise, gain, damping
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the noise anew."""
        self._rng = np.random.default_rng(seed)

    def cell(self, xy: np.ndarray) -> np.ndarray:
        """(n,) cell that holds each point (n, 2)."""
        rows, columns = self.shape
        row = np.clip(np.floor(rows / 2 - xy[:, 1]), 0, rows - 1)
        column = np.clip(np.floor(xy[:, 0] + columns / 2), 0, columns - 1)
        return (row * columns + column).astype(int)

    def middle(self, cell: np.ndarray) -> np.ndarray:
        """(n, 2) middle of each cell (n,)."""
        rows, columns = self.shape
        return np.stack([cell % columns + 0.5 - columns / 2, rows / 2 - cell // columns - 0.5], axis=1)

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        """Actions (n, 2) for batched dictionary observations of a point maze."""
        position, velocity = observation["observation"][:, :2], observation["observation"][:, 2:]
        here, there = self.cell(position), self.cell(observation["desired_goal"])
        target = np.where((here == there)[:, None], observation["desired_goal"], self.middle(self.next[here, there]))
        action = self.gain * (target - position) - self.damping * velocity
        if not deterministic:
            action = action + self.noise * self._rng.standard_normal(action.shape)
        return np.clip(action, -1.0, 1.0).astype(np.float32), state


def maze_controller(env_id: str, noise: float = 0.0, seed: int = 0) -> MazeController:
    """The controller of a registered point maze. Raises ValueError for an environment without a maze map."""
    from markovia.envs.control.vector import env_spec

    kwargs = env_spec(env_id).kwargs
    if "maze_map" not in kwargs:
        raise ValueError(f"{env_id} has no maze_map; the controller drives PointMaze environments")
    return MazeController(kwargs["maze_map"], noise, seed)
