"""D4RL's flat HDF5 files, read with h5py alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from markovia.envs.durable import in_place
from markovia.envs.names import nearest
from markovia.envs.offline.hdf5 import links_outside, refused
from markovia.envs.offline.scores import Reference, references
from markovia.envs.offline.transitions import About, Transitions, box_like
from markovia.envs.offline.validate import (
    DatasetError,
    Fault,
    Report,
    any_in_row,
    check_writable,
    first_true,
    float64_image,
    no_flags,
    not_finite,
    one_axis,
    overlapping,
    wrong_length,
)
from markovia.envs.untrusted import magic_of_pickle

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
ROUNDING = 1e-4  # relative and absolute, by which next_observations may differ from the observations of the next row
MOST_CHOICES = 2**63 - 1  # of Gymnasium's Discrete


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("D4RL files need h5py: pip install markovia[offline]") from error
    return h5py


def _column(dataset: Any, name: str) -> tuple[np.ndarray | None, list[Fault]]:
    """A whole column, or the first row that the disk does not give back."""
    why = refused(dataset)
    if why is not None or dataset.ndim == 0:
        return None, [Fault(name, None, why or "is one number, expected one row per step")]
    try:
        return dataset[()], []
    except (OSError, ValueError) as error:
        low, high = 0, len(dataset)
        while high - low > 1:  # the rows before `low` can be read, those before `high` can't
            middle = (low + high) // 2
            try:
                dataset[low:middle]
                low = middle
            except (OSError, ValueError):
                high = middle
        return None, [Fault(name, low, f"can't be read ({error}); the file is damaged, fetch it again")]


def _no_file(path: Path) -> str | None:
    """Why there is nothing to open at a path; None where there is."""
    if not path.exists():
        return "does not exist"
    if path.is_dir():
        return "is a folder, expected an HDF5 file"
    pickled = magic_of_pickle(path)
    return None if pickled is None else f"is {pickled}, expected HDF5; loading a pickle runs the code in it, and nothing in it was run"


def _read(path: Path) -> tuple[dict[str, np.ndarray], list[Fault]]:
    """Columns of the file, and what is wrong with each by itself."""
    h5py = _h5py()
    try:
        wrong = _no_file(path)
        if wrong is not None:
            return {}, [Fault("file", None, wrong)]
        file = h5py.File(path, "r")
    except (OSError, ValueError) as error:
        return {}, [Fault("file", None, f"is no whole HDF5 file ({error}); fetch it again")]
    found: dict[str, np.ndarray] = {}
    faults: list[Fault] = []
    with file:
        try:
            outside = links_outside(file)
            if outside is not None:
                return {}, [Fault(outside, None, "points to another file, or is nested too deeply; copy the values into this one")]
            present = [k for k in file if isinstance(file.get(k), h5py.Dataset)]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            return {}, [Fault("file", None, f"has damaged names or groups ({error}); fetch it again")]
        for name in (*REQUIRED, *OPTIONAL):
            if name in present:
                values, bad = _column(file[name], name)
                faults += bad
                if values is not None:
                    found[name] = values
            elif name in REQUIRED:
                hint = nearest(name, present) or f"; the file has {', '.join(present) or 'no arrays'}"
                faults.append(Fault(name, None, f"missing key{hint}"))
    flat = {k for k, v in found.items() if k in ("rewards", "terminals", "timeouts") or (k == "actions" and np.issubdtype(v.dtype, np.integer))}
    found = {k: one_axis(v) if k in flat else v for k, v in found.items()}
    if "actions" in found and found["actions"].ndim == 1 and np.issubdtype(found["actions"].dtype, np.floating):
        found["actions"] = found["actions"][:, None]  # one entry an action
    return found, faults


def _misshapen(name: str, values: np.ndarray) -> list[Fault]:
    """What the other checks could not even look at: no rows, or rows of another shape than the column's."""
    if not len(values):
        return [Fault(name, None, "has no rows; record the dataset again")]
    flat = name in ("rewards", "terminals", "timeouts")
    if (values.ndim != 1) if flat else (values.ndim < (1 if name == "actions" else 2) or not values.size):
        return [Fault(name, None, f"has the shape {values.shape}, expected {'one number' if flat else 'an array'} per row")]
    return []


