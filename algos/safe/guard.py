"""Adaptive chance-constrained safeguards while learning: networks that say how safe a state and an action are, and a shield made of them.

    psi      V_s(s), probability that the episode stays within its limit        advantage  A_s(s, a) = E[psi(s')] - psi(s)
    executed (B, T, d)  actions in [-1, 1] as the environment got them           ended      (B, T) the episode ended with this step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.func import functional_call

from markovia.agents.control import batch_obs
from markovia.agents.critics import QEnsemble
from markovia.agents.networks import Trunk, ValueNet
from markovia.agents.records import Obs, Rollout, joined, map_obs
from markovia.algos.compiled import Compiled
from markovia.algos.optimizer import Optimizer, Rule
from markovia.algos.safe.constraint import Constraint
from markovia.algos.safe.shield import correct, least_advantage
from markovia.algos.streams import stream_seed
from markovia.algos.trainer import part


class Steps(NamedTuple):
    """Observations, executed actions (n, d), environments (n,), labels (n,), and which steps (n,) are the last of their episode."""

    obs: Obs
    action: Tensor
    row: Tensor
    label: Tensor
    last: Tensor

    def at(self, index: Tensor | slice) -> Steps:
        """The steps that a mask, an index or a slice names."""
        return Steps(map_obs(self.obs, lambda x: x[index]), *(x[index] for x in self[1:]))


def together(parts: Sequence[Steps]) -> Steps:
    """One behind the other."""
    return Steps(*(joined(column) for column in zip(*parts, strict=True)))


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
        for end in (np.flatnonzero(ended[b]) + 1).tolist():
            labels[b, begin:end] = float((after[b] + cost[b, begin:end].sum(0) <= limit).all())
            after[b], begin = 0.0, end
        after[b] += cost[b, begin:].sum(0)
    return labels, after


def safety_gains(psi: Tensor, label: Tensor, last: Tensor) -> Tensor:
    """V_s(s_{t+1}) - V_s(s_t) of steps in order, all (n,), with the label of an episode behind its last step: what A_s(s_t, a_t) is fitted to.

    The released code takes the sum of all changes to the end instead, label - V_s(s_t): where V_s is right the same mean, with the noise of a whole
    episode.                                                                                                            [arXiv 2310.03379]
    """
    return torch.where(last, label, psi.roll(-1)) - psi


class Guard:
    """V_s and A_s of a run with `Constraint.shield`, fitted to finished episodes; `act` moves actions on their way to the environment.

    Both learn from the newest `ChanceShield.memory` steps: the episodes of one batch are often all safe or all unsafe, which tells no state or action
    from another. The record keeps the actions that were proposed: to the policy the guard is part of the environment. Raises ValueError for agents
    whose actions are no bounded Box of floats.
    """

    def __init__(self, constraint: Constraint, agent: Any, seed: int, compile: bool = False) -> None:
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
        self._weights = dict(self.net["advantage"].named_parameters())
        self._compiled = Compiled(self._moved, static=len(self._weights)) if compile else None
        self.iteration = 0
        self.memory: Steps | None = None
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
        leaves = list(seen.values()) if isinstance(seen, dict) else [seen]
        self._keys = tuple(seen) if isinstance(seen, dict) else ()
        values = [*self._weights.values(), action, bound, *leaves]
        if self._compiled is None:
            moved, intervened = self._moved(*values)
        else:
            moved, intervened = self._compiled((self._keys, *(x.shape for x in values)), values)
        self.asked, self.moved = self.asked + len(unit), self.moved + int(intervened.sum())
        out = np.where(intervened.cpu().numpy()[:, None], moved.cpu().numpy(), unit)
        world = self.low + 0.5 * (out.reshape(shape) + 1.0) * (self.high - self.low)
        kept = intervened.cpu().numpy().reshape(-1, *[1] * (len(shape) - 1))
        return np.where(kept, world, env_action).astype(env_action.dtype), out

    def learn(self, rollout: Rollout, generator: torch.Generator) -> dict[str, float]:
        """Fit both networks to the episodes that the record finishes; share of the actions moved while it was collected, and mean label.

        V_s learns the labels, A_s `safety_gains`.                                                                        [arXiv 2310.03379]
        """
        assert rollout.cost is not None
        executed, ended = rollout.columns.pop("executed"), rollout.columns.pop("ended").cpu().numpy()
        cost = rollout.cost.double().cpu().numpy()
        running = np.zeros((cost.shape[0], cost.shape[2])) if self.running is None else self.running
        labels, self.running = safe_labels(cost, ended, running, self.limit)
        self.iteration += 1
        out = {"shielded": self.moved / max(1, self.asked), "epsilon": self.epsilon}
        self.asked = self.moved = 0
        new = self._finished(rollout, executed, torch.from_numpy(labels), torch.from_numpy(ended))
        count = len(new.label)
        if count == 0:
            return out
        steps = new if self.memory is None else together([self.memory, new])
        steps = self.memory = steps.at(slice(-max(count, self.shield.memory), None))
        obs, action, label = steps.obs, steps.action, steps.label
        self._fit("value", self.shield.epochs, count, len(label), generator, lambda i: (self.psi(map_obs(obs, lambda x: x[i])) - label[i]).square())
        with torch.no_grad():
            gain = safety_gains(self.psi(obs), label, steps.last)

        def error(i: Tensor) -> Tensor:
            difference: Tensor = self.net["advantage"](map_obs(obs, lambda x: x[i]), action[i])[0] - gain[i]
            return difference.square()

        self._fit("advantage", 2 * self.shield.epochs, count, len(label), generator, error)
        return {**out, "safe": float(new.label.mean())}

    def _moved(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Corrected actions and which of them were moved, from the weights of A_s, actions, bounds and observations."""
        n = len(self._weights)
        weights, (action, bound, *leaves) = dict(zip(self._weights, values, strict=False)), values[n:]
        seen: Obs = dict(zip(self._keys, leaves, strict=True)) if self._keys else leaves[0]
        advantage: Callable[[Tensor], Tensor] = lambda a: functional_call(self.net["advantage"], weights, (seen, a))[0]  # noqa: E731
        found = correct(action, advantage, bound, step=self.shield.step, iterations=self.shield.iterations, stop=self._compiled is None)
        return found.action, found.intervened

    def _finished(self, rollout: Rollout, executed: Tensor, labels: Tensor, ended: Tensor) -> Steps:
        """The steps of all episodes that end in the record, from their first on, in order; those of the others stay open."""
        valid, dtype = rollout.valid, next(self.net.parameters()).dtype
        labels, ended = labels.to(valid.device, dtype), ended.to(valid.device)
        rows = torch.arange(len(labels), device=valid.device)[:, None].expand(labels.shape)
        seen = Steps(map_obs(rollout.obs, lambda x: x[valid]), executed[valid].to(dtype), rows[valid], labels[valid], ended[valid])
        if self.open is not None:
            # The first episode to end in a row is the one that was under way.
            seen = together([self.open._replace(label=labels[self.open.row, 0]), seen])
            seen = seen.at(torch.argsort(seen.row, stable=True))
        known = ~seen.label.isnan()
        self.open = seen.at(~known)
        return seen.at(known)

    def _fit(self, name: str, epochs: int, batch: int, count: int, generator: torch.Generator, loss: Callable[[Tensor], Tensor]) -> None:
        """Adam steps over `epochs` times `batch` of `count` steps, without replacement within a pass."""
        optimizer = self.optimizers[name]
        for _ in range(epochs):
            for index in torch.randperm(count, generator=generator)[:batch].split(self.shield.minibatch):
                optimizer.zero_grad()
                loss(index.to(self.agent.device)).mean().backward()
                optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Networks, optimisers and memory, and the iteration; episodes begin anew at a checkpoint."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state().items()}
        if self.memory is not None:
            obs, *columns = self.memory
            tensors |= {f"memory.obs.{k}": v for k, v in (obs.items() if isinstance(obs, dict) else [("", obs)])}
            tensors |= {f"memory.{name}": v for name, v in zip(Steps._fields[1:], columns, strict=True)}
        return tensors, self.iteration

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Put `state()` back."""
        self.net.load_state_dict(part(tensors, "net."))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state(part(tensors, f"optimizer.{name}."))
        self.iteration = iteration
        memory = {k: v.to(self.agent.device) for k, v in part(tensors, "memory.").items()}
        obs = part(memory, "obs.")
        self.memory = Steps(obs.get("", obs), *(memory[name] for name in Steps._fields[1:])) if memory else None


class Guarded:
    """The agent behind its guard: `predict` moves actions as they were moved in training, for evaluation and for use."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        """Stable-Baselines3's signature, like `Agent.predict`."""
        agent = self.guard.agent
        batch, single = batch_obs(observation, agent.observation_space)
        action, state = agent.predict(batch, state, episode_start, deterministic)
        moved, _ = self.guard.act(agent.observe(batch), action)
        return (moved[0] if single else moved), state
