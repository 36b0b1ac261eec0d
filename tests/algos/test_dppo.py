"""Fine-tuning in the two-layer MDP: records, advantages and ranges by hand, ppo as the limit of one step, an exact optimum, bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from on_policy_pieces import Given, check_gradient

from markovia.agents.control import ControlAgent
from markovia.agents.diffusion_policy import DiffusionPolicyAgent
from markovia.agents.records import Rollout
from markovia.algos.advantages import ChainGAE
from markovia.algos.diffusion_policy.collect import ChainCollector
from markovia.algos.diffusion_policy.method import Chain, TwoLayer
from markovia.algos.diffusion_policy.methods import DPPO
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.loss import clip_fraction, policy_loss
from markovia.algos.on_policy.method import Descent, OnPolicy, ValueLoss
from markovia.algos.on_policy.surrogates import ChainClip, Clip, chain_clip
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, evaluate_stepped, make_driver
from markovia.envs.control.chunks import ChunkEnv
from markovia.envs.control.two_layer import TwoLayerEnv
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.exact.linear_control import LinearControl, best_gains, linear_return
from markovia.runs import train

torch.set_num_threads(1)
F64 = torch.float64
POINT = "markovia/PointMass2D-v0"
DATASET = "fixture:pointmass2d/expert"
BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)
SMALL = {"num_env_steps": 10, "num_steps": 10, "batch_size": 16, "horizon": 4, "act_steps": 2, "network": {"hidden": 8, "depth": 1}}


def cloning(method_id: str) -> Any:
    """A cloning row with a small network, ten updates and four denoising steps."""
    return override(configure(method_id, POINT), {**SMALL, "noise": {"sample_steps": 4}})


# -- chunks of an environment -----------------------------------------------------------------------------------------------------------------


class Counter(gym.Env):
    """Observes the number of steps so far; pays that number, and costs 1; terminates after `length` steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = BOX

    def __init__(self, length: int) -> None:
        self.length, self.actions = length, []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.actions.append(float(action[0]))
        return np.full(1, self.t, np.float32), float(self.t), self.t == self.length, False, {"cost": 1.0}


def test_chunk_env_adds_up_rewards_and_stops_at_the_end():
    env = ChunkEnv(Counter(5), act_steps=3, obs_steps=2)
    obs, _ = env.reset(seed=0)
    assert obs.tolist() == [[0.0], [0.0]] and env.action_space.shape == (3, 1) and env.observation_space.shape == (2, 1)
    obs, reward, terminated, _, info = env.step(np.array([[0.1], [0.2], [0.3]], np.float32))
    assert (obs.tolist(), reward, terminated, info["cost"]) == ([[2.0], [3.0]], 6.0, False, 3.0)
    obs, reward, terminated, _, info = env.step(np.array([[0.4], [0.5], [0.6]], np.float32))
    assert (obs.tolist(), reward, terminated, info["cost"], env.num_env_steps) == ([[4.0], [5.0]], 9.0, True, 2.0, 5)
    assert env.env.actions == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match="continuous actions"):
        ChunkEnv(gym.make("CartPole-v1"), 2)


@pytest.mark.parametrize(("told", "costs"), [((2,), [1.0, None]), ((1, 3, 4), [2.0, 1.0]), ((), [None, None])])
def test_chunk_env_adds_up_the_costs_that_were_told(told, costs):
    class Silent(Counter):
        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
            *step, info = super().step(action)
            return *step, info if self.t in told else {}

    env = ChunkEnv(Silent(6), act_steps=3)
    env.reset(seed=0)
    assert [env.step(np.zeros((3, 1)))[4].get("cost") for _ in costs] == costs


class Linear(torch.nn.Module):
    """m = G_k x + W_k window for chunks of one action."""

    def __init__(self, steps: int, size: int, value: float = 0.0) -> None:
        super().__init__()
        self.G = torch.nn.Parameter(torch.full((steps,), value))
        self.W = torch.nn.Parameter(torch.zeros(steps, size))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        return self.G[timestep][:, None, None] * x + (self.W[timestep] * window).sum(-1)[:, None, None]


