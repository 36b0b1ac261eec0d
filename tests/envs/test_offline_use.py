"""Transforms, scores, measures, and logged episodes as an environment."""

import dataclasses
import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as gymnasium_check_env

import markovia  # noqa: F401  (registers the ids)
from markovia.envs.exact.offline import pointmass_data
from markovia.envs.offline import (
    About,
    ObsTransform,
    Reference,
    Transform,
    Transitions,
    action_coverage,
    concatenate,
    reference,
    returns_histogram,
    reward_transform,
    score_pct,
    state_action_coverage,
    terminate_at,
    trajectory_quality,
)
from markovia.envs.offline.measures import distinct, shared_limits
from markovia.envs.offline.replay import OfflineReplayEnv
from markovia.envs.offline.scores import references
from markovia.envs.offline.transforms import REWARD_TRANSFORMS


def discrete(obs, action, reward, ends, space=3):
    """Integer states and actions; the rows in `ends` terminate."""
    n = len(obs)
    terminated = np.isin(np.arange(n), ends)
    episode = np.cumsum(np.append(0, terminated[:-1]))
    about = About("toy", None, None, spaces.Discrete(10), spaces.Discrete(space))
    arrays = np.asarray(obs), np.asarray(action), np.asarray(reward, dtype=np.float64), np.asarray(obs)
    return Transitions(*arrays, terminated, np.zeros(n, dtype=bool), episode, about=about)


# -- transforms -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARD_TRANSFORMS)
def test_reward_transforms_can_be_undone_and_saved(name, tmp_path):
    data = pointmass_data("mix", episodes=6)
    transform = Transform(reward_transform(name, data), ObsTransform.fit(data))
    again = Transform.load(transform.save(tmp_path / "transform.json"))
    assert again.reward == transform.reward and again.reward.name == name
    np.testing.assert_array_equal(again(data).obs, transform(data).obs)
    np.testing.assert_allclose(transform.reward.inverse(transform(data).reward), data.reward, atol=1e-5)
    assert transform(data).reward.dtype == data.reward.dtype


def test_reward_transforms_by_hand():
    data = discrete([0, 1, 2, 0], [0] * 4, [0.0, 0.0, 1.0, -1.0], ends=[2, 3])
    values = {
        "none": [0, 1],
        "return_range": [0, 500],  # returns 1 and -1: 1000 / 2, for there is no time limit
        "antmaze_minus1": [-1, 0],
        "cql_antmaze": [-5, 5],
        "cql_antmaze_old": [-2, 2],
        "x100": [0, 100],
        "adroit_binary": [5, 15],
        "kitchen_minus4": [-4, -3],
    }
    assert values.keys() == REWARD_TRANSFORMS.keys()
    for name, expected in values.items():
        np.testing.assert_array_equal(reward_transform(name, data)(np.array([0.0, 1.0])), expected)
    short = dataclasses.replace(data, about=dataclasses.replace(data.about, horizon=200))
    assert reward_transform("return_range", short)(np.array([1.0])) == 100  # 200 / 2
    with pytest.raises(ValueError, match="return_range"):
        reward_transform("range", data)
    with pytest.raises(ValueError, match="nothing to scale by"):
        reward_transform("return_range", data.episodes([0]))


def test_the_reference_of_raw_returns_goes_where_rewards_change():
    data = pointmass_data("mix", episodes=2)
    assert data.about.reference is not None
    assert Transform(reward_transform("none", data), ObsTransform.fit(data))(data).about.reference == data.about.reference
    assert Transform(reward_transform("x100", data))(data).about.reference is None


