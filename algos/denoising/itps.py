"""Inference-time policy steering: a person's sketch moves the samples of a frozen trajectory denoiser, in six ways.

    path     (..., H, 2)   trajectories of H points of the plane, in the units in which the network was trained
    sketch   (n, 2)        what the person drew, any number of points; resampled to H points
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from markovia.algos.denoising.sampling import Predict, denoise, noise_like, predictor
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.tables import choose

Strategy = Literal["rs", "op", "pr", "bi", "gd", "ss"]
STRATEGIES = ("rs", "op", "pr", "bi", "gd", "ss")


def resample_path(sketch: Tensor, num_points: int) -> Tensor:
    """The sketch (n, 2) at `num_points` equally spaced indices, linear in between (n = 1: the point itself, repeated).      (H, 2)"""
    place = torch.linspace(0, len(sketch) - 1, num_points, dtype=sketch.dtype, device=sketch.device)
    low = place.floor().long().clamp(max=max(len(sketch) - 2, 0))
    high = (low + 1).clamp(max=len(sketch) - 1)
    return torch.lerp(sketch[low], sketch[high], (place - low)[:, None])


def alignment(path: Tensor, sketch: Tensor) -> Tensor:
    """How far a trajectory is from the sketch (H, 2): d = mean_h |path_h - sketch_h|_2, in the path's unit.                   (...)"""
    return (path - sketch).norm(dim=-1).mean(-1)


def ranking(distance: Tensor, temperature: float = 20.0) -> Tensor:
    """Probability of executing each of C candidates: softmax of temperature (1 - d/max d).            (..., C) -> (..., C)"""
    return (temperature * (1.0 - distance / distance.amax(-1, keepdim=True).clamp(min=1e-12))).softmax(-1)


def pulled(kernel: GaussianKernel, predict: Predict, distance: Callable[[Tensor], Tensor], rho: float) -> Predict:
    """Guided diffusion: every prediction but the last step's is pushed down the gradient of a distance at the noisy sample.

    eps <- eps + rho grad_x d(x),   adding to eps because the mean falls with eps                        [Wang 2024, 2411.16627]
    d is a mean over H points, so that the same rho pulls half as hard on paths of twice the length.
    """

    def push(x: Tensor, k: int) -> Tensor:
        # The official code pulls while t > 0: all steps but the last, whose timestep is 0 there; with trailing spacing it is not.
        if k == kernel.num_steps - 1:
            return predict(x, k)
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(distance(at).sum(), at)
        return kernel.add_to_eps(predict(x, k), rho * gradient, k)

    return push


@dataclass(frozen=True)
class ITPS:
    """Settings of inference-time policy steering.

    rs  random sampling: the sketch is not used
    op  output perturbation: the policy starts anew with cond = sketch_0, where the sketch starts (a network whose condition is the position)
    pr  post-hoc ranking: the best of `candidates` samples
    bi  biased initialisation: the chain starts half-way, at the sketch plus noise
    gd  guided diffusion: `rho` times the distance's gradient at every step but the last
    ss  stochastic sampling: as gd, and every noise level is visited `repeats` times
    """

    strategy: Strategy = "ss"
    rho: float = 60.0  # strength of the pull (gd, ss); 20 is usual for gd, and 1 to 5 stay close to the data
    repeats: int = 4  # visits of each noise level (ss)
    candidates: int = 32  # samples that are ranked (pr)
    start: float = 0.5  # share of the steps that is skipped (bi)
    start_noise: float = 0.5  # standard deviation of the noise on the sketch (bi)

    def __post_init__(self) -> None:
        choose("strategy", self.strategy, STRATEGIES)
        if self.rho < 0 or self.repeats < 1 or self.candidates < 1:
            raise ValueError(f"rho={self.rho}, repeats={self.repeats}, candidates={self.candidates}; expected rho >= 0 and counts >= 1.")
        if not 0 <= self.start < 1 or self.start_noise < 0:
            raise ValueError(f"start={self.start}, start_noise={self.start_noise}; expected a share in [0, 1) and a noise >= 0.")

    def sample(self, task: DenoisingTask, sketch: Tensor, n: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """n trajectories {"x": (n, H, 2), "cond"} of the task's network, steered towards the sketch.

        Raises ValueError when the task's samples are no paths, the sketch has no points, or `op` meets a network without a position to change.
        """
        if len(task.sample_shape) != 2 or task.sample_shape[1] != 2:
            raise ValueError(f"samples of shape {task.sample_shape} are no paths; expected (H, 2).")
        if sketch.ndim != 2 or sketch.shape[1] != 2 or len(sketch) == 0:
            raise ValueError(f"the sketch has shape {tuple(sketch.shape)}; expected (points, 2) with at least one point.")
        kernel, count = task.kernel, self.candidates if self.strategy == "pr" else 1
        starts = task.starts(n * count, generator)
        x, cond = starts["x"], starts["cond"]
        assert x is not None
        target = resample_path(sketch.to(x), task.sample_shape[0])
        if self.strategy == "op":
            cond = self._from_sketch(task, target, n)
        predict, first = predictor(kernel, task.network, cond), 0
        if self.strategy in ("gd", "ss"):
            predict = pulled(kernel, predict, lambda path: alignment(path, target), self.rho)
        if self.strategy == "bi":
            first = int(self.start * kernel.num_steps)
            x = target + self.start_noise * noise_like(x, generator)
        x = denoise(kernel, predict, x, generator, first, self.repeats if self.strategy == "ss" else 1)
        if self.strategy == "pr":
            best = ranking(alignment(x, target).unflatten(0, (n, count))).argmax(1)
            row = torch.arange(n, device=x.device) * count + best
            x, cond = x[row], None if cond is None else cond[row]
        return {"x": x, "cond": cond}

    @staticmethod
    def _from_sketch(task: DenoisingTask, target: Tensor, n: int) -> Tensor:
        if task.conditions is None or task.conditions.shape[1] != 2:
            raise ValueError(
                "strategy 'op' moves the position from which the policy starts, but this task's condition is "
                f"{'missing' if task.conditions is None else f'{task.conditions.shape[1]} numbers'}; it needs a network with cond = (x, y)."
            )
        return target[0].expand(n, 2)
