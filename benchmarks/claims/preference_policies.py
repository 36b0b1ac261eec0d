"""Claims about policies that share parameters: displacement under log-linear features, token trees; identities; metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.pairwise import Crossed, Difference, Pairwise
from markovia.algos.preference.pieces import NLL, Fixed
from markovia.algos.preference.population import bandit_scores, descend, total_variation, tree_scores
from markovia.algos.preference.scores import Score, TokenScores
from markovia.algos.preference.theory import predicates
from markovia.claims.preference import F64, at, at_least, at_most, loss_of, population, trained
from markovia.envs.exact import EnumerableTokenMDP, PreferenceBandit
from markovia.envs.exact.preference import DISPLACEMENT_FEATURES

PAIR = Views(pairs=torch.tensor([[0, 1]]))


def displaced(
    loss: Callable[..., Tensor], optimizer: str = "adam", lr: float = 0.05, steps: int = 4000, until: float | None = None
) -> tuple[Tensor, Tensor]:
    """Path of log pi - log ref (steps, 3) of the log-linear policy over w, l, c that sees the pair (w, l) only, and its last log pi.

    Ends where the loss falls to `until`.
    """
    features, ref = at(DISPLACEMENT_FEATURES), torch.full((1, 3), -float(np.log(3.0)), dtype=F64)
    theta = torch.zeros(2, dtype=F64, requires_grad=True)
    solver = (torch.optim.Adam if optimizer == "adam" else torch.optim.SGD)([theta], lr=lr)
    path = []
    for _ in range(steps):
        solver.zero_grad()
        logits = (features @ theta)[None]
        value = loss(bandit_scores(logits, ref=ref), PAIR).mean()
        path.append((torch.log_softmax(logits.detach(), -1) - ref)[0])
        if until is not None and float(value.detach()) <= until:
            break
        value.backward()
        solver.step()
    return torch.stack(path), path[-1] + ref[0]


def squared_po(bound: float = 0.1) -> dict[str, Any]:
    """|log pi(w) - log ref(w)| at loss 0.1 relative to DPO's, beta 0.1 (displacement problem, Adam and SGD); total variation to the stationary
    point on the bandit with beta 4 (at most 5e-3); the two predicates on four generators."""
    ratios, moved = [], []
    for optimizer, lr in (("adam", 0.05), ("sgd", 1.0)):
        a, b = (abs(float(displaced(loss_of(m, beta=0.1), optimizer, lr, 60_000, 0.1)[0][-1, 0])) for m in ("squared-po", "dpo"))
        ratios.append(a / b)
        moved.append((a, b))
    bandit = PreferenceBandit.random(scale=0.5)
    tv = float(total_variation(trained(loss_of("squared-po", beta=4.0), bandit, *population(bandit)), at(bandit.squared_log_optimum(4.0)).log()))
    generators = {
        "t log t": (lambda t: torch.xlogy(t, t), (True, False)), "-log t": (lambda t: -torch.log(t), (True, True)),
        "(t - 1)^2": (lambda t: (t - 1).square(), (False, True)), "(log t)^2 / 2": (lambda t: 0.5 * torch.log(t).square(), (True, True)),
    }  # fmt: skip
    right = all(predicates(f) == expected for f, expected in generators.values())
    out = at_most(ratios, bound, moved_nats_squared_dpo=moved, total_variation=tv, predicates_right=right)
    return {**out, "holds": out["holds"] and tv <= 5e-3 and right}


def alpha_po() -> dict[str, Any]:
    """Displacement problem without anchor, beta 2.5, gamma 0, trained to loss 0.1: final log pi(w) rises with alpha over 0, .25, .5, 1 (Adam and
    SGD). Measured is the least increase, nats."""
    finals = []
    for optimizer, lr in (("adam", 0.05), ("sgd", 0.1)):
        for alpha in (0.0, 0.25, 0.5, 1.0):
            score = Score("mean", (), psi="alpha", alpha=alpha)
            loss = loss_of("alpha-po", diff=Difference(score), margin=Fixed(0.0))
            finals.append(float(displaced(loss, optimizer, lr, 20_000, 0.1)[1][0]))
    increase = [b - a for i in (0, 4) for a, b in zip(finals[i : i + 3], finals[i + 1 : i + 4], strict=True)]
    return at_least(min(increase), 0.0, logp_chosen=finals)


def rpo_displacement() -> dict[str, Any]:
    """Displacement problem: DPO's log pi(w) falls; with an SFT weight of 0.1 it ends above the reference and never falls below it."""
    with_term, without = (displaced(Pairwise(0.1, terms=t))[0][:, 0] for t in ((NLL(0.1, reduce="sum"),), ()))
    lowest, end = float(with_term.min()), float(without[-1])
    return {"measured": lowest, "bound": -1e-9, "holds": lowest >= -1e-9 and float(with_term[-1]) > 0 > end, "final": [float(with_term[-1]), end]}


