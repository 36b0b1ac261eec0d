"""Steering and training of denoisers: hand-computed values, limit cases, exact optima, resume, bad input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from denoising_pieces import F64, ddim, diffusers, gen
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.algos.denoising.itps import ITPS, STRATEGIES, alignment, pulled, ranking, resample_path
from markovia.algos.denoising.methods import DENOISING
from markovia.algos.denoising.particles import (
    POTENTIALS,
    FKSteering,
    History,
    effective_size,
    last_log_potential,
    log_potential,
    resample,
)
from markovia.algos.denoising.rlg import RLGuidance
from markovia.algos.denoising.sampling import denoise, predictor
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import GuidedDenoiser, MLPDenoiser
from markovia.envs.denoising.tasks import make_task
from markovia.envs.exact.denoisers import GMMDenoiser


def gaussian_task(mean: float = 0.3, var: float = 0.64, num_steps: int = 10, reward: Any = None, **options: Any) -> DenoisingTask:
    """The exact denoiser of N(mean, var) in one dimension; reward -(x - 2)^2/2."""
    network = GMMDenoiser([[mean]], var**0.5).network(ddim().alphas_cumprod)
    kernel = GaussianKernel.from_scheduler(ddim(), num_steps, **options)
    return DenoisingTask(network, kernel, reward or (lambda x, c: -0.5 * (x[:, 0] - 2).square()), (1,), name="gaussian")


def path_task(num_steps: int = 20, conditions: Any = None, **options: Any) -> DenoisingTask:
    """Arcs above and below a line, 8 points each, shifted by the condition where there is one."""
    across = torch.linspace(-1, 1, 8, dtype=F64)
    arcs = torch.stack([torch.stack([across, s * 0.6 * torch.cos(1.5 * across)], -1).flatten() for s in (1, -1)])
    exact = GMMDenoiser(arcs, 0.05).network(ddim().alphas_cumprod)

    def network(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        shift = 0.0 if cond is None else (ddim().alphas_cumprod.to(x)[t].sqrt()[:, None, None] * cond.to(x)[:, None])
        return exact((x - shift).flatten(1), t).reshape(x.shape)

    kernel = GaussianKernel.from_scheduler(ddim(), num_steps, **{"kind": "ddpm", "clip_x0": 1.5, **options})
    return DenoisingTask(network, kernel, lambda x, c: x.sum((1, 2)), (8, 2), conditions, name="paths")


SKETCH = torch.stack([torch.linspace(-1, 1, 5), torch.full((5,), -0.4)], -1)


# -- sampling and RL guidance --------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "itps/rs")
@pytest.mark.check("limit", "itps/rs")
def test_denoise_is_the_chain_of_the_agent() -> None:
    task = make_task("linear_gaussian")
    agent = DenoisingAgent.from_task(task, critic_hidden=None)
    starts = task.starts(5, gen(1))
    ours = denoise(task.kernel, predictor(task.kernel, task.network), starts["x"], gen(2))
    torch.testing.assert_close(ours, agent.generate(starts, gen(2)).outcome["x"])


def test_repeats_renoise_the_clean_estimate_to_the_same_level() -> None:
    # with the exact denoiser of N(m, v) the corrector keeps the level's law: x0 of variance v rho, noised again, has less spread than the level,
    # so a single extra visit is written out here instead
    task = gaussian_task(num_steps=1)
    x, z = torch.full((1, 1), 0.7), torch.randn(2, 1, 1, generator=gen(3))
    step = torch.tensor([0])
    m = task.network(x, task.kernel.timestep(step))
    again = task.kernel.add_noise(task.kernel.x0_from(m, x, step), z[0], step)
    mean, std = task.kernel.mean_std(task.network(again, task.kernel.timestep(step)), again, step)
    torch.testing.assert_close(denoise(task.kernel, predictor(task.kernel, task.network), x, gen(3), repeats=2), mean + std * z[1])


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.check("value", "rlg")
@pytest.mark.check("limit", "rlg")
def test_rlg_between_and_at_its_ends(scale: float) -> None:
    task, tuned = gaussian_task(), gaussian_task(1.0, 0.4).network
    x = RLGuidance(scale).sample(task, tuned, 6, gen(1))["x"]
    plain = DenoisingTask(tuned if scale else task.network, task.kernel, task.reward, (1,))
    starts = plain.starts(6, g := gen(1))
    torch.testing.assert_close(x, denoise(task.kernel, predictor(task.kernel, plain.network), starts["x"], g))


@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
def test_rlg_is_exactly_beta_over_w_for_gaussians_with_a_linear_reward(scale: float) -> None:
    # the tilt of N(m, v) by exp(q x/beta) is N(m + v q/beta, v); w moves its mean to m + v q w/beta
    m, v, q, beta = 0.3, 0.64, 1.5, 0.7
    base, tuned, exact = (
        gaussian_task(mean, v, eta=0.0) for mean in (m, m + v * q / beta, m + v * q * scale / beta)
    )
    start = torch.randn(5, 1, dtype=F64, generator=gen())
    for k in range(10):
        t = torch.full((5,), int(base.kernel.timestep(k)))
        found = base.network(start, t) + scale * (tuned.network(start, t) - base.network(start, t))
        torch.testing.assert_close(found, exact.network(start, t), rtol=1e-12, atol=1e-12)


# -- Feynman-Kac steering --------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "fk-steering")
def test_potentials_by_hand() -> None:
    # one particle that saw 1 and 3 before, looks at 2 now, lam = 10
    one = torch.ones(1, 1)
    history = History(last=3 * one, best=3 * one, total=4 * one, spent=7 * one)
    found = {p: float(log_potential(2 * one, history, potential=p, lam=10.0)) for p in POTENTIALS}
    assert found == {"diff": -10.0, "max": 30.0, "add": 60.0, "rt": 20.0}
    assert float(last_log_potential(2 * one, history, lam=10.0)) == 13.0


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.check("limit", "fk-steering")
def test_without_resampling_every_potential_is_importance_sampling(potential: str) -> None:
    task = gaussian_task()
    found = FKSteering(num_particles=8, lam=1.7, potential=potential, threshold=0.0).sample(task, 3, gen())
    torch.testing.assert_close(found.log_weight, 1.7 * found.reward, rtol=1e-9, atol=1e-9)


def test_resampling_keeps_the_mean_weight_and_follows_the_weights() -> None:
    log_weight = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf], [1.0, 1.0, 1.0, 1.0]])
    assert effective_size(log_weight).tolist() == [1.0, 4.0]
    index, after = resample(log_weight, 0.5, gen())
    assert index.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]  # one heavy particle is copied, an even population stays
    assert after[0].tolist() == pytest.approx([math.log(0.25)] * 4) and after[1].tolist() == [1.0] * 4
    shares = torch.bincount(resample(torch.tensor([0.2, 0.8]).log().repeat(1, 5000), 1.0, gen())[0].flatten() % 2) / 10_000
    assert float(shares[1]) == pytest.approx(0.8, abs=0.02)


@pytest.mark.check("invariance", "fk-steering")
def test_populations_do_not_touch_each_other() -> None:
    """A population of bad particles next to one of good ones: copies stay at home."""

    def step(x: Tensor, k: int, generator: Any) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(len(x))

    x = torch.tensor([[0.0, 1.0], [10.0, 11.0]])
    found = FKSteering(num_particles=2, lam=50.0, potential="diff").steer(x, 10, step, lambda x, k: x, gen())
    assert found.x.tolist() == [[1.0, 1.0], [11.0, 11.0]]
    assert found.best()["x"].tolist() == found.draw(gen())["x"].tolist() == [1.0, 11.0]


@pytest.mark.parametrize("potential", POTENTIALS)
def test_particles_reach_the_exact_tilt_of_a_gaussian_chain(potential: str) -> None:
    # the base chain of a Gaussian is Gaussian, N(m, c) at its end; tilted by exp(-lam (x - 2)^2/2): precision 1/c + lam, mean (m/c + 2 lam)/(...)
    task, lam = gaussian_task(num_steps=20), 1.0
    m, c = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    points = torch.tensor([[0.0], [1.0]], dtype=F64)
    for k in range(20):
        mean, std = task.kernel.mean_std(task.network(points, task.kernel.timestep(torch.full((2,), k))), points, k)
        gain = mean[1] - mean[0]
        m, c = mean[0] + gain * m, gain.square() * c + std[0].square()
    expected = float((m / c + 2 * lam) / (1 / c + lam))
    found = FKSteering(num_particles=2048, lam=lam, potential=potential).sample(task, 4, gen(1))
    assert float(found.mean(found.x[..., 0])) == pytest.approx(expected, abs=0.04)
    assert float(task.rewards(torch.full((1, 1), float(m))).item()) < float(found.mean(found.reward))


def test_a_proposal_is_weighted_back_to_the_base() -> None:
    # particles moved by a denoiser of another mean still estimate the base's own mean (lam = 0)
    task = gaussian_task(mean=0.3, num_steps=6, final="mid")
    shifted = gaussian_task(mean=0.6, num_steps=6).network
    found = FKSteering(num_particles=4096, lam=0.0, threshold=0.0).sample(task, 2, gen(), proposal=shifted)
    plain = FKSteering(num_particles=4096, lam=0.0, threshold=0.0).sample(task, 2, gen())
    assert float(found.x.mean()) > 0.5
    assert float(found.mean(found.x[..., 0])) == pytest.approx(float(plain.x.mean()), abs=0.05)
    with pytest.raises(ValueError, match="a proposal divides by the std of every step"):
        FKSteering().sample(gaussian_task(), 2, gen(), proposal=shifted)


def masked_text(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """A law over 3^4 texts, a reward, and the chain that fills one masked place (-1) after another from the exact conditional."""
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    p = torch.randn(81, dtype=F64, generator=gen(seed)).mul(3.0).softmax(0)
    reward = torch.randn(81, dtype=F64, generator=gen(seed + 1))

    def posterior(x: Tensor) -> Tensor:
        fits = ((x[:, None] == texts) | (x[:, None] < 0)).all(-1)
        weight = fits * p
        return weight / weight.sum(1, keepdim=True)

    def step(x: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        place = torch.where(x < 0, torch.rand(x.shape, generator=generator), -1.0).argmax(1, keepdim=True)
        text = texts[torch.multinomial(posterior(x), 1, generator=generator).squeeze(1)]
        return x.scatter(1, place, text.gather(1, place)), torch.zeros(len(x))

    return p, reward, texts, step, lambda x, k: posterior(x) @ reward


@pytest.mark.parametrize("potential", POTENTIALS)
def test_particles_of_masked_text_reach_the_enumerated_tilt(potential: str) -> None:
    p, reward, _, step, promise = masked_text()
    tilt = (p.log() + 0.5 * reward).softmax(0)
    method = FKSteering(num_particles=16_384, lam=0.5, potential=potential, first=0.25, every=0.25, last=0.75)
    found = method.steer(torch.full((1, 16_384, 4), -1), 4, step, promise, gen(2))
    number = (found.x[0] * torch.tensor([27, 9, 3, 1])).sum(-1)
    law = torch.zeros(81, dtype=F64).scatter_add_(0, number, found.log_weight[0].softmax(0))
    assert float(0.5 * (law - tilt).abs().sum()) < 0.05 < 0.09 < float(0.5 * (p - tilt).abs().sum())


def test_looks_follow_the_shares() -> None:
    assert FKSteering().looks(100) == [20, 40, 60, 80] and FKSteering().looks(50) == [10, 20, 30, 40]
    assert FKSteering(first=0.0, every=0.5, last=1.0).looks(4) == [2]


def test_conditional_populations_share_a_condition() -> None:
    conditions = torch.tensor([[0.0], [5.0]])
    task = DenoisingTask(lambda x, t, c: 0.5 * x + c, GaussianKernel.direct([0.1] * 4), lambda x, c: -(x - c)[:, 0].abs(), (1,), conditions)
    found = FKSteering(num_particles=3).sample(task, 8, gen())
    assert found.cond is not None and bool((found.cond == found.cond[:, :1]).all()) and found.cond.unique().tolist() == [0.0, 5.0]
    assert found.best()["cond"].shape == (8, 1)


# -- inference-time policy steering ----------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "itps", "itps/gd", "itps/pr")
def test_path_functions_by_hand() -> None:
    sketch = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    assert resample_path(sketch, 5).tolist() == [[0, 0], [0.5, 0], [1, 0], [1, 1], [1, 2]]
    assert resample_path(sketch[:1] + 3, 2).tolist() == [[3, 3], [3, 3]]
    # distances 5 and 0 from the sketch's two points: mean 2.5
    assert float(alignment(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))) == 2.5
    # d = (0, 1): softmax(20, 0)
    assert ranking(torch.tensor([0.0, 1.0]))[0] == pytest.approx(1 / (1 + math.exp(-20)))
    assert float(ranking(torch.rand(3, 7, generator=gen())).sum()) == pytest.approx(3.0)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.check("invariance", "itps", "itps/gd")
def test_a_pull_on_eps_is_the_same_whatever_the_network_predicts(prediction: str) -> None:
    kernel = GaussianKernel.from_scheduler(ddim(prediction_type=prediction), 10)
    x, m, change = torch.randn(3, 4, 2, dtype=F64, generator=gen()).unbind(0)
    step = torch.tensor([1, 4, 6, 9])
    after = kernel.add_to_eps(m, change, step)
    signal, noise = (torch.tensor(v, dtype=F64)[step][:, None] for v in (kernel.tables.signal, kernel.tables.noise))
    moved = (x - signal * kernel.x0_from(after, x, step)) / noise - (x - signal * kernel.x0_from(m, x, step)) / noise
    torch.testing.assert_close(moved, change, rtol=1e-9, atol=1e-9)


@pytest.mark.check("value", "itps", "itps/gd")
def test_every_step_but_the_last_is_pulled() -> None:
    """eps + 3 (x - 1), the gradient of 3/2 |x - 1|^2, written out; as in the official code, t = 0 is left alone, whatever the last timestep is."""
    kernel = GaussianKernel.from_scheduler(ddim(), 10)
    assert int(kernel.timestep(9)) == 99  # trailing: not 0
    x = torch.randn(3, 2, dtype=F64, generator=gen())
    push = pulled(kernel, lambda x, k: 0.5 * x, lambda x: 0.5 * (x - 1).square().sum(-1), 3.0)
    for k in range(9):
        torch.testing.assert_close(push(x, k), 0.5 * x + 3.0 * (x - 1), rtol=1e-12, atol=1e-12)
    assert torch.equal(push(x, 9), 0.5 * x)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_where_the_output_says_nothing_about_eps_a_pull_adds_nothing(prediction: str) -> None:
    """At a level without signal v is -x0, and a flow's velocity is x - x0: eps is x itself."""
    noisy = ddim(prediction_type=prediction, rescale_betas_zero_snr=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.67) if prediction == "flow" else noisy
    kernel = GaussianKernel.from_scheduler(scheduler, 6)
    x, m, change = torch.randn(3, 4, 2, dtype=F64, generator=gen()).unbind(0)
    assert torch.equal(kernel.add_to_eps(m, change, 0), m)
    torch.testing.assert_close(kernel.eps_from(kernel.add_to_eps(m, change, 1), x, 1), kernel.eps_from(m, x, 1) + change, rtol=1e-9, atol=1e-9)
    task = DenoisingTask(lambda x, t, c: 0.5 * x, kernel, lambda x, c: x.sum((1, 2)), (8, 2))
    for strategy in ("gd", "ss"):
        found, plain = (ITPS(s, rho=2.0).sample(task, SKETCH, 3, gen())["x"] for s in (strategy, "rs"))  # type: ignore[arg-type]
        assert bool(found.isfinite().all()) and not torch.equal(found, plain)


