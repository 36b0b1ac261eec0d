"""The loop of cloning: draw chunks and noise, fit the network, let the weights that act follow as an average."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from markovia.agents.diffusion_policy import DiffusionPolicyAgent
from markovia.algos.diffusion_policy.data import ChunkData
from markovia.algos.diffusion_policy.loss import denoising_error, diffused, flowed, noise_level
from markovia.algos.diffusion_policy.method import DiffusionNoise, Imitation
from markovia.algos.finite import Watch
from markovia.algos.optimizer import make_optimizer
from markovia.algos.statistics import Statistics
from markovia.algos.trainer import Budget, part


class Logs:
    """Chunks of a dataset as the driver's source: fixed, so there is nothing to reset; a checkpoint holds their checksum."""

    def __init__(self, data: ChunkData) -> None:
        self.data = data
        self.episodes: list[float] = []

    def state(self) -> dict[str, Tensor]:
        """A checksum alone: the rows are read again from the dataset."""
        return {"checksum": torch.tensor(self.data.checksum())}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError when the run was begun on other rows."""
        if int(state["checksum"]) != self.data.checksum():
            raise ValueError("the dataset has changed since this run began, so it can't go on with the same numbers; train into another folder")

    def close(self) -> None:
        """There is nothing to close."""


class ImitationDriver(Budget):
    """Fits a copy of the agent's network to the data; the agent itself holds the average, with which it acts."""

    method: Imitation
    agent: DiffusionPolicyAgent
    compile_seconds = 0.0  # nothing is compiled

    def __init__(self, method: Imitation, agent: DiffusionPolicyAgent, collector: Logs, seed: int = 0) -> None:
        self.method, self.agent, self.collector, self.seed = method, agent, collector, seed
        self.iteration = self.num_env_steps = 0
        self.watch = Watch(agent.device)
        self.network = copy.deepcopy(agent.net["policy"])
        self.optimizer = make_optimizer(method.solver, [(list(self.network.parameters()), method.solver.lr)])
        self.levels = method.noise.levels() if isinstance(method.noise, DiffusionNoise) else None

    def step(self) -> dict[str, float]:
        """`num_steps` updates; the iteration's statistics."""
        stats, generator = Statistics(), self.generator("minibatch")
        for _ in range(min(self.method.num_steps, self.method.num_env_steps - self.num_env_steps)):
            solver = self.method.solver
            rising = min(1.0, (self.num_env_steps + 1) / max(1, solver.warmup))
            self.optimizer.scale_lr(rising * (1.0 - self.progress if solver.anneal else 1.0))
            self.num_env_steps += 1
            stats.add(self.update(generator))
        self.watch.look()
        self.iteration += 1
        self.watch.begin(self.iteration)
        return {**stats.means(), "iteration": float(self.iteration), "num_env_steps": float(self.num_env_steps)}

    def update(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of the network and of its average on one minibatch."""
        self.optimizer.zero_grad()
        rows = torch.randint(len(self.collector.data), (self.method.batch_size,), generator=generator)
        loss = self.loss(rows, generator)
        loss.backward()
        norm = self.optimizer.step()
        self.watch.add({"grad_norm": norm}, lambda: self.whole(rows))
        decay = self.method.average.decay(self.num_env_steps)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.agent.net["policy"].parameters()), list(self.network.parameters()), 1.0 - decay)
        return {"loss": loss.detach(), "grad_norm": norm}

    def whole(self, rows: Tensor) -> dict[str, Any]:
        """A minibatch for whoever wants to look at it: which rows, their observations and chunks."""
        data, m = self.collector.data, self.method
        return {"rows": rows, "obs": data.windows(rows, m.obs_steps), "action": data.chunks(rows, m.horizon)}

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """`denoising_error` of a minibatch of rows, with noise levels and noise from the generator."""
        m, data, device = self.method, self.collector.data, self.agent.device
        x0 = data.chunks(rows, m.horizon).to(device)
        window = self.agent.observe(data.windows(rows, m.obs_steps).numpy())
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        if self.levels is not None:
            step = torch.randint(self.levels.num_steps, (m.batch_size,), generator=generator).to(device)
            x, timestep, target = diffused(self.levels, x0, eps, step)
        else:
            sigma = noise_level(torch.rand(m.batch_size, generator=generator), times=m.noise.times).to(x0)  # type: ignore[union-attr]
            x, timestep, target = flowed(x0, eps, sigma, time_scale=m.noise.time_scale)
        return denoising_error(self.network(x, timestep, window), target)

    # -- checkpoints ----------------------------------------------------------------------------------------------------------------------

    def boundary(self) -> None:
        """Called at every checkpoint; the data do not change."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state().items()}
        tensors |= {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.state().items()}
        tensors |= {f"collector.{k}": v for k, v in self.collector.state().items()}
        return tensors, {"iteration": self.iteration, "num_env_steps": self.num_env_steps}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, data and seed."""
        self.collector.load_state(part(tensors, "collector."))
        self.agent.load_state(part(tensors, "agent."))
        self.network.load_state_dict(part(tensors, "network."))
        self.optimizer.load_state(part(tensors, "optimizer."))
        self.iteration, self.num_env_steps = meta["iteration"], meta["num_env_steps"]
        self.watch.begin(self.iteration)