def linear_agent(steps: int, size: int, std: list[float], start: float = 0.5, **options: Any) -> DiffusionPolicyAgent:
    """A linear policy of chunks of one action."""
    obs = spaces.Box(-np.inf, np.inf, (size,), np.float32)
    options = {"horizon": 1, "act_steps": 1, "obs_steps": 1, "normalize_obs": False, "critic_hidden": (16,), **options}
    return DiffusionPolicyAgent.from_spaces(obs, BOX, Linear(steps, size, start), GaussianKernel.direct(std), **options)


def two_layer(**chain: Any) -> TwoLayer:
    """Small settings of dppo."""
    descent = Descent(lr=1e-2, anneal=False, epochs=2, minibatch=16, max_grad_norm=1.0)
    settings = {"tuned_steps": 2, "critic_hidden": (8,), **chain}
    value = ValueLoss(coef=1.0, separate=descent)
    return dataclasses.replace(DPPO, num_env_steps=40, num_envs=2, num_steps=4, value=value, solver=descent, chain=Chain(**settings))


def counted(n: int = 2, steps: int = 4, length: int = 3, **options: Any) -> tuple[ChainCollector, DiffusionPolicyAgent]:
    venv = SyncVectorEnv([lambda: ChunkEnv(Counter(length), 1)] * n, autoreset_mode="SameStep")
    torch.manual_seed(0)
    agent = linear_agent(2, 1, [0.3, 0.2], **options)
    return ChainCollector(venv, agent, steps, scale_reward=False), agent


def test_chunks_become_denoising_steps():
    collector, agent = counted()
    rollout = collector.collect(agent, torch.Generator().manual_seed(0))
    assert rollout.shape == (2, 8) and rollout.outcome["env_steps"].tolist() == [4, 4]
    # episodes of three steps that pay 1, 2, 3; rewards and ends stand at the second denoising step
    assert rollout.reward[0].tolist() == [0, 1, 0, 2, 0, 3, 0, 1]
    assert rollout.continuation[0].tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert rollout.truncated[0].tolist() == [False] * 7 + [True] and float(rollout.boot_value[0, 7, 0]) != 0.0
    assert rollout.columns["left"][0].tolist() == [1, 0] * 4 and rollout.columns["stage"][0].tolist() == [0, 1] * 4
    assert rollout.obs["step"][0].tolist() == [0, 1] * 4
    assert rollout.obs["obs"][0, :, 0].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert torch.equal(rollout.action[:, ::2], rollout.obs["x"][:, 1::2])  # the chain goes on where it stood
    again = agent.evaluate(rollout, ("logp",)).logp
    assert torch.equal(again, rollout.logp_old) and collector.episodes == [6.0, 6.0]


@pytest.mark.check("value", "dppo")
def test_two_layer_advantage_by_hand():
    """Two chunks of two denoising steps, rewards 1 and 2, values 0.5 and 1, the episode ends: gamma .9, lam .5, gamma_d .8.

    d_2 = 2 - 1 = 1;  d_1 = 1 + .9 * 1 - .5 = 1.4;  A_2 = 1,  A_1 = 1.4 + .45 * 1 = 1.85; returns 2.35 and 2
    """
    t = lambda *x: torch.tensor([x])  # noqa: E731
    true = torch.ones(1, 4, dtype=torch.bool)
    rollout = Rollout(
        obs=t(0.0, 0.0, 0.0, 0.0), action=t(0.0, 0.0, 0.0, 0.0), logp_old=t(0.0, 0.0, 0.0, 0.0), reward=t(0.0, 1.0, 0.0, 2.0), valid=true, mask=true,
        continuation=t(1.0, 1.0, 1.0, 0.0), truncated=~true, value=t(0.5, 0.5, 1.0, 1.0)[..., None], columns={"left": t(1.0, 0.0, 1.0, 0.0)},
    )  # fmt: skip
    adv, ret = ChainGAE(gamma=0.9, lam=0.5, denoising_discount=0.8)(rollout.reward, rollout, {})
    assert adv[0].tolist() == pytest.approx([1.85, 1.85, 1.0, 1.0]) and ret[0].tolist() == pytest.approx([2.35, 2.35, 2.0, 2.0])
    assert rollout.columns["weight"][0].tolist() == pytest.approx([0.8, 1.0, 0.8, 1.0])
    # a penalty at a denoising step belongs to its chunk: -0.1 at the first step lowers A_1 by 0.1
    adv, _ = ChainGAE(gamma=0.9, lam=0.5)(rollout.reward - t(0.1, 0.0, 0.0, 0.0), rollout, {})
    assert adv[0].tolist() == pytest.approx([1.75, 1.75, 1.0, 1.0])


