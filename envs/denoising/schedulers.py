"""Reading the constants of a diffusers scheduler; its `step()` is never called, because it returns neither mean nor std and keeps a counter."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from markovia.envs.denoising import tables
from markovia.envs.denoising.tables import KINDS, Tables

_KIND_OF_SCHEDULER = {
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "LCMScheduler": "consistency",
    "FlowMatchEulerDiscreteScheduler": "flow_sde",
}

SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}  # those that any diffusion schedule can be sampled with


@dataclass(frozen=True)
class Level:
    """A step from one noise level to the next: alphas_cumprod for diffusion, sigma for flow matching."""

    timestep: float
    now: float
    next: float


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler counts in flow-matching sigmas; ValueError when it has no noise levels that a kernel can read."""
    if hasattr(scheduler, "alphas_cumprod"):
        return False
    if not hasattr(scheduler, "sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} has neither alphas_cumprod nor flow sigmas; expected a diffusers DDPM, DDIM, LCM or "
            "FlowMatchEulerDiscrete scheduler."
        )
    return True


def kind_of(scheduler: Any, kind: str | None) -> str:
    """The kernel's kind: as asked, or by the scheduler's class.

    Raises ValueError for a scheduler whose step is not one Gaussian of the current sample (multi-step and higher-order solvers), and for a kind
    that does not fit its noise levels.
    """
    flow, name = is_flow(scheduler), type(scheduler).__name__
    if kind is None and name not in _KIND_OF_SCHEDULER:
        raise ValueError(
            f"{name} is not supported: its step is not a Gaussian of the current sample alone. Use one of {', '.join(_KIND_OF_SCHEDULER)}, e.g. "
            f"DDIMScheduler.from_config(scheduler.config), which keeps the noise schedule; or pass kind= one of {', '.join(KINDS[:-1])} "
            "when the class is your own."
        )
    if kind is None:
        kind = "flow_resample" if flow and scheduler.config.get("stochastic_sampling") else _KIND_OF_SCHEDULER[name]
    if flow != kind.startswith("flow") or kind == "direct":
        raise ValueError(f"kind={kind!r} does not fit {name}; expected {'flow_sde or flow_resample' if flow else 'ddpm, ddim or consistency'}.")
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if not math.isclose(start, 1.0):
        raise ValueError(
            f"{name} starts at noise of std {start:.3g} and scales the network's input, which kind={kind!r} does not; "
            "use DDIMScheduler.from_config(scheduler.config)."
        )
    return kind


def levels(scheduler: Any, kind: str, final: str) -> list[Level]:
    """The noise levels that the scheduler visits, the last step's end by the rule `final` (see GaussianKernel.from_scheduler)."""
    return _flow_levels(scheduler, final) if is_flow(scheduler) else _diffusion_levels(scheduler, kind, final)


def _diffusion_levels(scheduler: Any, kind: str, final: str) -> list[Level]:
    steps = [int(t) for t in scheduler.timesteps]
    alphas = scheduler.alphas_cumprod.double().tolist()
    now = [alphas[t] for t in steps]
    # The true next timestep; `timestep - T // K` of DDIMScheduler.step agrees where the spacing is even.
    # LCMScheduler's last step gives the consistency function itself, whatever its final_alpha_cumprod is.
    last = 1.0 if kind == "consistency" else float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    if final == "mid":
        last = (1 + now[-1]) / 2
    elif final == "train0":
        if steps[-1] == 0:
            raise ValueError(
                "final='train0' leaves the last std at 0 when the last timestep is 0; use timestep_spacing='trailing' or "
                "steps_offset=1, or another final rule (drop, floor, mid)."
            )
        last = alphas[0]
    return [Level(float(t), a, b) for t, a, b in zip(steps, now, [*now[1:], last], strict=True)]


def _flow_levels(scheduler: Any, final: str) -> list[Level]:
    sigmas = scheduler.sigmas.double().tolist()
    steps = scheduler.timesteps.double().tolist()
    if math.isclose(sigmas[0], 1.0, abs_tol=1e-6):
        sigmas[0] = 1.0  # a shift in float32 gives 0.99999994 too, and 1 - sigma divides
    if len(sigmas) == len(steps):
        sigmas.append(0.0)  # a flow scheduler before set_timesteps has no terminal sigma yet
    if final == "mid":
        sigmas[-1] = sigmas[-2] / 2
    elif final == "train0":
        sigmas[-1] = min(float(scheduler.sigma_min), sigmas[-2] / 2)
    if any(b >= a for a, b in itertools.pairwise(sigmas)):
        raise ValueError("sigmas must fall from step to step; schedules with invert_sigmas=True are not supported.")
    return [Level(t, a, b) for t, a, b in zip(steps, sigmas, sigmas[1:], strict=False)]


def read_tables(scheduler: Any, kind: str, prediction: str, eta: float, final: str) -> Tables:
    """The constants of every step. Raises ValueError for learned variances."""
    rows = [_row(kind, prediction, level, eta, scheduler) for level in levels(scheduler, kind, final)]
    return Tables(*(list(column) for column in zip(*rows, strict=True)))


def _row(kind: str, prediction: str, level: Level, eta: float, scheduler: Any) -> tuple[float, ...]:
    """One step's constants, in the order of Tables' fields."""
    now, after = level.now, level.next
    signal, noise = (1 - now, now) if kind.startswith("flow") else (math.sqrt(now), math.sqrt(1 - now))
    if kind == "ddpm":
        variance = scheduler.config.get("variance_type", "fixed_small")
        if variance.startswith("learned"):
            raise ValueError(f"variance_type={variance!r}: the std must come from the sampler; use fixed_small or fixed_large.")
        # fixed_large_log gives NaN in diffusers' step(); its variance is that of fixed_large.
        mean = tables.ddpm(now, after, variance.startswith("fixed_large"), noisy_end=level.timestep > 0)
    elif kind == "ddim":
        mean = tables.ddim(now, after, eta)
    elif kind == "flow_sde":
        mean = tables.flow_sde(now, after, eta)
    elif kind == "flow_resample":
        mean = tables.flow_resample(after)
    else:
        mean = tables.consistency(after, *_boundary(scheduler, level.timestep))
    return (level.timestep, signal, noise, *tables.estimates(prediction, signal, noise), *mean)


def _boundary(scheduler: Any, timestep: float) -> tuple[float, float]:
    """c_skip and c_out of a consistency function; (0, 1) where the scheduler defines none: the x0 estimate is the function."""
    scaling = scheduler.config.get("timestep_scaling")
    if scaling is None:
        return 0.0, 1.0
    scaled, data = timestep * float(scaling), float(getattr(scheduler, "sigma_data", 0.5))
    return data**2 / (scaled**2 + data**2), scaled / math.sqrt(scaled**2 + data**2)
