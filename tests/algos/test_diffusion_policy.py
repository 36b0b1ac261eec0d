"""Cloning chunk-denoising policies: chunks of episodes, values by hand, exact minimisers, the chain of an exact denoiser, resume, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from gymnasium import spaces

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.agents.diffusion_policy import DiffusionPolicyAgent
from markovia.algos.advantages import ChainGAE
from markovia.algos.diffusion_policy.data import ChunkData, chunk_data
from markovia.algos.diffusion_policy.loss import denoising_error, diffused, flowed, noise_level
from markovia.algos.diffusion_policy.method import Average, Chain, DiffusionNoise, FlowNoise, Imitation, TwoLayer
from markovia.algos.diffusion_policy.methods import DIFFUSION, DIFFUSION_POLICY, DPPO
from markovia.algos.offline.method import Logged
from markovia.algos.on_policy.surrogates import ChainClip
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.algos.systems import Method, find
from markovia.envs.control.chunks import make_chunk_vec
from markovia.envs.exact.offline import obstacle_data, pointmass_data
from markovia.envs.offline.sources import load
from markovia.settings import from_json, to_json

torch.set_num_threads(1)
F64 = torch.float64
POINT = "markovia/PointMass2D-v0"
DATASET = "fixture:pointmass2d/expert"
BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)


def tiny(method_id: str, **changes: Any) -> Any:
    """A cloning row with a small network and twenty updates."""
    small = {"num_env_steps": 20, "num_steps": 10, "batch_size": 16, "horizon": 4, "act_steps": 2, "network": {"hidden": 8, "depth": 1}}
    return override(configure(method_id, POINT), {**small, "noise": {"sample_steps": 4}, **changes})


# -- data -----------------------------------------------------------------------------------------------------------------------------------


def test_chunks_and_windows_stay_within_their_episode():
    # two episodes: rows 0 1 2 and 3 4
    rows = torch.arange(5.0)[:, None]
    data = ChunkData(rows, 10 * rows, torch.tensor([0, 0, 0, 3, 3]), torch.tensor([2, 2, 2, 4, 4]))
    at = torch.tensor([0, 2, 3])
    assert data.chunks(at, 4)[..., 0].tolist() == [[0, 10, 20, 20], [20, 20, 20, 20], [30, 40, 40, 40]]
    assert data.windows(at, 3)[..., 0].tolist() == [[0, 0, 0], [0, 1, 2], [3, 3, 3]]


def test_dataset_becomes_chunks_in_units_of_the_box():
    data = pointmass_data("expert", episodes=3)
    setup = build(POINT, tiny("diffusion-policy"), 0, dataset=DATASET)
    agent = setup.agent
    found = chunk_data(data, Logged(), agent)
    assert len(found) == len(data) and found.last.tolist()[:2] == [39, 39] and found.first[40] == 40
    assert torch.allclose(found.action, torch.from_numpy(data.action).clamp(-1, 1), atol=1e-6)
    norm = agent.observe(found.windows(torch.arange(len(found)), 1).numpy())
    assert torch.allclose(norm.mean(0), torch.zeros(2), atol=1e-4) and torch.allclose(norm.std(0), torch.ones(2), atol=0.02)
    best = chunk_data(data, Logged(fraction=0.3), agent)
    assert len(best) == 40


def test_episodes_are_chosen_and_ended_as_for_the_other_methods():
    """Of returns 10 at the end and 5 at the beginning the first is the larger, but not the one of larger discounted return."""
    data, agent = pointmass_data("expert", episodes=2), build(POINT, tiny("diffusion-policy"), 0, dataset=DATASET).agent
    reward = np.zeros_like(data.reward)
    reward[39], reward[40] = 10.0, 5.0
    data = dataclasses.replace(data, reward=reward)
    for gamma, episode in ((1.0, data.obs[:40]), (0.5, data.obs[40:])):
        kept = chunk_data(data, Logged(fraction=0.5, fraction_gamma=gamma), agent)
        assert np.array_equal(kept.obs.numpy(), episode)
    # a step that pays so much is its episode's last one: chunks from before repeat its action
    paid = np.flatnonzero(load(DATASET).reward >= -0.03)
    found = build(POINT, tiny("flow-policy", data={"terminate_at": -0.03}), 0, dataset=DATASET).collector.data
    assert len(paid) > 1000 and np.array_equal(found.last[paid], paid)
    assert not np.array_equal(build(POINT, tiny("flow-policy"), 0, dataset=DATASET).collector.data.last[paid], paid)


# -- what is fitted -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.check("value", "diffusion-policy")
def test_target_gives_back_chunk_and_noise(prediction):
    kernel = DiffusionNoise(train_steps=30, sample_steps=5, prediction=prediction).levels()
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 4, 2, generator=g, dtype=F64)
    step = torch.randint(1, 30, (6,), generator=g)
    x, timestep, target = diffused(kernel, x0, eps, step)
    assert torch.allclose(kernel.x0_from(target, x, step), x0, atol=1e-9) and torch.allclose(kernel.eps_from(target, x, step), eps, atol=1e-9)
    assert timestep.tolist() == [29 - int(k) for k in step]
    # the squared-cosine levels themselves: cos^2((t/T + .008)/1.008 pi/2), products of betas capped at .999
    bar = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    t = int(timestep[0])
    abar = math.prod(1 - min(1 - bar((i + 1) / 30) / bar(i / 30), 0.999) for i in range(t + 1))
    assert torch.allclose(x[0], math.sqrt(abar) * x0[0] + math.sqrt(1 - abar) * eps[0], atol=1e-5)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_the_noisiest_level_is_noise_whatever_the_number_of_levels(schedule):
    """Chains start at N(0, I), so sqrt(abar_T) must be near 0: diffusers' betas are meant for T = 1000, and stay what they are there."""
    for steps in (5, 20, 100, 1000):
        tables = DiffusionNoise(train_steps=steps, sample_steps=4, beta_schedule=schedule).levels().tables
        assert 0.0 < tables.signal[0] < 0.05
    bar = DDIMScheduler(beta_schedule=schedule).alphas_cumprod
    assert tables.signal[0] == pytest.approx(float(bar[-1].sqrt()), rel=1e-6)


