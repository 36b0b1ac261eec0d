"""What the trainers of denoising agents share: agent, anchor, optimiser, budget, and a state that a resumed run continues from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.algos.collect import SequenceCollector
from markovia.algos.optimizer import make_optimizer
from markovia.algos.streams import stream, stream_seed


class ChainTrainer:
    """The part of a driver that does not depend on the method; a driver adds `step`.

    `method` has num_env_steps, num_envs and solver. Raises ValueError at construction for an agent of another kind.
    """

    compile_seconds = 0.0  # nothing is compiled

    def __init__(self, method: Any, agent: DenoisingAgent, collector: SequenceCollector, seed: int = 0) -> None:
        if agent.kind != "denoising":
            raise ValueError(f"{type(method).__name__} trains denoising agents, got kind {agent.kind!r}")
        self.method, self.agent, self.collector, self.seed = method, agent, collector, seed
        self.task: Any = collector.task
        self.reference: DenoisingAgent = agent.reference()  # type: ignore[assignment]
        self.optimizer = make_optimizer(method.solver, [(agent.parameters("policy"), method.solver.lr)])
        self.iteration = self.num_env_steps = 0
        self.boundary()

    @property
    def finished(self) -> bool:
        return self.num_env_steps >= self.method.num_env_steps

    def generator(self, name: str) -> torch.Generator:
        """The stream of this name and iteration."""
        return stream(self.seed, name, self.iteration, self.agent.device if name == "action" else "cpu")

    def set_lr(self) -> None:
        """Learning rate of this iteration's steps."""
        done = min(1.0, self.num_env_steps / self.method.num_env_steps)
        self.optimizer.scale_lr(1.0 - done if self.method.solver.anneal else 1.0)

    def descend(self, loss: Tensor) -> Tensor:
        """One optimiser step; returns the gradient's norm."""
        self.optimizer.zero_grad()
        loss.backward()
        return self.optimizer.step()

    def advance(self, num_chains: int) -> dict[str, float]:
        """Count the iteration; the statistics that every driver reports."""
        self.iteration += 1
        self.num_env_steps += num_chains
        return {"iteration": float(self.iteration), "num_env_steps": float(self.num_env_steps)}

    def boundary(self) -> None:
        """Called at every checkpoint; nothing of a chain outlives its batch."""
        self.collector.reset(stream_seed(self.seed, "env", self.iteration))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state().items()}
        tensors |= {f"reference.{k}": v for k, v in self.reference.net.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.state().items()}
        return tensors, {"iteration": self.iteration, "num_env_steps": self.num_env_steps}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""
        self.agent.load_state(part(tensors, "agent."))
        self.reference.net.load_state_dict(part(tensors, "reference."))
        self.optimizer.load_state(part(tensors, "optimizer."))
        self.iteration, self.num_env_steps = meta["iteration"], meta["num_env_steps"]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