def nca(bound: float = 0.05) -> dict[str, Any]:
    """One pair of 8 responses, beta 1, ref(w) = 0.1: relative distance of NCA's chosen log-ratio from log 2, and DPO's grows past it; displacement
    problem, beta 1, 4000 Adam steps: NCA's log pi(w) dips and ends above the reference, DPO's falls."""
    ref = torch.log(torch.tensor([[0.1, *[0.9 / 7] * 7]], dtype=F64))
    log_ratio = {}
    for m in ("nca/pair", "dpo"):
        loss = loss_of(m, beta=1.0)
        z = descend(lambda z, loss=loss: loss(bandit_scores(z, ref=ref), PAIR).mean(), {"z": ref}, 6000, 0.05)["z"]
        log_ratio[m] = float((torch.log_softmax(z, -1) - ref)[0, 0])
    paths = {m: displaced(loss_of(m, beta=1.0))[0][:, 0] for m in ("nca/pair", "dpo")}
    away = abs(log_ratio["nca/pair"] / float(np.log(2.0)) - 1.0)
    ends = {m: float(p[-1]) for m, p in paths.items()}
    holds = away <= bound and log_ratio["dpo"] > 1.0 and float(paths["nca/pair"].min()) < 0 < ends["nca/pair"] and ends["dpo"] < -1.0
    return {"measured": away, "bound": bound, "holds": holds, "log_ratio": log_ratio, "displacement_end": ends, "dip": float(paths["nca/pair"].min())}


def sppo_displacement(eta: float = 1.0, bound: float = 1e-2) -> dict[str, Any]:
    """Displacement problem, 6000 Adam steps: distance of SPPO's log-ratios (hard labels) from +-eta/2; DPO's and IPO's log pi(w) fall."""
    point = dataclasses.replace(loss_of("sppo/hard").point, eta=eta)
    path = displaced(loss_of("sppo/hard", point=point, score=Score()), steps=6000)[0]
    others = {m: float(displaced(loss_of(m, **c), steps=6000)[0][-1, 0]) for m, c in (("dpo", {"beta": 1.0}), ("ipo", {"link": _ipo(0.5)}))}
    away = float((path[-1, :2] - at([eta / 2, -eta / 2])).abs().max())
    return {"measured": away, "bound": bound, "holds": away <= bound and max(others.values()) < 0, "others": others, "dip": float(path[:, 0].min())}


def _ipo(tau: float) -> Any:
    return dataclasses.replace(loss_of("ipo").link, tau=tau)


# -- token trees ------------------------------------------------------------------------------------------------------------------------------------


def tree_pairs(tree: EnumerableTokenMDP, n: int, rng: np.random.Generator, logits: np.ndarray | None = None) -> np.ndarray:
    """(n, 2) different sequences of a policy, by default the reference, with Bradley-Terry labels."""
    out: list[tuple[int, int]] = []
    while len(out) < n:
        a, b = tree.sample(tree.logits_ref if logits is None else logits, 2, rng)
        if a != b:
            out.append((a, b) if rng.random() < 1 / (1 + np.exp(tree.R[b] - tree.R[a])) else (b, a))
    return np.array(out)


def tdpo(seeds: int = 5, bound: float = 0.75) -> dict[str, Any]:
    """Tree of 64 sequences, 64 pairs of the reference, 300 Adam steps at 0.01, beta 0.1: sequential KL on rejected responses at the end, TDPO2 over
    DPO; training accuracy within 5 points, entropy of sequences higher, in every seed."""
    ratios, right = [], []
    for seed in range(seeds):
        tree = EnumerableTokenMDP.random(V=4, H=3, seed=seed)
        rng = np.random.default_rng(1000 + seed)
        tree = EnumerableTokenMDP(4, 3, tree.logits_ref, rng.standard_normal(tree.M))
        views = Views(pairs=torch.as_tensor(tree_pairs(tree, 64, rng)))
        found = []
        for m in ("tdpo", "dpo"):
            loss = loss_of(m, beta=0.1)
            start = {"z": at(tree.logits_ref)}
            z = descend(lambda z, loss=loss, views=views, tree=tree: loss(tree_scores(tree, z), views).mean(), start, 300, 0.01)["z"]
            scores = tree_scores(tree, z)
            l, s = scores.log_ratio(), scores.sums()
            rejected = float(scores.sums(scores.kl_ref)[views.pairs[:, 1]].mean())  # type: ignore[index]
            accuracy = float((l[views.pairs[:, 0]] > l[views.pairs[:, 1]]).double().mean())  # type: ignore[index]
            found.append((rejected, accuracy, float(-(s.exp() * s).sum())))
        (kl_t, a_t, h_t), (kl_d, a_d, h_d) = found
        ratios.append(kl_t / kl_d)
        right.append(a_t >= a_d - 0.05 and h_t > h_d)
    out = at_most(ratios, bound)
    return {**out, "holds": out["holds"] and all(right)}


