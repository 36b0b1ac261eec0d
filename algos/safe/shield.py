"""Adaptive chance-constrained safeguards: an action must not spend more of the chance to stay safe than the state can afford.

    psi      probability that the rest of the episode is safe, by a critic V_s or exactly        epsilon  tolerated chance of an unsafe episode
    alpha    in (0, 1], how much of the margin psi - (1 - epsilon) one step may spend            [Chen 2023, arXiv 2310.03379]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def least_advantage(psi: Tensor, *, alpha: float, epsilon: float) -> Tensor:
    """h(s) = -alpha (psi(s) - (1 - epsilon)): an action is safe enough if E[psi(s')|s, a] - psi(s) >= h(s); elementwise.  [recovery-rate condition]

    Below 1 - epsilon the bound is positive: the action must bring safety back. Raises ValueError for alpha or epsilon outside (0, 1] and [0, 1].
    """
    if not (0 < alpha <= 1 and 0 <= epsilon <= 1):
        raise ValueError(f"expected alpha in (0, 1] and epsilon in [0, 1], got alpha={alpha}, epsilon={epsilon}")
    return -alpha * (psi - (1.0 - epsilon))


class Shielded(NamedTuple):
    """Corrected actions (B, n), which of them were moved (B,), and how far each lies above its bound (B,), negative where no correction helped."""

    action: Tensor
    intervened: Tensor
    margin: Tensor


def correct(
    action: Tensor,
    advantage: Callable[[Tensor], Tensor],
    bound: Tensor,
    *,
    step: float = 0.05,
    iterations: int = 20,
    low: float = -1.0,
    high: float = 1.0,
    stop: bool = True,
) -> Shielded:
    """Projected ascent on the safety advantage until it reaches its bound:  a <- clip(a + step grad A / max |grad A|).

    action (B, n) in [low, high]; `advantage` maps (B, n) to A_s(s, a) (B,); bound (B,). Rows that meet their bound stay as they are; `stop` leaves
    off when all do, where without it no value decides the course, as compiled code needs. The released code subtracts the gradient, which leads away
    from safety.
    """
    a = action.detach().clone()
    for _ in range(iterations):
        with torch.enable_grad():
            x = a.detach().requires_grad_()
            value = advantage(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        unsafe = (value.detach() < bound)[:, None]
        if stop and not unsafe.any():
            break
        size = gradient.abs().amax(1, keepdim=True)
        move = torch.where(size > 0, step * gradient / size.clamp(min=1e-30), 0.0)
        a = torch.where(unsafe, (a + move).clamp(low, high), a)
    with torch.no_grad():
        margin = advantage(a) - bound
    return Shielded(a, (a != action).any(1), margin)


def safest(P: np.ndarray, unsafe: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """psi (T+1, S) of the policy that maximises the chance of staying outside of `unsafe` (S,) for T steps, and its actions (T, S).

    psi_T = 1 outside, 0 inside;  psi_t(s) = max_a sum P(s'|s,a) psi_{t+1}(s') outside, 0 inside; P (S, A, S).
    """
    free = ~np.asarray(unsafe)
    psi: list[np.ndarray] = [free.astype(float)]
    actions: list[np.ndarray] = []
    for _ in range(horizon):
        ahead = P @ psi[0]
        actions.insert(0, ahead.argmax(-1))
        psi.insert(0, ahead.max(-1) * free)
    return np.stack(psi), np.stack(actions)


def shielded_policy(P: np.ndarray, policy: np.ndarray, unsafe: np.ndarray, horizon: int, *, alpha: float, epsilon: float) -> np.ndarray:
    """(T, S, A): `policy` (S, A) restricted to the actions that pass the recovery-rate condition with exact psi; the safest one where none does."""
    psi, actions = safest(P, unsafe, horizon)
    out = []
    for t in range(horizon):
        change = P @ psi[t + 1] - psi[t][:, None]
        bound = least_advantage(torch.from_numpy(psi[t]), alpha=alpha, epsilon=epsilon).numpy()
        kept = np.where(change >= bound[:, None], policy, 0.0)
        mass = kept.sum(-1, keepdims=True)
        out.append(np.where(mass > 0, kept / np.where(mass > 0, mass, 1.0), np.eye(policy.shape[1])[actions[t]]))
    return np.stack(out)


def chance_safe(P: np.ndarray, policy: np.ndarray, unsafe: np.ndarray, start: np.ndarray) -> float:
    """Probability that a policy (T, S, A) stays outside of `unsafe` for its T steps, from start (S,)."""
    free = ~np.asarray(unsafe)
    mass = start * free
    for step in policy:
        mass = np.einsum("s,sa,sat->t", mass, step, P) * free
    return float(mass.sum())
