"""Minari datasets that others made, or that are unusual: key order, column vectors, counts, names, metadata; and what is asked of `load`."""

import dataclasses
import json
import warnings
from collections import OrderedDict

import numpy as np
import pytest
from gymnasium import spaces

from markovia.envs.exact.offline import pointmass_data
from markovia.envs.offline import About, DatasetError, Transitions, check_minari, load, load_d4rl, load_minari, write_d4rl, write_minari
from markovia.envs.offline.minari_io import content_sha256, is_id

h5py = pytest.importorskip("h5py")
minari = pytest.importorskip("minari")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")  # it asks for authors and code links
BOX = spaces.Box(-1.0, 1.0, (2,), np.float64)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def episode(steps=3, **changed):
    """One truncated episode as Minari's collectors hand it on."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    columns = {
        "observations": np.arange(2.0 * (steps + 1)).reshape(-1, 2),
        "actions": np.zeros((steps, 2)),
        "rewards": np.arange(1.0, steps + 1),
        "terminations": np.zeros(steps, bool),
        "truncations": np.arange(steps) == steps - 1,
    }
    return EpisodeBuffer(**{**columns, **changed})


def foreign(*episodes, observation_space=BOX, action_space=BOX):
    """The id of a dataset that Minari itself wrote."""
    minari.create_dataset_from_buffers("foreign-v0", list(episodes), observation_space=observation_space, action_space=action_space)
    return "foreign-v0"


def two_keys(order="oa"):
    """Four rows with two observations; the space has its keys in another order than the alphabet's."""
    columns = {"o": np.arange(4.0)[:, None], "a": np.arange(8.0).reshape(4, 2) * 10}
    space = spaces.Dict(OrderedDict([("o", spaces.Box(-99, 99, (1,), np.float64)), ("a", spaces.Box(-99, 99, (2,), np.float64))]))
    ends = np.arange(4) == 3
    obs, following = {k: columns[k] for k in order}, {k: np.roll(columns[k], -1, 0) for k in reversed(order)}
    about = About("two", observation_space=space, action_space=BOX)
    return Transitions(obs, np.zeros((4, 2)), np.ones(4), following, ~ends & False, ends, np.zeros(4, int), about=about)


# -- keys ------------------------------------------------------------------------------------------------------------------------------


def test_dictionaries_have_the_order_of_their_space_before_and_after():
    data = two_keys()
    write_minari(data, "two-v0")
    back = load("two-v0")
    assert list(back.obs) == list(back.next_obs) == list(back.about.observation_space.spaces) == ["o", "a"]
    np.testing.assert_array_equal(back.flat_obs().obs, data.flat_obs().obs)
    np.testing.assert_array_equal(back.flat_obs().next_obs, data.flat_obs().next_obs)
    row = {k: v[1] for k, v in back.obs.items()}
    np.testing.assert_array_equal(back.flat_obs().obs[1], spaces.flatten(back.about.observation_space, row))
    assert back.about.metadata["content_sha256"] == content_sha256(back) == content_sha256(data) == content_sha256(two_keys("ao"))
    assert list(two_keys("ao").obs) == ["o", "a"]


def test_hashes_of_recorded_sets_stay():
    """Both were computed before keys were sorted: of one array, and of a dictionary whose keys were."""
    data = two_keys()
    one = dataclasses.replace(data, obs=data.obs["a"], next_obs=data.next_obs["a"], about=About("one"))
    assert content_sha256(one) == "271f1c9e0bf2f4296dc13a3f267b19be4326a627fb49a57a92c4c5d3a4ee4d40"
    assert content_sha256(data) == "498c7dce1a1471a5c4f3a354a5e9b4392fb4a9ae5921c2fdcce9fde0d01902f4"


def test_both_observations_need_the_same_columns():
    data = two_keys()
    with pytest.raises(ValueError, match=r"obs has the columns \['obs/o', 'obs/a'\], but next_obs \['obs/a'\]"):
        dataclasses.replace(data, next_obs={"a": data.next_obs["a"]})


def test_keys_are_chosen_before_what_can_not_be_read():
    mission = spaces.Text(8)
    nested = spaces.Dict({"deep": BOX})
    space = spaces.Dict({"m": mission, "n": nested, "z": BOX})
    z = np.arange(8.0).reshape(4, 2)
    name = foreign(episode(observations={"m": ["go"] * 4, "n": {"deep": z}, "z": z}), observation_space=space)
    np.testing.assert_array_equal(load(name, obs_keys=["z"]).obs, z[:-1])
    with pytest.raises(DatasetError, match=r"observations/m is a list; .* choose others with obs_keys"):
        load(name)
    with pytest.raises(DatasetError, match="observations/n is a dict"):
        load(name, obs_keys=["n", "z"])
    with pytest.raises(ValueError, match=r"no observation key \['y'\]; it has m, n, z"):
        load(name, obs_keys=["y"])


