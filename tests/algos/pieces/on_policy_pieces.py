"""What the test files of the on-policy rows share: small rows on the token tree, given records, and updates that are compared."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.agents.records import Rollout
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.loss import policy_loss, weights
from markovia.algos.on_policy.method import Descent, OnPolicy
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.natural import flatten
from markovia.algos.presets import configure, override
from markovia.algos.setup import Setup, build

torch.set_num_threads(1)
F64 = torch.float64
TREE = "markovia/TokenTree-v0"
SMALL = {"num_envs": 8, "num_steps": 2, "num_env_steps": 200}
FIRST_ORDER = [k for k, row in ON_POLICY.items() if isinstance(row.value.solver, Descent)]


def tree(method_id: str, dtype: str = "float64", **changes: Any) -> tuple[OnPolicy, Setup]:
    """A method on the tree of 3 tokens and 2 steps, whose rows are whole episodes."""
    method = override(configure(method_id, TREE), {**SMALL, **{k: v for k, v in changes.items() if isinstance(v, (int, dict, str))}})
    method = dataclasses.replace(method, **{k: v for k, v in changes.items() if dataclasses.is_dataclass(v)})
    return method, build(TREE, method, 0, {"V": 3, "H": 2}, {"dtype": dtype})


class Given:
    """A collector that always returns one record."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout, self.episodes = rollout, []

    def collect(self, agent: Any, generator: torch.Generator) -> Rollout:
        return self.rollout.map(torch.clone)

    def reset(self, seed: int) -> None:
        return

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        return


class Watched:
    """A collector that keeps its last record."""

    def __init__(self, collector: Any) -> None:
        self.inner, self.episodes = collector, collector.episodes

    def collect(self, agent: Any, generator: torch.Generator) -> Rollout:
        self.last = self.inner.collect(agent, generator)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def shake(agent: Any, size: float = 0.3, seed: int = 4) -> None:
    """Move every parameter by a normal of standard deviation `size`."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=F64).to(p.dtype))


def all_params(agent: Any) -> list[torch.Tensor]:
    return [*agent.parameters("policy"), *agent.parameters("value")]


def after_step(method: OnPolicy, rollout: Rollout) -> torch.Tensor:
    """All parameters after one iteration on a given record, from one and the same shaken start."""
    _, setup = tree("a2c")
    agent = setup.agent if method.advantage.needs_critic else tree("rloo")[1].agent
    shake(agent)
    OnPolicyDriver(method, agent, Given(rollout)).step()
    return flatten([p.detach() for p in all_params(agent)])


def record(method: OnPolicy, setup: Setup) -> Rollout:
    """A record of the shaken policy, so that the record and the agents of `after_step` agree."""
    shake(setup.agent)
    return setup.collector.collect(setup.agent, torch.Generator().manual_seed(1))


def check_differences(loss: Callable[[], torch.Tensor], params: Sequence[torch.Tensor]) -> None:
    """The gradient of a float64 loss in every parameter equals central differences, and is not zero."""
    grads = flatten(list(torch.autograd.grad(loss(), params)))
    found = []
    with torch.no_grad():
        for p in params:
            for i in range(p.numel()):
                values = []
                for h in (1e-6, -2e-6, 1e-6):  # forward, backward, and back to the start
                    p.view(-1)[i] += h
                    values.append(loss())
                found.append((values[0] - values[1]) / 2e-6)
    assert float(grads.abs().max()) > 1e-3
    torch.testing.assert_close(grads, torch.stack(found), rtol=1e-5, atol=1e-7)


def check_resume(make: Callable[[], OnPolicyDriver], path: Path) -> list[dict[str, float]]:
    """Two iterations after a checkpoint have the same statistics in the run that wrote it and in one that read it; returns those."""
    whole = make()
    for _ in range(2):
        whole.step()
    whole.boundary()
    save_tensors(path / "state.safetensors", *whole.state())
    expected = [whole.step() for _ in range(2)]
    resumed = make()
    resumed.load_state(*load_tensors(path / "state.safetensors"))
    resumed.boundary()
    assert json.dumps([resumed.step() for _ in range(2)]) == json.dumps(expected)
    for name, tensor in whole.state()[0].items():
        assert torch.equal(tensor, resumed.state()[0][name]), name
    return expected


def check_gradient(driver: OnPolicyDriver) -> None:
    """The gradient of the whole loss, on a record of its own and away from the policy that sampled it, equals central differences."""
    method, agent = driver.method, driver.agent
    rollout = driver.collector.collect(agent, driver.generator("action"))
    driver.advantages(rollout, driver.prepare(rollout))
    shake(agent)
    omega, coef = weights(rollout.mask, method.aggregation).to(F64), torch.tensor(0.7, dtype=F64)
    joint = method.advantage.needs_critic

    def loss() -> torch.Tensor:
        return policy_loss(method, agent, rollout, omega, coef, joint)[0]

    params = all_params(agent) if joint else agent.parameters("policy")
    check_differences(loss, params)


def by_rows(method: OnPolicy, micro: int | None = None, optimizer: str = "sgd") -> OnPolicy:
    """The method with full-batch passes over rows, so that no random order or split enters."""

    def whole(solver: Any) -> Any:
        if not isinstance(solver, Descent):
            return solver
        return dataclasses.replace(solver, unit="row", minibatch=None, micro=micro, optimizer=optimizer, lr=0.05, value_lr=None, epochs=2)

    value = dataclasses.replace(method.value, separate=None if method.value.separate is None else whole(method.value.separate))
    return dataclasses.replace(method, solver=whole(method.solver), value=value)


def padded(rollout: Rollout, steps: int = 3) -> Rollout:
    """More steps that do not exist, filled with numbers that would be seen if anything read them."""
    fill = {"action": 1, "logp_old": -math.inf, "reward": 7.0, "continuation": 1.0, "truncated": True, "value": 9.0, "boot_value": 5.0}

    def wider(x: torch.Tensor, value: Any) -> torch.Tensor:
        return torch.cat([x, torch.full((x.shape[0], steps, *x.shape[2:]), value, dtype=x.dtype)], dim=1)

    columns = {k: wider(getattr(rollout, k), v) for k, v in fill.items() if getattr(rollout, k) is not None}
    false = {k: wider(getattr(rollout, k), False) for k in ("valid", "mask")}
    return dataclasses.replace(rollout, obs=wider(rollout.obs, 0), **columns, **false)  # type: ignore[arg-type]
