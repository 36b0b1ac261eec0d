"""The formats that the fuzzer tries: good files of each, how they are changed, and what reads them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutations import arrays_of, changed_bytes, changed_json, changed_safetensors, changed_text, dump, write_hdf5

Files = dict[str, bytes]  # relative path -> content
COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


@dataclass(frozen=True)
class Format:
    """`good()` is an input that is read, `bad()` draws one that was changed, `read(folder)` reads either."""

    good: Callable[[], Files]
    bad: Callable[[], st.SearchStrategy[Files]]
    read: Callable[[Path], object]


def files_of(folder: Path) -> Files:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and "tfevents" not in p.name}


def _made(make: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        return files_of(Path(name))


# -- checkpoints -----------------------------------------------------------------------------------------------------------------------------


@cache
def _agents() -> tuple[Files, ...]:
    from gymnasium import spaces

    from markovia.agents.control import ControlAgent
    from markovia.agents.language import LanguageAgent
    from markovia.agents.tabular import TabularAgent
    from markovia.envs.text.pretrained import load_model, load_tokenizer

    box = spaces.Box(-1.0, 1.0, (2,))
    language = LanguageAgent(load_model("arithmetic"), load_tokenizer("arithmetic"))  # the architecture itself, not its name
    made = [
        ControlAgent.from_spaces(box, box, hidden=(4,), num_costs=1),
        ControlAgent.from_spaces(spaces.Dict(a=box), spaces.MultiDiscrete([2, 3]), hidden=(4,)),
        TabularAgent.from_spaces(spaces.Discrete(3), spaces.Discrete(2), critic=True),
        _denoising(),
        language,
    ]
    return tuple(_made(lambda folder, agent=agent: agent.save(folder / "agent")) for agent in made)


def _denoising() -> Any:
    from markovia.agents.denoising import DenoisingAgent
    from markovia.envs.denoising.tasks import linear_gaussian

    task = linear_gaussian()
    return DenoisingAgent(task.network, task.kernel, sample_shape=task.sample_shape)


@st.composite
def _bad_checkpoint(draw: Any) -> Files:
    files = dict(draw(st.sampled_from(_agents())))
    weights, header = "agent/agent.safetensors", "agent/agent.json"
    which = draw(st.sampled_from(["header", "header", "weights", "both"]))
    if which != "header":
        files[weights] = draw(changed_safetensors(files[weights]))
    told = json.loads(files[header])
    if which != "weights" and draw(st.booleans()):
        told["config"] = draw(changed_json(told["config"]))
    if draw(st.integers(0, 3)):  # whoever changes the weights on purpose changes the hash too
        told["sha256"] = hashlib.sha256(files[weights]).hexdigest()
    files[header] = dump(told) if draw(st.integers(0, 3)) else draw(changed_text(dump(told)))
    return files


def _read_checkpoint(folder: Path) -> None:
    from markovia.agents.checkpoint import load_agent, load_tensors

    for read in (lambda: load_tensors(folder / "agent" / "agent.safetensors"), lambda: load_agent(folder / "agent")):
        taught(read)


# -- run folders -----------------------------------------------------------------------------------------------------------------------------


@cache
def _runs() -> tuple[Files, ...]:
    from markovia.algos.presets import configure, override
    from markovia.runs import train

    out = []
    for env, changes, kwargs in (
        ("markovia/TokenTree-v0", {"num_env_steps": 8, "num_envs": 4, "num_steps": 2}, {"V": 3, "H": 2}),
        ("CartPole-v1", {"num_env_steps": 8, "num_envs": 2, "num_steps": 4}, {}),
    ):
        method = override(configure("ppo", env), changes)
        options: dict[str, Any] = {"num_checkpoints": 1, "eval_episodes": 1, "progress": False, "env_kwargs": kwargs}
        out.append(_made(lambda folder, m=method, e=env, o=options: train(m, e, out=folder / "run", **o)))
    return tuple(out)


@st.composite
def _bad_run(draw: Any) -> Files:
    files = dict(draw(st.sampled_from(_runs())))
    if draw(st.integers(0, 3)):
        bad = draw(changed_text(files["run/config.json"]))
        for name in files:  # the copy in the checkpoint says the same, else the folder is refused for that alone
            if name.endswith("config.json"):
                files[name] = bad
    else:
        name = draw(st.sampled_from(["run/metrics.jsonl", "run/done.json"]))
        files[name] = draw(changed_bytes(files[name]) | changed_text(files[name].splitlines()[0] if "metrics" in name else files[name]))
    transform = {"reward": {"name": "none", "scale": 1.0, "shift": 0.0}, "obs": {"mean": {"obs": [0.0, 1.0]}, "std": {"obs": [1.0, 1.0]}}}
    files["transform.json"] = draw(changed_text(dump(transform)))
    scale = {"env_id": "Pendulum-v1", "horizon": 200, "minimum": -1200.0, "maximum": -150.0, "source": "measured"}
    files["reference.json"] = draw(changed_text(dump(scale)))
    return files


def _read_run(folder: Path) -> None:
    from markovia.algos.offline.setup import read_reference
    from markovia.chat import newest_agent
    from markovia.envs.offline.transforms import Transform
    from markovia.loaded import load_run
    from markovia.rundir import Metrics, read_json

    run = folder / "run"
    for read in (
        lambda: load_run(run),
        lambda: newest_agent(run),
        lambda: Metrics(run).cut(1),
        lambda: read_json(run / "done.json"),
        lambda: Transform.load(folder / "transform.json"),
        lambda: read_reference(folder / "reference.json"),
    ):
        taught(read)


# -- texts -----------------------------------------------------------------------------------------------------------------------------------

ASKED, ANSWER = [{"role": "user", "content": "1+2="}], [{"role": "assistant", "content": "3"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "1+2=", "chosen": "3", "rejected": "4", "q": 0.9, "margin": 0.5, "weight": 1.0, "score_chosen": 1.0, "score_rejected": 0.0},
    {"chosen": "1+1= 2", "rejected": "1+1= 3"},
    {"prompt": "1+2=", "chosen": "3", "rejected": "4", "ref_chosen_logps": [-0.5, -0.1], "ref_rejected_logps": [-1.0, -0.1], "gold": "5"},
    {"prompt": "1+2=", "completions": ["3", "4", "5"], "scores": [1.0, 0.5, 0.0]},
    {"prompt": "1+2=", "completion": "3", "label": True, "score": 2.0},
    {"prompt": ASKED, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "4"}]},
    {"messages": ASKED + ANSWER},
    {"text": "1+2=3"},
    {"prompt": "1+2=", "chosen": "3", "rejected": "4", "other_prompt": "2+2=", "chosen_weights": [1.0, 1.0], "rejected_weights": [1.0, 0.5]},
]


@st.composite
def _bad_texts(draw: Any) -> Files:
    row = draw(st.sampled_from(ROWS))
    found = [row] + [draw(changed_json(row)) if draw(st.booleans()) else row for _ in range(draw(st.integers(0, 3)))]
    if draw(st.booleans()):
        found = found[1:] or found
    content = b"\n".join(map(dump, found)) + b"\n"
    if not draw(st.integers(0, 3)):
        content = draw(changed_bytes(content))
    if draw(st.booleans()):
        packed = gzip.compress(content)
        return {"data.jsonl.gz": packed if draw(st.booleans()) else draw(changed_bytes(packed))}
    return {"data.jsonl": content}


def _read_texts(folder: Path) -> None:
    from markovia.envs.text.files import prompts, read_rows
    from markovia.envs.text.preferences import DataOptions, load_preferences
    from markovia.envs.text.pretrained import load_tokenizer

    (path,) = folder.iterdir()
    tokenizer = load_tokenizer("arithmetic")
    for read in (
        lambda: load_preferences(path, tokenizer, DataOptions(max_length=12, max_prompt_length=6)).parts(2),
        lambda: read_rows(path, ["prompt"]),
        lambda: prompts(str(path), "markovia.envs.text.rewards:exact_answer", model="arithmetic"),
    ):
        taught(read)


# -- datasets --------------------------------------------------------------------------------------------------------------------------------


@cache
def _good_hdf5() -> bytes:
    rows = [(name, "plain", ((4, 2) if "obs" in name or name == "actions" else (4,), "?" if name[0] == "t" else "f4", 0)) for name in COLUMNS]
    return _made(lambda folder: write_hdf5(folder / "x.hdf5", rows))["x.hdf5"]


@st.composite
def _bad_hdf5(draw: Any) -> Files:
    if draw(st.booleans()):
        return {"x.hdf5": draw(changed_bytes(_good_hdf5()))}
    columns = draw(arrays_of(COLUMNS))
    return {"x.hdf5": _made(lambda folder: write_hdf5(folder / "x.hdf5", columns))["x.hdf5"]}


def _read_hdf5(folder: Path) -> None:
    from markovia.envs.offline.d4rl import check_d4rl, load_d4rl

    str(check_d4rl(folder / "x.hdf5"))  # never raises
    taught(lambda: load_d4rl(folder / "x.hdf5", horizon=10))


@cache
def _good_minari() -> Files:
    import numpy as np
    from gymnasium import spaces
    from gymnasium.envs.registration import EnvSpec

    from markovia.envs.offline import About, Transitions, write_minari

    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    about = About("x", "CartPole-v1", 10, box, box, EnvSpec("CartPole-v1", entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv"), None)
    flags = np.array([False, True, False, True])
    zeros = np.zeros((4, 2), np.float32)
    data = Transitions(zeros, zeros, np.zeros(4, np.float32), zeros, flags, ~flags & False, np.array([0, 0, 1, 1]), about=about)

    def make(folder: Path) -> None:
        with _datasets(folder):
            write_minari(data, "fuzz/x-v0")

    return _made(make)


class _datasets:
    """Minari's folder for a while."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, os.environ.get("MINARI_DATASETS_PATH")

    def __enter__(self) -> None:
        os.environ["MINARI_DATASETS_PATH"] = str(self.folder)

    def __exit__(self, *_: object) -> None:
        os.environ.pop("MINARI_DATASETS_PATH") if self.before is None else os.environ.update(MINARI_DATASETS_PATH=self.before)


