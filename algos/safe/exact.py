"""The constrained methods on tabular problems with exact gradients, so that the linear program's optimum and multiplier can judge them.

Policies are softmax tables: logits (S, A). numpy, float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import softmax

from markovia.algos.safe.dual import Dual, gradient, optimistic
from markovia.algos.safe.trust_region import acceptable, trust_region_dual
from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.tabular import TabularMDP


@dataclass(frozen=True)
class Trace:
    """What every iterate was worth, and the last policy."""

    value: np.ndarray  # (K,) J
    cost: np.ndarray  # (K, m) J_c
    weight: np.ndarray  # (K, m) multipliers in use
    policy: np.ndarray  # (S, A)
    cases: tuple[str, ...] = ()  # CPO: how each step was found


def action_values(problem: CMDP, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q of the reward (S, A) and of every cost (m, S, A)."""
    return problem.mdp.Q(policy), np.stack([replace(problem.mdp, R=c).Q(policy) for c in problem.C])


def primal_dual(
    problem: CMDP,
    dual: Dual,
    *,
    step: float = 1.0,
    iterations: int = 2000,
    optimistic_policy: bool = False,
    simultaneous: bool = False,
    logits: np.ndarray | None = None,
) -> Trace:
    """Mirror ascent of the policy against a multiplier, both exact.

    q_k = Q_r - sum_i w_i Q_i at pi_k,   pi_{k+1} ~ pi_k exp(step q_k);   optimistic: step (2 q_k - q_{k-1}), plain at the first iteration
    The multiplier is updated first and its new weight used, as the deep methods do; simultaneous: q_k is mixed with the weight before its update.
    """
    table = np.zeros(problem.mdp.R.shape) if logits is None else np.array(logits, dtype=np.float64)
    state, weight, before = dual.start(len(problem.budgets)), np.zeros(len(problem.budgets)), None
    values, costs, weights = [], [], []
    for _ in range(iterations):
        policy = softmax(table, axis=-1)
        q_r, q_c = action_values(problem, policy)
        cost = np.array([problem.mdp.rho @ (policy * q).sum(-1) for q in q_c])
        last = weight
        state, weight = dual.update(state, cost, problem.budgets)
        q = q_r - np.tensordot(last if simultaneous else weight, q_c, axes=1)
        table = table + step * (2 * q - before if optimistic_policy and before is not None else q)
        table -= table.max(-1, keepdims=True)
        before = q
        values.append(problem.mdp.rho @ (policy * q_r).sum(-1))
        costs.append(cost)
        weights.append(weight)
    return Trace(np.array(values), np.array(costs), np.array(weights), softmax(table, axis=-1))


def descent_ascent(problem: CMDP, *, step: float = 1.0, dual_step: float = 0.1, iterations: int = 4000) -> Trace:
    """Plain simultaneous gradient descent-ascent: its average converges, its iterates cycle."""
    return primal_dual(problem, gradient(dual_step, init=0.0, optimizer="sgd"), step=step, iterations=iterations, simultaneous=True)


def reload(problem: CMDP, *, step: float = 1.0, dual_step: float = 0.1, iterations: int = 4000) -> Trace:
    """ReLOAD: both players optimistic, so that the last iterate converges. Relied on: abstract and optimistic mirror descent.  [arXiv 2302.01275]

    pi_{k+1} ~ pi_k exp(step (2 q_k - q_{k-1})),   y_k = [y_{k-1} + dual_step e_k]_+,  w_{k+1} = [y_k + dual_step e_k]_+,  e = cost - limit
    Steps bound stability: on `cmdp_two_state` it converges for step * dual_step <= 0.02 and cycles from 0.03 on.
    """
    return primal_dual(problem, optimistic(dual_step), step=step, iterations=iterations, optimistic_policy=True, simultaneous=True)


def fisher(policy: np.ndarray, occupancy: np.ndarray, damping: float) -> np.ndarray:
    """(S*A, S*A) Hessian of the mean KL in the logits, blocks d(s) (diag pi - pi pi'), plus damping I."""
    S, A = policy.shape
    out = damping * np.eye(S * A)
    for s in range(S):
        block = slice(s * A, (s + 1) * A)
        out[block, block] += occupancy[s] * (np.diag(policy[s]) - np.outer(policy[s], policy[s]))
    return out


