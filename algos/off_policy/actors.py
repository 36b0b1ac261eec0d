"""Objectives of the actor slot on logged actions; the one that climbs Q by reparameterised actions is in `actor_critic`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from markovia.agents.control import ControlAgent
from markovia.agents.distributions import Distribution
from markovia.algos.off_policy.regularised import advantage_weight, anchored_objective, better_action, held_objective, squared_distance
from markovia.algos.off_policy.slots import Anchored, Clone, Deterministic, Guided, Held, SecondActor, Supported, Weighted

if TYPE_CHECKING:
    from markovia.algos.off_policy.actor_critic import ActorCritic, Loss
    from markovia.algos.off_policy.replay import Batch

EDGE = 1e-5  # a squashed density is infinite at the border of the Box


def log_prob(nets: ActorCritic, dist: Distribution, action: Tensor) -> Tensor:
    """log pi(a|s) of logged actions (b, d) in [-1, 1], (b,) nats; those at the border count as 1e-5 inside it where the policy is squashed.

    A deterministic policy is scored as a Gaussian of variance 1/2 around its action: -|pi(s) - a|^2, the constant left out.
    """
    if isinstance(nets.method.policy, Deterministic):
        return -squared_distance(nets.agent.unit_action(dist.mode()), action, reduce="sum")
    if nets.agent.squash:
        action = torch.atanh(action.clamp(-1.0 + EDGE, 1.0 - EDGE))
    return dist.log_prob(action)


def clone_loss(nets: ActorCritic, batch: Batch) -> Loss:
    """Mean of |pi(s) - a|^2, over entries too, for a deterministic policy, and of -log pi(a|s) for a stochastic one."""
    dist = nets.any_dist(nets.agent, batch.obs, batch.action.dtype)
    if isinstance(nets.method.policy, Deterministic):
        loss = squared_distance(nets.agent.unit_action(dist.mode()), batch.action, reduce="mean").mean()
    else:
        loss = -log_prob(nets, dist, batch.action).mean()
    return loss, {"actor_loss": loss.detach()}


def held_loss(nets: ActorCritic, slot: Held, batch: Batch, agent: ControlAgent) -> Loss:
    """Mean of `held_objective` at the agent's own action."""
    assert nets.critic is not None
    action = agent.unit_action(nets.dist(agent, batch.obs, batch.action.dtype).mode())
    distance = squared_distance(action, batch.action, reduce=slot.reduce)
    q = nets.one_q(nets.critic, batch.obs, action, slot.aggregate)
    loss = held_objective(q, distance, alpha=slot.alpha, weight=slot.weight).mean()
    return loss, {"actor_loss": loss.detach(), "distance": distance.detach().mean()}


def supported_loss(nets: ActorCritic, slot: Supported, batch: Batch, latent: Tensor) -> Loss:
    """Mean of `held_objective` at the policy's own action, whose distance is the behaviour model's bound; the gradient runs through the model."""
    action = nets.agent.unit_action(nets.dist(nets.agent, batch.obs, batch.action.dtype).mode())
    distance = nets.support(batch.obs, action, latent)
    loss = held_objective(nets.one_q(nets.critic, batch.obs, action, slot.aggregate), distance, alpha=slot.alpha, weight=slot.weight).mean()
    return loss, {"actor_loss": loss.detach(), "distance": distance.detach().mean()}


def guided_loss(nets: ActorCritic, slot: Guided, batch: Batch, latent: Tensor) -> Loss:
    """Mean of `held_objective` at the policy's own action a, held by `better_action` of the logged and the decoded one, decode(encode(s, a))."""
    dtype = batch.action.dtype
    action = nets.agent.unit_action(nets.dist(nets.agent, batch.obs, dtype).mode())
    decoded = nets.decode(batch.obs, action.detach() if slot.detach_target else action, latent)[0]
    with torch.no_grad():
        logged, own = (nets.one_q(nets.critic, batch.obs, a, slot.aggregate) for a in (batch.action, decoded))
        v = nets.v(nets.value, batch.obs, dtype)
    guide, gate = better_action(batch.action, decoded, logged, own, v)
    distance = gate * squared_distance(action, guide, reduce="mean")
    loss = held_objective(nets.one_q(nets.critic, batch.obs, action, slot.aggregate), distance, alpha=slot.alpha, weight=slot.weight).mean()
    return loss, {"actor_loss": loss.detach(), "distance": distance.detach().mean(), "adv": (logged - v).mean(), "decoded_adv": (own - v).mean()}


def weighted_loss(nets: ActorCritic, slot: Weighted, batch: Batch, noise: Tensor, adv: Tensor | None) -> Loss:
    """Mean of -w log pi(a|s); without a value network A = min_j Q_j(s, a) - min_j Q_j(s, a~), a~ one draw from the policy."""
    assert nets.critic is not None
    dist = nets.dist(nets.agent, batch.obs, noise.dtype)
    if adv is None:
        with torch.no_grad():
            drawn = nets.agent.unit_action(nets.choose(dist, noise))
            adv = nets.one_q(nets.critic, batch.obs, batch.action, "min") - nets.one_q(nets.critic, batch.obs, drawn, "min")
    weight = advantage_weight(adv, beta=slot.beta, max_weight=slot.max_weight, normalize=slot.normalize)
    loss = -(weight * log_prob(nets, dist, batch.action)).mean()
    return loss, {"actor_loss": loss.detach(), "adv": adv.mean(), "weight": weight.mean()}


def logged_loss(nets: ActorCritic, slot: Clone | Held | Weighted, batch: Batch, noise: Tensor, adv: Tensor | None) -> Loss:
    """Mean objective of a slot that reads logged actions."""
    if isinstance(slot, Clone):
        return clone_loss(nets, batch)
    return held_loss(nets, slot, batch, nets.agent) if isinstance(slot, Held) else weighted_loss(nets, slot, batch, noise, adv)


def anchored_loss(nets: ActorCritic, slot: Anchored, batch: Batch, noise: Tensor, agent: ControlAgent) -> Loss:
    """Mean of `anchored_objective` at an action that the agent draws by `noise` (b, d)."""
    assert nets.critic is not None
    dist = nets.dist(agent, batch.obs, noise.dtype)
    q = nets.one_q(nets.critic, batch.obs, agent.unit_action(nets.choose(dist, noise)), slot.aggregate)
    logp = log_prob(nets, dist, batch.action)
    loss = anchored_objective(q, logp, weight=slot.weight).mean()
    return loss, {"actor_loss": loss.detach(), "nll": -logp.detach().mean()}


def second_loss(nets: ActorCritic, slot: SecondActor, batch: Batch, noise: Tensor, agent: ControlAgent) -> Loss:
    """Mean objective of an actor that acts after training and enters no target."""
    return held_loss(nets, slot, batch, agent) if isinstance(slot, Held) else anchored_loss(nets, slot, batch, noise, agent)
