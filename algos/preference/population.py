"""Population losses of tabular policies: scores of every response at once, and their minimiser. For exact problems and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from markovia.agents.records import Views
from markovia.algos.preference.scores import TokenScores
from markovia.algos.preference.token_level import kl_ref_policy, log_collision

if TYPE_CHECKING:
    from markovia.envs.exact import EnumerableTokenMDP

Objective = Callable[[TokenScores, Views], Tensor]


def bandit_scores(logits: Tensor, **anchors: Tensor) -> TokenScores:
    """Scores of all responses of a tabular policy, one token each; row x * Y + y. logits (X, Y), anchors (X, Y) log-probabilities by name."""
    logp = torch.log_softmax(logits, -1).reshape(-1, 1)
    mask = torch.ones_like(logp, dtype=torch.bool)
    return TokenScores(logp, mask, {name: a.reshape(-1, 1).to(logp) for name, a in anchors.items()})


def tree_scores(tree: EnumerableTokenMDP, logits: Tensor, **anchors: Tensor) -> TokenScores:
    """Scores of all sequences of an enumerable token-MDP, token by token; logits and anchors (N, V), `ref` by default the tree's own p0."""
    index, tokens, mask = (torch.as_tensor(a) for a in (tree.prefix_index, tree.tokens, tree.mask))
    anchors.setdefault("ref", torch.as_tensor(tree.logits_ref))

    def taken(table: Tensor) -> Tensor:
        return torch.log_softmax(table, -1)[index, tokens]

    return TokenScores(
        taken(logits), mask, {name: taken(a.to(logits)) for name, a in anchors.items()},
        kl_ref=kl_ref_policy(logits, anchors["ref"].to(logits))[index], collision=log_collision(logits)[index],
    )  # fmt: skip


def weighted_mean(loss: Tensor, weight: Tensor) -> Tensor:
    """sum_i w_i L_i / sum_i w_i, a scalar."""
    return (weight * loss).sum() / weight.sum()


def minimise(objective: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 200) -> Tensor:
    """The minimiser of a smooth objective of one tensor near `start`, by L-BFGS; in start's precision, so give float64."""
    x = start.clone().requires_grad_()
    budget = {"max_iter": iterations, "max_eval": 4 * iterations, "history_size": 50}
    solver = torch.optim.LBFGS([x], tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe", **budget)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective(x)
        loss.backward()
        return loss

    solver.step(closure)
    return x.detach()


def descend(
    objective: Callable[..., Tensor], start: Mapping[str, Tensor], steps: int, lr: float, optimizer: str = "adam"
) -> dict[str, Tensor]:
    """`steps` full-batch steps of Adam or SGD on named tensors; objective(**tensors) is a scalar."""
    params = {k: v.clone().requires_grad_() for k, v in start.items()}
    make = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    solver = make(list(params.values()), lr=lr)
    for _ in range(steps):
        solver.zero_grad()
        objective(**params).backward()
        solver.step()
    return {k: v.detach() for k, v in params.items()}


def total_variation(logp: Tensor, logq: Tensor) -> Tensor:
    """max over the leading axes of half the L1 distance of two tables of log-probabilities (..., Y)."""
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1).max()
