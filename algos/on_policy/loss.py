"""The loss of one (micro-)minibatch: a pure function of the agent's evaluation, with detached statistics. Nothing here loops or logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from markovia.agents.distributions import Categorical, Distribution, kl, with_params
from markovia.agents.interface import Agent, Evaluation
from markovia.agents.records import Rollout, masked_mean
from markovia.algos.on_policy.divergence import KL, Divergence, k3
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.surrogates import ChainClip, KLDrift, chain_clip, tsallis_bregman
from markovia.algos.table import nearest


def weights(mask: Tensor, how: str, max_length: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Omega (B, T), the weight of each decision in the batch's loss; names as in verl.

    token-mean           1 / sum_j L_j    every decision alike (PPO, DAPO)         seq-mean-token-mean      1 / (B L_i)    every row alike (GRPO)
    seq-mean-token-sum   1 / B            log-prob of the row (RLOO, REINFORCE)    seq-mean-token-sum-norm  1 / (B L_max)  the same, scaled (Dr.GRPO)

    L_i counts row i's masked decisions, B the rows that have some; L_max is `max_length`, None: the width of the mask.
    Raises ValueError for another name.
    """
    m = mask.to(dtype or torch.get_default_dtype())
    rows = mask.any(1).sum().clamp(min=1)
    if how == "token-mean":
        return m / m.sum().clamp(min=1.0)
    if how == "seq-mean-token-mean":
        return m / (rows * m.sum(1, keepdim=True).clamp(min=1.0))
    if how == "seq-mean-token-sum":
        return m / rows
    if how == "seq-mean-token-sum-norm":
        return m / (rows * (max_length or mask.shape[1]))
    names = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    raise ValueError(f"unknown aggregation {how!r}{nearest(how, names)} (known: {', '.join(names)})")


def value_error(value: Tensor, ret: Tensor, value_old: Tensor, *, clip: float | None) -> Tensor:
    """0.5 (V - ret)^2, or 0.5 max((V - ret)^2, (V_old + clip(V - V_old, -c, c) - ret)^2); (b, t), squared reward units."""
    error = (value - ret).square()
    if clip is not None:
        error = torch.maximum(error, (value_old + (value - value_old).clamp(-clip, clip) - ret).square())
    return 0.5 * error


def critic_error(method: OnPolicy, value: Tensor, part: Rollout) -> Tensor:
    """(b, t): the squared error of the reward's column of `value` (b, t, 1 + m), plus those of cost columns where the record has their targets."""
    assert part.value is not None
    error = value_error(value[..., 0], part.columns["ret"], part.value[..., 0], clip=method.value.clip)
    if "cost_ret" in part.columns:
        error = error + value_error(value[..., 1:], part.columns["cost_ret"], part.value[..., 1:], clip=method.value.clip).sum(-1)
    return error


def drift_kl(method: OnPolicy, dist: Distribution, dist_old: dict[str, Tensor]) -> Tensor:
    """The divergence that the surrogate asks for, (b, t) nats."""
    surrogate, old = method.surrogate, with_params(dist, dist_old)
    if surrogate.needs_kl == "new_old":
        return kl(dist, old)
    if surrogate.needs_kl == "tsallis":
        if not (isinstance(dist, Categorical) and isinstance(old, Categorical) and isinstance(surrogate, KLDrift)):
            raise ValueError(f"the Tsallis divergence is written for categorical policies, this one is {type(dist).__name__}; use new_old")
        return tsallis_bregman(dist.logits, old.logits, q=surrogate.q)
    return kl(old, dist)


def wanted(method: OnPolicy, joint_value: bool) -> tuple[str, ...]:
    """What one forward pass must give."""
    want = ["logp"]
    exact = isinstance(method.divergence, KL) and method.divergence.estimator == "exact"
    want += ["dist"] if method.surrogate.needs_kl != "none" or exact or method.anchor is not None else []
    want += ["entropy"] if method.entropy_coef else []
    want += ["value"] if joint_value else []
    return tuple(want)


def sequence_ratio(log_ratio: Tensor, mask: Tensor, *, mean: bool = False) -> Tensor:
    """The log-ratio of the whole row, at every decision of it: log rho_i = sum_t m_it log_ratio_it; (b, t) nats.

    One ratio, hence one clip, per response (the form of RLOO with several updates a batch); the weights 1 / (B L_i) of seq-mean-token-mean over
    its L_i copies make each row count once. `mean` takes the mean in place of the sum: GSPO.                    [Zheng 2025, arXiv 2507.18071, eq. 7]
    """
    m = mask.to(log_ratio.dtype)
    total = (log_ratio * m).sum(1, keepdim=True)
    return (total / m.sum(1, keepdim=True).clamp(min=1.0) if mean else total).expand_as(log_ratio)


