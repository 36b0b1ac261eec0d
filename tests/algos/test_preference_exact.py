"""Population minimisers of the preference losses on problems whose optimum is known: bandit, token tree, preference game, displacement."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from markovia.agents.records import Views
from markovia.algos.preference.anchors import extrapolate, soft_sync
from markovia.algos.preference.listwise import EXO, NCA, InfoNCA, Listwise
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.pairwise import Difference, Pairwise, Residual, Squared
from markovia.algos.preference.pieces import Given, OtherRewards, ScoreGap
from markovia.algos.preference.population import bandit_scores, minimise, total_variation, tree_scores, weighted_mean
from markovia.algos.preference.scores import Score, TokenScores
from markovia.algos.preference.sources import judged
from markovia.algos.preference.unpaired import DRO, Pointwise, WinRate
from markovia.algos.presets import override
from markovia.envs.exact import EnumerableTokenMDP, PreferenceBandit, PreferenceGame

torch.set_num_threads(1)
F64 = torch.float64


def at(x: Any) -> torch.Tensor:
    return torch.as_tensor(x, dtype=F64)


def set_(method_id: str, **changes: Any) -> Any:
    return dataclasses.replace(PREFERENCE[method_id].value.loss, **changes)


def bandit_minimiser(loss: Any, bandit: PreferenceBandit, views: Views, weight: Any = None, **anchors: Any) -> torch.Tensor:
    """log pi (X, Y) at the minimum of the weighted mean of a loss, started from the reference."""
    ref = at(bandit.logp_ref)
    tables = {"ref": ref, **{k: at(v) for k, v in anchors.items()}}

    def objective(z: torch.Tensor) -> torch.Tensor:
        value = loss(bandit_scores(z, **tables), views)
        return value.mean() if weight is None else weighted_mean(value, at(weight))

    return torch.log_softmax(minimise(objective, ref), -1)


@pytest.fixture(scope="module")
def bandit() -> PreferenceBandit:
    return PreferenceBandit.random()


@pytest.fixture(scope="module")
def pairs(bandit: PreferenceBandit) -> tuple[Views, np.ndarray]:
    index, weight = bandit.pairs()
    return Views(pairs=torch.as_tensor(index), score=at(bandit.reward.ravel())), weight


# -- rewards: every regularised optimum ------------------------------------------------------------------------------------------------------


def test_dpo_on_the_bandit(bandit: PreferenceBandit, pairs: Any) -> None:
    found = bandit_minimiser(Pairwise(0.5), bandit, *pairs)
    assert total_variation(found, at(bandit.kl_optimum(0.5))) < 1e-6


@pytest.mark.parametrize(
    ("method_id", "divergence", "alpha"), [("f-dpo", "js", None), ("f-dpo/forward-kl", "kl_ref_pi", None), ("f-dpo/alpha", "alpha", 0.5)]
)
def test_f_dpo_on_the_bandit(method_id: str, divergence: str, alpha: float | None, bandit: PreferenceBandit, pairs: Any) -> None:
    found = bandit_minimiser(set_(method_id, beta=0.5), bandit, *pairs)
    assert total_variation(found, at(bandit.f_optimum(0.5, divergence, alpha)).log()) < 1e-5


def test_squared_po_on_the_bandit() -> None:
    bandit = PreferenceBandit.random(scale=0.5)
    index, weight = bandit.pairs()
    found = bandit_minimiser(set_("squared-po", beta=4.0), bandit, Views(pairs=torch.as_tensor(index)), weight)
    assert total_variation(found, at(bandit.squared_log_optimum(4.0)).log()) < 1e-5
    with pytest.raises(ValueError, match="raise beta"):
        PreferenceBandit(np.array([[-5.0, 0.0, 0.0]]), np.array([[5.0, 0.0, 0.0]])).squared_log_optimum(0.5)


def test_entropy_of_h_dpo_rises_with_alpha(bandit: PreferenceBandit, pairs: Any) -> None:
    entropies = []
    for alpha in (0.8, 1.0, 1.2):
        found = bandit_minimiser(set_("h-dpo", beta=0.5, diff=Difference(Score(policy=alpha))), bandit, *pairs)
        closed = torch.log_softmax(at(bandit.logp_ref) / alpha + at(bandit.reward) / (alpha * 0.5), -1)
        assert total_variation(found, closed) < 1e-6
        entropies.append(float(-(found.exp() * found).sum()))
    assert entropies == sorted(entropies)


def test_modpo_and_sequential_po_with_two_rewards(bandit: PreferenceBandit) -> None:
    second = np.random.default_rng(1).standard_normal(bandit.reward.shape)
    both = torch.stack([at(bandit.reward).flatten(), at(second).flatten()], 1)
    index, weight = bandit.pairs()
    views = Views(pairs=torch.as_tensor(index), score=both)
    for w in (0.2, 0.7):
        loss = Pairwise(0.5, margin=OtherRewards((0.0, 1 - w)), temperature=w)
        closed = torch.log_softmax(at(bandit.logp_ref) + at(w * bandit.reward + (1 - w) * second) / 0.5, -1)
        assert total_variation(bandit_minimiser(loss, bandit, views, weight), closed) < 1e-6
    # round 2 on the first reward, after a round on the second whose optimum is known
    stage1 = torch.log_softmax(at(bandit.logp_ref) + at(second) / 0.5, -1)
    found = bandit_minimiser(set_("spo-seq", beta=0.5), bandit, views, weight, stage0=bandit.logp_ref, stage1=stage1)
    closed = torch.log_softmax(stage1 + at(bandit.reward + second) / 0.5, -1)
    assert total_variation(found, closed) < 1e-6


def test_regression_on_rewards_and_on_votes(bandit: PreferenceBandit, pairs: Any) -> None:
    """rebel: pi_t e^(eta r); copg: ref e^(r / beta); irepo: pi_t e^(r / beta) from win probabilities. Any data with full support will do."""
    views, weight = pairs
    old = torch.log_softmax(at(bandit.logp_ref) + at(np.random.default_rng(2).standard_normal(bandit.reward.shape)), -1)
    rebel = set_("rebel", margin=ScoreGap(0.5))
    found = bandit_minimiser(rebel, bandit, views, old=old)
    assert total_variation(found, torch.log_softmax(old + 0.5 * at(bandit.reward), -1)) < 1e-6
    found = bandit_minimiser(set_("copg", beta=0.5), bandit, views)
    assert total_variation(found, at(bandit.kl_optimum(0.5))) < 1e-6
    votes = dataclasses.replace(views, q=at(weight))
    found = bandit_minimiser(set_("irepo", beta=0.5, margin=type(set_("irepo").margin)(10_000)), bandit, votes, old=old)
    assert total_variation(found, torch.log_softmax(old + at(bandit.reward) / 0.5, -1)) < 1e-5


@pytest.mark.check("limit", "dro")
def test_dro_finds_the_optimum_and_its_value(bandit: PreferenceBandit) -> None:
    """The loss keeps policy and value apart (each holds the other fixed); at the joint optimum both gradients vanish, and only there."""
    tau, ref = 0.7, at(bandit.logp_ref)
    views = Views(unpaired=torch.arange(bandit.X * bandit.Y), score=at(bandit.reward).flatten())
    weight = ref.exp().flatten()

    def gradients(logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, value = logits.clone().requires_grad_(), value.clone().requires_grad_()
        scores = dataclasses.replace(bandit_scores(logits, ref=ref), value=value.repeat_interleave(bandit.Y))
        return torch.autograd.grad(weighted_mean(Pointwise(DRO(tau))(scores, views), weight), (logits, value))

    optimum, value = at(bandit.kl_optimum(tau)), at(bandit.optimal_value(tau))
    assert max(float(g.abs().max()) for g in gradients(optimum, value)) < 1e-12
    assert min(float(g.abs().max()) for g in gradients(ref, value)) > 1e-3

    def joint(x: torch.Tensor) -> torch.Tensor:
        l = torch.log_softmax(x[:, 1:], -1) - ref
        return (ref.exp() * 0.5 * (at(bandit.reward) - x[:, :1] - tau * l).square()).sum()

    found = minimise(joint, torch.cat([torch.zeros(bandit.X, 1, dtype=F64), ref], 1))
    assert total_variation(torch.log_softmax(found[:, 1:], -1), optimum) < 1e-6 and float((found[:, 0] - value).abs().max()) < 1e-6


def test_exact_lists_seek_the_optimum_and_exo_is_the_reverse_kl(bandit: PreferenceBandit) -> None:
    """A list of all responses, log ref added to both sides: minimum at pi*, and EXO's value is KL(pi || pi*)."""
    views = Views(groups=torch.arange(bandit.X * bandit.Y).view(bandit.X, bandit.Y), score=at(bandit.reward).flatten())
    optimum, prior = at(bandit.kl_optimum(0.5)), (("ref", 1.0),)
    for loss in (EXO(0.5), InfoNCA(0.5)):
        full = Listwise(Score(anchors=()), 1.0, loss, prior)
        assert total_variation(bandit_minimiser(full, bandit, views), optimum) < 1e-5
    logits = torch.randn(bandit.X, bandit.Y, dtype=F64, generator=torch.Generator().manual_seed(0))
    logp = torch.log_softmax(logits, -1)
    found = Listwise(Score(anchors=()), 1.0, EXO(0.5), prior)(bandit_scores(logits, ref=at(bandit.logp_ref)), views)
    torch.testing.assert_close(found, (logp.exp() * (logp - optimum)).sum(-1))


