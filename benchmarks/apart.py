"""Sides of a comparison in processes of their own, in alternation: speeds by ratios within a turn, and peaks of memory that do not mix."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def reset_peak() -> None:
    """Forget the peak of this process so far; without the permission (or outside Linux) it stays, and counts model loading."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of memory includes model loading here", file=sys.stderr)


def peak_mb() -> float:
    """Peak resident memory in MB."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step_times(warm: int) -> tuple[list[float], Any]:
    """(times, callback): the moments at which the steps of a transformers trainer end; the peak of memory is forgotten after `warm` of them."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        """Time at the end of every step."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())
            if len(times) == warm:
                reset_peak()

    return times, Clock()


def side(script: str, *arguments: str, threads: int) -> dict[str, Any]:
    """What `python script arguments` prints as JSON on its last line. Raises RuntimeError with the end of its messages when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def median_ratio(ours: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]], key: str) -> float:
    """The median over turns of ours / theirs."""
    return statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))