def mean_kl(policy: np.ndarray, new: np.ndarray, occupancy: np.ndarray) -> float:
    """sum_s d(s) KL(pi(.|s) || new(.|s)), nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(policy > 0, policy * (np.log(policy) - np.log(new)), 0.0)
    return float(occupancy @ terms.sum(-1))


def constrained_policy_optimisation(
    problem: CMDP,
    *,
    delta: float = 0.01,
    iterations: int = 300,
    tolerance: float = 1e-3,
    damping: float = 1e-4,
    max_backtracks: int = 15,
    logits: np.ndarray | None = None,
) -> Trace:
    """CPO with exact advantages for one constraint.                                                    [Achiam 2017; arXiv 1705.10528]

    Surrogates sum_s d(s) sum_a pi(a|s) A(s, a) with the normalised occupancy d of the current policy; the violation enters in their unit,
    (J_c - limit) (1 - gamma). Raises ValueError for several constraints, for which the closed form does not hold.
    """
    if len(problem.budgets) != 1:
        raise ValueError(f"CPO's closed form serves one constraint, the problem has {len(problem.budgets)}; use primal_dual")
    mdp, limit = problem.mdp, problem.budgets[0]
    table = np.zeros(mdp.R.shape) if logits is None else np.array(logits, dtype=np.float64)
    values, costs, weights, cases = [], [], [], []
    for _ in range(iterations):
        policy = softmax(table, axis=-1)
        q_r, (q_c,) = action_values(problem, policy)
        adv, cost_adv = (q - (policy * q).sum(-1, keepdims=True) for q in (q_r, q_c))
        cost = float(mdp.rho @ (policy * q_c).sum(-1))
        d = mdp.occupancy(policy)
        g, b = ((d[:, None] * policy * a).ravel() for a in (adv, cost_adv))
        x, p = np.linalg.solve(fisher(policy, d, damping), np.stack([g, b], 1)).T
        c = (cost - limit) * (1 - mdp.gamma)
        found = trust_region_dual(float(g @ x), float(g @ p), float(b @ p), c, delta=delta)
        direction = (found.along_x * x + found.along_p * p).reshape(table.shape)
        for j in range(max_backtracks):
            new = softmax(table + 0.8**j * direction, axis=-1)
            gain, rise = (float(d @ ((new - policy) * a).sum(-1)) for a in (adv, cost_adv))
            if acceptable(mean_kl(policy, new, d), gain, rise, c, delta=delta, tolerance=tolerance):
                table = table + 0.8**j * direction
                table -= table.max(-1, keepdims=True)
                break
        values.append(float(mdp.rho @ (policy * q_r).sum(-1)))
        costs.append([cost])
        weights.append([found.nu])
        cases.append(found.case)
    return Trace(np.array(values), np.array(costs), np.array(weights), softmax(table, axis=-1), tuple(cases))


def terminating(problem: CMDP, unsafe: np.ndarray, probability: float) -> TabularMDP:
    """The MDP in which entering a state of `unsafe` (S,) bool ends the episode with `probability`; one absorbing state more.

    That is what constraints as terminations optimise: reward and future count with 1 - delta.                 [arXiv 2403.18765]
    Rewards here belong to (s, a), so they are paid whether or not the step ends the episode; zero on steps into unsafe states it is the same.
    """
    mdp = problem.mdp
    S, A = mdp.R.shape
    P = np.zeros((S + 1, A, S + 1))
    P[:S, :, :S] = mdp.P * (1.0 - probability * np.asarray(unsafe, dtype=np.float64))
    P[:S, :, S] = 1.0 - P[:S, :, :S].sum(-1)
    P[S, :, S] = 1.0
    return TabularMDP(P, np.vstack([mdp.R, np.zeros((1, A))]), mdp.gamma, np.append(mdp.rho, 0.0))
