"""Every loop that steps a policy through episodes carries what the policy carries: chunks of actions, histories, episode starts."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from markovia.agents.diffusion_policy import DiffusionPolicyAgent
from markovia.agents.return_conditioned import ReturnConditionedAgent
from markovia.algos.setup import evaluate_stepped
from markovia.algos.streams import stream_seed
from markovia.collect import NUM_ENVS, play
from markovia.envs.control import stepping
from markovia.envs.control.stepping import first_episodes
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import MLPDenoiser
from markovia.pictures import record_video

torch.set_num_threads(1)
ACT_STEPS, OBS_STEPS = 3, 2


class Counted(gym.Env):
    """obs = (step, sum of the actions so far); ends after seed % 5 + 4 steps, by termination when that is odd; the reward is the action."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    taken: ClassVar[list[list[float]]] = []  # actions of each episode, all environments together

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def _obs(self):
        return np.array([len(self.actions), sum(self.actions)], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = 4 + int(self.np_random.integers(5))
        self.actions = []
        Counted.taken.append(self.actions)
        return self._obs(), {}

    def step(self, action):
        self.actions.append(float(action[0]))
        over = len(self.actions) == self.length
        return self._obs(), self.actions[-1], over and self.length % 2 == 1, over and self.length % 2 == 0, {}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


ID = "test/Counted-v0"
gym.register(ID, Counted)


@pytest.fixture(autouse=True)
def nothing_taken():
    Counted.taken.clear()


def chunked(std=0.3):
    """A policy of three-action chunks whose network is random."""
    torch.manual_seed(0)
    network = MLPDenoiser((4, 1), 16, 1, cond_dim=2 * OBS_STEPS)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return DiffusionPolicyAgent.from_spaces(
        Counted.observation_space, Counted.action_space, network, GaussianKernel.direct([std, std]), horizon=4, act_steps=ACT_STEPS,
        obs_steps=OBS_STEPS, normalize_obs=False,
    )  # fmt: skip


class Told(DiffusionPolicyAgent):
    """A plan is (0.0, 0.1, 0.2): an action says its place in the chunk; the windows of the plans are kept."""

    windows: list[np.ndarray]

    def chain(self, window, deterministic=False, generator=None):
        self.windows += list(window.reshape(len(window), OBS_STEPS, 2).numpy())
        out = torch.zeros(len(window), 3, 4, 1)
        out[:, -1, :, 0] = 0.1 * torch.arange(4)
        return out


def told():
    agent = Told(chunked().config())
    agent.windows = []
    return agent


def check_places(agent):
    """Each action stands at its step's place in the chunk; each plan was made at a chunk's begin, that of an episode's first step from it alone."""
    assert len({len(a) for a in Counted.taken}) > 1, "episodes of one length would show nothing"
    for actions in Counted.taken:
        np.testing.assert_allclose(actions, [0.1 * (t % ACT_STEPS) for t in range(len(actions))], atol=1e-6)
    assert len(agent.windows) == sum(-(-len(a) // ACT_STEPS) for a in Counted.taken)  # and no plan beside these
    for window in agent.windows:
        t = int(window[-1, 0])
        assert t % ACT_STEPS == 0 and window[0, 0] == max(t - 1, 0)


# ------------------------------------------------------------------------------------------------------------------------- chunks
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_chunks_are_replanned_at_their_end_and_at_episode_starts(mode):
    agent, venv = told(), SyncVectorEnv([lambda: gym.make(ID)] * 6, autoreset_mode=mode)
    steps = list(first_episodes(venv, agent, 3, deterministic=True))
    lengths = np.sum([s.running for s in steps], 0)
    assert len(set(lengths)) > 2 and len(steps) == max(lengths)
    if mode == "SameStep":
        check_places(agent)
    else:  # the step that only resets asks for a plan of its own, which nothing carries out
        for actions in Counted.taken:
            np.testing.assert_allclose(actions, [0.1 * (t % ACT_STEPS) for t in range(len(actions))], atol=1e-6)
    first = sorted((a for a in Counted.taken if a), key=len)[-1]
    assert sum(s.reward[int(np.argmax(lengths))] for s in steps) == pytest.approx(sum(first))


def test_a_collection_plans_like_that():
    agent = told()
    data = play(ID, agent, 0, "medium", num_steps=150)
    check_places(agent)
    np.testing.assert_allclose(data.action[:, 0], 0.1 * (data.obs[:, 0] % ACT_STEPS), atol=1e-6)
    assert len(data) >= 150 and data.complete().all()


def test_a_video_shows_chunks(tmp_path):
    pytest.importorskip("moviepy")
    agent = told()
    record_video(agent, ID, {}, tmp_path, 3, 0)
    assert len(Counted.taken) == 3
    check_places(agent)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_collection_acts_as_the_evaluation_does(deterministic):
    agent = chunked()
    # a seed whose stream starts both: a collection takes 30 bits of it, an evaluation 31
    seed = next(s for s in range(20) if stream_seed(s, "evaluation") % 2**31 < 2**30)
    data = play(ID, agent, seed, "evaluation", deterministic=deterministic, episodes=NUM_ENVS)
    Counted.taken.clear()
    torch.manual_seed(stream_seed(seed, "evaluation-actions", 0))  # of the collection's only wave
    found = evaluate_stepped(agent, ID, NUM_ENVS, seed, deterministic=deterministic)
    assert data.lengths().tolist() == found["lengths"] and len(set(found["lengths"])) > 2
    np.testing.assert_allclose(data.returns(), found["returns"], rtol=1e-6)
    first, end = data.bounds()
    episodes = [data.action[a:b, 0].tolist() for a, b in zip(first, end, strict=True)]
    assert all(any(actions == pytest.approx(other) for other in Counted.taken) for actions in episodes)


def test_stable_baselines_own_evaluation_agrees():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    agent, venv = chunked(), make_vec_env(ID, 1)
    venv.seed(stream_seed(5, "evaluation") % 2**31)
    theirs = evaluate_policy(agent, venv, n_eval_episodes=1, deterministic=True)[0]
    assert evaluate_stepped(agent, ID, 1, 5)["returns"][0] == pytest.approx(theirs, abs=2e-6)  # its monitor rounds to six places


# -------------------------------------------------------------------------------------------------------------------------- limits
class Endless(Counted):
    """Ends no episode."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.length = -1
        return obs, info


class Still:
    """A policy that does nothing."""

    def __init__(self, size=1):
        self.size = size

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.full((*np.shape(observation)[:-1], self.size), 0.5, np.float32), state


ENDLESS = "test/Endless-v0"
gym.register(ENDLESS, Endless)


def test_episodes_that_nothing_ends_are_cut_and_count(monkeypatch, recwarn):
    monkeypatch.setattr(stepping, "LONGEST", 20)
    assert evaluate_stepped(Still(), ENDLESS, 3, 0) == {"returns": [10.0] * 3, "lengths": [20] * 3}
    assert evaluate_stepped(Still(), ENDLESS, 3, 1)["lengths"] == [20] * 3
    assert len(recwarn) == 2 and 'train with --env-kwargs \'{"max_episode_steps": 1000}\'' in str(recwarn[0].message)
    assert len(list(first_episodes(gym.make(ENDLESS), Still()))) == 20
    assert play(ENDLESS, Still(), 0, "medium", episodes=NUM_ENVS).lengths().tolist() == [20] * NUM_ENVS


@pytest.mark.filterwarnings("error")
def test_a_limit_is_kept_however_long(monkeypatch):
    monkeypatch.setattr(stepping, "LONGEST", 20)
    for steps in (7, 20, 33):
        assert evaluate_stepped(Still(), ENDLESS, 2, 0, {"max_episode_steps": steps})["lengths"] == [steps] * 2
        assert len(list(first_episodes(gym.make(ENDLESS, max_episode_steps=steps), Still()))) == steps


def test_a_batch_of_simulations_is_asked_for_its_own_limit(monkeypatch, recwarn):
    pytest.importorskip("mujoco.batch")
    monkeypatch.setattr(stepping, "LONGEST", 5)
    assert evaluate_stepped(Still(6), "HalfCheetah-v5", 2, 0, {"max_episode_steps": 9})["lengths"] == [9, 9]
    assert not recwarn.list
    assert evaluate_stepped(Still(6), "HalfCheetah-v5", 2, 0, {"max_episode_steps": -1})["lengths"] == [5, 5]
    assert "HalfCheetah-v5 has no time limit" in str(recwarn[0].message)


# ---------------------------------------------------------------------------------------------------------------------- histories
def test_a_return_that_is_asked_for_falls_by_what_was_paid():
    """Evaluations against a loop written here that tells each step's reward, in environments that end at different times."""
    torch.manual_seed(0)
    sizes = {"window": 4, "width": 8, "layers": 1, "heads": 1, "dropout": 0.0, "return_scale": 1.0}
    agent = ReturnConditionedAgent.from_spaces(Counted.observation_space, Counted.action_space, horizon=10, target_return=2.0, **sizes)
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(0.3 * torch.randn(p.shape))

    def alone(agent, tell):
        env, out = gym.make(ID), []
        for i in range(4):
            obs, _ = env.reset(seed=stream_seed(5, "evaluation") % 2**31 + i)
            state, total, over = None, 0.0, False
            while not over:
                action, state = agent.predict(obs, state)
                obs, reward, terminated, truncated, _ = env.step(action)
                if tell:
                    agent.rewarded(state, reward)
                total, over = total + reward, terminated or truncated
            out.append(total)
        return out

    np.testing.assert_allclose(evaluate_stepped(agent, ID, 4, 5)["returns"], alone(agent, True), rtol=1e-4)
    assert not np.allclose(alone(agent, True), alone(agent, False), rtol=1e-3)  # and that says something
    other = agent.asked_for(-3.0)
    assert agent.target_return == 2.0 and other.config()["target_return"] == -3.0
    np.testing.assert_allclose(evaluate_stepped(other, ID, 4, 5)["returns"], alone(other, True), rtol=1e-4)
