"""Claims of chunk-denoising policies: modes that cloning keeps, laws that samplers keep, and what fine-tuning the denoising steps reaches."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn

from markovia.agents.control import ControlAgent
from markovia.agents.diffusion_policy import DiffusionPolicyAgent, floored
from markovia.algos.advantages import ChainGAE
from markovia.algos.diffusion_policy.collect import ChainCollector
from markovia.algos.diffusion_policy.data import chunk_data, chunk_transitions
from markovia.algos.diffusion_policy.driver import ImitationDriver, Logs
from markovia.algos.diffusion_policy.method import Chain, DiffusionNoise, FlowNoise, Imitation, MLPNet
from markovia.algos.diffusion_policy.methods import DIFFUSION, DPPO
from markovia.algos.diffusion_policy.setup import make_network
from markovia.algos.off_policy.driver import OffPolicyDriver
from markovia.algos.off_policy.slots import Bounded
from markovia.algos.offline.method import Logged
from markovia.algos.offline.methods import BC
from markovia.algos.offline.source import make_source
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.method import Descent, ValueLoss
from markovia.algos.on_policy.surrogates import ChainClip
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, evaluate_stepped, make_driver
from markovia.algos.streams import stream
from markovia.envs.control.chunks import ChunkEnv, make_chunk_vec
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.exact.denoisers import GMMDenoiser
from markovia.envs.exact.linear_control import LinearControl, best_gains, linear_return
from markovia.envs.offline.sources import load
from markovia.envs.offline.transitions import About, Transitions

OBS, WIDE = spaces.Box(-np.inf, np.inf, (1,), np.float32), spaces.Box(-2.0, 2.0, (1,), np.float32)
OBSTACLE = "markovia/PointObstacle-v0"

# -- one state, two good actions --------------------------------------------------------------------------------------------------------------


def _bandit(n: int = 4000, seed: int = 0) -> Transitions:
    """One state, actions +1 and -1 with standard deviation 0.05."""
    rng = np.random.default_rng(seed)
    action = (rng.choice([-1.0, 1.0], (n, 1)) + 0.05 * rng.standard_normal((n, 1))).astype(np.float32)
    obs, ended = np.zeros((n, 1), np.float32), np.ones(n, dtype=bool)
    return Transitions(obs, action, np.zeros(n, np.float32), obs, ended, ~ended, np.arange(n), about=About("two modes"))


def _cloned(method: Imitation, data: Transitions, seed: int = 0) -> DiffusionPolicyAgent:
    torch.manual_seed(seed)
    agent = DiffusionPolicyAgent.from_spaces(
        OBS, WIDE, make_network(method, OBS, WIDE), *method.noise.kernels(), horizon=1, act_steps=1, obs_steps=1, normalize_obs=False
    )
    driver = ImitationDriver(method, agent, Logs(chunk_data(data, method.data, agent)), seed)
    while not driver.finished:
        driver.step()
    return agent


def _one_action(noise: DiffusionNoise | FlowNoise) -> Imitation:
    solver = dataclasses.replace(DIFFUSION.solver, lr=2e-3)
    return dataclasses.replace(
        DIFFUSION, num_env_steps=1500, horizon=1, act_steps=1, obs_steps=1, noise=noise, network=MLPNet(64, 2), solver=solver,
        data=Logged(normalize_obs=False),
    )  # fmt: skip


def _mass(agent: DiffusionPolicyAgent, deterministic: bool = False, n: int = 4000) -> tuple[float, float]:
    """Shares of sampled actions within 0.25 of -1 and of +1."""
    window = torch.zeros(n, 1)
    a = agent.env_action(agent.chain(window, deterministic, stream(0, "evaluation")))[:, 0, 0]
    return float((np.abs(a + 1.0) < 0.25).mean()), float((np.abs(a - 1.0) < 0.25).mean())


def _gaussian_action(data: Transitions, seed: int = 0) -> float:
    """Mean absolute action of `bc`, which minimises the squared error, after as many updates."""
    torch.manual_seed(seed)
    method = override(BC, {"num_env_steps": 1500, "policy": {"hidden": [64, 64]}, "data": {"normalize_obs": False}})
    agent = ControlAgent.from_spaces(OBS, WIDE, critic=False, normalize_obs=False, **method.policy.agent_options())
    driver = OffPolicyDriver(method, agent, make_source(data, method.data, agent, method.gamma), seed)
    while not driver.finished:
        driver.step()
    return float(np.abs(agent.predict(np.zeros((1, 1), np.float32), deterministic=True)[0]).mean())


def diffusion_modes() -> dict[str, Any]:
    """Actions +1 and -1 in one state: ddpm with 100 steps puts > 0.45 of its mass within 0.25 of each; squared error settles at |a| < 0.2."""
    data = _bandit()
    mass = _mass(_cloned(_one_action(DiffusionNoise(sample_steps=100, sampler="ddpm")), data))
    gaussian = _gaussian_action(data)
    return {"measured": min(mass), "bound": 0.45, "holds": min(mass) > 0.45 and gaussian < 0.2, "mass": mass, "gaussian_action": gaussian}


def flow_modes() -> dict[str, Any]:
    """The same by flow matching: Euler in 50 steps puts > 0.9 of the mass near the modes, 10 steps lose at most 8 points of it, 5 at most 20."""
    data = _bandit()
    agent = _cloned(_one_action(FlowNoise(sample_steps=50)), data)
    mass = {}
    for steps in (50, 10, 5):
        kernel, greedy = FlowNoise(sample_steps=steps).kernels()
        mass[steps] = sum(_mass(agent.tuned(kernel=kernel, greedy_kernel=greedy), deterministic=True))
    holds = mass[50] > 0.9 and mass[50] - mass[10] <= 0.08 and mass[50] - mass[5] <= 0.2
    return {"measured": mass[50], "bound": 0.9, "holds": holds, "mass_by_steps": {str(k): v for k, v in mass.items()}}


def _energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| without pairs of a point with itself; (n, d), (m, d)."""
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))  # noqa: E731
    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


