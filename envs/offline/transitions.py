"""Logged decisions as flat rows (s, a, r, s', a', ...), in numpy: the one place that decides terminations, truncations, a' and returns.

Names, everywhere in this folder:
    obs, next_obs   (N, ...) or one such array per key       terminated  (N,) bool: no reward can follow, targets do not bootstrap
    action          (N, ...)                                  truncated   (N,) bool: cut from outside, targets do bootstrap
    reward          (N,) floating point, in the task's unit                   episode     (N,) int64: true episode, ascending
A step that is both terminated and truncated counts as terminated. An episode that ends with neither is cut: the file ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import gymnasium as gym
    from gymnasium.envs.registration import EnvSpec

    from markovia.envs.offline.scores import Reference

Obs = np.ndarray | dict[str, np.ndarray]


def map_obs(obs: Obs, fn: Callable[[np.ndarray], np.ndarray]) -> Obs:
    """Apply `fn` to the array, or to every array of the dictionary."""
    return {k: fn(v) for k, v in obs.items()} if isinstance(obs, dict) else fn(obs)


def columns(obs: Obs, name: str = "obs") -> dict[str, np.ndarray]:
    """{"obs": array}, or {"obs/key": array} per key."""
    return {f"{name}/{k}": v for k, v in obs.items()} if isinstance(obs, dict) else {name: obs}


def space_columns(space: Any) -> dict[str, Any]:
    """The parts of an observation space under the names that `columns` gives their arrays."""
    from gymnasium import spaces

    return {f"obs/{k}": s for k, s in space.spaces.items()} if isinstance(space, spaces.Dict) else {"obs": space}


def pick(parts: Mapping[str, Any], keys: Sequence[str], name: str) -> dict[str, Any]:
    """The entries of `keys`, in their order. Raises ValueError for an unknown key, with the known ones."""
    unknown = [k for k in keys if k not in parts]
    if unknown or not keys:
        raise ValueError(f"{name} has no observation key {unknown[:1]}; it has {', '.join(parts)}")
    return {k: parts[k] for k in keys}


@dataclass(frozen=True)
class About:
    """Where rows come from and what they belong to; unknown parts are None."""

    name: str  # dataset id, file or fixture
    env_id: str | None = None
    horizon: int | None = None  # time limit of an episode, steps
    observation_space: gym.Space | None = None
    action_space: gym.Space | None = None
    env_spec: EnvSpec | None = None
    reference: Reference | None = None  # returns that count as 0 and 100
    metadata: dict[str, Any] = field(default_factory=dict)  # plain JSON of the file
    declared: bool = False  # the source says its action space; without it (D4RL) the space is guessed from the rows


@dataclass(frozen=True, eq=False)
class Transitions:
    """N logged decisions. Build it with whole episodes in order; `rows` and `view` cut it afterwards.

    next_action      (N, ...) the action logged one step later in the same episode; the row's own action where there is none
    has_next_action  (N,) bool: next_action is a logged one
    next_known       (N,) bool: next_obs is the true successor (a flat file does not hold it where an episode was truncated)
    Dictionary observations come in the order of the keys of `about.observation_space`, where that is a Dict of the same keys.
    Raises ValueError, naming the column, when lengths or the keys of obs and next_obs differ, or there is no row.
    """

    obs: Obs
    action: np.ndarray
    reward: np.ndarray
    next_obs: Obs
    terminated: np.ndarray
    truncated: np.ndarray
    episode: np.ndarray
    next_action: np.ndarray = None  # type: ignore[assignment]  # derived where it is not given, like the two below
    has_next_action: np.ndarray = None  # type: ignore[assignment]
    next_known: np.ndarray = None  # type: ignore[assignment]
    about: About = field(default_factory=lambda: About("unnamed"))

    def __post_init__(self) -> None:
        n = len(self.reward)
        if n == 0:
            raise ValueError(f"{self.about.name} holds no transitions; at least one is needed")
        for name, value in {**columns(self.obs), **columns(self.next_obs, "next_obs"), **self._flat()}.items():
            if len(value) != n:
                raise ValueError(f"{self.about.name}: {name} has {len(value)} rows, but reward has {n}; every column needs one row per decision")
        self._order_keys()
        for name in ("terminated", "truncated", "has_next_action", "next_known"):  # integers would choose rows where a mask is meant
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=bool))
        # Rewards are scaled and shifted: integers would wrap or lose what is behind the point.
        object.__setattr__(self, "reward", np.asarray(self.reward, dtype=np.result_type(self.reward, np.float32)))
        same = np.append(self.episode[1:] == self.episode[:-1], False)
        if self.next_action is None:
            after = np.minimum(np.arange(n) + 1, n - 1)
            object.__setattr__(self, "next_action", self.action[np.where(same, after, np.arange(n))])
            object.__setattr__(self, "has_next_action", same)
        if self.next_known is None:
            object.__setattr__(self, "next_known", np.ones(n, dtype=bool))
        object.__setattr__(self, "truncated", self.truncated & ~self.terminated)

    def _order_keys(self) -> None:
        """Both dictionaries in the order of the observation space, so that the rows' flat form is that of the environment."""
        if columns(self.obs).keys() != columns(self.next_obs).keys():
            raise ValueError(f"{self.about.name}: obs has the columns {list(columns(self.obs))}, but next_obs {list(columns(self.next_obs))}")
        if isinstance(self.obs, dict):
            parts = getattr(self.about.observation_space, "spaces", None)
            order = list(parts if isinstance(parts, dict) and parts.keys() == self.obs.keys() else self.obs)
            for name in ("obs", "next_obs"):
                object.__setattr__(self, name, pick(getattr(self, name), order, self.about.name))

    def _flat(self) -> dict[str, np.ndarray]:
        """Every column but the observations."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("obs", "next_obs", "about")}
        return {k: v for k, v in named.items() if v is not None}

    def __len__(self) -> int:
        return len(self.reward)

    # -- episodes -----------------------------------------------------------------------------------------------------------------

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(E,) first row and (E,) row after the last of every episode."""
        first = np.flatnonzero(np.append(True, self.episode[1:] != self.episode[:-1]))
        return first, np.append(first[1:], len(self))

    @property
    def num_episodes(self) -> int:
        return len(self.bounds()[0])

    def returns(self, gamma: float = 1.0) -> np.ndarray:
        """(E,) sum_t gamma^t r_t of every episode, float64."""
        first, end = self.bounds()
        steps = np.arange(len(self)) - np.repeat(first, end - first)
        return np.add.reduceat(self.reward.astype(np.float64) * gamma**steps, first)

    def lengths(self) -> np.ndarray:
        """(E,) decisions of every episode."""
        first, end = self.bounds()
        return end - first

    def complete(self) -> np.ndarray:
        """(E,) bool: the episode ended by itself or by its time limit, and was not cut by the end of a file."""
        last = self.bounds()[1] - 1
        return self.terminated[last] | self.truncated[last]

    def returns_to_go(self, gamma: float, *, cut: Literal["zero", "repeat_last"]) -> np.ndarray:
        """(N,) G_t = r_t + gamma G_{t+1} within the true episode, float64; after a termination G is 0.

        After a truncated or cut episode nothing is known: cut="zero" counts 0, cut="repeat_last" the last reward for ever, r_T / (1 - gamma).
        With sparse rewards the latter gives r_fail / (1 - gamma) in every step of an episode that never succeeds [Nakamoto 2023; arXiv 2303.05479].
        Raises ValueError for "repeat_last" with gamma = 1.
        """
        from scipy.signal import lfilter  # heavy, and needed by few

        if cut not in ("zero", "repeat_last"):
            raise ValueError(f"cut must be 'zero' or 'repeat_last', got {cut!r}")
        if cut == "repeat_last" and not gamma < 1:
            raise ValueError(f"cut='repeat_last' needs gamma < 1, got {gamma}; the sum of endless rewards has no value otherwise")
        reward, out = self.reward.astype(np.float64), np.empty(len(self))
        for first, end in zip(*self.bounds(), strict=True):
            after = 0.0 if cut == "zero" or self.terminated[end - 1] else reward[end - 1] / (1 - gamma)
            # G backwards in time is the recursive filter y_k = x_k + gamma y_{k-1}, started at G after the last step.
            out[first:end] = lfilter([1.0], [1.0, -gamma], reward[first:end][::-1], zi=[gamma * after])[0][::-1]
        return out

    # -- parts --------------------------------------------------------------------------------------------------------------------

    def rows(self, index: np.ndarray) -> Transitions:
        """The rows of an index array or bool mask, next actions kept as they were logged."""
        take = lambda x: x[index]  # noqa: E731
        flat = {k: take(v) for k, v in self._flat().items()}
        return replace(self, obs=map_obs(self.obs, take), next_obs=map_obs(self.next_obs, take), **flat)

    def episodes(self, keep: np.ndarray) -> Transitions:
        """The episodes of a mask (E,) or of indices, in logged order."""
        chosen = np.zeros(self.num_episodes, dtype=bool)
        chosen[keep] = True
        return self.rows(np.repeat(chosen, self.lengths()))

    def whole(self) -> Transitions:
        """The complete episodes, or all where none is: what a file's end cut short has no return to judge it by."""
        keep = self.complete()
        return self if keep.all() or not keep.any() else self.episodes(keep)

    def best(self, fraction: float, gamma: float = 1.0) -> Transitions:
        """The ceil(fraction E) episodes of largest return, at least one, by true episode ids        [10 % BC; Chen 2021, arXiv 2106.01345].

        An episode that was cut comes after all that are complete: the return of its part is no return of an episode.
        Raises ValueError for a fraction outside (0, 1].
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction}; 0.1 keeps the best tenth of the episodes")
        count = max(1, int(np.ceil(fraction * self.num_episodes - 1e-9)))  # 0.07 * 100 is a little more than 7
        return self.episodes(np.lexsort((-self.returns(gamma), ~self.complete()))[:count])

    def view(self, compat: Literal["minari", "d4rl"] = "minari", next_action: bool = False) -> Transitions:
        """The rows that temporal-difference learning may use: those with a true successor, or terminated ones, which need none.

        compat "d4rl" also drops the last row of every truncated episode, as D4RL's own view does: N - #timeouts rows.
        (D4RL drops the file's last row too, even where it is a termination; this does not.)
        next_action=True drops rows that are not terminated and have no next logged action (SARSA critics, ReBRAC).
        """
        if compat not in ("minari", "d4rl"):
            raise ValueError(f"compat must be 'minari' or 'd4rl', got {compat!r}")
        keep = self.terminated | self.next_known
        if compat == "d4rl":
            keep &= ~self.truncated
        if next_action:
            keep &= self.terminated | self.has_next_action
        return self if keep.all() else self.rows(keep)

    def flat_obs(self, keys: Sequence[str] | None = None) -> Transitions:
        """Dictionary observations as one (N, d) array of the keys in the given order (default: all, in their own).

        Raises ValueError for an unknown key, with the known ones.
        """
        if not isinstance(self.obs, dict):
            return self
        chosen = list(self.obs) if keys is None else list(keys)
        join = lambda obs: np.concatenate([v.reshape(len(self), -1) for v in pick(obs, chosen, self.about.name).values()], axis=1)  # noqa: E731
        obs = join(self.obs)
        return replace(self, obs=obs, next_obs=join(self.next_obs), about=replace(self.about, observation_space=box_like(obs)))


def box_like(obs: np.ndarray) -> gym.Space:
    """A Box of the rows' shape and type: 0 to 255 for bytes, else unbounded."""
    from gymnasium import spaces

    if obs.dtype == np.uint8:
        return spaces.Box(0, 255, obs.shape[1:], np.uint8)
    return spaces.Box(-np.inf, np.inf, obs.shape[1:], obs.dtype.type)


def concatenate(parts: Sequence[Transitions], name: str | None = None) -> Transitions:
    """All rows after each other, episodes numbered anew; `about` is that of the first part, under `name`.

    Raises ValueError when there is no part or the columns of two do not fit.
    """
    if not parts:
        raise ValueError("concatenate needs at least one part")
    head, offset, episode = parts[0], 0, []
    for part in parts:
        new = np.cumsum(np.append(0, part.episode[1:] != part.episode[:-1]))
        episode.append(new + offset)
        offset += int(new[-1]) + 1
        if columns(part.obs).keys() != columns(head.obs).keys() or part.action.shape[1:] != head.action.shape[1:]:
            raise ValueError(f"{part.about.name} has other observations or actions than {head.about.name}; only data of one task can be joined")
    join = lambda values: np.concatenate(list(values))  # noqa: E731

    def joined(name: str) -> Obs:
        first = getattr(head, name)
        if isinstance(first, dict):
            return {k: join(getattr(p, name)[k] for p in parts) for k in first}
        return join(getattr(p, name) for p in parts)

    flat = {k: join(getattr(p, k) for p in parts) for k in head._flat() if k != "episode"}
    about = head.about if name is None else replace(head.about, name=name)
    return Transitions(obs=joined("obs"), next_obs=joined("next_obs"), episode=join(episode), about=about, **flat)
