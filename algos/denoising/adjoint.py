"""Adjoint matching: the control of every step is regressed on the gradient of the reward, carried back through the reference.

    chain      (n, K + 1, *sample_shape)   x_0 .. x_K, sampled by the current policy without gradient
    adjoint    (n, K + 1, *sample_shape)   a_k, the gradient of -lam r with respect to x_k under the reference's mean
    u          (n, K, *sample_shape)       (mean - mean_ref)/std, the control
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from markovia.algos.on_policy.method import Descent
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.likelihood import Reduce, reduce_entries
from markovia.envs.denoising.tables import choose

INDICES = ("next", "current")


def reward_gradient(task: DenoisingTask, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """Gradient of the task's reward at clean samples, shaped as x (n, *sample_shape).

    Raises ValueError when the reward has no gradient (arrays, lists, thresholds): use a policy gradient such as ddpo then.
    """
    with torch.enable_grad():
        at = x.detach().requires_grad_(True)
        reward = task.reward(at, cond)
        if not (isinstance(reward, Tensor) and reward.requires_grad):
            raise ValueError(
                f"the reward of task {task.name!r} has no gradient with respect to the sample (it returned {type(reward).__name__}"
                f"{' without a graph' if isinstance(reward, Tensor) else ''}); adjoint matching needs one. Use ddpo or rloo for such rewards."
            )
        (gradient,) = torch.autograd.grad(reward.sum(), at)
    if not bool(gradient.isfinite().all()):
        raise ValueError(f"the gradient of the reward of task {task.name!r} is not finite for some samples; clamp or smooth the reward.")
    return gradient


def lean_adjoint(mean_ref: Callable[[Tensor, int], Tensor], chain: Tensor, gradient: Tensor, lam: float) -> Tensor:
    """The gradient of -lam r(x_K) carried back through the reference's means only: no derivative of the policy, none of its control cost.

    a_K = -lam grad r(x_K),   a_k = (d mean_ref(x_k)/d x_k)^T a_{k+1}                       [Domingo-Enrich 2024, 2409.08861]
    One vector-Jacobian product of the reference for each step. At the optimum it has the full adjoint's expectation.      (n, K + 1, ...)
    """
    adjoint = [-lam * gradient]
    for k in reversed(range(chain.shape[1] - 1)):
        with torch.enable_grad():
            at = chain[:, k].detach().requires_grad_(True)
            (back,) = torch.autograd.grad(mean_ref(at, k), at, grad_outputs=adjoint[0])
        adjoint.insert(0, back)
    return torch.stack(adjoint, 1)


def matching_loss(u: Tensor, adjoint: Tensor, std: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1) -> Tensor:
    """Regress the control on the adjoint, which is a constant here: the fixed point u = -s E[a] is the control of E r - KL/lam.

    L = |u + s a|^2                                                                                         [Domingo-Enrich 2024, 2409.08861]
    With a_{k+1}, the next state's adjoint, the discrete fixed point is the optimum of the chain exactly (x' = mean_ref + s u + s z is what u_k
    moves); the published code takes a_k, which agrees to first order in the step.                     u, adjoint (*batch, ...) -> (*batch,)
    """
    return reduce_entries((u + std * adjoint.detach()).square(), reduce, batch_ndim)


def check_memoryless(kernel: GaussianKernel, limit: float = 0.05) -> None:
    """Raise ValueError when a step has no noise, or when the clean sample depends on the starting noise by more than `limit`.

    With memory the controlled chain ends in p exp(r/beta - V(x_0)), biased by the value of its start instead of the tilted law.
    """
    kernel.require_density("adjoint matching", every_step=True)
    if kernel.memory > limit:
        raise ValueError(
            f"this {kernel.kind} kernel remembers its starting noise (correlation {kernel.memory:.2f}, limit {limit}), so adjoint matching would not "
            "end in the tilted law; use GaussianKernel.memoryless(scheduler, K): eta=1 for ddim, ddpm, eta=sqrt(2) for flow_sde. Sample with "
            "any eta afterwards."
        )


def check_solver(solver: Descent, *unread: str, who: str = "trainers of denoising chains") -> None:
    """Raise ValueError for settings of the on-policy loop that no trainer of denoisers reads, and for `unread`, further ones that `who` does not."""
    usual = Descent()
    names = ("micro", "kl_stop_nats", "recompute_advantage", "value_lr", *unread)
    given = [name for name in names if getattr(solver, name) != getattr(usual, name)]
    if given:
        raise ValueError(f"solver.{', solver.'.join(given)} has no meaning for {who}; leave it at its default.")


@dataclass(frozen=True)
class AdjointMatching:
    """Settings of adjoint matching: maximise lam E r - sum_k KL_k, so lam = 1/beta."""

    num_env_steps: int = 25_600  # chains in total
    num_envs: int = 64  # chains of one batch
    lam: float = 1.0  # reward scale, 1/beta; large for weak rewards (100 for image scorers)
    index: Literal["next", "current"] = "next"  # the adjoint that a step is matched with; "current" is the published code's
    steps_per_chain: int | None = None  # steps that count in each chain, drawn in equal strata of time; None: all
    drop_quantile: float | None = None  # leave out decisions whose root loss is above the moving average of this quantile of it, e.g. 0.9
    solver: Descent = field(default_factory=lambda: Descent(lr=1e-3, betas=(0.9, 0.95), anneal=False, epochs=1, minibatch=None, max_grad_norm=1.0))

    def __post_init__(self) -> None:
        choose("index", self.index, INDICES)
        if self.num_env_steps < 1 or self.num_envs < 1:
            raise ValueError(f"num_env_steps and num_envs must be >= 1, got {self.num_env_steps}, {self.num_envs}")
        if not self.lam > 0:
            raise ValueError(f"lam={self.lam}; expected a positive reward scale, 1/beta.")
        if self.steps_per_chain is not None and self.steps_per_chain < 1:
            raise ValueError(f"steps_per_chain={self.steps_per_chain}; expected at least 1, or None for all steps.")
        if self.drop_quantile is not None and not 0 < self.drop_quantile < 1:
            raise ValueError(f"drop_quantile={self.drop_quantile}; expected a share in (0, 1), or None to keep everything.")
        check_solver(self.solver)


def strata(n: int, num_steps: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Which steps count in each chain: one from each of `count` equal parts of the K steps, drawn anew for each chain.   (n, K) bool"""
    edges = torch.linspace(0, num_steps, min(count, num_steps) + 1)
    draw = torch.rand(n, len(edges) - 1, generator=generator)
    index = (edges[:-1] + draw * edges.diff()).floor().long().clamp(max=num_steps - 1)
    return torch.zeros(n, num_steps, dtype=torch.bool).scatter_(1, index, True)


def chain_of(rollout: Any) -> Tensor:
    """x_0 .. x_K of a denoising record: (n, K + 1, *sample_shape)."""
    return torch.cat([rollout.obs["x"], rollout.action[:, -1:]], 1)
