"""What a run is asked for, resolved: its configuration, and what is built from it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markovia.provenance import commit, versions
from markovia.settings import content_hash, to_json

if TYPE_CHECKING:
    from markovia.algos.setup import Setup
    from markovia.algos.systems import Method

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of `markovia.train` that decide a run's numbers, with method and files resolved."""

    name: str
    settings: Method
    env: str | None
    env_kwargs: dict[str, Any]
    agent_options: dict[str, Any]
    file: dict[str, Any] | None  # of preferences: path, content's hash, judge, options
    judge: str | Callable[..., Any] | None
    read: dict[str, str]  # files that a text task reads, by content's hash
    dataset: str | None
    references: dict[str, str] | None
    texts: str | None
    vectorization: str
    seed: int
    device: str
    shard: bool
    workers: Any  # the processes of a run with several, None for one
    num_checkpoints: int
    eval_episodes: int
    compile: bool | None

    @property
    def writes(self) -> bool:
        """Of several processes the first one keeps the run folder."""
        return self.workers is None or self.workers.rank == 0

    @property
    def num_processes(self) -> int:
        return 1 if self.workers is None else int(self.workers.size)

    def config(self) -> dict[str, Any]:
        """config.json."""
        import torch

        return {
            "schema": SCHEMA,
            "method": self.name,
            "settings": to_json(self.settings),
            "env": self.env,
            **({} if self.file is None else {"data": self.file}),
            **({} if self.dataset is None else {"dataset": self.dataset}),
            **({"read": self.read} if self.read else {}),
            **({"references": dict(self.references)} if self.references else {}),
            **({} if self.texts is None else {"texts": {self.texts: content_hash(self.texts)}}),
            "env_kwargs": to_json(self.env_kwargs),
            "agent_options": to_json(self.agent_options),
            "vectorization": self.vectorization,
            "seed": self.seed,
            "device": self.device if self.workers is None else torch.device(self.device).type,
            "num_checkpoints": self.num_checkpoints,
            "eval_episodes": self.eval_episodes,
            "compile": self.compile,
            "python": platform.python_version(),
            "versions": versions(),
            "commit": commit(),
        }

    def build(self) -> Setup:
        """Task, agent and collector. Raises ValueError for an argument that the environment or its agent does not know."""
        from markovia.algos.setup import build

        judged = None if self.file is None else {**self.file, "judge": self.judge}
        try:
            return build(
                self.env,
                self.settings,
                self.seed,
                env_kwargs=self.env_kwargs,
                agent_options=self.agent_options,
                vectorization=self.vectorization,
                device="cpu" if self.shard else self.device,  # a model that is cut goes to its device in parts
                data=judged,
                dataset=self.dataset,
                references=self.references,
                texts=self.texts,
            )
        except TypeError as e:
            if "unexpected keyword argument" not in str(e):
                raise
            given = f"env_kwargs {sorted(self.env_kwargs)}, agent_options {sorted(self.agent_options)}"
            raise ValueError(f"{self.env} or its agent does not know one of the arguments that were given ({given}): {e}") from e

    def driver(self, setup: Setup) -> Any:
        """The loop that trains: of one process, or of this one among several."""
        from markovia.algos.distributed import shared_driver
        from markovia.algos.setup import make_driver, worth_compiling

        if self.workers is not None:
            return shared_driver(
                self.settings, setup.agent, setup.collector, self.seed, self.workers, setup.references, setup.texts, self.device
            )
        compiled = worth_compiling(self.settings, setup) if self.compile is None else self.compile
        return make_driver(self.settings, setup, self.seed, compiled)