# -- columns of other shapes ------------------------------------------------------------------------------------------------------------


def test_column_vectors_are_read_as_columns():
    flags = {"terminations": np.zeros((3, 1), np.float32), "truncations": np.array([[0.0], [0.0], [1.0]])}
    name = foreign(episode(rewards=np.arange(1.0, 4)[:, None], **flags))
    assert check_minari(name).faults == ()
    data = load(name)
    assert data.reward.shape == (3,) and data.returns().tolist() == [6.0]
    assert data.truncated.tolist() == [False, False, True] and not data.terminated.any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards": np.ones((3, 2))}, "fault  episode 0: rewards: has the shape (3, 2), expected one number per step"),
        ({"terminations": np.zeros((3, 2), bool)}, "fault  episode 0: terminations: has the shape (3, 2), expected one number per step"),
        ({"truncations": np.array([0, 0, 2])}, "fault  episode 0: truncations, row 2: 2, expected 0 or 1"),
        ({"terminations": np.array([0.0, np.nan, 0.0])}, "fault  episode 0: terminations, row 1: nan, expected 0 or 1"),
    ],
)
def test_misshapen_rewards_and_flags_are_told(changed, message):
    name = foreign(episode(**changed))
    assert str(check_minari(name)).splitlines()[1:] == [f"  {message}"]
    with pytest.raises(DatasetError):
        load(name)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"observations": np.zeros((4, 3))}, "episode 1: observations: has rows of shape (3,), expected (2,) as in episode 0"),
        ({"actions": np.zeros((3, 1))}, "episode 1: actions: has rows of shape (1,), expected (2,) as in episode 0"),
    ],
)
def test_episodes_of_different_widths_are_told(later, message):
    name = foreign(episode(), episode(**later))
    with pytest.raises(DatasetError) as error:
        load(name)
    assert message in str(error.value) and "episode 0:" not in str(error.value)


def test_episodes_with_other_keys_are_told():
    z, space = np.zeros((4, 2)), spaces.Dict({"y": BOX, "z": BOX})
    name = foreign(episode(observations={"y": z, "z": z}), episode(observations={"z": z}), observation_space=space)
    with pytest.raises(DatasetError, match=r"episode 1: observations: has the columns .*/z.*, expected .*/y.* as in episode 0"):
        load(name)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_other_actions_than_arrays_are_told(kind):
    parts = {"a": np.zeros((3, 2)), "b": np.zeros((3, 2))}
    space = spaces.Dict(dict.fromkeys(parts, BOX)) if kind is dict else spaces.Tuple([BOX, BOX])
    name = foreign(episode(actions=parts if kind is dict else tuple(parts.values())), action_space=space)
    message = f"actions are a {kind.__name__}; only datasets whose actions are one array can be read"
    assert message in str(check_minari(name)) and "damaged" not in str(check_minari(name))
    with pytest.raises(DatasetError, match=message):
        load(name)


# -- counts ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [7, -3])
def test_choices_that_the_space_has_not_are_told(choice):
    name = foreign(episode(actions=np.array([0, choice, 1])), action_space=spaces.Discrete(2))
    with pytest.raises(DatasetError, match=rf"action, row 1: {choice} lies outside Discrete\(2\)"):
        load_minari(name)


def rewrite(root, name, **changed):
    file = root / name / "data" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"total_episodes": 1, "total_steps": 3}, "main_data.hdf5: holds 3 episodes, but metadata.json counts 1: the others are not read"),
        ({"total_steps": 100}, "metadata.json: counts 100 steps, but its episodes have 9; they are read as they are"),
    ],
)
def test_episodes_and_steps_that_metadata_do_not_count(root, changed, message):
    name = foreign(episode(), episode(), episode())
    assert check_minari(name).faults == ()
    rewrite(root, name, **changed)
    (fault,) = check_minari(name).faults
    assert message in str(fault) and not fault.fatal
    with pytest.warns(UserWarning, match=message[:40]):
        assert load(name).num_episodes == changed.get("total_episodes", 3)


def test_a_part_of_a_dataset_counts_its_own_steps():
    dataset = write_minari(pointmass_data("mix", episodes=4), "mix-v0")
    assert check_minari(dataset.filter_episodes(lambda ep: ep.id > 1)).faults == ()


def test_an_unknown_id_is_a_fault_of_its_report():
    assert "files: no dataset unknown-v0 in" in str(check_minari("unknown-v0"))
    assert "add the version" in str(check_minari("unknown"))


