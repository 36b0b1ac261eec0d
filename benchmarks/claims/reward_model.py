"""The claim of Bradley-Terry reward models: endless data give the true reward up to a shift, and the shift does not matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from markovia.algos.preference.reward_model import bradley_terry


def fitted(true: Tensor, pairs: int, centre: float, generator: torch.Generator) -> Tensor:
    """Rewards (K,) of K answers, fitted to so many pairs that were drawn and labelled by Bradley-Terry with the rewards `true`."""
    K = len(true)
    first = torch.randint(K, (pairs,), generator=generator)
    second = (first + torch.randint(1, K, (pairs,), generator=generator)) % K
    wins = torch.rand(pairs, generator=generator, dtype=true.dtype) < torch.sigmoid(true[first] - true[second])
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    reward = torch.zeros_like(true).requires_grad_()
    optimizer = torch.optim.LBFGS([reward], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry(reward[chosen], reward[rejected], centre=centre).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return reward.detach()


def shift_invariance(instances: int = 10, pairs: int = 20_000, bound: float = 0.06, tv_bound: float = 0.03) -> dict[str, Any]:
    """B(8), beta 1: the worst standard deviation of r - r* and the worst TV between the policies p0 exp(r) / Z of both; centring (c = .01) reported.

    The policies tell that a shift is harmless; that c > 0 centres the pairs' sums is checked too: their mean is then below a tenth of that of r*.
    """
    found: dict[str, list[float]] = {"std": [], "tv": [], "std_centred": [], "tv_centred": [], "sum_centred": []}
    for seed in range(instances):
        g = torch.Generator().manual_seed(seed)
        true, logp = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(2))
        true = 1.5 * true + 3.0  # spread out, and not centred
        target = torch.softmax(logp + true, 0)
        for name, centre in (("", 0.0), ("_centred", 0.01)):
            reward = fitted(true, pairs, centre, g)
            found[f"std{name}"].append(float((reward - true).std(correction=0)))
            found[f"tv{name}"].append(float((torch.softmax(logp + reward, 0) - target).abs().sum() / 2))
        found["sum_centred"].append(float(reward.mean().abs()))
    worst = {k: max(v) for k, v in found.items()}
    holds = worst["std"] < bound and worst["tv"] < tv_bound and worst["sum_centred"] < 0.3
    return {"measured": worst, "bound": {"std": bound, "tv": tv_bound, "sum_centred": 0.3}, "holds": bool(holds)}
