"""What the test files of the language table share: small rows on enumerable trees, given records, and updates that are compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from on_policy_pieces import shake
from torch import Tensor

from markovia.agents.interface import Evaluation
from markovia.agents.records import Rollout
from markovia.algos.on_policy.auxiliary import Ptx, Rehearsal
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.language import LANGUAGE
from markovia.algos.on_policy.loss import policy_loss, weights
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.references import Fixed
from markovia.algos.on_policy.rewards import SoftOverlong
from markovia.algos.presets import override
from markovia.algos.systems import find
from markovia.algos.tree_records import TreeCollector
from markovia.envs.exact.token_mdp import EnumerableTokenMDP

torch.set_num_threads(1)
F64 = torch.float64
ONE = torch.ones((), dtype=F64)
ROWS = list(LANGUAGE)


def t(*x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


def trees(n: int = 3, **options: Any) -> list[EnumerableTokenMDP]:
    """Prompts whose responses of 1 to 3 tokens are right or wrong."""
    options = {"reward": "binary", "success": 0.5, "eos": 2, **options}
    return [EnumerableTokenMDP.random(3, 3, seed=k, **options) for k in range(n)]


def small(method_id: str, **changes: Any) -> OnPolicy:
    """The row at a size for tests: 12 responses a batch."""
    method = find(method_id).value
    group = method.group_size if method.group_size == 1 else (2 if method.group_size == 2 else 4)
    base: dict[str, Any] = {"num_envs": 12, "group_size": group, "num_env_steps": 400, "solver": {"lr": 0.05, "epochs": 2, "minibatch": None}}
    if method.aggregation.endswith("norm"):
        base["max_length"] = 3
    if any(isinstance(r, SoftOverlong) for r in method.reward):  # responses of three tokens
        base["reward"] = {"0": {"buffer": 2}}
    if isinstance(method.aux, Rehearsal):  # a response of three tokens or fewer is seldom right each time: solved is more than a half
        base["aux"] = {"threshold": 0.5}
    if method.value.separate is not None:
        base["value"] = {"separate": {"lr": 0.05, "minibatch": None}}
    return override(override(method, base), changes)


def others(method: OnPolicy, collector: TreeCollector) -> dict[str, Any]:
    """The further policies that a method reads: tables of their own."""
    names = [n for n in method.references if n != "ref"] + (["other"] if type(method.refresh).__name__ == "Soup" else [])
    out = {}
    for i, name in enumerate(names):
        out[name] = collector.agent(critic=method.advantage.needs_critic)
        shake(out[name], seed=20 + i)
    return out


def texts(method: OnPolicy, collector: TreeCollector) -> Rollout | None:
    """The texts that a method keeps up the likelihood of: responses of another policy, 5 to each prompt."""
    if not isinstance(method.aux, Ptx):
        return None
    other = collector.agent()
    shake(other, seed=30)
    return collector.presample(other, len(collector.trees), 5, torch.Generator().manual_seed(0))[0]


class Given:
    """A collector that always returns one record."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout, self.episodes, self.greedy = rollout, [], False

    def collect(self, agent: Any, generator: torch.Generator) -> Rollout:
        return dataclasses.replace(self.rollout.map(torch.clone), outcome=self.rollout.outcome)

    def reset(self, seed: int) -> None:
        return

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        return


def made(method: OnPolicy, collector: TreeCollector, seed: int = 3, compile: bool = False) -> OnPolicyDriver:
    """A driver on a shaken agent, whose reference was shaken too, so that both differ from each other."""
    agent = collector.agent(critic=method.advantage.needs_critic)
    driver = OnPolicyDriver(method, agent, collector, seed, compile, others(method, collector), texts(method, collector))
    for ref in driver.references.values():
        shake(ref, seed=9)
    shake(agent)
    return driver


def collect(method: OnPolicy, seed: int = 1) -> Rollout:
    collector = TreeCollector(trees(), 12, method.group_size, {"budget": [1, 2, 3]})
    driver = made(method, collector)
    return collector.collect(driver.agent, torch.Generator().manual_seed(seed))


def after_step(method: OnPolicy, rollout: Rollout, steps: int = 1) -> Tensor:
    """All parameters after iterations on a given record, from one and the same start."""
    method = dataclasses.replace(method, filter=None)
    driver = made(method, TreeCollector(trees(), 12, method.group_size, {"budget": [1, 2, 3]}))
    driver.collector = Given(rollout)
    for _ in range(steps):
        driver.step()
    return torch.cat([p.detach().reshape(-1) for p in driver.agent.net.parameters()])


def same_update(a: OnPolicy, b: OnPolicy, rollout: Rollout | None = None, steps: int = 2) -> None:
    """Two methods give the same parameters on one record (Adam's division does not hide a factor: SGD)."""
    sgd = {"solver": {"optimizer": "sgd", "lr": 0.05, "max_grad_norm": 1e9}}
    if a.value.separate is not None and b.value.separate is not None:
        sgd["value"] = {"separate": {"optimizer": "sgd", "lr": 0.05, "max_grad_norm": 1e9}}
    rollout = collect(a) if rollout is None else rollout
    start = after_step(override(a, sgd), rollout, steps)
    torch.testing.assert_close(start, after_step(override(b, sgd), rollout, steps), rtol=0, atol=1e-10)


def policy_of(method: OnPolicy, rollout: Rollout) -> Tensor:
    """The policy's parameters after an iteration on a record."""
    driver = made(dataclasses.replace(method, filter=None), TreeCollector(trees(), 12, method.group_size))
    driver.collector = Given(rollout)
    driver.step()
    return driver.agent.net["policy"].table.detach()


class Scored:
    """An agent whose log-probabilities are given."""

    def __init__(self, logp: Tensor) -> None:
        self.logp = logp

    def evaluate(self, part: Rollout, want: object) -> Any:
        return Evaluation(logp=self.logp)


def record(log_ratio: list[list[float]], adv: list[list[float]]) -> Rollout:
    """Rows of whole responses, all tokens counted; the sampling policy's log-probs are 0."""
    x = torch.tensor(log_ratio, dtype=F64)
    ones = torch.ones_like(x, dtype=torch.bool)
    ends = torch.ones_like(x)
    ends[:, -1] = 0.0
    columns = {"adv": torch.tensor(adv, dtype=F64)}
    return Rollout(x.long(), x.long(), torch.zeros_like(x), torch.zeros_like(x), ones, ones.clone(), ends, ~ones, columns=columns)


def given_loss(method: OnPolicy, log_ratio: Any, adv: Any, ref: Any = None, beta: float = 0.0, **columns: Any) -> float:
    """The policy's loss of a row of the table at given log-ratios."""
    part = record(log_ratio, adv)
    part.columns |= {k: torch.tensor(v) for k, v in columns.items()}
    part.columns["beta"] = torch.full_like(part.reward, beta)
    if ref is not None:
        part.logp_ref["ref"] = torch.tensor(ref, dtype=F64)
    omega = weights(part.mask, method.aggregation, method.max_length, F64)
    if method.loss_divergence is None or ref is None:
        method = dataclasses.replace(method, divergence=None, refresh=Fixed())
    return float(policy_loss(method, Scored(torch.tensor(log_ratio, dtype=F64)), part, omega, ONE, False)[0])  # type: ignore[arg-type]
