"""Losses of single responses, each with a label, a score or nothing but itself; and losses that match sorted samples.

    s (U,)  score of the response, nats      label (U,) bool  desirable      r (U,)  its reward or win rate
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.pairwise import Link, Logistic
from markovia.algos.preference.pieces import gap, scalar_score
from markovia.algos.preference.scores import Score, TokenScores, merge, positive, require
from markovia.algos.table import nearest


def kto(s: Tensor, label: Tensor, z0: Tensor, *, beta: float, desirable: float, undesirable: float) -> Tensor:
    """Prospect theory: gains and losses are judged against a reference point, so no pairs are needed.

    L = lam_D (1 - s(beta (l - z0))) if desirable, lam_U (1 - s(beta (z0 - l))) if not              [Ethayarajh 2024; arXiv 2402.01306]
    z0 () nats, without gradient: max(0, mean log-ratio of mismatched prompts and responses), beta outside it.
    """
    sign = torch.where(label, 1.0, -1.0).to(s.dtype)
    lam = torch.where(label, desirable, undesirable).to(s.dtype)
    return lam * torch.sigmoid(-beta * sign * (s - z0))


def classify(s: Tensor, label: Tensor, *, beta: float) -> Tensor:
    """Each response against zero: phi(beta s) where it is desirable, phi(-beta s) where not; ASFT's part on odds.           [arXiv 2409.10571]

    On log odds at beta 1: -log p of the chosen and -log(1 - p) of the rejected, likelihood plus unlikelihood.
    """
    return -F.logsigmoid(torch.where(label, beta * s, -beta * s))


def win_rate_regression(s: Tensor, rate: Tensor, *, eta: float) -> Tensor:
    """SPPO: one step of multiplicative weights as a regression of log pi / pi_t on the win rate against pi_t.

    L = (s - eta (P(y > pi_t) - 1/2))^2;  hard labels put P in {0, 1}, targets +- eta / 2                            [Wu 2024; arXiv 2405.00675]
    """
    return (s - eta * (rate - 0.5)).square()


def dro(s: Tensor, r: Tensor, value: Tensor, *, tau: float) -> Tensor:
    """DRO-V: single rewards; the policy's step is rescaled by 1 / tau so that one learning rate serves policy and value.

    L = (1 / (2 tau)) (r - sg V - tau l)^2 + (1/2) (r - V - tau sg l)^2, both from (1/2) (r - V - tau l)^2   [Richemond 2024; arXiv 2405.19107]
    Optimum pi = ref e^(r / tau) / Z, V = tau log Z; policy gradient -(r - V) grad S + (tau / 2) grad l^2.
    """
    return (0.5 / tau) * (r - value.detach() - tau * s).square() + 0.5 * (r - value - tau * s.detach()).square()


Generator = Literal["tv", "chi2", "kl", "js", "hellinger"]
FLOOR = {"js": -0.6, "hellinger": -0.9}  # r is held above; the domains end at -log 2 and -1


def imitation(r: Tensor, *, generator: Generator) -> Tensor:
    """Learning from demonstrations as reward learning: -g(r), r = beta l the implicit reward of a demonstration.

    g: tv r (ordinary SFT); chi2 r - r^2 / 4; kl 1 - e^-r; js log(2 - e^-r); hellinger r / (1 + r)             [Wang 2025; arXiv 2507.00018]
    The list is derived from the conjugates of f-divergence imitation. All have slope 1 at r = 0, where pi = ref; js and hellinger are held
    above -0.6 and -0.9, where they go on with their slope there.
    """
    if generator == "tv":
        return -r
    if generator == "chi2":
        return -(r - 0.25 * r.square())
    if generator == "kl":
        return torch.exp((-r).clamp(max=60.0)) - 1.0
    floor = FLOOR[generator]
    held = r.clamp(min=floor)
    below = (r - held) * (1.0 / (2.0 * math.exp(floor) - 1.0) if generator == "js" else (1.0 + floor) ** -2.0)
    g = torch.log(2.0 - torch.exp(-held)) if generator == "js" else held / (1.0 + held)
    return -(g + below)


def quantiles(x: Tensor, n: int) -> Tensor:
    """n order statistics of a sample (m,), linearly interpolated where m is not n; the gradient follows the permutation."""
    ordered = torch.sort(x).values
    if len(x) == n:
        return ordered
    at = torch.linspace(0.0, len(x) - 1.0, n, dtype=x.dtype, device=x.device) if n > 1 else x.new_full((1,), (len(x) - 1) / 2)
    low = at.floor().long().clamp(max=max(len(x) - 2, 0))
    return torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(x) - 1)], at - low)


# -- one response at a time ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KTO:
    """Labels against a reference point that the batch estimates."""

    beta: float = 0.1
    desirable: float = 1.0  # lam_D; keep lam_D n_D / (lam_U n_U) in [1, 4/3]
    undesirable: float = 1.0  # lam_U
    needs: ClassVar[tuple[str, ...]] = ("label", "mismatched")
    coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(beta=self.beta, desirable=self.desirable, undesirable=self.undesirable)

    def __call__(self, s: Tensor, rows: Tensor, scores: TokenScores, views: Views, label: Tensor | None) -> Tensor:
        assert label is not None and scores.mismatched is not None
        z0 = scores.mismatched.detach().mean().clamp(min=0.0)
        return kto(s, label, z0, beta=self.beta, desirable=self.desirable, undesirable=self.undesirable)


@dataclass(frozen=True)
class Classify:
    """phi(+-beta s)."""

    beta: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("label",)
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def __call__(self, s: Tensor, rows: Tensor, scores: TokenScores, views: Views, label: Tensor | None) -> Tensor:
        assert label is not None
        return classify(s, label, beta=self.beta)


@dataclass(frozen=True)
class WinRate:
    """Regression on win rates, or on labels as win rates of 0 and 1."""

    eta: float = 1e3  # 1 / beta
    hard: bool = False  # labels for win rates

    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(eta=self.eta)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("label",) if self.hard else ("score",)

    def __call__(self, s: Tensor, rows: Tensor, scores: TokenScores, views: Views, label: Tensor | None) -> Tensor:
        if self.hard:
            assert label is not None
            return win_rate_regression(s, label.to(s.dtype), eta=self.eta)
        return win_rate_regression(s, scalar_score(views)[rows].to(s.dtype), eta=self.eta)


@dataclass(frozen=True)
class DRO:
    """Rewards with a value network."""

    tau: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("score", "value")
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(tau=self.tau)

    def __call__(self, s: Tensor, rows: Tensor, scores: TokenScores, views: Views, label: Tensor | None) -> Tensor:
        assert scores.value is not None
        return dro(s, scalar_score(views)[rows].to(s.dtype), scores.value[rows], tau=self.tau)


@dataclass(frozen=True)
class Imitate:
    """-g(beta s) of demonstrations."""

    beta: float = 0.1
    generator: Generator = "chi2"
    needs: ClassVar[tuple[str, ...]] = ()
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        if self.generator not in (known := ("tv", "chi2", "kl", "js", "hellinger")):
            raise ValueError(f"unknown generator {self.generator!r}{nearest(self.generator, known)}")

    def __call__(self, s: Tensor, rows: Tensor, scores: TokenScores, views: Views, label: Tensor | None) -> Tensor:
        return imitation(self.beta * s, generator=self.generator)


Point = KTO | Classify | WinRate | DRO | Imitate


@dataclass(frozen=True)
class Pointwise:
    """One loss per unpaired row (U,), or per pair (P,): the sum over its two rows, the chosen one labelled desirable."""

    point: Point = KTO()
    score: Score = Score()  # noqa: RUF009 (frozen)
    view: Literal["unpaired", "pairs"] = "unpaired"
    coef: float = 1.0  # of the point losses; 1/2 makes a pair's sum a mean
    chosen_nll: float = 0.0  # coefficient of the chosen response's mean NLL (pairs)

    def __post_init__(self) -> None:
        positive(coef=self.coef)
        if self.view not in ("unpaired", "pairs"):
            raise ValueError(f"view must be 'unpaired' or 'pairs', got {self.view!r}")
        if self.chosen_nll and self.view != "pairs":
            raise ValueError("chosen_nll is of the chosen response of a pair; set view='pairs'")

    @property
    def coupled(self) -> bool:
        """Whether items of a batch see each other."""
        return self.point.coupled

    @property
    def needs(self) -> tuple[str, ...]:
        """What a call reads; see NEEDS. The rows of a pair carry their label by their place."""
        point = self.point.needs if self.view == "unpaired" else tuple(n for n in self.point.needs if n != "label")
        return merge((self.view,), self.score.needs, point)

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        """(U,) or (P,); raises ValueError for a missing or misshapen column."""
        require(scores, views, self.needs)
        rows = views.unpaired if self.view == "unpaired" else views.pairs
        assert rows is not None
        s = self.score(scores, views)[rows]
        if self.view == "pairs":
            label: Tensor | None = torch.tensor([True, False], device=s.device).expand_as(s)
        else:
            label = None if views.label is None else views.label[rows]
        loss = self.coef * self.point(s, rows, scores, views, label)
        if self.view == "pairs":
            loss = loss.sum(1) - self.chosen_nll * scores.means()[rows[:, 0]]
        return loss if views.weight is None else loss * views.weight


# -- sorted samples ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transport:
    """AOT: the distribution of good scores should dominate that of bad ones, so both are sorted and compared rank by rank.

    unpaired: mean_i f(beta (l+_(i) - l-_(i)));  pairs: mean_i f(beta (D_(i) - Dref_(i))), D = S_w - S_l        [Melnyk 2024; arXiv 2406.05882]
    One item per rank; a batch of one is DPO. With unequal counts the longer sample is read at as many quantiles as the shorter has.
    """

    beta: float = 0.01
    link: Link = Logistic()  # noqa: RUF009 (frozen)
    eps: float = 0.0  # label smoothing: q = 1 - eps
    view: Literal["pairs", "unpaired"] = "pairs"
    coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        if not 0.0 <= self.eps < 0.5:
            raise ValueError(f"eps is the rate of wrong labels, it must lie in [0, 0.5), got {self.eps}")
        if self.view not in ("unpaired", "pairs"):
            raise ValueError(f"view must be 'unpaired' or 'pairs', got {self.view!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """What a call reads; see NEEDS."""
        return ("pairs", "logp_ref.ref") if self.view == "pairs" else ("unpaired", "label", "logp_ref.ref")

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        """(P,) or (min(n+, n-),); raises ValueError for pair weights and for a batch of one label only."""
        require(scores, views, self.needs)
        if views.weight is not None:
            raise ValueError("sorting breaks the pairs up, so a weight per pair has no meaning here; drop views.weight")
        if self.view == "pairs":
            good = torch.sort(gap(scores.sums(), views)).values
            bad = torch.sort(gap(scores.sums(scores.logp_ref["ref"].detach()), views)).values
        else:
            assert views.unpaired is not None and views.label is not None
            l, label = Score()(scores, views)[views.unpaired], views.label[views.unpaired]
            positives, negatives = l[label], l[~label]
            n = min(len(positives), len(negatives))
            if not n:
                raise ValueError(f"this batch has {len(positives)} desirable and {len(negatives)} undesirable rows; both kinds are compared")
            good, bad = quantiles(positives, n), quantiles(negatives, n)
        z = self.beta * (good - bad)
        return self.link(z) if self.eps == 0.0 else (1.0 - self.eps) * self.link(z) + self.eps * self.link(-z)
