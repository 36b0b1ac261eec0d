"""Collectors: both autoreset modes, boot values, ratios, costs, reward scale, sequences."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from markovia.agents.control import ControlAgent
from markovia.agents.records import Rollout
from markovia.agents.tabular import TabularAgent
from markovia.algos.collect import SequenceCollector, StepCollector, check_score
from markovia.algos.reward_scale import RewardScale

torch.set_num_threads(1)


class Counter(gym.Env):
    """Counts up from 0; even episodes terminate at 3, odd ones are truncated at 2. Reward = new count, cost = 10 x it."""

    observation_space = spaces.Box(-10.0, 10.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, first_episode=0, with_cost=False):
        self.episode, self.with_cost = first_episode - 1, with_cost

    def reset(self, *, seed=None, options=None):
        self.episode, self.n = self.episode + 1, 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.n], np.float32)

    def step(self, action):
        self.n += 1
        even = self.episode % 2 == 0
        info = {"cost": 10.0 * self.n} if self.with_cost else {}
        return self._obs(), float(self.n), even and self.n == 3, not even and self.n == 2, info


class DictCounter(Counter):
    observation_space = spaces.Dict(n=Counter.observation_space, odd=spaces.Discrete(2))

    def _obs(self):
        return {"n": np.array([self.n], np.float32), "odd": np.int64(self.episode % 2)}


class Numbered(Counter):
    observation_space = spaces.Discrete(4)

    def _obs(self):
        return np.int64(self.n)


def venv(mode, env=Counter, n=2, **kwargs):
    return SyncVectorEnv([lambda i=i: env(first_episode=i, **kwargs) for i in range(n)], autoreset_mode=mode)


def agent_for(env=Counter, **kwargs):
    torch.manual_seed(0)
    return ControlAgent.from_spaces(env.observation_space, env.action_space, **{"hidden": (8,), "normalize_obs": False, **kwargs})


MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP]


def test_same_step_rows_are_as_worked_out_by_hand():
    agent = agent_for()
    collector = StepCollector(venv(AutoresetMode.SAME_STEP), agent, 7, scale_reward=False)
    r = collector.collect(agent)
    # Environment 0 begins with an even episode: 1 2 3(term), 1 2(trunc), 1 2(cut);
    # environment 1 with an odd one: 1 2(trunc), 1 2 3(term), 1 2(trunc).
    assert r.obs[..., 0].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 0, 1]]
    assert r.reward.tolist() == [[1, 2, 3, 1, 2, 1, 2], [1, 2, 1, 2, 3, 1, 2]]
    assert r.continuation.tolist() == [[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1]]
    assert r.truncated.int().tolist() == [[0, 0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0, 1]]
    assert r.valid.all() and r.mask.all()
    v2 = agent.critic(torch.tensor([[2.0]])).squeeze()  # every truncated step and the cut end at count 2
    assert torch.allclose(r.boot_value[..., 0], torch.where(r.truncated, v2, torch.zeros(())))
    assert torch.allclose(r.value[..., 0], agent.critic(r.obs)[..., 0])
    assert sorted(collector.episodes) == [3.0, 3.0, 3.0, 6.0, 6.0]
    assert sorted(collector.episode_lengths) == [2, 2, 2, 3, 3]


def test_next_step_marks_the_resetting_step_and_keeps_the_final_observation():
    agent = agent_for()
    r = StepCollector(venv(AutoresetMode.NEXT_STEP), agent, 7, scale_reward=False).collect(agent)
    # Environment 0: 1 2 3(term) reset | 1 2(trunc) reset. Environment 1: 1 2(trunc) reset | 1 2 3(term) reset.
    assert r.valid.int().tolist() == [[1, 1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1, 0]]
    assert torch.equal(r.valid, r.mask)
    assert r.reward.tolist() == [[1, 2, 3, 0, 1, 2, 0], [1, 2, 0, 1, 2, 3, 0]]
    assert r.truncated.int().tolist() == [[0, 0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0]]
    assert (r.continuation[r.valid] == 0).sum() == 2
    v2 = agent.critic(torch.tensor([[2.0]])).squeeze()
    assert torch.allclose(r.boot_value[..., 0], torch.where(r.truncated, v2, torch.zeros(())))


@pytest.mark.parametrize("env", [Counter, DictCounter])
def test_both_modes_give_the_same_decisions(env):
    """Columns of the valid steps, environment by environment, with normaliser, reward scale and costs on."""
    found, norms = [], []
    for mode in MODES:
        agent = agent_for(env, normalize_obs=True, num_costs=1)
        collector = StepCollector(venv(mode, env, n=1, with_cost=True), agent, 80)
        r = collector.collect(agent)
        keep = slice(0, 40)  # rows end at different decisions
        obs = r.obs["n"] if isinstance(r.obs, dict) else r.obs
        found.append([x[r.valid][keep] for x in (obs, r.reward, r.continuation, r.cost)])
        norms.append(collector.episodes[:10])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b)
    assert norms[0] == norms[1]


def test_boot_values_agree_between_the_modes():
    boots = []
    for mode in MODES:
        agent = agent_for(num_costs=2)
        r = StepCollector(venv(mode, n=1), agent, 30, scale_reward=False).collect(agent)
        boots.append(r.boot_value[r.truncated][:4])
    assert boots[0].shape == (4, 3) and torch.equal(boots[0], boots[1])


@pytest.mark.parametrize("squash", [None, False, True])
def test_first_pass_ratio_is_exactly_one(squash):
    env = "CartPole-v1" if squash is None else "Pendulum-v1"
    vec = SyncVectorEnv([lambda: gym.make(env)] * 3, autoreset_mode="SameStep")
    torch.manual_seed(0)
    agent = ControlAgent.from_spaces(vec.single_observation_space, vec.single_action_space, squash=bool(squash))
    r = StepCollector(vec, agent, 50).collect(agent, torch.Generator().manual_seed(0))
    for view in (r, r.decisions()):
        assert torch.equal(agent.evaluate(view, ("logp",)).logp.exp() / view.logp_old.exp(), torch.ones(view.shape))


def test_logp_is_that_of_the_sampled_action():
    agent = agent_for(activation="gelu")  # one that samples by tensors
    seen = []

    def sample(obs, generator):
        action, logp = agent.act(obs, generator=generator)
        seen.append((action, logp))
        return action

    state = torch.Generator().manual_seed(1)
    plain = StepCollector(venv(AutoresetMode.SAME_STEP), agent_for(), 6).collect(
        agent_for(activation="gelu"), torch.Generator().manual_seed(1)
    )
    agent.sample = sample
    r = StepCollector(venv(AutoresetMode.SAME_STEP), agent, 6).collect(agent, state)
    assert torch.equal(r.action, torch.stack([a for a, _ in seen], 1)) and torch.equal(r.action, plain.action)
    assert torch.allclose(r.logp_old, torch.stack([p for _, p in seen], 1), atol=1e-6)


def test_same_seed_same_record_and_rows_go_on():
    records = []
    for _ in range(2):
        agent = agent_for()
        collector = StepCollector(venv(AutoresetMode.SAME_STEP), agent, 2, scale_reward=False)
        records.append([collector.collect(agent, torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.equal(records[0][1].action, records[1][1].action)
    assert records[0][1].obs[0, :, 0].tolist() == [2, 0]  # the third count of the first episode, then the next episode


def test_dictionary_observations_are_stored_by_key():
    agent = agent_for(DictCounter)
    r = StepCollector(venv(AutoresetMode.SAME_STEP, DictCounter), agent, 7).collect(agent)
    assert r.obs["n"].shape == (2, 7, 1) and r.obs["odd"].tolist()[0] == [0, 0, 0, 1, 1, 0, 0]
    v2 = agent.critic({"n": torch.tensor([[2.0]]), "odd": torch.tensor([1])}).item()
    assert r.boot_value[0, 4, 0].item() == pytest.approx(v2)


def test_tabular_agent_collects_state_numbers():
    agent = TabularAgent.from_spaces(Numbered.observation_space, Numbered.action_space, dtype="float64")
    agent.critic.table.data[:] = torch.arange(4.0)[:, None]
    r = StepCollector(venv(AutoresetMode.SAME_STEP, Numbered), agent, 7, scale_reward=False).collect(agent)
    assert r.obs.dtype == torch.int64 and r.boot_value[r.truncated].eq(2.0).all() and r.logp_old.dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
def test_costs_come_from_the_step_that_ends_the_episode_too(mode):
    agent = agent_for(num_costs=1)
    collector = StepCollector(venv(mode, with_cost=True), agent, 7, scale_reward=False)
    r = collector.collect(agent)
    assert torch.equal(r.cost[..., 0], 10.0 * r.reward)
    assert {tuple(c) for c in collector.episode_costs} == {(30.0,), (60.0,)}
    wrong = agent_for(num_costs=2)
    with pytest.raises(ValueError, match="num_costs"):
        StepCollector(venv(mode, with_cost=True), wrong, 7).collect(wrong)


class OldGenerator(Counter):
    def reset(self, *, seed=None, options=None):
        self.rng = np.random.RandomState(seed)
        return super().reset()


def test_environments_that_take_seeds_of_32_bits():
    collector = StepCollector(venv(AutoresetMode.SAME_STEP, OldGenerator), agent_for(), 7, seed=2**62 + 5)
    assert [env.unwrapped.rng.randint(2**31) for env in collector.venv.envs] == [np.random.RandomState(5 + i).randint(2**31) for i in range(2)]


class Sparse(Counter):
    """Tells a cost of 5 at count 3 only, so odd episodes are silent."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"cost": 5.0} if self.n == 3 else {}


