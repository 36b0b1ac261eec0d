"""An agent that acts better than the policy that it imitates, in closed form: where a model of its Q climbs, as far as the density allows.

    log_weight (..., m)  log lambda_i of a mixture      mean (..., m, d)  before the tanh      cov (..., m, d, d)
    grad (..., d)  gradient of Q(s, tanh(mu)) in mu     log_tau  budget, nats: how much less likely than at its best the action may be
Q is taken as linear around a point and the log density as it is, or bounded from below, so that each problem is one over an ellipsoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor

from markovia.agents.control import ControlAgent
from markovia.agents.critics import QuantileEnsemble
from markovia.agents.distributions import LOG_2PI
from markovia.agents.networks import PolicyNet, Trunk
from markovia.agents.records import Obs, map_obs

ActionValue = Callable[[Tensor], Tensor]  # actions (b, k, d) in [-1, 1] -> values (b, k)
LOG_STD_RANGE = (-5.0, 2.0)  # of modes, as in the published code


def ellipsoid_step(center: Tensor, cov: Tensor, grad: Tensor, radius: Tensor | float) -> Tensor:
    """argmax of g'mu over (mu - c)' Sigma^-1 (mu - c) <= r^2: mu = c + r Sigma g / sqrt(g' Sigma g), and c where g = 0.

    With r = sqrt(2 log tau) it is the single-Gaussian operator: log N(mu) falls by log tau from its peak.          [Li 2023, arXiv 2211.15956]
    center, grad (..., d), cov (..., d, d), radius (...) -> (..., d)
    """
    along = (cov @ grad[..., None])[..., 0]
    size = (grad * along).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
    return center + torch.as_tensor(radius).to(center)[..., None] * along / size.clamp(min=1e-12)


def mode_budgets(log_weight: Tensor, cov: Tensor, *, log_tau: float) -> Tensor:
    """c_i = max(0, log tau + h_i - max_j h_j), h_i = log lambda_i - 0.5 log det(2 pi Sigma_i), (..., m) nats: what mode i may give up.

    The log of a sum is bounded by its largest term, so mode i alone has to reach max_j lambda_j N_j(mu_j) / tau. A mode whose peak lies below that
    has no budget: it keeps its mean, which does not meet the bound.                     [arXiv 2211.15956; its published code has 2 c_i for c_i]
    """
    peak = log_weight - 0.5 * torch.logdet(2.0 * math.pi * cov)
    return (log_tau + peak - peak.amax(-1, keepdim=True)).clamp(min=0.0)


def jensen_ellipsoid(log_weight: Tensor, mean: Tensor, cov: Tensor, *, log_tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """The set sum_i lambda_i 0.5 (mu - mu_i)' Sigma_i^-1 (mu - mu_i) <= log tau as one ellipsoid: center, covariance, squared radius.

    S = (sum_i lambda_i Sigma_i^-1)^-1,  c = S sum_i lambda_i Sigma_i^-1 mu_i,  r^2 = 2 log tau - sum_i lambda_i (mu_i - c)' Sigma_i^-1 (mu_i - c);
    empty where r^2 < 0. It bounds the log of the mixture by Jensen's inequality. The paper's r^2 has mu_i and c apart, a difference of large numbers
    where modes are narrow.                                                                                              [arXiv 2211.15956]
    """
    weighted = log_weight.exp()[..., None, None] * torch.linalg.inv(cov)
    pulled = (weighted @ mean[..., None])[..., 0]
    precision = weighted.sum(-3)
    whole = torch.linalg.inv(precision)
    center = (whole @ pulled.sum(-2)[..., None])[..., 0]
    apart = mean - center[..., None, :]
    spread = (apart * (weighted @ apart[..., None])[..., 0]).sum((-1, -2))
    return center, whole, 2.0 * log_tau - spread


def slope(q: ActionValue, raw: Tensor) -> Tensor:
    """Gradient of q(tanh(raw)) in raw, (b, k, d)."""
    with torch.enable_grad():
        raw = raw.detach().requires_grad_(True)
        return torch.autograd.grad(q(torch.tanh(raw)).sum(), raw)[0]


def improve(q: ActionValue, log_weight: Tensor, mean: Tensor, cov: Tensor, *, log_tau: float, min_weight: float) -> Tensor:
    """The best by Q of one candidate per mode and of Jensen's, (b, d) before the tanh: the mixture operator.           [arXiv 2211.15956]

    A mode counts with a weight of at least `min_weight`, the heaviest always. One mode alone is the single-Gaussian operator; log_tau = 0 gives the
    best mode's mean.
    """
    with torch.no_grad():
        weight = log_weight.exp()
        counts = (weight >= min_weight) | (weight >= weight.amax(-1, keepdim=True))
        modes = ellipsoid_step(mean, cov, slope(q, mean), (2.0 * mode_budgets(log_weight, cov, log_tau=log_tau)).sqrt())
        center, whole, square = jensen_ellipsoid(log_weight, mean, cov, log_tau=log_tau)
        joint = ellipsoid_step(center, whole, slope(q, center[:, None])[:, 0], square.clamp(min=0.0).sqrt())
        found = torch.cat([modes, joint[:, None]], 1)
        allowed = torch.cat([counts, (square >= 0.0)[:, None]], 1)
        best = q(torch.tanh(found)).masked_fill(~allowed, -torch.inf).argmax(1)
        return found[torch.arange(len(best), device=best.device), best]


def lower_bound(q: Tensor, *, pessimism: float) -> Tensor:
    """mean_k Q_k - pessimism std_k Q_k over the ensemble (N, ...), std with N - 1; one member has none.                 [arXiv 2211.15956]"""
    return q.mean(0) - (pessimism * q.std(0) if q.shape[0] > 1 else 0.0)


@dataclass(frozen=True)
class SquashedMixture:
    """tanh of a mixture of diagonal normals: logits (..., m), mean and log_std (..., m, d); actions (..., d) are kept before the tanh."""

    logits: Tensor
    mean: Tensor
    log_std: Tensor

    def params(self) -> dict[str, Tensor]:
        return {"logits": self.logits, "mean": self.mean, "log_std": self.log_std}

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        uniform = torch.rand(self.logits.shape, generator=generator, device=self.logits.device, dtype=self.logits.dtype)
        mode = (self.logits - torch.log(-torch.log(uniform.clamp(1e-20, 1.0 - 1e-7)))).argmax(-1)
        mean, log_std = self._of(mode, self.mean), self._of(mode, self.log_std)
        return mean + log_std.exp() * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)

    def mode(self) -> Tensor:
        """Mean of the heaviest mode."""
        return self._of(self.logits.argmax(-1), self.mean)

    def _of(self, mode: Tensor, x: Tensor) -> Tensor:
        return x.gather(-2, mode[..., None, None].expand(*mode.shape, 1, x.shape[-1]))[..., 0, :]

    def log_prob(self, action: Tensor) -> Tensor:
        """log pi(a) = log sum_i lambda_i N_i(u) - sum_j log(1 - tanh(u_j)^2), nats, (...)."""
        z = (action[..., None, :] - self.mean) * torch.exp(-self.log_std)
        each = -(0.5 * (z.square() + LOG_2PI) + self.log_std).sum(-1)
        jacobian = 2.0 * (math.log(2.0) - action - F.softplus(-2.0 * action)).sum(-1)
        return torch.logsumexp(torch.log_softmax(self.logits, -1) + each, -1) - jacobian


class ImprovedAgent(ControlAgent):
    """Imitates with a mixture, and greedily acts by `improve` on its own critics; sampled actions are the mixture's."""

    def __init__(self, config: dict[str, Any], network: Any = None) -> None:
        super().__init__(config, network)
        own = config["improvement"]
        self.modes, self.log_tau, self.pessimism, self.min_weight = (own[k] for k in ("modes", "log_tau", "pessimism", "min_weight"))
        outputs = self.modes * (2 * self.action_size + 1)
        self.net["policy"] = PolicyNet(Trunk(self.observation_space, tuple(config["hidden"]), config["activation"]), outputs)
        with torch.no_grad():  # modes that start alike would stay alike
            self.net["policy"].head.bias.normal_(0.0, 0.5)  # type: ignore[union-attr,operator]
        self.net["q"] = QuantileEnsemble(self.observation_space, self.action_size, **config["q"])

    @classmethod
    def improved(
        cls, observation_space: gym.Space, action_space: gym.Space, improvement: dict[str, Any], q: dict[str, Any], **options: Any
    ) -> ImprovedAgent:
        """From one environment's spaces; improvement: modes, log_tau, pessimism, min_weight; q: arguments of `QuantileEnsemble`."""
        device = options.pop("device", "cpu")
        plain = ControlAgent.from_spaces(observation_space, action_space, squash=True, std="state", critic=False, **options)
        agent = cls({**plain.config(), "improvement": improvement, "q": {**q, "hidden": list(q["hidden"])}})
        agent.to(device)
        return agent

    def distribution(self, params: Tensor) -> SquashedMixture:  # type: ignore[override]
        m, d = self.modes, self.action_size
        logits, mean, log_std = params.split([m, m * d, m * d], -1)
        return SquashedMixture(logits, mean.unflatten(-1, (m, d)), log_std.clamp(*LOG_STD_RANGE).unflatten(-1, (m, d)))

    def value(self, obs: Obs, action: Tensor) -> Tensor:
        """Lower bound of Q for actions (b, k, d) in [-1, 1], (b, k)."""
        k = action.shape[1]
        again = map_obs(obs, lambda x: x.repeat_interleave(k, 0))
        return lower_bound(self.net["q"](again, action.flatten(0, 1)), pessimism=self.pessimism).unflatten(0, (-1, k))

    def act(self, obs: Obs, deterministic: bool = False, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            dist = self.distribution(self.net["policy"](obs)[0])
            if not deterministic:
                action = dist.sample(generator)
                return action, dist.log_prob(action)
            cov = torch.diag_embed((2.0 * dist.log_std).exp())
            log_weight = torch.log_softmax(dist.logits, -1)
            action = improve(lambda a: self.value(obs, a), log_weight, dist.mean, cov, log_tau=self.log_tau, min_weight=self.min_weight)
            return action, dist.log_prob(action)