def test_clipping_schedule_by_hand():
    # e^3 = 20.0855: at the middle (e^1.5 - 1)/(e^3 - 1) = 3.4817/19.0855 = .18243; .001 + .009 * .18243 = .0026419
    e = chain_clip(torch.tensor([0.0, 0.5, 1.0], dtype=F64), clip=0.01, base=0.001, rate=3.0)
    assert e.tolist() == pytest.approx([0.001, 0.0026418, 0.01], abs=1e-7)
    lr, adv, none = torch.tensor([[0.3, -0.3, 0.01]], dtype=F64), torch.tensor([[1.0, -1.0, 2.0]], dtype=F64), torch.zeros(())
    flat = ChainClip(clip=0.2, base=0.2)(lr, adv, None, none, torch.tensor([[0.0, 0.5, 1.0]], dtype=F64))
    assert torch.allclose(flat, Clip(0.2)(lr, adv, None, none))
    # at the noisiest step the range is 0.1: min(e^.3, 1.1) = 1.1
    assert float(ChainClip(clip=0.2, base=0.1)(lr, adv, None, none, torch.zeros(1, 3, dtype=F64))[0, 0]) == pytest.approx(1.1)
    point = torch.tensor([[0.02, -0.03, 0.01]], dtype=F64, requires_grad=True)
    stage = torch.tensor([[0.0, 0.5, 1.0]], dtype=F64)
    assert torch.autograd.gradcheck(lambda x: ChainClip(clip=0.2, base=0.05)(x, adv, None, none, stage), (point,))


def test_share_of_clipped_steps_goes_by_each_stages_range():
    """Ranges .01, .0474 and .2 at stages 0, .5 and 1: of ratios 1.05 the first two have left theirs; a surrogate with one range counts by that."""
    log_ratio, mask = torch.full((1, 3), math.log(1.05)), torch.ones(1, 3, dtype=torch.bool)
    staged, stage = dataclasses.replace(DPPO, surrogate=ChainClip(clip=0.2, base=0.01)), torch.tensor([[0.0, 0.5, 1.0]])
    assert float(clip_fraction(staged, log_ratio, mask, stage)) == pytest.approx(2 / 3)
    assert float(clip_fraction(OnPolicy(surrogate=Clip(0.2)), log_ratio, mask, stage)) == 0.0
    # and the loss reports it: a chunk of two denoising steps whose ratios are all 1.05
    driver, _ = doubled()
    rollout = driver.collector.collect(driver.agent, torch.Generator().manual_seed(0))
    rollout.columns["adv"] = torch.zeros_like(rollout.reward)
    rollout.logp_old = rollout.logp_old - math.log(1.05)
    omega = torch.full(rollout.shape, 1 / 16, dtype=F64)
    _, stats = policy_loss(staged, driver.agent, rollout, omega, torch.tensor(1.0), False)
    assert float(stats["clip_fraction"]) == pytest.approx(0.5)


