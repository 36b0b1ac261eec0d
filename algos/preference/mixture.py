"""A language agent that samples from the geometric mixture of a policy and its reference, token by token."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from markovia.agents.language import LanguageAgent
from markovia.algos.preference.anchors import mixture_logits


class _Caches(tuple[Any, ...]):
    """The key-value caches of both networks, in step."""

    def batch_select_indices(self, index: Tensor) -> None:
        for cache in self:
            cache.batch_select_indices(index)


class _Mixed(nn.Module):
    """Two networks with one output: the logits of the mixture."""

    def __init__(self, policy: LanguageAgent, reference: LanguageAgent, mix: float) -> None:
        super().__init__()
        self.members, self.mix = (policy, reference), mix
        self.networks = nn.ModuleList([policy.net["policy"], reference.net["policy"]])

    def forward(self, past_key_values: _Caches | None = None, **inputs: Any) -> Any:
        outs = [m.forward(past_key_values=c, **inputs) for m, c in zip(self.members, past_key_values or (None, None), strict=True)]
        logits = mixture_logits(outs[0].logits.float(), outs[1].logits.float(), mix=self.mix)
        return SimpleNamespace(logits=logits, past_key_values=_Caches(o.past_key_values for o in outs))


def mixture(policy: LanguageAgent, reference: LanguageAgent, mix: float) -> LanguageAgent:
    """An agent to `generate` from pi^(1 - b) ref^b, b = mix, at the policy's temperature; it has no gradient and no evaluation of its own.

    IPO-MD and Nash-MD sample so.                                                                     [arXiv 2403.08635, 2312.00886]
    """
    out = copy.copy(policy)
    out.net = nn.ModuleDict({"policy": _Mixed(policy, reference, mix)})
    return out
