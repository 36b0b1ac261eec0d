"""Agents and tensors on disk: safetensors and JSON, written whole or not at all; loading runs no code from the file."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from markovia.agents.counted import Counted
from markovia.agents.interface import Agent
from markovia.envs import untrusted
from markovia.envs.durable import in_place, write_whole

SCHEMA = 1
WEIGHTS, HEADER = "agent.safetensors", "agent.json"
META_KEY = "markovia"
MAX_LAYERS = 4096

# The only classes that a checkpoint can name; a file never chooses what is imported.
CLASSES: dict[str, str] = {
    "ControlAgent": "markovia.agents.control:ControlAgent",
    "ImprovedAgent": "markovia.agents.improved:ImprovedAgent",
    "ReturnConditionedAgent": "markovia.agents.return_conditioned:ReturnConditionedAgent",
    "TabularAgent": "markovia.agents.tabular:TabularAgent",
    "LanguageAgent": "markovia.agents.language:LanguageAgent",
    "RewardModel": "markovia.agents.reward_model:RewardModel",
    "DenoisingAgent": "markovia.agents.denoising:DenoisingAgent",
    "DiffusionPolicyAgent": "markovia.agents.diffusion_policy:DiffusionPolicyAgent",
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another schema, or no checkpoint at all."""


def _pack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], **header: Any) -> bytes:
    # Shared and non-contiguous tensors are refused by safetensors, hence the copies.
    packed = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    return safetensors.torch.save(packed, metadata={META_KEY: json.dumps({"schema": SCHEMA, "meta": dict(meta), **header})})


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """sha256 of names, values and meta: safetensors itself would not notice a changed number."""
    sha = hashlib.sha256(json.dumps(dict(meta)).encode())
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _disk_error(error: OSError, target: Path) -> OSError:
    reason = error.strerror or str(error)
    return OSError(error.errno, f"could not save to {target}: {reason}. Nothing half-written was left; free some space or choose another folder")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> Path:
    """One safetensors file with named tensors and plain JSON `meta`, there whole or not at all.

    Raises OSError when the disk refuses (the old file, if any, stays), TypeError when `meta` is not JSON.
    """
    path = Path(path)
    data = _pack(tensors, meta or {}, sha256=_digest(tensors, meta or {}))
    try:
        write_whole(path, data)
    except OSError as error:
        raise _disk_error(error, path) from error
    return path


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote, on the CPU. Raises CheckpointError for anything else; a pickle is never opened as one."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {path}")
    _refuse_pickle(path)
    try:
        # safetensors itself compares header, shapes and the file's length before it takes memory.
        with safe_open(path, framework="pt") as f:
            header = untrusted.parse_json((f.metadata() or {}).get(META_KEY, "null"), "its header")
            # Files are 4-byte aligned only, and small CPU matrix products differ in the last bit with alignment: clone into fresh memory.
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); nothing in it was run. Pickled .pt or .zip checkpoints can't be loaded"
        ) from error
    if not isinstance(header, dict) or "schema" not in header:
        raise CheckpointError(f"{path} was not written by markovia: its header lacks {META_KEY!r}")
    _check_schema(header["schema"], path)
    if not isinstance(header.get("meta"), dict):
        raise CheckpointError(f"{path} is damaged: its header holds no 'meta'; nothing in it was run")
    if "sha256" in header and header["sha256"] != _digest(tensors, header["meta"]):
        raise CheckpointError(f"{path} is damaged: its content does not match the hash in its header; nothing in it was run")
    return tensors, header["meta"]


