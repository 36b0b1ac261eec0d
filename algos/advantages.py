"""Advantage estimators: a record in, `adv` and `ret` (B, T) out; nothing here carries gradient.

Each slot value is callable as `advantage(reward, rollout, state) -> (adv, ret)`; `reward` (B, T) is the record's reward after penalties, `state`
what the slot keeps between batches. `needs` names columns of the record that the driver fills first: `greedy` (the return of the greedy response
to the same prompt) and `entropy` (of the sampling policy at each decision).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from markovia.agents.records import Rollout, masked_mean


def _suffix_sums(delta: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """A_t = delta_t + decay_t A_{t+1}, (B, T); numpy's operations on a few rows cost a fraction of torch's."""
    delta, decay = np.ascontiguousarray(delta.T), np.ascontiguousarray(decay.T)
    out, last = np.empty_like(delta), np.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        last = delta[t] + decay[t] * last
        out[t] = last
    return np.ascontiguousarray(out.T)


def _backwards(delta: Tensor, decay: Tensor) -> Tensor:
    """`_suffix_sums` of tensors, detached."""
    return torch.from_numpy(_suffix_sums(delta.detach().cpu().numpy(), decay.detach().cpu().numpy())).to(delta.device)


def gae(
    reward: Tensor,
    value: Tensor,
    continuation: Tensor,
    truncated: Tensor,
    boot_value: Tensor | None,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    skipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with termination and truncation kept apart.

    delta_t = r_t + gamma c_t V'_t - V_t,   A_t = delta_t + gamma lam c_t (1 - trunc_t) A_{t+1},   ret = A + V        [arXiv 1506.02438, eq. 16]
    c = continuation; V'_t is V_{t+1}, or boot_value_t (value of the final observation) where truncated. A fractional c is the mean over coin
    flips that end the episode. All (B, T); gamma a number or (B, T).

    Over `skipped` steps (bool) the return goes on as if they were one with the step before: there V_t is r_t + gamma c_t V'_t, and lam is 1.
    """
    flow = gamma * continuation
    if skipped is not None and bool(skipped.any()):
        paid = reward if boot_value is None else reward + torch.where(truncated, flow * boot_value, 0.0)
        value = _backwards(torch.where(skipped, paid, value), torch.where(skipped & ~truncated, flow, 0.0))
        lam = torch.where(skipped, 1.0, lam).to(reward)
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    if boot_value is not None:
        next_value = torch.where(truncated, boot_value, next_value)
    delta = reward + flow * next_value - value
    decay = flow * lam * (~truncated).to(reward.dtype)
    adv = _backwards(delta, decay)
    return adv, adv + value


def skipped_steps(rollout: Rollout) -> Tensor:
    """(B, T) bool: steps that exist and don't count, such as the last of a denoising chain where its noise is 0. No critic is fitted there."""
    return rollout.valid & ~rollout.mask


def leave_one_out(returns: Tensor, group: Tensor) -> Tensor:
    """R_i - mean of the other returns of the group, (B,).            [Kool 2019; Ahmadian 2024, arXiv 2402.14740]

    Raises ValueError for a group of one: it has no baseline.
    """
    _, index = torch.unique(group, return_inverse=True)
    size = torch.zeros(int(index.max()) + 1, dtype=returns.dtype, device=returns.device).index_add_(0, index, torch.ones_like(returns))
    if (size < 2).any():
        raise ValueError("leave-one-out needs at least 2 responses per prompt, got a group of 1; raise group_size")
    total = torch.zeros_like(size).index_add_(0, index, returns)
    n = size[index]
    return returns - (total[index] - returns) / (n - 1)


def normalise(adv: Tensor, mask: Tensor) -> Tensor:
    """(A - mean) / (std + 1e-8) over mask, std with divisor n - 1; a single decision is left as it is."""
    m = mask.to(adv.dtype)
    n = m.sum()
    mean = (adv * m).sum() / n.clamp(min=1)
    var = ((adv - mean).square() * m).sum() / (n - 1).clamp(min=1)
    return torch.where(n > 1, (adv - mean) / (var.sqrt() + 1e-8), adv)


