"""A row's loss under verl's policy-loss signature, so that what is tried out here scales with verl's workers:

    from verl.trainer.ppo.core_algos import register_policy_loss
    register_policy_loss("dapo-of-markovia")(verl_policy_loss(find("grpo/dapo").value))        actor.policy_loss.loss_mode=dapo-of-markovia

verl computes advantages, sums and the divergence to the reference itself: choose its `algorithm.adv_estimator`, `actor.loss_agg_mode` (the row's own
is `.loss_agg_mode` of the function) and `actor.use_kl_loss`. Surrogate, ratio level, token rule and divergence to the sampling policy are the row's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from markovia.agents.interface import Evaluation
from markovia.agents.records import Rollout, masked_mean
from markovia.algos.on_policy.loss import clip_fraction, objective, penalty
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.tokens import Partner

PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]


def aggregated(
    loss: Tensor,
    mask: Tensor,
    how: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """verl's sum of a loss (b, t) over one worker's part of a batch; the names are verl's, sizes of the whole batch come from its config.

    token-mean  sum / N dp    seq-mean-token-sum  sum / B dp    seq-mean-token-mean  sum_i mean_t / B dp    seq-mean-token-sum-norm  sum / L_max
    The last one lacks the 1 / B of Dr.GRPO, as verl's does. Raises ValueError for another name.
    """
    m = mask.to(loss.dtype)
    tokens, rows = m.sum(1), mask.bool().any(1).sum()
    N, B = (m.sum() if batch_num_tokens is None else batch_num_tokens), (rows if global_batch_size is None else global_batch_size)
    if how == "token-mean":
        return (loss * m).sum() / N * dp_size
    if how == "seq-mean-token-sum":
        return (loss * m).sum() / B * dp_size
    if how == "seq-mean-token-mean":
        return ((loss * m).sum(1) / tokens.clamp(min=1.0)).sum() / B * dp_size
    if how == "seq-mean-token-sum-norm":
        return (loss * m).sum() / (loss_scale_factor or mask.shape[1])
    raise ValueError(f"unknown loss_agg_mode {how!r}; verl has token-mean, seq-mean-token-sum, seq-mean-token-mean and seq-mean-token-sum-norm")


def _check(method: OnPolicy) -> None:
    """Raises ValueError for a row whose loss reads more than log-probs, advantages and a mask."""
    why = None
    if method.surrogate.needs_kl != "none":
        why = "its surrogate reads whole distributions"
    elif getattr(method.surrogate, "anchor", "old") == "ref":
        why = "its surrogate reads a reference, which verl does not hand over"
    elif method.tokens is not None and (isinstance(method.tokens, Partner) or set(method.tokens.want) - {"logp"}):
        why = f"its token rule {type(method.tokens).__name__} reads more than log-probs"
    elif method.anchor is not None:
        why = "its entropy anchor reads whole distributions"
    elif method.loss_divergence is not None and method.loss_divergence.reference not in ("ref", "old"):
        why = f"its divergence is to {method.loss_divergence.reference!r}, which verl does not hand over"
    elif method.aux is not None:
        why = f"its auxiliary loss {type(method.aux).__name__} is on a record of its own"
    if why is not None:
        raise ValueError(f"this row can't be a verl policy loss: {why}; rows such as grpo, grpo/dapo, grpo/gspo, rloo, clip-cov and kl-cov can")


def verl_policy_loss(method: OnPolicy) -> PolicyLoss:
    """The row as `fn(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights) -> (loss, metrics)`.

    Tensors (b, t), a micro-batch of one worker. A sequence-level ratio is one term per response and needs loss_agg_mode seq-mean-token-mean.
    A token rule selects within the micro-batch. Raises ValueError for a row that reads more than verl hands over.
    """
    _check(method)
    divergence = method.loss_divergence
    own = divergence if divergence is not None and divergence.reference == "old" else None

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if method.ratio_level != "token" and loss_agg_mode != "seq-mean-token-mean":
            raise ValueError(f"a sequence ratio is one term per response; set actor.loss_agg_mode=seq-mean-token-mean, got {loss_agg_mode!r}")
        mask = response_mask.bool()
        zero = torch.zeros_like(old_log_prob)
        part = Rollout(
            obs=zero, action=zero, logp_old=old_log_prob, reward=zero, valid=mask, mask=mask, continuation=zero, truncated=~mask, per_row=True,
            columns={"adv": advantages, "beta": torch.full_like(zero, 0.0 if own is None else own.beta), "chance": torch.rand_like(zero)},
        )  # fmt: skip
        ev = Evaluation(logp=log_prob)
        log_ratio = torch.where(mask, log_prob - old_log_prob, 0.0)
        if method.tokens is not None:
            with torch.no_grad():
                part.columns |= method.tokens(part, ev, method.surrogate)
        loss = -objective(method, part, log_prob, None, torch.ones((), dtype=zero.dtype, device=zero.device))
        if rollout_is_weights is not None:
            loss = loss * rollout_is_weights
        if own is not None:
            loss = loss + penalty(method, own, part, ev, log_ratio)
        with torch.no_grad():
            metrics = {
                "actor/pg_clipfrac": clip_fraction(method, log_ratio, mask).item(),
                "actor/ppo_kl": masked_mean(-log_ratio, mask).item(),
            }
        return aggregated(loss, mask, loss_agg_mode, **dict(getattr(config, "global_batch_info", None) or {})), metrics

    policy_loss.loss_agg_mode = method.aggregation  # type: ignore[attr-defined]
    return policy_loss
