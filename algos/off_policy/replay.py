"""Single steps as tensors, and the replay buffer: allocated once, rows drawn by an index tensor of a seeded generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from markovia.agents.records import Obs, map_obs


@dataclass
class Batch:
    """n single steps, in any order. The end of an episode is told twice: only `continuation` enters targets, `truncated` is kept for the record."""

    obs: Obs  # (n, ...) as the networks see it
    action: Tensor  # (n, d) in [-1, 1]
    reward: Tensor  # (n,)
    next_obs: Obs  # (n, ...) what followed this step; at an episode's end its final observation, never the next episode's first
    continuation: Tensor  # (n,) in [0, 1], 1 - terminated
    truncated: Tensor  # (n,) bool: outside interruption after this step
    extra: dict[str, Tensor] = field(default_factory=dict)  # columns (n, ...) that some data have: "next_action" in [-1, 1], "ret"

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """The same with `fn` applied to every tensor."""
        return Batch(
            map_obs(self.obs, fn), fn(self.action), fn(self.reward), map_obs(self.next_obs, fn), fn(self.continuation), fn(self.truncated),
            {k: fn(v) for k, v in self.extra.items()},
        )  # fmt: skip

    def named(self) -> dict[str, Tensor]:
        """Every tensor by name, those of an observation dictionary as "obs.key"."""
        out: dict[str, Tensor] = {k: getattr(self, k) for k in ("action", "reward", "continuation", "truncated")}
        for name in ("obs", "next_obs"):
            obs = getattr(self, name)
            out |= {f"{name}.{k}": v for k, v in obs.items()} if isinstance(obs, dict) else {name: obs}
        return out | {f"extra.{k}": v for k, v in self.extra.items()}

    @staticmethod
    def from_named(tensors: dict[str, Tensor]) -> Batch:
        """What `named` gave."""

        def obs(name: str) -> Obs:
            return tensors[name] if name in tensors else {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}.")}

        plain = {k: tensors[k] for k in ("action", "reward", "continuation", "truncated")}
        extra = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
        return Batch(obs=obs("obs"), next_obs=obs("next_obs"), extra=extra, **plain)


class Replay:
    """The last `capacity` transitions, on the device of the first ones. Raises ValueError when sampled while empty."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a replay needs room for at least 1 transition, got {capacity}")
        self.capacity, self.size, self.cursor = capacity, 0, 0
        self.store: Batch | None = None

    def add(self, rows: Batch) -> None:
        """Put n <= capacity rows in the place of the oldest."""
        n = rows.reward.shape[0]
        if n > self.capacity:
            raise ValueError(f"{n} transitions at once do not fit into a replay of {self.capacity}; raise replay_size")
        if self.store is None:  # memory is taken by the operating system only as rows are written
            self.store = rows.map(lambda x: x.new_empty((self.capacity, *x.shape[1:])))
        place = (torch.arange(n, device=rows.reward.device) + self.cursor) % self.capacity
        kept, new = self.store.named(), rows.named()
        for name, x in kept.items():
            x[place] = new[name]
        self.cursor = (self.cursor + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """`size` rows drawn uniformly with replacement; the generator lives on the CPU."""
        if self.store is None:
            raise ValueError("the replay is empty; collect transitions before the first update (learning_starts)")
        index = torch.randint(self.size, (size,), generator=generator).to(self.store.reward.device)
        return self.store.map(lambda x: x.index_select(0, index))  # rows are copied whole, several times faster than by x[index]

    def state(self) -> dict[str, Tensor]:
        """The rows that were written, and the place of the next one. Nothing is copied here."""
        rows = {} if self.store is None else self.store.map(lambda x: x[: self.size]).named()
        return {**rows, "cursor": torch.tensor(self.cursor)}

    def load_state(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Put `state()` back, also of a smaller replay. Rows of more than the capacity raise ValueError."""
        self.store, self.size, self.cursor = None, 0, 0
        rows, cursor = {k: v.to(device) for k, v in state.items() if k != "cursor"}, int(state["cursor"])
        size = len(rows["reward"]) if rows else 0
        if cursor < size < self.capacity:  # it was full; with its oldest row first, a larger one can go on behind its newest
            rows, cursor = {k: v.roll(-cursor, 0) for k, v in rows.items()}, size
        if rows:
            self.add(Batch.from_named(rows))
        self.cursor = cursor % self.capacity
