"""From a file of preferences, a model's name and a method to what a run needs."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from markovia.agents.interface import Agent
from markovia.algos.preference.anchors import Dataset
from markovia.algos.preference.data import prepare, samples_beside
from markovia.algos.preference.evaluation import HeldOut, ordered, prompt_task, unscored
from markovia.algos.preference.method import Preference
from markovia.algos.preference.sources import FileItems, JudgedSamples, OwnSamples
from markovia.algos.setup import Request, Setup, evaluate_sequences, sample_sequences
from markovia.envs.registry import kind_of
from markovia.envs.text.preferences import DataOptions, PreferenceData, load_preferences
from markovia.envs.text.rewards import resolve
from markovia.envs.text.tasks import TextTask, make_task, takes

SAMPLED_PROMPTS = 256  # prompts of a file that samples are drawn for


def build_preference(method: Preference, request: Request) -> Setup:
    """Agent, source of items and evaluation. Prompts are the file's, or those of a text task, whose score then judges sampled rounds.

    Raises ValueError for a missing file, model or judge, for columns that the method misses, and for a task that is not text.
    """
    from markovia.agents.language import LanguageAgent

    env_id, options, data = request.env_id, dict(request.agent_options), request.data
    task = None if env_id is None else _text_task(env_id, request.env_kwargs, options.get("model"))
    if data is None and isinstance(method.sampler, Dataset):
        raise ValueError("this method learns from preferences, not from rewards; give it a file of them: --data prefs.jsonl (docs/preference.md)")
    base = options.pop("model", None if task is None else task.model)
    if base is None:
        raise ValueError("say which model is to be trained: --model smollm2, a Hugging Face name, or a folder")
    # A file that holds responses serves every method whose columns it has; without one, or with a judge, a method that samples does so.
    judged = data is None or data.get("judge") is not None
    like_task = {"temperature": task.temperature, "max_new_tokens": task.max_new_tokens} if task is not None and data is None else {}
    agent = LanguageAgent.from_name(base, value_head="value" in method.needs, **{"packed": True, **like_task, **options})
    agent.to(request.device)
    reading = DataOptions(**(data or {}).get("options", {}))
    found = None if data is None else load_preferences(data["path"], agent.tokenizer, reading)
    judge = None if data is None or data.get("judge") is None else resolve(data["judge"])
    note = "" if found is None else str(found.report)
    prompts_only = found is not None and found.kind == "prompts"
    if not isinstance(method.sampler, Dataset) and (judged or prompts_only):
        if task is None:
            task = _prompts(found, agent.tokenizer, judge, reading, options.get("max_new_tokens"))
        return _online(method, agent, task, note)
    assert found is not None
    prepare(method, found)
    train, held_out = found.parts(reading.held_out)
    seen = not ordered(held_out, found.kind)
    held = HeldOut(agent, ordered(train, found.kind)[:32] if seen else held_out, found.kind)
    task = task or prompt_task(found, agent.tokenizer, judge or unscored, held_out, SAMPLED_PROMPTS, options.get("max_new_tokens"))

    def evaluate(agent: Agent, episodes: int, seed: int) -> dict[str, Any]:
        out = {**held(agent), "held_out": not seen}
        if task is not None:
            rollout = sample_sequences(agent, task, episodes, seed)
            out |= {"prompts": rollout.outcome["prompt_text"], "completions": rollout.outcome["completion_text"]}
            if judge is not None or env_id is not None:
                out["task_returns"] = task.score(rollout).tolist()
        return out

    source = OwnSamples if samples_beside(method, found) else FileItems
    return Setup("language", agent, source(train, found.kind), evaluate, task, note=str(found.report))


def _text_task(env_id: str, env_kwargs: dict[str, Any], model: str | None) -> TextTask:
    """The environment's task, with the tokenizer of the model that is trained where any model can do it."""
    if kind_of(env_id) != "language":
        raise ValueError(f"preferences are learnt on text here; {env_id} is a {kind_of(env_id)} task")
    kwargs = {**gym.spec(env_id.rpartition(":")[2]).kwargs, **env_kwargs}
    named = {"model": model} if model is not None and takes(kwargs["task"], "model") else {}
    return make_task(**{**kwargs, **named})


def _prompts(found: PreferenceData | None, tokenizer: Any, judge: Any, reading: DataOptions, max_new_tokens: int | None) -> TextTask:
    """A file's prompts as the task of rounds. Raises ValueError without a judge or prompts."""
    if found is None or judge is None:
        raise ValueError(
            "this method samples its own responses, so it needs prompts and a judge: --env with a text task, or --data with a column prompt and "
            "--judge module:function, called as (prompts, completions, **columns) -> list of numbers"
        )
    task = prompt_task(found, tokenizer, judge, found.parts(reading.held_out)[1], max_new_tokens=max_new_tokens)
    if task is None:
        raise ValueError(f"{found.report.source} has no prompts; rounds of samples need a column prompt")
    return task


def _online(method: Preference, agent: Any, task: TextTask, note: str) -> Setup:
    """Rounds of judged samples on the task's prompts."""

    def evaluate(agent: Agent, episodes: int, seed: int) -> dict[str, Any]:
        return evaluate_sequences(agent, task, episodes, seed)

    return Setup("language", agent, JudgedSamples(task, method), evaluate, task, note=note)
