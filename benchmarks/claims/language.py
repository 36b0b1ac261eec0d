"""Claims of the language methods on token trees whose optima and expected gradients are exact sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.algos.advantages import GroupNormalised, LeaveOneOut
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.loss import policy_loss
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.rewards import at_end
from markovia.algos.presets import override
from markovia.algos.systems import find
from markovia.algos.tree_records import TreeCollector, expected_loss
from markovia.envs.exact.token_mdp import EnumerableTokenMDP

ONE = torch.ones((), dtype=torch.float64)


def tv(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation of two laws given as log-probabilities or logits (..., n), normalised here."""
    a, b = (np.exp(x - x.max(-1, keepdims=True)) for x in (p, q))
    return float(np.abs(a / a.sum(-1, keepdims=True) - b / b.sum(-1, keepdims=True)).sum(-1).max() / 2)


def ascend(loss: Callable[[], Tensor], agent: Any, steps: int = 900, lr: float = 0.1) -> None:
    """Adam on an exact loss of the agent's table, its rate falling to a hundredth in the last half."""
    params = agent.parameters("policy")
    optimizer = torch.optim.Adam(params, lr=lr)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 0.01 ** (2.0 * k / steps - 1.0))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def law_loss(method: OnPolicy, agent: Any, collector: TreeCollector, reference: Any, beta: float, scale: bool) -> Callable[[], Tensor]:
    """The method's loss with all responses at their probabilities and the advantages of infinite groups."""

    def loss() -> Tensor:
        rollout, p = collector.everything(agent)
        returns = rollout.returns()
        mean = p @ returns
        sigma = (p @ (returns - mean).square()).sqrt() if scale else 1.0
        rollout.columns["adv"] = ((returns - mean) / sigma)[:, None].expand_as(rollout.reward)
        if method.divergence is not None:
            rollout.columns["beta"] = torch.full_like(rollout.reward, beta)
            rollout.logp_ref[method.divergence.reference] = reference.evaluate(rollout, ("logp",)).logp.detach()
        omega = p[:, None] * rollout.mask / rollout.mask.sum(1, keepdim=True)
        return policy_loss(method, agent, rollout, omega, ONE, False)[0]

    return loss


def run(method: OnPolicy, collector: TreeCollector, seed: int, steps: int, references: Mapping[str, Any] | None = None, agent: Any = None) -> Any:
    """The driver after `steps` iterations on trees, from the references of the trees."""
    agent = collector.agent(critic=method.advantage.needs_critic) if agent is None else agent
    driver = OnPolicyDriver(replace(method, num_env_steps=10**9), agent, collector, seed, references=references)
    for _ in range(steps):
        driver.step()
    return driver


def worst(name: str, found: Sequence[float], bound: float, **more: Any) -> dict[str, Any]:
    """A claim that the largest of the measured numbers stays within the bound."""
    return {"measured": max(found), "bound": bound, "holds": bool(max(found) <= bound), name: list(found), **more}


# -- grpo and its variants ---------------------------------------------------------------------------------------------------------------------


def grpo_fixed_point(seeds: int = 2, beta: float = 0.1) -> dict[str, Any]:
    """Where exact ascent on GRPO's own loss ends on bandits of 8 arms: at pi = beta' p0 / (beta' - A), not at p0 exp(R / beta') / Z. (E7)

    Pairs without the standard deviation (beta' = 2 beta, all pairs enumerated) and infinite groups with it (beta' = beta sigma, beta 0.4). The same
    loss with k1 in the reward and leave-one-out ends at p0 exp(R / beta) / Z. Total variation, the largest over bandits; E1 must be > 0.02 away.
    """
    base = replace(find("grpo").value, advantage=GroupNormalised("none"))
    plain = replace(base, advantage=LeaveOneOut(), divergence=KL(beta, "k1", "reward"), aggregation="seq-mean-token-sum")
    close, far = [], []
    for seed in range(seeds):
        tree = EnumerableTokenMDP.random(8, 1, seed)
        collector = TreeCollector([tree], 1)
        for method, beta_of, target, other in (
            (base, beta, tree.fixed_point(beta, "k3", group_size=2), tree.kl_optimum(2 * beta)[0][None]),
            (plain, beta, tree.kl_optimum(beta)[0][None], tree.fixed_point(beta, "k3", group_size=2)),
        ):
            agent, ref = collector.agent(), collector.agent()
            ascend(lambda m=method, b=beta_of, a=agent, r=ref, c=collector: expected_loss(m, a, c, {"ref": r}, 2, b), agent)  # type: ignore[misc]
            close.append(tv(collector.table(agent), target))
            far.append(tv(collector.table(agent), other))
        agent, ref = collector.agent(), collector.agent()
        ascend(law_loss(base, agent, collector, ref, 0.4, True), agent)
        close.append(tv(collector.table(agent), tree.fixed_point(0.4, "k3", std=True)))
    out = worst("tv_to_fixed_point", close, 1e-3, tv_to_the_other=far, smallest_tv_to_the_other=min(far))
    return out | {"holds": out["holds"] and min(far) > 0.02}


