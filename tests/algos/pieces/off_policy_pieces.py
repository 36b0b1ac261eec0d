"""What the test files of the off-policy table share: small rows, and networks in float64 of which no two are alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from markovia.agents.control import ControlAgent
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.methods import OFF_POLICY
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.update import Update
from markovia.algos.presets import override

torch.set_num_threads(1)
F64 = torch.float64
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 4.0], np.float32))
TINY: dict[str, Any] = {"policy": {"hidden": [8], "activation": "tanh"}, "critic": {"hidden": [8, 8], "activation": "tanh"}}
SHORT: dict[str, Any] = {**TINY, "learning_starts": 6, "num_steps": 15, "num_env_steps": 60, "batch_size": 8}


def tiny(method_id: str, **changes: Any) -> OffPolicy:
    """A row with small smooth networks."""
    method = override(OFF_POLICY[method_id].value, TINY)
    if method.value is not None:
        method = override(method, {"value": {"hidden": [8], "activation": "tanh"}})
    return dataclasses.replace(method, **changes)


def make_agent(method: OffPolicy, seed: int = 0) -> ControlAgent:
    torch.manual_seed(seed)
    agent = ControlAgent.from_spaces(OBS, BOX, critic=False, normalize_obs=False, **method.policy.agent_options())
    agent.net.double()
    shake(agent.net)
    return agent


def shake(net: torch.nn.Module, size: float = 0.3, seed: int = 4) -> None:
    """Move every parameter by a normal of standard deviation `size`."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=F64).to(p.dtype))


def made(method: OffPolicy, compile: bool = False) -> Update:
    """Networks in float64, no two of them alike, so that a mix-up of target, old and current ones is seen."""
    nets = ActorCritic(method, make_agent(method), 0)
    for i, net in enumerate([nets.critic, nets.target, *nets.reference_policies.values(), *([] if nets.value is None else [nets.value])]):
        shake(net, 0.2, seed=10 + i)
    return Update(nets, compile)


def minibatch(n: int = 6, seed: int = 0) -> tuple[Batch, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=F64)  # noqa: E731
    ends = torch.arange(n) % 3 == 0
    batch = Batch(normal(n, 3), normal(n, 2).tanh(), normal(n), normal(n, 3), 1.0 - ends.to(F64), torch.arange(n) % 3 == 1)
    return batch, normal(3, n, 2)


def everything(update: Update) -> torch.Tensor:
    """All numbers that an update moves, targets included."""
    return torch.cat([p.detach().reshape(-1) for p in update.nets.parameters()])


def order_and_repetition_change_nothing(make: Callable[[], Update], batch: Batch, noise: torch.Tensor) -> None:
    """One update of each network on the rows as they come, in another order, and on all of them twice."""
    ends = []
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for index in (torch.arange(6), order, torch.cat([order, order])):
        update = make()
        update(batch.map(lambda x, index=index: x[index]), noise[:, index], True)
        ends.append(everything(update))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-10)


def termination_stops_the_target_and_truncation_does_not(nets: ActorCritic, batch: Batch, noise: torch.Tensor, lam: float) -> None:
    y = nets.goal(batch, noise[0], lam, noise[3:])
    ended, reward = batch.continuation == 0, batch.reward.expand_as(y)
    torch.testing.assert_close(y[..., ended], reward[..., ended])
    assert bool((y[..., ~ended] != reward[..., ~ended]).all())
    batch.truncated = ~batch.truncated
    assert torch.equal(nets.goal(batch, noise[0], lam, noise[3:]), y)


Batches = Callable[[int], tuple[Batch, torch.Tensor]]  # seed -> minibatch and noise


def traced_equals_eager(make: Callable[[bool], Update], batches: Batches) -> None:
    """For tests with the fixture `traced_only`; `make` takes whether to compile."""
    eager, traced = make(False), make(True)
    for i in range(6):
        batch, noise = batches(i)
        left, right = (u(batch, noise, (i + 1) % u.nets.method.policy_delay == 0) for u in (eager, traced))
        assert left.keys() == right.keys()
        torch.testing.assert_close([*left.values()], [*right.values()], rtol=1e-9, atol=1e-12, check_dtype=False)
        if "old" in eager.nets.references and i == 2:
            eager.refresh()
            traced.refresh()
    torch.testing.assert_close(everything(eager), everything(traced), rtol=1e-9, atol=1e-12)


def compiled_agrees_with_eager(make: Callable[[bool], Update], batches: Batches, steps: int) -> None:
    """Through the compiler; in float64 only the order of sums differs."""
    eager, compiled = make(False), make(True)
    for i in range(steps):
        batch, noise = batches(i)
        for update in (eager, compiled):
            update(batch, noise, (i + 1) % update.nets.method.policy_delay == 0)
    assert compiled.compiled is not None and compiled.compiled.seconds > 0
    torch.testing.assert_close(everything(eager), everything(compiled), rtol=1e-7, atol=1e-9)


def linear_layers(x: torch.Tensor, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        x = x.tanh() if i < len(layers) - 1 else x
    return x


def net_by_hand(net: torch.nn.Module, obs: torch.Tensor) -> torch.Tensor:
    return linear_layers(obs, [(m.weight.T, m.bias) for m in net.modules() if isinstance(m, torch.nn.Linear)])


def policy_by_hand(agent: Any, obs: torch.Tensor) -> torch.Tensor:
    return net_by_hand(agent.net["policy"], obs)
