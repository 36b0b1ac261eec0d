"""D4RL files in and out: rows, time limits, what is noted, and what faulty files are told."""

import pickle
import warnings

import numpy as np
import pytest
from gymnasium import spaces
from logged_rows import same

import markovia  # noqa: F401  (registers the ids)
from markovia.dataset import describe
from markovia.envs.exact.offline import pointmass_data
from markovia.envs.offline import (
    DatasetError,
    check_d4rl,
    load,
    load_d4rl,
    reward_transform,
    write_d4rl,
)
from markovia.envs.offline.d4rl import counted_timeouts

h5py = pytest.importorskip("h5py")


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


def test_timeouts_that_nobody_set_are_counted_by_the_known_limit(tmp_path):
    """D4RL's -v0 files: the column is there and all False, which an episode longer than the limit that is known gives away."""
    n = 2500
    arrays = {"observations": np.zeros((n, 3), np.float32), "actions": np.zeros((n, 2), np.float32), "rewards": np.ones(n, np.float32)}
    path, _ = d4rl_file(tmp_path / "halfcheetah-medium-v0.hdf5", **arrays, terminals=np.zeros(n, bool), timeouts=np.zeros(n, bool))
    (note,) = check_d4rl(path).faults
    assert not note.fatal and "none is set in 2500 steps, and the time limit is 1000; counted by the limit" in note.problem
    for horizon in (None, 1000):
        with pytest.warns(UserWarning, match="counted by the limit"):
            data = load_d4rl(path, horizon=horizon)
        assert data.lengths().tolist() == [1000, 1000, 500] and data.complete().tolist() == [True, True, False]
    d4rl_file(path, **arrays, terminals=np.arange(n) % 500 == 499, timeouts=np.zeros(n, bool))
    assert not check_d4rl(path).faults and not load_d4rl(path).truncated.any()
    d4rl_file(path, **arrays, terminals=np.zeros(n, bool), timeouts=np.arange(n) == 1499)
    with pytest.warns(UserWarning, match="an episode has 1500 steps, and the time limit is 1000; read as it is"):
        assert load_d4rl(path).lengths().tolist() == [1500, 1000]


def test_actions_of_one_number_each_are_rows_of_one_entry(tmp_path):
    path, arrays = d4rl_file(tmp_path / "x.hdf5", actions=np.linspace(-1, 1, 10).astype(np.float32))
    data = load_d4rl(path, horizon=4)
    assert data.about.action_space.shape == (1,)
    np.testing.assert_array_equal(data.action, arrays["actions"][:, None])
    assert all(data.about.action_space.contains(a) for a in data.action)
    view = data.view()
    np.testing.assert_array_equal(load_d4rl(write_d4rl(view, tmp_path / "y.hdf5")).action, view.action)
