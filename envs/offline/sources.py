"""One name for every kind of dataset."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from markovia.envs.offline.transitions import Transitions

FIXTURE, D4RL = "fixture:", (".hdf5", ".h5")
TIERS = ("random", "medium", "medium-replay", "medium-expert", "expert")


def tier_id(env_id: str, tier: str, namespace: str = "markovia") -> str:
    """Minari id of a recorded tier: Pendulum-v1, medium -> markovia/pendulum/medium-v0."""
    name = re.sub(r"-v\d+$", "", env_id.rpartition(":")[2].rpartition("/")[2])
    name = re.sub(r"[^a-z0-9-]", "-", name.lower())
    return f"{namespace}/{name}/{tier}-v0"


def load(
    dataset: str | Path,
    *,
    obs_keys: Iterable[str] | None = None,
    env_id: str | None = None,
    horizon: int | None = None,
    download: bool = False,
) -> Transitions:
    """Rows of `fixture:<name>` (markovia.envs.exact.offline), of a D4RL file `*.hdf5` or `*.h5`, or of a Minari id.

    env_id and horizon (time limit of a file without timeouts) are for D4RL files whose name does not tell; obs_keys for dictionary observations;
    download fetches a Minari dataset that is not on this machine.
    Raises ValueError for a name that is none of these and for what its kind does not take, DatasetError for faulty data.
    """
    from markovia.envs.offline.minari_io import dataset_root, is_id, load_minari, one_array

    name = str(dataset)
    for what, told, own in (("a horizon", horizon, "has its own ends"), ("an env_id", env_id, "says its own")):
        if told is not None and not name.endswith(D4RL):
            raise ValueError(f"{what} is told of D4RL files alone ({', '.join(D4RL)}); {name} {own}")
    if name.startswith(FIXTURE) or name.endswith(D4RL):
        if download:
            raise ValueError(f"{name} is no Minari id, so it can't be downloaded; leave download out")
        if obs_keys is not None:
            raise ValueError(one_array(name))
    if name.startswith(FIXTURE):
        from markovia.envs.exact.offline import fixture

        return fixture(name.removeprefix(FIXTURE))
    if name.endswith(D4RL):
        from markovia.envs.offline.d4rl import load_d4rl

        return load_d4rl(name, env_id, horizon)
    if not is_id(name) and Path(name).exists():
        folder = Path(name).is_dir()
        where = f"; a Minari dataset is named by its id below {dataset_root()} (MINARI_DATASETS_PATH moves that)" if folder else ""
        raise ValueError(f"{name} is a {'folder' if folder else 'file of another kind'}, expected *.hdf5, *.h5, a Minari id or fixture:<name>{where}")
    return load_minari(name, obs_keys, download)