class _Velocity(nn.Module):
    """The exact velocity of a mixture as a network."""

    def __init__(self, oracle: GMMDenoiser) -> None:
        super().__init__()
        self.oracle, self.scale = oracle, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, timestep: Tensor, window: Tensor) -> Tensor:
        sigma = float(timestep[0]) / 1000.0
        return (self.scale * self.oracle.flow(x.flatten(1), 1.0 - sigma, sigma)).reshape(x.shape)


def flow_marginals(n: int = 3000) -> dict[str, Any]:
    """With the exact velocity of a mixture of two, 100 steps of the ODE, of flow_sde(0.7) and of flow_sde(sqrt 2) keep its law: energy distance
    to fresh samples < 0.01.
    """
    oracle = GMMDenoiser([[-0.5, 0.0], [0.5, 0.0]], 0.1)
    plane, found = spaces.Box(-2.0, 2.0, (2,), np.float32), {}
    generator = stream(0, "evaluation")
    for name, eta in (("ode", 0.0), ("flow_sde(0.7)", 0.7), ("flow_sde(sqrt 2)", 2.0**0.5)):
        kernel, greedy = FlowNoise(sample_steps=100, eta=eta).kernels()
        agent = DiffusionPolicyAgent.from_spaces(
            OBS, plane, _Velocity(oracle), kernel, greedy, horizon=1, act_steps=1, obs_steps=1, normalize_obs=False
        )
        agent.net.double()
        x = agent.chain(torch.zeros(n, 1, dtype=torch.float64), eta == 0.0, generator)[:, -1, 0]
        found[name] = _energy_distance(x, oracle.sample(n, generator))
    return {"measured": max(found.values()), "bound": 0.01, "holds": max(found.values()) < 0.01, "energy_distance": found}


# -- the two-layer MDP --------------------------------------------------------------------------------------------------------------------------