def test_exo_and_nca_on_sampled_lists_of_scored_responses(bandit: PreferenceBandit) -> None:
    """Lists of all responses from the reference: EXO with beta_pi = beta, beta_r = 1 has the minimiser ref e^(r / beta); NCA's residuals vanish at
    e^m_i = K q_i up to the sum constraint of a tabular policy, so without the constraint (free scores) exactly there."""
    views = Views(groups=torch.arange(bandit.X * bandit.Y).view(bandit.X, bandit.Y), score=at(bandit.reward).flatten())
    found = bandit_minimiser(Listwise(beta=0.5, loss=EXO(1.0)), bandit, views)
    assert total_variation(found, at(bandit.kl_optimum(0.5))) < 1e-5
    zero = torch.zeros(bandit.X * bandit.Y, 1, dtype=F64)
    free = minimise(lambda m: Listwise(beta=1.0, loss=NCA(1.0))(TokenScores(m, zero == 0, {"ref": zero}), views).sum(), zero)
    q = torch.softmax(at(bandit.reward), -1)
    torch.testing.assert_close(free.view(bandit.X, bandit.Y), (bandit.Y * q).log(), rtol=0, atol=1e-6)


def test_nca_holds_the_chosen_log_ratio_at_log_2_where_dpo_does_not() -> None:
    """One pair of 8 responses, beta 1, ref(w) = .1."""
    ref = torch.log(torch.tensor([[0.1, *[0.9 / 7] * 7]], dtype=F64))
    views = Views(pairs=torch.tensor([[0, 1]]))
    bandit = PreferenceBandit(ref.numpy(), np.zeros((1, 8)))
    chosen = {m: float((bandit_minimiser(set_(m, beta=1.0), bandit, views) - ref)[0, 0]) for m in ("nca/pair", "dpo")}
    assert abs(chosen["nca/pair"] - np.log(2)) < 0.05 * np.log(2) and chosen["dpo"] > 1.0


