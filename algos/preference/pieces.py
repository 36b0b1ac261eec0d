"""What a pair loss is given besides its two scores: a label q, a margin, a weight, and terms that are added. Each of them is one number per pair.

    q (P,)       probability that the chosen response is preferred          margin (P,)  subtracted from the logit
    weight (P,)  factor of the loss, without gradient                       term (P,)    added to it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.scores import TokenScores, merge, positive, response_score


def sides(x: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """x (B, ...) of the chosen and of the rejected rows, each (P, ...)."""
    assert views.pairs is not None
    return x[views.pairs[:, 0]], x[views.pairs[:, 1]]


def gap(x: Tensor, views: Views) -> Tensor:
    """x(chosen) - x(rejected), (P, ...)."""
    w, l = sides(x, views)
    return w - l


def scalar_score(views: Views) -> Tensor:
    """views.score as (B,). Raises ValueError where it has several dimensions."""
    assert views.score is not None
    if views.score.ndim != 1:
        raise ValueError(f"this loss reads one reward per row, views.score has shape {tuple(views.score.shape)}; choose a dimension or a sum")
    return views.score


# -- labels --------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certain:
    """q = 1: the pair is as labelled."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, views: Views) -> Tensor | float:
        return 1.0


@dataclass(frozen=True)
class Smoothed:
    """cDPO: q = 1 - eps, labels are wrong at a rate eps and the margin should stay finite."""

    eps: float = 0.1  # in [0, 1/2)
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        _flip_rate(self.eps)

    def __call__(self, views: Views) -> Tensor | float:
        return 1.0 - self.eps


@dataclass(frozen=True)
class Debiased:
    """Robust DPO: the loss whose mean over flips at rate eps is the loss of the true labels.

    L = [(1 - eps) f(z) - eps f(-z)] / (1 - 2 eps), that is q = (1 - eps) / (1 - 2 eps) > 1     [Chowdhury 2024; arXiv 2403.00409]
    One sample's loss is unbounded below (-eps z / (1 - 2 eps)): give the link a limit on z.
    """

    eps: float = 0.1  # flip rate, in [0, 1/2)
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        _flip_rate(self.eps)

    def __call__(self, views: Views) -> Tensor | float:
        return (1.0 - self.eps) / (1.0 - 2.0 * self.eps)


def _flip_rate(eps: float) -> None:
    if not 0.0 <= eps < 0.5:
        raise ValueError(f"eps is the rate of wrong labels, it must lie in [0, 0.5), got {eps}; above 0.5 swap chosen and rejected")


@dataclass(frozen=True)
class Given:
    """q of the data: a judge's probability or a share of votes."""

    needs: ClassVar[tuple[str, ...]] = ("q",)

    def __call__(self, views: Views) -> Tensor | float:
        assert views.q is not None
        return views.q


@dataclass(frozen=True)
class FromScores:
    """MMPO: q = s(c (score_w - score_l)), so that the margin's fixed point is beta D = c (score_w - score_l).                   [arXiv 2410.03145]"""

    c: float = 2.2  # logits per unit of score
    needs: ClassVar[tuple[str, ...]] = ("pairs", "score")

    def __post_init__(self) -> None:
        positive(c=self.c)

    def __call__(self, views: Views) -> Tensor | float:
        return torch.sigmoid(self.c * gap(scalar_score(views), views))


Label = Certain | Smoothed | Debiased | Given | FromScores

# -- margins -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """The same margin gamma for every pair; 0 is none."""

    gamma: float = 0.0  # on the logit scale
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, scores: TokenScores, views: Views, beta: float) -> Tensor | float:
        return self.gamma


@dataclass(frozen=True)
class FromData:
    """views.margin."""

    needs: ClassVar[tuple[str, ...]] = ("margin",)

    def __call__(self, scores: TokenScores, views: Views, beta: float) -> Tensor | float:
        assert views.margin is not None
        return views.margin


