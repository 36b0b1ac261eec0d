"""Minari datasets as rows, and rows as Minari datasets."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from markovia.envs.durable import in_place
from markovia.envs.names import nearest
from markovia.envs.offline.minari_check import check_files
from markovia.envs.offline.scores import Reference
from markovia.envs.offline.transitions import About, Obs, Transitions, columns, map_obs
from markovia.envs.offline.validate import DatasetError, Fault, Report, check_writable, float64_image, not_finite, overlapping, wrong_length
from markovia.envs.untrusted import read_json

ID = re.compile(r"([-\w]+/)*[-\w]+-v\d+")


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
    """Whether Minari can store a dataset under this name."""
    return ID.fullmatch(name) is not None


def check_id(dataset_id: str) -> str:
    """The id, if it is one that Minari can store. Raises ValueError that says what is missing."""
    if is_id(dataset_id):
        return dataset_id
    mend = f"add the version, e.g. {dataset_id}-v0" if is_id(f"{dataset_id}-v0") else "use letters, digits, - and _ in each part"
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
        raise DatasetError(f"{nested[0]} is a {type(out[nested[0]]).__name__}; only arrays, or one dictionary of arrays, can be read")
    return out


def _check_episode(k: int, ep: Any) -> list[Fault]:
    """What is wrong with one episode; rows are counted within it."""
    T, prefix = len(ep.rewards), f"episode {k}: "
    obs = _obs_columns(ep.observations)
    faults = [f for name, v in obs.items() for f in wrong_length(name, len(v), T + 1, "one more than rewards: the final one too")]
    for name in ("actions", "terminations", "truncations"):
        faults += wrong_length(name, len(getattr(ep, name)), T, "rewards")
    for name, values in {**obs, "actions": ep.actions, "rewards": ep.rewards}.items():
        faults += not_finite(name, values) + float64_image(name, values.shape, values.dtype)
    if len(ep.terminations) == len(ep.truncations):
        faults += overlapping("truncations", ep.terminations.astype(bool), ep.truncations.astype(bool))
        early = np.flatnonzero((ep.terminations | ep.truncations)[:-1])
        faults += [Fault("terminations / truncations", int(early[0]), "an end flag before the last step")] if len(early) else []
    return [Fault(prefix + f.field, f.row, f.problem, f.fatal) for f in faults]


def check_minari(dataset: Any) -> Report:
    """Everything that is wrong with a dataset (an id, or a MinariDataset), without raising; rows are counted within their episode."""
    try:
        return _read(open_minari(dataset) if isinstance(dataset, str) else dataset)[1]
    except DatasetError as error:
        return Report(str(dataset), (Fault("files", None, str(error)),))


def _read(dataset: Any) -> tuple[list[Any], Report]:
    """All episodes, as far as the file gives them, and what is wrong with them."""
    episodes: list[Any] = []
    faults: list[Fault] = []
    try:
        for ep in dataset.iterate_episodes():
            faults += _check_episode(len(episodes), ep)
            episodes.append(ep)
    except DatasetError:
        raise
    except Exception as error:  # a file that does not fit its own metadata breaks Minari, h5py and Pillow in many ways
        why = f"can't be read ({error!r}); the file is damaged or lacks a key, record or fetch it again"
        faults.append(Fault(f"main_data.hdf5, episode {len(episodes)}", None, why))
    return episodes, Report(dataset.id, tuple(faults))


def load_minari(dataset: Any, obs_keys: Iterable[str] | None = None, download: bool = False) -> Transitions:
    """Rows of a Minari dataset (an id, or a MinariDataset, filtered ones included); every true final observation is in next_obs.

    obs_keys joins entries of dictionary observations into one array, in this order; without it they stay a dictionary.
    What infos an episode holds is left out. Raises DatasetError with the whole report, ValueError for an unknown id.
    """
    dataset = open_minari(dataset, download) if isinstance(dataset, str) else dataset
    episodes, report = _read(dataset)
    report.check()
    for fault in report.faults[:3]:
        warnings.warn(f"{dataset.id}: {fault.field}, row {fault.row}: {fault.problem}", stacklevel=2)
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
    return data if obs_keys is None else data.flat_obs(list(obs_keys))


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
    return About(dataset.id, env_id, horizon, dataset.observation_space, dataset.action_space, spec, reference, plain)


def write_minari(data: Transitions, dataset_id: str, *, metadata: dict[str, Any] | None = None) -> Any:
    """Write rows as the local Minari dataset `dataset_id` and return it; a killed write leaves nothing under that id.

    Environment, spaces and reference scores come from `data.about`; `metadata` (plain JSON; Minari's names are algorithm_name, description,
    code_permalink, author, author_email as a list, requirements) is stored beside them. Images are stored without loss.
    Raises ValueError for an id that exists or can't be one, DatasetError for faulty rows, unknown spaces or a missing final observation.
    """
    minari = _minari()
    from minari.dataset.minari_storage import MinariStorage

    check_id(dataset_id)
    final = dataset_root() / dataset_id
    if final.exists():
        raise ValueError(f"the dataset {dataset_id} exists already in {dataset_root()}; choose another version, or delete it with Minari")
    about = data.about
    if about.observation_space is None or about.action_space is None:
        raise DatasetError(f"{about.name}: observation and action space are needed to write a dataset; set them in `about`")
    check_writable(data)
    spaces: dict[str, gym.Space] = {"observation_space": about.observation_space, "action_space": about.action_space}
    with in_place(final) as temporary:
        temporary.mkdir()
        storage = MinariStorage.new(temporary / "data", env_spec=about.env_spec, jpeg_encoding=False, **spaces)
        storage.update_metadata(_metadata(data, dataset_id, minari.__version__, metadata or {}))
        storage.update_episodes(_buffers(data))
    return open_folder(final / "data")


def _metadata(data: Transitions, dataset_id: str, version: str, extra: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"dataset_id": dataset_id, "minari_version": version, "content_sha256": content_sha256(data)}
    if data.about.reference is not None:
        own |= {"ref_min_score": data.about.reference.minimum, "ref_max_score": data.about.reference.maximum}
    # Minari hands authors about as sets.
    sets = {k: set(v) for k, v in extra.items() if k in ("author", "author_email") and not isinstance(v, str)}
    return {**own, **extra, **sets}


def content_sha256(data: Transitions) -> str:
    """Hash of all rows as little-endian float32, episode borders included: equal data have equal hashes, whatever file they come from."""
    digest = hashlib.sha256()
    flags = {"terminated": data.terminated, "truncated": data.truncated, "lengths": data.lengths()}
    for name, values in {**columns(data.obs), **columns(data.next_obs, "next_obs"), "action": data.action, "reward": data.reward, **flags}.items():
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
