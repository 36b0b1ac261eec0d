"""Stable-Baselines3 both ways: our agents in its evaluation, its policies as our agents."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.control import ControlAgent
from markovia.agents.records import Rollout
from markovia.agents.tabular import TabularAgent
from markovia.algos.collect import StepCollector
from markovia.envs.control import make_vec

sb3 = pytest.importorskip("stable_baselines3")
from markovia.agents.sb3 import SB3Agent  # noqa: E402

torch.set_num_threads(1)


class Spaces(gym.Env):
    """Any two spaces; three steps of reward 1."""

    def __init__(self, obs, action):
        self.observation_space, self.action_space, self.n = obs, action, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.n += 1
        return self.observation_space.sample(), 1.0, self.n == 3, False, {}


VECTOR = spaces.Box(-1.0, 1.0, (3,))
BOX = spaces.Box(-1.0, 2.0, (2,))
ACTIONS = [BOX, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)]
OBS = [VECTOR, spaces.Dict(a=VECTOR, b=spaces.Discrete(3))]


@pytest.mark.parametrize("action", ACTIONS, ids=str)
@pytest.mark.parametrize("obs", OBS, ids=["vector", "dict"])
def test_our_agent_runs_in_evaluate_policy(obs, action):
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    agent = ControlAgent.from_spaces(obs, action, hidden=(8,))
    mean, std = evaluate_policy(agent, Monitor(Spaces(obs, action)), n_eval_episodes=2, deterministic=False)
    assert (mean, std) == (3.0, 0.0)


def test_tabular_agent_runs_in_evaluate_policy():
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    env = Spaces(spaces.Discrete(4), spaces.Discrete(2))
    agent = TabularAgent.from_spaces(env.observation_space, env.action_space)
    assert evaluate_policy(agent, Monitor(env), n_eval_episodes=2)[0] == 3.0


def model_for(obs, action, **kwargs):
    policy = "MultiInputPolicy" if isinstance(obs, spaces.Dict) else "MlpPolicy"
    return sb3.PPO(policy, Spaces(obs, action), n_steps=8, batch_size=8, seed=0, device="cpu", **kwargs)


@pytest.mark.parametrize("action", ACTIONS, ids=str)
@pytest.mark.parametrize("obs", OBS, ids=["vector", "dict"])
def test_wrapped_model_equals_sb3(obs, action):
    model = model_for(obs, action)
    agent = SB3Agent(model)
    obs.seed(0)
    rows = [obs.sample() for _ in range(6)]
    batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]} if isinstance(rows[0], dict) else np.stack(rows)
    assert np.array_equal(agent.predict(batch, deterministic=True)[0], model.predict(batch, deterministic=True)[0])
    assert np.array_equal(agent.predict(rows[0], deterministic=True)[0], model.predict(rows[0], deterministic=True)[0])
    seen = agent.observe(batch)
    a, logp = agent.act(seen, generator=torch.Generator().manual_seed(0))
    value, theirs, entropy = model.policy.evaluate_actions(seen, a.float())
    shape = (2, 3)
    fold = lambda x: x.unflatten(0, shape)  # noqa: E731
    yes, zero = torch.ones(shape, dtype=torch.bool), torch.zeros(shape)
    folded = {k: fold(v) for k, v in seen.items()} if isinstance(seen, dict) else fold(seen)
    out = agent.evaluate(Rollout(folded, fold(a), zero, zero, yes, yes, zero, ~yes), ("logp", "value", "entropy"))
    assert torch.allclose(out.logp.flatten(), theirs, atol=1e-6) and torch.allclose(logp, theirs, atol=1e-6)
    assert torch.allclose(out.value.flatten(), value.flatten()) and torch.allclose(out.entropy.flatten(), entropy, atol=1e-6)


def test_wrapped_model_is_collected_from_with_its_normaliser():
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    vec = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = sb3.PPO("MlpPolicy", vec, n_steps=32, batch_size=32, seed=0, device="cpu").learn(32)
    agent = SB3Agent(model)
    raw = np.array([[0.5, 0.5, 3.0]], np.float32)
    assert np.allclose(agent.observe(raw).numpy(), vec.normalize_obs(raw))
    count = vec.obs_rms.count
    rollout = StepCollector(make_vec("Pendulum-v1", 2), agent, 20).collect(agent, torch.Generator().manual_seed(0))
    assert rollout.value.shape == rollout.boot_value.shape == (2, 20, 1)
    assert vec.obs_rms.count == pytest.approx(count + 40)
    assert torch.equal(agent.evaluate(rollout, ("logp",)).logp, rollout.logp_old)


def test_roles_split_the_parameters_and_the_reference_is_frozen():
    agent = SB3Agent(model_for(VECTOR, BOX))
    policy, value = agent.parameters("policy"), agent.parameters("value")
    assert len(policy) + len(value) == len(list(agent.net.parameters())) and not {*map(id, policy)} & {*map(id, value)}
    assert len(value) == 6  # two hidden layers and a head, weight and bias each
    assert not agent.reference().parameters("policy") and agent.parameters("policy")


def test_models_that_are_no_actor_critic_or_have_endless_actions_are_refused():
    with pytest.raises(ValueError, match="no action density"):
        SB3Agent(sb3.DQN("MlpPolicy", Spaces(VECTOR, spaces.Discrete(2)), device="cpu", buffer_size=10))
    with pytest.raises(ValueError, match="use_sde"):
        SB3Agent(model_for(VECTOR, BOX, use_sde=True))
    recurrent = model_for(VECTOR, BOX)
    recurrent.policy.lstm_actor = torch.nn.LSTM(1, 1)  # how sb3-contrib's policies name theirs
    with pytest.raises(ValueError, match="recurrent"):
        SB3Agent(recurrent)
    model = model_for(VECTOR, BOX)
    model.action_space = spaces.Box(-np.inf, np.inf, (2,))
    with pytest.raises(ValueError, match="infinite bounds"):
        SB3Agent(model)
    with pytest.raises(ValueError, match=r"model\.save"):
        SB3Agent(model_for(VECTOR, BOX)).config()
