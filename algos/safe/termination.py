"""Constraints as terminations: a violation ends the episode for the learner with some probability, and the environment goes on.

    cost   (..., m)  signed or plain cost of a step, > 0 where violated      delta  (...)  probability in [0, 1] that the step ended it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def termination_probability(cost: Tensor, scale: Tensor, p_max: Tensor, *, p_min: float = 0.0) -> Tensor:
    """delta = max_i delta_i,  delta_i = 0 where c_i <= 0, else p_min + clip(c_i / scale_i, 0, 1) (p_i - p_min)       [arXiv 2403.18765]

    cost (..., m), scale and p_max (m,).
    """
    share = (cost / scale).clamp(0.0, 1.0)
    return torch.where(cost > 0, p_min + share * (p_max - p_min), 0.0).amax(-1)


def running_scale(scale: Tensor | None, cost: Tensor, *, tau: float = 0.95, floor: float = 1e-6) -> Tensor:
    """(m,): scale <- tau scale + (1 - tau) [max over the environments of c]_+; the first call assigns. cost (n, m).

    The maximum is cut at `floor` before it is averaged, so that steps on which signed costs hold do not make the next violation look large.
    """
    top = cost.amax(0).clamp(min=floor)
    return top if scale is None else tau * scale + (1 - tau) * top


def soft_probability(progress: float, *, first: float = 0.05, last: float = 0.25) -> float:
    """Curriculum of a soft constraint: 1 / p goes linearly from 1 / first to 1 / last; progress in [0, 1]."""
    return 1.0 / (1.0 / first + min(max(progress, 0.0), 1.0) * (1.0 / last - 1.0 / first))


def soften(reward: Tensor, continuation: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """([(1 - delta) r]_+, (1 - delta) continuation): reward and future both count only if the step did not end the episode.

    Rewards are cut at 0, since with negative ones ending would be attractive.                                        [arXiv 2403.18765]
    """
    return ((1.0 - delta) * reward).clamp(min=0.0), (1.0 - delta) * continuation


@dataclass(frozen=True)
class SoftTermination:
    """CaT: a violation ends the episode with a probability that grows with it."""

    p_max: tuple[float, ...] = (1.0,)  # probability at the largest violation of each cost, or one for all; 1 for hard constraints
    p_min: float = 0.0  # probability at the slightest violation
    tau: float = 0.95  # memory of the scale
    curriculum: bool = False  # p_max grows from 0.05 to its value over the run

    def __post_init__(self) -> None:
        if not isinstance(self.p_max, list | tuple):
            object.__setattr__(self, "p_max", (float(self.p_max),))
        if not all(0 <= self.p_min <= p <= 1 for p in self.p_max):
            raise ValueError(f"expected 0 <= p_min <= p_max <= 1, got p_min={self.p_min}, p_max={self.p_max}")
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau must lie in [0, 1), got {self.tau}")

    def probabilities(self, num_costs: int, progress: float) -> Tensor:
        """(m,): p_max at this point of the run."""
        top = torch.as_tensor(self.p_max, dtype=torch.float64).expand(num_costs)
        return torch.tensor([soft_probability(progress, last=float(p)) if p > 0.05 else float(p) for p in top]) if self.curriculum else top

    def delta(self, cost: Tensor, scale: Tensor | None, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """delta (B, T) of a record's cost (B, T, m), step after step with the scale that is known then; and the scale (m,) to go on with."""
        p_max, out = self.probabilities(cost.shape[-1], progress).to(cost), []
        scale = None if scale is None else scale.to(cost)
        for t in range(cost.shape[1]):
            scale = running_scale(scale, cost[:, t], tau=self.tau)
            out.append(termination_probability(cost[:, t], scale, p_max, p_min=self.p_min))
        assert scale is not None
        return torch.stack(out, 1), scale
