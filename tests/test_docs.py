"""What the documentation shows is true: the Python of its pages is run from top to bottom, and its commands are ones that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from markovia.algos.systems import find
from markovia.cli import COMMANDS
from markovia.cli_train import _flag, _parse_train

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
# Pages whose blocks of Python are one program each, and what it imports beside markovia.
RUN = {
    "start": (),
    "three-kinds": ("transformers",),
    "elsewhere": ("stable_baselines3", "transformers", "datasets", "trl"),
    "results": (),
    "adding-a-method": (),
}
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)


def blocks(page: Path) -> Iterator[tuple[str, str, int]]:
    """(language, text, number of the line before it) of each fenced block."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        yield found[1], found[2], text.count("\n", 0, found.start(2))


@pytest.mark.parametrize("page", RUN)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # names that transformers changed and TRL still uses
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program from top to bottom; tests that it defines are called."""
    if missing := [name for name in RUN[page] if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    path = ROOT / "docs" / f"{page}.md"
    names: dict[str, Any] = {"__name__": "docs_page"}
    code = [(text, line) for language, text, line in blocks(path) if language == "python"]
    assert code
    for text, line in code:  # moved down, so that a traceback names the page's line
        exec(compile("\n" * line + text, str(path), "exec", dont_inherit=True), names)
    for name in [n for n in names if n.startswith("test_")]:
        names[name]()


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind `markovia` of each command line of a page."""
    for language, text, _ in blocks(page):
        if language in ("", "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith("markovia "):
                    yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_commands_of_a_page_are_known(page: Path) -> None:
    unknown = [words[0] for words in commands(page) if words[0] not in COMMANDS]
    assert unknown == []


TRAIN = sorted({shlex.join(words[1:]) for page in PAGES for words in commands(page) if words[0] == "train"})


@pytest.mark.parametrize("flags", TRAIN)
def test_the_flags_of_a_training_command_are_read(flags: str) -> None:
    method_id, *rest = shlex.split(flags)
    given: Any = _parse_train(method_id, _flag(rest, "--env"), rest, find(method_id))
    assert given.run.env == _flag(rest, "--env")
