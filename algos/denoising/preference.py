"""The loop of preference learning on denoising chains: pairs from a source, the log-ratio of every row, a loss that text uses too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.agents.records import Rollout
from markovia.algos.collect import SequenceCollector
from markovia.algos.denoising.adjoint import check_solver
from markovia.algos.denoising.loop import ChainTrainer
from markovia.algos.denoising.pairs import anchor_rule, as_scores, clipped, control_ratio, noise_error, views_of
from markovia.algos.denoising.sampling import denoise, predictor
from markovia.algos.denoising.sources import (
    Candidates,
    Items,
    NoisedData,
    SameStart,
    SemiPolicy,
    Source,
    StepScore,
    clean_estimate_score,
    noised_pairs,
)
from markovia.algos.on_policy.method import Descent
from markovia.algos.preference.anchors import EachRound, Frozen
from markovia.algos.preference.pairwise import Pairwise
from markovia.algos.statistics import Statistics
from markovia.algos.streams import stream
from markovia.algos.trainer import part


@dataclass(frozen=True)
class DenoisingPreference:
    """Settings of preference learning on denoising chains."""

    num_env_steps: int = 25_600  # chains in total, sampled or read from data
    num_envs: int = 64  # chains of one batch; two make a pair
    source: Source = field(default_factory=SameStart)
    loss: Pairwise = field(default_factory=Pairwise)
    clip: float | None = None  # e^log-ratio of a row is held in [1 - clip, 1 + clip]
    reference: Frozen | EachRound = field(default_factory=Frozen)  # the anchor: the start, or the policy of each iteration's beginning
    solver: Descent = field(default_factory=lambda: Descent(lr=1e-3, anneal=False, epochs=1, minibatch=None, max_grad_norm=1.0))  # counts pairs

    def __post_init__(self) -> None:
        if self.num_env_steps < 1 or self.num_envs < 2 or self.num_envs % 2:
            raise ValueError(f"num_env_steps must be >= 1 and num_envs even and >= 2 (pairs), got {self.num_env_steps}, {self.num_envs}")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"clip={self.clip}; expected a half-width in (0, 1), or None for no clip.")
        if isinstance(self.source, SemiPolicy) and isinstance(self.reference, EachRound):
            raise ValueError("a semi-policy source brings its own anchor, the checkpoint that sampled; leave reference at Frozen().")
        check_solver(self.solver, "unit")

    @property
    def anchors(self) -> tuple[str, ...]:
        """The names under which the loss looks for the one anchor."""
        return tuple(n.partition(".")[2] for n in self.loss.needs if n.startswith("logp_ref."))


class DenoisingPreferenceDriver(ChainTrainer):
    """Trains a denoising agent on pairs.

    score   what a step-aware preference model says of x at step k (`Candidates`); by default the reward of the anchor's clean estimate, which does
            not move with the policy
    data    {"x": (n, *shape), "cond": (n, C) or None}: pairs, preferred first (`NoisedData`), or winners (`SemiPolicy`); by default drawn from
            the start policy and labelled by the task's reward
    Raises ValueError at construction when the source needs likelihoods or noise levels that the kernel has not.
    """

    method: DenoisingPreference

    def __init__(
        self,
        method: DenoisingPreference,
        agent: DenoisingAgent,
        collector: SequenceCollector,
        seed: int = 0,
        score: StepScore | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(method, agent, collector, seed)
        if isinstance(method.source, SemiPolicy) or isinstance(method.reference, EachRound):
            self.reference = agent.frozen()  # type: ignore[assignment]  # an anchor that moves needs weights of its own, adapters or not
        self.score = score or clean_estimate_score(self.task, self.reference)
        self.data: dict[str, Any] = {}
        self.pool: list[dict[str, Tensor]] = []
        if isinstance(method.source, SameStart | Candidates):
            agent.kernel.require_density(type(method.source).__name__)
        elif agent.kernel.kind == "direct":
            raise ValueError(
                f"{type(method.source).__name__} compares noised clean samples, but a direct kernel has no noise levels; "
                "use a kernel read from a scheduler, or a method that compares sampled chains (d3po, spo-step, rebel-diffusion)."
            )
        else:
            self.data = data or self._own_data()
        if isinstance(method.source, SemiPolicy):
            self._remember()

    def _own_data(self) -> dict[str, Any]:
        pairs = self.method.source if isinstance(self.method.source, NoisedData) else NoisedData()
        made = pairs.make(self.reference, self.task, stream(self.seed, "pairs", device=self.agent.device))
        if isinstance(self.method.source, NoisedData):
            return made
        return {name: None if v is None else v[::2] for name, v in made.items()}

    def step(self) -> dict[str, float]:
        """Collect pairs, take the solver's steps on them, and return the iteration's statistics."""
        if isinstance(self.method.reference, EachRound):
            self.reference.net.load_state_dict(self.agent.net.state_dict())
        items = self.collect()
        self.set_lr()
        stats = self.improve(items)
        if isinstance(self.method.source, SemiPolicy) and (self.iteration + 1) % self.method.source.every == 0:
            self._remember()
        found = {"return": float(items.rewards.mean())} if len(items.rewards) else {}
        return {**found, "pairs": float(len(items.pairs)), **stats, **self.advance(self.method.num_envs)}

    @torch.no_grad()
    def collect(self) -> Items:
        """The iteration's pairs."""
        generator, n = self.generator("action"), self.method.num_envs
        if isinstance(self.method.source, SameStart | Candidates):
            return self.method.source.collect(self.agent, self.task, n, generator, self.score)
        x, cond = self._clean(n // 2, generator)
        record = noised_pairs(self.agent, x, cond, generator)
        return Items(record, torch.arange(n, device=x.device).view(-1, 2), x.new_zeros(n), x.new_zeros(0))

    def _clean(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """`count` clean pairs (2 count, *shape), preferred first."""
        x, cond = self.data["x"], self.data["cond"]
        if isinstance(self.method.source, NoisedData):
            pick = torch.randint(len(x) // 2, (count,), generator=generator, device=x.device)
            rows = torch.stack([2 * pick, 2 * pick + 1], 1).flatten()
            return x[rows], None if cond is None else cond[rows]
        chosen = int(torch.randint(len(self.pool), (), generator=generator, device=x.device))
        self.reference.net.load_state_dict(self.pool[chosen])
        pick = torch.randint(len(x), (count,), generator=generator, device=x.device)
        won, c = x[pick], None if cond is None else cond[pick]
        start = self.task.starts(count, generator)["x"]
        kernel = self.reference.kernel
        own = denoise(kernel, predictor(kernel, self.reference.network, c), start.to(won), generator)
        return torch.stack([won, own], 1).flatten(0, 1), None if c is None else c.repeat_interleave(2, 0)

    def _remember(self) -> None:
        self.pool.append({k: v.detach().clone() for k, v in self.agent.net.state_dict().items()})

    def improve(self, items: Items) -> dict[str, float]:
        """Epochs of minibatches of pairs."""
        stats = Statistics()
        for index in self.minibatches(len(items.pairs)):
            rows = items.pairs[index.to(items.pairs.device)].flatten()
            record, score = items.record.rows(rows), items.score[rows]
            loss, found = self.loss(record, score)
            stats.add({**found, "grad_norm": self.descend(loss, {"record": record, "score": score})})
        return stats.means()

    def loss(self, record: Rollout, score: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of pairs whose rows stand one after the other, and how often the policy orders them rightly."""
        ratio = self.ratio(record)
        scores = as_scores(ratio, record.mask, self.method.anchors)
        each = self.method.loss(scores, views_of(len(score) // 2, score.to(ratio)))
        total = scores.sums().detach().view(-1, 2)
        found = {"loss": each.detach().mean(), "accuracy": (total[:, 0] > total[:, 1]).float().mean()}
        if isinstance(self.method.source, SemiPolicy):
            found["kappa"] = anchor_rule(ratio[::2], self.method.source.otherwise).to(ratio).mean()
        return each.mean(), found

    def ratio(self, record: Rollout) -> Tensor:
        """What a row's score is made of, (B, T): the step's log-ratio under the kernel, or by how much better than the anchor the network
        predicts; for a semi-policy pair the second row has the sign of `anchor_rule`."""
        if isinstance(self.method.source, SameStart | Candidates):
            return clipped(control_ratio(self.agent, self.reference, record), self.method.clip)
        with torch.no_grad():
            anchor = noise_error(self.reference, record)
        better = anchor - noise_error(self.agent, record)
        if isinstance(self.method.source, SemiPolicy):
            kappa = torch.ones_like(better)
            kappa[1::2] = anchor_rule(better[::2], self.method.source.otherwise).to(kappa)
            better = better * kappa
        return clipped(better, self.method.clip)

    # -- checkpoints --------------------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs; data that the driver drew itself are drawn again from their own stream."""
        tensors, meta = super().state()
        for i, saved in enumerate(self.pool):
            tensors |= {f"pool.{i}.{k}": v for k, v in saved.items()}
        return tensors, meta | {"pool": len(self.pool)}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""
        super().load_state(tensors, meta)
        self.pool = [part(tensors, f"pool.{i}.") for i in range(meta["pool"])]
