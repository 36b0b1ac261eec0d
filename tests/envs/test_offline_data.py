"""Rows of logged decisions: next actions, returns, views; Minari and D4RL in and out; what faulty files are told."""

import dataclasses
import json
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import markovia  # noqa: F401  (registers the ids)
from markovia.dataset import describe
from markovia.envs.exact.offline import pointmass_data
from markovia.envs.offline import (
    About,
    DatasetError,
    Transitions,
    check_d4rl,
    check_minari,
    check_transitions,
    concatenate,
    load,
    load_d4rl,
    load_minari,
    reward_transform,
    write_d4rl,
    write_minari,
)
from markovia.envs.offline.d4rl import counted_timeouts

h5py = pytest.importorskip("h5py")
BOX = spaces.Box(-np.inf, np.inf, (1,), np.float64)


def logged(ends="..T..t.", rewards=(1, 2, 3, 4, 5, 6, 7)):
    """Rows 0, 1, 2, ...: obs and action count them; T ends an episode by termination, t by truncation, the last one is cut."""
    n = len(ends)
    terminated, truncated = (np.array([c == kind for c in ends]) for kind in "Tt")
    count = np.arange(n, dtype=np.float64)[:, None]
    episode = np.cumsum(np.append(0, (terminated | truncated)[:-1]))
    about = About("toy", observation_space=BOX, action_space=BOX)
    return Transitions(count, count + 100, np.array(rewards[:n], dtype=np.float64), count + 1, terminated, truncated, episode, about=about)


# -- rows -----------------------------------------------------------------------------------------------------------------------------


