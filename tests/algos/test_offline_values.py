"""The offline rows: equations by hand, and every loss against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from off_policy_pieces import F64, net_by_hand, policy_by_hand
from offline_pieces import (
    LAM,
    guided_by_hand,
    made,
    minibatch,
    mixture_by_hand,
    one,
    q_by_hand,
    quantile_loss_by_hand,
    quantiles_by_hand,
    squashed_by_hand,
    squashed_density_by_hand,
    support_by_hand,
    tiny,
)

from markovia.algos.off_policy import losses, regularised
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import Squashed
from markovia.algos.offline.methods import OFFLINE


def test_equations_by_hand() -> None:
    # differences (1, -2): squares 1 and 4
    a, b = torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor([[0.0, 2.0]], dtype=F64)
    assert regularised.squared_distance(a, b, reduce="mean").item() == 2.5
    assert regularised.squared_distance(a, b, reduce="sum").item() == 5.0
    # 3 - 0.5 * 5
    assert regularised.penalised_value(one(3), a, b, penalty=0.5).item() == 0.5
    # 0.9 * 2^2 above V, (1 - 0.9) * 3^2 below it
    assert regularised.expectile(one(2, -3), tau=0.9).tolist() == pytest.approx([3.6, 0.9])
    # e^(2 * 0.5), and 100 where e^(2 * 500) has no number
    assert regularised.advantage_weight(one(0.5, 500), beta=2.0, max_weight=100.0).tolist() == pytest.approx([math.e, 100.0])
    # 2 e^1 / (e^1 + e^0) and 2 / (e^1 + e^0)
    normal = regularised.advantage_weight(one(0.5, 0), beta=2.0, max_weight=0.1, normalize=True)
    assert normal.tolist() == pytest.approx([2 * math.e / (math.e + 1), 2 / (math.e + 1)])
    # (1 + 4) / 2, and half of (1 + e^0 - 1) / 2 - 0 = 1/2 and (0 + e^2 - 1) / 2 - 1
    found = regularised.support_bound(a, b, one(1, 0)[None], one(0, 1)[None], beta=1.0)
    assert found.item() == pytest.approx(2.5 + (0.5 + (math.e**2 - 1) / 2 - 1) / 2)
    # two members; log(e^log 3 + e^0) = log 4 less 1, and log(e^0 + e^0) = log 2 less 0
    values = torch.tensor([[[math.log(3)], [0.0]], [[0.0], [0.0]]], dtype=F64)
    logged = torch.tensor([[1.0], [0.0]], dtype=F64)
    assert regularised.conservative_gap(values, 0.0, logged, temperature=1.0).item() == pytest.approx(math.log(8) - 1)
    # a density of 1/2 doubles each weight; T = 2 gives 2 log(e^(a/2) + e^(b/2))
    assert regularised.conservative_gap(values, -math.log(2), logged, temperature=1.0).item() == pytest.approx(math.log(32) - 1)
    by_two = 2 * math.log(3**0.5 + 1) - 1 + 2 * math.log(2)
    assert regularised.conservative_gap(values, 0.0, logged, temperature=2.0).item() == pytest.approx(by_two)
    assert regularised.calibrated(one(1, 3), one(2, 2)).tolist() == [2.0, 3.0]
    # unit vectors at 0, 90 and 180 degrees: pairs 0, -1, 0, each twice, over N - 1 = 2; lengths do not matter
    grads = torch.tensor([[[2.0, 0.0]], [[0.0, 5.0]], [[-1.0, 0.0]]], dtype=F64)
    assert regularised.gradient_cosine(grads).item() == pytest.approx(-1.0)
    # level 1/4: y = 2 lies 3 above z = -1, Huber 3 - 1/2; y = -1.5 lies 1/2 below, Huber 1/8: (1/4 * 2.5 + 3/4 / 8) / 2
    found = losses.quantile_error(one(-1)[None, None], one(2, -1.5)[:, None], one(0.25)[:, None])
    assert found.item() == pytest.approx((0.25 * 2.5 + 0.75 / 8) / 2)
    # a second member with a target of its own, 1 above its z: both levels of it cost (1/4 * 1/2)
    both = losses.quantile_error(one(-1, 0)[:, None, None], torch.stack([one(2, -1.5), one(1, 1)])[..., None], one(0.25)[:, None])
    assert both.item() == pytest.approx(found.item() + 0.25 * 0.5)
    # the decoded action is worth 2 >= 1, then 0 < 3; above V in both rows; a tie goes to the decoded one, and V = 5 is above both
    chosen, gate = regularised.better_action(one(1, 2, 3)[:, None], one(7, 8, 9)[:, None], one(1, 3, 2), one(2, 0, 2), one(2, 1, 5))
    assert chosen[:, 0].tolist() == [7.0, 2.0, 9.0] and gate.tolist() == [1.0, 1.0, 0.0]
    assert regularised.lower_target(one(1, 4), one(2, 3)).tolist() == [1.0, 3.0]
    # mean |Q| = (2 + 4) / 2 = 3: 0.5 * 1 - 3 * 2 / 3 = -1.5 and 0.5 * 2 + 3 * 4 / 3 = 5
    assert regularised.held_objective(one(2, -4), one(1, 2), alpha=3.0, weight=0.5).tolist() == [-1.5, 5.0]
    # -2 - 0.5 * -1 = -1.5 and 4 - 0.5 * 3 = 2.5
    assert regularised.anchored_objective(one(2, -4), one(-1, 3), weight=0.5).tolist() == [-1.5, 2.5]


def expected_regulariser(method_id: str, nets: ActorCritic, batch: Batch, noise: torch.Tensor) -> torch.Tensor | float:
    """What is added to the squared errors, member by member and pair by pair."""
    if method_id == "edac":
        total = 0.0
        for i in range(6):
            obs, action = batch.obs[i : i + 1], batch.action[i : i + 1].clone().requires_grad_(True)  # type: ignore[index]
            grads = [torch.autograd.grad(q.sum(), action, retain_graph=True)[0][0] for q in q_by_hand(nets.critic, obs, action)]
            total += sum(float(torch.cosine_similarity(a, b, 0)) for j, a in enumerate(grads) for k, b in enumerate(grads) if j != k) / 2
        return total / 6
    if not method_id.startswith("cql"):
        return 0.0
    kinds = [(2 * torch.distributions.Normal(0, 1).cdf(noise[k]) - 1, torch.full((6,), 2 * math.log(0.5), dtype=F64), False) for k in (3, 4)]
    kinds += [(*squashed_by_hand(nets.agent, batch.obs, noise[k]), True) for k in (5, 6)]
    kinds += [(*squashed_by_hand(nets.agent, batch.next_obs, noise[k]), True) for k in (7, 8)]
    total = torch.zeros(6, dtype=F64)
    for j in range(2):
        weights = torch.zeros(6, dtype=F64)
        for action, log_mu, is_policy in kinds:
            q = q_by_hand(nets.critic, batch.obs, action)[j]
            q = torch.maximum(q, batch.extra["ret"]) if is_policy and method_id == "cql/cal-ql" else q
            weights = weights + q.exp() / log_mu.exp()
        total = total + weights.log() - q_by_hand(nets.critic, batch.obs, batch.action)[j]
    return (5.0 if method_id == "cql/cal-ql" else 10.0) * total.mean()


def expected_goal(method_id: str, nets: ActorCritic, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """y by the formula of the row's paper."""
    if method_id.startswith("cfpi"):
        tau = torch.distributions.Normal(0.0, 1.0).cdf(noise[3:5, :, 0])
        z = torch.stack(quantiles_by_hand(nets.target, batch.next_obs, batch.extra["next_action"], tau))
        return batch.reward + 0.99 * batch.continuation * z
    if method_id == "iql":
        value = net_by_hand(nets.value, batch.next_obs)[:, 0]
    elif method_id == "awac":
        action = (policy_by_hand(nets.agent, batch.next_obs).tanh() + nets.policy.log_std.exp() * noise[0]).clamp(-1, 1)
        value = torch.minimum(*q_by_hand(nets.target, batch.next_obs, action))
    elif method_id in ("cql", "cql/cal-ql", "edac", "edac/sac-n", "mcep/awac"):
        action, logp = squashed_by_hand(nets.agent, batch.next_obs, noise[0])
        value = torch.stack(q_by_hand(nets.target, batch.next_obs, action)).amin(0)
        value = value - LAM * logp if method_id.startswith("edac") else value
    else:
        mean = policy_by_hand(nets.references["target"], batch.next_obs).tanh()
        action = torch.clip(mean + torch.clip(0.2 * noise[0], -0.5, 0.5), -1, 1)
        value = torch.minimum(*q_by_hand(nets.target, batch.next_obs, action))
        if method_id == "rebrac":
            value = value - 0.01 * ((action - batch.extra["next_action"]) ** 2).sum(1)
    return batch.reward + 0.99 * batch.continuation * value