@pytest.mark.parametrize("mode", MODES)
def test_steps_and_episodes_without_a_told_cost_count_zero(mode):
    agent = agent_for(num_costs=1)
    collector = StepCollector(venv(mode, Sparse), agent, 7, scale_reward=False)
    r = collector.collect(agent)
    assert torch.equal(r.cost[..., 0], 5.0 * (r.reward == 3.0))
    # The first episode that ends, at count 2, does so before anything was told.
    told = sorted(zip(collector.episode_lengths, collector.episode_costs, strict=True))
    assert {tuple(x) for _, x in told[: len(told) // 2]} == {(0.0,)} and told[0] == (2, [0.0]) and told[-1] == (3, [5.0])


def test_that_costs_are_told_is_remembered_between_batches_and_over_a_checkpoint():
    def collector(first, agent):
        envs = SyncVectorEnv([lambda: Sparse(first_episode=first)], autoreset_mode=AutoresetMode.SAME_STEP)
        return StepCollector(envs, agent, 2 + (first == 0))

    agent = agent_for(num_costs=1)
    fresh = collector(1, agent)
    assert fresh.collect(agent).cost is None  # nobody knows yet whether this environment tells costs
    known = collector(0, agent)
    assert known.collect(agent).cost.sum() == 5.0
    assert (known.collect(agent).cost == 0.0).all() and list(known.episode_costs) == [[5.0], [0.0]]
    state = known.state()
    for saved in (state, {k: v for k, v in state.items() if k == "moments"}):  # checkpoints did not always say it
        resumed = collector(1, agent)
        resumed.load_state(saved)
        assert (resumed.collect(agent).cost == 0.0).all() and list(resumed.episode_costs) == [[0.0]]
    plain = agent_for()
    logged = collector(0, plain)
    for _ in range(2):
        logged.collect(plain)
    assert list(logged.episode_costs) == [[5.0], [0.0]] and list(logged.episode_lengths) == [3, 2]


def test_reward_scale_is_the_formula_and_survives_a_checkpoint():
    agent = agent_for()
    collector = StepCollector(venv(AutoresetMode.SAME_STEP, n=1), agent, 5, gamma=0.5)
    r = collector.collect(agent)
    # G of 1 2 3 | 1 2 with gamma 0.5: 1, 2.5, 4.25 | 1, 2.5; the first reward has no spread to be divided by.
    g = np.array([1.0, 2.5, 4.25, 1.0, 2.5])
    expected = [1.0] + [x / g[: i + 2].std() for i, x in enumerate([2.0, 3.0, 1.0, 2.0])]
    assert np.allclose(r.reward[0], expected, atol=1e-5)
    other = StepCollector(venv(AutoresetMode.SAME_STEP, n=1), agent, 5, gamma=0.5)
    other.load_state({k: v.clone() for k, v in collector.state().items()})
    collector.reset(7)
    other.reset(7)
    assert other.reward_scale.var == pytest.approx(g.var()) and other.reward_scale.mean == pytest.approx(g.mean())
    assert other.reward_scale.count == collector.reward_scale.count == 5


def test_reward_scale_does_not_depend_on_where_it_is_cut_nor_on_the_returns_level():
    rng = np.random.default_rng(0)
    reward, ended, live = rng.normal(1e6, 1.0, (3, 40)), rng.random((3, 40)) < 0.1, rng.random((3, 40)) < 0.9
    reward = np.where(live, reward, 0.0)
    ended &= live
    whole, parts = RewardScale(3, 0.0), RewardScale(3, 0.0)
    one = whole(reward, ended, live)
    two = np.concatenate([parts(reward[:, i : i + 8], ended[:, i : i + 8], live[:, i : i + 8]) for i in range(0, 40, 8)], axis=1)
    assert np.allclose(one, two, rtol=1e-9)
    assert whole.var == pytest.approx(reward[live].var(), rel=1e-6) and parts.var == pytest.approx(whole.var, rel=1e-6)


def test_agent_without_critic_gets_no_values():
    agent = agent_for(critic=False)
    r = StepCollector(venv(AutoresetMode.SAME_STEP), agent, 4).collect(agent)
    assert r.value is None and r.boot_value is None and r.truncated[:, -1].all()


class NanReward(Counter):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("nan"), *rest


def test_bad_environments_are_refused():
    agent = agent_for()
    with pytest.raises(ValueError, match="finite numbers"):
        StepCollector(venv(AutoresetMode.SAME_STEP, NanReward), agent, 4).collect(agent)
    with pytest.raises(ValueError, match="SAME_STEP or NEXT_STEP"):
        StepCollector(venv(AutoresetMode.DISABLED), agent, 4)
    with pytest.raises(ValueError, match="num_steps"):
        StepCollector(venv(AutoresetMode.SAME_STEP), agent, 0)


class FakeSequences:
    """A task and an agent in one: rows of lengths 1 and 3, each step rewarded by nothing."""

    critic = None
    kind = "language"

    def __init__(self, score):
        self.given = score

    def starts(self, n, generator):
        return {"n": n}

    def generate(self, starts, generator):
        n = starts["n"]
        valid = torch.tensor([[True, False, False], [True, True, True]])[:n]
        zero = torch.zeros(n, 3)
        return Rollout(zero, zero.long(), zero, zero, valid, valid, valid.float(), torch.zeros_like(valid))

    def score(self, rollout):
        return self.given


def test_sequence_scores_land_on_the_last_valid_step():
    fake = FakeSequences([0.5, 2])
    collector = SequenceCollector(fake, 2)
    r = collector.collect(fake)
    assert r.reward.tolist() == [[0.5, 0, 0], [0, 0, 2.0]] and collector.episodes == [0.5, 2.0]
    with pytest.raises(ValueError, match="SequenceCollector"):
        StepCollector(venv(AutoresetMode.SAME_STEP), fake, 2)


@pytest.mark.parametrize(
    ("score", "message"),
    [([1.0], "one per sequence"), ([1.0, float("nan")], "sequence 1"), (["a", "b"], "2 numbers"), (None, "2 numbers"), ([[1.0], [2.0]], "shape")],
)
def test_bad_scores_are_refused(score, message):
    with pytest.raises(ValueError, match=message):
        check_score(score, 2)
    fake = FakeSequences(score)
    with pytest.raises(ValueError, match=message):
        SequenceCollector(fake, 2).collect(fake)
