"""Measures of data as rows: they train nothing, but have an equation, a paper and a claim like every method."""

from __future__ import annotations

from dataclasses import dataclass

from markovia.algos.table import Row, table

_HERE = "markovia.envs.offline.measures:"


@dataclass(frozen=True)
class Measure:
    """How a dataset is measured (`markovia dataset ID`)."""

    bins: int = 100  # equal parts per dimension of (s, a)


MEASURES = table(
    [
        Row(
            "saco-tq", Measure(), None, "2111.04714", "how good and how varied a dataset is, before anything is learnt from it",
            ("control", "tabular"), (_HERE + "trajectory_quality", _HERE + "state_action_coverage"), "saco-tq",
            ("value", "invariance", "bad_input"), "a statistic of data is not descended on, has no parent and holds no state",
        ),
    ]
)  # fmt: skip
