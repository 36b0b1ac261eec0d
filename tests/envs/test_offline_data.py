"""Rows of logged decisions: next actions, returns, views; Minari in and out; rows in memory; what faulty sets are told."""

import dataclasses
import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from logged_rows import same

import markovia  # noqa: F401  (registers the ids)
from markovia.envs.exact.offline import pointmass_data
from markovia.envs.offline import (
    About,
    DatasetError,
    Transitions,
    check_minari,
    check_transitions,
    concatenate,
    load,
    load_d4rl,
    load_minari,
    write_d4rl,
    write_minari,
)

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


# -- what is told -------------------------------------------------------------------------------------------------------------------


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
