"""Imitation of logged sequences given the return that followed: Decision Transformer's settings, its windows of data and its loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.agents.records import Obs, map_obs
from markovia.agents.return_conditioned import ReturnConditionedAgent
from markovia.algos.offline.method import Logged
from markovia.algos.offline.source import DatasetSource, as_batch, check_fits, fix_normalizer
from markovia.algos.on_policy.method import Descent
from markovia.algos.statistics import Statistics
from markovia.algos.streams import stream_seed
from markovia.algos.trainer import Trainer, part
from markovia.envs.offline.transforms import ObsTransform, Transform, reward_transform
from markovia.envs.offline.transitions import Transitions


def _solver() -> Descent:
    return Descent(lr=1e-4, anneal=False, warmup=10_000, eps=1e-8, weight_decay=1e-4, epochs=1, minibatch=64, max_grad_norm=0.25)


@dataclass(frozen=True)
class ReturnConditioned:
    """Settings of imitation given the return-to-go; one step of the budget is one update."""

    num_env_steps: int = 100_000  # updates
    num_steps: int = 1000  # updates between two reports
    window: int = 20  # steps that the policy sees
    layers: int = 3
    heads: int = 1
    width: int = 128
    dropout: float = 0.1
    return_scale: float = 1e-3  # of returns-to-go, before the network reads them
    target_return: float | None = None  # asked for when acting, reward units; None: the largest return of the data
    solver: Descent = field(default_factory=_solver)  # minibatch counts windows, warmup updates
    data: Logged = field(default_factory=Logged)

    def __post_init__(self) -> None:
        for name in ("num_env_steps", "num_steps", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.return_scale > 0.0:
            raise ValueError(f"return_scale must be > 0, got {self.return_scale}")
        if replace(self.data, fraction=1.0, fraction_gamma=1.0, normalize_obs=True, horizon=None, terminate_at=None) != Logged():
            raise ValueError("windows are episodes with raw rewards: leave data.reward, data.next_action, data.returns_to_go and data.compat alone")
        if self.solver.minibatch is None or self.solver.epochs != 1 or self.solver.anneal:
            raise ValueError("this loop draws windows anew for each update: set solver.minibatch, and leave solver.epochs=1 and solver.anneal=False")

    @property
    def num_optimizer_steps(self) -> int:
        return self.num_env_steps


@dataclass
class Windows:
    """b windows of K steps; `valid` (b, K) is False behind an episode's end. See markovia.agents.return_conditioned for the rest."""

    obs: Obs
    action: Tensor
    to_go: Tensor
    step: Tensor
    valid: Tensor


def masked_error(predicted: Tensor, action: Tensor, valid: Tensor) -> Tensor:
    """L = mean over valid steps and entries of (a_t - pi(R_1, s_1, a_1, ..., R_t, s_t))^2, ().                     [Chen 2021, arXiv 2106.01345]

    predicted, action (b, K, d) in [-1, 1], valid (b, K) bool. With a window of one step and a return that is not read it is behavioural cloning.
    """
    return (predicted - action).square().mean(-1)[valid].mean()


class SequenceSource(DatasetSource):
    """A dataset whose minibatches are windows: a row is drawn uniformly, which draws episodes by their length, and what follows it is read."""

    def __init__(self, data: Transitions, settings: ReturnConditioned, agent: ReturnConditionedAgent) -> None:
        norm: Any = agent.net["normalizer"] if "normalizer" in agent.net else None
        transform = Transform(reward_transform("none", data), ObsTransform.fit(data, keys=norm.keys) if norm is not None and norm.keys else None)
        if transform.obs is not None:
            fix_normalizer(norm, transform.obs, len(data))
        first, end = data.bounds()
        lengths = end - first
        to_go = torch.from_numpy(data.returns_to_go(1.0, cut="zero"))
        super().__init__(as_batch(data, agent, {"to_go": to_go.numpy()}), transform)  # type: ignore[arg-type]
        device = agent.device
        self.step_of = torch.from_numpy(np.arange(len(data)) - np.repeat(first, lengths)).to(device)
        self.end_of = torch.from_numpy(np.repeat(end, lengths)).to(device)
        self.window, self.scale = settings.window, settings.return_scale

    def windows(self, size: int, generator: torch.Generator) -> Windows:
        """`size` windows that start anywhere in an episode; behind its end the last row is repeated and not valid."""
        rows = self.replay.store
        assert rows is not None
        first = torch.randint(self.replay.size, (size, 1), generator=generator).to(self.end_of.device)
        index = first + torch.arange(self.window, device=first.device)
        valid = index < self.end_of[first]
        index = torch.where(valid, index, self.end_of[first] - 1)
        return Windows(
            map_obs(rows.obs, lambda x: x[index]), rows.action[index], self.scale * rows.extra["to_go"][index], self.step_of[index], valid
        )


def make_sequences(data: Transitions, settings: ReturnConditioned, agent: ReturnConditionedAgent) -> SequenceSource:
    """The complete episodes that the settings leave, as the agent sees them: what would have followed a cut is not known.

    Raises ValueError when they are not of its spaces.
    """
    check_fits(data, agent)  # type: ignore[arg-type]
    return SequenceSource(data.whole().best(settings.data.fraction, settings.data.fraction_gamma), settings, agent)


class SequenceDriver(Trainer):
    """Minimises `masked_error` over windows of logged episodes."""

    method: ReturnConditioned
    agent: ReturnConditionedAgent

    def __init__(self, method: ReturnConditioned, agent: ReturnConditionedAgent, source: SequenceSource, seed: int = 0) -> None:
        super().__init__(method, agent, seed)
        self.source = source

    def loss(self, w: Windows) -> Tensor:
        return masked_error(self.agent.net["policy"](w.to_go, w.obs, w.action, w.step), w.action, w.valid)

    def step(self) -> dict[str, float]:
        """`num_steps` updates; the mean loss and gradient norm."""
        stats, generator, solver = Statistics(), self.generator("minibatch"), self.method.solver
        count = min(self.method.num_steps, self.method.num_env_steps - self.num_env_steps)
        assert solver.minibatch is not None
        self.agent.net.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(self.seed, "dropout", self.iteration))
            for k in range(count):
                self.optimizer.scale_lr(min(1.0, (self.num_env_steps + k + 1) / max(1, solver.warmup)))
                windows = self.source.windows(solver.minibatch, generator)
                loss = self.loss(windows)
                stats.add({"loss": loss.detach(), "grad_norm": self.descend(loss, windows)})
        self.agent.net.eval()
        return {**stats.means(), **self.advance(count)}

    def boundary(self) -> None:
        """There is nothing to reset."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The trainer's state, and a checksum of the rows."""
        tensors, meta = super().state()
        return tensors | {f"source.{k}": v for k, v in self.source.state().items()}, meta

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""
        self.source.load_state(part(tensors, "source."))
        super().load_state({k: v for k, v in tensors.items() if not k.startswith("source.")}, meta)
