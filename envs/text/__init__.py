"""Token-MDPs: the state is the text so far, an action appends a token, a reward function scores the finished text."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "TokenEnv": "env",
    "TokenVectorEnv": "env",
    "TextTask": "tasks",
    "make_task": "tasks",
    "sentiment": "tasks",
    "arithmetic": "tasks",
    "prompts": "files",
    "gsm8k": "files",
    "length_control": "lengths",
    "with_budgets": "lengths",
    "CharTokenizer": "tokens",
    "HFTokenizer": "tokens",
    "call_reward": "rewards",
    "vader_compound": "rewards",
    "exact_answer": "rewards",
    "RewardError": "rewards",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Lazy, because tasks hold torch tensors and `import markovia.envs` must stay free of torch.
    if name in _HOME:
        return getattr(importlib.import_module(f"markovia.envs.text.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