@pytest.mark.check("limit", "dppo")
def test_one_denoising_step_is_plain_ppo():
    """K = 1 with a network that does not look at its noise: loss and gradient of dppo are those of ppo with a Gaussian of the same std."""
    torch.manual_seed(0)
    obs = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    plain = ControlAgent.from_spaces(obs, BOX, hidden=(8,), std="fixed", log_std_init=math.log(0.3), normalize_obs=False)
    mean = plain.net["policy"]

    class Blind(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mean

        def forward(self, x: torch.Tensor, timestep: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
            return self.inner(window)[0][:, None]

    agent = DiffusionPolicyAgent.from_spaces(
        obs, BOX, Blind(), GaussianKernel.direct([0.3]), horizon=1, act_steps=1, obs_steps=1, normalize_obs=False, critic_hidden=(8,)
    )
    g = torch.Generator().manual_seed(1)
    seen, action, adv = torch.randn(6, 1, 3, generator=g), torch.randn(6, 1, 1, generator=g), torch.randn(6, 1, generator=g)
    true = torch.ones(6, 1, dtype=torch.bool)

    def part(inner: bool) -> Rollout:
        where = {"obs": seen, "x": torch.randn(6, 1, 1, 1), "step": torch.zeros(6, 1, dtype=torch.long)} if inner else seen
        columns = {"adv": adv, **({"stage": torch.ones(6, 1), "weight": torch.ones(6, 1)} if inner else {})}
        old = plain.evaluate(Rollout(seen, action, adv, adv, true, true, adv, ~true), ("logp",)).logp.detach() - 0.1 * adv
        return Rollout(where, action[..., None] if inner else action, old, adv, true, true, adv, ~true, columns=columns)

    losses, grads = [], []
    omega, coef = torch.full((6, 1), 1 / 6), torch.tensor(1.0)
    chain_ppo = dataclasses.replace(DPPO, surrogate=ChainClip(clip=0.2, base=0.01))
    for method, who, inner in ((OnPolicy(), plain, False), (chain_ppo, agent, True)):
        loss, _ = policy_loss(method, who, part(inner), omega, coef, False)
        losses.append(float(loss.detach()))
        grads.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(mean.parameters()))]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and torch.allclose(grads[1], grads[0], atol=1e-5) and grads[0].abs().max() > 0


def doubled() -> tuple[OnPolicyDriver, TwoLayer]:
    """A driver of the small settings in float64."""
    collector, agent = counted()
    agent.net.double()
    method = dataclasses.replace(two_layer(), scale_reward=False)
    return OnPolicyDriver(method, agent, collector, seed=0), method


@pytest.mark.check("gradient", "dppo")
def test_gradient_of_the_whole_loss_matches_finite_differences():
    driver, _ = doubled()
    check_gradient(driver)


@pytest.mark.check("invariance", "dppo")
def test_order_of_rows_and_micro_batches_change_nothing():
    record = doubled()[0].collector.collect(doubled()[0].agent, torch.Generator().manual_seed(0))

    def after(rollout: Rollout, micro: int | None = None) -> torch.Tensor:
        driver, method = doubled()
        solver = dataclasses.replace(method.solver, unit="row", minibatch=None, optimizer="sgd", epochs=2, micro=micro)
        method = dataclasses.replace(method, solver=solver, value=ValueLoss(coef=1.0, separate=solver))
        driver = OnPolicyDriver(method, driver.agent, Given(rollout), seed=0)
        driver.step()
        return torch.cat([p.detach().flatten() for p in driver.agent.net.parameters()])

    start = after(record)
    torch.testing.assert_close(after(record.rows(torch.tensor([1, 0]))), start, rtol=0, atol=1e-10)
    torch.testing.assert_close(after(record, 1), start, rtol=0, atol=1e-10)


def exact_return(agent: DiffusionPolicyAgent, cost: float, horizon: int) -> float:
    """E[return] of a linear chain of two steps: a = G1 (G0 x + W0 o + s0 z0) + W1 o + s1 z1."""
    G, W = (p.detach().double() for p in (agent.net["policy"].G, agent.net["policy"].W))
    s = agent.kernel.std
    gains = -(G[1] * W[0] + W[1])
    return linear_return(gains.tolist(), float((G[1] * G[0]) ** 2 + (G[1] * s[0]) ** 2 + s[1] ** 2), cost)


