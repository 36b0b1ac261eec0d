"""Constrained tabular MDPs solved by the linear program over occupancies, with the constraints' prices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from markovia.envs.exact.tabular import TabularMDP
from markovia.envs.machine import fits


@dataclass(frozen=True)
class CMDPSolution:
    """An optimum of the CMDP."""

    policy: np.ndarray  # (S, A), probabilities; states that are never reached are uniform
    value: float  # J of the policy
    costs: np.ndarray  # (m,), discounted costs of the policy
    multipliers: np.ndarray  # (m,), >= 0: dJ*/d budget, 0 where the budget does not bind
    occupancy: np.ndarray  # (S, A), expected discounted visits, sums to 1 / (1 - gamma)


@dataclass(frozen=True, eq=False)
class CMDP:
    """max J(pi) subject to J_c^k(pi) <= budgets[k], k = 1..m, in a TabularMDP.

    Discounted, unnormalised costs: J_c = E[sum_t gamma^t c(s_t, a_t)]; C: (m, S, A), or (S, A) for one constraint.
    Raises ValueError for shapes that do not fit and values that are not finite.
    """

    mdp: TabularMDP
    C: np.ndarray
    budgets: np.ndarray

    def __post_init__(self) -> None:
        C = np.asarray(self.C, dtype=np.float64)
        C = C[None] if C.ndim == 2 else C
        budgets = np.atleast_1d(np.asarray(self.budgets, dtype=np.float64))
        if C.ndim != 3 or C.shape[1:] != self.mdp.R.shape or budgets.shape != C.shape[:1]:
            raise ValueError(f"C must have shape (m, S, A) with (S, A) = {self.mdp.R.shape}, and budgets (m,); got {C.shape} and {budgets.shape}")
        if not (np.isfinite(C).all() and np.isfinite(budgets).all()):
            raise ValueError("C or budgets hold NaN or infinity; leave a constraint without a limit out")
        object.__setattr__(self, "C", C)
        object.__setattr__(self, "budgets", budgets)

    @classmethod
    def random(cls, S: int, A: int, gamma: float = 0.9, seed: int = 0, tightness: float = 0.5) -> CMDP:
        """A random MDP and one cost uniform on [0, 1]; the budget lies `tightness` of the way from the cost of the
        unconstrained optimum (0: free) down to the least reachable cost (1: only the safest policies).

        Raises OverMemory for tables that this machine can't hold.
        """
        if not 0 <= tightness <= 1:
            raise ValueError(f"tightness must lie in [0, 1], got {tightness}")
        fits(8 * (2 * S * A * S + A * A), f"a problem of S={S} states and A={A} actions")  # policy iteration compares all actions
        mdp = TabularMDP.random(S, A, gamma, seed)
        cost = replace(mdp, R=np.random.default_rng([seed, 1]).random((S, A)))
        free = cost.J(mdp.policy_iteration()[0])
        least = replace(cost, R=-cost.R).policy_iteration()[1] @ mdp.rho * -1
        return cls(mdp, cost.R, np.array([free + tightness * (least - free)]))

    def costs(self, policy: np.ndarray) -> np.ndarray:
        """(m,): discounted costs J_c^k of a policy (S, A)."""
        return np.array([replace(self.mdp, R=c).J(policy) for c in self.C])

    def lagrangian(self, multipliers: np.ndarray) -> TabularMDP:
        """The MDP with reward R - sum_k lam_k C_k; the dual function at lam is its optimal value + lam . budgets."""
        return replace(self.mdp, R=self.mdp.R - np.tensordot(np.atleast_1d(multipliers), self.C, axes=1))

    def solve(self) -> CMDPSolution:
        """Exact optimum by the occupancy LP [Altman 1999, ch. 3], with HiGHS.

        max_x sum x R  s.t.  sum_a x(s,a) = rho(s) + gamma sum P(s|s',a') x(s',a'),  sum x C_k <= budgets[k],  x >= 0;
        policy = x / sum_a x. The multipliers are the duals of the cost rows: the derivative of J* in each budget.
        Raises ValueError when no policy meets the budgets, with the least cost that each constraint can reach.
        """
        from scipy.optimize import linprog  # heavy, and needed by few

        mdp = self.mdp
        S, A = mdp.R.shape
        flow = np.repeat(np.eye(S), A, axis=1) - mdp.gamma * mdp.P.reshape(S * A, S).T
        result = linprog(-mdp.R.ravel(), A_ub=self.C.reshape(-1, S * A), b_ub=self.budgets, A_eq=flow, b_eq=mdp.rho, method="highs")
        if result.status == 2:
            least = [-float(mdp.rho @ replace(mdp, R=-c).policy_iteration()[1]) for c in self.C]
            raise ValueError(
                f"no policy meets the budgets {self.budgets.tolist()}: taken alone, the least reachable discounted "
                f"costs are {[round(x, 6) for x in least]}; raise the budgets above them (jointly if there are several)"
            )
        if not result.success:
            raise RuntimeError(f"HiGHS could not solve the occupancy LP: {result.message}")
        x = result.x.reshape(S, A).clip(min=0)
        mass = x.sum(-1, keepdims=True)
        policy = np.where(mass > 1e-12, x / np.maximum(mass, 1e-12), 1 / A)
        policy /= policy.sum(-1, keepdims=True)
        return CMDPSolution(policy, mdp.J(policy), self.costs(policy), np.abs(result.ineqlin.marginals), x)
