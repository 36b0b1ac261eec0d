"""From log-probabilities per token to one score per response.

    a_t  log pi(y_t | x, y_<t), nats, with gradient       b_t  the same under an anchor, never with gradient
    s(y) = psi( reduce_t w_t (c a_t - sum_k c_k b_t^k) )  which sum, which anchors and which psi is a method's choice

A denoising chain fills the same record: its log-ratio (or control pair's difference) per step is logp, with anchors of zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.shapes import Psi, shape
from markovia.algos.table import nearest

NEEDS = {
    "logp_ref.NAME": "log-probabilities (B, T) under the anchor NAME: scores.logp_ref[NAME]",
    "kl_ref": "KL(ref || policy) of the next-token distribution per token, (B, T), with gradient: scores.kl_ref",
    "collision": "log sum_v pi(v)^2 of the next-token distribution per token, (B, T): scores.collision",
    "value": "V(x) of each row's prompt, (B,), with gradient: scores.value",
    "mismatched": "log-ratios of responses under other prompts, any shape: scores.mismatched",
    "progress": "the share of training that is done, a number in [0, 1]: scores.progress",
    "pairs": "rows of chosen and rejected responses, (P, 2): views.pairs",
    "groups": "rows of each list, (G, K): views.groups",
    "gold": "a third row of each pair, (P,): views.gold",
    "unpaired": "rows that stand alone, (U,): views.unpaired",
    "q": "probability that the chosen response is preferred, (P,): views.q",
    "margin": "margin of each pair on the logit scale, (P,): views.margin",
    "score": "reward or win rate of each row, (B,) or (B, D): views.score",
    "label": "whether each row is desirable, (B,) bool: views.label",
    "c": "weight of each token in the score, (B, T): views.c",
    "keep": "decisions that enter the score, (B, T) bool: views.keep (preference.token_level.shared_subset draws it)",
    "diff": "decisions in which the responses of a pair differ, (B, T) bool: views.diff (preference.token_level.differing finds them)",
}
_IN_SCORES = {"kl_ref", "collision", "value", "mismatched", "progress"}
_PER_TOKEN = {"kl_ref", "collision", "c", "keep", "diff"}


@dataclass
class TokenScores:
    """What forward passes say of B responses of up to T tokens, in nats. A row of which only the sum is known has T = 1 and a `length`."""

    logp: Tensor  # (B, T) under the policy, with gradient
    mask: Tensor  # (B, T) bool: tokens of the response, its end included, prompt and padding not
    logp_ref: dict[str, Tensor] = field(default_factory=dict)  # (B, T) per anchor, without gradient
    length: Tensor | None = None  # (B,) tokens of the response, where that is not the mask's count
    kl_ref: Tensor | None = None  # (B, T) KL(ref || policy) over the vocabulary, with gradient
    collision: Tensor | None = None  # (B, T) log sum_v pi(v)^2
    value: Tensor | None = None  # (B,) V(x), with gradient
    mismatched: Tensor | None = None  # log-ratios of responses put under other prompts, without gradient
    progress: float | None = None  # share of training done, in [0, 1]

    def tokens(self, x: Tensor) -> Tensor:
        """x (B, T) with zeros where the mask is off, whatever stands there."""
        return torch.where(self.mask, x, 0.0)

    def sums(self, x: Tensor | None = None) -> Tensor:
        """(B,) sum over the response of x, by default of the policy's log-probs."""
        return self.tokens(self.logp if x is None else x).sum(1)

    def lengths(self) -> Tensor:
        """(B,) number of tokens, at least 1."""
        count = self.mask.sum(1) if self.length is None else self.length
        return count.clamp(min=1).to(self.logp.dtype)

    def means(self, x: Tensor | None = None) -> Tensor:
        """(B,) mean over the response of x, by default of the policy's log-probs."""
        return self.sums(x) / self.lengths()

    def log_ratio(self, anchor: str = "ref") -> Tensor:
        """(B,) summed log pi - log anchor."""
        return self.sums(self.logp - self.logp_ref[anchor])


def merge(*needs: Iterable[str]) -> tuple[str, ...]:
    """The union of what several components need, in order of first mention."""
    return tuple(dict.fromkeys(name for part in needs for name in part))


