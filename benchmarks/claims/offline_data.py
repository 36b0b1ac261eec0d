"""Claims about offline data: the measures of a dataset tell the tiers of one task apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from markovia.envs.exact.offline.maze import EmpiricalMDP, as_transitions, maze, run, success
from markovia.envs.exact.tabular import TabularMDP
from markovia.envs.offline import Transitions, concatenate, state_action_coverage, trajectory_quality

NUM_STEPS = 4_000
LIMIT = 50  # steps per episode


def _q_learning(mdp: TabularMDP, rng: np.random.Generator) -> tuple[Transitions, np.ndarray]:
    """Everything an epsilon-greedy learner did in NUM_STEPS steps, epsilon falling from 1 to 0.05 over the first half, and its greedy policy."""
    S, A = mdp.R.shape
    q, episodes, taken = np.zeros((S, A)), [], 0
    while taken < NUM_STEPS:
        state = 0
        rows: list[tuple] = []
        while len(rows) < LIMIT and state != S - 1:
            epsilon = max(0.05, 1 - 1.9 * taken / NUM_STEPS)
            action = int(rng.integers(A)) if rng.random() < epsilon else int(rng.choice(np.flatnonzero(q[state] == q[state].max())))
            new = int(rng.choice(S, p=mdp.P[state, action]))
            reward, over = 10.0 * (new == S - 1), new == S - 1
            q[state, action] += 0.5 * (reward + mdp.gamma * (0.0 if over else q[new].max()) - q[state, action])
            rows.append((state, action, reward, new, over))
            state, taken = new, taken + 1
        episodes.append(rows)
    return as_transitions(episodes, mdp, "replay", LIMIT).rows(np.arange(NUM_STEPS)), mdp.greedy(q)


def _play(mdp: TabularMDP, policy: np.ndarray, name: str, rng: np.random.Generator, steps: int = NUM_STEPS) -> Transitions:
    """`steps` rows of a policy; the last episode may be cut."""
    episodes: list[list[tuple]] = []
    while sum(map(len, episodes)) < steps:
        episodes += run(mdp, policy, 1, LIMIT, rng, 10.0)
    return as_transitions(episodes, mdp, name, LIMIT).rows(np.arange(steps))


def _five(mdp: TabularMDP, rng: np.random.Generator) -> dict[str, Transitions]:
    """The five sets of one task, NUM_STEPS rows each: random, expert, mixed (a fifth expert), noisy (a fifth uniform actions), replay."""
    replay, expert = _q_learning(mdp, rng)
    uniform = mdp.uniform_policy()
    part = _play(mdp, expert, "part", rng, NUM_STEPS // 5)
    return {
        "random": _play(mdp, uniform, "random", rng),
        "expert": _play(mdp, expert, "expert", rng),
        "mixed": concatenate([_play(mdp, uniform, "most", rng, NUM_STEPS - len(part)), part], "mixed"),
        "noisy": _play(mdp, 0.8 * expert + 0.2 * uniform, "noisy", rng),
        "replay": replay,
    }


def _ends(sets: dict[str, Transitions]) -> tuple[float, float]:
    """Mean returns of the random and of the expert set."""
    low, high = (float(sets[k].returns()[sets[k].complete()].mean()) for k in ("random", "expert"))
    return low, high


def saco_tq(seeds: int = 3) -> dict[str, Any]:
    """6 x 6 grid without slips, five sets per seed: TQ 0 and 1 at the ends, SACo(expert) < SACo(noisy) < SACo(replay) = 1."""
    rows: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        sets = _five(maze(size=6, slip=0.0), np.random.default_rng(seed))
        quality = {k: trajectory_quality(d, *_ends(sets)) for k, d in sets.items()}
        rows.append({"tq": quality, "saco": {k: state_action_coverage(d, sets["replay"]) for k, d in sets.items()}})
    measured = {m: {k: [round(r[m][k], 3) for r in rows] for k in rows[0][m]} for m in ("tq", "saco")}
    ends = all(r["tq"]["random"] == 0 and r["tq"]["expert"] == 1 and r["saco"]["replay"] == 1 for r in rows)
    ordered = all(r["saco"]["expert"] < r["saco"]["noisy"] < r["saco"]["replay"] for r in rows)
    return {"measured": measured, "bound": "TQ random 0, expert 1; SACo expert < noisy < replay = 1, every seed", "holds": ends and ordered}


def saco_tq_scores() -> dict[str, Any]:
    """25 sets on five grids: behavioural cloning's score goes with TQ, unconstrained Q-learning's with SACo.

    Cloning is the data's action frequencies, Q-learning the fixed point on the empirical MDP over all actions, where pairs that the data never
    tried keep a value drawn from [0, 10]: what a network that was never corrected there may say. Scores are exact: the probability of reaching
    the goal in 50 steps, on the scale of the random and the expert set.
    """
    columns: dict[str, list[float]] = {"tq": [], "saco": [], "bc": [], "q": []}
    for grid, (size, slip) in enumerate([(5, 0.1), (6, 0.0), (6, 0.25), (7, 0.1), (5, 0.25)]):
        mdp, rng = maze(size=size, slip=slip), np.random.default_rng(grid)
        sets = _five(mdp, rng)
        low, high = _ends(sets)
        for data in sets.values():
            empirical = EmpiricalMDP.from_data(data, mdp.num_states, mdp.num_actions)
            columns["tq"].append(trajectory_quality(data, low, high))
            columns["saco"].append(state_action_coverage(data, sets["replay"]))
            for name, policy in (("bc", empirical.behaviour), ("q", _unconstrained(empirical, rng))):
                columns[name].append((10.0 * success(mdp, policy, LIMIT) - low) / (high - low))
    pearson = {"bc_tq": float(np.corrcoef(columns["bc"], columns["tq"])[0, 1]), "q_saco": float(np.corrcoef(columns["q"], columns["saco"])[0, 1])}
    return {"measured": pearson, "bound": {"bc_tq": 0.8, "q_saco": 0.4}, "holds": pearson["bc_tq"] >= 0.8 and pearson["q_saco"] > 0.4}


def _unconstrained(empirical: EmpiricalMDP, rng: np.random.Generator) -> np.ndarray:
    """(S, A) greedy policy, ties shared, of Q-learning that believes arbitrary values of what the data never tried."""
    tried = empirical.counts > 0
    start = rng.uniform(0.0, 10.0, tried.shape)
    start[-1] = 0.0  # the goal ends the episode
    q = start
    for _ in range(500):
        q = np.where(tried, empirical.mdp.backup(q.max(-1)), start)
    best = q == q.max(-1, keepdims=True)
    return best / best.sum(-1, keepdims=True)
