"""Preference learning on denoising chains: scores by hand, the text losses on them, sources of pairs, bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from denoising_pieces import F64, ddim, diffusers, gen
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.algos.collect import SequenceCollector
from markovia.algos.denoising.methods import DENOISING
from markovia.algos.denoising.pairs import (
    anchor_rule,
    as_scores,
    best_and_worst,
    clipped,
    control_ratio,
    noise_error,
    per_step,
    ranked,
    step_record,
    views_of,
)
from markovia.algos.denoising.preference import DenoisingPreference, DenoisingPreferenceDriver
from markovia.algos.denoising.sources import Candidates, NoisedData, SameStart, SemiPolicy, noised_pairs
from markovia.algos.on_policy.method import Descent
from markovia.algos.preference.anchors import EachRound
from markovia.algos.preference.pairwise import Difference, Pairwise, Residual, Score
from markovia.algos.preference.pieces import ScoreGap
from markovia.algos.setup import build, make_driver
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import MLPDenoiser
from markovia.envs.denoising.tasks import make_task
from markovia.envs.exact.denoisers import LinearGaussianDenoising

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")
PAIRWISE = [name for name, row in DENOISING.items() if isinstance(row.value, DenoisingPreference)]
SOLVER = Descent(lr=0.01, epochs=2, minibatch=16, max_grad_norm=10.0)


def point_task(prediction: str = "epsilon", cond: bool = False) -> DenoisingTask:
    """Two numbers denoised in 6 steps by an untrained network; reward: their sum."""
    flow = prediction == "flow"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if flow else ddim(beta_schedule="linear", prediction_type=prediction)
    torch.manual_seed(0)
    network = MLPDenoiser((2,), 16, 1, cond_dim=3 if cond else 0)
    conditions = torch.eye(3) if cond else None
    return DenoisingTask(network, GaussianKernel.from_scheduler(scheduler, 6), lambda x, c: x.sum(-1), (2,), conditions)


def agent_on(task: DenoisingTask, double: bool = False, **options: Any) -> DenoisingAgent:
    agent = DenoisingAgent.from_task(task, critic_hidden=None, **options)
    if double:
        agent.net.double()
    return agent


def driver(method: DenoisingPreference, task: DenoisingTask | None = None, **options: Any) -> DenoisingPreferenceDriver:
    task = task or make_task("linear_gaussian")
    return DenoisingPreferenceDriver(method, agent_on(task), SequenceCollector(task, method.num_envs), **options)


def settings(**options: Any) -> DenoisingPreference:
    return DenoisingPreference(**{"num_env_steps": 64, "num_envs": 16, "solver": SOLVER, **options})


SMALL = {
    "d3po": settings(loss=Pairwise(0.5), clip=0.1),
    "spo-step": settings(source=Candidates(3, 0.0, 1), loss=Pairwise(2.0), clip=0.1),
    "diffusion-dpo": settings(source=NoisedData(32), loss=Pairwise(2.0)),
    "se-ppo": settings(source=SemiPolicy(every=1), loss=Pairwise(2.0)),
    "rebel-diffusion": settings(
        source=SameStart(steps=False),
        loss=Pairwise(1.0, Difference(Score(anchors=(("old", 1.0),))), Residual(), margin=ScoreGap(1.0)),
        reference=EachRound(),
    ),
}


def on_its_task(method_id: str, **options: Any) -> DenoisingPreferenceDriver:
    return driver(SMALL[method_id], point_task(cond=True) if method_id in ("diffusion-dpo", "se-ppo") else None, **options)


def test_every_row_has_small_settings_of_the_same_parts() -> None:
    assert set(SMALL) == set(PAIRWISE)
    for name, small in SMALL.items():
        full = DENOISING[name].value
        assert type(small.source) is type(full.source) and type(small.reference) is type(full.reference) and small.clip == full.clip
        assert type(small.loss.link) is type(full.loss.link) and small.anchors == full.anchors


# -- scores -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("limit", "d3po", "rebel-diffusion")
def test_control_ratio_is_the_difference_of_log_probs() -> None:
    task = make_task("linear_gaussian")
    agent, reference = agent_on(task, double=True), agent_on(task, double=True)
    with torch.no_grad():
        agent.net["policy"].h.add_(0.1)
    starts = {"x": task.starts(5, gen())["x"].double(), "cond": None}
    record = reference.generate(starts, gen())
    expected = agent.evaluate(record, ("logp",)).logp - reference.evaluate(record, ("logp",)).logp  # type: ignore[operator]
    torch.testing.assert_close(control_ratio(agent, reference, record), expected, rtol=1e-9, atol=1e-9)
    assert bool((control_ratio(reference, reference, record) == 0).all())


def test_clip_by_hand() -> None:
    # e^0.2 = 1.22 > 1.1 -> log 1.1; e^-0.2 = 0.82 < 0.9 -> log 0.9; 0.05 stays, and only it has a gradient
    ratio = torch.tensor([0.2, -0.2, 0.05], dtype=F64, requires_grad=True)
    held = clipped(ratio, 0.1)
    assert held.tolist() == pytest.approx([math.log(1.1), math.log(0.9), 0.05])
    held.sum().backward()
    assert ratio.grad is not None and ratio.grad.tolist() == [0.0, 0.0, 1.0]
    assert clipped(ratio, None) is ratio


@pytest.mark.check("value", "spo-step", "se-ppo")
def test_pairs_by_hand() -> None:
    assert ranked(torch.tensor([1.0, 2.0, 5.0, 3.0, 4.0, 4.0])).tolist() == [[1, 0], [2, 3]]
    assert ranked(torch.tensor([4.0, 4.0]), keep_ties=True).tolist() == [[0, 1]]
    # two chains of 3 steps, the last one does not count: row 1 against row 0 at steps 0 and 1
    mask = torch.tensor([[True, True, False]] * 2)
    assert per_step(torch.tensor([[1, 0]]), mask).tolist() == [[3, 0], [4, 1]]
    # s(2) - s(-2) = tanh(1) = 0.76
    best, worst, sure = best_and_worst(torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.1, 0.05]]), 0.7)
    assert (best.tolist(), worst.tolist(), sure.tolist()) == ([1, 1], [0, 0], [True, False])
    assert anchor_rule(torch.tensor([0.2, -0.1]), -1.0).tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="even number of samples, got 3"):
        ranked(torch.zeros(3))


@pytest.mark.check("value", "d3po")
def test_d3po_value_by_hand() -> None:
    # Delta = (0.2, -0.3), held at log 1.1 = 0.0953 and log 0.9 = -0.1054: z = 0.5 * 0.2007 = 0.10034, -log s(z) = 0.64424
    ratio = clipped(torch.tensor([[0.2], [-0.3]], dtype=F64), 0.1)
    loss = Pairwise(0.5)(as_scores(ratio, torch.ones(2, 1, dtype=torch.bool), ("ref",)), views_of(1, None))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-0.5 * (math.log(1.1) - math.log(0.9))))])
    assert loss.tolist() == pytest.approx([0.64424], abs=1e-4)


@pytest.mark.check("value", "rebel-diffusion")
def test_rebel_value_by_hand() -> None:
    # chains of 2 steps with log-ratios 0.3 and -0.1 in sum, rewards 1.5 and 1: (1/2 * 0.4 - 0.5)^2 = 0.09
    loss = Pairwise(0.5, Difference(Score(anchors=(("old", 1.0),))), Residual(), margin=ScoreGap(1.0))
    ratio = torch.tensor([[0.2, 0.1], [-0.3, 0.2]], dtype=F64)
    found = loss(as_scores(ratio, torch.ones(2, 2, dtype=torch.bool), ("old",)), views_of(1, torch.tensor([1.5, 1.0], dtype=F64)))
    assert found.tolist() == pytest.approx([0.09])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.check("value", "diffusion-dpo")
def test_diffusion_dpo_value_against_the_published_form(prediction: str) -> None:
    """-log s(-beta ((e_w - e_ref,w) - (e_l - e_ref,l))), e the mean squared error of what the network predicts, written out here."""
    task = point_task(prediction)
    agent, reference = agent_on(task, double=True, reduce="mean"), agent_on(task, double=True, reduce="mean")
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=F64, generator=gen(1)))
    x = torch.randn(8, 2, dtype=F64, generator=gen(2))
    record = noised_pairs(agent, x, None, gen(3))
    step, at, t = record.obs["step"][:, 0], record.obs["x"][:, 0], agent.kernel.timestep(record.obs["step"][:, 0])  # type: ignore[index]
    if prediction == "flow":
        a, s = 1 - t.double()[:, None] / 1000, t.double()[:, None] / 1000
    else:
        ab = diffusers.DDIMScheduler().alphas_cumprod.double()[t][:, None]
        a, s = ab.sqrt(), (1 - ab).sqrt()
    noise = (at - a * x) / s
    torch.testing.assert_close(noise[::2], noise[1::2], rtol=1e-6, atol=1e-6)
    assert torch.equal(step[::2], step[1::2])
    target = {"epsilon": noise, "sample": x, "v_prediction": a * noise - s * x, "flow": noise - x}[prediction]

    def error(agent: DenoisingAgent) -> Tensor:
        return (agent.net["policy"](at, t, None) - target).square().mean(-1)

    torch.testing.assert_close(noise_error(agent, record)[:, 0], error(agent), rtol=1e-6, atol=1e-9)
    ratio = noise_error(reference, record) - noise_error(agent, record)
    found = Pairwise(7.0)(as_scores(ratio, record.mask, ("ref",)), views_of(4, None))
    change = error(agent) - error(reference)
    expected = -torch.nn.functional.logsigmoid(-7.0 * (change[::2] - change[1::2]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_error_of_an_eps_network_is_that_of_its_noise_estimate_to_the_bit() -> None:
    agent = agent_on(point_task())
    x, noise = torch.randn(2, 8, 2, generator=gen(2)).unbind(0)
    step = torch.arange(8) % 6
    at = agent.kernel.add_noise(x, noise, step)
    record = step_record(at, step, None, at, target=agent.kernel.target(x, noise, step))
    eps = agent.kernel.eps_from(agent.network(at, agent.kernel.timestep(step)), at, step)
    assert torch.equal(noise_error(agent, record)[:, 0], (eps - noise).square().sum(-1))


def test_a_flow_learns_at_the_level_without_signal_too() -> None:
    """At sigma = 1 the noise is the sample itself, which tells nothing about the network; its velocity is eps - x0 there as everywhere."""
    agent = agent_on(point_task("flow"))
    x, noise, step = torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), torch.zeros(1, dtype=torch.long)
    at = agent.kernel.add_noise(x, noise, step)
    assert torch.equal(at, noise)
    m = agent.network(at, agent.kernel.timestep(step)).detach()
    error = noise_error(agent, step_record(at, step, None, at, target=agent.kernel.target(x, noise, step)))
    assert float(error.detach()) == pytest.approx(float((m[0, 0] + 3) ** 2 + (m[0, 1] - 1) ** 2), rel=1e-6)  # velocities -1 - 2 and 1 - 0
    error.sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in agent.parameters("policy") if p.grad is not None)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.check("limit", "diffusion-dpo")
def test_diffusion_dpo_is_the_step_ratio_integrated_over_the_forward_process(prediction: str) -> None:
    """Delta is affine in x', so at the mean of q(x'|x, x0) it is w (e_ref - e)/2: the two ways to score differ by the weight alone.

    w = (d mean/d m)^2/s^2, m what the network predicts.
    """
    task = point_task(prediction)
    agent, reference = agent_on(task, double=True), agent_on(task, double=True)
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=F64, generator=gen(1)))
    record = noised_pairs(agent, torch.randn(12, 2, dtype=F64, generator=gen(2)), None, gen(3))
    x, step, target = record.obs["x"][:, 0], record.obs["step"][:, 0], record.columns["target"][:, 0]  # type: ignore[index]
    q_mean, std = agent.kernel.mean_std(target, x, step)
    slope = agent.kernel.mean_std(torch.ones_like(x), x, step)[0] - agent.kernel.mean_std(torch.zeros_like(x), x, step)[0]
    live = std[:, 0] > 0
    weight = (slope[:, 0] / std[:, 0]).square()[live]
    ratio = control_ratio(agent, reference, step_record(x, step, None, q_mean))[live, 0]
    torch.testing.assert_close(ratio, 0.5 * weight * (noise_error(reference, record) - noise_error(agent, record))[live, 0], rtol=1e-8, atol=1e-10)


# -- losses on the agent --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", PAIRWISE)
@pytest.mark.check("gradient")
def test_gradient_of_the_loss_matches_finite_differences(method_id: str) -> None:
    loop = on_its_task(method_id)
    items = loop.collect()
    record = items.record.map(lambda t: t.double() if t.is_floating_point() else t)
    for net in (loop.agent.net, loop.reference.net):
        net.double()
        for p in net.parameters():
            p.data = p.data.double()
    params = list(loop.agent.net.parameters())
    with torch.no_grad():
        for p in params:  # away from the kinks: ratios of 0 and the clip
            p.add_(1e-3 * torch.randn(p.shape, dtype=F64, generator=gen(5)))
    rows = items.pairs[:4].flatten()

    def value() -> Tensor:
        return loop.loss(record.rows(rows), items.score[rows].double())[0]

    grads = torch.autograd.grad(value(), params)
    direction = [torch.randn(p.shape, dtype=F64, generator=gen(6)) for p in params]
    expected = float(sum((g * d).sum() for g, d in zip(grads, direction, strict=True)))
    ends = []
    for sign in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.add_(sign * d)
        ends.append(float(value().detach()))
    assert expected != 0 and (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("method_id", PAIRWISE)
@pytest.mark.check("invariance")
def test_order_of_the_pairs_does_not_change_the_loss(method_id: str) -> None:
    loop = on_its_task(method_id)
    items = loop.collect()
    with torch.no_grad():
        for p in loop.agent.net.parameters():
            p.add_(1e-2)
    there, back = items.pairs.flatten(), items.pairs.flip(0).flatten()
    first, second = (loop.loss(items.record.rows(r), items.score[r])[0].detach() for r in (there, back))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_the_anchor_of_each_round_is_the_policy_that_sampled() -> None:
    loop = on_its_task("rebel-diffusion")
    loop.step()
    assert not torch.equal(loop.reference.net["policy"].h, loop.agent.net["policy"].h)
    before = loop.agent.net["policy"].h.detach().clone()
    loop.step()
    assert torch.equal(loop.reference.net["policy"].h, before)


# -- sources -------------------------------------------------------------------------------------------------------------------------------


def test_chains_of_a_pair_share_start_and_condition() -> None:
    task = point_task(cond=True)
    items = SameStart(steps=False).collect(agent_on(task), task, 8, gen(), lambda x, k, c: x.sum(-1))
    first = items.record.obs["x"][:, 0]  # type: ignore[index]
    assert torch.equal(first[::2], first[1::2]) and torch.equal(items.record.obs["cond"][::2], items.record.obs["cond"][1::2])  # type: ignore[index]
    assert bool((items.score[items.pairs[:, 0]] >= items.score[items.pairs[:, 1]]).all())
    steps = SameStart().collect(agent_on(task), task, 8, gen(), lambda x, k, c: x.sum(-1))
    assert len(steps.pairs) == 4 * 5 and steps.record.shape == (48, 1)  # the last of 6 steps is deterministic
    assert bool(steps.record.mask[steps.pairs.flatten()].all())


@pytest.mark.check("limit", "spo-step")
def test_spo_with_pairs_of_whole_chains_is_d3po() -> None:
    d3po = DENOISING["d3po"].value
    assert dataclasses.replace(DENOISING["spo-step"].value, source=d3po.source, loss=d3po.loss) == d3po


def test_candidates_leave_from_one_sample_and_the_chain_goes_on_at_random() -> None:
    task = make_task("linear_gaussian")
    agent = agent_on(task)
    items = Candidates(count=4, threshold=0.0, skip=3).collect(agent, task, 300, gen(), lambda x, k, c: x[:, 0])
    x, step, after = (items.record.obs["x"][:, 0], items.record.obs["step"][:, 0], items.record.action[:, 0])  # type: ignore[index]
    assert torch.equal(x[::2], x[1::2]) and bool((after[::2, 0] > after[1::2, 0]).all()) and step.unique().tolist() == [3, 4, 5, 6, 7]
    # a random candidate leaves the law of the chain alone: E r of the sampled chains is that of the reference
    problem = LinearGaussianDenoising()
    assert float(items.rewards.mean()) == pytest.approx(float(problem.expected_reward(*problem.reference())), abs=0.15)


def test_own_pairs_are_ordered_by_the_reward_and_share_their_condition() -> None:
    task = point_task(cond=True)
    made = NoisedData(20).make(agent_on(task), task, gen())
    score = task.rewards(made["x"], made["cond"])
    assert bool((score[::2] >= score[1::2]).all()) and torch.equal(made["cond"][::2], made["cond"][1::2])


@pytest.mark.check("limit", "se-ppo")
def test_semi_policy_samples_from_its_pool_and_flips_the_sign() -> None:
    loop = on_its_task("se-ppo")
    loop.step()
    assert len(loop.pool) == 2
    record = loop.collect().record
    assert any(torch.equal(loop.reference.net.state_dict()[k], v) for k, v in loop.pool[1].items())
    always = driver(settings(source=SemiPolicy(otherwise=1.0)), point_task(cond=True))
    always.agent.net.load_state_dict(loop.agent.net.state_dict())
    always.reference.net.load_state_dict(loop.reference.net.state_dict())
    ours, plain = loop.ratio(record).detach(), always.ratio(record).detach()
    liked = plain[::2] >= 0
    assert torch.equal(ours[::2], plain[::2]) and torch.equal(ours[1::2], torch.where(liked, plain[1::2], -plain[1::2]))


def test_d3po_raises_the_exact_reward() -> None:
    problem = LinearGaussianDenoising()
    loop = driver(settings(num_envs=256, loss=Pairwise(0.1), clip=0.1, solver=Descent(lr=0.01, anneal=False, epochs=4, minibatch=None)))
    rewards = []
    for _ in range(3):
        loop.step()
        policy: Any = loop.agent.net["policy"]
        rewards.append(float(problem.expected_reward(policy.G.detach().double(), policy.h.detach().double())))
    assert -0.434 < rewards[0] < rewards[1] < rewards[2]


# -- bad input -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DenoisingPreference(num_envs=3), "even and >= 2"),
        (lambda: DenoisingPreference(solver=Descent(recompute_advantage=True)), "solver.recompute_advantage has no meaning"),
        (lambda: DenoisingPreference(solver=Descent(value_lr=0.1, unit="row")), "solver.value_lr, solver.unit has no meaning"),
        (lambda: DenoisingPreference(clip=1.0), r"half-width in \(0, 1\)"),
        (lambda: DenoisingPreference(source=SemiPolicy(), reference=EachRound()), "brings its own anchor"),
        (lambda: Candidates(count=1), "count >= 2"),
        (lambda: SemiPolicy(otherwise=0.5), "otherwise -1, 0 or 1"),
        (lambda: NoisedData(0), "at least 1 pair"),
        (lambda: driver(settings(source=NoisedData())), "no noise levels.*d3po"),
        (lambda: driver(settings(source=Candidates(skip=8))).step(), "no step could be compared"),
        (lambda: build("CartPole-v1", DenoisingPreference()), "DenoisingPreference trains denoising tasks"),
    ],
)
@pytest.mark.check("bad_input", "d3po", "spo-step", "diffusion-dpo", "se-ppo", "rebel-diffusion")
def test_bad_input_is_explained(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_drivers_are_built_from_settings() -> None:
    env = "markovia/LinearGaussian-v0"
    assert isinstance(make_driver(SMALL["d3po"], build(env, SMALL["d3po"])), DenoisingPreferenceDriver)
