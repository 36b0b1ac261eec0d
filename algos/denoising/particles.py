"""Feynman-Kac steering: several chains run side by side, and those that promise more reward are copied.

    reward, log_weight, and the histories   (G, N): G populations of N particles; weights in nats, not normalised
    x                                       (G N, ...), any dtype: the loop also steers chains of tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from markovia.algos.denoising.sampling import Network, noise_like, predictor
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.likelihood import control_pair, delta
from markovia.envs.denoising.tables import choose

Potential = Literal["diff", "max", "add", "rt"]
POTENTIALS: tuple[Potential, ...] = ("diff", "max", "add", "rt")

# One step of the base chain or of a proposal: (x, k, generator) -> x', log p(x'|x)/q(x'|x) per particle (zeros when q = p)
Step = Callable[[Tensor, int, torch.Generator | None], tuple[Tensor, Tensor]]
# Reward of the clean sample that is expected from x at step k; at k = K the reward itself
Promise = Callable[[Tensor, int], Tensor]


@dataclass
class History:
    """What a potential remembers of each particle's ancestors."""

    last: Tensor  # reward at the previous look, 0 before the first
    best: Tensor  # largest reward so far, -inf before the first
    total: Tensor  # sum of the rewards so far
    spent: Tensor  # sum of the log-potentials so far

    @classmethod
    def fresh(cls, like: Tensor) -> History:
        zero = torch.zeros_like(like)
        return cls(zero, torch.full_like(like, -math.inf), zero, zero)

    def seen(self, reward: Tensor, log_g: Tensor) -> History:
        return History(reward, torch.maximum(self.best, reward), self.total + reward, self.spent + log_g)

    def take(self, index: Tensor) -> History:
        return History(*(value.gather(1, index) for value in (self.last, self.best, self.total, self.spent)))


def log_potential(reward: Tensor, history: History, *, potential: str, lam: float) -> Tensor:
    """How much a look at the expected reward counts; any choice is right as long as all of them multiply to exp(lam r).

    diff  log G = lam (r_k - r_{k-1})       max  lam max_{j <= k} r_j       add  lam sum_{j <= k} r_j       rt  lam r_k      (1)
    [Singhal 2025, 2501.06848]                                              Returns (G, N) nats.
    """
    if potential == "diff":
        return lam * (reward - history.last)
    if potential == "max":
        return lam * torch.maximum(history.best, reward)
    if potential == "add":
        return lam * (history.total + reward)
    return lam * reward


def last_log_potential(reward: Tensor, history: History, *, lam: float) -> Tensor:
    """The potential of the clean sample, which makes the product exact whatever came before: lam r - sum of the earlier ones.      (G, N)"""
    return lam * reward - history.spent


def effective_size(log_weight: Tensor) -> Tensor:
    """Effective number of particles of each population, 1/sum of squared normalised weights, in [1, N].     (G, N) -> (G,)"""
    return 1.0 / log_weight.softmax(1).square().sum(1)