def _compare(columns: dict[str, np.ndarray], env_id: str | None, horizon: int | None, told: int | None) -> list[Fault]:
    """Faults that one sees only in two columns together, in the values, or against what is known and told; none where no column could be read."""
    if not columns:
        return []
    faults = [fault for name, values in columns.items() for fault in _misshapen(name, values)]
    if faults:
        return faults
    for name, values in columns.items():
        faults += wrong_length(name, len(values), len(columns["observations"]), "observations") if "observations" in columns else []
        if name in ("terminals", "timeouts"):
            faults += no_flags(name, values)
        else:
            faults += not_finite(name, values) + float64_image(name, values.shape, values.dtype)
        if name == "actions" and np.issubdtype(values.dtype, np.integer):
            wrong = first_true((values < 0) | (values >= MOST_CHOICES))
            why = "integer actions are choices, counted from 0; store others as floating point"
            faults += [] if wrong is None else [Fault(name, wrong, f"{values[wrong]}; {why}")]
    if "next_observations" in columns and "observations" in columns:
        shape, expected = columns["next_observations"].shape[1:], columns["observations"].shape[1:]
        faults += [Fault("next_observations", 0, f"has the shape {shape}, expected {expected} (observations)")] if shape != expected else []
    if "timeouts" in columns and "terminals" in columns and len(columns["timeouts"]) == len(columns["terminals"]):
        faults += overlapping("timeouts", columns["terminals"].astype(bool), columns["timeouts"].astype(bool))
    if "timeouts" not in columns and horizon is None:
        mend = "add the key, or pass horizon= (`markovia dataset --horizon`, `markovia train --data.horizon`)"
        faults.append(Fault("timeouts", None, f"missing key, and the task's time limit is unknown; {mend}"))
    if not any(fault.fatal for fault in faults) and columns.keys() >= set(REQUIRED):
        contradicted = _contradicted(columns, env_id, told)
        faults += _not_continuing(columns, horizon) + (contradicted or _too_long(columns, horizon))
    return faults


