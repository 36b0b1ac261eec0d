"""Records of the two-layer MDP: chunks are stepped in the environment, their denoising steps are the decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.agents.diffusion_policy import DiffusionPolicyAgent
from markovia.agents.records import Rollout
from markovia.algos.collect import StepCollector, Stepped


class ChainCollector(StepCollector):
    """`StepCollector` over chunks; every chunk of its record becomes the K' denoising steps that made it.

    Decision i = 0 .. K'-1 of a chunk: obs = {"obs": window, "x": x_i, "step": k}, action x_{i+1}. Rewards, ends and values of final observations
    stand at the last one; in between the episode goes on. `left` = K'-1-i and `stage` = i/(K'-1) (1 for K' = 1) are columns, `env_steps` (B,) in
    `outcome` counts steps of the inner environments.                                             [Ren 2024, arXiv 2409.00588, section 4.1]
    """

    def collect(self, agent: Any, generator: torch.Generator | None = None) -> Rollout:
        """(num_envs, num_steps x K') denoising steps of `agent`."""
        before = np.array(self.venv.get_attr("num_env_steps"))  # type: ignore[attr-defined]
        rollout = super().collect(agent, generator)
        after = np.array(self.venv.get_attr("num_env_steps"))  # type: ignore[attr-defined]
        rollout.outcome["env_steps"] = torch.from_numpy(after - before)
        return rollout

    def _record(self, agent: Any, steps: Stepped) -> Rollout:
        assert isinstance(agent, DiffusionPolicyAgent)
        n, T = agent.tuned_steps, steps.reward.shape[1]
        last = np.tile(np.arange(n) == n - 1, T)
        spread = lambda x: np.repeat(x, n, axis=1)  # noqa: E731
        obs, action = unrolled(steps.obs, steps.action, agent.kernel.num_steps)
        inner = Stepped(
            obs,
            action,
            reward=spread(steps.reward) * last,
            terminated=spread(steps.terminated) & last,
            truncated=spread(steps.truncated) & last,
            valid=spread(steps.valid),
            cost=None if steps.cost is None else spread(steps.cost) * last[:, None],
            finals=[(who, t * n + n - 1, raw) for who, t, raw in steps.finals],
        )
        rollout = super()._record(agent, inner)
        place = torch.arange(n, device=agent.device).repeat(T).expand(rollout.shape).to(rollout.reward)
        rollout.columns["left"] = n - 1.0 - place
        rollout.columns["stage"] = place / (n - 1.0) if n > 1 else torch.ones_like(place)
        return rollout


def unrolled(window: Tensor, chain: Tensor, num_steps: int) -> tuple[dict[str, Tensor], Tensor]:
    """({"obs", "x", "step"}, action) of denoising steps (B, T K', ...) from windows (B, T, C) and chains (B, T, K' + 1, H, d)."""
    B, T, n = chain.shape[0], chain.shape[1], chain.shape[2] - 1
    step = torch.arange(num_steps - n, num_steps, device=chain.device).repeat(T).expand(B, T * n)
    obs = {"obs": window.repeat_interleave(n, 1), "x": chain[:, :, :-1].flatten(1, 2), "step": step.contiguous()}
    return obs, chain[:, :, 1:].flatten(1, 2)
