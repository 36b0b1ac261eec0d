"""Auxiliary losses on records of their own, added to the policy's loss at every step: texts whose likelihood is kept up, responses of the start.

    logp (b, t)  nats, current policy      mask (b, t) bool      d (b, t)  log pi - log p0 of the start's own responses, nats
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout, masked_mean
from markovia.algos.on_policy.divergence import f_reference_loss
from markovia.algos.on_policy.filters import chosen, group_means
from markovia.envs.exact.divergences import f_divergence


def text_nll(logp: Tensor, mask: Tensor) -> Tensor:
    """-mean log pi of the tokens of given texts, (): PPO-ptx keeps what pretraining taught.          [Ouyang 2022, eq. 2; arXiv 2203.02155]"""
    return -masked_mean(torch.where(mask, logp, 0.0), mask)


def rehearsal(d: Tensor, mask: Tensor, *, f: str, alpha: float | None = None, clamp: float = 20.0) -> Tensor:
    """f(u), u = pi(y) / p0(y) of whole responses y that the start p0 gave, (b,); its mean is D_f(pi || p0).          [arXiv 2509.07430, eq. 5]

    D_f(pi || p0) = E_p0[f(u)]; f = -log u (kl_ref_pi) is the likelihood of the start's own responses, js is bounded. log u is clamped to +-clamp.
    """
    return f_reference_loss((d * mask.to(d.dtype)).sum(1), f=f, alpha=alpha, clamp=clamp)


@dataclass(frozen=True)
class Ptx:
    """Keeps up the likelihood of texts that come to the driver as a record (`texts`)."""

    coef: float = 0.1  # weight beside the policy's loss
    rows: int = 16  # texts of a step, drawn anew each time
    own_texts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, agent: Agent, part: Rollout) -> Tensor:
        logp = agent.evaluate(part, ("logp",)).logp
        assert logp is not None
        return self.coef * text_nll(logp, part.mask)


@dataclass(frozen=True)
class Rehearsal:
    """DPH-RL: prompts that the start solves are left out of the batches; its own responses to them are rehearsed by an f-divergence."""

    coef: float = 1.0  # eta, weight beside the policy's loss
    f: str = "js"  # generator of D_f(pi || p0)
    alpha: float | None = None  # order of the alpha family
    threshold: float = 1.0  # a prompt is solved when the mean reward of its responses is at least this
    samples: int = 8  # responses of the start to each prompt
    prompts: int = 256  # how many are tried, all where there are fewer; the others count as unsolved
    rows: int = 16  # stored responses of a step, drawn anew each time
    own_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self)
        f_divergence(self.f, self.alpha)
        if min(self.samples, self.prompts) < 1:
            raise ValueError(f"samples and prompts must be >= 1, got {self.samples} and {self.prompts}")

    def __call__(self, agent: Agent, part: Rollout) -> Tensor:
        logp = agent.evaluate(part, ("logp",)).logp
        assert logp is not None
        d = torch.where(part.mask, logp - part.logp_old, 0.0)
        return self.coef * rehearsal(d, part.mask, f=self.f, alpha=self.alpha).mean()


Auxiliary = Ptx | Rehearsal


def _check(aux: Ptx | Rehearsal) -> None:
    if aux.coef < 0 or aux.rows < 1:
        raise ValueError(f"expected coef >= 0 and rows >= 1, got {aux.coef} and {aux.rows}")


def record_for(aux: Auxiliary, agent: Agent, collector: Any, texts: Rollout | None, generator: torch.Generator) -> Rollout | None:
    """The record that the auxiliary loss draws from, None where no prompt is solved by the start (`agent`). The collector leaves out those that are.

    Raises ValueError where texts are missing, where the collector can't try out prompts, and where the start solves all of them.
    """
    if isinstance(aux, Ptx):
        if texts is None:
            raise ValueError("the method keeps up the likelihood of texts, and none were given: --texts FILE, or OnPolicyDriver(..., texts=record)")
        return texts
    if not hasattr(collector, "presample"):
        raise ValueError(f"Rehearsal tries out prompts before training; {type(collector).__name__} has none to try")
    found, prompt = collector.presample(agent, aux.prompts, aux.samples, generator)
    mean, index = group_means(found.returns(), found.group)
    solved = mean >= aux.threshold
    if bool(solved.all()):
        raise ValueError(f"the start solves all {len(mean)} prompts that were tried; there is nothing to explore: try more prompts, or a harder task")
    collector.without = frozenset(p for p, over in zip(prompt, solved.tolist(), strict=True) if over)
    rows = torch.nonzero(solved[index]).squeeze(1)
    return chosen(found, rows) if len(rows) else None
