"""Settings of chunk-denoising policies: how they are cloned from data, and how the two-layer MDP fine-tunes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from markovia.algos.advantages import ChainGAE
from markovia.algos.denoising.adjoint import check_solver
from markovia.algos.offline.method import Logged
from markovia.algos.on_policy.method import Descent, OnPolicy

if TYPE_CHECKING:
    from markovia.envs.denoising.kernel import GaussianKernel


def _diffusers() -> None:
    """Raises ImportError with the extra to install where diffusers, whose schedulers give the noise levels, is missing."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ImportError("diffusion and flow policies need diffusers' schedulers: pip install markovia[diffusion]") from error


@dataclass(frozen=True)
class DiffusionNoise:
    """Chunks are noised by a variance-preserving diffusion; sampled by DDIM or DDPM."""

    train_steps: int = 100  # T, noise levels in training
    sample_steps: int = 16  # K, denoising steps of a chain
    sampler: Literal["ddim", "ddpm"] = "ddim"
    eta: float = 1.0  # noise of sampled ddim chains; greedy chains have none
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"  # linear ones: betas 1e-4 to 0.02, times 1000/T
    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon"  # what the network gives
    clip_x0: float | None = 1.0  # bound of the clean estimate while sampling; eps is recomputed from it

    def __post_init__(self) -> None:
        if not 1 <= self.sample_steps <= self.train_steps:
            raise ValueError(f"expected 1 <= sample_steps <= train_steps, got {self.sample_steps} and {self.train_steps}")
        if self.sampler == "ddpm" and self.eta != 1.0:
            raise ValueError(f"eta is the noise of ddim; a ddpm chain has its own, got eta={self.eta}")

    @property
    def time_scale(self) -> float:
        """Largest value of the network's time input."""
        return float(self.train_steps)

    def _kernel(self, steps: int, sampler: str, eta: float, clip: float | None) -> GaussianKernel:
        _diffusers()
        from diffusers import DDIMScheduler, DDPMScheduler

        from markovia.envs.denoising.kernel import GaussianKernel

        cls = DDPMScheduler if sampler == "ddpm" else DDIMScheduler
        # Trailing: the chain begins at the noisiest level, which is what its starting noise is. diffusers' usual betas, 1e-4 to 0.02, reach noise in
        # 1000 steps; fewer steps need larger ones (squaredcos makes its own).
        shorter = 1000 / self.train_steps
        scheduler = cls(
            self.train_steps, beta_start=1e-4 * shorter, beta_end=min(0.02 * shorter, 0.999), beta_schedule=self.beta_schedule,
            timestep_spacing="trailing", clip_sample=False, prediction_type=self.prediction,
        )  # fmt: skip
        return GaussianKernel.from_scheduler(scheduler, steps, eta=eta, clip_x0=clip, recompute_eps=clip is not None)

    def kernels(self) -> tuple[GaussianKernel, GaussianKernel]:
        """The kernel of sampled chains, and that of greedy ones: the same noise levels by DDIM with eta = 0."""
        return self._kernel(self.sample_steps, self.sampler, self.eta, self.clip_x0), self._kernel(self.sample_steps, "ddim", 0.0, self.clip_x0)

    def levels(self) -> GaussianKernel:
        """A kernel at all T noise levels of training, for its forward process."""
        return self._kernel(self.train_steps, "ddim", 0.0, None)


@dataclass(frozen=True)
class FlowNoise:
    """Chunks are noised along straight lines; sampled by Euler steps of the learnt velocity, or with the noise of flow_sde."""

    sample_steps: int = 10  # K
    eta: float = 0.7  # noise of sampled chains; greedy chains have none
    times: Literal["uniform", "logit-normal"] = "uniform"  # law of the noise level in training

    def __post_init__(self) -> None:
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps must be >= 1, got {self.sample_steps}")

    @property
    def time_scale(self) -> float:
        """Largest value of the network's time input."""
        return 1000.0

    def kernels(self) -> tuple[GaussianKernel, GaussianKernel]:
        """The kernel of sampled chains (flow_sde), and that of greedy ones (Euler): sigma = 1, 1 - 1/K, .., 1/K, then 0."""
        _diffusers()
        from diffusers import FlowMatchEulerDiscreteScheduler

        from markovia.envs.denoising.kernel import GaussianKernel

        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1.0 - k / self.sample_steps for k in range(self.sample_steps)])
        sampled, greedy = (GaussianKernel.from_scheduler(scheduler, eta=eta) for eta in (self.eta, 0.0))
        return sampled, greedy


@dataclass(frozen=True)
class MLPNet:
    """A residual MLP on the flat chunk and window."""

    hidden: int = 256
    depth: int = 3


