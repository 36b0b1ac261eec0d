"""Claims about going online after learning on data: how far the return falls at the switch, and where it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from markovia.algos.offline.warm_start import WarmStart, WarmStartDriver
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.envs.exact.offline import fixture

TASK = "Pendulum-v1"
WINDOW = 5  # episodes of the moving return


def _driver(method: WarmStart, dataset: str, seed: int) -> WarmStartDriver:
    driver: WarmStartDriver = make_driver(method, build(TASK, method, seed, dataset=dataset), seed)
    return driver


def _online(driver: WarmStartDriver) -> np.ndarray:
    """Returns of the training episodes, in the order in which they ended."""
    driver.go_online()
    assert driver.online is not None
    episodes: list[float] = []
    describe = driver.online.describe

    def keep() -> dict[str, float]:
        episodes.extend(driver.collector.online.episodes)
        return describe()

    driver.online.describe = keep  # type: ignore[method-assign]
    while not driver.finished:
        driver.step()
    return np.array(episodes)


def pendulum(tier: str = "medium", steps: int = 6000, seeds: int = 2) -> dict[str, Any]:
    """From a recorded Pendulum set to Pendulum itself: the largest drop of a five-episode return below the return at the switch.

    With frozen steps it is at most half of that without them, or at most 10 % of that return: measured is the drop over what is allowed, worst of the
    seeds. And the last ten episodes return at least what they do when half of each minibatch stays offline, less 5 %. Returns count from -1600, the
    worst a pendulum can do.
    """
    dataset = f"fixture:pendulum/{tier}"
    fixture(f"pendulum/{tier}")  # says how to record it where it is not there
    base = configure("wsrl", TASK)
    assert isinstance(base, WarmStart)
    base = replace(base, online=replace(base.online, num_env_steps=steps))
    bare = replace(base, online=replace(base.online, learning_starts=base.online.batch_size))
    drops: dict[str, list[float]] = {"warm": [], "plain": [], "retained": []}
    ends: dict[str, list[float]] = {name: [] for name in drops}
    starts = []
    for seed in range(seeds):
        learnt = _driver(base, dataset, seed)
        while not learnt.offline.finished:
            learnt.step()
        state = learnt.state()
        found = build(TASK, base.offline, seed, dataset=dataset).evaluate(learnt.agent, 20, seed)
        starts.append(float(np.mean(found["returns"])) + 1600.0)
        for name, method in (("warm", base), ("plain", bare), ("retained", replace(bare, retain=0.5))):
            driver = _driver(method, dataset, seed)
            driver.load_state({k: v.clone() for k, v in state[0].items()}, state[1])
            returns = _online(driver) + 1600.0
            moving = np.convolve(returns, np.full(WINDOW, 1.0 / WINDOW), "valid")
            drops[name].append(float(max(0.0, starts[-1] - moving.min())))
            ends[name].append(float(returns[-10:].mean()))
    allowed = [max(0.5 * p, 0.1 * s) for p, s in zip(drops["plain"], starts, strict=True)]
    measured = max(w / a for w, a in zip(drops["warm"], allowed, strict=True))
    end = min(w - 0.95 * r for w, r in zip(ends["warm"], ends["retained"], strict=True))
    holds = measured <= 1.0 and end >= 0.0
    return {"measured": measured, "bound": 1.0, "holds": holds, "return_at_switch": starts, "drops": drops, "last_ten": ends}


def pool(method: str, tier: str = "random", fraction: float = 0.04, seeds: int = 3, least: float = 5.0) -> dict[str, Any]:
    """Few logged steps of the point mass, then as many updates as the preset has online steps: on a pool that these steps join, or on the data alone.

    Score of 20 greedy episodes with the pool less that without, worst of the seeds: at least `least` points of the 100 between random and expert.
    """
    task, dataset = "markovia/PointMass2D-v0", f"fixture:pointmass2d/{tier}"
    base = override(configure(method, task), {"offline": {"data": {"fraction": fraction}}})
    assert isinstance(base, WarmStart)
    alone = replace(base.offline, num_env_steps=base.offline.num_env_steps + base.online.num_optimizer_steps)
    scores: dict[str, list[float]] = {"at_switch": [], "with_steps": [], "data_alone": []}
    for seed in range(seeds):
        setup = build(task, base, seed, dataset=dataset)
        driver: WarmStartDriver = make_driver(base, setup, seed)
        while not driver.offline.finished:
            driver.step()
        scores["at_switch"].append(float(np.mean(setup.evaluate(driver.agent, 20, seed)["score_pct"])))
        while not driver.finished:
            driver.step()
        scores["with_steps"].append(float(np.mean(setup.evaluate(driver.agent, 20, seed)["score_pct"])))
        control = build(task, alone, seed, dataset=dataset)
        longer = make_driver(alone, control, seed)
        while not longer.finished:
            longer.step()
        scores["data_alone"].append(float(np.mean(control.evaluate(longer.agent, 20, seed)["score_pct"])))
    measured = min(w - a for w, a in zip(scores["with_steps"], scores["data_alone"], strict=True))
    return {"measured": measured, "bound": least, "holds": measured >= least, **scores}
