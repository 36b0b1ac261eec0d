"""Frozen dataclasses to plain JSON and back, so that a run's folder says exactly which method it trained, and on which file."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TYPE = "type"  # key that names a nested dataclass
FLOAT = "float"  # key of a float that JSON has no number for
_NAMES = ("inf", "-inf", "nan")


def to_json(value: Any) -> Any:
    """Plain JSON of a settings value: a dataclass becomes {"type": its name, field: ...}, an infinite float {"float": "inf"}.

    What JSON can't hold (a callable, a module) becomes {"python": repr}, which `from_json` refuses to rebuild.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {TYPE: type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: str(float(value))}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    # No other process shares an address: a run with a function among its settings could not be resumed.
    return {"python": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))}


def from_json(hint: Any, data: Any) -> Any:
    """Rebuild what `to_json` wrote, `hint` being the type of the field. Raises ValueError for what doesn't fit the type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(data, dict) and "python" in data:
        raise ValueError(f"this setting was a Python object ({data['python']}) and can't be rebuilt from JSON; use the agent that train() returned")
    if _is_float(data):
        return float(data[FLOAT])
    if origin in (typing.Union, types.UnionType):
        return _from_union(args, data)
    if dataclasses.is_dataclass(hint):
        return _from_dataclass(typing.cast(type, hint), data)
    if origin is tuple:
        hints = args[:1] * len(data) if args[1:] == (...,) else args
        return tuple(from_json(h, d) for h, d in zip(hints, data, strict=True))
    if origin is dict:
        return {k: from_json(args[1], v) for k, v in data.items()}
    if hint is float and isinstance(data, str):  # how an infinite one was written at first
        return float(data)
    if isinstance(data, dict):
        return {k: from_json(Any, v) for k, v in data.items()}
    return [from_json(Any, v) for v in data] if isinstance(data, list) else data


def _is_float(data: Any) -> bool:
    return isinstance(data, dict) and data.keys() == {FLOAT} and data[FLOAT] in _NAMES


def _from_union(options: tuple[Any, ...], data: Any) -> Any:
    if data is None:
        return None
    if isinstance(data, dict) and TYPE in data:
        named = [o for o in options if dataclasses.is_dataclass(o) and getattr(o, "__name__", "") == data[TYPE]]
        if not named:
            raise ValueError(f"settings name {data[TYPE]!r}, expected one of {[getattr(o, '__name__', str(o)) for o in options]}")
        return from_json(named[0], data)
    plain = [o for o in options if o is not type(None) and not dataclasses.is_dataclass(o)]
    return from_json(plain[0], data) if len(plain) == 1 else data


def _from_dataclass(cls: type, data: Any) -> Any:
    if not isinstance(data, dict) or data.get(TYPE) != cls.__name__:
        raise ValueError(f"settings of type {cls.__name__} expected, got {data!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(data.keys() - known - {TYPE})
    if unknown:
        raise ValueError(f"{cls.__name__} has no settings {unknown}; this run was written by another version of markovia")
    return cls(**{name: from_json(hints[name], data[name]) for name in known & data.keys()})


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Which entries of two JSON values differ, as "path: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if _as_first_written(old) == _as_first_written(new) else [f"{path}: {old} -> {new}"]


def _as_first_written(data: Any) -> Any:
    """JSON whose infinite floats are bare names, so that a run of then is the same run."""
    if _is_float(data):
        return data[FLOAT]
    if isinstance(data, dict):
        return {k: _as_first_written(v) for k, v in data.items()}
    return [_as_first_written(x) for x in data] if isinstance(data, list) else data


def file_entry(data: str | Path, judge: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What a run's configuration says of its file: path, content's hash, judge and options. Raises FileNotFoundError, and ValueError for options."""
    from markovia.algos.table import nearest
    from markovia.envs.text.preferences import DataOptions

    known = DataOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ValueError(f"unknown data option {name!r}{nearest(name, known)}")
    return {"path": str(data), "sha256": content_hash(data), "judge": to_json(judge), "options": to_json(options)}


def content_hash(data: str | Path) -> str:
    """sha256 of a file, or of all files of a folder. Raises FileNotFoundError."""
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; --data takes a .jsonl or .jsonl.gz file, or a folder written by datasets' save_to_disk")
    digest = hashlib.sha256()
    for part in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(part.read_bytes())
    return digest.hexdigest()


def task_arguments(
    method: Any, env: str | None, env_kwargs: dict[str, Any], data: Any, reward: Sequence[Any], weights: Sequence[float] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(env_kwargs with the file and the reward functions of a text task, the files it reads by content's hash), for methods that learn from rewards.

    For methods of preferences `data` is theirs, and env_kwargs come back as they are. Raises ValueError for an env that takes no such argument.
    """
    from markovia.algos.preference.method import FromPreferences

    if is_pipeline(env):
        return pipeline_arguments(env_kwargs, data, reward, weights)
    own: dict[str, Any] = {"rewards": list(reward) or None, "weights": list(weights) if weights else None}
    own |= {} if isinstance(method, FromPreferences) or data is None else {"data": str(data)}
    given = {k: v for k, v in own.items() if v is not None}
    if not given:
        return env_kwargs, {}
    import gymnasium as gym

    from markovia.envs.registry import kind_of

    task = None if env is None or kind_of(env) != "language" else gym.spec(env.rpartition(":")[2]).kwargs["task"]
    for name, flag in (("data", "data"), ("rewards", "reward"), ("weights", "reward-weights")):
        if name in given:
            from markovia.envs.text.tasks import takes

            if task is None or not takes(task, name):
                raise ValueError(f"{env or 'no environment'} takes no --{flag}; a text task that does is markovia/Prompts-v0")
            if env_kwargs.get(name) is not None:
                raise ValueError(f"{name} was given twice, as --{flag} and in env_kwargs; give it once")
    return {**env_kwargs, **given}, {given["data"]: content_hash(given["data"])} if "data" in given else {}


def is_pipeline(env: str | None) -> bool:
    """Whether an environment denoises with a pipeline of diffusers, whose folder, prompts and reward are the user's."""
    import gymnasium as gym

    from markovia.envs.registry import kind_of

    return env is not None and kind_of(env) == "denoising" and gym.spec(env.rpartition(":")[2]).kwargs.get("task") == "pipeline"


def pipeline_arguments(
    env_kwargs: dict[str, Any], data: Any, reward: Sequence[Any], weights: Sequence[float] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(env_kwargs with the prompts' file and the reward of images, the file by its content's hash). Raises ValueError for several rewards."""
    if len(reward) > 1 or weights:
        raise ValueError(f"images have one reward, got {len(reward)} and weights {list(weights or ())}; combine them in a function of yours")
    given = {"prompts": None if data is None else str(data), "reward": reward[0] if reward else None}
    for name, flag in (("prompts", "data"), ("reward", "reward")):
        if given[name] is not None and env_kwargs.get(name) is not None:
            raise ValueError(f"{name} was given twice, as --{flag} and in env_kwargs; give it once")
    return {**env_kwargs, **{k: v for k, v in given.items() if v is not None}}, {} if data is None else {str(data): content_hash(data)}
