"""What the test files of the offline table share: small rows, networks in float64, and their outputs written out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from off_policy_pieces import F64, OBS, net_by_hand, policy_by_hand, shake

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import Behaviour, Conservative
from markovia.algos.off_policy.update import Update
from markovia.algos.offline.method import Offline
from markovia.algos.offline.methods import OFFLINE
from markovia.algos.offline.setup import make_agent
from markovia.algos.presets import override
from markovia.algos.systems import find

torch.set_num_threads(1)
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


def made(method: OffPolicy, compile: bool = False) -> Update:
    """Networks in float64, no two of them alike."""
    torch.manual_seed(0)
    agent = make_agent(method, OBS, BOX, normalize_obs=False)
    agent.net.double()
    shake(agent.net)
    nets = ActorCritic(method, agent, 0)
    for i, net in enumerate([nets.critic, nets.target, *nets.reference_policies.values(), nets.value, nets.evaluation, nets.behaviour]):
        if net is not None:
            shake(net, seed=10 + i)
    return Update(nets, compile)


def minibatch(n: int = 6, seed: int = 0, noises: int = 9) -> tuple[Batch, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=F64)  # noqa: E731
    extra = {"next_action": normal(n, 2).tanh(), "ret": normal(n)}
    continuation = (torch.arange(n) % 3 > 0).to(F64)
    batch = Batch(normal(n, 3), normal(n, 2).tanh(), normal(n), normal(n, 3), continuation, torch.zeros(n, dtype=torch.bool), extra)
    return batch, normal(noises, n, 2)


LAM = 0.2


def one(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def dense_by_hand(layer: Any, j: int, x: torch.Tensor) -> torch.Tensor:
    """One member's layer; layer norm as written in the paper where it has one."""
    y = x @ layer.weight[j] + layer.bias[j, 0]
    if layer.scale is None:
        return y
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return y * layer.scale[j, 0] + layer.shift[j, 0]


def q_by_hand(critic: Any, obs: torch.Tensor, action: torch.Tensor) -> list[torch.Tensor]:
    """Each member by itself."""
    out = []
    for j in range(critic.num):
        x = torch.cat([obs, action], 1)
        for layer in critic.hidden:
            x = dense_by_hand(layer, j, x).tanh()
        out.append(dense_by_hand(critic.head, j, x)[:, 0])
    return out


def quantiles_by_hand(critic: Any, obs: torch.Tensor, action: torch.Tensor, tau: torch.Tensor) -> list[torch.Tensor]:
    """Each member and level by itself, (k, b)."""
    out = []
    for j in range(critic.num):
        x = dense_by_hand(critic.hidden[0], j, torch.cat([obs, action], 1)).tanh()
        rows = []
        for level in tau:
            cosines = torch.stack([torch.cos(math.pi * i * level) for i in range(1, critic.embedding + 1)], 1)
            gate = 1 / (1 + (-dense_by_hand(critic.levels, j, cosines)).exp())
            rows.append(dense_by_hand(critic.head, j, dense_by_hand(critic.merge, j, x * gate).tanh())[:, 0])
        out.append(torch.stack(rows))
    return out


def quantile_loss_by_hand(nets: ActorCritic, batch: Batch, y: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Huber's loss of every pair of a predicted and a target quantile of the same member, weighted by tau or 1 - tau."""
    tau, total = torch.distributions.Normal(0.0, 1.0).cdf(noise[5:7, :, 0]), torch.zeros((), dtype=F64)
    for z, own in zip(quantiles_by_hand(nets.critic, batch.obs, batch.action, tau), y, strict=True):
        for i in range(2):
            for target in own:
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


def squashed_by_hand(agent: Any, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tanh(mean + std noise) and its log density: the normal's over the slope 1 - a^2."""
    mean, log_std = policy_by_hand(agent, obs).split(2, -1)
    action = (mean + log_std.exp() * noise).tanh()
    return action, (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - torch.log(1 - action**2)).sum(-1)


def squashed_density_by_hand(agent: Any, batch: Batch) -> torch.Tensor:
    """log pi of logged actions: the normal's at atanh(a), over the slope 1 - a^2."""
    mean, log_std = policy_by_hand(agent, batch.obs).split(2, -1)
    z = (torch.atanh(batch.action) - mean) / log_std.exp()
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi) - torch.log(1 - batch.action**2)).sum(1)


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


def loss_and_gradient(nets: ActorCritic, batch: Batch, noise: torch.Tensor) -> list[torch.Tensor]:
    loss = nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0]
    return [loss.detach(), *torch.autograd.grad(loss, list(nets.policy.parameters()))]


def critic_losses(method: Offline, batch: Batch, noise: torch.Tensor) -> list[torch.Tensor]:
    nets = made(method).nets
    y = nets.goal(batch, noise[0], LAM)
    loss = nets.critic_loss(batch, y, noise[3:])[0]
    return [y, loss.detach(), *torch.autograd.grad(loss, list(nets.critic.parameters())), *loss_and_gradient(nets, batch, noise)]


def as_sac(method: Offline, **changes: Any) -> OffPolicy:
    """SAC's row with this one's networks."""
    sac = dataclasses.replace(find("sac").value, policy=method.policy, critic=method.critic)
    return override(sac, changes)


def half_and_half_equals_a_whole(make: Callable[[], Any], at: int, path: Path) -> None:
    """A driver of two phases that is stopped after `at` of its five iterations and read back ends as one that was not."""
    whole, first, second = (make() for _ in range(3))
    for i in range(5):
        for driver in (whole, first):
            if driver is whole or i < at:
                driver.step()
                driver.boundary()
    save_tensors(path, *first.state())
    second.load_state(*load_tensors(path))
    second.boundary()
    while not second.finished:
        second.step()
        second.boundary()
    assert whole.finished and (second.num_env_steps, second.iteration) == (whole.num_env_steps, whole.iteration)
    left, right = (driver.active.nets.state_dict() for driver in (whole, second))
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
