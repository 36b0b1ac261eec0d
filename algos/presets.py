"""Settings as data: preset files per kind of MDP and per environment on top of a method's row; flags come on top of these."""

from __future__ import annotations

import dataclasses
import json
import typing
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import numpy as np

from markovia.algos import advantages
from markovia.algos.denoising import adjoint, sources
from markovia.algos.denoising import preference as denoising_preference
from markovia.algos.diffusion_policy import method as diffusion_policy
from markovia.algos.off_policy import method as off_policy
from markovia.algos.off_policy import slots as off_policy_slots
from markovia.algos.offline import method as offline
from markovia.algos.on_policy import auxiliary, divergence, entropy, filters, merging, method, references, rewards, schedules, surrogates, tokens
from markovia.algos.on_policy.method import NaturalGradient
from markovia.algos.preference.method import FromPreferences
from markovia.algos.safe import constraint, dual, replayed, termination
from markovia.algos.systems import Method, find, rows
from markovia.algos.table import nearest
from markovia.envs.registry import kind_of

FOLDER = Path(__file__).parent / "presets"
_PLAIN = (int, float, bool, str, NoneType)
_ON_POLICY = (advantages, auxiliary, divergence, entropy, filters, merging, method, references, rewards, schedules, surrogates, tokens)
_CHAINS = (adjoint, denoising_preference, diffusion_policy, sources)
_MODULES = (*_ON_POLICY, off_policy, off_policy_slots, offline, *_CHAINS, constraint, dual, replayed, termination)
_CLASSES: dict[str, type] = {
    name: c for m in _MODULES for name, c in vars(m).items() if isinstance(c, type) and dataclasses.is_dataclass(c)
}


@cache
def _data() -> dict[str, Any]:
    return {f.stem: json.loads(f.read_text()) for f in sorted(FOLDER.glob("*.json"))}


def override(value: Any, changes: dict[str, Any]) -> Any:
    """`value` (a nested frozen dataclass) with changes; a nested dictionary changes a part, with "type" it replaces it by another class.

    Parts of a tuple are changed by their number: {"reward": {"0": {"rate": 0.05}}}.

    Raises ValueError for a field that the class does not have, and for a value of another type than its field's where that is plain.
    """
    names = {f.name for f in dataclasses.fields(value)}
    out: dict[str, Any] = {}
    for key, change in changes.items():
        if key not in names:
            raise ValueError(f"{type(value).__name__} has no field {key!r}{nearest(key, names)}")
        current = getattr(value, key)
        if isinstance(change, dict) and isinstance(current, tuple):
            change = tuple(override(part, change.get(str(i), {})) for i, part in enumerate(current))
        elif isinstance(change, dict):
            change = dict(change)
            base = _CLASSES[change.pop("type")]() if "type" in change else current
            if not dataclasses.is_dataclass(base):
                raise ValueError(f"{type(value).__name__}.{key} is {base!r}; name the class to put there with \"type\"")
            change = override(base, change)
        elif isinstance(change, list) and isinstance(current, tuple):
            change = tuple(change)
        out[key] = _fitting(change, type(value), key)
    return dataclasses.replace(value, **out)


@cache
def _plain_types(cls: type, key: str) -> tuple[type, ...]:
    """The types of a field of numbers, words or None; () for other fields."""
    hint = typing.get_type_hints(cls)[key]
    types = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return types if all(t in _PLAIN for t in types) else ()


def _fitting(value: Any, cls: type, key: str) -> Any:
    """A value for a plain field, NumPy's numbers as Python's and 1e6 as a whole number. Raises ValueError for one of another type."""
    value, types = value.item() if isinstance(value, np.generic) else value, _plain_types(cls, key)
    if int in types and float not in types and type(value) is float and value.is_integer():
        return int(value)
    if types and type(value) not in types and not (float in types and type(value) is int):
        names = " or ".join("None" if t is NoneType else t.__name__ for t in types)
        raise ValueError(f"{cls.__name__}.{key} must be {names}, got {value!r} of type {type(value).__name__}")
    return value


