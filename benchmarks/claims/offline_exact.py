"""Claims of the offline methods where the answer is exact: fixed points on the maze's empirical MDP, actors on the bandit's own Q."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn

from markovia.agents.improved import improve
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.regularised import advantage_weight, calibrated, conservative_gap, expectile
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import Behaviour
from markovia.algos.off_policy.update import Update
from markovia.algos.offline.method import Offline
from markovia.algos.offline.setup import make_agent
from markovia.algos.offline.source import make_source
from markovia.algos.presets import configure, override
from markovia.envs.exact.offline import Bandit2D, EmpiricalMDP, maze, maze_data, success
from markovia.envs.exact.tabular import TabularMDP

POINT = "markovia/PointMass2D-v0"


# -- the maze: fixed points on the MDP that counts of the data define -----------------------------------------------------------------------


def _expectile_of(q: Tensor, behaviour: Tensor, tau: float, sweeps: int = 50) -> Tensor:
    """(S,) minimiser over V of E_behaviour[expectile(q - V)] in every state, by Newton's method on the library's loss (piecewise quadratic)."""
    v = (behaviour * q).sum(1)
    for _ in range(sweeps):
        v = v.detach().requires_grad_(True)
        slope = torch.autograd.grad((behaviour * expectile(q - v[:, None], tau=tau)).sum(), v, create_graph=True)[0]
        step = slope.detach() / torch.autograd.grad(slope.sum(), v)[0]
        v = v - step
        if float(step.abs().max()) < 1e-13:
            break
    return v.detach()


def in_sample_value(bound: float = 0.05, seeds: int = 2) -> dict[str, Any]:
    """IQL's value at its fixed point on the maze's empirical MDP: largest error to the in-sample optimum, over its maximum, at tau 0.99.

    It falls with tau, and tau = 0.5 gives the behaviour's own value.
    """
    errors: dict[float, list[float]] = {0.7: [], 0.9: [], 0.99: []}
    to_behaviour = 0.0
    for seed in range(seeds):
        empirical = EmpiricalMDP.from_data(maze_data(seed), 49, 5)
        mdp, mu = empirical.mdp, torch.as_tensor(empirical.behaviour)
        optimum = empirical.in_sample_optimum()[1]
        found = {}
        for tau in (0.5, *errors):
            v = np.zeros(mdp.num_states)
            for _ in range(2000):
                new = _expectile_of(torch.as_tensor(mdp.backup(v)), mu, tau).numpy()
                gap, v = float(np.abs(new - v).max()), new
                if gap < 1e-11:
                    break
            found[tau] = v
        to_behaviour = max(to_behaviour, float(np.abs(found[0.5] - _value(mdp, empirical.behaviour)).max()))
        for tau, values in errors.items():
            values.append(float(np.abs(found[tau] - optimum).max() / optimum.max()))
    falls = all(a > b > c for a, b, c in zip(*errors.values(), strict=True))
    measured = max(errors[0.99])
    holds = measured < bound and falls and to_behaviour < 1e-8
    return {"measured": measured, "bound": bound, "holds": holds, "error_by_tau": {str(t): e for t, e in errors.items()},
            "tau_half_minus_behaviour": to_behaviour}  # fmt: skip


def _soft(q: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """softmax over the covered actions, (S, A)."""
    return np.asarray(special.softmax(np.where(covered, q, -np.inf), axis=1))


def _conservative_fixed_point(empirical: EmpiricalMDP, alpha: float, floor: np.ndarray | None = None) -> np.ndarray:
    """Q (S, A) at the fixed point of CQL on a table, policy softmax(Q) over covered actions, with Cal-QL's floor (S,) where one is given.

    In a state and given y the loss is convex, and its minimiser is Q = y - (alpha/2)(softmax(max(Q, floor)) / mu - 1) where that lies above the
    floor, y + alpha/2 where that lies below it, and the floor between the two. Damped iteration of both equations together.
    """
    mdp, covered = empirical.mdp, empirical.covered
    mu = np.where(covered, empirical.behaviour, 1.0)
    low = np.full((mdp.num_states, 1), -np.inf) if floor is None else floor[:, None]
    q = np.zeros_like(mdp.R)
    for _ in range(20_000):
        y = mdp.backup((_soft(q, covered) * q).sum(1))
        above = y - alpha / 2 * (np.where(covered, _soft(np.maximum(q, low), covered) / mu, 1.0) - 1.0)
        new = np.clip(low, above, y + alpha / 2)
        gap, q = float(np.abs(new - q).max()), q + 0.1 * (new - q)
        if gap < 1e-11:
            break
    return q


def _slope(empirical: EmpiricalMDP, q: np.ndarray, alpha: float, floor: np.ndarray | None = None) -> float:
    """Largest slope at `q` of the library's loss, sum_a mu (Q - y)^2 + alpha gap in every state, away from the floor's kinks."""
    covered, mu = torch.as_tensor(empirical.covered), torch.as_tensor(empirical.behaviour)
    y = torch.as_tensor(empirical.mdp.backup((_soft(q, empirical.covered) * q).sum(1)))
    x = torch.as_tensor(q).requires_grad_(True)
    values = x.masked_fill(~covered, -torch.inf).T[None]
    smooth = covered
    if floor is not None:
        g = torch.as_tensor(floor)
        values, smooth = calibrated(values, g).masked_fill(~covered.T, -torch.inf), covered & ((x - g[:, None]).abs() > 1e-6)
    gap = conservative_gap(values, 0.0, (mu * x).sum(1)[None], temperature=1.0)
    loss = ((mu * (x - y).square()).sum(1) + alpha * gap).sum()
    return float(torch.autograd.grad(loss, x)[0][smooth].abs().max())


def _value(mdp: TabularMDP, policy: np.ndarray) -> np.ndarray:
    step = np.einsum("sa,sat->st", policy, mdp.P)
    return np.linalg.solve(np.eye(mdp.num_states) - mdp.gamma * step, (policy * mdp.R).sum(1))


def conservative_values(alphas: tuple[float, ...] = (1.0, 5.0), seeds: int = 3) -> dict[str, Any]:
    """CQL on the maze's empirical MDP, policy softmax(Q): E_pi Q - V^pi of that MDP, largest over states, is never above 0."""
    excess, slopes = [], []
    for seed in range(seeds):
        empirical = EmpiricalMDP.from_data(maze_data(seed), 49, 5)
        for alpha in alphas:
            q = _conservative_fixed_point(empirical, alpha)
            policy = _soft(q, empirical.covered)
            excess.append(float(((policy * q).sum(1) - _value(empirical.mdp, policy)).max()))
            slopes.append(_slope(empirical, q, alpha))
    holds = max(excess) <= 1e-9 and max(slopes) <= 1e-8
    return {"measured": max(excess), "bound": 1e-9, "holds": holds, "excess": excess, "slope_of_the_loss": slopes}


