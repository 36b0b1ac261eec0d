"""Claims of constrained learners on samples: from a replay, with optimistic steps, and above the baseline's own return."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from scipy.special import softmax

from markovia.algos.off_policy.costs import upper_cost
from markovia.algos.presets import configure, override
from markovia.algos.safe.constraint import optimistic_advantage
from markovia.algos.safe.dual import gradient, log_augmented, optimistic
from markovia.algos.safe.exact import primal_dual
from markovia.algos.safe.front import FrontLearning
from markovia.algos.safe.pareto import hypervolume
from markovia.claims.safe import _explored, costs_and_returns
from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.cmdps import cmdp_grid


def _swing(penalty: float) -> float:
    """max x on [0, 1] with x <= 0.5 by steps of 0.02 against [lam + penalty e]_+: the largest |x - 0.5| of the last 500 of 3000 iterates."""
    lam, x, seen = 0.0, 0.0, []
    for _ in range(3000):
        weight, lam = max(lam + penalty * (x - 0.5), 0.0), max(lam + 0.02 * (x - 0.5), 0.0)
        x = float(np.clip(x + 0.02 * (1.0 - weight), 0.0, 1.0))
        seen.append(x)
    return float(np.abs(np.array(seen[-500:]) - 0.5).max())


def _bias(k: float, draws: int = 2000) -> float:
    """200 actions of true cost 1, judged by 4 critics with errors of deviation 0.5: mean estimate of the one that looks cheapest, less 1."""
    q = 1.0 + 0.5 * torch.randn(draws, 4, 200, generator=torch.Generator().manual_seed(0))
    return float(upper_cost(q, k=k).amin(-1).mean() - 1.0)


def cal_exact() -> dict[str, Any]:
    """CAL's two parts. (1) The augmented multiplier, in log space, against exact mirror steps on the grid (limit 0.5): return, cost and multiplier of
    the last of 2000 iterates are the linear program's within 1e-3, while on a linear problem a multiplier without penalty swings by more than 0.4
    and with one settles. (2) The cheapest-looking of 200 equal actions is under-estimated the less the more pessimistic the critics are read.
    Measured is the largest error of (1)."""
    problem = cmdp_grid()
    oracle = problem.solve()
    trace = primal_dual(problem, replace(log_augmented(0.5, 0.3), optimizer="sgd"), iterations=2000)
    pairs = ((trace.value[-1], oracle.value), (trace.cost[-1, 0], 0.5), (trace.weight[-1, 0], oracle.multipliers[0]))
    errors = [float(abs(found - wanted)) for found, wanted in pairs]
    swings, biases = [_swing(c) for c in (0.0, 1.0, 10.0)], [_bias(k) for k in (0.0, 0.5, 1.0)]
    parts = swings[0] > 0.4 and max(swings[1:]) < 1e-2 and biases[0] < biases[1] < biases[2] < 0
    return {
        "measured": max(errors), "bound": 1e-3, "holds": bool(max(errors) < 1e-3 and parts),
        "return, cost, multiplier error": errors, "swing at penalty 0, 1, 10": swings, "bias at k 0, 0.5, 1": biases,
    }  # fmt: skip


def _pendulum(method_id: str, seed: int, limit: float) -> tuple[float, float, float]:
    """Share of violating episodes, mean cost over the last quarter, and return there, of 20,000 steps of the pendulum with a speed limit."""
    env = "markovia/SafePendulum-v0"
    changes: dict[str, Any] = {"num_steps": 200, "constraint": {"cost_limit": [limit]}}
    costs, values, _ = costs_and_returns(env, override(configure(method_id, env), changes), seed)
    late = len(costs) // 4
    return float((costs > limit).mean()), float(costs[-late:].mean()), float(values[-late:].mean())


def cal_pendulum(limit: float = 10.0, seeds: int = 2) -> dict[str, Any]:
    """The pendulum with a limit of 10 steps an episode above 2 rad/s, 20,000 steps: fewer of CAL's training episodes violate it than of SAC's with a
    multiplier by gradient ascent on the cost of finished episodes. Measured is the share of CAL's, the bound the other's."""
    ours, theirs = (np.mean([_pendulum(m, seed, limit) for seed in range(seeds)], axis=0).tolist() for m in ("cal", "cal/sac-lag"))
    return {
        "measured": ours[0], "bound": theirs[0], "holds": ours[0] < theirs[0],
        "share of violating episodes, late cost, late return": {"cal": ours, "cal/sac-lag": theirs},
    }  # fmt: skip


def _sampled_grid(optimistic: bool, iterations: int, seed: int, lr: float = 0.02, dual_step: float = 0.05) -> tuple[np.ndarray, float]:
    """Measured discounted costs of every iteration, and the exact return of the last policy, of mirror-like steps on the grid, limit 0.5."""
    env = "markovia/SafeGrid-v0"
    dual = {"kp": dual_step if optimistic else 0.0, "ki": dual_step, "init": 0.0}
    method = override(
        configure("reload/ppo", env),
        {
            "num_env_steps": iterations * 6000, "num_envs": 100, "num_steps": 60, "normalize_advantage": "none", "advantage": {"gamma": 0.95},
            "solver": {"lr": lr, "minibatch": None, "epochs": 4, "anneal": False}, "value": {"coef": 5.0},
            "constraint": {"cost_limit": [0.5], "cost_gamma": 0.95, "dual": dual, "optimistic": optimistic, "mix": "sum"},
        },
    )  # fmt: skip
    costs, _, setup = costs_and_returns(env, method, seed, dtype="float64")
    table: Any = setup.agent.net["policy"].table
    return costs, float(cmdp_grid().mdp.J(torch.softmax(table.detach(), -1).numpy()))


def reload_grid(iterations: int = 200, seeds: int = 4) -> dict[str, Any]:
    """Sampled optimistic steps on the grid, limit 0.5 on the discounted cost, the multiplier's step 0.05: over the last quarter of the iterations the
    cost is nearer to the limit (mean |cost - limit|) than with the same steps of policy and multiplier that are not optimistic, in the mean over
    seeds. Measured is the distance, the bound the other's."""
    runs = {name: [_sampled_grid(name == "optimistic", iterations, seed) for seed in range(seeds)] for name in ("optimistic", "plain")}
    distance = {name: [float(np.abs(c[-(iterations // 4) :] - 0.5).mean()) for c, _ in found] for name, found in runs.items()}
    near, far = (float(np.mean(found)) for found in distance.values())
    returns = {name: [value for _, value in found] for name, found in runs.items()}
    return {
        "measured": near, "bound": far, "holds": near < far, "distances": distance, "returns": returns,
        "optimum": cmdp_grid().solve().value,
    }  # fmt: skip


def _temporal(problem: CMDP, policy: np.ndarray, weight: float) -> np.ndarray:
    """(S, A): the mixed advantage r - w c + gamma P V - V that exact critics of `policy` give on any batch, V that of the same mixture."""
    mdp = replace(problem.mdp, R=problem.mdp.R - weight * problem.C[0])
    value = mdp.V(policy)
    return mdp.R + mdp.gamma * mdp.P @ value - value[:, None]


def reload_critics(dual_step: float = 0.1, iterations: int = 4000) -> dict[str, Any]:
    """The sampled form with nothing left to chance: temporal-difference advantages by exact critics of this and of the last policy, each with its own
    multiplier, combined by `optimistic_advantage`, in mirror steps on the grid (limit 0.5). The last 500 iterates are within 1e-3 of the limit and of
    the optimal return; without the look back they miss the limit by more than 0.3. Measured is the largest error of the former."""
    problem = cmdp_grid()
    optimum = problem.solve().value
    seen: dict[bool, np.ndarray] = {}
    for back in (True, False):
        logits, last = np.zeros(problem.mdp.R.shape), None
        dual = optimistic(dual_step) if back else gradient(dual_step, init=0.0, optimizer="sgd")
        state, weight, found = dual.start(1), 0.0, []
        for _ in range(iterations):
            policy = softmax(logits, axis=-1)
            cost = float(problem.costs(policy)[0])
            found.append((problem.mdp.J(policy), cost))
            adv = _temporal(problem, policy, weight)
            step = adv if last is None or not back else optimistic_advantage(torch.from_numpy(adv), torch.from_numpy(last)).numpy()
            logits, last = logits + step, adv
            logits -= logits.max(-1, keepdims=True)
            state, (weight,) = dual.update(state, [cost], problem.budgets)
        seen[back] = np.abs(np.array(found[-500:]) - np.array([optimum, 0.5])).max(0)
    error, cycle = float(seen[True].max()), float(seen[False][1])
    return {"measured": error, "bound": 1e-3, "holds": error < 1e-3 and cycle > 0.3, "miss of the limit without looking back": cycle}


def stepmix_baseline(runs: int = 100) -> dict[str, Any]:
    """StepMix with the baseline's own return as the floor, in 100 random MDPs, one run each, 4000 episodes, bonus scale 0.03: no episode is played
    with a policy worth less than the baseline, while the unconstrained learner plays such episodes in every run. Measured is the number of runs in
    which StepMix ever did."""
    ours, free = (_explored(rule, 1.0, 0.03, runs) for rule in ("step-mixture", "none"))
    fell, free_fell = int(ours["under_baseline"].sum()), int(free["under_baseline"].sum())
    return {
        "measured": fell, "bound": 0, "holds": fell == 0 and free_fell == runs, "runs": runs, "runs_below_unconstrained": free_fell,
        "episodes_below_unconstrained": [int(free["below"].min()), float(free["below"].mean()), int(free["below"].max())],
        "late_regret": [float(ours["late"].mean()), float(ours["late"].max())],
    }  # fmt: skip


class Ledge(gym.Env):
    """A walk of 12 steps towards a ledge: x <- x + 0.25 a + 0.05 noise from 0, reward a, cost 1 for every step beyond x = 1."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = 0.0
        return np.array([self.x], np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.x += 0.25 * float(action[0]) + 0.05 * float(self.np_random.normal())
        return np.array([self.x], np.float32), float(action[0]), False, False, {"cost": float(self.x > 1.0)}


LEDGE: dict[str, Any] = {"id": "markovia-claims/Ledge-v0", "entry_point": "markovia.claims.safe_learning:Ledge", "max_episode_steps": 12}


def _guarded(shielded: bool, seed: int, steps: int) -> tuple[float, float]:
    """Mean cost of an episode (steps beyond the ledge) and mean return, over the second half of training."""
    if LEDGE["id"] not in gym.registry:
        gym.register(**LEDGE)
    method = override(
        configure("acs/ppo", LEDGE["id"]),
        {
            "num_env_steps": steps, "num_envs": 16, "num_steps": 60, "solver": {"minibatch": 240, "lr": 1e-3, "epochs": 5},
            "constraint": {
                "cost_limit": [0.0], "shield": {"epsilon": 0.1, "epsilon_first": 1.3, "epsilon_fall": 0.1, "hidden": [32], "memory": 3000},
            },
        },
    )  # fmt: skip
    if not shielded:
        method = replace(method, constraint=replace(method.constraint, shield=None))
    costs, returns, _ = costs_and_returns(LEDGE["id"], method, seed)
    half = len(costs) // 2
    return float(costs[half:].mean()), float(returns[half:].mean())


def acs_ledge(seeds: int = 2, steps: int = 28_800) -> dict[str, Any]:
    """PPO on reward less 0.1 cost walks over a ledge; behind the shield that it learns on the way, with a tolerated chance of 0.1, episodes cost less
    than half as much over the second half of training, and earn at least a quarter of the 4 that walking to the edge pays. Measured is the cost
    behind the shield, the bound half of that without."""
    ours, bare = (np.mean([_guarded(shielded, seed, steps) for seed in range(seeds)], axis=0).tolist() for shielded in (True, False))
    return {
        "measured": ours[0], "bound": 0.5 * bare[0], "holds": ours[0] < 0.5 * bare[0] and ours[1] >= 1.0,
        "cost, return": {"shield": ours, "none": bare},
    }  # fmt: skip


def learnt_front() -> dict[str, Any]:
    """C-MORL by PPO on the two goals: after two rounds of extensions from three preferences the front has more hypervolume over (0, 0) than before,
    and a sparsity less than half. Measured is the share of the hypervolume of staying anywhere between the goals from the first step on."""
    method = replace(FrontLearning(), rounds=0)
    first = method.search("markovia/TwoGoals-v0")
    whole = replace(method, rounds=2).search("markovia/TwoGoals-v0")
    p = np.linspace(-1.0, 1.0, 1001)
    ideal = hypervolume(25.0 * np.stack([1 - (p + 1) ** 2 / 4, 1 - (p - 1) ** 2 / 4], 1), np.zeros(2))
    before, after = (front.metrics(np.zeros(2)) for front in (first, whole))
    share = after["hypervolume"] / ideal
    holds = share > 0.85 and after["hypervolume"] > before["hypervolume"] and after["sparsity"] < 0.5 * before["sparsity"]
    sizes = [len(first.points), len(whole.points)]
    return {"measured": share, "bound": 0.85, "holds": bool(holds), "points": sizes, "before": before, "after": after}
