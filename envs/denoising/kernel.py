"""The Gaussian transition of a sampler: per-step mean and std, log-probabilities and the control pair.

A scheduler visits K noise levels; level k holds x = signal_k x0 + noise_k eps (signal^2 + noise^2 = 1 for DDPM and DDIM,
signal + noise = 1 for flow matching), and one step draws the next sample

    x' ~ N(mean(m, x, k), std_k^2 I),    mean = c_x0 x0 + c_eps eps + c_x x,    x0 and eps linear in (x, m)      (1)

where m is the network's output. Constants are read from a diffusers scheduler once, as float64 tables; its `step()` is never
called, because it returns neither mean nor std and keeps a counter.

    x, x_next, mean, model_output   (*batch, *sample_shape)
    step                            int, or int64 of shape (*batch): 0 is the noisiest step, K - 1 gives the clean sample
    std                             (*batch, 1, ..., 1), broadcasts against x; 0 where a step is deterministic

Functions that reduce over the sample take `batch_ndim`, the number of leading batch axes.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Reduce = Literal["sum", "mean"]

KINDS = ("ddpm", "ddim", "flow_sde", "flow_resample", "consistency", "direct")
FINALS = ("drop", "floor", "mid", "train0")
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")

_KIND_OF_SCHEDULER = {
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "LCMScheduler": "consistency",
    "FlowMatchEulerDiscreteScheduler": "flow_sde",
}


def choose(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return `value` when it is allowed, else raise a ValueError that names the nearest choice."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(allowed)}.{hint}")


# ---------------------------------------------------------------------------------------------- functions of mean and std
def _flat(values: Tensor, batch_ndim: int) -> Tensor:
    """(*batch, *sample_shape) -> (*batch, D)."""
    return values.flatten(batch_ndim) if values.ndim > batch_ndim else values.unsqueeze(-1)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1) -> Tensor:
    """Log-density of a step in nats; 0 where std = 0, because a deterministic step has no density and is masked out.

    log p = sum_d [ -(x'_d - mean_d)^2 / (2 std^2) - log std - log(2 pi)/2 ];  reduce="mean" divides by D, as the papers' code
    does (it changes the meaning of clip ranges and of beta by the factor D).                       Returns (*batch,).
    """
    choose("reduce", reduce, ("sum", "mean"))
    safe = torch.where(std > 0, std, torch.ones_like(std))
    entry = -0.5 * ((x_next - mean) / safe).square() - safe.log() - 0.5 * math.log(2 * math.pi)
    entry = _flat(torch.where(std > 0, entry, torch.zeros_like(entry)), batch_ndim)
    return entry.sum(-1) if reduce == "sum" else entry.mean(-1)


def control_pair(mean: Tensor, mean_ref: Tensor, x_next: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The change of mean and the drawn noise, both in units of the std under the reference; zeros where std = 0.

    u = (mean - mean_ref)/std,   z = (x' - mean_ref)/std                              Shapes as x: (*batch, *sample_shape).
    """
    scale = torch.where(std > 0, 1.0 / torch.where(std > 0, std, torch.ones_like(std)), torch.zeros_like(std))
    return (mean - mean_ref) * scale, (x_next - mean_ref) * scale


def delta(u: Tensor, z: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1) -> Tensor:
    """Log-ratio of policy to reference for a step, in nats: log p_theta(x'|x)/p_ref(x'|x) = <u, z> - |u|^2/2.  (*batch,)."""
    choose("reduce", reduce, ("sum", "mean"))
    entry = _flat(u * z - 0.5 * u.square(), batch_ndim)
    return entry.sum(-1) if reduce == "sum" else entry.mean(-1)


def step_kl(u: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1) -> Tensor:
    """KL(policy || reference) of a step, in nats: |u|^2/2.  Returns (*batch,)."""
    choose("reduce", reduce, ("sum", "mean"))
    entry = _flat(0.5 * u.square(), batch_ndim)
    return entry.sum(-1) if reduce == "sum" else entry.mean(-1)


# ------------------------------------------------------------------------------------------------------ the tables of (1)
@dataclass(frozen=True)
class Tables:
    """One float per step and coefficient; plain lists, so that a checkpoint stores them as JSON without loss."""

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


def _estimates(prediction: str, a: float, s: float) -> tuple[float, float, float, float]:
    """(x0_x, x0_m, eps_x, eps_m) with x0 = x0_x x + x0_m m and eps = eps_x x + eps_m m, from x = a x0 + s eps."""
    if prediction == "epsilon":
        return (1 / a, -s / a, 0.0, 1.0) if a > 0 else (math.inf,) * 4
    if prediction == "sample":
        return (0.0, 1.0, 1 / s, -a / s) if s > 0 else (math.inf,) * 4
    if prediction == "v_prediction":
        return a, -s, s, a
    return 1 / (a + s), -s / (a + s), 1 / (a + s), a / (a + s)


def _ddpm(ab: float, ab_next: float, large: bool, noisy_end: bool) -> tuple[float, float, float, float]:
    a = ab / ab_next
    b = 1 - a
    var = b * (1 - ab_next) / (1 - ab)
    if large:
        var = b if ab_next < 1 or noisy_end else 0.0
    return math.sqrt(ab_next) * b / (1 - ab), 0.0, math.sqrt(a) * (1 - ab_next) / (1 - ab), math.sqrt(max(var, 0.0))


def _ddim(ab: float, ab_next: float, eta: float) -> tuple[float, float, float, float]:
    std = eta * math.sqrt(max((1 - ab_next) / (1 - ab) * (1 - ab / ab_next), 0.0))
    return math.sqrt(ab_next), math.sqrt(max(1 - ab_next - std * std, 0.0)), 0.0, std


def _flow_sde(sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float, float]:
    dt = sigma_next - sigma
    # g = eta sqrt(sigma / (1 - sigma)) is singular at sigma = 1, where sampling starts: the next sigma stands in there.
    g = eta * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))
    return -dt, dt * (1 + g * g / (2 * sigma)), 1.0, g * math.sqrt(-dt)


