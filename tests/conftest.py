"""Fixtures that several test files share, and which check of a method each test is.

`@pytest.mark.check("value")` says that a test is one of the six checks of the rows that its parameters name; `@pytest.mark.check("limit", "ppo")`
names the rows itself. `pytest --collect-only --checks FILE` writes {row: {kind: [tests]}}, from which docs/systems.md and the sweep are made.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checks", type=Path, help="file for {row: {kind: [tests]}}, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "check(kind, *rows): which of a method's six checks this is, for the rows named here or by its parameters")


def pytest_collection_finish(session: pytest.Session) -> None:
    if (file := session.config.getoption("--checks")) is None:
        return
    from markovia.algos.systems import find, rows

    known, found = rows(), {}
    for item in session.items:
        for mark in item.iter_markers("check"):
            kind, *named = mark.args
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
            for row in named or [p for p in parameters if isinstance(p, str) and p in known]:
                found.setdefault(find(row).id, {}).setdefault(kind, []).append(item.nodeid)
    file.write_text(json.dumps(found))


@pytest.fixture
def trap(tmp_path):
    """(an object whose unpickling makes a file, the path of that file)."""
    proof = tmp_path / "owned"

    class Trap:
        def __reduce__(self):
            return (open, (str(proof), "w"))

    return Trap(), proof


@pytest.fixture
def traced_only(monkeypatch):
    """Compiled updates run their traced operations one by one: all of the mechanism but the compiler, which takes half a minute."""
    import torch

    monkeypatch.setattr("markovia.algos.kept.find", lambda told: None)
    monkeypatch.setattr("markovia.algos.kept.make", lambda *given: None)
    monkeypatch.setattr(torch, "compile", lambda graph_module, **_: graph_module)


@pytest.fixture
def allocated():
    """A function that runs a function and gives the most bytes that torch's allocator had given out at once, beyond what it had before."""
    from torch.profiler import ProfilerActivity, profile

    def measure(run):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            run()
        most = now = 0
        for event in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most

    return measure