def require(scores: TokenScores, views: Views, needs: Iterable[str]) -> None:
    """Raises ValueError naming a column that is missing or of another shape, what it holds, and where it goes."""
    shape_ = tuple(scores.logp.shape)
    if scores.logp.ndim != 2 or tuple(scores.mask.shape) != shape_ or scores.mask.dtype != torch.bool:
        raise ValueError(
            f"scores.logp and scores.mask must both be (rows, tokens), the mask bool; got {shape_} and "
            f"{tuple(scores.mask.shape)} {scores.mask.dtype}; a row known by its sum only has one token"
        )
    for name in needs:
        anchor = name.partition(".")[2]
        if anchor:
            found = scores.logp_ref.get(anchor)
            if found is None:
                have = sorted(scores.logp_ref)
                raise ValueError(
                    f"this loss compares with the anchor {anchor!r}, scores.logp_ref holds {have}{nearest(anchor, have)}; "
                    f"add its log-probabilities, shape {shape_}"
                )
        else:
            found = getattr(scores if name in _IN_SCORES else views, name)
            if found is None:
                raise ValueError(f"this loss needs {NEEDS[name]}; it is None")
        if (anchor or name in _PER_TOKEN) and tuple(found.shape) != shape_:
            raise ValueError(f"{name} must have one entry per row and token, shape {shape_}, got {tuple(found.shape)}")
        if name == "pairs" and (found.ndim != 2 or found.shape[1] != 2):
            raise ValueError(f"views.pairs must be (P, 2), columns chosen and rejected, got {tuple(found.shape)}")
        if name in ("q", "margin", "gold") and views.pairs is not None and len(found) != len(views.pairs):
            raise ValueError(f"views.{name} must have one entry per pair ({len(views.pairs)}), got {len(found)}")
        if name in ("score", "label", "value") and len(found) != shape_[0]:
            raise ValueError(f"{name} must have one entry per row ({shape_[0]}), got {len(found)}")


def positive(**values: float) -> None:
    """Raises ValueError for a setting that is not above zero."""
    for name, value in values.items():
        if not value > 0.0:
            raise ValueError(f"{name} must be > 0, got {value}")


def boost(logp: Tensor, diff: Tensor, *, limit: float) -> Tensor:
    """BMC's token weights, (B, T) without gradient: unlikely tokens among those that differ count more.

    w_t = 1 + 1[t differs] min(1 / pi(y_t), limit)                                                    [Jiang 2024; arXiv 2408.07471]
    The policy's own confidence weighs policy and anchor alike; limit = 0 is DPO.
    """
    return 1.0 + diff * torch.exp(-logp.detach()).clamp(max=limit)


def response_score(
    scores: TokenScores, *, anchors: Iterable[tuple[str, float]], policy: float = 1.0, reduce: str = "sum", weight: Tensor | None = None
) -> Tensor:
    """One number per response, (B,) nats: s = reduce_t w_t (policy a_t - sum_k c_k b_t^k); weight (B, T), None: 1."""
    difference = policy * scores.logp
    for name, c in anchors:
        difference = difference - c * scores.logp_ref[name].detach()
    if weight is not None:
        difference = torch.where(scores.mask, difference, 0.0) * weight
    return scores.means(difference) if reduce == "mean" else scores.sums(difference)


REF = (("ref", 1.0),)


@dataclass(frozen=True)
class Score:
    """Which number a response gets; by default DPO's l = log pi / ref."""

    reduce: Literal["sum", "mean"] = "sum"  # over the response's tokens
    anchors: tuple[tuple[str, float], ...] = REF  # (name, weight) of what is subtracted; () is reference-free
    policy: float = 1.0  # weight of the policy's own log-probs
    psi: Psi = "identity"  # function over the reduced log-ratio
    alpha: float = 0.5  # order of psi = "alpha"
    tokens: Literal["all", "weighted", "kept", "boosted"] = "all"  # weighted: views.c; kept: views.keep (SamPO); boosted: where views.diff (BMC)
    boost_limit: float = 1.5  # largest extra weight of a token, for tokens = "boosted"

    def __post_init__(self) -> None:
        if self.psi not in get_args(Psi):
            raise ValueError(f"unknown psi {self.psi!r}{nearest(self.psi, get_args(Psi))}")
        if self.psi == "odds" and (self.reduce != "mean" or self.anchors):
            raise ValueError("the odds are those of a mean log-prob without reference; set reduce='mean' and anchors=()")

    @property
    def needs(self) -> tuple[str, ...]:
        """Anchors and token columns."""
        column = {"all": (), "weighted": ("c",), "kept": ("keep",), "boosted": ("diff",)}[self.tokens]
        return (*(f"logp_ref.{name}" for name, _ in self.anchors), *column)

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        """(B,) scores of all rows."""
        weight = views.c if self.tokens == "weighted" else None
        if self.tokens == "kept":
            assert views.keep is not None
            weight = views.keep.to(scores.logp.dtype)
        elif self.tokens == "boosted":
            assert views.diff is not None
            weight = boost(scores.logp, views.diff, limit=self.boost_limit)
        l = response_score(scores, anchors=self.anchors, policy=self.policy, reduce=self.reduce, weight=weight)
        return shape(self.psi, l, self.alpha)
