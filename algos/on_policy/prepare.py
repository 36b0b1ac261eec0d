"""From a collected record to one that the loss can read: log-probs under the references, transformed and penalised rewards, further columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.algos.on_policy.divergence import ESTIMATORS, KL, f_reward, min_p_logp
from markovia.algos.on_policy.entropy import anchor_pull
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.rewards import at_end
from markovia.algos.on_policy.tokens import ClipCov, Unlikely


@torch.no_grad()
def fill(
    method: OnPolicy, agent: Agent, references: Mapping[str, Agent], rollout: Rollout, beta: float, memory: dict[str, Any], chance: torch.Generator
) -> Tensor:
    """Put what the method reads into the record, and return the reward (B, T) after transforms and the penalty in it.

    `beta` is the weight of the divergence now; `memory` holds what reward transforms and the entropy anchor keep between batches; `chance` is the
    random stream of token selections.
    """
    m = method
    if m.surrogate.needs_kl != "none" and rollout.dist_old is None:
        dist = agent.evaluate(rollout, ("dist",)).dist
        assert dist is not None
        rollout.dist_old = {k: v.clone() for k, v in dist.params().items()}
    exact = isinstance(m.divergence, KL) and m.divergence.estimator == "exact"
    for name in m.references:
        ev = references[name].evaluate(rollout, ("logp", "dist") if exact and name == "ref" else ("logp",))
        assert ev.logp is not None
        rollout.logp_ref[name] = ev.logp
        if ev.dist is not None:
            rollout.dist_ref = ev.dist.params()
    if isinstance(m.tokens, Unlikely):
        dist = agent.evaluate(rollout, ("dist",)).dist
        rollout.logp_ref["min-p"] = min_p_logp(dist.logits, rollout.action, kappa=m.tokens.kappa)  # type: ignore[union-attr]
    if isinstance(m.tokens, ClipCov):
        rollout.columns["chance"] = torch.rand(rollout.shape, generator=chance, dtype=torch.float64).to(rollout.reward)
    if "entropy" in getattr(m.advantage, "needs", ()):
        entropy = agent.evaluate(rollout, ("entropy",)).entropy
        assert entropy is not None
        rollout.columns["entropy"] = entropy
    if m.anchor is not None:
        if "anchor" not in memory:
            entropy, peaks = m.anchor.measure(agent.evaluate(rollout, m.anchor.want), rollout)
            memory["anchor"] = float(anchor_pull(entropy, peaks, entropy.new_zeros(()))[1])
        rollout.columns["anchor"] = torch.full_like(rollout.reward, memory["anchor"])
    reward = rollout.reward
    for transform in m.reward:
        reward = transform(reward, rollout, memory)
    return penalised(m, rollout, reward, beta)


def penalised(method: OnPolicy, rollout: Rollout, reward: Tensor, beta: float) -> Tensor:
    """reward (B, T) less beta k(d), or less beta f'(u) of the response at its end; for a penalty in the loss the column `beta` instead."""
    divergence = method.divergence
    if divergence is None:
        return reward
    rows = torch.ones_like(reward)
    if divergence.rows == "failed":
        rows = rows * ((rollout.reward * rollout.valid).sum(1, keepdim=True) <= 0)
    if divergence.place == "loss":
        rollout.columns["beta"] = beta * rows
        return reward
    d = torch.where(rollout.mask, rollout.logp_old - rollout.logp_ref[divergence.reference], 0.0)
    if isinstance(divergence, KL):
        return reward - beta * rows * ESTIMATORS[divergence.estimator](d)
    options: dict[str, Any] = {"f": divergence.f, "alpha": divergence.alpha, "clamp": divergence.clamp}
    if divergence.level == "token":
        return reward - torch.where(rollout.mask, beta * rows * f_reward(d, **options), 0.0)
    return reward - rows * at_end(beta * f_reward(d.sum(1), **options), rollout)
