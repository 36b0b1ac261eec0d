"""Every row of the preference table: hand-computed value, gradient, parent as a limit, invariances, bad input."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from markovia.agents.records import Views
from markovia.algos.preference.listwise import EXO, NCA, InfoNCA, Listwise
from markovia.algos.preference.method import Preference
from markovia.algos.preference.methods import PREFERENCE, Tool
from markovia.algos.preference.pairwise import Difference, Hinge, Pairwise, Residual, Squared
from markovia.algos.preference.pieces import NLL, Fixed, LogRatio, OtherRewards, ScoreGap
from markovia.algos.preference.scores import NEEDS, Score, TokenScores
from markovia.algos.preference.unpaired import KTO, Classify, Imitate, Pointwise, Transport
from markovia.settings import from_json, to_json

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
        {"ref": ref, "old": old, "proposal": old, "stage0": ref, "stage1": old},
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


def fitting(method_id: str, scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """The few columns that a row wants in another form."""
    if method_id == "modpo":  # two rewards per row; those of the second dimension are .2, 1, 0
        second = torch.linspace(0.2, 1.0, len(scores.logp), dtype=F64) if len(scores.logp) > 3 else torch.tensor([0.2, 1.0, 0.0], dtype=F64)
        return scores, dataclasses.replace(views, score=torch.stack([views.score, second], 1))
    if method_id == "iopo":  # rows y1|x1, y2|x2, y2|x1, y1|x2
        full = torch.tensor([[0, 2, 1, 1]]) if len(scores.logp) == 3 else views.groups.clamp(min=0)
        return scores, dataclasses.replace(views, groups=full)
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
    "rpo": [phi(0.015) + 0.005 * 2.0],
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
    # win rates less the mean of the others: .6, -.45, -.15; prices .1 l + .5 l_old per token: (.05, .125), (0, -.225, 0), (.185)
    "nash-mp": [((1.2 - 0.175 - 0.125) + (-1.8 + 0.225 + 0.45) + (-0.075 - 0.0925)) / 3],
    "spac": [10 * phi(0.25) + 0.5 * 20 * math.tanh(0.25 / 20)],  # the data terms of +-.25 cancel
    "tr-dpo": [phi(0.05 * 1.5)],
    "tr-dpo/hard": [phi(0.05 * 1.5)],
    "sdpo-stepwise": [phi(0.15)],
    "apo-accelerated": [phi(0.15)],
}


@pytest.mark.parametrize("method_id", LOSSES)
def test_value(method_id: str) -> None:
    found = LOSSES[method_id].value(*fitting(method_id, *small()))
    torch.testing.assert_close(found, torch.tensor(VALUES[method_id], dtype=F64), rtol=1e-9, atol=1e-12)


# -- the table -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", PREFERENCE)
def test_row_is_whole(method_id: str) -> None:
    row = PREFERENCE[method_id]
    assert row.id == method_id and row.claim and row.new and re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert row.parent is None or row.parent in PREFERENCE
    assert set(row.kinds) <= {"language", "denoising"} and row.not_checked
    texts = []
    for where in row.functions:
        module, _, name = where.partition(":")
        texts.append(getattr(importlib.import_module(module), name).__doc__ or "")
    assert all(texts) and any("=" in text or "phi" in text for text in texts)
    assert from_json(type(row.value), json.loads(json.dumps(to_json(row.value)))) == row.value
    if isinstance(row.value, Preference):
        assert all(n in NEEDS or n.startswith("logp_ref.") for n in row.value.needs)


# -- gradient ------------------------------------------------------------------------------------------------------------------------------

B, T = 12, 4


def random_batch(seed: int = 0, scale: float = 0.7) -> tuple[TokenScores, Views]:
    """12 rows of 1 to 4 tokens, every column filled; scores are win rates."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, T + 1, (B,), generator=g)
    mask = torch.arange(T) < length[:, None]

    def logs(around: torch.Tensor | float) -> torch.Tensor:
        return around - scale * torch.rand(B, T, generator=g, dtype=F64)

    logp = logs(-0.2)
    scores = TokenScores(
        logp, mask, {name: logs(-0.2) for name in ("ref", "old", "proposal", "stage0", "stage1")},
        kl_ref=torch.rand(B, T, generator=g, dtype=F64), collision=logs(-0.2), value=torch.rand(B, generator=g, dtype=F64),
        mismatched=torch.randn(B, generator=g, dtype=F64) + 0.5, progress=0.6,
    )  # fmt: skip
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    views = Views(
        pairs=pairs, groups=torch.tensor([[0, 1, 2, 3], [4, 5, 6, -1], [7, 8, 9, 10]]), gold=torch.tensor([8, 9, 10, 11]), unpaired=torch.arange(B),
        q=torch.rand(4, generator=g, dtype=F64), score=torch.rand(B, generator=g, dtype=F64), label=torch.rand(B, generator=g) > 0.5,
        keep=mask & (torch.rand(B, T, generator=g) > 0.3), diff=mask & (torch.rand(B, T, generator=g) > 0.5),
    )  # fmt: skip
    return scores, views


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
        out.append(held_self_play(s, v, at, {"ref": 0.1, "old": 0.5}, adv)[rows].mean())
    return torch.stack(out)


