"""Reward transforms: what becomes of the task's reward before penalties and advantages; pure functions, and the slots that apply them.

    reward (B, T)  reward units, a response's own at its last token          returns (B,)  its sum over the response
    length (B,)    tokens that count

Each slot value is callable as `transform(reward, rollout, memory) -> reward`; `memory` is the driver's, saved with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from markovia.agents.records import Rollout
from markovia.algos.on_policy.divergence import f_reward
from markovia.envs.exact.divergences import f_divergence


def overlong(length: Tensor, *, max_length: int, buffer: int, penalty: float) -> Tensor:
    """Soft punishment of long responses: min(0, -(L - (L_max - buffer)) / buffer * penalty), (B,).               [arXiv 2503.14476, eq. 13]"""
    return (-(length - (max_length - buffer)) / buffer * penalty).clamp(max=0.0)


def exact_length(correct: Tensor, length: Tensor, budget: Tensor, *, rate: float) -> Tensor:
    """1[correct] - rate |n - L|: answer in exactly n tokens, (B,). A wrong answer of the right length beats a right one far off. [2503.04697, eq. 1]

    arXiv 2503.04697.
    """
    return correct - rate * (budget - length).abs()


def at_most_length(correct: Tensor, length: Tensor, budget: Tensor, *, rate: float, offset: float = 0.5) -> Tensor:
    """1[correct] clip(rate (n - L) + offset, 0, 1): answer in at most n tokens, (B,); at n itself it pays the offset. [arXiv 2503.04697, eq. 2]"""
    return correct * (rate * (budget - length) + offset).clamp(0.0, 1.0)


def implicit_reward(logp_dpo: Tensor, logp_ref: Tensor, *, scale: float, clip: float) -> Tensor:
    """clip(scale (log pi_dpo - log ref), +-clip) per token, (B, T): DPO's implicit reward, told at every token.   [arXiv 2404.18922, eq. 4.4]

    Without the clip the sum over a response telescopes, so that the optimum is p0 exp(R (1 + scale / beta') / beta) / Z.
    """
    return (scale * (logp_dpo - logp_ref)).clamp(-clip, clip)


def combine(rewards: Tensor, *, how: str, lam: float = 0.5) -> Tensor:
    """One reward (B,) from those of k models (B, k): mean, worst case, or R = mean_i r_i - lam var_i r_i (divisor k - 1).    [arXiv 2310.02743]

    Standardise each model's scale first: Bradley-Terry rewards are free in shift, and their scales differ.
    Raises ValueError for an unknown name and for a variance of one model.
    """
    if how == "mean":
        return rewards.mean(1)
    if how == "worst":
        return rewards.min(1).values
    if how == "uncertainty":
        if rewards.shape[1] < 2:
            raise ValueError("uncertainty weighting needs the rewards of at least 2 models, got 1")
        return rewards.mean(1) - lam * rewards.var(1)
    raise ValueError(f"how must be mean, worst or uncertainty, got {how!r}")


def calibrated(returns: Tensor, samples: Tensor) -> Tensor:
    """C = share of the reference's responses that score less, ties counting half; returns (B,), samples (B, K) -> (B,). [arXiv 2412.19792, eq. 9]

    Uniform under the reference with mean 1/2, and the same for every monotone map of the reward.
    """
    score = returns[:, None]
    return (samples < score).to(returns.dtype).mean(1) + 0.5 * (samples == score).to(returns.dtype).mean(1)


@dataclass(frozen=True)
class Scaled:
    """R / running standard deviation (divisor n - 1), clipped: PPO-max. The mean stays, advantages are centred later.   [arXiv 2307.04964]"""

    clip: float = 5.0  # bound on the absolute scaled reward
    centre: bool = False  # subtract the running mean
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip bounds the scaled reward and must be > 0, got {self.clip}")

    def __call__(self, reward: Tensor, rollout: Rollout, memory: dict[str, Any]) -> Tensor:
        returns = (reward * rollout.valid).sum(1)
        n, mean, square = memory.get("reward_count", 0), memory.get("reward_mean", 0.0), memory.get("reward_square", 0.0)
        # Chan's update of the mean and of the sum of squared deviations by a batch.
        added, batch_mean = len(returns), float(returns.mean())
        delta, total = batch_mean - mean, n + added
        mean += delta * added / total
        square += float((returns - batch_mean).square().sum()) + delta * delta * n * added / total
        memory |= {"reward_count": total, "reward_mean": mean, "reward_square": square}
        std = math.sqrt(square / (total - 1)) if total > 1 else 1.0
        if std == 0.0:
            return reward  # all alike so far: there is no scale yet
        scaled = ((returns - mean if self.centre else returns) / std).clamp(-self.clip, self.clip)
        return at_end(scaled, rollout)


@dataclass(frozen=True)
class SoftOverlong:
    """DAPO's length penalty near the longest response, which must be longer than the buffer."""

    buffer: int = 4  # tokens before the end over which the penalty grows
    penalty: float = 1.0  # at the full length, reward units
    max_length: int | None = None  # longest response, None: the width of the record
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.penalty < 0:
            raise ValueError(f"expected buffer >= 1 and penalty >= 0, got {self.buffer} and {self.penalty}")

    def __call__(self, reward: Tensor, rollout: Rollout, memory: dict[str, Any]) -> Tensor:
        length = rollout.mask.sum(1).to(reward.dtype)
        longest = rollout.shape[1] if self.max_length is None else self.max_length
        if self.penalty and self.buffer >= longest:
            raise ValueError(
                f"reward: SoftOverlong's buffer of {self.buffer} tokens is no less than the longest response of {longest}, so every response would "
                "be punished; take a smaller buffer, longer responses (max_new_tokens), or penalty=0"
            )
        return reward + at_end(overlong(length, max_length=longest, buffer=self.buffer, penalty=self.penalty), rollout)


@dataclass(frozen=True)
class LengthBudget:
    """LCPO: what the task tells to be `solved`, else a reward above a half, is correct; its column `budget` is the number of tokens asked for."""

    mode: str = "exact"  # "exact" or "max"
    rate: float = 3e-4  # reward per token off the budget
    offset: float = 0.5  # "max": what the budget itself pays
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "max"):
            raise ValueError(f"mode must be 'exact' or 'max', got {self.mode!r}")

    def __call__(self, reward: Tensor, rollout: Rollout, memory: dict[str, Any]) -> Tensor:
        told = rollout.outcome.get("columns", {}).get("budget")
        if told is None:
            raise ValueError("LengthBudget reads the task's column 'budget' (tokens asked for per prompt), and this task has none")
        solved = rollout.outcome.get("solved")
        correct = ((reward * rollout.valid).sum(1) > 0.5 if solved is None else solved.to(reward.device)).to(reward.dtype)
        length = rollout.mask.sum(1).to(reward.dtype)
        budget = torch.as_tensor(told, dtype=reward.dtype, device=reward.device)
        if self.mode == "exact":
            return at_end(exact_length(correct, length, budget, rate=self.rate), rollout)
        return at_end(at_most_length(correct, length, budget, rate=self.rate, offset=self.offset), rollout)


@dataclass(frozen=True)
class ImplicitReward:
    """RTO: the log-ratio of a DPO-trained policy (the driver's reference "dpo") to the reference is paid at every token."""

    scale: float = 0.05  # beta_1
    clip: float = 0.05  # bound per token, reward units
    terminal_clip: float = 10.0  # bound of the task's own reward
    needs: ClassVar[tuple[str, ...]] = ("dpo", "ref")

    def __post_init__(self) -> None:
        if not (self.scale >= 0 and self.clip > 0 and self.terminal_clip > 0):
            raise ValueError(f"expected scale >= 0, clip > 0 and terminal_clip > 0, got {self.scale}, {self.clip} and {self.terminal_clip}")

    def __call__(self, reward: Tensor, rollout: Rollout, memory: dict[str, Any]) -> Tensor:
        token = implicit_reward(rollout.logp_ref["dpo"], rollout.logp_ref["ref"], scale=self.scale, clip=self.clip)
        return reward.clamp(-self.terminal_clip, self.terminal_clip) + torch.where(rollout.mask, token, 0.0)


def matching_reward(d: Tensor, returns: Tensor, log_z: Tensor, *, beta: float, f: str, alpha: float | None = None, clamp: float = 20.0) -> Tensor:
    """-f'(t), t = pi / p for the target p = ref exp(R / beta) / Z: what a policy gradient on D_f(pi || p) is paid, (B,).   [arXiv 2302.08215, eq. 4]

    grad D_f(pi || p) = E_pi[f'(t) grad log pi];  log t = d - R / beta + log Z, d (B,) the sequence log-ratio to ref; t is not differentiated.
    With f = u log u the sum is R / beta - d up to a constant: the KL-regularised reward.
    """
    return -f_reward(d - returns / beta + log_z, f=f, alpha=alpha, clamp=clamp)


@dataclass(frozen=True)
class Matching:
    """f-DPG: the policy is fitted to the target ref exp(R / beta) / Z in any f-divergence, by a pseudo-reward."""

    beta: float = 0.1  # temperature of the target, reward units
    f: str = "js"  # generator of D_f(pi || target)
    alpha: float | None = None  # order of the alpha family
    log_z: float | None = None  # log Z where it is known, None: estimated by E_pi[ref exp(R / beta) / pi] over the responses to each prompt
    needs: ClassVar[tuple[str, ...]] = ("ref",)

    def __post_init__(self) -> None:
        f_divergence(self.f, self.alpha)
        if not self.beta > 0:
            raise ValueError(f"beta is the temperature of the target and must be > 0, got {self.beta}")

    def __call__(self, reward: Tensor, rollout: Rollout, memory: dict[str, Any]) -> Tensor:
        d = torch.where(rollout.mask, rollout.logp_old - rollout.logp_ref["ref"], 0.0).sum(1)
        returns = (reward * rollout.valid).sum(1)
        log_z = torch.full_like(d, self.log_z or 0.0)
        if self.log_z is None:
            _, index = torch.unique(torch.zeros(len(d)) if rollout.group is None else rollout.group, return_inverse=True)
            same = index[:, None] == index[None]
            weight = (returns / self.beta - d)[None].expand_as(same).masked_fill(~same, -torch.inf)
            log_z = torch.logsumexp(weight, 1) - same.sum(1).log()
        return at_end(matching_reward(d, returns, log_z, beta=self.beta, f=self.f, alpha=self.alpha), rollout)


def at_end(returns: Tensor, rollout: Rollout) -> Tensor:
    """(B, T) with `returns` (B,) at the last valid step of each row and zero elsewhere."""
    steps = torch.arange(rollout.shape[1], device=returns.device)
    last = (steps * rollout.valid).argmax(1, keepdim=True)
    return returns.new_zeros(rollout.shape).scatter_(1, last, returns[:, None])


RewardTransform = Scaled | SoftOverlong | LengthBudget | ImplicitReward | Matching
