"""Every row of the tables is whole: it can be run and shown, and has its paper, equation, parent, checks and claim; docs/systems.md says so."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from markovia.algos.offline.warm_start import WarmStart
from markovia.algos.presets import override
from markovia.algos.systems import Method, rows
from markovia.algos.table import CHECKS, Row
from markovia.catalogue import card, command, resolve, where
from markovia.claims import CLAIMS
from markovia.cli_train import _parse_train
from markovia.envs.registry import KINDS
from markovia.runs import resolve as resolve_method
from markovia.settings import from_json, to_json

ROOT = Path(__file__).resolve().parent.parent
ROWS = rows()
TRAINED = [i for i, row in ROWS.items() if isinstance(row.value, Method)]
ENV_OF_KIND = {
    "control": "Pendulum-v1", "tabular": "markovia/TokenTree-v0", "language": "markovia/Arithmetic-v0", "denoising": "markovia/LinearGaussian-v0",
}  # fmt: skip
# Whatever an equation can't do without.
EQUATION = re.compile(r"[=^]|<-|log|1\[| / |\+ \(")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/systems.py."""
    spec = importlib.util.spec_from_file_location("systems_page", ROOT / "docs" / "systems.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tested(script: ModuleType) -> dict[str, dict[str, list[str]]]:
    """{row: {kind: [tests]}}."""
    return script.tested()  # type: ignore[no-any-return]


def lacks(row: Row) -> list[str]:
    """What a row lacks of paper, equation, parent, kinds and claim."""
    texts = [resolve(f).__doc__ or "" for f in row.functions]
    checks = {
        "an arXiv id": bool(re.fullmatch(r"\d{4}\.\d{4,5}", row.paper)),
        "what is new": bool(row.new),
        "a parent that is a row": row.parent is None or (row.parent in ROWS and row.parent != row.id),
        "kinds of MDP that there are": bool(row.kinds) and set(row.kinds) <= set(KINDS.values()) | {"control"},
        "functions with docstrings": bool(texts) and all(texts),
        "an equation in one of their docstrings": any(EQUATION.search(t) for t in texts),
        "a claim that can be run": row.claim in CLAIMS,
        "known checks": set(row.checks) <= set(CHECKS),
        "a reason for the checks that do not apply": set(row.checks) == set(CHECKS) or bool(row.not_checked),
    }
    return [name for name, there in checks.items() if not there]


@pytest.mark.parametrize("method_id", ROWS)
def test_row_is_whole(method_id: str) -> None:
    assert lacks(ROWS[method_id]) == []


def test_a_row_without_something_is_found() -> None:
    row = dataclasses.replace(ROWS["ppo"], claim="none", paper="", parent="pppo", checks=("value",))
    assert [name.split()[1] for name in lacks(row)] == ["arXiv", "parent", "claim", "reason"]


@pytest.mark.parametrize("method_id", ROWS)
def test_every_check_that_applies_is_written(method_id: str, script: ModuleType, tested: dict[str, dict[str, list[str]]]) -> None:
    """A new row needs tests that carry `@pytest.mark.check(kind)` for it, or a row that says which kinds don't apply and why."""
    assert script.missing(ROWS[method_id], tested) == [], f"no test is marked with these checks of {method_id} (docs/adding-a-method.md)"


@pytest.mark.parametrize("method_id", ROWS)
def test_no_check_is_said_not_to_apply_and_written_all_the_same(method_id: str, tested: dict[str, dict[str, list[str]]]) -> None:
    assert set(tested[method_id]) <= set(ROWS[method_id].checks)


def test_a_row_without_tests_is_found(script: ModuleType) -> None:
    assert script.missing(dataclasses.replace(ROWS["ppo"], id="new"), {}) == list(CHECKS)


def test_marks_name_kinds_that_there_are(tested: dict[str, dict[str, list[str]]]) -> None:
    assert {kind for found in tested.values() for kind in found} == set(CHECKS)


# -- the command line --------------------------------------------------------------------------------------------------------------------------


def flags_of(row: Row) -> list[str]:
    """What `markovia train ID` is called with: the words of `command`, filled in for a small task."""
    env = "markovia/SafePendulum-v0" if getattr(row.value, "constraint", None) is not None else ENV_OF_KIND[row.kinds[0]]
    words = {"ID": env, "ID_OR_FILE": "fixture:pointmass2d/expert", "FILE": "prefs.jsonl", "NAME": "smollm2"}
    return [words.get(word, word) for word in command(row).split()[3:]]


@pytest.mark.parametrize("method_id", ROWS)
def test_every_row_is_reached_from_the_command_line(method_id: str) -> None:
    """Trained, or measured by a command of its own; its page gives the equation and the file and line where it stands, two steps from the id."""
    row = ROWS[method_id]
    if method_id in TRAINED:
        flags = flags_of(row)
        assert resolve_method(method_id, flags[1] if flags[0] == "--env" else None)[1] is not None
        assert from_json(type(row.value), json.loads(json.dumps(to_json(row.value)))) == row.value  # as a run's folder keeps it
    else:
        assert command(row) in ("markovia dataset ID", f"markovia claims {row.claim}")
    page = card(method_id)
    for part in (row.new, f"https://arxiv.org/abs/{row.paper}", command(row), f"markovia claims {row.claim}"):
        assert part in page
    for function in row.functions:
        found = resolve(function)
        assert where(found) in page and (found.__doc__ or "").strip().splitlines()[0] in page
        file, _, line = where(found).rpartition(":")
        name = function.rpartition(".")[2].rpartition(":")[2]
        lines = (ROOT / file).read_text().splitlines()[int(line) - 1 :][:6]  # decorators stand above
        assert any(re.search(rf"(def|class) {name}\b", text) for text in lines), f"{file}:{line} is not {name}"


@pytest.mark.parametrize("method_id", TRAINED)
def test_every_row_has_flags(method_id: str) -> None:
    row = ROWS[method_id]
    flags = flags_of(row)
    env = flags[1] if flags[0] == "--env" else None
    _parse_train(method_id, env, flags, row)


@pytest.mark.parametrize("method_id", TRAINED)
@pytest.mark.check("bad_input")
def test_a_budget_that_trains_nothing_is_refused(method_id: str) -> None:
    value, nothing = ROWS[method_id].value, {"num_env_steps": 0}
    with pytest.raises(ValueError, match=r"num_env_steps.* must be >= 1"):
        override(value, {"offline": nothing} if isinstance(value, WarmStart) else nothing)


# -- the page ----------------------------------------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_tables(script: ModuleType, tested: dict[str, dict[str, list[str]]]) -> None:
    assert script.PAGE.read_text() == script.page(tested), "docs/systems.md is old: make it anew with `python docs/systems.py`"


def test_links_of_the_page_lead_somewhere(script: ModuleType) -> None:
    links = re.findall(r"\]\((\.\./[^)#]+)#L(\d+)\)", script.PAGE.read_text())
    assert len(links) > 200
    for file, line in set(links):
        assert len((script.PAGE.parent / file).read_text().splitlines()) >= int(line)
