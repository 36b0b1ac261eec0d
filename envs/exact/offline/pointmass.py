"""F3: a point that is pushed to a goal in the plane, with data of five kinds; a network learns it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import gymnasium as gym
import numpy as np

from markovia.envs.exact.offline.plane import NOISE, Plane, pushed, square
from markovia.envs.offline.scores import Reference
from markovia.envs.offline.transitions import About, Transitions

GOAL = np.array([0.5, 0.5])
HORIZON = 40
ENV_ID = "markovia/PointMass2D-v0"
TIERS = ("random", "medium", "expert", "mix", "blend")
NUM_EPISODES = 250

Policy = Callable[[np.ndarray], np.ndarray]  # states (n, 2) -> actions (n, 2)


def reward(state: np.ndarray) -> np.ndarray:
    """r = -|s' - g|, of the state that a push led to; any leading shape."""
    distance: np.ndarray = np.linalg.norm(state - GOAL, axis=-1)
    return -distance


def expert(state: np.ndarray) -> np.ndarray:
    """clip(10 (g - s)): straight to the goal; one step covers a distance of 0.1 per axis."""
    return np.clip(10.0 * (GOAL - state), -1.0, 1.0)


class PointMass2D(Plane):
    """A point in the plane is pushed towards a fixed goal.

    ## Description
    s' = clip(s + 0.1 a + N(0, 0.01^2)), the fixture F3 of the offline methods: `markovia.envs.exact.offline` has its data and its reference returns.

    ## Action Space
    Box(-1, 1, (2,)): the push.

    ## Observation Space
    Box(-1, 1, (2,)): the position.

    ## Rewards
    -|s' - (0.5, 0.5)|, a float.

    ## Starting State
    Uniform in the square.

    ## Episode End
    Never terminates; the registered id is truncated after 40 steps.
    """

    def _start(self) -> np.ndarray:
        return self.np_random.uniform(-1.0, 1.0, 2)

    def _arrived(self, state: np.ndarray) -> tuple[float, bool]:
        return float(reward(state)), False


def evaluate(policy: Policy, episodes: int = 200, seed: int = 0) -> np.ndarray:
    """(episodes,) returns of a policy of states (n, 2), all episodes side by side."""
    return _run(lambda s, rng: policy(s), episodes, seed).returns()


def _run(policy: Callable[[np.ndarray, np.random.Generator], np.ndarray], episodes: int, seed: int, stream: int = 0) -> Transitions:
    """Whole episodes, one after the other in the rows. The starts depend on the seed alone, so that tiers of one seed differ by their policy."""
    rng = np.random.default_rng([seed, stream])
    states, actions, rewards = [np.random.default_rng(seed).uniform(-1.0, 1.0, (episodes, 2))], [], []
    for _ in range(HORIZON):
        actions.append(np.clip(policy(states[-1], rng), -1.0, 1.0))
        states.append(pushed(states[-1], actions[-1], NOISE * rng.standard_normal((episodes, 2))))
        rewards.append(reward(states[-1]))
    rows = lambda x: np.stack(x, axis=1).reshape(episodes * HORIZON, *x[0].shape[1:]).astype(np.float32)  # noqa: E731
    last = np.tile(np.arange(HORIZON) == HORIZON - 1, episodes)
    return Transitions(
        obs=rows(states[:-1]),
        action=rows(actions),
        reward=rows(rewards),
        next_obs=rows(states[1:]),
        terminated=np.zeros(len(last), dtype=bool),
        truncated=last,
        episode=np.repeat(np.arange(episodes), HORIZON),
        about=About("pointmass2d", ENV_ID, HORIZON, square(), square(), gym.spec(ENV_ID)),
    )


def _uniform(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1.0, 1.0, state.shape)


def _blended(weight: np.ndarray) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """weight (n,) of the expert in every episode; the rest is a uniform action."""
    return lambda s, rng: weight[:, None] * expert(s) + (1 - weight[:, None]) * _uniform(s, rng)


def _policy(tier: str, episodes: int) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    if tier == "medium":
        return lambda s, rng: 0.35 * expert(s) + 0.4 * rng.standard_normal(s.shape)
    if tier == "mix":  # four random episodes, then an expert one
        return _blended((np.arange(episodes) % 5 == 4).astype(np.float64))
    if tier == "blend":  # ten blocks, from random to expert
        return _blended(np.linspace(0.0, 1.0, 10)[np.arange(episodes) * 10 // episodes])
    return {"random": _uniform, "expert": lambda s, rng: expert(s)}[tier]


def pointmass_data(tier: str, seed: int = 0, episodes: int = NUM_EPISODES) -> Transitions:
    """One tier: random, medium (35 % of the expert plus noise 0.4), expert, mix (a fifth expert episodes) or blend (from random to expert).

    `about.reference` counts the mean return of the random tier as 0 and that of the expert tier as 100. Raises ValueError for another tier.
    """
    if tier not in TIERS:
        raise ValueError(f"unknown tier {tier!r}; pointmass2d has {', '.join(TIERS)}")
    data = _run(_policy(tier, episodes), episodes, seed, TIERS.index(tier))
    return replace(data, about=replace(data.about, name=f"pointmass2d/{tier}", reference=pointmass_reference(seed)))


def pointmass_reference(seed: int = 0) -> Reference:
    """Mean returns of the random and the expert tier: about -38.6 and -4.5 for seed 0."""
    low, high = (float(_run(_policy(t, NUM_EPISODES), NUM_EPISODES, seed, TIERS.index(t)).returns().mean()) for t in ("random", "expert"))
    return Reference(ENV_ID, HORIZON, low, high, f"mean returns of the random and expert tiers of seed {seed}, {NUM_EPISODES} episodes each")
