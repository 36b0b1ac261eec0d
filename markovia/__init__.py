"""markovia: control, text and denoising as Gymnasium environments, trained through one agent interface.

`import markovia` registers the environments by name only; torch and the heavy libraries load when they are used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout the folders envs/, agents/, algos/ stand beside this one; make them importable as markovia.* without an install.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "envs" / "__init__.py").is_file():
    __path__.extend([str(_root), str(_root / "benchmarks")])

_LAZY = ("envs", "agents", "algos", "claims")


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("markovia.runs").train
    if name in _LAZY:
        return importlib.import_module(f"markovia.{name}")
    raise AttributeError(f"module 'markovia' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "train"])


from markovia.envs.registry import register_all as _register_all  # noqa: E402

_register_all()
