"""Denoising policies: a network predicts the model output, the kernel turns it into the mean and standard deviation of the next sample."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from markovia.agents.adapters import adapters_off, inject, plain_state
from markovia.agents.distributions import FixedStdGaussian
from markovia.agents.interface import Agent, Evaluation, check_want
from markovia.agents.records import Obs, Rollout
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import build_network, is_known, network_config


class ChainCritic(nn.Module):
    """V(x, k, cond): an MLP on the flat sample, the step as a one-hot vector and the condition; (N, 1 + num_costs)."""

    def __init__(self, size: int, num_steps: int, cond_dim: int, hidden: int, num_costs: int = 0) -> None:
        super().__init__()
        self.num_steps = num_steps
        layers = [nn.Linear(size + num_steps + cond_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1 + num_costs)]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, 1.0), strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def forward(self, x: Tensor, step: Tensor, cond: Tensor | None) -> Tensor:
        parts = [x.flatten(1), nn.functional.one_hot(step, self.num_steps).to(x.dtype)]
        result: Tensor = self.layers(torch.cat(parts if cond is None else [*parts, cond], -1))
        return result


class DenoisingAgent(Agent):
    """pi(x'|x, k, c) = N(mu(x, k, c), s_k^2 I): only the mean is learned, s_k comes from the kernel.        [arXiv 2305.13301, section 4]

    network  (x (N, *shape), timestep (N,), cond (N, C) or None) -> model output (N, *shape); eps, x0, v or flow as the kernel was told
    reduce   "sum": exact log-probs; "mean": divided by the number of entries D (published image settings)
    lora     peft's settings, e.g. {"r": 8, "alpha": 16, "target_modules": ["to_q", "to_v"]}: only adapters are trained, and the reference is the
             same network with the adapters off
    batch    largest number of samples in one call of the network where no gradient is wanted; None: all at once
    """

    kind = "denoising"

    def __init__(
        self,
        network: nn.Module,
        kernel: GaussianKernel,
        sample_shape: Iterable[int],
        cond_dim: int = 0,
        critic_hidden: int | None = 128,
        reduce: Literal["sum", "mean"] = "sum",
        num_costs: int = 0,
        lora: dict[str, Any] | None = None,
        batch: int | None = None,
    ) -> None:
        if reduce not in ("sum", "mean"):
            raise ValueError(f"reduce must be 'sum' or 'mean', got {reduce!r}")
        if batch is not None and batch < 1:
            raise ValueError(f"batch must be >= 1 sample, or None for all at once, got {batch}")
        self.kernel, self.sample_shape, self.cond_dim = kernel, tuple(int(n) for n in sample_shape), cond_dim
        self.critic_hidden, self.reduce, self.num_costs, self.lora, self.batch = critic_hidden, reduce, num_costs, lora, batch
        self._adapters_off = False
        # A checkpoint needs no weights that lie in a pipeline's folder and are not trained.
        self.own_base = lora is not None and any(getattr(m, "folder", None) for m in network.modules())
        if lora is not None:
            inject(network, lora)
        self.net = nn.ModuleDict({"policy": network})
        size = math.prod(self.sample_shape)
        self.scale = 1.0 if reduce == "sum" else 1.0 / size
        if critic_hidden is not None:
            self.net["critic"] = ChainCritic(size, kernel.num_steps, cond_dim, critic_hidden, num_costs)

    @classmethod
    def from_task(cls, task: Any, **options: Any) -> DenoisingAgent:
        """An agent that starts at the task's own network (a copy of it) and uses the task's kernel."""
        if not isinstance(task.network, nn.Module):
            raise ValueError(
                f"the task's network is a {type(task.network).__name__}, not a torch Module, so it has no parameters to train; "
                "build DenoisingAgent(network=...) with a Module of your own"
            )
        task.kernel.require_density(f"training on task {task.name!r}")
        cond_dim = 0 if task.conditions is None else int(task.conditions.shape[1])
        if options.get("lora") is not None:
            # Frozen weights can be shared; only the modules around them must be the agent's own.
            shared = {id(p): p for p in task.network.parameters()}
            return cls(copy.deepcopy(task.network, shared), task.kernel, task.sample_shape, cond_dim, **options)
        network = copy.deepcopy(task.network).float()
        for p in network.parameters():
            p.requires_grad_(True)
        return cls(network, task.kernel, task.sample_shape, cond_dim, **options)

    @property
    def guidance(self) -> float:
        """Scale of the classifier-free guidance inside the policy's network; 1 without."""
        return float(getattr(self.net["policy"], "guidance", 1.0))

    def network(self, x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        """Model output (N, *shape) of the policy's network, or of the reference's: adapters on or off."""
        with adapters_off(self.net["policy"]) if self._adapters_off else nullcontext():
            if self.batch is None or len(x) <= self.batch or torch.is_grad_enabled():
                output: Tensor = self.net["policy"](x, timestep, cond)
                return output
            parts = zip(x.split(self.batch), timestep.split(self.batch), [None] * len(x) if cond is None else cond.split(self.batch), strict=False)
            return torch.cat([self.net["policy"](*part) for part in parts])

    def _dist(self, x: Tensor, step: Tensor, cond: Tensor | None) -> FixedStdGaussian:
        """Distribution of the next sample for a flat batch (N, *shape)."""
        output = self.network(x, self.kernel.timestep(step), cond)
        mean, std = self.kernel.mean_std(output, x, step)
        return FixedStdGaussian(mean, std.reshape(len(x)), self.scale)

    def act(self, obs: Obs, deterministic: bool = False, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Next samples x' (n, *shape) and log-probs (n,) for obs = {"x": (n, *shape), "step": (n,) int64, "cond": (n, C) or absent}."""
        assert isinstance(obs, dict)
        with torch.no_grad():
            dist = self._dist(obs["x"], obs["step"], obs.get("cond"))
            action = dist.mode() if deterministic else dist.sample(generator)
            return action, dist.log_prob(action)

    @torch.no_grad()
    def generate(self, starts: dict[str, Any], generator: torch.Generator | None = None, deterministic: bool = False) -> Rollout:
        """Whole chains from starts = {"x": (n, *shape), "cond": (n, C) or None}; rewards are zero until a task scores `outcome["x"]`."""
        x, cond = starts["x"].to(self.device), starts.get("cond")
        n, steps = len(x), self.kernel.num_steps
        xs = x.new_empty((n, steps, *self.sample_shape))
        actions, logps = torch.empty_like(xs), x.new_empty((n, steps))
        for k in range(steps):
            obs = {"x": x, "step": torch.full((n,), k, dtype=torch.long, device=x.device)} | ({} if cond is None else {"cond": cond})
            xs[:, k] = x
            x, logps[:, k] = self.act(obs, deterministic, generator)
            actions[:, k] = x
        step = torch.arange(steps, device=x.device).expand(n, steps)
        obs = {"x": xs, "step": step}
        if cond is not None:
            obs["cond"] = cond[:, None].expand(n, steps, -1)
        valid = torch.ones((n, steps), dtype=torch.bool, device=x.device)
        counts = torch.as_tensor(self.kernel.in_likelihood, dtype=torch.bool, device=x.device)
        continuation = torch.ones((n, steps), device=x.device)
        continuation[:, -1] = 0.0
        return Rollout(
            obs=obs, action=actions, logp_old=logps, reward=torch.zeros_like(logps), valid=valid, mask=counts.expand(n, steps).clone(),
            continuation=continuation, truncated=torch.zeros_like(valid), outcome={"x": x, "cond": cond},
            columns={} if cond is None else {"guidance": torch.full_like(logps, self.guidance)},
        )  # fmt: skip

    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        """logp, entropy, dist (B, T) and value (B, T, 1 + m) of every step of every chain, in one batched network call.

        Raises ValueError for another quantity, and for a record that was sampled with another guidance scale: its ratios would compare two
        different policies.
        """
        wanted = check_want(want, self.critic is not None, "critic_hidden=128", ("logp", "entropy", "dist", "value"))
        assert isinstance(rollout.obs, dict)
        sampled = rollout.columns.get("guidance")
        # Reading a value would break a compiled update in two; such an update evaluates records of its own agent only.
        if sampled is not None and not torch.compiler.is_compiling() and bool((sampled != self.guidance).any()):
            raise ValueError(
                f"the record was sampled with guidance {float(sampled.flatten()[0]):g}, but this agent evaluates with {self.guidance:g}; "
                "build both around GuidedDenoiser(network, scale) with one scale, so that training sees the policy that acted"
            )
        B, T = rollout.shape
        x = rollout.obs["x"].reshape(B * T, *self.sample_shape)
        step = rollout.obs["step"].reshape(B * T)
        cond = rollout.obs["cond"].reshape(B * T, -1) if "cond" in rollout.obs else None
        ev = Evaluation()
        if wanted & {"logp", "entropy", "dist"}:
            flat = self._dist(x, step, cond)
            ev.dist = FixedStdGaussian(flat.mean.reshape(B, T, *self.sample_shape), flat.std.reshape(B, T), self.scale)
            ev.logp = ev.dist.log_prob(rollout.action) if "logp" in wanted else None
            ev.entropy = ev.dist.entropy() if "entropy" in wanted else None
        if self.critic is not None and "value" in wanted:
            ev.value = self.critic(x, step, cond).reshape(B, T, 1 + self.num_costs)
        return ev

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Next sample for the observation of a `DenoisingEnv` in action mode "next_sample" (single or batched)."""
        sample = torch.as_tensor(np.asarray(observation["sample"]), dtype=torch.float32, device=self.device)
        step = torch.as_tensor(np.asarray(observation["step"]), device=self.device).reshape(-1).long()
        # Under NEXT_STEP autoreset a final observation (step K) is asked about too; the environment ignores that action.
        obs: dict[str, Tensor] = {"x": sample.reshape(-1, *self.sample_shape), "step": step.clamp(max=self.kernel.num_steps - 1)}
        if "cond" in observation:
            obs["cond"] = torch.as_tensor(np.asarray(observation["cond"]), dtype=torch.float32, device=self.device).reshape(len(obs["x"]), -1)
        action, _ = self.act(obs, deterministic)
        return action.reshape(sample.shape).cpu().numpy(), state

    # -- reference and checkpoints --------------------------------------------------------------------------------------------------------

    def reference(self, fixed: bool = False) -> Agent:
        """The policy before training: the same weights with the adapters off (LoRA, no copy), else a frozen copy."""
        if self.lora is None:
            return self.frozen()
        ref = copy.copy(self)
        ref._adapters_off = True
        return ref

    def frozen(self) -> Agent:
        """A frozen copy with weights of its own, adapters included: what a method needs whose anchor moves."""
        return super().reference()

    def parameters(self, which: Literal["policy", "value"]) -> list[nn.Parameter]:
        """Trainable parameters of one role; none for a reference, which shares its weights with the agent."""
        return [] if self._adapters_off else super().parameters(which)

    def state(self) -> dict[str, Tensor]:
        """Every weight; adapters and critic alone where the rest lies in a pipeline's folder."""
        return {k: v for k, v in self.net.state_dict().items() if not self.own_base or k in self._trained()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back. Missing or unknown names, or another shape, raise ValueError."""
        kept = {k: v for k, v in self.net.state_dict().items() if self.own_base and k not in self._trained()}
        super().load_state(kept | state)

    def _trained(self) -> set[str]:
        return {n for n, p in self.net.named_parameters() if "lora_" in n or n.startswith("critic.")}

    def export(self, folder: str | Path, adapters: bool = False) -> Path:
        """The trained pipeline as a diffusers folder, adapters merged into its weights; `adapters`: these alone, by diffusers' own
        `save_lora_adapter` (read with `pipe.unet.load_lora_adapter(folder, prefix=None)`).

        Raises ValueError when the network does not belong to a pipeline on disk, or has no adapters of diffusers.
        """
        from markovia.envs.denoising.pipeline import write_pipeline
        from markovia.envs.denoising.pipeline_network import PipelineDenoiser

        found = next((m for m in self.net["policy"].modules() if isinstance(m, PipelineDenoiser)), None)
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} already exists and is not empty; export to a new folder")
        if found is None or found.folder is None:
            raise ValueError("only a pipeline that was read from a folder can be written back; this network has none. save(folder) keeps the agent")
        if not adapters:
            return write_pipeline(found.folder, plain_state(found.model), folder)
        if self.lora is None or not hasattr(found.model, "save_lora_adapter"):
            raise ValueError(
                f"{type(found.model).__name__} has no adapters that diffusers could write (lora={self.lora}); write the whole pipeline instead"
            )
        found.model.save_lora_adapter(str(folder))  # type: ignore[operator]
        return folder

    def config(self) -> dict[str, Any]:
        network = self.net["policy"]
        return {
            "network": network_config(network) if is_known(network) else {"network": "custom"},
            "kernel": self.kernel.to_config(),
            "sample_shape": list(self.sample_shape),
            "cond_dim": self.cond_dim,
            "critic_hidden": self.critic_hidden,
            "reduce": self.reduce,
            "num_costs": self.num_costs,
            "lora": self.lora,
            "batch": self.batch,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> DenoisingAgent:
        options = dict(config)
        spec, kernel = options.pop("network"), GaussianKernel.from_config(options.pop("kernel"))
        if network is None and spec["network"] == "custom":
            raise ValueError("this checkpoint's network is a class of its author's own; pass it: DenoisingAgent.load(folder, network=...)")
        return cls(network if network is not None else build_network(spec), kernel, **options)
