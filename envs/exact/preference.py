"""Preference problems whose optimum is known: a bandit with rewards, a game without, and a family in which chosen mass is displaced.

    logp_ref  (X, Y)  log-probabilities of the reference, X prompts, Y responses each, nats
    reward    (X, Y)  P(y > y') = s(r(y) - r(y')) in the bandit, s the logistic function
    P         (Y, Y)  P(y > y') of the game, P + P' = 1
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, lambertw, log_softmax, logsumexp

from markovia.envs.exact.divergences import FDivergence, check_beta, f_optimum


class PreferenceBandit:
    """Prompts with a finite set of responses, Bradley-Terry labels, and every regularised optimum in closed form.

    Raises ValueError for tables of different shapes.
    """

    def __init__(self, logits_ref: np.ndarray, reward: np.ndarray):
        self.reward = np.asarray(reward, dtype=np.float64)
        self.logp_ref = log_softmax(np.asarray(logits_ref, dtype=np.float64), axis=-1)
        if self.logp_ref.ndim != 2 or self.reward.shape != self.logp_ref.shape:
            raise ValueError(f"logits_ref and reward must both be (prompts, responses), got {self.logp_ref.shape} and {self.reward.shape}")
        self.X, self.Y = self.reward.shape

    @classmethod
    def random(cls, prompts: int = 4, responses: int = 8, seed: int = 0, scale: float = 1.0) -> PreferenceBandit:
        """Reference logits N(0, 1), rewards scale x N(0, 1)."""
        rng = np.random.default_rng(seed)
        return cls(rng.standard_normal((prompts, responses)), scale * rng.standard_normal((prompts, responses)))

    def pairs(self, covered: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All ordered pairs (P, 2) of rows x * Y + y of one prompt, and the probability (P,) that the first is preferred.

        With `covered` only the first so many responses of each prompt are compared; ValueError unless it lies in 2..Y.
        """
        n = self.Y if covered is None else covered
        if not 2 <= n <= self.Y:
            raise ValueError(f"covered must lie in 2..{self.Y}, the number of responses, got {n}")
        first, second = np.nonzero(~np.eye(n, dtype=bool))
        rows = np.arange(self.X)[:, None] * self.Y
        index = np.stack([(rows + first).ravel(), (rows + second).ravel()], axis=1)
        r = self.reward.ravel()
        return index, expit(r[index[:, 0]] - r[index[:, 1]])

    def sample_pairs(self, n: int, rng: np.random.Generator, flip: float = 0.0) -> np.ndarray:
        """(n, 2) rows, chosen first: prompt uniform, two different responses of the reference, a Bradley-Terry label turned with rate `flip`."""
        x = rng.integers(self.X, size=n)
        p = np.exp(self.logp_ref)[x]
        first = np.array([rng.choice(self.Y, p=row) for row in p])
        p[np.arange(n), first] = 0.0
        second = np.array([rng.choice(self.Y, p=row / row.sum()) for row in p])
        wins = rng.random(n) < expit(self.reward[x, first] - self.reward[x, second])
        wins ^= rng.random(n) < flip
        return x[:, None] * self.Y + np.where(wins[:, None], np.stack([first, second], 1), np.stack([second, first], 1))

    def kl_optimum(self, beta: float) -> np.ndarray:
        """log pi* (X, Y) = log ref + r / beta - log Z."""
        return log_softmax(self.logp_ref + self.reward / check_beta(beta), axis=-1)

    def optimal_value(self, beta: float) -> np.ndarray:
        """V*(x) (X,) = beta log E_ref e^(r / beta)."""
        return check_beta(beta) * logsumexp(self.logp_ref + self.reward / beta, axis=-1)

    def f_optimum(self, beta: float, divergence: str | FDivergence, alpha: float | None = None) -> np.ndarray:
        """(X, Y) probabilities of the maximiser of E r - beta D_f(pi || ref)."""
        return np.stack([f_optimum(p, r, beta, divergence, alpha) for p, r in zip(self.logp_ref, self.reward, strict=True)])

    def squared_log_optimum(self, beta: float) -> np.ndarray:
        """(X, Y) probabilities of the stationary point for f(u) = (log u)^2 / 2 on the branch u < e, on which f' = log u / u rises.

        Raises ValueError for prompts that have none there: u <= e caps the best response, so beta must be large enough.
        """
        return np.stack([self._squared_log(p, r, check_beta(beta)) for p, r in zip(self.logp_ref, self.reward, strict=True)])

    @staticmethod
    def _squared_log(logp_ref: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
        most = (np.exp(logp_ref) * SQUARED_LOG.df_inverse((reward - reward.max()) / beta + SQUARED_LOG.s_upper)).sum()
        if most < 1.0:
            raise ValueError(f"with beta={beta} no stationary point has every pi / ref below e (the masses sum to {most:.3g} at most); raise beta")
        return f_optimum(logp_ref, reward, beta, SQUARED_LOG)

    def expected_reward(self, pi: np.ndarray) -> float:
        """E_x E_pi r, pi (X, Y) probabilities."""
        return float((pi * self.reward).sum(-1).mean())


def _squared_log_inverse(s: np.ndarray) -> np.ndarray:
    """u with log u / u = s on the branch u <= e: l e^-l = s, so l = -W0(-s); at the branch point itself scipy has no value."""
    return np.exp(-lambertw(-np.minimum(s, (1.0 - 1e-14) / np.e)).real)


SQUARED_LOG = FDivergence(
    "squared_log",
    lambda u: np.log(u) ** 2 / 2,
    lambda u: np.log(u) / u,
    _squared_log_inverse,
    lambda u: (1 - np.log(u)) / u**2,
    1.0 / np.e,
)


class PreferenceGame:
    """A symmetric two-player game on K responses, given by P(y > y') and a reference policy.

    Raises ValueError unless P is square with P + P' = 1 and logits_ref has one entry per response.
    """

    def __init__(self, P: np.ndarray, logits_ref: np.ndarray):
        self.P = np.asarray(P, dtype=np.float64)
        self.logp_ref = log_softmax(np.asarray(logits_ref, dtype=np.float64))
        self.K = len(self.P)
        if self.P.shape != (self.K, self.K) or not np.allclose(self.P + self.P.T, 1.0):
            raise ValueError(f"P must be square with P(y > y') + P(y' > y) = 1 for every pair, got shape {self.P.shape}")
        if self.logp_ref.shape != (self.K,):
            raise ValueError(f"logits_ref must have one entry per response, shape ({self.K},), got {self.logp_ref.shape}")

    @classmethod
    def random(cls, K: int = 4, seed: int = 0, cycle: float = 0.3, deficit: float = 0.1, noise: float = 0.05) -> PreferenceGame:
        """Responses 0, 1, 2 beat each other in a cycle, all others lose to those three by `deficit`, and normal noise is added.

        Without the deficit another response is the pure equilibrium in about one seed of five, and nothing cycles.
        """
        if K < 3:
            raise ValueError(f"a cycle needs three responses, got K={K}")
        rng = np.random.default_rng(seed)
        A = np.zeros((K, K))
        A[:3, 3:] = deficit
        for y in range(3):
            A[y, (y + 1) % 3] = cycle
        upper = np.triu(noise * rng.standard_normal((K, K)), 1)
        A = np.where(A != 0, A, -A.T) + upper - upper.T
        return cls(0.5 + np.clip(A, -0.5, 0.5), 0.5 * rng.standard_normal(K))

    def win_rate(self, pi: np.ndarray) -> np.ndarray:
        """(K,) P(y > pi) of each response against a policy, pi (K,) probabilities."""
        return self.P @ pi

    def duality_gap(self, pi: np.ndarray) -> float:
        """2 (max_y P(y > pi) - 1/2): 0 at a Nash equilibrium of the game without regularisation."""
        return float(2.0 * (self.win_rate(pi).max() - 0.5))

    def exploitability(self, pi: np.ndarray, tau: float) -> float:
        """What the best answer to pi gains in P(. > pi) - tau KL(. || ref), over pi itself: 0 at the regularised equilibrium."""
        rate, logp = self.win_rate(pi), np.log(pi)
        best = check_beta(tau) * logsumexp(self.logp_ref + rate / tau)
        return float(best - (pi @ rate - tau * (pi @ (logp - self.logp_ref))))

    def response(self, anchor: np.ndarray, opponent: np.ndarray, tau: float) -> np.ndarray:
        """log pi (K,), pi ~ anchor e^(P(y > opponent) / tau): the step of mirror descent, and with anchor = ref the best answer."""
        return log_softmax(anchor + self.win_rate(np.exp(opponent)) / check_beta(tau))

    def equilibrium(self, tau: float, damping: float = 0.5, tolerance: float = 1e-10) -> np.ndarray:
        """log pi (K,), the one policy with pi ~ ref e^(P(y > pi) / tau), by a damped fixed point.

        Raises ValueError where it does not settle: a small tau needs a damping nearer 0.
        """
        logp = self.logp_ref
        for _ in range(10_000):
            best = self.response(self.logp_ref, logp, tau)
            if np.abs(best - logp).max() < tolerance:
                return best
            logp = log_softmax((1.0 - damping) * logp + damping * best)
        raise ValueError(f"the fixed point does not settle with tau={tau} and damping={damping}; lower the damping")

    def mirror_prox(self, logp: np.ndarray, beta: float, eta: float) -> np.ndarray:
        """One iteration of Nash Mirror Prox, log pi_k -> log pi_(k+1), two queries of P.

        pi_(k+1/2) and pi_(k+1) ~ ref^(eta/(1+eta)) pi_k^(1/(1+eta)) e^((eta/(1+eta)) P(y > opponent) / beta), the opponent being pi_k and then
        pi_(k+1/2); the centre stays pi_k. The closed form is derived.                                           [Tiapkin 2025; arXiv 2505.19731]
        """
        share = eta / (1.0 + eta)
        centre = share * self.logp_ref + (1.0 - share) * logp
        return self.response(centre, self.response(centre, logp, beta / share), beta / share)

    def nash_md(self, logp: np.ndarray, eta: float, tau: float) -> np.ndarray:
        """One iteration of Nash-MD: pi ~ mix e^(eta P(y > mix)), mix ~ pi^(1 - eta tau) ref^(eta tau).                          [arXiv 2312.00886]"""
        mix = log_softmax((1.0 - eta * tau) * logp + eta * tau * self.logp_ref)
        return self.response(mix, mix, 1.0 / eta)


# Features of three responses w, l, c: softmax(features @ theta), of which only the pair (w, l) is ever compared. From the uniform
# reference a DPO step goes along (.2, .2), where mass flows to the unseen c and log pi(w) falls; a tabular policy shows no such thing.
DISPLACEMENT_FEATURES = np.array([[1.0, 0.2], [0.8, 0.0], [2.0, 2.0]])
