"""Where the pairs of a denoising preference method come from. Each source returns rows of decisions and pairs of these rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.agents.records import Rollout
from markovia.algos.denoising.pairs import best_and_worst, per_step, ranked, step_record
from markovia.algos.denoising.sampling import denoise, noise_like, predictor

# Score of x (n, *shape) at step k (K: clean) under cond: what a step-aware preference model says; higher is better
StepScore = Callable[[Tensor, int, Tensor | None], Tensor]


class Items(NamedTuple):
    """Rows, which of them make pairs (preferred first), each row's score (B,), and the rewards of the chains that were sampled."""

    record: Rollout
    pairs: Tensor
    score: Tensor
    rewards: Tensor


def clean_estimate_score(task: Any, agent: DenoisingAgent) -> StepScore:
    """The task's reward of the clean sample that an agent expects from x at step k."""

    def score(x: Tensor, k: int, cond: Tensor | None) -> Tensor:
        if k == agent.kernel.num_steps:
            return task.rewards(x, cond)
        predict = predictor(agent.kernel, agent.network, cond)
        return task.rewards(agent.kernel.x0_from(predict(x, k), x, k), cond)

    return score


@dataclass(frozen=True)
class SameStart:
    """Two chains from one starting noise and one condition; the one of higher reward is preferred, ties are left out.

    The start is no action: chains of different starts would differ by what no policy can change.
    """

    steps: bool = True  # every step inherits the label and is a pair of its own; False: a chain is one item (ties are kept)

    def collect(self, agent: DenoisingAgent, task: Any, n: int, generator: torch.Generator, score: StepScore) -> Items:
        starts = {name: None if v is None else v.repeat_interleave(2, 0) for name, v in task.starts(n // 2, generator).items()}
        rollout = agent.generate(starts, generator)
        rewards = task.score(rollout)
        pairs = ranked(rewards, keep_ties=not self.steps)
        if not self.steps:
            return Items(rollout, pairs, rewards, rewards)
        return Items(rollout.decisions(), per_step(pairs, rollout.mask), rewards.repeat_interleave(rollout.shape[1]), rewards)


@dataclass(frozen=True)
class Candidates:
    """At every step several next samples are drawn from ONE x: best against worst, and the chain goes on from a random one.

    Going on from the best would bias the states that are visited.                                          [Liang 2024, 2406.04314]
    """

    count: int = 2  # candidates of a step
    threshold: float = 0.3  # least margin tanh(gap/2) of a pair, in [0, 1)
    skip: int = 4  # first steps that are taken plainly

    def __post_init__(self) -> None:
        if self.count < 2 or not 0 <= self.threshold < 1 or self.skip < 0:
            raise ValueError(f"count={self.count}, threshold={self.threshold}, skip={self.skip}; expected count >= 2, 0 <= threshold < 1, skip >= 0.")

    @torch.no_grad()
    def collect(self, agent: DenoisingAgent, task: Any, n: int, generator: torch.Generator, score: StepScore) -> Items:
        kernel, starts = agent.kernel, task.starts(n, generator)
        x, cond = starts["x"], starts["cond"]
        predict, row = predictor(kernel, agent.network, cond), torch.arange(n, device=x.device)
        parts: list[Rollout] = []
        scores: list[Tensor] = []
        for k in range(kernel.num_steps):
            mean, std = kernel.mean_std(predict(x, k), x, k)
            drawn = torch.stack([mean + std * noise_like(x, generator) for _ in range(self.count)], 1)
            if k >= self.skip and bool(kernel.in_likelihood[k]):
                many = None if cond is None else cond.repeat_interleave(self.count, 0)
                s = score(drawn.flatten(0, 1), k + 1, many).reshape(n, self.count)
                best, worst, sure = best_and_worst(s, self.threshold)
                who = row[sure].repeat_interleave(2)
                which = torch.stack([best, worst], 1)[sure].flatten()
                step = torch.full_like(who, k)
                parts.append(step_record(x[who], step, None if cond is None else cond[who], drawn[who, which]))
                scores.append(s[who, which])
            x = drawn[row, torch.randint(self.count, (n,), generator=generator, device=x.device)]
        rewards = task.rewards(x, cond)
        record = join(parts)
        return Items(record, torch.arange(record.shape[0], device=x.device).view(-1, 2), torch.cat(scores), rewards)


def join(parts: list[Rollout]) -> Rollout:
    """Records of single decisions one after the other. Raises ValueError when there are none."""
    if not parts:
        raise ValueError("no step could be compared: every step was skipped or is deterministic; lower `skip` or build the kernel with eta > 0.")
    assert isinstance(parts[0].obs, dict)
    obs = {name: torch.cat([p.obs[name] for p in parts]) for name in parts[0].obs}  # type: ignore[index]
    columns = {name: torch.cat([p.columns[name] for p in parts]) for name in parts[0].columns}
    flat = step_record(obs["x"][:, 0], obs["step"][:, 0], obs["cond"][:, 0] if "cond" in obs else None, torch.cat([p.action for p in parts])[:, 0])
    flat.columns.update(columns)
    return flat


def noised_pairs(agent: DenoisingAgent, x: Tensor, cond: Tensor | None, generator: torch.Generator) -> Rollout:
    """Clean pairs x (2P, *shape), preferred first, noised at one step and with one noise for both of a pair: different ones destroy the signal."""
    count, kernel = len(x) // 2, agent.kernel
    step = torch.randint(kernel.num_steps, (count,), generator=generator, device=x.device).repeat_interleave(2)
    noise = torch.randn(count, *x.shape[1:], dtype=x.dtype, generator=generator, device=x.device).repeat_interleave(2, 0)
    noised = kernel.add_noise(x, noise, step)
    return step_record(noised, step, cond, noised, target=kernel.target(x, noise, step))


@dataclass(frozen=True)
class NoisedData:
    """A fixed set of pairs of clean samples, drawn from the reference once and labelled by the task's reward (or given to the driver)."""

    num_pairs: int = 2048

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs={self.num_pairs}; expected at least 1 pair.")

    @torch.no_grad()
    def make(self, reference: DenoisingAgent, task: Any, generator: torch.Generator) -> dict[str, Any]:
        """{"x": (2 num_pairs, *shape), "cond"} of the reference, the better of each two first; a pair shares its condition."""
        starts = task.starts(2 * self.num_pairs, generator)
        x, cond = starts["x"], starts["cond"]
        if cond is not None:
            cond = cond[::2].repeat_interleave(2, 0)
        x = denoise(reference.kernel, predictor(reference.kernel, reference.network, cond), x, generator)
        order = ranked(task.rewards(x, cond), keep_ties=True).flatten()
        return {"x": x[order], "cond": None if cond is None else cond[order]}


@dataclass(frozen=True)
class SemiPolicy:
    """Winners are data; the other of a pair is sampled by a randomly chosen earlier checkpoint, which is also the anchor of that iteration."""

    every: int = 50  # iterations between checkpoints of the pool
    otherwise: float = -1.0  # kappa where the sampler likes the winner more: -1 learns from its sample, 0 leaves it out, +1 always pushes it down

    def __post_init__(self) -> None:
        if self.every < 1 or self.otherwise not in (-1.0, 0.0, 1.0):
            raise ValueError(f"every={self.every}, otherwise={self.otherwise}; expected every >= 1 and otherwise -1, 0 or 1.")


Source = SameStart | Candidates | NoisedData | SemiPolicy
