"""Whether a run fits into memory, told before it starts: text by the arithmetic of its family, steps and chains by the rows that are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from gymnasium.vector.utils import create_empty_array

from markovia.agents.records import map_obs
from markovia.algos.on_policy.memory import GB, Memory, available, check


@dataclass(frozen=True)
class Kept:
    """The rows that a run of steps or chains keeps."""

    weights: int  # bytes of the agent, already there
    rows: int
    row: int  # bytes of one
    name: str  # of what keeps them
    sizes: str  # the settings that say how many
    mend: ClassVar[str] = "smaller sizes"

    @property
    def total(self) -> int:
        return self.weights + self.rows * self.row

    def __str__(self) -> str:
        return f"about {self.total / GB:.3g} GB: {self.name} of {self.rows:,} rows ({self.sizes}), {self.row:,} bytes each"


def estimate(method: Any, setup: Any, processes: int = 1, shard: bool = False) -> Memory | Kept | None:
    """The sizes of a run, for each of the processes that share it; None where they are those of a file."""
    from markovia.algos.on_policy.method import OnPolicy
    from markovia.algos.preference.method import Preference
    from markovia.algos.preference.reward_model import RewardTraining

    if isinstance(method, RewardTraining):
        from markovia.algos.preference.memory import estimate_scores

        return estimate_scores(setup.agent, method, setup.collector)
    if setup.kind != "language":
        return _kept(method, setup)
    if isinstance(method, OnPolicy):
        from markovia.algos.on_policy.memory import estimate as of_rollouts

        return of_rollouts(setup.agent, method, setup.task.prompt_length, setup.task.max_new_tokens, processes, shard)
    if isinstance(method, Preference):
        from markovia.algos.preference.memory import estimate as of_items

        return of_items(setup.agent, method, setup.collector)
    return None


def _kept(method: Any, setup: Any) -> Kept | None:
    """A replay, a record of steps, or chains; None for datasets, which are there already."""
    from markovia.algos.collect import SequenceCollector, StepCollector
    from markovia.algos.off_policy.collect import ReplayCollector

    agent, collector = setup.agent, getattr(setup.collector, "online", setup.collector)
    weights = sum(x.numel() * x.element_size() for x in agent.state().values())
    if isinstance(collector, SequenceCollector):
        steps, size = agent.kernel.num_steps, math.prod(agent.sample_shape)
        return Kept(weights, collector.num_rows * steps, 4 * (2 * size + 8), "chains", f"num_envs={collector.num_rows} x {steps} steps")
    if not isinstance(collector, StepCollector):
        return None
    venv, num_envs = collector.venv, collector.venv.num_envs
    obs, action = _obs_bytes(agent, venv), 4 * math.prod(venv.single_action_space.shape or (1,))
    if isinstance(collector, ReplayCollector):
        online, row = getattr(method, "online", method), 2 * obs + action + 4 * (2 + collector.num_costs) + 1
        sizes = f"replay_size={online.replay_size}, num_env_steps={online.num_env_steps}"
        return Kept(weights, collector.replay.capacity, row, "a replay", sizes)
    # Reward, flags, log-probability, and for each column of values what is estimated, bootstrapped, hoped for and aimed at.
    row = obs + 2 * action + 8 + 5 + 4 * 2 + 4 * 4 * (1 + collector.num_costs)
    rows, name, sizes = num_envs * collector.num_steps, "a record", f"num_envs={num_envs} x num_steps={collector.num_steps}"
    if (shield := getattr(getattr(method, "constraint", None), "shield", None)) is not None:
        rows += min(shield.memory, method.num_env_steps)
        name, sizes = "a record and a shield's memory", f"{sizes}, constraint.shield.memory={shield.memory}"
    return Kept(weights, rows, row, name, sizes)


def _obs_bytes(agent: Any, venv: Any) -> int:
    """Bytes of one observation as the networks see it."""
    seen = agent.observe(create_empty_array(venv.single_observation_space, 1))
    sizes: list[int] = []
    map_obs(seen, lambda x: sizes.append(x.numel() * x.element_size()) or x)  # type: ignore[func-returns-value]
    return sum(sizes)


def before_run(method: Any, setup: Any, processes: int = 1, shard: bool = False, anyway: bool = False) -> str | None:
    """One line about the memory that a run on texts (each of its processes) will need, None for other runs.

    Warns of a run that may need more than is free; raises ValueError, unless `anyway`, for one that needs more than the machine has.
    """
    memory = estimate(method, setup, processes, shard)
    if memory is None:
        return None
    free, total = available(setup.agent.device)
    check(memory, free, total, anyway)
    if isinstance(memory, Kept):
        return None
    return f"memory: {memory}" + (f"; {free / GB:.3g} GB are free beside the weights" if free < float("inf") else "")
