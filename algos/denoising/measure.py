"""What tells whether a fine-tuned denoiser got better or only fools its reward: KL to its start, spread of samples, distance to the data.

    x      (n, *sample_shape)   clean samples
    data   (m, *sample_shape)   real samples, or those of the start where there are none
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.agents.records import Rollout
from markovia.algos.streams import stream
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.likelihood import control_pair, step_kl

NOISE = 256  # samples of the start that stand for the data where a task has none


@torch.no_grad()
def chain_kl(agent: DenoisingAgent, task: DenoisingTask, record: Rollout) -> Tensor:
    """KL(chain || start's chain) of each recorded chain, nats: the sum over its steps of |u|^2/2, u = (mean - mean_start)/std.          (n,)

    Its mean over chains of the agent is unbiased, and has less noise than the mean log-ratio: each step's noise is integrated out.
    """
    assert isinstance(record.obs, dict)
    dist = agent.evaluate(record, ("dist",)).dist
    assert dist is not None
    mean, (B, T) = dist.params()["mean"], record.shape
    cond = record.obs["cond"].flatten(0, 1) if "cond" in record.obs else None
    start, std = task.mean_std(record.obs["x"].flatten(0, 1), record.obs["step"].flatten(), cond)
    flat = mean.flatten(0, 1)
    return step_kl(control_pair(flat, start, flat, std)[0]).reshape(B, T).sum(1)


def diversity(x: Tensor, data: Tensor) -> Tensor:
    """Mean distance between two samples, as a share of that between two real ones: falls towards 0 when the samples become one.          ()"""
    return torch.pdist(x.flatten(1)).mean() / torch.pdist(data.flatten(1)).mean()


def nearest(x: Tensor, data: Tensor) -> Tensor:
    """Mean distance of a sample to the nearest real one, as a multiple of that between real ones: grows when samples leave the data.     ()

    A classifier can be certain of noise, and noise is diverse: only this tells.
    """
    real = data.flatten(1)
    between = torch.cdist(real, real).fill_diagonal_(torch.inf).min(1).values.mean()
    return torch.cdist(x.flatten(1), real).min(1).values.mean() / between


@torch.no_grad()
def real_samples(agent: DenoisingAgent, task: DenoisingTask, seed: int, most: int = 2000) -> Tensor:
    """The task's data, at most so many; where it has none, samples of its own network."""
    if task.data is not None:
        data = task.data()
        return data[:: max(1, -(-len(data) // most))]
    generator = stream(seed, "start", device=agent.device)
    starts = task.starts(NOISE if agent.batch is None else min(NOISE, 4 * agent.batch), generator)
    x, cond = starts["x"], starts["cond"]
    assert x is not None
    for k in range(task.num_steps):
        mean, std = task.mean_std(x, k, cond)
        x = mean + std * torch.randn(x.shape, generator=generator, device=x.device)
    return x


def describe(agent: DenoisingAgent, task: DenoisingTask, record: Rollout, data: Tensor) -> dict[str, float]:
    """Statistics of the agent's own chains: reward, judge (where there is one), KL to the start in nats, diversity, distance to the data."""
    x, cond = record.outcome["x"], record.outcome.get("cond")
    found: dict[str, Any] = {"sample_return": task.score(record).mean(), "kl_nats": chain_kl(agent, task, record).mean()}
    if task.judge is not None:
        found["sample_judge"] = task.judged(x, cond).mean()
    found |= {"diversity": diversity(x, data.to(x)), "nearest_data": nearest(x, data.to(x))}
    return {name: float(value) for name, value in found.items()}
