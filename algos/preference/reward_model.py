"""Reward models from preferences: Bradley-Terry on scores of a text, by the same data, loop and checkpoints as the losses on policies.

    r (n,)  scores of texts, nats: P(y beats y') = s(r - r'), s the logistic function
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.reward_model import RewardModel
from markovia.algos.on_policy.method import Descent
from markovia.algos.preference.data import totals
from markovia.algos.preference.method import FromPreferences
from markovia.algos.preference.sources import FileItems
from markovia.algos.setup import Request, Setup
from markovia.algos.statistics import Statistics
from markovia.algos.table import Row, table
from markovia.algos.trainer import Trainer
from markovia.envs.text.preferences import DataOptions, Item, load_preferences


def bradley_terry(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, q: Tensor | float = 1.0, centre: float = 0.0
) -> Tensor:
    """Classification of pairs by the difference of two scores, (P,): a shift of all scores changes nothing, their scale is fitted.

    L = -q log s(r_w - r_l - m) - (1 - q) log s(-(r_w - r_l - m)) + c (r_w + r_l)^2               [Ouyang 2022, eq. 1; arXiv 2203.02155]
    chosen, rejected (P,) are r_w and r_l; `margin` m and q, the probability that chosen is preferred, per pair or for all. c > 0 centres the
    scores, and biases them: it penalises every pair's sum, not the mean of the sums.
    """
    z = chosen - rejected - margin
    return -(q * F.logsigmoid(z) + (1.0 - q) * F.logsigmoid(-z)) + centre * (chosen + rejected).square()


@dataclass(frozen=True)
class RewardTraining(FromPreferences):
    """Settings of reward-model training."""

    centre: float = 0.0  # c, weight of (r_w + r_l)^2; above 0 scores are centred and biased
    num_env_steps: int | None = None  # items seen in all: pairs or lists; None: `passes` over the data
    passes: int = 1  # over the data, where num_env_steps is not given
    num_envs: int = 16  # items of a batch
    solver: Descent = Descent(lr=1e-5, anneal=True, eps=1e-8, epochs=1, minibatch=None, unit="row", max_grad_norm=1.0)  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        for name in ("num_env_steps", "passes", "num_envs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.centre < 0:
            raise ValueError(f"centre weighs a penalty and must be >= 0, got {self.centre}")


def pairs_of(item: Item, ranked: bool) -> list[tuple[int, int]]:
    """(better, worse) responses of an item: chosen and rejected, or every two of a ranked list with different scores."""
    score = totals(item)
    return [(i, j) for i in range(len(score)) for j in range(len(score)) if score[i] > score[j]] if ranked else [(0, 1)]


class RewardModelDriver(Trainer):
    """Trains a reward model on the items of a source; all pairs of a ranked list count as one item, so that a long list does not count more."""

    method: RewardTraining

    def __init__(self, method: RewardTraining, agent: RewardModel, source: FileItems, seed: int = 0) -> None:
        if not isinstance(agent, RewardModel):
            raise ValueError(f"this loop trains reward models, got an agent of kind {agent.kind!r}; build it with RewardModel.from_name")
        if source.kind not in ("pairs", "lists"):
            raise ValueError(f"a reward model learns from pairs or ranked lists, the file holds items of kind {source.kind!r}")
        if method.num_env_steps is None:
            method = replace(method, num_env_steps=method.passes * len(source.items))
        self.source = source
        self.model = agent
        super().__init__(method, agent, seed)

    def step(self) -> dict[str, float]:
        """A batch of items, the solver's steps on it; returns statistics."""
        assert self.method.num_env_steps is not None
        count = min(self.method.num_envs, self.method.num_env_steps - self.num_env_steps)
        items = self.source.take(self.num_env_steps, count, self.seed)
        self.set_lr()
        stats = Statistics()
        for index in self.minibatches(count):
            self.optimizer.zero_grad()
            for micro in index.split(self.method.solver.micro or len(index)):
                loss, told = self.loss([items[i] for i in micro.tolist()])
                (loss * (len(micro) / len(index))).backward()
                stats.add(told)
            stats.add({"grad_norm": self.move(lambda index=index: self.whole(items, index))})
        return {**stats.means(), **self.advance(count)}

    def whole(self, items: Sequence[Item], index: Tensor) -> dict[str, Any]:
        """A minibatch for whoever wants to look at it: lines of the file, and what is known of each."""
        chosen = [items[i] for i in index.tolist()]
        line = torch.tensor([i.line for i in chosen])
        return {"line": line, "values": [i.values for i in chosen], "prompt": [i.prompt for i in chosen], "responses": [i.responses for i in chosen]}

    def loss(self, items: Sequence[Item]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over items of the mean over their pairs; items whose scores are all equal count as 0."""
        ranked = self.source.kind == "lists"
        score = self.model.scores([i.prompt + r for i in items for r in i.responses])
        starts = [0, *accumulate(len(i.responses) for i in items)]
        found = [(n, starts[n] + i, starts[n] + j) for n, item in enumerate(items) for i, j in pairs_of(item, ranked)]
        if not found:
            return 0.0 * score.sum(), {}
        item_of = [n for n, _, _ in found]
        owner = torch.tensor(item_of, device=score.device)
        weight = 1.0 / torch.bincount(owner, minlength=len(items)).to(score.dtype)[owner] / len(items)
        chosen, rejected = score[[i for _, i, _ in found]], score[[j for _, _, j in found]]
        margin, q = (score.new_tensor([items[n].values.get(k, d) for n in item_of]) for k, d in (("margin", 0.0), ("q", 1.0)))
        weight = weight * score.new_tensor([items[n].values.get("weight", 1.0) for n in item_of])
        loss = (weight * bradley_terry(chosen, rejected, margin=margin, q=q, centre=self.method.centre)).sum()
        with torch.no_grad():
            diff = chosen - rejected
            told = {"loss": loss.detach(), "accuracy": (diff > 0).float().mean(), "margin": diff.mean(), "reward_mean": score.mean()}
            told["reward_std"] = score.std(correction=0)
        return loss, told

    def boundary(self) -> None:
        """Nothing outlives an iteration: batches are functions of the seed and of what was seen."""


@torch.no_grad()
def judge_items(model: RewardModel, items: Sequence[Item], ranked: bool) -> dict[str, Any]:
    """returns: the share of an item's pairs that the model orders rightly; beside it means over the items: log-loss in nats and difference."""
    returns, losses, diffs = [], [], []
    for item in items:
        score = model.scores([item.prompt + r for r in item.responses])
        diff = torch.stack([score[i] - score[j] for i, j in pairs_of(item, ranked)] or [score.new_zeros(())])
        q = item.values.get("q", 1.0)
        returns.append(float(((diff > 0) + 0.5 * (diff == 0)).float().mean()))
        losses.append(float(bradley_terry(diff, torch.zeros_like(diff), q=q, margin=item.values.get("margin", 0.0)).mean()))
        diffs.append(float(diff.mean()))
    count = max(1, len(items))
    return {"returns": returns, "log_loss": sum(losses) / count, "margin": sum(diffs) / count}


def build_reward_model(method: RewardTraining, request: Request) -> Setup:
    """What a run needs. Raises ValueError for a missing file or model, and for an env, which has no say here."""
    options, data = dict(request.agent_options), request.data
    if data is None or request.env_id is not None:
        raise ValueError("a reward model learns from a file alone: markovia train reward-model --data prefs.jsonl --model minilm")
    base = options.pop("model", None)
    if base is None:
        raise ValueError("say what the head stands on: --model minilm (sentence embeddings), smollm2, a Hugging Face name, or a folder")
    agent = RewardModel.from_name(base, **options)
    agent.to(request.device)
    reading = DataOptions(**{"max_length": agent.options.max_length, "max_prompt_length": agent.options.max_length // 2, **data.get("options", {})})
    found = load_preferences(data["path"], agent.tokenizer, reading)
    train, held_out = found.parts(reading.held_out)
    source = FileItems(train, found.kind)

    def evaluate(agent: Any, episodes: int, seed: int) -> dict[str, Any]:
        return {**judge_items(agent, held_out or train[:32], found.kind == "lists"), "held_out": bool(held_out)}

    return Setup("reward", agent, source, evaluate, note=str(found.report))


REWARD_MODEL = table(
    [
        Row(
            "reward-model", RewardTraining(), None, "2203.02155", "Bradley-Terry on a scalar score of the text", ("language",),
            ("markovia.algos.preference.reward_model:bradley_terry",), "reward-model",
        ),
    ]
)  # fmt: skip