def bmc(seeds: int = 5, wanted: int = 5) -> dict[str, Any]:
    """24 pairs that differ in one token, 200 SGD steps at 0.5, beta 0.1, limit 1.5: its share of |log-ratio change| is above DPO's."""
    from markovia.algos.preference.token_level import differing

    right, shares = [], []
    for seed in range(seeds):
        rng, tree = np.random.default_rng(1000 + seed), EnumerableTokenMDP.random(V=4, H=3, seed=seed)
        first = rng.integers(tree.M, size=24)
        tokens = tree.tokens[first].copy()
        where = rng.integers(3, size=24)
        tokens[np.arange(24), where] = (tokens[np.arange(24), where] + rng.integers(1, 4, size=24)) % 4
        rows = torch.as_tensor(np.concatenate([first, tree.sequence_index(tokens)]))
        pairs = torch.arange(48).view(2, 24).T
        token_rows = torch.as_tensor(tree.tokens)[rows]
        views = Views(pairs=pairs, diff=differing(token_rows, torch.ones(48, 3, dtype=torch.bool), pairs))
        found = []
        for m in ("bmc", "dpo"):
            loss = loss_of(m, beta=0.1)

            def objective(z: Tensor, loss: Any = loss, tree: EnumerableTokenMDP = tree, rows: Tensor = rows, views: Views = views) -> Tensor:
                return loss(_rows(tree_scores(tree, z), rows), views).mean()

            z = descend(objective, {"z": at(tree.logits_ref)}, 200, 0.5, "sgd")["z"]
            scores = _rows(tree_scores(tree, z), rows)
            change = (scores.logp - scores.logp_ref["ref"]).abs()
            found.append(float(change[views.diff].sum() / change.sum()))  # type: ignore[index]
        shares.append(found)
        right.append(found[0] > found[1])
    return at_least(sum(right), wanted, shares_bmc_dpo=shares)


def _rows(scores: TokenScores, rows: Tensor) -> TokenScores:
    anchors = {k: v[rows] for k, v in scores.logp_ref.items()}
    return TokenScores(scores.logp[rows], scores.mask[rows], anchors, collision=None if scores.collision is None else scores.collision[rows])


def wpo(seeds: int = 5, bound: float = 0.15) -> dict[str, Any]:
    """Pairs of the policy itself and of a distant sampler: mean weight of the first less that of the second, least of the seeds; a uniform policy
    gives weight 1 (deviation at most 1e-6)."""
    gaps, weight = [], loss_of("wpo").weight
    for seed in range(seeds):
        rng, tree = np.random.default_rng(1000 + seed), EnumerableTokenMDP.random(V=4, H=3, seed=seed)
        distant = 1.5 * rng.standard_normal(tree.logits_ref.shape)
        means = []
        for logits in (None, distant):
            views = Views(pairs=torch.as_tensor(tree_pairs(tree, 300, rng, logits)))
            means.append(float(weight(tree_scores(tree, at(tree.logits_ref)), views).mean()))
        gaps.append(means[0] - means[1])
    tree = EnumerableTokenMDP.random(V=4, H=3)
    uniform = weight(tree_scores(tree, torch.zeros(tree.num_prefixes, 4, dtype=F64)), Views(pairs=torch.tensor([[0, 1], [5, 9]])))
    away = float((uniform - 1.0).abs().max())
    out = at_least(min(gaps), bound, each=gaps, uniform_deviation=away)
    return {**out, "holds": out["holds"] and away <= 1e-6}


# -- identities --------------------------------------------------------------------------------------------------------------------------------------


def _batch(n: int = 64, T: int = 6, seed: int = 0) -> tuple[TokenScores, Views]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (n, 1), generator=g)
    logp, ref = (-2 * torch.rand(n, T, generator=g, dtype=F64) - 0.05 for _ in range(2))
    views = Views(pairs=torch.arange(n).view(-1, 2), gold=torch.arange(n).view(-1, 2)[:, 0], score=torch.rand(n, generator=g, dtype=F64))
    return TokenScores(logp, mask, {"ref": ref}), views