@dataclass(frozen=True)
class ScoreGap:
    """margin = c (score_w - score_l) - c k (log old/ref of w - of l): what the log-ratio is regressed on, or has to exceed.

    How refined DPO's scores enter its loss is not public: this margin, and soft labels (`FromScores`), are the two reconstructions.
    REBEL with c = eta; refined DPO in the logit; k > 0 keeps the sampler near the reference.   [arXiv 2404.16767; 2402.08005; 2406.19185]
    """

    c: float = 1.0  # log-ratio per unit of score
    kl_coef: float = 0.0  # k of the penalty on log(old / ref), read from the anchors old and ref

    @property
    def needs(self) -> tuple[str, ...]:
        return ("pairs", "score", *(("logp_ref.old", "logp_ref.ref") if self.kl_coef else ()))

    def __call__(self, scores: TokenScores, views: Views, beta: float) -> Tensor | float:
        reward = scalar_score(views)
        if self.kl_coef:
            reward = reward - self.kl_coef * scores.sums(scores.logp_ref["old"] - scores.logp_ref["ref"])
        return self.c * gap(reward, views)


@dataclass(frozen=True)
class LogitOfVotes:
    """iREPO: margin = log p/(1-p) of the share p of votes, p kept in [1/(2h), 1 - 1/(2h)] for h votes.                          [arXiv 2405.15230]"""

    votes: int = 5  # h, annotators per pair
    needs: ClassVar[tuple[str, ...]] = ("q",)

    def __post_init__(self) -> None:
        if self.votes < 1:
            raise ValueError(f"votes counts annotators per pair, it must be >= 1, got {self.votes}")

    def __call__(self, scores: TokenScores, views: Views, beta: float) -> Tensor | float:
        assert views.q is not None
        edge = 0.5 / self.votes
        return torch.logit(views.q.clamp(edge, 1.0 - edge))


@dataclass(frozen=True)
class ReferenceGap:
    """MIPO: margin = beta log(1 + e^K), K = mean log ref(y_w) - mean log ref(y_l): more reference where it is right already.  [arXiv 2409.17545]

    K large is length-normalised DPO, K very negative is SimPO without a margin.
    """

    needs: ClassVar[tuple[str, ...]] = ("pairs", "logp_ref.ref")

    def __call__(self, scores: TokenScores, views: Views, beta: float) -> Tensor | float:
        return beta * F.softplus(gap(scores.means(scores.logp_ref["ref"]), views))


@dataclass(frozen=True)
class OtherRewards:
    """MODPO: margin = w_-k . (R_-k(y_w) - R_-k(y_l)); the pair is labelled by dimension k, whose weight is 0 here and the temperature of the loss.

    L = phi((1 / w_k) [beta D - w_-k . (R_-k(y_w) - R_-k(y_l))]), optimum ref e^(w.r / beta) / Z                [Zhou 2023; arXiv 2310.03708]
    """

    weights: tuple[float, ...] = (0.0, 0.5)  # per column of views.score, 0 for the labelled one
    needs: ClassVar[tuple[str, ...]] = ("pairs", "score")

    def __call__(self, scores: TokenScores, views: Views, beta: float) -> Tensor | float:
        assert views.score is not None
        if views.score.ndim != 2 or views.score.shape[1] != len(self.weights):
            raise ValueError(f"MODPO reads {len(self.weights)} rewards per row, views.score has shape {tuple(views.score.shape)}, wanted (B, D)")
        return gap(views.score, views) @ views.score.new_tensor(self.weights)