def _likes(env_id: str, environments: dict[str, Any]) -> list[str]:
    """The environment and those that it is "like", the farthest first. Raises ValueError for a circle."""
    chain: list[str] = []
    key: str | None = env_id
    while key in environments:
        if key in chain:
            circle = " -> ".join([*reversed(chain), key])
            raise ValueError(f"presets/environments.json goes round in a circle of \"like\": {circle}; take one of these out")
        chain.insert(0, key)
        key = environments[key].get("like")
    return chain


def _whose(method_id: str, entries: list[dict[str, Any]]) -> str:
    """Whose presets among `entries` a method takes: its own, or those of the nearest ancestor with settings of the same class; "" where none are."""
    known, key = rows(), method_id
    while key in known and type(known[key].value) is type(known[method_id].value):
        if any(key in entry for entry in entries):
            return key
        key = known[key].parent or ""
    return ""


def preset_sources(method_id: str, env_id: str) -> list[tuple[str, dict[str, Any]]]:
    """The presets that apply, weakest first: (whose, changes). Every method takes those of its family, which is named by the settings' class.

    An environment's entry may name another one under "like": that one's presets come first. A method that has no entry for the kind, or none for the
    environment and those that it is like, takes there its parent's, or those of the nearest ancestor that has some; {} is an entry too.
    """
    family, environments = type(find(method_id).value).__name__, _data()["environments"]
    found: list[tuple[str, dict[str, Any]]] = []
    for entries in ([_data()["kinds"].get(kind_of(env_id), {})], [environments[key] for key in _likes(env_id, environments)]):
        chosen = _whose(method_id, entries)
        found += [(who, entry[who]) for entry in entries for who in (family, chosen) if who in entry]
    return found


def _shared(changes: dict[str, Any], theirs: Any, ours: Any, now: Any) -> dict[str, Any]:
    """The part of an ancestor's preset that a row takes: fields that both rows set alike. What the row has otherwise than its ancestor stays.

    theirs, ours: the settings of the two rows, or the same part of both; now: ours with the presets so far.
    """
    out: dict[str, Any] = {}
    for key, change in changes.items():
        a, b, c = (getattr(part, key) for part in (theirs, ours, now))
        if not isinstance(change, dict) or "type" in change:
            taken = a == b
        elif dataclasses.is_dataclass(a):
            taken = type(a) is type(b) is type(c)
            change = _shared(change, a, b, c) if taken else change
        elif a is None:  # an empty slot, which presets may have filled
            taken = b is None and all(hasattr(c, name) for name in change)
        else:  # parts of a tuple
            taken = a == b == c
        if taken:
            out[key] = change
    return out


def configure(method_id: str, env_id: str) -> Any:
    """The method's settings for an environment (a `Method`): row < preset (kind) < preset (environment).

    Some presets also change the agent: `train(settings, env_id, method_id=method_id)` takes those too, without `method_id` it can't know of them.
    Raises ValueError for an unknown method and for a kind of MDP that the method does not serve.
    """
    row, kind = find(method_id), kind_of(env_id)
    if not isinstance(row.value, Method):
        raise ValueError(f"{method_id} ({type(row.value).__name__}) trains nothing in an environment; `markovia show {method_id}` says what it does")
    if kind not in row.kinds:
        raise ValueError(f"{method_id} serves {', '.join(row.kinds)}; {env_id} is a {kind} task. `markovia systems` lists what serves which kind")
    if isinstance(row.value, FromPreferences):
        raise ValueError(f"{method_id} learns from preferences, not from the rewards of {env_id}; `markovia show {method_id}` says what it reads")
    value: Method = row.value
    for who, changes in preset_sources(method_id, env_id):
        changes = {key: change for key, change in changes.items() if key != "agent"}
        if who == type(value).__name__:
            # What a family's entry says of learning rates and minibatches means nothing to a natural-gradient step.
            if isinstance(getattr(value, "solver", None), NaturalGradient):
                changes.pop("solver", None)
        elif who != method_id:
            changes = _shared(changes, find(who).value, row.value, value)
        value = override(value, changes)
    return value


def agent_options(method_id: str, env_id: str) -> dict[str, Any]:
    """How the presets want the agent built (hidden sizes, LoRA, ...): the "agent" entries, the environment's over the kind's."""
    out: dict[str, Any] = {}
    for _, changes in preset_sources(method_id, env_id):
        out.update(changes.get("agent", {}))
    return out