def levelled(method: OnPolicy, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The log-ratio that the surrogate sees: of the decision, of its row, or the row's mean; (b, t) nats."""
    return log_ratio if method.ratio_level == "token" else sequence_ratio(log_ratio, mask, mean=method.ratio_level == "sequence-mean")


def clip_fraction(method: OnPolicy, log_ratio: Tensor, mask: Tensor, stage: Tensor | None = None) -> Tensor:
    """Share of the decisions whose ratio has left the surrogate's clipping range (at its `stage`), [0.8, 1.2] for surrogates without one; ()."""
    low = getattr(method.surrogate, "clip", 0.2)
    if stage is not None and isinstance(method.surrogate, ChainClip):
        low = chain_clip(stage, clip=low, base=method.surrogate.base, rate=method.surrogate.rate)
    high = getattr(method.surrogate, "high", low)
    rho = levelled(method, log_ratio, mask).exp()
    return masked_mean(((rho < 1.0 - low) | (rho > 1.0 + high)).to(log_ratio.dtype), mask)


def objective(method: OnPolicy, part: Rollout, logp: Tensor, kl_value: Tensor | None, coef: Tensor) -> Tensor:
    """w S(rho, A) (b, t), to be maximised; rho by token or by sequence, against the surrogate's anchor.

    With the columns `adv_other` and `mix` (w') the two terms are blended: w' S(rho, A) + (1 - w') S(rho, A').
    """
    anchor = part.logp_ref["ref"] if getattr(method.surrogate, "anchor", "old") == "ref" else part.logp_old
    # Steps that don't count may hold infinite log-probs (zero-std or padding): keep them out before exp.
    log_ratio = torch.where(part.mask, logp - anchor, 0.0)
    log_ratio = levelled(method, log_ratio, part.mask)
    columns = part.columns
    staged = {"stage": columns["stage"]} if "stage" in columns and isinstance(method.surrogate, ChainClip) else {}
    out = method.surrogate(log_ratio, columns["adv"], kl_value, coef, **staged)
    if "adv_other" in columns:
        out = columns["mix"] * out + (1.0 - columns["mix"]) * method.surrogate(log_ratio, columns["adv_other"], kl_value, coef)
    return columns["weight"] * out if "weight" in columns else out


def penalty(method: OnPolicy, divergence: Divergence, part: Rollout, ev: Evaluation, log_ratio: Tensor) -> Tensor:
    """beta k(d) (b, t); beta is a column of the record, so it may differ by row and change without a new compilation."""
    if isinstance(divergence, KL) and divergence.estimator == "exact":
        assert ev.dist is not None and part.dist_ref is not None
        term = torch.where(part.mask, kl(ev.dist, with_params(ev.dist, part.dist_ref)), 0.0)
    else:
        assert ev.logp is not None
        reference = part.logp_old if divergence.reference == "old" else part.logp_ref[divergence.reference]
        allowed = part.mask & part.columns["selected"] if "selected" in part.columns else part.mask
        d = torch.where(allowed, ev.logp - reference, 0.0)
        term = divergence.term(d, log_ratio, part.mask)
        if "selected" in part.columns:
            term = torch.where(part.columns["selected"], term, 0.0)
    return part.columns["beta"] * term


def policy_loss(
    method: OnPolicy, agent: Agent, part: Rollout, omega: Tensor, coef: Tensor, joint_value: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_bt Omega [ -w S + beta k(d) - c_H entropy + c_V value error ] + auxiliary terms, and detached statistics summed with the same weights.

    omega (b, t) holds the weights over the whole minibatch of which `part` may be a piece, so pieces add up exactly.
    """
    ev = agent.evaluate(part, wanted(method, joint_value))
    assert ev.logp is not None
    m = part.mask
    log_ratio = torch.where(m, ev.logp - part.logp_old, 0.0)
    kl_value = None
    if method.surrogate.needs_kl != "none":
        assert ev.dist is not None and part.dist_old is not None
        kl_value = torch.where(m, drift_kl(method, ev.dist, part.dist_old), 0.0)
    per_step = -objective(method, part, ev.logp, kl_value, coef)
    with torch.no_grad():
        stats: dict[str, Tensor] = {
            "approx_kl": (omega * k3(-log_ratio)).sum() / omega.sum().clamp(min=1e-12),
            "clip_fraction": clip_fraction(method, log_ratio, m, part.columns.get("stage")),
        }
        stats["policy_loss"] = (omega * per_step).sum().detach()
    if method.loss_divergence is not None:
        per_step = per_step + penalty(method, method.loss_divergence, part, ev, log_ratio)
    if method.entropy_coef:
        assert ev.entropy is not None
        per_step = per_step - method.entropy_coef * ev.entropy
        stats["entropy"] = masked_mean(ev.entropy.detach(), m)
    loss = (omega * per_step).sum()
    if method.anchor is not None:
        loss = loss + (part.columns["pull"] * method.anchor.quantity(ev)).sum()
    if joint_value:
        assert ev.value is not None
        v_loss = (omega * critic_error(method, ev.value, part)).sum()
        loss = loss + method.value.coef * v_loss
        stats["value_loss"] = v_loss.detach()
    if kl_value is not None:
        stats["kl_max"] = kl_value.detach().max()
        stats["kl_mean"] = masked_mean(kl_value.detach(), m)
    return loss, stats


def critic_loss(method: OnPolicy, agent: Agent, part: Rollout, omega: Tensor, *_: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_bt Omega value error, for critics that are fitted apart from the policy."""
    ev = agent.evaluate(part, ("value",))
    assert ev.value is not None
    loss = (omega * critic_error(method, ev.value, part)).sum()
    return loss, {"value_loss": loss.detach()}
