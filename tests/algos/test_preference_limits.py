"""The preference rows' parents as limits, and identities between losses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from markovia.agents.records import Views
from markovia.algos.preference.listwise import EXO, NCA, InfoNCA, Listwise
from markovia.algos.preference.methods import PREFERENCE, Tool
from markovia.algos.preference.pairwise import Difference, Hinge, Pairwise, Residual, Squared
from markovia.algos.preference.pieces import NLL, Fixed, LogRatio, OtherRewards, ScoreGap
from markovia.algos.preference.scores import Score, TokenScores
from markovia.algos.preference.unpaired import Classify, Imitate, Pointwise, Transport

torch.set_num_threads(1)
F64 = torch.float64
LOSSES = {k: row for k, row in PREFERENCE.items() if not isinstance(row.value, Tool)}
B, T = 12, 4
LOG2, LOG3 = math.log(2.0), math.log(3.0)


def sig(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def sums(x: torch.Tensor, scores: TokenScores) -> torch.Tensor:
    return (x * scores.mask).sum(1)


def d(x: torch.Tensor, views: Views) -> torch.Tensor:
    return x[views.pairs[:, 0]] - x[views.pairs[:, 1]]


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


def two_rewards(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    return scores, dataclasses.replace(views, score=torch.stack([views.score, 1.0 - views.score], 1))


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
    "modpo": (of("modpo", margin=OtherRewards((0.0, 0.0)), temperature=1.0), DPO, two_rewards, 1e-12),
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
    "irepo": (of("irepo", margin=ScoreGap(1.0)), of("rebel", beta=0.1, margin=ScoreGap(1.0)), untouched, 1e-12),
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
@pytest.mark.check("limit")
def test_parent_is_a_limit(method_id: str, random_batch: Any) -> None:
    variant, other, batch, atol = LIMITS[method_id]
    scores, views = batch(*random_batch(3))
    (a, ga), (b, gb) = (value_and_gradient(loss, scores, views) for loss in (variant, other))
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
    torch.testing.assert_close(ga, gb, rtol=1e-3 if batch is shrunk else 0, atol=max(atol, 1e-12) if batch is not shrunk else 1e-9)


def test_every_row_has_a_limit() -> None:
    # These are compared with formulas of their own below and on the exact problems.
    apart = {"asft/beta", "kto", "exo", "ipo", "ipo/nash-md", "nash-mp", "lipo", "pro", "dro", "sppo", "nca"}
    assert set(LIMITS) | apart == set(LOSSES)


@pytest.mark.check("limit", "ipo")
def test_ipo_is_dpo_to_second_order(random_batch: Any) -> None:
    """phi(z) = log 2 - z/2 + z^2/8 - O(z^4) = (z - 2)^2 / 8 + const: near z = 0 DPO is IPO with tau = beta / 4."""
    scores, views = shrunk(*random_batch(1))
    ga, gb = (value_and_gradient(loss, scores, views)[1] for loss in (DPO, Pairwise(1.0, link=Squared(0.025), coef=0.1**2 / 8)))
    torch.testing.assert_close(ga, gb, rtol=1e-9, atol=1e-12)


@pytest.mark.check("limit", "exo")
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


@pytest.mark.check("limit", "nca")
def test_nca_next_to_the_reference_is_half_of_info_nca(random_batch: Any) -> None:
    """At r = 0 the gradients in r_i are (1/K - p_i)/2 and 1/K - p_i, for target shares p and K responses."""
    scores, views = shrunk(*random_batch(5))
    halves, whole = (value_and_gradient(Listwise(beta=1.0, loss=loss), scores, views)[1] for loss in (NCA(1.0), InfoNCA(1.0)))
    assert float(whole.abs().max()) > 1e-2
    torch.testing.assert_close(2 * halves, whole, rtol=0, atol=2e-4)


def test_info_nca_ignores_a_constant_in_the_scores_and_nca_does_not(random_batch: Any) -> None:
    scores, views = random_batch(2)
    moved = dataclasses.replace(scores, logp=scores.logp + torch.where(torch.arange(T) == 0, 5.0, 0.0))
    views.groups[1, 3] = 11
    for loss, changes in ((InfoNCA(1.0), False), (NCA(1.0), True)):
        a, b = (Listwise(beta=1.0, loss=loss)(s, views) for s in (scores, moved))
        assert bool(((a - b).abs() > 1e-3).all()) == changes and (changes or torch.allclose(a, b, atol=1e-12))


def test_brain_with_two_samples_and_a_certain_target_is_dpo_at_beta_1(random_batch: Any) -> None:
    scores, views = as_groups(*proposal_is_prior(*random_batch(16)))
    torch.testing.assert_close(of("brain", loss=InfoNCA(HARD))(scores, views), Pairwise(1.0)(scores, views), rtol=0, atol=1e-12)


def test_satisfied_pairs_have_no_hinge_gradient(random_batch: Any) -> None:
    scores, views = random_batch(17)
    apart = torch.zeros(B, 1, dtype=F64)
    apart[views.pairs[:, 0]] = 3.0
    moved = dataclasses.replace(scores, logp=scores.logp + apart * scores.mask)
    value, grad = value_and_gradient(of("slic", terms=()), moved, views)
    assert not value.any() and not grad.any()


@pytest.mark.check("limit", "lipo")
def test_lipo_with_two_responses_is_dpo_times_a_constant(random_batch: Any) -> None:
    scores, views = hard_rates(*random_batch(4))
    views.groups = views.pairs
    found = of("lipo", beta=0.1)(scores, views)
    # gains 2^1 - 2^0 = 1, discounts 1/log 2 - 1/log 3
    torch.testing.assert_close(found, (1 / LOG2 - 1 / LOG3) * DPO(scores, views), rtol=1e-12, atol=0)


@pytest.mark.check("limit", "pro")
def test_pro_with_two_responses_and_with_equal_gaps(random_batch: Any) -> None:
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


@pytest.mark.check("limit", "kto")
def test_kto_around_zero_is_the_logistic_probability_of_the_wrong_side(random_batch: Any) -> None:
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


def test_averaging_robust_dpo_over_flips_gives_dpo(random_batch: Any) -> None:
    scores, views = random_batch(7)
    robust = LOSSES["robust-dpo"].value
    flipped = dataclasses.replace(views, pairs=views.pairs.flip(1))
    torch.testing.assert_close(0.9 * robust(scores, views) + 0.1 * robust(scores, flipped), DPO(scores, views), rtol=1e-12, atol=1e-12)


@pytest.mark.check("limit", "asft/beta")
def test_orpo_is_the_log_share_of_the_odds_and_asft_likelihood_plus_unlikelihood(random_batch: Any) -> None:
    scores, views = random_batch(8)
    p = scores.means().exp()
    w, l = p[views.pairs[:, 0]], p[views.pairs[:, 1]]
    share = -0.1 * torch.log(w * (1 - l) / (w * (1 - l) + l * (1 - w)))
    torch.testing.assert_close(LOSSES["orpo"].value(scores, views), share - w.log(), rtol=0, atol=1e-6)
    asft = Pointwise(Classify(1.0), ODDS, "pairs", coef=0.7, chosen_nll=1.0)
    torch.testing.assert_close(asft(scores, views), -1.7 * w.log() - 0.7 * torch.log(1 - l), rtol=0, atol=1e-6)


def test_copg_is_the_gradient_it_names(random_batch: Any) -> None:
    """Ascend (R_b(y) - R_b(y')) (grad S(y) - grad S(y')), R_b = R - beta l; coefficients without gradient."""
    scores, views = random_batch(9)
    beta = 0.3
    grad = value_and_gradient(Pairwise(beta, link=Residual(), margin=ScoreGap(1.0), coef=1 / (2 * beta)), scores, views)[1]
    logp = scores.logp.clone().requires_grad_()
    rb = views.score - beta * sums(scores.logp - scores.logp_ref["ref"], scores)
    expected = torch.autograd.grad(-(d(rb, views) * d(sums(logp, scores), views)).sum(), logp)[0]
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