@dataclass(frozen=True)
class UNet1DNet:
    """diffusers' UNet along the chunk's time axis."""

    channels: tuple[int, ...] = (64, 128)  # of each level


@dataclass(frozen=True)
class Average:
    """The weights that act: an exponential average whose memory grows, decay_n = min(limit, 1 - (1 + n)^-power) after n updates."""

    power: float = 0.75
    limit: float = 0.9999

    def __post_init__(self) -> None:
        if not (self.power > 0.0 and 0.0 <= self.limit < 1.0):
            raise ValueError(f"an average needs power > 0 and 0 <= limit < 1, got {self.power} and {self.limit}")

    def decay(self, updates: int) -> float:
        """Share of the average that stays at update number `updates` (from 1); limit = 0 keeps no average."""
        return min(self.limit, 1.0 - (1.0 + updates) ** -self.power)


@dataclass(frozen=True)
class Imitation:
    """Settings of cloning a chunk-denoising policy; one step of the budget is one update."""

    num_env_steps: int = 100_000  # updates
    num_steps: int = 1000  # updates between two reports
    batch_size: int = 256
    horizon: int = 16  # H, actions of a chunk
    act_steps: int = 8  # of which so many are executed
    obs_steps: int = 2  # observations in the window
    noise: DiffusionNoise | FlowNoise = field(default_factory=DiffusionNoise)
    network: MLPNet | UNet1DNet = field(default_factory=MLPNet)
    average: Average = field(default_factory=Average)
    solver: Descent = field(default_factory=lambda: Descent(lr=1e-4, anneal=True, eps=1e-8, weight_decay=1e-6, max_grad_norm=1.0))  # warmup: updates
    data: Logged = field(default_factory=Logged)

    def __post_init__(self) -> None:
        for name in ("num_env_steps", "num_steps", "batch_size", "obs_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 1 <= self.act_steps <= self.horizon:
            raise ValueError(f"act_steps of the horizon's actions are executed: expected 1 to {self.horizon}, got {self.act_steps}")
        kept = {name: getattr(self.data, name) for name in ("fraction", "fraction_gamma", "normalize_obs", "horizon", "terminate_at")}
        if self.data != Logged(**kept):
            raise ValueError(
                "cloning reads observations and actions alone, of whole episodes: leave data.reward, data.next_action, data.returns_to_go and "
                "data.compat as they are"
            )
        check_solver(self.solver, "minibatch", "epochs", "unit", who="cloning, where each update draws batch_size rows anew")


@dataclass(frozen=True)
class Chain:
    """The inner layer of the two-layer MDP: which denoising steps are decisions, with what noise and which density."""

    start: str | None = None  # folder of the cloned policy: a run's, or an agent's
    tuned_steps: int = 10  # K', the last denoising steps; at most K
    min_std: float = 0.1  # least standard deviation of a step, for sampling and for likelihoods
    noise_clip: float | None = 3.0  # bound of the standard normal noise
    entry_range: tuple[float, float] | None = (-5.0, 2.0)  # entries of log-probabilities are cut to it, nats
    reduce: Literal["mean", "sum"] = "mean"  # over entries; "sum" is the density
    critic_hidden: tuple[int, ...] = (256, 256)

    def __post_init__(self) -> None:
        if self.tuned_steps < 1:
            raise ValueError(f"chain.tuned_steps must be >= 1, got {self.tuned_steps}")
        if self.noise_clip is not None and not self.noise_clip > 0.0:
            raise ValueError(f"chain.noise_clip must be > 0, or None for no bound, got {self.noise_clip}")


@dataclass(frozen=True)
class TwoLayer(OnPolicy):
    """Settings of the on-policy loop whose decisions are the denoising steps of a chunk policy; num_steps counts chunks, num_env_steps actions."""

    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.advantage, ChainGAE):
            given = type(self.advantage).__name__
            raise ValueError(f"a chunk's advantage is shared by its denoising steps, so advantage must be ChainGAE(), got {given}")
        if self.normalize_obs:
            raise ValueError("the cloned policy keeps the normaliser of its data; set normalize_obs=False")
        if self.constraint is not None:
            raise ValueError("constraints are not offered in the two-layer MDP; use ppo-lag and its kin")

    @property
    def num_optimizer_steps(self) -> int:
        """Minibatch steps over the budget, if every chunk holds one action; chunks of several give fewer."""
        batch = self.num_envs * self.num_steps
        descents = [s for s in (self.solver, self.value.separate) if isinstance(s, Descent)]
        decisions = batch * self.chain.tuned_steps
        return sum(-(-decisions // (s.minibatch or decisions)) * s.epochs for s in descents) * (self.num_env_steps // batch)
