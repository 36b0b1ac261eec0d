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
from markovia.agents.interface import Evaluation
from markovia.agents.records import Rollout
from markovia.algos.advantages import GAE, ConflictAware, Consistency, FrozenQ, Greedy, GroupNormalised, LeaveOneOut, MovingBaseline, group_normalised
from markovia.algos.on_policy.divergence import KL, FDivergence, f_reward, k3, min_p_logp
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.entropy import EntropyAnchor, anchor_pull, nucleus_entropy, peak_mask
from markovia.algos.on_policy.filters import AccuracyBand
from markovia.algos.on_policy.language import LANGUAGE
from markovia.algos.on_policy.loss import policy_loss, sequence_ratio, value_error, weights
from markovia.algos.on_policy.method import OnPolicy, ValueLoss
from markovia.algos.on_policy.references import EMA, Fixed, HardReset, lerp, slerp
from markovia.algos.on_policy.rewards import (
    ImplicitReward,
    LengthBudget,
    Matching,
    Scaled,
    SoftOverlong,
    at_most_length,
    exact_length,
    implicit_reward,
    matching_reward,
    overlong,
)
from markovia.algos.on_policy.schedules import AdaptiveKL, Anneal, DownThenUp, Steady, adaptive, down_then_up
from markovia.algos.on_policy.surrogates import Clip, PolicyGradient, Regress
from markovia.algos.on_policy.tokens import ClipCov, Steer, TopCov, conflict_weights, covariance, damped, entropy_change, partner_ratio
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


def value_rto() -> None:
    # .05 (-1 + 2) = .05 is clipped to .04; .05 (-1 + 1.5) = .025
    assert implicit_reward(t(-1, -1), t(-2, -1.5), scale=0.05, clip=0.04).tolist() == pytest.approx([0.04, 0.025])


def value_dvpo() -> None:
    # V = .3, .6 and reward 1 at the end: Q = V of the next prefix, and the reward
    rollout = record([[0.0, 0.0]], [[0.0, 0.0]])
    rollout.value = t(0.3, 0.6)[None, :, None]
    q, target = FrozenQ()(t(0, 1)[None], rollout, {})
    assert q.tolist() == [[0.6, 1.0]] and target.tolist() == [[0.6, 1.0]]


def value_gtpo() -> None:
    # 1 2 3 right, 1 5 3 wrong: the first and the last token are shared, each run stops at the middle one; a third response is neutral
    action = torch.tensor([[1, 2, 3], [1, 5, 3], [1, 2, 3]])
    mask, group = torch.ones(3, 3, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    assert conflict_weights(action, t(1, -1, 0), mask, group, boost=2.0)[:2].tolist() == [[2.0, 1.0, 2.0], [0.0, 1.0, 0.0]]
    # 7 1 against 7 9 1: from the start 7 is shared, from the end 1 is; in the second response 9 ends both runs
    action, mask = torch.tensor([[7, 1, 0], [7, 9, 1]]), torch.tensor([[True, True, False], [True, True, True]])
    weight = conflict_weights(action, t(1, -1), mask, group[:2], boost=2.0)
    assert weight[0, :2].tolist() == [2.0, 2.0] and weight[1].tolist() == [0.0, 1.0, 0.0]
    # rewards 1, 0 without shared tokens, entropies .2 and 1 > log 2: A = .5 - .1 * .2, and the uncertain response is left out
    rollout = record([[0.0], [0.0]], [[0.0], [0.0]])
    rollout = dataclasses.replace(rollout, action=torch.tensor([[1], [2]]), columns={"entropy": t(0.2, 1.0)[:, None]})
    assert ConflictAware()(t(1, 0)[:, None], rollout, {})[0][:, 0].tolist() == pytest.approx([0.48, 0.0])


def value_copo() -> None:
    # answers 7, 7 both right: e = 0, Rg = 1; answers 1, 2 one right: e = 1 bit, z = 1/2, Rg = .5 (1 - .5): Ag = +-.375 / (.75 / sqrt 2)
    rollout = record([[0.0]] * 4, [[0.0]] * 4)
    rollout = dataclasses.replace(rollout, group=torch.tensor([0, 0, 1, 1]), outcome={"completion_text": ["7", "7", "1", "2"]})
    adv, _ = Consistency(eps=1e-12)(t(1, 1, 1, 0)[:, None], rollout, {})
    assert adv[2:, 0].tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])
    assert rollout.columns["adv_other"][:, 0].tolist() == pytest.approx([1 / math.sqrt(2)] * 2 + [-1 / math.sqrt(2)] * 2)
    assert rollout.columns["mix"][:, 0].tolist() == pytest.approx([0.0, 0.0, *[1 / (1 + math.exp(-0.5))] * 2])
    # the loss: .5 min(1.5, 1.2) 1 + .5 max(min(-4.5, -3.6), -9) with rho = 1.5, A = 1 and -3
    other = given_loss(find("copo").value, [[math.log(1.5)]], [[1.0]], adv_other=t(-3.0)[None].tolist(), mix=[[0.5]])
    assert other == pytest.approx(-(0.5 * 1.2 - 0.5 * 4.5))


