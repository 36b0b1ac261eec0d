"""Texts of a file as a record: what an auxiliary loss keeps the likelihood of."""

from __future__ import annotations

from pathlib import Path

from markovia.agents.language import LanguageAgent
from markovia.agents.records import Rollout
from markovia.algos.preference.data import token_rows
from markovia.envs.text.preferences import DataOptions, load_preferences


def load_texts(path: str | Path, agent: LanguageAgent, max_length: int = 256) -> Rollout:
    """The texts of a file in a format of single responses (`text`, `prompt` and `completion`, `messages`), each cut at `max_length` tokens.

    Raises ValueError for another agent than one of language, and for a file of another format.
    """
    if not isinstance(agent, LanguageAgent):
        raise ValueError(f"texts are for language agents, got one of kind {agent.kind!r}")
    found = load_preferences(path, agent.tokenizer, DataOptions(max_length=max_length, max_prompt_length=max_length // 2))
    if found.kind != "single":
        raise ValueError(f"{path} holds {found.report.format} rows; texts come as a column text, prompt and completion, or messages")
    return token_rows([i.prompt for i in found.items], [i.responses[0] for i in found.items], agent.tokenizer.pad_token_id, agent.device)
