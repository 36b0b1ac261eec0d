"""Claims of self-play methods on games without an equilibrium in pure responses: exact iterations, and training where the claim is about descent."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.anchors import extrapolate
from markovia.algos.preference.pairwise import Difference, Pairwise, Squared
from markovia.algos.preference.pieces import Given
from markovia.algos.preference.population import bandit_scores, descend, minimise, total_variation, weighted_mean
from markovia.algos.preference.scores import Score
from markovia.claims.preference import at, at_most, loss_of
from markovia.envs.exact import PreferenceGame


def every_pair(game: PreferenceGame) -> tuple[Views, Tensor, Tensor]:
    """All ordered pairs with their probability q, and the two responses of each."""
    first, second = (torch.as_tensor(i) for i in np.nonzero(np.ones((game.K, game.K))))
    return Views(pairs=torch.stack([first, second], 1), q=at(game.P)[first, second]), first, second


def minimum(loss: Pairwise, game: PreferenceGame, views: Views, weight: Tensor, **anchors: Tensor) -> Tensor:
    """log pi (K,) at the minimum of the weighted mean of a loss."""
    ref = at(game.logp_ref)

    def objective(z: Tensor) -> Tensor:
        return weighted_mean(loss(bandit_scores(z[None], ref=ref[None], **anchors), views), weight)

    return torch.log_softmax(minimise(objective, ref), -1)


def kl(target: np.ndarray, logp: np.ndarray) -> float:
    """KL(target || pi), nats."""
    return float(np.exp(target) @ (target - logp))


def online_ipo(tau: float = 0.5, bound: float = 1e-3, seeds: int = 5) -> dict[str, Any]:
    """Online IPO (y, y' ~ sg pi, soft labels) by gradient descent: exploitability of the regularised game; its gradient equals -4/tau times the
    self-play direction (largest deviation, at most 1e-8). With certain labels IPO's margin ends at 1 / (2 tau) and DPO's does not stop."""
    found, deviations = [], []
    for seed in range(seeds):
        game = PreferenceGame.random(seed=seed)
        views, first, second = every_pair(game)
        ref, P, loss = at(game.logp_ref), at(game.P), Pairwise(1.0, link=Squared(tau), label=Given())

        def objective(z: Tensor) -> Tensor:
            pi = torch.softmax(z, -1).detach()
            return (pi[first] * pi[second] * loss(bandit_scores(z[None], ref=ref[None]), views)).sum()  # noqa: B023 (called at once)

        z = at(np.random.default_rng(1000 + seed).standard_normal(game.K)).requires_grad_()
        logp = torch.log_softmax(z, -1)
        ascent = (logp.exp() * (P @ logp.exp().detach() - 0.5 - tau * (logp - ref))).sum()
        pair = (torch.autograd.grad(f, z)[0] for f in (objective(z), ascent))
        deviations.append(float((next(pair) + 4.0 / tau * next(pair)).abs().max()))
        logits = descend(objective, {"z": ref}, 2000, 0.02)["z"]
        found.append(game.exploitability(torch.softmax(logits, -1).numpy(), tau))
    margins = _certain_margins(tau)
    out = at_most(found, bound, gradient_deviation=max(deviations), margin_ipo_dpo=margins, target_margin=0.5 / tau)
    return {**out, "holds": out["holds"] and max(deviations) <= 1e-8 and abs(margins[0] - 0.5 / tau) < 1e-3 and margins[1] > 5 * margins[0]}


def _certain_margins(tau: float) -> tuple[float, float]:
    ref = torch.zeros(1, 3, dtype=torch.float64)
    views, found = Views(pairs=torch.tensor([[0, 1]])), []
    for loss in (Pairwise(1.0, link=Squared(tau)), Pairwise(tau)):
        z = descend(lambda z, loss=loss: loss(bandit_scores(z, ref=ref.log_softmax(-1)), views).sum(), {"z": ref}, 3000, 0.05)["z"]
        found.append(float(z[0, 0] - z[0, 1]))
    return found[0], found[1]


def ipo_md(tau: float = 0.5, mix: float = 0.5, bound: float = 1e-6, seeds: int = 5) -> dict[str, Any]:
    """Against responses of the mixture pi^(1-b) ref^b, IPO's minimum is one damped step ref e^(P(y > mix) / tau); iterated, it has a fixed point.
    Measured is the largest total variation between trained step and closed form, and between the last two iterates (both at most the bound)."""
    found = []
    for seed in range(seeds):
        game = PreferenceGame.random(seed=seed)
        views, first, second = every_pair(game)
        ref, logp, moved = at(game.logp_ref), at(game.logp_ref), 1.0
        for _ in range(12):
            mixed = torch.log_softmax((1.0 - mix) * logp + mix * ref, -1)
            weight = mixed.exp()[first] * mixed.exp()[second]
            step = minimum(Pairwise(1.0, link=Squared(tau), label=Given()), game, views, weight)
            closed = at(game.response(game.logp_ref, mixed.numpy(), tau))
            found.append(float(total_variation(step, closed)))
            moved, logp = float(total_variation(step, logp)), step
        found.append(moved)
    return at_most(found, bound)


def sppo(bound: float = 0.06, seeds: int = 5) -> dict[str, Any]:
    """Duality gap of the average of 1000 exact iterations pi e^(eta P), eta 0.1; DPO at its population minimum on pairs of the reference with labels
    of the same P (beta 0.05) has a gap above 0.15."""
    average, dpo = [], []
    for seed in range(seeds):
        game = PreferenceGame.random(seed=seed)
        logp, mean = game.logp_ref, np.zeros(game.K)
        for _ in range(1000):
            mean += np.exp(logp) / 1000
            logp = game.response(logp, logp, 10.0)
        average.append(game.duality_gap(mean))
        views, first, second = every_pair(game)
        ref = at(game.logp_ref).exp()
        logp_dpo = minimum(Pairwise(0.05, label=Given()), game, views, ref[first] * ref[second] * (first != second))
        dpo.append(game.duality_gap(logp_dpo.exp().numpy()))
    out = at_most(average, bound, gap_of_dpo=dpo)
    return {**out, "holds": out["holds"] and min(dpo) > 0.15}


def inpo(tau: float = 0.1, eta: float = 1.0, bound: float = 1e-3, seeds: int = 5) -> dict[str, Any]:
    """KL from the regularised equilibrium to the last iterate after 60 iterations; the trained step equals its closed form (largest total variation,
    at most 1e-6); without regularisation (tau 0) the duality gap stays above 0.05 in iterations 150 to 300."""
    found, steps, cycling = [], [], []
    for seed in range(seeds):
        game = PreferenceGame.random(seed=seed)
        views, first, second = every_pair(game)
        old = torch.log_softmax(at(game.logp_ref) + at(np.random.default_rng(1000 + seed).standard_normal(game.K)), -1)
        diff = Difference(Score(anchors=(("ref", tau / eta), ("old", 1 - tau / eta))))
        loss = loss_of("inpo", diff=diff, link=Squared(eta), label=Given())
        closed = game.response(tau / eta * game.logp_ref + (1 - tau / eta) * old.numpy(), old.numpy(), eta)
        found_step = minimum(loss, game, views, old.exp()[first] * old.exp()[second], old=old[None])
        steps.append(float(total_variation(found_step, at(closed))))
        end, logp = game.equilibrium(tau, damping=0.1), game.logp_ref
        for _ in range(60):
            logp = game.response(tau / eta * game.logp_ref + (1 - tau / eta) * logp, logp, eta)
        found.append(kl(end, logp))
        logp = game.logp_ref
        for t in range(300):
            logp = game.response(logp, logp, eta)
            if t >= 150:
                cycling.append(game.duality_gap(np.exp(logp)))
    out = at_most(found, bound, step_total_variation=max(steps), least_gap_without_regularisation=min(cycling))
    return {**out, "holds": out["holds"] and max(steps) <= 1e-6 and min(cycling) > 0.05}


def mirror_prox(beta: float = 0.1, seeds: int = 5) -> dict[str, Any]:
    """Largest contraction of KL(equilibrium || pi_k) per iteration with eta = 2 beta, which is at most 1 / (1 + 2 beta); Nash-MD with its theoretical
    steps needs more than 3 times the iterations to 1e-6; the rate is the same for K = 64 (within 0.05)."""
    bound, rates, ratio = 1.0 / (1.0 + 2.0 * beta), [], []
    for seed in range(seeds):
        game = PreferenceGame.random(seed=seed)
        rate, prox = _prox_rate(game, beta)
        rates.append(rate)
        end, logp, t = game.equilibrium(beta, damping=0.1), game.logp_ref, 0
        while kl(end, logp) > 1e-6 and t < 5000:
            logp = game.nash_md(logp, 2.0 / (beta * (t + 2)), beta)
            t += 1
        ratio.append(t / prox)
    large = _prox_rate(PreferenceGame.random(K=64, seed=0), beta)[0]
    holds = max(rates) <= bound and min(ratio) > 3 and abs(large - float(np.mean(rates))) < 0.05
    return {"measured": max(rates), "bound": bound, "holds": holds, "rates": rates, "rate_64": large, "nash_md_over_prox": ratio}


def _prox_rate(game: PreferenceGame, beta: float) -> tuple[float, int]:
    """Largest ratio of successive KLs down to 1e-10, and the iterations to 1e-6."""
    end, logp = game.equilibrium(beta, damping=0.1, tolerance=1e-13), game.logp_ref
    found = [kl(end, logp)]
    while found[-1] > 1e-10:
        logp = game.mirror_prox(logp, beta, 2.0 * beta)
        found.append(kl(end, logp))
    ratios = [b / a for a, b in itertools.pairwise(found)]
    return max(ratios), next(i for i, v in enumerate(found) if v <= 1e-6)


def nash_md(tau: float = 0.5, bound: float = 1e-3, seeds: int = 5) -> dict[str, Any]:
    """Exact Nash-MD with eta 0.5: KL from the regularised equilibrium to the last of 200 iterates. The sampled method's expected gradient is zero
    there, up to the mixture: opponent mix ~ pi^(1-b) ref^b with b 0."""
    found = []
    for seed in range(seeds):
        game = PreferenceGame.random(seed=seed)
        end, logp = game.equilibrium(tau), game.logp_ref
        for t in range(200):
            logp = game.nash_md(logp, 2.0 / (tau * (t + 2)), tau)
        found.append(kl(end, logp))
        z = at(end).requires_grad_()
        views = Views(unpaired=torch.arange(game.K), score=at(game.win_rate(np.exp(end))))
        loss = loss_of("ipo/nash-md", price=(("ref", tau),))
        value = (at(np.exp(end)) * loss(bandit_scores(z[None], ref=at(game.logp_ref)[None]), views)).sum()
        found.append(float(torch.autograd.grad(value, z)[0].abs().max()))
    return at_most(found, bound)


def accelerated(bound: float = 0.05) -> dict[str, Any]:
    """Rounds of DPO at its population minimum, extrapolated with momentum a: growth per round of the log-ratio's coefficient of r / beta, relative to
    1 / (1 - a), from round 6 on, for a in 0, 0.3, 0.6. Measured is the largest relative deviation."""
    rng = np.random.default_rng(0)
    ref, r = log_softmax(rng.standard_normal((4, 8)), axis=-1), rng.standard_normal((4, 8))
    r = r - r.mean(-1, keepdims=True)
    deviations = []
    for a in (0.0, 0.3, 0.6):
        logp = fitted = ref
        for t in range(12):
            new = log_softmax(logp + r, axis=-1)
            growth = float(((new - fitted) * r).sum() / (r**2).sum())
            moved = extrapolate(at(new), at(fitted), momentum=a)
            logp, fitted = torch.log_softmax(moved, -1).numpy(), new
            if t >= 6:
                deviations.append(abs(growth * (1 - a) - 1.0))
    return at_most(deviations, bound)
