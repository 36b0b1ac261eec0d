"""Action distributions as plain parameter dictionaries; log-prob, entropy, KL, Fisher metric are free functions of them.

A distribution is a frozen value with tensors of leading shape (B, T) (or (B,)); `params()` / `from_params` convert to the record's `dist_old`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Gaussian:
    """Diagonal normal: mean (..., d), log_std (..., d). Actions are unbounded; the environment clips."""

    mean: Tensor
    log_std: Tensor

    def params(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "log_std": self.log_std}

    def at(self, noise: Tensor) -> Tensor:
        """mean + std noise: the action that standard normal `noise` (..., d) gives, differentiable in both parameters."""
        return self.mean + self.log_std.exp() * noise

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.at(torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype))

    def mode(self) -> Tensor:
        return self.mean

    def log_probs(self, action: Tensor) -> Tensor:
        """log N(a_j; mean_j, std_j) of every entry, nats, shape (..., d)."""
        z = (action - self.mean) * torch.exp(-self.log_std)
        return -(0.5 * (z.square() + LOG_2PI) + self.log_std)

    def log_prob(self, action: Tensor) -> Tensor:
        """Joint log-density, the sum over entries, nats, shape (...)."""
        return self.log_probs(action).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * (1.0 + LOG_2PI)).sum(-1)

    def fisher(self, tangent: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metric of the parameters: diag(1/std^2) on the mean, 2 on log std."""
        return {"mean": tangent["mean"] * torch.exp(-2.0 * self.log_std), "log_std": 2.0 * tangent["log_std"]}


@dataclass(frozen=True)
class SquashedGaussian(Gaussian):
    """tanh of a diagonal normal, actions kept BEFORE the squash: the Jacobian cancels in ratios and KL
    and is added in log-prob; `entropy` is that before the squash (after it there is no closed form).

    log pi(a) = log N(u) - sum_j log(1 - tanh(u_j)^2), with log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)).
    """

    def log_probs(self, action: Tensor) -> Tensor:
        return super().log_probs(action) - 2.0 * (math.log(2.0) - action - F.softplus(-2.0 * action))


@dataclass(frozen=True)
class Categorical:
    """Softmax over the last axis: logits (..., n); actions are int64 (...)."""

    logits: Tensor

    def params(self) -> dict[str, Tensor]:
        return {"logits": self.logits}

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        # Gumbel-max: one vectorised draw per decision. Uniforms are kept away from 0 and 1 so that both logs are finite.
        u = torch.rand(self.logits.shape, generator=generator, device=self.logits.device, dtype=self.logits.dtype)
        return (self.logits - torch.log(-torch.log(u.clamp(1e-20, 1.0 - 1e-7)))).argmax(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """log softmax(logits)[action], nats."""
        flat = self.logits.reshape(-1, self.logits.shape[-1])
        return -F.cross_entropy(flat, action.reshape(-1), reduction="none").reshape(action.shape)

    def entropy(self) -> Tensor:
        logp = torch.log_softmax(self.logits, -1)
        return -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)

    def fisher(self, tangent: dict[str, Tensor]) -> dict[str, Tensor]:
        """(diag(p) - p p^T) v on the logits."""
        p = torch.softmax(self.logits, -1)
        pv = p * tangent["logits"]
        return {"logits": pv - p * pv.sum(-1, keepdim=True)}


