"""The Gaussian transition of a sampler.

A scheduler visits K noise levels; level k holds x = signal_k x0 + noise_k eps (signal^2 + noise^2 = 1 for DDPM and DDIM,
signal + noise = 1 for flow matching), and one step draws the next sample

    x' ~ N(mean(m, x, k), std_k^2 I),    mean = c_x0 x0 + c_eps eps + c_x x,    x0 and eps linear in (x, m)      (1)

where m is the network's output. Constants are read from a diffusers scheduler once, as float64 tables.

    x, x_next, mean, model_output   (*batch, *sample_shape)
    step                            int, or int64 of shape (*batch): 0 is the noisiest step, K - 1 gives the clean sample
    std                             (*batch, 1, ..., 1), broadcasts against x; 0 where a step is deterministic
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from markovia.envs.denoising import likelihood, schedulers, tables
from markovia.envs.denoising.likelihood import Reduce
from markovia.envs.denoising.tables import FINALS, KINDS, PREDICTIONS, SCALED, Tables, choose


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
        constants: Tables,
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
        self.tables = constants
        columns = asdict(constants)
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
        eta                   noise scale: of ddim (default 1) or flow_sde (default 0.7); 0 is the deterministic sampler. Other kinds have none
        kind                  None: ddpm, ddim, consistency or flow_sde (flow_resample with `stochastic_sampling`) by the class
        final                 what to do where the last std is 0. drop: leave the step out of likelihoods. floor: std is at least
                              `min_std` at every step (DPPO). mid: ab' = (1 + ab)/2 at the last step (adjoint matching; sigma/2 for
                              flows). train0: ab' = alphas_cumprod[0] at the last step
        clip_x0               half-width of the clip of the x0 estimate; "scheduler" reads its clip_sample, None is no clip
        recompute_eps         recompute eps from the clipped x0 (`use_clipped_model_output` of diffusers)
        Raises ValueError for unknown names, an eta that the kind does not read, learned variances, thresholding and schedules without noise levels.
        """
        choose("final", final, FINALS)
        if kind is not None:
            choose("kind", kind, KINDS)
        kind = schedulers.kind_of(scheduler, kind)
        flow, config = kind.startswith("flow"), scheduler.config
        if num_inference_steps is not None:
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps={num_inference_steps}; expected at least 1.")
            scheduler = copy.deepcopy(scheduler)
            scheduler.set_timesteps(num_inference_steps)
        if config.get("thresholding"):
            raise ValueError(
                "thresholding=True makes the mean depend on quantiles of the batch; build the scheduler with thresholding=False and pass clip_x0."
            )
        if clip_x0 == "scheduler":
            clip_x0 = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None
        elif clip_x0 is not None and (isinstance(clip_x0, str) or not clip_x0 > 0):
            raise ValueError(f"clip_x0={clip_x0!r}; expected a positive half-width, None for no clip, or 'scheduler'.")
        prediction = choose("prediction_type", prediction_type or ("flow" if flow else config.get("prediction_type", "epsilon")), PREDICTIONS)
        if eta is None:
            eta = 0.7 if kind == "flow_sde" else 1.0
        if eta < 0:
            raise ValueError(f"eta={eta}; expected a noise scale >= 0.")
        if kind not in SCALED and eta != 1.0:
            raise ValueError(f"eta={eta} is the noise of {' and '.join(SCALED)}; a {kind} kernel's noise follows from its levels: leave eta out.")
        constants = schedulers.read_tables(scheduler, kind, prediction, eta, final)
        if final == "floor":
            if not min_std > 0:
                raise ValueError(f"min_std={min_std}; final='floor' needs a positive min_std.")
            constants = Tables(**{**asdict(constants), "std": [max(s, min_std) for s in constants.std]})
        return cls(
            constants,
            kind=kind,
            prediction_type=prediction,
            final=final,
            clip_x0=clip_x0,
            recompute_eps=recompute_eps,
            integer_timesteps=not flow,
            init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        )

    @classmethod
    def memoryless(cls, scheduler: Any, num_inference_steps: int | None = None, final: str = "mid", **options: Any) -> GaussianKernel:
        """The kernel whose clean sample does not depend on the starting noise (`memory` near 0) and whose every step has a density.

        ddim with eta = 1, ddpm as it is, flow_sde with eta = sqrt(2): the noise for which KL-regularised control ends in exactly the tilted law
        p exp(r/beta) whatever the start.                                                   [Domingo-Enrich 2024, 2409.08861]
        """
        eta = math.sqrt(2.0) if schedulers.kind_of(scheduler, options.get("kind")) == "flow_sde" else 1.0
        return cls.from_scheduler(scheduler, num_inference_steps, eta=eta, final=final, **options)

    @classmethod
    def direct(cls, std: list[float]) -> GaussianKernel:
        """A kernel whose network predicts the mean itself: x' ~ N(m, std_k^2 I), timestep k. Used by LinearGaussian."""
        n = len(std)
        zero, one = [0.0] * n, [1.0] * n
        steps = [float(k) for k in range(n)]
        constants = Tables(steps, one, zero, zero, one, zero, zero, one, zero, zero, [float(s) for s in std])
        return cls(constants, kind="direct", prediction_type="sample")

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

    @property
    def memory(self) -> float:
        """How much the clean sample still depends on the starting noise, in [0, 1] (`tables.memory`): 1 for an ODE, about 0 when memoryless.

        A `direct` kernel has no noise levels and reports 0: its chain is the problem itself, not the discretisation of a diffusion.
        """
        return 0.0 if self.kind == "direct" else tables.memory(self.tables)

    def require_density(self, purpose: str, every_step: bool = False) -> None:
        """Raise ValueError when no step has a density (eta = 0), or when `every_step` must have one and some has not.

        Likelihoods, ratios and the control pair exist only where std > 0.
        """
        if not bool(self.in_likelihood.any()):
            raise ValueError(
                f"{purpose} needs log-probabilities, but every step of this {self.kind} kernel is deterministic (eta = 0); build it with eta > 0, "
                "e.g. eta=1 for ddim or 0.7 for flow_sde, and keep eta = 0 for sampling only."
            )
        if every_step and not bool(self.in_likelihood.all()):
            dead = [k for k, live in enumerate(self.in_likelihood.tolist()) if not live]
            raise ValueError(
                f"{purpose} divides by the std of every step, but it is 0 at step {', '.join(map(str, dead))} of {self.num_steps}; "
                "build the kernel with final='mid' (or 'floor' or 'train0'), e.g. GaussianKernel.memoryless(scheduler, K); ready tasks take "
                "final='mid' too (--env-kwargs '{\"final\": \"mid\"}')."
            )

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

    def eps_from(self, model_output: Tensor, x: Tensor, step: int | Tensor) -> Tensor:
        """The network's estimate of the noise in x (from the clipped x0, if the kernel recomputes it)."""
        return self._clipped(model_output, x, step)[1]

    def add_to_eps(self, model_output: Tensor, change: Tensor, step: int | Tensor) -> Tensor:
        """The model output whose eps estimate is larger by `change`, in whatever the network predicts: eps = eps_x x + eps_m m, so m + change/eps_m.

        Where eps_m = 0 (v and flow at a level without signal) eps is x, whatever the output is: nothing is added.
        Raises ValueError for a `direct` kernel, whose output is the mean and says nothing about eps.
        """
        if self.kind == "direct":
            raise ValueError("a direct kernel has no eps estimate to guide; use a kernel read from a scheduler.")
        eps_m = self._at(self._estimate, step, model_output)[3]
        return model_output + change / eps_m.where(eps_m != 0, math.inf)

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
        """Log-density of a step in nats, see `likelihood.log_prob`."""
        return likelihood.log_prob(x_next, mean, std, reduce, batch_ndim)

    def add_noise(self, x0: Tensor, eps: Tensor, step: int | Tensor) -> Tensor:
        """Forward process at a step's noise level: x = signal x0 + noise eps."""
        if self.kind == "direct":
            raise ValueError("a direct kernel has no forward process; use a kernel read from a scheduler.")
        signal, noise = self._at(self._level, step, x0)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, step: int | Tensor) -> Tensor:
        """What the network should give for `add_noise(x0, eps, step)`; what it does give is the conditional mean of that.

        eps (epsilon), x0 (sample), signal eps - noise x0 (v_prediction), eps - x0 (flow: the velocity)
        [Ho 2020, 2006.11239, eq. 14; v: 2202.00512, appendix D; flow: 2210.02747, eq. 23]
        """
        targets = {"epsilon": lambda: eps, "sample": lambda: x0, "v_prediction": lambda: self.add_noise(eps, -x0, step), "flow": lambda: eps - x0}
        return targets[self.prediction_type]()
