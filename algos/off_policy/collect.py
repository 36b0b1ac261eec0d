"""Stepping a vector environment into a replay buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from markovia.agents.control import ControlAgent
from markovia.algos.collect import StepCollector, final_obs
from markovia.algos.off_policy.replay import Batch, Replay
from markovia.algos.safe.constraint import checked_cost


class ReplayCollector(StepCollector):
    """One step of every environment at a time, written to `replay`: the final observation of an episode is kept apart from the next one's first.

    Steps that only reset (NEXT_STEP) are not written. Rewards enter as `reward` gives them, unscaled where it is None; episodes count them raw.
    A raw reward of at least `terminate_at` is written as a termination, though the environment goes on.
    Costs are counted where the task tells them, and written as the column `cost` for methods with limits (`num_costs`): there is none before the
    first cost was told, so that an update without any is refused (`checked_cost`), and zeros for steps without a cost.
    """

    reward: Callable[[np.ndarray], np.ndarray] | None = None
    terminate_at: float | None = None

    def __init__(self, venv: VectorEnv, agent: ControlAgent, replay: Replay, seed: int = 0, num_costs: int = 0, cost_gamma: float = 1.0) -> None:
        self.agent, self.replay = agent, replay
        super().__init__(venv, agent, num_steps=1, seed=seed, scale_reward=False, cost_gamma=cost_gamma)
        self.num_costs = num_costs

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self._obs = self.agent.observe(self._raw)

    @torch.no_grad()
    def step(self, agent: ControlAgent, generator: torch.Generator, uniform: bool = False) -> int:
        """One step with the policy's own exploration, or with `uniform` actions; the number of transitions that came of it.

        Raises ValueError for a reward or a cost that is not finite, and where there are not as many costs as limits.
        """
        live = ~self._starting
        unit = self._unit_action(agent, generator, uniform)
        r, term, trunc, infos = self._advance(agent.from_unit(unit.cpu().numpy()), live)
        done = term | trunc
        following = agent.observe(self._raw)
        swapped = done.any() and not self.next_step
        final = agent.observe(_with_final(self._raw, infos, np.flatnonzero(done), self.venv, self._steps - 1)) if swapped else following
        paid = r if self.reward is None else self.reward(r)
        over = term if self.terminate_at is None else term | (r >= self.terminate_at)
        cost = self._told(infos, done)
        width = self.num_costs or self._costs_told
        if cost is None and width:
            cost = np.zeros((len(r), width))
        rows = Batch(
            self._obs, unit, _like(paid, unit), final, _like(1.0 - over, unit), torch.from_numpy(trunc).to(unit.device),
            self._limited(cost, unit),
        )  # fmt: skip
        if not live.all():
            index = torch.from_numpy(np.flatnonzero(live)).to(unit.device)
            rows = rows.map(lambda x: x[index])
        if live.any():
            self.replay.add(rows)
        self._obs = following
        self._episode(r, live, done, None if cost is None else np.where(live[:, None], cost, 0.0))
        self._starting = done if self.next_step else np.zeros_like(done)
        return int(live.sum())

    def _limited(self, cost: np.ndarray | None, unit: Tensor) -> dict[str, Tensor]:
        """The step's column of costs for a method with limits, once a cost was told; steps that were written before get zeros."""
        if not (self.num_costs and self._costs_told):
            return {}
        column = checked_cost(None if cost is None else _like(cost, unit), self.num_costs)
        written = self.replay.store
        if written is not None and "cost" not in written.extra:
            written.extra["cost"] = column.new_zeros((self.replay.capacity, self.num_costs))
        return {"cost": column}

    def _unit_action(self, agent: ControlAgent, generator: torch.Generator, uniform: bool) -> Tensor:
        if not uniform:
            return agent.unit_action(agent.sample(self._obs, generator))
        shape = (self.venv.num_envs, agent.action_size)
        return 2.0 * torch.rand(shape, generator=generator, device=generator.device) - 1.0

    def state(self) -> dict[str, Tensor]:
        """The replay, and what every collector keeps."""
        return super().state() | self.replay.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back."""
        super().load_state(state)
        self.replay.load_state({k: v for k, v in state.items() if k != "costs_told"}, self.agent.device)


def _like(x: np.ndarray, unit: Tensor) -> Tensor:
    return torch.from_numpy(x).to(device=unit.device, dtype=unit.dtype)


def _with_final(raw: Any, infos: dict[str, Any], who: np.ndarray, venv: VectorEnv, step: int) -> Any:
    """A copy of the batched observation with the final observations of the environments `who` in place of their next episode's first."""
    final = final_obs(infos, who, venv, step)
    if isinstance(raw, dict):
        out = {k: v.copy() for k, v in raw.items()}
        for k, v in out.items():
            v[who] = final[k]
        return out
    out = raw.copy()
    out[who] = final
    return out