def test_observation_transform_is_of_s_alone_and_applied_to_both():
    data = pointmass_data("expert", episodes=5)
    changed = Transform(reward_transform("none", data), ObsTransform.fit(data))(data)
    s = data.obs.astype(np.float64)
    np.testing.assert_allclose(changed.next_obs, (data.next_obs - s.mean(0)) / (s.std(0) + 1e-3), atol=1e-5)
    np.testing.assert_allclose(changed.obs.mean(0), 0.0, atol=1e-5)
    two = dataclasses.replace(data, obs={"a": data.obs}, next_obs={"a": data.next_obs})
    transform = Transform(reward_transform("none", two), ObsTransform.fit(two))
    np.testing.assert_array_equal(Transform.from_json(json.loads(json.dumps(transform.to_json())))(two).obs["a"], changed.obs)


def test_a_foreign_transform_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"rewards": 1}')
    with pytest.raises(ValueError, match="no saved transform"):
        Transform.load(tmp_path / "x.json")


def test_success_terminates():
    data = discrete([0, 1, 2, 3, 4, 5], [0] * 6, [0, 1, 0, 0, 1, 0], ends=[5])
    changed = terminate_at(data)
    assert changed.terminated.tolist() == [False, True, False, False, True, True]
    assert changed.episode.tolist() == [0, 0, 1, 1, 1, 2]
    assert changed.has_next_action.tolist() == [True, False, True, True, False, False]
    assert changed.returns().tolist() == [1, 1, 0]


# -- scores ---------------------------------------------------------------------------------------------------------------------------


def test_reference_scores():
    # (3234.3 + 20.272305) / (3234.3 + 20.272305) and the middle between both
    assert score_pct(3234.3, "hopper-medium-v2", 1000) == pytest.approx(100.0)
    assert score_pct([-20.272305, 1607.0138475], "hopper-expert-v0", 1000).tolist() == pytest.approx([0.0, 50.0])
    assert score_pct(0.35, "antmaze-large-play-v2", 1000) == pytest.approx(35.0)
    assert reference("pen-human-v1", 100).maximum == 3076.8331017826877
    assert "89141a6" in reference("kitchen-mixed-v0", 280).source
    with pytest.raises(ValueError, match="at most 700 steps, not 1000"):
        reference("antmaze-umaze-v2", 1000)
    with pytest.raises(ValueError, match=r"did you mean .*hopper-medium-v"):
        reference("hopper-medium-v5", 1000)
    with pytest.raises(ValueError, match="below the maximum"):
        Reference("x", 1, 2.0, 2.0, "")


def test_every_reference_is_whole():
    assert len(references()) == 147
    for (env_id, horizon), r in references().items():
        assert r.minimum < r.maximum and 50 <= horizon <= 1000 and r.source and r.env_id == env_id


# -- measures -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "saco-tq")
@pytest.mark.check("bad_input", "saco-tq")
def test_trajectory_quality_by_hand():
    data = discrete([0, 1, 2, 3, 4], [0] * 5, [1, 2, 3, 4, 50], ends=[1, 3])  # returns 3 and 7; the last episode is cut
    assert trajectory_quality(data, 1.0, 9.0) == pytest.approx((5 - 1) / 8)
    with pytest.raises(ValueError, match="minimum < maximum"):
        trajectory_quality(data, 1.0, 1.0)
    with pytest.raises(ValueError, match="no complete episode"):
        trajectory_quality(data.episodes([2]), 0.0, 1.0)


@pytest.mark.check("value", "saco-tq")
@pytest.mark.check("invariance", "saco-tq")
def test_state_action_coverage_by_hand():
    data = discrete([0, 0, 1, 1], [0, 0, 0, 1], [0] * 4, ends=[3])  # (0,0), (1,0), (1,1): 3 pairs
    replay = discrete([0, 0, 1, 1, 2], [0, 1, 0, 1, 2], [0] * 5, ends=[4])  # 4 pairs in the first 4 rows
    assert state_action_coverage(data, replay) == pytest.approx(0.75)
    assert state_action_coverage(replay, data) == pytest.approx(4 / 3)
    assert state_action_coverage(data, data) == 1.0
    shuffled = data.rows(np.array([2, 0, 3, 1]))
    assert state_action_coverage(shuffled, replay) == pytest.approx(0.75)
    grown = concatenate([data, discrete([5, 6, 7, 8], [0, 0, 0, 0], [0] * 4, ends=[3])])  # 4 of its 8 rows: from both halves
    assert state_action_coverage(grown, discrete([0] * 4, [0] * 4, [0] * 4, ends=[3])) == 4.0
    with pytest.raises(ValueError, match="numbers per"):
        state_action_coverage(data, pointmass_data("mix", episodes=1))


