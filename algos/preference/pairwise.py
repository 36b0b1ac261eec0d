"""Pairwise direct-alignment losses: scores in, one loss per pair out.

    diff (P,)  score(chosen) - score(rejected), nats          z = (beta diff - margin) / temperature
    L    (P,)  weight [ q f(z) + (1 - q) f(-z) ] coef + terms,  f the link

A method is a choice of difference, link f, label q, margin, weight and terms (preference.pieces).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.pieces import Certain, Fixed, Label, Margin, OtherRewards, Term, Unweighted, Weight, gap, sides
from markovia.algos.preference.scores import REF, Score, TokenScores, merge, positive, require

# -- links ---------------------------------------------------------------------------------------------------------------------------------


def logistic(z: Tensor) -> Tensor:
    """Bradley-Terry cross-entropy: RLHF's optimum by classification, without a reward model.

    phi(z) = -log s(z), s the logistic function; z = beta D, so L = -log s(beta (l_w - l_l))        [Rafailov 2023, eq. 7; arXiv 2305.18290]
    Its gradient vanishes once the pair is separated, and certain labels push D without bound.
    """
    return -F.logsigmoid(z)


def hinge(z: Tensor, *, delta: float) -> Tensor:
    """Separate the pair by delta and then leave it alone.

    L = max(0, delta - z)                                                                           [Zhao 2023; arXiv 2305.10425]
    """
    return torch.relu(delta - z)


def squared(z: Tensor, *, target: float) -> Tensor:
    """Regress z on a finite target, so that certain labels do not push it to infinity. z is a difference of sums; TRL's offline trainer takes means.

    L = (z - 1 / (2 tau))^2;  target = 1 / (2 tau)                                                        [Azar 2023, eq. 17; arXiv 2310.12036]
    """
    return (z - target).square()


@dataclass(frozen=True)
class Logistic:
    """-log s(z)."""

    limit: float | None = None  # |z| is held below this; only losses that are unbounded below need it

    def __call__(self, z: Tensor) -> Tensor:
        return logistic(z if self.limit is None else z.clamp(-self.limit, self.limit))


@dataclass(frozen=True)
class Hinge:
    """max(0, delta - z)."""

    delta: float = 1.0

    def __post_init__(self) -> None:
        positive(delta=self.delta)

    def __call__(self, z: Tensor) -> Tensor:
        return hinge(z, delta=self.delta)


@dataclass(frozen=True)
class Squared:
    """(z - 1 / (2 tau))^2."""

    tau: float = 0.1  # strength of the regularisation; the target margin is 1 / (2 tau)

    def __post_init__(self) -> None:
        positive(tau=self.tau)

    def __call__(self, z: Tensor) -> Tensor:
        return squared(z, target=0.5 / self.tau)


@dataclass(frozen=True)
class Residual:
    """z^2: the margin is what beta D is regressed on."""

    def __call__(self, z: Tensor) -> Tensor:
        return squared(z, target=0.0)


Link = Logistic | Hinge | Squared | Residual

# -- differences ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """score(chosen) - score(rejected)."""

    score: Score = Score()  # noqa: RUF009 (frozen)

    @property
    def needs(self) -> tuple[str, ...]:
        return merge(("pairs",), self.score.needs)

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        return gap(self.score(scores, views), views)


def token_kl_offset(kl_chosen: Tensor, kl_rejected: Tensor, *, alpha: float, detach_chosen: bool) -> Tensor:
    """TDPO's offset of the log-ratio difference, (P,) nats, from the sequential KL(ref || pi) of each response.

    TDPO1: SeqKL_w - SeqKL_l;   TDPO2: alpha (sg SeqKL_w - SeqKL_l)                                  [Zeng 2024; arXiv 2404.11999]
    The stop on the chosen side keeps KL from being raised there; alpha = 0 is DPO.
    """
    return alpha * ((kl_chosen.detach() if detach_chosen else kl_chosen) - kl_rejected)


@dataclass(frozen=True)
class TokenKL:
    """DPO's difference and TDPO's offset by the sequential KL."""

    alpha: float = 0.5
    detach_chosen: bool = True  # TDPO2; False with alpha = 1 is TDPO1
    score: Score = Score()  # noqa: RUF009 (frozen)

    @property
    def needs(self) -> tuple[str, ...]:
        return merge(("pairs", "kl_ref"), self.score.needs)

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        w, l = sides(scores.sums(scores.kl_ref), views)
        return gap(self.score(scores, views), views) + token_kl_offset(w, l, alpha=self.alpha, detach_chosen=self.detach_chosen)


@dataclass(frozen=True)
class Blend:
    """WRPO: the chosen score moves from the target's own response to the one of a stronger model, while training proceeds.

    D = a s(gold) + (1 - a) s(chosen) - s(rejected), a from 0 to alpha over the run                        [Yang 2024; arXiv 2412.03187]
    """

    alpha: float = 0.1  # a at the end of training
    score: Score = Score()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha blends two scores, it must lie in [0, 1], got {self.alpha}")

    @property
    def needs(self) -> tuple[str, ...]:
        return merge(("pairs", "gold", "progress"), self.score.needs)

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        assert scores.progress is not None and views.gold is not None
        s = self.score(scores, views)
        w, l = sides(s, views)
        a = self.alpha * scores.progress
        return a * s[views.gold] + (1.0 - a) * w - l


@dataclass(frozen=True)
class Crossed:
    """IOPO: two prompts with their own answers against the answers swapped; a group holds the rows y1|x1, y2|x2, y2|x1, y1|x2.

    D = l(y1|x1) + l(y2|x2) - l(y2|x1) - l(y1|x2)                                                        [Zhang 2024; arXiv 2411.06208]
    The paper's mean of two groups is the same. Anchors do not cancel: the prompts differ.
    """

    score: Score = Score()  # noqa: RUF009 (frozen)

    @property
    def needs(self) -> tuple[str, ...]:
        return merge(("groups",), self.score.needs)

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        assert views.groups is not None
        if views.groups.shape[1] != 4:
            raise ValueError(f"a crossed pair is 4 rows (y1|x1, y2|x2, y2|x1, y1|x2), views.groups has shape {tuple(views.groups.shape)}")
        own1, own2, swapped1, swapped2 = self.score(scores, views)[views.groups].unbind(1)
        return own1 + own2 - swapped1 - swapped2


Contrast = Difference | TokenKL | Blend | Crossed

# -- the loss ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairwise:
    """One loss per pair (P,): weight coef [q f(z) + (1 - q) f(-z)] + terms, z = (beta D - margin) / temperature."""

    beta: float = 0.1
    diff: Contrast = Difference()
    link: Link = Logistic()
    label: Label = Certain()  # noqa: RUF009 (frozen)
    margin: Margin = Fixed()  # noqa: RUF009 (frozen)
    temperature: float = 1.0  # divides the logit; MODPO's weight of the labelled dimension
    weight: Weight = Unweighted()  # noqa: RUF009 (frozen)
    coef: float = 1.0  # of the pair's part; the terms have their own
    terms: tuple[Term, ...] = ()
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(beta=self.beta, temperature=self.temperature, coef=self.coef)
        if isinstance(self.margin, OtherRewards) and not math.isclose(sum(self.margin.weights) + self.temperature, 1.0, abs_tol=1e-6):
            raise ValueError(
                f"the weights of all dimensions sum to 1: margin.weights {self.margin.weights} and temperature {self.temperature} "
                f"(weight of the labelled one) sum to {sum(self.margin.weights) + self.temperature:.4g}"
            )
        if isinstance(self.diff, Crossed) and (self.terms or not isinstance(self.margin, Fixed) or not isinstance(self.label, Certain)):
            raise ValueError("a crossed pair has no label, margin or term of its own; leave them at their defaults")

    @property
    def needs(self) -> tuple[str, ...]:
        """What a call reads; see NEEDS."""
        return merge(self.diff.needs, self.label.needs, self.margin.needs, self.weight.needs, *(t.needs for t in self.terms))

    def logits(self, scores: TokenScores, views: Views) -> Tensor:
        """z (P,)."""
        return (self.beta * self.diff(scores, views) - self.margin(scores, views, self.beta)) / self.temperature

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        """(P,); raises ValueError for a missing or misshapen column."""
        require(scores, views, self.needs)
        z, q = self.logits(scores, views), self.label(views)
        loss = self.link(z) if isinstance(q, float) and q == 1.0 else q * self.link(z) + (1.0 - q) * self.link(-z)
        loss = self.coef * loss * self.weight(scores, views)
        for term in self.terms:
            loss = loss + term(scores, views)
        return loss if views.weight is None else loss * views.weight


__all__ = ["REF", "Blend", "Crossed", "Difference", "Hinge", "Link", "Logistic", "Pairwise", "Residual", "Score", "Squared", "TokenKL"]
