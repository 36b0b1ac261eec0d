"""F2: an open grid with slips, few successes in the data, and the empirical MDP on which tabular offline methods have exact fixed points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from markovia.envs.exact.tabular import TabularMDP
from markovia.envs.offline.transitions import About, Transitions

MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])  # up, down, left, right, stay


def maze(size: int = 7, slip: float = 0.25, reward: float = 10.0, gamma: float = 0.95) -> TabularMDP:
    """Open size x size grid, start (0, 0), goal (size - 1, size - 1); states row-major, five actions clipped at the border.

    With probability `slip` the action is replaced by a uniform one of the five. Entering the goal pays `reward` and ends: the goal's row of P stays
    in the goal and pays nothing. V*(start) is 4.78 for the defaults.
    """
    S, goal = size * size, size * size - 1
    cell = np.stack(np.divmod(np.arange(S), size), axis=1)
    target = np.clip(cell[:, None] + MOVES, 0, size - 1) @ np.array([size, 1])
    target[goal] = goal
    step = np.eye(S)[target]
    P = (1 - slip) * step + slip * step.mean(axis=1, keepdims=True)
    R = reward * P[..., goal]
    R[goal] = 0.0
    return TabularMDP(P, R, gamma, np.eye(S)[0])


def success(mdp: TabularMDP, policy: np.ndarray, num_steps: int = 50) -> float:
    """Probability that `policy` (S, A) is in the last state, the goal, after num_steps steps; exact."""
    return float((mdp.rho @ np.linalg.matrix_power(mdp.chain(policy), num_steps))[-1])


def run(mdp: TabularMDP, policy: np.ndarray, episodes: int, num_steps: int, rng: np.random.Generator, reward: float) -> list[list[tuple]]:
    """Episodes of (s, a, r, s', terminated) that end in the last state or after num_steps steps."""
    S, A = mdp.R.shape
    out = []
    for _ in range(episodes):
        state = int(rng.choice(S, p=mdp.rho))
        rows: list[tuple] = []
        while len(rows) < num_steps and state != S - 1:
            action = int(rng.choice(A, p=policy[state]))
            new = int(rng.choice(S, p=mdp.P[state, action]))
            rows.append((state, action, reward * (new == S - 1), new, new == S - 1))
            state = new
        out.append(rows)
    return out


def as_transitions(episodes: list[list[tuple]], mdp: TabularMDP, name: str, num_steps: int) -> Transitions:
    """Rows of `run`; an episode that did not terminate was truncated."""
    from gymnasium import spaces

    obs, action, reward, next_obs, terminated = (np.array(c) for c in zip(*(row for ep in episodes for row in ep), strict=True))
    last = np.cumsum([len(ep) for ep in episodes]) - 1
    truncated = np.zeros(len(obs), dtype=bool)
    truncated[last] = ~terminated[last]
    episode = np.repeat(np.arange(len(episodes)), [len(ep) for ep in episodes])
    about = About(name, None, num_steps, spaces.Discrete(mdp.num_states), spaces.Discrete(mdp.num_actions))
    return Transitions(obs, action, reward.astype(np.float64), next_obs, terminated.astype(bool), truncated, episode, about=about)


def maze_data(seed: int = 0, num_random: int = 99, num_optimal: int = 1, num_steps: int = 50) -> Transitions:
    """`num_random` uniform and `num_optimal` optimal episodes in the default maze, at most num_steps long."""
    mdp, rng = maze(), np.random.default_rng(seed)
    optimal, _ = mdp.policy_iteration()
    episodes = run(mdp, mdp.uniform_policy(), num_random, num_steps, rng, 10.0) + run(mdp, optimal, num_optimal, num_steps, rng, 10.0)
    return as_transitions(episodes, mdp, "maze", num_steps)


@dataclass(frozen=True, eq=False)
class EmpiricalMDP:
    """The MDP that counts of the data define; tabular offline methods are solved on it to their fixed point.

    counts     (S, A)  how often each pair occurs
    behaviour  (S, A)  the data's action frequencies, uniform in states that never occur
    covered    (S, A)  pairs that occur; all pairs of a state that never occurs (only ends do): they stay where they are and pay nothing
    """

    mdp: TabularMDP
    counts: np.ndarray

    @classmethod
    def from_data(cls, data: Transitions, num_states: int, num_actions: int, gamma: float = 0.95) -> EmpiricalMDP:
        """Counts of (s, a, s') and mean rewards; starts are the episodes' first states. Raises ValueError for observations that are no states."""
        obs, next_obs = data.obs, data.next_obs
        if isinstance(obs, dict) or isinstance(next_obs, dict) or obs.ndim != 1 or not np.issubdtype(obs.dtype, np.integer):
            raise ValueError(f"{data.about.name}: the empirical MDP needs integer states (N,) as observations")
        moved = np.zeros((num_states, num_actions, num_states))
        np.add.at(moved, (obs, data.action, next_obs), 1.0)
        paid = np.zeros((num_states, num_actions))
        np.add.at(paid, (obs, data.action), data.reward)
        counts = moved.sum(-1)
        n = np.maximum(counts, 1.0)
        P = np.where(counts[..., None] > 0, moved / n[..., None], np.eye(num_states)[:, None])
        rho = np.bincount(obs[data.bounds()[0]], minlength=num_states) / data.num_episodes
        return cls(TabularMDP(P, paid / n, gamma, rho), counts)

    @property
    def behaviour(self) -> np.ndarray:
        total = self.counts.sum(-1, keepdims=True)
        return np.where(total > 0, self.counts / np.maximum(total, 1.0), 1 / self.counts.shape[1])

    @property
    def covered(self) -> np.ndarray:
        return (self.counts > 0) | (self.counts.sum(-1, keepdims=True) == 0)

    def in_sample_optimum(self, tol: float = 1e-10) -> tuple[np.ndarray, np.ndarray]:
        """Policy (S, A) and values (S,): V = max over covered a of r + gamma E V: IQL's limit tau -> 1 [Kostrikov 2021; arXiv 2110.06169]."""
        return self.mdp.value_iteration(tol, allowed=self.covered)