def expected_value_loss(method_id: str, nets: ActorCritic, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """The value network's loss by the formula of the row's paper."""
    v = net_by_hand(nets.value, batch.obs)[:, 0]
    if method_id == "a2pr":
        mean = policy_by_hand(nets.references["target"], batch.next_obs).tanh()
        action = torch.clip(mean + torch.clip(0.2 * noise[1], -0.5, 0.5), -1, 1)
        nexts = [torch.minimum(*q_by_hand(critic, batch.next_obs, action)) for critic in (nets.target, nets.critic)]
        y = torch.minimum(*(batch.reward + 0.99 * batch.continuation * n for n in nexts))
        return ((v - y) ** 2).mean()
    u = torch.minimum(*q_by_hand(nets.target, batch.obs, batch.action)) - v
    return torch.where(u < 0, 0.3 * u**2, 0.7 * u**2).mean()


def expected_actor(method_id: str, nets: ActorCritic, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """The actor's loss by the formula of the row's paper."""
    if method_id in ("cql", "cql/cal-ql", "edac", "edac/sac-n"):
        action, logp = squashed_by_hand(nets.agent, batch.obs, noise[2])
        return (LAM * logp - torch.stack(q_by_hand(nets.critic, batch.obs, action)).amin(0)).mean()
    if method_id.startswith("cfpi"):
        return mixture_by_hand(nets, batch)
    if method_id == "mcep/awac":
        drawn = squashed_by_hand(nets.agent, batch.obs, noise[2])[0]
        adv = torch.minimum(*q_by_hand(nets.critic, batch.obs, batch.action)) - torch.minimum(*q_by_hand(nets.critic, batch.obs, drawn))
        return -(adv.exp().clamp(max=1000.0).detach() * squashed_density_by_hand(nets.agent, batch)).mean()
    params = policy_by_hand(nets.agent, batch.obs)
    action = params.tanh()
    if method_id in ("bc", "filtered-bc"):
        return ((action - batch.action) ** 2).mean()
    if method_id in ("awac", "iql"):
        log_std = nets.policy.log_std
        z = (batch.action - action) / log_std.exp()
        logp = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1)
        if method_id == "iql":
            adv = torch.minimum(*q_by_hand(nets.target, batch.obs, batch.action)) - net_by_hand(nets.value, batch.obs)[:, 0]
        else:
            drawn = (action + log_std.exp() * noise[2]).clamp(-1, 1)
            adv = torch.minimum(*q_by_hand(nets.critic, batch.obs, batch.action)) - torch.minimum(*q_by_hand(nets.critic, batch.obs, drawn))
        return -((3.0 * adv).exp().clamp(max=100.0).detach() * logp).mean()
    q = q_by_hand(nets.critic, batch.obs, action)
    if method_id == "a2pr":
        return guided_by_hand(nets, batch, noise)
    if method_id == "spot":
        return 0.1 * support_by_hand(nets.behaviour, batch.obs, action, noise[-2:]).mean() - q[0].mean() / q[0].abs().mean()
    if method_id in ("td3-bc", "mcep"):
        return -2.5 * q[0].mean() / q[0].abs().mean() + ((action - batch.action) ** 2).mean()
    least = torch.minimum(*q)
    return 0.01 * ((action - batch.action) ** 2).sum(1).mean() - least.mean() / least.abs().mean()


@pytest.mark.parametrize("method_id", OFFLINE)
@pytest.mark.check("value")
def test_losses_equal_the_formulas_written_out(method_id: str) -> None:
    method = tiny(method_id)
    nets, (batch, noise) = made(method).nets, minibatch()
    if nets.critic is not None:
        y = expected_goal(method_id, nets, batch, noise)
        torch.testing.assert_close(nets.goal(batch, noise[0], LAM, noise[3:]), y)
    if method_id.startswith("cfpi"):
        torch.testing.assert_close(nets.critic_loss(batch, y, noise[3:])[0], quantile_loss_by_hand(nets, batch, y, noise))
    elif nets.critic is not None:
        errors = [(q - y).square().mean() for q in q_by_hand(nets.critic, batch.obs, batch.action)]
        expected = sum(errors) * (0.5 if method_id == "iql" else 1.0) + expected_regulariser(method_id, nets, batch, noise)
        torch.testing.assert_close(nets.critic_loss(batch, y, noise[3:])[0], expected)
    adv = None
    if nets.value is not None:
        found, _, adv = nets.value_loss(batch, noise[1], LAM)
        torch.testing.assert_close(found, expected_value_loss(method_id, nets, batch, noise))
    torch.testing.assert_close(nets.actor_loss(batch, noise[2], LAM, adv, noise[-2:])[0], expected_actor(method_id, nets, batch, noise))


def test_the_evaluation_policy_has_its_own_weights_and_constraint() -> None:
    nets, (batch, noise) = made(tiny("mcep")).nets, minibatch()
    action = policy_by_hand(nets.deployed, batch.obs).tanh()
    q = q_by_hand(nets.critic, batch.obs, action)[0]
    expected = -10.0 * q.mean() / q.abs().mean() + ((action - batch.action) ** 2).mean()
    torch.testing.assert_close(nets.evaluation_loss(batch, noise[2])[0], expected)
    assert nets.evaluation is nets.deployed.net["policy"] is not nets.policy
    nets = made(tiny("mcep/awac")).nets
    q = sum(q_by_hand(nets.critic, batch.obs, squashed_by_hand(nets.deployed, batch.obs, noise[2])[0])) / 2
    expected = (-q - 0.6 * squashed_density_by_hand(nets.deployed, batch)).mean()
    torch.testing.assert_close(nets.evaluation_loss(batch, noise[2])[0], expected)
    assert nets.evaluation is nets.deployed.net["policy"] is not nets.policy


def test_clones_of_stochastic_policies_maximise_the_likelihood_of_the_box() -> None:
    """-log pi of tanh(u): the normal's density of u = atanh(a) over the slope 1 - a^2, by hand; actions at the border stay finite."""
    nets, (batch, noise) = made(tiny("bc", policy=Squashed((8,), "tanh"))).nets, minibatch()
    torch.testing.assert_close(nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0], -squashed_density_by_hand(nets.agent, batch).mean())
    batch.action = torch.ones_like(batch.action)
    assert math.isfinite(nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0].item())
