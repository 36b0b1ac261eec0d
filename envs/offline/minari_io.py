"""Minari datasets as rows, and rows as Minari datasets."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from markovia.envs.durable import in_place
from markovia.envs.names import nearest
from markovia.envs.offline.minari_check import MAIN, METADATA, check_files, parse
from markovia.envs.offline.scores import Reference
from markovia.envs.offline.transitions import About, Obs, Transitions, columns, map_obs, pick
from markovia.envs.offline.validate import (
    DatasetError,
    Fault,
    Report,
    check_writable,
    first_true,
    float64_image,
    no_flags,
    not_finite,
    one_axis,
    outside_spaces,
    overlapping,
    wrong_length,
)
from markovia.envs.untrusted import read_json

ID = re.compile(r"([-\w]+/)*[-\w]+-v\d+")
FLAGS = ("terminations", "truncations")
OWN = (  # metadata that belong to the rows
    *("dataset_id", "minari_version", "content_sha256", "total_episodes", "total_steps", "dataset_size"),
    *("data_format", "jpeg_encoding", "observation_space", "action_space", "env_spec"),
)
KINDS: dict[str, Any] = {  # of Minari's other metadata
    **dict.fromkeys(("algorithm_name", "description", "code_permalink", "eval_env_spec"), str),
    **dict.fromkeys(("author", "author_email"), list | tuple | set),
    **dict.fromkeys(("ref_min_score", "ref_max_score"), int | float),
}


def _minari() -> Any:
    try:
        import minari
        import minari.dataset.minari_storage  # needs h5py and Pillow as soon as a file is touched
    except ImportError as error:
        raise ImportError("Minari datasets need Minari: pip install markovia[offline]") from error
    return minari


def dataset_root() -> Path:
    """Where Minari keeps its datasets: MINARI_DATASETS_PATH, else ~/.minari/datasets."""
    given = os.environ.get("MINARI_DATASETS_PATH")
    return Path(given) if given else Path.home() / ".minari" / "datasets"


def is_id(name: str) -> bool:
    """Whether Minari can store a dataset under this name, and list it: one name that it can't list breaks its whole list."""
    return ID.fullmatch(name) is not None and _lists(name)


def _lists(name: str) -> bool:
    namespace = name.rpartition("/")[0]
    return len(namespace) != 1 and "data" not in namespace.split("/")  # a folder that holds one named data is a dataset to Minari


def check_id(dataset_id: str) -> str:
    """The id, if it is one that Minari can store. Raises ValueError that says what is missing."""
    if is_id(dataset_id):
        return dataset_id
    mend = f"add the version, e.g. {dataset_id}-v0" if is_id(f"{dataset_id}-v0") else "use letters, digits, - and _ in each part"
    if not _lists(dataset_id):
        mend = "Minari lists no dataset in a namespace of one letter or in one with the part data; choose another"
    raise ValueError(f"{dataset_id!r} is no Minari id (namespace/name-v0); {mend}")


def local_ids() -> list[str]:
    """Ids of the datasets on this machine."""
    found = dataset_root().glob("**/data/metadata.json")
    return sorted(str(p.parent.parent.relative_to(dataset_root())) for p in found if ".tmp-" not in str(p))


def open_minari(dataset_id: str, download: bool = False) -> Any:
    """The MinariDataset of an id. Raises ValueError for an id without version or one that is not here, with the nearest that are."""
    check_id(dataset_id)
    minari = _minari()
    if not download and not (dataset_root() / dataset_id / "data").is_dir():
        hint = nearest(dataset_id, local_ids())
        raise ValueError(f"no dataset {dataset_id} in {dataset_root()}{hint} (download=True fetches it, `markovia collect` makes one)")
    if download and not (dataset_root() / dataset_id / "data").is_dir():
        minari.download_dataset(dataset_id)
    return open_folder(dataset_root() / dataset_id / "data")


def open_folder(folder: Path) -> Any:
    """The MinariDataset whose metadata.json and main_data.hdf5 lie in a folder, looked through before Minari reads them. Raises DatasetError."""
    _minari()
    from minari import MinariDataset

    check_files(folder)
    try:
        return MinariDataset(folder)
    except (ImportError, DatasetError):
        raise
    except Exception as error:  # Minari asserts, and its storages raise what h5py and Gymnasium do
        raise DatasetError(f"{folder} can't be opened as a Minari dataset ({error!r}); it is damaged or of another version") from error


