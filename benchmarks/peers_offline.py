"""The other sides of offline comparisons: d3rlpy, and loops in one function each as single-file projects write them.

benchmarks/throughput.py compares speed: d3rlpy and `single_file` take (rows, updates, device) and return updates per second of their second phase;
the first one warms them up. benchmarks/offline_peers.py compares returns. Rows are arrays by name: obs (N, n), action (N, d), reward (N,), next_obs
(N, n), done (N,). Batch 256, networks of 256-256, twin critics.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = dict[str, np.ndarray]
Loop = Callable[[Rows, str], tuple[Callable[[int], Any], nn.Module]]  # (rows, device) -> (what does update number k, the actor)
WARM = 50  # updates of the first phase


def _timed(update: Callable[[int], Any], updates: int) -> float:
    for k in range(WARM):
        update(k)
    began = time.perf_counter()
    for k in range(updates):
        update(k)
    return updates / (time.perf_counter() - began)


def has_d3rlpy() -> bool:
    """Whether d3rlpy is there; it pins an older gymnasium, so install it with --no-deps, and structlog, dataclasses-json, colorama and gym beside."""
    return importlib.util.find_spec("d3rlpy") is not None


def d3rlpy(kind: str, rows: Rows, updates: int, device: str) -> float:
    """Updates per second of d3rlpy's TD3PlusBC or IQL with its defaults, which are batch 256 and 256-256; its own sampling is in it."""
    import d3rlpy as library

    with contextlib.redirect_stdout(io.StringIO()):  # it tells the shapes that it finds
        data = library.dataset.MDPDataset(rows["obs"], rows["action"], rows["reward"], rows["done"])
        algo = getattr(library.algos, f"{kind}Config")().create(device=device)
        algo.build_with_dataset(data)
    return _timed(lambda k: algo.update(data.sample_transition_batch(256)), updates)


def _tensors(rows: Rows, device: str) -> dict[str, Tensor]:
    return {k: torch.as_tensor(v, dtype=torch.float32, device=device) for k, v in rows.items()}


def _net(n_in: int, n_out: int, last: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Linear(n_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, n_out)]
    return nn.Sequential(*layers, *([] if last is None else [last]))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def _follow(target: nn.Module, net: nn.Module) -> None:
    for p, q in zip(target.parameters(), net.parameters(), strict=True):
        p.mul_(0.995).add_(q, alpha=0.005)


def single_file(loop: Loop, rows: Rows, updates: int, device: str) -> float:
    """Updates per second of a loop."""
    return _timed(loop(rows, device)[0], updates)


def td3_bc(rows: Rows, device: str) -> tuple[Callable[[int], Any], nn.Module]:
    """A plain TD3+BC loop: torch modules, one torch.optim.Adam per network, nothing compiled."""
    data = _tensors(rows, device)
    n, d = data["obs"].shape[1], data["action"].shape[1]
    actor, critics = _net(n, d, nn.Tanh()).to(device), [_net(n + d, 1).to(device) for _ in range(2)]
    actor_target, critic_targets = copy.deepcopy(actor), copy.deepcopy(critics)
    optimizers = [torch.optim.Adam(net.parameters(), lr=3e-4) for net in (actor, *critics)]

    def update(k: int) -> None:
        index = torch.randint(len(data["obs"]), (256,), device=device)
        s, a, r, s2, done = (data[name][index] for name in ("obs", "action", "reward", "next_obs", "done"))
        with torch.no_grad():
            a2 = (actor_target(s2) + (0.2 * torch.randn_like(a)).clamp(-0.5, 0.5)).clamp(-1.0, 1.0)
            both = [q(torch.cat([s2, a2], 1)).squeeze(1) for q in critic_targets]
            y = r + 0.99 * (1.0 - done) * torch.minimum(*both)
        losses = [F.mse_loss(q(torch.cat([s, a], 1)).squeeze(1), y) for q in critics]
        for optimizer in optimizers[1:]:
            optimizer.zero_grad()
        (losses[0] + losses[1]).backward()
        for optimizer in optimizers[1:]:
            optimizer.step()
        if k % 2 == 0:
            action = actor(s)
            q = critics[0](torch.cat([s, action], 1))
            _step(optimizers[0], F.mse_loss(action, a) - 2.5 * q.mean() / q.abs().mean().detach())
            for target, net in zip((actor_target, *critic_targets), (actor, *critics), strict=True):
                _follow(target, net)

    return update, actor


def iql(rows: Rows, device: str) -> tuple[Callable[[int], Any], nn.Module]:
    """A plain IQL loop: torch modules, torch.optim.Adam, a cosine schedule on the actor, nothing compiled."""
    data = _tensors(rows, device)
    n, d = data["obs"].shape[1], data["action"].shape[1]
    actor, value, critics = _net(n, d, nn.Tanh()).to(device), _net(n, 1).to(device), [_net(n + d, 1).to(device) for _ in range(2)]
    log_std, targets = nn.Parameter(torch.zeros(d, device=device)), copy.deepcopy(critics)
    actor_optimizer = torch.optim.Adam([*actor.parameters(), log_std], lr=3e-4)
    value_optimizer = torch.optim.Adam(value.parameters(), lr=3e-4)
    critic_optimizer = torch.optim.Adam([p for q in critics for p in q.parameters()], lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(actor_optimizer, 1_000_000)

    def update(k: int) -> None:
        index = torch.randint(len(data["obs"]), (256,), device=device)
        s, a, r, s2, done = (data[name][index] for name in ("obs", "action", "reward", "next_obs", "done"))
        with torch.no_grad():
            following = value(s2).squeeze(1)
            best = torch.minimum(*(q(torch.cat([s, a], 1)).squeeze(1) for q in targets))
        adv = best - value(s).squeeze(1)
        _step(value_optimizer, ((0.7 - (adv < 0).float()).abs() * adv.square()).mean())
        y = r + 0.99 * (1.0 - done) * following
        _step(critic_optimizer, sum(F.mse_loss(q(torch.cat([s, a], 1)).squeeze(1), y) for q in critics) / 2)  # type: ignore[arg-type]
        for target, q in zip(targets, critics, strict=True):
            _follow(target, q)
        dist = torch.distributions.Normal(actor(s), log_std.clamp(-20.0, 2.0).exp())
        weight = (3.0 * adv.detach()).exp().clamp(max=100.0)
        _step(actor_optimizer, -(weight * dist.log_prob(a).sum(1)).mean())
        schedule.step()

    return update, actor
