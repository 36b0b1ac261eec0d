"""From a dataset to an environment: learning on logged data, then from a replay that may or may not hold them, one after the other.

Nothing here is a loss: both phases are the off-policy update, whose networks go over by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from markovia.agents.control import ControlAgent
from markovia.algos.off_policy.collect import ReplayCollector
from markovia.algos.off_policy.driver import OffPolicyDriver
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.replay import Batch, Replay
from markovia.algos.off_policy.slots import Ascent, Conservative, Critics, SoftTarget, Squashed, TunedTemperature
from markovia.algos.offline.method import Logged, Offline
from markovia.algos.offline.source import DatasetSource
from markovia.algos.trainer import part

_LEARNING: dict[str, dict[str, Any]] = {"critic": {"lr": 1.0, "coef": 1.0}, "value": {"lr": 1.0}}  # what may differ between the phases
_POLICY = Squashed()
_CRITICS = Critics(num=10, layer_norm=True, coef=1.0)
_TARGET = SoftTarget(entropy=False, subset=2)
_ACTOR = Ascent(lr=1e-4)
_TEMPERATURE = TunedTemperature(lr=1e-4)


def _offline() -> Offline:
    data = Logged(normalize_obs=False, returns_to_go="zero")
    regulariser = Conservative(calibrated=True)
    target = replace(_TARGET, num_actions=10)  # as the authors' CQL has it on every suite; their SAC has it on AntMaze alone
    return Offline(policy=_POLICY, target=target, critic=_CRITICS, regulariser=regulariser, actor=_ACTOR, temperature=_TEMPERATURE, data=data)


def _online() -> OffPolicy:
    return OffPolicy(
        num_env_steps=300_000, learning_starts=5000, start="policy", utd=4.0, policy_delay=4, follow="critic",
        policy=_POLICY, target=_TARGET, critic=_CRITICS, actor=_ACTOR, temperature=_TEMPERATURE,
    )  # fmt: skip


def continued(before: Offline, **changes: Any) -> OffPolicy:
    """The same update as `before` on steps of the environment, which the policy takes from the first one on."""
    slots = {f.name: getattr(before, f.name) for f in fields(OffPolicy)}
    return OffPolicy(**{**slots, "replay_size": 1_000_000, "learning_starts": before.batch_size, "start": "policy", **changes})


@dataclass(frozen=True)
class WarmStart:
    """Settings of learning on a dataset, then in an environment; a step of the budget is an update of the first phase or a step of the second."""

    offline: Offline = field(default_factory=_offline)
    online: OffPolicy = field(default_factory=_online)  # its learning_starts are the steps of the frozen policy that fill the replay
    retain: float | Literal["append"] = 0.0  # share of each online minibatch that is drawn from the dataset; append: one pool of both, 0: forget it

    def __post_init__(self) -> None:
        if self.offline.critic is None:
            raise ValueError("imitation has no critics that could go online; give offline.critic, offline.target and an actor that follows them")
        for slot in ("policy", "critic", "value"):
            before, after = getattr(self.offline, slot), getattr(self.online, slot)
            learning = {} if None in (before, after) else _LEARNING.get(slot, {})
            if type(before) is not type(after) or (before is not None and replace(before, **learning) != replace(after, **learning)):
                raise ValueError(f"offline.{slot} and online.{slot} must be the same networks, since their weights go over: got {before} and {after}")
        if type(self.offline.temperature) is not type(self.online.temperature):
            raise ValueError("both phases need the same kind of temperature, since its value goes over")
        if self.offline.evaluation is not None or self.offline.behaviour is not None or isinstance(self.online, Offline):
            raise ValueError("offline.evaluation and offline.behaviour have no place online; leave them out, and let online be OffPolicy settings")
        if any(slot is not None for slot in (self.online.evaluation, self.online.behaviour, self.online.constraint)):
            raise ValueError("online.evaluation, online.behaviour and online.constraint have no counterpart offline; leave them out")
        if self.online.learning_starts < self.online.batch_size:
            raise ValueError(
                f"online.learning_starts={self.online.learning_starts} would draw minibatches of {self.online.batch_size} from fewer steps; "
                "raise it, at least to the batch size"
            )
        if self.retain != "append" and not (isinstance(self.retain, float | int) and 0.0 <= self.retain < 1.0):
            raise ValueError(
                f"retain must lie in [0, 1) or be 'append', got {self.retain!r}; 0.5 draws half of each minibatch from the dataset, "
                "'append' all rows alike from both"
            )

    @property
    def num_env_steps(self) -> int:
        return self.offline.num_env_steps + self.online.num_env_steps

    @property
    def batch_size(self) -> int:
        return max(self.offline.batch_size, self.online.batch_size)

    @property
    def num_optimizer_steps(self) -> int:
        return self.offline.num_optimizer_steps + self.online.num_optimizer_steps


class Phases:
    """Where both phases' transitions come from: the dataset, and an environment whose replay starts empty."""

    def __init__(self, dataset: DatasetSource, replay: ReplayCollector, retain: float | Literal["append"]) -> None:
        self.dataset, self.online = dataset, replay
        if retain:
            replay.replay = _Shared(replay.replay.capacity, dataset.replay, retain)

    def close(self) -> None:
        self.online.close()


