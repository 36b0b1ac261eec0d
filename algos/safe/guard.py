"""Adaptive chance-constrained safeguards while learning: networks that say how safe a state and an action are, and a shield made of them.

    psi      V_s(s), probability that the episode stays within its limit        advantage  A_s(s, a) = E[psi(s')] - psi(s)
    executed (B, T, d)  actions in [-1, 1] as the environment got them           ended      (B, T) the episode ended with this step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.critics import QEnsemble
from markovia.agents.networks import Trunk, ValueNet
from markovia.agents.records import Obs, Rollout, joined, map_obs
from markovia.algos.optimizer import Optimizer, Rule
from markovia.algos.safe.constraint import Constraint
from markovia.algos.safe.shield import correct, least_advantage
from markovia.algos.streams import stream_seed
from markovia.algos.trainer import part


class Steps(NamedTuple):
    """Observations, executed actions (n, d) and the environments (n,) of some steps."""

    obs: Obs
    action: Tensor
    row: Tensor

    def where(self, mask: Tensor) -> Steps:
        """The steps that `mask` (n,) names."""
        return Steps(map_obs(self.obs, lambda x: x[mask]), self.action[mask], self.row[mask])


def safe_labels(cost: np.ndarray, ended: np.ndarray, running: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 for the steps of an episode whose whole cost stays at or below the limit, 0 for one over it, nan where its end is not in the record (B, T).

    cost (B, T, m), `running` (B, m) what the episodes under way had cost before; also returns what they have cost after the record. An episode that
    is over its limit has no label before its end either: if bad ones were told sooner, most labels of a record without ends would be 0.
                                                                                                                        [arXiv 2310.03379]
    """
    B, T, _ = cost.shape
    labels, after = np.full((B, T), np.nan), np.array(running, dtype=np.float64)
    for b in range(B):
        begin = 0
        for end in np.flatnonzero(ended[b]) + 1:
            labels[b, begin:end] = float((after[b] + cost[b, begin:end].sum(0) <= limit).all())
            after[b], begin = 0.0, end
        after[b] += cost[b, begin:].sum(0)
    return labels, after


