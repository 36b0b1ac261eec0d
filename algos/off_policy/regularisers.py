"""The regulariser slot of the critics, on networks: which actions and gradients its equations are asked about."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from markovia.agents.records import Obs, map_obs
from markovia.algos.off_policy.regularised import calibrated, conservative_gap, gradient_cosine
from markovia.algos.off_policy.slots import Conservative, Diverse

if TYPE_CHECKING:
    from markovia.algos.off_policy.actor_critic import ActorCritic, Loss
    from markovia.algos.off_policy.replay import Batch


def conservative(nets: ActorCritic, slot: Conservative, batch: Batch, q: Tensor, noise: Tensor) -> Loss:
    """alpha times the mean `conservative_gap`; `noise` (3 num, b, d) gives uniform actions and the policy's at s and at s', all judged at s.

    No gradient reaches the policy. `q` (N, b) are the critics' values of the logged actions.
    """
    n, b = slot.num, len(batch.reward)
    with torch.no_grad():
        uniform = 2.0 * torch.special.ndtr(noise[:n]) - 1.0
        both = ((batch.obs, noise[n : 2 * n]), (batch.next_obs, noise[2 * n : 3 * n]))
        drawn, log_pi = zip(*(_sampled(nets, obs, x) for obs, x in both), strict=True)
        actions = torch.cat([uniform, *drawn])
        log_mu = torch.cat([torch.full_like(log_pi[0], -noise.shape[-1] * math.log(2.0)), *log_pi])
    again = map_obs(batch.obs, lambda x: x.expand(3 * n, *x.shape).flatten(0, 1))
    values = nets.q(nets.critic, again, actions.flatten(0, 1)).unflatten(1, (3 * n, b))
    if slot.calibrated:
        values = torch.cat([values[:, :n], calibrated(values[:, n:], batch.extra["ret"])], 1)
    if not slot.importance:
        values, log_mu = torch.cat([values, q[:, None]], 1), torch.zeros_like(noise[:1, :, 0])
    gap = conservative_gap(values, log_mu, q, temperature=slot.temperature).mean()
    return slot.alpha * gap, {"gap": gap.detach()}


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