@pytest.mark.check("value", "flow-policy")
def test_flow_values_by_hand():
    # sigma = .25: x = .75 * 2 + .25 * (-1) = 1.25, velocity -1 - 2 = -3, time 250
    x, t, target = flowed(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), -1.0), torch.tensor([0.25]), time_scale=1000.0)
    assert (float(x), float(t), float(target)) == (1.25, 250.0, -3.0)
    # quantile .8413447 of the normal is 1, whose logistic is .7310586
    assert float(noise_level(torch.tensor([0.8413447]), times="logit-normal")) == pytest.approx(0.7310586, abs=1e-5)
    assert noise_level(torch.tensor([0.3]), times="uniform").tolist() == pytest.approx([0.3])


@pytest.mark.check("value", "diffusion-policy", "flow-policy")
def test_weighted_error_by_hand():
    # entries 1 and 3 off: means (1 + 9)/2 = 5 and (4 + 0)/2 = 2; weights 2 and 0.5: (10 + 1)/2 = 5.5
    output, target = torch.tensor([[[1.0, 3.0]], [[2.0, 0.0]]]), torch.zeros(2, 1, 2)
    assert float(denoising_error(output, target)) == 3.5
    assert float(denoising_error(output, target, torch.tensor([2.0, 0.5]))) == 5.5


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_exact_minimiser_on_linear_gaussian_data(kind):
    """a|s ~ N(m s, v): the best linear network is E[target|x, s]; its gradient vanishes on Gauss-Hermite nodes, exact for quadratics."""
    m, v = 0.7, 0.25
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    grid = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), -1).reshape(-1, 3)
    weight = torch.from_numpy(np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * 3, indexing="ij"), -1).reshape(-1, 3), -1))
    s, z, eps = torch.from_numpy(grid).T
    a = m * s + math.sqrt(v) * z
    if kind == "flow":
        signal, noise = 0.6, 0.4
        x, _, target = flowed(a[:, None, None], eps[:, None, None], torch.full_like(s, noise), time_scale=1000.0)
    else:
        kernel = DiffusionNoise(train_steps=30, sample_steps=5, prediction=kind).levels()
        signal, noise = kernel.tables.signal[12], kernel.tables.noise[12]
        x, _, target = diffused(kernel, a[:, None, None], eps[:, None, None], torch.full(s.shape, 12))
    # E[a|x, s] = m s + signal v / V (x - signal m s), V = signal^2 v + noise^2; E[eps|x, s] = noise / V (x - signal m s)
    V = signal**2 * v + noise**2
    of_a = (signal * v / V, m - signal**2 * v * m / V)
    of_eps = (noise / V, -noise * signal * m / V)
    combine = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-noise, signal), "flow": (-1, 1)}[kind]
    best = torch.tensor([combine[0] * p + combine[1] * q for p, q in zip(of_a, of_eps, strict=True)], dtype=F64, requires_grad=True)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return denoising_error(w[0] * x + w[1] * s[:, None, None], target, weight * len(weight))

    (grad,) = torch.autograd.grad(loss(best), best)
    assert grad.abs().max() < 1e-12
    assert float(loss(best.detach() + 0.1)) > float(loss(best.detach())) + 1e-3
    assert torch.autograd.gradcheck(loss, (best.detach() + 0.3).requires_grad_())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_chain_of_the_exact_denoiser(eta):
    """The exact network of N(m s, v) is linear, so its chain stays Gaussian: mean m s, variance by the sampler's recursion, which tends to v.

    x0 = m s + a v / V (x - a m s),  eps = b / V (x - a m s),  x' = a' x0 + sqrt(b'^2 - d^2) eps + d z  [a signal, b noise, V = a^2 v + b^2]
    """
    m, v, s = 0.5, 0.04, 0.8
    noise = DiffusionNoise(sample_steps=50, clip_x0=None, eta=eta)
    kernel, greedy = noise.kernels()
    levels = noise.levels()
    signal, sigma = (torch.tensor(getattr(levels.tables, k), dtype=torch.float32) for k in ("signal", "noise"))

    class Exact(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, timestep: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
            a, b = (c[99 - timestep][:, None, None] for c in (signal, sigma))
            return self.one * b / (a**2 * v + b**2) * (x - a * m * window[:, None])

    variance = 1.0
    ends = [*zip(kernel.tables.signal, kernel.tables.noise, strict=True), (1.0, 0.0)]
    for (a, b), (a1, b1) in itertools.pairwise(ends):
        V, d2 = a * a * v + b * b, eta**2 * (b1 / b) ** 2 * (1 - (a / a1) ** 2)
        variance = (a1 * a * v / V + math.sqrt(b1**2 - d2) * b / V) ** 2 * variance + d2
    assert variance == pytest.approx(v, rel=0.25)  # 50 steps are somewhat too narrow
    obs = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    agent = DiffusionPolicyAgent.from_spaces(obs, BOX, Exact(), kernel, greedy, horizon=1, act_steps=1, obs_steps=1, normalize_obs=False)
    x = agent.chain(torch.full((8000, 1), s), eta == 0.0, torch.Generator().manual_seed(0))[:, -1]
    assert float(x.mean()) == pytest.approx(m * s, abs=0.01) and float(x.var()) == pytest.approx(variance, rel=0.06)


# -- cloning --------------------------------------------------------------------------------------------------------------------------------


def test_weights_that_act_are_the_growing_average():
    method = tiny("diffusion-policy", average={"power": 0.75, "limit": 0.5})
    driver = make_driver(method, build(POINT, method, 1, dataset=DATASET), seed=1)
    start = torch.cat([p.detach().flatten().clone() for p in driver.network.parameters()])
    generator, mean = torch.Generator().manual_seed(0), start
    for n in (1, 2, 3):
        driver.num_env_steps = n
        driver.update(generator)
        now = torch.cat([p.detach().flatten() for p in driver.network.parameters()])
        decay = min(0.5, 1 - (1 + n) ** -0.75)
        mean = decay * mean + (1 - decay) * now
    acting = torch.cat([p.detach().flatten() for p in driver.agent.net["policy"].parameters()])
    assert torch.allclose(acting, mean, atol=1e-6) and not torch.allclose(acting, now, atol=1e-6)
    assert Average(limit=0.0).decay(5) == 0.0 and Average().decay(1) == pytest.approx(1 - 2**-0.75)


@pytest.mark.parametrize("method_id", ["diffusion-policy", "flow-policy"])
@pytest.mark.check("resume")
def test_half_and_half_equals_a_whole_when_cloning(method_id, tmp_path):
    method = tiny(method_id)
    make = lambda: make_driver(method, build(POINT, method, 5, dataset=DATASET), seed=5)  # noqa: E731
    straight = make()
    straight.step()
    straight.boundary()
    save_tensors(tmp_path / "state.safetensors", *straight.state())
    stats = straight.step()
    resumed = make()
    resumed.load_state(*load_tensors(tmp_path / "state.safetensors"))
    assert resumed.step() == stats and straight.finished and math.isfinite(stats["loss"])
    a, b = straight.state()[0], resumed.state()[0]
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="dataset has changed"):
        other = make_driver(method, build(POINT, method, 5, dataset="fixture:pointmass2d/random"), seed=5)
        other.load_state(*load_tensors(tmp_path / "state.safetensors"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusionNoise(sample_steps=200), "sample_steps <= train_steps"),
        (lambda: DiffusionNoise(sampler="ddpm", eta=0.5), "eta is the noise of ddim"),
        (lambda: FlowNoise(sample_steps=0), "sample_steps must be >= 1"),
        (lambda: Average(limit=1.0), "limit < 1"),
        (lambda: Imitation(act_steps=17), "expected 1 to 16, got 17"),
        (lambda: Imitation(data=Logged(next_action=True)), "observations and actions alone"),
        (lambda: Imitation(data=Logged(compat="d4rl")), "data.compat"),
        *((lambda k=k, v=v: Imitation(solver=dataclasses.replace(DIFFUSION.solver, **{k: v})), rf"solver.{k} has no meaning.*batch_size")
          for k, v in {"minibatch": 32, "epochs": 2, "micro": 8, "kl_stop_nats": 0.1, "recompute_advantage": True, "value_lr": 0.1,
                       "unit": "row"}.items()),
        (lambda: Chain(tuned_steps=0), "tuned_steps must be >= 1"),
        (lambda: TwoLayer(), "must be ChainGAE"),
        (lambda: dataclasses.replace(DPPO, normalize_obs=True), "normalize_obs=False"),
        (lambda: ChainClip(clip=0.01, base=0.1), "0 < base <= clip"),
        (lambda: ChainClip()(torch.zeros(1, 1), torch.zeros(1, 1), None, torch.zeros(())), "no column `stage`"),
        (lambda: ChainGAE(denoising_discount=1.5), "denoising_discount must lie in"),
    ],
)
@pytest.mark.check("bad_input", "diffusion-policy", "flow-policy", "dppo")
def test_settings_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_are_whole_and_survive_the_run_folder():
    for name, row in DIFFUSION_POLICY.items():
        assert find(name) is row and find(row.parent) and row.kinds == ("control",)
        assert from_json(Method, json.loads(json.dumps(to_json(row.value)))) == row.value


def test_obstacle_data_hold_both_ways():
    data = obstacle_data(episodes=60)
    first, end = data.bounds()
    middle = [data.obs[a:b][np.abs(data.obs[a:b, 0]).argmin(), 1] for a, b in zip(first, end, strict=True)]
    assert np.mean(np.array(middle) > 0) == pytest.approx(0.5, abs=0.25) and 0.25 < data.returns().mean() < 0.75
    assert set(np.unique(data.returns())) == {0.0, 1.0} and not data.truncated.any()
    venv = make_chunk_vec("markovia/PointObstacle-v0", 2, 4, 2, seed=0)
    assert venv.single_action_space.shape == (4, 2) and venv.spec.max_episode_steps == 60
    venv.close()


def test_data_of_another_task_are_refused():
    for env, dataset, message in ((POINT, None, "name one"), ("Pendulum-v1", DATASET, "observations"), ("CartPole-v1", DATASET, "needs Boxes")):
        with pytest.raises(ValueError, match=message):
            build(env, tiny("diffusion-policy"), 0, dataset=dataset)