def value_steer() -> None:
    # p = b = 1/4, A = 1, H = 1: 4 * 3/16 * (1 - log 4)
    omega = entropy_change(t(0.25).log(), t(0.25).log(), t(1.0), t(1.0))
    assert omega.item() == pytest.approx(0.75 * (1 - math.log(4)))
    weight = damped(t(-0.2, 0.1, 9.0), torch.tensor([True, True, False]), w_min=0.8)
    assert weight[:2].tolist() == pytest.approx([0.8, math.sqrt(0.8)])
    # dual clip: A = -1, rho = 20: not -20 but -10
    assert given_loss(find("steer").value, [[math.log(20)]], [[-1.0]]) == pytest.approx(10.0)


COV = ([[-1.0, -3.0, -2.0, -2.0]], [[2.0, -2.0, 1.0, -1.0]])  # means -2 and 0: covariances 2, 2, 0, 0


def value_clip_cov() -> None:
    part = record([[0.0] * 4], COV[1])
    logp = torch.tensor(COV[0], dtype=F64)
    assert covariance(logp, part.columns["adv"], part.mask).tolist() == [[2.0, 2.0, 0.0, 0.0]]
    part.logp_old, part.columns["chance"] = logp.clone(), t(0.1, 0.9, 0.5, 0.5)[None]
    # half of 4 tokens may go, but only 2 are candidates; with a quarter the one with the higher chance goes
    for rate, weight in ((0.5, [0.0, 0.0, 1.0, 1.0]), (0.25, [1.0, 0.0, 1.0, 1.0]), (1e-4, [1.0, 0.0, 1.0, 1.0])):
        assert ClipCov(rate)(part, Evaluation(logp=logp), Clip(0.2))["weight"].tolist() == [weight]
    # a token that PPO already clips is no candidate: the second has A < 0 and rho < .8
    part.logp_old = logp + t(0.0, 1.0, 0.0, 0.0)
    assert ClipCov(0.25)(part, Evaluation(logp=logp), Clip(0.2))["weight"].tolist() == [[0.0, 1.0, 1.0, 1.0]]


def value_kl_cov() -> None:
    part = record([[0.0] * 4], COV[1])
    chosen = TopCov(0.5)(part, Evaluation(logp=torch.tensor(COV[0], dtype=F64)), None)["selected"]
    assert chosen.tolist() == [[True, True, False, False]]
    # two tokens with l - l_b = .2 and -.3, A = 1, only the first selected: (-e^.2 + .2 - e^-.3) / 2
    loss = given_loss(find("kl-cov").value, [[0.2, -0.3]], [[1.0, 1.0]], ref=[[0.0, 0.0]], beta=1.0, selected=[[True, False]])
    assert loss == pytest.approx((-math.exp(0.2) + 0.2 - math.exp(-0.3)) / 2)


