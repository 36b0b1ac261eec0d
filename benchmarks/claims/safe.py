"""Claims of constraint handling, measured on problems whose optimum and multiplier the linear program gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from markovia.algos.safe.conservative import Rule, evaluate, explore, optimal
from markovia.algos.safe.dual import PIDDual
from markovia.algos.safe.exact import constrained_policy_optimisation, descent_ascent, primal_dual, reload, terminating
from markovia.algos.safe.pareto import c_morl, expected_utility, hypervolume, nondominated, simplex_grid, sparsity, weighted_optima
from markovia.algos.safe.shield import chance_safe, safest, shielded_policy
from markovia.algos.safe.trust_region import trust_region_dual
from markovia.envs.exact.cmdps import GRID_HAZARDS, cmdp_grid, cmdp_two_state
from markovia.envs.exact.tabular import TabularMDP


def lagrangian_grid() -> dict[str, Any]:
    """Exact mirror steps against a multiplier on the grid, limit 0.5. With K_I = 0.05 alone the last 200 of 2000 iterates still swing by more than
    0.3; with K_P = 0.5 besides, |J_c - limit| < 1e-3 from iteration 200 on, the violations sum to less than 15, and return and multiplier are
    those of the linear program within 1e-3. Measured is the settled |J_c - limit|."""
    problem = cmdp_grid()
    oracle = problem.solve()
    swinging = primal_dual(problem, PIDDual(ki=0.05, init=0.0), iterations=2000)
    settled = primal_dual(problem, PIDDual(kp=0.5, ki=0.05, init=0.0), iterations=2000)
    violation = lambda trace: float(np.maximum(trace.cost[:, 0] - 0.5, 0.0).sum())  # noqa: E731
    found = {
        "measured": float(np.abs(settled.cost[200:, 0] - 0.5).max()),
        "bound": 1e-3,
        "swing_integral_only": float(np.abs(swinging.cost[-200:, 0] - 0.5).max()),
        "violation_integral_only": violation(swinging),
        "violation": violation(settled),
        "return_error": float(abs(settled.value[-1] - oracle.value)),
        "multiplier_error": float(abs(settled.weight[-1, 0] - oracle.multipliers[0])),
    }
    holds = found["measured"] < 1e-3 and found["swing_integral_only"] > 0.3 and found["violation"] < 15
    return {**found, "holds": bool(holds and found["return_error"] < 1e-3 and found["multiplier_error"] < 1e-3)}


def _disc_optimum(g: np.ndarray, b: np.ndarray, c: float, delta: float) -> float | None:
    """max g.D on a disc cut by a half-plane, by a fine grid over both edges; None where they don't meet."""
    radius = np.sqrt(2 * delta)
    angle = np.linspace(0, 2 * np.pi, 20_001)
    rim = radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    foot, along = -c * b / (b @ b), np.array([-b[1], b[0]]) / np.linalg.norm(b)
    chord = foot + np.linspace(-radius, radius, 20_001)[:, None] * along
    chord = chord[(chord**2).sum(1) <= 2 * delta * (1 + 1e-12)]
    allowed = np.concatenate([rim[c + rim @ b <= 0], chord])
    return float((allowed @ g).max()) if len(allowed) else None


def _starts(problem: Any) -> list[np.ndarray]:
    """Nine softmax tables with discounted costs from 0.1 to 4.2: uniform, six random ones, one that likes hazards and one that shuns them."""
    rng = np.random.default_rng(0)
    q_c = replace(problem.mdp, R=problem.C[0]).Q(problem.mdp.uniform_policy())
    liking = q_c - q_c.mean(-1, keepdims=True)
    return [np.zeros(problem.mdp.R.shape), *rng.normal(size=(6, *problem.mdp.R.shape)), 0.25 * liking, -2.0 * liking]