class _LinearChain(nn.Module):
    """m = G_k x + W_k window, for chunks of one action."""

    def __init__(self, steps: int, size: int) -> None:
        super().__init__()
        self.G, self.W = nn.Parameter(torch.full((steps,), 0.5)), nn.Parameter(torch.zeros(steps, size))

    def forward(self, x: Tensor, timestep: Tensor, window: Tensor) -> Tensor:
        return self.G[timestep][:, None, None] * x + (self.W[timestep] * window).sum(-1)[:, None, None]


def _linear_gap(seed: int, cost: float, horizon: int, std: tuple[float, float]) -> float:
    """(J* - J)/(J* - J_0) after training a linear chain of two steps on linear control; J in closed form."""
    torch.manual_seed(seed)
    env = LinearControl(horizon, cost)
    agent = DiffusionPolicyAgent.from_spaces(
        env.observation_space, env.action_space, _LinearChain(2, horizon), GaussianKernel.direct(list(std)), horizon=1, act_steps=1, obs_steps=1,
        normalize_obs=False, critic_hidden=(16,),
    )  # fmt: skip
    solver = Descent(lr=0.03, anneal=True, epochs=4, minibatch=256, max_grad_norm=1.0, eps=1e-8)
    method = dataclasses.replace(
        DPPO, num_env_steps=51_200, num_envs=64, num_steps=8, scale_reward=False, advantage=ChainGAE(gamma=1.0, lam=1.0, denoising_discount=1.0),
        surrogate=ChainClip(clip=0.2, base=0.2), value=ValueLoss(coef=1.0, separate=dataclasses.replace(solver, lr=0.01)), solver=solver,
        chain=Chain(tuned_steps=2, reduce="sum", entry_range=None),
    )  # fmt: skip
    venv = SyncVectorEnv([lambda: ChunkEnv(LinearControl(horizon, cost), 1)] * 64, autoreset_mode="SameStep")  # type: ignore[arg-type]
    driver = OnPolicyDriver(method, agent, ChainCollector(venv, agent, 8, seed, scale_reward=False), seed)

    def value() -> float:
        """Return of a = G_1 (G_0 x + W_0 s + std_0 z) + W_1 s + std_1 z', x and z standard normal."""
        net: Any = agent.net["policy"]
        (g0, g1), (w0, w1) = net.G.detach().double().tolist(), net.W.detach().double()
        variance = (g1 * g0) ** 2 + (g1 * std[0]) ** 2 + std[1] ** 2
        return linear_return((-(g1 * w0 + w1)).tolist(), variance, cost)

    start, best = value(), linear_return(best_gains(horizon, cost), std[1] ** 2, cost)
    while not driver.finished:
        driver.step()
    return (best - value()) / (best - start)


def dppo_linear(seeds: int = 3) -> dict[str, Any]:
    """Linear control over two steps, each action by two denoising steps: dppo closes all but 2 % of the gap to the best linear-Gaussian chain, whose
    return is known (Riccati's gains, the noise of the last denoising step alone); mean over seeds.
    """
    gaps = [_linear_gap(seed, 0.5, 2, (0.06, 0.02)) for seed in range(seeds)]
    return {"measured": float(np.mean(gaps)), "bound": 0.02, "holds": float(np.mean(gaps)) <= 0.02, "gaps": gaps}


# -- behind the obstacle --------------------------------------------------------------------------------------------------------------------------


def _cloned_chunks(dataset: str, seed: int = 0) -> DiffusionPolicyAgent:
    """A diffusion policy cloned with the presets of the obstacle."""
    method = configure("diffusion-policy", OBSTACLE)
    setup = build(OBSTACLE, method, seed, dataset=dataset)
    driver = make_driver(method, setup, seed)
    while not driver.finished:
        driver.step()
    assert isinstance(setup.agent, DiffusionPolicyAgent)
    return setup.agent