class _Shared(Replay):
    """A replay whose minibatches hold a share of a dataset's rows, or draw from both as from one pool."""

    def __init__(self, capacity: int, dataset: Replay, share: float | Literal["append"]) -> None:
        super().__init__(capacity)
        self.dataset, self.share = dataset, share

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        if self.share == "append":
            rows = torch.randint(self.dataset.size + self.size, (size,), generator=generator)
            logged = int((rows < self.dataset.size).sum())
        else:
            logged = round(self.share * size)
        old, new = self.dataset.sample(logged, generator), super().sample(size - logged, generator)
        named, others = new.named(), old.named()
        return Batch.from_named({name: torch.cat([others[name], x]) for name, x in named.items()})


class WarmStartDriver:
    """The driver of one phase after that of the other; policy, critics, targets and temperature go over, optimisers begin anew."""

    def __init__(self, method: WarmStart, agent: ControlAgent, collector: Phases, seed: int = 0, compile: bool = False) -> None:
        self.method, self.agent, self.collector, self.seed, self.compile = method, agent, collector, seed, compile
        self.offline = OffPolicyDriver(method.offline, agent, collector.dataset, seed, compile)
        self.online: OffPolicyDriver | None = None

    @property
    def active(self) -> OffPolicyDriver:
        return self.offline if self.online is None else self.online

    @property
    def iteration(self) -> int:
        return self.offline.iteration + (0 if self.online is None else self.online.iteration)

    @property
    def num_env_steps(self) -> int:
        return self.offline.num_env_steps + (0 if self.online is None else self.online.num_env_steps)

    @property
    def finished(self) -> bool:
        return self.online is not None and self.online.finished

    @property
    def compile_seconds(self) -> float:
        return self.offline.compile_seconds + (0.0 if self.online is None else self.online.compile_seconds)

    def step(self) -> dict[str, float]:
        """One iteration of the phase that is due; its statistics, counted over both."""
        if self.offline.finished and self.online is None:
            self.go_online()
        stats = self.active.step()
        return {**stats, "iteration": float(self.iteration), "num_env_steps": float(self.num_env_steps), "online": float(self.online is not None)}

    def go_online(self) -> None:
        """Begin the second phase: networks, targets and temperature by name; nothing of the dataset but what `retain` asks for.

        Frozen policies that only this phase has (those of smoothed targets and of mirror descent) begin as the policy is now.
        """
        self.online = OffPolicyDriver(self.method.online, self.agent, self.collector.online, self.seed, self.compile)
        begun, learnt = self.online.nets.state(), self.offline.nets.state()
        self.online.nets.load_state({name: learnt.get(name, tensor) for name, tensor in begun.items()})

    # -- checkpoints ------------------------------------------------------------------------------------------------------------------

    def boundary(self) -> None:
        """That of the active phase."""
        self.active.boundary()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The active phase's state; of the other one only how far it went."""
        tensors, meta = self.active.state()
        meta |= {"online": self.online is not None, "offline_iterations": self.offline.iteration}
        return {**tensors, **{f"dataset.{k}": v for k, v in self.collector.dataset.state().items()}}, meta

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""
        self.collector.dataset.load_state(part(tensors, "dataset."))
        if meta["online"]:
            self.offline.iteration, self.offline.num_env_steps = meta["offline_iterations"], self.method.offline.num_env_steps
            self.go_online()
        self.active.load_state({k: v for k, v in tensors.items() if not k.startswith("dataset.")}, meta)
