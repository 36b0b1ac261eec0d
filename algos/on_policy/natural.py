"""Natural-gradient steps: conjugate gradient on exact Fisher products and a backtracking line search (TRPO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from markovia.agents.distributions import kl, with_params
from markovia.agents.interface import Agent
from markovia.agents.records import Rollout, masked_mean
from markovia.algos.on_policy.method import NaturalGradient, OnPolicy
from markovia.algos.safe.dual import TrustRegionDual
from markovia.algos.safe.trust_region import acceptable, trust_region_dual


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """x with product(x) = b for a symmetric positive definite product, from x = 0; stops at |r|^2 < tolerance.       [Hestenes & Stiefel 1952]"""
    x = torch.zeros_like(b)
    r, p = b.clone(), b.clone()
    rr = r.dot(r)
    for _ in range(iterations):
        if rr < tolerance:
            break
        hp = product(p)
        alpha = rr / p.dot(hp)
        x = x + alpha * p
        r = r - alpha * hp
        new = r.dot(r)
        p = r + (new / rr) * p
        rr = new
    return x


class _Head(nn.Module):
    """Distribution parameters as a function of the agent's weights, for torch.func."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.net = agent.net
        self.agent = agent

    def forward(self, rollout: Rollout) -> dict[str, Tensor]:
        dist = self.agent.evaluate(rollout, ("dist",)).dist
        assert dist is not None
        return dist.params()


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([t.numel() for t in like])
    return [p.view_as(t) for p, t in zip(parts, like, strict=True)]