def length_tree() -> EnumerableTokenMDP:
    """Token 1 first is right; then 0 or 1 goes on and 2 ends, up to 6 tokens: only the first token decides the reward."""
    shape = EnumerableTokenMDP(3, 6, np.zeros((63, 3)), np.zeros(127), eos=2)
    logits = np.zeros((63, 3))
    logits[0] = [0.0, 0.0, -20.0]  # hardly ever empty
    reward = (shape.tokens[:, 0] == 1).astype(float)
    return EnumerableTokenMDP(3, 6, logits, reward, eos=2)


def _lengths(tree: EnumerableTokenMDP, logits: np.ndarray) -> dict[str, float]:
    p = np.exp(tree.sequence_logp(logits))
    return {name: float(p[part] @ tree.lengths[part] / p[part].sum()) for name, part in (("right", tree.R > 0.5), ("wrong", tree.R < 0.5))}


def grpo_lengths(steps: int = 50, lr: float = 20.0) -> dict[str, Any]:
    """Dr.GRPO has no expected gradient on the length, GRPO's division by it has: wrong responses grow, right ones shrink.

    Only the first token decides; exact gradients with infinite groups, sigma 1, no penalty. `measured` is the largest expected gradient of Dr.GRPO on
    logits after the first token (bound 1e-12); 50 steps of GRPO must raise the mean length of wrong and lower that of right responses.
    """
    tree = length_tree()
    collector = TreeCollector([tree], 1)
    grpo = replace(find("grpo").value, divergence=None)
    found: dict[str, Any] = {}
    for name, how in (("dr-grpo", "sum"), ("grpo", "mean")):
        agent = collector.agent()
        table = agent.parameters("policy")[0]
        start = _lengths(tree, collector.table(agent))
        for k in range(steps):
            rollout, p = collector.everything(agent)
            returns = rollout.returns()
            rollout.columns["adv"] = (returns - p @ returns)[:, None].expand_as(rollout.reward)
            omega = p[:, None] * rollout.mask / (rollout.mask.sum(1, keepdim=True) if how == "mean" else tree.H)
            (gradient,) = torch.autograd.grad(policy_loss(grpo, agent, rollout, omega, ONE, False)[0], [table])
            if k == 0:
                found[name] = {"largest_gradient_on_lengths": float(gradient[1:].abs().max())}
            with torch.no_grad():
                table.sub_(lr * gradient)
        found[name] |= {"before": start, "after": _lengths(tree, collector.table(agent))}
    measured = found["dr-grpo"]["largest_gradient_on_lengths"]
    before, after = found["grpo"]["before"], found["grpo"]["after"]
    moved = after["wrong"] > before["wrong"] + 0.1 and after["right"] < before["right"] - 0.1
    return {"measured": measured, "bound": 1e-12, "holds": bool(measured <= 1e-12 and moved), **found}


def dapo_prompts(draws: int = 400, G: int = 4) -> dict[str, Any]:
    """With refill every group carries a signal, and prompts come in proportion to 1 - p^G - (1 - p)^G. Three prompts, within 4 standard errors."""
    trees = []
    for p in (0.02, 0.5, 0.9):
        trees.append(EnumerableTokenMDP(2, 1, np.log([[p, 1 - p]]), np.array([1.0, 0.0])))
    collector = TreeCollector(trees, 12 * G, G, {"budget": [0, 1, 2]})
    method = override(find("grpo/dapo").value, {"num_envs": 12 * G, "group_size": G, "filter": {"max_rounds": 50}})
    driver = OnPolicyDriver(method, collector.agent(), collector, 0)
    counts, silent = np.zeros(3), 0
    for k in range(draws):
        driver.iteration = k  # another random stream, the same policy
        rollout, _ = driver._collect()
        mean = rollout.returns().view(-1, G).mean(1)
        silent += int(((mean == 0) | (mean == 1)).sum())
        counts += np.bincount(np.array(rollout.outcome["columns"]["budget"])[::G], minlength=3)
    share = counts / counts.sum()
    q = np.array([0.02, 0.5, 0.9])
    law = 1 - q**G - (1 - q) ** G
    expected = law / law.sum()
    error = np.abs(share - expected) / np.sqrt(expected * (1 - expected) / counts.sum())
    found = {"silent_groups": silent, "share": share.tolist(), "law": expected.tolist()}
    return {"measured": float(error.max()), "bound": 4.0, "holds": bool(error.max() < 4 and silent == 0), **found}


