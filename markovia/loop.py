"""The iterations of a run: step, report, checkpoint, until the budget, a callback or the clock ends them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markovia.chains import watch
from markovia.envs.finite import NotFinite
from markovia.envs.text.rewards import RewardError
from markovia.not_finite import keep_batch
from markovia.report import Sink, TensorBoard
from markovia.rundir import Metrics, save_checkpoint
from markovia.summary import summary
from markovia.texts import text_batch

if TYPE_CHECKING:
    from markovia.agents.interface import Agent
    from markovia.algos.distributed import Workers


@dataclass(frozen=True)
class RunInfo:
    """What a callback sees after each iteration; returning False ends the run after this iteration."""

    run: Path
    iteration: int
    num_env_steps: int
    seconds: float  # since this process began to train
    stats: dict[str, Any]
    agent: Agent


Callback = Callable[[RunInfo], bool | None]


@contextlib.contextmanager
def told_to_resume(there: Callable[[], Any]) -> Iterator[None]:
    """An interrupt says that --resume goes on, if by then there is something to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        if not there():
            raise
        raise KeyboardInterrupt("the same command with --resume goes on from what was saved") from None


class Loop:
    """Iterations until the budget, a callback or the clock ends them."""

    sinks: list[Sink]
    workers: Workers | None = None  # the processes that share the run

    def __init__(
        self,
        run: Path,
        config: dict[str, Any],
        driver: Any,
        setup: Any,
        metrics: Metrics,
        callbacks: tuple[Callback, ...],
        num_checkpoints: int,
        eval_episodes: int,
        max_seconds: float | None,
    ) -> None:
        self.run, self.config, self.driver, self.setup, self.metrics, self.callbacks = run, config, driver, setup, metrics, callbacks
        self.num_checkpoints, self.eval_episodes, self.max_seconds = num_checkpoints, eval_episodes, max_seconds
        self.watch = watch(run, setup, driver)
        self.began = time.monotonic()
        earlier = metrics.read()[-1:]  # of a run that goes on
        self.earlier = float(earlier[0].get("seconds", 0.0)) if earlier else 0.0

    @property
    def seconds(self) -> float:
        """What the run has taken, with what it took up to the checkpoint that it was resumed from."""
        return self.earlier + time.monotonic() - self.began

    def _part(self) -> int:
        """Which of the equal parts of num_env_steps the run is in; a checkpoint is due when this number grows."""
        return int(self.num_checkpoints * self.driver.num_env_steps / self.driver.method.num_env_steps)

    def run_to_end(self) -> str:
        """Why the run ended: "budget", "callback" or "seconds"."""
        rounds = self.rounds()
        while True:
            try:
                next(rounds)
            except StopIteration as end:
                return str(end.value)

    def rounds(self) -> Generator[None, None, str]:
        """The same, handed over before each iteration."""
        driver, why = self.driver, "budget"
        while not driver.finished:
            part, before, clock, compiled = self._part(), driver.num_env_steps, time.monotonic(), driver.compile_seconds
            yield
            try:
                stats: dict[str, Any] = dict(driver.step())
            except (RewardError, NotFinite) as e:
                kept = keep_batch(self.run, driver.iteration, e) if self.workers is None or self.workers.rank == 0 else ""
                raise type(e)(f"{e}.{kept} Nothing is lost: mend it, then the run goes on from its last checkpoint with --resume") from e
            now = time.monotonic()
            stats |= {
                "iteration": int(driver.iteration),
                "num_env_steps": int(driver.num_env_steps),
                "seconds": round(self.seconds, 4),
                "steps_per_second": (driver.num_env_steps - before) / max(now - clock - (driver.compile_seconds - compiled), 1e-9),
            }
            verdict = self._ask(stats)
            if self.max_seconds is not None and now - self.began >= self.max_seconds and verdict is None:
                verdict = "seconds"
            verdict = verdict if self.workers is None else self.workers.first(verdict)
            due = driver.finished or verdict is not None or self._part() > part
            evaluation = self.setup.evaluate(self.agent, self.eval_episodes, self.driver.seed) if due and self.eval_episodes else None
            if self.workers is not None and self.workers.rank > 0:
                if due:
                    self._follow()
                if verdict is not None and not driver.finished:
                    return str(verdict)
                continue
            if evaluation is not None:
                found = summary(evaluation)
                stats |= {"eval_return": found["mean"]} | {f"eval_{k}": found[k] for k in ("pass@1", "pass@8") if k in found}
            if due and self.watch is not None:
                stats |= self.watch.look(stats["iteration"])
            self._show_texts(stats, due)
            self.metrics.append(stats)
            for sink in self.sinks:
                sink.write(stats)
            if due:
                save_checkpoint(self.run, self.setup.agent, driver, self.config)
                driver.boundary()
            if verdict is not None and not driver.finished:
                why = verdict
                break
        return why

    @property
    def agent(self) -> Any:
        """The agent that samples for an evaluation: of several processes, all together."""
        return self.setup.agent if self.workers is None else self.driver.agent

    def _follow(self) -> None:
        """What the other processes do while the first one writes a checkpoint: their parts of a model that is cut are asked for in the same order."""
        if self.workers is not None and self.workers.sharded:
            self.setup.agent.state()
            self.driver.state()
        self.driver.boundary()

    def _show_texts(self, stats: dict[str, Any], due: bool) -> None:
        """Of text runs the spread of the batch's rewards, and at checkpoints some of its texts: samples/<iteration>.jsonl."""
        batch = text_batch(self.driver)
        if batch is None:
            return
        stats["reward_histogram"] = batch.histogram()
        if due:
            batch.write(self.run / "samples" / f"{stats['iteration']:06d}.jsonl")
        for sink in self.sinks:
            if isinstance(sink, TensorBoard):
                sink.texts(batch, stats["num_env_steps"], due)

    def _ask(self, stats: dict[str, Any]) -> str | None:
        info = RunInfo(self.run, stats["iteration"], stats["num_env_steps"], stats["seconds"], stats, self.setup.agent)
        answers = [callback(info) for callback in self.callbacks]
        return "callback" if any(map(_is_false, answers)) else None


def _is_false(answer: Any) -> bool:
    """Whether an answer is False: Python's, NumPy's or a tensor's, since a comparison of theirs gives one. 0 and [] are none."""
    boolean = str(getattr(answer, "dtype", "")) in ("bool", "torch.bool") and answer.ndim == 0
    return answer is False or (boolean and not answer)
