"""What is measured of a policy trained on preferences. Nothing here carries a gradient.

    logp_w, logp_l (P,)  log-probability of the chosen and of the rejected response, nats: sums, or means over tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.pieces import gap, sides
from markovia.algos.preference.scores import TokenScores, positive, require


def ranking_accuracy(logp_w: Tensor, logp_l: Tensor) -> Tensor:
    """Share of pairs that the policy itself ranks rightly; not the trainer's accuracy of implicit rewards.

    R = E 1[pi(y_w | x) >= pi(y_l | x)]                                                            [Chen 2024, definition 2.3; arXiv 2405.19534]
    """
    return (logp_w >= logp_l).float().mean()


def idealized_accuracy(logp_ref_w: Tensor, logp_ref_l: Tensor, share: Tensor, *, beta: float) -> Tensor:
    """The ranking accuracy of the exact optimum of DPO's objective: what perfect training could reach with this reference.

    R* = E 1[ log ref(y_w)/ref(y_l) + (1/beta) log(a / (1 - a)) >= 0 ], a (P,) the share of raters who prefer y_w
                                                                                                               [Chen 2024; arXiv 2405.19534]
    Raises ValueError unless beta > 0.
    """
    positive(beta=beta)
    return (logp_ref_w - logp_ref_l + torch.logit(share) / beta >= 0).float().mean()


def loss_to_flip(logp_ref_w: Tensor, logp_ref_l: Tensor, *, beta: float) -> Tensor:
    """(P,) the DPO loss at and below which a pair is ranked rightly, phi(beta c), c = log ref(y_l) / ref(y_w).           [arXiv 2405.19534]

    Where the reference is far off, the loss has to become very small before the ranking turns.
    """
    return F.softplus(-beta * (logp_ref_l - logp_ref_w))


def flips(right_before: Tensor, right_after: Tensor) -> Tensor:
    """(2, 2) shares of pairs: rows wrong, right before; columns wrong, right after. right_* (P,) bool."""
    cell = 2 * right_before.long() + right_after.long()
    return torch.bincount(cell, minlength=4).float().view(2, 2) / max(len(cell), 1)


class Generalisation(NamedTuple):
    """Accuracies of a reward, and what it loses outside its training distribution."""

    accuracy: dict[str, float]
    mean_drop: float
    worst_drop: float


def generalisation(margins: Mapping[str, Tensor], inside: str) -> Generalisation:
    """Accuracy of a reward model per set of pairs, A = E 1[score_w > score_l], and its drops against the set called `inside`.

    For DPO's implicit reward margins are beta (l_w - l_l), for an explicit one r_w - r_l; margins[name] (P,).        [Lin 2024; arXiv 2409.03650]
    Raises ValueError when `inside` is not one of the sets, or the only one.
    """
    if inside not in margins or len(margins) < 2:
        raise ValueError(f"name the training distribution among at least two sets of pairs, got {inside!r} and sets {sorted(margins)}")
    accuracy = {name: float((m > 0).float().mean()) for name, m in margins.items()}
    drops = [accuracy[inside] - a for name, a in accuracy.items() if name != inside]
    return Generalisation(accuracy, sum(drops) / len(drops), max(drops))


class TopK(NamedTuple):
    """Means over the masked positions."""

    entropy: Tensor  # () of the k largest probabilities as they are
    mass: Tensor  # () their sum
    entropy_renormalised: Tensor  # () after division by the mass


def top_k(logits: Tensor, mask: Tensor, *, k: int = 10) -> TopK:
    """Warning signs of likelihood over-optimisation: entropy of the k likeliest tokens turning down, their mass shrinking.

    H_k = -sum_{i<=k} p_i log p_i,  M_k = sum_{i<=k} p_i; mean over positions                                         [Shi 2024; arXiv 2410.11677]
    logits (B, T, V), mask (B, T) bool. H_k of renormalised p differs exactly when M_k shrinks, so both are given.
    Raises ValueError for k outside 1 ... V.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie between 1 and the vocabulary's {logits.shape[-1]}, got {k}")
    logp = torch.log_softmax(logits.detach(), -1).topk(k, dim=-1).values
    p = logp.exp()
    mass = p.sum(-1)
    entropy = -(p * logp).sum(-1)
    n = mask.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / n

    return TopK(mean(entropy), mean(mass), mean(entropy / mass + mass.log()))


def dimension_conflict(change: Tensor) -> Tensor:
    """(n,) how much training on each of n dimensions of preference harms the others; its mean is the data set's ADC. Lower is better.

    ADC_i = mean_{j != i} min(0, D_ij)^2,  D_ij the change of accuracy on dimension j after training on i            [Jiang 2024; arXiv 2405.11647]
    change (n, n): in percent points, as the paper's tables are, or in shares. Raises ValueError for another shape.
    """
    if change.ndim != 2 or change.shape[0] != change.shape[1] or len(change) < 2:
        raise ValueError(f"change must be square, one row per trained dimension and one column per measured one, got {tuple(change.shape)}")
    harm = change.clamp(max=0.0).square()
    return (harm.sum(1) - harm.diagonal()) / (len(change) - 1)


def hybrid_weights(accuracy: Tensor, *, temperature: float = 0.5) -> Tensor:
    """(n,) sampling weights of the next round: more of the dimensions whose held-out accuracy lags.

    softmax((max_j acc_j - acc_i) / temperature)                                                                              [arXiv 2405.11647]
    accuracy is a share in [0, 1]; a temperature far below the spread of accuracies overshoots, and dimensions then take turns in lagging.
    """
    positive(temperature=temperature)
    return torch.softmax((accuracy.max() - accuracy) / temperature, 0)


@torch.no_grad()
def pair_statistics(scores: TokenScores, views: Views, *, beta: float, anchor: str = "ref") -> dict[str, Tensor]:
    """What a preference run logs of a batch of pairs, each a number; rewards are beta l, log-probs sums in nats.

    accuracy counts implicit margins > 0 (0 at the start, where all are 0); ranking_accuracy is the policy's own ranking.
    """
    require(scores, views, ("pairs", f"logp_ref.{anchor}"))
    s, l = scores.sums(), scores.log_ratio(anchor)
    (s_w, s_l), (l_w, l_l), margin = sides(s, views), sides(l, views), gap(beta * l, views)
    length_w, length_l = sides(scores.lengths(), views)
    return {
        "logp_chosen": s_w.mean(),
        "logp_rejected": s_l.mean(),
        "log_ratio_chosen": l_w.mean(),
        "log_ratio_rejected": l_l.mean(),
        "reward_chosen": beta * l_w.mean(),
        "reward_rejected": beta * l_l.mean(),
        "margin": margin.mean(),
        "accuracy": (margin > 0).float().mean(),
        "ranking_accuracy": ranking_accuracy(s_w, s_l),
        "ranking_accuracy_per_token": ranking_accuracy(s_w / length_w, s_l / length_l),
        "length_chosen": length_w.mean(),
        "length_rejected": length_l.mean(),
    }
