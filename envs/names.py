"""What to say to a name that is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(name: str, known: Iterable[str]) -> str:
    """"; did you mean ...?" with up to three known names, the best first, or an empty string.

    The last part of a path is compared too, so that a forgotten namespace is found ("dapo" for "grpo/dapo").
    """

    def likeness(other: str) -> float:
        whole, last = (SequenceMatcher(None, name, text).ratio() for text in (other, other.rpartition("/")[2]))
        return max(whole, last - 0.05)

    close = sorted(((likeness(other), other) for other in known), key=lambda pair: -pair[0])[:3]
    names = [repr(other) for score, other in close if score >= 0.4]
    return f"; did you mean {' or '.join(names)}?" if names else ""
