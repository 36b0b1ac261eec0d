"""F1: a bandit with a two-dimensional action whose behaviour has eight modes; every density and value is known."""

from __future__ import annotations

import numpy as np

from markovia.envs.exact.arrays import Array, exp, like, log_softmax, logsumexp
from markovia.envs.exact.divergences import check_beta
from markovia.envs.offline.transitions import About, Transitions

NUM_MODES = 8


class Bandit2D:
    """One state, actions in [-1, 1]^2, behaviour mu(a) = mean_k N(a; m_k, std^2 I), m_k = 0.7 (cos 2 pi k/8, sin 2 pi k/8).

    Q(a) = argmin_k |a - m_k| / 7: constant around each mode, so its gradient is 0; gradient methods use `q_smooth`.
    Modes 7 (the best) and 0 (the worst) are neighbours, and the mean of the data lies in a hole: log mu is -35 there, 0.44 at the data's median.
    Actions (..., 2) may be numpy arrays or torch tensors; values come back in the same library.
    """

    def __init__(self, std: float = 0.08, width: float = 0.15) -> None:
        angle = 2 * np.pi * np.arange(NUM_MODES) / NUM_MODES
        self.modes = 0.7 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        self.std, self.width = std, width

    def _squared_distance(self, action: Array) -> Array:
        """(..., 8)."""
        return ((action[..., None, :] - like(self.modes, action)) ** 2).sum(-1)

    def q(self, action: Array) -> Array:
        """(...,) in [0, 1]: index of the nearest mode / 7."""
        return self._squared_distance(action).argmin(-1) / (NUM_MODES - 1)

    def q_smooth(self, action: Array) -> Array:
        """(...,): Q_h(a) = sum_k (k/7) softmax_k(-|a - m_k|^2 / 2 h^2), h = `width`; differentiable."""
        weight = exp(log_softmax(-self._squared_distance(action) / (2 * self.width**2)))
        return (weight * like(np.arange(NUM_MODES) / (NUM_MODES - 1), action)).sum(-1)

    def log_mu(self, action: Array) -> Array:
        """(...,) nats: log density of the behaviour."""
        each = -self._squared_distance(action) / (2 * self.std**2)
        return logsumexp(each) - np.log(NUM_MODES * 2 * np.pi * self.std**2)

    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """(n, 2) actions of the behaviour, clipped to the box (about one in 23,000)."""
        rng = np.random.default_rng(seed)
        mode = rng.integers(NUM_MODES, size=n)
        return np.clip(self.modes[mode] + self.std * rng.standard_normal((n, 2)), -1.0, 1.0)

    def grid(self, n: int = 101) -> np.ndarray:
        """(n^2, 2) points of an even grid over the box."""
        axis = np.linspace(-1.0, 1.0, n)
        return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)

    def optimum(self, beta: float, smooth: bool = False, n: int = 101) -> np.ndarray:
        """(n^2,) probabilities on `grid(n)` of the maximiser of E_pi Q - beta KL(pi || mu): pi proportional to mu e^(Q/beta)."""
        points = self.grid(n)
        q = self.q_smooth(points) if smooth else self.q(points)
        return np.exp(log_softmax(self.log_mu(points) + q / check_beta(beta)))

    def data(self, n: int = 10_000, seed: int = 0) -> Transitions:
        """n logged decisions of one step each: obs is one zero, the reward is Q(a), every row terminates."""
        from gymnasium import spaces

        action = self.sample(n, seed).astype(np.float32)
        zeros, end = np.zeros((n, 1), dtype=np.float32), np.ones(n, dtype=bool)
        box = spaces.Box(-1.0, 1.0, (2,), np.float32)
        about = About("bandit2d", horizon=1, observation_space=spaces.Box(0.0, 1.0, (1,), np.float32), action_space=box)
        reward = self.q(action.astype(np.float64)).astype(np.float32)
        return Transitions(zeros, action, reward, zeros, end, ~end, np.arange(n), about=about)
