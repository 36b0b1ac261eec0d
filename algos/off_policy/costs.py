"""The constraint slot of the off-policy update, on networks: what the cost critics learn, and what they say of an action.

    q_c  (m, E, b)  discounted costs of m constraints by E critics each        weight  (b, m)  what a unit of each cost is worth in reward
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from markovia.agents.records import Obs
from markovia.algos.off_policy.losses import bootstrap, td_error

if TYPE_CHECKING:
    from markovia.algos.off_policy.actor_critic import ActorCritic, Loss
    from markovia.algos.off_policy.replay import Batch


def upper_cost(q_c: Tensor, *, k: float) -> Tensor:
    """Q_U = mean_i Q_i + k std_i over the critics, (m, b): an actor that looks for low cost finds the critics' errors, which k > 0 makes up for.

    The sample standard deviation (E - 1).                                                                        [Wu 2024, arXiv 2401.14758]
    """
    return q_c.mean(1) if k == 0 else q_c.mean(1) + k * q_c.std(1)


def cost_names(m: int) -> list[str]:
    """Names of the statistics that hold each cost's mean."""
    return ["cost_q"] if m == 1 else [f"cost_q/{i}" for i in range(m)]


def _costs(nets: ActorCritic, critic: torch.nn.Module | None, obs: Obs, action: Tensor) -> Tensor:
    """(m, E, b)."""
    constraint = nets.method.constraint
    assert constraint is not None
    return nets.q(critic, obs, action).unflatten(0, (constraint.num_costs, constraint.critic.num))


def cost_loss(nets: ActorCritic, batch: Batch, noise: Tensor) -> Loss:
    """coef mean sum_j (Q_j(s, a) - y_j)^2, y_j = c + gamma (1 - terminated) Qbar_j(s', a') of the same critic, a' drawn from the policy; no entropy.

    The statistics hold the mean of Q_U over replayed actions for each cost, as `cost_names` calls it.             [Wu 2024, arXiv 2401.14758]
    """
    constraint = nets.method.constraint
    assert constraint is not None
    with torch.no_grad():
        dist = nets.dist(nets.agent, batch.next_obs, noise.dtype)
        following = _costs(nets, nets.cost_target, batch.next_obs, nets.agent.unit_action(nets.choose(dist, noise)))
        y = bootstrap(batch.extra["cost"].T[:, None], batch.continuation, following, gamma=nets.method.gamma)
    q_c = _costs(nets, nets.cost, batch.obs, batch.action)
    loss = constraint.critic.coef * td_error(q_c.flatten(0, 1), y.flatten(0, 1)).mean()
    means = upper_cost(q_c.detach(), k=constraint.conservatism).mean(1)
    return loss, {"cost_loss": loss.detach()} | dict(zip(cost_names(len(means)), means, strict=True))


def priced(nets: ActorCritic, batch: Batch, action: Tensor) -> Tensor:
    """sum_i w_i Q_U^i(s, a), (b,), with gradient in the action; in reward units."""
    constraint = nets.method.constraint
    assert constraint is not None
    upper = upper_cost(_costs(nets, nets.cost, batch.obs, action), k=constraint.conservatism)
    return (batch.extra["cost_weight"].T * upper).sum(0)