def expected_gradients(method: str, seeds: int = 3, bound: float = 1e-8) -> dict[str, Any]:
    """Largest error of the expected gradient, by enumeration, against that of J - beta KL(pi || p0) on trees of 4 tokens and 2 steps. (E6)

    Methods whose aggregation or group mean scales the gradient by a known constant are multiplied by its inverse.
    """
    value, errors = find(method).value, []
    scale, G = 1.0, max(value.group_size, 1)
    if method == "grpo/gspo":  # the group's mean holds the sample, and the ratio is the mean over the 2 tokens
        value, G = replace(value, advantage=GroupNormalised("none")), 3
        scale = 2.0 * G / (G - 1)
    if method.startswith("p3o"):
        value = replace(value, tokens=None)  # on-policy both ratios of a pair are 1
    for seed in range(seeds):
        tree = EnumerableTokenMDP.random(4, 2, seed)
        collector = TreeCollector([tree], 1)
        collector.greedy = method == "remax"
        start = tree.logits_ref + 0.5 * np.random.default_rng(seed).standard_normal(tree.logits_ref.shape)
        agent, ref = collector.agent(logits=start), collector.agent()
        expected_loss(value, agent, collector, {"ref": ref}, G).backward()
        found = -scale * agent.parameters("policy")[0].grad.numpy()  # type: ignore[union-attr]
        beta = 0.0 if value.divergence is None else value.divergence.beta
        errors.append(float(np.abs(found - tree.exact_gradient(start, beta)).max()))
    return worst("largest_error", errors, bound)


# -- remax, grpo-d, ppo-max --------------------------------------------------------------------------------------------------------------------


def remax_variance(instances: int = 20) -> dict[str, Any]:
    """The greedy baseline adds no bias, and for rewards shifted by 5 the gradient's variance at p0 is lower than without it, in >= 18 of 20 trees."""
    value = find("remax").value
    plain = expected_gradients("remax")
    better, ratios = 0, []
    for seed in range(instances):
        tree = EnumerableTokenMDP.random(4, 3, seed)
        tree = EnumerableTokenMDP(4, 3, tree.logits_ref, tree.R + 5.0)
        collector = TreeCollector([tree], 1)
        collector.greedy = True
        agent = collector.agent()
        rollout, p = collector.everything(agent)
        adv = value.advantage(rollout.reward, rollout, {})[0][:, 0].numpy()
        scores = _score_gradients(tree)  # (M, N * V): grad log pi of each sequence
        traces = []
        for weight in (adv, tree.R):
            g = weight[:, None] * scores
            mean = p.numpy() @ g
            traces.append(float(p.numpy() @ (g**2).sum(1) - mean @ mean))
        ratios.append(traces[0] / traces[1])
        better += traces[0] < traces[1]
    holds = bool(better >= 18 and plain["holds"])
    return {"measured": better, "bound": 18, "holds": holds, "variance_ratios": ratios, "largest_bias": plain["measured"]}


def _score_gradients(tree: EnumerableTokenMDP) -> np.ndarray:
    """grad log pi(y) in the logits at p0, (M, N V)."""
    policy, out = np.exp(tree.logits_ref), np.zeros((tree.M, tree.num_prefixes, tree.V))
    for y in range(tree.M):
        for t in range(int(tree.lengths[y])):
            i = tree.prefix_index[y, t]
            out[y, i] -= policy[i]
            out[y, i, tree.tokens[y, t]] += 1.0
    return out.reshape(tree.M, -1)


