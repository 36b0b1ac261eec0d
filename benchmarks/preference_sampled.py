"""Studies of benchmarks/preference.py on pairs that are sampled once: letters of any length under a transformer, and displacement on a token tree.

`sequences` is the fourth bed of the table at equal KL. `tree_displacement` follows chosen and rejected log-probs of losses that are said to displace
the chosen response, or not to, on a tree whose prefixes share the parameters of a small network.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from markovia.agents.records import Views
from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.listwise import LambdaRank, Listwise
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.pairwise import Blend, Pairwise
from markovia.algos.preference.population import tree_scores
from markovia.algos.preference.scores import REF, TokenScores
from markovia.algos.preference.token_level import differing, kl_ref_policy, log_collision, shared_subset
from markovia.algos.preference.unpaired import DRO, Pointwise, WinRate
from markovia.claims.preference_policies import tree_pairs
from markovia.claims.preference_sequences import SETTINGS, Sequences, reference, response_mask, reward
from markovia.envs.exact import EnumerableTokenMDP

SEQUENCE_NATS = 3.0  # of KL to the reference, at which policies on letters are compared
LISTS, SAMPLES = 512, 1024  # lists of four in the data; samples of each measurement


class Letters:
    """The data of one seed: lists of four samples of the reference with rewards, the first two of each with a Bradley-Terry label."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.ref = reference(self.g)
        self.tokens = torch.cat([self.ref.sample(LISTS, self.g) for _ in range(4)])  # row k LISTS + i: the k-th response of list i
        self.reward = reward(self.tokens)
        first, second = torch.arange(LISTS), torch.arange(LISTS) + LISTS
        self.q = torch.sigmoid(self.reward[first] - self.reward[second])
        wins = torch.rand(LISTS, generator=self.g) < self.q
        self.pairs = torch.where(wins[:, None], torch.stack([first, second], 1), torch.stack([second, first], 1))
        self.q = torch.where(wins, self.q, 1.0 - self.q)
        drawn = self.ref.sample(SAMPLES, self.g)
        self.others = reward(drawn)  # of the reference, what win rates are counted against
        self.many = torch.cat([reward(self.ref.sample(8192, self.g)) for _ in range(4)]).double()
        self.beta = self._beta()

    def _beta(self) -> float:
        """Strength for which pi* ~ ref e^(r / beta) is SEQUENCE_NATS from the reference, by importance weights of its samples."""
        low, high = 0.05, 100.0
        for _ in range(60):
            middle = float(np.sqrt(low * high))
            low, high = (middle, high) if self.optimum(middle)[0] > SEQUENCE_NATS else (low, middle)
        return high

    def optimum(self, beta: float) -> tuple[float, float]:
        """(KL(pi* || ref), log Z)."""
        log_z = float(torch.logsumexp(self.many / beta, 0) - np.log(len(self.many)))
        return float((torch.softmax(self.many / beta, 0) * self.many).sum()) / beta - log_z, log_z

    def views(self, loss: Any, index: Tensor, g: torch.Generator) -> tuple[Tensor, Views]:
        """The rows of some lists that a loss reads, and its views of them."""
        n = len(index)
        if isinstance(loss, Listwise) and loss.view == "groups":
            rows = torch.cat([index + k * LISTS for k in range(4)])
            score = self._win_rate(rows) if isinstance(loss.loss, LambdaRank) else self.reward[rows]
            return rows, Views(groups=torch.arange(4 * n).view(4, n).T, score=score)
        rows = self.pairs[index].T.flatten()
        pairs = torch.arange(2 * n).view(2, n).T
        if "label" not in loss.needs and isinstance(loss, Pointwise) and loss.view == "unpaired" and not isinstance(loss.point, DRO):
            return rows[:n], Views(unpaired=torch.arange(n))
        rate = isinstance(loss, Pointwise) and isinstance(loss.point, WinRate)
        gold = pairs[:, 0]
        if isinstance(loss, Pairwise) and isinstance(loss.diff, Blend):  # a stronger model's response: the best of the list
            best = index + LISTS * torch.stack([self.reward[index + k * LISTS] for k in range(4)]).argmax(0)
            rows, gold = torch.cat([rows, best]), torch.arange(2 * n, 3 * n)
        mask, B = response_mask(self.tokens[rows]), len(rows)
        views = Views(
            pairs=pairs, q=self.q[index], score=self._win_rate(rows) if rate else self.reward[rows], gold=gold, unpaired=torch.arange(B),
            label=torch.arange(B) < n,
        )  # fmt: skip
        if "keep" in loss.needs:
            views.keep = shared_subset(mask, pairs, g)
        if "diff" in loss.needs:
            views.diff = differing(self.tokens[rows], mask, pairs)
        return rows, views

    def _win_rate(self, rows: Tensor) -> Tensor:
        return torch.sigmoid(self.reward[rows][:, None] - self.others).mean(1)

    def scores(self, model: Sequences, tokens: Tensor, progress: float) -> TokenScores:
        """Everything a loss may read of these rows."""
        mask = response_mask(tokens)
        logits = torch.log_softmax(model(tokens), -1)
        with torch.no_grad():
            before = torch.log_softmax(self.ref(tokens), -1)
        logp, ref = (x.gather(2, tokens[..., None]).squeeze(2) for x in (logits, before))
        value = torch.zeros(len(tokens))
        out = TokenScores(
            logp, mask, dict.fromkeys(("ref", "old", "proposal"), ref), kl_ref=kl_ref_policy(logits, before), collision=log_collision(logits),
            value=value, progress=progress,
        )  # fmt: skip
        out.mismatched = out.log_ratio().detach()
        return out

    def loss(self, loss: Any, model: Sequences, index: Tensor, g: torch.Generator, progress: float) -> Tensor:
        """Mean loss of some lists; a self-play loss draws rows of the policy itself instead."""
        if isinstance(loss, SelfPlay):
            tokens = model.sample(2 * len(index), g)
            rate = torch.sigmoid(reward(tokens)[:, None] - reward(model.sample(len(index), g))).mean(1)
            return loss(self.scores(model, tokens, progress), Views(unpaired=torch.arange(len(tokens)), score=rate)).mean()
        rows, views = self.views(loss, index, g)
        scores = self.scores(model, self.tokens[rows], progress)
        if isinstance(loss, Pointwise) and isinstance(loss.point, DRO):  # the best V for this policy
            scores.value = (self.reward[rows] - loss.point.tau * scores.log_ratio().detach()).mean().expand(len(rows))
        return loss(scores, views).mean()

    @torch.no_grad()
    def measures(self, model: Sequences, g: torch.Generator) -> dict[str, float]:
        """The same as of the other beds, from SAMPLES samples; the KL to the reference is exact per token."""
        tokens = model.sample(SAMPLES, g)
        mask = response_mask(tokens)
        logits, before = torch.log_softmax(model(tokens), -1), torch.log_softmax(self.ref(tokens), -1)
        kl = float((kl_ref_policy(before, logits) * mask).sum(1).mean())
        r = reward(tokens)
        both = self.tokens[self.pairs.T.flatten()]
        l = ((model.logp(both) - self.ref.logp(both)) * response_mask(both)).sum(1)
        return {
            "kl_ref": kl,
            "kl_optimum": kl - float(r.mean()) / self.beta + self.optimum(self.beta)[1],
            "win_rate": float(torch.sigmoid(r[:, None] - self.others).mean()),
            "chosen": float(l[:LISTS].mean()),
            "rejected": float(l[LISTS:].mean()),
        }