# -- token by token ---------------------------------------------------------------------------------------------------------------------------


def test_dpo_on_the_token_tree_with_a_tabular_policy() -> None:
    tree = EnumerableTokenMDP.random(V=4, H=3, seed=0)
    first, second = np.nonzero(~np.eye(tree.M, dtype=bool))
    views = Views(pairs=torch.as_tensor(np.stack([first, second], 1)))
    weight = torch.sigmoid(at(tree.R[first] - tree.R[second]))
    found = minimise(lambda z: weighted_mean(Pairwise(0.5)(tree_scores(tree, z), views), weight), at(tree.logits_ref))
    assert total_variation(tree.sequence_logp(found), at(tree.kl_optimum(0.5)[0])) < 1e-4


def test_token_scores_of_the_tree() -> None:
    """Sums are sequence log-probs; KL(ref || pi) summed over a sequence's prefixes has the law's KL as its mean under ref; uniform collision."""
    tree = EnumerableTokenMDP.random(V=3, H=3, seed=1, eos=2)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(tree.num_prefixes, tree.V, generator=g, dtype=F64)
    scores = tree_scores(tree, logits)
    torch.testing.assert_close(scores.sums(), tree.sequence_logp(logits))
    ref = at(tree.logp_ref)
    kl = (ref.exp() * (ref - scores.sums())).sum()
    torch.testing.assert_close((ref.exp() * scores.sums(scores.kl_ref)).sum(), kl)
    uniform = tree_scores(tree, torch.zeros_like(logits))
    torch.testing.assert_close(uniform.collision, torch.full_like(uniform.collision, -np.log(3)))