@pytest.mark.check("limit", "itps", "itps/gd", "itps/bi", "itps/pr")
def test_strategies_in_their_limits() -> None:
    task = path_task()
    x = {s: ITPS(s, rho=2.0, repeats=2, candidates=16).sample(task, SKETCH, 12, gen())["x"] for s in STRATEGIES if s != "op"}
    assert torch.equal(ITPS("gd", rho=0.0).sample(task, SKETCH, 12, gen())["x"], x["rs"])
    assert torch.equal(ITPS("ss", rho=2.0, repeats=1).sample(task, SKETCH, 12, gen())["x"], x["gd"])
    assert torch.equal(ITPS("pr", candidates=1).sample(task, SKETCH, 12, gen())["x"], x["rs"])
    target = resample_path(SKETCH, 8)
    d = {s: float(alignment(v, target).mean()) for s, v in x.items()}
    assert d["ss"] < d["gd"] < d["rs"] and d["pr"] < d["rs"] and d["bi"] < d["rs"]


@pytest.mark.check("value", "itps/op")
def test_output_perturbation_starts_where_the_sketch_starts() -> None:
    task = path_task(conditions=[[0.0, 0.0]])
    far = SKETCH + torch.tensor([0.0, 1.5])
    x = ITPS("op").sample(task, far, 8, gen())
    assert torch.equal(x["cond"], far[0].expand(8, 2))
    assert float(x["x"][..., 1].mean()) > 0.5 > abs(float(ITPS("rs").sample(task, far, 8, gen())["x"][..., 1].mean()))


