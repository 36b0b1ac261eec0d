"""The test beds of benchmarks/preference.py whose optimum is known, and what a loss makes of them at a given KL to the reference.

    bandit    4 prompts x 8 responses with rewards, tabular        tree  64 sequences of 3 tokens with rewards, tabular, token by token
    game      4 responses that beat each other in a cycle          sequences  1 to 12 letters, a transformer, pairs sampled once

On the first three every response is listed and a loss is its own population mean: pairs and lists of the reference, labels P(y > y').
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.anchors import FromMixture
from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.listwise import LambdaRank, Listwise
from markovia.algos.preference.method import Loss
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.pairwise import Blend, Pairwise
from markovia.algos.preference.pieces import FromScores, ScoreGap
from markovia.algos.preference.population import bandit_scores, tree_scores, weighted_mean
from markovia.algos.preference.scores import TokenScores
from markovia.algos.preference.token_level import kl_ref_policy, log_collision
from markovia.algos.preference.unpaired import DRO, Pointwise, Transport, WinRate
from markovia.envs.exact import EnumerableTokenMDP, PreferenceBandit, PreferenceGame

F64 = torch.float64
LEFT_OUT = {
    "modpo": "reads two rewards", "spo-seq": "reads the policies of earlier rounds", "iopo": "crosses two prompts",
    "vpo/online": "sets its own samples beside the pairs", "spac": "sets its own samples beside the pairs", "nash-mp": "samples its own lists",
    **dict.fromkeys(("tr-dpo", "tr-dpo/hard", "sdpo-stepwise", "apo-accelerated"), "DPO's loss; only its anchor moves, between rounds"),
}  # fmt: skip


def methods() -> list[str]:
    """Rows of the table that are losses of one round on one prompt at a time."""
    return [m for m, row in PREFERENCE.items() if hasattr(row.value, "loss") and m not in LEFT_OUT]


def at(x: Any) -> Tensor:
    """A float64 tensor."""
    return torch.as_tensor(x, dtype=F64)


@dataclass
class Bed:
    """A problem whose responses are all listed, one row each; B rows in all."""

    start: Tensor  # logits of the tabular policy, those of the reference
    score: Callable[[Tensor], TokenScores]  # rows of all responses
    prompt: Tensor  # (B,) which prompt a response belongs to
    P: Tensor  # (B, B) probability that the row's response beats the column's
    reward: Tensor  # (B,); in the game the win rate against the reference
    optimum: Callable[[float], Tensor]  # strength of the regularisation -> log pi* (B,)
    nats: float  # of KL to the reference, at which policies are compared
    weakest: float = 1e-3  # regularisation for which the optimum can be computed

    def __post_init__(self) -> None:
        self.logp_ref = self.score(self.start).sums().detach()
        self.same = self.prompt[:, None] == self.prompt
        self.prompts = int(self.prompt.max()) + 1
        self.best = self._at_kl()

    def _at_kl(self) -> Tensor:
        """log pi* (B,) of the strength at which its KL to the reference is `nats`."""
        low, high = self.weakest, 1e3
        for _ in range(60):
            middle = float(np.sqrt(low * high))
            low, high = (middle, high) if self.kl(self.optimum(middle)) > self.nats else (low, middle)
        return self.optimum(low)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over prompts of sums over responses."""
        return x.sum() / self.prompts

    def kl(self, logp: Tensor, other: Tensor | None = None) -> float:
        """KL(pi || other), by default to the reference, nats, mean over prompts."""
        return float(self.mean(logp.exp() * (logp - (self.logp_ref if other is None else other))))

    def against(self, logp: Tensor) -> Tensor:
        """(B,) win rate of each response against a policy on its prompt."""
        return torch.where(self.same, self.P * logp.exp(), 0.0).sum(1)

    def measures(self, logp: Tensor) -> dict[str, float]:
        """Distances in nats, the win rate against the reference, and how far chosen and rejected responses moved (mean log-ratio)."""
        ref, moved = self.logp_ref.exp(), logp - self.logp_ref
        rate = self.against(self.logp_ref)
        return {
            "kl_ref": self.kl(logp),
            "kl_optimum": self.kl(logp, self.best),
            "win_rate": float(self.mean(logp.exp() * rate)),
            "duality_gap": float(2.0 * self.against(logp).max() - 1.0),
            # A response of the reference is the chosen one with the probability that it beats another.
            "chosen": float(self.mean(2.0 * ref * rate * moved)),
            "rejected": float(self.mean(2.0 * ref * (1.0 - rate) * moved)),
        }


