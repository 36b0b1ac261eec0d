"""What the trainers of denoising agents share beside `Trainer`: the task, and an anchor that belongs to the state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.algos.collect import SequenceCollector
from markovia.algos.streams import stream_seed
from markovia.algos.trainer import Trainer, part


class ChainTrainer(Trainer):
    """The part of a driver that does not depend on the method; a driver adds `step`.

    `method` has num_env_steps, num_envs and solver. Raises ValueError at construction for an agent of another kind.
    """

    agent: DenoisingAgent

    def __init__(self, method: Any, agent: DenoisingAgent, collector: SequenceCollector, seed: int = 0) -> None:
        if agent.kind != "denoising":
            raise ValueError(f"{type(method).__name__} trains denoising agents, got kind {agent.kind!r}")
        self.collector = collector
        self.task: Any = collector.task
        self.reference: DenoisingAgent = agent.reference()  # type: ignore[assignment]
        super().__init__(method, agent, seed)
        self.boundary()

    def boundary(self) -> None:
        """Called at every checkpoint; nothing of a chain outlives its batch."""
        self.collector.reset(stream_seed(self.seed, "env", self.iteration))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors, meta = super().state()
        return tensors | ({} if self._shared else {f"reference.{k}": v for k, v in self.reference.net.state_dict().items()}), meta

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, task and seed."""
        super().load_state(tensors, meta)
        if not self._shared:
            self.reference.net.load_state_dict(part(tensors, "reference."))

    @property
    def _shared(self) -> bool:
        """Whether the reference is the agent's own network with its adapters off."""
        return self.reference.net is self.agent.net
