"""The regulariser slot of the critics, on networks: which actions and gradients its equations are asked about."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from markovia.agents.records import Obs
from markovia.algos.off_policy.regularised import calibrated, conservative_gap, gradient_cosine
from markovia.algos.off_policy.slots import Conservative, Diverse

if TYPE_CHECKING:
    from markovia.algos.off_policy.actor_critic import ActorCritic, Loss
    from markovia.algos.off_policy.replay import Batch


def conservative(nets: ActorCritic, slot: Conservative, batch: Batch, q: Tensor, noise: Tensor) -> Loss:
    """alpha times the multiplier times the mean `conservative_gap`; of `noise` the first 3 num rows (b, d) give uniform actions and the policy's at s
    and at s', all judged at s.

    No gradient reaches the policy. `q` (N, b) are the critics' values of the logged actions.
    """
    n = slot.num
    with torch.no_grad():
        uniform = 2.0 * torch.special.ndtr(noise[:n]) - 1.0
        both = ((batch.obs, noise[n : 2 * n]), (batch.next_obs, noise[2 * n : 3 * n]))
        drawn, log_pi = zip(*(_sampled(nets, obs, x) for obs, x in both), strict=True)
        actions = torch.cat([uniform, *drawn])
        log_mu = torch.cat([torch.full_like(log_pi[0], -noise.shape[-1] * math.log(2.0)), *log_pi])
    values = nets.q_of_each(nets.critic, batch.obs, actions)
    if slot.calibrated:
        values = torch.cat([values[:, :n], calibrated(values[:, n:], batch.extra["ret"])], 1)
    if not slot.importance:
        values, log_mu = torch.cat([values, q[:, None]], 1), torch.zeros_like(noise[:1, :, 0])
    gap = conservative_gap(values, log_mu, q, temperature=slot.temperature, min_gap=slot.min_gap).mean()
    if nets.log_multiplier is None:
        return slot.alpha * gap, {"gap": gap.detach()}
    multiplier = nets.log_multiplier.detach().exp()
    return slot.alpha * multiplier * gap, {"gap": gap.detach(), "multiplier": multiplier}


def _sampled(nets: ActorCritic, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions (n, b, d) in [-1, 1] that the policy draws at obs (b, ...), and their log densities (n, b)."""
    dist = nets.dist(nets.agent, obs, noise.dtype)
    raw = dist.at(noise)
    return nets.agent.unit_action(raw), dist.log_prob(raw)


def diverse(nets: ActorCritic, slot: Diverse, batch: Batch, q: Tensor) -> Loss:
    """eta times the mean `gradient_cosine` at logged actions; its gradient runs through the gradient in the action."""
    actions = batch.action.detach().expand(q.shape[0], *batch.action.shape).clone().requires_grad_(True)
    values = nets.q(nets.critic, batch.obs, actions)
    (grads,) = torch.autograd.grad(values.sum(), actions, create_graph=True)
    cosine = gradient_cosine(grads).mean()
    return slot.eta * cosine, {"cosine": cosine.detach() / q.shape[0]}