def grpo_d_speed(seeds: int = 10) -> dict[str, Any]:
    """Against the constant middle weight: higher reward at the turn, lower KL at the end (and no higher final reward). Medians over 10 seeds.

    64 responses of 3 tokens; 90 % of p0 lies on a family that earns .6 at most, the rest earns up to 1; G = 8, Adam .03, 300 steps, turn at 90.
    """
    found: dict[str, list[tuple[float, float, float]]] = {"grpo-d": [], "constant": [], "lowest": []}
    grpo = override(find("grpo-d").value, {"num_envs": 8, "group_size": 8, "num_env_steps": 8 * 3 * 300, "solver": {"lr": 0.03}})
    middle, lowest = (replace(grpo, divergence=KL(b, "k3", "loss")) for b in (0.07, 0.04))
    for seed in range(seeds):
        tree = EnumerableTokenMDP.random(4, 3, seed)
        logits = tree.logits_ref.copy()
        logits[0] = np.log([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3])
        reward = np.where(tree.tokens[:, 0] == 0, 0.6, 1.0) * np.random.default_rng(seed).uniform(0.9, 1.0, tree.M)
        tree = EnumerableTokenMDP(4, 3, logits, reward)
        for name, method in (("grpo-d", grpo), ("constant", middle), ("lowest", lowest)):
            collector = TreeCollector([tree], 8, 8)
            driver = OnPolicyDriver(method, collector.agent(), collector, seed)
            at_turn = 0.0
            for k in range(300):
                driver.step()
                if k + 1 == 90:
                    at_turn = float(tree.expected_reward(collector.table(driver.agent)))
            table = collector.table(driver.agent)
            found[name].append((at_turn, float(tree.expected_reward(table)), float(tree.divergence(table))))
    medians = {name: np.median(rows, axis=0).tolist() for name, rows in found.items()}
    faster, closer = medians["grpo-d"][0] - medians["constant"][0], medians["constant"][2] - medians["grpo-d"][2]
    return {"measured": faster, "bound": 0.0, "holds": bool(faster > 0 and closer > 0), "reward_at_turn_reward_kl": medians}


class Noisy(TreeCollector):
    """Every twentieth reward is off by a Cauchy number."""

    def collect(self, agent: Any, generator: torch.Generator | None = None) -> Any:
        rollout = super().collect(agent, generator)
        u = torch.rand(2, rollout.shape[0], generator=generator, dtype=torch.float64)
        noise = torch.where(u[0] < 0.05, torch.tan(torch.pi * (u[1] - 0.5)), 0.0)
        rollout.reward = rollout.reward + at_end(noise.to(rollout.reward), rollout)
        return rollout


def ppo_max_entropy(seeds: int = 5, steps: int = 200) -> dict[str, Any]:
    """Heavy-tailed noise on rewards: scaled, clipped and with the KL the sequence entropy stays above 1 nat, without all three it falls below 0.3.

    64 responses of 3 tokens with rewards U[0, 1]; every twentieth sample's gets Cauchy noise; 128 samples an iteration, 4 epochs, Adam .1, beta .02.
    Nothing is claimed of the reward: noise of infinite variance swells the running spread until the signal is lost in it.
    """
    size = {"num_envs": 128, "normalize_advantage": "none", "solver": {"lr": 0.1, "epochs": 4, "minibatch": None}}
    apart = {"pretrain": 0, "separate": {"lr": 0.1, "epochs": 4, "minibatch": None}}
    full = override(find("ppo-max").value, size | {"value": apart})
    vanilla = replace(full, reward=(), divergence=None, value=replace(full.value, clip=None))
    entropy: dict[str, list[float]] = {"ppo-max": [], "vanilla": []}
    for seed in range(seeds):
        tree = EnumerableTokenMDP.random(4, 3, seed)
        for name, method in (("ppo-max", full), ("vanilla", vanilla)):
            collector = Noisy([tree], 128)
            driver = run(method, collector, seed, steps)
            logp = tree.sequence_logp(collector.table(driver.agent))
            entropy[name].append(float(-(np.exp(logp) * logp).sum()))
    low, high = min(entropy["ppo-max"]), max(entropy["vanilla"])
    return {"measured": low, "bound": 1.0, "holds": bool(low > 1.0 and high < 0.3), "entropy_nats": entropy}


# -- p3o, apa ----------------------------------------------------------------------------------------------------------------------------------


def p3o_frontier(method: str = "p3o", betas: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 1.0), steps: int = 600) -> dict[str, Any]:
    """Reward lost against the exact frontier p0 exp(R / b) / Z at equal KL, 600 Adam steps of 64 pairs on 64 responses, 5 weights; bound 0.01.

    Also: adding a constant to all rewards of a prompt changes no update (largest difference of parameters, bound 1e-11).
    """
    losses = []
    base = override(find(method).value, {"num_envs": 128, "solver": {"lr": 0.05, "epochs": 1, "minibatch": None}})
    tree = EnumerableTokenMDP.random(4, 3, 0)
    for beta in betas:
        collector = TreeCollector([tree], 128, 2)
        weighed = override(base, {"divergence": {"beta": beta}, "num_env_steps": 128 * 3 * steps, "solver": {"anneal": True}})
        table = collector.table(run_to_end(weighed, collector, 0).agent)
        kl, reward = float(tree.divergence(table)), float(tree.expected_reward(table))
        losses.append(_frontier(tree, kl) - reward)
    shifted = EnumerableTokenMDP(4, 3, tree.logits_ref, tree.R + 3.0)
    tables = []
    for t in (tree, shifted):
        collector = TreeCollector([t], 128, 2)
        tables.append(collector.table(run(override(base, {"solver": {"epochs": 4, "minibatch": 32}}), collector, 1, 10).agent))
    moved = float(np.abs(tables[0] - tables[1]).max())
    out = worst("reward_below_the_frontier", losses, 0.01, changed_by_a_shift=moved)
    return out | {"holds": out["holds"] and moved < 1e-11}


