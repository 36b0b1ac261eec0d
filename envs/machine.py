"""What of the machine this process may use: memory and cores, within the limits of its control groups (containers, batch systems), and how its
allocator keeps memory.

    unified (version 2)   memory.max, memory.current, cpu.max of a group and of every group around it
    version 1             memory.limit_in_bytes, memory.usage_in_bytes, cpu.cfs_quota_us, cpu.cfs_period_us, in a folder for each controller
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_anyway: ContextVar[bool] = ContextVar("more memory than there is may be asked for", default=False)
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def groups(controller: str, proc: Path = PROC, root: Path = GROUPS) -> list[Path]:
    """Folders that may limit "memory" or "cpu" of this process, the innermost of each hierarchy first; none where there are no control groups.

    A container sees its own group as the root, whatever path it is told.
    """
    found = []
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not path or (names and controller not in names.split(",")):
            continue
        parts = [] if ".." in Path(path).parts else list(Path(path).parts[1:])
        for base in dict.fromkeys([root / names, root / controller] if names else [root, root / "unified"]):
            found += [base.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
    return found


def memory(proc: Path = PROC, root: Path = GROUPS) -> tuple[float, float]:
    """(free, all) bytes for this process: what the machine has, and no more than a group allows. All are free where nobody tells what is used, and
    infinite where nobody knows."""
    free, total = _installed(proc)
    for folder in groups("memory", proc, root):
        limit = min(_number(folder / "memory.max"), _number(folder / "memory.limit_in_bytes"))
        if limit >= total:
            continue
        used = min(_number(folder / "memory.current"), _number(folder / "memory.usage_in_bytes"))
        stat = _fields(folder / "memory.stat")
        cache = stat.get("total_inactive_file", stat.get("inactive_file", 0.0))  # pages of files that are given up when memory is wanted
        free, total = min(free, limit if math.isinf(used) else max(0.0, limit - used + cache)), limit
    return min(free, total), total


class OverMemory(ValueError):
    """Something needs more memory than this machine has."""


@contextlib.contextmanager
def over_memory(anyway: bool = True) -> Iterator[None]:
    """Within, nothing is refused for its size, if `anyway`."""
    token = _anyway.set(anyway)
    try:
        yield
    finally:
        _anyway.reset(token)


def fits(num_bytes: float, what: str, total: float | None = None) -> None:
    """Raises OverMemory, before memory is taken, when `what` needs more bytes than the machine has (`total`); not within `over_memory()`."""
    total = memory()[1] if total is None else total
    if num_bytes > total and not _anyway.get():
        raise OverMemory(f"{what} needs {num_bytes / 1e9:.3g} GB, and this machine has {total / 1e9:.3g}; make it smaller")


def cores(proc: Path = PROC, root: Path = GROUPS) -> int:
    """Cores that this process may run on, no more than the time that its groups may use of them, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in groups("cpu", proc, root):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        for part, whole in ((_parsed(quota), _parsed(period)), (_number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us"))):
            if 0 < part < math.inf and 0 < whole < math.inf:
                allowed = min(allowed, math.ceil(part / whole))
    return max(1, allowed)


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep up to 256 MiB that was freed, for the next operation on tensors; whether it does now.

    Left to itself it gives megabytes back to the system after each operation, which clears new pages for the next one: nearly half the time of an
    eager update of CQL went there. Blocks above 32 MiB still come and go. The setting is the process's, and lasts. Nothing is done under another
    allocator's library, or where the environment has settings for malloc of its own.
    """
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}) or any(name in os.environ for name in own):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    return mallopt is not None and bool(mallopt(trim_threshold, 256 << 20)) and bool(mallopt(mmap_threshold, 32 << 20))


def _installed(proc: Path) -> tuple[float, float]:
    """(free, all) bytes of the machine."""
    told = _fields(proc / "meminfo")
    if "MemTotal:" in told:
        return 1024 * told.get("MemAvailable:", told["MemTotal:"]), 1024 * told["MemTotal:"]
    try:
        import psutil
    except ImportError:
        known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
        installed = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if known else math.inf
        return installed, installed
    memory = psutil.virtual_memory()
    return float(memory.available), float(memory.total)


def _text(path: Path) -> str:
    """A small file's text, empty where there is none or it may not be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _parsed(text: str) -> float:
    """A number, infinite for anything else ("max")."""
    return float(text) if text.strip().isdecimal() else math.inf


def _number(path: Path) -> float:
    return _parsed(_text(path))


def _fields(path: Path) -> dict[str, float]:
    """Lines of a name and a number."""
    rows = [line.split() for line in _text(path).splitlines()]
    return {row[0]: _parsed(row[1]) for row in rows if len(row) > 1}