def conservative_true_values(seeds: int = 3, many: float = 0.95, few: float = 0.2) -> dict[str, Any]:
    """Share of states with E_pi Q <= V^pi of the true maze: at alpha 5 at least `many`, at alpha 0 at most `few`; worst of the seeds.

    At alpha 0 nothing pulls values either way: E_pi Q is V^pi of the empirical MDP exactly (told as `alpha_0_minus_empirical`), whose rewards at the
    goal come from a handful of successes. Which states lie below the truth is then the luck of the data, between none and two thirds of them.
    """
    shares: dict[float, list[float]] = {0.0: [], 5.0: []}
    apart = 0.0
    for seed in range(seeds):
        empirical = EmpiricalMDP.from_data(maze_data(seed), 49, 5)
        for alpha, found in shares.items():
            q = _conservative_fixed_point(empirical, alpha)
            policy = _soft(q, empirical.covered)
            found.append(float(((policy * q).sum(1) <= _value(maze(), policy) + 1e-9)[:-1].mean()))
            if alpha == 0.0:
                apart = max(apart, float(np.abs((policy * q).sum(1) - _value(empirical.mdp, policy)).max()))
    holds = min(shares[5.0]) >= many and max(shares[0.0]) <= few
    return {"measured": min(shares[5.0]), "bound": many, "holds": holds, "alpha_5": shares[5.0], "alpha_0": shares[0.0], "alpha_0_bound": few,
            "alpha_0_minus_empirical": apart}  # fmt: skip


def calibrated_values(alpha: float = 5.0, seeds: int = 3) -> dict[str, Any]:
    """Cal-QL on 50 random and 50 optimal maze episodes, floor the mean return of a state: E_pi Q - floor, smallest over states, is not below -1e-3.

    CQL on the same data falls below the floor in some states.
    """
    lowest: dict[str, list[float]] = {"cal-ql": [], "cql": []}
    slopes = []
    for seed in range(seeds):
        data = maze_data(seed, 50, 50)
        empirical = EmpiricalMDP.from_data(data, 49, 5)
        count = np.bincount(data.obs, minlength=49)  # type: ignore[arg-type]
        ret = data.returns_to_go(empirical.mdp.gamma, cut="zero")
        mean = np.bincount(data.obs, weights=ret, minlength=49) / np.maximum(count, 1)  # type: ignore[arg-type]
        for name, floor in (("cal-ql", np.where(count > 0, mean, -np.inf)), ("cql", None)):
            q = _conservative_fixed_point(empirical, alpha, floor)
            lowest[name].append(float(((_soft(q, empirical.covered) * q).sum(1) - mean)[count > 0].min()))
            slopes.append(_slope(empirical, q, alpha, floor))
    measured = min(lowest["cal-ql"])
    holds = measured >= -1e-3 and max(lowest["cql"]) < 0.0 and max(slopes) <= 1e-8
    return {"measured": measured, "bound": -1e-3, "holds": holds, **lowest, "slope_of_the_loss": slopes}


