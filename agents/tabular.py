"""A softmax policy with one logit per state and action, for problems that are solved to their fixed point."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.control import StepAgent
from markovia.agents.distributions import Categorical
from markovia.agents.interface import Evaluation, Kind, check_want
from markovia.agents.records import Rollout
from markovia.agents.spaces import space_from_json, space_to_json


class Table(nn.Module):
    """One row of numbers per state: index (...) int64 -> (..., n)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, state: Tensor) -> Tensor:
        return F.embedding(state, self.table)


class TabularAgent(StepAgent):
    """pi(a|s) = softmax(logits[s])[a] and a table of values (S, 1 + m); observations are state numbers.

    A MultiDiscrete observation is numbered row-major. `net["policy"].table` is (S, A), so exact solvers can read and write it.
    """

    kind: Kind = "tabular"

    def __init__(self, config: dict[str, Any], logits: Tensor | None = None) -> None:
        self._config = dict(config)
        self.observation_space = space_from_json(config["observation_space"])
        self.action_space = space_from_json(config["action_space"])
        if not isinstance(self.observation_space, spaces.Discrete | spaces.MultiDiscrete):
            raise ValueError(
                f"a tabular agent needs a Discrete or MultiDiscrete observation space, got {self.observation_space}; use ControlAgent for vectors"
            )
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(f"a tabular agent needs a Discrete action space, got {self.action_space}; use ControlAgent for others")
        dtypes = {"float32": torch.float32, "float64": torch.float64}
        if config["dtype"] not in dtypes:
            raise ValueError(f"dtype must be float32 or float64, got {config['dtype']!r}")
        dtype = dtypes[config["dtype"]]
        self.num_costs: int = config["num_costs"]
        single = isinstance(self.observation_space, spaces.Discrete)
        n_states = int(self.observation_space.n) if single else int(np.prod(self.observation_space.nvec))  # type: ignore[union-attr]
        shape = (n_states, int(self.action_space.n))
        if logits is not None and tuple(logits.shape) != shape:
            raise ValueError(f"the initial logits must have shape (states, actions) = {shape}, got {tuple(logits.shape)}")
        table = torch.zeros(shape, dtype=dtype) if logits is None else logits.detach().to(dtype).clone()
        self.net = nn.ModuleDict({"policy": Table(table)})
        if config["critic"]:
            self.net["critic"] = Table(torch.zeros(n_states, 1 + self.num_costs, dtype=dtype))

    @classmethod
    def from_spaces(
        cls,
        observation_space: gym.Space,
        action_space: gym.Space,
        logits: Tensor | np.ndarray | None = None,
        num_costs: int = 0,
        critic: bool = True,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
    ) -> TabularAgent:
        """A table for one environment's spaces; `logits` (S, A) start it at a given policy (log-probabilities of a prior), else uniform."""
        config = {
            "observation_space": space_to_json(observation_space),
            "action_space": space_to_json(action_space),
            "num_costs": int(num_costs),
            "critic": bool(critic),
            "dtype": dtype,
        }
        agent = cls(config, None if logits is None else torch.as_tensor(logits))
        agent.to(device)
        return agent

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> TabularAgent:
        return cls(config)

    def observe(self, observation: Any, update: bool | np.ndarray = False) -> Tensor:
        """Batched raw observations (n,) or (n, k) as state numbers (n,) int64; there is nothing to normalise."""
        raw = np.asarray(observation).astype(np.int64) - self.observation_space.start  # type: ignore[attr-defined]
        if isinstance(self.observation_space, spaces.MultiDiscrete):
            raw = np.ravel_multi_index(tuple(np.moveaxis(raw, -1, 0)), tuple(self.observation_space.nvec))
        return torch.from_numpy(np.array(raw, dtype=np.int64)).to(self.device)

    @torch.no_grad()
    def act(
        self, obs: Any, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        dist = Categorical(self.net["policy"](obs))
        action = dist.mode() if deterministic else dist.sample(generator)
        return action, dist.log_prob(action)

    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        wanted = check_want(want, self.critic is not None)
        state: Tensor = rollout.obs  # type: ignore[assignment]
        logits: Tensor = self.net["policy"].table  # type: ignore[assignment]
        out = Evaluation()
        if "logp" in wanted:
            # Normalising the table once is cheaper than normalising a row for each of the (usually many more) decisions.
            flat = torch.log_softmax(logits, -1).reshape(-1)
            index = state * logits.shape[1] + rollout.action
            out.logp = flat.index_select(0, index.reshape(-1)).reshape(index.shape)
        if wanted & {"entropy", "dist", "hidden"}:
            rows = self.net["policy"](state)
            dist = Categorical(rows)
            out.dist = dist if "dist" in wanted else None
            out.entropy = dist.entropy() if "entropy" in wanted else None
            out.hidden = rows if "hidden" in wanted else None
        if "value" in wanted:
            out.value = self.net["critic"](state)
        return out

    def env_action(self, action: Tensor) -> np.ndarray:
        return action.detach().cpu().numpy() + self.action_space.start  # type: ignore[attr-defined]
