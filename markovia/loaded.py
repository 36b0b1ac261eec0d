"""Read a run back (`markovia.load_run`): its configuration, and task and agent as they stood at its newest checkpoint."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markovia.config_check import check_config, largest
from markovia.envs import machine
from markovia.envs.control.vector import env_spec
from markovia.rundir import CONFIG, DRIVER, RunError, checkpoints, read_json, whole_before
from markovia.settings import content_hash, differences, from_json

if TYPE_CHECKING:
    from markovia.agents.interface import Agent
    from markovia.algos.safe.guard import Guarded
    from markovia.algos.setup import Setup

# What may differ between the run that was stopped and the one that goes on.
_NOT_COMPARED = ("versions", "commit", "python")


@dataclass(frozen=True)
class LoadedRun:
    """A run read back: its configuration, and task and agent as they stood at its newest checkpoint."""

    run: Path
    config: dict[str, Any]
    agent: Agent
    evaluate: Callable[..., dict[str, Any]]  # (agent, episodes, seed) -> raw "returns" and what else the kind of task tells
    task: Any  # the sequence task of text and denoising runs, None for stepped kinds

    def shielded(self) -> Guarded:
        """The agent behind the shield that it was trained with (`acs/ppo`): a policy whose `predict` moves unsafe actions.

        Raises ValueError for a run without a shield, CheckpointError where its networks are not in the checkpoint.
        """
        from markovia.agents.checkpoint import CheckpointError, load_tensors
        from markovia.algos.safe.guard import Guard, Guarded
        from markovia.algos.systems import Method
        from markovia.algos.trainer import part

        constraint: Any = getattr(from_json(Method, self.config["settings"]), "constraint", None)
        if getattr(constraint, "shield", None) is None:
            raise ValueError(f"{self.run} was trained without a shield; its agent is all there is (acs/ppo trains one, or --constraint.shield.*)")
        guard, path = Guard(constraint, self.agent, self.config["seed"]), checkpoints(self.run)[-1] / DRIVER
        tensors, meta = load_tensors(path)
        try:
            guard.load_state(part(tensors, "guard."), meta["guard"])
        except (KeyError, RuntimeError, TypeError) as e:
            raise CheckpointError(f"{path} does not hold the shield of this run ({e!r}); it is of another version of markovia") from e
        return Guarded(guard)


def load_run(run: str | Path, trust: Sequence[str] = ()) -> LoadedRun:
    """Rebuild a run's task and agent. `trust` names modules whose code config.json may name, beside markovia's own and $MARKOVIA_TRUST_CODE.

    Raises RunError when the folder is no run, has no checkpoint yet or another configuration than it, and ValueError for code that is not trusted.
    """
    from markovia.agents.checkpoint import CheckpointError, read_agent
    from markovia.envs.untrusted import code_from_file

    run = Path(run)
    config = own_config(run)
    found = checkpoints(run)
    if not found:
        raise RunError(f"{run} has no checkpoint yet; train on with --resume")
    _compare_files(config, run)
    try:
        with code_from_file(trust), counted(config, str(run / CONFIG)):
            setup = _without_dataset(config, run, found[-1] / "agent") or _built(config, found[-1] / "agent")
    except CheckpointError as error:
        raise CheckpointError(f"{error}{whole_before(found, lambda c: read_agent(c / 'agent'))}") from error
    except (ValueError, FileNotFoundError, ImportError, RunError):
        raise
    except Exception as error:  # what settings from a file do to a constructor is anybody's guess
        raise RunError(f"{run / CONFIG} can't be built ({error!r}); it was damaged, or written by another version of markovia") from error
    return LoadedRun(run, config, setup.agent, setup.evaluate, setup.task)


def _compare_files(config: dict[str, Any], run: Path) -> None:
    """Raises RunError where a text file of the run is not there; warns where it has changed since, because then nobody knows what was held out."""
    told = dict(config.get("read", {}))
    if "sha256" in config.get("data", {}):
        told[config["data"]["path"]] = config["data"]["sha256"]
    for path, was in told.items():
        if not Path(path).exists():
            raise RunError(f"{run} was trained on {path}, which is not there: put it back, or be in the folder that the run was started in")
        if content_hash(path) != was:
            warnings.warn(f"{path} has changed since {run} was trained on it: what it holds out now may have been trained on", stacklevel=3)


def _without_dataset(config: dict[str, Any], run: Path, agent: Path) -> Setup | None:
    """A policy that learnt from a dataset, which is not read again: its checkpoint and the run's reference returns are all that evaluation takes.

    None for other runs, and for those from before the references were kept.
    """
    if config.get("dataset") is None:
        return None
    from markovia.agents.checkpoint import load_agent
    from markovia.algos.offline.setup import REFERENCE, read_reference, scored
    from markovia.algos.setup import Setup

    if not (run / REFERENCE).is_file():
        return None
    env_spec(config["env"])
    evaluate = scored(config["env"], from_json(dict[str, Any], config["env_kwargs"]), read_reference(run / REFERENCE))
    return Setup("control", load_agent(agent), None, evaluate)


def _built(config: dict[str, Any], agent: Path) -> Setup:
    """What `train` built of a configuration, with the weights of a checkpoint's agent."""
    from markovia.agents.checkpoint import read_agent
    from markovia.algos.setup import build
    from markovia.algos.systems import Method

    if config["env"] is not None:
        env_spec(config["env"])
    weights = read_agent(agent)[1]
    setup = build(
        config["env"],
        from_json(Method, config["settings"]),
        config["seed"],
        env_kwargs=from_json(dict[str, Any], config["env_kwargs"]),
        agent_options=from_json(dict[str, Any], config["agent_options"]),
        device="cpu",
        data=from_json(dict[str, Any], config["data"]) if "data" in config else None,
        dataset=config.get("dataset"),
    )
    setup.agent.load_state(weights)
    return setup


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two configurations, as far as a run's numbers depend on it; empty when nothing does."""
    old, new = ({k: v for k, v in c.items() if k not in _NOT_COMPARED} for c in (before, now))
    return "; ".join(differences(old, new)[:4])


def own_config(run: Path) -> dict[str, Any]:
    """config.json of a run. Raises RunError when its newest checkpoint was written under another configuration."""
    config = check_config(read_json(run / CONFIG), run / CONFIG)
    for written in (checkpoint / CONFIG for checkpoint in checkpoints(run)[-1:]):
        changed = changes(check_config(read_json(written), written), config) if written.is_file() else ""
        if changed:
            raise RunError(
                f"{run / CONFIG} was edited or belongs to another run: the newest checkpoint was written with other settings ({changed}); "
                f"put {written} in its place, or train into another --out"
            )
    return config


@contextlib.contextmanager
def counted(config: dict[str, Any], name: str, mend: str = "") -> Iterator[None]:
    """While what a configuration describes is built, its tensors are counted before they are made. Raises OverMemory that names the largest sizes."""
    from markovia.agents.counted import Counted

    try:
        with Counted(f"what {name} describes"):
            yield
    except machine.OverMemory as error:
        raise machine.OverMemory(f"{error} (the largest sizes are {largest(config)}){mend}") from None