def test_cells_need_shared_limits():
    narrow, wide = np.linspace(0, 1, 11)[:, None], np.linspace(0, 10, 11)[:, None]
    assert distinct(narrow, shared_limits([narrow]), 10) == 10  # the upper limit belongs to the last cell
    assert distinct(narrow, shared_limits([narrow, wide]), 10) == 2  # [0, 1) and 1.0
    assert distinct(np.ones((5, 2)), shared_limits([np.ones((5, 2))]), 100) == 1
    states = np.arange(300)[:, None].astype(float)
    assert distinct(states, shared_limits([states]), 100) == 100
    assert distinct(states, shared_limits([states]), 100, np.array([True])) == 300  # discrete states never share a cell
    far = np.array([[0.0], [2.0**32], [1.0]])
    assert distinct(far, shared_limits([far]), 100, np.array([True])) == 3  # integers that 32 bits would take for one
    # against sets of rounded tuples
    rng = np.random.default_rng(0)
    table = rng.random((500, 2))
    cells = {tuple(np.minimum((row * 7).astype(int), 6)) for row in table}
    assert distinct(table, (np.zeros(2), np.ones(2)), 7) == len(cells)


def test_action_coverage_by_hand():
    data = discrete([0] * 4, [1, 1, 1, 3], [0] * 4, ends=[3], space=4)
    found = action_coverage(data)
    assert found.share.tolist() == [0, 0.75, 0, 0.25] and found.covered.tolist() == [0.5]
    box = spaces.Box(-1, 1, (2,), np.float32)
    actions = np.array([[-1, 0], [-0.95, 0], [0.05, 0], [1, 0]], dtype=np.float32)
    found = action_coverage(dataclasses.replace(data, action=actions, next_action=actions, about=About("b", None, None, None, box)), bins=10)
    assert found.covered.tolist() == pytest.approx([0.3, 0.1]) and found.at_bound.tolist() == [0.5, 0.0]
    uniform = action_coverage(pointmass_data("random"))
    assert (uniform.covered == 1).all() and (uniform.at_bound < 0.03).all()
    huge = action_coverage(discrete([0] * 4, [2**40, 2**40, 0, 1], [0] * 4, ends=[3], space=2**40 + 1))
    assert huge.share is None and huge.covered.tolist() == [3 / (2**40 + 1)]
    counts, edges = returns_histogram(pointmass_data("random"), bins=5)
    assert counts.sum() == 250 and len(edges) == 6


@pytest.mark.parametrize("value", [0.6, 1e-3, -7e4, 1e20])
def test_returns_that_differ_by_rounding_have_a_histogram(value):
    data = discrete([0, 0], [0, 0], [value, np.nextafter(value, 0)], ends=[0, 1])
    counts, edges = returns_histogram(data, bins=5)
    assert counts.tolist() == [0, 0, 2, 0, 0] and edges[0] < value < edges[-1]


# -- replay ---------------------------------------------------------------------------------------------------------------------------

REPLAY = "markovia/OfflineReplay-v0"


@pytest.mark.parametrize("dataset", ["fixture:maze", "fixture:bandit2d"])  # the default is checked with every other id
def test_both_check_envs_pass_without_a_warning(dataset):
    check = pytest.importorskip("stable_baselines3.common.env_checker").check_env
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(gym.make(REPLAY, dataset=dataset).unwrapped, skip_render_check=True)
        check(gym.make(REPLAY, dataset=dataset))


