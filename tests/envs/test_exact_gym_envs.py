"""The exact problems as Gymnasium environments."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import markovia.envs  # noqa: F401  (registers the ids)
from markovia.envs.exact import CMDP, TabularMDP
from markovia.envs.exact.gym_envs import CMDPEnv, TabularMDPEnv, TokenTreeEnv, TokenTreeVectorEnv

IDS = ["markovia/Tabular-v0", "markovia/TabularCMDP-v0", "markovia/TokenTree-v0"]


@pytest.mark.parametrize("env_id", IDS)
def test_spec_is_plain_data_and_rebuilds_the_same_problem(env_id):
    env = gym.make(env_id, seed=3)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    for a, b in zip(_episode(env), _episode(again), strict=True):
        assert a == b


def _episode(env, seed=5):
    rows = [env.reset(seed=seed)[0]]
    env.action_space.seed(seed)
    for _ in range(4):
        rows.append(env.step(env.action_space.sample()))
        if rows[-1][2]:
            break
    return rows


def test_token_tree_pays_the_oracles_reward_with_the_last_token():
    env = gym.make("markovia/TokenTree-v0", V=3, H=3, seed=1, eos=0)
    tree = env.unwrapped.oracle
    for y in range(tree.M):
        obs, _ = env.reset(seed=0)
        assert obs == 0
        for t in range(tree.lengths[y]):
            assert obs == tree.prefix_index[y, t]
            obs, reward, terminated, truncated, _ = env.step(tree.tokens[y, t])
            assert terminated == (t == tree.lengths[y] - 1) and truncated is False and type(reward) is float
        assert reward == tree.R[y] and obs == tree.num_prefixes
    with pytest.raises(ValueError, match="reset"):
        env.unwrapped.step(0)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("kwargs", [{"V": 4, "H": 3}, {"V": 3, "H": 4, "eos": 1, "reward": "binary"}])
def test_batched_equals_scalar_in_both_modes(kwargs, mode):
    batched = gym.make_vec("markovia/TokenTree-v0", num_envs=5, autoreset_mode=mode.value, **kwargs)
    assert isinstance(batched, TokenTreeVectorEnv)
    assert batched.metadata["autoreset_mode"] is mode
    scalar = gym.make_vec("markovia/TokenTree-v0", 5, "sync", vector_kwargs={"autoreset_mode": mode}, **kwargs)
    assert batched.observation_space == scalar.observation_space and batched.action_space == scalar.action_space
    np.testing.assert_array_equal(batched.reset(seed=0)[0], scalar.reset(seed=0)[0])
    rng, ends = np.random.default_rng(0), 0
    for _ in range(40):
        actions = rng.integers(kwargs["V"], size=5)
        ours, theirs = batched.step(actions), scalar.step(actions)
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        assert ours[4].keys() == theirs[4].keys()
        for key in ours[4]:
            np.testing.assert_array_equal(ours[4][key], theirs[4][key])
        ends += ours[2].sum()
    assert ends > 20


def test_tabular_env_samples_the_mdps_transitions_and_returns_average_to_J():
    mdp = TabularMDP.random(4, 2, 0.5, seed=2)
    env, rng = TabularMDPEnv(oracle=mdp), np.random.default_rng(0)
    counts, returns = np.zeros_like(mdp.P), []
    env.reset(seed=0)
    for _ in range(1500):
        (state, _), total = env.reset(), 0.0
        for t in range(12):
            action = rng.integers(2)
            new, reward, _, _, _ = env.step(action)
            counts[state, action, new] += 1
            total, state = total + 0.5**t * reward, new
        returns.append(total)
    assert np.abs(counts / counts.sum(-1, keepdims=True) - mdp.P).max() < 0.05
    error = np.std(returns) / np.sqrt(len(returns))
    assert abs(np.mean(returns) - mdp.J(mdp.uniform_policy())) < 4 * error + 0.5**12 * 2


def test_cmdp_env_reports_the_cost_as_a_float():
    env = gym.make("markovia/TabularCMDP-v0")
    state, _ = env.reset(seed=0)
    _, _, _, _, info = env.step(1)
    assert type(info["cost"]) is float and info["cost"] == env.unwrapped.oracle.C[0, state, 1]


def test_bad_input_is_taught():
    with pytest.raises(ValueError, match=r"0\.\.3"):
        env = TokenTreeEnv()
        env.reset()
        env.step(4)
    with pytest.raises(ValueError, match=r"5 integers in 0\.\.3"):
        envs = TokenTreeVectorEnv(5)
        envs.reset()
        envs.step(np.full(5, 4))
    with pytest.raises(ValueError, match="2 seeds for 5 environments"):
        envs.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="'SameStep' or 'NextStep'"):
        TokenTreeVectorEnv(5, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match="single cost"):
        CMDPEnv(oracle=CMDP(TabularMDP.random(2, 2), np.ones((2, 2, 2)), [9.0, 9.0]))
    with pytest.raises(ValueError, match="reset"):
        TabularMDPEnv().step(0)


def test_importing_the_environments_loads_no_torch():
    code = "import sys, markovia.envs, markovia.envs.exact.gym_envs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
