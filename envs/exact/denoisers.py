"""Two denoising problems whose answers are known in closed form, in float64.

LinearGaussianDenoising   a linear-Gaussian chain with a quadratic reward: the KL-optimal policy, every value, J and its gradient
GMMDenoiser               the exact eps, x0, v, flow and score of a Gaussian mixture: a denoiser without training
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _matrix(value: object, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
    return tensor


def _per_step(value: object, name: str, num_steps: int, shape: tuple[int, ...]) -> Tensor:
    """(num_steps, *shape), from one value that every step shares or from one per step."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.ndim == len(shape):
        tensor = tensor.expand(num_steps, *tensor.shape)
    return _matrix(tensor, name, (num_steps, *shape)).clone()


class LinearGaussianDenoising:
    """Denoising MDP with linear reference, quadratic reward and KL penalty; every quantity is exact.

    x_0 ~ N(0, I),   x_{k+1} = A_k x_k + b_k + s_k eps,   r(x_K) = -x^T Q x/2 + q^T x,   J = E r - beta sum_k KL_k        (1)

    A policy is a per-step linear mean mu_k(x) = G_k x + h_k with the reference's std s_k: `G` (K, d, d), `h` (K, d).
    Optimal with that std:  mu*_k = M_k (A_k x + b_k + s_k^2 p_{k+1}/beta),  M_k = (I + s_k^2 P_{k+1}/beta)^-1,
    V_k = -x^T P_k x/2 + p_k^T x + const,  P_k = A^T P M A,  p_k = A^T M (p - P b)   (P, p at k+1; P_K = Q, p_K = q)              (2)

    The default is a fixture with d = 2, K = 8, A = [[.9, .05], [-.05, .9]], b = 0, s = 0.3, Q = diag(1, .5), q = (1, -1),
    beta = 0.5: E r is -0.434 under the reference and 0.573 at the optimum, whose KL is 0.794 nats and J 0.175.
    A, b and s may be given for one step (used at each) or per step. All tensors float64; KL in nats.
    """

    def __init__(
        self,
        A: object = ((0.9, 0.05), (-0.05, 0.9)),
        b: object = (0.0, 0.0),
        s: float | Sequence[float] = 0.3,
        Q: object = ((1.0, 0.0), (0.0, 0.5)),
        q: object = (1.0, -1.0),
        beta: float = 0.5,
        num_steps: int = 8,
    ) -> None:
        self.q = torch.as_tensor(q, dtype=torch.float64)
        d, k = self.q.shape[0], num_steps
        self.A = _per_step(A, "A", k, (d, d))
        self.b = _per_step(b, "b", k, (d,))
        self.s = _per_step(s, "s", k, ())
        self.Q = _matrix(Q, "Q", (d, d))
        if not torch.equal(self.Q, self.Q.T):
            raise ValueError("Q is not symmetric; pass (Q + Q^T)/2, which gives the same reward.")
        if not bool((self.s > 0).all()):
            raise ValueError(f"s={self.s.tolist()}; every std must be positive, else the KL is infinite.")
        if not beta > 0:
            raise ValueError(f"beta={beta}; expected a positive KL strength.")
        self.beta = float(beta)
        self.num_steps, self.dim = k, d

    def reward(self, x: Tensor, cond: None = None) -> Tensor:
        """r(x) = -x^T Q x/2 + q^T x for x (..., d); `cond` is there for tasks, which pass one."""
        Q, q = self.Q.to(x), self.q.to(x)
        return -0.5 * torch.einsum("...i,ij,...j->...", x, Q, x) + x @ q

    def reference(self) -> tuple[Tensor, Tensor]:
        """(G, h) of the reference: (A, b)."""
        return self.A.clone(), self.b.clone()

    def soft_values(self) -> tuple[Tensor, Tensor]:
        """(P, p) of the soft values V_k, shapes (K + 1, d, d) and (K + 1, d), their constants left out (equation 2)."""
        P, p = [self.Q], [self.q]
        for k in reversed(range(self.num_steps)):
            A, b, M = self.A[k], self.b[k], self._shrink(k, P[0])
            p.insert(0, A.T @ M @ (p[0] - P[0] @ b))
            P.insert(0, A.T @ P[0] @ M @ A)
        return torch.stack(P), torch.stack(p)

    def optimal(self) -> tuple[Tensor, Tensor]:
        """(G, h) of the policy that maximises J among all policies with std s (equation 2)."""
        P, p = self.soft_values()
        shrink = torch.stack([self._shrink(k, P[k + 1]) for k in range(self.num_steps)])
        push = self.b + self.s.square()[:, None] * p[1:] / self.beta
        return shrink @ self.A, torch.einsum("kij,kj->ki", shrink, push)

    def _shrink(self, k: int, P: Tensor) -> Tensor:
        return torch.linalg.inv(torch.eye(self.dim, dtype=torch.float64) + self.s[k].square() * P / self.beta)

    def moments(self, G: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (K + 1, d) and covariance (K + 1, d, d) of every x_k: m' = G m + h, C' = G C G^T + s^2 I."""
        m, C = [torch.zeros(self.dim, dtype=torch.float64)], [torch.eye(self.dim, dtype=torch.float64)]
        for k in range(self.num_steps):
            C.append(G[k] @ C[k] @ G[k].T + self.s[k].square() * C[0])
            m.append(G[k] @ m[k] + h[k])
        return torch.stack(m), torch.stack(C)

    def expected_reward(self, G: Tensor, h: Tensor) -> Tensor:
        """E r(x_K) = -(m^T Q m + tr(Q C))/2 + q^T m at K."""
        m, C = self.moments(G, h)
        return -0.5 * (m[-1] @ self.Q @ m[-1] + (self.Q * C[-1]).sum()) + self.q @ m[-1]

    def kl(self, G: Tensor, h: Tensor) -> Tensor:
        """(K,) nats: KL_k = (|dG m + dh|^2 + tr(dG C dG^T))/(2 s^2), with dG = G - A, dh = h - b and the moments of x_k."""
        m, C = self.moments(G, h)
        dG, dh = G - self.A, h - self.b
        mean = torch.einsum("kij,kj->ki", dG, m[:-1]) + dh
        spread = torch.einsum("kij,kjl,kil->k", dG, C[:-1], dG)
        return (mean.square().sum(-1) + spread) / (2 * self.s.square())

    def objective(self, G: Tensor, h: Tensor) -> Tensor:
        """J = E r - beta sum_k KL_k; differentiable in G and h."""
        return self.expected_reward(G, h) - self.beta * self.kl(G, h).sum()

    def gradient(self, G: Tensor, h: Tensor, with_kl: bool = True) -> tuple[Tensor, Tensor]:
        """Exact policy gradient (dJ/dG, dJ/dh); `with_kl=False` gives that of E r alone."""
        G, h = G.detach().clone().requires_grad_(True), h.detach().clone().requires_grad_(True)
        dG, dh = torch.autograd.grad(self.objective(G, h) if with_kl else self.expected_reward(G, h), (G, h))
        return dG, dh

    def policy_values(self, G: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P, p, c) with E[r - beta sum_{j>=k} KL_j | x_k = x] = -x^T P_k x/2 + p_k^T x + c_k, for k = 0..K."""
        P, p, c = [self.Q], [self.q], [torch.zeros((), dtype=torch.float64)]
        for k in reversed(range(self.num_steps)):
            A, a, dG, dh, s2 = G[k], h[k], G[k] - self.A[k], h[k] - self.b[k], self.s[k].square()
            cost = self.beta / s2
            c.insert(0, c[0] + p[0] @ a - 0.5 * (a @ P[0] @ a + s2 * P[0].trace() + cost * dh @ dh))
            p.insert(0, A.T @ (p[0] - P[0] @ a) - cost * dG.T @ dh)
            P.insert(0, A.T @ P[0] @ A + cost * dG.T @ dG)
        return torch.stack(P), torch.stack(p), torch.stack(c)

    def gap_fraction(self, G: Tensor, h: Tensor) -> float:
        """(J* - J)/(J* - J_ref): 1 at the reference, 0 at the optimum."""
        best = self.objective(*self.optimal())
        return float(
            (best - self.objective(G.detach().double(), h.detach().double()))
            / (best - self.objective(*self.reference()))
        )

    def sample(self, G: Tensor, h: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n chains x_0..x_K under a policy: (n, K + 1, d)."""
        noise = torch.randn(n, self.num_steps + 1, self.dim, dtype=torch.float64, generator=generator)
        chain = [noise[:, 0]]
        for k in range(self.num_steps):
            chain.append(chain[k] @ G[k].T + h[k] + self.s[k] * noise[:, k + 1])
        return torch.stack(chain, 1)


class GMMDenoiser:
    """The exact denoiser of data sum_i w_i N(m_i, tau^2 I), for any noise level x = a x0 + s eps.

    x ~ sum_i w_i N(a m_i, V I),   V = a^2 tau^2 + s^2,   resp_i proportional to w_i N(x; a m_i, V I)
    E[x0 | x] = sum_i resp_i [m_i + (a tau^2/V) (x - a m_i)],   score = -sum_i resp_i (x - a m_i)/V
    eps = -s score,   v = a eps - s x0,   flow = eps - x0

    means (n, d), weights (n,) (normalised here), tau > 0; signal a and noise s broadcast against x (..., d) without its last
    axis. Matches `kernel.add_noise`: a = sqrt(abar), s = sqrt(1 - abar), or 1 - sigma and sigma for flow matching.
    """

    def __init__(self, means: object, tau: float, weights: object | None = None) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2:
            raise ValueError(f"means has shape {tuple(self.means.shape)}; expected (components, dimension).")
        n = self.means.shape[0]
        raw = torch.ones(n, dtype=torch.float64) if weights is None else _matrix(weights, "weights", (n,))
        if not bool((raw > 0).all()) or not tau > 0:
            raise ValueError(f"weights={raw.tolist()}, tau={tau}; expected positive numbers.")
        self.weights = raw / raw.sum()
        self.tau = float(tau)

    def _components(self, x: Tensor, signal: object, noise: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(difference x - a m (..., n, d), V (..., 1), log w_i N_i (..., n), a (..., 1))."""
        a = torch.as_tensor(signal, dtype=x.dtype, device=x.device)[..., None]
        s = torch.as_tensor(noise, dtype=x.dtype, device=x.device)[..., None]
        difference = x[..., None, :] - a[..., None] * self.means.to(x)
        var = a.square() * self.tau**2 + s.square()
        log_joint = self.weights.to(x).log() - 0.5 * difference.square().sum(-1) / var
        return difference, var, log_joint - 0.5 * x.shape[-1] * (2 * math.pi * var).log(), a

    def log_density(self, x: Tensor, signal: object, noise: object) -> Tensor:
        """log p(x) in nats at a noise level, shape (...)."""
        return self._components(x, signal, noise)[2].logsumexp(-1)

    def responsibilities(self, x: Tensor, signal: object, noise: object) -> Tensor:
        """P(component i | x), shape (..., n)."""
        return self._components(x, signal, noise)[2].softmax(-1)

    def score(self, x: Tensor, signal: object, noise: object) -> Tensor:
        """Gradient of log p(x), shape (..., d)."""
        difference, var, log_joint, _ = self._components(x, signal, noise)
        return -(log_joint.softmax(-1)[..., None] * difference).sum(-2) / var

    def x0(self, x: Tensor, signal: object, noise: object) -> Tensor:
        """E[x0 | x], shape (..., d)."""
        difference, var, log_joint, a = self._components(x, signal, noise)
        each = self.means.to(x) + (a * self.tau**2 / var)[..., None] * difference
        return (log_joint.softmax(-1)[..., None] * each).sum(-2)

    def eps(self, x: Tensor, signal: object, noise: object) -> Tensor:
        """E[eps | x] = -s score, shape (..., d)."""
        return -torch.as_tensor(noise, dtype=x.dtype, device=x.device)[..., None] * self.score(x, signal, noise)

    def v(self, x: Tensor, signal: object, noise: object) -> Tensor:
        """E[v | x] with v = a eps - s x0, shape (..., d)."""
        a = torch.as_tensor(signal, dtype=x.dtype, device=x.device)[..., None]
        s = torch.as_tensor(noise, dtype=x.dtype, device=x.device)[..., None]
        return a * self.eps(x, signal, noise) - s * self.x0(x, signal, noise)

    def flow(self, x: Tensor, signal: object, noise: object) -> Tensor:
        """E[eps - x0 | x], the flow-matching velocity, shape (..., d)."""
        return self.eps(x, signal, noise) - self.x0(x, signal, noise)

    def network(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> Callable[..., Tensor]:
        """A denoiser with a network's signature (x, timestep, cond=None) -> prediction, for a scheduler's alphas_cumprod."""
        heads = {"epsilon": self.eps, "sample": self.x0, "v_prediction": self.v}
        if prediction_type not in heads:
            raise ValueError(f"prediction_type={prediction_type!r}; expected one of {', '.join(heads)}.")

        def predict(x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
            abar = alphas_cumprod.to(x)[timestep]
            return heads[prediction_type](x, abar.sqrt(), (1 - abar).sqrt())

        return predict

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n points of the data distribution, (n, d) float64."""
        index = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[index] + self.tau * noise
