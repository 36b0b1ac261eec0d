"""Word problems of one step, generated: something to try the GSM8K format on where no file is at hand."""

from __future__ import annotations

_NAMES = ("Ann", "Ben", "Carla", "Dev", "Eva", "Farid")
_THINGS = ("apples", "books", "coins", "marbles")


def word_problems() -> list[dict[str, str]]:
    """96 rows with `question` and `answer` ("... #### 42"): sums, differences, products and shares of small numbers."""
    out = []
    for i, name in enumerate(_NAMES):
        for k, thing in enumerate(_THINGS):
            a, b = 12 + 7 * i + 3 * k, 4 + 2 * i + k
            few, each = 2 + (i + k) % 4, 3 + i + k
            rows = (
                (f"{name} has {a} {thing} and is given {b} more. How many {thing} does {name} have now?", f"{a} + {b} = {a + b}", a + b),
                (f"{name} had {a} {thing} and gave away {b}. How many {thing} are left?", f"{a} - {b} = {a - b}", a - b),
                (f"{name} buys {few} boxes with {each} {thing} in each. How many {thing} is that?", f"{few} * {each} = {few * each}", few * each),
                (f"{name} shares {few * each} {thing} equally among {few} friends. How many {thing} does each friend get?",
                 f"{few * each} / {few} = {each}", each),
            )  # fmt: skip
            out += [{"question": q, "answer": f"{working}\n#### {number}"} for q, working, number in rows]
    return out