def _gaussian_chunks(
    venv: Any, dataset: str, horizon: int, obs_steps: int, updates: int, hidden: tuple[int, ...], seed: int = 0, std: float = 0.1
) -> ControlAgent:
    """A Gaussian policy of chunks, with a critic, cloned from the same data by -log pi, then given the std of dppo's last step; for the spaces of
    `venv`, whose actions are chunks.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = {**Bounded(hidden=hidden).agent_options(), "log_std_init": 0.0, "normalize_obs": True}
    agent = ControlAgent.from_spaces(venv.single_observation_space, venv.single_action_space, critic=True, **options)
    method = dataclasses.replace(BC, num_env_steps=updates, policy=Bounded(hidden=hidden))
    source = make_source(chunk_transitions(load(dataset), horizon, obs_steps), method.data, agent, method.gamma)
    driver = OffPolicyDriver(method, agent, source, seed)
    while not driver.finished:
        driver.step()
    with torch.no_grad():
        agent.net["policy"].log_std.fill_(float(np.log(std)))  # type: ignore[union-attr,operator]
    return agent


def _distance_to_data(windows: np.ndarray, chunks: np.ndarray, data: Transitions) -> float:
    """Mean over (window, chunk) pairs of the distance to the nearest logged pair, actions counted per step: |w - w'|^2 + |c - c'|^2 / Ta."""
    length = chunks.shape[1]

    def points(w: np.ndarray, c: np.ndarray) -> Tensor:
        flat = np.concatenate([w.reshape(len(w), -1), c.reshape(len(c), -1) / np.sqrt(length)], 1)
        return torch.from_numpy(flat.astype(np.float32))

    assert isinstance(data.obs, np.ndarray)
    return float(torch.cdist(points(windows, chunks), points(data.obs, data.action)).min(1).values.mean())


def dppo_obstacle() -> dict[str, Any]:
    """A goal behind an obstacle, data with both ways and 44 % successes: the cloned policy fine-tuned by dppo (5 of 10 denoising steps) succeeds in
    >= 0.9 of 300 episodes, at least 0.15 more than the clone.
    """
    with tempfile.TemporaryDirectory() as temporary:
        clone = _cloned_chunks("fixture:obstacle")
        start = clone.save(f"{temporary}/clone")
        method = override(configure("dppo", OBSTACLE), {"chain": {"start": str(start)}})
        setup = build(OBSTACLE, method, 0)
        driver = make_driver(method, setup, 0)
        while not driver.finished:
            driver.step()
        success = {name: float(np.mean(evaluate_stepped(a, OBSTACLE, 300, 1)["returns"])) for name, a in (("clone", clone), ("dppo", setup.agent))}
    holds = success["dppo"] >= 0.9 and success["dppo"] >= success["clone"] + 0.15
    return {"measured": success["dppo"], "bound": 0.9, "holds": holds, "success": success}


@torch.no_grad()
def _explored(agent: Any, venv: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows and sampled chunks of `steps` steps of each environment."""
    generator, windows, chunks = stream(0, "action"), [], []
    obs, _ = venv.reset(seed=0)
    for _ in range(steps):
        action = agent.env_action(agent.sample(agent.observe(obs), generator))
        windows.append(obs.copy())
        chunks.append(action)
        obs = venv.step(action)[0]
    return np.concatenate(windows), np.concatenate(chunks)


def structured_exploration(dataset: str = "fixture:obstacle/steady") -> dict[str, Any]:
    """Noise inside the chain keeps to the data: with one std (0.1), the chunks that a cloned diffusion policy draws lie nearer to logged pairs of
    state and chunk than those of a cloned Gaussian policy; `measured` is the ratio of the mean distances to the nearest pair.
    """
    clone = _cloned_chunks(dataset)
    venv = make_chunk_vec(OBSTACLE, 20, clone.act_steps, clone.obs_steps)
    gaussian = _gaussian_chunks(venv, dataset, clone.act_steps, clone.obs_steps, 2000, (64, 64))
    diffusion = clone.tuned(kernel=floored(clone.kernel, 0.1), noise_clip=3.0)
    logged = chunk_transitions(load(dataset), clone.act_steps, clone.obs_steps)
    found = {name: _distance_to_data(*_explored(a, venv, 75), logged) for name, a in (("diffusion", diffusion), ("gaussian", gaussian))}
    ratio = found["diffusion"] / found["gaussian"]
    return {"measured": ratio, "bound": 1.0, "holds": ratio < 1.0, "distance": found}