# -- writing ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r/os-v0", "data/os-v0", "ab/data/os-v0"])
def test_names_that_minari_does_not_list_are_refused(root, name):
    with pytest.raises(ValueError, match="Minari lists no dataset in a namespace of one letter or in one with the part data"):
        write_minari(pointmass_data("mix", episodes=1), name)
    assert not root.exists()


@pytest.mark.parametrize("name", ["os-v0", "ro/os-v0", "r/o/s-v0", "ab/data-v1", "my-data/os-v0"])
def test_names_that_minari_lists(name):
    from minari.dataset.minari_dataset import DATASET_ID_RE

    assert bool(DATASET_ID_RE.fullmatch(name)) == is_id(name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"algorithm_name": 3}, "the metadata 'algorithm_name' must be of type str, got 3"),
        ({"author": "me"}, r"the metadata 'author' must be of type list \| tuple \| set, got 'me'"),
        ({"ref_min_score": "low"}, r"the metadata 'ref_min_score' must be of type int \| float, got 'low'"),
        ({"dataset_id": "other-v0"}, "'dataset_id' is written by Minari or from the rows; leave it out or take another name"),
        ({"content_sha256": "0"}, "'content_sha256' is written by Minari or from the rows"),
        ({"total_steps": 1}, "'total_steps' is written by Minari or from the rows"),
    ],
)
def test_metadata_that_can_not_be_stored_are_refused_before_writing(root, metadata, message):
    with pytest.raises(ValueError, match=message):
        write_minari(pointmass_data("mix", episodes=1), "x-v0", metadata=metadata)
    assert not root.exists()


def test_keys_that_could_not_be_read_again_are_refused_before_writing(root):
    data = two_keys()
    about = dataclasses.replace(data.about, observation_space=spaces.Dict({"a/b": data.about.observation_space["o"]}))
    with pytest.raises(DatasetError, match="the observation key 'a/b' has a slash, which HDF5 takes for a folder; rename it"):
        write_minari(dataclasses.replace(data, obs={"a/b": data.obs["o"]}, next_obs={"a/b": data.next_obs["o"]}, about=about), "x-v0")
    assert not root.exists()


# -- what is asked of load -------------------------------------------------------------------------------------------------------------


def test_what_a_source_does_not_take_is_refused(tmp_path):
    data = pointmass_data("mix", episodes=1)
    write_minari(data, "mix-v0")
    file = write_d4rl(data, tmp_path / "mix.hdf5")
    for name in ("mix-v0", "fixture:pointmass2d/medium"):
        with pytest.raises(ValueError, match="an env_id is told of D4RL files alone"):
            load(name, env_id="hopper-medium-v2")
    for name in (file, "fixture:pointmass2d/medium"):
        with pytest.raises(ValueError, match="is no Minari id, so it can't be downloaded; leave download out"):
            load(name, download=True)
        with pytest.raises(ValueError, match="has one array of observations, so obs_keys have nothing to choose from; leave them out"):
            load(name, obs_keys=["z"])
    with pytest.raises(ValueError, match="has one array of observations, so obs_keys have nothing to choose from; leave them out"):
        load("mix-v0", obs_keys=["z"])


# -- rows ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "kept"), [(0.07, 7), (0.14, 14), (0.28, 28), (0.55, 55), (0.071, 8), (1e-12, 1), (1.0, 100)])
def test_a_fraction_of_the_episodes_is_rounded_up_but_not_for_a_rounded_product(fraction, kept):
    ends = np.ones(100, bool)
    data = Transitions(np.zeros((100, 1)), np.zeros((100, 1)), np.arange(100.0), np.zeros((100, 1)), ends, ~ends, np.arange(100))
    assert data.best(fraction).num_episodes == kept


def test_flags_of_integers_are_masks():
    data = pointmass_data("mix", episodes=2)
    flags = ("terminated", "truncated", "has_next_action", "next_known")
    integers = dataclasses.replace(data, **{k: getattr(data, k).astype(np.int64) for k in flags})
    for view in (integers.view("d4rl", next_action=True), integers.view()):
        assert all(getattr(view, k).dtype == bool for k in flags)
    np.testing.assert_array_equal(integers.view("d4rl", next_action=True).obs, data.view("d4rl", next_action=True).obs)


def test_what_declares_its_actions(tmp_path):
    data = pointmass_data("mix", episodes=1)
    plain = dataclasses.replace(data, about=dataclasses.replace(data.about, env_spec=None))
    write_minari(plain, "mix-v0")
    assert load("mix-v0").about.declared
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not load_d4rl(write_d4rl(plain, tmp_path / "mix.hdf5")).about.declared
    assert load_minari("mix-v0").about.env_spec is None
