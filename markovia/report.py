"""Where a run's numbers go besides metrics.jsonl: the terminal, TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from markovia.rundir import RunError

if TYPE_CHECKING:
    from markovia.texts import TextBatch


class Sink(Protocol):
    """Takes each iteration's statistics."""

    def write(self, stats: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def numbers(stats: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in stats.items() if isinstance(v, (int, float)) and v == v}


class TensorBoard:
    """Scalars over num_env_steps; after a resume the events past the checkpoint are purged. All of it raises RunError when the disk refuses."""

    def __init__(self, run: Path, num_env_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.refused = run, False
        with self._told():
            self.writer = SummaryWriter(str(run), purge_step=num_env_steps + 1 if num_env_steps else None)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Its events are written by a thread, whose error comes back at some later call, and again at every one after that."""
        try:
            yield
        except OSError as e:
            if not self.refused:
                self.refused = True
                reason = f"could not write TensorBoard's events in {self.run}: {e.strerror or e}"
                raise RunError(f"{reason}; free some space and try again (a run goes on with --resume)") from e

    def write(self, stats: dict[str, Any]) -> None:
        with self._told():
            for name, value in numbers(stats).items():
                self.writer.add_scalar(name, value, int(stats["num_env_steps"]))

    def texts(self, batch: TextBatch, num_env_steps: int, with_samples: bool) -> None:
        """The spread of a batch's rewards, and some of its texts."""
        with self._told():
            self.writer.add_histogram("reward", batch.rewards, num_env_steps)
            if with_samples:
                self.writer.add_text("samples", batch.markdown(), num_env_steps)

    def close(self) -> None:
        with self._told():
            self.writer.close()


def tracker(package: str) -> Any:
    """The module of a tracker by name. Raises ValueError when it is neither of the two or not installed."""
    if package not in ("wandb", "trackio"):
        raise ValueError(f"track takes 'wandb' or 'trackio', got {package!r}")
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise ValueError(f"track={package!r} needs a package that is not installed: pip install {package}") from e


class Tracker:
    """Weights & Biases or trackio, which share one interface."""

    def __init__(self, package: str, run: Path, config: dict[str, Any]) -> None:
        self.module = tracker(package)
        self.module.init(project="markovia", name=run.name, config=config)

    def write(self, stats: dict[str, Any]) -> None:
        self.module.log(numbers(stats))

    def close(self) -> None:
        self.module.finish()


class Lines:
    """One line every few seconds, for logs and pipes."""

    def __init__(self, label: str, total: int, start: int, every_s: float = 5.0) -> None:
        self.label, self.total, self.every_s = label, total, every_s
        self.first, self.began, self.last = start, time.monotonic(), 0.0
        self.latest: dict[str, Any] = {}
        self.shown = True

    def write(self, stats: dict[str, Any]) -> None:
        self.latest |= stats  # the return is only there when an episode ended
        self.shown = False
        if time.monotonic() - self.last >= self.every_s:
            self._show()

    def _show(self) -> None:
        self.last, self.shown = time.monotonic(), True
        print(f"{self.label}  {describe(self.latest, self.total, self.first, self.last - self.began)}", flush=True)

    def close(self) -> None:
        if not self.shown:
            self._show()


def describe(stats: dict[str, Any], total: int, start: int, seconds: float) -> str:
    """steps / total, return and speed in one short text."""
    steps = int(stats.get("num_env_steps", 0))
    score = stats.get("return")
    shown = "return      -" if score is None else f"return {score:>10.4g}"
    return f"{steps:>10,} / {total:,}  {shown}  {(steps - start) / max(seconds, 1e-9):,.0f} steps/s"


class Bar:
    """A rich progress bar with return and speed."""

    def __init__(self, label: str, total: int, start: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.total, self.first, self.began = total, start, time.monotonic()
        self.latest: dict[str, Any] = {}
        self.progress = Progress(TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self.task = self.progress.add_task(label, total=total, completed=start, text="")
        self.progress.start()

    def write(self, stats: dict[str, Any]) -> None:
        self.latest |= stats
        text = describe(self.latest, self.total, self.first, time.monotonic() - self.began)
        self.progress.update(self.task, completed=min(stats["num_env_steps"], self.total), text=text)

    def close(self) -> None:
        self.progress.stop()


def sinks(run: Path, config: dict[str, Any], label: str, total: int, start: int, track: str | None, progress: bool) -> list[Sink]:
    """Everything that wants this run's numbers."""
    out: list[Sink] = [Tracker(track, run, config)] if track else []
    out.append(TensorBoard(run, start))
    if progress:
        out.append(Bar(label, total, start) if sys.stdout.isatty() else Lines(label, total, start))
    return out
