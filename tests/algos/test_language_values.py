"""The language table is whole, and every row has a value worked by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from language_pieces import F64, ONE, ROWS, Scored, given_loss, made, record, small, t, trees
from torch import Tensor

from markovia.agents.interface import Evaluation
from markovia.algos.advantages import ConflictAware, Consistency, FrozenQ, Greedy, group_normalised
from markovia.algos.on_policy.auxiliary import Ptx, Rehearsal
from markovia.algos.on_policy.divergence import KL, f_reward, k3, min_p_logp
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.entropy import anchor_pull, nucleus_entropy, peak_mask
from markovia.algos.on_policy.filters import AccuracyBand
from markovia.algos.on_policy.loss import sequence_ratio, value_error, weights
from markovia.algos.on_policy.merging import Merger, Warp, merged
from markovia.algos.on_policy.references import lerp, slerp
from markovia.algos.on_policy.rewards import (
    Matching,
    Scaled,
    SoftOverlong,
    at_most_length,
    exact_length,
    implicit_reward,
    matching_reward,
    overlong,
)
from markovia.algos.on_policy.schedules import AdaptiveKL, Anneal, adaptive, down_then_up
from markovia.algos.on_policy.surrogates import Clip, Regress
from markovia.algos.on_policy.tokens import ClipCov, TopCov, conflict_weights, covariance, damped, entropy_change, joint_weight, partner_ratio
from markovia.algos.systems import find
from markovia.algos.tree_records import TreeCollector
from markovia.envs.exact.token_mdp import EnumerableTokenMDP

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
    # a buffer as long as the responses would punish all of them
    given = record([[0.0] * 4], [[0.0] * 4])
    with pytest.raises(ValueError, match="buffer of 4 tokens is no less than the longest response of 4"):
        SoftOverlong(buffer=4)(given.reward, given, {})
    assert SoftOverlong(buffer=3)(given.reward, given, {})[0].tolist() == [0.0, 0.0, 0.0, -1.0]
    assert torch.equal(SoftOverlong(buffer=4, penalty=0.0)(given.reward, given, {}), given.reward)
    # groups with means 0, 1/2 and 1: only the middle one tells the responses apart
    keep = AccuracyBand().keep(t(0, 0, 1, 0, 1, 1), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert keep.tolist() == [False, False, True, True, False, False]
    # other rewards: those of the first group differ, whatever their mean, those of the second are alike
    group = torch.arange(2).repeat_interleave(4)
    assert AccuracyBand().keep(t(-0.9, -0.5, -0.2, 0.6, 0.1, 0.1, 0.1, 0.1), group).tolist() == [True] * 4 + [False] * 4
    # told what is solved, only that counts: in the first group nothing is, for all that its rewards differ
    solved = torch.tensor([False] * 4 + [True, False, True, True])
    assert AccuracyBand().keep(t(-0.9, -0.5, -0.2, 0.6, 0.1, 0.1, 0.1, 0.1), group, solved).tolist() == [False] * 4 + [True] * 4
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
    # as published: ten times the advantage is regressed on, (.2 - 10)^2; and the critic's error counts whole beside it
    assert given_loss(find("apa").value, [[0.2]], [[1.0]]) == pytest.approx(9.8**2)
    assert find("apa").value.value.coef == 1.0
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
    assert given_loss(find("prorl").value, [[math.log(1.5)]], [[1.0]]) == pytest.approx(-1.4)
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


def test_the_adaptive_weight_follows_the_kl_to_the_divergences_own_reference() -> None:
    schedule = AdaptiveKL(kl_target_nats=1e-3, horizon=12.0)
    method = dataclasses.replace(small("kdrl"), divergence=KL(0.2, "k2", "loss", reference="teacher", schedule=schedule))
    driver = made(method, TreeCollector(trees(), 12, 4))
    found = driver.step()
    assert found["kl_teacher"] > 1.2e-3 and "kl_ref" not in found
    assert driver.beta == pytest.approx(0.2 * 1.2)  # 12 responses, the error cut to .2


def value_ptx() -> None:
    # texts of log-probs -1, -2 and -3 (the fourth token is padding): the mean over tokens is 2; a tenth of it
    part = record([[0.0, 0.0], [0.0, 0.0]], [[0.0] * 2] * 2)
    part.mask = torch.tensor([[True, True], [True, False]])
    assert Ptx(0.1)(Scored(torch.tensor([[-1.0, -2.0], [-3.0, 9.0]], dtype=F64)), part).item() == pytest.approx(0.2)  # type: ignore[arg-type]


def value_dph(f: str) -> Callable[[], None]:
    def check() -> None:
        # d = log 4 - log 2 and 0: u = 2 and 1. JS: 2 log 2 - 3 log 3/2, and f(1) = 0; forward KL: -log 2, and 0
        part = record([[0.0, 0.0], [0.0, 0.0]], [[0.0] * 2] * 2)
        part.logp_old = torch.tensor([[-math.log(4), 0.0], [-1.0, -1.0]], dtype=F64)
        agent = Scored(torch.tensor([[0.0, -math.log(2)], [-0.5, -1.5]], dtype=F64))
        value = {"js": 2 * math.log(2) - 3 * math.log(1.5), "kl_ref_pi": -math.log(2)}[f]
        assert Rehearsal(0.3, f)(agent, part).item() == pytest.approx(0.3 * value / 2)  # type: ignore[arg-type]

    return check


def test_solved_prompts_are_rehearsed_and_left_out() -> None:
    """Three prompts of which the start solves the second: only its responses are stored, with the start's log-probs, and no batch holds it."""
    made_of = [EnumerableTokenMDP.random(3, 2, seed=k) for k in range(3)]
    made_of = [EnumerableTokenMDP(3, 2, m.logits_ref, np.full(m.M, float(k == 1))) for k, m in enumerate(made_of)]
    collector = TreeCollector(made_of, 12, 4)
    method = small("dph-rl", aux={"samples": 3, "threshold": 1.0})
    driver = OnPolicyDriver(method, collector.agent(), collector)
    assert collector.without == {1} and driver.extra is not None and driver.extra.shape[0] == 3
    low, high = collector.offset[1], collector.offset[2]
    assert bool(((driver.extra.obs >= low) & (driver.extra.obs < high)).all())  # type: ignore[operator]
    fresh = collector.agent().evaluate(driver.extra, ("logp",)).logp
    torch.testing.assert_close(torch.where(driver.extra.mask, fresh, 0.0), driver.extra.logp_old)  # type: ignore[arg-type]
    drawn, _ = driver._collect()
    assert not bool(((drawn.obs >= low) & (drawn.obs < high)).any())  # type: ignore[operator]
    assert "aux_loss" in driver.step()
    # none solved: nothing to rehearse, and every prompt is explored
    none = TreeCollector([made_of[0]], 12, 4)
    driver = OnPolicyDriver(method, none.agent(), none)
    assert driver.extra is None and none.without == frozenset() and "aux_loss" not in driver.step()