def run_to_end(method: OnPolicy, collector: TreeCollector, seed: int, references: Mapping[str, Any] | None = None) -> OnPolicyDriver:
    """The driver when its budget is spent."""
    driver = OnPolicyDriver(method, collector.agent(critic=method.advantage.needs_critic), collector, seed, references=references)
    while not driver.finished:
        driver.step()
    return driver


def _frontier(tree: EnumerableTokenMDP, kl: float) -> float:
    """The largest E R at KL(pi || p0) = kl nats, on the curve p0 exp(c R) / Z, by bisection on c."""
    low, high = 0.0, 1e4
    for _ in range(200):
        c = (low + high) / 2
        logp = tree.kl_optimum(1.0 / c)[0] if c > 0 else tree.logp_ref
        low, high = (c, high) if float(np.exp(logp) @ (logp - tree.logp_ref)) < kl else (low, c)
    return float(np.exp(tree.kl_optimum(1.0 / high)[0]) @ tree.R)


def apa_fixed_point(anchor: str = "old", lam: float = 1.0, seeds: int = 4) -> dict[str, Any]:
    """APA's minimum on exact data of a bandit of 8 arms: u = pi / anchor with log u - c u = A / lam, c < 0 such that E u = 1 (Lambert's W).

    Largest error of u over seeds; beside it the total variation to anchor exp(A / lam) / Z. Then A / lam = 20 on an arm of probability .01: unclipped
    policy gradients become deterministic, APA stops at the predicted point.
    """
    errors, distances = [], []
    for seed in range(seeds):
        tree = EnumerableTokenMDP.random(8, 1, seed)
        b = np.exp(tree.logp_ref)
        u, predicted, tilted = _regressed(b, tree.R - b @ tree.R, lam, anchor)
        errors.append(float(np.abs(u - predicted).max()))
        distances.append(float(0.5 * np.abs(b * u - tilted).sum()))
    b = np.array([0.01, *([0.99 / 7] * 7)])
    adv = np.array([20.0, *([-0.2 / 0.99] * 7)])
    u, predicted, _ = _regressed(b, adv, 1.0, anchor)
    out = worst("largest_error_of_u", errors, 1e-6, tv_to_the_tilted_anchor=distances)
    out |= {"rare": float(b[0] * u[0]), "rare_predicted": float(b[0] * predicted[0])}
    return out | {"holds": out["holds"] and abs(out["rare"] - out["rare_predicted"]) < 1e-4}


def _regressed(b: np.ndarray, adv: np.ndarray, lam: float, anchor: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u that gradient descent finds, u that the equation predicts, and b exp(A / lam) / Z."""
    from scipy.optimize import brentq
    from scipy.special import lambertw

    value = override(find("apa").value, {"surrogate": {"anchor": anchor, "lam": lam}, "divergence": None})
    tree = EnumerableTokenMDP(len(b), 1, np.log(b)[None], np.zeros(len(b)))
    collector = TreeCollector([tree], 1)
    agent = collector.agent()
    rollout, _ = collector.everything(agent)
    rollout.columns["adv"] = torch.from_numpy(adv)[:, None]
    rollout.logp_ref["ref"] = torch.from_numpy(np.log(b))[:, None]
    omega = torch.from_numpy(b)[:, None]
    params = agent.parameters("policy")
    optimizer = torch.optim.LBFGS(params, max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = policy_loss(value, agent, rollout, omega, ONE, False)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    u = np.exp(tree.sequence_logp(collector.table(agent))) / b
    x = adv / lam

    def solution(c: float) -> np.ndarray:
        return np.real(lambertw(c * np.exp(x))) / c  # log u + c u = x

    c = brentq(lambda c: b @ solution(c) - 1.0, 1e-12, 1e6)
    tilted = b * np.exp(x - x.max())
    return u, solution(c), tilted / tilted.sum()