def cpo_grid() -> dict[str, Any]:
    """(1) On 2000 random two-dimensional programs (H = I, delta 0.02) the closed form equals a brute-force search within 1e-3 wherever one exists.
    (2) Exact CPO on the grid, limit 0.5, 300 iterations, from nine starts and for delta 0.003 and 0.01: cost <= limit + 0.02 at >= 95 % of
    iterations, final return >= 0.99 of the linear program's. Measured is the worst share of iterations."""
    rng, worst_gap, solvable = np.random.default_rng(0), 0.0, 0
    for _ in range(2000):
        g, b, c = rng.normal(size=2), rng.normal(size=2), rng.normal(0.0, 0.2)
        found = trust_region_dual(float(g @ g), float(g @ b), float(b @ b), c, delta=0.02)
        best = _disc_optimum(g, b, c, 0.02)
        if best is not None:
            solvable += 1
            worst_gap = max(worst_gap, abs(float(g @ (found.along_x * g + found.along_p * b)) - best))
    problem = cmdp_grid()
    optimum = problem.solve()
    traces = [constrained_policy_optimisation(problem, delta=delta, damping=1e-6, logits=s) for delta in (0.003, 0.01) for s in _starts(problem)]
    kept = [float((t.cost[:, 0] <= 0.52).mean()) for t in traces]
    reached = [float(t.value[-1] / optimum.value) for t in traces]
    prices = [float(t.weight[-1, 0]) for t in traces]
    return {
        "measured": min(kept),
        "bound": 0.95,
        "holds": bool(worst_gap < 1e-3 and min(kept) >= 0.95 and min(reached) >= 0.99),
        "program_error": worst_gap,
        "programs_solvable": solvable,
        "cost_at_start": [float(t.cost[0, 0]) for t in traces[:9]],
        "share_of_iterations_within": kept,
        "return_over_optimum": reached,
        "multiplier": prices,
        "multiplier_of_the_program": float(optimum.multipliers[0]),
        "recovery_steps": [t.cases.count("recovery") for t in traces],
    }


