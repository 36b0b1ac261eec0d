"""The replay buffer and what stepping writes into it: final observations, both kinds of end, wrap-around, saving."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from markovia.agents.control import ControlAgent
from markovia.algos.off_policy.collect import ReplayCollector
from markovia.algos.off_policy.replay import Batch, Replay
from markovia.algos.off_policy.slots import Squashed

torch.set_num_threads(1)


def rows(n: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    ends = torch.arange(n) % 3 == 0
    obs, next_obs = torch.randn(2, n, 3, generator=g)
    return Batch(obs, torch.rand(n, 2, generator=g), torch.randn(n, generator=g), next_obs, 1.0 - ends.float(), ~ends)


class Count(gym.Env):
    """Observation 10 x episode + step; an episode is 3 steps long, odd ones terminate and even ones are truncated."""

    def __init__(self, reward: float = 1.0, bound: float = 1.0) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-bound, bound, (1,), np.float32)
        self.episode, self.reward = -1, reward

    def _obs(self) -> np.ndarray:
        return np.array([10 * self.episode + self.t], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.action = action
        over = self.t == 3
        return self._obs(), self.reward * float(action[0]), over and self.episode % 2 == 1, over and self.episode % 2 == 0, {}


def counting(mode: AutoresetMode, **kwargs: Any) -> tuple[ReplayCollector, ControlAgent]:
    venv = SyncVectorEnv([lambda: Count(**kwargs)], autoreset_mode=mode)
    agent = ControlAgent.from_spaces(
        venv.single_observation_space, venv.single_action_space, critic=False, normalize_obs=False, **Squashed(hidden=(4,)).agent_options()
    )
    return ReplayCollector(venv, agent, Replay(100)), agent


def test_infinite_box_is_refused() -> None:
    with pytest.raises(ValueError, match=r"infinite bounds.*give it finite bounds"):
        counting(AutoresetMode.SAME_STEP, bound=math.inf)


def test_reward_that_is_not_finite_is_refused() -> None:
    collector, agent = counting(AutoresetMode.SAME_STEP, reward=math.nan)
    with pytest.raises(ValueError, match="environment 0 returned the reward nan"):
        collector.step(agent, torch.Generator())


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_replay_keeps_final_observations_and_both_kinds_of_end(mode: AutoresetMode) -> None:
    collector, agent = counting(mode, bound=2.0)
    generator = torch.Generator().manual_seed(0)
    steps = [collector.step(agent, generator, uniform=i % 2 == 0) for i in range(11)]
    n = sum(steps)
    assert n == collector.replay.size == (11 if mode is AutoresetMode.SAME_STEP else 9)  # two steps only reset
    found = collector.replay.store.map(lambda x: x[:n])
    start = found.obs[0, 0].item()  # number of resets before
    t = torch.arange(n)
    assert torch.equal(found.obs[:, 0], start + 10 * (t // 3) + t % 3)
    assert torch.equal(found.next_obs[:, 0], found.obs[:, 0] + 1)  # never the next episode's first observation
    odd = (found.obs[:, 0] // 10) % 2 == 1
    assert torch.equal(found.continuation == 0, (t % 3 == 2) & odd)
    assert torch.equal(found.truncated, (t % 3 == 2) & ~odd)
    assert bool((found.action.abs() <= 1).all())
    torch.testing.assert_close(found.reward, 2.0 * found.action[:, 0])  # the Box reaches to 2
    whole = found.reward[: 3 * (n // 3)].view(-1, 3).sum(1)
    torch.testing.assert_close(torch.tensor(collector.episodes), whole)


def test_replay_forgets_the_oldest_and_saves_what_was_written() -> None:
    replay = Replay(10)
    batch = rows(4)
    for k in range(3):
        replay.add(dataclasses.replace(batch, reward=4.0 * k + torch.arange(4.0)))
    assert replay.size == 10 and replay.cursor == 2
    assert replay.store.reward.tolist() == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    young = Replay(1000)
    young.add(batch)
    assert {v.shape[0] for v in young.state().values() if v.dim()} == {4}  # not the room for 1000
    other = Replay(10)
    other.load_state(replay.state())
    a, b = (r.sample(64, torch.Generator().manual_seed(1)).named() for r in (replay, other))
    assert all(torch.equal(a[k], b[k]) for k in a) and set(a["reward"].tolist()) == set(range(2, 12))


def test_dictionary_observations_are_kept_by_key() -> None:
    replay = Replay(3)
    obs = {"a": torch.arange(2.0), "b": torch.ones(2, 2)}
    zeros = torch.zeros(2)
    replay.add(Batch(obs, zeros[:, None], zeros, {k: v + 5 for k, v in obs.items()}, zeros, zeros > 0))
    other = Replay(3)
    other.load_state(replay.state())
    found = other.sample(8, torch.Generator().manual_seed(0))
    assert torch.equal(found.next_obs["a"], found.obs["a"] + 5) and found.obs["b"].shape == (8, 2)


@pytest.mark.parametrize("capacity", [4, 6])
def test_a_full_replay_goes_on_in_one_of_its_size_or_larger(capacity: int) -> None:
    saved, again = Replay(4), Replay(capacity)
    for k in range(6):  # the last four are kept, newest before oldest
        saved.add(dataclasses.replace(rows(1), reward=torch.full((1,), k)))
    again.load_state(saved.state())
    if capacity == 4:
        assert all(torch.equal(x, again.state()[k]) for k, x in saved.state().items())
    for newest in (6, 7, 8):
        again.add(dataclasses.replace(rows(1), reward=torch.full((1,), newest)))
        kept = list(range(max(2, newest + 1 - capacity), newest + 1))
        assert sorted(again.state()["reward"].tolist()) == kept
        assert set(again.sample(200, torch.Generator().manual_seed(0)).reward.tolist()) == set(kept)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Replay(0), "room for at least 1"),
        (lambda: Replay(4).sample(2, torch.Generator()), "the replay is empty"),
        (lambda: Replay(4).add(rows(6)), "raise replay_size"),
    ],
)
def test_bad_input_is_answered(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
