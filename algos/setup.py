"""From an environment id and a method's settings to an agent, a source of data and an evaluation; each family's folder builds its own."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.algos.collect import cost_of
from markovia.algos.compiled import can_compile
from markovia.algos.families import Family, family_of
from markovia.algos.streams import stream, stream_seed
from markovia.algos.text_metrics import pass_curve
from markovia.envs import machine
from markovia.envs.control.stepping import Policy, first_episodes
from markovia.envs.control.vector import make_vec
from markovia.envs.registry import kind_of

if TYPE_CHECKING:
    from markovia.algos.systems import Method

COMPILE_STEPS = 30_000  # optimiser steps; each saves a little under a millisecond
THREAD_WORK = 10_000_000  # parameters times rows of an optimiser step, from which on several threads are worth it
Evaluate = Callable[[Agent, int, int], dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What a run is built from, beside the method's settings."""

    env_id: str | None
    seed: int = 0
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    agent_options: dict[str, Any] = field(default_factory=dict)
    vectorization: str = "auto"
    device: str = "cpu"
    data: dict[str, Any] | None = None  # a file of preferences: its path, "judge" and "options"
    dataset: str | None = None

    @property
    def task(self) -> str:
        """The environment's id, which families that train in one can count on."""
        assert self.env_id is not None
        return self.env_id


@dataclass
class Setup:
    """What a run needs. `evaluate(agent, episodes, seed)` returns {"returns": [...], ...} under the greedy or sampled policy of the kind."""

    kind: str
    agent: Agent
    collector: Any  # where the driver's data comes from: `StepCollector`, `SequenceCollector`, `ReplayCollector`
    evaluate: Evaluate
    task: Any = None  # the sequence task, None for stepped kinds
    note: str = ""  # what became of the rows of a file, where data were read
    references: dict[str, Agent] = field(default_factory=dict)  # policies that the method reads, by name
    texts: Rollout | None = None  # of an auxiliary loss
    files: dict[str, str] = field(default_factory=dict)  # more for the run folder: name -> content
    episode_steps: int = 1  # decisions of all rows together until an episode of full length ends; 1 where that is not known


def build(
    env_id: str | None,
    method: Method,
    seed: int = 0,
    env_kwargs: dict[str, Any] | None = None,
    agent_options: dict[str, Any] | None = None,
    vectorization: str = "auto",
    device: str = "cpu",
    data: dict[str, Any] | None = None,
    dataset: str | None = None,
    references: dict[str, str] | None = None,
    texts: str | None = None,
) -> Setup:
    """Build everything for one run; network initialisation draws from the stream (seed, "init").

    data  for preference methods: {"path": file, "judge": "module:function" or None, "options": fields of DataOptions}; env_id may then be None
    dataset  for offline methods: a Minari id, a D4RL file or "fixture:<name>"; env_id is then the task of the evaluation
    texts  file whose likelihood an auxiliary loss keeps up (Ptx)
    references  policies that the method reads beside its own reference: name -> run folder, folder of agent.save, or Hugging Face name
    Raises ValueError with the mend for unknown ids and spaces that no agent serves.
    """
    family = family_of(method)
    request = Request(env_id, seed, dict(env_kwargs or {}), dict(agent_options or {}), vectorization, device, data, dataset)
    _check(method, family, request)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "init"))
        setup: Setup = _find(family.build)(method, request)
    if references:
        from markovia.algos.policies import load_policies

        setup.references = load_policies(method, references, setup.agent)
    if texts is not None:
        from markovia.algos.on_policy.auxiliary import Ptx

        if not isinstance(getattr(method, "aux", None), Ptx):
            raise ValueError("the method reads no texts; those that do have an auxiliary loss Ptx, e.g. ppo-max/ptx and ppo-rlhf/ptx")
        from markovia.algos.texts import load_texts

        setup.texts = load_texts(texts, setup.agent)  # type: ignore[arg-type]
    return setup


def _check(method: Method, family: Family, request: Request) -> None:
    """Raises ValueError where what is given to learn from is not what the family reads."""
    name, env_id = type(method).__name__, request.env_id
    if request.dataset is not None and family.reads != "dataset":
        raise ValueError(f"{name} does not learn from a dataset; choose an offline method such as td3-bc, or leave dataset out")
    if family.reads == "preferences":
        return
    if env_id is None or request.data is not None:
        raise ValueError(f"{name} learns from an environment, not from a file; give it an env and no data")
    kind = kind_of(env_id)
    if family.kinds is not None and kind not in family.kinds:
        raise ValueError(f"{name} trains {' and '.join(family.kinds)} tasks; {env_id} is a {kind} task")
    if family.reads == "dataset" and (kind != "control" or request.dataset is None):
        raise ValueError(
            f"an offline method learns control from a dataset: name one (--dataset: a Minari id, a D4RL file or fixture:NAME), "
            f"got {request.dataset} for the {kind} task {env_id}"
        )


