"""Where every driver looks for numbers that are not finite, at the step where they appear; each look is one reduction over what is at hand.

    a step of environments    observations, rewards, costs     `check_step`
    whole sequences           rewards, costs, log-probs        `scored`, `check_logp`
    a step of an optimiser    the gradient's norm              `Watch`

What is found is raised as `NotFinite` with its batch. A run writes that to its folder (`markovia.loop`) and can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.agents.records import Rollout
from markovia.algos.statistics import Stats
from markovia.envs.finite import NotFinite

EVERY = 16  # updates between two looks on an accelerator, where a look waits for it
NORM = "grad_norm"  # what names of gradient norms begin with in an update's statistics


def flat(batch: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, dataclasses and lists of such by dotted name; numbers, texts and None are leaves too."""
    if is_dataclass(batch) and not isinstance(batch, type):
        batch = {f.name: getattr(batch, f.name) for f in fields(batch)}
    if isinstance(batch, list | tuple) and any(is_dataclass(x) for x in batch):
        batch = {str(i): x for i, x in enumerate(batch)}
    if not isinstance(batch, Mapping):
        return {} if batch is None else {name or "batch": batch}
    out: dict[str, Any] = {}
    for key, value in batch.items():
        out |= flat(value, f"{name}.{key}" if name else str(key))
    return out


def numbers(batch: Any) -> dict[str, Tensor]:
    """The tensors and numeric arrays of `flat`, on the CPU."""
    out = {}
    for name, value in flat(batch).items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            out[name] = torch.from_numpy(np.ascontiguousarray(value))
        elif isinstance(value, Tensor):
            out[name] = value.detach().cpu()
    return out


def place(batch: Any) -> str | None:
    """Which column holds a number that is not finite, and where; steps that a mask (B, T) leaves out may hold anything. None: there is none."""
    columns = numbers(batch)
    masks = [mask for name, mask in columns.items() if name.rpartition(".")[2] == "mask" and mask.dtype == torch.bool]
    for name, x in columns.items():
        if not x.is_floating_point():
            continue
        bad = ~x.isfinite()
        for mask in masks:
            if x.shape[: mask.ndim] == mask.shape:
                bad &= mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
        if bad.any():
            at = bad.nonzero()[0].tolist()
            return f"{name}{at} is {float(x[tuple(at)])}"
    return None


# -- environments --------------------------------------------------------------------------------------------------------------------------

_MEND = {
    "reward": "rewards must be finite numbers",
    "cost": "costs must be finite numbers",
    "observation": "observations must be finite numbers; mend the environment, or wrap it so that such an episode ends before",
    "final observation": "observations must be finite numbers; mend the environment, or wrap it so that such an episode ends before",
}


def check_step(field: str, values: Any, step: int, batch: Callable[[], Any], rows: np.ndarray | None = None) -> None:
    """Raises NotFinite for an entry of `values` (n, ...), an array or a dictionary of them; row i belongs to environment rows[i] (None: i)."""
    for key, x in values.items() if isinstance(values, dict) else (("", values),):
        if x.dtype.kind != "f" or np.isfinite(x).all():
            continue
        at = np.argwhere(~np.isfinite(x))[0].tolist()
        entry = f"{field} {x[tuple(at)]}" if x.ndim == 1 else f"{field} {x[tuple(at)]} (entry {f'{key!r} ' if key else ''}{at[1:]})"
        env = at[0] if rows is None else int(rows[at[0]])
        raise NotFinite(f"environment {env} returned the {entry} at step {step}; {_MEND[field]}", {**batch(), field.replace(" ", "_"): values})


# -- sequences -----------------------------------------------------------------------------------------------------------------------------


def scored(task: Any, rollout: Rollout) -> Any:
    """task.score(rollout); the error of a reward that is not as it should be carries the record away."""
    try:
        return task.score(rollout)
    except ValueError as error:
        if getattr(error, "batch", None) is None:
            error.batch = rollout  # type: ignore[attr-defined]
        raise


def check_logp(rollout: Rollout) -> None:
    """Raises NotFinite where the log-prob of a decision that counts is not finite: the network that made it holds, or made, NaN or infinity."""
    bad = rollout.mask & ~rollout.logp_old.isfinite()
    if bad.any():
        row, step = bad.nonzero()[0].tolist()
        raise NotFinite(
            f"the policy's log-prob of decision {step} of row {row} is {float(rollout.logp_old[row, step])}: its network gives numbers that are not "
            "finite; go on from an earlier checkpoint with a lower learning rate, or in float32",
            rollout,
        )


# -- updates -------------------------------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at the gradient norms that updates return, so that the first broken one is named and its minibatch kept.

    every  updates between two looks: 1 on a CPU, where reading a number is free. 0: whenever `look` is called, as at the end of an iteration
    """

    def __init__(self, device: torch.device, every: int | None = None) -> None:
        self.every = (1 if device.type == "cpu" else EVERY) if every is None else every
        self.iteration = self.count = 0
        self.broken = False  # whether it has found one
        self._pending: list[tuple[int, Any, Any]] = []

    def begin(self, iteration: int) -> None:
        """Number the updates of an iteration from 0."""
        self.iteration, self.count = iteration, 0

    def add(self, stats: Stats | Mapping[str, Tensor | float], batch: Any) -> None:
        """The statistics of one update, and its minibatch or a function that makes it. Raises NotFinite, at the latest `every` updates later."""
        if self.every != 1 or isinstance(stats, Stats) or not all(math.isfinite(stats[name]) for name in stats if name.startswith(NORM)):
            self._pending.append((self.count, stats, batch))
        self.count += 1
        if self._pending and len(self._pending) >= self.every > 0:
            self.look()

    def look(self) -> None:
        """Raises NotFinite for the first update since the last look whose gradient was not finite."""
        pending, self._pending = self._pending, []
        for number, norms, batch in _norms(pending):
            for name, norm in norms.items():
                if not math.isfinite(norm):
                    raise self._error(number, name, norm, batch() if callable(batch) else batch)

    def _error(self, number: int, name: str, norm: float, batch: Any) -> NotFinite:
        self.broken, found = True, place(batch)
        of = name.partition("/")[2]
        why = f"its minibatch holds the cause: {found}" if found else (
            "every number of its minibatch is finite, so the loss or the network overflowed; try a lower learning rate or a lower max_grad_norm, "
            "or float32 in place of bf16"
        )  # fmt: skip
        return NotFinite(f"the gradient{f' of {of}' if of else ''} has norm {norm} in update {number} of iteration {self.iteration}; {why}", batch)


def _norms(pending: list[tuple[int, Any, Any]]) -> Iterator[tuple[int, dict[str, float], Any]]:
    """(number, its norms by name, batch) of pending updates; vectors of statistics are read together."""
    if len(pending) > 1 and isinstance(pending[0][1], Stats):
        names = pending[0][1].names
        at = [i for i, name in enumerate(names) if name.startswith(NORM)]
        table = torch.stack([stats.values for _, stats, _ in pending])[:, at]
        if bool(table.isfinite().all()):
            return
        for (number, _, batch), row in zip(pending, table.tolist(), strict=True):
            yield number, {names[i]: x for i, x in zip(at, row, strict=True)}, batch
        return
    for number, stats, batch in pending:
        if isinstance(stats, Stats):
            yield number, {name: float(stats[name]) for name in stats.names if name.startswith(NORM)}, batch
        else:
            yield number, {name: float(x) for name, x in stats.items() if name.startswith(NORM)}, batch
