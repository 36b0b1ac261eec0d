"""Exploration that keeps a floor in every episode, in finite-horizon tabular MDPs: StepMix, EpsMix, and UCBVI without a floor.

Everything has leading batch dimensions ... (independent runs, and candidate policies), so that a hundred runs are one set of array operations.
    P       (..., S, A, S)  transition probabilities          policy  (..., H, S, A)  probabilities per step
    reward  (..., S, A)     known, in [0, 1]                  V       (..., H+1, S)   value from step h on, V_H = 0
    counts  (..., S, A, S)  observed transitions, of all steps together (the transitions don't depend on the step)

Relied on: the abstract of arXiv 2306.06265 and the algorithms' structure as recalled; that the floor is kept follows here from the value of a
mixture in one step, or of a coin per episode, being linear in its weight. The baseline is given; its value is bounded from the counts like any
other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Rule = Literal["step-mixture", "episode-mixture", "none"]


def evaluate(P: np.ndarray, reward: np.ndarray, policy: np.ndarray, bonus: np.ndarray | None = None) -> np.ndarray:
    """(..., H+1, S): V_h = sum_a pi_h [r + P V_{h+1}], and with a bonus (..., H, S, A) the pessimistic [r + P V_{h+1} - bonus]_+ in its place."""
    H = policy.shape[-3]
    V = [np.zeros(np.broadcast_shapes(policy.shape[:-3], P.shape[:-3]) + policy.shape[-2:-1])]
    for h in reversed(range(H)):
        q = reward + (P @ V[0][..., None, :, None])[..., 0]
        if bonus is not None:
            q = np.maximum(q - bonus[..., h, :, :], 0.0)
        V.insert(0, (policy[..., h, :, :] * q).sum(-1))
    return np.stack(V, axis=-2)


def optimal(
    P: np.ndarray, reward: np.ndarray, horizon: int, log_term: float = 0.0, counts: np.ndarray | None = None, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Greedy policy (..., H, S, A), its V (..., H+1, S) and bonus (..., H, S, A); with counts n(s, a) (..., S, A) the optimistic one.

    Q_h = min(H - h, r + P V_{h+1} + b_h),  b_h = scale (3 sqrt(Var_P(V_{h+1}) L / n) + 14 H L / n)        [Bernstein bonus of UCBVI]
    The constants, and the theory's further term P (V_upper - V_lower) / H, are those of best-policy identification as recalled; scale < 1 is what
    makes the sizes of a test reachable. Without counts the bonus is 0.
    """
    shape = np.broadcast_shapes(P.shape[:-1], reward.shape)
    V: list[np.ndarray] = [np.zeros(shape[:-1])]
    policies: list[np.ndarray] = []
    bonuses: list[np.ndarray] = []
    n = None if counts is None else np.maximum(counts, 1.0)
    for h in reversed(range(horizon)):
        after = V[0][..., None, :, None]
        mean = (P @ after)[..., 0]
        bonus = np.zeros(shape)
        if n is not None:
            variance = np.maximum((P @ after**2)[..., 0] - mean**2, 0.0)
            bonus = scale * (3.0 * np.sqrt(variance * log_term / n) + 14.0 * horizon * log_term / n)
        q = np.minimum(reward + mean + bonus, horizon - h)
        policies.insert(0, np.eye(shape[-1])[q.argmax(-1)])
        bonuses.insert(0, bonus)
        V.insert(0, q.max(-1))
    return np.stack(policies, -3), np.stack(V, -2), np.stack(bonuses, -3)


def empirical(counts: np.ndarray) -> np.ndarray:
    """(..., S, A, S) relative frequencies; uniform where a pair was never seen."""
    n = counts.sum(-1, keepdims=True)
    return np.where(n > 0, counts / np.maximum(n, 1.0), 1.0 / counts.shape[-1])


