"""The preference loop: items -> rows -> log-probs of policy and anchors -> scores -> loss -> step -> anchor.

Any `Preference` on any data that holds its columns; the losses see scores and views only.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from markovia.agents.distributions import Categorical
from markovia.agents.interface import Agent
from markovia.agents.records import masked_mean
from markovia.algos.preference.anchors import EachRound, Extrapolated, Frozen, Sync, extrapolate, soft_sync
from markovia.algos.preference.data import Batch, entries, halves, make_batch, token_rows, with_logps
from markovia.algos.preference.method import Preference
from markovia.algos.preference.metrics import pair_statistics, ranking_accuracy, top_k
from markovia.algos.preference.pieces import sides
from markovia.algos.preference.scores import TokenScores
from markovia.algos.preference.sources import FileItems, JudgedSamples, OwnSamples
from markovia.algos.preference.token_level import kl_ref_policy, log_collision
from markovia.algos.statistics import Statistics
from markovia.algos.trainer import Trainer, part
from markovia.envs.text.preferences import Item

SPREAD_EVERY = 10  # iterations; KL, entropy and mass need whole distributions


def moving_reference(agent: Agent) -> Agent:
    """A frozen copy of what is trained; what is not (the base below adapters) is shared, not copied."""
    frozen = copy.copy(agent)
    shared = {id(p): p for p in agent.net.parameters() if not p.requires_grad}
    frozen.net = copy.deepcopy(agent.net, memo=shared)
    for p in frozen.net.parameters():
        p.requires_grad_(False)
    return frozen


def _check_law(agent: Agent, source: FileItems | JudgedSamples) -> None:
    """Raises ValueError where samples are drawn from part of the vocabulary: they are evaluated over all of it, so that log pi / old is not 0."""
    top_p = agent.options.top_p  # type: ignore[attr-defined]
    if isinstance(source, JudgedSamples | OwnSamples) and top_p < 1.0:
        raise ValueError(f"rounds draw from the policy itself, over the whole vocabulary, and top_p is {top_p}; leave it at 1 in the agent options")
    if isinstance(source, JudgedSamples) and source.task.allowed is not None:
        raise ValueError("rounds draw from the policy itself, over the whole vocabulary, and the task allows some tokens only; drop its `allowed`")


class PreferenceDriver(Trainer):
    """Trains a language agent on items of a source.

    Raises ValueError at construction for an agent of another kind, for stored log-probs where the method needs the anchor itself, and for samples
    of another law than the policy's.
    """

    method: Preference

    def __init__(self, method: Preference, agent: Agent, source: FileItems | JudgedSamples, seed: int = 0) -> None:
        if agent.kind != "language":
            raise ValueError(f"this loop trains language agents, got kind {agent.kind!r}; denoising chains have rows of their own")
        if method.num_env_steps is None:
            if not isinstance(source, FileItems):
                raise ValueError("online rounds have no passes over data; say how many items to see with num_env_steps")
            method = replace(method, num_env_steps=method.passes * len(source.items))
        if "value" in method.needs and agent.critic is None:
            raise ValueError("this method learns V(x), but the agent has no value head; build it with value_head=True")
        _check_law(agent, source)
        self.source = source
        self.pad = agent.tokenizer.pad_token_id  # type: ignore[attr-defined]
        self.steps = 0  # of the optimiser
        self.reference = self._reference(method, agent)
        self.target = None if method.target is None else moving_reference(agent)
        super().__init__(method, agent, seed, ("policy", "value") if "value" in method.needs else ("policy",))
        self.trained = [p for p in agent.net.parameters() if p.requires_grad]
        moves = not isinstance(method.reference, Frozen)
        self.moved = self._places(self.reference if moves else None)  # the anchor's, at the same places
        self.followers = self._places(self.target)
        self.fitted = [p.detach().clone() for p in self.trained] if isinstance(method.reference, Extrapolated) else []

    def _places(self, copy: Agent | None) -> list[Tensor]:
        """What a copy has where the agent has its trained parameters."""
        if copy is None:
            return []
        both = zip(copy.net.parameters(), self.agent.net.parameters(), strict=True)
        return [c for c, p in both if p.requires_grad]

    def _reference(self, method: Preference, agent: Agent) -> Agent | None:
        """The anchor `ref` as a policy, None where no method asks for it or its log-probs lie with the items."""
        whole = {"kl_ref", "mismatched"} & set(method.needs)
        if "ref" not in method.anchors and not whole:
            return None
        items = self.source.items if isinstance(self.source, FileItems) else []
        stored = bool(items) and all("ref" in item.logps for item in halves(items, method.needs))
        if method.stored_reference and (whole or not items):
            why = f"the method reads {sorted(whole)} under the anchor" if whole else "the samples of a round are not there yet"
            raise ValueError(f"the anchor's log-probs can't be stored at the start: {why}; leave stored_reference at False")
        if (method.stored_reference or stored) and not whole and isinstance(method.reference, Frozen):
            if not stored and isinstance(self.source, FileItems):
                self.source = type(self.source)(with_logps(agent, items, self.pad), self.source.kind)
            return None
        if not isinstance(method.reference, Frozen):
            return moving_reference(agent)
        return agent.reference(fixed=True)

    # -- an iteration -------------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """A batch of items (online: a round of samples), the solver's steps on it, and the anchor's move; returns statistics."""
        assert self.method.num_env_steps is not None
        count = min(self.method.num_envs, self.method.num_env_steps - self.num_env_steps)
        seen = self.num_env_steps
        items, found = self.source.draw(self.agent, self.reference, seen, count, self.seed, self.generator("action"))
        self.set_lr()
        if items and self.iteration % SPREAD_EVERY == 0:
            found |= self.spread(items[0])
        stats = self.improve(items)
        out = {**found, **stats, **self.advance(count)}
        part_now, part_before = (self.method.rounds * n // self.method.num_env_steps for n in (self.num_env_steps, seen))
        if part_now > part_before and not self.finished:
            self._end_round()
        return out

    def improve(self, items: list[Item]) -> dict[str, float]:
        """Epochs of minibatches; items that don't see each other are cut further where the solver says so (micro)."""
        stats, generator = Statistics(), self.generator("tokens")
        for index in self.minibatches(len(items)):
            size = self.method.solver.micro if self.method.solver.micro and not self.method.coupled else len(index)
            self.optimizer.zero_grad()
            for micro in index.split(size):
                batch = make_batch([items[i] for i in micro.tolist()], self.source.kind, self.method.needs, self.pad, self.agent.device, generator)
                scores = self.scores(batch)
                loss = self.method(scores, batch.views).mean()
                (loss * (self._entries(items, micro) / self._entries(items, index))).backward()
                stats.add({"loss": loss.detach(), **self.describe(scores, batch)})
            stats.add({"grad_norm": self.move(lambda index=index: self.whole(items, index))})
            self.steps += 1
            for anchor, sync in ((self.moved, self.method.reference), (self.followers, self.method.target)):
                if isinstance(sync, Sync) and self.steps % sync.every == 0:
                    self._move(anchor, sync.rate)
        return stats.means()

    def _entries(self, items: list[Item], index: Tensor) -> int:
        return entries([items[i] for i in index.tolist()], self.source.kind, self.method.needs)

    def whole(self, items: list[Item], index: Tensor) -> dict[str, Any]:
        """A minibatch in one, with the texts of its items, for whoever wants to look at it."""
        chosen = [items[i] for i in index.tolist()]
        batch = make_batch(chosen, self.source.kind, self.method.needs, self.pad, self.agent.device, self.generator("tokens"))
        return {"batch": batch, "line": torch.tensor([i.line for i in chosen]), "prompt_text": [i.prompt_text for i in chosen]}

    def scores(self, batch: Batch) -> TokenScores:
        """What one pass of the policy and one of each anchor say of the rows; only what the method reads."""
        needs, record = set(self.method.needs), batch.record
        spread, value = bool(needs & {"kl_ref", "collision"}), "value" in needs
        out = self.agent.evaluate(record, ["logp", *(["dist"] if spread else []), *(["hidden"] if value else [])])
        assert out.logp is not None
        scores = TokenScores(out.logp, record.mask, dict(batch.logps), progress=self.progress)
        if self.reference is not None:
            with torch.no_grad():
                ref = self.reference.evaluate(record, ["logp", *(["dist"] if "kl_ref" in needs else [])])
            assert ref.logp is not None
            scores.logp_ref["ref"] = ref.logp
            if "kl_ref" in needs:
                scores.kl_ref = kl_ref_policy(out.dist.logits, ref.dist.logits)  # type: ignore[union-attr]
            if "mismatched" in needs:
                scores.mismatched = self.mismatched(batch)
        if self.target is not None:
            with torch.no_grad():
                behind = self.target.evaluate(record, ["logp"]).logp
            assert behind is not None
            scores.logp_ref["target"] = behind
        if "collision" in needs:
            scores.collision = log_collision(out.dist.logits)  # type: ignore[union-attr]
        if value:
            assert out.hidden is not None and self.agent.critic is not None
            # The first response token is predicted at the prompt's end. The policy's trunk is not moved by V.
            scores.value = self.agent.critic(out.hidden[:, 0].detach())[:, 0]
        return scores

    @torch.no_grad()
    def mismatched(self, batch: Batch) -> Tensor:
        """(B,) log-ratios of each row's response under the prompt of another item: KTO's reference point.

        Raises ValueError for a batch of one prompt.
        """
        assert self.reference is not None and isinstance(batch.record.obs, dict)
        record = batch.record
        obs = batch.record.obs
        prompts = [ids[mask].tolist() for ids, mask in zip(obs["prompt_ids"], obs["prompt_mask"], strict=True)]
        n = len(prompts)
        other = [next((q for q in (prompts[(i + k) % n] for k in range(1, n)) if q != p), None) for i, p in enumerate(prompts)]
        if any(o is None for o in other):
            raise ValueError("a batch of a single prompt has no mismatched responses; set num_envs (and solver.minibatch) to 2 or more")
        responses = [a[v].tolist() for a, v in zip(record.action, record.valid, strict=True)]
        swapped = token_rows([o or [] for o in other], responses, self.pad, self.agent.device)
        policy, ref = (agent.evaluate(swapped, ["logp"]).logp for agent in (self.agent, self.reference))
        assert policy is not None and ref is not None
        return (policy - ref).sum(1)

    @torch.no_grad()
    def describe(self, scores: TokenScores, batch: Batch) -> dict[str, Tensor]:
        """What is logged of a batch: of pairs their two sides, else the rows' log-probs; ratios to the anchor where it is at hand."""
        views, ref = batch.views, scores.logp_ref.get("ref")
        detached = replace(scores, logp=scores.logp.detach())
        if views.pairs is not None and ref is not None:
            out = pair_statistics(detached, views, beta=float(getattr(self.method.loss, "beta", 1.0)))
        elif views.pairs is not None:
            (w, l), (n_w, n_l) = sides(detached.sums(), views), sides(detached.lengths(), views)
            out = {
                "logp_chosen": w.mean(),
                "logp_rejected": l.mean(),
                "ranking_accuracy": ranking_accuracy(w, l),
                "ranking_accuracy_per_token": ranking_accuracy(w / n_w, l / n_l),
                "length_chosen": n_w.mean(),
                "length_rejected": n_l.mean(),
            }
        else:
            out = {"logp": detached.sums().mean(), "length": detached.lengths().mean()}
            out |= {} if ref is None else {"log_ratio": detached.log_ratio().mean()}
        return out

    @torch.no_grad()
    def spread(self, item: Item) -> dict[str, float]:
        """Means over the tokens of one item's responses: entropy of the next token in nats, mass of the 10 likeliest, and, where the anchor is at
        hand, KL(pi || anchor) in nats; exact, and cheap for one item."""
        record = make_batch([item], self.source.kind, set(self.method.needs) - {"keep", "diff"}, self.pad, self.agent.device).record
        now: Tensor = self.agent.evaluate(record, ["dist"]).dist.logits  # type: ignore[union-attr]
        out = {
            "entropy": float(masked_mean(Categorical(now).entropy(), record.mask)),
            "top10_mass": float(top_k(now, record.mask, k=min(10, now.shape[-1])).mass),
        }
        if self.reference is not None:
            anchor: Tensor = self.reference.evaluate(record, ["dist"]).dist.logits  # type: ignore[union-attr]
            out["kl_ref"] = float(masked_mean(kl_ref_policy(anchor, now), record.mask))
        return out

    # -- the anchor ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _move(self, anchor: list[Tensor], rate: float) -> None:
        for place, p in zip(anchor, self.trained, strict=bool(anchor)):
            place.copy_(soft_sync(place, p, rate=rate))

    @torch.no_grad()
    def _end_round(self) -> None:
        """What EachRound and Extrapolated do between two parts of the run."""
        if isinstance(self.method.reference, EachRound):
            self._move(self.moved, 1.0)
        elif isinstance(self.method.reference, Extrapolated):
            for p, previous in zip(self.trained, self.fitted, strict=True):
                new = p.detach().clone()
                p.copy_(extrapolate(new, previous, momentum=self.method.reference.momentum))
                previous.copy_(new)
            self._move(self.moved, 1.0)

    # -- checkpoints --------------------------------------------------------------------------------------------------------------

    def boundary(self) -> None:
        """Nothing outlives an iteration: batches and samples are functions of the seed and of what was seen."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs; a frozen anchor is the policy that the driver was built with."""
        tensors, meta = super().state()
        for prefix, own in self._kept():
            tensors |= {f"{prefix}{i}": tensor for i, tensor in enumerate(own)}
        return tensors, meta | {"steps": self.steps}

    def _kept(self) -> tuple[tuple[str, list[Tensor]], ...]:
        """What moves beside the policy, by its name in a checkpoint."""
        return ("anchor.", self.moved), ("target.", self.followers), ("fitted.", self.fitted)

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put `state()` back into a driver that was built with the same method, items, seed and start policy."""
        super().load_state(tensors, meta)
        self.steps = meta["steps"]
        with torch.no_grad():
            for prefix, own in self._kept():
                saved = part(tensors, prefix)
                for i, tensor in enumerate(own):
                    tensor.copy_(saved[str(i)])
