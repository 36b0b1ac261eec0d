"""What is wrong with a file of logged decisions, by field and row, before anything learns from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from markovia.envs.offline.transitions import Transitions, columns, space_columns

if TYPE_CHECKING:
    import gymnasium as gym


class DatasetError(ValueError):
    """Data that can't be used as it is; the message names field and row."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. `row` is the first row it concerns, None when it is not about a row."""

    field: str
    row: int | None
    problem: str
    fatal: bool = True  # False: loading goes on, `problem` says how the rows are read

    def __str__(self) -> str:
        place = self.field if self.row is None else f"{self.field}, row {self.row}"
        return f"{'fault' if self.fatal else 'note '}  {place}: {self.problem}"


@dataclass(frozen=True)
class Report:
    """All faults of one source."""

    source: str
    faults: tuple[Fault, ...] = ()

    @property
    def fatal(self) -> tuple[Fault, ...]:
        return tuple(f for f in self.faults if f.fatal)

    def __str__(self) -> str:
        return "\n".join([f"{self.source}: {len(self.faults) or 'no'} fault(s)", *(f"  {f}" for f in self.faults)])

    def check(self) -> None:
        """Raise DatasetError with the whole report when something fatal is in it."""
        if self.fatal:
            raise DatasetError(str(self))


def any_in_row(mask: np.ndarray) -> np.ndarray:
    """(N,) bool of (N, ...), which may have no rows or no entries in them."""
    return np.asarray(mask.any(axis=tuple(range(1, mask.ndim))))


def first_true(mask: np.ndarray) -> int | None:
    """Index of the first True along axis 0, any other axis counted together; None where there is none."""
    rows = any_in_row(mask)
    return int(rows.argmax()) if rows.any() else None


def one_axis(values: np.ndarray) -> np.ndarray:
    """(N,) of (N, 1), as many write rewards and flags; anything else as it is."""
    return values[:, 0] if values.shape[1:] == (1,) else values


def no_flags(name: str, values: np.ndarray) -> list[Fault]:
    """The first flag (N,) that is neither 0 nor 1."""
    row = first_true((values != 0) & (values != 1))
    return [] if row is None else [Fault(name, row, f"{values[row]}, expected 0 or 1")]


def not_finite(name: str, values: np.ndarray) -> list[Fault]:
    """NaN and infinite entries of a numeric column."""
    if not np.issubdtype(values.dtype, np.number):
        return [Fault(name, None, f"holds {values.dtype}, expected numbers")]
    if not np.issubdtype(values.dtype, np.inexact):
        return []
    bad = ~np.isfinite(values)
    row = first_true(bad)
    if row is None:
        return []
    first = values[row][bad[row]] if values.ndim > 1 else values[row : row + 1]
    return [Fault(name, row, f"{first.flat[0]} ({int(any_in_row(bad).sum())} such row(s)); drop these episodes, or record them again")]


def wrong_length(name: str, found: int, expected: int, of: str) -> list[Fault]:
    """A column that is shorter or longer than the one that it belongs to; the row is the first that only one of them has."""
    if found == expected:
        return []
    return [Fault(name, min(found, expected), f"{found} rows, expected {expected} ({of})")]


def overlapping(name: str, terminated: np.ndarray, truncated: np.ndarray) -> list[Fault]:
    """Steps that are flagged as termination and as truncation."""
    both = terminated & truncated
    row = first_true(both)
    return [] if row is None else [Fault(name, row, f"terminated and truncated at once ({int(both.sum())} row(s)); read as terminated", False)]


def float64_image(name: str, shape: tuple[int, ...], dtype: np.dtype) -> list[Fault]:
    """Images (rows of at least 2 axes, 8 pixels or more each) that take eight bytes a value."""
    if dtype != np.float64 or len(shape) < 3 or sum(n >= 8 for n in shape[1:]) < 2:
        return []
    return [Fault(name, 0, f"images of shape {shape[1:]} as float64 take 8 times the memory of uint8; read as float32", False)]


