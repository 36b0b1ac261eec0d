"""Train a named method on an environment, with a run folder that survives a kill (`markovia.train`, `markovia train`)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markovia.asked import Asked
from markovia.config_check import check_config, check_finite
from markovia.envs import machine
from markovia.envs.control.vector import env_spec
from markovia.loaded import changes, counted, own_config
from markovia.loop import Callback, Loop, told_to_resume
from markovia.report import sinks, tracker
from markovia.rundir import CONFIG, Metrics, RunError, checkpoints, held, load_checkpoint, sweep, write_json, write_text
from markovia.settings import file_entry, is_pipeline, task_arguments, to_json
from markovia.summary import summary

if TYPE_CHECKING:
    from markovia.agents.interface import Agent
    from markovia.algos.setup import Setup
    from markovia.algos.systems import Method


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the trained agent, and what done.json holds."""

    run: Path
    agent: Agent
    done: dict[str, Any]  # empty in the other processes of a run with several


def default_folder(method_id: str, env: str, seed: int) -> Path:
    """runs/<env>/<method>-seed<seed>, with slashes and colons made plain."""
    clean = [re.sub(r"[^\w.=+-]+", "-", part) for part in (env.removeprefix("markovia/"), method_id)]
    return Path("runs") / clean[0] / f"{clean[1]}-seed{seed}"


def resolve(method: str | Method, env: str | None, method_id: str | None = None) -> tuple[str, Method, dict[str, Any]]:
    """(id, settings, agent options) of a method given by id, or by value with the id it came from (None: its class's name).

    A method of preferences has the settings of its row, whatever the env. Raises ValueError for an unknown id, for a kind of MDP that the method
    does not serve, and for a method of rewards without an env.
    """
    from markovia.algos.preference.method import FromPreferences
    from markovia.algos.presets import agent_options, configure
    from markovia.algos.systems import find

    preference = isinstance(find(method).value if isinstance(method, str) else method, FromPreferences)
    if preference or env is None:
        if not preference:
            raise ValueError(f"{method_id or method} learns from rewards: name an environment (env), e.g. HalfCheetah-v5")
        return (method, find(method).value, {}) if isinstance(method, str) else (method_id or type(method).__name__, method, {})
    if isinstance(method, str):
        return method, configure(method, env), agent_options(method, env)
    if method_id is not None:
        return method_id, method, agent_options(method_id, env)
    return type(method).__name__, method, {}