def test_replay_gives_the_logged_rows():
    data = pointmass_data("medium", episodes=3)
    env = OfflineReplayEnv(data=data)
    obs, info = env.reset(seed=0, options={"episode": 2})
    for t in range(40):
        np.testing.assert_array_equal(obs, data.obs[80 + t])
        np.testing.assert_array_equal(info["logged_action"], data.action[80 + t])
        obs, reward, terminated, truncated, info = env.step(info["logged_action"])
        assert reward == data.reward[80 + t] and info["action_distance"] == 0.0 and not terminated and truncated == (t == 39)
    assert "logged_action" not in info and info["logged_step"] == 40
    with pytest.raises(ValueError, match="reset"):
        env.step(env.action_space.sample())
    with pytest.raises(ValueError, match=r"0\.\.2"):
        env.reset(options={"episode": 3})
    picked = {env.reset(seed=seed)[1]["logged_episode"] for seed in range(20)}
    assert picked == {0, 1, 2}


def test_replay_terminates_and_cuts_as_logged():
    data = discrete([4, 5, 6], [0, 1, 2], [1, 2, 3], ends=[1])
    env = OfflineReplayEnv(data=data)
    env.reset(options={"episode": 0})
    assert env.step(1)[1:4] == (1.0, False, False)
    assert env.step(1)[1:4] == (2.0, True, False)
    env.reset(options={"episode": 1})
    _, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated, info["action_distance"]) == (3.0, False, True, 1.0)


def test_replay_serves_no_observation_of_another_episode():
    """Episodes of a flat file: cut at row 1, terminated at row 3; nobody logged what came after either."""
    data = discrete([4, 5, 6, 7], [0] * 4, [1, 2, 3, 4], ends=[3])
    ends = {"episode": np.array([0, 0, 1, 1]), "truncated": np.arange(4) == 1, "next_known": np.arange(4) % 2 == 0}
    flat = dataclasses.replace(data, next_obs=np.array([5, 6, 7, 0]), **ends)
    env = OfflineReplayEnv(data=flat)
    env.reset(options={"episode": 0})
    assert env.step(0)[:4] == (5, 1.0, False, True)
    env.reset(options={"episode": 1})
    assert env.step(0)[:4] == (7, 3.0, False, False)
    assert env.step(0)[:4] == (7, 4.0, True, False)


def test_replay_numbers_episodes_as_the_dataset_does():
    """The first and the third of four episodes are one step long, cut, and without a successor."""
    data = discrete([4, 5, 6, 7, 8], [0] * 5, [1, 2, 3, 4, 5], ends=[])
    truncated = np.array([1, 0, 1, 1, 1], dtype=bool)
    ends = {"episode": np.array([0, 1, 1, 2, 3]), "truncated": truncated, "next_known": np.array([0, 1, 1, 0, 1], dtype=bool)}
    env = OfflineReplayEnv(data=dataclasses.replace(data, **ends))
    for episode, first in ((1, 5), (3, 8)):
        obs, info = env.reset(options={"episode": episode})
        assert obs == first and info["logged_episode"] == episode
    for episode in (0, 2):
        with pytest.raises(ValueError, match=f"no step of episode {episode} can be replayed: nobody logged the observation after it"):
            env.reset(options={"episode": episode})
    with pytest.raises(ValueError, match=r"0\.\.3, got 4"):
        env.reset(options={"episode": 4})
    assert {env.reset(seed=seed)[1]["logged_episode"] for seed in range(10)} == {1, 3}