def value_p3o_joint() -> None:
    # ratios 1.1 and 1/1.1 (tokens log 1.1 and 0), A = 3 and -3: omega = 2 log 1.1 < log 1.5, rho_1 rho_2 = 1: -(3 log 1.1 + 3 log 1.1) / 2
    x = math.log(1.1)
    log_ratio = [[x, 0.0], [-x, 0.0]]
    mask, adv = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[3.0, 3.0], [-3.0, -3.0]], dtype=F64)
    weight = joint_weight(torch.tensor(log_ratio, dtype=F64), adv, mask, clip=0.2)
    assert weight.reshape(-1).tolist() == pytest.approx([1.0] * 4)
    assert given_loss(find("p3o/joint").value, log_ratio, adv.tolist(), weight=weight.tolist()) == pytest.approx(-3 * x)
    # apart by log 1.6 > log (1.2 / .8) in the wanted direction: dropped; against it: kept, with rho_1 rho_2 = 1.6
    far = torch.tensor([[math.log(1.6)], [0.0]], dtype=F64)
    assert joint_weight(far, adv[:, :1], mask[:, :1], clip=0.2).tolist() == [[0.0], [0.0]]
    assert joint_weight(far, -adv[:, :1], mask[:, :1], clip=0.2)[:, 0].tolist() == pytest.approx([1.6, 1.6])


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
    # two runs from (1, 1) end at (3, 1) and (1, 3); a quarter of the way to the point above is the next start
    weights = torch.nn.Parameter(t(1.0, 1.0))
    merger = Merger(Warp(runs=2, rounds=1, eta=0.25), [weights])
    weights.data = t(3.0, 1.0)
    assert not merger.end_of_part(0.4) and merger.end_of_part(0.5) and weights.tolist() == [1.0, 1.0]
    weights.data = t(1.0, 3.0)
    assert merger.end_of_part(1.0) and weights.tolist() == pytest.approx([1 + 0.25 * math.sqrt(2)] * 2)
    # a third run at a right angle is taken in by a third of it: sin 60 of the point between the two others, sin 30 of the third
    (found,) = merged([t(0, 0, 0)], [[t(2, 0, 0)], [t(0, 2, 0)], [t(0, 0, 2)]])
    assert found.tolist() == pytest.approx([math.sqrt(1.5), math.sqrt(1.5), 1.0])


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
    "ppo-max/ptx": value_ptx, "ppo-rlhf/ptx": value_ptx, "dph-rl": value_dph("js"), "dph-rl/forward-kl": value_dph("kl_ref_pi"),
    "p3o/joint": value_p3o_joint, "f-dpg": value_f_dpg, "f-dpg/forward-kl": value_forward_dpg,
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


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("value")
def test_value_by_hand(method_id: str) -> None:
    VALUES[method_id]()
