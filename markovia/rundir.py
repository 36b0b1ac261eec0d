"""The folder of a run: what is written where, and how a kill or a full disk leaves it whole.

    config.json        what was asked for, versions, seed, device, commit
    metrics.jsonl      one line per iteration
    events.out.*       the same for TensorBoard
    checkpoints/N/     agent/ (Agent.save), driver.safetensors and the run's config.json after iteration N; the last two are kept
    samples/N.*        what the policy made at iteration N, where a checkpoint was written: texts with rewards (jsonl), images (png)
    done.json          present when the run has ended: evaluation, seconds, why it ended
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from markovia.envs import untrusted
from markovia.envs.durable import TEMPORARY, in_place, write_whole

if sys.platform != "win32":
    import fcntl

CONFIG = "config.json"
DRIVER = "driver.safetensors"  # the whole training state; agent/ beside it is for those who only want the policy
KEEP = 2  # checkpoints: the newest and, in case that one is damaged later, the one before


class RunError(RuntimeError):
    """A run folder that can't be used or written; the message says how to mend it."""


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Make the folder and keep it for one run: two at once would mix their lines and sweep each other's checkpoints.

    The system lets go of it when the process ends, however it ends. File systems and systems without such locks check nothing.
    Raises RunError when it can't be made, and when another run holds it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = None if sys.platform == "win32" else os.open(run, os.O_RDONLY)
    except OSError as e:
        raise RunError(f"could not make the run folder {run}, or not read it: {e.strerror or e}; choose another --out") from e
    if descriptor is None:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another run is writing to {run} at this moment; wait until it has ended, or choose another --out") from None
        except OSError:  # a network file system may refuse to lock a folder
            yield
            return
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to processes that were forked meanwhile
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds either the old or the new content whole. Raises RunError when the disk refuses."""
    try:
        write_whole(path, content)
    except OSError as e:
        raise _refused(path, e) from e


def _refused(path: Path, error: OSError) -> RunError:
    return RunError(f"could not write {path}: {error.strerror or error}; free some space and try again (a run goes on with --resume)")


def write_json(path: Path, value: Any) -> None:
    """JSON through `write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The JSON of a run folder's file. Raises RunError when it is missing or damaged."""
    try:
        return untrusted.read_json(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise RunError(f"{path} is missing; {path.parent} is not the folder of a markovia run") from e
    except ValueError as e:
        raise RunError(f"{path} is damaged ({e}); restore it or train again") from e
    except OSError as e:
        raise RunError(f"{path} can't be read: {e.strerror or e}") from e


def plain(stats: dict[str, Any]) -> dict[str, Any]:
    """Statistics as strict JSON: numbers that are not finite become null."""
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in stats.items()}


class Metrics:
    """metrics.jsonl, one strict JSON object per line; a line is written whole at its iteration's end."""

    def __init__(self, run: Path) -> None:
        self.path = run / "metrics.jsonl"

    def append(self, stats: dict[str, Any]) -> None:
        """Add a line. Raises RunError when the disk refuses."""
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(plain(stats)) + "\n")
        except OSError as e:
            raise _refused(self.path, e) from e

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a last line that a kill cut short is dropped. Raises RunError for a damaged line before others."""
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = untrusted.parse_json(line, self.path)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                rows.append(row)
            elif number < len(lines):
                raise RunError(f"{self.path}, line {number} of {len(lines)} is damaged; restore the file, or take that line out")
        return rows

    def cut(self, iteration: int) -> None:
        """Keep the lines up to `iteration`: what a resumed run does again must not stand there twice. Raises RunError when the disk refuses."""
        kept = [json.dumps(row) for row in self.read() if row["iteration"] <= iteration]
        write_text(self.path, "".join(line + "\n" for line in kept))


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first. Links are none: a run is its folder and nothing outside it."""
    found = [p for p in (run / "checkpoints").glob("*") if p.name.isdecimal() and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda p: int(p.name))


def save_checkpoint(run: Path, agent: Any, driver: Any, config: dict[str, Any]) -> Path:
    """Put checkpoints/<iteration> in place, then drop the ones before the last two.

    `config` lies in it too, so that a checkpoint says itself which run it belongs to; the lines of metrics.jsonl up to it reach the disk before it.
    Raises RunError when the disk refuses; nothing half-written remains and the checkpoint before is untouched.
    """
    from markovia.agents.checkpoint import save_tensors

    final = run / "checkpoints" / f"{driver.iteration:06d}"
    lines = [path for path in (Metrics(run).path,) if path.exists()]
    try:
        with in_place(final, needs=lines) as temporary:
            temporary.mkdir()
            agent.save(temporary / "agent")
            tensors, meta = driver.state()
            save_tensors(temporary / DRIVER, tensors, meta)
            (temporary / CONFIG).write_text(json.dumps(config))
            if final.exists():  # a run that was stopped here and resumed: same iteration, same content
                _drop(final)
    except Exception as e:
        if not _is_disk(e):
            raise
        older = checkpoints(run)
        safe = f"the checkpoint of iteration {int(older[-1].name)} is intact" if older else "there was no earlier checkpoint"
        raise RunError(f"could not save the checkpoint {final}: {e}; {safe}. Free some space, then go on with --resume") from e
    try:
        for old in checkpoints(run)[:-KEEP]:
            _drop(old)
    except OSError as e:
        raise _refused(final, e) from e
    return final


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill leaves it whole or under a name that is swept, never in part."""
    gone = checkpoint.with_name(f"{TEMPORARY}old-{checkpoint.name}")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _is_disk(error: Exception) -> bool:
    """Did the disk refuse? safetensors reports an I/O error as its own exception type."""
    return isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "I/O" in str(error))


def load_checkpoint(run: Path, driver: Any) -> int:
    """Put the newest checkpoint into a freshly built driver and its agent; its iteration, 0 when there is none. Raises CheckpointError."""
    from markovia.agents.checkpoint import CheckpointError, load_tensors

    found = checkpoints(run)
    if not found:
        return 0
    try:
        driver.load_state(*load_tensors(found[-1] / DRIVER))
    except CheckpointError as e:
        raise CheckpointError(f"{e}{whole_before(found, lambda c: load_tensors(c / DRIVER))}") from e
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as e:
        raise CheckpointError(f"{found[-1] / DRIVER} is not of this run, or of another version of markovia ({e!r}); train into another --out") from e
    return int(driver.iteration)


def whole_before(found: list[Path], read: Callable[[Path], object]) -> str:
    """How to go on from the checkpoint before a damaged one; empty when there is none that can be `read`."""
    from markovia.agents.checkpoint import CheckpointError

    try:
        read(found[-2])
    except (CheckpointError, IndexError):
        return ""
    return f"; {found[-2]} is whole: remove {found[-1]} to go on from it"


def sweep(run: Path) -> None:
    """Remove what a kill left half-written."""
    for path in [*run.glob(f"{TEMPORARY}*"), *(run / "checkpoints").glob(f"{TEMPORARY}*")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
