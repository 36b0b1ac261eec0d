"""Claims of the offline methods: on the fixtures whose optimum, density or scores are known (`markovia.envs.exact.offline`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from markovia.algos.offline.method import Offline
from markovia.algos.presets import configure
from markovia.algos.setup import Setup, build, make_driver

POINT = "markovia/PointMass2D-v0"


def _trained(method: Offline, tier: str, seed: int) -> tuple[Any, Setup]:
    """A run on a pointmass tier to the end of its budget, without a run folder."""
    setup = build(POINT, method, seed, dataset=f"fixture:pointmass2d/{tier}")
    driver = make_driver(method, setup, seed)
    while not driver.finished:
        driver.step()
    return driver, setup


def _score(method: str, tier: str, seed: int, episodes: int = 200) -> float:
    """Mean score of greedy episodes after training with the presets: 0 is the random tier's mean return, 100 the expert tier's."""
    _, setup = _trained(configure(method, POINT), tier, seed)
    return float(np.mean(setup.evaluate(setup.agent, episodes, seed)["score_pct"]))


def _data_score(tier: str) -> float:
    from markovia.envs.exact.offline import pointmass_data

    data = pointmass_data(tier)
    assert data.about.reference is not None
    return float(data.about.reference.score_pct(data.returns()).mean())


def imitation(seeds: int = 2, expert: float = 95.0, near: float = 8.0) -> dict[str, Any]:
    """BC reaches the expert that it imitates, and what it learns from medium data scores like their mean, within `near`; worst of the seeds."""
    on_expert = [_score("bc", "expert", s) for s in range(seeds)]
    gaps = [abs(_score("bc", "medium", s) - _data_score("medium")) for s in range(seeds)]
    holds = min(on_expert) >= expert and max(gaps) <= near
    return {"measured": min(on_expert), "bound": expert, "holds": holds, "expert": on_expert, "medium_minus_data": gaps, "medium_bound": near}


def best_episodes(seeds: int = 2, bound: float = 90.0, plain: float = 40.0) -> dict[str, Any]:
    """A fifth of the data is expert: imitation of the best tenth reaches `bound`, imitation of all stays under `plain`; worst of the seeds."""
    filtered, every = ([_score(m, "mix", s) for s in range(seeds)] for m in ("filtered-bc", "bc"))
    holds = min(filtered) >= bound and max(every) <= plain
    return {"measured": min(filtered), "bound": bound, "holds": holds, "filtered": filtered, "all": every, "all_bound": plain}


def better_than_imitation(method: str, tier: str = "blend", margin: float = 15.0, seeds: int = 2) -> dict[str, Any]:
    """Score of the method minus that of BC on the same data; worst of the seeds."""
    own, clone = ([_score(m, tier, s) for s in range(seeds)] for m in (method, "bc"))
    measured = min(a - b for a, b in zip(own, clone, strict=True))
    return {"measured": measured, "bound": margin, "holds": measured >= margin, method: own, "bc": clone}