def mild_evaluation(weight: float = 1.0, milder: float = 0.1, gain: float = 0.15, seeds: int = 3) -> dict[str, Any]:
    """MCEP in tables: pi~ = mu exp(Q^pi~ / w) / Z at its fixed point on the maze's empirical MDP, and policies that read the same Q.

    Success in 50 steps of the true maze of the greedy policy and of mu exp(Q / (w/10)) / Z, minus that of pi~; the smaller gain, worst of the seeds.
    """
    gains, held, mild = [], [], []
    for seed in range(seeds):
        empirical = EmpiricalMDP.from_data(maze_data(seed), 49, 5)
        mdp, mu = empirical.mdp, empirical.behaviour

        def tilted(q: np.ndarray, w: float, mu: np.ndarray = mu) -> np.ndarray:
            weights = mu * advantage_weight(torch.as_tensor(q - q.max(1, keepdims=True)), beta=1.0 / w, max_weight=1.0).numpy()
            return np.asarray(weights / weights.sum(1, keepdims=True))

        policy = mu
        for _ in range(2000):
            q = mdp.backup(_value(mdp, policy))
            new = tilted(q, weight)
            gap, policy = float(np.abs(new - policy).max()), new
            if gap < 1e-12:
                break
        greedy = np.eye(5)[np.where(empirical.covered, q, -np.inf).argmax(1)]
        held.append(success(maze(), policy))
        mild.append(success(maze(), tilted(q, milder * weight)))
        gains.append(min(mild[-1], success(maze(), greedy)) - held[-1])
    return {"measured": min(gains), "bound": gain, "holds": min(gains) >= gain, "success_of_target_policy": held, "success_of_mild_policy": mild}


# -- the bandit: exact Q, only the actor learns ---------------------------------------------------------------------------------------------


class _ExactQ(nn.Module):
    """The bandit's own Q in the place of critics, (1, b)."""

    def __init__(self, q: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = q

    def forward(self, obs: Tensor, action: Tensor, members: int | None = None) -> Tensor:
        return self.function(action)[None]


def _bandit_actor(method: Offline, q: Callable[[Tensor], Tensor], steps: int, lr: float = 3e-3, seed: int = 0) -> tuple[ActorCritic, Batch]:
    """The actor's objective alone, minimised over 10,000 logged actions with exact Q; and these rows."""
    data = Bandit2D().data(seed=seed)
    space, box = data.about.observation_space, data.about.action_space
    assert space is not None and box is not None
    torch.manual_seed(seed)
    agent = make_agent(method, space, box, normalize_obs=False)
    with torch.no_grad():
        # The one observation is 0 and so is the network's action at it, where Q may be 0 too: start from another action.
        agent.net["policy"].head.bias.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))  # type: ignore[union-attr,operator]
    rows = make_source(data, replace(method.data, normalize_obs=False), agent, method.gamma).replay
    nets = ActorCritic(method, agent, seed)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Batch, Tensor]:
        batch = rows.sample(method.batch_size, generator)
        return batch, torch.randn((method.num_noises, *batch.action.shape), generator=generator)

    if isinstance(method.behaviour, Behaviour):
        update = Update(nets)
        for _ in range(method.behaviour.steps):
            update.fit_behaviour(*draw())
    nets.critic = _ExactQ(q)  # type: ignore[assignment]
    optimizer = torch.optim.Adam(nets.policy.parameters(), lr)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1.0 - k / steps)
        batch, noise = draw()
        optimizer.zero_grad()
        nets.actor_loss(batch, noise[2], 0.0, None, noise[-2:])[0].backward()
        optimizer.step()
    assert rows.store is not None
    return nets, rows.store


