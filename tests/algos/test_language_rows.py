"""Every row of the language table on enumerable trees: value by hand, gradients, parent limits, invariances, resume, bad input."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.agents.records import Rollout
from markovia.algos.advantages import GroupNormalised, LeaveOneOut, MovingBaseline, group_normalised
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.filters import AccuracyBand
from markovia.algos.on_policy.language import LANGUAGE
from markovia.algos.on_policy.loss import policy_loss, sequence_ratio, value_error, weights
from markovia.algos.on_policy.method import OnPolicy, ValueLoss
from markovia.algos.on_policy.rewards import Scaled, SoftOverlong, overlong
from markovia.algos.on_policy.schedules import DownThenUp, Steady, down_then_up
from markovia.algos.on_policy.surrogates import Clip, PolicyGradient, Regress
from markovia.algos.on_policy.tokens import partner_ratio
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


def shake(agent: Any, size: float = 0.3, seed: int = 4) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=F64))


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
    driver = OnPolicyDriver(method, agent, collector, seed, compile, others(method, collector))
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


# -- the table -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ROWS)
def test_row_is_whole(method_id: str) -> None:
    row = LANGUAGE[method_id]
    assert row.claim and row.new and re.fullmatch(r"\d{4}\.\d{5}", row.paper) and row.parent is not None and find(row.parent)
    texts = []
    for where in row.functions:
        module, _, name = where.partition(":")
        texts.append(getattr(importlib.import_module(module), name).__doc__)
    assert all(texts) and any(row.paper in text or re.search(r"=|max\(|/ ", text) for text in texts)
    assert set(VALUES) >= {method_id} and set(LIMITS) >= {method_id} and set(BAD) >= {method_id}


# -- 1: values by hand ---------------------------------------------------------------------------------------------------------------------


def value_grpo() -> None:
    # rewards 1, 0, 0, 1 of one prompt and 2, 4 of another: means .5 and 3, std (n - 1) = sqrt(1/3) and sqrt 2
    adv = group_normalised(t(1, 0, 0, 1, 2, 4), torch.tensor([5, 5, 5, 5, 1, 1]), scale="group", eps=0.0)
    a, b = 0.5 * math.sqrt(3), 1 / math.sqrt(2)
    assert adv.tolist() == pytest.approx([a, -a, -a, a, -b, b])
    # G = 2: +-1 / (sqrt 2 + 2 eps / |R1 - R2|)
    two = group_normalised(t(3, 1), torch.tensor([0, 0]), scale="group", eps=0.1)
    assert two.tolist() == pytest.approx([1 / (math.sqrt(2) + 0.1), -1 / (math.sqrt(2) + 0.1)])
    # one response of two tokens, rho = 1.5 and 1, A = 2, d = log 2 at the first token: -(1.2 * 2 + 2) / 2 + .04 (.5 + log 2 - 1) / 2
    loss = given_loss(find("grpo").value, [[math.log(1.5), 0.0]], [[2.0, 2.0]], ref=[[math.log(1.5) - math.log(2), 0.0]], beta=0.04)
    assert loss == pytest.approx(-2.2 + 0.04 * (0.5 + math.log(2) - 1) / 2)


def value_dr_grpo() -> None:
    adv = group_normalised(t(1, 0, 0, 0), torch.zeros(4, dtype=torch.long), scale="none", eps=0.0)
    assert adv.tolist() == [0.75, -0.25, -0.25, -0.25]
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert weights(mask, "seq-mean-token-sum-norm", 5)[mask].tolist() == pytest.approx([0.1] * 4)  # 1 / (2 rows x 5)


def value_dapo() -> None:
    # L_max 10, the last 4 tokens: 6 costs nothing, 8 half, 10 all of it
    assert overlong(t(3, 6, 8, 10), max_length=10, buffer=4, penalty=2.0).tolist() == [0.0, 0.0, -1.0, -2.0]
    # groups with means 0, 1/2 and 1: only the middle one tells the responses apart
    keep = AccuracyBand().keep(t(0, 0, 1, 0, 1, 1), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert keep.tolist() == [False, False, True, True, False, False]
    # rho = 1.5, A = 1: clipped at 1.28, not at 1.2
    assert given_loss(find("grpo/dapo").value, [[math.log(1.5)]], [[1.0]]) == pytest.approx(-1.28)


def value_gspo() -> None:
    # rho = 4 and 1 in one response: the geometric mean is 2; A = 1, clip wide: both tokens carry 2
    log_ratio = torch.tensor([[4.0, 1.0]], dtype=F64).log()
    assert sequence_ratio(log_ratio, torch.ones(1, 2, dtype=torch.bool), mean=True).exp()[0].tolist() == pytest.approx([2.0, 2.0])
    wide = dataclasses.replace(find("grpo/gspo").value, surrogate=Clip(5.0))
    assert given_loss(wide, log_ratio.tolist(), [[1.0, 1.0]]) == pytest.approx(-2.0)


def value_remax() -> None:
    # rewards to go of .25 (a penalty) and 1 at the end: 1.25, 1; the greedy response scored .5
    from markovia.algos.advantages import Greedy

    rollout = record([[0.0, 0.0]], [[0.0, 0.0]])
    rollout.columns["greedy"] = t(0.5, 0.5)[None]
    assert Greedy()(t(0.25, 1.0)[None], rollout, {})[0].tolist() == [[0.75, 0.5]]


def value_grpo_d() -> None:
    # low .04, high .1, turn .3: starts at .07, .055 half way down, .04 at the turn, .1 at the end
    found = [down_then_up(p, low=0.04, high=0.1, turn=0.3) for p in (0.0, 0.15, 0.3, 0.65, 1.0)]
    assert found == pytest.approx([0.07, 0.055, 0.04, 0.07, 0.1])


def value_ppo_max() -> None:
    # first batch 1, 2, 6: mean 3, std sqrt(14 / 2) = sqrt 7; second batch 10, clipped: all four mean 4.75, squares 50.75 / 3
    memory: dict[str, Any] = {}
    first = record([[0.0], [0.0], [0.0]], [[0.0]] * 3)
    assert Scaled(2.0)(t(1, 2, 6)[:, None], first, memory)[:, 0].tolist() == pytest.approx([1 / math.sqrt(7), 2 / math.sqrt(7), 2.0])
    assert Scaled(9.0)(t(10)[:, None], record([[0.0]], [[0.0]]), memory)[:, 0].tolist() == pytest.approx([10 / math.sqrt(50.75 / 3)])
    assert value_error(t(3.0), t(0.0), t(1.0), clip=0.2).item() == 4.5


def value_p3o() -> None:
    # two responses, ratios 2 and .5 (tokens 2 * 1 and .5 * 1), A = +-3: -(1/2)(min(6, 3.6) * .5 + min(-1.5, -2.4) * 2) = -(1.8 - 4.8) / 2
    log_ratio = [[math.log(2), 0.0], [math.log(0.5), 0.0]]
    weight = partner_ratio(torch.tensor(log_ratio, dtype=F64), torch.ones(2, 2, dtype=torch.bool))
    assert weight[:, 0].tolist() == pytest.approx([0.5, 2.0])
    loss = given_loss(find("p3o").value, log_ratio, [[3.0, 3.0], [-3.0, -3.0]], weight=weight.tolist())
    assert loss == pytest.approx(1.5)


def value_apa() -> None:
    # lam 2, A = 1, l - b = .2: (.2 - .5)^2
    assert given_loss(dataclasses.replace(find("apa").value, surrogate=Regress(2.0)), [[0.2]], [[1.0]]) == pytest.approx(0.09)


def value_apa_initial() -> None:
    # the same against the initial policy: l - ref = -.1, (-.1 - .5)^2
    method = dataclasses.replace(find("apa/initial").value, surrogate=Regress(2.0, "ref"))
    assert given_loss(method, [[0.2]], [[1.0]], ref=[[0.3]]) == pytest.approx(0.36)


VALUES: dict[str, Callable[[], None]] = {
    "grpo": value_grpo, "grpo/dr-grpo": value_dr_grpo, "grpo/dapo": value_dapo, "grpo/gspo": value_gspo, "remax": value_remax,
    "grpo-d": value_grpo_d, "ppo-max": value_ppo_max, "p3o": value_p3o, "apa": value_apa, "apa/initial": value_apa_initial,
}  # fmt: skip


class Scored:
    """An agent whose log-probabilities are given."""

    def __init__(self, logp: Tensor) -> None:
        self.logp = logp

    def evaluate(self, part: Rollout, want: object) -> Any:
        from markovia.agents.interface import Evaluation

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
        method = dataclasses.replace(method, divergence=None)
    return float(policy_loss(method, Scored(torch.tensor(log_ratio, dtype=F64)), part, omega, ONE, False)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("method_id", ROWS)
def test_value_by_hand(method_id: str) -> None:
    VALUES[method_id]()


# -- 2: gradient ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ROWS)
def test_gradient_of_the_whole_loss_matches_finite_differences(method_id: str) -> None:
    """Of everything that carries gradient, with the columns of the whole minibatch (weights, selections) held."""
    method = dataclasses.replace(small(method_id), filter=None)
    collector = TreeCollector(trees(2), 12, method.group_size, {"budget": [1, 3]})
    driver = made(method, collector)
    rollout, _ = driver._collect()
    driver.advantages(rollout, driver.prepare(rollout))
    shake(driver.agent, 0.2, seed=8)
    update = driver.updates["main"]
    update.begin(rollout)
    part, omega = update._prepared(rollout.rows(update.index))
    if update._surveys:
        part.columns |= update._survey(part)

    def loss() -> Tensor:
        return policy_loss(method, driver.agent, part, omega, ONE, update.joint_value)[0]

    params = update.optimizer.params
    grads = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), params)])
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


# -- 3: limits -----------------------------------------------------------------------------------------------------------------------------


def limit_grpo() -> None:
    # One epoch, no penalty, no scale: G / (G - 1) times it is the leave-one-out gradient (summed, so G - 1 more by length).
    method = small("grpo", divergence=None, advantage={"scale": "none"}, aggregation="seq-mean-token-sum", solver={"epochs": 1})
    rloo = dataclasses.replace(method, advantage=LeaveOneOut(), surrogate=PolicyGradient())
    rollout, G = collect(method), method.group_size
    scaled = dataclasses.replace(rollout, reward=rollout.reward * G / (G - 1))
    start = after_step(override(method, {"solver": {"optimizer": "sgd", "max_grad_norm": 1e9}}), scaled)
    torch.testing.assert_close(start, after_step(override(rloo, {"solver": {"optimizer": "sgd", "max_grad_norm": 1e9}}), rollout), rtol=0, atol=1e-12)


def limit_dr_grpo() -> None:
    # Without the constant it is the plain sum: L_max times the gradient.
    method = small("grpo/dr-grpo", max_length=1)
    same_update(method, dataclasses.replace(method, aggregation="seq-mean-token-sum"))


def limit_dapo() -> None:
    method = dataclasses.replace(small("grpo/dapo"), reward=(SoftOverlong(penalty=0.0),), surrogate=Clip(0.2, 0.2))
    same_update(method, dataclasses.replace(small("grpo", divergence=None), aggregation="token-mean"))


def limit_gspo() -> None:
    # One-token responses: the mean over tokens is the token's own ratio.
    method = small("grpo/gspo")
    short = record([[0.0]] * 12, [[0.0]] * 12)
    short = dataclasses.replace(short, reward=t(*range(12))[:, None] % 5, group=torch.arange(12) // 4, columns={})
    same_update(method, dataclasses.replace(method, ratio_level="token"), short)


def limit_remax() -> None:
    # Where the greedy response earns nothing, no penalty and a reward at the end only: REINFORCE before its first baseline.
    method = small("remax", divergence=None, solver={"epochs": 1})
    rollout = collect(method)
    rollout.columns["greedy"] = torch.zeros_like(rollout.reward)
    same_update(method, dataclasses.replace(method, advantage=MovingBaseline()), rollout, steps=1)


def limit_grpo_d() -> None:
    method = small("grpo-d")
    flat = override(method, {"divergence": {"schedule": {"type": "DownThenUp", "low": 0.07, "high": 0.07}}})
    steady = dataclasses.replace(flat, divergence=KL(0.07, "k3", "loss", schedule=Steady()))
    same_update(flat, steady)


def limit_ppo_max() -> None:
    # Rewards of spread 1 that are not clipped stay as they are.
    method = small("ppo-max", value={"pretrain": 0})
    rollout = collect(method)
    returns = rollout.returns()
    unit = dataclasses.replace(rollout, reward=rollout.reward / returns.std())
    same_update(dataclasses.replace(method, reward=(Scaled(1e9),)), dataclasses.replace(method, reward=()), unit, steps=1)


def limit_p3o() -> None:
    # On-policy the partner's ratio is 1: one step is RLOO's with G = 2.
    method = small("p3o", solver={"epochs": 1, "minibatch": None})
    plain = {"tokens": None, "ratio_level": "token", "surrogate": PolicyGradient(), "aggregation": "seq-mean-token-sum"}
    rloo = dataclasses.replace(method, **plain)  # type: ignore[type-var]
    same_update(method, rloo, steps=1)


def limit_apa() -> None:
    # At the sampling policy the gradient is 2 A / lam: with lam = 2 the policy gradient.
    method = small("apa", surrogate={"lam": 2.0}, solver={"epochs": 1})
    same_update(method, dataclasses.replace(method, surrogate=PolicyGradient()), steps=1)


def limit_apa_initial() -> None:
    # A reference that is the sampling policy: the anchor "old".
    method = small("apa/initial", divergence=None, solver={"epochs": 1})
    collector = TreeCollector(trees(), 12, 1)
    found = []
    for surrogate in (Regress(1.0, "ref"), Regress(1.0, "old")):
        driver = OnPolicyDriver(dataclasses.replace(method, surrogate=surrogate), collector.agent(critic=True), collector, 3)
        driver.step()
        found.append(driver.agent.net["policy"].table.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


LIMITS: dict[str, Callable[[], None]] = {
    "grpo": limit_grpo, "grpo/dr-grpo": limit_dr_grpo, "grpo/dapo": limit_dapo, "grpo/gspo": limit_gspo, "remax": limit_remax,
    "grpo-d": limit_grpo_d, "ppo-max": limit_ppo_max, "p3o": limit_p3o, "apa": limit_apa, "apa/initial": limit_apa_initial,
}  # fmt: skip


@pytest.mark.parametrize("method_id", ROWS)
def test_limit_to_its_parent(method_id: str) -> None:
    LIMITS[method_id]()


# -- 4: invariance -------------------------------------------------------------------------------------------------------------------------


def padded(rollout: Rollout, steps: int = 3) -> Rollout:
    """More steps that do not exist, filled with numbers that would be seen if anything read them."""
    fill = {"action": 1, "logp_old": -math.inf, "reward": 7.0, "continuation": 1.0, "truncated": True, "value": 9.0}

    def wider(x: Tensor, value: Any) -> Tensor:
        return torch.cat([x, torch.full((x.shape[0], steps, *x.shape[2:]), value, dtype=x.dtype)], dim=1)

    columns: dict[str, Any] = {k: wider(getattr(rollout, k), v) for k, v in fill.items() if getattr(rollout, k) is not None}
    columns |= {k: wider(getattr(rollout, k), False) for k in ("valid", "mask")}
    extra = {k: wider(v, float(v[0, 0])) for k, v in rollout.columns.items()}
    return dataclasses.replace(rollout, obs=wider(rollout.obs, 0), columns=extra, **columns)  # type: ignore[arg-type]


def reordered(rollout: Rollout, order: Tensor) -> Rollout:
    told = {"completion_text": [rollout.outcome["completion_text"][i] for i in order.tolist()]}
    told["columns"] = {k: [v[i] for i in order.tolist()] for k, v in rollout.outcome["columns"].items()}
    return dataclasses.replace(rollout.rows(order), outcome=told)


@pytest.mark.parametrize("method_id", ROWS)
def test_order_of_rows_padding_and_micro_batches_change_nothing(method_id: str) -> None:
    method = small(method_id, solver={"optimizer": "sgd"})
    method = dataclasses.replace(method, reward=tuple(override(r, {"max_length": 3}) if isinstance(r, SoftOverlong) else r for r in method.reward))
    if method_id == "clip-cov":  # its random choice belongs to places in the record
        method = override(method, {"tokens": {"rate": 1.0}})
    rollout = collect(method)
    if method_id == "remax":
        rollout.columns["greedy"] = torch.full_like(rollout.reward, 0.4)
    start = after_step(method, rollout)
    order = torch.randperm(rollout.shape[0], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(after_step(method, reordered(rollout, order)), start, rtol=0, atol=1e-10)
    torch.testing.assert_close(after_step(method, padded(rollout)), start, rtol=0, atol=1e-10)
    torch.testing.assert_close(after_step(override(method, {"solver": {"micro": 3}}), rollout), start, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method_id", [m for m in ROWS if not LANGUAGE[m].value.advantage.needs_critic and m not in ("gtpo", "copo")])
def test_a_group_of_equal_rewards_gives_no_gradient(method_id: str) -> None:
    method = dataclasses.replace(small(method_id), reward=(), divergence=None, tokens=None, anchor=None)
    rollout = collect(method)
    rollout = dataclasses.replace(rollout, reward=torch.where(rollout.continuation == 0, 1.0, 0.0).double() * rollout.valid)
    if method_id == "remax":
        rollout.columns["greedy"] = torch.ones_like(rollout.reward)
    if method.group_size == 1 and method_id != "remax":
        pytest.skip("its baseline is not a group's")
    start = made(method, TreeCollector(trees(), 12, method.group_size)).agent
    assert torch.equal(after_step(method, rollout), torch.cat([p.detach().reshape(-1) for p in start.net.parameters()]))


# -- 5: resume, and the compiled step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ROWS)
def test_resume_gives_the_same_bits(method_id: str, tmp_path: Any) -> None:
    method = small(method_id, solver={"minibatch": 4})
    collector = TreeCollector(trees(), 12, method.group_size, {"budget": [1, 2, 3]})
    straight = made(method, collector)
    straight.step(), straight.step()
    save_tensors(tmp_path / "state.safetensors", *straight.state())
    logs = [straight.step() for _ in range(2)]
    resumed = made(method, collector)
    resumed.load_state(*load_tensors(tmp_path / "state.safetensors"))
    again = [resumed.step() for _ in range(2)]
    (a, meta_a), (b, meta_b) = straight.state(), resumed.state()
    assert meta_a == meta_b and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert logs == again or all(x.keys() == y.keys() for x, y in zip(logs, again, strict=True))


@pytest.mark.parametrize("method_id", ROWS)
def test_traced_update_equals_the_eager_one(method_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph_module, **_: graph_module)
    method = small(method_id, solver={"minibatch": 8})
    eager, traced = (made(method, TreeCollector(trees(), 12, method.group_size, {"budget": [1, 2, 3]}), compile=c) for c in (False, True))
    for _ in range(2):
        left, right = eager.step(), traced.step()
        for key in left.keys() | right.keys():
            assert right[key] == pytest.approx(left[key], rel=1e-7, abs=1e-9, nan_ok=True), key
    for p, q in zip(eager.agent.net.parameters(), traced.agent.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


# -- 6: bad input --------------------------------------------------------------------------------------------------------------------------


def alone(method_id: str) -> None:
    """A batch in which every response answers another prompt."""
    method = override(find(method_id).value, {"group_size": 1, "num_envs": 3, "filter": None})
    collector = TreeCollector(trees(), 3, 1)
    OnPolicyDriver(method, collector.agent(), collector).step()


class Bare:
    """A collector that makes no greedy responses."""

    episodes: tuple[float, ...] = ()

    def reset(self, seed: int) -> None:
        return


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "grpo": (lambda: alone("grpo"), "at least 2 responses per prompt.*raise group_size"),
    "grpo/dr-grpo": (lambda: GroupNormalised(scale="std"), "scale must be 'group', 'batch' or 'none'"),
    "grpo/dapo": (lambda: AccuracyBand(low=1.0, high=0.5), "low < high"),
    "grpo/gspo": (lambda: override(find("grpo/gspo").value, {"aggregation": "token-mean"}), "one term per row.*seq-mean-token-mean"),
    "remax": (lambda: OnPolicyDriver(find("remax").value, TreeCollector(trees(), 2).agent(), Bare()), "needs greedy responses.*Bare makes none"),  # type: ignore[arg-type]
    "grpo-d": (lambda: DownThenUp(low=0.2, high=0.1), "0 <= low <= high"),
    "ppo-max": (lambda: ValueLoss(pretrain=2), "give value.separate a Descent"),
    "p3o": (lambda: override(find("p3o").value, {"group_size": 4}), "group_size=2"),
    "apa": (lambda: Regress(lam=0.0), "lam divides the advantage"),
    "apa/initial": (lambda: Regress(lam=-1.0, anchor="ref"), "must be > 0"),
}


@pytest.mark.parametrize("method_id", ROWS)
def test_bad_input_is_told(method_id: str) -> None:
    make, match = BAD[method_id]
    with pytest.raises(ValueError, match=match):
        make()