def resample(log_weight: Tensor, threshold: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Ancestors (G, N) drawn by weight, and the weights that go on: those of a resampled population are equal, the others are carried.

    A population is resampled when its effective size is below threshold N; 1 resamples always (unless all weights are equal), 0 never.
    A resampled population keeps its mean weight, so that sums over populations stay unbiased.
    """
    G, N = log_weight.shape
    due = (effective_size(log_weight) < threshold * N)[:, None]
    drawn = torch.multinomial(log_weight.softmax(1), N, replacement=True, generator=generator)
    keep = torch.arange(N, device=log_weight.device).expand(G, N)
    mean = log_weight.logsumexp(1, keepdim=True) - math.log(N)
    return torch.where(due, drawn, keep), torch.where(due, mean.expand(G, N), log_weight)


@dataclass
class Particles:
    """Weighted samples of p(x) exp(lam r(x)): x (G, N, ...), cond (G, N, C) or None, reward and log_weight (G, N)."""

    x: Tensor
    cond: Tensor | None
    reward: Tensor
    log_weight: Tensor

    def best(self) -> dict[str, Any]:
        """The particle of highest reward of each population: {"x": (G, ...), "cond": (G, C) or None}."""
        return self._pick(self.reward.argmax(1))

    def draw(self, generator: torch.Generator | None = None) -> dict[str, Any]:
        """One particle of each population by weight: asymptotically (N large) a sample of the tilted law."""
        return self._pick(torch.multinomial(self.log_weight.softmax(1), 1, generator=generator).squeeze(1))

    def mean(self, value: Tensor) -> Tensor:
        """Weighted mean of `value` (G, N) over all particles, each population by its total weight."""
        return (self.log_weight.flatten().softmax(0) * value.flatten()).sum()

    def _pick(self, index: Tensor) -> dict[str, Any]:
        row = torch.arange(len(index), device=index.device)
        return {"x": self.x[row, index], "cond": None if self.cond is None else self.cond[row, index]}


@dataclass(frozen=True)
class FKSteering:
    """Settings of Feynman-Kac steering; best-of-N is lam = 0 and `best()`, importance sampling is threshold = 0."""

    num_particles: int = 4  # N, chains of one population
    lam: float = 10.0  # strength: the target is p(x) exp(lam r(x)), so lam = 1/beta
    potential: Potential = "max"  # diff, max, add or rt
    first: float = 0.2  # the first look at the reward, as a share of the steps
    every: float = 0.2  # share of the steps between looks
    last: float = 0.8  # the last look before the end
    threshold: float = 1.0  # resample when the effective size is below this share of N

    def __post_init__(self) -> None:
        choose("potential", self.potential, POTENTIALS)
        if self.num_particles < 1:
            raise ValueError(f"num_particles={self.num_particles}; expected at least 1 chain in a population.")
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ValueError(f"lam={self.lam}; expected a finite strength >= 0 (to lower a reward, pass its negative).")
        if not (0 <= self.first <= self.last <= 1 and 0 < self.every <= 1):
            raise ValueError(f"first={self.first}, last={self.last}, every={self.every}; expected shares with 0 <= first <= last <= 1 and every > 0.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}; expected a share of the particles, 0 (never resample) to 1 (always).")

    def looks(self, num_steps: int) -> list[int]:
        """The steps k, 0 < k < K, at which the reward of x_k's clean estimate is looked at."""
        count = round((self.last - self.first) / self.every) + 1
        shares = (self.first + i * self.every for i in range(count))
        return sorted({k for share in shares if share <= self.last + 1e-9 and 0 < (k := round(share * num_steps)) < num_steps})

    @torch.no_grad()
    def steer(self, x: Tensor, num_steps: int, step: Step, promise: Promise, generator: torch.Generator | None = None) -> Particles:
        """Run populations x (G, N, ...) through a chain of `num_steps` steps; works for any chain whose clean sample can be estimated on the way.

        log w += log p/q at every step (a proposal other than the base chain) and log G at every look; then `resample`.
        """
        G, N = x.shape[:2]
        looks = set(self.looks(num_steps))
        flat = x.flatten(0, 1)
        log_weight = torch.zeros((G, N), dtype=torch.float64, device=x.device)
        history = History.fresh(log_weight)
        for k in range(num_steps):
            if k in looks:
                reward = promise(flat, k).reshape(G, N).to(log_weight)
                log_g = log_potential(reward, history, potential=self.potential, lam=self.lam)
                index, log_weight = resample(log_weight + log_g, self.threshold, generator)
                history = history.seen(reward, log_g).take(index)
                flat = flat[(index + N * torch.arange(G, device=index.device)[:, None]).flatten()]
            flat, log_ratio = step(flat, k, generator)
            log_weight = log_weight + log_ratio.reshape(G, N).to(log_weight)
        reward = promise(flat, num_steps).reshape(G, N).to(log_weight)
        log_weight = log_weight + last_log_potential(reward, history, lam=self.lam)
        return Particles(flat.unflatten(0, (G, N)), None, reward, log_weight)

    def sample(
        self, task: DenoisingTask, n: int, generator: torch.Generator | None = None, proposal: Network | None = None
    ) -> Particles:
        """n populations of a denoising task, each for one condition; `proposal` moves the particles in place of the task's network.

        Raises ValueError when a proposal is given and the kernel has deterministic steps, where p/q does not exist.
        """
        kernel, N = task.kernel, self.num_particles
        if proposal is not None:
            kernel.require_density("a proposal", every_step=True)
        starts = task.starts(n * N, generator)
        x, cond = starts["x"], starts["cond"]
        assert x is not None
        if cond is not None:  # particles of a population share its condition, so that copies need not carry it
            cond = cond[::N].repeat_interleave(N, 0)
        base = predictor(kernel, task.network, cond)
        moved = base if proposal is None else predictor(kernel, proposal, cond)

        def step(x: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
            mean, std = kernel.mean_std(moved(x, k), x, k)
            x_next = mean + std * noise_like(x, generator)
            if proposal is None:
                return x_next, x.new_zeros(len(x))
            return x_next, -delta(*control_pair(mean, kernel.mean_std(base(x, k), x, k)[0], x_next, std))

        def promise(x: Tensor, k: int) -> Tensor:
            return task.rewards(x if k == kernel.num_steps else kernel.x0_from(base(x, k), x, k), cond)

        found = self.steer(x.unflatten(0, (n, N)), kernel.num_steps, step, promise, generator)
        found.cond = None if cond is None else cond.unflatten(0, (n, N))
        return found
