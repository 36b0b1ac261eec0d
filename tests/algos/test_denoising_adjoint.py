"""Adjoint matching: the lean adjoint, the loss, exact fixed points, training to the closed-form optimum, bad input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from denoising_pieces import F64, ddim, gen
from torch import Tensor

from markovia.agents.denoising import DenoisingAgent
from markovia.algos.collect import SequenceCollector
from markovia.algos.denoising.adjoint import AdjointMatching, chain_of, lean_adjoint, matching_loss, reward_gradient, strata
from markovia.algos.denoising.driver import AdjointDriver
from markovia.algos.denoising.sampling import predictor
from markovia.algos.on_policy.method import Descent
from markovia.algos.presets import configure
from markovia.algos.setup import build, make_driver
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import MLPDenoiser
from markovia.envs.denoising.tasks import make_task
from markovia.envs.exact.denoisers import LinearGaussianDenoising


def point_task(reward: Any) -> DenoisingTask:
    return DenoisingTask(MLPDenoiser((1,), 8, 1), GaussianKernel.memoryless(ddim(), 4), reward, (1,))


def small_driver(seed: int = 0, **options: Any) -> AdjointDriver:
    task = make_task("linear_gaussian")
    method = AdjointMatching(**{"num_env_steps": 256, "num_envs": 16, "lam": 2.0, "solver": Descent(lr=0.01, epochs=2, minibatch=32), **options})
    agent = DenoisingAgent.from_task(task, critic_hidden=None)
    return AdjointDriver(method, agent, SequenceCollector(task, method.num_envs), seed)


@pytest.mark.check("value", "adjoint-matching")
@pytest.mark.check("gradient", "adjoint-matching")
def test_matching_loss_by_hand_and_its_gradient() -> None:
    # u = (1, -2), a = (3, 1), s = 0.5: (1 + 1.5)^2 + (-2 + 0.5)^2 = 6.25 + 2.25 = 8.5
    u, a, s = torch.tensor([[1.0, -2.0]], dtype=F64, requires_grad=True), torch.tensor([[3.0, 1.0]], dtype=F64), torch.tensor([[0.5]], dtype=F64)
    assert matching_loss(u, a, s).tolist() == [8.5] and matching_loss(u, a, s, "mean").tolist() == [4.25]
    assert torch.autograd.gradcheck(lambda u: matching_loss(u, a, s), (u,))
    held = a.clone().requires_grad_(True)
    matching_loss(u, held, s).sum().backward()
    assert held.grad is None


def test_lean_adjoint_is_the_product_of_the_references_jacobians() -> None:
    net = MLPDenoiser((2,), 8, 1).double()
    kernel = GaussianKernel.memoryless(ddim(), 4)
    predict = predictor(kernel, net)
    chain, gradient = torch.randn(3, 5, 2, dtype=F64, generator=gen()), torch.randn(3, 2, dtype=F64, generator=gen(1))

    def mean(x: Tensor, k: int) -> Tensor:
        return kernel.mean_std(predict(x, k), x, k)[0]

    found = lean_adjoint(mean, chain, gradient, lam=0.7)
    assert torch.equal(found[:, -1], -0.7 * gradient)
    for i in range(3):
        row = -0.7 * gradient[i]
        for k in (3, 2, 1, 0):
            row = row @ torch.autograd.functional.jacobian(lambda x, k=k: mean(x[None], k)[0], chain[i, k])
            torch.testing.assert_close(found[i, k], row, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.check("limit", "adjoint-matching")
def test_the_closed_form_optimum_is_the_fixed_point_of_the_next_index_only(num_steps: int) -> None:
    """Everything is affine, so E[a_{k+1} | x_k] is the adjoint of the noise-free continuation under the optimal policy."""
    problem = LinearGaussianDenoising([[1 - 0.5 / num_steps]], [0.1], num_steps**-0.5, [[1.0]], [0.8], beta=0.5, num_steps=num_steps)
    G, h = problem.optimal()
    worst = {"next": 0.0, "current": 0.0}
    for k in range(num_steps):
        chain = [torch.tensor([[-1.0], [2.0]], dtype=F64)]
        for j in range(k, num_steps):
            chain.append(chain[-1] @ G[j].T + h[j])
        at_end = problem.q - chain[-1] @ problem.Q
        adjoint = lean_adjoint(lambda x, j, k=k: x @ problem.A[k + j].T + problem.b[k + j], torch.stack(chain, 1), at_end, lam=1 / problem.beta)
        control = (chain[1] - (chain[0] @ problem.A[k].T + problem.b[k])) / problem.s[k]
        for name, i in (("next", 1), ("current", 0)):
            worst[name] = max(worst[name], float((control + problem.s[k] * adjoint[:, i]).abs().max()))
    assert worst["next"] < 1e-12 and worst["current"] > 1e-2


def test_adjoint_matching_learns_the_closed_form_optimum() -> None:
    problem = LinearGaussianDenoising()
    solver = Descent(lr=0.02, epochs=1, minibatch=None, max_grad_norm=100.0)
    driver = small_driver(num_env_steps=4096, num_envs=64, lam=1 / problem.beta, solver=solver)
    while not driver.finished:
        driver.step()
    policy = driver.agent.net["policy"]
    assert problem.gap_fraction(policy.G, policy.h) < 0.02


def test_reward_gradients_against_the_closed_form() -> None:
    task, problem = make_task("linear_gaussian"), LinearGaussianDenoising()
    x = torch.randn(4, 2, dtype=F64, generator=gen())
    torch.testing.assert_close(reward_gradient(task, x), problem.q - x @ problem.Q)


def test_strata_draw_one_step_from_each_part() -> None:
    drawn = strata(500, 12, 4, gen())
    assert bool((drawn.unflatten(1, (4, 3)).sum(-1) == 1).all()) and drawn.float().mean(0).tolist() == pytest.approx([1 / 3] * 12, abs=0.08)
    assert bool(strata(3, 5, 9, gen()).all())  # more strata than steps: every step


def test_only_drawn_steps_are_trained_and_outliers_are_left_out() -> None:
    driver = small_driver(steps_per_chain=2)
    rollout = driver.collector.collect(driver.agent, gen())
    driver.prepare(rollout)
    assert bool((rollout.mask.sum(1) == 2).all()) and torch.equal(chain_of(rollout)[:, :-1], rollout.obs["x"])
    strict = small_driver(drop_quantile=0.5)
    strict.prepare(rollout := strict.collector.collect(strict.agent, gen()))
    every = small_driver().loss(rollout)[0].detach()
    assert bool(strict.loss(rollout)[0].detach() < every) and strict.root_loss_limit is not None


def test_the_index_chooses_the_adjoint() -> None:
    columns = []
    for index in ("next", "current"):
        driver = small_driver(index=index)
        driver.prepare(rollout := driver.collector.collect(driver.agent, gen()))
        columns.append(rollout.columns["adjoint"])
    assert torch.equal(columns[0][:, :-1], columns[1][:, 1:])


@pytest.mark.check("invariance", "adjoint-matching")
def test_permutation_of_the_batch_does_not_change_the_loss() -> None:
    driver = small_driver()
    driver.prepare(rollout := driver.collector.collect(driver.agent, gen()))
    with torch.no_grad():
        driver.agent.net["policy"].h.add_(0.1)
    order = torch.randperm(16, generator=gen())
    torch.testing.assert_close(driver.loss(rollout)[0], driver.loss(rollout.rows(order))[0])


# -- bad input -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: AdjointMatching(lam=0.0), "1/beta"),
        (lambda: AdjointMatching(index="nxt"), "did you mean 'next'"),
        (lambda: AdjointMatching(steps_per_chain=0), "at least 1"),
        (lambda: AdjointMatching(solver=Descent(micro=4, kl_stop_nats=0.1)), "solver.micro, solver.kl_stop_nats has no meaning"),
        (lambda: AdjointMatching(solver=Descent(value_lr=0.1)), "solver.value_lr has no meaning"),
        (lambda: AdjointMatching(drop_quantile=1.0), r"share in \(0, 1\)"),
        (lambda: reward_gradient(point_task(lambda x, c: [0.0] * len(x)), torch.zeros(2, 1)), "no gradient.*it returned list"),
        (lambda: reward_gradient(point_task(lambda x, c: (x[:, 0] > 0).float()), torch.zeros(2, 1)), "Tensor without a graph"),
        (lambda: reward_gradient(point_task(lambda x, c: x[:, 0].abs().sqrt()), torch.zeros(2, 1)), "not finite"),
        (lambda: adjoint_on(eta=1.0), "final='mid'"),
        (lambda: adjoint_on(eta=0.3, final="mid"), "remembers its starting noise"),
    ],
)
@pytest.mark.check("bad_input", "adjoint-matching")
def test_bad_input_is_explained(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def adjoint_on(**options: Any) -> AdjointDriver:
    """Adjoint matching of a small network on a kernel of one's own."""
    kernel = GaussianKernel.from_scheduler(ddim(), 10, **options)
    task = DenoisingTask(MLPDenoiser((1,), 8, 1), kernel, lambda x, c: x[:, 0], (1,))
    return AdjointDriver(AdjointMatching(), DenoisingAgent.from_task(task, critic_hidden=None), SequenceCollector(task, 4))


def test_trainers_are_built_from_the_table_and_samplers_are_refused() -> None:
    env = "markovia/LinearGaussian-v0"
    setup = build(env, configure("adjoint-matching", env))
    assert isinstance(make_driver(configure("adjoint-matching", env), setup), AdjointDriver) and setup.agent.critic is None
    for method_id in ("rlg", "fk-steering", "itps"):
        with pytest.raises(ValueError, match="trains nothing"):
            configure(method_id, env)
    with pytest.raises(ValueError, match="CartPole-v1 is a control task"):
        build("CartPole-v1", AdjointMatching())


def test_other_kinds_of_agents_are_refused() -> None:
    other: Any = SimpleNamespace(kind="language")
    with pytest.raises(ValueError, match="AdjointMatching trains denoising agents, got kind 'language'"):
        AdjointDriver(AdjointMatching(), other, SequenceCollector(make_task("linear_gaussian"), 2))
