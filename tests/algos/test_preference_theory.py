"""Tools and metrics of preference learning: predicates, differential information, rankings, over-optimisation, conflict; token columns of pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from markovia.agents.records import Views
from markovia.algos.preference.anchors import extrapolate, mixture_logits, soft_sync
from markovia.algos.preference.metrics import (
    dimension_conflict,
    flips,
    generalisation,
    hybrid_weights,
    idealized_accuracy,
    loss_to_flip,
    pair_statistics,
    ranking_accuracy,
    top_k,
)
from markovia.algos.preference.pairwise import Pairwise
from markovia.algos.preference.population import bandit_scores, minimise, total_variation, weighted_mean
from markovia.algos.preference.scores import TokenScores
from markovia.algos.preference.theory import did, did_entropy, did_entropy_estimate, ideal_rejected, predicates
from markovia.algos.preference.token_level import differing, kl_ref_policy, log_collision, shared_subset

torch.set_num_threads(1)
F64 = torch.float64

# -- which divergences --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "inducing", "resistant"),
    [
        (lambda t: torch.xlogy(t, t), True, False),  # reverse KL: argmin 1/e
        (lambda t: -torch.log(t), True, True),  # forward KL: argmin at infinity
        (lambda t: (t - 1).square(), False, True),  # chi-square: f'(0) = -2
        (lambda t: 0.5 * torch.log(t).square(), True, True),  # SquaredPO, not convex beyond e
    ],
)
def test_predicates(f, inducing: bool, resistant: bool) -> None:
    assert predicates(f) == (inducing, resistant)


def test_the_second_predicate_is_about_f_as_written() -> None:
    """t log t - t + 1 is the same divergence as t log t, with its least value at 1."""
    assert predicates(lambda t: torch.xlogy(t, t)) == (True, False)
    assert predicates(lambda t: torch.xlogy(t, t) - t + 1) == (True, True)
    with pytest.raises(ValueError, match="finite"):
        predicates(lambda t: torch.log(t - 1.0))


# -- differential information ---------------------------------------------------------------------------------------------------------------------


def laws(seed: int, K: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.log_softmax(torch.randn(K, generator=g, dtype=F64), -1) for _ in range(2))
    return a, b


def test_preferences_between_two_samplers_are_the_sigmoid_of_their_information() -> None:
    """y ~ pi_w and y' ~ pi_l: given the two values, P(y is the chosen one) = pi_w(y) pi_l(y') / (that + pi_w(y') pi_l(y))."""
    w, l = laws(0)
    joint = w.exp()[:, None] * l.exp()[None]
    q = did(w, l)
    torch.testing.assert_close(torch.sigmoid(q[:, None] - q[None]), joint / (joint + joint.T), rtol=0, atol=1e-10)
    torch.testing.assert_close(q.exp().sum(), torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize("ideal", [True, False])
def test_dpo_recovers_the_optimum_from_its_ideal_rejected_sampler_only(ideal: bool) -> None:
    optimum, ref = laws(1, K=8)
    beta = 0.5
    rejected = ideal_rejected(optimum, ref, beta=beta) if ideal else torch.full_like(ref, -math.log(8))
    first, second = np.nonzero(~np.eye(8, dtype=bool))
    views = Views(pairs=torch.as_tensor(np.stack([first, second], 1)))
    weight = ref.exp()[first] * rejected.exp()[second]
    found = minimise(lambda z: weighted_mean(Pairwise(beta)(bandit_scores(z[None], ref=ref[None]), views), weight), ref)
    distance = total_variation(torch.log_softmax(found, -1), optimum)
    assert distance < 1e-4 if ideal else distance > 0.2


@pytest.mark.check("value", "did")
@pytest.mark.check("bad_input", "did")
def test_information_entropy_is_low_when_the_policy_reinforces_its_reference() -> None:
    ref = torch.log_softmax(-torch.log(torch.arange(1, 33, dtype=F64)), -1)  # Zipf
    sharp, smooth = (torch.log_softmax(c * ref, -1) for c in (2.0, 0.5))
    found = [float(did_entropy(p, ref)) for p in (sharp, smooth)]
    # pi / ref ~ ref^(c - 1): entropies of Zipf's law itself and of its square root inverse
    q = [torch.softmax((c - 1) * ref, -1) for c in (2.0, 0.5)]
    assert found == pytest.approx([float(-(x * x.log()).sum()) for x in q])
    assert found == pytest.approx([2.88, 3.40], abs=0.005)
    index = torch.multinomial(smooth.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert float(did_entropy_estimate(smooth[index], ref[index])) == pytest.approx(found[1], abs=0.02)
    with pytest.raises(ValueError, match="beta must be > 0"):
        ideal_rejected(smooth, ref, beta=0.0)


# -- rankings ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "ranking-accuracy")
@pytest.mark.check("bad_input", "ranking-accuracy")
def test_ranking_accuracies_by_hand() -> None:
    """Pairs with gaps 1, -1, 0, -3; the reference's gaps 1, -1, 0, -3 too, raters .5, .9, .4, 1: optimum gaps at beta 1 are 1, 1.2, -.41, inf."""
    w, l = torch.tensor([0.0, -1.0, -2.0, -3.0]), torch.tensor([-1.0, 0.0, -2.0, 0.0])
    assert float(ranking_accuracy(w, l)) == 0.5  # a tie counts as right
    share = torch.tensor([0.5, 0.9, 0.4, 1.0])
    assert float(idealized_accuracy(w, l, share, beta=1.0)) == 0.75
    assert float(idealized_accuracy(w, l, share, beta=10.0)) == 0.5  # log(9) / 10 < 1
    with pytest.raises(ValueError, match="beta"):
        idealized_accuracy(w, l, share, beta=-1.0)
    table = flips(torch.tensor([True, False, False, True]), torch.tensor([True, True, False, True]))
    torch.testing.assert_close(table, torch.tensor([[0.25, 0.25], [0.0, 0.5]]))


def test_a_pair_is_ranked_rightly_exactly_when_its_loss_is_below_the_bound() -> None:
    g = torch.Generator().manual_seed(0)
    logp, ref = (4 * torch.randn(20_000, 1, generator=g, dtype=F64) for _ in range(2))
    views = Views(pairs=torch.arange(20_000).view(-1, 2))
    scores = TokenScores(logp, torch.ones_like(logp, dtype=torch.bool), {"ref": ref})
    loss = Pairwise(0.1)(scores, views)
    bound = loss_to_flip(ref[0::2, 0], ref[1::2, 0], beta=0.1)
    assert torch.equal(loss <= bound, (logp[0::2] >= logp[1::2]).squeeze(1))


@pytest.mark.check("value", "implicit-rm-generalisation")
@pytest.mark.check("bad_input", "implicit-rm-generalisation")
def test_generalisation_by_hand() -> None:
    margins = {"train": torch.tensor([1.0, 2.0, -1.0, 1.0]), "long": torch.tensor([1.0, -1.0]), "new": torch.tensor([0.0, -1.0])}
    found = generalisation(margins, "train")
    assert found == ({"train": 0.75, "long": 0.5, "new": 0.0}, 0.5, 0.75)
    with pytest.raises(ValueError, match="at least two sets"):
        generalisation({"train": torch.ones(2)}, "train")


# -- over-optimisation, conflict ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "likelihood-overopt")
@pytest.mark.check("bad_input", "likelihood-overopt")
def test_top_k_by_hand() -> None:
    """p = .5, .3, .2 and k = 2: H = -.5 log .5 - .3 log .3, M = .8, renormalised p = .625, .375. The second position is masked out."""
    logits = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]], dtype=F64).log() + 3.0
    found = top_k(logits, torch.tensor([[True, False]]), k=2)
    expected = (-0.5 * math.log(0.5) - 0.3 * math.log(0.3), 0.8, -0.625 * math.log(0.625) - 0.375 * math.log(0.375))
    assert [float(x) for x in found] == pytest.approx(list(expected))
    with pytest.raises(ValueError, match="between 1 and the vocabulary's 3"):
        top_k(logits, torch.tensor([[True, True]]), k=4)


@pytest.mark.check("value", "adc")
@pytest.mark.check("bad_input", "adc")
def test_dimension_conflict_by_hand() -> None:
    """Training on 0 costs dimension 1 three points and dimension 2 one; gains and the trained dimension itself do not count."""
    change = torch.tensor([[-9.0, -3.0, -1.0], [2.0, 5.0, 0.0], [-2.0, 4.0, 1.0]])
    torch.testing.assert_close(dimension_conflict(change), torch.tensor([5.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="square"):
        dimension_conflict(change[:2])
    weights = hybrid_weights(torch.tensor([0.9, 0.8, 0.9]), temperature=0.1)
    torch.testing.assert_close(weights, torch.softmax(torch.tensor([0.0, 1.0, 0.0]), 0))


def test_pair_statistics_by_hand() -> None:
    logp = torch.tensor([[-1.0, -1.0], [-3.0, 7.0]], dtype=F64)
    mask = torch.tensor([[True, True], [True, False]])
    scores = TokenScores(logp, mask, {"ref": torch.tensor([[-2.0, -1.0], [-2.0, 0.0]], dtype=F64)})
    found = pair_statistics(scores, Views(pairs=torch.tensor([[0, 1]])), beta=0.1)
    expected = {
        "logp_chosen": -2.0, "logp_rejected": -3.0, "log_ratio_chosen": 1.0, "log_ratio_rejected": -1.0,
        "reward_chosen": 0.1, "reward_rejected": -0.1, "margin": 0.2,
        "accuracy": 1.0, "ranking_accuracy": 1.0, "ranking_accuracy_per_token": 1.0, "length_chosen": 2.0, "length_rejected": 1.0,
    }  # fmt: skip
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected)
    with pytest.raises(ValueError, match="anchor 'stage0'"):
        pair_statistics(scores, Views(pairs=torch.tensor([[0, 1]])), beta=0.1, anchor="stage0")


# -- token columns -----------------------------------------------------------------------------------------------------------------------------------


def test_shared_subset_is_uniform_and_as_long_as_the_shorter_response() -> None:
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, True, True, False], [False, False, True, False, True]])
    pairs = torch.tensor([[0, 1], [2, 3]])
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([shared_subset(mask, pairs, g) for _ in range(4000)])
    assert (drawn.sum(2) == 2).all() and not (drawn & ~mask).any()
    assert (drawn[:, 1] == mask[1]).all() and (drawn[:, 3] == mask[3]).all()
    torch.testing.assert_close(drawn[:, 0].float().mean(0), torch.full((5,), 2 / 5), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn[:, 2].float().mean(0), torch.tensor([0, 2 / 3, 2 / 3, 2 / 3, 0]), rtol=0, atol=0.03)
    with pytest.raises(ValueError, match="repeat the row"):
        shared_subset(mask, torch.tensor([[0, 1], [0, 2]]))


