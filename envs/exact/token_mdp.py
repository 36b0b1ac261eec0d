"""The enumerable token-MDP TM(V, H): small enough to list every sequence, so that each expectation is a sum.

    V, H         vocabulary size, horizon in tokens; with `eos` a sequence may end earlier (EOS is its last token)
    M, N         number of complete sequences (<= 4096), number of prefixes at which a token is chosen
    logits       (N, V)  a policy: one row per prefix, breadth first (row 0 is the empty prefix); numpy or torch
    R            (M,)    reward of a complete sequence, paid with its last token; gamma = 1
    logp_ref     (M,)    log p0(y), nats; p0 = softmax(logits_ref) is the reference and the start of learning

E1 ... E9 name the facts that the methods of the language family are checked against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import logsumexp

from markovia.envs.exact import divergences as fdiv
from markovia.envs.exact.arrays import Array, exp, is_torch, like, log_softmax, to_numpy
from markovia.envs.exact.token_tree import TokenTree, tree_size

MAX_GROUPS = 2**18  # of expected_gradient: M^G tuples


class EnumerableTokenMDP(TokenTree):
    """A token-MDP with all its sequences, its optima in closed form, and exact expectations of any estimator.

    Raises ValueError for a size with more than 4096 sequences, tables of the wrong shape, or rewards that are not finite.
    """

    def __init__(self, V: int, H: int, logits_ref: np.ndarray, reward: np.ndarray, eos: int | None = None):
        super().__init__(V, H, eos)
        self.logits_ref = log_softmax(self._table(logits_ref, "logits_ref"))  # (N, V), normalised
        self.R = to_numpy(reward)
        if self.R.shape != (self.M,):
            raise ValueError(f"reward must have one entry per sequence, shape ({self.M},), got {self.R.shape}")
        if not np.isfinite(self.R).all():
            raise ValueError("reward holds NaN or infinity; every sequence needs a finite reward")
        self.logp_ref = self.sequence_logp(self.logits_ref)

    @classmethod
    def random(
        cls,
        V: int,
        H: int,
        seed: int = 0,
        reward: str = "uniform",
        success: float = 0.3,
        eos: int | None = None,
    ) -> EnumerableTokenMDP:
        """p0 = softmax of N(0, 1) logits; R uniform on [0, 1], or "binary": 1 with probability `success`, else 0."""
        N, M = tree_size(V, H, eos)
        rng = np.random.default_rng(seed)
        logits = rng.standard_normal((N, V))
        if reward not in ("uniform", "binary"):
            raise ValueError(f"reward must be 'uniform' or 'binary', got {reward!r}")
        if not 0 <= success <= 1:
            raise ValueError(f"success is a probability, got {success}")
        draws = rng.random(M)
        return cls(V, H, logits, draws if reward == "uniform" else (draws < success).astype(np.float64), eos)

    def sample(self, logits: Array, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n,): indices of n sequences drawn from the policy."""
        return rng.choice(self.M, size=n, p=_normalised(self.sequence_logp(self._table(logits))))

    # ---- expectations of a policy: numpy in, numpy out; torch in, torch out with gradient --------------------------

    def sequence_logp(self, logits: Array) -> Array:
        """(M,): log pi(y) = sum_t log pi(y_t | y_<t), nats."""
        logp = log_softmax(logits)
        taken = logp[like(self.prefix_index, logits), like(self.tokens, logits)]
        if is_torch(logits):
            return taken.masked_fill(~like(self.mask, logits), 0.0).sum(-1)
        return np.where(self.mask, taken, 0.0).sum(-1)

    def expected_reward(self, logits: Array) -> Array:
        """E_pi R, a scalar."""
        return (exp(self.sequence_logp(logits)) * like(self.R, logits)).sum()

    def divergence(self, logits: Array, divergence: str = "kl_pi_ref", alpha: float | None = None) -> Array:
        """D_f(pi || p0) between the laws of whole sequences, at the scale of the f-divergence table."""
        row = fdiv.f_divergence(divergence, alpha)
        return row(self.sequence_logp(logits), like(self.logp_ref, logits))

    def objective(self, logits: Array, beta: float, divergence: str = "kl_pi_ref", alpha: float | None = None) -> Array:
        """E_pi R - beta D_f(pi || p0), a scalar; beta = 0 is the plain expected reward."""
        value = self.expected_reward(logits)
        return value if beta == 0 else value - beta * self.divergence(logits, divergence, alpha)

    def exact_gradient(self, logits: Array, beta: float = 0.0, divergence: str = "kl_pi_ref", alpha: float | None = None) -> Array:
        """(N, V): gradient of `objective` in the logits, without autograd.

        dJ/dlogits(s, a) = sum_y pi(y) G(y) (1[y takes a at s] - pi(a|s) 1[y passes s]),  G = R - beta f'(pi / p0).
        """
        table = self._table(logits)
        logp = self.sequence_logp(table)
        weight = self.R
        if beta:
            weight = weight - beta * fdiv.f_divergence(divergence, alpha).df(np.exp(logp - self.logp_ref))
        taken = np.zeros_like(table)
        flow = (np.exp(logp) * weight)[:, None] * self.mask
        np.add.at(taken, (self.prefix_index, self.tokens), flow)
        return like(taken - np.exp(log_softmax(table)) * taken.sum(-1, keepdims=True), logits)

    def prefix_occupancy(self, logits: Array) -> np.ndarray:
        """(N,): probability that a sequence of the policy passes the prefix (the rows of one depth sum to 1 without EOS)."""
        probability = np.exp(self.sequence_logp(self._table(logits)))
        return np.bincount(self.prefix_index.ravel(), (probability[:, None] * self.mask).ravel(), minlength=self.num_prefixes)

    def values(self, logits: Array) -> tuple[np.ndarray, np.ndarray]:
        """Q (N, V) and V (N,) of the policy for the terminal reward alone; the advantage is Q - V[:, None]."""
        policy = np.exp(log_softmax(self._table(logits)))
        return self._backward(lambda i, q: (policy[i], policy[i] @ q))[1:]

    def _backward(
        self, rule: Callable[[int, np.ndarray], tuple[np.ndarray, float]], token_reward: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Backward induction: rule(prefix, q (V,)) -> (row of the policy's table, value); returns table, Q and V."""
        table, q = np.zeros((2, self.num_prefixes, self.V))
        values = np.zeros(self.num_prefixes)
        for i in reversed(range(self.num_prefixes)):
            ends = self.leaf[i] >= 0
            q[i] = np.where(ends, self.R[self.leaf[i]], values[self.child[i]])
            if token_reward is not None:
                q[i] += token_reward[i]
            table[i], values[i] = rule(i, q[i])
        return table, q, values

    def policy_of(self, probs: Array) -> np.ndarray:
        """(N, V) log-probabilities of the policy whose sequences have the law probs (M,); p0 at prefixes it never visits."""
        probs = to_numpy(probs)
        taken = np.zeros((self.num_prefixes, self.V))
        np.add.at(taken, (self.prefix_index, self.tokens), probs[:, None] * self.mask)
        mass = taken.sum(-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(mass > 0, np.log(taken / mass), self.logits_ref)

    # ---- optima -----------------------------------------------------------------------------------------------------

    def kl_optimum(self, beta: float) -> tuple[np.ndarray, float]:
        """log pi* (M,) = logp_ref + R / beta - log Z, and the optimal value beta log Z of E R - beta KL(pi || p0). (E1)"""
        beta = fdiv.check_beta(beta)
        tilted = self.logp_ref + self.R / beta
        log_z = float(logsumexp(tilted))
        return tilted - log_z, beta * log_z

    def token_optimum(self, beta: float, token_reward: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The same optimum token by token: log pi*(a|s) (N, V) and soft values (N,); token_reward (N, V) is added to R.

        V(s) = beta log sum_a p0(a|s) e^((r + V(sa)) / beta),  pi*(a|s) = p0(a|s) e^((r + V(sa) - V(s)) / beta).     (E2)
        """
        beta = fdiv.check_beta(beta)

        def rule(i: int, q: np.ndarray) -> tuple[np.ndarray, float]:
            tilted = self.logits_ref[i] + q / beta
            log_z = logsumexp(tilted)
            return tilted - log_z, beta * log_z

        table, _, values = self._backward(rule, token_reward)
        return table, values

    def gap(self, logits: Array, beta: float) -> Array:
        """Optimal value minus E R - beta KL(pi || p0); equals beta KL(pi || pi*) for every policy, so it is >= 0.    (E3)"""
        return self.kl_optimum(beta)[1] - self.objective(logits, beta)

    def kl_to_optimum(self, logits: Array, beta: float) -> Array:
        """KL(pi || pi*) in nats, pi* the KL optimum of E1; a scalar of the logits' library, differentiable."""
        logp = self.sequence_logp(logits)
        possible = logp > -math.inf  # a sequence of probability 0 contributes nothing, not 0 * -inf
        logp = logp[possible]
        return (exp(logp) * (logp - like(self.kl_optimum(beta)[0], logits)[possible])).sum()

    def f_optimum(self, beta: float, divergence: str, alpha: float | None = None) -> np.ndarray:
        """(M,): probabilities of the maximiser of E R - beta D_f(pi || p0) over laws of whole sequences.             (E4)"""
        return fdiv.f_optimum(self.logp_ref, self.R, beta, divergence, alpha)

    def token_f_optimum(self, beta: float, divergence: str, alpha: float | None = None) -> np.ndarray:
        """(N, V) log-probabilities of the maximiser of E_pi [R - beta sum_t D_f(pi(.|s_t) || p0(.|s_t))].

        For kl_pi_ref it is E1; for other f a penalty per token has another optimum than E4: the same condition is
        solved at each prefix by backward induction.
        """
        row = fdiv.f_divergence(divergence, alpha)

        def rule(i: int, q: np.ndarray) -> tuple[np.ndarray, float]:
            pi = fdiv.f_optimum(self.logits_ref[i], q, beta, row)
            with np.errstate(divide="ignore"):
                logp = np.log(pi)
            return logp, pi @ q - beta * row(logp, self.logits_ref[i])

        return self._backward(rule)[0]

    def best_of_n(self, n: int, logp: Array | None = None) -> np.ndarray:
        """(M,): exact law of the best of n independent sequences, ties broken at random; of p0 unless logp (M,) is given.

        With sequences sorted into classes k of equal reward, C_k the cumulative mass:
        pi_n(y) = p(y) (C_k^n - C_(k-1)^n) / (C_k - C_(k-1)).                                                         (E5)
        """
        return self._order_statistic(n, logp, self.R)

    def worst_of_n(self, n: int, logp: Array | None = None) -> np.ndarray:
        """(M,): exact law of the worst of n: `best_of_n` with C^n replaced by 1 - (1 - C)^n.                         (E5)"""
        return self._order_statistic(n, logp, -self.R)  # the worst under R is the best under -R

    def _order_statistic(self, n: int, logp: Array | None, score: np.ndarray) -> np.ndarray:
        _check_count(n)
        p = np.exp(self.logp_ref if logp is None else to_numpy(logp))
        _, rank = np.unique(score, return_inverse=True)
        mass = np.bincount(rank, p)
        below = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.where(mass > 0, ((below + mass) ** n - below**n) / mass, 0.0)
        return p * factor[rank]

    # ---- estimators, fixed points, dynamics --------------------------------------------------------------------------

    def expected_gradient(
        self,
        loss: Callable[[Any, Any], Any],
        logits: Array,
        group_size: int = 1,
        logits_behaviour: Array | None = None,
    ) -> Array:
        """(N, V): exact expectation of the gradient of any sampled loss, by enumerating every group of sequences.   (E6)

        loss(theta (N, V), index (K, G)) -> (K,): the loss of each of K groups, given as sequence indices; theta is a
        float64 torch tensor that requires a gradient. Groups are drawn from `logits_behaviour` (default: logits).
        Raises ValueError when there are more than 2^18 groups, or the loss is not one number per group.
        """
        import torch

        if group_size < 1 or self.M**group_size > MAX_GROUPS:
            raise ValueError(
                f"{self.M} sequences in groups of {group_size} cannot be enumerated: at least 1 and at most {MAX_GROUPS} "
                "groups; use a smaller V, H or group_size"
            )
        theta = torch.from_numpy(self._table(logits)).requires_grad_()
        behaviour = theta.detach() if logits_behaviour is None else torch.from_numpy(self._table(logits_behaviour))
        index = torch.cartesian_prod(*[torch.arange(self.M)] * group_size).reshape(-1, group_size)
        weight = self.sequence_logp(behaviour)[index].sum(-1).exp()
        per_group = loss(theta, index)
        if tuple(per_group.shape) != (len(index),):
            raise ValueError(f"loss must return one value per group, shape ({len(index)},), got {tuple(per_group.shape)}")
        (gradient,) = torch.autograd.grad((weight * per_group).sum(), theta)
        return gradient if is_torch(logits) else gradient.numpy()

    def fixed_point(self, beta: float, estimator: str, std: bool = False, group_size: int | None = None) -> np.ndarray:
        """(N, V) log-probabilities at which the expected gradient of a group-baseline method vanishes.             (E7)

        estimator  "k1" in the reward: the KL optimum E1 (whatever the group size)
                   "k2" as a loss: pi(a|s) ~ p0(a|s) e^(Q^pi(s,a) / beta'), where Q^pi holds no future KL
                   "k3" as a loss: pi(a|s) = beta' p0(a|s) / (beta' - A^pi(s,a))
        beta' = beta, or beta G / (G - 1) for groups of G that include the sample in their mean, or beta sigma(pi) when
        advantages are divided by the standard deviation of R under pi (G -> infinity), solved self-consistently.
        On a single step (H = 1) these are the fixed points of Dr.GRPO and GRPO. Raises ValueError where no such point
        exists: with std and k2, a small beta lets the policy collapse.
        """
        beta = fdiv.check_beta(beta)
        if estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"estimator must be 'k1' (in the reward), 'k2' or 'k3' (as a loss), got {estimator!r}")
        if std and (estimator == "k1" or group_size is not None):
            raise ValueError("std=True has a known fixed point only for k2 and k3 with infinite groups: drop group_size")
        if group_size is not None and group_size < 2:
            raise ValueError(f"a group baseline needs at least 2 samples, got group_size={group_size}")
        if estimator == "k1":
            return self.token_optimum(beta)[0]
        if not std:
            return self._loss_fixed_point(beta if group_size is None else beta * group_size / (group_size - 1), estimator)
        if np.ptp(self.R) == 0:
            return self.logits_ref  # no advantage anywhere

        def excess(sigma: float) -> float:
            return self._reward_std(self._loss_fixed_point(beta * sigma, estimator)) - sigma

        # sigma never exceeds half the range of R; of several roots the largest is the one next to p0
        grid = np.ptp(self.R) / 2 * np.geomspace(1.0, 1e-6, 40)
        below = next((i for i, sigma in enumerate(grid) if excess(sigma) > 0), None)
        if below is None:
            raise ValueError(
                f"with beta={beta} the penalty cannot hold the policy: dividing by the standard deviation collapses it on "
                "the best sequences, and no fixed point with spread exists; raise beta"
            )
        low, high = grid[below], grid[max(below - 1, 0)]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return self._loss_fixed_point(beta * low, estimator)

    def _loss_fixed_point(self, beta: float, estimator: str) -> np.ndarray:
        """Per prefix, the k2 condition is KL(pi || p0)'s optimum and the k3 condition KL(p0 || pi)'s, for Q^pi."""
        name = {"k2": "kl_pi_ref", "k3": "kl_ref_pi"}[estimator]

        def rule(i: int, q: np.ndarray) -> tuple[np.ndarray, float]:
            pi = fdiv.f_optimum(self.logits_ref[i], q, beta, name)
            with np.errstate(divide="ignore"):
                return np.log(pi), pi @ q

        return self._backward(rule)[0]

    def _reward_std(self, logits: np.ndarray) -> float:
        p = np.exp(self.sequence_logp(logits))
        return float(np.sqrt(p @ (self.R - p @ self.R) ** 2))

    def repeated_tilting(self, beta: float, rounds: int, rate: float = 1.0) -> np.ndarray:
        """log pi (M,) after `rounds` exact KL solves, the reference moving by `rate` in log-space after each.      (E8)

        pi_k = ref_k e^(R/beta) / Z,  log ref_(k+1) = (1 - rate) log ref_k + rate log pi_k + const:
        p0 e^(c R) with c = (1 + (rounds - 1) rate) / beta; rate 1 (hard reset) gives p0 e^(rounds R / beta).
        """
        beta = fdiv.check_beta(beta)
        if rounds < 0 or not 0 <= rate <= 1:
            raise ValueError(f"rounds must be >= 0 and rate in [0, 1], got rounds={rounds}, rate={rate}")
        strength = (1 + (rounds - 1) * rate) / beta if rounds else 0.0
        tilted = self.logp_ref + strength * self.R
        return tilted - logsumexp(tilted)

    def entropy(self, logits: Array) -> Array:
        """(N,): entropy of the next token at each prefix, nats."""
        logp = log_softmax(logits)
        return -(exp(logp) * logp).sum(-1)

    def entropy_derivative(self, logits: Array, dlogits: Array) -> Array:
        """(N,): change of `entropy` for a small change of the logits (N, V), dH(s) = -Cov_{a~pi}(log pi(a|s), dz_a). (E9)"""
        logp = log_softmax(logits)
        p = exp(logp)
        return -(p * logp * (dlogits - (p * dlogits).sum(-1)[:, None])).sum(-1)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n, nats: an upper bound of KL(best-of-n || p0), tight as the atoms of p0 shrink.            (E5)"""
    _check_count(n)
    return math.log(n) - (n - 1) / n


def binary_fixed_point(success: float, beta: float, estimator: str) -> float:
    """Success probability at the fixed point for a reward in {0, 1} and one step, no std; success = that of p0.     (E7)

    k3: p = ((1 - beta) + sqrt((1 - beta)^2 + 4 beta q)) / 2;  k1, k2: p = q e^(1/beta) / (q e^(1/beta) + 1 - q).
    """
    beta = fdiv.check_beta(beta)
    if estimator == "k3":
        return ((1 - beta) + math.sqrt((1 - beta) ** 2 + 4 * beta * success)) / 2
    if estimator in ("k1", "k2"):
        return success / (success + (1 - success) * math.exp(-1 / beta))
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")


def _check_count(n: int) -> None:
    if int(n) != n or n < 1:
        raise ValueError(f"n counts samples: it must be an integer >= 1, got {n!r}")


def _normalised(logp: np.ndarray) -> np.ndarray:
    p = np.exp(logp)
    return p / p.sum()