def test_pr_is_the_best_of_its_candidates() -> None:
    task, target = path_task(8), resample_path(SKETCH, 8)
    many = ITPS("rs").sample(task, SKETCH, 6 * 5, gen())["x"].unflatten(0, (6, 5))
    best = many[torch.arange(6), alignment(many, target).argmin(1)]
    assert torch.equal(ITPS("pr", candidates=5).sample(task, SKETCH, 6, gen())["x"], best)


def reordered(task: DenoisingTask, order: Tensor) -> DenoisingTask:
    """The same task whose starts come in another order; its chain is deterministic, so nothing else is random."""
    inner = task.starts

    def starts(n: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        return {k: None if v is None else v[order] for k, v in inner(n, generator).items()}

    task.starts = starts  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("method_id", ["rlg", "itps/gd", "itps/rs", "itps/op"])
@pytest.mark.check("invariance")
def test_chains_do_not_touch_each_other(method_id: str) -> None:
    """In another order they end in that order."""
    order = torch.tensor([3, 0, 2, 1])

    def sample(shuffled: bool) -> Tensor:
        task = gaussian_task(eta=0.0) if method_id == "rlg" else path_task(8, [[0.1, 0.2]] if method_id == "itps/op" else None, kind="ddim", eta=0.0)
        task = reordered(task, order) if shuffled else task
        if method_id == "rlg":
            return RLGuidance(2.0).sample(task, gaussian_task(1.0, 0.4).network, 4, gen(1))["x"]
        return ITPS(DENOISING[method_id].value.strategy, rho=2.0).sample(task, SKETCH, 4, gen(1))["x"]

    torch.testing.assert_close(sample(True), sample(False)[order], rtol=1e-6, atol=1e-6)


@pytest.mark.check("invariance", "itps/pr")
def test_the_best_candidate_does_not_depend_on_their_order() -> None:
    task, target = path_task(8), resample_path(SKETCH, 8)
    many = ITPS("rs").sample(task, SKETCH, 6, gen())["x"]
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    chosen = [c[ranking(alignment(c, target)).argmax()] for c in (many, many[order])]
    assert torch.equal(*chosen)


@pytest.mark.check("value", "itps/bi")
@pytest.mark.check("invariance", "itps/bi")
def test_biased_chains_start_half_way_at_the_noised_sketch() -> None:
    """Written out: x = sketch + 0.5 z, then the last half of the steps; without noise every chain of a deterministic kernel is the same."""
    task = path_task(8, kind="ddim", eta=0.0)
    target, z = resample_path(SKETCH, 8), gen(1)
    task.starts(3, z)  # drawn and not used
    x = target + 0.5 * torch.randn(3, 8, 2, generator=z)
    expected = denoise(task.kernel, predictor(task.kernel, task.network), x, z, 4)
    torch.testing.assert_close(ITPS("bi", start=0.5, start_noise=0.5).sample(task, SKETCH, 3, gen(1))["x"], expected)
    same = ITPS("bi", start_noise=0.0).sample(task, SKETCH, 3, gen(2))["x"]
    assert torch.equal(same[0], same[2])


@pytest.mark.check("limit", "itps/op")
def test_a_sketch_that_starts_at_the_condition_perturbs_nothing() -> None:
    a, b = (ITPS(s).sample(path_task(8, [[-1.0, -0.4]]), SKETCH, 4, gen())["x"] for s in ("op", "rs"))
    assert torch.equal(a, b)


# -- agents: ratios and guidance -------------------------------------------------------------------------------------------------------------


def test_ratios_are_one_on_the_first_pass_with_guidance_inside_the_policy() -> None:
    net = GuidedDenoiser(MLPDenoiser((2,), 16, 1, cond_dim=3), 3.0)
    kernel = GaussianKernel.from_scheduler(ddim(), 6)
    task = DenoisingTask(net, kernel, lambda x, c: x.sum(-1), (2,), torch.eye(3))
    agent = DenoisingAgent.from_task(task, critic_hidden=None)
    agent.net.double()  # an untrained network drives samples so far out that the rounding of float32 shows
    record = agent.generate({k: x.double() for k, x in task.starts(7, gen()).items()}, gen())
    logp = agent.evaluate(record, ("logp",)).logp
    assert logp is not None
    torch.testing.assert_close(logp[record.mask], record.logp_old[record.mask], rtol=1e-9, atol=1e-9)
    assert bool((record.columns["guidance"] == 3.0).all())
    plain = DenoisingAgent(net.inner, kernel, (2,), cond_dim=3, critic_hidden=None)
    with pytest.raises(ValueError, match="sampled with guidance 3, but this agent evaluates with 1"):
        plain.evaluate(record, ("logp",))
    again = DenoisingAgent.from_config(agent.config())
    assert again.guidance == 3.0


# -- bad input -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FKSteering(potential="maximum"), "did you mean 'max'"),
        (lambda: FKSteering(num_particles=0), "at least 1 chain"),
        (lambda: FKSteering(lam=-1.0), "finite strength"),
        (lambda: FKSteering(first=0.9, last=0.2), "expected shares"),
        (lambda: FKSteering(threshold=2.0), "share of the particles"),
        (lambda: RLGuidance(math.nan), "0 for the reference"),
        (lambda: ITPS("gds"), "did you mean 'gd'"),
        (lambda: ITPS(repeats=0), "counts >= 1"),
        (lambda: ITPS(start=1.0), "share in"),
        (lambda: ITPS().sample(gaussian_task(), SKETCH, 2), r"no paths; expected \(H, 2\)"),
        (lambda: ITPS().sample(path_task(), torch.zeros(3), 2), "at least one point"),
        (lambda: ITPS("op").sample(path_task(), SKETCH, 2), "condition is missing"),
        (lambda: denoise(gaussian_task().kernel, lambda x, k: x, torch.zeros(1, 1), start=10), "0 to 9"),
        (lambda: denoise(gaussian_task().kernel, lambda x, k: x, torch.zeros(1, 1), repeats=0), "at least 1 visit"),
        (lambda: GaussianKernel.direct([0.1]).add_to_eps(torch.zeros(1), torch.zeros(1), 0), "no eps estimate"),
        (lambda: DenoisingAgent.from_task(make_task("mixture2d", eta=0.0)), "eta = 0"),
    ],
)
@pytest.mark.check("bad_input", "rlg", "fk-steering", "itps", "itps/gd", "itps/bi", "itps/pr", "itps/op", "itps/rs")
def test_bad_input_is_explained(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
