"""Finished responses as a record, and the rule of a task on what may be said next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.records import Rollout
from markovia.agents.tokens import response_valid


def allowed_tokens(tokenizer: Any, starts: dict[str, Any], action: Tensor, t: int) -> Tensor | None:
    """(B, V) bool of the task's own rule, called with real tokens only; None without a rule."""
    rule = starts.get("allowed")
    if rule is None:
        return None
    ids, mask, tokens = starts["prompt_ids"].cpu().numpy(), starts["prompt_mask"].cpu().numpy(), action[:, :t].cpu().numpy()
    eos, rows = tokenizer.eos_token_id, []
    for i in range(len(ids)):
        # A finished row goes on being filled with padding; whatever it draws is dropped.
        over = eos in tokens[i]
        rows.append(np.ones(tokenizer.vocab_size, bool) if over else np.asarray(rule(ids[i][mask[i]], tokens[i]), bool))
    return torch.from_numpy(np.stack(rows)).to(action.device)


def record_of_responses(
    tokenizer: Any, starts: dict[str, Any], prompt: Tensor, mask: Tensor, action: Tensor, logp: Tensor, kept_bits: Tensor | None
) -> Rollout:
    """The Rollout of finished responses; the last valid token ends the episode (EOS, or the task's own length)."""
    valid = response_valid(action, tokenizer.eos_token_id)
    last = valid & ~F.pad(valid[:, 1:], (0, 1), value=False)
    obs = {"prompt_ids": prompt, "prompt_mask": mask} | ({} if kept_bits is None else {"kept": kept_bits})
    texts = [tokenizer.decode(a[v].tolist()) for a, v in zip(action, valid, strict=True)]
    prompts, group = starts.get("prompt_text"), starts.get("group")
    return Rollout(
        obs=obs,
        action=action,
        logp_old=logp,
        reward=torch.zeros_like(logp),
        valid=valid,
        mask=valid.clone(),
        continuation=1.0 - last.to(logp.dtype),
        truncated=torch.zeros_like(valid),
        group=None if group is None else group.to(action.device),
        outcome={
            "prompt_text": prompts if prompts is not None else [tokenizer.decode(p[m].tolist()) for p, m in zip(prompt, mask, strict=True)],
            "completion_text": texts,
            "columns": starts.get("columns", {}),
        },
        per_row=True,
    )
