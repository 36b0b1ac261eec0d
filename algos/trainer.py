"""What trainers share that improve one agent with one optimiser on batches of their own making; a driver adds `step`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.algos.finite import Watch
from markovia.algos.optimizer import make_optimizer
from markovia.algos.streams import stream


class Budget:
    """How far a run is, and its random streams. A driver sets the attributes; `method` has num_env_steps."""

    method: Any
    agent: Agent
    seed: int
    iteration: int
    num_env_steps: int

    @property
    def finished(self) -> bool:
        return self.num_env_steps >= self.method.num_env_steps

    @property
    def progress(self) -> float:
        """Fraction of the budget that is spent, in [0, 1]."""
        return min(1.0, self.num_env_steps / self.method.num_env_steps)

    def generator(self, name: str) -> torch.Generator:
        """The stream of this name and iteration."""
        return stream(self.seed, name, self.iteration, self.agent.device if name == "action" else "cpu")


class Trainer(Budget):
    """Agent, optimiser, budget, random streams, and a state that a resumed run continues from. `method` has num_env_steps and solver."""

    compile_seconds = 0.0  # nothing is compiled

    def __init__(self, method: Any, agent: Agent, seed: int = 0, roles: Sequence[Literal["policy", "value"]] = ("policy",)) -> None:
        self.method, self.agent, self.seed = method, agent, seed
        lr = {"policy": method.solver.lr, "value": method.solver.value_lr or method.solver.lr}
        self.optimizer = make_optimizer(method.solver, [(agent.parameters(role), lr[role]) for role in roles])
        self.iteration = self.num_env_steps = 0
        self.watch = Watch(agent.device)

    def set_lr(self) -> None:
        """Learning rate of this iteration's steps."""
        rising = min(1.0, (self.iteration + 1) / max(1, self.method.solver.warmup))
        self.optimizer.scale_lr(rising * (1.0 - self.progress if self.method.solver.anneal else 1.0))

    def minibatches(self, count: int) -> Iterator[Tensor]:
        """The solver's epochs over `count` items in random order, as indices."""
        solver, generator = self.method.solver, self.generator("minibatch")
        size = solver.minibatch or max(count, 1)
        for _ in range(solver.epochs):
            yield from torch.randperm(count, generator=generator).split(size) if count else ()

    def descend(self, loss: Tensor, batch: Any) -> Tensor:
        """One optimiser step; returns the gradient's norm. One that is not finite raises NotFinite with `batch`, what the loss was taken on."""
        self.optimizer.zero_grad()
        loss.backward()
        return self.move(batch)

    def move(self, batch: Any) -> Tensor:
        """The same along the gradients that backward passes have added up; `batch` may be a function that makes it."""
        norm = self.optimizer.step()
        self.watch.add({"grad_norm": norm}, batch)
        return norm

    def advance(self, num_items: int) -> dict[str, float]:
        """Count the iteration; the statistics that every driver reports."""
        self.watch.look()
        self.iteration += 1
        self.watch.begin(self.iteration)
        self.num_env_steps += num_items
        return {"iteration": float(self.iteration), "num_env_steps": float(self.num_env_steps)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state().items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.state().items()}
        return tensors, {"iteration": self.iteration, "num_env_steps": self.num_env_steps}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""
        self.agent.load_state(part(tensors, "agent."))
        self.optimizer.load_state(part(tensors, "optimizer."))
        self.iteration, self.num_env_steps = meta["iteration"], meta["num_env_steps"]
        self.watch.begin(self.iteration)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
