"""The equations that keep a policy near logged actions, or its values near logged returns: pure functions, one number per transition.

    action, logged (b, d)  actions in [-1, 1]             q      (N, b) or (b,)  values of critics, reward units
    logp (b,)  log pi(a|s) of the logged action, nats     adv    (b,)  advantage of the logged action, reward units
    values (N, k, b)  of k candidate actions per state    log_mu (k, b)  log density that drew them, nats
    td_error (b,)  min_j Qbar_j(s, a) - V(s)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def squared_distance(action: Tensor, logged: Tensor, *, reduce: Literal["mean", "sum"]) -> Tensor:
    """|a - a_logged|^2, (b,), averaged over the entries (TD3+BC, behavioural cloning) or summed (ReBRAC).   [arXiv 2106.06860; 2305.09836]"""
    error = (action - logged).square()
    return error.mean(-1) if reduce == "mean" else error.sum(-1)


def penalised_value(value: Tensor, action: Tensor, logged: Tensor, *, penalty: float) -> Tensor:
    """V(s') = Q(s', a') - penalty sum_k (a'_k - a'_logged,k)^2, (b,), a' the target policy's action.              [arXiv 2305.09836]

    The logged action is the one that follows in the same episode; penalty = 0 is TD3's target.
    """
    return value - penalty * squared_distance(action, logged, reduce="sum")


def held_objective(q: Tensor, distance: Tensor, *, alpha: float, weight: float) -> Tensor:
    """L = -alpha Q(s, pi(s)) / sg[mean |Q|] + weight |pi(s) - a|^2, (b,): the scale of Q, and so of rewards, drops out.

    alpha 2.5, weight 1 and the mean over entries: TD3+BC [arXiv 2106.06860]. alpha 1, a sum and min_j Q_j: ReBRAC [2305.09836].
    alpha = 0 is behavioural cloning. The mean runs over the batch and is kept above 1e-8.
    """
    return weight * distance - alpha * q / q.detach().abs().mean().clamp(min=1e-8)


def anchored_objective(q: Tensor, logp: Tensor, *, weight: float) -> Tensor:
    """L = -Q(s, a~) - weight log pi(a|s), (b,): a~ is the policy's own action, through which the gradient flows, a the logged one.

    MCEP's second actor over AWAC, as its authors' code has it                                                         [arXiv 2306.03680]
    """
    return -q - weight * logp


def expectile(td_error: Tensor, *, tau: float) -> Tensor:
    """|tau - 1[u < 0]| u^2, u = Qbar(s, a) - V(s), (b,): its minimiser V is the tau-expectile of Q over logged actions.

    tau = 0.5 is half the squared error, so V is the behaviour's value; tau -> 1 tends to the best logged action.   [arXiv 2110.06169, eq. 5]
    """
    return (tau - (td_error < 0.0).to(td_error.dtype)).abs() * td_error.square()


def advantage_weight(adv: Tensor, *, beta: float, max_weight: float, normalize: bool = False) -> Tensor:
    """w = min(exp(beta A), w_max), (b,), no gradient; -w log pi(a|s) fits pi to mu exp(beta A) / Z.    [arXiv 2006.09359; 2110.06169, eq. 7]

    The exponent is clipped, not its result, so that a large advantage gives w_max and no infinity. beta = 0 is behavioural cloning.
    With `normalize` w = b exp(beta A) / sum exp(beta A) over the batch, as some code of AWAC has it.
    """
    if normalize:
        return len(adv) * torch.softmax(beta * adv.detach(), 0)
    return (beta * adv.detach()).clamp(max=math.log(max_weight)).exp()


def conservative_gap(values: Tensor, log_mu: Tensor | float, logged: Tensor, *, temperature: float, min_gap: float | None = None) -> Tensor:
    """sum_i [ T log sum_k exp((Q_i(s, a_k) - log mu_k) / T) - Q_i(s, a) ], (b,), logged (N, b) = Q_i(s, a).  [arXiv 2006.04779, eq. 4, CQL(H)]

    Dividing by mu makes the sum an estimate of the integral over actions, exact at T = 1 up to the constant T log k.
    In a table, with squared error 1 and weight alpha, the fixed point is Q = y - (alpha / 2)(softmax(Q) / mu - 1).
    A critic's gap below `min_gap` counts as that and has no gradient, as published code has it on AntMaze.
    """
    gap = temperature * torch.logsumexp((values - log_mu) / temperature, dim=1) - logged
    return (gap if min_gap is None else gap.clamp(min=min_gap)).sum(0)


def multiplier_loss(log_multiplier: Tensor, gap: Tensor, *, target: float) -> Tensor:
    """-exp(log_multiplier) (gap - target), (): its descent is the dual ascent of min_Q max_{m >= 0} m (gap - target).   [arXiv 2006.04779, eq. 30]

    gap () is the mean of one critic's `conservative_gap`, no gradient; the multiplier grows while it exceeds the target.
    """
    return -log_multiplier.exp() * (gap.detach() - target)


def calibrated(values: Tensor, ret: Tensor) -> Tensor:
    """max(Q(s, a_k), G(s)), (N, k, b), G (b,) the logged Monte Carlo return: values below it are not pushed further.     [arXiv 2303.05479]"""
    return torch.maximum(values, ret)


def gradient_cosine(grads: Tensor) -> Tensor:
    """1/(N - 1) sum_{i != j} <g_i, g_j>, (b,), g_i = grad_a Q_i / (|grad_a Q_i| + 1e-10), grads (N, b, d).      [arXiv 2110.01548]

    N times the mean cosine over pairs; never below -N / (N - 1). The sum over pairs is |sum_i g_i|^2 - sum_i |g_i|^2.
    """
    unit = grads / (torch.linalg.vector_norm(grads, dim=-1, keepdim=True) + 1e-10)
    return (unit.sum(0).square().sum(-1) - unit.square().sum((0, -1))) / (grads.shape[0] - 1)


def support_bound(decoded: Tensor, action: Tensor, mean: Tensor, log_std: Tensor, *, beta: float, weight: Tensor | float = 1.0) -> Tensor:
    """U = weight mean_k (decoded_k - a_k)^2 + beta mean_j KL(N(mean_j, std_j) || N(0, 1)), (b,), mean and log_std (b, 2 d).   [arXiv 2202.06239]

    `weight` (b,) is 1 but for A2PR's model, which reconstructs only actions of positive advantage [2405.19909]. At weight 1 it is up to scale and
    constant a bound on -log mu(a|s) by a decoder of deviation sigma = sqrt(beta / 4), with latents of 2 d entries:
    U = (beta / 2 d)(-ELBO - d (log sigma + 0.5 log 2 pi)).
    """
    divergence = 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0) - log_std
    return weight * (decoded - action).square().mean(-1) + beta * divergence.mean(-1)


def better_action(logged: Tensor, decoded: Tensor, q_logged: Tensor, q_decoded: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What holds the actor in the place of the logged action, (b, d), and whether it does, (b,) of 0 and 1.             [arXiv 2405.19909]

    a_bar = the decoded action where Q(s, decoded) >= Q(s, logged), else the logged one; g = 1[Q(s, decoded) >= V(s) or Q(s, logged) > V(s)].
    With g = 1 and the logged action alone it is TD3+BC.
    """
    chosen = torch.where((q_decoded >= q_logged)[:, None], decoded, logged)
    return chosen, ((q_decoded >= v) | (q_logged > v)).to(v.dtype)


def lower_target(y_target: Tensor, y_online: Tensor) -> Tensor:
    """min(y_target, y_online), (b,): what A2PR's V is fitted to; both are r + gamma m min_j Q_j(s', a'), Q of the targets and of now. [2405.19909]"""
    return torch.minimum(y_target, y_online)