def bandit() -> Bed:
    """Rewards N(0, 1), reference softmax of N(0, 1); compared at half a nat."""
    made = PreferenceBandit.random()
    r = at(made.reward).flatten()

    def score(z: Tensor) -> TokenScores:
        out, ref = bandit_scores(z, ref=at(made.logp_ref)), at(made.logp_ref)
        kl, collision = kl_ref_policy(z, ref), log_collision(z)
        return dataclasses.replace(out, kl_ref=kl.repeat_interleave(8)[:, None], collision=collision.repeat_interleave(8)[:, None])

    prompt = torch.arange(4).repeat_interleave(8)
    return Bed(at(made.logp_ref), score, prompt, torch.sigmoid(r[:, None] - r), r, lambda b: at(made.kl_optimum(b)).flatten(), 0.5)


def tree() -> Bed:
    """Rewards N(0, 1) on sequences, one prompt; compared at one nat."""
    rng = np.random.default_rng(1000)
    made = EnumerableTokenMDP(4, 3, EnumerableTokenMDP.random(V=4, H=3, seed=0).logits_ref, rng.standard_normal(64))
    r = at(made.R)
    law = torch.zeros(made.M, dtype=torch.int64)
    return Bed(at(made.logits_ref), lambda z: tree_scores(made, z), law, torch.sigmoid(r[:, None] - r), r, lambda b: at(made.kl_optimum(b)[0]), 1.0)


def game() -> Bed:
    """A cycle of three and a fourth that loses to each; the optimum is the regularised equilibrium; compared at 0.1 nats."""
    made = PreferenceGame.random()
    ref = at(made.logp_ref)[None]

    def score(z: Tensor) -> TokenScores:
        kl, collision = kl_ref_policy(z, ref), log_collision(z)
        return dataclasses.replace(bandit_scores(z, ref=ref), kl_ref=kl.expand(1, made.K).T, collision=collision.expand(1, made.K).T)

    def optimum(tau: float) -> Tensor:
        return at(made.equilibrium(tau, damping=min(0.5, tau / 2)))

    rate = at(made.win_rate(np.exp(made.logp_ref)))
    return Bed(ref, score, torch.zeros(made.K, dtype=torch.int64), at(made.P), rate, optimum, 0.1, weakest=0.05)


# -- what a loss reads of a bed ------------------------------------------------------------------------------------------------------------


def picked(scores: TokenScores, rows: Tensor) -> TokenScores:
    """The scores of some rows; a row may stand several times."""
    columns = {f.name: v[rows] for f in dataclasses.fields(scores) if isinstance(v := getattr(scores, f.name), Tensor)}
    return dataclasses.replace(scores, logp_ref={name: x[rows] for name, x in scores.logp_ref.items()}, **columns)


