"""The agent that denoises chunks: densities of chains, plans, checkpoints, the frozen part, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.chunk_networks import UNet1DChunk
from markovia.agents.diffusion_policy import DiffusionPolicyAgent, chunk_log_prob, floored
from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.algos.diffusion_policy.collect import unrolled
from markovia.algos.diffusion_policy.method import DiffusionNoise, FlowNoise
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import MLPDenoiser

torch.set_num_threads(1)
F64 = torch.float64
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 4.0], np.float32))
NOISES = {
    "ddim": DiffusionNoise(train_steps=20, sample_steps=5),
    "ddpm": DiffusionNoise(train_steps=20, sample_steps=5, sampler="ddpm", clip_x0=None),
    "v": DiffusionNoise(train_steps=20, sample_steps=5, prediction="v_prediction", eta=0.5),
    "flow": FlowNoise(sample_steps=5),
}


def made(noise: str = "ddim", floor: float | None = 0.1, **options: Any) -> DiffusionPolicyAgent:
    """A small agent: chunks of 4 actions of which 2 are executed, windows of 2 observations."""
    torch.manual_seed(0)
    kernel, greedy = NOISES[noise].kernels()
    network = MLPDenoiser((4, 2), hidden=8, depth=1, time_scale=NOISES[noise].time_scale, cond_dim=6)
    options = {"horizon": 4, "act_steps": 2, "obs_steps": 2, "critic_hidden": (8,), **options}
    return DiffusionPolicyAgent.from_spaces(OBS, BOX, network, kernel if floor is None else floored(kernel, floor), greedy, **options)


def record(agent: DiffusionPolicyAgent, n: int = 3) -> tuple[torch.Tensor, Rollout]:
    """Chains of n windows and the record of their denoising steps."""
    g = torch.Generator().manual_seed(1)
    window = torch.randn(n, 6, generator=g, dtype=next(agent.net.parameters()).dtype)
    chain = agent.sample(window, g)
    obs, action = unrolled(window[:, None], chain[:, None], agent.kernel.num_steps)
    shape = obs["step"].shape
    zero, true = window.new_zeros(shape), torch.ones(shape, dtype=torch.bool)
    return chain, Rollout(obs, action, zero, zero, true, true, zero, ~true)


# -- densities ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_log_prob_of_a_chain_in_float64(noise, reduce):
    agent = made(noise, tuned_steps=3, reduce=reduce)
    agent.net.double()
    chain, rollout = record(agent)
    logp = agent.evaluate(rollout, ("logp",)).logp.detach()
    assert chain.shape == (3, 4, 4, 2) and logp.shape == (3, 3)
    for row in range(3):
        for i, k in enumerate((2, 3, 4)):
            # the network and the scheduler's constants by themselves, one number at a time
            x, t = chain[row, i], agent.kernel.tables.timesteps[k]
            m = agent.net["policy"](x[None], torch.tensor([t], dtype=F64), rollout.obs["obs"][row, :1])[0].detach()
            c = {name: values[k] for name, values in vars(agent.kernel.tables).items()}
            x0, eps = c["x0_x"] * x + c["x0_m"] * m, c["eps_x"] * x + c["eps_m"] * m
            if agent.kernel.clip_x0 is not None:
                x0 = x0.clamp(-1.0, 1.0)
                eps = (x - c["signal"] * x0) / c["noise"]
            mean, s = c["mean_x0"] * x0 + c["mean_eps"] * eps + c["mean_x"] * x, max(c["std"], 0.1)
            entries = [
                -((float(chain[row, i + 1, h, j]) - float(mean[h, j])) ** 2) / (2 * s * s) - math.log(s) - 0.5 * math.log(2 * math.pi)
                for h in range(2)  # executed steps alone
                for j in range(2)
            ]
            expected = sum(entries) if reduce == "sum" else sum(entries) / 4
            assert float(logp[row, i]) == pytest.approx(expected, abs=1e-6)


def test_entries_are_cut_before_the_mean_and_then_have_no_gradient():
    # std 0.1: an entry is log(1/(0.1 sqrt(2 pi))) - z^2/2 = 1.3836 - z^2/2; z = 1 gives 0.8836, z = 4 gives -6.616, cut to -5
    mean = torch.zeros(1, 2, 1, dtype=F64, requires_grad=True)
    action, std = torch.tensor([[[0.1], [0.4]]], dtype=F64), torch.full((1, 1, 1), 0.1, dtype=F64)
    logp = chunk_log_prob(action, mean, std, executed=2, entry_range=(-5.0, 2.0), reduce="mean")
    assert float(logp.detach()) == pytest.approx((0.88364656 - 5.0) / 2, abs=1e-7)
    (grad,) = torch.autograd.grad(logp.sum(), mean)
    assert grad.flatten().tolist() == pytest.approx([0.5 * 0.1 / 0.01, 0.0])


def test_first_pass_has_ratio_one_and_act_agrees_with_evaluate():
    agent = made("ddim", tuned_steps=3, noise_clip=3.0)
    window = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    chain, logp = agent.act(window, generator=torch.Generator().manual_seed(3))
    obs, action = unrolled(window[:, None], chain[:, None], 5)
    zero = torch.zeros(5, 3)
    rollout = Rollout(obs, action, zero, zero, zero == 0, zero == 0, zero, zero != 0)
    assert torch.equal(agent.evaluate(rollout, ("logp",)).logp.sum(1), logp)
    again, _ = agent.act({k: v[:, 0] for k, v in obs.items()}, deterministic=True)
    assert torch.equal(again, agent.step_law(window, chain[:, 0], torch.full((5,), 2))[0])


def test_steps_before_the_tuned_ones_keep_the_frozen_network():
    agent = made("ddim", tuned_steps=2)
    window = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    before = agent.sample(window, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p in agent.parameters("policy"):
            p.add_(0.1)
    after = agent.sample(window, torch.Generator().manual_seed(3))
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(before[:, 1], after[:, 1])
    names = {id(p) for p in agent.parameters("policy")} | {id(p) for p in agent.parameters("value")}
    assert not names & {id(p) for p in agent.net["base"].parameters()}


def test_fine_tuning_goes_on_from_the_frozen_network_and_the_tuned_one():
    agent = made("ddim", tuned_steps=2)
    with torch.no_grad():
        for p in agent.parameters("policy"):
            p.add_(0.1)
    again = agent.tuned(kernel=floored(agent.kernel, 0.2), reduce="mean", critic_hidden=[4])
    window = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    one, two = (a.chain(window, True, torch.Generator().manual_seed(3)) for a in (agent, again))
    assert torch.equal(one, two)
    assert not {id(p) for p in agent.net.parameters()} & {id(p) for p in again.net.parameters()}
    # the steps that one network denoises can't go over to the other
    for changes in ({"tuned_steps": 3}, {"tuned_steps": None}, {"kernel": NOISES["flow"].kernels()[0], "tuned_steps": 1}):
        with pytest.raises(ValueError, match="tuned_steps=2"):
            agent.tuned(**changes)
    every = made("ddim", tuned_steps=None)
    assert every.tuned(tuned_steps=3).net["base"] is not None


def test_value_and_sampling_noise():
    agent = made("ddim", noise_clip=0.5, tuned_steps=3)
    _, rollout = record(agent)
    value = agent.evaluate(rollout, ("value",)).value
    assert value.shape == (3, 3, 1) and torch.allclose(value[:, 0], value[:, 2], atol=1e-6)  # the noisy chunk is not seen
    mean, std = agent.step_law(rollout.obs["obs"].flatten(0, 1), rollout.obs["x"].flatten(0, 1), rollout.obs["step"].flatten())
    z = (rollout.action.flatten(0, 1) - mean) / std
    assert float(z.detach().abs().max()) <= 0.5 + 1e-5 and float(std.min()) >= 0.1 - 1e-7


def test_greedy_chain_is_an_ode():
    agent = made("flow")
    window = torch.zeros(1, 6)
    x = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(5))
    chain = agent.chain(window, deterministic=True, generator=torch.Generator().manual_seed(5))
    for k in range(5):  # Euler: sigma = 1, .8, .6, .4, .2
        x = x - 0.2 * agent.net["policy"](x, torch.tensor([1000.0 * (1 - 0.2 * k)]), window)
    assert torch.allclose(chain[:, -1], x, atol=1e-5)


# -- acting -------------------------------------------------------------------------------------------------------------------------------


def test_chunks_reach_the_box_and_are_executed_in_order():
    agent = made("ddim")
    chain = torch.zeros(1, 2, 4, 2)
    chain[0, -1] = torch.tensor([[1.0, 0.0], [-3.0, -1.0], [9.0, 9.0], [9.0, 9.0]])
    # x in [-1, 1] goes to the Box [-1, 1] x [-2, 4], clipped; two steps are executed
    assert np.allclose(agent.env_action(chain), [[[1.0, 1.0], [-1.0, -2.0]]])


def test_predict_plans_anew_when_the_chunk_is_used_up_or_an_episode_begins(monkeypatch):
    agent = made("ddim", normalize_obs=False)
    seen: list[torch.Tensor] = []

    def chain(window: torch.Tensor, deterministic: bool, generator: Any) -> torch.Tensor:
        seen.append(window)
        out = torch.zeros(len(window), 2, 4, 2)
        out[:, -1, :, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4]) * len(seen)
        return out

    monkeypatch.setattr(agent, "chain", chain)
    obs = lambda t: np.stack([np.full(3, t), np.full(3, 10.0 + t)]).astype(np.float32)  # noqa: E731
    a0, state = agent.predict(obs(0), None, np.ones(2, bool), True)
    a1, state = agent.predict(obs(1), state, np.zeros(2, bool), True)
    a2, state = agent.predict(obs(2), state, np.array([False, True]), True)  # both plan: used up, and a new episode
    a3, state = agent.predict(obs(3), state, np.array([False, True]), True)  # only the second
    assert np.allclose([a[:, 0] for a in (a0, a1, a2, a3)], [[0.1, 0.1], [0.2, 0.2], [0.2, 0.2], [0.4, 0.3]])
    assert [len(w) for w in seen] == [2, 2, 1]
    assert seen[0].tolist() == [[0.0] * 6, [10.0] * 6]  # the first observation is repeated
    assert seen[1].tolist() == [[1.0] * 3 + [2.0] * 3, [12.0] * 6] and seen[2].tolist() == [[13.0] * 6]


def test_greedy_predictions_are_reproducible_and_single_observations_are_taken():
    agent = made("flow")
    one = np.zeros(3, np.float32)
    torch.manual_seed(1)
    a, state = agent.predict(one, deterministic=True)
    torch.manual_seed(2)
    b, _ = agent.predict(one, deterministic=True)
    assert a.shape == (2,) and np.array_equal(a, b) and BOX.contains(a)
    assert not np.array_equal(a, agent.predict(one)[0])
    assert agent.predict(one, state, deterministic=True)[1].place.tolist() == [2]


# -- checkpoints ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuned", [None, 2])
def test_checkpoint_round_trip(tmp_path, tuned):
    agent = made("ddim", tuned_steps=tuned, entry_range=(-5.0, 2.0), reduce="mean", noise_clip=3.0)
    agent.net["normalizer"].norms[0].set_moments(torch.arange(3.0), torch.full((3,), 2.0), 10)
    with torch.no_grad():
        for p in agent.parameters("policy"):
            p.add_(0.05)
    agent.save(tmp_path / "agent")
    back = Agent.load(tmp_path / "agent")
    assert isinstance(back, DiffusionPolicyAgent) and back.config() == agent.config()
    obs = np.ones((2, 3), np.float32)
    assert np.array_equal(agent.predict(obs, deterministic=True)[0], back.predict(obs, deterministic=True)[0])
    window = agent.observe(obs[:, None].repeat(2, 1))
    assert torch.equal(agent.sample(window, torch.Generator().manual_seed(0)), back.sample(window, torch.Generator().manual_seed(0)))


class Own(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.w * x


def test_a_network_of_the_users_own_must_be_passed(tmp_path):
    kernel = GaussianKernel.direct([0.5, 0.2])
    agent = DiffusionPolicyAgent.from_spaces(OBS, BOX, Own(), kernel, horizon=1, act_steps=1, obs_steps=1)
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match="pass it"):
        Agent.load(tmp_path / "agent")
    assert float(Agent.load(tmp_path / "agent", network=Own()).net["policy"].w.detach()) == 1.0


def test_unet_pads_the_chunk_and_travels_with_the_agent(tmp_path):
    kernel, greedy = NOISES["ddim"].kernels()
    network = UNet1DChunk(5, 2, 6, channels=(8, 16), time_scale=20.0)
    agent = DiffusionPolicyAgent.from_spaces(OBS, BOX, network, kernel, greedy, horizon=5, act_steps=2, obs_steps=2)
    agent.save(tmp_path / "agent")
    obs = np.zeros((2, 3), np.float32)
    assert np.array_equal(Agent.load(tmp_path / "agent").predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    # what is beyond the chunk repeats its end: a chunk and its longer self agree where both are
    x, t, w = torch.randn(3, 5, 2), torch.arange(3), torch.randn(3, 6)
    longer = UNet1DChunk(6, 2, 6, channels=(8, 16), time_scale=20.0)
    longer.load_state_dict(network.state_dict())
    assert torch.allclose(network(x, t, w), longer(torch.cat([x, x[:, -1:]], 1), t, w)[:, :5], atol=1e-6)
    changed = w.clone()
    changed[:, 0] += 1.0
    assert not torch.allclose(network(x, t, w), network(x, t, changed))


# -- bad input ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_steps": 5}, "act_steps <= horizon"),
        ({"tuned_steps": 6}, "expected 1 to 5, got 6"),
        ({"reduce": "median"}, "'sum' or 'mean'"),
        ({"floor": 0.0}, "min_std must be > 0"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        made("ddim", **options)


def test_other_spaces_are_refused():
    kernel = GaussianKernel.direct([0.5])
    with pytest.raises(ValueError, match="denoises continuous actions"):
        DiffusionPolicyAgent.from_spaces(OBS, spaces.Discrete(3), Own(), kernel)
    with pytest.raises(ValueError, match="FlattenObservation"):
        DiffusionPolicyAgent.from_spaces(spaces.Dict(a=OBS), BOX, Own(), kernel)
    with pytest.raises(ValueError, match="no critic"):
        agent = made("ddim", critic_hidden=None)
        agent.evaluate(record(agent)[1], ("value",))
