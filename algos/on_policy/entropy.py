"""Entropy of the likely part of the action distribution, and SIREN's two-sided anchor on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from markovia.agents.interface import Evaluation
from markovia.agents.records import Rollout


def nucleus_entropy(logits: Tensor, *, top_p: float) -> Tensor:
    """Entropy (b, t) of softmax(logits) renormalised over its nucleus: the likeliest actions whose mass together is at most top_p.

    The action that crosses top_p is left out; a first action above top_p alone gives entropy 0. The gradient on logits outside of the nucleus
    is exactly zero.                                                                                               [arXiv 2509.25133, section 3.2]
    """
    p, order = logits.detach().softmax(-1).sort(dim=-1, descending=True)
    inside = p.cumsum(-1) <= top_p
    inside = inside | (torch.arange(p.shape[-1], device=p.device) == 0)
    kept = torch.zeros_like(inside).scatter(-1, order, inside)
    logp = torch.log_softmax(logits.masked_fill(~kept, -torch.inf), -1).masked_fill(~kept, 0.0)
    return -(torch.where(kept, logp.exp(), 0.0) * logp).sum(-1)


def peak_mask(entropy: Tensor, mask: Tensor, *, quantile: float) -> Tensor:
    """(b, t) bool: decisions whose entropy lies strictly above the quantile (linear interpolation) of their own response."""
    if quantile <= 0.0:
        return mask
    bound = entropy.masked_fill(~mask, torch.nan).nanquantile(quantile, dim=1, keepdim=True)
    return mask & (entropy > bound)


def anchor_pull(entropy: Tensor, peaks: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (b, t) of the entropies in the gradient of (H - H0)^2, and H (), the mean over responses of the mean over their peaks.

    d (H - H0)^2 = sum_it 2 (H - H0) / (B n_i) dH_it at the n_i peaks of the B responses that have some.          [arXiv 2509.25133, eq. 8]
    """
    m = peaks.to(entropy.dtype)
    n, rows = m.sum(1, keepdim=True), peaks.any(1).sum().clamp(min=1)
    share = m / (n.clamp(min=1.0) * rows)
    mean = (share * entropy).sum()
    return 2.0 * (mean - anchor) * share, mean


@dataclass(frozen=True)
class EntropyAnchor:
    """coef (H - H0)^2, H the nucleus entropy at the uncertain places, H0 that of the first batch: an anchor, not a bonus."""

    coef: float = 0.005
    top_p: float = 0.8  # mass of the nucleus
    quantile: float = 0.8  # of its own response, above which a decision takes part; 0: all do
    want: ClassVar[tuple[str, ...]] = ("dist",)

    def __post_init__(self) -> None:
        if not (self.coef >= 0.0 and 0.0 < self.top_p <= 1.0 and 0.0 <= self.quantile < 1.0):
            raise ValueError(f"expected coef >= 0, top_p in (0, 1], quantile in [0, 1), got {self.coef}, {self.top_p}, {self.quantile}")

    def measure(self, ev: Evaluation, part: Rollout) -> tuple[Tensor, Tensor]:
        """Nucleus entropies (b, t) and the places that take part (b, t) bool."""
        entropy = self.quantity(ev)
        return entropy, peak_mask(entropy.detach(), part.mask, quantile=self.quantile)

    def quantity(self, ev: Evaluation) -> Tensor:
        """What the loss multiplies by the column `pull`, (b, t)."""
        assert ev.dist is not None
        return nucleus_entropy(ev.dist.logits, top_p=self.top_p)  # type: ignore[union-attr]

    def __call__(self, part: Rollout, ev: Evaluation) -> dict[str, Tensor]:
        """The column `pull` of a whole minibatch; the record's column `anchor` holds H0."""
        entropy, peaks = self.measure(ev, part)
        pull, _ = anchor_pull(entropy, peaks, part.columns["anchor"][0, 0])
        return {"pull": self.coef * pull}
