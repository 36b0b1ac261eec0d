"""Whether a run of a language model or of a reward model fits into memory, told before it starts."""

from __future__ import annotations

from typing import Any

from markovia.algos.on_policy.memory import GB, Memory, available, check


def estimate(method: Any, setup: Any, processes: int = 1, shard: bool = False) -> Memory | None:
    """The sizes of a run, for each of the processes that share it; None where nobody has worked them out."""
    from markovia.algos.on_policy.method import OnPolicy
    from markovia.algos.preference.method import Preference
    from markovia.algos.preference.reward_model import RewardTraining

    if isinstance(method, RewardTraining):
        from markovia.algos.preference.memory import estimate_scores

        return estimate_scores(setup.agent, method, setup.collector)
    if setup.kind != "language":
        return None
    if isinstance(method, OnPolicy):
        from markovia.algos.on_policy.memory import estimate as of_rollouts

        return of_rollouts(setup.agent, method, setup.task.prompt_length, setup.task.max_new_tokens, processes, shard)
    if isinstance(method, Preference):
        from markovia.algos.preference.memory import estimate as of_items

        return of_items(setup.agent, method, setup.collector)
    return None


def before_run(method: Any, setup: Any, processes: int = 1, shard: bool = False, anyway: bool = False) -> str | None:
    """One line about the memory that a run (each of its processes) will need, None where that is not known.

    Warns of a run that may need more than is free; raises ValueError, unless `anyway`, for one that needs more than the machine has.
    """
    memory = estimate(method, setup, processes, shard)
    if memory is None:
        return None
    free, total = available(setup.agent.device)
    check(memory, free, total, anyway)
    return f"memory: {memory}" + (f"; {free / GB:.3g} GB are free beside the weights" if free < float("inf") else "")
