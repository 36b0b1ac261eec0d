"""config.json of a run, perhaps written by someone else: its shape, and numbers that would fill memory, are looked at before anything is built."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from markovia.envs.machine import fits
from markovia.envs.registry import kind_of
from markovia.rundir import RunError
from markovia.settings import FLOAT

MAX_NUMBER = 2**20  # of what an environment or an agent is given
MAX_MATRIX = 2**28  # entries of one layer
MAX_ENVS = 2**14
MAX_SEED = 2**63 - 1
ENV_BYTES = 1.2e6  # of one environment, as Humanoid-v5 was measured; the other tasks of MuJoCo take little less, games of a few numbers far less
PARTS = ("agent_options", "env_kwargs", "settings")
_SIZES = ("hidden", "width", "channels", "layers", "depth", "window", "heads", "modes")  # settings that shape networks
_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "settings": (dict,),
    "env": (str, type(None)),
    "env_kwargs": (dict,),
    "agent_options": (dict,),
    "seed": (int,),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {"data": (dict,), "dataset": (str,), "read": (dict,), "references": (dict,), "texts": (dict,)}


def check_config(config: Any, path: Path | str) -> dict[str, Any]:
    """The configuration, if it has the entries of one, of their types, and no number beyond reason.

    path  the file that holds it, or what else it is called in messages: a new run is checked too, so that one that begins can be resumed
    Raises RunError, and OverMemory where the layers that are listed are more than the machine holds.
    """
    from markovia.agents.checkpoint import MAX_LAYERS, most_layers

    if not isinstance(config, dict):
        raise RunError(f"{path} holds a {type(config).__name__}, expected the object that a run writes; restore it from a checkpoint's folder")
    for name, types in _TYPES.items():
        if not isinstance(config.get(name, _missing), types) or isinstance(config.get(name), bool):
            raise RunError(f"{path} has no usable {name!r} (found {str(config.get(name))[:60]!r}); restore it from a checkpoint's folder")
    for name, types in _OPTIONAL.items():
        if name in config and not isinstance(config[name], types):
            raise RunError(f"{path} has no usable {name!r} (found {str(config[name])[:60]!r}); restore it from a checkpoint's folder")
    if not 0 <= config["seed"] <= MAX_SEED:
        raise RunError(f"{path} has the seed {config['seed']}, expected 0 to 2^63 - 1")
    for part in PARTS:
        if (layers := most_layers(config[part])) > MAX_LAYERS:
            raise RunError(f"{path}, {part} describes {layers} layers, at most {MAX_LAYERS} are built")
    for part in ("env_kwargs", "agent_options"):
        _check_numbers(config[part], f"{path}, {part}", MAX_NUMBER)
    _check_numbers(config["settings"], f"{path}, settings", 2**63)
    fits(4 * _entries([config[part] for part in PARTS]), f"what {path} describes ({largest(config)})")
    envs = config["settings"].get("num_envs", 1)
    if isinstance(envs, int) and envs > MAX_ENVS:
        raise RunError(f"{path} asks for {envs} environments, at most {MAX_ENVS} are made")
    if isinstance(envs, int) and kind_of(config["env"] or "") == "control":  # rows of tables, texts and images are no simulations
        fits(envs * ENV_BYTES, f"settings.num_envs={envs} of {path}")
    return config


def check_finite(settings: Any, name: str = "") -> None:
    """Raises ValueError for a NaN among settings (as JSON), and for an infinite learning rate or coefficient; elsewhere inf may mean no limit."""
    if isinstance(settings, dict) and FLOAT in settings:
        if settings[FLOAT] == "nan" or name.endswith(("lr", "coef")):
            raise ValueError(f"{name} is {settings[FLOAT]}; give a finite number")
    elif isinstance(settings, dict):
        for key, inner in settings.items():
            check_finite(inner, f"{name}.{key}" if name else key)
    elif isinstance(settings, list):
        for i, inner in enumerate(settings):
            check_finite(inner, f"{name}.{i}")


_missing = object()


def largest(config: dict[str, Any]) -> str:
    """The two sizes of a configuration that describe most numbers, as "agent_options.hidden=[64, 64]"."""
    found = [size for part in PARTS for size in _sizes(config[part], part)]
    told = [f"{name}={str(value)[:60]}" for _, name, value in sorted(found, key=lambda size: -size[0])[:2]]
    return ", ".join(told) or "none of its own"


def _entries(value: Any) -> int:
    """Entries of the matrices between the layers that are listed, at least."""
    if isinstance(value, dict):
        return sum(map(_entries, value.values()))
    if not isinstance(value, list):
        return 0
    return sum(map(_entries, value)) + sum(a * b for a, b in pairwise(value) if isinstance(a, int) and isinstance(b, int))


def _sizes(value: Any, name: str) -> list[tuple[int, str, Any]]:
    """(numbers that it may stand for, name, value) of what may be a size: of settings what is called so, of the rest every number."""
    if isinstance(value, dict):
        return [size for key, inner in value.items() for size in _sizes(inner, f"{name}.{key}")]
    called = not name.startswith("settings.") or any(word in name.rpartition(".")[2] for word in _SIZES)
    numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int) and not isinstance(v, bool)]
    if not called or not numbers:
        return []
    return [(sum(a * b for a, b in pairwise(numbers)) or numbers[0] ** 2, name, value)]


def _check_numbers(value: Any, name: str, most: int) -> None:
    """Raises RunError for an integer above `most`, and for neighbours in a list whose product is no layer's."""
    if isinstance(value, dict):
        for key, inner in value.items():
            # A seed stands for nothing of its size.
            _check_numbers(inner, f"{name}.{key}"[:200], MAX_SEED if key == "seed" else most)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, name, most)
        numbers = [v for v in value if isinstance(v, int)]
        if any(a * b > MAX_MATRIX for a, b in pairwise(numbers)):
            raise RunError(f"{name} is {str(value)[:60]}: layers of that size are not made")
    elif isinstance(value, int) and abs(value) > most:
        raise RunError(f"{name} is {str(value)[:40]}, more than {most}, the most that a run may ask for")