def _ends(columns: dict[str, np.ndarray], horizon: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(N,) terminated and (N,) truncated, the latter counted where the file has no timeouts, or sets none though an episode passes the limit."""
    terminated = columns["terminals"].astype(bool)
    if "timeouts" not in columns or _unset(columns, horizon):
        return terminated, counted_timeouts(terminated, horizon or len(terminated))
    return terminated, columns["timeouts"].astype(bool)


def _longest(ended: np.ndarray) -> int:
    """Steps of the longest episode."""
    return int(np.diff(np.flatnonzero(np.append(ended[:-1], True)), prepend=-1).max())


def _unset(columns: dict[str, np.ndarray], horizon: int | None) -> bool:
    """Is no timeout set at all, though one must be, as in D4RL's -v0 files?"""
    timeouts = columns.get("timeouts")
    return timeouts is not None and horizon is not None and not timeouts.any() and _longest(columns["terminals"].astype(bool)) > horizon


def _too_long(columns: dict[str, np.ndarray], horizon: int | None) -> list[Fault]:
    """A note on episodes longer than the task's time limit, and what was made of them."""
    if horizon is None or "timeouts" not in columns:
        return []
    if _unset(columns, horizon):
        steps = _longest(columns["terminals"].astype(bool))
        return [Fault("timeouts", None, f"none is set in {steps} steps, and the time limit is {horizon}; counted by the limit", False)]
    terminated, truncated = _ends(columns, horizon)
    steps = _longest(terminated | truncated)
    what = f"an episode has {steps} steps, and the time limit is {horizon}; read as it is"
    return [Fault("timeouts", None, what, False)] if steps > horizon else []


def _not_continuing(columns: dict[str, np.ndarray], horizon: int | None) -> list[Fault]:
    """A note on rows within an episode whose next observation is not the observation of the next row."""
    if "next_observations" not in columns:
        return []
    obs, following = columns["observations"][1:], columns["next_observations"][:-1]
    terminated, truncated = _ends(columns, horizon)
    rows = np.flatnonzero(any_in_row(obs != following) & ~(terminated | truncated)[:-1])
    rows = rows[any_in_row(~np.isclose(obs[rows], following[rows], ROUNDING, ROUNDING))]
    if not len(rows):
        return []
    what = f"differs from observations of row {rows[0] + 1} in the same episode ({len(rows)} row(s))"
    return [Fault("next_observations", int(rows[0]), f"{what}; read as it is", False)]


def _contradicted(columns: dict[str, np.ndarray], env_id: str | None, horizon: int | None) -> list[Fault]:
    """A time limit that was told, against longer episodes of a file with timeouts and against what the references know of its task."""
    if horizon is None or "timeouts" not in columns:
        return []
    terminated, truncated = _ends(columns, horizon)
    longest = _longest(terminated | truncated)
    limits = [h for e, h in references() if e == env_id]
    if longest <= horizon and horizon in (limits or [horizon]):
        return []
    own = f"an episode of {longest} steps" if longest > horizon else f"those of {env_id}, at most {limits[0]} steps"
    return [Fault("timeouts", None, f"the file has its own ends ({own}), which the horizon {horizon} contradicts; leave the horizon out")]


def guess_env_id(path: str | Path) -> str | None:
    """hopper_medium_replay-v2.hdf5 -> hopper-medium-replay-v2, where references know that id; else None."""
    env_id = Path(path).stem.replace("_", "-")
    return env_id if any(env_id == e for e, _ in references()) else None


def _known(path: Path, env_id: str | None, horizon: int | None) -> tuple[str | None, int | None, Reference | None]:
    """env id, time limit and reference, as far as they are given or known."""
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be >= 1, got {horizon}")
    given, env_id = env_id, env_id or guess_env_id(path)
    fitting = {h: r for (e, h), r in references().items() if e == env_id}
    if given is not None and not fitting:
        warnings.warn(f"no reference returns are known for {given}{nearest(given, {e for e, _ in references()})}", stacklevel=3)
    if horizon is None and len(fitting) == 1:
        (horizon,) = fitting
    return env_id, horizon, fitting.get(horizon) if horizon is not None else None


def check_d4rl(path: str | Path, horizon: int | None = None) -> Report:
    """Everything that is wrong with a file, without raising: missing keys, lengths, NaN, flags, float64 images, damage."""
    path, told = Path(path), horizon
    columns, faults = _read(path)
    env_id, horizon, _ = _known(path, None, told)
    return Report(str(path), (*faults, *_compare(columns, env_id, horizon, told)))


def load_d4rl(path: str | Path, env_id: str | None = None, horizon: int | None = None) -> Transitions:
    """Rows of a D4RL file: `observations, actions, rewards, terminals` and, where there are any, `timeouts` and `next_observations`.

    Without next_observations the successor of row i is observation i + 1, which is another episode's where i was truncated and does not exist
    in the last row: there next_known is False, and `view` drops the row. Without timeouts every `horizon`-th step of an episode counts as one.
    env_id and horizon come from the file's name where the references know it. Raises DatasetError with the whole report.
    """
    path, told = Path(path), horizon
    columns, faults = _read(path)
    env_id, horizon, reference = _known(path, env_id, told)
    report = Report(str(path), (*faults, *_compare(columns, env_id, horizon, told)))
    report.check()
    for fault in report.faults:
        warnings.warn(f"{path.name}: {fault.field}, row {fault.row}: {fault.problem}", stacklevel=2)
    columns = {k: v.astype(np.float32) if float64_image(k, v.shape, v.dtype) else v for k, v in columns.items()}
    obs, action, reward = (columns[k] for k in ("observations", "actions", "rewards"))
    terminated, truncated = _ends(columns, horizon)
    ends = terminated | truncated
    known = np.ones(len(reward), dtype=bool) if "next_observations" in columns else ~ends
    known[-1] &= "next_observations" in columns
    about = About(path.stem, env_id, horizon, box_like(obs), _action_box(action), None, reference, {"file": path.name})
    return Transitions(
        obs=obs,
        action=action,
        reward=reward,
        next_obs=columns.get("next_observations", np.concatenate([obs[1:], obs[-1:]])),
        terminated=terminated,
        truncated=truncated,
        episode=np.cumsum(np.append(0, ends[:-1])),
        next_known=known,
        about=about,
    )


def counted_timeouts(terminated: np.ndarray, horizon: int) -> np.ndarray:
    """(N,) bool: every `horizon`-th step since the episode's start, where no termination came first."""
    n = len(terminated)
    last_start = np.maximum.accumulate(np.where(np.append(True, terminated[:-1]), np.arange(n), 0))
    return ((np.arange(n) - last_start) % horizon == horizon - 1) & ~terminated


def _action_box(action: np.ndarray) -> Any:
    """D4RL's tasks act in [-1, 1]; a file that goes beyond says itself how far. Integers are choices."""
    from gymnasium import spaces

    if not np.issubdtype(action.dtype, np.floating):
        return spaces.Discrete(int(action.max()) + 1) if action.ndim == 1 else spaces.MultiDiscrete(action.max(axis=0).astype(np.int64) + 1)
    bound = np.maximum(1.0, np.abs(action).max(axis=0)).astype(action.dtype)
    return spaces.Box(-bound, bound, dtype=action.dtype.type)


def write_d4rl(data: Transitions, path: str | Path) -> Path:
    """Write rows as a D4RL file, next_observations included; a killed write leaves nothing under that name.

    Flags are the format's only marks of an episode's end: one that was cut before the last row of all is written as truncated.
    Raises ValueError for a file that exists, DatasetError for dictionary observations, which the format has no place for, for faulty rows and
    unknown final observations.
    """
    if isinstance(data.obs, dict):
        raise DatasetError(f"{data.about.name} has dictionary observations; flatten them first with flat_obs(keys)")
    path, inner = Path(path), data.bounds()[1][:-1] - 1
    if path.exists():
        raise ValueError(f"{path} exists already; choose another name, or delete it")
    check_writable(data)
    timeouts = data.truncated.copy()
    timeouts[inner] |= ~data.terminated[inner]
    with in_place(path) as temporary, _h5py().File(temporary, "w") as file:
        names = {"observations": data.obs, "actions": data.action, "rewards": data.reward, "next_observations": data.next_obs}
        for name, values in {**names, "terminals": data.terminated, "timeouts": timeouts}.items():
            file.create_dataset(name, data=values)
    return path
