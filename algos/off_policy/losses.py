"""The equations of off-policy actor-critics: pure functions of what networks gave, one number per transition.

    q     (N, b)  values of the N critics              logp  (b,) or (b, d)  log pi(a|s) of an action in [-1, 1], joint or per entry, nats
    y     (b,)    critic target, no gradient           lam   ()  weight of the entropy (SAC's alpha), reward units per nat
    continuation (b,)  1 - terminated; truncation never enters: the final observation of a truncated episode is bootstrapped
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["min", "mean", "first", "mean-std"]


def aggregate(q: Tensor, how: Aggregate) -> Tensor:
    """One value per transition, (b,): min_j Q_j (pessimistic: twin critics, arXiv 1802.09477), the mean, Q_1, or mean - std.

    Of two critics mean - std is their minimum, of more it is pessimistic without following the one that errs most.
    """
    if how == "min":
        return q.amin(0)
    if how == "mean-std":
        return q.mean(0) - (q.var(0, unbiased=False) + 1e-12).sqrt()  # the root of 0 has no slope
    return q.mean(0) if how == "mean" else q[0]


def drawn_members(q: Tensor, noise: Tensor, *, subset: int) -> Tensor:
    """The rows of q (N, b) with the `subset` largest of N random numbers (N,): all subsets are equally likely.    [REDQ; arXiv 2101.05982, eq. 2]"""
    return q[torch.topk(noise, subset).indices]


def log_q(logp: Tensor, *, q: float) -> Tensor:
    """Tsallis' logarithm of a density p given log p: (p^(q-1) - 1) / (q - 1), log p at q = 1; same shape.   [Tomar 2020, arXiv 2005.09814]"""
    return logp if q == 1.0 else torch.expm1((q - 1.0) * logp) / (q - 1.0)


def bootstrap(reward: Tensor, continuation: Tensor, value: Tensor, *, gamma: float) -> Tensor:
    """y = r + gamma (1 - terminated) V(s'), (b,); V(s') is min_j Q_j(s', a') - lam log pi(a'|s') for SAC.      [arXiv 1812.05905, eq. 5-6]"""
    return reward + gamma * continuation * value


def soft_value(q: Tensor, log_density: Tensor, *, lam: Tensor | float) -> Tensor:
    """V = Q(s, a) - lam log_q pi(a|s), a ~ pi: the value with its entropy, (b,) from (b,).              [arXiv 1812.05905, eq. 3]"""
    return q - lam * log_density


def smoothed_action(mean: Tensor, noise: Tensor, *, std: float, clip: float) -> Tensor:
    """Target policy smoothing: a' = clip(mu(s') + clip(std eps, -c, c), -1, 1), the Box as [-1, 1].      [arXiv 1802.09477, section 5.3]"""
    return (mean + (std * noise).clamp(-clip, clip)).clamp(-1.0, 1.0)


def td_error(q: Tensor, y: Tensor) -> Tensor:
    """sum_j (Q_j(s, a) - y_j)^2 over the ensemble, (b,), squared reward units; y (b,) or (N, b). SAC halves it.      [arXiv 1812.05905, eq. 5]"""
    return (q - y).square().sum(0)


def quantile_error(z: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    """sum_i mean_j |tau_i - 1[y_j < z_i]| h(y_j - z_i), (b,), summed over the ensemble too; h is Huber's loss with threshold 1.

    z (N, k, b) predicted quantiles at levels tau (k, b), y (l, b) quantiles of the target, or (N, l, b) of each member's own, no gradient.
                                                                                                          [Dabney 2018, arXiv 1806.06923]
    """
    gap = y[..., None, :, :] - z[:, :, None]
    huber = torch.where(gap.abs() <= 1.0, 0.5 * gap.square(), gap.abs() - 0.5)
    return ((tau[None, :, None] - (gap < 0.0).to(gap.dtype)).abs() * huber).mean(2).sum((0, 1))


def mirror_objective(
    value: Tensor, log_density: Tensor | float, log_density_old: Tensor | float, *, lam: Tensor | float, inverse_step: Tensor | float, q: float
) -> Tensor:
    """What the actor minimises in one mirror-descent step from pi_k, (b,); a is reparameterised, gradient flows through it in all terms.

    L = (1/t) log_q pi(a|s) + q (lam - 1/t) log_q pi_k(a|s) - Q(s, a)                          [Tomar 2020, arXiv 2005.09814]
    It maximises <Q - lam grad psi(pi_k), pi> - (1/t) B(pi, pi_k), psi(pi) = E_pi[log_q pi], B its Bregman divergence: KL(pi || pi_k) at q = 1.
    1/t = lam drops pi_k at any q: SAC at q = 1. lam = 1/t = 0 with a deterministic actor: TD3. 1/t < lam repels from pi_k.
    """
    return inverse_step * log_density + q * (lam - inverse_step) * log_density_old - value


def temperature_loss(log_lam: Tensor, logp: Tensor, *, target_entropy_nats: float) -> Tensor:
    """-log lam (log pi + H), (b,), the gradient in log lam alone: lam falls while the entropy exceeds H.      [arXiv 1812.05905, eq. 18]

    As in the published code the multiplier is log lam where the paper has lam; both have their zero at E[log pi] = -H.
    """
    return -log_lam * (logp.detach() + target_entropy_nats)


def parameter_penalty(mean: Tensor, log_std: Tensor) -> Tensor:
    """mean_j mu_j^2 + mean_j log^2 std_j, (b,): keeps tanh policies out of saturation.      [code of arXiv 2005.09814 and 1801.01290]"""
    return mean.square().mean(-1) + log_std.square().mean(-1)