class Guard:
    """V_s and A_s of a run with `Constraint.shield`, fitted to finished episodes; `act` moves actions on their way to the environment.

    The record keeps the actions that were proposed: to the policy the guard is part of the environment. Raises ValueError for agents whose actions
    are no bounded Box of floats.
    """

    def __init__(self, constraint: Constraint, agent: Any, seed: int) -> None:
        shield, box = constraint.shield, getattr(agent, "action_space", None)
        assert shield is not None
        if not (agent.kind == "control" and isinstance(box, spaces.Box)):
            raise ValueError(f"a shield moves actions along a gradient, so it needs a Box of actions, got {box}; use shield=None")
        self.shield, self.limit, self.agent = shield, constraint.limits, agent
        self.low, self.high = box.low.astype(np.float64), box.high.astype(np.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "init-guard"))
            value = ValueNet(Trunk(agent.observation_space, shield.hidden, "tanh"))
            advantage = QEnsemble(agent.observation_space, int(np.prod(box.shape)), 1, shield.hidden, "tanh")
        self.net = nn.ModuleDict({"value": value, "advantage": advantage}).to(agent.device)
        self.optimizers = {name: Optimizer([(list(net.parameters()), shield.lr)], Rule(eps=1e-8), np.inf) for name, net in self.net.items()}
        self.iteration = 0
        self.restart()

    def restart(self) -> None:
        """The environments begin new episodes."""
        self.running: np.ndarray | None = None
        self.open: Steps | None = None
        self.asked = self.moved = 0

    @property
    def epsilon(self) -> float:
        """Tolerated chance of an unsafe episode now; above 1 nothing is moved."""
        return max(self.shield.epsilon, self.shield.epsilon_first - self.shield.epsilon_fall * self.iteration)

    def psi(self, obs: Obs) -> Tensor:
        """(n,) in (0, 1)."""
        out: Tensor = self.net["value"](obs)[..., 0].sigmoid()
        return out

    def act(self, obs: Any, env_action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions (n, ...) for the environment, moved where they spend too much of the state's safety, and the same in [-1, 1]."""
        shape = env_action.shape
        unit = (2.0 * (env_action - self.low) / (self.high - self.low) - 1.0).reshape(len(env_action), -1)
        if self.epsilon > 1.0:
            return env_action, unit
        seen = map_obs(obs, lambda x: torch.as_tensor(x).to(self.agent.device))
        action = torch.as_tensor(unit, dtype=next(self.net.parameters()).dtype, device=self.agent.device)
        with torch.no_grad():
            bound = least_advantage(self.psi(seen), alpha=self.shield.alpha, epsilon=self.epsilon)
        advantage: Callable[[Tensor], Tensor] = lambda a: self.net["advantage"](seen, a)[0]  # noqa: E731
        found = correct(action, advantage, bound, step=self.shield.step, iterations=self.shield.iterations)
        self.asked, self.moved = self.asked + len(unit), self.moved + int(found.intervened.sum())
        out = np.where(found.intervened.cpu().numpy()[:, None], found.action.cpu().numpy(), unit)
        world = self.low + 0.5 * (out.reshape(shape) + 1.0) * (self.high - self.low)
        kept = found.intervened.cpu().numpy().reshape(-1, *[1] * (len(shape) - 1))
        return np.where(kept, world, env_action).astype(env_action.dtype), out

    def learn(self, rollout: Rollout, generator: torch.Generator) -> dict[str, float]:
        """Fit both networks to the episodes that the record finishes; share of the actions moved while it was collected, and mean label.

        A_s is fitted to label - V_s(s), the sum of the one-step errors of a safety value that is paid at the end.        [arXiv 2310.03379]
        """
        assert rollout.cost is not None
        executed, ended = rollout.columns.pop("executed"), rollout.columns.pop("ended").cpu().numpy()
        cost = rollout.cost.double().cpu().numpy()
        running = np.zeros((cost.shape[0], cost.shape[2])) if self.running is None else self.running
        labels, self.running = safe_labels(cost, ended, running, self.limit)
        self.iteration += 1
        out = {"shielded": self.moved / max(1, self.asked), "epsilon": self.epsilon}
        self.asked = self.moved = 0
        steps, label = self._finished(rollout, executed, torch.from_numpy(labels))
        if not len(label):
            return out
        obs, action = steps.obs, steps.action
        self._fit("value", self.shield.epochs, len(label), generator, lambda i: (self.psi(map_obs(obs, lambda x: x[i])) - label[i]).square())
        with torch.no_grad():
            gain = label - self.psi(obs)

        def error(i: Tensor) -> Tensor:
            difference: Tensor = self.net["advantage"](map_obs(obs, lambda x: x[i]), action[i])[0] - gain[i]
            return difference.square()

        self._fit("advantage", 2 * self.shield.epochs, len(label), generator, error)
        return {**out, "safe": float(label.mean())}

    def _finished(self, rollout: Rollout, executed: Tensor, labels: Tensor) -> tuple[Steps, Tensor]:
        """The steps of all episodes that end in the record, from their first on, and their labels (n,); those of the others stay open."""
        dtype, device = next(self.net.parameters()).dtype, rollout.valid.device
        labels, rows = labels.to(device, dtype), torch.arange(len(labels), device=device)[:, None].expand(labels.shape)
        seen = Steps(map_obs(rollout.obs, lambda x: x[rollout.valid]), executed[rollout.valid].to(dtype), rows[rollout.valid])
        label = labels[rollout.valid]
        if self.open is not None:
            label = torch.cat([labels[self.open.row, 0], label])  # the first episode to end in a row is the one that was under way
            seen = Steps(*(joined(pair) for pair in zip(self.open, seen, strict=True)))
        known = ~label.isnan()
        self.open = seen.where(~known)
        return seen.where(known), label[known]

    def _fit(self, name: str, epochs: int, count: int, generator: torch.Generator, loss: Callable[[Tensor], Tensor]) -> None:
        optimizer = self.optimizers[name]
        for _ in range(epochs):
            for index in torch.randperm(count, generator=generator).split(self.shield.minibatch):
                optimizer.zero_grad()
                loss(index.to(self.agent.device)).mean().backward()
                optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Networks and optimisers, and the iteration; episodes begin anew at a checkpoint."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state().items()}
        return tensors, self.iteration

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Put `state()` back."""
        self.net.load_state_dict(part(tensors, "net."))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state(part(tensors, f"optimizer.{name}."))
        self.iteration = iteration
