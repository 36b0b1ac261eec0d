"""The policy that denoises chunks of actions: an observation window conditions a chain x_0 .. x_K, the clean sample is what is executed.

    window   (n, C)               the last `obs_steps` observations as the networks see them, flattened, oldest first
    x        (n, H, d)            noisy chunk of H actions, the Box reaching from -1 to 1
    chain    (n, K' + 1, H, d)    the last K' + 1 samples of a chain; its last entry is the clean chunk, unclipped
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.chunk_networks import build_chunk_network, chunk_network_config
from markovia.agents.control import StepAgent, batch_obs, check_action_space
from markovia.agents.distributions import FixedStdGaussian
from markovia.agents.interface import Evaluation, Kind, check_want
from markovia.agents.networks import Trunk, ValueNet, check_layers, is_image
from markovia.agents.normalizer import ObsNorm
from markovia.agents.records import Obs, Rollout
from markovia.agents.spaces import space_from_json, space_to_json
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.likelihood import log_prob


def floored(kernel: GaussianKernel, min_std: float) -> GaussianKernel:
    """The kernel whose every step has a std of at least `min_std`: exploration, and a density where the sampler has none (DPPO's rule).

    s_k <- max(s_k, min_std).                                                                       [Ren 2024, arXiv 2409.00588, section 4.2]
    Raises ValueError for min_std <= 0.
    """
    if not min_std > 0.0:
        raise ValueError(f"min_std must be > 0, got {min_std}; the last denoising step has std 0, so it would have no density (0.1 is usual)")
    config = kernel.to_config()
    config["tables"]["std"] = [max(s, min_std) for s in config["tables"]["std"]]
    return GaussianKernel.from_config({**config, "final": "floor"})


def chunk_log_prob(
    action: Tensor, mean: Tensor, std: Tensor, *, executed: int, entry_range: tuple[float, float] | None, reduce: Literal["sum", "mean"]
) -> Tensor:
    """log p of one denoising step over the first `executed` actions of the chunk: the rest of it is never carried out.

    l_j = -(a_j - mean_j)^2 / (2 s^2) - log s - log(2 pi)/2, cut to entry_range first, then summed or averaged over entries j; (*batch,) nats
    action, mean (*batch, H, d), std (*batch, 1, 1). A cut entry has no gradient; the mean divides by D = executed x d, which scales every clip
    range by D.                                                                                          [Ren 2024, arXiv 2409.00588, code]
    """
    entries = log_prob(action[..., :executed, :], mean[..., :executed, :], std, batch_ndim=action.ndim)
    if entry_range is not None:
        entries = entries.clamp(*entry_range)
    flat = entries.flatten(-2)
    return flat.sum(-1) if reduce == "sum" else flat.mean(-1)


@dataclass(frozen=True)
class Plan:
    """What `predict` carries from one step to the next, a row for each environment."""

    window: np.ndarray  # (n, obs_steps, ...) raw observations, the newest last
    chunk: np.ndarray  # (n, act_steps, ...) actions of the Box
    place: np.ndarray  # (n,) int: which of them is next
    generator: torch.Generator | None  # None: torch's own stream


class DiffusionPolicyAgent(StepAgent):
    """pi(x'|x, k, window) = N(mean, s_k^2 I): a chunk of actions by K denoising steps, of which the last K' are trained.

    [Chi 2023, arXiv 2303.04137; Ren 2024, 2409.00588]

    network   (x (N, H, d), timestep (N,), window (N, C)) -> model output (N, H, d), of what the kernel was told
    kernel    draws the chain while learning and for sampled actions; `greedy_kernel` for deterministic ones (DDIM with eta = 0, an ODE)

    `deterministic` means the greedy kernel: the start of the chain is drawn anew, because it decides which of several modes is taken; `predict`
    then draws from a stream of its own, so that its answers are reproducible.
    The normaliser is fixed (a denoiser can't follow moving moments): `observe` never updates it.
    """

    kind: Kind = "control"

    def __init__(self, config: dict[str, Any], network: nn.Module | None = None) -> None:
        self._config = copy.deepcopy(config)
        self.observation_space = space_from_json(config["observation_space"])
        self.action_space: Any = space_from_json(config["action_space"])
        check_action_space(self.action_space)
        if not isinstance(self.action_space, spaces.Box):
            raise ValueError(f"a diffusion policy denoises continuous actions, but the action space is {self.action_space}; use a Box")
        if not isinstance(self.observation_space, spaces.Box) or is_image(self.observation_space):
            raise ValueError(
                f"a diffusion policy is conditioned on a window of vectors, but the observation space is {self.observation_space}; "
                "wrap the environment in gymnasium.wrappers.FlattenObservation"
            )
        self.horizon, self.act_steps, self.obs_steps = (int(config[k]) for k in ("horizon", "act_steps", "obs_steps"))
        if not 1 <= self.act_steps <= self.horizon or self.obs_steps < 1:
            raise ValueError(
                f"expected 1 <= act_steps <= horizon and obs_steps >= 1, got act_steps={self.act_steps}, horizon={self.horizon}, "
                f"obs_steps={self.obs_steps}"
            )
        self.action_size = int(np.prod(self.action_space.shape))
        self.kernel = GaussianKernel.from_config(config["kernel"])
        self.greedy_kernel = GaussianKernel.from_config(config["greedy_kernel"])
        steps = self.kernel.num_steps
        if self.greedy_kernel.num_steps != steps:
            raise ValueError(f"both kernels need the same steps, got {steps} and {self.greedy_kernel.num_steps}")
        self.tuned_steps = steps if config["tuned_steps"] is None else int(config["tuned_steps"])
        if not 1 <= self.tuned_steps <= steps:
            raise ValueError(f"tuned_steps counts the last of {steps} denoising steps, expected 1 to {steps}, got {self.tuned_steps}")
        self.noise_clip: float | None = config["noise_clip"]
        self.entry_range = None if config["entry_range"] is None else tuple(config["entry_range"])
        self.reduce: Literal["sum", "mean"] = config["reduce"]
        if self.reduce not in ("sum", "mean"):
            raise ValueError(f"reduce must be 'sum' or 'mean', got {self.reduce!r}")
        if network is None:
            network = build_chunk_network(config["network"])
        self.net = nn.ModuleDict({"policy": network})
        if self.tuned_steps < steps:
            # The steps before the tuned ones stay what they were.
            self.net["base"] = copy.deepcopy(network).requires_grad_(False)
        if config["critic_hidden"] is not None:
            check_layers(config["critic_hidden"], "tanh")
            window = spaces.Box(-np.inf, np.inf, (self.window_size,), np.float32)
            self.net["critic"] = ValueNet(Trunk(window, tuple(config["critic_hidden"]), "tanh"))
        if config["normalize_obs"]:
            self.net["normalizer"] = ObsNorm(self.observation_space)

    @classmethod
    def from_spaces(
        cls,
        observation_space: gym.Space,
        action_space: gym.Space,
        network: nn.Module,
        kernel: GaussianKernel,
        greedy_kernel: GaussianKernel | None = None,
        horizon: int = 16,
        act_steps: int = 8,
        obs_steps: int = 2,
        normalize_obs: bool = True,
        critic_hidden: Sequence[int] | None = None,
        tuned_steps: int | None = None,
        noise_clip: float | None = None,
        entry_range: tuple[float, float] | None = None,
        reduce: Literal["sum", "mean"] = "sum",
        device: str | torch.device = "cpu",
    ) -> DiffusionPolicyAgent:
        """An agent for one environment's spaces.

        horizon, act_steps   H actions are denoised together, the first act_steps of them executed before the next chunk
        obs_steps            observations in the window, the current one included
        greedy_kernel        None: the kernel itself
        tuned_steps          K', the last denoising steps, which are trained; the others keep a frozen copy of the network. None: all
        noise_clip           bound of the standard normal noise of each step; None: none
        entry_range, reduce  how log-probabilities are taken, see `chunk_log_prob`
        Raises ValueError for spaces that the agent can't serve and for options out of range.
        """
        config = {
            "observation_space": space_to_json(observation_space),
            "action_space": space_to_json(action_space),
            "network": chunk_network_config(network),
            "kernel": kernel.to_config(),
            "greedy_kernel": (greedy_kernel or kernel).to_config(),
            "horizon": int(horizon),
            "act_steps": int(act_steps),
            "obs_steps": int(obs_steps),
            "normalize_obs": bool(normalize_obs),
            "critic_hidden": None if critic_hidden is None else list(critic_hidden),
            "tuned_steps": tuned_steps,
            "noise_clip": noise_clip,
            "entry_range": None if entry_range is None else list(entry_range),
            "reduce": reduce,
        }
        agent = cls(config, network)
        agent.to(device)
        return agent

    @property
    def window_size(self) -> int:
        """C, numbers that condition the network."""
        return self.obs_steps * int(np.prod(self.observation_space.shape or (1,)))

    def config(self) -> dict[str, Any]:
        return copy.deepcopy(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> DiffusionPolicyAgent:
        return cls(config, network)

    def tuned(self, **changes: Any) -> DiffusionPolicyAgent:
        """A new agent with the weights and the normaliser of this one and other options (kernel, tuned_steps, critic_hidden, reduce, ...).

        Raises ValueError for another tuned_steps, or kernel of other steps, where the first ones have a frozen network of their own.
        """
        config = {**self.config(), **{k: v.to_config() if isinstance(v, GaussianKernel) else v for k, v in changes.items()}}
        agent = DiffusionPolicyAgent(config, copy.deepcopy(self.net["policy"]))
        if "base" in self.net:
            now, given = ((a.tuned_steps, a.kernel.num_steps) for a in (self, agent))
            if now != given:
                raise ValueError(
                    f"this policy was tuned at the last {now[0]} of {now[1]} denoising steps, the others have a frozen network of their own, so it "
                    f"can't go on with the last {given[0]} of {given[1]}; set tuned_steps={now[0]}, or start from the policy that was cloned"
                )
            agent.net["base"].load_state_dict(self.net["base"].state_dict())
        if "normalizer" in self.net:
            agent.net["normalizer"].load_state_dict(self.net["normalizer"].state_dict())
        agent.to(self.device)
        return agent

    # -- one denoising step ---------------------------------------------------------------------------------------------------------------

    def step_law(self, window: Tensor, x: Tensor, step: Tensor, kernel: GaussianKernel | None = None, role: str = "policy") -> tuple[Tensor, Tensor]:
        """Mean (n, H, d) and std (n, 1, 1) of the next sample under the network `role`, for steps (n,) int64."""
        kernel = kernel or self.kernel
        return kernel.mean_std(self.net[role](x, kernel.timestep(step), window), x, step)

    @torch.no_grad()
    def chain(self, window: Tensor, deterministic: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """(n, K' + 1, H, d): the last K' + 1 samples of chains from fresh noise."""
        kernel = self.greedy_kernel if deterministic else self.kernel
        n, frozen = len(window), kernel.num_steps - self.tuned_steps
        shape = (n, self.horizon, self.action_size)

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=window.dtype, device=window.device)

        x, kept = kernel.init_noise_sigma * noise(), []
        for k in range(kernel.num_steps):
            if k >= frozen:
                kept.append(x)
            step = torch.full((n,), k, dtype=torch.long, device=window.device)
            mean, std = self.step_law(window, x, step, kernel, "policy" if k >= frozen else "base")
            z = noise() if self.noise_clip is None or deterministic else noise().clamp(-self.noise_clip, self.noise_clip)
            x = mean + std * z
        return torch.stack([*kept, x], 1)

    def _logp(self, action: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return chunk_log_prob(action, mean, std, executed=self.act_steps, entry_range=self.entry_range, reduce=self.reduce)  # type: ignore[arg-type]

    # -- the agent interface --------------------------------------------------------------------------------------------------------------

    def observe(self, observation: Any, update: bool | np.ndarray = False) -> Obs:
        """Raw windows (n, obs_steps, *shape) as (n, C); the normaliser is fixed, so `update` changes nothing."""
        frames = torch.from_numpy(np.array(observation, dtype=np.float32)).to(self.device)
        normed = self.net["normalizer"](frames) if "normalizer" in self.net else frames
        return normed.flatten(1).to(next(self.net["policy"].parameters()).dtype)

    def sample(self, obs: Obs, generator: torch.Generator | None = None) -> Tensor:
        return self.chain(obs, generator=generator)  # type: ignore[arg-type]

    @torch.no_grad()
    def act(self, obs: Obs, deterministic: bool = False, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Chains and the log-probs (n,) of their tuned steps together for windows (n, C); for {"obs", "x", "step"} one step x' and its log-prob.

        The log-prob of a deterministic chain is that under the sampling kernel.
        """
        if isinstance(obs, dict):
            mean, std = self.step_law(obs["obs"], obs["x"], obs["step"])
            z = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            action = mean if deterministic else mean + std * (z if self.noise_clip is None else z.clamp(-self.noise_clip, self.noise_clip))
            return action, self._logp(action, mean, std)
        chain = self.chain(obs, deterministic, generator)
        n, steps = chain.shape[0], self.tuned_steps
        step = torch.arange(self.kernel.num_steps - steps, self.kernel.num_steps, device=obs.device).repeat(n)
        mean, std = self.step_law(obs.repeat_interleave(steps, 0), chain[:, :-1].flatten(0, 1), step)
        return chain, self._logp(chain[:, 1:].flatten(0, 1), mean, std).reshape(n, steps).sum(1)

    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        """logp, entropy, dist (B, T) and value (B, T, 1) of denoising steps: obs = {"obs": (B, T, C), "x": (B, T, H, d), "step": (B, T)}.

        The value reads the window alone, never the noisy chunk; `dist` is over the executed part of the chunk.
        """
        wanted = check_want(want, self.critic is not None, "critic_hidden=(256, 256)", ("logp", "entropy", "dist", "value"))
        assert isinstance(rollout.obs, dict)
        lead = rollout.shape
        window, out = rollout.obs["obs"].flatten(0, 1), Evaluation()
        if wanted - {"value"}:
            x, step = rollout.obs["x"].flatten(0, 1), rollout.obs["step"].flatten()
            mean, std = self.step_law(window, x, step)
            out.logp = self._logp(rollout.action.flatten(0, 1), mean, std).unflatten(0, lead) if "logp" in wanted else None
            scale = 1.0 if self.reduce == "sum" else 1.0 / (self.act_steps * self.action_size)
            dist = FixedStdGaussian(mean[:, : self.act_steps].unflatten(0, lead), std.reshape(lead), scale)
            out.entropy = dist.entropy() if "entropy" in wanted else None
            out.dist = dist if "dist" in wanted else None
        if "value" in wanted:
            out.value = self.net["critic"](window).unflatten(0, lead)
        return out

    def env_action(self, action: Tensor) -> np.ndarray:
        """The executed part of chains (n, K' + 1, H, d) in the Box: (n, act_steps, *shape), clipped."""
        space = self.action_space
        unit = action[:, -1, : self.act_steps].detach().cpu().numpy().reshape(len(action), self.act_steps, *space.shape)
        raw = space.low + 0.5 * (unit + 1.0) * (space.high - space.low)
        return np.minimum(np.maximum(raw, space.low), space.high).astype(space.dtype)

    def predict(
        self, observation: Any, state: Plan | None = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Plan]:
        """One action for each observation; `state` carries window and chunk, as a recurrent policy's does in Stable-Baselines3.

        A new chunk is denoised where the old one is used up and where `episode_start` says that an episode begins. Without a state every call
        begins anew.
        """
        batch, single = batch_obs(observation, self.observation_space)
        n = len(batch)
        fresh = np.ones(n, dtype=bool) if state is None else np.zeros(n, dtype=bool)
        if episode_start is not None:
            fresh |= np.asarray(episode_start, dtype=bool).reshape(n)
        if state is None:
            empty = np.empty((n, self.act_steps, *self.action_space.shape), dtype=self.action_space.dtype)
            generator = torch.Generator(self.device).manual_seed(0) if deterministic else None
            state = Plan(np.repeat(batch[:, None], self.obs_steps, 1), empty, np.zeros(n, dtype=int), generator)
        window = np.concatenate([state.window[:, 1:], batch[:, None]], 1)
        window[fresh] = batch[fresh, None]
        due = fresh | (state.place >= self.act_steps)
        chunk, place = state.chunk.copy(), np.where(due, 0, state.place)
        if due.any():
            generator = state.generator if deterministic else None
            chunk[due] = self.env_action(self.chain(self.observe(window[due]), deterministic, generator))  # type: ignore[arg-type]
        action = chunk[np.arange(n), place]
        return (action[0] if single else action), replace(state, window=window, chunk=chunk, place=place + 1)
