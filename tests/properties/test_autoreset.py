"""Whatever the lengths and ends of episodes, both autoreset modes record the decisions that were made, and no others."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from markovia.agents.control import ControlAgent
from markovia.algos.collect import StepCollector
from markovia.algos.off_policy.collect import ReplayCollector
from markovia.algos.off_policy.replay import Replay
from markovia.envs.control.vector import make_vec

torch.set_num_threads(1)
MODES = st.sampled_from([AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
SCRIPTS = st.lists(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=3)


class Scripted(gym.Env):
    """Episodes of given lengths that terminate or are truncated, over and over; the observation tells episode and step, as does the reward."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, script):
        self.script, self.episode = script, -1

    def reset(self, *, seed=None, options=None):
        # A seeded reset begins the script anew, an autoreset goes on with it.
        self.episode, self.n = 0 if seed is not None else self.episode + 1, 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.episode, self.n], np.float64)

    def step(self, action):
        self.n += 1
        length, terminates = self.script[self.episode % len(self.script)]
        over = self.n == length
        return self._obs(), 10.0 * self.episode + self.n, over and terminates, over and not terminates, {}


def decisions(script, count):
    """(episode, step, reward, terminated, truncated) of the first decisions of a script."""
    out, episode = [], 0
    while len(out) < count:
        length, terminates = script[episode % len(script)]
        out += [(episode, n, 10.0 * episode + n + 1, n + 1 == length and terminates, n + 1 == length and not terminates) for n in range(length)]
        episode += 1
    return out[:count]


def build(scripts, mode):
    venv = SyncVectorEnv([lambda s=s: Scripted(s) for s in scripts], autoreset_mode=mode)
    torch.manual_seed(0)
    return venv, ControlAgent.from_spaces(Scripted.observation_space, Scripted.action_space, hidden=(4,), normalize_obs=False, squash=True)


@settings(max_examples=15)
@given(SCRIPTS, MODES, st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_rows_hold_the_decisions_that_were_made(scripts, mode, lengths):
    venv, agent = build(scripts, mode)
    kept = [[] for _ in scripts]
    collector = StepCollector(venv, agent, 1, seed=0, scale_reward=False)
    for T in lengths:  # rows go on where the last ones were cut
        collector.num_steps = T
        r = collector.collect(agent)
        assert torch.equal(r.valid, r.mask)
        if mode is AutoresetMode.SAME_STEP:
            assert r.valid.all()
        for b in range(len(scripts)):
            live = r.valid[b].nonzero().squeeze(1).tolist()
            for t in live:
                cut = t == T - 1  # the row's cut is a truncation of the record's own
                kept[b].append((*r.obs[b, t].tolist(), float(r.reward[b, t]), float(r.continuation[b, t]), bool(r.truncated[b, t]), cut))
                if r.truncated[b, t]:
                    after = torch.tensor([[r.obs[b, t, 0], r.obs[b, t, 1] + 1.0]], dtype=r.obs.dtype)
                    torch.testing.assert_close(r.boot_value[b, t], agent.critic(after)[0])
                else:
                    assert not r.boot_value[b, t].any()
    finished = []
    for script, found in zip(scripts, kept, strict=True):
        expected = decisions(script, len(found))
        total = 0.0
        for (episode, n, reward, terminated, truncated), (e, step, got, continuation, was_truncated, cut) in zip(expected, found, strict=True):
            assert (e, step, got, continuation) == (episode, n, reward, 1.0 - terminated)
            assert was_truncated == (truncated or (cut and not terminated))
            total += reward
            if terminated or truncated:
                finished, total = [*finished, total], 0.0
    assert sorted(collector.episodes) == sorted(finished)


@settings(max_examples=15)
@given(SCRIPTS, MODES, st.integers(1, 12))
def test_a_replay_holds_transitions_to_the_observation_that_ended_them(scripts, mode, steps):
    venv, agent = build(scripts, mode)
    replay = Replay(1000)
    collector, generator = ReplayCollector(venv, agent, replay, seed=0), torch.Generator().manual_seed(0)
    count = sum(collector.step(agent, generator) for _ in range(steps))
    rows = replay.store.map(lambda x: x[: replay.size])
    assert count == replay.size
    # Environments are told apart by nothing, so the rows of all of them are compared in one order.
    found = sorted(
        (*o.tolist(), *n.tolist(), float(r), float(c), bool(t))
        for o, n, r, c, t in zip(rows.obs, rows.next_obs, rows.reward, rows.continuation, rows.truncated, strict=True)
    )
    # Under NEXT_STEP an environment makes a decision fewer for every episode that it ended before its last step.
    expected = []
    for script in scripts:
        budget, made = steps, 0
        for _, _, _, terminated, truncated in decisions(script, steps):
            if budget <= 0:
                break
            made, budget = made + 1, budget - 1 - (mode is AutoresetMode.NEXT_STEP and (terminated or truncated))
        expected += [(float(e), float(n), float(e), n + 1.0, r, 1.0 - term, trunc) for e, n, r, term, trunc in decisions(script, made)]
    assert found == sorted(expected)


@pytest.fixture(scope="module", params=["markovia/Arithmetic-v0", "markovia/Mixture2D-v0"])
def both(request):
    """An environment's batched form in either mode."""
    return {mode: make_vec(request.param, 3, vector_kwargs={"autoreset_mode": mode}) for mode in ("SameStep", "NextStep")}


@settings(max_examples=3)
@given(seed=st.integers(0, 2**31 - 1))
def test_batched_environments_make_the_same_decisions_in_both_modes(both, seed):
    """The k-th decision of each row has the same action in both; observations, rewards and ends of the decisions are then the same."""
    found = []
    for mode, venv in both.items():
        rngs = [np.random.default_rng([seed, i]) for i in range(3)]
        space = venv.single_action_space
        obs, _ = venv.reset(seed=seed)
        waiting, rows = np.zeros(3, bool), [[] for _ in range(3)]
        for _ in range(25):
            action = np.zeros(venv.action_space.shape, venv.action_space.dtype)
            for i in np.flatnonzero(~waiting):
                action[i] = rngs[i].integers(space.n) if isinstance(space, spaces.Discrete) else rngs[i].uniform(-1.0, 1.0, space.shape)
            before = {k: v.copy() for k, v in obs.items()} if isinstance(obs, dict) else {"": obs.copy()}
            obs, reward, terminated, truncated, _ = venv.step(action)
            for i in np.flatnonzero(~waiting):
                rows[i].append(({k: v[i].tolist() for k, v in before.items()}, float(reward[i]), bool(terminated[i]), bool(truncated[i])))
            waiting = (terminated | truncated) if mode == "NextStep" else waiting
        found.append(rows)
    assert any(done for _, _, done, _ in found[0][0])
    for same, following in zip(*found, strict=True):
        assert same[: len(following)] == following