@dataclass(frozen=True)
class MultiCategorical:
    """Independent softmaxes (MultiDiscrete): logits (..., sum n_i), split by `sizes`; actions are int64 (..., m)."""

    logits: Tensor
    sizes: tuple[int, ...]

    def parts(self) -> list[Categorical]:
        return [Categorical(x) for x in self.logits.split(list(self.sizes), -1)]

    def params(self) -> dict[str, Tensor]:
        return {"logits": self.logits}

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.stack([p.sample(generator) for p in self.parts()], -1)

    def mode(self) -> Tensor:
        return torch.stack([p.mode() for p in self.parts()], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        return torch.stack([p.log_prob(action[..., i]) for i, p in enumerate(self.parts())], -1).sum(-1)

    def entropy(self) -> Tensor:
        return torch.stack([p.entropy() for p in self.parts()], -1).sum(-1)

    def fisher(self, tangent: dict[str, Tensor]) -> dict[str, Tensor]:
        cut = tangent["logits"].split(list(self.sizes), -1)
        return {"logits": torch.cat([p.fisher({"logits": t})["logits"] for p, t in zip(self.parts(), cut, strict=True)], -1)}


@dataclass(frozen=True)
class FixedStdGaussian:
    """N(mean, std^2 I) with std given by a sampler (denoising): mean (B, T, *shape), std (B, T). Only the mean is learned.

    scale = 1 sums over the D entries (exact); scale = 1/D averages (the convention of the published DDPO code).
    A step with std = 0 is deterministic and has no density: its log-prob, entropy, KL and metric are 0, and it belongs outside of the mask.
    """

    mean: Tensor
    std: Tensor
    scale: float = 1.0

    def _std(self) -> Tensor:
        return self.std.reshape(*self.std.shape, *([1] * (self.mean.dim() - self.std.dim())))

    def params(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "std": self.std}

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self._std() * noise

    def mode(self) -> Tensor:
        return self.mean

    def _sum(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(self.std.dim()).sum(-1)

    def _inverse(self) -> Tensor:
        """1/std where std > 0, else 0."""
        s = self._std()
        return torch.where(s > 0, 1.0 / torch.where(s > 0, s, 1.0), 0.0)

    def log_prob(self, action: Tensor) -> Tensor:
        inverse = self._inverse()
        # Rounding moves a deterministic step's action off its mean; divided by any small std that would be everything.
        return self._sum(torch.where(inverse > 0, -0.5 * (((action - self.mean) * inverse).square() + LOG_2PI) + _log(inverse), 0.0))

    def entropy(self) -> Tensor:
        inverse = self._inverse()
        return self._sum(torch.where(inverse > 0, 0.5 * (1.0 + LOG_2PI) - _log(inverse), 0.0).expand_as(self.mean))

    def fisher(self, tangent: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": self.scale * tangent["mean"] * self._inverse().square(), "std": torch.zeros_like(self.std)}


def _log(x: Tensor) -> Tensor:
    """log x, and 0 where x is 0."""
    return torch.where(x > 0, x, 1.0).log()


Distribution = Gaussian | Categorical | MultiCategorical | FixedStdGaussian


def with_params(like: Distribution, params: dict[str, Tensor]) -> Distribution:
    """A distribution of the kind of `like` with other parameters (the record's `dist_old`)."""
    if isinstance(like, FixedStdGaussian):
        return FixedStdGaussian(params["mean"], params["std"], like.scale)
    if isinstance(like, MultiCategorical):
        return MultiCategorical(params["logits"], like.sizes)
    if isinstance(like, Categorical):
        return Categorical(params["logits"])
    return type(like)(params["mean"], params["log_std"])


def kl(p: Distribution, q: Distribution) -> Tensor:
    """KL(p || q) in nats per decision, shape of the batch; exact for every kind (for a squash the Jacobian cancels).

    Raises ValueError when the two are of different kinds.
    """
    if type(p) is not type(q):
        raise ValueError(f"KL needs two distributions of one kind, got {type(p).__name__} and {type(q).__name__}")
    if isinstance(p, Gaussian) and isinstance(q, Gaussian):
        var_ratio = torch.exp(2.0 * (p.log_std - q.log_std))
        z = ((p.mean - q.mean) * torch.exp(-q.log_std)).square()
        return (q.log_std - p.log_std + 0.5 * (var_ratio + z - 1.0)).sum(-1)
    if isinstance(p, FixedStdGaussian) and isinstance(q, FixedStdGaussian):
        return p._sum(0.5 * ((p.mean - q.mean) * q._inverse()).square())
    if isinstance(p, MultiCategorical) and isinstance(q, MultiCategorical):
        return torch.stack([kl(a, b) for a, b in zip(p.parts(), q.parts(), strict=True)], -1).sum(-1)
    assert isinstance(p, Categorical) and isinstance(q, Categorical)
    lp, lq = torch.log_softmax(p.logits, -1), torch.log_softmax(q.logits, -1)
    # Masked actions have logits near the dtype's minimum on both sides; clamping keeps 0 * (-inf) out of the sum.
    return (lp.exp() * (lp.clamp(min=-1e30) - lq.clamp(min=-1e30))).sum(-1)