@lru_cache(maxsize=4)
def letters_of(seed: int) -> Letters:
    """The data of a seed, made once a process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Letters(seed)


def letters(method_id: str, seed: int, steps: int = 200, every: int = 5, batch: int = 64) -> dict[str, Any]:
    """Adam steps on batches of 64 lists; measures where the KL to the reference passes SEQUENCE_NATS (interpolated), else at the end."""
    data, model = letters_of(seed), Sequences()
    model.load_state_dict(data.ref.state_dict())
    loss = dataclasses.replace(PREFERENCE[method_id].value.loss, **SETTINGS.get(method_id, {}))
    solver, g = torch.optim.Adam(model.parameters(), lr=1e-3), torch.Generator().manual_seed(seed)
    found = [data.measures(model, g)]
    for step in range(1, steps + 1):
        solver.zero_grad()
        data.loss(loss, model, torch.randperm(LISTS, generator=g)[:batch], g, step / steps).backward()
        solver.step()
        if step % every:
            continue
        found.append(data.measures(model, g))
        if found[-1]["kl_ref"] >= SEQUENCE_NATS:
            a, b = found[-2:]
            share = (SEQUENCE_NATS - a["kl_ref"]) / (b["kl_ref"] - a["kl_ref"])
            return {k: a[k] + share * (b[k] - a[k]) for k in a} | {"strength": None, "stopped": step, "reached": True}
    return {**found[-1], "strength": None, "stopped": None, "reached": False}


# -- displacement on the tree --------------------------------------------------------------------------------------------------------------

DISPLACEMENT = ("dpo", "squared-po", "ipo", "rpo", "nca/pair", "sppo/hard", "f-dpo/forward-kl", "simpo", "alpha-po")


class Prefixes(nn.Module):
    """A network of width 16 over the letters of a prefix, so that what one prefix learns moves others; logits (N, V) of all prefixes."""

    def __init__(self, tree: EnumerableTokenMDP) -> None:
        super().__init__()
        self.code = torch.zeros(tree.num_prefixes, tree.H * tree.V)
        for sequence, prefix in zip(tree.tokens, tree.prefix_index, strict=True):
            for t in range(tree.H):
                for u in range(t):
                    self.code[prefix[t], u * tree.V + sequence[u]] = 1.0
        place = torch.nn.functional.one_hot(self.code.sum(1).long(), tree.H).float()
        self.code = torch.cat([self.code, place], 1)
        self.layers = nn.Sequential(nn.Linear(self.code.shape[1], 16), nn.Tanh(), nn.Linear(16, tree.V))

    def forward(self) -> Tensor:
        return 2.0 * self.layers(self.code)


def tree_displacement(method_id: str, seed: int, pairs: int = 16, steps: int = 1000, every: int = 10, beta: float = 0.1) -> dict[str, Any]:
    """Log-ratios of chosen and rejected responses, win rate against the reference and mass outside of the data along training on `pairs` pairs.

    Both sides of every pair share the parameters of one network with all other sequences. Losses keep their rows' settings; those whose rows are set
    for large models (RPO, SPPO) get beta 0.1 too, RPO's likelihood term the same weight, and SPPO the reference as its sampler.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        empty = EnumerableTokenMDP.random(V=4, H=3, seed=seed)
        net = Prefixes(empty)
        rng = np.random.default_rng(seed)
        tree = EnumerableTokenMDP(4, 3, net().detach().double().numpy(), rng.standard_normal(64))
    views = Views(pairs=torch.as_tensor(tree_pairs(tree, pairs, rng)))
    assert views.pairs is not None
    loss: Any = PREFERENCE[method_id].value.loss
    if method_id == "rpo":
        loss = dataclasses.replace(loss, beta=beta, terms=(dataclasses.replace(loss.terms[0], coef=beta),))
    if isinstance(loss, Pointwise):
        score, point = dataclasses.replace(loss.score, anchors=REF), dataclasses.replace(loss.point, eta=1.0 / beta)
        loss = dataclasses.replace(loss, score=score, point=point)
    solver = torch.optim.Adam(net.parameters(), lr=0.01)
    R = torch.as_tensor(tree.R)
    rate = torch.sigmoid(R[:, None] - R) @ torch.as_tensor(tree.logp_ref).exp()
    seen = torch.zeros(tree.M, dtype=torch.bool)
    seen[views.pairs.flatten()] = True
    curve: dict[str, list[float]] = {k: [] for k in ("chosen", "rejected", "win_rate", "unseen", "accuracy", "kl_ref")}
    for step in range(steps + 1):
        scores = tree_scores(tree, net().double())
        if step % every == 0:
            logp = scores.sums().detach()
            l = logp - torch.as_tensor(tree.logp_ref)
            w, r = (l[views.pairs[:, i]] for i in (0, 1))
            told = (w.mean(), r.mean(), logp.exp() @ rate, logp.exp()[~seen].sum(), (w > r).double().mean(), logp.exp() @ l)
            for name, value in zip(curve, told, strict=True):
                curve[name].append(round(float(value), 5))
        solver.zero_grad()
        loss(scores, views).mean().backward()
        solver.step()
    return {"every": every, "curve": curve}