def check_transitions(data: Transitions) -> Report:
    """Faults of rows in memory: numbers that are not finite, next observations that don't follow, spaces that don't hold them."""
    numeric = {**columns(data.obs), **columns(data.next_obs, "next_obs"), "action": data.action, "reward": data.reward}
    faults = [f for name, values in numeric.items() for f in not_finite(name, values)]
    faults += [f for name, values in numeric.items() for f in float64_image(name, values.shape, values.dtype)]
    flags = first_true((data.terminated | data.truncated)[:-1] & (data.episode[1:] == data.episode[:-1]))
    if flags is not None:
        faults.append(Fault("terminated / truncated", flags, f"an end flag in the middle of episode {int(data.episode[flags])}"))
    if first_true(np.diff(data.episode) < 0) is not None:
        faults.append(Fault("episode", first_true(np.diff(data.episode) < 0), "episode ids must not fall"))
    faults += _not_following(data)
    faults += outside_spaces(data)
    return Report(data.about.name, tuple(faults))


def check_writable(data: Transitions) -> None:
    """Raises DatasetError for rows that a file can't hold: faulty ones, and episodes whose last successor nobody knows."""
    check_transitions(data).check()
    last, name = data.bounds()[1] - 1, data.about.name
    lost = last[~data.next_known[last] & ~data.terminated[last]]
    if len(lost):
        raise DatasetError(f"{name}: next_obs, row {int(lost[0])}: the episode's final observation is not known; write data.view() instead")


def _not_following(data: Transitions) -> list[Fault]:
    """Rows whose next_obs is not the next row's obs of the same episode."""
    inside = (data.episode[1:] == data.episode[:-1]) & data.next_known[:-1]
    out = []
    for (name, obs), following in zip(columns(data.obs).items(), columns(data.next_obs).values(), strict=True):
        apart = any_in_row(obs[1:] != following[:-1]) & inside
        row = first_true(apart)
        if row is not None:
            out.append(Fault(f"next_{name}", row, f"differs from {name} of row {row + 1} in the same episode ({int(apart.sum())} row(s))"))
    return out


def outside_spaces(data: Transitions) -> list[Fault]:
    """Observations and actions of another shape than their space's, choices that it does not have, and actions outside a Box.

    The last is a note, since logged policies overshoot by rounding; observations may leave their Box, as many environments' own do.
    """
    from gymnasium import spaces

    about, faults = data.about, []
    told = about.observation_space
    named, found = space_columns(told), columns(data.obs)
    if told is not None and named.keys() != found.keys():
        return [Fault("obs", None, f"holds {', '.join(found)}, expected {', '.join(named)} (the observation space)")]
    for name, values in {**found, **columns(data.next_obs, "next_obs")}.items():
        faults += _outside(name, values, named.get(name.removeprefix("next_")), "the observation space")
    faults += _outside("action", data.action, about.action_space, "the action space")
    if not faults and isinstance(about.action_space, spaces.Box):
        row = first_true((data.action < about.action_space.low - 1e-4) | (data.action > about.action_space.high + 1e-4))
        faults += [] if row is None else [Fault("action", row, f"{data.action[row]} lies outside {about.action_space}", False)]
    return faults


def _outside(name: str, values: np.ndarray, space: gym.Space | None, of: str) -> list[Fault]:
    """Rows of another shape than the space's and, where it counts choices, those that are none."""
    from gymnasium import spaces

    if space is None or space.shape is None:
        return []
    if values.shape[1:] != space.shape:
        return [Fault(name, 0, f"has the shape {values.shape[1:]}, expected {space.shape} ({of})")]
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        low, high = space.start, space.start + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
    elif isinstance(space, spaces.MultiBinary):
        low, high = 0, 1
    else:
        return []
    if values.dtype.kind not in "biu":
        return [Fault(name, None, f"holds {values.dtype}, expected integers ({of}, {space})")]
    row = first_true((values < low) | (values > high))
    return [] if row is None else [Fault(name, row, f"{values[row]} lies outside {space}")]
