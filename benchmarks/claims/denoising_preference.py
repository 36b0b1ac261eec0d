"""Claims of preference learning on denoising chains, on the linear-Gaussian chain and on exact mixtures."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from markovia.agents.denoising import DenoisingAgent
from markovia.algos.collect import SequenceCollector
from markovia.algos.denoising.methods import DENOISING
from markovia.algos.denoising.pairs import noise_error
from markovia.algos.denoising.preference import DenoisingPreference, DenoisingPreferenceDriver
from markovia.algos.denoising.sampling import denoise, predictor
from markovia.algos.denoising.sources import Candidates, NoisedData, SemiPolicy, noised_pairs
from markovia.algos.on_policy.method import Descent
from markovia.algos.optimizer import make_optimizer
from markovia.algos.preference.pairwise import Pairwise
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.tasks import make_task
from markovia.envs.exact.denoisers import GMMDenoiser, LinearGaussianDenoising


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _on_chain(method: DenoisingPreference, seed: int, **options: Any) -> DenoisingPreferenceDriver:
    """A driver on the linear-Gaussian chain; log-ratios are means over the entries, as in the published code of d3po and spo-step."""
    task = make_task("linear_gaussian")
    agent = DenoisingAgent.from_task(task, critic_hidden=None, reduce="mean")
    return DenoisingPreferenceDriver(method, agent, SequenceCollector(task, method.num_envs), seed, **options)


def _expected_reward(driver: DenoisingPreferenceDriver, problem: LinearGaussianDenoising) -> float:
    policy: Any = driver.agent.net["policy"]
    return float(problem.expected_reward(policy.G.detach().double(), policy.h.detach().double()))


def _soft_value(problem: LinearGaussianDenoising) -> Any:
    """The exact soft value V_k of x as a step-aware score."""
    P, p = problem.soft_values()

    def score(x: Tensor, k: int, cond: Tensor | None) -> Tensor:
        at = x.double()
        return -0.5 * torch.einsum("ni,ij,nj->n", at, P[k], at) + at @ p[k]

    return score


_FOUR_STEPS = Descent(lr=0.01, anneal=False, epochs=4, minibatch=None, max_grad_norm=1e6)


def d3po(rounds: int = 5, seeds: int = 3) -> dict[str, Any]:
    """E r of the linear-Gaussian chain, in closed form, rises in each of 5 rounds of 256 pairs and 4 steps, from -0.43 to more than 0.5.

    beta 10 is reported too: it is slower. Neither stays at the KL optimum (0.573), because the clip only removes gradients.
    """
    problem = LinearGaussianDenoising()
    start = float(problem.expected_reward(*problem.reference()))
    found: dict[str, list[list[float]]] = {}
    for beta in (0.1, 10.0):
        method = replace(DENOISING["d3po"].value, num_env_steps=512 * rounds, num_envs=512, loss=Pairwise(beta), solver=_FOUR_STEPS)
        found[f"{beta:g}"] = []
        for seed in range(seeds):
            driver, curve = _on_chain(method, seed), []
            while not driver.finished:
                driver.step()
                curve.append(_expected_reward(driver, problem))
            found[f"{beta:g}"].append(curve)
    curves = [[start, *curve] for curve in found["0.1"]]
    rises = all(b > a for curve in curves for a, b in itertools.pairwise(curve))
    last = min(curve[-1] for curve in curves)
    return {"measured": last, "bound": 0.5, "holds": rises and last > 0.5, "start": start, "expected_reward_by_beta": found}


def spo_step(chains: int = 8192, seeds: int = 8) -> dict[str, Any]:
    """With the exact soft value as step-aware score, two candidates and no threshold: at the reference the gradient points along that of
    E r - beta KL with a cosine above 0.9 (not 1: a win counts the same whatever its margin), and with 8 chains an update E r = 0 is reached with
    at least 1.7 times fewer chains than d3po needs (mean over the seeds, same learning rate and steps).
    """
    problem = LinearGaussianDenoising()
    score = _soft_value(problem)
    source = Candidates(count=2, threshold=0.0, skip=0)
    spo = replace(DENOISING["spo-step"].value, source=source, num_envs=chains)
    driver = _on_chain(spo, 0, score=score)
    items = driver.collect()
    rows = items.pairs.flatten()
    loss, _ = driver.loss(items.record.rows(rows), items.score[rows])
    policy: Any = driver.agent.net["policy"]
    ours = torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, (policy.G, policy.h))])
    exact = torch.cat([g.flatten() for g in problem.gradient(*problem.reference())])
    cosine = float(-torch.nn.functional.cosine_similarity(ours, exact, 0))

    def chains_needed(method: DenoisingPreference, seed: int, **options: Any) -> int:
        driver = _on_chain(method, seed, **options)
        while not driver.finished:
            driver.step()
            if _expected_reward(driver, problem) > 0:
                break
        return driver.num_env_steps

    common: dict[str, Any] = {"num_env_steps": 8000, "num_envs": 8, "solver": _FOUR_STEPS}
    used = [chains_needed(replace(spo, **common), seed, score=score) for seed in range(seeds)]
    other = [chains_needed(replace(DENOISING["d3po"].value, **common), seed) for seed in range(seeds)]
    factor = sum(other) / sum(used)
    holds = cosine > 0.9 and factor >= 1.7
    return {"measured": factor, "bound": 1.7, "holds": holds, "cosine": cosine, "bound_of_cosine": 0.9, "spo_chains": used, "d3po_chains": other}


def rebel_diffusion(pairs: int = 20_000) -> dict[str, Any]:
    """On 20,000 pairs fitted to the end (LBFGS, float64): with a linear reward the policy is the KL tilt with beta = 1/eta, rms error of the mean
    below 0.1 % of the shift; with a quadratic one the fixed std can't represent the tilt, and the error at eta 1 is at most 8 %.
    """
    out: dict[str, dict[str, float]] = {}
    for name, Q in (("linear", ((0.0, 0.0), (0.0, 0.0))), ("quadratic", ((1.0, 0.0), (0.0, 0.5)))):
        for eta in (0.5, 1.0, 2.0):
            task, problem = make_task("linear_gaussian", Q=Q), LinearGaussianDenoising(Q=Q, beta=1 / eta)
            row: DenoisingPreference = DENOISING["rebel-diffusion"].value
            method = replace(row, num_envs=2 * pairs, loss=replace(row.loss, beta=1 / eta))
            driver = DenoisingPreferenceDriver(method, DenoisingAgent.from_task(task, critic_hidden=None), SequenceCollector(task, 2 * pairs), 0)
            items = driver.collect()
            for agent in (driver.agent, driver.reference):
                agent.net = copy.deepcopy(agent.net).double()
            record = items.record.map(lambda t: t.double() if t.is_floating_point() else t)
            rows = items.pairs.flatten()
            record, reward = record.rows(rows), problem.reward(record.action[:, -1])[rows]
            fit = torch.optim.LBFGS(driver.agent.net.parameters(), max_iter=60, tolerance_change=1e-14, line_search_fn="strong_wolfe")

            def closure(driver: Any = driver, record: Any = record, reward: Any = reward, fit: Any = fit) -> Tensor:
                fit.zero_grad()
                loss: Tensor = driver.loss(record, reward)[0]
                loss.backward()
                return loss

            fit.step(closure)
            residual = float(closure().detach())
            policy: Any = driver.agent.net["policy"]
            G, h = problem.optimal()
            assert isinstance(record.obs, dict)
            x = record.obs["x"]

            def mean(A: Tensor, b: Tensor, x: Tensor = x) -> Tensor:
                return torch.einsum("kij,nkj->nki", A, x) + b

            wrong = (mean(policy.G, policy.h) - mean(G, h)).detach().square().mean().sqrt()
            shift = (mean(G, h) - mean(*problem.reference())).square().mean().sqrt()
            out[f"{name}, eta {eta:g}"] = {"error": float(wrong / shift), "loss": residual}
    linear = max(v["error"] for k, v in out.items() if k.startswith("linear"))
    at_one = out["quadratic, eta 1"]["error"]
    return {"measured": linear, "bound": 1e-3, "holds": linear <= 1e-3 and at_one <= 0.08, "quadratic_at_eta_1": at_one, "each": out}


class _Corrected(nn.Module):
    """An exact denoiser plus a small network that starts at zero."""

    def __init__(self, exact: Any) -> None:
        super().__init__()
        self.exact = [exact]  # no parameters of ours; in a list, so that copies share it
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        change: Tensor = self.layers(torch.cat([x, timestep.to(x)[:, None] / 1000], -1))
        return self.exact[0](x, timestep) + change


def _mixture(means: Tensor, tau: float, reward: Any, num_steps: int = 50) -> DenoisingTask:
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    torch.manual_seed(0)
    network = _Corrected(GMMDenoiser(means, tau).network(scheduler.alphas_cumprod))
    return DenoisingTask(network, GaussianKernel.from_scheduler(scheduler, num_steps), reward, (2,), name="mixture")


def _sample(agent: DenoisingAgent, n: int = 4000, seed: int = 99) -> Tensor:
    start = torch.randn(n, 2, generator=(generator := _generator(seed)))
    return denoise(agent.kernel, predictor(agent.kernel, agent.net["policy"]), start, generator)


_ADAM = Descent(lr=1e-3, anneal=False, epochs=1, minibatch=None, max_grad_norm=1e6, eps=1e-8)


def diffusion_dpo(seeds: int = 2) -> dict[str, Any]:
    """Two modes at (+-1, 0), tau 0.3, every pair prefers the right one; exact denoiser plus a zero-initialised MLP, 300 steps of 256 pairs, beta 20
    on mean errors: the share of the right mode grows from 0.5 to more than 0.95, and the spread within it changes by less than 20 %.

    Other strengths are reported: a larger beta moves less, a smaller one leaves the data (at 10 the mode is pushed outwards and shrinks).
    """
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    task = _mixture(means, 0.3, lambda x, c: x[:, 0])

    def trained(beta: float, seed: int) -> dict[str, float]:
        noise = 0.3 * torch.randn(4096, 2, 2, generator=_generator(seed))
        data = {"x": (means + noise).flatten(0, 1), "cond": None}
        row: DenoisingPreference = DENOISING["diffusion-dpo"].value
        method = replace(row, num_env_steps=300 * 512, num_envs=512, source=NoisedData(4096), loss=Pairwise(beta), solver=_ADAM)
        agent = DenoisingAgent.from_task(task, critic_hidden=None, reduce="mean")
        driver = DenoisingPreferenceDriver(method, agent, SequenceCollector(task, 512), seed, data=data)
        before = _sample(agent)
        while not driver.finished:
            driver.step()
        x = _sample(agent)
        inside, was = x[x[:, 0] > 0], before[before[:, 0] > 0]
        return {
            "share": float((x[:, 0] > 0).float().mean()),
            "change_of_spread": float((inside.std(0) / was.std(0) - 1).abs().max()),
            "mean": float(inside[:, 0].mean()),
        }

    runs = [trained(20.0, seed) for seed in range(seeds)]
    share, spread = min(r["share"] for r in runs), max(r["change_of_spread"] for r in runs)
    others = {f"{beta:g}": trained(beta, 0) for beta in (10.0, 50.0, 200.0, 2000.0)}
    return {"measured": share, "bound": 0.95, "holds": share > 0.95 and spread < 0.2, "runs": runs, "other_betas": others}


def se_ppo(steps: int = 300, seeds: int = 1) -> dict[str, Any]:
    """Two good modes of four, winners from the good ones, and a pool of earlier checkpoints that holds an already good one: after 300 steps the mass
    on the good modes is larger than by fitting the winners alone (equal steps; that is the good checkpoint), and larger than when every sample of a
    checkpoint counts as a loser.

    `own_pool` is the same without the good checkpoint. `kappa` is the mean sign in each third of the run: +1 where the policy likes the winner at
    least as much as the checkpoint does. From one noise level and one noise, as the method takes it, that sign is little more than a coin's.
    """
    means = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    task = _mixture(means, 0.2, lambda x, c: x[:, 1], num_steps=20)
    rules = {"se-ppo": -1.0, "always a loser": 1.0, "left out": 0.0}

    def describe(agent: DenoisingAgent) -> dict[str, Any]:
        x = _sample(agent)
        distance = torch.cdist(x, means)
        near = distance.amin(1) < 0.6  # three standard deviations
        good = near & (distance.argmin(1) < 2)
        return {"good": float(good.float().mean()), "bad": float((near & ~good).float().mean()), "outside": float((~near).float().mean())}

    def winners_alone(data: dict[str, Any], seed: int) -> DenoisingAgent:
        agent = DenoisingAgent.from_task(task, critic_hidden=None, reduce="mean")
        optimizer = make_optimizer(_ADAM, [(agent.parameters("policy"), _ADAM.lr)])
        for step in range(steps):
            generator = _generator(1000 * (seed + 1) + step)
            rows = torch.randint(4096, (256,), generator=generator)
            record = noised_pairs(agent, data["x"][rows], None, generator)
            optimizer.zero_grad()
            noise_error(agent, record).mean().backward()
            optimizer.step()
        return agent

    def semi_policy(data: dict[str, Any], seed: int, otherwise: float, pool: list[dict[str, Tensor]]) -> dict[str, Any]:
        source = SemiPolicy(every=steps // 6, otherwise=otherwise)
        method = replace(DENOISING["se-ppo"].value, num_env_steps=steps * 256, num_envs=256, source=source, loss=Pairwise(20.0), solver=_ADAM)
        agent = DenoisingAgent.from_task(task, critic_hidden=None, reduce="mean")
        driver = DenoisingPreferenceDriver(method, agent, SequenceCollector(task, 256), seed, data=data)
        driver.pool += pool
        sign = []
        while not driver.finished:
            sign.append(driver.step()["kappa"])
        thirds = torch.tensor(sign).chunk(3)
        return {**describe(agent), "kappa": [float(part.mean()) for part in thirds]}

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*rules, "winners alone")}
    own: dict[str, list[dict[str, Any]]] = {name: [] for name in rules}
    for seed in range(seeds):
        pick = torch.randint(2, (4096,), generator=(generator := _generator(seed)))
        data: dict[str, Any] = {"x": means[pick] + 0.2 * torch.randn(4096, 2, generator=generator), "cond": None}
        fitted = winners_alone(data, seed)
        found["winners alone"].append(describe(fitted))
        good_one = {k: v.detach().clone() for k, v in fitted.net.state_dict().items()}
        for name, otherwise in rules.items():
            found[name].append(semi_policy(data, seed, otherwise, [good_one]))
            own[name].append(semi_policy(data, seed, otherwise, []))
    mass, own_mass = ({name: sum(r["good"] for r in runs) / seeds for name, runs in group.items()} for group in (found, own))
    bound = max(mass["always a loser"], mass["winners alone"])
    holds = mass["se-ppo"] > bound
    return {"measured": mass["se-ppo"], "bound": bound, "holds": holds, "good_mass": mass, "own_pool": own_mass, "each": found, "each_own_pool": own}
