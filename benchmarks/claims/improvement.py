"""Claims about closed-form policy improvement: each operator is the optimum of the problem that it says it solves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from markovia.agents.improved import ellipsoid_step, jensen_ellipsoid, mode_budgets


def _random(generator: torch.Generator, d: int = 3, m: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log weights, means and covariances of a mixture, and a gradient."""
    root = torch.randn((m, d, d), generator=generator, dtype=torch.float64)
    cov = root @ root.mT / d + 0.1 * torch.eye(d, dtype=torch.float64)
    log_weight = torch.log_softmax(torch.randn(m, generator=generator, dtype=torch.float64), 0)
    mean, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, d), (d,)))
    return log_weight, 0.3 * mean, cov, grad


def _numeric(grad: Tensor, start: Tensor, left: Callable[[np.ndarray], float], slope: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest g'mu over left(mu) >= 0, by sequential quadratic programming from a point inside."""
    g = grad.numpy()
    limit = {"type": "ineq", "fun": left, "jac": slope}
    found = minimize(lambda x: -g @ x, start.numpy(), jac=lambda x: -g, constraints=[limit], method="SLSQP", options={"ftol": 1e-14, "maxiter": 300})
    return float(-found.fun)


def operators(problems: int = 1000, bound: float = 1e-4, log_tau: float = 0.5, joint: float = 2.0) -> dict[str, Any]:
    """Random problems in R^3 with linear Q: largest gap of the single-Gaussian and of Jensen's step to the best feasible value, found numerically.

    Jensen's bound has the budget `joint`, since smaller ones leave it no point. Every mode with a budget c_i > 0 ends where
    lambda_i N_i = max_j lambda_j N_j(mu_j) / tau; one without stays at its mean.
    """
    generator = torch.Generator().manual_seed(0)
    gaps: dict[str, list[float]] = {"single": [], "jensen": []}
    contact, stayed, without = 0.0, 0.0, 0
    for _ in range(problems):
        log_weight, mean, cov, grad = _random(generator)
        precision = torch.linalg.inv(cov)
        weight, g = log_weight.exp(), grad

        def each(x: np.ndarray, mean: Tensor = mean, precision: Tensor = precision) -> Tensor:
            away = torch.as_tensor(x) - mean
            return 0.5 * torch.einsum("md,mde,me->m", away, precision, away)

        def pulls(x: np.ndarray, mean: Tensor = mean, precision: Tensor = precision) -> Tensor:
            return torch.einsum("mde,me->md", precision, torch.as_tensor(x) - mean)

        step = ellipsoid_step(mean[0], cov[0], g, (2.0 * log_tau) ** 0.5)
        best = _numeric(g, mean[0], lambda x: log_tau - float(each(x)[0]), lambda x: -pulls(x)[0].numpy())
        gaps["single"].append(abs(float(g @ step) - best))
        center, whole, square = jensen_ellipsoid(log_weight, mean, cov, log_tau=joint)
        if float(square) > 0.0:
            best = _numeric(g, center, lambda x: joint - float(weight @ each(x)), lambda x: -(weight @ pulls(x)).numpy())  # noqa: B023
            gaps["jensen"].append(abs(float(g @ ellipsoid_step(center, whole, g, square.sqrt())) - best))
        budgets = mode_budgets(log_weight, cov, log_tau=log_tau)
        moved = ellipsoid_step(mean, cov, g.expand_as(mean), (2.0 * budgets).sqrt())
        peak = log_weight - 0.5 * torch.logdet(2.0 * torch.pi * cov)
        reached = peak - 0.5 * torch.einsum("md,mde,me->m", moved - mean, precision, moved - mean)
        has = budgets > 0.0
        contact = max(contact, float((reached - (peak.max() - log_tau)).abs()[has].max()))
        stayed, without = max(stayed, float((moved - mean).abs()[~has].sum())), without + int((~has).sum())
    worst = max(max(v) for v in gaps.values())
    holds = worst <= bound and contact <= 1e-8 and stayed == 0.0
    largest = {k: max(v) for k, v in gaps.items()}
    return {"measured": worst, "bound": bound, "holds": holds, "largest_gap": largest, "feasible_jensen": len(gaps["jensen"]),
            "contact_error_nats": contact, "modes_without_budget": without / (4 * problems)}  # fmt: skip