# Where part of a loss is held fixed in the gradient, the same loss written out with that part a constant.
HELD: dict[str, Held] = {
    "wpo": held_wpo, "bmc": held_bmc, "tdpo": held_tdpo, "dro": held_dro, "nash-mp": held_nash_mp,
    "ipo/nash-md": lambda s, v, at: held_self_play(s, v, at, {"ref": 0.1}, v.score - 0.5),
}  # fmt: skip


@pytest.mark.parametrize("method_id", LOSSES)
def test_gradient_matches_finite_differences(method_id: str) -> None:
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


# -- parent as a limit ---------------------------------------------------------------------------------------------------------------------


def of(method_id: str, **changes: Any) -> Any:
    """A row's loss with other settings."""
    return dataclasses.replace(LOSSES[method_id].value.loss, **changes)


def difference(method_id: str, **changes: Any) -> Difference:
    return Difference(dataclasses.replace(LOSSES[method_id].value.loss.diff.score, **changes))


def shrunk(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """Policy next to the reference: log-ratios of 1e-4."""
    ref = scores.logp_ref["ref"]
    return dataclasses.replace(scores, logp=ref + 1e-4 * (scores.logp - ref)), views


def same_rate(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return scores, dataclasses.replace(views, q=torch.ones_like(views.q))


def reference_sure(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """K >= 15 for every pair: per token the reference prefers the chosen response by far."""
    ref = scores.logp_ref["ref"].clone()
    ref[views.pairs[:, 1]] -= 40.0
    return dataclasses.replace(scores, logp_ref={"ref": ref}), views


def uniform_policy(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """The sum of squares is the probability of every token."""
    return dataclasses.replace(scores, collision=scores.logp), views


def unlikely(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return dataclasses.replace(scores, logp=scores.logp - 20.0), views


def stages_equal(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """Nothing was learnt in the first round."""
    return dataclasses.replace(scores, logp_ref=dict.fromkeys(("ref", "stage0", "stage1"), scores.logp_ref["ref"])), views


def own_answers(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """The swapped answer to the second prompt is its own, so one pair is left: y1 over y2 for the first prompt."""
    g = views.pairs
    return scores, dataclasses.replace(views, groups=torch.stack([g[:, 0], g[:, 0] * 0 + 8, g[:, 1], g[:, 0] * 0 + 8], 1))


def one_token(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    mask = torch.zeros_like(scores.mask)
    mask[:, 0] = True
    return dataclasses.replace(scores, mask=mask), dataclasses.replace(views, keep=mask)


def gold_is_chosen(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return scores, dataclasses.replace(views, gold=views.pairs[:, 0])


def as_groups(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """Pairs as lists of two with rewards 1 and 0."""
    score = torch.zeros_like(views.score)
    score[views.pairs[:, 0]] = 1.0
    return scores, dataclasses.replace(views, groups=views.pairs, score=score)


def untouched(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return scores, views


def proposal_is_prior(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return dataclasses.replace(scores, logp_ref={**scores.logp_ref, "proposal": scores.logp_ref["ref"]}), views


def old_is_ref(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return dataclasses.replace(scores, logp_ref={**scores.logp_ref, "old": scores.logp_ref["ref"]}), views


def hard_rates(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    score = torch.zeros_like(views.score)
    score[views.pairs[:, 0]] = 1.0
    return scores, dataclasses.replace(views, score=score)


def one_pair(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return scores, dataclasses.replace(views, pairs=views.pairs[:1], unpaired=views.pairs[0], label=torch.arange(B) == int(views.pairs[0, 0]))


def demonstrations(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return scores, dataclasses.replace(views, unpaired=views.pairs[:, 0])


def reference_point_zero(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return dataclasses.replace(scores, mismatched=torch.full((3,), -1.0, dtype=F64)), views


DPO = LOSSES["dpo"].value.loss
HARD = 1e-3  # a reward temperature at which rewards 1 and 0 are certain labels
ODDS = Score("mean", (), psi="odds")
# id: (variant, what it becomes, batch, tolerance of value and gradient, factor on the right side)
LIMITS: dict[str, tuple[Any, Any, Any, float]] = {
    "dpo": (DPO, Listwise(loss=InfoNCA(), view="pairs"), untouched, 1e-12),  # a classifier over lists of two
    "dpo/cdpo": (of("dpo/cdpo", label=type(of("dpo/cdpo").label)(0.0)), DPO, untouched, 1e-12),
    "f-dpo": (of("f-dpo", beta=0.2), DPO, shrunk, 1e-7),  # log s(l) = l / 2 + O(l^2)
    "f-dpo/forward-kl": (of("f-dpo/forward-kl"), DPO, shrunk, 1e-7),
    "f-dpo/alpha": (of("f-dpo/alpha", diff=difference("f-dpo/alpha", alpha=1e-9)), DPO, untouched, 1e-8),
    "squared-po": (of("squared-po"), DPO, shrunk, 1e-7),
    "slic": (of("slic", terms=()), Pairwise(1.0, Difference(Score(anchors=())), Hinge(1.0)), untouched, 1e-12),
    "slic/hinge-norm": (of("slic/hinge-norm", beta=1.0, diff=Difference(Score(anchors=()))), of("slic", terms=()), untouched, 1e-12),
    "ipo/online": (of("ipo/online"), of("ipo"), same_rate, 1e-12),
    "ipo/ipo-md": (of("ipo/ipo-md"), of("ipo/online"), untouched, 1e-12),
    "simpo": (of("simpo", beta=5.0, margin=Fixed(0.0), diff=difference("simpo", anchors=(("ref", 1.0),))), of("ln-dpo"), untouched, 1e-12),
    "alpha-po": (of("alpha-po", margin=Fixed(1.375), diff=difference("alpha-po", alpha=1e-9)), of("simpo"), untouched, 1e-7),
    "ln-dpo": (of("ln-dpo", beta=0.1), DPO, one_token, 1e-12),
    "h-dpo": (of("h-dpo", beta=0.1, diff=difference("h-dpo", policy=1.0)), DPO, untouched, 1e-12),
    "mmpo": (of("mmpo", beta=0.1, label=type(of("mmpo").label)(1e6)), DPO, hard_rates, 1e-12),
    "robust-dpo": (of("robust-dpo", label=type(of("robust-dpo").label)(0.0)), DPO, untouched, 1e-12),
    "rdpo-refined": (of("rdpo-refined", margin=ScoreGap(0.0)), DPO, untouched, 1e-12),
    "rdpo-refined/soft": (of("rdpo-refined/soft", label=type(of("mmpo").label)(1e6)), of("rdpo-refined", margin=ScoreGap(0.0)), hard_rates, 1e-12),
    "mipo": (of("mipo", beta=5.0), of("ln-dpo"), reference_sure, 1e-6),
    "modpo": (of("modpo", margin=OtherRewards((0.0, 0.0)), temperature=1.0), DPO, lambda s, v: fitting("modpo", s, v), 1e-12),
    "spo-seq": (of("spo-seq"), DPO, stages_equal, 1e-12),
    "iopo": (of("iopo"), DPO, own_answers, 1e-12),
    "orpo": (of("orpo", coef=1.0, terms=()), of("orpo/beta"), untouched, 1e-12),
    "orpo/beta": (of("orpo/beta"), of("simpo", beta=1.0, margin=Fixed(0.0)), unlikely, 1e-8),  # log p/(1-p) -> log p
    "asft": (of("asft", chosen_nll=0.0), of("asft/beta"), untouched, 1e-12),
    "rpo": (of("rpo", beta=0.1, terms=(NLL(0.0, reduce="sum"),)), DPO, untouched, 1e-12),
    # gold = chosen and no reference: CPO
    "tpo": (of("tpo"), Pairwise(0.01, Difference(Score(anchors=())), terms=(NLL(1.0),)), gold_is_chosen, 1e-12),
    "tpo/length": (of("tpo/length", margin=Fixed(0.0)), of("tpo", beta=0.01), one_token, 1e-12),
    "wrpo": (of("wrpo", beta=0.1, diff=type(of("wrpo").diff)(0.0)), DPO, untouched, 1e-12),
    "vpo": (of("vpo", terms=(LogRatio(0.0, of="chosen"),)), DPO, untouched, 1e-12),
    "vpo/online": (of("vpo/online", terms=(LogRatio(-0.01, of="gold"),)), of("vpo"), gold_is_chosen, 1e-12),
    "sam-po": (of("sam-po"), DPO, one_token, 1e-12),
    "tdpo": (of("tdpo", diff=type(of("tdpo").diff)(0.0)), DPO, untouched, 1e-12),
    "tdpo/tdpo1": (of("tdpo/tdpo1", diff=type(of("tdpo").diff)(0.0, False)), of("tdpo", diff=type(of("tdpo").diff)(0.0)), untouched, 1e-12),
    "bmc": (of("bmc", beta=0.1, diff=difference("bmc", boost_limit=0.0)), DPO, untouched, 1e-12),
    "wpo": (of("wpo", beta=0.1), DPO, uniform_policy, 1e-12),
    "exo/pair": (of("exo/pair", loss=EXO(eps=sig(-1.0))), of("exo"), as_groups, 1e-12),  # softmax(1, 0)
    "nca/pair": (of("nca/pair"), Listwise(beta=0.01, loss=NCA(HARD)), as_groups, 1e-12),
    "nca/info-nca": (of("nca/info-nca", beta=0.1, loss=InfoNCA(HARD)), DPO, as_groups, 1e-12),
    "brain": (of("brain"), of("nca/info-nca", beta=1.0, loss=InfoNCA(1.0)), proposal_is_prior, 1e-12),
    "aot": (Transport(beta=0.1), DPO, one_pair, 1e-12),
    "aot/unpaired": (Transport(beta=0.1, view="unpaired"), Transport(beta=0.1), one_pair, 1e-12),
    "copg": (of("copg", beta=1.0), of("rebel", diff=Difference(), margin=ScoreGap(1.0)), untouched, 1e-12),
    "rebel": (of("rebel", margin=ScoreGap(10.0)), Pairwise(1.0, link=Squared(0.05)), lambda s, v: hard_rates(*old_is_ref(s, v)), 1e-12),
    "sppo/hard": (of("sppo/hard"), of("sppo"), hard_rates, 1e-12),
    "inpo": (of("inpo"), Pairwise(1.0, link=Squared(7.5e-3)), old_is_ref, 1e-12),
    "spac": (of("spac", beta=0.1, coef=1.0, terms=()), DPO, old_is_ref, 1e-12),
    "tr-dpo": (of("tr-dpo", beta=0.1), DPO, untouched, 1e-12),
    "tr-dpo/hard": (of("tr-dpo/hard"), of("tr-dpo"), untouched, 1e-12),
    "sdpo-stepwise": (of("sdpo-stepwise"), DPO, untouched, 1e-12),
    "apo-accelerated": (of("apo-accelerated"), of("sdpo-stepwise"), untouched, 1e-12),
    "sft-bridge/sft": (Pairwise(1e-12, coef=1e-12, terms=(LogRatio(-0.1, of="chosen"),)), of("sft-bridge/sft"), demonstrations, 1e-11),
    **{f"sft-bridge{v}": (of(f"sft-bridge{v}"), Pointwise(Imitate(generator="tv")), shrunk, 1e-7) for v in ("", "/kl", "/js", "/hellinger")},
}


def value_and_gradient(loss: Any, scores: TokenScores, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    logp = scores.logp.clone().requires_grad_()
    value = loss(dataclasses.replace(scores, logp=logp), views)
    return value.detach(), torch.autograd.grad(value.sum(), logp)[0]


@pytest.mark.parametrize("method_id", LIMITS)
def test_parent_is_a_limit(method_id: str) -> None:
    variant, other, batch, atol = LIMITS[method_id]
    scores, views = batch(*random_batch(3))
    (a, ga), (b, gb) = (value_and_gradient(loss, scores, views) for loss in (variant, other))
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
    torch.testing.assert_close(ga, gb, rtol=1e-3 if batch is shrunk else 0, atol=max(atol, 1e-12) if batch is not shrunk else 1e-9)


def test_every_row_has_a_limit() -> None:
    # These are compared with formulas of their own below and on the exact problems.
    apart = {"asft/beta", "kto", "exo", "ipo", "ipo/nash-md", "nash-mp", "irepo", "lipo", "pro", "dro", "sppo", "nca"}
    assert set(LIMITS) | apart == set(LOSSES)


def test_ipo_is_dpo_to_second_order() -> None:
    """phi(z) = log 2 - z/2 + z^2/8 - O(z^4) = (z - 2)^2 / 8 + const: near z = 0 DPO is IPO with tau = beta / 4."""
    scores, views = shrunk(*random_batch(1))
    ga, gb = (value_and_gradient(loss, scores, views)[1] for loss in (DPO, Pairwise(1.0, link=Squared(0.025), coef=0.1**2 / 8)))
    torch.testing.assert_close(ga, gb, rtol=1e-9, atol=1e-12)


def test_exo_and_dpo_on_lists_of_two_are_the_two_directions_of_one_divergence() -> None:
    """KL(p || q) and KL(q || p) of binary laws: equal where p and q change places."""
    p, q = 0.3, 0.8
    logp = torch.tensor([[math.log(p / (1 - p))], [0.0]], dtype=F64)
    s = TokenScores(logp, torch.ones(2, 1, dtype=torch.bool), {"ref": torch.zeros(2, 1, dtype=F64)})
    views = Views(groups=torch.tensor([[0, 1]]), score=torch.tensor([math.log(q / (1 - q)), 0.0], dtype=F64))
    reverse = Listwise(beta=1.0, loss=EXO())(s, views)
    forward = Listwise(beta=1.0, loss=InfoNCA())(s, views)
    kl = [x * math.log(x / y) + (1 - x) * math.log((1 - x) / (1 - y)) for x, y in ((p, q), (q, p))]
    entropy = -(q * math.log(q) + (1 - q) * math.log(1 - q))
    torch.testing.assert_close(torch.cat([reverse, forward - entropy]), torch.tensor(kl, dtype=F64), rtol=1e-12, atol=1e-12)


def test_info_nca_ignores_a_constant_in_the_scores_and_nca_does_not() -> None:
    scores, views = random_batch(2)
    moved = dataclasses.replace(scores, logp=scores.logp + torch.where(torch.arange(T) == 0, 5.0, 0.0))
    views.groups[1, 3] = 11
    for loss, changes in ((InfoNCA(1.0), False), (NCA(1.0), True)):
        a, b = (Listwise(beta=1.0, loss=loss)(s, views) for s in (scores, moved))
        assert bool(((a - b).abs() > 1e-3).all()) == changes and (changes or torch.allclose(a, b, atol=1e-12))


def test_lipo_with_two_responses_is_dpo_times_a_constant() -> None:
    scores, views = hard_rates(*random_batch(4))
    views.groups = views.pairs
    found = of("lipo", beta=0.1)(scores, views)
    # gains 2^1 - 2^0 = 1, discounts 1/log 2 - 1/log 3
    torch.testing.assert_close(found, (1 / LOG2 - 1 / LOG3) * DPO(scores, views), rtol=1e-12, atol=0)


def test_pro_with_two_responses_and_with_equal_gaps() -> None:
    scores, views = random_batch(5)
    mean = scores.means()
    gap = d(views.score, views)
    ordered = torch.where((gap > 0)[:, None], views.pairs, views.pairs.flip(1))
    pro = of("pro", best_nll=0.0)
    found = pro(scores, dataclasses.replace(views, groups=views.pairs))
    torch.testing.assert_close(found, F.softplus(-gap.abs() * (mean[ordered[:, 0]] - mean[ordered[:, 1]])))
    plain = dataclasses.replace(pro, loss=dataclasses.replace(pro.loss, gaps=False))(scores, views)
    for group, value in zip(views.groups.tolist(), plain, strict=True):  # Plackett-Luce, the likelihood of the order, one choice after another
        rows = sorted((i for i in group if i >= 0), key=lambda i: -float(views.score[i]))
        left, total = list(rows), 0.0
        for i in rows:
            total -= float(mean[i]) - math.log(sum(math.exp(float(mean[j])) for j in left))
            left.remove(i)
        assert math.isclose(total, float(value), rel_tol=1e-9)


def test_kto_around_zero_is_the_logistic_probability_of_the_wrong_side() -> None:
    """z0 clamped at 0 (the batch's estimate is negative): 1 - s(beta l), 1 - s(-beta l)."""
    scores, views = reference_point_zero(*random_batch(6))
    l = sums(scores.logp - scores.logp_ref["ref"], scores)
    expected = torch.where(views.label, 1 - torch.sigmoid(0.1 * l), 1 - torch.sigmoid(-0.1 * l))
    torch.testing.assert_close(LOSSES["kto"].value(scores, views), expected)


def test_sorting_is_the_optimal_assignment() -> None:
    from scipy.optimize import linear_sum_assignment

    g = torch.Generator().manual_seed(0)
    logp = torch.randn(16, 1, generator=g, dtype=F64)
    scores = TokenScores(logp, torch.ones(16, 1, dtype=torch.bool), {"ref": torch.zeros(16, 1, dtype=F64)})
    views = Views(unpaired=torch.arange(16), label=torch.arange(16) < 8)
    cost = F.softplus(-(logp[:8] - logp[8:].T))
    rows, columns = linear_sum_assignment(cost.numpy())
    torch.testing.assert_close(Transport(1.0, view="unpaired")(scores, views).sum(), cost[rows, columns].sum())


def test_averaging_robust_dpo_over_flips_gives_dpo() -> None:
    scores, views = random_batch(7)
    robust = LOSSES["robust-dpo"].value
    flipped = dataclasses.replace(views, pairs=views.pairs.flip(1))
    torch.testing.assert_close(0.9 * robust(scores, views) + 0.1 * robust(scores, flipped), DPO(scores, views), rtol=1e-12, atol=1e-12)


def test_orpo_is_the_log_share_of_the_odds_and_asft_likelihood_plus_unlikelihood() -> None:
    scores, views = random_batch(8)
    p = scores.means().exp()
    w, l = p[views.pairs[:, 0]], p[views.pairs[:, 1]]
    share = -0.1 * torch.log(w * (1 - l) / (w * (1 - l) + l * (1 - w)))
    torch.testing.assert_close(LOSSES["orpo"].value(scores, views), share - w.log(), rtol=0, atol=1e-6)
    asft = Pointwise(Classify(1.0), ODDS, "pairs", coef=0.7, chosen_nll=1.0)
    torch.testing.assert_close(asft(scores, views), -1.7 * w.log() - 0.7 * torch.log(1 - l), rtol=0, atol=1e-6)


def test_copg_is_the_gradient_it_names() -> None:
    """Ascend (R_b(y) - R_b(y')) (grad S(y) - grad S(y')), R_b = R - beta l; coefficients without gradient."""
    scores, views = random_batch(9)
    beta = 0.3
    grad = value_and_gradient(Pairwise(beta, link=Residual(), margin=ScoreGap(1.0), coef=1 / (2 * beta)), scores, views)[1]
    logp = scores.logp.clone().requires_grad_()
    rb = views.score - beta * sums(scores.logp - scores.logp_ref["ref"], scores)
    expected = torch.autograd.grad(-(d(rb, views) * d(sums(logp, scores), views)).sum(), logp)[0]
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


# -- invariances ---------------------------------------------------------------------------------------------------------------------------


def padded(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """Two more tokens of junk that the mask leaves out."""

    def wider(x: torch.Tensor | None, value: Any) -> torch.Tensor | None:
        return None if x is None else torch.cat([torch.full((len(x), 2), value, dtype=x.dtype), x], 1)

    token = {"logp": -math.inf, "mask": False, "kl_ref": math.nan, "collision": math.inf}
    anchors = {k: wider(v, -math.inf) for k, v in scores.logp_ref.items()}
    columns = {k: wider(getattr(scores, k), v) for k, v in token.items()}
    return (
        dataclasses.replace(scores, logp_ref=anchors, **columns),
        dataclasses.replace(views, keep=wider(views.keep, True), diff=wider(views.diff, True)),
    )


def permuted(scores: TokenScores, views: Views, order: torch.Tensor) -> tuple[TokenScores, Views]:
    """Rows in another order, and index views that point at where they went."""
    to = torch.empty_like(order)
    to[order] = torch.arange(len(order))
    index = {k: torch.where(getattr(views, k) >= 0, to[getattr(views, k).clamp(min=0)], -1) for k in ("pairs", "groups", "gold", "unpaired")}
    rows = {k: getattr(views, k)[order] for k in ("score", "label", "keep", "diff")}
    columns = {k: getattr(scores, k)[order] for k in ("logp", "mask", "kl_ref", "collision", "value")}
    anchors = {k: v[order] for k, v in scores.logp_ref.items()}
    return dataclasses.replace(scores, logp_ref=anchors, **columns), dataclasses.replace(views, **index, **rows)


def items(views: Views, keep: slice) -> Views:
    """Part of the items, all rows."""
    part = {k: None if (x := getattr(views, k)) is None else x[keep] for k in ("pairs", "gold", "q", "weight")}
    part |= {"groups": views.groups[keep], "unpaired": views.unpaired[keep]}
    return dataclasses.replace(views, **part)


@pytest.mark.parametrize("method_id", LOSSES)
def test_padding_order_and_micro_batches_change_nothing(method_id: str) -> None:
    method = LOSSES[method_id].value
    scores, views = fitting(method_id, *random_batch(11))
    value, grad = value_and_gradient(method, scores, views)
    wide, wide_grad = value_and_gradient(method, *padded(scores, views))
    torch.testing.assert_close(wide, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wide_grad[:, 2:], grad, rtol=1e-10, atol=1e-12)
    assert not wide_grad[:, :2].any()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(method(*permuted(scores, views, order)), value, rtol=1e-12, atol=1e-12)
    assert method.coupled == (method_id in ("kto", "aot", "aot/unpaired"))
    if not method.coupled:
        parts = [method(scores, items(views, part)) for part in (slice(0, 1), slice(1, None))]
        torch.testing.assert_close(torch.cat(parts), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method_id", [k for k in LOSSES if not k.startswith("aot")])
def test_weights_multiply_items(method_id: str) -> None:
    scores, views = fitting(method_id, *random_batch(12))
    value = LOSSES[method_id].value(scores, views)
    weight = torch.linspace(0.0, 2.0, len(value), dtype=F64)
    torch.testing.assert_close(LOSSES[method_id].value(scores, dataclasses.replace(views, weight=weight)), weight * value)


def test_rows_of_sums_give_the_same_scores() -> None:
    """A row of which only the sum is known has one token and a length."""
    scores, views = random_batch(13)
    sums_ = TokenScores(
        scores.sums()[:, None], torch.ones(B, 1, dtype=torch.bool), {k: scores.sums(v)[:, None] for k, v in scores.logp_ref.items()},
        length=scores.mask.sum(1),
    )  # fmt: skip
    for method_id in ("dpo", "ln-dpo", "simpo", "orpo", "mipo", "ipo"):
        torch.testing.assert_close(LOSSES[method_id].value(sums_, views), LOSSES[method_id].value(scores, views))


@pytest.mark.parametrize("method_id", LOSSES)
def test_hundreds_of_nats_in_float32(method_id: str) -> None:
    """Losses and gradients stay finite."""
    scores, views = fitting(method_id, *random_batch(14))
    big = {"logp": scores.logp.float() * 150, "logp_ref": {k: v.float() * 150 for k, v in scores.logp_ref.items()}}
    columns = {k: getattr(scores, k).float() for k in ("kl_ref", "collision", "value", "mismatched")}
    data = {k: getattr(views, k).float() for k in ("q", "score")}
    value, grad = value_and_gradient(LOSSES[method_id].value, dataclasses.replace(scores, **big, **columns), dataclasses.replace(views, **data))
    assert value.dtype == torch.float32 and torch.isfinite(value).all() and torch.isfinite(grad).all()


# -- bad input -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", LOSSES)
def test_missing_and_misshapen_columns_are_named(method_id: str) -> None:
    method = LOSSES[method_id].value
    scores, views = fitting(method_id, *random_batch())
    for name in method.needs:
        anchor = name.partition(".")[2]
        if anchor:
            rest = {k: v for k, v in scores.logp_ref.items() if k != anchor}
            with pytest.raises(ValueError, match=f"anchor '{anchor}'"):
                method(dataclasses.replace(scores, logp_ref=rest), views)
        elif hasattr(scores, name):
            with pytest.raises(ValueError, match=rf"scores\.{name}"):
                method(dataclasses.replace(scores, **{name: None}), views)
        else:
            with pytest.raises(ValueError, match=rf"views\.{name}"):
                method(scores, dataclasses.replace(views, **{name: None}))
    with pytest.raises(ValueError, match="the mask bool"):
        method(dataclasses.replace(scores, mask=scores.mask.float()), views)


def test_columns_of_a_wrong_shape() -> None:
    scores, views = random_batch()
    with pytest.raises(ValueError, match=r"pairs must be \(P, 2\)"):
        DPO(scores, dataclasses.replace(views, pairs=torch.arange(6).view(2, 3)))
    with pytest.raises(ValueError, match=r"one entry per row and token, shape \(12, 4\), got \(12, 3\)"):
        DPO(dataclasses.replace(scores, logp_ref={"ref": scores.logp[:, 1:]}), views)
    with pytest.raises(ValueError, match=r"views.q must have one entry per pair \(4\), got 3"):
        LOSSES["ipo/online"].value(scores, dataclasses.replace(views, q=views.q[:3]))
    with pytest.raises(ValueError, match=r"one entry per row \(12\), got 5"):
        LOSSES["exo"].value(scores, dataclasses.replace(views, score=views.score[:5]))
    with pytest.raises(ValueError, match="did you mean 'ref'"):
        Pairwise(diff=Difference(Score(anchors=(("reff", 1.0),))))(scores, views)
    with pytest.raises(ValueError, match="one reward per row"):
        LOSSES["exo"].value(scores, dataclasses.replace(views, score=torch.ones(B, 2)))
    with pytest.raises(ValueError, match="MODPO reads 2 rewards"):
        LOSSES["modpo"].value(scores, views)
    with pytest.raises(ValueError, match="a crossed pair is 4 rows"):
        LOSSES["iopo"].value(scores, dataclasses.replace(views, groups=torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="sorting breaks the pairs up"):
        LOSSES["aot"].value(scores, dataclasses.replace(views, weight=torch.ones(4)))
    with pytest.raises(ValueError, match="both kinds are compared"):
        LOSSES["aot/unpaired"].value(scores, dataclasses.replace(views, label=torch.ones(B, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Pairwise(beta=0.0), "beta must be > 0, got 0"),
        (lambda: of("dpo/cdpo", label=type(of("dpo/cdpo").label)(0.6)), "swap chosen and rejected"),
        (lambda: Score(psi="foward_kl"), "did you mean 'forward_kl'"),
        (lambda: Score(psi="odds"), "reduce='mean' and anchors"),
        (lambda: Squared(-1.0), "tau must be > 0"),
        (lambda: Pairwise(margin=OtherRewards((0.0, 0.5)), temperature=0.4), "sum to 0.9"),
        (lambda: of("iopo", terms=(NLL(),)), "a crossed pair has no label"),
        (lambda: of("wrpo", diff=type(of("wrpo").diff)(1.5)), r"in \[0, 1\], got 1.5"),
        (lambda: EXO(eps=0.0), "infinite"),
        (lambda: Listwise(loss=EXO(), view="pairs"), "EXO on pairs needs eps"),
        (lambda: of("pro", view="pairs"), "needs groups with scores"),
        (lambda: Listwise(view="lists"), "'groups' or 'pairs'"),
        (lambda: Pointwise(chosen_nll=1.0), "view='pairs'"),
        (lambda: Imitate(generator="chi"), "did you mean 'chi2'"),
        (lambda: KTO(desirable=0.0), "desirable must be > 0"),
        (lambda: Transport(eps=0.5), "wrong labels"),
        (lambda: dataclasses.replace(LOSSES["ipo/nash-md"].value.loss, price=(("ref", -1.0),)), "must be >= 0"),
        (lambda: type(LOSSES["tr-dpo"].value.reference)(0.0, 1), r"rate must lie in \(0, 1\]"),
        (lambda: type(LOSSES["apo-accelerated"].value.reference)(1.0), "diverges"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pairs": torch.tensor([[0, 12]])}, "rows 0 to 12, but there are rows 0 to 11"),
        ({"pairs": torch.tensor([[3, 3]])}, "a row with itself"),
        ({"groups": torch.tensor([[1, -1, -1]])}, "fewer than 2 rows"),
        ({"label": torch.ones(B)}, "label > 0"),
        ({"q": torch.tensor([1.2])}, r"\[0, 1\]"),
        ({"gold": torch.tensor([-1])}, "views.gold"),
    ],
)
def test_views_check(changes: dict[str, torch.Tensor], match: str) -> None:
    views = random_batch()[1]
    views.check(B)
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(views, **changes).check(B)


def test_environments_are_no_preference_data() -> None:
    from markovia.algos.presets import configure

    with pytest.raises(ValueError, match="dpo learns from preferences, not from the rewards of markovia/Sentiment-v0"):
        configure("dpo", "markovia/Sentiment-v0")