def test_replay_of_a_file_that_does_not_say_its_time_limit(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for name, shape in {"observations": (6, 2), "actions": (6, 1), "rewards": 6, "terminals": 6}.items():
            file[name] = np.zeros(shape)
    with pytest.raises(ValueError, match="pass horizon="):
        gym.make(REPLAY, dataset=str(tmp_path / "x.hdf5"))
    env = gym.make(REPLAY, dataset=str(tmp_path / "x.hdf5"), horizon=3, env_id="hopper-medium-v2")
    assert env.unwrapped.data.num_episodes == 2 and env.unwrapped.data.about.env_id == "hopper-medium-v2"


def test_replay_needs_spaces_and_known_names():
    with pytest.raises(ValueError, match="observation and action space"):
        OfflineReplayEnv(data=dataclasses.replace(pointmass_data("medium", episodes=1), about=About("bare")))
    with pytest.raises(ValueError, match="pointmass2d/medium"):
        gym.make(REPLAY, dataset="fixture:point")


def test_importing_offline_data_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, markovia.envs.offline.replay, markovia.envs.exact.offline; assert not {'torch', 'h5py', 'minari'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def cut_short():
    """Four episodes of reward -1 a step and four steps, the last one cut by the file's end after two."""
    data = pointmass_data("random", episodes=4)
    keep = np.concatenate([np.arange(40 * k, 40 * k + 4) for k in range(4)])[:-2]
    ends = np.zeros(14, dtype=bool)
    ends[[3, 7, 11]] = True
    return dataclasses.replace(data.rows(keep), reward=-np.ones(14, np.float32) - 0.1 * (np.arange(14) == 5), truncated=ends)


def test_an_episode_that_the_file_cut_is_not_judged_by_its_part():
    """With costs for rewards the shortest part has the best return: -2 where whole episodes have -4, -4.1 and -4."""
    data = cut_short()
    assert data.returns().tolist() == pytest.approx([-4, -4.1, -4, -2]) and data.whole().num_episodes == 3
    assert [len(data.best(f)) for f in (0.25, 0.5, 0.75, 1.0)] == [4, 8, 12, 14]
    assert data.best(0.25).episode.tolist() == [0] * 4 and set(data.best(0.5).episode.tolist()) == {0, 2}
    assert reward_transform("return_range", data).scale == pytest.approx((data.about.horizon or 1000) / 0.1, rel=1e-4)
    nowhere = dataclasses.replace(data, truncated=np.zeros(14, dtype=bool))
    assert nowhere.whole() is nowhere and len(nowhere.best(0.25)) == 2


def test_a_transform_of_some_keys_leaves_the_others_alone():
    rows = pointmass_data("random", episodes=1)
    obs = {"x": rows.obs, "eye": np.full((40, 2, 2, 3), 7, np.uint8)}
    data = dataclasses.replace(rows, obs=obs, next_obs=obs, about=About("eyes"))
    fitted = ObsTransform.fit(data, keys=["x"])
    assert list(fitted.mean) == ["x"]
    seen = fitted(obs)
    assert seen["eye"] is obs["eye"]
    np.testing.assert_allclose(seen["x"].mean(0), 0.0, atol=1e-6)
    again = Transform.from_json(Transform(reward_transform("none", data), fitted).to_json())
    np.testing.assert_array_equal(again.obs(obs)["x"], seen["x"])


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_replay_shows_observations_of_the_spaces_own_type(dtype, keys):
    """Minari does not hold files to the type that they declare."""
    data = pointmass_data("random", episodes=2)
    obs = (10 * data.obs).astype(dtype)
    space = gym.spaces.Box(-100.0, 100.0, obs.shape[1:], np.float32)
    obs, space = ({"x": obs}, gym.spaces.Dict({"x": space})) if keys else (obs, space)
    about = dataclasses.replace(data.about, observation_space=space)
    env = OfflineReplayEnv(data=dataclasses.replace(data, obs=obs, next_obs=obs, about=about))
    assert space.contains(env.reset(seed=0)[0]) and space.contains(env.step(env.action_space.sample())[0])
    gymnasium_check_env(env, skip_render_check=True)