def value_lp_reg() -> None:
    # .6, .39, .01 with kappa .02: below .012 is noise; .6 / .99 and nothing
    logits = t(0.6, 0.39, 0.01).log().expand(1, 2, 3)
    found = min_p_logp(logits, torch.tensor([[0, 2]]), kappa=0.02)
    assert found.tolist()[0] == pytest.approx([math.log(0.6 / 0.99), -1e4])
    # d loss / d l = -A rho + c (1 - proxy / pi) at a kept token: A = -2, rho = 1.5, proxy / pi = 1.2
    x = torch.tensor(math.log(1.5), dtype=F64, requires_grad=True)
    d = x - (x.detach() + math.log(1.2))
    loss = -Clip(1.0, 9.0)(x, t(-2.0)[0], None, ONE) + k3(d)
    assert torch.autograd.grad(loss, x)[0].item() == pytest.approx(2 * 1.5 + 1 - 1.2)


def value_siren() -> None:
    # .5, .3, .15, .05 with top_p .8: .625 and .375 are left; a first token above top_p is alone
    logits = t(0.5, 0.3, 0.15, 0.05).log().requires_grad_()
    entropy = nucleus_entropy(logits, top_p=0.8 + 1e-9)
    assert entropy.item() == pytest.approx(-(0.625 * math.log(0.625) + 0.375 * math.log(0.375)))
    (grad,) = torch.autograd.grad(entropy, logits)
    assert grad[2:].tolist() == [0.0, 0.0] and abs(float(grad[0])) > 0.01
    assert nucleus_entropy(t(0.9, 0.1).log(), top_p=0.8).item() == 0.0
    # responses with entropies 1, 3 and 2: all places, means 2 and 2; H0 = 1.5: pull 2 (.5) / (2 rows n_i)
    mask = torch.tensor([[True, True], [True, False]])
    pull, mean = anchor_pull(torch.tensor([[1.0, 3.0], [2.0, 9.0]], dtype=F64), mask, t(1.5)[0])
    assert mean == 2.0 and pull.tolist() == [[0.25, 0.25], [0.5, 0.0]]
    assert anchor_pull(t(1.0)[None], mask[:1, :1], t(1.5)[0])[0].item() < 0  # below the anchor it pulls up
    peaks = peak_mask(torch.tensor([[1.0, 3.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]]), quantile=0.5)
    assert peaks.tolist() == [[False, True, False, False]]


def value_prorl() -> None:
    assert given_loss(dataclasses.replace(find("prorl").value, divergence=None), [[math.log(1.5)]], [[1.0]]) == pytest.approx(-1.4)
    method = small("prorl", refresh={"every": 2}, filter=None)
    driver = made(method, TreeCollector(trees(), 12, method.group_size))
    ref, own = driver.references["ref"].net["policy"].table, driver.agent.net["policy"].table  # type: ignore[union-attr]
    driver.step()
    assert not torch.equal(ref, own) and float(driver.updates["main"].optimizer.groups[0].count) == 2.0
    driver.step()
    assert torch.equal(ref, own) and float(driver.updates["main"].optimizer.groups[0].count) == 0.0


def value_difficulty_filter() -> None:
    # means 0, 1/4, 3/4 and 1 of groups of 4: both middle ones are kept, bounds included
    returns = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=F64)
    keep = find("difficulty-filter").value.filter.keep(returns.reshape(-1), torch.arange(4).repeat_interleave(4))
    assert keep.view(4, 4)[:, 0].tolist() == [False, True, True, False]


def value_lcpo() -> None:
    right, n = t(1, 1, 0), t(2000, 2000, 2000)
    assert exact_length(right, t(2000, 3000, 2000), n, rate=3e-4).tolist() == pytest.approx([1.0, 0.7, 0.0])


def value_lcpo_max() -> None:
    # at the budget .5, 500 tokens below .65, a wrong answer nothing; far below it the cap
    found = at_most_length(t(1, 1, 0, 1), t(2000, 1500, 2000, 0), t(2000, 2000, 2000, 2000), rate=3e-4)
    assert found.tolist() == pytest.approx([0.5, 0.65, 0.0, 1.0])


