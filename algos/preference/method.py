"""A preference method: a loss, what becomes of its anchor, and where its responses come from; one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.anchors import Dataset, Frozen, Reference, Sampler
from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.listwise import Listwise
from markovia.algos.preference.pairwise import Pairwise
from markovia.algos.preference.scores import TokenScores
from markovia.algos.preference.unpaired import Pointwise, Transport

Loss = Pairwise | Listwise | Pointwise | Transport | SelfPlay


@dataclass(frozen=True)
class Preference:
    """Settings of the preference loop."""

    loss: Loss = Pairwise()  # noqa: RUF009 (frozen)
    reference: Reference = Frozen()  # noqa: RUF009 (frozen)
    sampler: Sampler = Dataset()  # noqa: RUF009 (frozen)

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that the loss reads; see markovia.algos.preference.scores.NEEDS."""
        return self.loss.needs

    @property
    def coupled(self) -> bool:
        """Whether the items of a batch see each other, so that it must not be cut into micro-batches."""
        return self.loss.coupled

    @property
    def anchors(self) -> tuple[str, ...]:
        """Names of the anchors whose log-probabilities are needed."""
        return tuple(n.partition(".")[2] for n in self.needs if n.startswith("logp_ref."))

    def __call__(self, scores: TokenScores, views: Views) -> Tensor:
        """One loss per item (N,)."""
        return self.loss(scores, views)
