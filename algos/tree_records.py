"""The enumerable token-MDP as a source of records: prompts are trees, responses are drawn or listed whole, and expectations of a loss are sums.

A tabular agent holds all trees: the prefix i of tree k is its state offset_k + i. In float64 the expected gradient of any method's loss is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.agents.tabular import TabularAgent
from markovia.algos.collect import Stateless
from markovia.algos.on_policy.loss import policy_loss, weights
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.prepare import fill
from markovia.envs.exact.token_mdp import EnumerableTokenMDP


class TreeCollector(Stateless):
    """Responses to prompts that are trees of equal vocabulary and horizon; `num_rows` a batch, `group_size` to each prompt drawn.

    `columns` holds one entry per tree for what a task would tell (e.g. a length budget). Prompts are drawn without replacement until all were.
    Raises ValueError for trees of different shapes and a group size that does not divide the rows.
    """

    def __init__(
        self, trees: Sequence[EnumerableTokenMDP], num_rows: int, group_size: int = 1, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        if len({(t.V, t.H) for t in trees}) != 1:
            raise ValueError(f"trees of one collector must share V and H, got {sorted({(t.V, t.H) for t in trees})}")
        if num_rows < 1 or num_rows % group_size:
            raise ValueError(f"num_rows={num_rows} must be a positive multiple of group_size={group_size}")
        self.trees, self.num_rows, self.group_size, self.columns = list(trees), num_rows, group_size, dict(columns or {})
        self.offset = np.concatenate([[0], np.cumsum([t.num_prefixes for t in trees])])
        self.episodes: list[float] = []
        self.greedy = False
        self.without: frozenset[int] = frozenset()  # trees that are left out
        # All sequences of all trees below each other, so that a record is one indexing.
        self._start = np.concatenate([[0], np.cumsum([t.M for t in trees])])
        self._obs = torch.from_numpy(np.concatenate([t.prefix_index + o for t, o in zip(trees, self.offset[:-1], strict=True)]))
        self._action, self._mask = (torch.from_numpy(np.concatenate([getattr(t, n) for t in trees])) for n in ("tokens", "mask"))
        self._return = torch.from_numpy(np.concatenate([t.R for t in trees]))
        self._text = [" ".join(str(a) for a in row[m]) for t in trees for row, m in zip(t.tokens, t.mask, strict=True)]

    def agent(self, critic: bool = False, logits: np.ndarray | None = None, dtype: str = "float64") -> TabularAgent:
        """A table over all prefixes of all trees, at the references or at `logits` (states, V)."""
        table = np.concatenate([t.logits_ref for t in self.trees]) if logits is None else logits
        states, actions = spaces.Discrete(int(self.offset[-1])), spaces.Discrete(self.trees[0].V)
        return TabularAgent.from_spaces(states, actions, logits=torch.as_tensor(table), critic=critic, dtype=dtype)

    def table(self, agent: Any, tree: int = 0) -> np.ndarray:
        """Logits (N, V) of one tree under the agent."""
        table: Tensor = agent.net["policy"].table  # type: ignore[assignment]
        return table.detach().double().numpy()[self.offset[tree] : self.offset[tree + 1]]

    @torch.no_grad()
    def collect(self, agent: Any, generator: torch.Generator | None = None) -> Rollout:
        """`num_rows` responses drawn from the agent."""
        count, left = self.num_rows // self.group_size, np.array([k for k in range(len(self.trees)) if k not in self.without])
        rounds = [torch.randperm(len(left), generator=generator) for _ in range(-(-count // len(left)))]
        rollout = self._drawn(agent, left[torch.cat(rounds)[:count].numpy()], self.group_size, generator)
        self.episodes += rollout.returns().tolist()
        return rollout

    @torch.no_grad()
    def presample(self, agent: Any, prompts: int, per_prompt: int, generator: torch.Generator | None = None) -> tuple[Rollout, list[int]]:
        """`per_prompt` responses to each of so many trees (all where there are fewer), and the trees' numbers."""
        chosen = torch.randperm(len(self.trees), generator=generator)[:prompts].numpy()
        return self._drawn(agent, chosen, per_prompt, generator), chosen.tolist()

    def _drawn(self, agent: Any, prompt: np.ndarray, size: int, generator: torch.Generator | None) -> Rollout:
        """The record of `size` responses drawn from the agent to each prompt."""
        drawn = []
        for k in prompt:
            p = np.exp(self.trees[k].sequence_logp(self.table(agent, k)))
            drawn.append(torch.multinomial(torch.from_numpy(p), size, replacement=True, generator=generator).numpy())
        return self.rows(agent, np.concatenate(drawn), prompt.repeat(size), np.arange(len(prompt)).repeat(size))

    @torch.no_grad()
    def rows(self, agent: Any, sequence: np.ndarray, prompt: np.ndarray, group: np.ndarray) -> Rollout:
        """The record of given responses: sequence number, prompt and group of each row (B,)."""
        index = torch.from_numpy(self._start[prompt] + sequence)
        obs, action, valid = self._obs[index], self._action[index], self._mask[index]
        dtype = agent.net["policy"].table.dtype
        last = valid & ~torch.nn.functional.pad(valid[:, 1:], (0, 1), value=False)
        reward = torch.where(last, self._return[index].to(dtype)[:, None], 0.0)
        texts = [self._text[i] for i in index.tolist()]
        rollout = Rollout(
            obs=obs, action=action, logp_old=reward, reward=reward, valid=valid, mask=valid.clone(),
            continuation=(valid & ~last).to(dtype), truncated=torch.zeros_like(valid), group=torch.from_numpy(group),
            outcome={"completion_text": texts, "columns": {name: [v[k] for k in prompt] for name, v in self.columns.items()}},
        )  # fmt: skip
        found = agent.evaluate(rollout, ("logp", "value") if agent.critic is not None else ("logp",))
        rollout.logp_old = torch.where(valid, found.logp, 0.0)
        rollout.value = found.value
        if self.greedy:
            best = {k: self._greedy(agent, k) for k in set(prompt.tolist())}
            rollout.columns["greedy"] = torch.tensor([best[k] for k in prompt], dtype=dtype)[:, None].expand(rollout.shape)
        return rollout

    def _greedy(self, agent: Any, k: int) -> float:
        tree, table = self.trees[k], self.table(agent, k)
        prefix = 0
        while True:
            a = int(table[prefix].argmax())
            if tree.leaf[prefix, a] >= 0:
                return float(tree.R[tree.leaf[prefix, a]])
            prefix = int(tree.child[prefix, a])

    def everything(self, agent: Any, group_size: int = 1, tree: int = 0) -> tuple[Rollout, Tensor]:
        """Every group of responses to one prompt as rows (M^G G), and the probability of each group (M^G,) under the agent."""
        M = self.trees[tree].M
        index = torch.cartesian_prod(*[torch.arange(M)] * group_size).reshape(-1, group_size)
        p = torch.from_numpy(self.trees[tree].sequence_logp(self.table(agent, tree)))[index].sum(1).exp()
        rows = index.reshape(-1).numpy()
        return self.rows(agent, rows, np.full(len(rows), tree), np.arange(len(index)).repeat(group_size)), p