def value_kdrl() -> None:
    # half way from .2 to .002; the loss of one token with d = .5: beta d^2 / 2
    assert Anneal(0.002).after(0.2, 0.2, 0.5, 0.0, 1) == pytest.approx(0.101)
    method = dataclasses.replace(find("kdrl").value, divergence=KL(0.2, "k2", "loss"))
    assert given_loss(method, [[0.0]], [[1.0]], ref=[[-0.5]], beta=0.2) == pytest.approx(-1 + 0.2 * 0.125)


def value_f_div(f: str, alpha: float | None, u: float, expected: float) -> Callable[[], None]:
    return lambda: check_close(f_reward(t(u).log(), f=f, alpha=alpha), expected)


def check_close(found: Tensor, expected: float) -> None:
    assert found.item() == pytest.approx(expected)


def value_kl_controller() -> None:
    # twice the target is clipped to +.2, nine tenths of it is -.1; 64 responses on a horizon of 10,000
    assert adaptive(0.2, 12.0, kl_target_nats=6.0, horizon=1e4, num_samples=64) == pytest.approx(0.2 * (1 + 0.2 * 0.0064))
    assert adaptive(0.2, 5.4, kl_target_nats=6.0, horizon=1e4, num_samples=64) == pytest.approx(0.2 * (1 - 0.1 * 0.0064))


def value_salsa() -> None:
    a, b = t(1.0, 0.0, -1.0), t(0.0, 2.0, 0.5)
    (soup,) = lerp([a], [b], eta=0.25)
    assert soup.tolist() == [0.75, 0.5, -0.625]
    # on logits it is the normalised geometric mean
    mean = a.softmax(-1) ** 0.75 * b.softmax(-1) ** 0.25
    torch.testing.assert_close(soup.softmax(-1), mean / mean.sum())


def value_warp() -> None:
    # task vectors (2, 0) and (0, 2): the half way point keeps the norm, 2 (sin 45, sin 45); parallel vectors: the mean
    start = [t(1.0, 1.0)]
    (found,) = slerp(start, [t(3.0, 1.0)], [t(1.0, 3.0)])
    assert found.tolist() == pytest.approx([1 + math.sqrt(2)] * 2)
    (found,) = slerp(start, [t(3.0, 1.0)], [t(5.0, 1.0)])
    assert found.tolist() == pytest.approx([4.0, 1.0])


def value_f_dpg() -> None:
    # d = 0, R / beta = log 3 and 0, Z = 2: t = 2 / 3 and 2; JS: -log(2t / (1 + t)) = -log .8 and -log 4/3
    reward = matching_reward(t(0, 0), t(math.log(3), 0), torch.tensor(2.0, dtype=F64).log(), beta=1.0, f="js")
    assert reward.tolist() == pytest.approx([-math.log(0.8), -math.log(4 / 3)])
    # Z is estimated as the mean of exp(R / beta - d) over the prompt's responses: 2 here, the same numbers
    rollout = dataclasses.replace(record([[0.0], [0.0]], [[0.0]] * 2), group=torch.zeros(2, dtype=torch.long))
    rollout.logp_ref["ref"] = torch.zeros(2, 1, dtype=F64)
    torch.testing.assert_close(Matching(1.0, "js")(t(math.log(3), 0)[:, None], rollout, {})[:, 0], reward)


def value_forward_dpg() -> None:
    # f' = -1 / t: pays 1 / t = target / policy
    # d = .5, R / beta = .5, log Z = .25: log t = .25
    assert matching_reward(t(0.5), t(1.0), t(0.25), beta=2.0, f="kl_ref_pi").tolist() == pytest.approx([math.exp(-0.25)])