# -- games ------------------------------------------------------------------------------------------------------------------------------------


def all_pairs(game: PreferenceGame) -> tuple[Views, torch.Tensor, torch.Tensor]:
    """Every ordered pair (y, y') with its probability q, and the two indices."""
    first, second = (torch.as_tensor(i) for i in np.nonzero(np.ones((game.K, game.K))))
    return Views(pairs=torch.stack([first, second], 1), q=at(game.P)[first, second]), first, second


@pytest.fixture(scope="module")
def game() -> PreferenceGame:
    return PreferenceGame.random(seed=3)


def game_minimiser(loss: Any, game: PreferenceGame, views: Views, weight: torch.Tensor, **anchors: Any) -> torch.Tensor:
    tables = {k: at(v)[None] for k, v in {"ref": game.logp_ref, **anchors}.items()}
    found = minimise(lambda z: weighted_mean(loss(bandit_scores(z[None], **tables), views), weight), at(game.logp_ref))
    return torch.log_softmax(found, -1)


def test_offline_ipo_with_soft_labels_and_inpo_are_the_step_of_mirror_descent(game: PreferenceGame) -> None:
    """Pairs y, y' ~ mu x mu: IPO has the minimum ref e^(P(y > mu) / tau), INPO ref^(tau/eta) old^(1 - tau/eta) e^(P(y > old) / eta)."""
    views, first, second = all_pairs(game)
    old = torch.log_softmax(at(game.logp_ref) + at([0.3, -0.2, 0.1, 0.4]), -1)
    weight = old.exp()[first] * old.exp()[second]
    found = game_minimiser(Pairwise(1.0, link=Squared(0.5), label=Given()), game, views, weight)
    assert total_variation(found, at(game.response(game.logp_ref, old.numpy(), 0.5))) < 1e-6
    tau, eta = 0.3, 0.9
    inpo = set_("inpo", diff=Difference(Score(anchors=(("ref", tau / eta), ("old", 1 - tau / eta)))), link=Squared(eta), label=Given())
    centre = tau / eta * game.logp_ref + (1 - tau / eta) * old.numpy()
    found = game_minimiser(inpo, game, views, weight, old=old)
    assert total_variation(found, at(game.response(centre, old.numpy(), eta))) < 1e-6


