"""Executable claims: what each method is supposed to do, as a function that measures it and says whether it holds.

A claim function takes no argument and returns {"measured": ..., "bound": ..., "holds": bool, ...} (plain JSON); `markovia claims` runs it.
Class "fast" takes under 60 s on two cores, "slow" at most 10 minutes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Claim(NamedTuple):
    """Where a claim's function is, and how long it may take."""

    function: str  # "module:function"
    speed: Literal["fast", "slow"] = "fast"


CLAIMS: dict[str, Claim] = {}
