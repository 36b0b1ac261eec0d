"""Every row of the preference table: hand-computed value, gradient, parent as a limit, invariances, bad input."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from markovia.agents.records import Views
from markovia.algos.preference.methods import PREFERENCE, Tool
from markovia.algos.preference.scores import NEEDS, TokenScores

torch.set_num_threads(1)
F64 = torch.float64
LOSSES = {k: row for k, row in PREFERENCE.items() if not isinstance(row.value, Tool)}


def phi(z: float) -> float:
    """log(1 + e^-z)."""
    return math.log1p(math.exp(-z))


def sig(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def softmax(*x: float) -> list[float]:
    e = [math.exp(v) for v in x]
    return [v / sum(e) for v in e]


def filled(rows: list[list[float]], value: float = 0.0, T: int = 3) -> torch.Tensor:
    return torch.tensor([[*r, *[value] * (T - len(r))] for r in rows], dtype=F64)


def small() -> tuple[TokenScores, Views]:
    """Row 0 chosen (2 tokens), row 1 rejected (3), row 2 gold (1).

    S = -2, -4, -.5;  mean S = -1, -4/3, -.5;  S_ref = -2.5, -3, -1.1;  S_old = -2.25, -3.75, -.75
    l = .5, -1, .6 (D = 1.5);  l against old = .25, -.25, .25 (D = .5);  mean l = .25, -1/3, .6;  rewards 1, .3, .5
    """
    old = filled([[-1.0, -1.25], [-1.0, -1.75, -1.0], [-0.75]])
    ref = filled([[-1.5, -1.0], [-1.0, -1.0, -1.0], [-1.1]])
    scores = TokenScores(
        filled([[-1.0, -1.0], [-1.0, -2.0, -1.0], [-0.5]]),
        filled([[1, 1], [1, 1, 1], [1]]) > 0,
        {"ref": ref, "old": old, "target": (ref + old) / 2, "proposal": old, "stage0": ref, "stage1": old},
        kl_ref=filled([[0.1, 0.2], [0.05, 0.05, 0.1], [0.3]]),
        collision=filled([[-0.5, -0.5], [-0.5, -1.0, -0.5], [-0.2]]),
        value=torch.tensor([0.3, 0.1, 0.2], dtype=F64),
        mismatched=torch.tensor([0.4, -0.2], dtype=F64),
        progress=0.5,
    )
    views = Views(
        pairs=torch.tensor([[0, 1]]),
        groups=torch.tensor([[0, 1, 2, -1]]),
        gold=torch.tensor([2]),
        unpaired=torch.tensor([0, 1, 2]),
        q=torch.tensor([0.7], dtype=F64),
        score=torch.tensor([1.0, 0.3, 0.5], dtype=F64),
        label=torch.tensor([True, False, True]),
        keep=filled([[1, 1], [1, 0, 1], [1]]) > 0,
        diff=filled([[1, 0], [0, 1, 0], [0]]) > 0,
    )
    return scores, views


def odds(s: float) -> float:
    return s - math.log(1.0 - math.exp(s))


# log odds of the mean log-probs -1 and -4/3
O_W, O_L = odds(-1.0), odds(-4 / 3)
# softmax targets of the rewards 1, .3, .5
Q1, Q01 = softmax(1.0, 0.3, 0.5), softmax(10.0, 3.0, 5.0)
P_EXO = softmax(0.05, -0.1, 0.06)  # .1 l
P_PAIR = softmax(0.05, -0.1)
P_INFO = softmax(0.005, -0.01, 0.006)  # .01 l
# BRAIn: log p = -2.5, -3, -1.1 and log p' = -2.25, -3.75, -.75, so r + log p - log p' = .75, 1.05, .15; logits S - log p' = .25, -.25, .25
Q_BRAIN, P_BRAIN = softmax(0.75, 1.05, 0.15), softmax(0.25, -0.25, 0.25)
LOG2, LOG3, LOG4 = math.log(2.0), math.log(3.0), math.log(4.0)
VALUES: dict[str, list[float]] = {
    "dpo": [phi(0.15)],  # .1 x 1.5
    "dpo/cdpo": [0.9 * phi(0.15) + 0.1 * phi(-0.15)],
    "f-dpo": [phi(0.1 * (math.log(sig(0.5)) - math.log(sig(-1.0))))],
    "f-dpo/forward-kl": [phi(0.1 * (-math.exp(-0.5) + math.exp(1.0)))],
    "f-dpo/alpha": [phi(0.1 * ((1 - math.exp(-0.25)) - (1 - math.exp(0.5))) / 0.5)],
    "squared-po": [phi(0.1 * (0.5 * math.exp(-0.5) + math.exp(1.0)))],  # l e^-l at .5 and at -1
    "slic": [0.0 + 0.1 * 0.5],  # 1 - (-2 + 4) < 0; NLL of gold .5
    "slic/hinge-norm": [1.0 - 0.05 * 1.5],
    "ipo": [(1.5 - 5.0) ** 2],  # 1 / (2 x .1) = 5
    "ipo/online": [0.7 * 3.5**2 + 0.3 * 6.5**2],
    "ipo/ipo-md": [0.7 * 3.5**2 + 0.3 * 6.5**2],
    # -(r - 1/2) S + sum_t a_t x .1 (sum_{u >= t} l_u), per-token l: (.5, 0), (0, -1, 0), (.6)
    "ipo/nash-md": [0.5 * 2 - 0.05, -0.2 * 4 + 0.1 + 0.2, -0.06 * 0.5],
    "simpo": [phi(2.5 * (-1 + 4 / 3) - 1.375)],
    "alpha-po": [phi(2.5 * ((1 - math.exp(0.25)) - (1 - math.exp(1 / 3))) / 0.25 - 0.1)],
    "ln-dpo": [phi(5.0 * (0.25 + 1 / 3))],
    "h-dpo": [phi(0.01 * ((-1.8 + 2.5) - (-3.6 + 3.0)))],
    "mmpo": [sig(2.2 * 0.7) * phi(0.015) + sig(-2.2 * 0.7) * phi(-0.015)],
    "robust-dpo": [(0.9 * phi(0.15) - 0.1 * phi(-0.15)) / 0.8],
    "rdpo-refined": [phi(0.15 - 0.7)],
    "rdpo-refined/soft": [sig(0.7) * phi(0.15) + sig(-0.7) * phi(-0.15)],
    "wpo": [math.exp(-0.5 - 2 / 3) * phi(0.015)],  # mean log pi - log sum pi^2 is -.5 and -2/3
    "mipo": [phi(10 / 3 - 10 * math.log1p(math.exp(-0.25)))],  # K = -1.25 + 1
    "modpo": [phi((0.15 - 0.5 * (0.2 - 1.0)) / 0.5)],
    # D against stage1 .5; R_1 = .1 (log stage1 - log stage0) = .025, -.075
    "spo-seq": [phi(0.1 * 0.5 - (0.025 + 0.075))],
    "iopo": [phi(0.1 * (0.5 + 0.6 + 1.0 + 1.0))],
    "orpo": [0.1 * phi(O_W - O_L) + 1.0],
    "orpo/beta": [phi(O_W - O_L)],
    "asft": [1.0 - math.log(1 - math.exp(-4 / 3)) + 1.0],  # the sigmoid of the log odds is the probability
    "asft/beta": [1.0 - math.log(1 - math.exp(-4 / 3))],
    "rpo": [phi(0.015) + 5e-5 * 2.0],
    "tpo": [phi(0.01 * 2.0) + 0.5],
    "tpo/length": [phi(0.01 / 3 - 0.5) + 0.5],
    "wrpo": [phi(0.01 * (0.05 * 0.6 + 0.95 * 0.5 + 1.0))],  # half way to a = .1
    "vpo": [phi(0.15) - 0.01 * 0.5],
    "vpo/online": [phi(0.15) + 0.01 * 0.6],
    "sam-po": [phi(0.1 * 0.5)],  # the kept tokens of row 1 have log-ratio 0
    "tdpo": [phi(0.1 * (1.5 + 0.5 * (0.3 - 0.2)))],
    "tdpo/tdpo1": [phi(0.1 * (1.5 + 0.3 - 0.2))],
    "bmc": [phi(0.01 * (2.5 * 0.5 + 2.5 * 1.0))],  # 1 + min(e, 1.5) and 1 + min(e^2, 1.5) on the differing tokens
    "exo": [sum(p * math.log(p / q) for p, q in zip(P_EXO, Q1, strict=True))],
    "exo/pair": [P_PAIR[0] * math.log(P_PAIR[0] / 0.999) + P_PAIR[1] * math.log(P_PAIR[1] / 0.001)],
    "nca": [sum(q * phi(m) + phi(-m) / 3 for q, m in zip(Q01, (0.005, -0.01, 0.006), strict=True))],
    "nca/pair": [phi(0.005) + 0.5 * phi(-0.005) + 0.5 * phi(0.01)],
    "nca/info-nca": [-sum(q * math.log(p) for q, p in zip(Q01, P_INFO, strict=True))],
    "brain": [-sum(q * math.log(p) for q, p in zip(Q_BRAIN, P_BRAIN, strict=True))],
    # .05 l = .025, -.05, .03: ranks 2, 3, 1; pairs 0 > 1, 0 > 2, 2 > 1
    "lipo": [
        (2 - 2**0.3) * (1 / LOG3 - 1 / LOG4) * phi(0.075)
        + (2 - 2**0.5) * (1 / LOG2 - 1 / LOG3) * phi(-0.005)
        + (2**0.5 - 2**0.3) * (1 / LOG2 - 1 / LOG4) * phi(0.08)
    ],
    # order 0, 2, 1; gaps .5, .7 then .2; (K - 1)^2 x .05 x 2
    "pro": [
        -math.log(softmax(-0.7, -0.5 * 0.5, -0.7 * 4 / 3)[0]) - math.log(softmax(-0.2 * 0.5, -0.2 * 4 / 3)[0]) + 0.05 * 4 * 2.0
    ],
    "kto": [sig(-0.1 * 0.4), sig(-0.1 * 1.1), sig(-0.1 * 0.5)],  # z0 = .1
    "aot": [phi(0.015)],
    "aot/unpaired": [phi(0.01 * (0.55 + 1.0))],  # one negative, so the positives' median .55
    "dro": [0.2**2, 1.2**2, 0.3**2],  # tau 1: twice half the square of r - V - l = .2, 1.2, -.3
    "sft-bridge": [-(r - r * r / 4) for r in (0.05, -0.1, 0.06)],
    "sft-bridge/sft": [-0.05, 0.1, -0.06],
    "sft-bridge/kl": [math.exp(-r) - 1 for r in (0.05, -0.1, 0.06)],
    "sft-bridge/js": [-math.log(2 - math.exp(-r)) for r in (0.05, -0.1, 0.06)],
    "sft-bridge/hellinger": [-r / (1 + r) for r in (0.05, -0.1, 0.06)],
    "copg": [(0.5 * 1.5 - 0.7) ** 2],
    "rebel": [(0.5 - ((1 - 0.05 * 0.25) - (0.3 + 0.05 * 0.75))) ** 2],  # log old/ref = .25, -.75
    "irepo": [(0.05 - math.log(0.7 / 0.3)) ** 2],
    "sppo": [0.5 * ((0.25 - 500) ** 2 + (-0.25 + 200) ** 2)],  # 1000 (1 - 1/2) and 1000 (.3 - 1/2)
    "sppo/hard": [0.5 * ((0.25 - 500) ** 2 + (-0.25 + 500) ** 2)],
    "inpo": [(1.5 / 3 + 2 * 0.5 / 3 - 1 / 0.015) ** 2],
    # win rates less the mean of the others: .6, -.45, -.15; per token l = (.5, 0), (0, -1, 0), (.6) and against the target (.25, .125),
    # (0, -.625, 0), (.425); prices .1 and .5 of them (.175, .0625), (0, -.4125, 0), (.2725); rows count e^(.25), e^(-.25), e^(.25)
    "nash-mp": [(math.exp(0.25) * (1.2 - 0.2375 - 0.0625) + math.exp(-0.25) * (-1.8 + 0.4125 + 0.825) + math.exp(0.25) * (-0.075 - 0.13625)) / 3],
    "spac": [10 * phi(0.25) + 0.5 * 20 * math.tanh(0.25 / 20)],  # the data terms of +-.25 cancel
    "tr-dpo": [phi(0.05 * 1.5)],
    "tr-dpo/hard": [phi(0.05 * 1.5)],
    "sdpo-stepwise": [phi(0.15)],
    "apo-accelerated": [phi(0.15)],
}


@pytest.mark.parametrize("method_id", LOSSES)
@pytest.mark.check("value")
def test_value(method_id: str, fitting: Any) -> None:
    found = LOSSES[method_id].value(*fitting(method_id, *small()))
    torch.testing.assert_close(found, torch.tensor(VALUES[method_id], dtype=F64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method_id", LOSSES)
def test_what_a_row_needs_are_columns_that_there_are(method_id: str) -> None:
    assert all(n in NEEDS or n.startswith("logp_ref.") for n in LOSSES[method_id].value.needs)


# -- gradient ------------------------------------------------------------------------------------------------------------------------------

B, T = 12, 4


def with_leaves(scores: TokenScores, logp: torch.Tensor, kl_ref: torch.Tensor, value: torch.Tensor) -> TokenScores:
    return dataclasses.replace(scores, logp=logp, kl_ref=kl_ref, value=value)


Held = Callable[[TokenScores, Views, TokenScores], torch.Tensor]


def sums(x: torch.Tensor, scores: TokenScores) -> torch.Tensor:
    return (x * scores.mask).sum(1)


def d(x: torch.Tensor, views: Views) -> torch.Tensor:
    return x[views.pairs[:, 0]] - x[views.pairs[:, 1]]


def held_wpo(s: TokenScores, v: Views, at: TokenScores) -> torch.Tensor:
    per_row = torch.exp(sums(at.logp - at.collision, at) / at.mask.sum(1))
    w = torch.clamp(per_row[v.pairs[:, 0]] * per_row[v.pairs[:, 1]], max=1.0)
    return w * F.softplus(-0.01 * d(sums(s.logp - s.logp_ref["ref"], s), v))


def held_bmc(s: TokenScores, v: Views, at: TokenScores) -> torch.Tensor:
    w = torch.where(v.diff, 1 + torch.minimum(1 / at.logp.exp(), torch.tensor(1.5, dtype=F64)), 1.0)
    return F.softplus(-0.01 * d(sums(w * (s.logp - s.logp_ref["ref"]), s), v))


def held_tdpo(s: TokenScores, v: Views, at: TokenScores) -> torch.Tensor:
    chosen, rejected = sums(at.kl_ref, at)[v.pairs[:, 0]], sums(s.kl_ref, s)[v.pairs[:, 1]]
    return F.softplus(-0.1 * (d(sums(s.logp - s.logp_ref["ref"], s), v) + 0.5 * (chosen - rejected)))


def held_dro(s: TokenScores, v: Views, at: TokenScores) -> torch.Tensor:
    l, l0 = (sums(x.logp - s.logp_ref["ref"], s) for x in (s, at))
    return 0.5 * (v.score - at.value - l) ** 2 + 0.5 * (v.score - s.value - l0) ** 2


def held_self_play(s: TokenScores, v: Views, at: TokenScores, price: dict[str, float], adv: torch.Tensor) -> torch.Tensor:
    total = -adv * sums(s.logp, s)
    for name, c in price.items():
        l = (at.logp - at.logp_ref[name]) * at.mask
        for t in range(T):
            total = total + c * l[:, t:].sum(1) * (s.logp * s.mask)[:, t]
    return total


def held_nash_mp(s: TokenScores, v: Views, at: TokenScores) -> torch.Tensor:
    out = []
    for group in v.groups.tolist():
        rows = [i for i in group if i >= 0]
        adv = torch.zeros(B, dtype=F64)
        for i in rows:
            adv[i] = v.score[i] - sum(v.score[j] for j in rows if j != i) / (len(rows) - 1)
        ratio = sums(at.logp - at.logp_ref["old"], s).exp().clamp(max=10.0)
        out.append((ratio * held_self_play(s, v, at, {"ref": 0.1, "target": 0.5}, adv))[rows].mean())
    return torch.stack(out)


# Where part of a loss is held fixed in the gradient, the same loss written out with that part a constant.
HELD: dict[str, Held] = {
    "wpo": held_wpo, "bmc": held_bmc, "tdpo": held_tdpo, "dro": held_dro, "nash-mp": held_nash_mp,
    "ipo/nash-md": lambda s, v, at: held_self_play(s, v, at, {"ref": 0.1}, v.score - 0.5),
}  # fmt: skip


@pytest.mark.parametrize("method_id", LOSSES)
@pytest.mark.check("gradient")
def test_gradient_matches_finite_differences(method_id: str, random_batch: Any, fitting: Any) -> None:
    method = LOSSES[method_id].value
    scores, views = fitting(method_id, *random_batch())
    leaves = [x.clone().requires_grad_() for x in (scores.logp, scores.kl_ref, scores.value)]
    value = method(with_leaves(scores, *leaves), views)
    weight = torch.linspace(0.5, 1.5, len(value), dtype=F64)
    grads = torch.autograd.grad((weight * value).sum(), leaves, allow_unused=True)

    def loss(*at: torch.Tensor) -> torch.Tensor:
        moved = with_leaves(scores, *at)
        return (weight * (HELD[method_id](moved, views, scores) if method_id in HELD else method(moved, views))).sum()

    h, size = 1e-6, 0.0
    for k, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        found = torch.zeros_like(leaf)
        for i in range(leaf.numel()):
            step = torch.zeros_like(leaf)
            step.view(-1)[i] = h
            up, down = ([x.detach() + (step if j == k else 0) * sign for j, x in enumerate(leaves)] for sign in (1, -1))
            found.view(-1)[i] = (loss(*up) - loss(*down)) / (2 * h)
        expected = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-7 * (1.0 + float(value.detach().abs().max())))
        size = max(size, float(found.abs().max()))
    assert size > 1e-4
