"""Claims of the off-policy methods: the mirror step against the optimum of small problems that are solved exactly, and learning on Pendulum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.algos.off_policy.driver import OffPolicyDriver
from markovia.algos.off_policy.losses import log_q, mirror_objective, soft_value
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.slots import Critics
from markovia.algos.presets import configure, override
from markovia.algos.setup import Setup, build, make_driver
from markovia.algos.streams import stream
from markovia.envs.exact.tabular import TabularMDP

PENDULUM = "Pendulum-v1"


# -- tabular: the actor's objective is the only thing that moves the policy ------------------------------------------------------------------


def _evaluate(mdp: TabularMDP, policy: Tensor, lam: float, q: float) -> Tensor:
    """Q (S, A) of a policy when every step pays -lam log_q pi(a|s) on top of its reward; a linear solve."""
    P, R = torch.as_tensor(mdp.P), torch.as_tensor(mdp.R)
    bonus = (policy * soft_value(R, log_q(policy.log(), q=q), lam=lam)).sum(1)
    step = torch.einsum("sa,sat->st", policy, P)
    v = torch.linalg.solve(torch.eye(len(R), dtype=R.dtype) - mdp.gamma * step, bonus)
    return R + mdp.gamma * P @ v


def _mirror_step(value: Tensor, policy: Tensor, lam: float, t: float, q: float) -> Tensor:
    """The minimiser over softmax policies of E_pi[mirror_objective] in every state, by L-BFGS from pi_k."""
    old = log_q(policy.log(), q=q)
    logits = policy.log().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logp = logits.log_softmax(1)
        total = (logp.exp() * mirror_objective(value, log_q(logp, q=q), old, lam=lam, inverse_step=1.0 / t, q=q)).sum()
        total.backward()
        return total

    optimizer.step(loss)
    return logits.detach().softmax(1)


def _regularised_optimum(mdp: TabularMDP, lam: float, q: float, sweeps: int = 400) -> np.ndarray:
    """pi (S, A) that maximises E[sum gamma^t (r - lam log_q pi)], by value iteration; written without the library's losses.

    In a state max_pi sum_a pi (Q - lam log_q pi) has pi = [1 + (q - 1) (Q + nu) / (q lam)]_+^(1/(q-1)), with nu found by bisection so that pi
    sums to one; softmax(Q / lam) at q = 1.
    """
    if q == 1.0:
        return mdp.soft_value_iteration(lam)[0]
    v = np.zeros(mdp.num_states)
    for _ in range(sweeps):
        value = mdp.backup(v)
        low, high = -value.max(1) - q * lam / (q - 1.0), -value.min(1) + q * lam  # no action, and every action alone, has its probability
        for _ in range(80):
            nu = 0.5 * (low + high)
            policy = np.maximum(1.0 + (q - 1.0) * (value + nu[:, None]) / (q * lam), 0.0) ** (1.0 / (q - 1.0))
            low, high = np.where(policy.sum(1) > 1.0, low, nu), np.where(policy.sum(1) > 1.0, nu, high)
        v = (policy * (value - lam * (policy ** (q - 1.0) - 1.0) / (q - 1.0))).sum(1)
    return policy


def regularised_optimum(q: float, lam: float = 0.5, t: float = 0.5, iterations: int = 60, seeds: int = 3, bound: float = 1e-4) -> dict[str, Any]:
    """Total variation, worst state, of mirror descent's policy to the optimum of the entropy-regularised MDP (random, 6 states, 3 actions).

    Every iteration evaluates pi_k exactly and minimises the actor's objective exactly; lam t <= 1. Worst of the seeds.
    """
    found = []
    for seed in range(seeds):
        mdp = TabularMDP.random(6, 3, seed=seed)
        policy = torch.as_tensor(mdp.uniform_policy())
        for _ in range(iterations):
            policy = _mirror_step(_evaluate(mdp, policy, lam, q), policy, lam, t, q)
        found.append(float(np.abs(policy.numpy() - _regularised_optimum(mdp, lam, q)).sum(1).max() / 2))
    return {"measured": max(found), "bound": bound, "holds": max(found) <= bound, "total_variation": found}


# -- Pendulum --------------------------------------------------------------------------------------------------------------------------------


def _trained(method: OffPolicy, seed: int) -> tuple[OffPolicyDriver, Setup, dict[str, float]]:
    """A run to the end of its budget, without a run folder; the statistics of its last iteration."""
    setup = build(PENDULUM, method, seed)
    driver: OffPolicyDriver = make_driver(method, setup, seed)
    stats: dict[str, float] = {}
    while not driver.finished:
        stats = driver.step()
    return driver, setup, stats


def _score(setup: Setup, seed: int, episodes: int = 20) -> float:
    return float(np.mean(setup.evaluate(setup.agent, episodes, seed)["returns"]))


def pendulum(method: str, bound: float, seeds: int = 2) -> dict[str, Any]:
    """Mean return of 20 deterministic episodes after training with the presets; worst of the seeds. -1,200 is a random policy, -150 the best known.

    With a tuned temperature it must also stay > 0 and the entropy must end within 1 nat of its target.
    """
    settings = configure(method, PENDULUM)
    returns, entropies, lams = [], [], []
    for seed in range(seeds):
        driver, setup, stats = _trained(settings, seed)
        returns.append(_score(setup, seed))
        if driver.nets.log_lam is not None:
            entropies.append(stats["entropy_nats"] - driver.nets.target_entropy_nats)
            lams.append(stats["lam"])
    holds = min(returns) >= bound and all(abs(e) <= 1.0 for e in entropies) and all(x > 0.0 for x in lams)
    found = {"measured": min(returns), "bound": bound, "holds": holds, "returns": returns, "num_env_steps": settings.num_env_steps}
    return {**found, **({"entropy_minus_target_nats": entropies, "lam": lams} if entropies else {})}


@torch.no_grad()
def _overestimation(driver: OffPolicyDriver, setup: Setup, seed: int, episodes: int = 20) -> float:
    """Mean of Q_1(s, a) - discounted return that the deterministic policy collects from (s, a), over the first 100 steps of episodes of 200.

    The tail beyond the time limit is bootstrapped with Q_1 at the last state, whose weight is at most gamma^100.
    """
    gamma, agent = driver.method.gamma, driver.agent
    venv = setup.collector.venv
    q, reward = [], []
    for episode in range(episodes):
        raw, _ = venv.reset(seed=int(stream(seed, "overestimation", episode).initial_seed() % 2**31))
        values, rewards = [], []
        for _ in range(200):
            obs = agent.observe(raw)
            unit = agent.unit_action(agent.act(obs, deterministic=True)[0])
            values.append(float(driver.nets.q(driver.nets.critic, obs, unit, 1)[0, 0]))
            raw, r, _, _, _ = venv.step(agent.from_unit(unit.numpy()))
            rewards.append(float(r[0]))
        q.append(values)
        reward.append(rewards)
    value, paid = np.array(q), np.array(reward)
    follow, ret = value[:, -1], np.zeros_like(value)
    for t in range(198, -1, -1):
        follow = paid[:, t] + gamma * follow
        ret[:, t] = follow
    return float((value - ret)[:, :100].mean())


def twin_minimum(seeds: int = 2) -> dict[str, Any]:
    """TD3's minimum over twins against a single critic, all else equal: mean of Q - Monte Carlo return is lower, averaged over seeds."""
    settings = configure("td3", PENDULUM)
    single = override(settings, {"critic": {"num": 1}})
    assert isinstance(single.critic, Critics)
    found: dict[str, list[float]] = {}
    for name, method in (("twin", settings), ("single", single)):
        found[name] = [_overestimation(*_trained(method, seed)[:2], seed) for seed in range(seeds)]
    measured = float(np.mean(found["twin"]) - np.mean(found["single"]))
    return {"measured": measured, "bound": 0.0, "holds": measured < 0.0, **{f"{k}_q_minus_return": v for k, v in found.items()}}
