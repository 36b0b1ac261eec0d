"""Tabular Markov decision processes solved by linear algebra: values, occupancy, optima, policy gradient and Hessian.

Names, everywhere in this file:
    P       (S, A, S)  transition probabilities           policy  (S, A)  probabilities pi(a|s)
    R       (S, A)     expected reward                    logits  (S, A)  policy = softmax(logits)
    gamma   [0, 1)     discount                           rho     (S,)    start distribution
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp, softmax

from markovia.envs.exact.divergences import check_beta
from markovia.envs.machine import fits

_Rule = Callable[[np.ndarray], np.ndarray]  # of the action values (S, A)


def _distribution(values: np.ndarray, what: str) -> np.ndarray:
    if not (np.isfinite(values).all() and (values >= 0).all() and np.allclose(values.sum(-1), 1, atol=1e-8)):
        raise ValueError(f"{what} must hold probabilities: no negative entry, sums of 1 over the last axis")
    return values


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """A finite discounted MDP with exact solvers; J(pi) = E[sum_t gamma^t r_t] from s_0 ~ rho.

    Raises ValueError for shapes that do not fit, rows that are no distributions, or gamma outside [0, 1).
    """

    P: np.ndarray
    R: np.ndarray
    gamma: float
    rho: np.ndarray

    def __post_init__(self) -> None:
        P, R, rho = (np.asarray(x, dtype=np.float64) for x in (self.P, self.R, self.rho))
        if P.ndim != 3 or P.shape[0] != P.shape[2]:
            raise ValueError(f"P must have shape (S, A, S), got {P.shape}")
        if R.shape == P.shape:
            R = (P * R).sum(-1)  # a reward of (s, a, s') counts by its mean
        if R.shape != P.shape[:2] or rho.shape != P.shape[:1]:
            raise ValueError(f"P {P.shape} needs R {P.shape[:2]} and rho {P.shape[:1]}, got {R.shape} and {rho.shape}")
        if not np.isfinite(R).all():
            raise ValueError("R holds NaN or infinity; every reward must be finite")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), got {self.gamma}; the solvers need a discount")
        for name, value in (("P", _distribution(P, "P")), ("R", R), ("rho", _distribution(rho, "rho"))):
            object.__setattr__(self, name, value)

    @classmethod
    def random(cls, S: int, A: int, gamma: float = 0.9, seed: int = 0) -> TabularMDP:
        """Dirichlet(1) transitions and start, rewards uniform on [0, 1]. Raises OverMemory for tables that this machine can't hold."""
        fits(2 * 8 * S * A * S, f"a table of S={S} states and A={A} actions")  # its numbers, and those that they are scaled from
        rng = np.random.default_rng(seed)
        return cls(rng.dirichlet(np.ones(S), (S, A)), rng.random((S, A)), gamma, rng.dirichlet(np.ones(S)))

    @property
    def num_states(self) -> int:
        return self.P.shape[0]

    @property
    def num_actions(self) -> int:
        return self.P.shape[1]

    def uniform_policy(self) -> np.ndarray:
        """(S, A), every action equally likely."""
        return np.full(self.R.shape, 1 / self.num_actions)

    def _check(self, policy: np.ndarray) -> np.ndarray:
        policy = np.asarray(policy, dtype=np.float64)
        if policy.shape != self.R.shape:
            raise ValueError(f"policy must have shape (S, A) = {self.R.shape}, got {policy.shape}")
        return _distribution(policy, "policy (probabilities, not logits: apply softmax first)")

    def chain(self, policy: np.ndarray) -> np.ndarray:
        """(S, S): P_pi(s'|s) = sum_a pi(a|s) P(s'|s, a)."""
        return np.einsum("sa,sat->st", policy, self.P)

    def _resolvent(self, policy: np.ndarray) -> np.ndarray:
        """(I - gamma P_pi)^-1, shape (S, S): expected discounted visits from each state to each state."""
        return np.linalg.inv(np.eye(self.num_states) - self.gamma * self.chain(policy))

    def V(self, policy: np.ndarray) -> np.ndarray:
        """(S,): V = (I - gamma P_pi)^-1 r_pi."""
        policy = self._check(policy)
        return np.linalg.solve(np.eye(self.num_states) - self.gamma * self.chain(policy), (policy * self.R).sum(-1))

    def backup(self, values: np.ndarray) -> np.ndarray:
        """(S, A): R + gamma P V of any state values (S,)."""
        return self.R + self.gamma * self.P @ values

    def Q(self, policy: np.ndarray) -> np.ndarray:
        """(S, A): Q(s, a) = R(s, a) + gamma sum_s' P(s'|s, a) V(s')."""
        return self.backup(self.V(policy))

    def A(self, policy: np.ndarray) -> np.ndarray:
        """(S, A): advantage Q(s, a) - V(s)."""
        values = self.V(policy)
        return self.backup(values) - values[:, None]

    def occupancy(self, policy: np.ndarray) -> np.ndarray:
        """(S,): normalised discounted state occupancy d = (1 - gamma) rho (I - gamma P_pi)^-1, sums to 1."""
        return (1 - self.gamma) * self.rho @ self._resolvent(self._check(policy))

    def J(self, policy: np.ndarray) -> float:
        """Discounted return rho . V."""
        return float(self.rho @ self.V(policy))

    def greedy(self, q: np.ndarray) -> np.ndarray:
        """(S, A) deterministic policy on the first argmax of q (S, A)."""
        return np.eye(self.num_actions)[q.argmax(-1)]

    def policy_iteration(self) -> tuple[np.ndarray, np.ndarray]:
        """An optimal deterministic policy (S, A) and its values (S,), exact up to the linear solver."""
        policy = self.greedy(self.R)
        while True:
            values = self.V(policy)
            q = self.backup(values)
            # Only a real improvement moves an action: two equal ones would otherwise swap for ever.
            better = q.max(-1) > (policy * q).sum(-1) + 1e-12 * (1 + np.abs(values))
            if not better.any():
                return policy, values
            policy = np.where(better[:, None], self.greedy(q), policy)

    def value_iteration(self, tol: float = 1e-10, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Greedy policy (S, A) and values (S,) within tol of the optimum, by V <- max_a (R + gamma P V), over `allowed` (S, A) bool only.

        Raises ValueError for a state without an allowed action.
        """
        penalty = np.zeros_like(self.R)
        if allowed is not None:
            if allowed.shape != self.R.shape or not allowed.any(-1).all():
                raise ValueError(f"allowed must have shape (S, A) = {self.R.shape} with at least one action in every state")
            penalty[~allowed] = -np.inf
        return self._iterate(lambda q: (q + penalty).max(-1), lambda q: self.greedy(q + penalty), tol)

    def soft_value_iteration(self, beta: float, policy_ref: np.ndarray | None = None, tol: float = 1e-10) -> tuple[np.ndarray, np.ndarray]:
        """Optimum of E[sum_t gamma^t (r_t - beta KL(pi(.|s_t) || ref(.|s_t)))]: policy (S, A) and soft values (S,).

        V = beta log sum_a ref(a|s) e^(Q(s,a)/beta), pi = ref e^((Q - V)/beta).
        Without policy_ref the term is + beta entropy, as in soft actor-critic.
        """
        beta = check_beta(beta)
        with np.errstate(divide="ignore"):
            log_ref = np.zeros_like(self.R) if policy_ref is None else np.log(self._check(policy_ref))
        return self._iterate(lambda q: beta * logsumexp(log_ref + q / beta, axis=-1), lambda q: softmax(log_ref + q / beta, axis=-1), tol)

    def _iterate(self, state_value: _Rule, policy_of: _Rule, tol: float) -> tuple[np.ndarray, np.ndarray]:
        """Fixed point of the gamma-contraction V <- state_value(R + gamma P V), to within tol."""
        values = np.zeros(self.num_states)
        while True:
            new = state_value(self.backup(values))
            step, values = np.abs(new - values).max(), new
            # the second bound is rounding: below it the iteration cannot move
            if step * self.gamma <= max(tol * (1 - self.gamma), 1e-15 * np.abs(values).max()):
                return policy_of(self.backup(values)), values

    def policy_gradient(self, logits: np.ndarray) -> np.ndarray:
        """(S, A): dJ/dlogits(s, a) = d(s) pi(a|s) A(s, a) / (1 - gamma), softmax policy [Agarwal 2019, arXiv 1908.00261]."""
        policy = softmax(np.asarray(logits, dtype=np.float64), axis=-1)
        return self.occupancy(policy)[:, None] * policy * self.A(policy) / (1 - self.gamma)

    def policy_hessian(self, logits: np.ndarray) -> np.ndarray:
        """(S*A, S*A): second derivatives of J in the softmax logits (row-major over (s, a)), in closed form.

        Differentiating V = r_pi + gamma P_pi V twice, with visits m = rho (I - gamma P_pi)^-1 and g = pi A:
        H = C + C' + blockdiag_s m(s) [diag(g_s) - g_s pi_s' - pi_s g_s'],
        C[(s,a),(t,b)] = gamma m(s) pi(a|s) (P(.|s,a) - P_pi(.|s)) . (I - gamma P_pi)^-1[:, t] g(t,b).
        """
        policy = softmax(np.asarray(logits, dtype=np.float64), axis=-1)
        visits = self._resolvent(policy)
        m = self.rho @ visits
        g = policy * self.A(policy)
        moved = (m[:, None] * policy)[..., None] * (self.P - self.chain(policy)[:, None])  # (S, A, S)
        cross = self.gamma * np.einsum("sau,ut,tb->satb", moved, visits, g)
        n = self.R.size
        hessian = cross.reshape(n, n) + cross.reshape(n, n).T
        blocks = hessian.reshape(*self.R.shape, *self.R.shape)
        for s in range(self.num_states):
            outer = np.outer(g[s], policy[s])
            blocks[s, :, s, :] += m[s] * (np.diag(g[s]) - outer - outer.T)
        return hessian