def _find(path: str) -> Callable[..., Any]:
    """What "package.module:name" says."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def make_driver(method: Method, setup: Setup, seed: int = 0, compile: bool = False) -> Any:
    """The driver whose slots the method fills."""
    family = family_of(method)
    extra: dict[str, Any] = {"compile": compile} if family.compiles else {}
    extra |= {name: given for name, given in (("references", setup.references), ("texts", setup.texts)) if given}
    return _find(family.driver)(method, setup.agent, setup.collector, seed, **extra)


def worth_compiling(method: Method, setup: Setup) -> bool:
    """Whether a compiled update repays the half minute that it takes to compile, on a device that can: updates of one shape, and many of them."""
    if setup.kind == "language" or not family_of(method).compiles or getattr(method, "num_optimizer_steps", 0) < COMPILE_STEPS:
        return False
    return can_compile(setup.agent.device.type)


def num_threads(method: Method, setup: Setup, available: int) -> int:
    """Threads that a run computes on. Those that wait for each other cost small networks far more than they bring, most of all on a busy machine."""
    settings: Any = method
    solver = getattr(settings, "solver", None)
    minibatch = getattr(settings, "batch_size", None) or getattr(solver, "minibatch", None)
    rows = minibatch or settings.num_envs * getattr(settings, "num_steps", 1)
    work = rows * sum(p.numel() for p in setup.agent.net.parameters())
    return available if work >= THREAD_WORK else 1


@contextlib.contextmanager
def tuned(method: Method, setup: Setup) -> Iterator[None]:
    """Within, torch computes on as many threads as the optimiser steps are worth; freed memory is kept from then on."""
    machine.keep_freed_memory()
    usual = torch.get_num_threads()
    torch.set_num_threads(num_threads(method, setup, min(usual, machine.cores())))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def stepped_setup(kind: str, agent: Agent, collector: Any, venv: VectorEnv, request: Request) -> Setup:
    """A run whose environment is stepped, evaluated in fresh copies of it."""

    def evaluate(agent: Agent, episodes: int, seed: int) -> dict[str, Any]:
        return evaluate_stepped(agent, request.task, episodes, seed, request.env_kwargs)

    limit = venv.spec.max_episode_steps if venv.spec is not None else None
    return Setup(kind, agent, collector, evaluate, episode_steps=venv.num_envs * (limit or 1))


def sequence_setup(kind: str, agent: Agent, collector: Any, task: Any) -> Setup:
    """A run on whole sequences, evaluated by sampling more of them."""

    def evaluate(agent: Agent, episodes: int, seed: int) -> dict[str, Any]:
        return evaluate_sequences(agent, task, episodes, seed)

    return Setup(kind, agent, collector, evaluate, task)


def evaluate_stepped(
    agent: Policy,
    env_id: str,
    episodes: int,
    seed: int,
    env_kwargs: dict[str, Any] | None = None,
    deterministic: bool = True,
    columns: bool = False,
) -> dict[str, Any]:
    """Raw returns, lengths and, where the task tells some or the agent learnt to value them, costs of `episodes` greedy episodes, each of its own
    environment and seed (no bias towards short ones); with deterministic=False of sampled actions. The costs of an episode are added up, with
    `columns` each cost for itself."""
    venv = make_vec(env_id, episodes, seed=seed, kwargs=env_kwargs or {})
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=int)
    costs = np.zeros((episodes, 1)) if getattr(agent, "num_costs", 0) else None
    for step in first_episodes(venv, agent, stream_seed(seed, "evaluation") % 2**31, deterministic):
        returns += step.reward * step.running
        step_cost = cost_of(step.infos, step.terminated | step.truncated, episodes)
        if step_cost is not None:
            costs = (0.0 if costs is None else costs) + step_cost * step.running[:, None]
        lengths += step.running
    venv.close()
    out: dict[str, Any] = {"returns": returns.tolist(), "lengths": lengths.tolist()}
    return out if costs is None else {**out, "costs": (costs if columns else costs.sum(1)).tolist()}


def sample_sequences(agent: Agent, task: Any, n: int, seed: int, per_prompt: int = 1) -> Rollout:
    """n sequences of the stream (seed, "evaluation"); texts start from held-out prompts where the task has some, `per_prompt` from each."""
    generator = stream(seed, "evaluation", device=agent.device)
    if agent.kind == "language":
        chance = stream(seed, "evaluation-prompts")
        starts = task.starts(n * per_prompt, chance, split="held_out" if task.held_out else "train", group_size=per_prompt)
    else:
        starts = task.starts(n, generator)
    return agent.generate(starts, generator)


@torch.no_grad()
def evaluate_sequences(agent: Agent, task: Any, episodes: int, seed: int) -> dict[str, Any]:
    """Rewards of `episodes` sampled sequences; text is started from held-out prompts, denoising also scored by the judge where there is one.

    A text task that can tell what is right gets several responses to each prompt: a return is then their mean, and pass@k stands beside it.
    """
    per_prompt = task.eval_samples if agent.kind == "language" and task.solved is not None else 1
    rollout = sample_sequences(agent, task, episodes, seed, per_prompt)
    returns, lengths = task.score(rollout).view(-1, per_prompt), rollout.valid.sum(1).double().view(-1, per_prompt)
    out: dict[str, Any] = {"returns": returns.mean(1).tolist(), "lengths": lengths.mean(1).tolist()}
    if agent.kind == "language":
        out["prompts"], out["completions"] = (rollout.outcome[k][::per_prompt] for k in ("prompt_text", "completion_text"))
        told = rollout.outcome["rewards"]
        out |= {f"reward/{name}": float(x.mean()) for name, x in told.items()} if len(told) > 1 else {}
        if task.solved is not None:
            curve = pass_curve(rollout.outcome["solved"].view(-1, per_prompt))
            out |= {f"pass@{k}": curve[k - 1] for k in (1, 8) if k <= per_prompt} | {"pass_curve": curve}
    elif getattr(task, "judge", None) is not None:
        out["judge"] = task.judged(rollout.outcome["x"], rollout.outcome.get("cond")).tolist()
    return out
