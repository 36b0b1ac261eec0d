"""Claims of the language methods about where they end: exact ascent on their own losses against closed forms, and identities of references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from markovia.algos.advantages import GroupNormalised, MovingBaseline
from markovia.algos.on_policy.divergence import KL, FDivergence
from markovia.algos.on_policy.filters import AccuracyBand
from markovia.algos.on_policy.loss import critic_loss
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.references import lerp, slerp
from markovia.algos.on_policy.rewards import ImplicitReward, Matching
from markovia.algos.on_policy.schedules import AdaptiveKL
from markovia.algos.on_policy.surrogates import PolicyGradient
from markovia.algos.presets import override
from markovia.algos.systems import find
from markovia.algos.tree_records import TreeCollector, expected_loss
from markovia.claims.language import ascend, law_loss, run, tv, worst
from markovia.envs.exact.token_mdp import EnumerableTokenMDP


def _whole_return(method: OnPolicy) -> OnPolicy:
    """The method with the plain return as advantage: a baseline changes no expected gradient, and one response a group is enough."""
    plain = {"advantage": MovingBaseline(), "normalize_advantage": "none", "surrogate": PolicyGradient(), "aggregation": "seq-mean-token-sum"}
    return replace(method, group_size=1, **plain)  # type: ignore[arg-type]


def f_optimum(f: str, alpha: float | None = None, bound: float = 1e-3) -> dict[str, Any]:
    """Total variation to the exact maximiser of E R - beta D_f(pi || p0) after exact ascent, bandits of 32 arms, beta .1 and 1. (E4)"""
    found = {}
    for beta in (0.1, 1.0):
        tree = EnumerableTokenMDP.random(32, 1, 0)
        collector = TreeCollector([tree], 1)
        method = _whole_return(replace(find("f-div-reg").value, divergence=FDivergence(beta, f, alpha)))
        agent, ref = collector.agent(), collector.agent()
        ascend(lambda m=method, a=agent, r=ref, c=collector: expected_loss(m, a, c, {"ref": r}), agent, 1500, 0.1)  # type: ignore[misc]
        with np.errstate(divide="ignore"):
            target = np.log(tree.f_optimum(beta, f, alpha))
        found[beta] = tv(tree.sequence_logp(collector.table(agent)), target)
    return {"measured": max(found.values()), "bound": bound, "holds": bool(max(found.values()) <= bound), "total_variation": list(found.values())}


def matched_target(f: str, bound: float = 1e-3) -> dict[str, Any]:
    """KL(pi || target) after exact ascent on the pseudo-reward, target p0 exp(R / .3) / Z: bandit of 32 arms, tree of 4 tokens and 3 steps."""
    found = []
    for tree in (EnumerableTokenMDP.random(32, 1, 0), EnumerableTokenMDP.random(4, 3, 0)):
        collector = TreeCollector([tree], 1)
        log_z = tree.kl_optimum(0.3)[1] / 0.3
        method = _whole_return(replace(find("f-dpg").value, reward=(Matching(0.3, f, log_z=log_z),)))
        agent, ref = collector.agent(), collector.agent()
        ascend(lambda m=method, a=agent, r=ref, c=collector: expected_loss(m, a, c, {"ref": r}), agent, 1200, 0.1)  # type: ignore[misc]
        found.append(float(tree.kl_to_optimum(collector.table(agent), 0.3)))
    return worst("kl_to_target", found, bound)


def rto_fixed_point(implicit: float = 0.4, b1: float = 1.6, b2: float = 0.5) -> dict[str, Any]:
    """With an exact DPO policy at beta' and no clip RTO ends at p0 exp(R (1 + b1 / beta') / b2) / Z, trees of 4 tokens and 3 steps; TV < 1e-3.

    Its returns to go also have a gradient variance at p0 below 0.8 of that of the terminal reward R (1 + b1 / beta') with the same optimum.
    """
    found, ratios = [], []
    for seed in range(2):
        tree = EnumerableTokenMDP.random(4, 3, seed)
        collector = TreeCollector([tree], 1)
        method = _whole_return(replace(find("rto").value, reward=(ImplicitReward(b1, 1e9),), divergence=KL(b2)))
        agent, ref = collector.agent(), collector.agent()
        dpo = collector.agent(logits=tree.token_optimum(implicit)[0])
        ascend(lambda m=method, a=agent, r=ref, c=collector, d=dpo: expected_loss(m, a, c, {"ref": r, "dpo": d}), agent, 700, 0.1)  # type: ignore[misc]
        found.append(tv(tree.sequence_logp(collector.table(agent)), tree.kl_optimum(b2 / (1 + b1 / implicit))[0]))
        ratios.append(_to_go_variance(tree, tree.token_optimum(implicit)[0], b1, 1 + b1 / implicit))
    out = worst("tv_to_fixed_point", found, 1e-3, variance_ratios=ratios)
    return out | {"holds": out["holds"] and max(ratios) < 0.8}


def _to_go_variance(tree: EnumerableTokenMDP, dpo: np.ndarray, b1: float, factor: float) -> float:
    """Trace of the gradient's covariance at p0 with token rewards and returns to go, over that of the terminal reward alone."""
    policy, p = np.exp(tree.logits_ref), np.exp(tree.logp_ref)
    token = b1 * (dpo - tree.logits_ref)[tree.prefix_index, tree.tokens] * tree.mask
    to_go = token[:, ::-1].cumsum(1)[:, ::-1] + tree.R[:, None]
    traces = []
    for weight in (to_go, np.repeat(factor * tree.R[:, None], tree.H, 1)):
        g = np.zeros((tree.M, tree.num_prefixes, tree.V))
        for h in range(tree.H):
            rows = np.arange(tree.M)
            g[rows, tree.prefix_index[:, h]] -= weight[:, h, None] * policy[tree.prefix_index[:, h]]
            g[rows, tree.prefix_index[:, h], tree.tokens[:, h]] += weight[:, h]
        flat = g.reshape(tree.M, -1)
        mean = p @ flat
        traces.append(float(p @ (flat**2).sum(1) - mean @ mean))
    return traces[0] / traces[1]


def dvpo_one_step(beta: float = 0.1, seeds: int = 3) -> dict[str, Any]:
    """With Q of p0 frozen DVPO ends at p0 exp(Q / beta) / Z prefix by prefix, better than p0; trees of 4 tokens and 3 steps, TV of responses < 1e-3.

    The critic is fitted first by the method's own targets and loss on all responses of p0, to 1e-3 of the exact values.
    """
    found, gains, errors = [], [], []
    for seed in range(seeds):
        tree = EnumerableTokenMDP.random(4, 3, seed)
        collector = TreeCollector([tree], 1)
        q, v = tree.values(tree.logits_ref)
        method = replace(find("dvpo").value, normalize_advantage="none", surrogate=PolicyGradient(), divergence=KL(beta, "k2", "loss"))
        agent, ref = collector.agent(critic=True), collector.agent()
        _fit_critic(method, agent, collector)
        errors.append(float(np.abs(agent.parameters("value")[0].detach().numpy()[:, 0] - v).max()))
        ascend(lambda m=method, a=agent, r=ref, c=collector: expected_loss(m, a, c, {"ref": r}), agent, 900, 0.1)  # type: ignore[misc]
        target = tree.sequence_logp(tree.logits_ref + q / beta)
        found.append(tv(tree.sequence_logp(collector.table(agent)), target))
        gains.append(float(tree.expected_reward(collector.table(agent)) - tree.expected_reward(tree.logits_ref)))
    out = worst("tv_to_one_step_improvement", found, 1e-3, gain_of_reward=gains, critic_errors=errors)
    return out | {"holds": out["holds"] and min(gains) > 0 and max(errors) < 1e-3}


def _fit_critic(method: OnPolicy, agent: Any, collector: TreeCollector, rounds: int = 60) -> None:
    """Rounds of TD targets on all responses of the policy, each fitted by a few steps of Newton's size (tabular, weights pi)."""
    (table,) = agent.parameters("value")
    for _ in range(rounds):
        rollout, p = collector.everything(agent)
        _, rollout.columns["ret"] = method.advantage(rollout.reward, rollout, {})
        omega = p[:, None] * rollout.mask
        (gradient,) = torch.autograd.grad(critic_loss(method, agent, rollout, omega)[0], [table])
        visits = torch.zeros_like(table[:, 0]).index_add_(0, rollout.obs.reshape(-1), omega.reshape(-1).to(table))  # type: ignore[union-attr]
        with torch.no_grad():
            table.sub_(gradient / visits.clamp(min=1e-12)[:, None])


def kdrl_fixed_point() -> dict[str, Any]:
    """Bandits of 16 arms, no std, exact: k2 ends at teacher exp(R / beta) / Z, at beta = 1000 at the teacher; k3 elsewhere. TV < 1e-3."""
    near: list[float] = []
    far: list[float] = []
    for seed in range(2):
        tree, teacher = EnumerableTokenMDP.random(16, 1, seed), EnumerableTokenMDP.random(16, 1, seed + 50).logits_ref
        collector = TreeCollector([tree], 1)
        taught = EnumerableTokenMDP(16, 1, teacher, tree.R)
        value = replace(find("kdrl").value, advantage=GroupNormalised("none"))
        for estimator, beta in (("k2", 0.3), ("k2", 1000.0), ("k3", 0.3)):
            method = replace(value, divergence=KL(beta, estimator, "loss", reference="teacher"))  # type: ignore[arg-type]
            agent, ref = collector.agent(), collector.agent(logits=teacher)
            ascend(law_loss(method, agent, collector, ref, beta, False), agent, 900, 0.1)
            target = teacher if beta == 1000.0 else taught.kl_optimum(beta)[0][None]
            (near if estimator == "k2" else far).append(tv(collector.table(agent), target))
    out = worst("tv_of_k2", near, 1e-3, tv_of_k3=far)
    return out | {"holds": out["holds"] and min(far) > 0.02}


def kl_controller() -> dict[str, Any]:
    """The measured KL comes within 5 % of the target from beta .01 and 1, when the policy is the exact optimum at the current beta. B(16)."""
    tree, target, found = EnumerableTokenMDP.random(16, 1, 0), 0.5, []
    schedule = AdaptiveKL(kl_target_nats=target, horizon=100.0)
    for start in (0.01, 1.0):
        beta = schedule.start(start)
        for _ in range(400):
            logp = tree.kl_optimum(beta)[0]
            kl = float(np.exp(logp) @ (logp - tree.logp_ref))
            beta = schedule.after(beta, start, 0.0, kl, 32)
        found.append(abs(kl / target - 1.0))
    return worst("relative_error", found, 0.05)


def salsa_optimum(instances: int = 20) -> dict[str, Any]:
    """Two policies of one base, the first with mass .001 and the second with .3 on the best action: the soup as reference earns more. B(16), exact.

    `measured` counts the optima (beta .1 and .3) that earn more with the soup than with the first policy and lie further from it; all must. Reported
    beside it: the same where the second policy lacks another action, drawn at random, in turn. There the soup does not always earn more.
    """
    counts = {}
    for name in ("one-sided", "both"):
        better = 0
        for seed in range(instances):
            rng = np.random.default_rng(seed)
            base, reward = rng.standard_normal(16), rng.uniform(size=16)
            best = int(reward.argmax())
            other = int(rng.choice([i for i in range(16) if i != best])) if name == "both" else None
            policies = [_with_mass(base, {best: m} | ({other: 0.301 - m} if other is not None else {})) for m in (1e-3, 0.3)]
            (soup,) = lerp([torch.from_numpy(policies[0])], [torch.from_numpy(policies[1])], eta=0.5)
            for beta in (0.1, 0.3):
                laws = [EnumerableTokenMDP(16, 1, ref[None], reward).kl_optimum(beta)[0] for ref in (policies[0], soup.numpy())]
                further = [float(np.exp(law) @ (law - policies[0])) for law in laws]
                better += bool((np.exp(laws[1]) - np.exp(laws[0])) @ reward > 0 and further[1] > further[0])
        counts[name] = better
    every = 2 * instances
    return {"measured": counts["one-sided"], "bound": every, "holds": counts["one-sided"] == every, "better_where_both_lack": counts["both"]}


def _with_mass(logits: np.ndarray, mass: dict[int, float]) -> np.ndarray:
    """Log-probabilities (n,) of softmax(logits) with given probabilities at some places."""
    p = np.exp(logits)
    p[list(mass)] = 0.0
    p *= (1.0 - sum(mass.values())) / p.sum()
    for i, m in mass.items():
        p[i] = m
    return np.log(p)


def warp_merging(trials: int = 20, beta: float = 0.5, noise: float = 0.3) -> dict[str, Any]:
    """Averaging two runs with noisy rewards on the sphere earns more than the mean of both at equal KL, by > 0.01 (mean of 20 trials). B(32) logits.

    Also exact: pulling p0 exp(R / beta) / Z back to p0 by eta in logits is the optimum at beta / eta (bound 1e-8).
    """
    tree = EnumerableTokenMDP.random(32, 1, 0)
    start = torch.from_numpy(tree.logits_ref)
    errors = []
    for eta in (0.25, 0.5, 0.75):
        (point,) = lerp([start], [torch.from_numpy(tree.kl_optimum(beta)[0])[None]], eta=eta)
        errors.append(float(np.abs(tree.sequence_logp(point.numpy()) - tree.kl_optimum(beta / eta)[0]).max()))
    gains = []
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        tree = EnumerableTokenMDP.random(32, 1, seed)
        start = torch.from_numpy(tree.logits_ref)
        runs = [start + torch.from_numpy(tree.R + noise * rng.standard_normal(32))[None] / beta for _ in range(2)]
        (merged,) = slerp([start], [runs[0]], [runs[1]])
        curves = [_path(tree, start, end) for end in (*runs, merged)]
        kl = 0.9 * min(float(c[0].max()) for c in curves)
        rewards = [float(np.interp(kl, *c)) for c in curves]
        gains.append(rewards[2] - 0.5 * (rewards[0] + rewards[1]))
    mean = float(np.mean(gains))
    return {"measured": mean, "bound": 0.01, "holds": bool(mean > 0.01 and max(errors) < 1e-8), "gains": gains, "error_of_the_path": max(errors)}


def _path(tree: EnumerableTokenMDP, start: torch.Tensor, end: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """KL to p0 and true reward along the line from start to end."""
    points = [lerp([start], [end], eta=eta)[0].numpy() for eta in np.linspace(0, 1, 201)]
    return np.array([tree.divergence(x) for x in points]), np.array([tree.expected_reward(x) for x in points])


def prorl_resets(seeds: int = 2, steps: int = 500) -> dict[str, Any]:
    """A rare success (2 in 1000 under p0): resets every 100 steps end above .98, no reset below .97; trees of 4 tokens and 4 steps.

    4 kept groups of 8 a step, silent groups drawn again, beta .05, Adam .03. And K exact solves with resets give p0 exp(K R / beta) / Z (1e-8).
    """
    tree = EnumerableTokenMDP.random(16, 1, 0)
    logp, beta = tree.logp_ref, 2.0
    for _ in range(4):
        logp = EnumerableTokenMDP(16, 1, logp[None], tree.R).kl_optimum(beta)[0]
    identity = float(np.abs(logp - tree.repeated_tilting(beta, 4)).max())
    found: dict[str, list[float]] = {"reset": [], "fixed": []}
    for seed in range(seeds):
        tree = _rare(seed)
        for name, every in (("reset", 100), ("fixed", 10**6)):
            size: dict[str, Any] = {"num_envs": 32, "group_size": 8, "filter": {"max_rounds": 200}, "refresh": {"every": every}}
            method = override(find("prorl").value, size | {"divergence": {"beta": 0.05}, "solver": {"lr": 0.03}})
            driver = run(method, TreeCollector([tree], 32, 8), seed, steps)
            found[name].append(float(tree.expected_reward(driver.collector.table(driver.agent))))
    low, high = min(found["reset"]), max(found["fixed"])
    holds = bool(low > 0.98 and high < 0.97 and identity < 1e-8)
    return {"measured": low, "bound": 0.98, "holds": holds, "reward": found, "identity_error": identity}


def _rare(seed: int, q: float = 0.002) -> EnumerableTokenMDP:
    """A tree of 4 tokens and 4 steps whose right responses have probability of about q under p0."""
    tree = EnumerableTokenMDP.random(4, 4, seed)
    order = np.argsort(tree.logp_ref)
    order = order[np.argsort(np.random.default_rng(seed).random(len(order)))]
    reward, mass = np.zeros(tree.M), 0.0
    for y in order:
        p = float(np.exp(tree.logp_ref[y]))
        if mass + p <= q:
            reward[y], mass = 1.0, mass + p
    return EnumerableTokenMDP(4, 4, tree.logits_ref, reward)


def difficulty_kl() -> dict[str, Any]:
    """KL(p0 || p0 exp(R / beta) / Z) for binary rewards is p (1 - p) / (2 beta^2) to 5 % at beta >= 5 and p in [.2, .8], and >= 2 TV^2 always.

    KL = log(1 - p + p e^(1/beta)) - p / beta. `measured` is the largest relative error. Its largest value lies within the kept band for beta >= .5.
    """
    p = np.linspace(0.2, 0.8, 61)
    errors = []
    for beta in (5.0, 10.0, 50.0):
        errors.append(float(np.abs(_prompt_kl(p, beta) / (p * (1 - p) / (2 * beta**2)) - 1).max()))
    p, slack = np.linspace(0.01, 0.99, 99), []
    for beta in (0.1, 0.2, 0.5, 1.0, 5.0):
        e = np.exp(1 / beta)
        slack.append(float((_prompt_kl(p, beta) - 2 * (p * (1 - p) * (e - 1) / (1 - p + p * e)) ** 2).min()))
    band: AccuracyBand = find("difficulty-filter").value.filter
    peaks = [float(p[_prompt_kl(p, beta).argmax()]) for beta in (0.5, 1.0, 5.0)]
    holds = bool(max(errors) < 0.05 and min(slack) > -1e-12 and all(band.low <= x <= band.high for x in peaks))
    return {"measured": max(errors), "bound": 0.05, "holds": holds, "slack_of_the_bound": slack, "success_rate_of_largest_kl": peaks}


def _prompt_kl(p: np.ndarray, beta: float) -> np.ndarray:
    return np.log(1 - p + p * np.exp(1 / beta)) - p / beta


def lcpo_lengths(mode: str = "exact", steps: int = 300) -> dict[str, Any]:
    """Budgets of 3, 6 and 9 tokens on responses of up to 11 (token 1 makes them right, 2 ends them), exact gradients, rate .1, 300 Adam steps of .05.

    "exact": mean |L - n| < .3 and accuracy > .95 for every budget. "max": P(L > n + 1) < .05 and accuracy > .95; shorter pays, so L goes to about 2.
    """
    H = 11
    shape = EnumerableTokenMDP(3, H, np.zeros((2**H - 1, 3)), np.zeros(2 ** (H - 1) * 3 + 2 ** (H - 1) - 1), eos=2)
    right = ((shape.tokens == 1) & shape.mask).any(1).astype(float)
    tree = EnumerableTokenMDP(3, H, np.zeros((2**H - 1, 3)), right, eos=2)
    budgets, found = [3, 6, 9], []
    name = "lcpo" if mode == "exact" else "lcpo/max"
    for n in budgets:
        collector = TreeCollector([tree], 1, columns={"budget": [n]})
        method = _whole_return(override(find(name).value, {"divergence": None}))
        method = replace(method, reward=(override(method.reward[0], {"rate": 0.1}),))
        agent = collector.agent()
        optimizer = torch.optim.Adam(agent.parameters("policy"), lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            expected_loss(method, agent, collector).backward()
            optimizer.step()
        p = np.exp(tree.sequence_logp(collector.table(agent)))
        off = np.abs(tree.lengths - n)
        over = tree.lengths > n + 1
        found.append({"off": float(p @ off), "over": float(p @ over), "accuracy": float(p @ right), "length": float(p @ tree.lengths)})
    accurate = min(f["accuracy"] for f in found) > 0.95
    measured = max(f["off" if mode == "exact" else "over"] for f in found)
    bound = 0.3 if mode == "exact" else 0.05
    return {"measured": measured, "bound": bound, "holds": bool(measured < bound and accurate), "budgets": budgets, "found": found}
