"""Claims of methods on lists: which divergence seeks a mode, what a baseline saves, and ranking weights against pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.listwise import InfoNCA, Listwise
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.pairwise import Hinge, Pairwise
from markovia.algos.preference.population import bandit_scores, descend
from markovia.algos.preference.scores import TokenScores
from markovia.claims.preference import F64, at, at_least, loss_of, reward_of
from markovia.envs.exact import PreferenceBandit


def lipo(seeds: int = 5, wanted: int = 4) -> dict[str, Any]:
    """10 lists of 8 per prompt, noisy win rates, beta 0.5, 300 steps: E r at least DPO's on best / worst pairs and hinge's on the same."""
    right, rewards = [], []
    for seed in range(seeds):
        rng, bandit = np.random.default_rng(1000 + seed), PreferenceBandit.random(seed=seed)
        groups = np.concatenate([x * 8 + rng.choice(8, (10, 8), p=np.exp(bandit.logp_ref[x])) for x in range(4)])
        r = bandit.reward.ravel()[groups]
        rate = np.clip(expit(r[:, :, None] - r[:, None]).mean(-1) + 0.1 * rng.standard_normal(r.shape), 0.0, 1.0)
        n = groups.size
        views = Views(groups=torch.arange(n).view(groups.shape), score=at(rate.ravel()))
        best, worst = rate.argmax(-1), rate.argmin(-1)
        rows = np.arange(len(groups)) * 8
        pairs = Views(pairs=torch.as_tensor(np.stack([rows + best, rows + worst], 1)))
        entry, ref = torch.as_tensor(groups.ravel()), at(bandit.logp_ref)
        found = []
        for loss, v in ((loss_of("lipo", beta=0.5), views), (Pairwise(0.5), pairs), (Pairwise(0.5, link=Hinge(1.0)), pairs)):

            def objective(z: Tensor, loss: Any = loss, v: Views = v) -> Tensor:
                scores = bandit_scores(z, ref=ref)  # noqa: B023 (called at once)
                return loss(TokenScores(scores.logp[entry], scores.mask[entry], {"ref": scores.logp_ref["ref"][entry]}), v).mean()  # noqa: B023

            found.append(reward_of(torch.log_softmax(descend(objective, {"z": ref}, 300, 0.05)["z"], -1), bandit))
        rewards.append(found)
        right.append(found[0] >= max(found[1:]))
    return at_least(sum(right), wanted, mean_reward_lipo_dpo_hinge=np.mean(rewards, 0).tolist())


def exo(bound: float = 2.0) -> dict[str, Any]:
    """A Gaussian of width 3 over 50 responses, its mean trained from 25 towards an optimum with modes at 10 (60 %) and 40 (40 %): distance of
    EXO's mean to the nearest mode; InfoNCA ends between 15 and 35; KL(pi || pi*) is smaller for EXO."""
    y = torch.arange(50, dtype=F64)
    modes = 0.6 * torch.softmax(-0.5 * ((y - 10) / 1.5) ** 2, -1) + 0.4 * torch.softmax(-0.5 * ((y - 40) / 1.5) ** 2, -1)
    optimum = torch.log((modes + 1e-3) / (modes + 1e-3).sum())
    ref = torch.full((1, 50), -float(np.log(50)), dtype=F64)
    views = Views(groups=torch.arange(50)[None], score=optimum)  # r / beta_r = log pi* - log ref up to a constant
    means, kl = {}, {}
    for name, inner in (("exo", PREFERENCE["exo"].value.loss.loss), ("info-nca", InfoNCA(1.0))):
        loss = Listwise(PREFERENCE["pro"].value.loss.score, 1.0, inner)

        def objective(mean: Tensor, loss: Listwise = loss) -> Tensor:
            return loss(bandit_scores(-0.5 * ((y - mean) / 3.0)[None] ** 2, ref=ref), views).sum()

        means[name] = float(descend(objective, {"mean": at(25.0)}, 3000, 0.05)["mean"])
        logp = torch.log_softmax(-0.5 * ((y - means[name]) / 3.0) ** 2, -1)
        kl[name] = float((logp.exp() * (logp - optimum)).sum())
    distance = min(abs(means["exo"] - m) for m in (10, 40))
    holds = distance <= bound and 15 <= means["info-nca"] <= 35 and kl["exo"] < kl["info-nca"]
    return {"measured": distance, "bound": bound, "holds": holds, "mean": means, "kl_nats": kl}


def brain(bound: float = 3.0, draws: int = 1000) -> dict[str, Any]:
    """Half way to the posterior, 4 responses per list: variance of the gradient estimate without the self-normalised baseline over that with it,
    least of temperatures 0.5, 1, 2; at 64 responses both have the same mean direction (cosine above 0.95)."""
    ratios, cosines = [], []
    for seed, g in enumerate((0.5, 1.0, 2.0)):
        bandit = PreferenceBandit.random(prompts=1, seed=seed)
        logp = torch.log_softmax(at(bandit.logp_ref[0]) + at(bandit.reward[0]) / (2 * g), -1)
        with_b, without = _brain_gradients(bandit, logp, g, 4, draws, seed)
        ratios.append(float(without.var(0).sum() / with_b.var(0).sum()))
        a, b = (x.mean(0) for x in _brain_gradients(bandit, logp, g, 64, draws, seed))
        cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
    out = at_least(min(ratios), bound, ratios=ratios, cosines=cosines)
    return {**out, "holds": out["holds"] and min(cosines) > 0.95}


def _brain_gradients(bandit: PreferenceBandit, logp: Tensor, g: float, n: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """(draws, Y) gradients in the logits of the list loss, and of sum A_i log pi(y_i) without B; proposal = prior = reference."""
    rng = np.random.default_rng(1000 + seed)
    rows = torch.as_tensor(rng.choice(bandit.Y, (draws, n), p=np.exp(bandit.logp_ref[0])))
    reward, ref = at(bandit.reward[0]), at(bandit.logp_ref[0])
    loss = loss_of("brain", loss=InfoNCA(g))
    z = logp.repeat(draws, 1).requires_grad_()  # a copy of the logits per draw, so that gradients stay apart
    taken = torch.log_softmax(z, -1).gather(1, rows).reshape(-1, 1)
    anchor = ref[rows].reshape(-1, 1)
    scores = TokenScores(taken, torch.ones_like(taken, dtype=torch.bool), {"ref": anchor, "proposal": anchor})
    views = Views(groups=torch.arange(draws * n).view(draws, n), score=reward[rows].flatten())
    (with_b,) = torch.autograd.grad(loss(scores, views).sum(), z, retain_graph=True)
    A = torch.softmax(reward[rows] / g, -1)
    (without,) = torch.autograd.grad(-(A * taken.view(draws, n)).sum(), z)
    return with_b, without