def test_equal_log_ratios_cancel_under_the_shared_subset_and_not_without() -> None:
    from markovia.algos.preference.methods import PREFERENCE

    mask = torch.arange(6) < torch.tensor([[6], [2]])
    logp = torch.full((2, 6), -0.3, dtype=F64)
    scores = TokenScores(logp, mask, {"ref": logp - 0.5})
    views = Views(pairs=torch.tensor([[0, 1]]), keep=shared_subset(mask, torch.tensor([[0, 1]]), torch.Generator().manual_seed(0)))
    margins = [float(PREFERENCE[m].value.loss.logits(scores, views)) for m in ("sam-po", "dpo")]
    assert margins == pytest.approx([0.0, 0.1 * 0.5 * 4])


def test_differing_tokens_by_hand() -> None:
    """1 2 3 4 against 1 9 3 4 5, behind a prompt token; 2 was replaced by 9 and 5 added."""
    tokens = torch.tensor([[7, 1, 2, 3, 4, 0], [7, 1, 9, 3, 4, 5]])
    mask = torch.tensor([[False, True, True, True, True, False], [False, True, True, True, True, True]])
    found = differing(tokens, mask, torch.tensor([[0, 1]]))
    assert found.int().tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1]]


def test_columns_of_the_next_token_distribution() -> None:
    """p = .5, .25, .25: sum of squares .375; KL of ref (.25, .5, .25) to it .25 log .5 + .5 log 2."""
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=F64).log() - 2.0
    ref = torch.tensor([0.25, 0.5, 0.25], dtype=F64).log() + 1.0
    assert float(log_collision(logits)) == pytest.approx(math.log(0.375))
    assert float(kl_ref_policy(logits, ref)) == pytest.approx(0.25 * math.log(0.5) + 0.5 * math.log(2.0))
    mixed = torch.softmax(mixture_logits(logits, ref, mix=0.5), -1)  # ~ sqrt(p q)
    root = torch.tensor([0.125, 0.125, 0.0625], dtype=F64).sqrt()
    torch.testing.assert_close(mixed, root / root.sum())


def test_soft_sync_and_extrapolation_by_hand() -> None:
    anchor, policy = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    assert soft_sync(anchor, policy, rate=0.25).tolist() == [0.25, 1.5] and soft_sync(anchor, policy, rate=1.0).tolist() == [1.0, 0.0]
    assert extrapolate(policy, anchor, momentum=0.5).tolist() == [1.5, -1.0]