def odds(bound: float = 1e-6) -> dict[str, Any]:
    """Deviation of ORPO from -lam log[p_w (1 - p_l) / (p_w (1 - p_l) + p_l (1 - p_w))] - log p_w, of ASFT from (1 + lam) NLL_w - lam log(1 - p_l),
    and of gradient ratios |dL/dp_l| / |dL/dp_w| at p = .5, .001 from 500 (DPO) and .25 / (1 - .001) (ASFT, relative)."""
    scores, views = _batch()
    p = scores.means().exp()
    w, l = p[0::2], p[1::2]
    orpo = -0.1 * torch.log(w * (1 - l) / (w * (1 - l) + l * (1 - w))) - w.log()
    asft = loss_of("asft", coef=0.7)(scores, views) - (-1.7 * w.log() - 0.7 * torch.log(1 - l))
    found = [float((loss_of("orpo")(scores, views) - orpo).abs().max()), float(asft.abs().max())]
    probabilities = torch.tensor([0.5, 0.001], dtype=F64, requires_grad=True)
    pair = TokenScores(probabilities.log()[:, None], torch.ones(2, 1, dtype=torch.bool), {"ref": torch.zeros(2, 1, dtype=F64)})
    for m, ratio in (("dpo", 500.0), ("asft", 0.25 / 0.999)):
        (g,) = torch.autograd.grad(loss_of(m)(pair, PAIR).sum(), probabilities, retain_graph=True)
        found.append(abs(float(g[1].abs() / g[0].abs()) / ratio - 1.0))
    return at_most(found, bound)


def mipo(bound: float = 1e-4) -> dict[str, Any]:
    """Deviation from length-normalised DPO at K = 15 and from SimPO without margin at K = -15."""
    scores, views = _batch()
    found = []
    for K, other in ((15.0, Difference(Score("mean"))), (-15.0, Difference(Score("mean", ())))):
        level = torch.where(torch.arange(64)[:, None] % 2 == 0, K, 0.0).to(F64).expand_as(scores.logp)
        moved = dataclasses.replace(scores, logp_ref={"ref": level})
        found.append(float((loss_of("mipo", beta=1.0)(moved, views) - Pairwise(1.0, other)(moved, views)).abs().max()))
    return at_most(found, bound)


def identities(method: str, bound: float = 1e-6) -> dict[str, Any]:
    """tpo: gold = chosen is CPO. pro: two responses give phi(g (s_1 - s_2)). exo/pair and cDPO agree with their formulas. Largest deviation."""
    scores, views = _batch()
    s, mean = scores.sums(), scores.means()
    if method == "tpo":
        expected = F.softplus(-0.01 * (s[0::2] - s[1::2])) - mean[0::2]
        found = loss_of("tpo")(scores, views) - expected
    elif method == "pro":
        gap = views.score[0::2] - views.score[1::2]  # type: ignore[index]
        expected = F.softplus(-gap.abs() * torch.sign(gap) * (mean[0::2] - mean[1::2]))
        found = loss_of("pro", best_nll=0.0)(scores, dataclasses.replace(views, groups=views.pairs)) - expected
    else:
        l = scores.log_ratio()
        z = 0.1 * (l[0::2] - l[1::2])
        found = loss_of("dpo/cdpo")(scores, views) - (0.9 * F.softplus(-z) + 0.1 * F.softplus(z))
    return at_most([float(found.abs().max())], bound)


def iopo(seeds: int = 6) -> dict[str, Any]:
    """4 prompts that differ in one bit, tabular: accuracy of argmax_x pi(y | x), mean over seeds, against that of DPO on the two pairs apart."""
    accuracy = []
    for seed in range(seeds):
        rng = np.random.default_rng(1000 + seed)
        ref = torch.log_softmax(at(rng.standard_normal((4, 8))), -1)
        own = rng.permutation(8)[:4]  # the answer that fits each prompt
        crossed = [(x * 8 + own[x], v * 8 + own[v], x * 8 + own[v], v * 8 + own[x]) for x in range(4) for v in (x ^ 1, x ^ 2)]
        groups = torch.tensor(crossed)
        apart = Views(pairs=torch.cat([groups[:, [0, 2]], groups[:, [1, 3]]]))
        found = []
        for loss, views in ((Pairwise(0.1, Crossed()), Views(groups=groups)), (Pairwise(0.1), apart)):
            z = descend(lambda z, loss=loss, views=views: loss(bandit_scores(z, ref=ref), views).mean(), {"z": ref}, 300, 0.02)["z"]  # noqa: B023
            found.append(float((torch.log_softmax(z, -1)[:, own].argmax(0) == torch.arange(4)).double().mean()))
        accuracy.append(found)
    mean = np.mean(accuracy, 0)
    return {"measured": float(mean[0]), "bound": float(mean[1]), "holds": bool(mean[0] >= mean[1]), "each_iopo_dpo": accuracy}
