"""The split of training time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from markovia.cli import run
from markovia.profile import Stopwatch, profile

SMALL = {"num_envs": 2, "num_steps": 8, "solver": {"epochs": 1}}


class Thing:
    """Each method takes a second of its own clock."""

    now = 0.0

    def outer(self) -> None:
        self.now += 1.0
        self.inner()

    def inner(self) -> None:
        self.now += 1.0


def test_a_method_inside_another_counts_for_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    thing, watch = Thing(), Stopwatch()
    monkeypatch.setattr("markovia.profile.time", SimpleNamespace(perf_counter=lambda: thing.now))
    watch.wrap(thing, "outer", "update")
    watch.wrap(thing, "inner", "policy")
    watch.wrap(thing, "missing", "policy")
    thing.outer()
    thing.inner()
    assert watch.seconds == {"environment": 0.0, "policy": 1.0, "update": 2.0}


@pytest.mark.parametrize("env", ["Pendulum-v1", "markovia/TokenTree-v0", "markovia/LinearGaussian-v0"])
def test_parts_add_up_to_the_whole(env: str) -> None:
    found = profile("ppo", env, iterations=2, compile=False, settings=SMALL)
    assert sum(found.parts.values()) == pytest.approx(found.seconds) and min(found.parts.values()) >= 0.0
    assert found.parts["update"] > 0.0 and found.parts["policy"] > 0.0
    assert found.num_env_steps == (4 if env.endswith("LinearGaussian-v0") else 32)
    assert found.compile_seconds == 0.0


def test_profile_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "ppo", "--env", "Pendulum-v1", "--iterations", "1", "--eager", "--settings", '{"num_envs": 2, "num_steps": 8}']) == 0
    out = capsys.readouterr().out
    assert "environment" in out and "16 steps in" in out
    assert run(["profile", "ppo", "--env", "CartPole-v1", "--iterations", "0"]) == 2
    assert run(["profile", "ppoo", "--env", "CartPole-v1"]) == 2


@pytest.mark.parametrize("method", ["td3-bc", "wsrl", "dpo"])
def test_methods_that_step_no_environment_are_refused(method):
    with pytest.raises(ValueError, match=f"{method} learns from a dataset or a file, and a profile is of methods that step an environment"):
        profile(method, "Pendulum-v1")
