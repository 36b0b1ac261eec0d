"""What to watch besides the reward when a language model is trained: variety, plausibility under the reference, and distance from it.

A text is a completion as a string; its words are cut at white space, lower case
logp and logp_ref (B, T) are log-probs of the sampled tokens in nats, mask (B, T) bool says which of them count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from markovia.agents.records import masked_mean


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different word n-grams over all word n-grams of all texts, in [0, 1]; 0 where no text has n words.       [Li 2016; arXiv 1510.03055]

    Falls with the number of texts, so compare equal numbers only. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}; use 2 for distinct-2")
    grams = [gram for text in texts for gram in _ngrams(text.lower().split(), n)]
    return len(set(grams)) / max(1, len(grams))


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def logp_per_token(logp: Tensor, mask: Tensor) -> float:
    """Mean log-prob of the tokens that count, nats per token; under the reference it tells fluent text from word spam."""
    return float(masked_mean(logp, mask))


def sequence_kl(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> float:
    """KL(pi || ref) of whole responses by the estimator k1, mean_b sum_t (logp - logp_ref), nats; unbiased, can be negative."""
    return float(((logp - logp_ref) * mask).sum(1).mean())


def pass_at_k(correct: Tensor, samples: int, k: int) -> Tensor:
    """1 - C(n - c, k) / C(n, k): of k responses drawn from n of which c are right, one is right; unbiased, (N,).      [arXiv 2107.03374, eq. 1]

    correct (N,) counts c per prompt. As a product, 1 - prod_{i=n-c+1..n} (1 - k / i), nothing overflows.
    Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} is estimated from at least {k} responses per prompt, got {samples}")
    i = torch.arange(1, samples + 1, dtype=torch.float64)
    # Factors of i <= n - c count as 1; with i = k one is 0, so fewer than k wrong responses give exactly 1.
    factor = torch.where(i > samples - correct.double()[:, None], 1.0 - k / i, 1.0)
    return 1.0 - factor.clamp(min=0.0).prod(1)


def pass_curve(right: Tensor) -> list[float]:
    """pass@1, ..., pass@n as means over the prompts, of right (N, n) bool."""
    count, n = right.sum(1), right.shape[1]
    return [float(pass_at_k(count, n, k).mean()) for k in range(1, n + 1)]
