"""From an environment id and a method's settings to an agent, a collector and an evaluation: the only code that knows all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.algos.collect import SequenceCollector, StepCollector, cost_of
from markovia.algos.compiled import can_compile
from markovia.algos.denoising.adjoint import AdjointMatching
from markovia.algos.denoising.driver import AdjointDriver
from markovia.algos.denoising.methods import ChainMethod
from markovia.algos.denoising.preference import DenoisingPreference, DenoisingPreferenceDriver
from markovia.algos.diffusion_policy.method import Imitation, TwoLayer
from markovia.algos.off_policy.driver import OffPolicyDriver, check_action_box
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.offline.method import Offline
from markovia.algos.offline.sequences import ReturnConditioned, SequenceDriver
from markovia.algos.offline.warm_start import WarmStart, WarmStartDriver
from markovia.algos.on_policy.auxiliary import Ptx
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.policies import load_policies
from markovia.algos.preference.driver import PreferenceDriver
from markovia.algos.preference.method import FromPreferences, Preference
from markovia.algos.preference.reward_model import RewardModelDriver, RewardTraining, build_reward_model
from markovia.algos.streams import stream, stream_seed
from markovia.algos.systems import Method
from markovia.algos.text_metrics import pass_curve
from markovia.envs.control.vector import make_vec
from markovia.envs.registry import kind_of

EAGER = (ChainMethod, FromPreferences, Imitation, ReturnConditioned)  # settings whose loops compile nothing
COMPILE_STEPS = 30_000  # optimiser steps; each saves a little under a millisecond
Evaluate = Callable[[Agent, int, int], dict[str, Any]]


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
    setup = _build(env_id, method, seed, env_kwargs or {}, dict(agent_options or {}), vectorization, device, data, dataset)
    if references:
        setup.references = load_policies(method, references, setup.agent)
    if texts is not None:
        if not isinstance(getattr(method, "aux", None), Ptx):
            raise ValueError("the method reads no texts; those that do have an auxiliary loss Ptx, e.g. ppo-max/ptx and ppo-rlhf/ptx")
        from markovia.algos.texts import load_texts

        setup.texts = load_texts(texts, setup.agent)  # type: ignore[arg-type]
    return setup


def _build(
    env_id: str | None, method: Method, seed: int, env_kwargs: dict[str, Any], options: dict[str, Any], vectorization: str, device: str,
    data: dict[str, Any] | None, dataset: str | None,
) -> Setup:  # fmt: skip
    if dataset is not None and not isinstance(method, Offline | WarmStart | ReturnConditioned | Imitation):
        raise ValueError(f"{type(method).__name__} does not learn from a dataset; choose an offline method such as td3-bc, or leave dataset out")
    if isinstance(method, Preference):
        from markovia.algos.preference.setup import build_preference

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "init"))
            return build_preference(env_id, method, env_kwargs, options, data, device)
    if isinstance(method, RewardTraining):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "init"))
            return build_reward_model(env_id, options, data, device)
    if env_id is None or data is not None:
        raise ValueError(f"{type(method).__name__} learns from an environment, not from a file; give it an env and no data")
    kind = kind_of(env_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "init"))
        if isinstance(method, ChainMethod):
            if kind != "denoising":
                raise ValueError(f"{type(method).__name__} trains denoising tasks; {env_id} is a {kind} task")
            return _sequences(kind, env_id, method, env_kwargs, options, device)
        if isinstance(method, TwoLayer):
            from markovia.algos.diffusion_policy.setup import build_two_layer

            return build_two_layer(env_id, method, seed, env_kwargs, options, device)
        if isinstance(method, Offline | WarmStart | ReturnConditioned | Imitation):
            from markovia.algos.diffusion_policy.setup import build_imitation
            from markovia.algos.offline.setup import build_offline, build_sequences, build_warm_start

            if kind != "control" or dataset is None:
                raise ValueError(
                    f"an offline method learns control from a dataset: name one (--dataset: a Minari id, a D4RL file or fixture:NAME), "
                    f"got {dataset} for the {kind} task {env_id}"
                )
            if isinstance(method, Imitation):
                return build_imitation(env_id, method, dataset, env_kwargs, options, device)
            if isinstance(method, ReturnConditioned):
                return build_sequences(env_id, method, dataset, env_kwargs, options, device)
            if isinstance(method, WarmStart):
                return build_warm_start(env_id, method, dataset, seed, env_kwargs, options, vectorization, device)
            return build_offline(env_id, method, dataset, env_kwargs, options, device)
        if isinstance(method, OffPolicy):
            return _replayed(kind, env_id, method, seed, env_kwargs, options, vectorization, device)
        if kind in ("control", "tabular"):
            return _stepped(kind, env_id, method, seed, env_kwargs, options, vectorization, device)
        return _sequences(kind, env_id, method, env_kwargs, options, device)


def make_driver(method: Method, setup: Setup, seed: int = 0, compile: bool = False) -> Any:
    """The driver whose slots the method fills, by the class of its settings."""
    if isinstance(method, AdjointMatching):
        return AdjointDriver(method, setup.agent, setup.collector, seed)  # type: ignore[arg-type]
    if isinstance(method, DenoisingPreference):
        return DenoisingPreferenceDriver(method, setup.agent, setup.collector, seed)  # type: ignore[arg-type]
    if isinstance(method, RewardTraining):
        return RewardModelDriver(method, setup.agent, setup.collector, seed)  # type: ignore[arg-type]
    if isinstance(method, Preference):
        return PreferenceDriver(method, setup.agent, setup.collector, seed)
    if isinstance(method, Imitation):
        from markovia.algos.diffusion_policy.driver import ImitationDriver

        return ImitationDriver(method, setup.agent, setup.collector, seed)  # type: ignore[arg-type]
    if isinstance(method, ReturnConditioned):
        return SequenceDriver(method, setup.agent, setup.collector, seed)  # type: ignore[arg-type]
    if isinstance(method, WarmStart):
        return WarmStartDriver(method, setup.agent, setup.collector, seed, compile)  # type: ignore[arg-type]
    if isinstance(method, OffPolicy):
        return OffPolicyDriver(method, setup.agent, setup.collector, seed, compile)  # type: ignore[arg-type]
    return OnPolicyDriver(method, setup.agent, setup.collector, seed, compile, setup.references, setup.texts)


def worth_compiling(method: Method, setup: Setup) -> bool:
    """Whether a compiled update repays the half minute that it takes to compile, on a device that can: updates of one shape, and many of them."""
    if setup.kind == "language" or isinstance(method, EAGER) or method.num_optimizer_steps < COMPILE_STEPS:
        return False
    return can_compile(setup.agent.device.type)


def _gamma(method: OnPolicy) -> float:
    return float(getattr(method.advantage, "gamma", 1.0))


def _num_costs(method: Any) -> int:
    """Cost columns that the critic needs."""
    constraint = getattr(method, "constraint", None)
    return 0 if constraint is None else constraint.num_costs


def _stepped(
    kind: str, env_id: str, method: OnPolicy, seed: int, env_kwargs: dict[str, Any], options: dict[str, Any], vectorization: str, device: str
) -> Setup:
    venv = make_vec(env_id, method.num_envs, vectorization=vectorization, seed=seed, kwargs=env_kwargs)
    spaces = venv.single_observation_space, venv.single_action_space
    critic = method.advantage.needs_critic
    options = {"num_costs": _num_costs(method), **options}
    agent: Agent
    if kind == "tabular":
        from markovia.agents.tabular import TabularAgent

        agent = TabularAgent.from_spaces(*spaces, logits=_prior(venv), critic=critic, device=device, **options)
    else:
        from markovia.agents.control import ControlAgent

        options = {"normalize_obs": method.normalize_obs, **options}
        agent = ControlAgent.from_spaces(*spaces, critic=critic, device=device, **options)
    cost_gamma = 1.0 if method.constraint is None else method.constraint.cost_gamma
    collector = StepCollector(venv, agent, method.num_steps, seed, _gamma(method), method.scale_reward, cost_gamma)
    return _stepped_setup(kind, env_id, agent, collector, venv, env_kwargs)


def _replayed(
    kind: str, env_id: str, method: OffPolicy, seed: int, env_kwargs: dict[str, Any], options: dict[str, Any], vectorization: str, device: str
) -> Setup:
    from markovia.agents.control import ControlAgent
    from markovia.algos.off_policy.collect import ReplayCollector
    from markovia.algos.off_policy.replay import Replay

    venv = make_vec(env_id, method.num_envs, vectorization=vectorization, seed=seed, kwargs=env_kwargs)
    check_action_box(venv.single_action_space)
    options = {**method.policy.agent_options(), "normalize_obs": False, **options}
    agent = ControlAgent.from_spaces(venv.single_observation_space, venv.single_action_space, critic=False, device=device, **options)
    # A step of all environments may pass the budget by all but one of them.
    replay = Replay(min(method.replay_size, method.num_env_steps + method.num_envs))
    return _stepped_setup(kind, env_id, agent, ReplayCollector(venv, agent, replay, seed), venv, env_kwargs)


def _stepped_setup(
    kind: str, env_id: str, agent: Agent, collector: StepCollector, venv: gym.vector.VectorEnv, env_kwargs: dict[str, Any]
) -> Setup:
    def evaluate(agent: Agent, episodes: int, seed: int) -> dict[str, Any]:
        return evaluate_stepped(agent, env_id, episodes, seed, env_kwargs)

    limit = venv.spec.max_episode_steps if venv.spec is not None else None
    return Setup(kind, agent, collector, evaluate, episode_steps=venv.num_envs * (limit or 1))


def _prior(venv: gym.vector.VectorEnv) -> torch.Tensor | None:
    """Start logits for problems that come with a reference policy (TokenTree's p0), one more row for the end state; else None."""
    oracle = getattr(venv.unwrapped, "oracle", None)
    prior = getattr(oracle, "logits_ref", None)
    if prior is None:
        return None
    table = torch.as_tensor(prior, dtype=torch.float32)
    return torch.cat([table, torch.zeros_like(table[:1])])


def _sequences(
    kind: str, env_id: str, method: OnPolicy | ChainMethod, env_kwargs: dict[str, Any], options: dict[str, Any], device: str
) -> Setup:
    bare = env_id.rpartition(":")[2]
    kwargs = {**gym.spec(bare).kwargs, **env_kwargs}
    critic = isinstance(method, OnPolicy) and method.advantage.needs_critic
    agent: Agent
    if isinstance(method, ChainMethod) or kind == "denoising":
        from markovia.agents.denoising import DenoisingAgent
        from markovia.envs.denoising.tasks import make_task

        task: Any = make_task(**kwargs)
        hidden = options.pop("critic_hidden", 128) if critic else None
        agent = DenoisingAgent.from_task(task, critic_hidden=hidden, **{"num_costs": _num_costs(method), **options})
        agent.to(device)
    else:
        from markovia.agents.language import LanguageAgent
        from markovia.envs.text.tasks import make_task as make_text_task
        from markovia.envs.text.tasks import takes

        # A task that any model can do has the tokenizer of the one that is trained.
        named = {"model": options["model"]} if options.get("model") and takes(kwargs["task"], "model") else {}
        task = make_text_task(**{**kwargs, **named, "group_size": method.group_size})
        options = {"temperature": task.temperature, "max_new_tokens": task.max_new_tokens, **options}
        base = options.pop("model", task.model)
        if base is None:
            raise ValueError(f"{env_id} names no model of its own; say which to train with the agent option model=<name or folder>")
        agent = LanguageAgent.from_name(base, value_head=critic, **{"num_costs": _num_costs(method), **options})
        agent.to(device)
    collector = SequenceCollector(task, method.num_envs)

    def evaluate(agent: Agent, episodes: int, seed: int) -> dict[str, Any]:
        return evaluate_sequences(agent, task, episodes, seed)

    return Setup(kind, agent, collector, evaluate, task)


def evaluate_stepped(
    agent: Agent, env_id: str, episodes: int, seed: int, env_kwargs: dict[str, Any] | None = None, deterministic: bool = True
) -> dict[str, Any]:
    """Raw returns, lengths and, where the task has them, costs of `episodes` greedy episodes, each of its own environment and seed (no bias towards
    short ones); with deterministic=False of sampled actions."""
    venv = make_vec(env_id, episodes, seed=seed, kwargs=env_kwargs or {})
    obs, _ = venv.reset(seed=stream_seed(seed, "evaluation") % 2**31)
    returns, lengths, running = np.zeros(episodes), np.zeros(episodes, dtype=int), np.ones(episodes, dtype=bool)
    state, starting = None, np.ones(episodes, dtype=bool)
    costs: np.ndarray | None = None
    while running.any():
        actions, state = agent.predict(obs, state, starting, deterministic)
        obs, reward, terminated, truncated, infos = venv.step(actions)
        returns += reward * running
        step_cost = cost_of(infos, terminated | truncated, episodes)
        if step_cost is not None:
            costs = (0.0 if costs is None else costs) + step_cost.sum(1) * running
        lengths += running
        starting = terminated | truncated
        running &= ~starting
    venv.close()
    return {"returns": returns.tolist(), "lengths": lengths.tolist(), **({} if costs is None else {"costs": costs.tolist()})}


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
