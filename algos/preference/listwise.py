"""Losses on lists of K scored or ranked responses to one prompt, one per list; pairs are lists of two.

    s (G, K)  beta x score of each response       r (G, K)  its reward           valid (G, K) bool  the list has it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.pieces import scalar_score
from markovia.algos.preference.scores import Score, TokenScores, merge, positive, require

EMPTY = -1e9  # logit of a place that a short list does not fill; -inf would make the gradient of p log p NaN


def fill(x: Tensor, valid: Tensor, value: float = EMPTY) -> Tensor:
    """x where the list has an entry, else `value`."""
    return torch.where(valid, x, value)


def reward_target(r: Tensor, valid: Tensor, *, temperature: float) -> Tensor:
    """log q (G, K), q = softmax(r / temperature) over the list."""
    return torch.log_softmax(fill(r / temperature, valid), 1)


def reverse_kl(s: Tensor, log_q: Tensor, valid: Tensor) -> Tensor:
    """EXO: the policy's law over the list is fitted by the mode-seeking divergence, whose full-list gradient is that of KL(pi || pi*).

    L = sum_i p_i (log p_i - log q_i), p = softmax(beta l), q = softmax(r / temperature)                       [Ji 2024; arXiv 2402.00856]
    """
    log_p = torch.log_softmax(fill(s, valid), 1)
    return (log_p.exp() * fill(log_p - log_q, valid, 0.0)).sum(1)


def cross_entropy(s: Tensor, log_q: Tensor, valid: Tensor) -> Tensor:
    """InfoNCA: the list's rewards as soft labels of a classifier over the list; K = 2 with hard labels is DPO.

    L = -sum_i q_i log softmax_i(beta l)                                                                    [Chen 2024; arXiv 2402.05369]
    """
    return -(log_q.exp() * fill(torch.log_softmax(fill(s, valid), 1), valid, 0.0)).sum(1)


def noise_contrastive(s: Tensor, log_q: Tensor, valid: Tensor) -> Tensor:
    """NCA: each response apart, so that the chosen likelihood cannot fall without bound.

    L = -sum_i q_i log sigma(m_i) - (1/K) sum_i log sigma(-m_i),  m = beta l                                [Chen 2024; arXiv 2402.05369]
    For a pair: phi(m_w) + phi(-m_w) / 2 + phi(-m_l) / 2.
    """
    noise = fill(F.logsigmoid(-s), valid, 0.0).sum(1) / valid.sum(1)
    return -(log_q.exp() * fill(F.logsigmoid(s), valid, 0.0)).sum(1) - noise


def lambda_weights(s: Tensor, r: Tensor, valid: Tensor) -> Tensor:
    """LiPO's weight of each ordered pair (i better than j) of a list, (G, K, K), without gradient.

    D_ij = |2^psi_i - 2^psi_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|, ranks from 1 by falling s, ties by position  [Liu 2024; arXiv 2402.01878]
    """
    order = torch.argsort(fill(s.detach(), valid), dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1, stable=True) + 1
    gain, discount = torch.exp2(r), 1.0 / torch.log1p(rank.to(s.dtype))
    return (gain[:, :, None] - gain[:, None]).abs() * (discount[:, :, None] - discount[:, None]).abs()


def lambda_rank(s: Tensor, r: Tensor, valid: Tensor) -> Tensor:
    """LiPO-lambda: a logistic loss on every ordered pair of the list, weighted by what swapping the two would cost in DCG.

    L = sum_{psi_i > psi_j} D_ij log(1 + e^(-(s_i - s_j))),  psi in [0, 1] the win rates                      [Liu 2024; arXiv 2402.01878]
    """
    better = (r[:, :, None] > r[:, None]) & valid[:, :, None] & valid[:, None]
    return (torch.where(better, lambda_weights(s, r, valid), 0.0) * -F.logsigmoid(s[:, :, None] - s[:, None])).sum((1, 2))


def gapped_plackett_luce(s: Tensor, r: Tensor, valid: Tensor, *, gaps: bool = True) -> Tensor:
    """PRO: Plackett-Luce from best to worst, each comparison sharpened by the gap in reward.

    L = sum_k -log[ e^(s_k g_kk) / (e^(s_k g_kk) + sum_{i>k} e^(s_i g_ki)) ],  g_ki = r_k - r_i,  g_kk = max_{i>k} g_ki
    over the list sorted by falling r; with every gap 1 it is ListMLE.                                          [Song 2023; arXiv 2306.17492]
    """
    order = torch.argsort(fill(r, valid), dim=1, descending=True, stable=True)
    s, r, valid = (x.gather(1, order) for x in (s, r, valid))
    K = s.shape[1]
    after = torch.ones(K, K, dtype=torch.bool, device=s.device).triu(1) & valid[:, None] & valid[:, :, None]  # (G, k, i): i comes after k
    g = r[:, :, None] - r[:, None] if gaps else torch.ones_like(r[:, :, None] - r[:, None])
    own = s * fill(g, after).amax(2).clamp(min=0.0)  # every gap of a sorted list is >= 0; a last place has none
    rest = torch.where(after, s[:, None] * g, -torch.inf)
    everything = torch.cat([own[:, :, None], rest], dim=2)
    return torch.where(after.any(2), torch.logsumexp(everything, 2) - own, 0.0).sum(1)


# -- the slot ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EXO:
    """KL(p || q)."""

    temperature: float = 1.0  # of the rewards, beta_r; with eps unset
    eps: float | None = None  # flip rate of pairs: q = (1 - eps, eps)

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        if self.eps is not None and not 0.0 < self.eps < 0.5:
            raise ValueError(f"eps must lie in (0, 0.5), got {self.eps}: at 0 the divergence to a certain label is infinite")

    def __call__(self, s: Tensor, r: Tensor, valid: Tensor) -> Tensor:
        if self.eps is None:
            return reverse_kl(s, reward_target(r, valid, temperature=self.temperature), valid)
        return reverse_kl(s, s.new_tensor([1.0 - self.eps, self.eps]).log().expand_as(s), valid)


@dataclass(frozen=True)
class InfoNCA:
    """KL(q || p), less the entropy of q."""

    temperature: float = 1.0  # alpha, of the rewards
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)

    def __call__(self, s: Tensor, r: Tensor, valid: Tensor) -> Tensor:
        return cross_entropy(s, reward_target(r, valid, temperature=self.temperature), valid)


@dataclass(frozen=True)
class NCA:
    """Binary noise contrast of each response."""

    temperature: float = 1.0  # alpha, of the rewards
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)

    def __call__(self, s: Tensor, r: Tensor, valid: Tensor) -> Tensor:
        return noise_contrastive(s, reward_target(r, valid, temperature=self.temperature), valid)


@dataclass(frozen=True)
class LambdaRank:
    """Weighted pairs of the list; rewards are win rates in [0, 1]."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, s: Tensor, r: Tensor, valid: Tensor) -> Tensor:
        return lambda_rank(s, r, valid)


