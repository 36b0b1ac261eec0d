"""Where the time of training goes: environment, policy, update, and the rest."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PARTS = ("environment", "policy", "update")


class Stopwatch:
    """Seconds spent in wrapped methods, by part; a wrapped method inside another counts for the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.running = False

    def wrap(self, thing: Any, name: str, part: str) -> None:
        """Time the method `name` of `thing`, if it has one, as `part`."""
        method: Callable[..., Any] | None = getattr(thing, name, None)
        if method is None:
            return

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return method(*args, **kwargs)
            self.running, began = True, time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - began
                self.running = False

        setattr(thing, name, timed)


@dataclass(frozen=True)
class Profile:
    """How the seconds of some iterations split; compile time is apart and not in them."""

    num_env_steps: int
    seconds: float
    parts: dict[str, float]  # environment, policy, update, other; seconds
    compile_seconds: float

    @property
    def steps_per_second(self) -> float:
        return self.num_env_steps / self.seconds


def profile(
    method: str, env: str, iterations: int = 5, vectorization: str = "auto", compile: bool = True, settings: dict[str, Any] | None = None
) -> Profile:
    """Train for one iteration to warm up, then time `iterations` more of the method with its presets for `env` (and `settings` on top).

    Off-policy methods are warmed up until their first updates. Raises ValueError as `markovia.train` does.
    """
    from markovia.algos.families import family_of
    from markovia.algos.presets import agent_options, configure, override
    from markovia.algos.setup import build, make_driver, tuned
    from markovia.algos.systems import find

    if family_of(find(method).value).reads != "environment":
        raise ValueError(f"{method} learns from a dataset or a file, and a profile is of methods that step an environment, such as ppo or sac")
    value = override(configure(method, env), settings or {})
    setup = build(env, value, 0, agent_options=agent_options(method, env), vectorization=vectorization)
    driver = make_driver(value, setup, 0, compile and setup.kind != "language")
    with contextlib.closing(setup.collector), tuned(value, setup):
        driver.step()
        while driver.num_env_steps <= getattr(value, "learning_starts", 0):
            driver.step()
        watch = Stopwatch()
        for name in ("step", "reset"):
            watch.wrap(getattr(setup.collector, "venv", None), name, "environment")
        watch.wrap(setup.task, "score", "environment")
        for name in ("act", "sample", "observe", "env_action", "evaluate", "generate"):
            watch.wrap(setup.agent, name, "policy")
        _watch_actors(watch, setup.agent)
        for name in ("prepare", "advantages", "improve"):
            watch.wrap(driver, name, "update")
        before, compiled, began = driver.num_env_steps, driver.compile_seconds, time.perf_counter()
        for _ in range(iterations):
            driver.step()
        seconds = time.perf_counter() - began - (driver.compile_seconds - compiled)
    parts = {**watch.seconds, "other": seconds - sum(watch.seconds.values())}
    return Profile(driver.num_env_steps - before, seconds, parts, driver.compile_seconds)


def _watch_actors(watch: Stopwatch, agent: Any) -> None:
    """Time what steps for the agent, where that is not the agent itself."""
    make: Callable[[], Any] | None = getattr(agent, "actor", None)
    if make is None:
        return

    def actor() -> Any:
        found = make()
        if found is not agent:
            for name in ("sample", "observe", "env_action"):
                watch.wrap(found, name, "policy")
        return found

    agent.actor = actor


def show(found: Profile, title: str) -> None:
    """Print the split as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("part")
    for name in ("seconds", "share", "us a step"):
        table.add_column(name, justify="right")
    for part, seconds in found.parts.items():
        table.add_row(part, f"{seconds:.3f}", f"{100.0 * seconds / found.seconds:.0f} %", f"{1e6 * seconds / found.num_env_steps:.0f}")
    Console().print(table)
    speed = f"{found.num_env_steps:,} steps in {found.seconds:.2f} s, {found.steps_per_second:,.0f} steps/s"
    print(f"{speed}; compiling took {found.compile_seconds:.1f} s more")
