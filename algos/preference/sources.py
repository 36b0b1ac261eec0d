"""Where the items of a batch come from: a file in random order, or responses of the present policy that a judge scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.algos.collect import check_score
from markovia.algos.preference.anchors import FromPolicy
from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.listwise import LambdaRank, Listwise
from markovia.algos.preference.method import Preference
from markovia.algos.preference.unpaired import Pointwise, WinRate
from markovia.algos.streams import stream
from markovia.envs.text.preferences import Item, Kind


class FileItems:
    """Items of a file, in a new random order for every pass; which come next depends on the seed and on how many were seen alone."""

    def __init__(self, items: Sequence[Item], kind: Kind) -> None:
        self.items, self.kind = list(items), kind

    def take(self, seen: int, count: int, seed: int) -> list[Item]:
        """The items seen, ..., seen + count - 1 of the sequence of passes."""
        total, out = len(self.items), []
        for number in range(seen // total, (seen + count - 1) // total + 1):
            order = torch.randperm(total, generator=stream(seed, "pass", number)).tolist()
            first = number * total
            out += [self.items[i] for i in order[max(seen - first, 0) : seen + count - first]]
        return out

    def close(self) -> None:
        """Nothing to release."""


def win_rates(reward: Tensor) -> Tensor:
    """P(y beats another response of its group), ties half, of rewards (G, K): mean over the K - 1 others."""
    wins = (reward[:, :, None] > reward[:, None]).double() + 0.5 * (reward[:, :, None] == reward[:, None]).double()
    return (wins.sum(2) - 0.5) / (reward.shape[1] - 1)


def reads_win_rates(method: Preference) -> bool:
    """Whether the loss reads win rates where others read rewards."""
    loss = method.loss
    point = isinstance(loss, Pointwise) and isinstance(loss.point, WinRate)
    return point or isinstance(loss, SelfPlay) or (isinstance(loss, Listwise) and isinstance(loss.loss, LambdaRank))


class JudgedSamples:
    """Rounds of an online method: K responses to each prompt by the policy, rewarded by the task, as lists or as pairs of best and worst.

    A pair has q = s(r_w - r_l), the judge's rewards being taken for logits; pairs of equal reward are left out. The log-probs under the sampler
    are the items' anchors `old` and `proposal`. Raises ValueError at construction for what is not sampled here.
    """

    def __init__(self, task: Any, method: Preference) -> None:
        if not isinstance(method.sampler, FromPolicy):
            raise ValueError(f"{type(method.sampler).__name__} is not sampled here; write its responses to a file and train on it with --data")
        if "gold" in method.needs or method.sampler.per_prompt < 2:
            raise ValueError(
                "this method sets one sample of the policy beside responses of a file; online rounds here are made of samples alone. "
                "Write such rows to a file (chosen, rejected, gold, and the log-probs of the sampler) and train on it with --data"
            )
        self.task, self.method = task, method
        self.kind: Kind = "lists" if "groups" in method.needs else "pairs"

    @torch.no_grad()
    def sample(self, agent: Agent, prompts: int, generator: torch.Generator) -> tuple[list[Item], dict[str, float]]:
        """(items, statistics) of a round."""
        assert isinstance(self.method.sampler, FromPolicy)
        K = self.method.sampler.per_prompt
        starts = self.task.starts(prompts * K, generator, group_size=K)
        rollout = agent.generate(starts, generator)
        reward = check_score(self.task.score(rollout), prompts * K).view(prompts, K)
        score = win_rates(reward) if reads_win_rates(self.method) else reward
        lists = [self._list(rollout, score[g], g, K) for g in range(prompts)]
        found = {"return": float(reward.mean()), "length": float(rollout.mask.sum(1).float().mean())}
        if self.kind == "lists":
            return lists, found
        apart = [g for g in range(prompts) if reward[g].max() > reward[g].min()]
        found["tied"] = 1.0 - len(apart) / prompts
        return [_extremes(lists[g], reward[g]) for g in apart], found

    def _list(self, rollout: Rollout, score: Tensor, group: int, K: int) -> Item:
        assert isinstance(rollout.obs, dict)
        rows = range(group * K, group * K + K)
        prompt = rollout.obs["prompt_ids"][rows[0]][rollout.obs["prompt_mask"][rows[0]]].tolist()
        logps = [rollout.logp_old[i][rollout.valid[i]].tolist() for i in rows]
        responses = [rollout.action[i][rollout.valid[i]].tolist() for i in rows]
        return Item(prompt, responses, rollout.outcome["prompt_text"][rows[0]], {}, score.tolist(), {"old": logps, "proposal": logps})

    def close(self) -> None:
        """Nothing to release."""


def _extremes(item: Item, reward: Tensor) -> Item:
    """The pair of best and worst response of a list."""
    assert item.score is not None
    at = [int(reward.argmax()), int(reward.argmin())]
    return replace(
        item,
        responses=[item.responses[i] for i in at],
        score=[item.score[i] for i in at],
        values={"q": float(torch.sigmoid(reward[at[0]] - reward[at[1]]))},
        logps={name: [rows[i] for i in at] for name, rows in item.logps.items()},
    )