@dataclass(frozen=True)
class PlackettLuce:
    """From best to worst, with or without PRO's gaps."""

    gaps: bool = True
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, s: Tensor, r: Tensor, valid: Tensor) -> Tensor:
        return gapped_plackett_luce(s, r, valid, gaps=self.gaps)


ListLoss = EXO | InfoNCA | NCA | LambdaRank | PlackettLuce


@dataclass(frozen=True)
class Listwise:
    """One loss per list (G,). With view "pairs" each pair is a list of two whose label is certain; scored pairs are groups of two rows."""

    score: Score = Score()  # noqa: RUF009 (frozen)
    beta: float = 0.1
    loss: ListLoss = InfoNCA()
    prior: tuple[tuple[str, float], ...] = ()  # (anchor, weight): sum-log-probs added to r / temperature; BRAIn's ratio of prior to proposal
    view: Literal["groups", "pairs"] = "groups"
    best_nll: float = 0.0  # PRO's c: + c (K - 1)^2 x summed NLL of the best response
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        if self.view not in ("groups", "pairs"):
            raise ValueError(f"view must be 'groups' or 'pairs', got {self.view!r}")
        soft = isinstance(self.loss, InfoNCA | EXO | NCA)
        if not soft and (self.prior or self.view == "pairs"):
            raise ValueError(f"{type(self.loss).__name__} ranks by reward: it has no prior, and needs groups with scores (pairs are groups of two)")
        if isinstance(self.loss, EXO) and (self.loss.eps is None) == (self.view == "pairs"):
            raise ValueError("EXO on pairs needs eps, the flip rate of their labels; on groups it reads rewards, with eps None")

    @property
    def needs(self) -> tuple[str, ...]:
        """What a call reads; see NEEDS."""
        rewards = ("groups", "score") if self.view == "groups" else ("pairs",)
        return merge(rewards, self.score.needs, (f"logp_ref.{name}" for name, _ in self.prior))

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        """(G,); raises ValueError for a missing or misshapen column."""
        require(scores, views, self.needs)
        index = views.groups if self.view == "groups" else views.pairs
        assert index is not None
        valid, at = index >= 0, index.clamp(min=0)
        s = self.beta * self.score(scores, views)[at]
        r = scalar_score(views)[at].to(s.dtype) if self.view == "groups" else s.new_tensor([0.0, EMPTY]).expand_as(s)
        for name, c in self.prior:
            r = r + c * getattr(self.loss, "temperature", 1.0) * scores.sums(scores.logp_ref[name])[at]
        loss = self.loss(s, r, valid)
        if self.best_nll:
            best = at.gather(1, fill(r, valid).argmax(1, keepdim=True)).squeeze(1)
            loss = loss - self.best_nll * (valid.sum(1) - 1).square().to(s.dtype) * scores.sums()[best]
        return loss if views.weight is None else loss * views.weight
