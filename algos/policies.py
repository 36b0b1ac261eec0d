"""Trained policies by name, for methods that read one beside their own: a teacher, a DPO-trained policy, a second supervised model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from markovia.agents.checkpoint import find_agent
from markovia.agents.interface import Agent
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.references import Soup
from markovia.algos.table import nearest


def wanted(method: Any) -> tuple[str, ...]:
    """Names of the policies that a method has to be given."""
    if not isinstance(method, OnPolicy):
        return ()
    return tuple(n for n in method.references if n != "ref") + (("other",) if isinstance(method.refresh, Soup) else ())


def load_policy(source: str | Path, like: Agent) -> Agent:
    """The frozen policy of a run's folder, of a folder of `agent.save`, or (text) of a Hugging Face name or folder, at the temperature of `like`.

    Raises ValueError for a policy of another kind or vocabulary, and for a source that is none of these.
    """
    place = find_agent(source)
    if place is not None:
        policy = Agent.load(place)
    elif like.kind == "language" and (Path(source).is_dir() or str(source).count("/") < 2):
        from markovia.agents.language import LanguageAgent

        try:
            policy = LanguageAgent.from_name(str(source), max_new_tokens=like.options.max_new_tokens)  # type: ignore[attr-defined]
        except OSError as e:
            raise ValueError(f"{source} is neither a run's folder, nor one of agent.save, nor a Hugging Face name or folder: {e}") from e
    else:
        raise ValueError(f"there is no agent in {source}; give a run's folder or one that agent.save(folder) wrote")
    if policy.kind != like.kind:
        raise ValueError(f"{source} holds a {policy.kind} agent, the one that is trained is of kind {like.kind}")
    if like.kind == "language":
        sizes = [a.tokenizer.vocab_size for a in (policy, like)]  # type: ignore[attr-defined]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{source} has a vocabulary of {sizes[0]} tokens, the policy that is trained one of {sizes[1]}; they must be the same")
        shape = like.options  # type: ignore[attr-defined]
        policy.options = replace(policy.options, temperature=shape.temperature, top_p=shape.top_p, bf16=shape.bf16)  # type: ignore[attr-defined]
    policy.to(like.device)  # type: ignore[arg-type]
    for p in policy.net.parameters():
        p.requires_grad_(False)
    return policy


def load_policies(method: Any, sources: Mapping[str, str | Path], like: Agent) -> dict[str, Agent]:
    """Every policy that the method reads, by name. Raises ValueError for a name that it does not read, and what `load_policy` raises."""
    names = wanted(method)
    for name in sources:
        if name not in names:
            known = f"it reads {', '.join(names)}" if names else "it reads none beside its own reference"
            raise ValueError(f"the method reads no policy {name!r}{nearest(name, names)} ({known})")
    return {name: load_policy(source, like) for name, source in sources.items()}
