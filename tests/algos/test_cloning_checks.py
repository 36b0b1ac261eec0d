"""The cloning rows' whole loss: its gradient, the order and the split of a minibatch, and plain imitation where the noised chunk tells nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from markovia.algos.diffusion_policy.driver import ImitationDriver
from markovia.algos.diffusion_policy.loss import denoising_error, diffused, flowed
from markovia.algos.diffusion_policy.method import DiffusionNoise
from markovia.algos.off_policy.regularised import squared_distance
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver

F64 = torch.float64
POINT = "markovia/PointMass2D-v0"
CLONING = ["diffusion-policy", "flow-policy"]


def driver_of(method_id: str) -> ImitationDriver:
    """A small network in float64, on data of the point mass."""
    small = {"num_env_steps": 20, "num_steps": 10, "batch_size": 6, "horizon": 4, "act_steps": 2, "network": {"hidden": 8, "depth": 1}}
    method = override(configure(method_id, POINT), {**small, "noise": {"sample_steps": 4}})
    driver: Any = make_driver(method, build(POINT, method, 5, dataset="fixture:pointmass2d/expert"), seed=5)
    driver.agent.net.double()
    driver.network.double()
    driver.collector.data = dataclasses.replace(driver.collector.data, action=driver.collector.data.action.double())
    with torch.no_grad():  # the last layer begins at zero
        for p in driver.network.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=F64))
    return driver


@pytest.mark.parametrize("method_id", CLONING)
@pytest.mark.check("gradient")
def test_gradient_of_the_loss_matches_finite_differences(method_id: str) -> None:
    driver = driver_of(method_id)

    def loss() -> torch.Tensor:
        return driver.loss(torch.arange(6) * 3, torch.Generator().manual_seed(1))

    params = list(driver.network.parameters())
    grads = torch.autograd.grad(loss(), params)
    assert max(float(g.abs().max()) for g in grads) > 1e-3
    for p, g in zip(params, grads, strict=True):
        for i in {0, p.numel() // 2, p.numel() - 1}:  # two or three weights of every layer
            values = []
            with torch.no_grad():
                for h in (1e-6, -2e-6, 1e-6):
                    p.view(-1)[i] += h
                    values.append(float(loss()))
            assert float(g.view(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("method_id", CLONING)
@pytest.mark.check("invariance")
def test_order_and_split_of_a_minibatch_change_nothing(method_id: str) -> None:
    driver = driver_of(method_id)
    g = torch.Generator().manual_seed(2)
    rows, eps = torch.arange(6) * 3, torch.randn(6, 4, 2, generator=g, dtype=F64)
    level = torch.tensor([0, 5, 9, 20, 33, 40])

    def error(index: torch.Tensor) -> torch.Tensor:
        x0 = driver.collector.data.chunks(rows[index], 4)
        window = driver.agent.observe(driver.collector.data.windows(rows[index], driver.method.obs_steps).numpy())
        if driver.levels is not None:
            x, timestep, target = diffused(driver.levels, x0, eps[index], level[index])
        else:
            x, timestep, target = flowed(x0, eps[index], level[index] / 50, time_scale=1000.0)
        return denoising_error(driver.network(x, timestep, window), target)

    whole = error(torch.arange(6))
    torch.testing.assert_close(error(torch.tensor([4, 2, 0, 5, 1, 3])), whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((error(torch.arange(3)) + error(torch.arange(3, 6))) / 2, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.check("limit", "diffusion-policy", "flow-policy")
def test_at_pure_noise_the_loss_is_that_of_imitation() -> None:
    """Where the noised chunk tells nothing of the action, a network of the window alone has bc's mean squared distance."""
    g = torch.Generator().manual_seed(0)
    chunk, eps, clone = (torch.randn(5, 4, 2, generator=g, dtype=F64) for _ in range(3))
    imitation = squared_distance(clone.flatten(1), chunk.flatten(1), reduce="mean").mean()
    x, _, target = flowed(chunk, eps, torch.ones(5, dtype=F64), time_scale=1000.0)
    torch.testing.assert_close(x, eps)  # the network sees the noise, and may give x - clone
    torch.testing.assert_close(denoising_error(x - clone, target), imitation)
    _, _, target = diffused(DiffusionNoise(prediction="sample").levels(), chunk, eps, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(denoising_error(clone, target), imitation)