def _obs_columns(values: Any, name: str = "observations") -> dict[str, np.ndarray]:
    """Flat columns of one episode's observations; nested dictionaries and tuples raise DatasetError."""
    out = columns(values, name)
    nested = [k for k, v in out.items() if not isinstance(v, np.ndarray)]
    if nested:
        kind = type(out[nested[0]]).__name__
        raise DatasetError(f"{nested[0]} is a {kind}; only arrays, or one dictionary of arrays, can be read; choose others with obs_keys")
    return out


def _plain(ep: Any, keys: Sequence[str] | None) -> Any:
    """The episode with the observations of `keys` alone (None: all), and with rewards and flags of shape (T, 1) as (T,)."""
    flat = {name: one_axis(getattr(ep, name)) for name in ("rewards", *FLAGS)}
    return replace(ep, observations=ep.observations if keys is None else {k: ep.observations[k] for k in keys}, **flat)


def _shapes(ep: Any) -> dict[str, tuple[int, ...]]:
    """Shape of a row of every column that is an array of the environment."""
    return {name: v.shape[1:] for name, v in {**_obs_columns(ep.observations), "actions": ep.actions}.items()}


def _check_episode(k: int, ep: Any, first: Any) -> list[Fault]:
    """What is wrong with one episode, and how it differs from the first one; rows are counted within it."""
    if not isinstance(ep.actions, np.ndarray):
        raise DatasetError(f"actions are a {type(ep.actions).__name__}; only datasets whose actions are one array can be read")
    T, obs, shapes, expected = len(ep.rewards), _obs_columns(ep.observations), _shapes(ep), _shapes(first)
    faults = [
        Fault(name, None, f"has rows of shape {shape}, expected {expected[name]} as in episode 0")
        for name, shape in shapes.items()
        if shape != expected.get(name, shape)
    ]
    if shapes.keys() != expected.keys():
        faults.append(Fault("observations", None, f"has the columns {[*shapes][:-1]}, expected {[*expected][:-1]} as in episode 0"))
    for name, values in obs.items():
        faults += wrong_length(name, len(values), T + 1, "one more than rewards: the final one too")
    for name in ("actions", *FLAGS):
        faults += wrong_length(name, len(getattr(ep, name)), T, "rewards")
    for name, values in {**obs, "actions": ep.actions, "rewards": ep.rewards}.items():
        faults += not_finite(name, values) + float64_image(name, values.shape, values.dtype)
    faults += _check_flat(ep)
    return [Fault(f"episode {k}: {f.field}", f.row, f.problem, f.fatal) for f in faults]


def _check_flat(ep: Any) -> list[Fault]:
    """What is wrong with rewards and flags: more than one number per step, flags that are neither 0 nor 1, or not at the episode's end."""
    flat = {name: getattr(ep, name) for name in ("rewards", *FLAGS)}
    faults = [Fault(name, None, f"has the shape {v.shape}, expected one number per step") for name, v in flat.items() if v.ndim != 1]
    for name in FLAGS:
        faults += no_flags(name, flat[name]) if flat[name].ndim == 1 else []
    if faults or len(ep.terminations) != len(ep.truncations):
        return faults
    terminated, truncated = (flat[name].astype(bool) for name in FLAGS)
    early = first_true((terminated | truncated)[:-1])
    faults = overlapping("truncations", terminated, truncated)
    return faults + ([] if early is None else [Fault("terminations / truncations", early, "an end flag before the last step")])


def check_minari(dataset: Any) -> Report:
    """Everything that is wrong with a dataset (an id, or a MinariDataset), without raising; rows are counted within their episode."""
    try:
        return _read(open_minari(dataset) if isinstance(dataset, str) else dataset)[1]
    except ValueError as error:  # DatasetError, or an id that is none or not here
        return Report(str(dataset), (Fault("files", None, str(error)),))


def _read(dataset: Any, keys: Sequence[str] | None = None) -> tuple[list[Any], Report]:
    """All episodes, as far as the file gives them, and what is wrong with them."""
    episodes: list[Any] = []
    faults: list[Fault] = []
    try:
        for stored in dataset.iterate_episodes():
            ep = _plain(stored, keys)
            faults += _check_episode(len(episodes), ep, episodes[0] if episodes else ep)
            episodes.append(ep)
        faults = _not_counted(dataset, episodes) + faults
    except DatasetError:
        raise
    except Exception as error:  # a file that does not fit its own metadata breaks Minari, h5py and Pillow in many ways
        why = f"can't be read ({error!r}); the file is damaged or lacks a key, record or fetch it again"
        faults.append(Fault(f"{MAIN}, episode {len(episodes)}", None, why))
    return episodes, Report(dataset.id, tuple(faults))


