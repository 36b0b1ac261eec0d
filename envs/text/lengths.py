"""Length control: a prompt asks for so many tokens, and the reward counts how far the response is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from markovia.envs.text.rewards import RewardFn, written
from markovia.envs.text.tasks import TextTask, make_task, takes

INSTRUCTION = "Answer with {budget} tokens. {prompt}"
GO_ON = "Go on with this text: {}"


def off_budget(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], budget: Sequence[int], **columns: Any
) -> list[float]:
    """-|n - L|, L the number of generated tokens, the closing EOS included.                                            [arXiv 2503.04697, eq. 1]"""
    return [-float(abs(n - len(ids))) for n, ids in zip(budget, completion_ids, strict=True)]


class WithinBudget:
    """1[correct] clip(rate (n - L) + 1/2, 0, 1): a right answer in at most n tokens; at n itself it pays a half.       [arXiv 2503.04697, eq. 2]"""

    __name__ = "within_budget"

    def __init__(self, base: TextTask, rate: float) -> None:
        self.correct, self.rate = Correct(base), rate

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], budget: Sequence[int], **columns: Any
    ) -> list[float]:
        right = self.correct(prompts, completions, completion_ids, **columns)
        return [c * min(1.0, max(0.0, self.rate * (n - len(i)) + 0.5)) for c, n, i in zip(right, budget, completion_ids, strict=True)]


class Correct:
    """1 where another task's reward is above a half."""

    __name__ = "correct"

    def __init__(self, base: TextTask) -> None:
        self.base = base

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        apart = self.base.rewards_apart(prompts, completions, {k: v for k, v in columns.items() if k in self.base.columns}, completion_ids)
        return (self.base.weighted(apart) > 0.5).astype(float).tolist()


def with_budgets(
    base: TextTask, budgets: Sequence[int], mode: str = "exact", rate: float = 0.05, instruction: str = INSTRUCTION, group_size: int | None = None
) -> TextTask:
    """Every prompt of a task with every budget n, told to the model by `instruction` and to reward functions as the column `budget`.

    "exact": 1[correct] - rate |n - L|. "max": 1[correct] clip(rate (n - L) + 1/2, 0, 1). Correct is what the task itself rewards with more than 1/2.
    The method `lcpo` reads correctness and budget apart, so it serves either mode.                                              [arXiv 2503.04697]
    Raises ValueError for another mode, no budgets or budgets below 1, and a rate below 0.
    """
    if mode not in ("exact", "max"):
        raise ValueError(f"mode must be 'exact' or 'max', got {mode!r}")
    if not budgets or min(budgets) < 1 or rate < 0:
        raise ValueError(f"expected budgets of at least 1 token and rate >= 0, got budgets {list(budgets)} and rate {rate}")

    def each(prompts: Sequence[str], columns: dict[str, Sequence[Any]]) -> tuple[list[str], dict[str, Sequence[Any]]]:
        texts = [instruction.format(prompt=p, budget=n) for p in prompts for n in budgets]
        told: dict[str, Sequence[Any]] = {k: [x for x in v for _ in budgets] for k, v in columns.items()}
        return texts, told | ({"budget": [n for _ in prompts for n in budgets]} if texts else {})

    (prompts, columns), (held, held_columns) = each(base.prompts, base.columns), each(base.held_out, base.held_out_columns)
    rewards: list[RewardFn | str] = [Correct(base), off_budget if mode == "exact" else WithinBudget(base, rate)]
    return TextTask(
        prompts=prompts, columns=columns, held_out=held, held_out_columns=held_columns, tokenizer=base.tokenizer, rewards=rewards,
        weights=[1.0, rate] if mode == "exact" else [0.0, 1.0], max_new_tokens=max(base.max_new_tokens, *budgets) + max(budgets) // 2,
        group_size=base.group_size if group_size is None else group_size, model=base.model, temperature=base.temperature, solved="correct",
        eval_samples=1, reward_timeout=base.reward_timeout,
    )  # fmt: skip


def length_control(
    base: str | None = None,
    budgets: Sequence[int] = (8, 16, 24),
    mode: str = "exact",
    rate: float = 0.05,
    instruction: str = INSTRUCTION,
    group_size: int = 1,
    model: str = "smollm2",
    chat: bool = True,
    **kwargs: Any,
) -> TextTask:
    """LCPO's task: so many tokens as the prompt asks for. `base` is the task whose prompts and correctness are taken, with its own arguments.

    Without one: openings of film reviews to go on with, where any text is right, so that only the length counts. With `chat` the model reads all of
    it through its chat template, where it has one. A rate of 3e-4 suits budgets of thousands of tokens.                            [arXiv 2503.04697]
    """
    from markovia.envs.text.files import prompt_text
    from markovia.envs.text.openings import HELD_OUT, TRAIN
    from markovia.envs.text.pretrained import load_tokenizer
    from markovia.envs.text.tokens import as_tokenizer

    if base is None:
        longest = max(budgets, default=1)
        train, held = ([GO_ON.format(p) for p in part] for part in (TRAIN, HELD_OUT))
        plain = TextTask(train, load_tokenizer(model), written, longest, held_out=held, model=model, temperature=0.7, **kwargs)
    else:
        plain = make_task(base, **{k: v for k, v in (("model", model), ("chat", False)) if takes(base, k)}, **kwargs)
    task = with_budgets(plain, budgets, mode, rate, instruction, group_size)
    tokenizer = as_tokenizer(task.tokenizer)
    if not chat or not getattr(getattr(tokenizer, "inner", None), "chat_template", None):
        return task
    told = [[prompt_text(tokenizer, p, True, "a prompt") for p in part] for part in (task.prompts, task.held_out)]
    return replace(task, prompts=told[0], held_out=told[1])
