"""What language agents and their packed form do with logits and masks: kept sets, draws, log-probs, positions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def positions(mask: Tensor) -> Tensor:
    """Position of every token counted from the first real one, (n, L) int64; left padding gets 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The kept set of top-p sampling, (n, V) bool: the most probable tokens until their mass reaches top_p (the crossing one included).

    Sorted by falling probability, token v is kept iff the mass before it is < top_p             [Holtzman 2020; arXiv 1904.09751]
    """
    p, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = p.cumsum(-1) - p
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < top_p)


def keep_only(logits: Tensor, kept: Tensor | None) -> Tensor:
    """Logits with everything outside of `kept` at the dtype's minimum, so that the softmax renormalises over it."""
    return logits if kept is None else logits.masked_fill(~kept, torch.finfo(logits.dtype).min)


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sample: the first token whose cumulative probability exceeds u; logits (n, V), u (n,) float64 in [0, 1)."""
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)


def token_logp(logits: Tensor, token: Tensor) -> Tensor:
    """log softmax(logits)[token] in nats, shape of `token`; cross_entropy is several times faster than log_softmax and gather."""
    return -F.cross_entropy(logits.reshape(-1, logits.shape[-1]), token.reshape(-1), reduction="none").view(token.shape)


def pack(kept: Tensor) -> Tensor:
    """Booleans (..., V) as bits (..., ceil(V / 8)) uint8."""
    return torch.from_numpy(np.packbits(kept.cpu().numpy(), axis=-1)).to(kept.device)


def unpack(bits: Tensor, size: int) -> Tensor:
    """Inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=-1, count=size).astype(bool)).to(bits.device)


def response_valid(action: Tensor, eos: int) -> Tensor:
    """(B, T) bool: tokens up to and including the first EOS."""
    ended_before = (action == eos).long().cumsum(1) - (action == eos).long()
    return ended_before == 0
