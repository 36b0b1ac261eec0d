"""Where the items of a batch come from: a file in random order, or responses of the present policy that a judge scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.language import LanguageAgent
from markovia.agents.records import Rollout
from markovia.algos.collect import rewards_of
from markovia.algos.preference.anchors import Dataset, FromMixture, FromPolicy
from markovia.algos.preference.data import reads_win_rates, with_logps
from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.listwise import Listwise
from markovia.algos.preference.method import Preference
from markovia.algos.preference.mixture import mixture
from markovia.algos.streams import stream
from markovia.envs.text.preferences import Item, Kind
from markovia.envs.text.tokens import left_pad

Found = dict[str, float]


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

    def draw(self, agent: Agent, reference: Agent | None, seen: int, count: int, seed: int, generator: torch.Generator) -> tuple[list[Item], Found]:
        """The next `count` items, and no statistics; see `JudgedSamples.draw`."""
        return self.take(seen, count, seed), {}

    def close(self) -> None:
        """Nothing to release."""


def win_rates(reward: Tensor, itself: bool = False) -> Tensor:
    """P(y beats a response of its group) of rewards (G, K): mean of s(r_i - r_j) over the K - 1 others j.

    `itself` takes the mean over all K, the response itself counted 1/2: SPPO's estimate.                                    [arXiv 2405.00675]
    Less the mean of the others' rates that is P - 1/2 over the K - 1 others, SelfPlay's unbiased advantage.
    """
    wins = torch.sigmoid(reward[:, :, None] - reward[:, None])
    return wins.mean(2) if itself else (wins.sum(2) - 0.5) / (reward.shape[1] - 1)


def judged(method: Preference, reward: Tensor) -> Tensor:
    """What the loss reads as scores of responses with rewards (G, K): win rates or the rewards themselves."""
    if not reads_win_rates(method):
        return reward
    loss = method.loss
    # The others' rates hold their wins over y_i, which as y_i's baseline would count its own K / (K - 1) times; with itself in each they cancel.
    alone = isinstance(loss, Listwise) or (isinstance(loss, SelfPlay) and loss.baseline == "half")
    return win_rates(reward, itself=not alone)


class JudgedSamples:
    """Rounds of an online method: responses to each prompt by the policy or its mixture with the reference, rewarded by the task.

    P(y > y') = s(r - r'): the judge's rewards are taken for logits. Methods of pairs get best and worst, pairs of equal reward being left out; those
    that read win rates get them within the group, or against the mixture's response (Nash-MD). Where gold is read it is the reference's response.
    The log-probs under the sampler are the anchors `old` and `proposal`. Raises ValueError at construction for a method that reads a file beside it.
    """

    def __init__(self, task: Any, method: Preference) -> None:
        sampler = method.sampler
        if isinstance(sampler, Dataset) or (isinstance(sampler, FromPolicy) and sampler.per_prompt < 2):
            raise ValueError("this method learns from pairs of a file (and sets samples beside them); give it --data with chosen and rejected")
        self.task, self.method = task, method
        self.duel = isinstance(sampler, FromMixture) and not sampler.both  # one response of the policy against one of the mixture
        needs = set(method.needs)
        each = "groups" in needs or {"unpaired", "score"} <= needs  # every response has a score of its own to learn from
        self.kind: Kind = "single" if self.duel else "lists" if each else "pairs"

    def _samplers(self, agent: LanguageAgent, reference: Agent | None) -> list[tuple[LanguageAgent, int]]:
        """Who samples how many responses to each prompt."""
        sampler = self.method.sampler
        if isinstance(sampler, FromMixture):
            assert isinstance(reference, LanguageAgent)
            mixed = mixture(agent, reference, sampler.mix)
            return [(agent, 1), (mixed, 1)] if self.duel else [(mixed, 2)]
        assert isinstance(sampler, FromPolicy)
        own = [(agent, sampler.per_prompt)]
        if "gold" in self.method.needs:
            assert isinstance(reference, LanguageAgent)
            own.append((reference, 1))
        return own

    @torch.no_grad()
    def draw(self, agent: Agent, reference: Agent | None, seen: int, count: int, seed: int, generator: torch.Generator) -> tuple[list[Item], Found]:
        """(items, statistics) of a round of `count` prompts."""
        assert isinstance(agent, LanguageAgent)
        starts = self.task.starts(count, generator, group_size=1)
        rounds = [(who.generate(repeated(starts, n), generator), n) for who, n in self._samplers(agent, reference)]
        rewards = [rewards_of(self.task, r).view(count, n) for r, n in rounds]
        length = sum(float(r.mask.sum()) for r, _ in rounds) / sum(r.shape[0] for r, _ in rounds)
        found = {"return": float(rewards[0].mean()), "length": length}
        if self.duel:
            rate = torch.sigmoid(rewards[0] - rewards[1])[:, 0]
            items = [replace(item_of(rounds[0][0], [g]), score=[float(rate[g])]) for g in range(count)]
            return items, found | {"win_rate": float(rate.mean())}
        (rollout, K), reward = rounds[0], rewards[0]
        score = judged(self.method, reward)
        lists = [replace(item_of(rollout, range(g * K, g * K + K)), score=score[g].tolist()) for g in range(count)]
        if self.kind == "lists":
            return lists, found
        apart = [g for g in range(count) if reward[g].max() > reward[g].min()]
        items = [_extremes(lists[g], reward[g]) for g in apart]
        if len(rounds) > 1:
            items = [_with_third(i, item_of(rounds[1][0], [g])) for i, g in zip(items, apart, strict=True)]
        return items, found | {"tied": 1.0 - len(apart) / count}

    def close(self) -> None:
        """Nothing to release."""


class OwnSamples(FileItems):
    """Pairs of a file, each with a response of the present policy as its third, and the log-probs of all three under it as anchor `old`."""

    @torch.no_grad()
    def draw(self, agent: Agent, reference: Agent | None, seen: int, count: int, seed: int, generator: torch.Generator) -> tuple[list[Item], Found]:
        """(items, statistics): the batch of the file, sampled anew."""
        assert isinstance(agent, LanguageAgent)
        items = self.take(seen, count, seed)
        pad = agent.tokenizer.pad_token_id
        ids, mask = left_pad([i.prompt for i in items], max(len(i.prompt) for i in items), pad)
        longest = max(len(r) for i in items for r in i.responses)
        starts = {"prompt_ids": torch.from_numpy(ids), "prompt_mask": torch.from_numpy(mask), "max_new_tokens": longest}
        rollout = agent.generate(starts, generator)
        whole = [_with_third(i, item_of(rollout, [n])) for n, i in enumerate(items)]
        found = {"length": float(rollout.mask.sum(1).float().mean())}
        return with_logps(agent, whole, pad, "old"), found


def repeated(starts: dict[str, Any], times: int) -> dict[str, Any]:
    """`starts` with every row `times` in succession."""
    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat_interleave(times, 0)
        if isinstance(value, list):
            return [v for v in value for _ in range(times)]
        return {k: each(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {k: each(v) for k, v in starts.items()}


def item_of(rollout: Rollout, rows: Sequence[int]) -> Item:
    """Rows of one prompt as an item, with the log-probs that they were sampled with."""
    assert isinstance(rollout.obs, dict)
    prompt = rollout.obs["prompt_ids"][rows[0]][rollout.obs["prompt_mask"][rows[0]]].tolist()
    logps = [rollout.logp_old[i][rollout.valid[i]].tolist() for i in rows]
    responses = [rollout.action[i][rollout.valid[i]].tolist() for i in rows]
    return Item(prompt, responses, rollout.outcome["prompt_text"][rows[0]], logps={"old": logps, "proposal": logps})


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


def _with_third(pair: Item, other: Item) -> Item:
    """The pair with another item's response as gold; log-probs of two samplers are not those of one anchor, so they are dropped."""
    score = None if pair.score is None else [*pair.score, pair.score[-1]]  # nothing reads the third one's
    return replace(pair, responses=[*pair.responses[:2], other.responses[0]], score=score, logps={})
