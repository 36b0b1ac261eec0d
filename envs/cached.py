"""What can be made again and takes long: converted models, compiled updates. Each is a folder in the user's cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from markovia.envs.durable import in_place


def cache_dir() -> Path:
    """$MARKOVIA_CACHE, else the platform's user cache."""
    if chosen := os.environ.get("MARKOVIA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "markovia"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "markovia"
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "markovia"


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `name`, filled by `build(folder)` the first time; whole or absent, also with several processes.

    Raises OSError when the disk refuses, and what `build` raises.
    """
    final = cache_dir() / name
    if final.is_dir():
        return final
    try:
        with in_place(final) as work:
            work.mkdir()
            build(work)
    except OSError:
        if not final.is_dir():  # another process that was faster is welcome, anything else is an error
            raise
    return final
