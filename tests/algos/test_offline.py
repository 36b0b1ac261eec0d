"""Every row of the offline table: values, gradients, limits, invariance, resume, bad input; and how a dataset becomes a source of transitions."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.control import ControlAgent
from markovia.algos.off_policy import losses, regularised
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import (
    Behaviour,
    Clone,
    ClosedForm,
    Conservative,
    Critics,
    Deterministic,
    Diverse,
    Expectile,
    Guided,
    Held,
    InSampleTarget,
    JointBehaviour,
    Mixture,
    SmoothedTarget,
    SoftTarget,
    Squashed,
    Supported,
    Weighted,
)
from markovia.algos.off_policy.update import Update
from markovia.algos.offline.method import Logged, Offline
from markovia.algos.offline.methods import OFFLINE
from markovia.algos.offline.setup import make_agent
from markovia.algos.offline.source import make_source
from markovia.algos.presets import configure, override
from markovia.algos.setup import build
from markovia.algos.systems import find
from markovia.envs.exact.offline import pointmass_data
from markovia.envs.offline.transitions import About, Transitions

torch.set_num_threads(1)
F64 = torch.float64
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
POINT = "markovia/PointMass2D-v0"
DATASET = "fixture:pointmass2d/blend"
ACTIVE = [m for m, row in OFFLINE.items() if row.value.critic is not None]


def tiny(method_id: str, **changes: Any) -> Offline:
    """A row with small smooth networks."""
    method = override(OFFLINE[method_id].value, {"policy": {"hidden": [8], "activation": "tanh"}})
    if method_id.startswith("cfpi"):
        method = override(method, {"critic": {"hidden": [8, 8], "activation": "tanh", "quantiles": 2, "embedding": 3}})
        return dataclasses.replace(override(method, {"policy": {"num": min(method.policy.num, 2)}}), **changes)
    for slot in ("critic", "value", "behaviour"):
        if getattr(method, slot) is not None:
            method = override(method, {slot: {"hidden": [8], "activation": "tanh"}})
    if isinstance(method.regulariser, Conservative):
        method = override(method, {"regulariser": {"num": 2}})
    if isinstance(method.behaviour, Behaviour):
        method = override(method, {"behaviour": {"steps": 6}})
    if method_id.startswith("edac"):
        method = override(method, {"critic": {"num": 3}})
    return dataclasses.replace(method, **changes)


def shake(net: torch.nn.Module, seed: int, size: float = 0.3) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=F64).to(p.dtype))


def made(method: OffPolicy, compile: bool = False) -> Update:
    """Networks in float64, no two of them alike."""
    torch.manual_seed(0)
    agent = make_agent(method, OBS, BOX, normalize_obs=False)
    agent.net.double()
    shake(agent.net, 4)
    nets = ActorCritic(method, agent, 0)
    for i, net in enumerate([nets.critic, nets.target, *nets.reference_policies.values(), nets.value, nets.evaluation, nets.behaviour]):
        if net is not None:
            shake(net, 10 + i)
    return Update(nets, compile)


def minibatch(n: int = 6, seed: int = 0, noises: int = 9) -> tuple[Batch, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=F64)  # noqa: E731
    extra = {"next_action": normal(n, 2).tanh(), "ret": normal(n)}
    continuation = (torch.arange(n) % 3 > 0).to(F64)
    batch = Batch(normal(n, 3), normal(n, 2).tanh(), normal(n), normal(n, 3), continuation, torch.zeros(n, dtype=torch.bool), extra)
    return batch, normal(noises, n, 2)


def everything(update: Update) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in update.nets.parameters()])


LAM = 0.2


def one(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


# -- the table -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", OFFLINE)
def test_row_is_whole(method_id: str) -> None:
    from markovia.claims import CLAIMS

    row = OFFLINE[method_id]
    assert row.id == method_id and row.new and row.claim in CLAIMS and re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert row.parent is None or find(row.parent)
    for where in row.functions:
        module, _, name = where.partition(":")
        assert re.search(r"\d{4}\.\d{5}", getattr(importlib.import_module(module), name).__doc__)
    updates = {"spot": 1_100_000, "cfpi": 500_000, "cfpi/sg": 500_000}
    assert row.value.fixed_data and row.value.num_optimizer_steps == updates.get(method_id, 1_000_000)
    assert configure(method_id, POINT).num_env_steps == 3000


# -- 1: values -----------------------------------------------------------------------------------------------------------------------------


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
    # the decoded action is worth 2 >= 1, then 0 < 3; above V in both rows; a tie goes to the decoded one, and V = 5 is above both
    chosen, gate = regularised.better_action(one(1, 2, 3)[:, None], one(7, 8, 9)[:, None], one(1, 3, 2), one(2, 0, 2), one(2, 1, 5))
    assert chosen[:, 0].tolist() == [7.0, 2.0, 9.0] and gate.tolist() == [1.0, 1.0, 0.0]
    assert regularised.lower_target(one(1, 4), one(2, 3)).tolist() == [1.0, 3.0]
    # mean |Q| = (2 + 4) / 2 = 3: 0.5 * 1 - 3 * 2 / 3 = -1.5 and 0.5 * 2 + 3 * 4 / 3 = 5
    assert regularised.held_objective(one(2, -4), one(1, 2), alpha=3.0, weight=0.5).tolist() == [-1.5, 5.0]


def forward(layers: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        x = x.tanh() if i < len(layers) - 1 else x
    return x


def q_by_hand(critic: Any, obs: torch.Tensor, action: torch.Tensor) -> list[torch.Tensor]:
    """Each member by itself; layer norm as written in the paper where the critics have it."""
    out = []
    for j in range(critic.num):
        x = torch.cat([obs, action], 1)
        for layer in critic.hidden:
            x = x @ layer.weight[j] + layer.bias[j, 0]
            if layer.scale is not None:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
                x = x * layer.scale[j, 0] + layer.shift[j, 0]
            x = x.tanh()
        out.append((x @ critic.head.weight[j] + critic.head.bias[j, 0])[:, 0])
    return out


def net_by_hand(net: Any, obs: torch.Tensor) -> torch.Tensor:
    return forward([(m.weight.T, m.bias) for m in net.modules() if isinstance(m, torch.nn.Linear)], obs)


def quantiles_by_hand(critic: Any, obs: torch.Tensor, action: torch.Tensor, tau: torch.Tensor) -> list[torch.Tensor]:
    """Each member and level by itself, (k, b)."""
    out = []
    for j in range(critic.num):
        dense = lambda x, layer, j=j: x @ layer.weight[j] + layer.bias[j, 0]  # noqa: E731
        x = dense(torch.cat([obs, action], 1), critic.hidden[0]).tanh()
        rows = []
        for level in tau:
            cosines = torch.stack([torch.cos(math.pi * i * level) for i in range(critic.embedding)], 1)
            rows.append(dense(dense(x * dense(cosines, critic.levels).tanh(), critic.merge).tanh(), critic.head)[:, 0])
        out.append(torch.stack(rows))
    return out


def quantile_loss_by_hand(nets: ActorCritic, batch: Batch, y: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Huber's loss of every pair of a predicted and a target quantile, weighted by tau or 1 - tau."""
    tau, total = torch.distributions.Normal(0.0, 1.0).cdf(noise[5:7, :, 0]), torch.zeros((), dtype=F64)
    for z in quantiles_by_hand(nets.critic, batch.obs, batch.action, tau):
        for i in range(2):
            for target in y:
                weight = torch.where(target < z[i], 1 - tau[i], tau[i])
                total = total + (weight * torch.nn.functional.huber_loss(z[i], target, reduction="none")).mean() / 2
    return total


