"""The constants of a sampler, one float per step: noise levels, the network's x0 and eps estimates, and the mean and std of the next sample.

    x = signal x0 + noise eps,   x0 = x0_x x + x0_m m,   eps = eps_x x + eps_m m,   mean = mean_x0 x0 + mean_eps eps + mean_x x     (1)

Functions here work on single noise levels: `ab` is alphas_cumprod of a step and `ab_next` that of the next, lower one (1 when clean);
`sigma` and `sigma_next` are those of flow matching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markovia.envs.names import nearest

KINDS = ("ddpm", "ddim", "flow_sde", "flow_resample", "consistency", "direct")
SCALED = ("ddim", "flow_sde")  # whose noise is scaled by eta; that of the others follows from their levels
FINALS = ("drop", "floor", "mid", "train0")
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


def choose(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return `value` when it is allowed, else raise a ValueError that names the nearest choice."""
    if value in allowed:
        return value
    raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(allowed)}{nearest(str(value), allowed)}")


@dataclass(frozen=True)
class Tables:
    """One float per step and coefficient of (1); plain lists, so that a checkpoint stores them as JSON without loss."""

    timesteps: list[float]
    signal: list[float]
    noise: list[float]
    x0_x: list[float]
    x0_m: list[float]
    eps_x: list[float]
    eps_m: list[float]
    mean_x0: list[float]
    mean_eps: list[float]
    mean_x: list[float]
    std: list[float]


Mean = tuple[float, float, float, float]  # mean_x0, mean_eps, mean_x, std


def estimates(prediction: str, a: float, s: float) -> tuple[float, float, float, float]:
    """(x0_x, x0_m, eps_x, eps_m) at signal a and noise s; infinite where the prediction says nothing about x0 (epsilon without signal)."""
    if prediction == "epsilon":
        return (1 / a, -s / a, 0.0, 1.0) if a > 0 else (math.inf,) * 4
    if prediction == "sample":
        return (0.0, 1.0, 1 / s, -a / s) if s > 0 else (math.inf,) * 4
    if prediction == "v_prediction":
        return a, -s, s, a
    return 1 / (a + s), -s / (a + s), 1 / (a + s), a / (a + s)


def ddpm(ab: float, ab_next: float, large: bool, noisy_end: bool) -> Mean:
    """mean = sqrt(ab') b/(1-ab) x0 + sqrt(a)(1-ab')/(1-ab) x,  a = ab/ab', b = 1-a;  std sqrt(b(1-ab')/(1-ab)), sqrt(b) if large.  [2006.11239]

    noisy_end: a large std stays at the step that gives the clean sample (as diffusers does when the last timestep is not 0).
    """
    a = ab / ab_next
    b = 1 - a
    var = b * (1 - ab_next) / (1 - ab)
    if large:
        var = b if ab_next < 1 or noisy_end else 0.0
    return math.sqrt(ab_next) * b / (1 - ab), 0.0, math.sqrt(a) * (1 - ab_next) / (1 - ab), math.sqrt(max(var, 0.0))


def ddim(ab: float, ab_next: float, eta: float) -> Mean:
    """mean = sqrt(ab') x0 + sqrt(1-ab'-s^2) eps,  std s = eta sqrt((1-ab')/(1-ab)) sqrt(1-ab/ab').                  [2010.02502, eq. 12, 16]"""
    std = eta * math.sqrt(max((1 - ab_next) / (1 - ab) * (1 - ab / ab_next), 0.0))
    return math.sqrt(ab_next), math.sqrt(max(1 - ab_next - std * std, 0.0)), 0.0, std


def flow_sde(sigma: float, sigma_next: float, eta: float) -> Mean:
    """mean = x + [v + g^2/(2 sigma)(x + (1-sigma) v)] dt,  g = eta sqrt(sigma/(1-sigma)),  std g sqrt(-dt).          [2505.05470, eq. 9]

    With v = eps - x0 the bracket is (1 + g^2/(2 sigma)) eps - x0. g is singular at sigma = 1, where sampling starts: the next sigma stands in.
    """
    dt = sigma_next - sigma
    g = eta * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))
    return -dt, dt * (1 + g * g / (2 * sigma)), 1.0, g * math.sqrt(-dt)


def flow_resample(sigma_next: float) -> Mean:
    """mean = (1-sigma') x0 with x0 = x - sigma v,  std sigma': a fresh noise at every step."""
    return 1 - sigma_next, 0.0, 0.0, sigma_next


def consistency(ab_next: float, skip: float, out: float) -> Mean:
    """mean = sqrt(ab') (c_skip x + c_out x0),  std sqrt(1-ab'): the consistency function's estimate, noised again.      [2303.01469]"""
    return math.sqrt(ab_next) * out, 0.0, math.sqrt(ab_next) * skip, math.sqrt(max(1 - ab_next, 0.0))


def memory(tables: Tables) -> float:
    """|correlation| of start and end of the chain when the data are N(0, 1) and the network is exact; 1 for an ODE, about 0 when memoryless.

    With x = a x0 + s eps and V = a^2 + s^2 the exact estimates are x0 = (a/V) x and eps = (s/V) x, so that x' = B x + std z with
    B = mean_x0 a/V + mean_eps s/V + mean_x: the correlation is prod B_k over the standard deviation of x_K.
    """
    t, gain, var = tables, 1.0, 1.0
    for k, std in enumerate(t.std):
        total = t.signal[k] ** 2 + t.noise[k] ** 2
        step = (t.mean_x0[k] * t.signal[k] + t.mean_eps[k] * t.noise[k]) / total + t.mean_x[k]
        gain, var = gain * step, step * step * var + std * std
    return abs(gain) / math.sqrt(var)
