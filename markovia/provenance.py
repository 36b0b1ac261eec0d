"""What a run's numbers come from: versions of packages, and the commit of the code."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

_PACKAGES = ("markovia", "torch", "numpy", "gymnasium", "mujoco", "transformers", "peft", "diffusers")


def versions() -> dict[str, str]:
    """Installed versions of what a run's numbers depend on."""
    out = {}
    for name in _PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def commit() -> str | None:
    """The commit of the checkout that this code lies in, with "+" when it has changes; None outside git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes.strip() else "")