def train(
    method: str | Method,
    env: str | None = None,
    *,
    data: str | Path | None = None,
    dataset: str | Path | None = None,
    model: str | None = None,
    judge: str | Callable[..., Any] | None = None,
    data_options: dict[str, Any] | None = None,
    reward: Sequence[str | Callable[..., Any]] = (),
    reward_weights: Sequence[float] | None = None,
    references: dict[str, str] | None = None,
    texts: str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Callback | Iterable[Callback] = (),
    env_kwargs: dict[str, Any] | None = None,
    agent_options: dict[str, Any] | None = None,
    vectorization: str = "auto",
    device: str = "cpu",
    shard: bool = False,
    num_checkpoints: int = 10,
    eval_episodes: int = 10,
    eval_checkpoints: bool = False,
    max_seconds: float | None = None,
    compile: bool | None = None,
    over_memory: bool = False,
    track: str | None = None,
    progress: bool = True,
    method_id: str | None = None,
    prepare: Callable[[Any], None] | None = None,
    together: Callable[[Any], str] | None = None,
) -> RunResult:
    """Train `method` (an id, or a settings value) on the Gymnasium id `env`, or on a file of preferences; everything is written to the folder `out`.

    data             file of preferences (docs/preference.md) that the language model `model` learns from; `data_options` are fields of DataOptions,
                     `judge` (a function with TRL's reward signature, or "module:function") scores texts: those of rounds, and of the evaluation.
                     For methods that learn from rewards: the file of a text task that reads one (markovia/Prompts-v0, markovia/GSM8K-v0)
    reward           reward functions of such a task, "module:function" or "run:FOLDER" of a reward model, with `reward_weights` (None: 1 each)
    texts            file of texts whose likelihood is kept up beside the reward (ppo-max/ptx, ppo-rlhf/ptx)
    references       policies that the method reads beside its own reference, e.g. {"teacher": "runs/..."}: name -> the folder of a run or of
                     agent.save, or a Hugging Face name
    dataset          what offline methods learn from (docs/offline-data.md): a Minari id, a D4RL file or "fixture:<name>"; env is then the task
                     that the policy is evaluated in
    shard            under torchrun (docs/scaling.md): cut the language model over the processes instead of holding it whole in each
    num_checkpoints  at most so many, spread evenly over num_env_steps; environments are reseeded and reset at each, in every run, so that a run
                     that was killed and goes on with resume=True gives the same numbers as one that was never killed (CPU, same versions).
                     Fewer where the reset would come before an episode of full length can end (num_envs x the environment's time limit)
    max_seconds      ends the run after the iteration in which this time is over
    compile          whether updates are compiled (torch.compile); None: where the run is long enough to repay it. Compiled and eager updates
                     agree to rounding, so a run is resumed as it was begun
    over_memory      begin a run even if it needs more memory than the machine has
    eval_episodes    greedy episodes (control) or samples (text, denoising) at the end, in done.json; eval_checkpoints: at every checkpoint too
    callbacks        one or several functions, called with a `RunInfo` after each iteration; False ends the run
    prepare          called with the `Setup` before its first step, to wrap its collector's environments (`setup.collector.venv`)
    together         called with the loop of iterations in the place of running it; returns why it ended (several seeds at once: markovia.seeds)
    Raises ValueError for what was asked wrongly, RunError when the folder can't be used or written.
    """
    from markovia.algos.distributed import launched
    from markovia.algos.memory import before_run

    callbacks = (callbacks,) if callable(callbacks) else tuple(callbacks)
    seed, num_checkpoints = _whole_number("seed", seed, 0), _whole_number("num_checkpoints", num_checkpoints, 1)
    eval_episodes = _whole_number("eval_episodes", eval_episodes, 0)
    if max_seconds is not None and not max_seconds >= 0:
        raise ValueError(f"max_seconds must be >= 0, got {max_seconds}")
    for argument, given in (("env_kwargs", env_kwargs), ("agent_options", agent_options), ("data_options", data_options)):
        if not isinstance(given, dict | None):
            raise ValueError(f"{argument} must be a dictionary by name, got {given!r}")
    if env is not None:
        env_spec(env)
    name, settings, options = resolve(method, env, method_id)
    check_finite(to_json(settings))
    if model is not None and is_pipeline(env):
        env_kwargs, model = {"folder": model, **(env_kwargs or {})}, None
    options |= (agent_options or {}) | ({} if model is None else {"model": model})
    env_kwargs, read = task_arguments(settings, env, env_kwargs or {}, data, reward, reward_weights)
    data = None if read else data
    if data is None and (judge is not None or data_options):
        raise ValueError(f"judge and data_options go with a file of preferences (data), and {name} on {env} reads none here; leave them out")
    file = None if data is None else file_entry(data, judge, data_options or {})
    workers, device = launched(device, shard)
    _check_device(device)
    asked = Asked(
        name=name, settings=settings, env=env, env_kwargs=env_kwargs, agent_options=options, file=file, judge=judge, read=read,
        dataset=None if dataset is None else str(dataset), references=references, texts=None if texts is None else str(texts),
        vectorization=vectorization, seed=seed, device=device, shard=shard, workers=workers, num_checkpoints=num_checkpoints,
        eval_episodes=eval_episodes, compile=compile,
    )  # fmt: skip
    run = Path(out) if out is not None else default_folder(name, asked.dataset or env or Path(data or "data").name.partition(".")[0], seed)
    config = asked.config()
    with machine.over_memory(over_memory):
        _check_asked(config)
        if asked.writes:
            _check_folder(run, config, resume)
            with held(run) if run.exists() else contextlib.nullcontext():  # told before minutes go into building what may not be written
                pass
    if track:
        tracker(track)
    with machine.over_memory(over_memory):
        # What is built lasts, so it adds up; what comes after works on data, and its tensors go as they came.
        with counted(config, "this run", "; --over-memory begins it all the same"):
            setup = asked.build()
        if prepare is not None:
            prepare(setup)
        told = progress and asked.writes
        needed = before_run(settings, setup, asked.num_processes, shard, over_memory)
        if needed and told:
            print(needed)
        driver = asked.driver(setup)
    with held(run) if asked.writes else contextlib.nullcontext(), told_to_resume(lambda: checkpoints(run)):
        if asked.writes:  # again, for another run may have been here while this one was built
            with machine.over_memory(over_memory):
                _check_folder(run, config, resume)
        metrics = _begin(run, config, setup, driver, asked.writes, told)
        num_env_steps = driver.method.num_env_steps  # settings may leave it to the size of the data
        # A reset before the time limit would cut every episode: none would end, and no return would be seen.
        places = max(1, min(num_checkpoints, num_env_steps // setup.episode_steps))
        loop = Loop(run, config, driver, setup, metrics, callbacks, places, eval_episodes if eval_checkpoints else 0, max_seconds)
        loop.workers = workers
        loop.sinks = sinks(run, config, f"{name} on {env or data}", num_env_steps, driver.num_env_steps, track, progress) if asked.writes else []
        why = _learn(loop, together)
        evaluation = setup.evaluate(loop.agent, eval_episodes, seed) if eval_episodes else None
        done = _conclude(loop, why, evaluation, eval_checkpoints) if asked.writes else {}
    return RunResult(run, setup.agent, done)


def _whole_number(name: str, value: Any, least: int) -> int:
    """As Python's int, which NumPy's numbers are not. Raises ValueError that names the argument."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return int(value)


def _begin(run: Path, config: dict[str, Any], setup: Setup, driver: Any, writes: bool, told: bool) -> Metrics:
    """Put the newest checkpoint into the driver, and lay the folder out for what comes; the metrics that count so far."""
    # Before anything is swept: a folder whose checkpoint can't be read stays as it is.
    if load_checkpoint(run, driver):
        driver.boundary()
    metrics = Metrics(run)
    if not writes:
        return metrics
    _open_folder(run, config)
    if setup.note:
        write_text(run / "data.txt", setup.note + "\n")
        if told:
            print(setup.note)
    for filename, content in setup.files.items():
        write_text(run / filename, content)
    metrics.cut(driver.iteration)
    return metrics


def _learn(loop: Loop, together: Callable[[Any], str] | None) -> str:
    """Run the loop to its end, or hand it to `together`; why it ended."""
    from markovia.algos.setup import tuned

    try:
        with tuned(loop.driver.method, loop.setup):
            return loop.run_to_end() if together is None else together(loop)
    finally:
        for sink in loop.sinks:
            sink.close()
        loop.setup.collector.close()


def _conclude(loop: Loop, why: str, evaluation: dict[str, Any] | None, best: bool) -> dict[str, Any]:
    """Write done.json; with `best` also the best of the evaluations at checkpoints."""
    driver = loop.driver
    done = {
        "ended": why,
        "iteration": driver.iteration,
        "num_env_steps": driver.num_env_steps,
        "seconds": round(loop.seconds, 3),
        "compile_seconds": round(driver.compile_seconds, 3),
        "evaluation": None if evaluation is None else summary(evaluation),
    }
    if best and evaluation is not None:
        scores = [row["eval_return"] for row in loop.metrics.read() if row.get("eval_return") is not None]
        done["best_eval_return"] = max(scores) if scores else None
    write_json(loop.run / "done.json", done)
    return done


def _check_device(device: str) -> None:
    """Raises ValueError for a device that torch does not know or this machine does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device {device!r} can't be used here ({str(e).splitlines()[0]}); 'cpu' always can, 'cuda' where there is a GPU") from e


def _check_asked(config: dict[str, Any]) -> None:
    """Raises RunError for a new run that could not be read back, and OverMemory."""
    try:
        check_config(config, "this run")
    except machine.OverMemory as error:
        raise machine.OverMemory(f"{error}; --over-memory begins it all the same") from None


def _check_folder(run: Path, config: dict[str, Any], resume: bool) -> None:
    """A new run wants an empty folder; a resumed one wants the same configuration, and metrics that can be read. Raises RunError otherwise."""
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file, so no run can be written there; choose another --out")
    if not run.exists() or not any(run.iterdir()):
        return
    if not resume:
        raise RunError(f"{run} already holds a run; go on with it (--resume), or choose another folder (--out)")
    if not (run / CONFIG).exists():
        if any(not p.name.startswith(".tmp-") for p in run.iterdir()):
            raise RunError(f"{run} is not the folder of a markovia run (no config.json); choose another --out")
        return
    changed = changes(own_config(run), config)
    if changed:
        raise RunError(f"{run} was started with other settings, so it can't be resumed with these ({changed}); choose another --out")
    Metrics(run).read()


def _open_folder(run: Path, config: dict[str, Any]) -> None:
    """Sweep the folder. config.json is its first file, so that what a full disk leaves here is taken for an empty folder."""
    try:
        sweep(run)
        (run / "done.json").unlink(missing_ok=True)
    except OSError as e:
        raise RunError(f"{run} can't be written ({e.strerror or e}); make it writable, then go on with --resume") from e
    if not (run / CONFIG).exists():
        write_json(run / CONFIG, config)