def fisher_product(agent: Agent, rollout: Rollout, *, damping: float) -> Callable[[Tensor], Tensor]:
    """v -> (J^T M J + damping I) v with J = d(distribution parameters)/d(policy weights) and M the distribution's closed-form metric.

    Equals the Hessian at theta_old of the mean KL over the record's masked decisions, in either direction, plus damping.   [arXiv 1502.05477]
    """
    head = _Head(agent)
    wanted_ids = {id(p) for p in agent.parameters("policy")}
    named = [(n, p) for n, p in head.named_parameters() if id(p) in wanted_ids]
    names, tensors = [n for n, _ in named], [p.detach() for _, p in named]
    order = {id(p): i for i, p in enumerate(agent.parameters("policy"))}
    back = sorted(range(len(named)), key=lambda i: order[id(named[i][1])])
    mask = rollout.mask
    count = mask.sum().clamp(min=1)

    def outputs(values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = functional_call(head, dict(zip(names, values, strict=True)), (rollout,))
        return result

    with torch.no_grad():
        dist = agent.evaluate(rollout, ("dist",)).dist
    assert dist is not None
    primal = tuple(tensors)
    # torch.func.vjp would do the same, and import torch's compiler for it: seconds, and 80 MB.
    with torch.enable_grad():
        leaves = [t.requires_grad_() for t in map(torch.detach, tensors)]
        made = {k: t for k, t in outputs(tuple(leaves)).items() if t.requires_grad}

    def product(v: Tensor) -> Tensor:
        ordered = unflatten(v, agent.parameters("policy"))
        tangent = [torch.empty(0)] * len(ordered)
        for position, i in enumerate(back):
            tangent[i] = ordered[position]
        out = jvp(outputs, (primal,), (tuple(tangent),))[1]
        scaled = dist.fisher(out)
        masked = {
            k: torch.where(mask.reshape(*mask.shape, *([1] * (t.dim() - mask.dim()))), t, 0.0) / count for k, t in scaled.items()
        }
        grads = torch.autograd.grad(list(made.values()), leaves, [masked[k] for k in made], retain_graph=True, materialize_grads=True)
        return flatten([grads[i] for i in back]) + damping * v

    return product


def natural_step(
    method: OnPolicy, solver: NaturalGradient, agent: Agent, rollout: Rollout, violation: float | None = None
) -> dict[str, float]:
    """One trust-region step on the whole batch; the policy is left untouched when no candidate is accepted.

    s = sqrt(2 delta / x^T F x) x, F x = g; accept theta + 0.8^j s for the first j with mean KL(old||new) <= delta and a better surrogate.
    Schulman 2015 (arXiv 1502.05477), appendix C. Without line search: the natural policy gradient step itself.
    With a violation (cost per step over its limit): CPO's step s = along_x x + along_p p, F p = b = gradient of the cost surrogate, and its
    acceptance (`trust_region_dual`, `acceptable`).                                                                     [arXiv 1705.10528]
    """
    params = agent.parameters("policy")
    mask = rollout.mask

    def surrogate(adv: Tensor) -> Tensor:
        logp = agent.evaluate(rollout, ("logp",)).logp
        assert logp is not None
        log_ratio = torch.where(mask, logp - rollout.logp_old, 0.0)
        return masked_mean(method.surrogate(log_ratio, adv, None, torch.ones(())), mask)

    adv = rollout.columns["adv"]
    value = surrogate(adv)
    g = flatten(list(torch.autograd.grad(value, params)))
    if violation is not None:
        assert method.constraint is not None and isinstance(method.constraint.dual, TrustRegionDual)
        tolerance, cost_adv = method.constraint.dual.tolerance, rollout.columns["cost_adv"][..., 0]
        cost_value = surrogate(cost_adv)
        b = flatten(list(torch.autograd.grad(cost_value, params)))
    with torch.no_grad():
        product = fisher_product(agent, rollout, damping=solver.damping)
        solve = lambda v: conjugate_gradient(product, v, iterations=solver.cg_iterations, tolerance=solver.cg_tolerance)  # noqa: E731
        x = solve(g)
        stats: dict[str, Any] = {"policy_loss": -float(value), "line_search_steps": 0.0, "accepted": 0.0, "approx_kl": 0.0}
        stats["grad_norm"] = float(g.norm())
        if violation is not None:
            p = solve(b)
            q, r, s = float(g.dot(x)), float(g.dot(p)), float(b.dot(p))
            found = trust_region_dual(max(q, 0.0), r, max(s, 0.0), violation, delta=solver.kl_limit_nats)
            step = found.along_x * x + found.along_p * p
            stats |= {"cost_weight": found.nu, "recovery": float(found.case == "recovery"), "limit_active": float(found.case in ("active", "edge"))}
        else:
            curvature = x.dot(product(x))
            if not torch.isfinite(curvature) or curvature <= 0:
                return stats  # no gradient (the driver tells of a broken one): stay
            step = torch.sqrt(2.0 * solver.kl_limit_nats / curvature) * x
        start = flatten([p.detach() for p in params]).clone()
        old = agent.evaluate(rollout, ("dist",)).dist
        assert old is not None
        old_params = {k: v.clone() for k, v in old.params().items()}

        def put(flat: Tensor) -> None:
            for p, v in zip(params, unflatten(flat, params), strict=True):
                p.copy_(v)

        def measured_kl() -> Tensor:
            new = agent.evaluate(rollout, ("dist",)).dist
            assert new is not None
            return masked_mean(torch.where(mask, kl(with_params(new, old_params), new), 0.0), mask)

        if not solver.line_search:
            put(start + step)
            return {**stats, "accepted": 1.0, "approx_kl": float(measured_kl())}
        for j in range(solver.max_backtracks):
            put(start + solver.backtrack**j * step)
            kl_new = measured_kl()
            if violation is None:
                accept = bool(kl_new <= solver.kl_limit_nats and surrogate(adv) > value)
            else:
                changes = {"gain": float(surrogate(adv) - value), "cost_change": float(surrogate(cost_adv) - cost_value)}
                accept = acceptable(float(kl_new), violation=violation, delta=solver.kl_limit_nats, tolerance=tolerance, **changes)
            if accept:
                return {**stats, "accepted": 1.0, "line_search_steps": float(j), "approx_kl": float(kl_new)}
        put(start)
        return {**stats, "line_search_steps": float(solver.max_backtracks)}
