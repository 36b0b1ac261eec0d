"""Several seeds of one configuration in one process (`markovia train METHOD --num-seeds N`): run folders of their own, updates as one batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from markovia.envs.finite import NotFinite
from markovia.not_finite import keep_batch
from markovia.runs import RunResult, default_folder, resolve, train

if TYPE_CHECKING:
    from markovia.algos.systems import Method


def train_seeds(
    method: str | Method, env: str, *, num_seeds: int, seed: int = 0, out: str | Path | None = None, progress: bool = True, **options: Any
) -> list[RunResult]:
    """Train seeds seed, seed + 1, ... of an offline method; each has the folder, checkpoints and numbers (to rounding) of a run of its own.

    out      a folder for all, with a run folder seed<k> for each; by default those of `markovia.train`
    options  those of `markovia.train`; progress is shown of the first seed
    Raises ValueError for fewer than one seed, for methods that do not learn from a dataset, and for a tracker.
    """
    from markovia.algos.offline.method import Offline

    if num_seeds < 1:
        raise ValueError(f"num_seeds must be >= 1, got {num_seeds}")
    if not options.get("dataset"):
        raise ValueError("several seeds in one process serve methods that learn from a dataset (--dataset); run the seeds one by one")
    if options.get("track"):
        raise ValueError("a tracker follows one run of a process; run the seeds one by one, or leave track out")
    settings = resolve(method, env, options.get("method_id"))[1]
    if not isinstance(settings, Offline):
        raise ValueError(f"several seeds in one process serve the actor-critic update on a dataset, not {type(settings).__name__}; run one by one")
    loops: list[Any] = []
    ends: list[str] = []
    results: dict[int, RunResult] = {}

    def begin(k: int) -> None:
        """Set up seed k; the last one that is ready starts them all, and each then finishes its own run."""

        def together(loop: Any) -> str:
            loops.append(loop)
            if k + 1 < num_seeds:
                begin(k + 1)
            else:
                ends.extend(_run(loops))
            return ends[k]

        name = options.get("method_id") or (method if isinstance(method, str) else type(method).__name__)
        folder = default_folder(name, str(options["dataset"]), seed + k) if out is None else Path(out) / f"seed{seed + k}"
        results[k] = train(method, env, seed=seed + k, out=folder, progress=progress and k == 0, together=together, **options)

    begin(0)
    return [results[k] for k in range(num_seeds)]


def _run(loops: list[Any]) -> list[str]:
    """Iterate all runs in step to their ends; why each ended."""
    ends: dict[int, str] = {}
    rounds = {k: loop.rounds() for k, loop in enumerate(loops)}

    def advance(k: int) -> None:
        try:
            next(rounds[k])
        except StopIteration as end:
            ends[k] = end.value
            del rounds[k]

    for k in list(rounds):
        advance(k)  # to its first iteration
    while rounds:
        newest = max(loops[k].driver.num_updates for k in rounds)
        for k in list(rounds):  # a run that was killed before the others had saved catches up alone
            while k in rounds and loops[k].driver.num_updates < newest:
                advance(k)
        _step_together(loops, rounds, advance)
    return [ends[k] for k in range(len(loops))]


def _step_together(loops: list[Any], rounds: dict[int, Any], advance: Any) -> None:
    """Step the runs that are left as one group, until one of them ends."""
    from markovia.algos.off_policy.seeds import SeedGroup

    left = list(rounds)
    drivers = [loops[k].driver for k in left]
    group = SeedGroup(drivers, compile=drivers[0].update.compiled is not None)
    try:
        while len(rounds) == len(left):
            try:
                found = group.step()
            except NotFinite as e:
                who = next(k for k, driver in zip(left, drivers, strict=True) if driver.watch.broken)
                kept = keep_batch(loops[who].run, loops[who].driver.iteration, e)
                raise NotFinite(f"seed {loops[who].driver.seed}: {e}.{kept} Nothing is lost: mend it, then all go on with --resume") from e
            for driver, stats in zip(drivers, found, strict=True):
                driver.step = lambda stats=stats: stats
            for k in left:
                advance(k)
    finally:
        for driver in drivers:
            driver.__dict__.pop("step", None)
