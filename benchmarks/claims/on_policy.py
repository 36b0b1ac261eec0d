"""Claims of the on-policy methods, measured on problems whose optimum is known, with the settings that the command line uses."""

from __future__ import annotations

from typing import Any

import torch

from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.presets import agent_options, configure, override
from markovia.algos.setup import build


def _train(method_id: str, env_id: str, seed: int, env_kwargs: dict[str, Any] | None = None, **changes: Any) -> tuple[OnPolicyDriver, Any]:
    """A run to the end of its budget, without a run folder."""
    method = override(configure(method_id, env_id), changes)
    setup = build(env_id, method, seed, env_kwargs=env_kwargs, agent_options=agent_options(method_id, env_id))
    driver = OnPolicyDriver(method, setup.agent, setup.collector, seed)
    while not driver.finished:
        driver.step()
    return driver, setup


def token_tree(method: str, bound: float = 2e-3, seeds: int = 5) -> dict[str, Any]:
    """KL(pi || pi*) in nats after training with sampled gradients on random trees (V 4, H 4), penalty 0.5 KL(pi || p0).

    pi* = p0 exp(R / 0.5) / Z is exact; a new tree for every seed. Holds when the worst seed is within the bound.
    """
    found, starts = [], []
    for seed in range(seeds):
        setup = _train(method, "markovia/TokenTree-v0", seed, {"seed": seed})[1]
        oracle = setup.collector.venv.unwrapped.oracle
        found.append(float(oracle.kl_to_optimum(setup.agent.net["policy"].table.detach().double(), 0.5)))
        starts.append(float(oracle.kl_to_optimum(oracle.logits_ref, 0.5)))
    return {"measured": max(found), "bound": bound, "holds": max(found) <= bound, "kl_to_optimum_nats": found, "kl_at_start_nats": starts}


def linear_gaussian(method: str, bound: float = 0.02, seeds: int = 3) -> dict[str, Any]:
    """Gap fraction (J* - J) / (J* - J_ref) on the linear-Gaussian chain, J = E r - 0.5 KL, all in closed form. Worst of the seeds."""
    from markovia.envs.exact.denoisers import LinearGaussianDenoising

    problem, gaps = LinearGaussianDenoising(), []
    for seed in range(seeds):
        _, setup = _train(method, "markovia/LinearGaussian-v0", seed)
        policy = setup.agent.net["policy"]
        gaps.append(problem.gap_fraction(policy.G.detach().double(), policy.h.detach().double()))
    return {"measured": max(gaps), "bound": bound, "holds": max(gaps) <= bound, "gap_fraction": gaps}


def cartpole(method: str, bound: float = 400.0, seeds: int = 3) -> dict[str, Any]:
    """Mean greedy return on CartPole-v1 after 50,000 steps, 10 episodes a seed, mean over seeds."""
    returns = []
    for seed in range(seeds):
        _, setup = _train(method, "CartPole-v1", seed, num_env_steps=50_000)
        scores = setup.evaluate(setup.agent, 10, seed)["returns"]
        returns.append(sum(scores) / len(scores))
    mean = sum(returns) / len(returns)
    return {"measured": mean, "bound": bound, "holds": mean >= bound, "returns": returns}


@torch.no_grad()
def _describe_digits(setup: Any, wanted: int, n: int = 400) -> dict[str, float]:
    """Judge's probability, pairwise distance of samples over that of the class's real digits, and distance to the nearest real image of any
    class over that between real images: noise fools classifiers and is diverse, but lies far from the data."""
    from markovia.envs.denoising.tasks import digit_images

    generator = torch.Generator().manual_seed(1)
    rollout = setup.agent.generate(setup.task.starts(n, generator), generator)
    samples = rollout.outcome["x"]
    images, labels = digit_images()
    everything, real = images.flatten(1), images[labels == wanted].flatten(1)
    between = torch.cdist(everything, everything).fill_diagonal_(float("inf")).min(1).values.mean()
    nearest = torch.cdist(samples.flatten(1), everything).min(1).values.mean()
    return {
        "reward": float(setup.task.score(rollout).mean()),
        "judge": float(setup.task.judged(samples).mean()),
        "nearest_real_ratio": float(nearest / between),
        "diversity_ratio": float(torch.pdist(samples.flatten(1)).mean() / torch.pdist(real).mean()),
    }


def digits(method: str, wanted: int = 3) -> dict[str, Any]:
    """Probability of the wanted digit by a judge that training never saw: >= 0.6, with pairwise distances >= 0.5 of real digits of the class
    and samples no further from the data than 1.25 times the distance between real images."""
    method_value = configure(method, "markovia/Digits-v0")
    start = build("markovia/Digits-v0", method_value, 0, env_kwargs={"wanted": wanted})
    before = _describe_digits(start, wanted)
    _, setup = _train(method, "markovia/Digits-v0", 0, {"wanted": wanted})
    after = _describe_digits(setup, wanted)
    holds = after["judge"] >= 0.6 and after["diversity_ratio"] >= 0.5 and after["nearest_real_ratio"] <= 1.25
    return {"measured": after["judge"], "bound": 0.6, "holds": holds, "before": before, "after": after}