def expected_loss(
    method: OnPolicy,
    agent: Any,
    collector: TreeCollector,
    references: Mapping[str, Agent] | None = None,
    group_size: int = 1,
    beta: float | None = None,
) -> Tensor:
    """The mean over all groups of `group_size` responses of the method's loss on one group; its gradient is the expected one. (E6)

    Groups come from the agent itself; `beta` replaces the weight of the divergence. Methods whose token rules look at a whole minibatch are not
    served: their loss is not one of a group.
    """
    rollout, probability = collector.everything(agent, group_size)
    start = 0.0 if method.divergence is None else method.divergence.beta
    reward = fill(method, agent, references or {}, rollout, start if beta is None else beta, {}, torch.Generator())
    adv, ret = method.advantage(reward, rollout, {})
    rollout.columns["adv"], rollout.columns["ret"] = adv.contiguous(), ret.contiguous()
    mask = rollout.mask
    if method.aggregation == "token-mean":
        count = mask.view(len(probability), -1).sum(1).repeat_interleave(group_size)[:, None]
        omega = mask / count
    else:
        omega = weights(mask, method.aggregation, method.max_length, adv.dtype) * len(probability)
    omega = omega.to(adv) * probability.repeat_interleave(group_size)[:, None].to(adv)
    return policy_loss(method, agent, rollout, omega, torch.tensor(0.0, dtype=adv.dtype), False)[0]