VALUES: dict[str, Callable[[], None]] = {
    "f-dpg": value_f_dpg, "f-dpg/forward-kl": value_forward_dpg,
    "rto": value_rto, "dvpo": value_dvpo, "gtpo": value_gtpo, "copo": value_copo, "steer": value_steer, "clip-cov": value_clip_cov,
    "kl-cov": value_kl_cov, "lp-reg": value_lp_reg, "siren": value_siren, "prorl": value_prorl, "difficulty-filter": value_difficulty_filter,
    "lcpo": value_lcpo, "lcpo/max": value_lcpo_max, "kdrl": value_kdrl, "kl-controller": value_kl_controller, "salsa": value_salsa,
    "warp": value_warp,
    "f-div-reg": value_f_div("js", None, 2.0, math.log(4 / 3)), "f-div-reg/forward-kl": value_f_div("kl_ref_pi", None, 2.0, -0.5),
    "f-div-reg/chi2": value_f_div("chi2", None, 1.5, 1.0), "f-div-reg/hellinger": value_f_div("hellinger", None, 4.0, 0.5),
    "f-div-reg/alpha": value_f_div("alpha", 0.5, 4.0, 1.0), "f-div-reg/tv": value_f_div("tv", None, 2.0, 0.5),
    "grpo": value_grpo, "grpo/dr-grpo": value_dr_grpo, "grpo/dapo": value_dapo, "grpo/gspo": value_gspo, "remax": value_remax,
    "grpo-d": value_grpo_d, "ppo-max": value_ppo_max, "p3o": value_p3o, "apa": value_apa, "apa/initial": value_apa_initial,
}  # fmt: skip


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


def limit_rto() -> None:
    method = small("rto")
    same_update(dataclasses.replace(method, reward=(ImplicitReward(0.0),)), dataclasses.replace(method, reward=()))


def limit_dvpo() -> None:
    # A critic that says 0 everywhere: Q is the reward, as is PPO's TD error.
    method = small("dvpo", value={"pretrain": 0}, divergence=None)
    ppo = dataclasses.replace(method, advantage=GAE(1.0, 0.0))
    rollout = collect(method)
    rollout.value = torch.zeros_like(rollout.value)  # type: ignore[arg-type]
    torch.testing.assert_close(policy_of(method, rollout), policy_of(ppo, rollout), rtol=0, atol=1e-12)