def mixture_by_hand(nets: ActorCritic, batch: Batch) -> torch.Tensor:
    """-log of the mixture's density of atanh(a), over the slope 1 - a^2, from torch's own mixture."""
    m, params = nets.agent.modes, policy_by_hand(nets.agent, batch.obs)  # type: ignore[attr-defined]
    logits, mean, log_std = params[:, :m], params[:, m : 3 * m].reshape(-1, m, 2), params[:, 3 * m :].reshape(-1, m, 2)
    parts = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), parts).log_prob(torch.atanh(batch.action))
    return -(density - torch.log(1 - batch.action**2).sum(1)).mean()


def policy_by_hand(agent: Any, obs: torch.Tensor) -> torch.Tensor:
    return net_by_hand(agent.net["policy"], obs)


def squashed_by_hand(agent: Any, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tanh(mean + std noise) and its log density: the normal's over the slope 1 - a^2."""
    mean, log_std = policy_by_hand(agent, obs).split(2, -1)
    action = (mean + log_std.exp() * noise).tanh()
    return action, (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - torch.log(1 - action**2)).sum(-1)


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
    return 5.0 * total.mean()


def expected_goal(method_id: str, nets: ActorCritic, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """y by the formula of the row's paper."""
    if method_id.startswith("cfpi"):
        tau = torch.distributions.Normal(0.0, 1.0).cdf(noise[3:5, :, 0])
        z = torch.minimum(*quantiles_by_hand(nets.target, batch.next_obs, batch.extra["next_action"], tau))
        return batch.reward + 0.99 * batch.continuation * z
    if method_id == "iql":
        value = net_by_hand(nets.value, batch.next_obs)[:, 0]
    elif method_id == "awac":
        action = (policy_by_hand(nets.agent, batch.next_obs).tanh() + nets.policy.log_std.exp() * noise[0]).clamp(-1, 1)
        value = torch.minimum(*q_by_hand(nets.target, batch.next_obs, action))
    elif method_id in ("cql", "cql/cal-ql", "edac", "edac/sac-n"):
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


def support_by_hand(vae: Any, obs: torch.Tensor, action: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The bound from a likelihood and a divergence of torch.distributions: U = (beta / 2d)(-ELBO - d (log sigma + 0.5 log 2 pi))."""
    mean, log_std = net_by_hand(vae.encode, torch.cat([obs, action], 1)).chunk(2, 1)
    posterior = torch.distributions.Normal(mean, log_std.clamp(-4, 15).exp())
    z = mean + log_std.clamp(-4, 15).exp() * torch.cat([noise[0], noise[1]], 1)
    sigma = (0.5 / 4) ** 0.5
    likelihood = torch.distributions.Normal(net_by_hand(vae.decode, torch.cat([obs, z], 1)).tanh(), sigma).log_prob(action).sum(1)
    elbo = likelihood - torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    return 0.5 / 4 * (-elbo - 2 * (math.log(sigma) + 0.5 * math.log(2 * math.pi)))


def decoded_by_hand(vae: Any, obs: torch.Tensor, action: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    mean, log_std = net_by_hand(vae.encode, torch.cat([obs, action], 1)).chunk(2, 1)
    z = mean + log_std.exp() * torch.cat([noise[0], noise[1]], 1)
    return net_by_hand(vae.decode, torch.cat([obs, z], 1)).tanh()


def guided_by_hand(nets: ActorCritic, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """Row by row: which action guides, and whether it does."""
    action, v = policy_by_hand(nets.agent, batch.obs).tanh(), net_by_hand(nets.value, batch.obs)[:, 0]
    decoded = decoded_by_hand(nets.behaviour, batch.obs, action, noise[-2:])
    own, logged, here = (q_by_hand(nets.critic, batch.obs, a)[0] for a in (decoded, batch.action, action))
    total = torch.zeros((), dtype=F64)
    for i in range(len(v)):
        guide = decoded[i] if own[i] >= logged[i] else batch.action[i]
        if own[i] >= v[i] or logged[i] > v[i]:
            total = total + 0.5 * ((action[i] - guide) ** 2).mean() / len(v)
    return total - 2.5 * here.mean() / here.abs().mean()


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
    nets, (batch, _) = made(tiny("mcep")).nets, minibatch()
    action = policy_by_hand(nets.deployed, batch.obs).tanh()
    q = q_by_hand(nets.critic, batch.obs, action)[0]
    expected = -10.0 * q.mean() / q.abs().mean() + ((action - batch.action) ** 2).mean()
    torch.testing.assert_close(nets.evaluation_loss(batch)[0], expected)
    assert nets.evaluation is nets.deployed.net["policy"] is not nets.policy


def test_clones_of_stochastic_policies_maximise_the_likelihood_of_the_box() -> None:
    """-log pi of tanh(u): the normal's density of u = atanh(a) over the slope 1 - a^2, by hand; actions at the border stay finite."""
    nets, (batch, noise) = made(tiny("bc", policy=Squashed((8,), "tanh"))).nets, minibatch()
    params = policy_by_hand(nets.agent, batch.obs)
    mean, log_std = params[:, :2], params[:, 2:]
    z = (torch.atanh(batch.action) - mean) / log_std.exp()
    logp = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi) - torch.log(1 - batch.action**2)).sum(1)
    torch.testing.assert_close(nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0], -logp.mean())
    batch.action = torch.ones_like(batch.action)
    assert math.isfinite(nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0].item())