@st.composite
def _bad_minari(draw: Any) -> Files:
    files = dict(_good_minari())
    metadata, main = (next(n for n in files if n.endswith(end)) for end in ("metadata.json", "main_data.hdf5"))
    which = draw(st.sampled_from(["metadata", "metadata", "inner", "main", "arrays"]))
    if which == "metadata":
        files[metadata] = draw(changed_text(files[metadata]))
    elif which == "inner":  # spaces and specifications are JSON within JSON
        told = json.loads(files[metadata])
        name = draw(st.sampled_from([n for n in ("observation_space", "action_space", "env_spec") if isinstance(told.get(n), str)]))
        told[name] = dump(draw(changed_json(json.loads(told[name])))).decode("utf-8", "surrogatepass")
        files[metadata] = dump(told)
    elif which == "main":
        files[main] = draw(changed_bytes(files[main]))
    else:
        names = [f"episode_{k}/{n}" for k in range(2) for n in ("observations", "actions", "rewards", "terminations", "truncations")]
        columns = draw(arrays_of(tuple(names)))
        files[main] = _made(lambda folder: write_hdf5(folder / "x.hdf5", columns))["x.hdf5"]
    return files


def _read_minari(folder: Path) -> None:
    from markovia.envs.offline.minari_io import check_minari, load_minari

    with _datasets(folder):
        str(check_minari("fuzz/x-v0"))  # never raises
        taught(lambda: load_minari("fuzz/x-v0"))


FORMATS: dict[str, Format] = {
    "checkpoint": Format(lambda: _agents()[0], _bad_checkpoint, _read_checkpoint),
    "config": Format(lambda: _runs()[0], _bad_run, _read_run),
    "jsonl": Format(lambda: {"data.jsonl": dump(ROWS[0])}, _bad_texts, _read_texts),
    "hdf5": Format(lambda: {"x.hdf5": _good_hdf5()}, _bad_hdf5, _read_hdf5),
    "minari": Format(_good_minari, _bad_minari, _read_minari),
}


def taught(read: Callable[[], object]) -> str | None:
    """The message of the error that teaches, None where the file could be read; every other exception goes on."""
    from markovia.rundir import RunError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except (ValueError, FileNotFoundError, RunError) as error:
            assert len(str(error)) > 10, repr(error)  # a bare name teaches nobody
            return str(error)
    return None


def write(files: Files, folder: Path) -> None:
    """Put one input where nothing else is."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
