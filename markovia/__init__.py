"""markovia: control, text and denoising as Gymnasium environments, trained through one agent interface.

`import markovia` registers the environments by name only; torch and the heavy libraries load when they are used.
`markovia.train` makes a run (markovia/runs.py), `markovia.load_run` reads one back (markovia/loaded.py).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markovia.loaded import load_run as load_run
    from markovia.runs import train as train

__version__ = "0.1.0"

# In a checkout the folders envs/, agents/, algos/ stand beside this one; make them importable as markovia.* without an install.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "envs" / "__init__.py").is_file():
    __path__.extend([str(_root), str(_root / "benchmarks")])

_PACKAGES = ("envs", "agents", "algos", "claims")
_RUNS = {"load_run": "loaded", "train": "runs"}


def __getattr__(name: str) -> Any:
    if name in _RUNS:
        return getattr(importlib.import_module(f"markovia.{_RUNS[name]}"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"markovia.{name}")
    raise AttributeError(f"module 'markovia' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGES, *_RUNS])


from markovia.envs.registry import register_all as _register_all  # noqa: E402

_register_all()
