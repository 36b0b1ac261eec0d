"""From a request to what the on-policy loop needs: a stepped environment, or a task of whole sequences."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch

from markovia.agents.interface import Agent
from markovia.algos.collect import SequenceCollector, StepCollector
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.safe.constraint import check_task_limit
from markovia.algos.setup import Request, Setup, sequence_setup, stepped_setup
from markovia.envs.control.vector import make_vec
from markovia.envs.registry import kind_of


def build(method: OnPolicy, request: Request) -> Setup:
    """Everything for one run of the on-policy loop, by the kind of its task. Raises ValueError for spaces that no agent serves, for limits that
    the task does not know or has otherwise, and for groups where a task has no prompts."""
    by_kind, kind, constraint = {"denoising": denoising_setup, "language": _language}, kind_of(request.task), method.constraint
    check_task_limit(constraint, request.task, request.env_kwargs)
    if kind in by_kind and constraint is not None and constraint.cost_gamma < 1:
        raise ValueError(f"a sequence is paid for as a whole, with no steps to discount; set cost_gamma=1 for {request.task}")
    if kind != "language" and method.group_size > 1:
        raise ValueError(
            f"group_size={method.group_size} asks for several responses to each prompt, which text tasks have; in {request.task} all rows are one "
            "group: set group_size=1"
        )
    return by_kind.get(kind, _stepped)(method, request)


def num_costs(method: Any) -> int:
    """Cost columns that the critic needs."""
    constraint = getattr(method, "constraint", None)
    return 0 if constraint is None else constraint.num_costs


def _stepped(method: OnPolicy, request: Request) -> Setup:
    kind = kind_of(request.task)
    venv = make_vec(request.task, method.num_envs, vectorization=request.vectorization, seed=request.seed, kwargs=request.env_kwargs)
    spaces = venv.single_observation_space, venv.single_action_space
    options: dict[str, Any] = {"num_costs": num_costs(method), "critic": method.advantage.needs_critic, "device": request.device}
    agent: Agent
    if kind == "tabular":
        from markovia.agents.tabular import TabularAgent

        agent = TabularAgent.from_spaces(*spaces, **{"logits": _prior(venv), **options, **request.agent_options})
    else:
        from markovia.agents.control import ControlAgent

        agent = ControlAgent.from_spaces(*spaces, **{"normalize_obs": method.normalize_obs, **options, **request.agent_options})
    gamma, constraint = float(getattr(method.advantage, "gamma", 1.0)), method.constraint
    cost_gamma = 1.0 if constraint is None else constraint.cost_gamma
    collector = StepCollector(venv, agent, method.num_steps, request.seed, gamma, method.scale_reward, cost_gamma)
    return stepped_setup(kind, agent, collector, venv, request)


def _prior(venv: gym.vector.VectorEnv) -> torch.Tensor | None:
    """Start logits for problems that come with a reference policy (TokenTree's p0), one more row for the end state; else None."""
    oracle = getattr(venv.unwrapped, "oracle", None)
    prior = getattr(oracle, "logits_ref", None)
    if prior is None:
        return None
    table = torch.as_tensor(prior, dtype=torch.float32)
    return torch.cat([table, torch.zeros_like(table[:1])])


def task_kwargs(request: Request) -> dict[str, Any]:
    """Keywords of a task of whole sequences: those that its id is registered with, and the request's."""
    return {**gym.spec(request.task.rpartition(":")[2]).kwargs, **request.env_kwargs}


def denoising_setup(method: Any, request: Request) -> Setup:
    """Everything for a denoising task; with a critic where the method's advantage needs one."""
    from markovia.agents.denoising import DenoisingAgent
    from markovia.envs.denoising.tasks import make_task

    task = make_task(**task_kwargs(request))
    options = dict(request.agent_options)
    critic = isinstance(method, OnPolicy) and method.advantage.needs_critic
    hidden = options.pop("critic_hidden", 128) if critic else None
    agent = DenoisingAgent.from_task(task, critic_hidden=hidden, **{"num_costs": num_costs(method), **options})
    agent.to(request.device)
    return sequence_setup("denoising", agent, SequenceCollector(task, method.num_envs), task)


def _language(method: OnPolicy, request: Request) -> Setup:
    from markovia.agents.language import LanguageAgent
    from markovia.envs.text.tasks import make_task, takes

    kwargs, options = task_kwargs(request), dict(request.agent_options)
    # A task that any model can do has the tokenizer of the one that is trained.
    named = {"model": options["model"]} if options.get("model") and takes(kwargs["task"], "model") else {}
    task = make_task(**{**kwargs, **named, "group_size": method.group_size})
    options = {"temperature": task.temperature, "max_new_tokens": task.max_new_tokens, **options}
    base = options.pop("model", task.model)
    if base is None:
        raise ValueError(f"{request.task} names no model of its own; say which to train with the agent option model=<name or folder>")
    agent = LanguageAgent.from_name(base, value_head=method.advantage.needs_critic, **{"num_costs": num_costs(method), **options})
    agent.to(request.device)
    return sequence_setup("language", agent, SequenceCollector(task, method.num_envs), task)
