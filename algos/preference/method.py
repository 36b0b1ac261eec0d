"""A preference method: a loss, what becomes of its anchor, and where its responses come from; one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.on_policy.method import Descent
from markovia.algos.preference.anchors import Dataset, Frozen, Reference, Sampler, Sync
from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.listwise import Listwise
from markovia.algos.preference.pairwise import Pairwise
from markovia.algos.preference.scores import TokenScores
from markovia.algos.preference.unpaired import Pointwise, Transport

Loss = Pairwise | Listwise | Pointwise | Transport | SelfPlay


class FromPreferences:
    """Settings of methods that learn from a file of preferences, whatever they train."""


@dataclass(frozen=True)
class Preference(FromPreferences):
    """Settings of the preference loop."""

    loss: Loss = Pairwise()  # noqa: RUF009 (frozen)
    reference: Reference = Frozen()  # noqa: RUF009 (frozen)
    target: Sync | None = None  # how the anchor `target` follows the policy; None: there is none
    sampler: Sampler = Dataset()  # noqa: RUF009 (frozen)
    num_env_steps: int | None = None  # items seen in all: pairs, lists or single responses; None: `passes` over the data
    passes: int = 1  # over the data, where num_env_steps is not given
    num_envs: int = 8  # items of a batch; online: prompts of a round
    rounds: int = 3  # equal parts of the run, after each of which EachRound and Extrapolated move the anchor
    stored_reference: bool = False  # a frozen anchor's log-probs are computed once, at the start; no second model is kept
    solver: Descent = Descent(lr=1e-5, anneal=False, eps=1e-8, epochs=1, minibatch=None, unit="row", max_grad_norm=1.0)  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        for name in ("num_env_steps", "passes", "num_envs", "rounds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.solver.kl_stop_nats is not None or self.solver.recompute_advantage:
            raise ValueError("this loop has no advantages and no old policy; leave solver.kl_stop_nats and solver.recompute_advantage alone")
        if (self.target is None) == ("target" in self.anchors):
            reads = "reads no" if self.target is not None else "reads an"
            raise ValueError(f"the loss {reads} anchor 'target', and target is {self.target}; give both, as nash-mp does, or neither")
        if self.stored_reference and not isinstance(self.reference, Frozen):
            kind = type(self.reference).__name__
            raise ValueError(f"the log-probs of a {kind} anchor can't be stored, it moves; use Frozen() or stored_reference=False")

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