class Population:
    """The mean of one loss over everything that the reference (or the method's own sampler) could draw. Sorted losses see 256 drawn items."""

    def __init__(self, method_id: str, bed: Bed, seed: int = 0) -> None:
        self.id, self.bed, self.rng = method_id, bed, np.random.default_rng(seed)
        first, second = torch.nonzero(bed.same & ~torch.eye(len(bed.prompt), dtype=torch.bool)).unbind(1)
        self.pairs = torch.stack([first, second], 1)
        self.groups = self._groups()
        self.rate = bed.against(bed.logp_ref)

    def _groups(self, most: int = 1000) -> Tensor:
        """(G, 4) lists: all of them, or `most` drawn from the reference without repetition."""
        rows = [torch.nonzero(self.bed.prompt == x).squeeze(1).tolist() for x in range(self.bed.prompts)]
        if len(rows[0]) <= 8:
            return torch.tensor([c for r in rows for c in itertools.combinations(r, 4)])
        p = self.bed.logp_ref.exp().numpy()
        return torch.tensor(np.stack([self.rng.choice(len(p), 4, replace=False, p=p) for _ in range(most)]))

    def __call__(self, loss: Loss, logits: Tensor, progress: float) -> Tensor:
        """The loss of the policy with these logits."""
        bed, scores = self.bed, self.bed.score(logits)
        anchors = dict.fromkeys(("ref", "old", "proposal"), scores.logp_ref["ref"])
        scores = dataclasses.replace(scores, logp_ref=anchors, progress=progress)
        logp = scores.sums().detach()
        law = self._law(logp)
        if isinstance(loss, SelfPlay):
            score = bed.against(law)
            return weighted_mean(loss(scores, Views(unpaired=torch.arange(len(logp)), score=score)), logp.exp())
        if isinstance(loss, Transport):
            return self._sorted(loss, scores)
        if isinstance(loss, Listwise) and loss.view == "groups":
            score = self.rate if isinstance(loss.loss, LambdaRank) else bed.reward
            return weighted_mean(loss(scores, Views(groups=self.groups, score=score)), law[self.groups].sum(1).exp())
        if isinstance(loss, Pointwise) and loss.view == "unpaired":
            return self._single(loss, scores, law)
        w, l = self.pairs.unbind(1)
        score = self.rate if isinstance(loss, Pointwise) and isinstance(loss.point, WinRate) else bed.reward
        views = Views(pairs=self.pairs, q=bed.P[w, l], score=score, gold=self._gold(loss, w), keep=scores.mask, diff=scores.mask)
        return weighted_mean(loss(scores, views), (law[w] + law[l]).exp() * bed.P[w, l])

    def _law(self, logp: Tensor) -> Tensor:
        """log-probabilities of the responses' sampler: the policy or its mixture for the methods of every round, else the reference."""
        sampler = PREFERENCE[self.id].value.sampler
        if self.id == "ipo/online":
            return logp
        if isinstance(sampler, FromMixture):
            mixed = (1.0 - sampler.mix) * logp + sampler.mix * self.bed.logp_ref
            total = torch.where(self.bed.same, mixed, -torch.inf).logsumexp(1)
            return mixed - total
        return self.bed.logp_ref

    def _gold(self, loss: Any, chosen: Tensor) -> Tensor:
        """The best response of the prompt for WRPO (a stronger model's), else the chosen one."""
        if not (isinstance(loss, Pairwise) and isinstance(loss.diff, Blend)):
            return chosen
        best = torch.where(self.bed.same, self.bed.reward, -torch.inf).argmax(1)
        return best[chosen]

    def _single(self, loss: Pointwise, scores: TokenScores, law: Tensor) -> Tensor:
        """Every response twice, as one that beat another and as one that was beaten; demonstrations once."""
        rows = torch.arange(len(law))
        if "label" not in loss.needs and not isinstance(loss.point, DRO):
            return weighted_mean(loss(scores, Views(unpaired=rows)), law.exp() * self.rate)
        if isinstance(loss.point, DRO):
            residual = self.bed.reward - loss.point.tau * scores.log_ratio().detach()
            value = torch.where(self.bed.same, law.exp() * residual, 0.0).sum(1)  # the best V for this policy
            return weighted_mean(loss(dataclasses.replace(scores, value=value), Views(unpaired=rows, score=self.bed.reward)), law.exp())
        twice = torch.cat([rows, rows])
        doubled = dataclasses.replace(picked(scores, twice), mismatched=self._mismatched(scores))
        label = torch.arange(len(twice)) < len(rows)
        weight = torch.cat([law.exp() * self.rate, law.exp() * (1.0 - self.rate)])
        return weighted_mean(loss(doubled, Views(unpaired=torch.arange(len(twice)), label=label)), weight)

    def _mismatched(self, scores: TokenScores) -> Tensor:
        """Log-ratios of responses drawn for one prompt under the next one (with a single prompt under itself), each as often as it is drawn."""
        size = len(self.bed.prompt) // self.bed.prompts
        l = scores.log_ratio().detach().roll(-size)
        return (l * self.bed.logp_ref.exp() * size).expand(len(l))

    def _sorted(self, loss: Transport, scores: TokenScores, n: int = 256) -> Tensor:
        if not hasattr(self, "drawn"):
            w, l = self.pairs.unbind(1)
            p = ((self.bed.logp_ref[w] + self.bed.logp_ref[l]).exp() * self.bed.P[w, l]).numpy()
            self.drawn = self.pairs[self.rng.choice(len(p), n, p=p / p.sum())].T.flatten()
        rows = torch.arange(2 * n)
        views = Views(pairs=rows.view(2, n).T, unpaired=rows, label=rows < n)
        return loss(picked(scores, self.drawn), views).mean()


