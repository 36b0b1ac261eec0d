"""What the critic and the multipliers of the iteration before say of the present batch, for advantages that are optimistic (ReLOAD's deep form)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.algos.advantages import normalise
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.safe.constraint import optimistic_advantage
from markovia.algos.safe.handler import ConstraintHandler


class Judge:
    """Remembers the critic's weights from one iteration to the next; `seen` keeps those that the present batch was judged with."""

    def __init__(self, method: OnPolicy, agent: Agent, constraint: ConstraintHandler) -> None:
        self.method, self.agent, self.constraint = method, agent, constraint
        self.before: list[Tensor] | None = None
        self._now: list[Tensor] = []

    def seen(self) -> None:
        """The critic is about to learn: note its weights."""
        self._now = [p.detach().clone() for p in self.agent.parameters("value")]

    def next(self) -> None:
        """The iteration is over: what was noted is now the iteration before."""
        self.before = self._now

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        for p, w in zip(self.agent.parameters("value"), weights, strict=True):
            p.copy_(w)

    def optimistic(self, rollout: Rollout, reward: Tensor, adv: Tensor, state: dict[str, Any]) -> Tensor:
        """`optimistic_advantage` of the mixed advantage adv (B, T); adv itself in the first iteration. `state` is that of the advantage's estimator.

        Boot values stay those of the present critic: final observations are not in the record.
        """
        if self.before is None:
            return adv
        older = replace(rollout, columns=dict(rollout.columns))  # mixing writes there
        if self.before:
            present = [p.detach().clone() for p in self.agent.parameters("value")]
            self._put(self.before)
            older.value = self.agent.evaluate(rollout, ("value",)).value
            self._put(present)
        last, _ = self.method.advantage(reward, older, dict(state))
        if self.method.normalize_advantage == "batch":
            last = normalise(last, older.mask)
        return optimistic_advantage(adv, self.constraint.mix(older, last, self.method.advantage, before=True))

    def state(self) -> dict[str, Tensor]:
        """The remembered weights by number, in the order of `agent.parameters("value")`, and that there was an iteration: without a critic it has
        no weights to be known by."""
        return {} if self.before is None else {"seen": torch.ones(()), **{f"{i:04d}": w for i, w in enumerate(self.before)}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back."""
        self.before = [state[name] for name in sorted(state) if name != "seen"] if state else None
