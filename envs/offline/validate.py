"""What is wrong with a file of logged decisions, by field and row, before anything learns from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from markovia.envs.offline.transitions import Transitions, columns


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


def first_true(mask: np.ndarray) -> int | None:
    """Index of the first True along axis 0, any other axis counted together; None where there is none."""
    rows = mask.reshape(len(mask), -1).any(axis=1) if mask.ndim > 1 else mask
    return int(rows.argmax()) if rows.any() else None


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
    count = int(bad.reshape(len(bad), -1).any(axis=1).sum())
    return [Fault(name, row, f"{first.flat[0]} ({count} such row(s)); drop these episodes, or record them again")]


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
    faults += _outside(data)
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
        apart = (obs[1:] != following[:-1]).reshape(len(obs) - 1, -1).any(axis=1) & inside
        row = first_true(apart)
        if row is not None:
            out.append(Fault(f"next_{name}", row, f"differs from {name} of row {row + 1} in the same episode ({int(apart.sum())} row(s))"))
    return out


def _outside(data: Transitions) -> list[Fault]:
    """Actions outside their space; a note, since logged policies overshoot by rounding."""
    from gymnasium import spaces

    space, action = data.about.action_space, data.action
    if isinstance(space, spaces.Box):
        if action.shape[1:] != space.shape:
            return [Fault("action", 0, f"shape {action.shape[1:]}, expected {space.shape} (the action space)")]
        low, high = space.low - 1e-4, space.high + 1e-4
        row = first_true((action < low) | (action > high))
    elif isinstance(space, spaces.Discrete):
        row = first_true((action < space.start) | (action >= space.start + space.n))
    else:
        return []
    return [] if row is None else [Fault("action", row, f"{action[row]} lies outside {space}", isinstance(space, spaces.Discrete))]
