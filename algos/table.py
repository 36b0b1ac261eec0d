"""A method is a row: an id, the value that fills a driver's slots, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markovia.envs.names import nearest as nearest  # the methods' code asks for it here

# The kinds of test that a method can have.
CHECKS = ("value", "gradient", "limit", "invariance", "resume", "bad_input")


@dataclass(frozen=True)
class Row:
    """One method. `value` fills a driver's slots; everything else is what `markovia show` and the tests read."""

    id: str
    value: Any
    parent: str | None
    paper: str
    new: str
    kinds: tuple[str, ...]
    functions: tuple[str, ...]  # "module:function" of the equations that make it, main one first
    claim: str  # id in markovia.claims
    checks: tuple[str, ...] = CHECKS  # those that apply; a test says by a mark which one of which row it is
    not_checked: str = ""  # why a check of the six does not apply


def table(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by id; a second row of one id raises ValueError."""
    out: dict[str, Row] = {}
    for row in rows:
        if row.id in out:
            raise ValueError(f"method id {row.id!r} appears twice in the table")
        out[row.id] = row
    return out