def test_next_logged_action_and_returns_by_hand():
    data = logged()
    np.testing.assert_array_equal(data.next_action[:, 0], [101, 102, 102, 104, 105, 105, 106])
    np.testing.assert_array_equal(data.has_next_action, [1, 1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(data.returns(), [6, 15, 7])
    # 1 + 2/2 + 3/4;  4 + 5/2 + 6/4;  7
    np.testing.assert_allclose(data.returns(0.5), [2.75, 8.0, 7.0])
    np.testing.assert_array_equal(data.complete(), [True, True, False])
    np.testing.assert_array_equal(data.lengths(), [3, 3, 1])


def test_returns_to_go_by_hand():
    data = logged()
    # gamma 1/2: 3, 2 + 3/2, 1 + 3.5/2 | 6, 5 + 6/2, 4 + 8/2 | 7
    np.testing.assert_allclose(data.returns_to_go(0.5, cut="zero"), [2.75, 3.5, 3, 8, 8, 6, 7])
    # after the truncated and the cut episode the last reward r for ever: r / (1 - 1/2); after the terminated one nothing
    np.testing.assert_allclose(data.returns_to_go(0.5, cut="repeat_last"), [2.75, 3.5, 3, 9.5, 11, 12, 14])
    failed = logged(".....t.", rewards=(-1,) * 7)
    np.testing.assert_allclose(failed.returns_to_go(0.9, cut="repeat_last"), -10.0)  # r_fail / (1 - gamma) everywhere
    with pytest.raises(ValueError, match="gamma < 1"):
        data.returns_to_go(1.0, cut="repeat_last")
    with pytest.raises(ValueError, match="'zero' or 'repeat_last'"):
        data.returns_to_go(0.9, cut="none")


def test_views_drop_what_can_not_be_bootstrapped():
    data = logged()
    assert data.view() is data
    np.testing.assert_array_equal(data.view("d4rl").obs[:, 0], [0, 1, 2, 3, 4, 6])
    np.testing.assert_array_equal(data.view(next_action=True).obs[:, 0], [0, 1, 2, 3, 4])
    # the action that follows row 4 was logged in row 5, which the d4rl view drops: it stays
    np.testing.assert_array_equal(data.view("d4rl").next_action[:, 0], [101, 102, 102, 104, 105, 106])
    unknown = dataclasses.replace(data, next_known=np.array([1, 1, 0, 1, 1, 0, 1], dtype=bool))
    np.testing.assert_array_equal(unknown.view().obs[:, 0], [0, 1, 2, 3, 4, 6])  # row 2 terminates and needs no successor
    with pytest.raises(ValueError, match="compat"):
        data.view("D4RL")


def test_terminated_wins_over_truncated():
    data = logged("..T")
    both = dataclasses.replace(data, truncated=np.array([False, False, True]))
    assert not both.truncated.any() and both.terminated[2]


def test_best_episodes_keep_true_borders():
    data = logged(".t.t.t.t", rewards=(1, 1, 5, 5, 3, 3, 2, 2))
    assert data.best(0.5).returns().tolist() == [10, 6]  # ceil(0.5 * 4) episodes, in logged order
    assert data.best(0.01).returns().tolist() == [10]
    with pytest.raises(ValueError, match="fraction"):
        data.best(0.0)


def test_concatenation_renumbers_and_keeps_last_rows_apart():
    a, b = logged(), logged()
    joined = concatenate([a, b], "both")
    assert joined.num_episodes == 6 and len(joined) == 14 and joined.about.name == "both"
    np.testing.assert_array_equal(joined.returns(), np.tile([6.0, 15.0, 7.0], 2))
    assert not joined.has_next_action[6]
    np.testing.assert_array_equal(concatenate([a.episodes([1]), b]).episode, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    with pytest.raises(ValueError, match="data of one task"):
        concatenate([a, pointmass_data("random", episodes=2)])


def test_dictionary_observations():
    data = logged()
    two = {"b": data.obs, "a": np.repeat(data.obs, 2, axis=1)}
    space = spaces.Dict([("b", BOX), ("a", spaces.Box(-np.inf, np.inf, (2,), np.float64))])
    about = dataclasses.replace(data.about, observation_space=space)
    data = dataclasses.replace(data, obs=two, next_obs={k: v + 1 for k, v in two.items()}, about=about)
    assert check_transitions(data).faults == ()
    flat = data.flat_obs(["a", "b"])
    np.testing.assert_array_equal(flat.obs[3], [3, 3, 3])
    assert flat.about.observation_space.shape == (3,)
    assert data.rows(np.array([2])).obs["a"].shape == (1, 2)
    bytes_ = {k: v.astype(np.uint8) for k, v in two.items()}
    space = dataclasses.replace(data, obs=bytes_, next_obs=bytes_).flat_obs().about.observation_space
    assert space.dtype == np.uint8 and space.low.max() == 0 and space.high.min() == 255
    with pytest.raises(ValueError, match="it has b, a"):
        data.flat_obs(["c"])


def test_columns_of_other_lengths_are_refused():
    data = logged()
    with pytest.raises(ValueError, match="action has 6 rows, but reward has 7"):
        dataclasses.replace(data, action=data.action[:-1])
    with pytest.raises(ValueError, match="no transitions"):
        data.rows(np.zeros(7, dtype=bool))


# -- Minari ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def minari_root(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def same(a, b):
    for name in ("obs", "action", "reward", "next_obs", "terminated", "truncated", "episode", "next_action", "has_next_action"):
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, dict):
            assert list(x) == list(y)
            x, y = (np.concatenate([v[k].reshape(len(v[k]), -1) for k in v], axis=1) for v in (x, y))
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert x.dtype == y.dtype, name


def test_minari_round_trip_and_environment(minari_root):
    import minari

    data = pointmass_data("medium", episodes=4)
    written = write_minari(data, "markovia/toy/medium-v0", metadata={"algorithm_name": "by hand", "author": ["a", "b"], "own": {"seed": 0}})
    assert [len(ep.observations) for ep in written.iterate_episodes()] == [41] * 4
    back = load("markovia/toy/medium-v0")
    same(back, data)
    assert back.about.metadata["own"] == {"seed": 0} and set(back.about.metadata["author"]) == {"a", "b"}
    assert back.about.reference.minimum == data.about.reference.minimum and back.about.horizon == 40
    env = minari.load_dataset("markovia/toy/medium-v0").recover_environment()
    assert env.spec.id == "markovia/PointMass2D-v0" and env.spec.max_episode_steps == 40
    write_minari(back, "markovia/toy/again-v0")
    same(load("markovia/toy/again-v0"), data)
    score = minari.get_normalized_score(written, np.array([data.about.reference.maximum]))
    assert score == pytest.approx(1.0)
    assert set(minari.list_local_datasets()) == {"markovia/toy/medium-v0", "markovia/toy/again-v0"}


def test_minari_keeps_types_flags_and_dictionaries(minari_root):
    n = 5
    obs = {"image": np.arange(n * 32 * 32, dtype=np.int64).reshape(n, 32, 32).astype(np.uint8), "x": np.arange(n, dtype=np.float32)[:, None]}
    following = {"image": np.roll(obs["image"], -1, 0), "x": np.roll(obs["x"], -1, 0)}
    space = spaces.Dict({"image": spaces.Box(0, 255, (32, 32), np.uint8), "x": spaces.Box(-9, 9, (1,), np.float32)})
    terminated, truncated = np.array([0, 1, 0, 0, 0], dtype=bool), np.array([0, 0, 0, 0, 1], dtype=bool)
    about = About("toy", None, None, space, spaces.Discrete(3))
    data = Transitions(obs, np.array([0, 1, 2, 0, 1]), np.ones(n), following, terminated, truncated, np.array([0, 0, 1, 1, 1]), about=about)
    write_minari(data, "dicts-v0")
    same(load_minari("dicts-v0"), data)  # images without loss
    flat = load_minari("dicts-v0", ["x"])
    assert flat.obs.shape == (n, 1)


def test_minari_filtered_views_and_ids(minari_root):
    dataset = write_minari(pointmass_data("mix", episodes=5), "mix-v3")
    best = load_minari(dataset.filter_episodes(lambda ep: ep.id == 4))
    assert best.num_episodes == 1 and best.returns()[0] == pytest.approx(pointmass_data("mix", episodes=5).returns()[4])
    with pytest.raises(ValueError, match="add the version"):
        load("mix")
    with pytest.raises(ValueError, match=r"did you mean .*mix-v3"):
        load("mix-v2")
    with pytest.raises(ValueError, match="exists already"):
        write_minari(pointmass_data("mix", episodes=1), "mix-v3")
    with pytest.raises(ValueError, match="letters, digits"):
        write_minari(pointmass_data("mix", episodes=1), "a b-v0")


def test_a_failed_write_leaves_nothing(minari_root, monkeypatch):
    from markovia.envs.offline import minari_io

    monkeypatch.setattr(minari_io, "_buffers", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_minari(pointmass_data("mix", episodes=1), "ns/broken-v0")
    assert [p for p in minari_root.rglob("*") if p.is_file()] == []


@pytest.mark.filterwarnings("ignore::UserWarning:minari")  # it asks for authors and code links
def test_faulty_minari_is_reported(minari_root):
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    x = np.zeros((3, 2))
    nan = x.copy()
    nan[1, 0] = np.nan
    flags = {"terminations": np.array([0, 0, 1], dtype=bool), "truncations": np.array([0, 0, 1], dtype=bool)}
    buffers = [
        EpisodeBuffer(observations=x, actions=nan, rewards=np.ones(3), **flags),  # T observations
        EpisodeBuffer(
            observations=np.zeros((4, 2)), actions=x, rewards=np.ones(3), terminations=np.array([True, False, True]), truncations=np.zeros(3, bool)
        ),
    ]
    box = spaces.Box(-1, 1, (2,), np.float64)
    minari.create_dataset_from_buffers("faulty-v0", buffers, observation_space=box, action_space=box)
    text = str(check_minari("faulty-v0"))
    assert "fault  episode 0: observations, row 3: 3 rows, expected 4" in text
    assert "fault  episode 0: actions, row 1: nan" in text
    assert "note   episode 0: truncations, row 2: terminated and truncated at once" in text
    assert "fault  episode 1: terminations / truncations, row 0: an end flag before the last step" in text
    with pytest.raises(DatasetError, match="observations, row 3"):
        load("faulty-v0")
    file = minari_root / "faulty-v0" / "data" / "main_data.hdf5"
    images = [EpisodeBuffer(observations=np.zeros((4, 16, 16, 3)), actions=x, rewards=np.ones(3), **flags)]
    minari.create_dataset_from_buffers(
        "images-v0", images, observation_space=spaces.Box(0, 1, (16, 16, 3), np.float64), action_space=box
    )
    assert "note   episode 0: observations, row 0: images of shape (16, 16, 3) as float64" in str(check_minari("images-v0"))
    with h5py.File(file, "a") as whole:
        del whole["episode_1"]["rewards"]
    missing = str(check_minari("faulty-v0"))
    assert "fault  main_data.hdf5, episode 1: can't be read" in missing and "rewards" in missing
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "main_data.hdf5: can't be read" in str(check_minari("faulty-v0"))


# -- D4RL -----------------------------------------------------------------------------------------------------------------------------


def d4rl_file(path, drop=(), **changed):
    """Two episodes of 4 steps (the first terminates, the second times out) and one cut after 2."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.standard_normal((10, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (10, 2)).astype(np.float32),
        "rewards": np.arange(10, dtype=np.float32),
        "terminals": np.arange(10) == 3,
        "timeouts": np.arange(10) == 7,
    }
    arrays = {k: v for k, v in {**arrays, **changed}.items() if k not in drop}
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path, arrays


def test_d4rl_rows_equal_the_loop_of_d4rl(tmp_path):
    path, arrays = d4rl_file(tmp_path / "hopper_medium-v2.hdf5")
    data = load(path)
    assert data.about.env_id == "hopper-medium-v2" and data.about.horizon == 1000 and data.about.reference.maximum == 3234.3
    assert data.returns().tolist() == [6, 22, 17]
    # D4RL's Q-learning view, written out: all rows but the last one and those with a timeout
    rows = [i for i in range(9) if not arrays["timeouts"][i]]
    view = data.view("d4rl")
    np.testing.assert_array_equal(view.obs, arrays["observations"][rows])
    np.testing.assert_array_equal(view.next_obs, arrays["observations"][[i + 1 for i in rows]])
    np.testing.assert_array_equal(view.terminated, arrays["terminals"][rows])
    assert len(data.view("minari")) == 8  # the successor of row 7 is not in the file


def test_d4rl_with_next_observations_and_column_vectors(tmp_path):
    following = np.ones((10, 3), dtype=np.float32)
    path, _ = d4rl_file(tmp_path / "x.hdf5", next_observations=following, rewards=np.arange(10.0)[:, None])
    with pytest.warns(UserWarning, match="differs from observations of row 1"):
        data = load_d4rl(path)
    assert len(data.view()) == 10 and len(data.view("d4rl")) == 9 and data.reward.shape == (10,)
    np.testing.assert_array_equal(data.next_obs, following)
    assert data.about.env_id is None and data.about.reference is None


def test_d4rl_without_timeouts_counts_steps(tmp_path):
    path, _ = d4rl_file(tmp_path / "x.hdf5", drop=("timeouts",))
    assert "timeouts: missing key" in str(check_d4rl(path))
    with pytest.raises(DatasetError, match="pass horizon="):
        load_d4rl(path)
    np.testing.assert_array_equal(np.flatnonzero(load_d4rl(path, horizon=2).truncated), [1, 5, 7, 9])  # row 3 terminates instead
    np.testing.assert_array_equal(np.flatnonzero(counted_timeouts(np.arange(10) == 1, 3)), [4, 7])


def test_d4rl_round_trip(tmp_path):
    data = pointmass_data("medium", episodes=3)
    same(load_d4rl(write_d4rl(data, tmp_path / "p.hdf5")), data)


def test_d4rl_is_not_written_with_successors_that_nobody_knows(tmp_path):
    path, _ = d4rl_file(tmp_path / "x.hdf5")
    data = load_d4rl(path)
    with pytest.raises(DatasetError, match=r"next_obs, row 7: the episode's final observation is not known; write data.view\(\)"):
        write_d4rl(data, tmp_path / "y.hdf5")
    again = load_d4rl(write_d4rl(data.view(), tmp_path / "y.hdf5"))
    assert len(again) == len(data.view()) == 8 and again.next_known.all()
    np.testing.assert_array_equal(again.episode, data.view().episode)
    np.testing.assert_array_equal(np.flatnonzero(again.truncated), [6])  # a cut episode that others follow


def test_integers_of_a_d4rl_file(tmp_path):
    """Rewards become numbers that can be scaled; actions are choices, one or several."""
    data = load_d4rl(d4rl_file(tmp_path / "x.hdf5", rewards=np.arange(10, dtype=np.uint8), actions=np.arange(10)[:, None] % 3)[0])
    assert data.reward.dtype == np.float32 and data.about.action_space == spaces.Discrete(3) and data.action.shape == (10,)
    np.testing.assert_array_equal(reward_transform("antmaze_minus1", data)(data.reward), np.arange(10) - 1.0)
    wide = load_d4rl(d4rl_file(tmp_path / "y.hdf5", actions=np.stack([np.arange(10) % 2, np.arange(10) % 4], 1))[0])
    assert wide.about.action_space == spaces.MultiDiscrete([2, 4])
    assert describe(str(tmp_path / "x.hdf5"))[0]["action_share"] == pytest.approx([0.4, 0.3, 0.3])
    assert describe(str(tmp_path / "y.hdf5"))[0]["action_coverage"] is None


def test_horizon_and_id_of_a_d4rl_file(tmp_path):
    path, _ = d4rl_file(tmp_path / "x.hdf5", drop=("timeouts",))
    with pytest.raises(ValueError, match="horizon must be >= 1, got 0"):
        load_d4rl(path, horizon=0)
    with pytest.raises(ValueError, match="a horizon is told of D4RL files alone"):
        load("fixture:pointmass2d/medium", horizon=4)
    with pytest.warns(UserWarning, match="no reference returns are known for hoper-medium-v2; did you mean 'hopper-medium-v2'"):
        load_d4rl(path, env_id="hoper-medium-v2", horizon=4)


def test_a_horizon_does_not_stand_against_the_timeouts_of_a_file(tmp_path):
    path, _ = d4rl_file(tmp_path / "x.hdf5")  # its episodes have 4, 4 and 2 steps
    assert load(path, horizon=4).about.horizon == 4
    with pytest.raises(DatasetError, match=r"its own ends \(an episode of 4 steps\), which the horizon 3 contradicts; leave the horizon out"):
        load(path, horizon=3)
    assert not check_d4rl(path, horizon=4).faults and check_d4rl(path, horizon=3).fatal
    known, _ = d4rl_file(tmp_path / "hopper_medium-v2.hdf5")
    assert load(known, horizon=1000).about.reference is not None
    with pytest.raises(DatasetError, match="those of hopper-medium-v2, at most 1000 steps"):
        load(known, horizon=200)


def test_shuffled_next_observations_are_noted(tmp_path):
    obs = np.arange(10.0)[:, None]
    following = np.where(np.arange(10)[:, None] == 3, -1.0, obs + 1 + 1e-6)  # row 3 terminates
    path, _ = d4rl_file(tmp_path / "x.hdf5", observations=obs, next_observations=following)
    assert check_d4rl(path).faults == ()
    path, _ = d4rl_file(tmp_path / "y.hdf5", observations=obs, next_observations=following[::-1])
    note = "next_observations, row 0: differs from observations of row 1 in the same episode (7 row(s)); read as it is"
    assert f"note   {note}" in str(check_d4rl(path))
    with pytest.warns(UserWarning, match="differs from observations of row 1"):
        np.testing.assert_array_equal(load_d4rl(path).next_obs, following[::-1])
    pixels = np.zeros((10, 8, 8), np.uint8)
    path, _ = d4rl_file(tmp_path / "z.hdf5", observations=pixels, next_observations=pixels + (np.arange(10) == 1)[:, None, None].astype(np.uint8))
    assert "row 1: differs from observations of row 2 in the same episode (1 row(s))" in str(check_d4rl(path))


@pytest.mark.parametrize(
    ("actions", "row"),
    [
        (-np.arange(1, 11), 0),
        (np.where(np.arange(10) == 4, -2, 1), 4),
        (np.where(np.arange(10) == 5, 2**63 - 1, 1), 5),
        (np.full(10, 2**64 - 1, np.uint64), 0),
        (np.array([[0, 1]] * 9 + [[0, -1]]), 9),
        (np.arange(10, dtype=np.int8), None),
    ],
)
def test_integer_actions_of_a_d4rl_file_are_choices(tmp_path, actions, row):
    path, _ = d4rl_file(tmp_path / "x.hdf5", actions=actions)
    if row is None:
        assert load_d4rl(path).about.action_space == spaces.Discrete(int(actions.max()) + 1)
    else:
        with pytest.raises(DatasetError, match=rf"actions, row {row}: .*; integer actions are choices, counted from 0"):
            load_d4rl(path)


def test_a_written_d4rl_file_is_whole_and_replaces_none(tmp_path, monkeypatch):
    data = pointmass_data("medium", episodes=1)
    create, path = h5py.Group.create_dataset, tmp_path / "p.hdf5"

    def broken(self, name, *args, **kwargs):
        return 1 / 0 if name == "rewards" else create(self, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(h5py.Group, "create_dataset", broken)
        with pytest.raises(ZeroDivisionError):
            write_d4rl(data, path)
    assert list(tmp_path.iterdir()) == []
    write_d4rl(data, path)
    with pytest.raises(ValueError, match=r"p\.hdf5 exists already; choose another name, or delete it"):
        write_d4rl(data, path)
    same(load_d4rl(path), data)


def test_faulty_d4rl_is_reported_by_field_and_row(tmp_path):
    nan = np.zeros((10, 3), dtype=np.float32)
    nan[4, 1] = np.nan
    both = np.arange(10) == 3
    cases = {
        "missing": ({"drop": ("rewards",), "reward": np.zeros(10)}, "fault  rewards: missing key; did you mean 'reward'"),
        "length": ({"actions": np.zeros((9, 2))}, "fault  actions, row 9: 9 rows, expected 10 (observations)"),
        "nan": ({"observations": nan}, "fault  observations, row 4: nan (1 such row(s))"),
        "inf": ({"rewards": np.where(np.arange(10) == 6, np.inf, 0.0)}, "fault  rewards, row 6: inf"),
        "overlap": ({"timeouts": both}, "note   timeouts, row 3: terminated and truncated at once (1 row(s)); read as terminated"),
        "flag": ({"terminals": 2 * (np.arange(10) == 2)}, "fault  terminals, row 2: 2, expected 0 or 1"),
        "next": ({"next_observations": np.zeros((10, 4))}, "fault  next_observations, row 0: has the shape (4,), expected (3,) (observations)"),
        "image": ({"observations": np.zeros((10, 16, 16, 3))}, "note   observations, row 0: images of shape (16, 16, 3) as float64"),
    }
    for name, (changes, message) in cases.items():
        path, _ = d4rl_file(tmp_path / f"{name}.hdf5", **changes)
        report = check_d4rl(path)
        assert message in str(report), str(report)
        assert len(report.faults) == 1
        if message.startswith("fault"):
            with pytest.raises(DatasetError, match=message[7:].split(",")[0].split(":")[0]):
                load_d4rl(path)
        else:
            with pytest.warns(UserWarning, match="row"):
                load_d4rl(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_d4rl(tmp_path / "image.hdf5").obs.dtype == np.float32


def test_damaged_d4rl_is_reported(tmp_path):
    path, _ = d4rl_file(tmp_path / "whole.hdf5")
    (tmp_path / "cut.hdf5").write_bytes(path.read_bytes()[:2000])
    assert "fault  file: is no whole HDF5 file" in str(check_d4rl(tmp_path / "cut.hdf5"))
    (tmp_path / "text.hdf5").write_text("not HDF5")
    assert "is no whole HDF5 file" in str(check_d4rl(tmp_path / "text.hdf5"))
    (tmp_path / "empty.hdf5").touch()
    (tmp_path / "folder.hdf5").mkdir()
    (tmp_path / "pickle.hdf5").write_bytes(pickle.dumps({"observations": [1.0]}))
    wrong = {"none": "does not exist", "empty": "is no whole HDF5 file", "folder": "is a folder", "pickle": "is a pickle of protocol"}
    for name, message in wrong.items():
        (fault,) = check_d4rl(tmp_path / f"{name}.hdf5").faults  # and nothing about keys of a file that nobody could open
        assert fault.field == "file" and message in fault.problem
    # Compressed chunks of 100 rows, one of which is overwritten: its first row is named.
    rows = np.random.default_rng(0).standard_normal((1000, 3))
    with h5py.File(tmp_path / "chunk.hdf5", "w") as file:
        chunked = file.create_dataset("observations", data=rows, chunks=(100, 3), compression="gzip")
        for name, shape in {"actions": (1000, 2), "rewards": 1000, "terminals": 1000, "timeouts": 1000}.items():
            file[name] = np.zeros(shape)
        place = chunked.id.get_chunk_info(3).byte_offset
    with (tmp_path / "chunk.hdf5").open("r+b") as raw:
        raw.seek(place)
        raw.write(b"\0" * 200)
    assert "fault  observations, row 300: can't be read" in str(check_d4rl(tmp_path / "chunk.hdf5"))


def test_what_is_no_dataset_is_told_from_an_unknown_id(tmp_path, minari_root):
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps([1.0]))
    with pytest.raises(ValueError, match=r"rows.pkl is a file of another kind, expected \*.hdf5"):
        load(tmp_path / "rows.pkl")
    with pytest.raises(ValueError, match=r"is a folder, expected .*MINARI_DATASETS_PATH"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no dataset nobody/made-v0 in"):
        load("nobody/made-v0")


def test_rows_in_memory_are_checked():
    data = logged()
    assert check_transitions(data).faults == ()
    moved = dataclasses.replace(data, next_obs=data.next_obs + (np.arange(7) == 3)[:, None])
    assert "next_obs, row 3: differs from obs of row 4" in str(check_transitions(moved))
    early = dataclasses.replace(data, truncated=np.arange(7) == 4)
    assert "row 4: an end flag in the middle of episode 1" in str(check_transitions(early))
    narrow = dataclasses.replace(data.about, action_space=spaces.Box(0, 104, (1,), np.float64))
    assert "note   action, row 5: [105.] lies outside" in str(check_transitions(dataclasses.replace(data, about=narrow)))
    with pytest.raises(DatasetError, match="next_obs, row 3"):
        check_transitions(moved).check()


BOX7, PAIR = spaces.Box(-np.inf, np.inf, (7,)), spaces.Dict({"a": BOX, "b": spaces.Discrete(3)})


@pytest.mark.parametrize(
    ("part", "space", "values", "message"),
    [
        ("obs", BOX7, np.zeros((7, 3)), "fault  obs, row 0: has the shape (3,), expected (7,) (the observation space)"),
        ("obs", spaces.Discrete(3), np.array([0, 1, 2, 3, 0, 0, 0]), "fault  obs, row 3: 3 lies outside Discrete(3)"),
        ("obs", PAIR, np.zeros((7, 1)), "fault  obs: holds obs, expected obs/a, obs/b (the observation space)"),
        ("obs", PAIR, {"a": np.zeros((7, 1)), "b": np.full(7, 3)}, "fault  obs/b, row 0: 3 lies outside Discrete(3)"),
        ("action", BOX7, np.zeros((7, 3)), "fault  action, row 0: has the shape (3,), expected (7,) (the action space)"),
        ("action", spaces.Discrete(2), np.arange(7), "fault  action, row 2: 2 lies outside Discrete(2)"),
        ("action", spaces.Discrete(2, start=-3), -np.arange(7), "fault  action, row 0: 0 lies outside Discrete(2, start=-3)"),
        ("action", spaces.Discrete(3), np.full(7, 0.5), "fault  action: holds float64, expected integers (the action space, Discrete(3))"),
        ("action", spaces.Discrete(3), np.zeros((7, 4), int), "fault  action, row 0: has the shape (4,), expected () (the action space)"),
        ("action", spaces.MultiDiscrete([3, 3]), np.full((7, 2), 9), "fault  action, row 0: [9 9] lies outside MultiDiscrete([3 3])"),
        ("action", spaces.MultiBinary(2), np.full((7, 2), 2), "fault  action, row 0: [2 2] lies outside MultiBinary(2)"),
    ],
)
def test_rows_that_are_not_of_their_space(part, space, values, message):
    name = "observation_space" if part == "obs" else "action_space"
    changed = {"obs": values, "next_obs": values} if part == "obs" else {"action": values}
    data = dataclasses.replace(logged("TTTTTTT"), **changed, about=About("toy", **{name: space}))
    assert message in str(check_transitions(data)).splitlines()[1]


def test_rows_that_are_of_their_space():
    data = logged()
    for space, action in (
        (spaces.Discrete(7), np.arange(7)),
        (spaces.Discrete(7, start=-6), -np.arange(7, dtype=np.int32)),
        (spaces.MultiDiscrete([7, 8]), np.stack([np.arange(7), np.arange(1, 8)], 1)),
        (spaces.MultiBinary(1), np.arange(7, dtype=np.int8)[:, None] % 2),
        (None, data.action),
    ):
        assert check_transitions(dataclasses.replace(data, action=action, about=About("toy", None, None, BOX, space))).faults == ()


def test_one_transition_is_a_dataset(tmp_path, minari_root):
    one = logged("T")
    assert check_transitions(one).faults == ()
    same(load_d4rl(write_d4rl(one, tmp_path / "one.hdf5")), one)
    write_minari(one, "one-v0")
    same(load("one-v0"), one)
    bad = dataclasses.replace(one, obs=one.obs * np.nan)
    assert "obs, row 0: nan (1 such row(s))" in str(check_transitions(bad))


def test_missing_library_is_taught(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"markovia\[offline\]"):
        load_d4rl(tmp_path / "x.hdf5")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"markovia\[offline\]"):
        load_minari("a-v0")


def test_spec_with_other_arguments_is_recovered(minari_root):
    env = gym.make("markovia/Tabular-v0", seed=3)
    obs, action = np.array([1, 2]), np.array([0, 1])
    about = About("t", None, None, env.observation_space, env.action_space, env.spec)
    flags = np.array([False, False]), np.array([False, True])
    write_minari(Transitions(obs, action, np.ones(2), np.array([2, 0]), *flags, np.zeros(2, dtype=int), about=about), "tab-v0")
    back = load_minari("tab-v0")
    np.testing.assert_array_equal(gym.make(back.about.env_spec).unwrapped.oracle.R, env.unwrapped.oracle.R)
    assert json.loads((minari_root / "tab-v0" / "data" / "metadata.json").read_text())["dataset_id"] == "tab-v0"