def _refuse_pickle(path: Path) -> None:
    try:
        untrusted.refuse_pickle(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _check_schema(schema: Any, path: Path) -> None:
    if schema != SCHEMA:
        raise CheckpointError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; load it with the markovia that wrote it")


def save_agent(agent: Agent, folder: str | Path) -> Path:
    """Write `agent.safetensors` and `agent.json` to `folder`; a new folder appears whole or not at all.

    In a folder that exists the two files are replaced one after the other; the hash in agent.json tells a pair that does not belong together.
    Raises OSError when the disk refuses, ValueError for agent classes that can't be rebuilt from JSON.
    """
    name, folder = type(agent).__name__, Path(folder)
    if name not in CLASSES:
        raise ValueError(f"{name} can't be rebuilt from JSON; markovia saves {', '.join(CLASSES)}. Keep its state() with save_tensors instead")
    data = _pack(agent.state(), {"class": name})
    header = {
        "schema": SCHEMA,
        "class": name,
        "kind": agent.kind,
        "config": agent.config(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "versions": {"torch": torch.__version__, "gymnasium": version("gymnasium"), "safetensors": version("safetensors")},
    }
    text = json.dumps(header, indent=1).encode()
    try:
        if folder.exists():
            with in_place(folder / HEADER) as told, in_place(folder / WEIGHTS) as weights:
                weights.write_bytes(data)
                told.write_bytes(text)
        else:
            with in_place(folder) as made:
                made.mkdir()
                (made / WEIGHTS).write_bytes(data)
                (made / HEADER).write_bytes(text)
    except OSError as error:
        raise _disk_error(error, folder) from error
    return folder


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = untrusted.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no agent in {path.parent}: {HEADER} is missing; give the folder that agent.save(folder) wrote") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} holds a {type(header).__name__}, expected an object with schema, class, config")
    _check_schema(header.get("schema"), path)
    if not isinstance(header.get("class"), str) or header["class"] not in CLASSES or not isinstance(header.get("config"), dict):
        raise CheckpointError(f"{path} names the agent class {header.get('class')!r}; expected one of {', '.join(CLASSES)} and its config")
    return header


def read_agent(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header (class, kind, config) and tensors of what `save_agent` wrote, their hash compared; nothing is built.

    Raises CheckpointError for a folder that is missing, damaged, foreign or of another schema.
    """
    folder = Path(folder)
    header, weights = _read_header(folder / HEADER), folder / WEIGHTS
    tensors, _ = load_tensors(weights)
    with open(weights, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != header.get("sha256"):
            raise CheckpointError(f"{weights} does not match the hash in {HEADER}: damaged, or the two are from different saves")
    return header, tensors


def find_agent(source: str | Path) -> Path | None:
    """Where the agent lies that a run's folder (its newest checkpoint) or a folder of `agent.save` holds; None for anything else."""
    folder = Path(source)
    found = sorted((p for p in (folder / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    places = (folder, *(p / "agent" for p in found[-1:]))
    return next((p for p in places if (p / HEADER).is_file()), None)


def load_agent(folder: str | Path, network: nn.Module | None = None) -> Agent:
    """Rebuild the agent that `save_agent` wrote; `network` is the user's own policy network, when it had one.

    Raises what `read_agent` raises, and ValueError when the network is missing.
    """
    folder = Path(folder)
    header, tensors = read_agent(folder)
    module, name = CLASSES[header["class"]].split(":")
    cls = getattr(importlib.import_module(module), name)
    try:
        if network is None and not _elsewhere(header["config"]):
            _check_size(cls, header["config"], tensors)
        with Counted(f"what {folder / HEADER} describes"):
            agent: Agent = cls.from_config(header["config"], network=network)
        agent.load_state(tensors)
    except (ValueError, ImportError, OSError):
        raise
    except Exception as error:  # what a configuration from a file does to a constructor is anybody's guess
        raise CheckpointError(f"{folder / HEADER} has a configuration that {name} can't read ({error!r})") from error
    return agent


def _elsewhere(config: dict[str, Any]) -> bool:
    """Whether the network lies in a file of its own: a named base model, or a pipeline of diffusers."""
    spec = config.get("network")
    while isinstance(spec, dict) and "inner" in spec:  # guidance around it
        spec = spec["inner"]
    return config.get("base") is not None or (isinstance(spec, dict) and spec.get("network") == "PipelineDenoiser")


def most_layers(config: Any) -> int:
    """The largest number that a configuration gives as one of layers."""
    if not isinstance(config, dict):
        return max(map(most_layers, config), default=0) if isinstance(config, list) else 0
    own = [v for k, v in config.items() if isinstance(v, int) and ("layer" in k or "depth" in k)]
    own += [len(v) for k, v in config.items() if isinstance(v, list) and ("hidden" in k or "channels" in k)]
    return max([*own, *map(most_layers, config.values())], default=0)


def _check_size(cls: type[Agent], config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError when a configuration describes a far larger network than the file holds; no memory is taken to find out."""
    held = sum(v.numel() for v in tensors.values())
    if most_layers(config) > MAX_LAYERS:
        raise CheckpointError(f"the configuration of a {cls.__name__} describes {most_layers(config)} layers, at most {MAX_LAYERS} are built")
    with torch.device("meta"):
        described = sum(v.numel() for v in cls.from_config(config).state().values())
    if described > 2 * held + 2**20:
        raise CheckpointError(f"the configuration of a {cls.__name__} describes {described} numbers, its file holds {held}: they don't fit")