@dataclass(frozen=True)
class EarlierRounds:
    """Sequential PO: margin = sum_i lam_i D R_i, with the implicit rewards of the rounds before, read from their anchors stage0, ... of a file

    R_i = beta log(pi_i / pi_(i-1)) - sum_{j<i} lam_j R_j;  optimum pi_n ~ pi_(n-1) e^((R_n + sum_i lam_i R_i) / beta)     [arXiv 2405.12739, derived]
    """

    lam: tuple[float, ...] = (1.0,)  # one per earlier round

    @property
    def needs(self) -> tuple[str, ...]:
        return ("pairs", *(f"logp_ref.stage{i}" for i in range(len(self.lam) + 1)))

    def __call__(self, scores: TokenScores, views: Views, beta: float) -> Tensor | float:
        total: Tensor = torch.zeros_like(scores.logp[:, 0])
        for i, lam in enumerate(self.lam):
            reward = beta * scores.sums(scores.logp_ref[f"stage{i + 1}"] - scores.logp_ref[f"stage{i}"]) - total
            total = total + lam * reward
        return gap(total.detach(), views)


Margin = Fixed | FromData | ScoreGap | LogitOfVotes | ReferenceGap | OtherRewards | EarlierRounds

# -- weights -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unweighted:
    """1."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, scores: TokenScores, views: Views) -> Tensor | float:
        return 1.0


@dataclass(frozen=True)
class OnPolicyWeight:
    """WPO: pairs that the policy would write itself count more; a policy's own token has factor about 1, whatever its entropy.

    w(y) = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2]);  weight = sg min(w(y_w) w(y_l), 1)                       [Zhou 2024; arXiv 2406.11827]
    """

    limit: float = 1.0  # the official code's clamp; infinity for none, as in TRL
    needs: ClassVar[tuple[str, ...]] = ("pairs", "collision")

    def __call__(self, scores: TokenScores, views: Views) -> Tensor | float:
        assert scores.collision is not None
        w, l = sides(scores.means((scores.logp - scores.collision).detach()), views)
        return torch.exp(w + l).clamp(max=self.limit)


Weight = Unweighted | OnPolicyWeight

# -- terms ---------------------------------------------------------------------------------------------------------------------------------


def rows_of(which: str, views: Views) -> Tensor:
    """(P,) row indices of the chosen, rejected or gold responses."""
    if which == "gold":
        assert views.gold is not None
        return views.gold
    assert views.pairs is not None
    return views.pairs[:, 0 if which == "chosen" else 1]


@dataclass(frozen=True)
class NLL:
    """coef x the negative log-likelihood of one response of the pair: RPO's and CPO's regulariser, SLiC's and TPO's target.   [arXiv 2405.16436]

    -coef sum_t log pi(y_t), or its mean over tokens: the two differ by |y|, and so does what coef means.
    """

    coef: float = 1.0
    of: Literal["chosen", "gold"] = "chosen"
    reduce: Literal["sum", "mean"] = "mean"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("pairs", "gold") if self.of == "gold" else ("pairs",)

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        total = scores.means() if self.reduce == "mean" else scores.sums()
        return -self.coef * total[rows_of(self.of, views)]


@dataclass(frozen=True)
class LogRatio:
    """coef x the log-ratio l of one response of the pair: above 0 pushes it down (a sample to calibrate on), below 0 pulls it up.  [arXiv 2405.19320]

    With a bound, l is replaced by bound tanh(l / bound): a term that is linear in l alone has no minimum. SPAC is three such terms beside the pair
    loss, + l(own sample) / eta - (l_w + l_l) / (2 eta), reconstructed from its game between actor and critic (arXiv 2406.04274).
    """

    coef: float = 1.0
    of: Literal["chosen", "rejected", "gold"] = "gold"
    anchor: str = "ref"
    bound: float | None = None  # nats

    @property
    def needs(self) -> tuple[str, ...]:
        return merge(("pairs",), ("gold",) if self.of == "gold" else (), (f"logp_ref.{self.anchor}",))

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        l = response_score(scores, anchors=((self.anchor, 1.0),))[rows_of(self.of, views)]
        return self.coef * (l if self.bound is None else self.bound * torch.tanh(l / self.bound))


Term = NLL | LogRatio
