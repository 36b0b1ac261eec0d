"""A look through the files of a Minari dataset before Minari itself reads them: it trusts them, and would build what they name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markovia.envs.offline.hdf5 import links_outside, too_large
from markovia.envs.offline.validate import DatasetError
from markovia.envs.untrusted import parse_json, read_json, refuse_pickle

METADATA, MAIN = "metadata.json", "main_data.hdf5"
MAX_ENTRIES = 2**26  # of one observation or action
_STRINGS = ("dataset_id", "minari_version", "data_format", "observation_space", "action_space", "env_spec", "eval_env_spec")
_NUMBERS = ("total_episodes", "total_steps", "ref_min_score", "ref_max_score")


def check_files(folder: Path) -> None:
    """Raises DatasetError for metadata of other types than Minari's, spaces that are none or larger than the file, an environment that would be
    built to find the spaces, and HDF5 files whose arrays lie elsewhere or are larger than what they hold."""
    try:
        metadata = read_json(folder / METADATA)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(f"{folder} holds no Minari dataset: {METADATA} is missing") from error
    except ValueError as error:
        raise DatasetError(str(error)) from error
    _check_metadata(metadata, folder / METADATA)
    if metadata["data_format"] == "hdf5":
        _check_main(folder / MAIN)


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict):
        raise DatasetError(f"{path} holds a {type(metadata).__name__}, expected an object")
    for name in ("dataset_id", "minari_version", "data_format", "total_episodes", "total_steps"):
        if name not in metadata:
            raise DatasetError(f"{path} lacks {name!r}; it is damaged or not of Minari, fetch it again")
    wrong = [n for n in _STRINGS if metadata.get(n) is not None and not isinstance(metadata[n], str)]
    wrong += [n for n in _NUMBERS if metadata.get(n) is not None and (isinstance(metadata[n], bool) or not isinstance(metadata[n], (int, float)))]
    counts = [metadata[n] for n in ("total_episodes", "total_steps") if n not in wrong]
    if wrong or any(not isinstance(c, int) or not 0 <= c < 2**40 for c in counts):
        raise DatasetError(f"{path}: {wrong[0] if wrong else 'total_episodes or total_steps'} is not of the type that Minari writes; fetch it again")
    for name in ("env_spec", "eval_env_spec"):
        if metadata.get(name) is not None:
            _check_spec(metadata[name], f"{path}, {name}")
    for name in ("observation_space", "action_space"):
        if metadata.get(name) is None:
            _may_build(metadata.get("env_spec"), f"{path}, {name}")
        else:
            _check_space(parse(metadata[name], f"{path}, {name}"), f"{path}, {name}")


def parse(text: str, name: str) -> Any:
    """JSON within JSON. Raises DatasetError."""
    try:
        return parse_json(text, name)
    except ValueError as error:
        raise DatasetError(str(error)) from error


def _check_spec(text: str, name: str) -> None:
    spec = parse(text, name)
    fits = isinstance(spec, dict) and isinstance(spec.get("id"), str) and isinstance(spec.get("entry_point"), (str, type(None)))
    if not fits or not isinstance(spec.get("kwargs", {}), dict) or not isinstance(spec.get("additional_wrappers", ()), (list, tuple)):
        raise DatasetError(f"{name} is no environment's specification; fetch the dataset again")


def _may_build(env_spec: str | None, name: str) -> None:
    """Without a space of its own Minari builds the environment of the specification, whose entry point may be any function of any module."""
    import gymnasium as gym

    spec = {} if env_spec is None else parse(env_spec, name)
    known = gym.registry.get(str(spec.get("id")))
    if known is None or known.entry_point != spec.get("entry_point") or spec.get("additional_wrappers"):
        raise DatasetError(
            f"{name} is missing, so {spec.get('entry_point')!r} would have to be run to find it, and it is not the registered environment "
            f"{spec.get('id')!r}; import the package that registers that, or add the space to {METADATA}"
        )


def _check_space(space: Any, name: str, depth: int = 0) -> None:
    import numpy as np

    if not isinstance(space, dict) or not isinstance(space.get("type"), str) or depth > 16:
        raise DatasetError(f"{name} is no space; fetch the dataset again")
    parts = space.get("subspaces", {})
    for part in parts.values() if isinstance(parts, dict) else parts if isinstance(parts, list) else ():
        _check_space(part, name, depth + 1)
    shape = space.get("shape", [])
    n = space.get("n", 0)
    sizes: list[Any] = [*shape, *(n if isinstance(n, list) else [])] if isinstance(shape, list) else [None]
    if any(not isinstance(k, int) or k < 0 for k in sizes) or len(sizes) > 32 or math.prod(sizes) > MAX_ENTRIES:
        raise DatasetError(f"{name} has the shape {str(shape)[:80]}, which is no environment's; at most {MAX_ENTRIES} entries are read")
    if space["type"] == "MultiBinary" and isinstance(n, int) and n > MAX_ENTRIES:
        raise DatasetError(f"{name} has {n} entries, at most {MAX_ENTRIES} are read")
    if "dtype" in space:
        try:
            numeric = isinstance(space["dtype"], str) and np.dtype(space["dtype"]).kind in "biuf"
        except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError):  # NumPy parses the name
            numeric = False
        if not numeric:
            raise DatasetError(f"{name} holds {str(space['dtype'])[:80]}, expected numbers")


def _check_main(path: Path) -> None:
    import h5py

    if not path.is_file():
        raise DatasetError(f"{path} is missing; fetch the dataset again")
    try:
        refuse_pickle(path)
        if path.stat().st_size == 0:
            return  # a dataset without episodes yet
        with h5py.File(path, "r") as file:
            outside = links_outside(file)
            why = f"{outside} points to another file, or is nested too deeply" if outside is not None else too_large(file)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: can't be read ({error}); it is damaged, fetch it again") from error
    if why is not None:
        raise DatasetError(f"{path}: {why}")