def limit_gtpo() -> None:
    # Certain, of one token, right and wrong never share it: Dr.GRPO's advantage and the policy gradient.
    method = small("gtpo", advantage={"penalty": 0.0, "entropy_limit": 1e9}, solver={"epochs": 1})
    short = record([[0.0]] * 12, [[0.0]] * 12)
    action = torch.tensor([0, 0, 1, 1] * 3)[:, None]
    short = dataclasses.replace(short, action=action, reward=1.0 - action.double(), group=torch.arange(12) // 4, columns={})
    same_update(method, dataclasses.replace(method, advantage=GroupNormalised("none")), short)


def limit_copo() -> None:
    # Where the answers must never agree for the local term to count alone, it is GRPO by tokens.
    method = small("copo", advantage={"centre": -1e9, "eps": 1e-4})
    rollout = collect(method)
    last = (rollout.continuation == 0) & rollout.valid
    rollout = dataclasses.replace(rollout, reward=torch.where(last, torch.arange(12).double()[:, None] % 4, 0.0))  # every group differs
    same_update(method, dataclasses.replace(method, advantage=GroupNormalised()), rollout)


def limit_without(method_id: str, changes: dict[str, Any], **parent: Any) -> Callable[[], None]:
    """The row with `changes` equals itself with slots left empty."""

    def check() -> None:
        method = small(method_id, **changes)
        same_update(method, dataclasses.replace(method, **parent))

    return check


def limit_kl_cov() -> None:
    limit_without("kl-cov", {"divergence": {"beta": 0.0}}, tokens=None, divergence=None)()
    # One step per batch: |l - l_b| has no gradient at 0, the method does nothing.
    method = small("kl-cov", solver={"epochs": 1})
    same_update(method, dataclasses.replace(method, tokens=None, divergence=None), steps=1)


def limit_lp_reg() -> None:
    limit_without("lp-reg", {"divergence": {"beta": 0.0}}, tokens=None, divergence=None)()


def limit_difficulty_filter() -> None:
    # A band that holds every mean changes nothing.
    method = small("difficulty-filter", filter={"low": -1.0, "high": 2.0})
    tables = []
    for m in (method, dataclasses.replace(method, filter=None)):
        driver = made(m, TreeCollector(trees(), 12, method.group_size))
        driver.step()
        tables.append(driver.agent.net["policy"].table.detach())
    assert torch.equal(tables[0], tables[1])


def limit_lcpo() -> None:
    for name in ("lcpo", "lcpo/max"):
        method = small(name)
        free = (LengthBudget("exact", 0.0),) if name == "lcpo" else (LengthBudget("max", 0.0, 1.0),)
        same_update(dataclasses.replace(method, reward=free), dataclasses.replace(method, reward=()))


def limit_kdrl() -> None:
    limit_without("kdrl", {"divergence": {"beta": 0.0, "schedule": {"end": 0.0}}}, divergence=None)()


def limit_f_div() -> None:
    # The generator u log u: f' = 1 + log u, and the 1 is a baseline; so it is rloo with k1 in the reward.
    method = small("f-div-reg")
    same_update(dataclasses.replace(method, divergence=FDivergence(0.3, "kl_pi_ref")), dataclasses.replace(method, divergence=KL(0.3)))


def limit_alpha() -> None:
    method = small("f-div-reg/alpha")
    near, limit = (dataclasses.replace(method, divergence=FDivergence(0.3, *f)) for f in (("alpha", 1.0 - 1e-9), ("kl_ref_pi", None)))
    rollout = collect(method)
    torch.testing.assert_close(after_step(near, rollout), after_step(limit, rollout), rtol=0, atol=1e-6)


def policy_of(method: OnPolicy, rollout: Rollout) -> Tensor:
    """The policy's parameters after an iteration on a record."""
    driver = made(dataclasses.replace(method, filter=None), TreeCollector(trees(), 12, method.group_size))
    driver.collector = Given(rollout)
    driver.step()
    return driver.agent.net["policy"].table.detach()


def limit_f_dpg() -> None:
    # The generator u log u, Z = 1 / e: it is paid R / beta - d, which is REINFORCE with k1 in the reward, in units of beta.
    method = small("f-dpg")
    rollout = collect(method)
    matched = dataclasses.replace(method, reward=(Matching(0.5, "kl_pi_ref", log_z=-1.0),))
    in_units = dataclasses.replace(rollout, reward=rollout.reward / 0.5)
    sgd = {"solver": {"optimizer": "sgd", "lr": 0.05, "max_grad_norm": 1e9}}
    plain = dataclasses.replace(method, reward=(), divergence=KL(1.0))
    torch.testing.assert_close(after_step(override(matched, sgd), rollout), after_step(override(plain, sgd), in_units), rtol=0, atol=1e-12)


LIMITS: dict[str, Callable[[], None]] = {
    "f-dpg": limit_f_dpg, "f-dpg/forward-kl": limit_f_dpg,
    "rto": limit_rto, "dvpo": limit_dvpo, "gtpo": limit_gtpo, "copo": limit_copo, "kl-cov": limit_kl_cov, "lp-reg": limit_lp_reg,
    "steer": limit_without("steer", {"tokens": {"w_min": 1.0}}, tokens=None),
    "clip-cov": limit_without("clip-cov", {"tokens": {"low": 1e9, "high": 1e10}}, tokens=None),
    "siren": limit_without("siren", {"anchor": {"coef": 0.0}}, anchor=None),
    "prorl": limit_without("prorl", {"refresh": {"every": 1000}}, refresh=Fixed()),
    "difficulty-filter": limit_difficulty_filter, "lcpo": limit_lcpo, "lcpo/max": limit_lcpo, "kdrl": limit_kdrl,
    "f-div-reg": limit_f_div, "f-div-reg/alpha": limit_alpha,
    **{m: limit_without(m, {"divergence": {"beta": 0.0}}, divergence=None) for m in ROWS if m.startswith("f-div-reg/") and not m.endswith("alpha")},
    "kl-controller": limit_without("kl-controller", {"divergence": {"schedule": {"horizon": 1e300}}}, divergence=KL(0.2)),
    "salsa": limit_without("salsa", {"refresh": {"share": 1.0}}, refresh=Fixed()),
    "warp": limit_without("warp", {"refresh": {"rate": 0.0}}, refresh=Fixed()),
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
    if isinstance(method.advantage, MovingBaseline) or (method.group_size == 1 and method_id != "remax"):
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


def without_policies(method_id: str) -> None:
    method = find(method_id).value
    collector = TreeCollector(trees(), method.num_envs, method.group_size)
    OnPolicyDriver(method, collector.agent(critic=True), collector)


def without_budget() -> None:
    method = small("lcpo")
    collector = TreeCollector(trees(), 12, method.group_size)
    OnPolicyDriver(method, collector.agent(), collector).step()


def one_prompt() -> None:
    method = small("copo")
    collector = TreeCollector(trees(1), 4, 4)
    OnPolicyDriver(method, collector.agent(), collector).step()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "f-dpg": (lambda: Matching(beta=0.0), "temperature of the target"),
    "f-dpg/forward-kl": (lambda: Matching(f="forward"), "unknown f-divergence"),
    "rto": (lambda: without_policies("rto"), r"policies that were not given, \['dpo'\]"),
    "dvpo": (lambda: OnPolicyDriver(find("dvpo").value, TreeCollector(trees(), 2).agent(), TreeCollector(trees(), 2)), "FrozenQ needs values"),
    "gtpo": (lambda: alone("gtpo"), "at least 2 responses per prompt"),
    "copo": (one_prompt, "at least 2 prompts in a batch"),
    "steer": (lambda: Steer(w_min=0.0), r"weight in \(0, 1\]"),
    "clip-cov": (lambda: ClipCov(low=3.0, high=2.0), "low must be < high"),
    "kl-cov": (lambda: override(find("kl-cov").value, {"divergence": None}), "give one with place='loss'"),
    "lp-reg": (lambda: override(find("lp-reg").value, {"tokens": None}), "'min-p' and the token rule Unlikely need each other"),
    "siren": (lambda: EntropyAnchor(top_p=0.0), r"top_p in \(0, 1\]"),
    "prorl": (lambda: HardReset(every=0), "every must be >= 1"),
    "difficulty-filter": (lambda: AccuracyBand(max_rounds=0), "max_rounds"),
    "lcpo": (without_budget, "column 'budget'"),
    "lcpo/max": (lambda: LengthBudget("least"), "mode must be 'exact' or 'max'"),
    "kdrl": (lambda: without_policies("kdrl"), r"policies that were not given, \['teacher'\]"),
    "f-div-reg": (lambda: FDivergence(f="jss"), "did you mean 'js'"),
    "f-div-reg/alpha": (lambda: FDivergence(f="alpha"), "needs its order"),
    "f-div-reg/forward-kl": (lambda: FDivergence(f="kl_ref_pi", beta=-1.0), "beta must be >= 0"),
    "f-div-reg/chi2": (lambda: FDivergence(f="chi2", clamp=0.0), "clamp"),
    "f-div-reg/hellinger": (lambda: FDivergence(f="hellinger", sampler="reference"), "use place='loss'"),
    "f-div-reg/tv": (lambda: FDivergence(f="tv", alpha=0.5), "has no order"),
    "kl-controller": (lambda: AdaptiveKL(horizon=0.0), "must be > 0"),
    "salsa": (lambda: without_policies("salsa"), r"policies that were not given, \['other'\]"),
    "warp": (lambda: EMA(rate=2.0), r"rate must lie in \[0, 1\]"),
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