def test_oracle_of_linear_control():
    """Riccati's gains are the maximum of `linear_return`, and that is the mean return of episodes."""
    gains = best_gains(2, 0.5)
    assert gains == pytest.approx([8 / 11, 2 / 3])  # p_1 = .5 * 2/3 = 1/3; k_0 = (4/3)/(4/3 + 1/2)
    best = linear_return(gains, 0.0004, 0.5)
    assert all(best > linear_return([gains[0] + d, gains[1] + e], 0.0004, 0.5) for d, e in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)))
    env, rng, total = LinearControl(2, 0.5), np.random.default_rng(0), []
    env.reset(seed=0)
    for _ in range(3000):
        obs, _ = env.reset()
        done, ret = False, 0.0
        while not done:
            obs, r, done, _, _ = env.step([-0.5 * obs.sum() + 0.06 * rng.standard_normal()])
            ret += r
        total.append(ret)
    assert np.mean(total) == pytest.approx(linear_return([0.5, 0.5], 0.0036, 0.5), abs=0.0024)


def test_dppo_finds_the_optimum_of_linear_control():
    """Two denoising steps of std 0.06 and 0.02; the best chain forgets its noise before the last step: gap under 5 % of what was to be gained."""
    cost, horizon = 0.5, 2
    venv = SyncVectorEnv([lambda: ChunkEnv(LinearControl(horizon, cost), 1)] * 32, autoreset_mode="SameStep")
    torch.manual_seed(0)
    agent = linear_agent(2, horizon, [0.06, 0.02], start=0.05)
    solver = Descent(lr=0.05, anneal=True, epochs=4, minibatch=128, max_grad_norm=1.0, eps=1e-8)
    method = dataclasses.replace(
        DPPO, num_env_steps=10_240, num_envs=32, num_steps=8, scale_reward=False, advantage=ChainGAE(gamma=1.0, lam=1.0, denoising_discount=1.0),
        surrogate=ChainClip(clip=0.2, base=0.2), value=ValueLoss(coef=1.0, separate=dataclasses.replace(solver, lr=0.01)),
        solver=solver, chain=Chain(tuned_steps=2, reduce="sum", entry_range=None),
    )  # fmt: skip
    driver = OnPolicyDriver(method, agent, ChainCollector(venv, agent, 8, scale_reward=False), seed=0)
    start, best = exact_return(agent, cost, horizon), linear_return(best_gains(horizon, cost), 0.0004, cost)
    while not driver.finished:
        driver.step()
    assert driver.iteration == 40
    assert (best - exact_return(agent, cost, horizon)) / (best - start) < 0.05


# -- fine-tuning as a run -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """An untrained clone for the point mass."""
    return str(build(POINT, cloning("diffusion-policy"), 3, dataset=DATASET).agent.save(tmp_path_factory.mktemp("clone") / "agent"))


def test_divergence_to_the_clone_is_a_term_like_in_ppo(clone):
    """With a KL to the frozen start in the loss, the first batch has log-ratio 0 to it, and later ones do not."""
    method = dataclasses.replace(two_layer(start=clone), divergence=KL(beta=0.1, place="loss", estimator="k2"))
    driver = make_driver(method, build(POINT, method, 0), 0)
    first, second = (driver.collector.collect(driver.agent, torch.Generator().manual_seed(0)) for _ in range(2))
    driver.prepare(first)
    assert torch.equal(first.logp_ref["ref"], first.logp_old)
    driver.step()
    driver.step()
    driver.step()
    second.logp_old = driver.agent.evaluate(second, ("logp",)).logp.detach()
    driver.prepare(second)
    assert float((second.logp_ref["ref"] - second.logp_old).abs().max()) > 1e-4


def test_evaluation_follows_chunks(clone):
    method = two_layer(start=clone)
    agent = build(POINT, method, 0).agent
    calls: list[int] = []
    chain = agent.chain
    agent.chain = lambda window, *rest: calls.append(len(window)) or chain(window, *rest)  # type: ignore[method-assign]
    found = evaluate_stepped(agent, POINT, 3, 0)
    assert found["lengths"] == [40] * 3 and calls == [3] * 20  # a chunk lasts two steps
    assert evaluate_stepped(agent, POINT, 3, 0)["returns"] == found["returns"]


