"""All methods, joined from the families' tables."""

from __future__ import annotations

from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.table import Row, nearest, table


def rows() -> dict[str, Row]:
    """Every method by id."""
    return table([*ON_POLICY.values()])


def find(method_id: str) -> Row:
    """The row of one id. Raises ValueError with the nearest ids."""
    known = rows()
    if method_id not in known:
        raise ValueError(f"unknown method {method_id!r}{nearest(method_id, known)} (`markovia systems` lists all)")
    return known[method_id]