def step_mixture(lower: np.ndarray, baseline: np.ndarray, greedy: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """StepMix's policy (R, H, S, A) from the lower bounds (R, H+1) of the candidates "baseline for the first j steps, then greedy", j = 0..H.

    The least j whose bound reaches the floor; j = 0: greedy. Else the mixture of candidates j and j - 1, which differ in step j - 1 only, with
    weight rho = (L_j - floor) / (L_j - L_{j-1}) on the latter: its bound is the floor. None reaches it: the baseline.  [arXiv 2306.06265]
    """
    H = baseline.shape[-3]
    reaches = lower >= floor[:, None]
    j = np.where(reaches.any(1), reaches.argmax(1), H)
    rows = np.arange(len(lower))
    before = lower[rows, np.maximum(j - 1, 0)]
    gap = lower[rows, j] - before
    rho = np.where(reaches.any(1) & (j > 0), (lower[rows, j] - floor) / np.where(gap > 0, gap, 1.0), 0.0)
    step = np.arange(H)
    share = np.where(step[None] < j[:, None] - 1, 0.0, 1.0)  # of the greedy policy at each step
    share = np.where(step[None] == j[:, None] - 1, rho[:, None], share)[..., None, None]
    return (1.0 - share) * baseline + share * greedy


def episode_mixture(lower_greedy: np.ndarray, lower_baseline: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """EpsMix's probability (R,) of playing the greedy policy in an episode.

    1 if L_greedy >= floor, else (L_b - floor) / (L_b - L_greedy) if L_b >= floor, else 0                          [arXiv 2306.06265]
    """
    gap = lower_baseline - lower_greedy
    mixed = np.where(lower_baseline >= floor, (lower_baseline - floor) / np.where(gap > 0, gap, 1.0), 0.0)
    return np.where(lower_greedy >= floor, 1.0, mixed)


def from_transitions(
    step: np.ndarray, state: np.ndarray, action: np.ndarray, next_state: np.ndarray, num_states: int, num_actions: int, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """Offline start: counts (S, A, S) and the empirical behaviour policy (H, S, A), uniform where the data has no visit; inputs (n,) int."""
    counts = np.zeros((num_states, num_actions, num_states))
    np.add.at(counts, (state, action, next_state), 1.0)
    taken = np.zeros((horizon, num_states, num_actions))
    np.add.at(taken, (step, state, action), 1.0)
    visits = taken.sum(-1, keepdims=True)
    return counts, np.where(visits > 0, taken / np.maximum(visits, 1.0), 1.0 / num_actions)


@dataclass(frozen=True)
class History:
    """Exact worth of what was played, and what was known at the end."""

    value: np.ndarray  # (K, R) value of the policy (or the mixture of policies) of each episode
    baseline_only: np.ndarray  # (K, R) bool: nothing but the baseline was safe enough
    counts: np.ndarray  # (R, S, A, S)


def explore(
    P: np.ndarray,
    reward: np.ndarray,
    start: np.ndarray,
    baseline: np.ndarray,
    floor: np.ndarray,
    *,
    rule: Rule = "step-mixture",
    episodes: int = 4000,
    bonus_scale: float = 0.03,
    confidence: float = 0.1,
    counts: np.ndarray | None = None,
    seed: int = 0,
) -> History:
    """`episodes` of R independent runs: bounds from the counts, a policy by `rule`, an episode, its transitions counted.

    P (R, S, A, S) true transitions, which only sample and score; start (R, S); baseline (R, H, S, A); floor (R,). `counts` (R, S, A, S) begin from
    a data set. L = log(S A H episodes / confidence). Raises ValueError for another rule and where the baseline itself lies under the floor.
    """
    if rule not in ("step-mixture", "episode-mixture", "none"):
        raise ValueError(f"rule must be 'step-mixture', 'episode-mixture' or 'none', got {rule!r}")
    R, S, A, _ = P.shape
    H = baseline.shape[-3]
    worth = np.einsum("rs,rs->r", start, evaluate(P, reward, baseline)[:, 0])
    if rule != "none" and (worth < floor).any():
        worst = int((worth - floor).argmin())
        raise ValueError(f"the baseline of run {worst} is worth {worth[worst]:.4g}, less than its floor {floor[worst]:.4g}; lower the floor")
    rng = np.random.default_rng(seed)
    seen = np.zeros(P.shape) if counts is None else np.array(counts, dtype=np.float64)
    log_term = float(np.log(S * A * H * episodes / confidence))
    prefix = (np.arange(H)[None] < np.arange(H + 1)[:, None])[..., None, None]  # (H+1, H, 1, 1): candidate j follows the baseline there
    values, fallback = [], []
    rows = np.arange(R)
    for _ in range(episodes):
        model = empirical(seen)
        greedy, _, bonus = optimal(model, reward, H, log_term, seen.sum(-1), bonus_scale)
        played, coin = greedy, np.ones(R)
        if rule != "none":
            candidates = np.where(prefix, baseline[:, None], greedy[:, None])
            chosen = candidates if rule == "step-mixture" else candidates[:, [0, H]]
            lower = np.einsum("rs,rjs->rj", start, evaluate(model[:, None], reward[:, None], chosen, bonus[:, None])[..., 0, :])
            if rule == "step-mixture":
                played = step_mixture(lower, baseline, greedy, floor)
            else:
                coin = episode_mixture(lower[:, 0], lower[:, 1], floor)
        value = np.einsum("rs,rs->r", start, evaluate(P, reward, played)[:, 0])
        values.append(coin * value + (1.0 - coin) * worth)
        fallback.append(coin == 0 if rule == "episode-mixture" else (played == baseline).all((1, 2, 3)))
        heads = rng.random(R) < coin
        played = np.where(heads[:, None, None, None], played, baseline)
        state = _draw(rng, start)
        for h in range(H):
            action = _draw(rng, played[rows, h, state])
            after = _draw(rng, P[rows, state, action])
            seen[rows, state, action, after] += 1.0
            state = after
    return History(np.array(values), np.array(fallback), seen)


def _draw(rng: np.random.Generator, probabilities: np.ndarray) -> np.ndarray:
    """One index per row of (R, n) probabilities."""
    cumulative = probabilities.cumsum(-1)
    return np.minimum((rng.random((len(cumulative), 1)) * cumulative[:, -1:] >= cumulative).sum(-1), probabilities.shape[-1] - 1)