def _not_counted(dataset: Any, episodes: list[Any]) -> list[Fault]:
    """Notes on metadata that count other episodes or steps than the file holds: a killed collection writes its episodes first, its metadata last."""
    told, main, faults = dataset.storage.metadata, Path(dataset.storage.data_path) / MAIN, []
    if main.is_file() and main.stat().st_size:
        import h5py

        with h5py.File(main, "r") as file:
            held = sum(name.startswith("episode_") for name in file)
        if held > told["total_episodes"]:
            problem = f"holds {held} episodes, but {METADATA} counts {told['total_episodes']}: the others are not read"
            faults.append(Fault(MAIN, None, f"{problem}; set total_episodes and total_steps where they are whole", False))
    steps = sum(len(ep.rewards) for ep in episodes)
    if len(episodes) == told["total_episodes"] and steps != told["total_steps"]:
        faults.append(Fault(METADATA, None, f"counts {told['total_steps']} steps, but its episodes have {steps}; they are read as they are", False))
    return faults


def load_minari(dataset: Any, obs_keys: Iterable[str] | None = None, download: bool = False) -> Transitions:
    """Rows of a Minari dataset (an id, or a MinariDataset, filtered ones included); every true final observation is in next_obs.

    obs_keys joins entries of dictionary observations into one array, in this order; without it they stay a dictionary.
    What infos an episode holds is left out. Raises DatasetError with the whole report, ValueError for an unknown id or key.
    """
    dataset = open_minari(dataset, download) if isinstance(dataset, str) else dataset
    keys = None if obs_keys is None else list(obs_keys)
    if keys is not None:
        if not isinstance(dataset.observation_space, gym.spaces.Dict):
            raise ValueError(one_array(dataset.id))
        pick(dataset.observation_space.spaces, keys, dataset.id)
    episodes, report = _read(dataset, keys)
    report.check()
    for fault in report.faults[:3]:
        warnings.warn(f"{dataset.id}: {str(fault).removeprefix('note ').lstrip()}", stacklevel=2)
    if not episodes:
        raise DatasetError(f"{dataset.id} has no episodes")
    join = lambda name: np.concatenate([np.asarray(getattr(ep, name)) for ep in episodes])  # noqa: E731
    lengths = [len(ep.rewards) for ep in episodes]
    data = Transitions(
        obs=_join_obs([map_obs(ep.observations, lambda x: x[:-1]) for ep in episodes]),
        action=join("actions"),
        reward=join("rewards"),
        next_obs=_join_obs([map_obs(ep.observations, lambda x: x[1:]) for ep in episodes]),
        terminated=join("terminations").astype(bool),
        truncated=join("truncations").astype(bool),
        episode=np.repeat(np.arange(len(episodes)), lengths),
        about=_about(dataset),
    )
    data = data if keys is None else data.flat_obs(keys)
    Report(dataset.id, tuple(outside_spaces(data))).check()
    return data


def one_array(name: str) -> str:
    """What is told where keys are asked of a source without any."""
    return f"{name} has one array of observations, so obs_keys have nothing to choose from; leave them out"


def _join_obs(parts: list[Obs]) -> Obs:
    head = parts[0]
    if isinstance(head, dict):
        return {k: _lean(np.concatenate([p[k] for p in parts])) for k in head}  # type: ignore[index]
    return _lean(np.concatenate(parts))  # type: ignore[arg-type]


def _lean(values: np.ndarray) -> np.ndarray:
    """float64 images as float32."""
    return values.astype(np.float32) if float64_image("", values.shape, values.dtype) else values


def _about(dataset: Any) -> About:
    raw = read_json(Path(dataset.storage.data_path) / "metadata.json")
    spec: EnvSpec | None = dataset.env_spec
    low, high = raw.get("ref_min_score"), raw.get("ref_max_score")
    reference = None
    env_id, horizon = (spec.id, spec.max_episode_steps) if spec is not None else (None, None)
    if low is not None and high is not None and low < high:
        reference = Reference(env_id or dataset.id, horizon, float(low), float(high), f"the dataset {dataset.id}")
    plain = {k: v for k, v in raw.items() if k not in ("observation_space", "action_space", "env_spec", "eval_env_spec")}
    space = dataset.observation_space
    if isinstance(space, gym.spaces.Dict) and "observation_space" in raw:  # Minari sorts its keys, the file has them in the environment's order
        space = gym.spaces.Dict([(k, space[k]) for k in parse(raw["observation_space"], METADATA)["subspaces"]])
    return About(dataset.id, env_id, horizon, space, dataset.action_space, spec, reference, plain, declared=True)


