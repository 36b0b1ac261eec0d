"""From denoising records to the scores that preference losses read, and the pairs that they compare.

    ratio   (B, T)  log p/p_ref of each step under the kernel: the control pair's difference, nats with gradient
    error   (B, T)  squared error of the network's output at a noised clean sample
    pairs   (P, 2)  rows of the preferred and of the other sample

The losses are those of text (`algos.preference`): a chain, or a single step, takes the place of a response.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.agents.records import Rollout, Views
from markovia.algos.preference.scores import TokenScores
from markovia.envs.denoising.likelihood import control_pair, delta, reduce_entries


def control_ratio(agent: DenoisingAgent, reference: DenoisingAgent, record: Rollout) -> Tensor:
    """log p_theta/p_ref of every recorded step, from the two means: no difference of two large log-probabilities.

    Delta = <u, z> - |u|^2/2,   u = (mean - mean_ref)/s,   z = (x' - mean_ref)/s                      (B, T) nats, 0 where s = 0
    """
    dist = agent.evaluate(record, ("dist",)).dist
    with torch.no_grad():
        ref = reference.evaluate(record, ("dist",)).dist
    assert dist is not None and ref is not None
    mean, std = dist.params()["mean"], dist.params()["std"]
    std = std.reshape(*std.shape, *[1] * (mean.ndim - 2))
    return delta(*control_pair(mean, ref.params()["mean"], record.action, std), agent.reduce, batch_ndim=2)


def clipped(ratio: Tensor, clip: float | None) -> Tensor:
    """log clip(e^ratio, 1 - clip, 1 + clip): steps outside get no gradient, on either side (unlike PPO's pessimistic minimum).  [2311.13231]"""
    return ratio if clip is None else ratio.clamp(math.log1p(-clip), math.log1p(clip))


def noise_error(agent: DenoisingAgent, record: Rollout) -> Tensor:
    """Denoising error of each row at its noised sample, e = |eps - eps_theta(x_t, t, c)|^2; of x0, v or the velocity if so parametrised. (B, T)

    The error of eps would weigh the levels otherwise, and is 0 where a flow has no signal.                              [Wallace 2023, 2311.12908]
    What should be predicted is in columns["target"]. Summed or averaged over the sample's entries as the agent was told (`reduce`).
    """
    assert isinstance(record.obs, dict)
    B, T = record.shape
    x, step = record.obs["x"].flatten(0, 1), record.obs["step"].flatten()
    cond = record.obs["cond"].flatten(0, 1) if "cond" in record.obs else None
    output = agent.network(x, agent.kernel.timestep(step), cond)
    return reduce_entries((output - record.columns["target"].flatten(0, 1)).square(), agent.reduce).reshape(B, T)


def anchor_rule(chosen: Tensor, otherwise: float) -> Tensor:
    """SePPO's kappa, per pair and without gradient: +1 where the policy already likes the winner more than its sampler did, else `otherwise`.

    If the sampler gives the winner less likelihood than the policy, D(x_w) >= 0, its own sample is probably worse than the winner and is pushed
    down; if not, it is probably good: -1 learns from it too, 0 leaves it out.                                     [Zhang 2024, 2410.05255]
    """
    return torch.where(chosen.detach() >= 0, 1.0, otherwise)


def as_scores(ratio: Tensor, mask: Tensor, anchors: tuple[str, ...]) -> TokenScores:
    """Scores whose log-ratio to each anchor is `ratio`: log-probabilities relative to the anchor, which is therefore zero."""
    return TokenScores(ratio, mask, {name: torch.zeros_like(ratio) for name in anchors})


def ranked(score: Tensor, keep_ties: bool = False) -> Tensor:
    """(P, 2) of rows (0, 1), (2, 3), ..., the one of higher score (2P,) first; ties are left out unless they are kept.

    Raises ValueError for an odd number of rows.
    """
    if len(score) % 2:
        raise ValueError(f"pairs need an even number of samples, got {len(score)}; set num_envs to an even number.")
    two = torch.arange(len(score), device=score.device).view(-1, 2)
    gap = score[two[:, 0]] - score[two[:, 1]]
    two = torch.where((gap < 0)[:, None], two.flip(1), two)
    return two if keep_ties else two[gap != 0]


def per_step(pairs: Tensor, mask: Tensor) -> Tensor:
    """Pairs of rows (P, 2) as pairs of single decisions, (P T', 2): step k of one chain against step k of the other, where both count."""
    T = mask.shape[1]
    index = pairs[:, None, :] * T + torch.arange(T, device=pairs.device)[None, :, None]
    both = mask[pairs[:, 0]] & mask[pairs[:, 1]]
    return index[both]


def best_and_worst(score: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of candidates (n, c) the best and the worst (n,), and whether their margin s(s_w - s_l) - s(s_l - s_w) = tanh(gap/2) is above the threshold."""
    best, worst = score.argmax(1), score.argmin(1)
    gap = score.amax(1) - score.amin(1)
    return best, worst, torch.tanh(gap / 2) > threshold


def step_record(x: Tensor, step: Tensor, cond: Tensor | None, action: Tensor, **columns: Tensor) -> Rollout:
    """A record of B single decisions (B, 1): x and action (B, *shape), step (B,), cond (B, C) or None; columns (B, ...)."""
    B = len(x)
    zero, yes = x.new_zeros(B, 1), torch.ones(B, 1, dtype=torch.bool, device=x.device)
    obs: dict[str, Any] = {"x": x[:, None], "step": step[:, None]} | ({} if cond is None else {"cond": cond[:, None]})
    return Rollout(
        obs=obs, action=action[:, None], logp_old=zero, reward=zero.clone(), valid=yes, mask=yes.clone(), continuation=zero + 1.0,
        truncated=~yes, columns={name: value[:, None] for name, value in columns.items()},
    )  # fmt: skip


def views_of(count: int, score: Tensor | None) -> Views:
    """Views of `count` pairs whose rows stand one after the other; score (2 count,) of each row, where the loss reads it."""
    return Views(pairs=torch.arange(2 * count, device=None if score is None else score.device).view(-1, 2), score=score)