def test_online_ipo_gradient_is_self_play_and_its_fixed_point_the_equilibrium(game: PreferenceGame) -> None:
    """With y, y' ~ sg pi: gradient = -(4 / tau) (E[(P - 1/2) grad S] - tau grad KL(pi || ref))."""
    tau = 0.5
    views, first, second = all_pairs(game)
    logits = torch.randn(game.K, generator=torch.Generator().manual_seed(2), dtype=F64).requires_grad_()
    logp = torch.log_softmax(logits, -1)
    pi, ref = logp.exp(), at(game.logp_ref)
    weight = (pi[first] * pi[second]).detach()
    loss = Pairwise(1.0, link=Squared(tau), label=Given())(bandit_scores(logits[None], ref=ref[None]), views)
    (found,) = torch.autograd.grad((weight * loss).sum(), logits, retain_graph=True)
    rate = at(game.P) @ pi.detach()
    ascent = (pi.detach() * (rate - 0.5) * logp).sum() - tau * (pi * (logp - ref)).sum()
    torch.testing.assert_close(found, -4.0 / tau * torch.autograd.grad(ascent, logits)[0], rtol=0, atol=1e-10)
    # Following it to its end gives the regularised equilibrium.
    equilibrium = at(game.equilibrium(tau))
    at_end = equilibrium.clone().requires_grad_()
    weight = equilibrium.exp()[first] * equilibrium.exp()[second]
    loss = Pairwise(1.0, link=Squared(tau), label=Given())(bandit_scores(at_end[None], ref=ref[None]), views)
    assert float(torch.autograd.grad((weight * loss).sum(), at_end)[0].abs().max()) < 1e-8
    assert game.exploitability(equilibrium.exp().numpy(), tau) < 1e-9 < 1e-3 < game.exploitability(np.exp(game.logp_ref), tau)


@pytest.mark.check("limit", "ipo/nash-md", "nash-mp")
def test_nash_md_and_mirror_prox_surrogates_have_the_gradient_of_their_objective(game: PreferenceGame) -> None:
    """E over rows sampled from pi of the surrogate's gradient is that of E[P(y > opponent)] - sum_k c_k KL(pi || anchor_k)."""
    ref, old = at(game.logp_ref), at([0.1, -0.4, 0.2, 0.0]).log_softmax(-1)
    logits = torch.randn(game.K, generator=torch.Generator().manual_seed(3), dtype=F64).requires_grad_()
    logp = torch.log_softmax(logits, -1)
    rate = at(game.P) @ old.exp()
    views = Views(unpaired=torch.arange(game.K), score=rate)
    loss = dataclasses.replace(set_("ipo/nash-md"), price=(("ref", 0.3), ("old", 0.2)))
    surrogate = loss(bandit_scores(logits[None], ref=ref[None], old=old[None]), views)
    (found,) = torch.autograd.grad((logp.exp().detach() * surrogate).sum(), logits, retain_graph=True)
    objective = (logp.exp() * (rate - 0.3 * (logp - ref) - 0.2 * (logp - old))).sum()
    exact = -torch.autograd.grad(objective, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    # Rows of the sampler, each counted pi / old, have the same gradient; with their ratio cut at 1 they have another.
    for cut, same in ((1e6, True), (1.0, False)):
        surrogate = dataclasses.replace(loss, max_ratio=cut)(bandit_scores(logits[None], ref=ref[None], old=old[None]), views)
        (found,) = torch.autograd.grad((old.exp() * surrogate).sum(), logits, retain_graph=True)
        assert torch.allclose(found, exact, rtol=0, atol=1e-12) == same


def test_self_play_near_a_target_that_follows_ends_at_the_regularised_equilibrium(game: PreferenceGame) -> None:
    """nash-mp's expected gradient, the opponent being the policy itself: whatever the price on a target that comes after, it vanishes in the end."""
    ref, tau = at(game.logp_ref), 0.1
    logits, target = ref.clone().requires_grad_(), ref.clone()
    loss = dataclasses.replace(set_("nash-mp"), baseline="half", max_ratio=None)
    assert loss.price == (("ref", tau), ("target", 0.5))
    for _ in range(4000):
        logp = torch.log_softmax(logits, -1)
        views = Views(unpaired=torch.arange(game.K), score=at(game.P) @ logp.detach().exp())
        surrogate = loss(bandit_scores(logits[None], ref=ref[None], target=target.log_softmax(-1)[None]), views)
        (grad,) = torch.autograd.grad((logp.exp().detach() * surrogate).sum(), logits)
        with torch.no_grad():
            logits -= grad
            target = soft_sync(target, logits, rate=0.05)
    assert total_variation(torch.log_softmax(logits.detach(), -1), at(game.equilibrium(tau))) < 1e-4


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("baseline", ["others", "half"])
def test_rounds_of_self_play_have_the_gradient_of_the_win_rate_against_oneself(K: int, baseline: str) -> None:
    """nash-mp on every group of K responses, judged as a round's are: its mean gradient is that of P(y > pi) exactly, prices left out."""
    method = override(PREFERENCE["nash-mp"].value, {"loss": {"price": [["ref", 0.0], ["target", 0.0]], "baseline": baseline}})
    reward, logits = at([0.7, -0.3, 1.1, 0.0]), torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=F64).requires_grad_()
    logp = torch.log_softmax(logits, -1)
    groups = torch.cartesian_prod(*[torch.arange(4)] * K)
    rows = torch.arange(groups.numel())
    anchors = {name: logp.detach()[groups].view(-1, 1) for name in ("ref", "target", "old")}
    scores = TokenScores(logp[groups].view(-1, 1), torch.ones(len(rows), 1, dtype=torch.bool), anchors)
    surrogate = method(scores, Views(groups=rows.view(-1, K), unpaired=rows, score=judged(method, reward[groups]).flatten()))
    each = surrogate if baseline == "others" else surrogate.view(-1, K).mean(1)
    (found,) = torch.autograd.grad((logp.detach()[groups].sum(1).exp() * each).sum(), logits, retain_graph=True)
    rate = torch.sigmoid(reward[:, None] - reward) @ logp.detach().exp()
    torch.testing.assert_close(found, -torch.autograd.grad((logp.exp() * rate).sum(), logits)[0], rtol=0, atol=1e-12)