# -- 2: gradients --------------------------------------------------------------------------------------------------------------------------


def check_gradient(loss: Any, net: Any) -> None:
    params = list(net.parameters())
    found = torch.autograd.grad(loss(), params)
    for p, grad in zip(params, found, strict=True):
        for i in range(0, p.numel(), max(1, p.numel() // 4)):
            values = []
            for h in (1e-6, -2e-6, 1e-6):  # forward, backward, and back to the start
                with torch.no_grad():
                    p.view(-1)[i] += h
                values.append(loss().item())
            assert float(grad.reshape(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("method_id", OFFLINE)
@pytest.mark.check("gradient")
def test_gradients_match_finite_differences(method_id: str) -> None:
    """The scale of Q is a constant in the gradient, so it is held still here: by hand, with the value that it has at the start."""
    method = tiny(method_id)
    nets, (batch, noise) = made(method).nets, minibatch(4)
    slot = method.actor
    if nets.critic is not None:
        y = nets.goal(batch, noise[0], LAM, noise[3:])
        check_gradient(lambda: nets.critic_loss(batch, y, noise[3:])[0], nets.critic)
    adv = None
    if nets.value is not None:
        check_gradient(lambda: nets.value_loss(batch, noise[1], LAM)[0], nets.value)
        adv = nets.value_loss(batch, noise[1], LAM)[2]
    if isinstance(slot, Weighted) and adv is None:  # the advantage is a constant in the gradient, though its draw moves with the policy
        adv = torch.linspace(-1.0, 1.0, 4, dtype=F64)
    if nets.behaviour is not None:
        check_gradient(lambda: nets.behaviour_loss(batch, noise[-2:])[0], nets.behaviour)
    if not isinstance(slot, Held | Supported | Guided):
        check_gradient(lambda: nets.actor_loss(batch, noise[2], LAM, adv, noise[-2:])[0], nets.policy)
        return

    def action() -> torch.Tensor:
        return policy_by_hand(nets.agent, batch.obs).tanh()

    def q() -> torch.Tensor:
        return nets.one_q(nets.critic, batch.obs, action(), slot.aggregate)

    size = q().detach().abs().mean()

    def loss() -> torch.Tensor:
        if isinstance(slot, Guided):
            return guided_by_hand(nets, batch, noise) + slot.alpha * (q() / q().abs().mean() - q() / size).mean()
        if isinstance(slot, Supported):
            distance = nets.support(batch.obs, action(), noise[-2:])
        else:
            distance = regularised.squared_distance(action(), batch.action, reduce=slot.reduce)
        return (slot.weight * distance - slot.alpha * q() / size).mean()

    check_gradient(loss, nets.policy)
    params = list(nets.policy.parameters())
    found = torch.autograd.grad(nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0], params)
    torch.testing.assert_close(found, torch.autograd.grad(loss(), params), rtol=1e-12, atol=1e-14)


# -- 3: limits -----------------------------------------------------------------------------------------------------------------------------


def loss_and_gradient(nets: ActorCritic, batch: Batch, noise: torch.Tensor) -> list[torch.Tensor]:
    loss = nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0]
    return [loss.detach(), *torch.autograd.grad(loss, list(nets.policy.parameters()))]


@pytest.mark.check("limit", "td3-bc")
def test_td3_bc_without_q_is_bc() -> None:
    batch, noise = minibatch()
    ends = [loss_and_gradient(made(m).nets, batch, noise) for m in (tiny("td3-bc", actor=Held(alpha=0.0)), tiny("bc"))]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.check("limit", "spot")
def test_spot_with_a_gaussian_at_the_logged_action_is_td3_bc(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, noise = minibatch()
    nets = made(override(tiny("spot"), {"actor": {"alpha": 2.5, "weight": 1.0}})).nets
    monkeypatch.setattr(nets, "support", lambda obs, action, latent: (action - batch.action).square().mean(1))
    torch.testing.assert_close(
        loss_and_gradient(nets, batch, noise), loss_and_gradient(made(tiny("td3-bc")).nets, batch, noise), rtol=1e-12, atol=1e-14
    )


@pytest.mark.check("limit", "a2pr")
def test_a2pr_held_by_the_logged_action_alone_is_td3_bc(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decoded action is better, and every state lies below its logged action: candidates {a}, gate 1, weight 1."""
    from markovia.algos.off_policy import actors

    batch, noise = minibatch()
    nets = made(override(tiny("a2pr"), {"actor": {"weight": 1.0}})).nets
    real = actors.better_action
    low = torch.full((6,), -torch.inf, dtype=F64)
    monkeypatch.setattr(actors, "better_action", lambda logged, decoded, q_logged, q_decoded, v: real(logged, decoded, q_logged, low, low))
    torch.testing.assert_close(
        loss_and_gradient(nets, batch, noise), loss_and_gradient(made(tiny("td3-bc")).nets, batch, noise), rtol=1e-12, atol=1e-14
    )


def test_a2pr_models_the_logged_actions_above_its_value() -> None:
    """Reconstruction of those rows alone, KL of all; and a detached target sends no gradient through the model."""
    nets, (batch, noise) = made(tiny("a2pr")).nets, minibatch()
    better = q_by_hand(nets.critic, batch.obs, batch.action)[0] > net_by_hand(nets.value, batch.obs)[:, 0]
    assert 0 < int(better.sum()) < 6
    decoded = decoded_by_hand(nets.behaviour, batch.obs, batch.action, noise[:2])
    mean, log_std = net_by_hand(nets.behaviour.encode, torch.cat([batch.obs, batch.action], 1)).chunk(2, 1)
    divergence = torch.distributions.kl_divergence(torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0))
    expected = (better * ((decoded - batch.action) ** 2).mean(1)).mean() + 0.5 * divergence.mean()
    torch.testing.assert_close(nets.behaviour_loss(batch, noise[:2])[0], expected)
    through, cut = (loss_and_gradient(made(override(tiny("a2pr"), {"actor": {"detach_target": d}})).nets, batch, noise) for d in (False, True))
    assert through[0] == cut[0] and not torch.allclose(through[1], cut[1])


def test_the_evaluation_policy_never_enters_a_target() -> None:
    """With the constraint of the other actor the two stay equal; with any constraint the rest learns what TD3+BC learns, to the bit."""
    ends = {}
    for name, changes in (("td3-bc", {}), ("mcep", {}), ("same", {"evaluation": {"alpha": 2.5}})):
        method = override(tiny("td3-bc" if name == "td3-bc" else "mcep"), changes)
        torch.manual_seed(0)
        agent = ControlAgent.from_spaces(OBS, BOX, critic=False, normalize_obs=False, **method.policy.agent_options())
        agent.net.double()
        ends[name] = Update(ActorCritic(method, agent, 0))
        for i in range(6):
            batch, noise = minibatch(seed=i)
            ends[name](batch, noise, i % 2 == 1)
    parts = [{k: v for k, v in u.nets.state_dict().items() if not k.startswith("evaluation.")} for u in ends.values()]
    assert all(torch.equal(v, part[k]) for part in parts[1:] for k, v in parts[0].items())
    mild, same = ends["mcep"].nets, ends["same"].nets
    assert all(torch.equal(p, q) for p, q in zip(same.evaluation.parameters(), same.policy.parameters(), strict=True))
    assert not torch.equal(mild.evaluation.head.weight, mild.policy.head.weight)


@pytest.mark.check("limit", "rebrac")
def test_rebrac_without_its_penalty_is_td3_bc() -> None:
    """Its loss is TD3+BC's divided by alpha, where its weight is 1 / (alpha |A|) and both read the same Q; no layer norm, no penalty."""
    batch, noise = minibatch()
    plain = override(tiny("rebrac"), {"target": {"penalty": 0.0}, "critic": {"layer_norm": False}})
    rebrac = made(override(plain, {"actor": {"weight": 1 / (2.5 * 2), "aggregate": "first"}})).nets
    td3_bc = made(tiny("td3-bc")).nets
    assert torch.equal(rebrac.goal(batch, noise[0], LAM), td3_bc.goal(batch, noise[0], LAM))
    ours, theirs = (loss_and_gradient(nets, batch, noise) for nets in (rebrac, td3_bc))
    torch.testing.assert_close(ours, [x / 2.5 for x in theirs], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method_id", ["awac", "iql"])
@pytest.mark.check("limit")
def test_regression_without_advantage_is_a_clone(method_id: str) -> None:
    batch, noise = minibatch()
    clone = made(tiny("bc", policy=tiny(method_id).policy)).nets
    weighted = made(override(tiny(method_id), {"actor": {"beta": 0.0}})).nets
    torch.testing.assert_close(*(loss_and_gradient(nets, batch, noise) for nets in (weighted, clone)), rtol=1e-12, atol=1e-14)


@pytest.mark.check("limit", "iql")
def test_a_middle_expectile_is_half_the_squared_error() -> None:
    u = one(-2, 0.5, 3)
    torch.testing.assert_close(regularised.expectile(u, tau=0.5), 0.5 * u**2)


def test_the_deterministic_regression_is_a_weighted_square() -> None:
    nets, (batch, noise) = made(tiny("awac", policy=Deterministic(hidden=(8,), activation="tanh"))).nets, minibatch()
    adv = batch.reward
    error = (policy_by_hand(nets.agent, batch.obs).tanh() - batch.action).square().sum(1)
    torch.testing.assert_close(nets.actor_loss(batch, noise[2], LAM, adv, noise[-2:])[0], ((3 * adv).exp().clamp(max=100) * error).mean())


def critic_losses(method: Offline, batch: Batch, noise: torch.Tensor) -> list[torch.Tensor]:
    nets = made(method).nets
    y = nets.goal(batch, noise[0], LAM)
    loss = nets.critic_loss(batch, y, noise[3:])[0]
    return [y, loss.detach(), *torch.autograd.grad(loss, list(nets.critic.parameters())), *loss_and_gradient(nets, batch, noise)]


def as_sac(method: Offline, **changes: Any) -> OffPolicy:
    """SAC's row with this one's networks."""
    sac = dataclasses.replace(find("sac").value, policy=method.policy, critic=method.critic)
    return override(sac, changes)


@pytest.mark.check("limit", "cql", "edac", "edac/sac-n")
def test_regularisers_of_weight_0_leave_sac() -> None:
    batch, noise = minibatch()
    cql = override(tiny("cql"), {"regulariser": {"alpha": 0.0}})
    sac = as_sac(cql, target={"entropy": False})
    torch.testing.assert_close(critic_losses(cql, batch, noise), critic_losses(sac, batch, noise), rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]
    edac = override(tiny("edac"), {"regulariser": {"eta": 0.0}})
    left, right = (critic_losses(m, batch, noise) for m in (edac, tiny("edac/sac-n")))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)
    twins = override(tiny("edac/sac-n"), {"critic": {"num": 2}})
    torch.testing.assert_close(critic_losses(twins, batch, noise), critic_losses(as_sac(twins), batch, noise), rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]


@pytest.mark.check("limit", "cql/cal-ql")
def test_returns_that_no_value_falls_below_change_nothing() -> None:
    batch, noise = minibatch()
    batch.extra["ret"] = batch.extra["ret"] - 1e6
    left, right = (critic_losses(tiny(m), batch, noise) for m in ("cql", "cql/cal-ql"))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_conservative_critics_send_no_gradient_into_the_policy() -> None:
    nets, (batch, noise) = made(tiny("cql")).nets, minibatch()
    nets.critic_loss(batch, batch.reward, noise[3:])[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in nets.policy.parameters())


def test_without_importance_weights_the_logged_action_joins_the_sum() -> None:
    nets, (batch, noise) = made(override(tiny("cql"), {"regulariser": {"importance": False}})).nets, minibatch()
    candidates = [2 * torch.distributions.Normal(0, 1).cdf(noise[k]) - 1 for k in (3, 4)]
    candidates += [squashed_by_hand(nets.agent, batch.obs if k < 7 else batch.next_obs, noise[k])[0] for k in (5, 6, 7, 8)]
    q = torch.stack([torch.stack(q_by_hand(nets.critic, batch.obs, a)) for a in (*candidates, batch.action)])
    expected = (q.exp().sum(0).log() - q[-1]).sum(0).mean()
    torch.testing.assert_close(nets.critic_loss(batch, batch.reward, noise[3:])[1]["gap"], expected.detach())


@pytest.mark.check("limit", "mcep")
def test_mcep_without_its_evaluation_policy_is_td3_bc() -> None:
    assert dataclasses.replace(tiny("mcep"), evaluation=None) == tiny("td3-bc")
    nets, (batch, noise) = made(override(tiny("mcep"), {"evaluation": {"alpha": 2.5}})).nets, minibatch()
    nets.deployed.net["policy"].load_state_dict(nets.policy.state_dict())  # type: ignore[union-attr]
    torch.testing.assert_close(nets.evaluation_loss(batch)[0], nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0])


@pytest.mark.check("limit", "filtered-bc")
def test_filtered_bc_of_all_episodes_is_bc() -> None:
    assert dataclasses.replace(tiny("filtered-bc"), data=Logged(fraction=1.0)) == tiny("bc")


# -- 4: invariance -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", OFFLINE)
@pytest.mark.check("invariance")
def test_order_and_repetition_of_the_batch_change_nothing(method_id: str) -> None:
    batch, noise = minibatch()
    ends = []
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for index in (torch.arange(6), order, torch.cat([order, order])):
        update = made(tiny(method_id))
        update(batch.map(lambda x, index=index: x[index]), noise[:, index], True)
        ends.append(everything(update))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method_id", ACTIVE)
def test_truncation_bootstraps_and_termination_does_not(method_id: str) -> None:
    nets, (batch, noise) = made(tiny(method_id)).nets, minibatch()
    y = nets.goal(batch, noise[0], LAM, noise[3:])
    ended, reward = batch.continuation == 0, batch.reward.expand_as(y)
    torch.testing.assert_close(y[..., ended], reward[..., ended])
    assert bool((y[..., ~ended] != reward[..., ~ended]).all())
    batch.truncated = ~batch.truncated
    assert torch.equal(nets.goal(batch, noise[0], LAM, noise[3:]), y)


@pytest.mark.parametrize("method_id", ["td3-bc", "rebrac", "mcep", "spot"])  # a2pr compares Q with V, so there it does not
def test_the_scale_of_rewards_drops_out_of_the_actor(method_id: str) -> None:
    """Q multiplied by 7 gives the actor the same loss."""
    batch, noise = minibatch()
    nets = made(tiny(method_id)).nets
    before = loss_and_gradient(nets, batch, noise)
    with torch.no_grad():
        nets.critic.head.weight.mul_(7.0)
        nets.critic.head.bias.mul_(7.0)
    torch.testing.assert_close(loss_and_gradient(nets, batch, noise), before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method_id", OFFLINE)
def test_traced_update_equals_the_eager_one(method_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the compiled update but the compiler, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda graph_module, **_: graph_module)
    eager, traced = made(tiny(method_id)), made(tiny(method_id), compile=True)
    for i in range(4):
        batch, noise = minibatch(seed=i)
        left, right = (u(batch, noise, (i + 1) % eager.nets.method.policy_delay == 0) for u in (eager, traced))
        assert left.keys() == right.keys()
        torch.testing.assert_close([*left.values()], [*right.values()], rtol=1e-9, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(everything(eager), everything(traced), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method_id", ["edac", "cql/cal-ql", "spot"])
def test_compiled_update_agrees_with_the_eager_one(method_id: str) -> None:
    """Gradients of gradients, many actions per state, and a model that is fixed, through the compiler; float64, so only the order of sums differs."""
    method = tiny(method_id, policy_delay=1)
    eager, compiled = made(method), made(method, compile=True)
    for i in range(6):
        batch, noise = minibatch(seed=i)
        for update in (eager, compiled):
            update(batch, noise, True)
    assert compiled.compiled is not None and compiled.compiled.seconds > 0
    torch.testing.assert_close(everything(eager), everything(compiled), rtol=1e-7, atol=1e-9)


# -- 6: bad input --------------------------------------------------------------------------------------------------------------------------


def other(**changes: Any) -> Transitions:
    return dataclasses.replace(pointmass_data("random", episodes=2), about=About("other"), **changes)


def source(data: Transitions, **settings: Any) -> Any:
    agent = ControlAgent.from_spaces(BOX, BOX, critic=False, **Deterministic(hidden=(4,)).agent_options())
    return make_source(data, Logged(**settings), agent, 0.99)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Logged(fraction=0.0), r"data.fraction must lie in \(0, 1\], got 0.0"),
        (lambda: Logged(reward="return_rang"), "did you mean 'return_range'"),
        (lambda: Offline(learning_starts=5), "learning_starts means nothing for a fixed dataset, so it must stay 0, got 5"),
        (lambda: Offline(utd=2.0), "utd means nothing"),
        (lambda: dataclasses.replace(tiny("td3-bc"), target=SmoothedTarget(penalty=0.1)), "set data.next_action=True"),
        (lambda: dataclasses.replace(tiny("td3-bc"), actor=Clone()), "imitation alone.*has no critic"),
        (lambda: dataclasses.replace(tiny("bc"), actor=Held()), "every other actor needs both"),
        (lambda: dataclasses.replace(tiny("td3-bc"), policy=Squashed()), r"needs policy=Deterministic\(\)"),
        (lambda: Held(alpha=-1.0), "actor.alpha and actor.weight must be >= 0"),
        (lambda: dataclasses.replace(tiny("awac"), evaluation=Held()), r"belongs to actor=Held\(\), got Weighted; set evaluation=None"),
        (lambda: Behaviour(beta=0.0), "behaviour.steps must be >= 1 and behaviour.beta > 0"),
        (lambda: Supported(weight=-1.0), "actor.alpha and actor.weight must be >= 0"),
        (lambda: dataclasses.replace(tiny("spot"), behaviour=None), r"set behaviour=Behaviour\(\)"),
        (lambda: JointBehaviour(weight=0.0), "behaviour.weight and behaviour.beta must be > 0, got 0.0 and 0.5"),
        (lambda: Guided(alpha=-1.0), "actor.alpha and actor.weight must be >= 0, got -1.0"),
        (lambda: Mixture(num=0), "policy.num must be >= 1, got 0"),
        (lambda: ClosedForm(log_tau=-1.0), "log_tau >= 0"),
        (lambda: dataclasses.replace(tiny("cfpi"), evaluation=None), r"policy=Mixture\(\) acts by evaluation=ClosedForm\(\)|imitation alone"),
        (lambda: dataclasses.replace(tiny("cfpi"), critic=Critics()), "need each other: set both or neither"),
        (lambda: dataclasses.replace(tiny("cfpi"), regulariser=Diverse()), "quantile critics take no regulariser"),
        (lambda: dataclasses.replace(tiny("cfpi"), target=SoftTarget()), r"set target=LoggedTarget\(\), got SoftTarget"),
        (lambda: dataclasses.replace(tiny("cfpi"), data=Logged()), "reads the next logged action; set data.next_action=True"),
        (lambda: dataclasses.replace(tiny("a2pr"), value=None), "need each other and serve nothing else"),
        (lambda: dataclasses.replace(tiny("a2pr"), target=SoftTarget()), r"set target=SmoothedTarget\(\)"),
        (lambda: Weighted(beta=-1.0), "actor.beta must be >= 0"),
        (lambda: Expectile(tau=1.0), r"value.tau must lie in \(0, 1\), got 1.0"),
        (lambda: dataclasses.replace(tiny("iql"), value=None), r"set target=InSampleTarget\(\) and value=Expectile\(\)"),
        (lambda: dataclasses.replace(tiny("awac"), target=InSampleTarget()), "an expectile value serves InSampleTarget alone"),
        (lambda: Conservative(num=0), "needs alpha >= 0, num >= 1 and temperature > 0, got 5.0, 0 and 1.0"),
        (lambda: Diverse(eta=-1.0), "regulariser.eta must be >= 0"),
        (lambda: dataclasses.replace(tiny("edac"), critic=Critics(num=1)), "critic.num must be >= 2, got 1"),
        (lambda: dataclasses.replace(tiny("bc"), regulariser=Diverse()), "needs critics; set regulariser=None"),
        (lambda: dataclasses.replace(tiny("td3-bc"), regulariser=Conservative()), "which a deterministic policy does not have"),
        (lambda: dataclasses.replace(tiny("cql/cal-ql"), data=Logged()), "set data.returns_to_go to 'zero' or 'repeat_last'"),
        (lambda: build(POINT, tiny("bc")), "an offline method learns control from a dataset: name one .--dataset"),
        (lambda: build(POINT, OffPolicy(), dataset=DATASET), "does not learn from a dataset; choose an offline method such as td3-bc"),
        (lambda: build("CartPole-v1", tiny("bc"), dataset=DATASET), "Discrete"),
        (lambda: build("Pendulum-v1", tiny("bc"), dataset=DATASET), r"blend has observations \{'obs': \(2,\)\}, but the environment gives"),
        (lambda: build(POINT, tiny("bc"), dataset="fixture:nothing"), "unknown fixture 'nothing'"),
        (lambda: source(other(action=np.zeros((80, 3), np.float32))), r"other has actions of shape \(3,\)"),
        (lambda: source(other(action=np.full((80, 2), 1.5, np.float32))), "from 1.5 to 1.5, outside the environment's"),
    ],
)
def test_bad_input_is_answered(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
