"""Policy gradients of a preference game: a response earns its win rate against an opponent, less a price for leaving its anchors.

    logp (B, T)  log pi per token, nats, with gradient        rate (B,)  P(y > opponent)        l (B, T)  log pi - log anchor per token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.pieces import scalar_score
from markovia.algos.preference.scores import TokenScores, merge, require


def suffix_sums(x: Tensor) -> Tensor:
    """sum_{u >= t} x_u, (B, T)."""
    return x.flip(1).cumsum(1).flip(1)


def self_play(logp: Tensor, adv: Tensor, price: Tensor) -> Tensor:
    """A surrogate (B,) whose gradient is minus that of E[P(y > opponent)] - sum_k c_k KL(pi || anchor_k), for rows sampled from pi.

    L = -adv S + sum_t (sum_{u >= t} price_u) a_t;  adv, price without gradient           [Nash-MD: arXiv 2312.00886; mirror prox: 2505.19731]
    price (B, T) = sum_k c_k (a - b^k). A token pays for itself and for all after it; paying for itself alone is not the gradient of the KL.
    """
    return -adv.detach() * logp.sum(1) + (suffix_sums(price.detach()) * logp).sum(1)


@dataclass(frozen=True)
class SelfPlay:
    """One surrogate per row (U,), or per group (G,) with the mean win rate of the group's other rows as baseline.

    Rows of another policy count w = pi(y) / old(y) times, without gradient: E_old[w grad L] = E_pi[grad L].
    """

    price: tuple[tuple[str, float], ...] = (("ref", 0.1),)  # (anchor, coefficient of KL(pi || anchor))
    baseline: Literal["half", "others"] = "half"  # 1/2: the win rate against oneself; others: leave-one-out in the group
    max_ratio: float | None = None  # rows are the anchor old's, so each counts pi(y) / old(y), up to this; None: they are taken for pi's own

    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if any(c < 0.0 for _, c in self.price):
            raise ValueError(f"the price of leaving an anchor must be >= 0, got {self.price}")
        if self.max_ratio is not None and self.max_ratio < 1.0:
            raise ValueError(f"max_ratio must be >= 1, the ratio of rows of the policy itself, or None; got {self.max_ratio}")

    @property
    def needs(self) -> tuple[str, ...]:
        """What a call reads; see NEEDS. score is the win rate against the opponent's response."""
        anchors = [name for name, _ in self.price] + ["old"] * (self.max_ratio is not None)
        return merge(("groups" if self.baseline == "others" else "unpaired", "score"), (f"logp_ref.{name}" for name in anchors))

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        """(U,) or (G,); raises ValueError for a missing or misshapen column."""
        require(scores, views, self.needs)
        logp = scores.tokens(scores.logp)
        price = torch.zeros_like(logp)
        for name, c in self.price:
            price = price + c * scores.tokens(scores.logp - scores.logp_ref[name])
        rate = scalar_score(views).to(logp.dtype)
        count = logp.new_ones(len(logp)) if self.max_ratio is None else scores.log_ratio("old").detach().exp().clamp(max=self.max_ratio)
        if self.baseline == "half":
            assert views.unpaired is not None
            loss = (count * self_play(logp, rate - 0.5, price))[views.unpaired]
        else:
            assert views.groups is not None
            valid, at = views.groups >= 0, views.groups.clamp(min=0)
            g = torch.where(valid, rate[at], 0.0)
            others = (g.sum(1, keepdim=True) - g) / (valid.sum(1, keepdim=True) - 1)
            # The baseline belongs to a place in a group, so rows are taken apart first.
            each = count[at] * self_play(logp[at.flatten()], (g - others).flatten(), price[at.flatten()]).view_as(g)
            loss = torch.where(valid, each, 0.0).sum(1) / valid.sum(1)
        return loss if views.weight is None else loss * views.weight
