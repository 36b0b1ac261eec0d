"""Gymnasium spaces as plain JSON and back, so that a checkpoint rebuilds its agent without unpickling anything."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

MAX_ENTRIES = 2**26  # of an observation or action; a picture of 4096 x 4096 in colours has three quarters of it


def _bound(x: np.ndarray) -> Any:
    """One number when all entries agree (also inf, as a string), the nested list otherwise."""
    flat = x.reshape(-1)
    if flat.size and (flat == flat[0]).all():
        return _number(flat[0])
    return [_number(v) for v in flat]


def _number(v: Any) -> Any:
    v = v.item()
    return v if np.isfinite(v) else str(v)  # JSON has no infinity


def _array(value: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if isinstance(value, list):
        return np.array([float(v) if isinstance(v, str) else v for v in value], dtype=dtype).reshape(shape)
    return np.full(shape, float(value) if isinstance(value, str) else value, dtype=dtype)


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """A Box, Discrete, MultiDiscrete, MultiBinary or Dict of these as plain JSON. Other spaces raise ValueError."""
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound(space.low), "high": _bound(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": [[k, space_to_json(v)] for k, v in space.spaces.items()]}
    raise ValueError(
        f"a {type(space).__name__} space is not supported; expected Box, Discrete, MultiDiscrete, MultiBinary or a Dict of these. "
        "gymnasium.wrappers.FlattenObservation turns most other observations into a Box"
    )


def space_from_json(data: dict[str, Any]) -> gym.Space:
    """The space that `space_to_json` wrote. Raises ValueError for anything else, sizes that no environment has included."""
    try:
        return _space(data)
    except (AssertionError, AttributeError, IndexError, KeyError, MemoryError, OverflowError, RecursionError, SyntaxError, TypeError) as error:
        raise ValueError(f"{str(data)[:200]} is not a space that was saved ({error!r}); expected what space_to_json writes") from error


def _shape(data: dict[str, Any]) -> tuple[int, ...]:
    shape = tuple(data["shape"])
    if any(not isinstance(n, int) or n < 0 for n in shape) or len(shape) > 32 or math.prod(shape) > MAX_ENTRIES:
        raise ValueError(f"a space of shape {str(shape)[:80]} is not one of an environment; at most {MAX_ENTRIES} entries are read")
    return shape


def _space(data: dict[str, Any]) -> gym.Space:
    kind = data.get("type")
    if kind == "Box":
        shape, dtype = _shape(data), np.dtype(data["dtype"])
        if dtype.kind not in "biuf":
            raise ValueError(f"a Box of {str(dtype)[:80]} is not one of an environment; expected numbers")
        return spaces.Box(_array(data["low"], shape, dtype), _array(data["high"], shape, dtype), shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(np.array(data["nvec"]), start=np.array(data["start"]))
    if kind == "MultiBinary":
        shape = _shape(data)
        return spaces.MultiBinary(list(shape) if len(shape) > 1 else shape[0])
    if kind == "Dict":
        return spaces.Dict([(k, _space(v)) for k, v in data["spaces"]])
    raise ValueError(f"unknown space type {kind!r}; expected Box, Discrete, MultiDiscrete, MultiBinary or Dict")
