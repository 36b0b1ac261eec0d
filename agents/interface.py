"""What every agent can do; the drivers in algos/ use nothing else.

An agent is a policy pi(a|s) with all it needs to act: networks, action distribution, observation normaliser, tokenizer or noise schedule.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from markovia.agents.distributions import Distribution
from markovia.agents.records import Obs, Rollout

Kind = Literal["control", "tabular", "language", "denoising", "reward"]
WANT = ("logp", "entropy", "dist", "value", "hidden")


@dataclass
class Evaluation:
    """What one forward pass over a record gives; only what was asked for is set. Shapes (B, T), value (B, T, 1 + m)."""

    logp: Tensor | None = None
    entropy: Tensor | None = None
    dist: Distribution | None = None
    value: Tensor | None = None
    hidden: Tensor | None = None


def check_want(want: Iterable[str], has_critic: bool, build: str = "critic=True", known: Sequence[str] = WANT) -> set[str]:
    """The columns asked for as a set; one that is not `known`, and a value without a critic (`build` gives one), raise ValueError."""
    wanted = set(want)
    if unknown := wanted - set(known):
        raise ValueError(f"evaluate() can't give {sorted(unknown)}; choose from {', '.join(known)}")
    if "value" in wanted and not has_critic:
        raise ValueError(f"this agent has no critic, so there is no value; build it with {build} or ask for other columns")
    return wanted


class Agent(ABC):
    """Base of every agent kind. `net` holds all modules; `policy_names` / `value_names` list its children by role.

    Subclasses implement `act` and `evaluate`, and `config` / `from_config` for checkpoints.
    """

    kind: Kind
    net: nn.ModuleDict  # children by role
    policy_names: tuple[str, ...] = ("policy",)
    value_names: tuple[str, ...] = ("critic",)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def critic(self) -> nn.Module | None:
        """The value network, None for critic-free agents."""
        return self.net[self.value_names[0]] if self.value_names[0] in self.net else None

    @abstractmethod
    def act(
        self, obs: Obs, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample actions (n, ...) and their log-probs (n,) for a batch of observations that the network may see; no gradient."""

    @abstractmethod
    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        """All of `want` (a subset of logp, entropy, dist, value, hidden) over every step of the record, in one forward pass, with gradient."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain JSON from which `from_config` rebuilds the same agent, weights apart."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> Agent:
        """Rebuild from `config()`; `network` is needed for a policy network that is the user's own class."""

    def env_action(self, action: Tensor) -> np.ndarray:
        """Policy coordinates to what the environment takes (clipped or unsquashed)."""
        return action.detach().cpu().numpy()

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Stable-Baselines3's signature: numpy observation(s) in, numpy action(s) out; normalises like training did.

        The state that comes back belongs into the next call, with `episode_start` (n,) where an episode begins: policies that plan ahead or remember
        carry it. `markovia.envs.control.stepping` does that.
        """
        raise ValueError(f"{type(self).__name__} (kind {self.kind!r}) has no single-step predict; use generate(starts, generator)")

    def generate(self, starts: dict[str, Any], generator: torch.Generator | None = None, deterministic: bool = False) -> Rollout:
        """Whole sequences from `starts` (token and denoising agents)."""
        raise ValueError(f"{type(self).__name__} (kind {self.kind!r}) does not generate sequences; step it in an environment")

    def parameters(self, which: Literal["policy", "value"]) -> list[nn.Parameter]:
        """Trainable parameters of one role; a module shared by both roles belongs to the policy."""
        names = {"policy": self.policy_names, "value": self.value_names}.get(which)
        if names is None:
            raise ValueError(f"parameters() takes 'policy' or 'value', got {which!r}")
        policy_ids = {id(p) for n in self.policy_names if n in self.net for p in self.net[n].parameters()}
        found = [p for n in names if n in self.net for p in self.net[n].parameters() if p.requires_grad]
        return found if which == "policy" else [p for p in found if id(p) not in policy_ids]

    def reference(self, fixed: bool = False) -> Agent:
        """A frozen policy with the same `evaluate`: a copy without gradient (LoRA agents override: adapters off).

        `fixed` promises that its weights are never moved, so that they may be kept in fewer bytes where `evaluate` stays the same to the bit.
        """
        frozen = copy.copy(self)
        frozen.net = copy.deepcopy(self.net)
        for p in frozen.net.parameters():
            p.requires_grad_(False)
        return frozen

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint must hold: weights and buffers, normaliser included."""
        return dict(self.net.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back. Missing or unknown names raise ValueError."""
        own = self.net.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        if missing or unknown or wrong:
            raise ValueError(
                f"the checkpoint does not fit this agent: missing {missing[:3]}, unknown {unknown[:3]}, other shape {wrong[:3]}; "
                "rebuild the agent with the configuration that was saved beside the weights"
            )
        self.net.load_state_dict(state)

    def to(self, device: str | torch.device) -> Agent:
        self.net.to(device)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write safetensors and JSON (nothing pickled) to `folder`, atomically."""
        from markovia.agents.checkpoint import save_agent

        return save_agent(self, Path(folder))

    @staticmethod
    def load(folder: str | Path, network: nn.Module | None = None) -> Agent:
        """Rebuild an agent from `save`'s folder. A damaged, foreign or executable file raises CheckpointError and runs nothing."""
        from markovia.agents.checkpoint import load_agent

        return load_agent(Path(folder), network=network)