def test_bad_input_is_explained(clone, tmp_path):
    ControlAgent.from_spaces(BOX, BOX).save(tmp_path / "gaussian")
    for method, env, message in (
        (DPPO, POINT, "name its run"),
        (two_layer(start=str(tmp_path / "nothing")), POINT, "no agent in"),
        (two_layer(start=str(tmp_path / "gaussian")), POINT, "what diffusion-policy or flow-policy has cloned"),
        (two_layer(start=clone), "Pendulum-v1", "name the environment of its data"),
        (two_layer(start=clone, tuned_steps=9), POINT, "the last of 4 denoising steps"),
    ):
        with pytest.raises(ValueError, match=message):
            build(env, method, 0)


def test_a_run_clones_and_another_fine_tunes_it(tmp_path):
    """The whole way of the command line: dataset to run folder, run folder to fine-tuned policy."""
    cloned = train(cloning("flow-policy"), POINT, dataset=DATASET, out=tmp_path / "clone", eval_episodes=2, progress=False)
    assert len(cloned.done["evaluation"]["returns"]) == 2 and "score_pct" in cloned.done["evaluation"]
    method = two_layer(start=str(tmp_path / "clone"), tuned_steps=3, min_std=0.05)
    tuned = train(dataclasses.replace(method, num_env_steps=80), POINT, out=tmp_path / "tuned", eval_episodes=2, progress=False)
    assert tuned.agent.tuned_steps == 3 and float(tuned.agent.kernel.std.min()) >= 0.05 and tuned.agent.kernel.kind == "flow_sde"
    base, start = tuned.agent.net["base"].state_dict(), cloned.agent.net["policy"].state_dict()
    assert all(torch.equal(base[k], start[k]) for k in start)
    assert not all(torch.equal(v, start[k]) for k, v in tuned.agent.net["policy"].state_dict().items())
    assert torch.equal(tuned.agent.net["normalizer"].norms[0].mean, cloned.agent.net["normalizer"].norms[0].mean)
    # a third run goes on from the second one, its frozen steps included
    onward = dataclasses.replace(method, chain=dataclasses.replace(method.chain, start=str(tmp_path / "tuned")))
    again, window = build(POINT, onward, 0).agent, torch.zeros(3, tuned.agent.window_size)
    chains = [a.chain(window, True, torch.Generator().manual_seed(0)) for a in (tuned.agent, again)]
    assert torch.equal(*chains)
    with pytest.raises(ValueError, match="tuned_steps=3"):
        build(POINT, dataclasses.replace(onward, chain=dataclasses.replace(onward.chain, tuned_steps=2)), 0)



# -- the two-layer MDP as an environment ----------------------------------------------------------------------------------------------------------


def test_collected_chains_replay_in_the_two_layer_environment():
    """Stepping the recorded actions gives the record's rewards, ends, windows, steps and samples; ends only where a chunk ends."""
    collector, agent = counted(n=1, steps=6)
    rollout = collector.collect(agent, torch.Generator().manual_seed(0))
    env = TwoLayerEnv(Counter(3), num_steps=2)
    obs, _ = env.reset(seed=0)
    for t in range(rollout.shape[1]):
        assert obs["obs"].flatten().tolist() == rollout.obs["obs"][0, t].tolist() and obs["step"] == int(rollout.obs["step"][0, t])
        assert obs["step"] == 0 or np.array_equal(obs["sample"], rollout.obs["x"][0, t].numpy())
        obs, reward, terminated, truncated, _ = env.step(rollout.action[0, t].numpy())
        assert (reward, terminated, truncated) == (float(rollout.reward[0, t]), float(rollout.continuation[0, t]) == 0.0, False)
        if terminated:
            obs, _ = env.reset()
    # what was carried out: the clean samples, which this Box takes as they are, clipped
    clean = rollout.action[0, 1::2, 0, 0].clamp(-1, 1).tolist()
    assert env.env.env.actions == pytest.approx(clean, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*Box observation space")
def test_two_layer_environment_is_one_of_gymnasium():
    env = TwoLayerEnv(gym.make(POINT), num_steps=3, horizon=2, act_steps=2, obs_steps=2)
    check_env(env, skip_render_check=True)
    first, second = (env.reset(seed=4)[0]["sample"] for _ in range(2))
    assert np.array_equal(first, second)
    with pytest.raises(ValueError, match="act_steps <= horizon"):
        TwoLayerEnv(Counter(3), num_steps=2, horizon=1, act_steps=2)
