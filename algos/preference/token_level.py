"""Token columns of a pair that are drawn or found before the loss: SamPO's shared subset and BMC's differing tokens."""

from __future__ import annotations

from difflib import SequenceMatcher

import torch
from torch import Tensor


def shared_subset(mask: Tensor, pairs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """SamPO's views.keep (B, T): in the longer response of each pair a uniform subset as long as the shorter one, drawn without replacement.

    T_m = min(|y_w|, |y_l|);  l^(y) = sum over kept t of (a_t - b_t), one subset for policy and anchor              [Lu 2024; arXiv 2406.10957]
    Rows of no pair keep their mask. mask (B, T) bool, pairs (P, 2). A row in two pairs would need two subsets: raises ValueError.
    """
    if len(pairs.unique()) != pairs.numel():
        raise ValueError("a row stands in more than one pair; SamPO draws a subset per pair, so repeat the row")
    draw = torch.rand(mask.shape, generator=generator, device=mask.device).masked_fill(~mask, 2.0)
    rank = draw.argsort(1).argsort(1)  # masked tokens come last
    limit = mask.sum(1)
    limit[pairs] = limit[pairs].amin(1, keepdim=True).expand(-1, 2)
    return mask & (rank < limit[:, None])


def differing(tokens: Tensor, mask: Tensor, pairs: Tensor) -> Tensor:
    """BMC's views.diff (B, T): response tokens outside the longest matching blocks of the two responses of a pair.    [arXiv 2408.07471]

    tokens (B, T) int64, mask (B, T) bool, pairs (P, 2); one alignment per pair on the CPU. The authors' code leaves stop words out of the differing
    tokens; here they count, since a list of them belongs to one language and tokenizer.
    """
    out = torch.zeros_like(mask)
    for w, l in pairs.tolist():
        at_w, at_l = (torch.nonzero(mask[i]).squeeze(1) for i in (w, l))
        same = SequenceMatcher(None, tokens[w, at_w].tolist(), tokens[l, at_l].tolist(), autojunk=False)
        out[w, at_w] = True
        out[l, at_l] = True
        for block in same.get_matching_blocks():
            out[w, at_w[block.a : block.a + block.size]] = False
            out[l, at_l[block.b : block.b + block.size]] = False
    return out


def log_collision(logits: Tensor) -> Tensor:
    """scores.collision: log sum_v pi(v)^2 = logsumexp(2 z) - 2 logsumexp(z), logits (..., V) -> (...).                    [arXiv 2406.11827]"""
    return torch.logsumexp(2.0 * logits, -1) - 2.0 * torch.logsumexp(logits, -1)


def kl_ref_policy(logits: Tensor, logits_ref: Tensor) -> Tensor:
    """scores.kl_ref: KL(ref || pi) of the next token, logits (..., V) -> (...) nats, with gradient in the policy.         [arXiv 2404.11999]"""
    lr = torch.log_softmax(logits_ref.detach(), -1)
    return (lr.exp() * (lr - torch.log_softmax(logits, -1))).sum(-1)