def cat_grid() -> dict[str, Any]:
    """Hazards that end the episode with probability p, solved exactly: the true cost of the greedy policy does not rise with p, from over 1 at
    p <= 0.2 to under 0.05 at p >= 0.4. Measured is the cost at p = 1."""
    problem = cmdp_grid()
    unsafe = np.isin(np.arange(25), GRID_HAZARDS)
    probabilities = [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    policies = [terminating(problem, unsafe, p).policy_iteration()[0][:25] for p in probabilities]
    costs, values = [float(problem.costs(q)[0]) for q in policies], [problem.mdp.J(q) for q in policies]
    falls = all(a >= b - 1e-9 for a, b in pairwise(costs[1:]))  # at p = 0 the cost is of no interest: ties are free
    holds = falls and min(costs[:3]) > 1.0 and max(costs[4:]) < 0.05
    return {"measured": costs[-1], "bound": 0.05, "holds": holds, "probability": probabilities, "cost": costs, "return": values}


def reload_cycles() -> dict[str, Any]:
    """On the grid (limit 0.5, 4000 iterations, dual steps 0.05, 0.1, 0.2) the last 500 iterates of ReLOAD are within 1e-3 of the optimum in return
    and cost, while descent-ascent with the same steps misses the limit by more than 0.3 there and only its average is near (0.02 in return, 0.05
    in cost). On the two-state problem (steps 0.1 and 0.02, 8000 iterations) the errors are < 1e-3 and > 4. Measured is ReLOAD's worst error."""
    problem, found = cmdp_grid(), []
    oracle = problem.solve()
    for dual_step in (0.05, 0.1, 0.2):
        plain, ours = descent_ascent(problem, dual_step=dual_step), reload(problem, dual_step=dual_step)
        found.append(
            {
                "dual_step": dual_step,
                "reload_return_error": float(np.abs(ours.value[-500:] - oracle.value).max()),
                "reload_cost_error": float(np.abs(ours.cost[-500:, 0] - 0.5).max()),
                "reload_multiplier_error": float(abs(ours.weight[-1, 0] - oracle.multipliers[0])),
                "plain_cost_error": float(np.abs(plain.cost[-500:, 0] - 0.5).max()),
                "plain_average_return_error": float(abs(plain.value.mean() - oracle.value)),
                "plain_average_cost_error": float(abs(plain.cost.mean() - 0.5)),
            }
        )
    two = cmdp_two_state()
    plain, ours = (f(two, step=0.1, dual_step=0.02, iterations=8000) for f in (descent_ascent, reload))
    error, cycle = float(np.abs(ours.cost[-500:, 0] - 5.0).max()), float(np.abs(plain.cost[-500:, 0] - 5.0).max())
    worst = max([error, *(max(f["reload_return_error"], f["reload_cost_error"]) for f in found)])
    cycles = all(f["plain_cost_error"] > 0.3 for f in found) and cycle > 4.0
    averages = all(f["plain_average_return_error"] < 0.02 and f["plain_average_cost_error"] < 0.05 for f in found)
    holds = worst < 1e-3 and cycles and averages
    return {"measured": worst, "bound": 1e-3, "holds": holds, "grid": found, "two_state": {"reload": error, "plain": cycle}}


def _instances(runs: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random MDPs (S 4, A 3, H 4), the baseline 0.6 optimal + 0.4 uniform, and what baseline and optimum are worth."""
    rng = np.random.default_rng(seed)
    P, reward, start = rng.dirichlet(np.ones(4), (runs, 4, 3)), rng.random((runs, 4, 3)), np.eye(4)[np.zeros(runs, dtype=int)]
    greedy, V, _ = optimal(P, reward, 4)
    baseline = 0.6 * greedy + 0.4 / 3
    return P, reward, start, baseline, (start * evaluate(P, reward, baseline)[:, 0]).sum(-1), (start * V[:, 0]).sum(-1)


def _explored(rule: Rule, share: float, scale: float, runs: int, seed: int = 0) -> dict[str, Any]:
    """Episodes below the floor in each run, late regret over the optimum, and total regret, of 4000 episodes scored exactly."""
    P, reward, start, baseline, worth, best = _instances(runs)
    history = explore(P, reward, start, baseline, share * worth, rule=rule, bonus_scale=scale, seed=seed)
    below = (history.value < share * worth - 1e-9).sum(0)
    regret = best - history.value
    late = regret[-400:].mean(0) / best
    return {"below": below, "late": late, "total": regret.sum(0), "under_baseline": (history.value < worth - 1e-9).any(0)}


def stepmix_floor(runs: int = 100) -> dict[str, Any]:
    """StepMix in 100 random MDPs, one run each, 4000 episodes, floor 0.95 of the baseline's return, bonus scale 0.03: no episode is played below the
    floor, UCBVI plays >= 10 of them in the mean, and StepMix's regret over the last tenth is < 0.05 of the optimum in the mean; and the same floors
    at 0.75 and scale 0.1 on 20 MDPs. Measured is the number of runs in which StepMix ever fell below."""
    ours, free = (_explored(rule, 0.95, 0.03, runs) for rule in ("step-mixture", "none"))
    others = {f"{share} {scale}": _explored("step-mixture", share, scale, 20) for share in (0.95, 0.75) for scale in (0.03, 0.1)}
    fell = int((ours["below"] > 0).sum()) + sum(int((o["below"] > 0).sum()) for o in others.values())
    return {
        "measured": fell,
        "bound": 0,
        "holds": bool(fell == 0 and free["below"].mean() >= 10 and ours["late"].mean() < 0.05),
        "runs": runs,
        "runs_below_unconstrained": int((free["below"] > 0).sum()),
        "episodes_below_unconstrained": [int(free["below"].min()), float(free["below"].mean()), int(free["below"].max())],
        "late_regret": [float(ours["late"].mean()), float(ours["late"].max())],
        "late_regret_unconstrained": float(free["late"].mean()),
    }


def stepmix_offline(runs: int = 20) -> dict[str, Any]:
    """StepMix that begins from 300 logged episodes of the baseline: no episode below the floor of 0.95, and less regret than from nothing."""
    P, reward, start, baseline, worth, best = _instances(runs)
    logged, rows, rng = np.zeros(P.shape), np.arange(runs), np.random.default_rng(7)
    pick = lambda p: (rng.random((runs, 1)) >= p.cumsum(-1)).sum(-1).clip(max=p.shape[-1] - 1)  # noqa: E731
    for _ in range(300):
        state = pick(start)
        for h in range(4):
            action = pick(baseline[rows, h, state])
            after = pick(P[rows, state, action])
            logged[rows, state, action, after] += 1
            state = after
    arguments: dict[str, Any] = {"episodes": 2000, "bonus_scale": 0.03}
    scratch = explore(P, reward, start, baseline, 0.95 * worth, **arguments)
    offline = explore(P, reward, start, baseline, 0.95 * worth, counts=logged, **arguments)
    ratio = float((best - offline.value).sum() / (best - scratch.value).sum())
    below = int((offline.value < 0.95 * worth - 1e-9).sum())
    return {"measured": ratio, "bound": 1.0, "holds": ratio < 1.0 and below == 0, "episodes_below": below}


def epsmix_floor(runs: int = 20, seeds: int = 3) -> dict[str, Any]:
    """EpsMix, scored as the mixture that it plays: no episode below the floor (0.95 and 0.75 of the baseline), and for both floors a total regret
    over 20 random MDPs and 3 seeds within 1.3 times StepMix's. Measured is the larger ratio; that of the worst single MDP is told besides."""
    ratios, below, worst = [], 0, []
    for share in (0.95, 0.75):
        ours = [_explored("episode-mixture", share, 0.03, runs, seed) for seed in range(seeds)]
        theirs = [_explored("step-mixture", share, 0.03, runs, seed) for seed in range(seeds)]
        a, b = (np.sum([f["total"] for f in found], axis=0) for found in (ours, theirs))
        below += sum(int(f["below"].sum()) for f in ours)
        ratios.append(float(a.sum() / b.sum()))
        worst.append(float((a / b).max()))
    return {
        "measured": max(ratios), "bound": 1.3, "holds": max(ratios) <= 1.3 and below == 0, "episodes_below": below, "ratios": ratios,
        "worst_single_mdp": worst,
    }  # fmt: skip


def c_morl_front(seeds: int = 16) -> dict[str, Any]:
    """Two objectives u^2 and (1 - u)^2 in random MDPs (S 10, A 4): from the two corners, four rounds of constrained extensions reach >= 0.94 of the
    true front's hypervolume with a sparsity < 0.4, from < 0.5 and > 40; as many optima of random preferences give less hypervolume in every seed.
    Measured is the worst share of the hypervolume."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        P, u = rng.dirichlet(np.ones(10), (10, 4)), rng.random((10, 4))
        mdp, rewards = TabularMDP(P, u, 0.9, np.full(10, 0.1)), np.stack([u**2, (1 - u) ** 2])
        vertices = weighted_optima(mdp, rewards, simplex_grid(2, 1 / 500))[0]
        vertices = vertices[nondominated(vertices)]
        vertices = vertices[np.argsort(vertices[:, 0])]
        x, y = vertices.T  # the true front is the broken line through them
        whole = float(x[0] * y[0] + (np.diff(x) * (y[1:] + y[:-1]) / 2).sum())
        corners = weighted_optima(mdp, rewards, np.eye(2))[0]
        front = c_morl(mdp, rewards, np.eye(2))
        random = weighted_optima(mdp, rewards, rng.dirichlet(np.ones(2), front.solved))[0]
        random = random[nondominated(random)]
        share = lambda p: hypervolume(p, np.zeros(2)) / whole  # noqa: B023, E731
        fine = simplex_grid(2, 0.01)
        found.append(
            {
                "hypervolume": [share(corners), share(front.points), share(random)],
                "sparsity": [sparsity(corners), sparsity(front.points), sparsity(random)],
                "expected_utility": [expected_utility(p, fine) for p in (corners, front.points, random)],
                "solved": front.solved,
            }
        )
    hv, sp = (np.array([f[k] for f in found]) for k in ("hypervolume", "sparsity"))
    holds = hv[:, 1].min() >= 0.94 and hv[:, 0].max() < 0.5 and sp[:, 0].min() > 40 and sp[:, 1].max() < 0.4 and (hv[:, 2] < hv[:, 1]).all()
    return {"measured": float(hv[:, 1].min()), "bound": 0.94, "holds": bool(holds), "seeds": found}


def acs_shield(problems: int = 60) -> dict[str, Any]:
    """Random MDPs (12 states, two of them absorbing and unsafe, 3 actions, 30 steps, epsilon 0.2): the chance that a uniform policy stays safe,
    behind an exact shield, rises strictly from no shield over alpha = 0.8 to 0.2, and never above the safest policy's. Measured is the number of
    problems in which it does not."""
    found = []
    for seed in range(problems):
        rng = np.random.default_rng(seed)
        hazard = rng.uniform(0.0, 0.2, (12, 3, 1))
        P = np.concatenate([rng.dirichlet(np.ones(10), (12, 3)) * (1 - hazard), hazard * rng.dirichlet(np.ones(2), (12, 3))], -1)
        P[10:] = np.eye(12)[10:, None]
        unsafe, start, uniform = np.arange(12) >= 10, np.eye(12)[0], np.full((12, 3), 1 / 3)
        free = chance_safe(P, np.broadcast_to(uniform, (30, 12, 3)), unsafe, start)
        shielded = [chance_safe(P, shielded_policy(P, uniform, unsafe, 30, alpha=a, epsilon=0.2), unsafe, start) for a in (0.8, 0.2)]
        found.append([free, *shielded, float(safest(P, unsafe, 30)[0][0, 0])])
    broken = sum(not (a < b < c <= d + 1e-12) for a, b, c, d in found)
    return {"measured": broken, "bound": 0, "holds": broken == 0, "mean_chances": np.mean(found, axis=0).tolist()}


def trpo_lag_grid(seed: int = 0) -> dict[str, Any]:
    """Sampled TRPO-Lagrangian on the grid, limit 0.5 on the discounted cost, PI dual (0.5, 0.05), 200 environments of 60 steps, 150 iterations: the
    mean measured cost of the last 30 is within 0.05 of the limit and their mean exact return at least 0.64. Measured is the distance from the
    limit."""
    import torch

    from markovia.algos.presets import configure, override
    from markovia.algos.setup import build, make_driver

    problem, env = cmdp_grid(), "markovia/SafeGrid-v0"
    method = override(
        configure("trpo-lag", env),
        {
            "num_env_steps": 150 * 12_000, "num_envs": 200, "num_steps": 60, "normalize_advantage": "none", "advantage": {"gamma": 0.95},
            "solver": {"damping": 0.01}, "value": {"separate": {"lr": 0.02, "minibatch": 1000, "epochs": 5}},
            "constraint": {"cost_limit": [0.5], "cost_gamma": 0.95, "dual": {"kp": 0.5, "ki": 0.05, "optimizer": "sgd", "init": 0.0}},
        },
    )  # fmt: skip
    setup = build(env, method, seed, agent_options={"dtype": "float64"})
    driver, costs, values = make_driver(method, setup, seed), [], []
    while not driver.finished:
        costs.append(driver.step()["cost"])
        table: Any = setup.agent.net["policy"].table
        values.append(problem.mdp.J(torch.softmax(table.detach(), -1).numpy()))
    cost, value = float(np.mean(costs[-30:])), float(np.mean(values[-30:]))
    holds = abs(cost - 0.5) <= 0.05 and value >= 0.64
    return {"measured": abs(cost - 0.5), "bound": 0.05, "holds": holds, "cost": cost, "return": value, "optimum": problem.solve().value}


def costs_and_returns(env: str, method: Any, seed: int, **agent_options: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """What each iteration of a run tells of its episodes, (iterations,) each, and what was trained."""
    from markovia.algos.setup import build, make_driver

    setup = build(env, method, seed, agent_options=agent_options)
    driver, found = make_driver(method, setup, seed), []
    while not driver.finished:
        stats = driver.step()
        found.append((stats["cost"], stats["return"]))
    costs, returns = np.array(found).T
    return costs, returns, setup


def _pendulum(method_id: str, limit: float, seed: int) -> tuple[float, float, float]:
    """Mean episode cost over the last tenth of 120,000 steps, mean violation per episode over all of them, and the return over the last tenth."""
    from markovia.algos.presets import configure, override

    env = "markovia/SafePendulum-v0"
    changes: dict[str, Any] = {"num_env_steps": 120_000, "num_envs": 4, "num_steps": 1000, "advantage": {"gamma": 0.95}}
    if method_id not in ("cpo", "trpo-lag"):
        changes["solver"] = {"minibatch": 250, "lr": 1e-3}
    changes |= {"normalize_advantage": "batch"} if method_id == "ppo" else {"constraint": {"cost_limit": [limit]}}
    costs, returns, _ = costs_and_returns(env, override(configure(method_id, env), changes), seed)
    return float(costs[-3:].mean()), float(np.maximum(costs - limit, 0.0).mean()), float(returns[-3:].mean())


def pendulum_limit(method: str, limit: float = 10.0, seeds: int = 2) -> dict[str, Any]:
    """The pendulum with a limit of 10 steps an episode above 2 rad/s: after 120,000 steps the method's episodes cost at most 1.2 times the limit
    (mean of the seeds, last tenth of training), PPO's at least twice the limit, and over training the violation is smaller than under gradient
    ascent on the multiplier. Measured is the cost."""
    found = {m: np.mean([_pendulum(m, limit, seed) for seed in range(seeds)], axis=0).tolist() for m in (method, "ppo", "ppo-lag")}
    cost, free, overshoot = found[method][0], found["ppo"][0], found[method][1]
    holds = cost <= 1.2 * limit and free >= 2 * limit and overshoot < found["ppo-lag"][1]
    return {"measured": cost, "bound": 1.2 * limit, "holds": bool(holds), "limit": limit, "cost, mean violation, return": found}