def weighted_regression(steps: int = 1500, expressive: float = 0.2, gaussian: float = 0.12, clone: float = 0.02) -> dict[str, Any]:
    """AWAC on the bandit with exact Q, beta 3: weighted mean of the data's Q (an expressive policy's) above its plain mean.

    A single Gaussian gains less and puts its mean into the hole between the modes; beta = 0 gives the maximum-likelihood Gaussian.
    """
    bandit = Bandit2D()
    method = override(configure("awac", POINT), {"batch_size": 1024})
    nets, rows = _bandit_actor(method, bandit.q, steps)
    q = bandit.q(rows.action)
    weight = advantage_weight(q - q.mean(), beta=3.0, max_weight=100.0)
    expressive_gain = float((weight * q).sum() / weight.sum() - q.mean())
    obs = torch.zeros(20_000, 1)
    drawn = nets.agent.unit_action(nets.agent.sample(obs, torch.Generator().manual_seed(1)))
    gaussian_gain = float(bandit.q(drawn).mean() - q.mean())
    log_mu = float(bandit.log_mu(nets.agent.unit_action(nets.agent.policy(obs[:1]).mode()).detach())[0])  # type: ignore[attr-defined]
    plain, _ = _bandit_actor(override(method, {"actor": {"beta": 0.0}}), bandit.q, steps)
    nll = float(-plain.agent.policy(rows.obs).log_prob(rows.action).mean().detach())  # type: ignore[attr-defined]
    std = rows.action.std(0, correction=0)
    best = float((std.log() + 0.5 * math.log(2 * math.pi) + 0.5).sum())
    holds = expressive_gain >= expressive and gaussian_gain >= gaussian and log_mu < -3.4 and nll - best < clone
    return {"measured": expressive_gain, "bound": expressive, "holds": holds, "gaussian_gain": gaussian_gain, "gaussian_bound": gaussian,
            "log_mu_at_gaussian_mean": log_mu, "clone_nll_gap": nll - best}  # fmt: skip


def improved_actions(log_tau: float = 0.5, modes: int = 8, steps: int = 1500, seeds: int = 2) -> dict[str, Any]:
    """CFPI on the bandit with its own smooth Q: Q at the mixture's action minus that at a single Gaussian's, which starts in the hole, is positive;

    and the exact log mu at the mixture's action lies above the 1 % quantile of the data's.
    """
    bandit = Bandit2D()
    found: dict[str, list[dict[str, float]]] = {"cfpi": [], "cfpi/sg": []}
    low = 0.0
    for seed in range(seeds):
        for method_id, num in (("cfpi", modes), ("cfpi/sg", 1)):
            changes = {"batch_size": 1024, "policy": {"num": num}}
            nets, rows = _bandit_actor(override(configure(method_id, POINT), changes), bandit.q_smooth, steps, seed=seed)
            dist: Any = nets.any_dist(nets.agent, torch.zeros(1, 1), torch.float32)
            cov = torch.diag_embed((2.0 * dist.log_std.detach()).exp())
            log_weight, mean = torch.log_softmax(dist.logits.detach(), -1), dist.mean.detach()
            action = torch.tanh(improve(bandit.q_smooth, log_weight, mean, cov, log_tau=log_tau, min_weight=0.05))
            found[method_id].append({"q": float(bandit.q_smooth(action)), "log_mu": float(bandit.log_mu(action))})
            low = float(torch.quantile(bandit.log_mu(rows.action), 0.01))  # type: ignore[arg-type]
    measured = min(a["q"] - b["q"] for a, b in zip(*found.values(), strict=True))
    holds = measured > 0.0 and min(r["log_mu"] for r in found["cfpi"]) >= low
    return {"measured": measured, "bound": 0.0, "holds": holds, **found, "log_mu_quantile": low}


def support(weight: float = 40.0, beta: float = 0.02, steps: int = 3000, quantile: float = 0.01, gap: float = 2.0, seeds: int = 2) -> dict[str, Any]:
    """SPOT on the bandit, Q climbing between two modes: exact log mu at the policy's action against the 1 % quantile of the data's.

    TD3+BC's action of the same Q, which lies on the ray from the data's mean along Q's slope, is less likely by at least `gap` nats.
    """
    bandit = Bandit2D()
    slope = torch.tensor([math.cos(math.pi / 8), math.sin(math.pi / 8)])
    changes = {
        "batch_size": 256,
        "actor": {"weight": weight},
        "behaviour": {"steps": steps, "beta": beta, "hidden": [128, 128]},
    }
    found, gaps = [], []
    for seed in range(seeds):
        nets, rows = _bandit_actor(override(configure("spot", POINT), changes), lambda a: a @ slope, steps, seed=seed)
        action = nets.agent.unit_action(nets.agent.policy(torch.zeros(1, 1)).mode())[0].detach()  # type: ignore[attr-defined]
        mean = rows.action.mean(0)
        ray = mean + ((action - mean) @ slope) * slope
        low = float(torch.quantile(bandit.log_mu(rows.action), quantile))  # type: ignore[arg-type]
        found.append(float(bandit.log_mu(action)) - low)
        gaps.append(float(bandit.log_mu(action) - bandit.log_mu(ray)))
    holds = min(found) >= 0.0 and min(gaps) >= gap
    return {"measured": min(found), "bound": 0.0, "holds": holds, "above_quantile_nats": found, "above_td3_bc_nats": gaps, "gap_bound": gap}
