"""Writes docs/systems.md from the tables of methods, the marks of the tests and the committed results of the claims: `python docs/systems.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from markovia.algos.systems import TABLES, rows
from markovia.algos.table import CHECKS, Row
from markovia.catalogue import command, list_claims, resolve, systems, where

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "systems.md"
Tested = dict[str, dict[str, list[str]]]

INTRO = """# Methods

Made by `python docs/systems.py` from the tables of methods, the marks of the tests and `benchmarks/results/claims.jsonl`; don't edit it by hand.
`markovia show ID` gives the equation, settings and claim of a method on one page.

Six kinds of check: a hand-computed **v**alue, the **g**radient against finite differences, the parent as a **l**imit case, **i**nvariance (order,
padding, micro-batches), **r**esume to the same bits, and **b**ad input that is answered. A dot stands for a kind that does not apply, with its reason
at the end of the page; a capital X for one that applies and is not written.
"""


def tested() -> Tested:
    """{row: {kind: [tests]}} by collecting the tests that carry a mark."""
    marked = [str(f) for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.check(" in f.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checks.json"
        collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--checks", str(file), *marked]
        done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the tests could not be collected:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
        found: Tested = json.loads(file.read_text())
    return found


def missing(row: Row, checks: Tested) -> list[str]:
    """The kinds that apply to a row and that no test carries."""
    return [kind for kind in row.checks if kind not in checks.get(row.id, {})]


def letters(row: Row, checks: Tested) -> str:
    """"vglirb" with dots for what does not apply and X for what is not written."""
    gone = missing(row, checks)
    return "".join("X" if kind in gone else kind[0] if kind in checks.get(row.id, {}) else "." for kind in CHECKS)


def link(reference: str) -> str:
    """A Markdown link to the line of "module:name"."""
    file, _, line = where(resolve(reference)).rpartition(":")
    return f"[{reference.partition(':')[2]}](../{file}#L{line})"


def counts(checks: Tested) -> list[str]:
    """How many rows are checked in which way, and how many claims hold."""
    out = ["| check | rows with a test | not written | does not apply |", "|---|---|---|---|"]
    every = rows().values()
    for kind in CHECKS:
        have = sum(kind in checks.get(r.id, {}) for r in every)
        gone = sum(kind in missing(r, checks) for r in every)
        out.append(f"| {kind} | {have} | {gone} | {len(every) - have - gone} |")
    trained = sum(command(r).startswith("markovia train") for r in every)
    return [f"{len(every)} rows, of which {trained} train.", "", *out]


def claims() -> list[str]:
    """How many claims hold, and the names of the others; a row may have further ones beside that of its table, with a task behind an @."""
    found: dict[str, list[str]] = {"holds": [], "does not hold": [], "not run": []}
    for line in list_claims("all"):
        name, _, result, _ = line.split("  ")
        found[result].append(f"`{name}`")
    lines = [f"- {result}: {', '.join(found[result]) or 'none'}" for result in ("does not hold", "not run")]
    return ["", f"Of {sum(map(len, found.values()))} claims {len(found['holds'])} hold:", "", *lines]


def family(title: str, table: dict[str, Row], checks: Tested, results: dict[str, str]) -> list[str]:
    """One family's table."""
    out = ["", f"## {title}", "", "| id | what is new | parent | paper | equation | checks | claim |", "|---|---|---|---|---|---|---|"]
    for row in table.values():
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})"
        functions = ", ".join(link(f) for f in row.functions)
        claim = results[row.id] if row.claim == row.id else f"{results[row.id]} (`{row.claim}`)"
        new = row.new.replace("|", "\\|")
        out.append(f"| `{row.id}` | {new} | {row.parent or ''} | {paper} | {functions} | `{letters(row, checks)}` | {claim} |")
    return out


def named(ids: list[str]) -> str:
    """The ids, or their number where they are a family."""
    return ", ".join(ids) if len(ids) < 20 else f"{ids[0]} and {len(ids) - 1} more rows of its kind"


def reasons(checks: Tested) -> list[str]:
    """Why kinds do not apply, each reason once, with the rows that it speaks of; then what is not written."""
    by_reason: dict[str, list[str]] = {}
    for row in rows().values():
        if row.not_checked:
            by_reason.setdefault(row.not_checked, []).append(f"`{row.id}`")
    out = ["", "## What does not apply, and why", "", *(f"- {reason}: {named(ids)}" for reason, ids in by_reason.items())]
    gone = [f"- `{row.id}`: {', '.join(kinds)}" for row in rows().values() if (kinds := missing(row, checks))]
    return out + (["", "## Not written", "", *gone] if gone else [])


def page(checks: Tested) -> str:
    """The whole page."""
    results = {s["id"]: s["result"] for s in systems()}
    tables = [line for title, table in TABLES.items() for line in family(title, table, checks, results)]
    return "\n".join([INTRO, *counts(checks), *claims(), *tables, *reasons(checks), ""])


if __name__ == "__main__":
    PAGE.write_text(page(tested()))
    print(PAGE)