def test_the_self_play_surrogate_pays_for_the_future_on_trees() -> None:
    """Token by token: the exact expected gradient of the surrogate is that of E R - 0.3 KL(pi || p0) on whole sequences."""
    tree = EnumerableTokenMDP.random(V=3, H=3, seed=2)
    logits = torch.randn(tree.num_prefixes, tree.V, generator=torch.Generator().manual_seed(5), dtype=F64).requires_grad_()
    views = Views(unpaired=torch.arange(tree.M), score=at(tree.R))
    scores = tree_scores(tree, logits)
    surrogate = dataclasses.replace(set_("ipo/nash-md"), price=(("ref", 0.3),))(scores, views)
    (found,) = torch.autograd.grad((scores.sums().detach().exp() * surrogate).sum(), logits)
    torch.testing.assert_close(found, -tree.exact_gradient(logits.detach(), 0.3), rtol=0, atol=1e-10)


@pytest.mark.check("limit", "sppo")
def test_sppo_step_is_multiplicative_weights(game: PreferenceGame) -> None:
    """Where log Z = eta / 2 (as for P against a policy of win rate 1/2, to first order in eta) the regression has pi_t e^(eta P) as its minimiser."""
    old, eta = at(game.logp_ref), 1e-3
    views = Views(unpaired=torch.arange(game.K), score=at(game.win_rate(np.exp(game.logp_ref))))
    loss = Pointwise(WinRate(eta), Score(anchors=(("old", 1.0),)))
    found = game_minimiser(loss, game, views, old.exp(), old=old)
    step = at(game.response(game.logp_ref, game.logp_ref, 1 / eta))
    torch.testing.assert_close((found - old) / eta, (step - old) / eta, rtol=0, atol=2e-3)


def test_sppo_and_inpo_and_mirror_prox_iterations(game: PreferenceGame) -> None:
    """Exact iterations: SPPO's average has a small gap; INPO's last iterate and mirror prox's go to the regularised equilibrium."""
    logp, mean = game.logp_ref, np.zeros(game.K)
    for _ in range(1000):
        mean += np.exp(logp) / 1000
        logp = game.response(logp, logp, 10.0)
    assert game.duality_gap(mean) < 0.06

    def kl(target: np.ndarray, logp: np.ndarray) -> float:
        return float(np.exp(target) @ (target - logp))

    tau, eta, logp, end = 0.1, 1.0, game.logp_ref, game.equilibrium(0.1, damping=0.1)
    for _ in range(60):
        logp = game.response(tau / eta * game.logp_ref + (1 - tau / eta) * logp, logp, eta)
    assert kl(end, logp) < 1e-3
    logp, found = game.logp_ref, [kl(end, game.logp_ref)]
    for _ in range(15):
        logp = game.mirror_prox(logp, beta=0.1, eta=0.2)
        found.append(kl(end, logp))
    assert all(b < a / 1.2 for a, b in itertools.pairwise(found))