def write_minari(data: Transitions, dataset_id: str, *, metadata: dict[str, Any] | None = None) -> Any:
    """Write rows as the local Minari dataset `dataset_id` and return it; a killed write leaves nothing under that id.

    Environment, spaces and reference scores come from `data.about`; `metadata` (plain JSON; Minari's names are algorithm_name, description,
    code_permalink, author, author_email as a list, requirements) is stored beside them. Images are stored without loss.
    Raises ValueError for an id that exists or can't be one and for metadata that belong to the rows or are not of Minari's types, DatasetError for
    faulty rows, unknown spaces or a missing final observation.
    """
    minari = _minari()
    from minari.dataset.minari_storage import MinariStorage

    check_id(dataset_id)
    if data.about.env_spec is not None:
        check_spec(data.about.env_spec)
    final = dataset_root() / dataset_id
    if final.exists():
        raise ValueError(f"the dataset {dataset_id} exists already in {dataset_root()}; choose another version, or delete it with Minari")
    about = data.about
    if about.observation_space is None or about.action_space is None:
        raise DatasetError(f"{about.name}: observation and action space are needed to write a dataset; set them in `about`")
    check_writable(data)
    slash = [k for k in data.obs if "/" in k] if isinstance(data.obs, dict) else []
    if slash:
        raise DatasetError(f"{about.name}: the observation key {slash[0]!r} has a slash, which HDF5 takes for a folder; rename it")
    stored = _metadata(data, dataset_id, minari.__version__, metadata or {})
    spaces: dict[str, gym.Space] = {"observation_space": about.observation_space, "action_space": about.action_space}
    with in_place(final) as temporary:
        temporary.mkdir()
        storage = MinariStorage.new(temporary / "data", env_spec=about.env_spec, jpeg_encoding=False, **spaces)
        storage.update_metadata(stored)
        storage.update_episodes(_buffers(data))
    return open_folder(final / "data")


def check_spec(spec: EnvSpec) -> None:
    """Refuse an environment whose specification JSON can't hold, with a ValueError that says what to register in its place."""
    try:
        spec.to_json()
    except ValueError as error:
        raise ValueError(
            f"{spec.id} can't be written into a dataset ({str(error).strip()}); register it by name, entry_point='module:Class', with plain arguments"
        ) from None


def _metadata(data: Transitions, dataset_id: str, version: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Ours and the caller's. Raises ValueError for names that are ours and for types that Minari does not take."""
    taken = [k for k in OWN if k in extra]
    if taken:
        raise ValueError(f"the metadata {taken[0]!r} is written by Minari or from the rows; leave it out or take another name")
    wrong = [k for k, kind in KINDS.items() if k in extra and not isinstance(extra[k], kind)]
    if wrong:
        kind = "str" if KINDS[wrong[0]] is str else KINDS[wrong[0]]
        raise ValueError(f"the metadata {wrong[0]!r} must be of type {kind}, got {extra[wrong[0]]!r}")
    own: dict[str, Any] = {"dataset_id": dataset_id, "minari_version": version, "content_sha256": content_sha256(data)}
    if data.about.reference is not None:
        own |= {"ref_min_score": data.about.reference.minimum, "ref_max_score": data.about.reference.maximum}
    return {**own, **extra, **{k: set(extra[k]) for k in ("author", "author_email") if k in extra}}  # Minari hands authors about as sets


def content_sha256(data: Transitions) -> str:
    """Hash of all rows as little-endian float32, episode borders included: equal data have equal hashes, whatever file they come from."""
    digest = hashlib.sha256()
    flags = {"terminated": data.terminated, "truncated": data.truncated, "lengths": data.lengths()}
    obs = [*sorted(columns(data.obs).items()), *sorted(columns(data.next_obs, "next_obs").items())]  # whatever order a space gives its keys
    for name, values in {**dict(obs), "action": data.action, "reward": data.reward, **flags}.items():
        digest.update(f"{name}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return digest.hexdigest()


def _buffers(data: Transitions) -> Iterable[Any]:
    """Minari's episode buffers: T + 1 observations and T of everything else."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    for first, end in zip(*data.bounds(), strict=True):
        part = slice(first, end)

        def whole(obs: np.ndarray, following: np.ndarray, part: slice = part) -> np.ndarray:
            return np.concatenate([obs[part], following[part][-1:]])

        if isinstance(data.obs, dict):
            obs: Any = {k: whole(v, data.next_obs[k]) for k, v in data.obs.items()}  # type: ignore[index]
        else:
            obs = whole(data.obs, data.next_obs)  # type: ignore[arg-type]
        flags = {"terminations": data.terminated[part], "truncations": data.truncated[part]}
        yield EpisodeBuffer(observations=obs, actions=data.action[part], rewards=data.reward[part], **flags)