def with_strength(loss: Any, strength: float) -> Any:
    """The loss with another strength of its regularisation: beta, tau, 1 / eta or the price, whatever it is called there."""
    if isinstance(loss, SelfPlay):
        return dataclasses.replace(loss, price=tuple((name, strength) for name, _ in loss.price))
    if not isinstance(loss, Pointwise):
        return dataclasses.replace(loss, beta=strength)
    knob = {DRO: {"tau": strength}, WinRate: {"eta": 1.0 / strength}}.get(type(loss.point), {"beta": strength})  # type: ignore[call-overload]
    return dataclasses.replace(loss, point=dataclasses.replace(loss.point, **knob))


def on_the_scale_of_logits(loss: Any) -> Any:
    """Rewards of the beds are Bradley-Terry logits already, so scores and lists keep them as they are."""
    if isinstance(loss, Pairwise) and isinstance(loss.label, FromScores):
        return dataclasses.replace(loss, label=FromScores(1.0))
    if isinstance(loss, Pairwise) and isinstance(loss.margin, ScoreGap):
        return dataclasses.replace(loss, margin=ScoreGap(1.0))
    if isinstance(loss, Listwise) and hasattr(loss.loss, "temperature"):
        return dataclasses.replace(loss, loss=dataclasses.replace(loss.loss, temperature=1.0))
    return loss


def path(population: Population, loss: Any, steps: int, every: int, lr: float = 0.05) -> list[Tensor]:
    """log pi (B,) along Adam's descent from the reference."""
    logits = population.bed.start.clone().requires_grad_()
    solver = torch.optim.Adam([logits], lr=lr)
    out = []
    for step in range(steps + 1):
        if step % every == 0:
            out.append(population.bed.score(logits.detach()).sums())
        solver.zero_grad()
        population(loss, logits, step / steps).backward()
        solver.step()
    return out


def equal_kl(bed: Bed, method_id: str, steps: int = 600, tries: int = 9) -> dict[str, Any]:
    """Measures of a method where its policy is `bed.nats` from the reference.

    The strength is searched for which the policy at the end of training is there (within 2 %): by secants of log KL over its logarithm, by halving
    the interval where those leave the bracket. Where no strength leads there, the descent with the row's own setting is stopped where it passes, and
    where it never does, its end is told with reached = False.
    """
    population, own = Population(method_id, bed), on_the_scale_of_logits(PREFERENCE[method_id].value.loss)
    strength, low, high = 1.0, 1e-3, 1e3
    before: tuple[float, float] | None = None
    for _ in range(tries):
        end = path(population, with_strength(own, strength), steps, steps)[-1]
        kl = max(bed.kl(end), 1e-9)
        if abs(kl - bed.nats) <= 0.02 * bed.nats:
            return {**bed.measures(end), "strength": strength, "stopped": None, "reached": True}
        low, high = (strength, high) if kl > bed.nats else (low, strength)
        slope = -2.0 if before is None else np.log(kl / before[1]) / np.log(strength / before[0])
        before = strength, kl
        strength *= float((bed.nats / kl) ** (1.0 / np.clip(slope, -4.0, -0.2)))
        if not low < strength < high:
            strength = float(np.sqrt(low * high))
    walked = path(population, own, 2 * steps, 1, lr=0.01)  # small steps, so that it does not pass far
    passed = next((i for i, p in enumerate(walked) if bed.kl(p) >= bed.nats), None)
    end = walked[-1 if passed is None else passed]
    return {**bed.measures(end), "strength": None, "stopped": passed, "reached": passed is not None}


BEDS: dict[str, Callable[[], Bed]] = {"bandit": bandit, "tree": tree, "game": game}