# -- displacement, and anchors over time --------------------------------------------------------------------------------------------------------


def test_game_is_whole_and_refuses_what_is_not() -> None:
    game = PreferenceGame.random(K=5, seed=0)
    assert np.allclose(game.P + game.P.T, 1.0) and game.P.shape == (5, 5) and (game.P[:3, 3:] > 0.4).all()
    with pytest.raises(ValueError, match="P must be square"):
        PreferenceGame(np.eye(3), np.zeros(3))
    with pytest.raises(ValueError, match="three responses"):
        PreferenceGame.random(K=2)
    with pytest.raises(ValueError, match="lower the damping"):
        PreferenceGame.random(seed=3).equilibrium(0.01, damping=1.0)
    with pytest.raises(ValueError, match=r"covered must lie in 2\.\.3"):
        PreferenceBandit.random(2, 3).pairs(covered=4)
    with pytest.raises(ValueError, match=r"must both be \(prompts, responses\)"):
        PreferenceBandit(np.zeros((2, 3)), np.zeros((3, 2)))


def test_sampled_pairs_follow_reference_and_labels() -> None:
    bandit = PreferenceBandit.random(prompts=1, responses=3)
    sampled = bandit.sample_pairs(20_000, np.random.default_rng(0))
    wins = np.zeros((3, 3))
    np.add.at(wins, (sampled[:, 0], sampled[:, 1]), 1)
    r = bandit.reward[0]
    np.testing.assert_allclose(wins / (wins + wins.T + np.eye(3)), 1 / (1 + np.exp(r[None] - r[:, None])) * (1 - np.eye(3)), atol=0.03)
    p = np.exp(bandit.logp_ref[0])
    together = p[:, None] * p[None] * (1 / (1 - p)[:, None] + 1 / (1 - p)[None])  # drawn in either order
    np.testing.assert_allclose((wins + wins.T)[np.triu_indices(3, 1)] / 20_000, together[np.triu_indices(3, 1)], atol=0.015)


def test_repeated_hard_syncs_add_up_and_stages_divide_beta(bandit: PreferenceBandit, pairs: Any) -> None:
    """tr-dpo and sdpo-stepwise: after n converged rounds pi = ref e^(n r / beta) / Z, DPO with beta / n."""
    anchor = at(bandit.logp_ref)
    for _ in range(2):
        anchor = bandit_minimiser(Pairwise(0.8), bandit, *pairs, ref=anchor)
    assert total_variation(anchor, at(bandit.kl_optimum(0.4))) < 1e-6


def test_extrapolated_rounds_grow_by_one_over_one_less_momentum(bandit: PreferenceBandit) -> None:
    """Increments of the coefficient of r / beta, of the fitted policies before momentum: (1 - a^(t+1)) / (1 - a), t from 0."""
    r = at(bandit.reward - bandit.reward.mean(-1, keepdims=True))
    for a in (0.0, 0.3, 0.6):
        logp = previous = at(bandit.logp_ref)
        found = []
        for _ in range(9):
            fitted = torch.log_softmax(logp + r, -1)  # the converged step at beta 1
            found.append(float(((fitted - previous) * r).sum() / r.square().sum()))
            logp, previous = torch.log_softmax(extrapolate(fitted, previous, momentum=a), -1), fitted
        np.testing.assert_allclose(found, [(1 - a ** (t + 1)) / (1 - a) for t in range(9)], rtol=1e-9)


@pytest.mark.check("limit", "irepo")
def test_residual_and_logistic_regress_the_same_minimiser(bandit: PreferenceBandit, pairs: Any) -> None:
    views, weight = pairs
    a = bandit_minimiser(Pairwise(0.5, link=Residual(), margin=ScoreGap(1.0)), bandit, views)
    assert total_variation(a, bandit_minimiser(Pairwise(0.5), bandit, views, weight)) < 1e-6
