"""What every registered id promises: both checkers, Stable-Baselines3's PPO, vectorisation, and a batched form that equals it."""

import copy
import json
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import markovia.envs  # noqa: F401  (registers the ids)
from markovia.envs.control.vector import make_env, make_vec
from markovia.envs.registry import ENVS

pytest.importorskip("stable_baselines3")
torch.set_num_threads(1)

SLOW = tuple(f"markovia/{name}-v0" for name in ("Sentiment", "LengthControl", "GSM8K", "Prompts"))  # a vocabulary of 49,152
IDS = [pytest.param(e["id"], marks=pytest.mark.slow if e["id"] in SLOW else ()) for e in ENVS]
BATCHED = [p for p, e in zip(IDS, ENVS, strict=True) if "vector_entry_point" in e]


@pytest.mark.parametrize("env_id", IDS)
def test_both_checkers_accept_it_without_a_warning(env_id):
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Actions in units that mean something (standard deviations, torques), and velocities without a bound, are no faults.
        for expected in (".*symmetric and normalized.*", ".*observation space m(in|ax)imum value is -?infinity.*"):
            warnings.filterwarnings("ignore", message=expected)
        env = make_env(env_id)
        modes = env.metadata["render_modes"]
        check_env(env.unwrapped, skip_render_check=not modes or "human" in modes)  # what opens a window needs a display
        sb3_check_env(env)
    json.loads(env.spec.to_json())


BOXES = [f"markovia/{name}-v0" for name in ("PointMass2D", "PointObstacle", "TwoGoals", "SafePointGoal", "SafePointCircle", "SafePointRun")]
DISCRETE = [f"markovia/{name}-v0" for name in ("Tabular", "TabularCMDP", "TokenTree", "SafeGrid", "SafeTwoState", "Arithmetic")]
BAD = [(i, a) for i in BOXES for a in ([0.5], 0.5, [0.5] * 3, [[0.5, 0.5]], [np.nan, 0.0], [0.0, -np.inf])]
BAD += [("markovia/SafePendulum-v0", a) for a in (0.5, [0.5] * 2, [[0.5]], [np.nan], [np.inf])]
BAD += [(i, a) for i in DISCRETE for a in (1.7, np.nan, np.inf, [1], np.array([0, 1]), "1", None, -1, 10**6)]


@pytest.mark.parametrize(("env_id", "action"), BAD)
def test_a_wrong_action_is_not_taken(env_id, action):
    env, same = (make_env(env_id).unwrapped for _ in range(2))
    env.reset(seed=0), same.reset(seed=0)
    with pytest.raises(ValueError, match="expected"):
        env.step(action)
    shape = env.action_space.shape
    good = np.float32([0.5, -0.5])[: shape[0]] if shape else np.array(1)  # an array without an axis is what networks give
    for a, b in zip(env.step(good), same.step(good), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("actions", [[1.7, 1.0], [np.nan, 1.0], [1], [[1, 1]], [1, 10**6]])
@pytest.mark.parametrize("env_id", [i for i in DISCRETE if "vector_entry_point" in ENVS[[e["id"] for e in ENVS].index(i)]])
def test_wrong_actions_are_not_taken_by_a_batch(env_id, actions):
    venv = gym.make_vec(env_id, 2)
    venv.reset(seed=0)
    with pytest.raises(ValueError, match="expected"):
        venv.step(np.array(actions))


@pytest.mark.parametrize("env_id", IDS)
def test_copies_start_like_the_original(env_id):
    env = make_env(env_id)
    copies = [pickle.loads(pickle.dumps(env)), copy.deepcopy(env)]
    env.reset(seed=1)  # a copy has a state of its own
    first, _ = env.reset(seed=0)
    for other in copies:
        assert_same(first, other.reset(seed=0)[0])


@pytest.mark.parametrize("env_id", IDS)
def test_ppo_of_stable_baselines_trains_512_steps(env_id):
    from stable_baselines3 import PPO

    env = make_env(env_id)
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    assert PPO(policy, env, n_steps=512, n_epochs=1, device="cpu", seed=0).learn(512).num_timesteps == 512


def rows(obs, i):
    """Row i of a batched observation, an array of dictionaries included."""
    return {k: v[i] for k, v in obs.items()} if isinstance(obs, dict) else obs[i]


def assert_same(a, b, **tolerance):
    """Equal, floats within `tolerance`; dictionaries by key, arrays of objects by entry."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k], **tolerance)
    elif isinstance(a, np.ndarray) and a.dtype == object:
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, **tolerance)
    elif a is None:
        assert b is None
    else:
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("env_id", IDS)
def test_sync_equals_single_environments_with_the_same_seeds(env_id):
    venv, singles = make_vec(env_id, 2, "sync", seed=3), [make_env(env_id) for _ in range(2)]
    assert isinstance(venv, SyncVectorEnv) and venv.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    obs, _ = venv.reset(seed=7)
    for i, env in enumerate(singles):
        assert_same(rows(obs, i), env.reset(seed=7 + i)[0])
    venv.action_space.seed(0)
    for _ in range(105):
        actions = venv.action_space.sample()
        obs, reward, terminated, truncated, infos = venv.step(actions)
        for i, env in enumerate(singles):
            single, *rest, _ = env.step(actions[i])
            assert rest == [reward[i], terminated[i], truncated[i]]
            if terminated[i] or truncated[i]:
                assert_same(rows(infos["final_obs"], i), single)
                single, _ = env.reset()
            assert_same(rows(obs, i), single)
    venv.close()


@pytest.mark.parametrize("env_id", BATCHED)
def test_batched_form_equals_sync(env_id):
    ours, theirs = gym.make_vec(env_id, 3), make_vec(env_id, 3, "sync")
    assert not isinstance(ours, SyncVectorEnv) and ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert ours.single_observation_space == theirs.single_observation_space and ours.action_space == theirs.action_space
    close = {"rtol": 1e-3, "atol": 1e-4}  # a network on three rows rounds otherwise than on one, and 20 denoising steps carry it on
    assert_same(ours.reset(seed=5)[0], theirs.reset(seed=5)[0], **close)
    assert ours.np_random_seed == theirs.np_random_seed == (5, 6, 7)
    ours.action_space.seed(0)
    ends, longest = 0, getattr(getattr(ours, "task", None), "max_new_tokens", 40)  # steps until a text is over at the latest
    for _ in range(longest + 5):
        actions = ours.action_space.sample()
        for a, b in zip(a_step := ours.step(actions), theirs.step(actions), strict=True):
            assert_same(a, b, **close)
        ends += int(a_step[2].sum())
    assert ends


def horizon(venv):
    """Steps after which an episode of a batched form is over at the latest."""
    task = getattr(venv.unwrapped, "task", None)
    return venv.unwrapped.oracle.H if task is None else getattr(task, "max_new_tokens", None) or task.num_steps


@pytest.mark.parametrize("env_id", BATCHED)
def test_batched_form_takes_a_limit_that_cuts_nothing(env_id):
    limit = horizon(gym.make_vec(env_id, 1))
    gym.make_vec(env_id, 2, max_episode_steps=limit).close()
    with pytest.raises(ValueError, match=f"max_episode_steps {limit - 1} would cut .* of {limit} .*leave it out"):
        gym.make_vec(env_id, 2, max_episode_steps=limit - 1)