class GaussianKernel:
    """A sampler's Gaussian step, vectorised over a per-sample step index (module docstring, equation 1).

    kind            mean                                                                              std
    ddpm            sqrt(ab') b/(1-ab) x0 + sqrt(a)(1-ab')/(1-ab) x,  a = ab/ab', b = 1-a             sqrt(b(1-ab')/(1-ab)), sqrt(b) if large
    ddim(eta)       sqrt(ab') x0 + sqrt(1-ab'-s^2) eps                                                s = eta sqrt((1-ab')/(1-ab)) sqrt(1-ab/ab')
    flow_sde(eta)   x + [v + g^2/(2 sigma)(x + (1-sigma) v)] dt,  g = eta sqrt(sigma/(1-sigma))       g sqrt(-dt)
    flow_resample   (1-sigma')(x - sigma v)                                                           sigma'
    consistency     sqrt(ab') (c_skip x + c_out x0)                                                   sqrt(1-ab')
    direct          m: the network predicts the mean itself                                           given

    Ho 2020 (2006.11239) eq. 7; Song 2020 (2010.02502) eq. 12, 16; Liu 2025, Flow-GRPO (2505.05470) eq. 9; Song 2023 (2303.01469).
    """

    def __init__(
        self,
        tables: Tables,
        *,
        kind: str,
        prediction_type: str,
        final: str = "drop",
        clip_x0: float | None = None,
        recompute_eps: bool = False,
        integer_timesteps: bool = True,
        init_noise_sigma: float = 1.0,
    ) -> None:
        self.kind = choose("kind", kind, KINDS)
        self.prediction_type = choose("prediction_type", prediction_type, PREDICTIONS)
        self.final = choose("final", final, FINALS)
        self.clip_x0 = clip_x0
        self.recompute_eps = recompute_eps
        self.integer_timesteps = integer_timesteps
        self.init_noise_sigma = float(init_noise_sigma)
        self.tables = tables
        columns = asdict(tables)
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) != 1 or lengths["std"] < 1:
            raise ValueError(f"a kernel's tables need one value per step, the same number each; got lengths {lengths}.")
        for name, values in columns.items():
            bad = next((k for k, v in enumerate(values) if not math.isfinite(v)), None)
            if bad is not None:
                raise ValueError(
                    f"the kernel's {name} is {values[bad]} at step {bad}: prediction_type={prediction_type!r} has no x0 "
                    "estimate at a level without signal. Train with v_prediction, sample or flow, or start at a lower noise level."
                )
        c = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
        self._timesteps = c["timesteps"]
        self._estimate = torch.stack([c["x0_x"], c["x0_m"], c["eps_x"], c["eps_m"]])
        self._mean = torch.stack([c["mean_x0"], c["mean_eps"], c["mean_x"], c["std"]])
        self._level = torch.stack([c["signal"], c["noise"]])
        # Without clipping the mean is affine in (x, m); these two numbers are all that a step needs.
        self._affine = torch.stack(
            [
                c["mean_x"] + c["mean_x0"] * c["x0_x"] + c["mean_eps"] * c["eps_x"],
                c["mean_x0"] * c["x0_m"] + c["mean_eps"] * c["eps_m"],
                c["std"],
            ]
        )

    # -------------------------------------------------------------------------------------------------------- construction
    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        kind: str | None = None,
        final: str = "drop",
        clip_x0: float | str | None = "scheduler",
        recompute_eps: bool = False,
        prediction_type: str | None = None,
        min_std: float = 0.1,
    ) -> GaussianKernel:
        """Read the constants of a diffusers DDPM, DDIM, LCM or flow-matching Euler scheduler (it is copied, not changed).

        num_inference_steps   K; None takes the scheduler's timesteps as they are
        eta                   noise scale: of ddim (default 1) or flow_sde (default 0.7); 0 is the deterministic sampler
        kind                  None: ddpm, ddim, consistency or flow_sde (flow_resample with `stochastic_sampling`) by the class
        final                 what to do where the last std is 0. drop: leave the step out of likelihoods. floor: std is at least
                              `min_std` at every step (DPPO). mid: ab' = (1 + ab)/2 at the last step (adjoint matching; sigma/2 for
                              flows). train0: ab' = alphas_cumprod[0] at the last step
        clip_x0               half-width of the clip of the x0 estimate; "scheduler" reads its clip_sample, None is no clip
        recompute_eps         recompute eps from the clipped x0 (`use_clipped_model_output` of diffusers)
        Raises ValueError for unknown names, learned variances, thresholding and schedules without noise levels.
        """
        choose("final", final, FINALS)
        if kind is not None:
            choose("kind", kind, KINDS)
        flow = hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod")
        if not flow and not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has neither alphas_cumprod nor flow sigmas; expected a diffusers DDPM, DDIM, LCM or "
                "FlowMatchEulerDiscrete scheduler."
            )
        scheduler = copy.deepcopy(scheduler)
        config = scheduler.config
        if num_inference_steps is not None:
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps={num_inference_steps}; expected at least 1.")
            scheduler.set_timesteps(num_inference_steps)
        kind = kind or _default_kind(scheduler, flow)
        if flow != kind.startswith("flow") or kind == "direct":
            raise ValueError(
                f"kind={kind!r} does not fit {type(scheduler).__name__}; "
                f"expected {'flow_sde or flow_resample' if flow else 'ddpm, ddim or consistency'}."
            )
        if config.get("thresholding"):
            raise ValueError(
                "thresholding=True makes the mean depend on quantiles of the batch; build the scheduler with "
                "thresholding=False and pass clip_x0."
            )
        if clip_x0 == "scheduler":
            clip_x0 = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None
        elif clip_x0 is not None and (isinstance(clip_x0, str) or not clip_x0 > 0):
            raise ValueError(f"clip_x0={clip_x0!r}; expected a positive half-width, None for no clip, or 'scheduler'.")
        prediction = choose(
            "prediction_type",
            prediction_type or ("flow" if flow else config.get("prediction_type", "epsilon")),
            PREDICTIONS,
        )
        if eta is None:
            eta = 0.7 if kind == "flow_sde" else 1.0
        if eta < 0:
            raise ValueError(f"eta={eta}; expected a noise scale >= 0.")
        levels = _flow_levels(scheduler, final) if flow else _diffusion_levels(scheduler, final)
        rows = [_row(kind, prediction, level, eta, scheduler) for level in levels]
        tables = Tables(*(list(column) for column in zip(*rows, strict=True)))
        if final == "floor":
            if not min_std > 0:
                raise ValueError(f"min_std={min_std}; final='floor' needs a positive min_std.")
            tables = Tables(**{**asdict(tables), "std": [max(s, min_std) for s in tables.std]})
        return cls(
            tables,
            kind=kind,
            prediction_type=prediction,
            final=final,
            clip_x0=clip_x0,
            recompute_eps=recompute_eps,
            integer_timesteps=not flow,
            init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        )

    @classmethod
    def direct(cls, std: list[float]) -> GaussianKernel:
        """A kernel whose network predicts the mean itself: x' ~ N(m, std_k^2 I), timestep k. Used by LinearGaussian."""
        n = len(std)
        zero, one = [0.0] * n, [1.0] * n
        steps = [float(k) for k in range(n)]
        tables = Tables(steps, one, zero, zero, one, zero, zero, one, zero, zero, [float(s) for s in std])
        return cls(tables, kind="direct", prediction_type="sample")

    def to_config(self) -> dict[str, Any]:
        """Everything as plain JSON values; `from_config` gives back an equal kernel, bit for bit."""
        return {
            "kind": self.kind,
            "prediction_type": self.prediction_type,
            "final": self.final,
            "clip_x0": self.clip_x0,
            "recompute_eps": self.recompute_eps,
            "integer_timesteps": self.integer_timesteps,
            "init_noise_sigma": self.init_noise_sigma,
            "tables": asdict(self.tables),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GaussianKernel:
        """Rebuild from `to_config()`; raises ValueError when entries are missing or unknown."""
        rest = dict(config)
        try:
            return cls(Tables(**rest.pop("tables")), **rest)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a kernel config: {error}; expected what GaussianKernel.to_config() returns."
            ) from error

    # --------------------------------------------------------------------------------------------------------------- facts
    @property
    def num_steps(self) -> int:
        """K, the horizon of the denoising MDP."""
        return self._timesteps.shape[0]

    @property
    def std(self) -> Tensor:
        """(K,) float64, the std of each step."""
        return self._affine[2]

    @property
    def in_likelihood(self) -> Tensor:
        """(K,) bool, False where the step is deterministic and therefore left out of likelihoods."""
        return self._affine[2] > 0

    def timestep(self, step: int | Tensor) -> Tensor:
        """The value that the network expects as its time: int64 timesteps, float32 for flow matching."""
        index = torch.as_tensor(step)
        return self._timesteps.to(index.device)[index].to(torch.int64 if self.integer_timesteps else torch.float32)

    # ---------------------------------------------------------------------------------------------------------- one step
    def _at(self, table: Tensor, step: int | Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Rows of `table` at `step`, in x's dtype and device, shaped to broadcast over the sample's axes."""
        index = torch.as_tensor(step, device=x.device)
        picked = table.to(x.device)[:, index].to(x.dtype)
        return tuple(picked.reshape(len(table), *index.shape, *([1] * (x.ndim - index.ndim))).unbind(0))

    def _clipped(self, model_output: Tensor, x: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
        x0_x, x0_m, eps_x, eps_m = self._at(self._estimate, step, x)
        x0 = x0_x * x + x0_m * model_output
        eps = eps_x * x + eps_m * model_output
        if self.clip_x0 is not None:
            x0 = x0.clamp(-self.clip_x0, self.clip_x0)
            if self.recompute_eps:
                signal, noise = self._at(self._level, step, x)
                eps = (x - signal * x0) / noise
        return x0, eps

    def x0_from(self, model_output: Tensor, x: Tensor, step: int | Tensor) -> Tensor:
        """The network's estimate of the clean sample (clipped if the kernel clips); for `direct`, the mean."""
        return self._clipped(model_output, x, step)[0]

    def mean_std(self, model_output: Tensor, x: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (*batch, *sample_shape) and std (*batch, 1, ...) of the next sample (equation 1)."""
        if self.clip_x0 is None:
            by_x, by_m, std = self._at(self._affine, step, x)
            return by_x * x + by_m * model_output, std
        x0, eps = self._clipped(model_output, x, step)
        by_x0, by_eps, by_x, std = self._at(self._mean, step, x)
        return by_x0 * x0 + by_eps * eps + by_x * x, std

    def log_prob(
        self, x_next: Tensor, mean: Tensor, std: Tensor, reduce: Reduce = "sum", batch_ndim: int = 1
    ) -> Tensor:
        """Log-density of a step in nats, see the free function `log_prob`."""
        return log_prob(x_next, mean, std, reduce, batch_ndim)

    def add_noise(self, x0: Tensor, eps: Tensor, step: int | Tensor) -> Tensor:
        """Forward process at a step's noise level: x = signal x0 + noise eps."""
        if self.kind == "direct":
            raise ValueError("a direct kernel has no forward process; use a kernel read from a scheduler.")
        signal, noise = self._at(self._level, step, x0)
        return signal * x0 + noise * eps


# -------------------------------------------------------------------------------------------- reading a diffusers scheduler
def _default_kind(scheduler: Any, flow: bool) -> str:
    if flow and scheduler.config.get("stochastic_sampling"):
        return "flow_resample"
    name = type(scheduler).__name__
    if name not in _KIND_OF_SCHEDULER:
        raise ValueError(
            f"no default kind for {name}; pass kind= one of {', '.join(KINDS[:-1])}, or use one of {', '.join(_KIND_OF_SCHEDULER)}."
        )
    return _KIND_OF_SCHEDULER[name]


@dataclass(frozen=True)
class _Level:
    """A step from one noise level to the next: alphas_cumprod for diffusion, sigma for flow matching."""

    timestep: float
    now: float
    next: float


def _diffusion_levels(scheduler: Any, final: str) -> list[_Level]:
    steps = [int(t) for t in scheduler.timesteps]
    alphas = scheduler.alphas_cumprod.double().tolist()
    now = [alphas[t] for t in steps]
    # The true next timestep; `timestep - T // K` of DDIMScheduler.step agrees where the spacing is even.
    last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    if final == "mid":
        last = (1 + now[-1]) / 2
    elif final == "train0":
        if steps[-1] == 0:
            raise ValueError(
                "final='train0' leaves the last std at 0 when the last timestep is 0; use timestep_spacing='trailing' or "
                "steps_offset=1, or another final rule (drop, floor, mid)."
            )
        last = alphas[0]
    return [_Level(float(t), a, b) for t, a, b in zip(steps, now, [*now[1:], last], strict=True)]


def _flow_levels(scheduler: Any, final: str) -> list[_Level]:
    sigmas = scheduler.sigmas.double().tolist()
    steps = scheduler.timesteps.double().tolist()
    if len(sigmas) == len(steps):
        sigmas.append(0.0)  # a flow scheduler before set_timesteps has no terminal sigma yet
    if final == "mid":
        sigmas[-1] = sigmas[-2] / 2
    elif final == "train0":
        sigmas[-1] = min(float(scheduler.sigma_min), sigmas[-2] / 2)
    if any(b >= a for a, b in itertools.pairwise(sigmas)):
        raise ValueError("sigmas must fall from step to step; schedules with invert_sigmas=True are not supported.")
    return [_Level(t, a, b) for t, a, b in zip(steps, sigmas, sigmas[1:], strict=False)]


def _row(kind: str, prediction: str, level: _Level, eta: float, scheduler: Any) -> tuple[float, ...]:
    """One step's constants, in the order of Tables' fields."""
    now, after = level.now, level.next
    signal, noise = (1 - now, now) if kind.startswith("flow") else (math.sqrt(now), math.sqrt(1 - now))
    if kind == "ddpm":
        variance = scheduler.config.get("variance_type", "fixed_small")
        if variance.startswith("learned"):
            raise ValueError(
                f"variance_type={variance!r}: the std must come from the sampler; use fixed_small or fixed_large."
            )
        # fixed_large_log gives NaN in diffusers' step(); its variance is that of fixed_large.
        mean = _ddpm(now, after, variance.startswith("fixed_large"), noisy_end=level.timestep > 0)
    elif kind == "ddim":
        mean = _ddim(now, after, eta)
    elif kind == "flow_sde":
        mean = _flow_sde(now, after, eta)
    elif kind == "flow_resample":
        mean = (1 - after, 0.0, 0.0, after)
    else:
        skip, out = _boundary(scheduler, level.timestep)
        mean = (math.sqrt(after) * out, 0.0, math.sqrt(after) * skip, math.sqrt(max(1 - after, 0.0)))
    return (level.timestep, signal, noise, *_estimates(prediction, signal, noise), *mean)


def _boundary(scheduler: Any, timestep: float) -> tuple[float, float]:
    """c_skip and c_out of a consistency function; (0, 1) where the scheduler defines none: the x0 estimate is the function."""
    scaling = scheduler.config.get("timestep_scaling")
    if scaling is None:
        return 0.0, 1.0
    scaled, data = timestep * float(scaling), float(getattr(scheduler, "sigma_data", 0.5))
    return data**2 / (scaled**2 + data**2), scaled / math.sqrt(scaled**2 + data**2)