@dataclass(frozen=True)
class GAE:
    """Discounted TD errors, exponentially averaged; needs a critic, at the steps that count."""

    gamma: float = 0.99  # discount per decision
    lam: float = 0.95  # exponential average over horizons; 1 is Monte Carlo minus V
    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0.0 <= self.gamma <= 1.0 and 0.0 <= self.lam <= 1.0):
            raise ValueError(f"gamma and lam must lie in [0, 1], got gamma={self.gamma}, lam={self.lam}")

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        assert rollout.value is not None
        gamma = self.gamma if rollout.discount is None else rollout.discount
        boot = None if rollout.boot_value is None else rollout.boot_value[..., 0]
        args = (reward, rollout.value[..., 0], rollout.continuation, rollout.truncated, boot)
        return gae(*args, gamma=gamma, lam=self.lam, skipped=skipped_steps(rollout))


@dataclass(frozen=True)
class ChainGAE:
    """GAE of chunks in the two-layer MDP of a denoising policy: each denoising step has its chunk's advantage, noisy steps count less.

    A_i = gamma_d^(K'-1-i) A_GAE(s_e, a_e), i = 0 (noisiest) .. K'-1                              [Ren 2024, arXiv 2409.00588, section 4.3]
    gamma and lam work between chunks. The factor is the column `weight`, because advantages are standardised before it is applied; rewards within
    a chain (penalties) are added up. Reads the column `left` (B, T): K'-1-i.
    """

    gamma: float = 0.99  # discount per chunk
    lam: float = 0.95  # exponential average over chunks
    denoising_discount: float = 0.99  # gamma_d
    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("gamma", "lam", "denoising_discount"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        assert rollout.value is not None
        left = rollout.columns["left"]
        steps = int(left[0, 0]) + 1
        last = slice(steps - 1, None, steps)
        boot = None if rollout.boot_value is None else rollout.boot_value[:, last, 0]
        total = reward.unflatten(1, (-1, steps)).sum(2)
        adv, ret = gae(
            total, rollout.value[:, ::steps, 0], rollout.continuation[:, last], rollout.truncated[:, last], boot, gamma=self.gamma, lam=self.lam
        )
        rollout.columns["weight"] = self.denoising_discount**left
        return adv.repeat_interleave(steps, 1), ret.repeat_interleave(steps, 1)


def _row_returns(reward: Tensor, rollout: Rollout) -> Tensor:
    """(B,) sums, checked: each row must hold exactly one episode."""
    last = rollout.valid & ~torch.cat([rollout.valid[:, 1:], torch.zeros_like(rollout.valid[:, :1])], dim=1)
    ends = (rollout.continuation == 0) & rollout.valid
    if not torch.equal(ends, last):
        raise ValueError(
            "this advantage treats a row as one whole response, but the rows hold cut or several episodes; "
            "set num_steps to the episode's length, or use GAE"
        )
    return (reward * rollout.valid).sum(dim=1)


@dataclass(frozen=True)
class LeaveOneOut:
    """The whole row is one action; the baseline is the mean of the other rows of its group."""

    needs_critic: ClassVar[bool] = False

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        returns = _row_returns(reward, rollout)
        group = rollout.group if rollout.group is not None else torch.zeros(len(returns), dtype=torch.long, device=returns.device)
        adv = leave_one_out(returns, group)[:, None].expand_as(reward)
        return adv, returns[:, None].expand_as(reward)


@dataclass(frozen=True)
class MovingBaseline:
    """REINFORCE: the baseline is the mean of the returns of all earlier batches (0 before the first)."""

    needs_critic: ClassVar[bool] = False

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        returns = _row_returns(reward, rollout)
        baseline, n = state.get("baseline", 0.0), state.get("batches", 0)
        state["baseline"], state["batches"] = (baseline * n + float(returns.mean())) / (n + 1), n + 1
        return (returns - baseline)[:, None].expand_as(reward), returns[:, None].expand_as(reward)


@dataclass(frozen=True)
class BatchReturn:
    """DDPO: the row's return, standardised over the batch and clipped, the same for all its decisions.     [arXiv 2305.13301]"""

    scale: bool = True  # divide by the batch's standard deviation
    clip: float = 5.0  # bound on the absolute advantage
    reward_to_go: bool = False  # from each decision on, against the batch's mean of that step; exact for penalties inside the reward
    per_prompt: int = 0  # mean and deviation of a condition's own last rewards, once it has so many (16 in the published code); 0: of the batch
    needs_critic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.per_prompt < 0 or self.per_prompt == 1 or (self.per_prompt and self.reward_to_go):
            raise ValueError(
                f"per_prompt={self.per_prompt} keeps so many rewards of each prompt, 2 or more (0: none), and standardises whole returns; "
                "leave reward_to_go at False with it"
            )

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        returns = _row_returns(reward, rollout)[:, None].expand_as(reward)
        if self.per_prompt:
            mean, std = prompt_statistics(returns[:, 0], _condition_names(rollout), state, keep=self.per_prompt)
            adv = (returns - mean[:, None]) / ((std[:, None] + 1e-8) if self.scale else 1.0)
            return adv.clamp(-self.clip, self.clip), returns
        if self.reward_to_go:
            returns = (reward * rollout.valid).flip(1).cumsum(1).flip(1)
        adv = returns - returns.mean(dim=0, keepdim=True)
        if self.scale:
            adv = adv / (returns.std(dim=0, keepdim=True) + 1e-8)
        return adv.clamp(-self.clip, self.clip), returns


def prompt_statistics(returns: Tensor, names: list[str], state: dict[str, Any], *, keep: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation (divisor n) of each row's prompt over its last `keep` returns, these ones included: (B,), (B,).    [arXiv 2305.13301]

    A prompt with fewer than `keep` has the batch's, so that nobody is judged by two or three rewards. `state` keeps the returns between batches;
    a hard prompt is then not punished for being hard.
    """
    kept = {name: list(values) for name, values in state.get("prompts", {}).items()}
    for name, value in zip(names, returns.tolist(), strict=True):
        kept[name] = [*kept.get(name, []), value][-keep:]
    state["prompts"] = kept
    own = {name: torch.tensor(kept[name], dtype=returns.dtype) for name in set(names) if len(kept[name]) >= keep}
    pairs = [(own[n].mean(), own[n].std(correction=0)) if n in own else (returns.mean().cpu(), returns.std(correction=0).cpu()) for n in names]
    mean, std = (torch.stack(column).to(returns) for column in zip(*pairs, strict=True))
    return mean, std


def _condition_names(rollout: Rollout) -> list[str]:
    """A name for the condition of each chain, short and the same in every batch. Raises ValueError for records without conditions."""
    if not isinstance(rollout.obs, dict) or "cond" not in rollout.obs:
        raise ValueError("per_prompt needs chains with a condition (DigitsConditional, a pipeline with prompts); leave it at 0 without")
    rows = rollout.obs["cond"][:, 0].detach().cpu().contiguous().numpy()
    return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows]


def group_normalised(returns: Tensor, group: Tensor, *, scale: str, eps: float) -> Tensor:
    """R_i - mean of its group, (B,); over std + eps of the group or of the batch of centred returns (divisor n - 1).   [arXiv 2402.03300, 4.1]

    scale "group" is GRPO, "none" Dr.GRPO (2503.20783). A group of equal returns gives zeros. Raises ValueError for a group of one and another scale.
    """
    _, index = torch.unique(group, return_inverse=True)
    size = torch.zeros(int(index.max()) + 1, dtype=returns.dtype, device=returns.device).index_add_(0, index, torch.ones_like(returns))
    if (size < 2).any():
        raise ValueError("a group baseline needs at least 2 responses per prompt, got a group of 1; raise group_size")
    centred = returns - (torch.zeros_like(size).index_add_(0, index, returns) / size)[index]
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (centred.std() + eps)
    if scale != "group":
        raise ValueError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")
    std = (torch.zeros_like(size).index_add_(0, index, centred.square()) / (size - 1)).sqrt()
    return centred / (std[index] + eps)


def answer_entropy(answers: list[str], group: Tensor) -> Tensor:
    """Entropy in bits of the empirical distribution of answers within each row's group, (B,) float64.                 [arXiv 2508.04138, eq. 6]"""
    counts: dict[int, dict[str, int]] = {}
    rows = group.tolist()
    for g, answer in zip(rows, answers, strict=True):
        own = counts.setdefault(g, {})
        own[answer] = own.get(answer, 0) + 1
    entropy = {}
    for g, own in counts.items():
        n = sum(own.values())
        entropy[g] = -sum(c / n * math.log2(c / n) for c in own.values())
    return torch.tensor([entropy[g] for g in rows], dtype=torch.float64)


def _groups(rollout: Rollout) -> Tensor:
    """(B,) group numbers; without prompts all rows answer the same one."""
    if rollout.group is not None:
        return rollout.group
    return torch.zeros(rollout.shape[0], dtype=torch.long, device=rollout.valid.device)


@dataclass(frozen=True)
class GroupNormalised:
    """GRPO: the whole row is one action; its return against those of its group."""

    scale: str = "group"  # divide by the standard deviation of the "group", of the "batch", or not at all: "none"
    eps: float = 1e-4  # added to the standard deviation
    needs_critic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scale not in ("group", "batch", "none"):
            raise ValueError(f"scale must be 'group', 'batch' or 'none', got {self.scale!r}")

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        returns = _row_returns(reward, rollout)
        adv = group_normalised(returns, _groups(rollout), scale=self.scale, eps=self.eps)
        return adv[:, None].expand_as(reward), returns[:, None].expand_as(reward)


@dataclass(frozen=True)
class Greedy:
    """ReMax: the return from each decision on, less the reward of the policy's own greedy response to the prompt.      [arXiv 2310.10505, eq. 6]"""

    needs_critic: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("greedy",)

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        _row_returns(reward, rollout)
        to_go = (reward * rollout.valid).flip(1).cumsum(1).flip(1)
        return to_go - rollout.columns["greedy"], to_go


@dataclass(frozen=True)
class FrozenQ:
    """DVPO: A_t = Q(s_t, a_t) of a critic that was fitted on the first batches and then stays; Q = r_t + V(s_{t+1}), since transitions append.

    While the critic is fitted, its targets are the lam-returns; lam = 0 is SARSA.                                   [arXiv 2502.16944, eqs. 5, 8]
    Q holds no baseline: standardise the advantages over the batch. A text agent's critic is a head on the policy's own trunk; there only the head is
    frozen, and its features move with the policy, while the paper's critic is a network of its own.
    """

    gamma: float = 1.0
    lam: float = 0.0  # of the targets
    needs_critic: ClassVar[bool] = True
    trains_critic: ClassVar[bool] = False

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        assert rollout.value is not None
        boot = None if rollout.boot_value is None else rollout.boot_value[..., 0]
        args = (reward, rollout.value[..., 0], rollout.continuation, rollout.truncated, boot)
        q, target = (gae(*args, gamma=self.gamma, lam=lam, skipped=skipped_steps(rollout))[1] for lam in (0.0, self.lam))
        return q, target


@dataclass(frozen=True)
class ConflictAware:
    """GTPO: group advantage less entropy, without pushing tokens that right and wrong responses share; uncertain responses are left out.

    A_it = delta_i lambda_it (R_i - mean - gamma <H>_i), <H>_i the mean token entropy of the response, lambda of `conflict_weights` from the sign
    of R_i - mean; delta_i = 1[<H>_i <= limit], or 1 where the first batch's mean entropy already exceeds the limit.   [arXiv 2508.03772, eqs. 5-8]
    """

    penalty: float = 0.1  # of the response's mean entropy, reward units per nat
    boost: float = 2.0  # factor of conflict tokens in positive responses
    entropy_limit: float = 0.6931471805599453  # log 2 nats
    needs_critic: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("entropy",)

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        from markovia.algos.on_policy.tokens import conflict_weights

        returns, group, m = _row_returns(reward, rollout), _groups(rollout), rollout.mask
        centred = group_normalised(returns, group, scale="none", eps=0.0)
        entropy = (rollout.columns["entropy"] * m).sum(1) / m.sum(1).clamp(min=1)
        start = state.setdefault("entropy", float(masked_mean(rollout.columns["entropy"], m)))
        keep = torch.ones_like(entropy) if start > self.entropy_limit else (entropy <= self.entropy_limit).to(entropy.dtype)
        shifted = keep * (centred - self.penalty * entropy)
        adv = shifted[:, None] * conflict_weights(rollout.action, centred, m, group, boost=self.boost)
        return adv, returns[:, None].expand_as(reward)


@dataclass(frozen=True)
class Consistency:
    """COPO: beside the advantage within the group, one of the prompt among the prompts; the less the answers agree, the more the first counts.

    Rg = mean_i R_i (1 - z e), e the entropy in bits of the group's answers, z = (1 - 1/G) / log2 G;  Ag = (Rg - mean) / (std + eps) over prompts.
    The loss blends both clipped terms with w = sigmoid(k (e - b)), and w = 0 where the group's rewards are all equal.   [arXiv 2508.04138, eqs. 5-10]
    Puts `adv_other` (Ag) and `mix` (w) beside `adv` (B, T). Answers are the texts of the responses. Raises ValueError for fewer than 2 prompts.
    """

    eps: float = 1e-6
    slope: float = 1.0  # k
    centre: float = 0.5  # b, bits
    needs_critic: ClassVar[bool] = False

    def __call__(self, reward: Tensor, rollout: Rollout, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        returns, group = _row_returns(reward, rollout), _groups(rollout)
        local = group_normalised(returns, group, scale="group", eps=self.eps)
        entropy = answer_entropy(rollout.outcome["completion_text"], group).to(returns)
        _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
        if len(size) < 2:
            raise ValueError("a cross-prompt advantage needs at least 2 prompts in a batch; raise num_envs or lower group_size")
        n = size.to(returns.dtype)
        z = (1.0 - 1.0 / n) / torch.log2(n)
        first = torch.zeros_like(size).scatter_reduce(0, index, torch.arange(len(index), device=index.device), "amin", include_self=False)
        mean = torch.zeros_like(n).index_add_(0, index, returns) / n
        reward_global = mean * (1.0 - z * entropy[first])
        adv_global = (reward_global - reward_global.mean()) / (reward_global.std() + self.eps)
        mix = torch.sigmoid(self.slope * (entropy[first] - self.centre))
        silent = torch.zeros_like(n).index_add_(0, index, local.abs()) == 0
        mix = torch.where(silent, 0.0, mix)
        rollout.columns["adv_other"] = adv_global[index][:, None].expand_as(reward)
        rollout.columns["mix"] = mix[index][:, None].expand_as(reward)
        return local[:, None].expand_as(reward), returns[:, None].expand_as(reward)


Advantage = GAE | ChainGAE | LeaveOneOut | MovingBaseline | BatchReturn | GroupNormalised | Greedy | FrozenQ | ConflictAware | Consistency
