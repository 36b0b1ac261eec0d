"""Text tasks: prompts, tokenizer, reward functions and the response length; one object serves stepping, generation and scoring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from markovia.envs.names import nearest
from markovia.envs.text.rewards import RewardFn, call_rewards, check_weights, exact_answer, names_of, resolve, vader_compound
from markovia.envs.text.tokens import Tokenizer, as_tokenizer, left_pad

AllowedFn = Callable[[np.ndarray, np.ndarray], np.ndarray]
Split = Literal["train", "held_out"]


@dataclass
class TextTask:
    """Prompts to continue and how a continuation is scored.

    `rewards` follow TRL's signature `(prompts, completions, **columns) -> list[float]`; each column has one entry per prompt.
    `allowed(prompt_ids, response_ids) -> (V,) bool` may forbid next tokens. `model` and `temperature` say what the task was made for.
    `solved` names the reward function whose value above 0.5 says that a response is right: evaluations then draw `eval_samples` responses to each
    prompt and tell pass@k; a name that no function has is dropped. `reward_timeout` (seconds) bounds each reward function's time for a batch.
    Raises ValueError for no prompts, columns of another length, an empty encoded prompt, a response length or group size below 1, and for
    another number of weights than of reward functions.
    """

    prompts: Sequence[str]
    tokenizer: Any
    rewards: Sequence[RewardFn | str] | RewardFn | str
    max_new_tokens: int
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)
    held_out: Sequence[str] = ()
    held_out_columns: dict[str, Sequence[Any]] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    group_size: int = 1
    allowed: AllowedFn | str | None = None
    model: str | None = None
    temperature: float = 1.0
    solved: str | None = None
    eval_samples: int = 16
    reward_timeout: float | None = None

    def __post_init__(self) -> None:
        self.tokenizer: Tokenizer = as_tokenizer(self.tokenizer)
        single = callable(self.rewards) or isinstance(self.rewards, str)
        self.rewards = [resolve(f) for f in ([self.rewards] if single else self.rewards)]  # type: ignore[union-attr]
        self.allowed = None if self.allowed is None else resolve(self.allowed)
        if len(self.prompts) == 0 or len(self.rewards) == 0:
            raise ValueError(f"a text task needs prompts and reward functions, got {len(self.prompts)} and {len(self.rewards)}")
        if min(self.max_new_tokens, self.group_size, self.eval_samples) < 1:
            given = f"{self.max_new_tokens}, {self.group_size} and {self.eval_samples}"
            raise ValueError(f"max_new_tokens, group_size and eval_samples must be >= 1, got {given}")
        check_weights(self.rewards, self.weights)
        if self.solved not in self.reward_names:  # a ready task's reward was replaced by one that can't tell what is right
            self.solved = None
        for split, prompts, columns in (("train", self.prompts, self.columns), ("held_out", self.held_out, self.held_out_columns)):
            for name, values in columns.items():
                if len(values) != len(prompts):
                    raise ValueError(
                        f"column {name!r} of split {split!r} has {len(values)} entries for {len(prompts)} prompts; give one per prompt"
                    )
        if self.held_out and self.held_out_columns.keys() != self.columns.keys():
            raise ValueError(f"held_out_columns are {sorted(self.held_out_columns)}, expected the columns {sorted(self.columns)}")

    def rows_of(self, split: Split) -> tuple[Sequence[str], dict[str, Sequence[Any]]]:
        """Prompts and columns of a split. Raises ValueError for one that the task lacks."""
        if split == "train":
            return self.prompts, self.columns
        if split == "held_out" and self.held_out:
            return self.held_out, self.held_out_columns
        raise ValueError(f"split {split!r} is empty or unknown; expected 'train', or 'held_out' for a task with held-out prompts")

    @cached_property
    def _encoded(self) -> dict[str, list[list[int]]]:
        encoded = {"train": [self.tokenizer.encode(p) for p in self.prompts], "held_out": [self.tokenizer.encode(p) for p in self.held_out]}
        for split, rows in encoded.items():
            if any(len(r) == 0 for r in rows):
                raise ValueError(f"a prompt of split {split!r} encodes to no tokens; every prompt needs at least one (a BOS token will do)")
        return encoded

    @cached_property
    def prompt_length(self) -> int:
        """P: tokens of the longest prompt; all prompts are padded to it on the left."""
        return max(len(r) for rows in self._encoded.values() for r in rows)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def reward_names(self) -> list[str]:
        """Names of the reward functions, as the log has them."""
        return names_of(self.rewards)  # type: ignore[arg-type]

    def prompt(self, index: int, split: Split = "train") -> tuple[str, list[int], dict[str, Any]]:
        """Text, ids and columns of one prompt. Raises ValueError for an index outside the split."""
        prompts, columns = self.rows_of(split)
        if not 0 <= index < len(prompts):
            raise ValueError(f"prompt {index} is outside of split {split!r}, expected 0 <= prompt < {len(prompts)}")
        return prompts[index], self._encoded[split][index], {k: v[index] for k, v in columns.items()}

    def batch(self, index: Sequence[int], group: Sequence[int], split: Split = "train") -> dict[str, Any]:
        """The `starts` of chosen prompts; `index` and `group` have one entry per row."""
        rows = [self.prompt(int(i), split) for i in index]
        ids, mask = left_pad([r[1] for r in rows], self.prompt_length, self.tokenizer.pad_token_id)
        return {
            "prompt_ids": torch.from_numpy(ids),
            "prompt_mask": torch.from_numpy(mask),
            "prompt_text": [r[0] for r in rows],
            "columns": {k: [r[2][k] for r in rows] for k in self.columns},
            "group": torch.as_tensor(group, dtype=torch.int64),
            "max_new_tokens": self.max_new_tokens,
            "allowed": self.allowed,
        }

    def starts(
        self,
        n: int,
        generator: torch.Generator | None = None,
        split: Split = "train",
        group_size: int | None = None,
        without: Collection[int] = (),
    ) -> dict[str, Any]:
        """n starts: prompts drawn without replacement until the split is used up, each repeated `group_size` times in a row.

        Prompts whose number is in `without` are left out.

        prompt_ids (n, P) int64 padded left, prompt_mask (n, P) bool, prompt_text [n], columns {name: [n]}, group (n,) int64.
        Raises ValueError when n is no multiple of the group size, and when nothing is left.
        """
        size = self.group_size if group_size is None else group_size
        if n < 1 or size < 1 or n % size:
            raise ValueError(f"{n} starts can't be cut into groups of {size}; ask for a multiple of the group size")
        left = [i for i in range(len(self.rows_of(split)[0])) if i not in without]
        total, count = len(left), n // size
        if not left:
            raise ValueError(f"all prompts of split {split!r} are left out")
        device = generator.device if generator is not None else "cpu"
        rounds = [torch.randperm(total, generator=generator, device=device) for _ in range(-(-count // total))]
        chosen = [left[i] for i in torch.cat(rounds)[:count].tolist()]
        return self.batch([i for i in chosen for _ in range(size)], [g for g in range(count) for _ in range(size)], split)

    def all_starts(self, split: Split = "held_out", group_size: int = 1) -> dict[str, Any]:
        """Every prompt of a split, in order (for evaluation)."""
        index = range(len(self.rows_of(split)[0]))
        return self.batch([i for i in index for _ in range(group_size)], [i for i in index for _ in range(group_size)], split)

    def rewards_apart(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]], ids: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """(n, k) float64, what each reward function says; `ids` are the completions as token ids, for functions that take `completion_ids`."""
        timeout = self.reward_timeout
        return call_rewards(self.rewards, prompts, completions, timeout, **{"completion_ids": ids, **columns})  # type: ignore[arg-type]

    def weighted(self, apart: np.ndarray) -> np.ndarray:
        """(n,) float64, the weighted sum of the reward functions (n, k)."""
        return np.asarray(apart @ check_weights(self.rewards, self.weights))  # type: ignore[arg-type]

    def score(self, rollout: Any) -> Tensor:
        """(n,) float32 reward of each row from `rollout.outcome` (prompt_text, completion_text, columns).

        Writes into the outcome what each function said (`rewards`, by name) and, where the task can tell, which responses are right (`solved`).
        """
        out = rollout.outcome
        ids = [a[v].tolist() for a, v in zip(rollout.action, rollout.valid, strict=True)]
        apart = self.rewards_apart(out["prompt_text"], out["completion_text"], out.get("columns", {}), ids)
        out["rewards"] = {name: torch.from_numpy(apart[:, k].copy()) for k, name in enumerate(self.reward_names)}
        if self.solved is not None:
            out["solved"] = out["rewards"][self.solved] > 0.5
        return torch.from_numpy(self.weighted(apart)).to(torch.float32)


def sentiment(max_new_tokens: int = 24, group_size: int = 1, temperature: float = 0.7, model: str = "smollm2") -> TextTask:
    """Continue the opening of a film review; reward is VADER's compound score of the continuation alone, in [-1, 1].

    Made for the model "smollm2"; needs the model's tokenizer only. At temperature 0.7 the start reads well.
    """
    from markovia.envs.text.openings import HELD_OUT, TRAIN
    from markovia.envs.text.pretrained import load_tokenizer

    return TextTask(
        prompts=TRAIN,
        held_out=HELD_OUT,
        tokenizer=load_tokenizer(model),
        rewards=[vader_compound],
        max_new_tokens=max_new_tokens,
        group_size=group_size,
        model=model,
        temperature=temperature,
    )


def arithmetic(digits: int = 2, group_size: int = 1, carries: int | None = None, eval_samples: int = 16) -> TextTask:
    """Sums a+b of numbers below 10^digits, character by character: "12+7=" is to be continued by "19" and EOS; reward 1 or 0.

    `carries` keeps the sums in which so many places carry over (0: easiest, up to `digits`), None all of them.
    A tenth of the pairs is held out. The shipped model "arithmetic" was trained on up to two digits.
    Raises ValueError unless 1 <= digits <= 2 and 0 <= carries <= digits.
    """
    from markovia.envs.text.pretrained import load_tokenizer

    if digits not in (1, 2):
        raise ValueError(f"arithmetic has 1 or 2 digits, got {digits}")
    if carries is not None and not 0 <= carries <= digits:
        raise ValueError(f"sums of {digits} digits have 0 to {digits} carries, got carries={carries}")
    base = 10**digits
    pairs = [(a, b) for a in range(base) for b in range(base) if carries is None or count_carries(a, b) == carries]
    kept = [(a, b) for a, b in pairs if not is_held_out(a, b)]
    rest = [(a, b) for a, b in pairs if is_held_out(a, b)]
    return TextTask(
        prompts=[f"{a}+{b}=" for a, b in kept],
        columns={"answer": [str(a + b) for a, b in kept]},
        held_out=[f"{a}+{b}=" for a, b in rest],
        held_out_columns={"answer": [str(a + b) for a, b in rest]},
        tokenizer=load_tokenizer("arithmetic"),
        rewards=[exact_answer],
        max_new_tokens=digits + 2,
        group_size=group_size,
        model="arithmetic",
        solved="exact_answer",
        eval_samples=eval_samples,
    )


def count_carries(a: int, b: int) -> int:
    """How many places of the sum a+b carry over."""
    carry = count = 0
    while a or b:
        carry = int(a % 10 + b % 10 + carry > 9)
        count, a, b = count + carry, a // 10, b // 10
    return count


def is_held_out(a: int, b: int) -> bool:
    """Whether the sum a+b is kept for evaluation: a tenth of the pairs, spread over all digits."""
    return (31 * a + 17 * b) % 10 == 3


_FILES = "markovia.envs.text.files:"
TASKS: dict[str, Callable[..., TextTask] | str] = {
    "sentiment": sentiment,
    "arithmetic": arithmetic,
    "prompts": _FILES + "prompts",
    "gsm8k": _FILES + "gsm8k",
    "length_control": "markovia.envs.text.lengths:length_control",
}


def task_function(task: str | Callable[..., TextTask]) -> Callable[..., TextTask]:
    """What makes a task: a ready one's name or "module:function". Raises ValueError for an unknown name, with the nearest one."""
    if isinstance(task, str) and task not in TASKS and ":" not in task:
        raise ValueError(f"unknown text task {task!r}{nearest(task, TASKS)} (known: {', '.join(sorted(TASKS))})")
    return resolve(TASKS.get(task, task) if isinstance(task, str) else task)


def takes(task: Any, name: str) -> bool:
    """Whether what makes this task has an argument of that name; a finished task has none."""
    return not isinstance(task, TextTask) and name in inspect.signature(task_function(task)).parameters


def make_task(task: TextTask | str | Callable[..., TextTask], **kwargs: Any) -> TextTask:
    """A task itself, a ready one by name, or what "module:function" returns.

    Raises ValueError for an unknown name, with the nearest one, and for keywords beside a finished task.
    """
    if isinstance(task, TextTask):
        if kwargs:
            raise ValueError(f"keywords {sorted(kwargs)} came with a finished TextTask; set them where it is built")
        return task
    made = task_function(task)(**kwargs)
    if not isinstance(made, TextTask):
        raise ValueError(f"{task!r} returned a {type(made).__name__}, expected a TextTask")
    return made
