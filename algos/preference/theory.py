"""Tools of theory: which divergences give a DPO that does not displace, and what information a pair of samplers carries.

    logp, logp_ref, logp_w, ... (..., M)  log-probabilities of all M responses, nats
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from markovia.algos.preference.scores import positive


class Predicates(NamedTuple):
    """What a generator f allows."""

    inducing: bool  # f-DPO's pair loss has the regularised optimum as its minimiser
    resistant: bool  # necessary for chosen responses not to be displaced


def predicates(f: Callable[[Tensor], Tensor]) -> Predicates:
    """Is the penalty sum_y ref(y) f(pi(y) / ref(y)) DPO-inducing, and displacement-resistant?

    inducing iff f'(t) -> -inf as t -> 0+ (f need not be convex); resistant only if argmin f >= 1                    [Pipano 2026; arXiv 2602.06788]
    f takes and returns float64 tensors of t in [1e-12, 10], which is where both are judged numerically: f' diverges when it falls by more than 1
    between 1e-6 and 1e-12. The second predicate is about f as written: f + c (t - 1) is the same divergence with another argmin.
    Raises ValueError where f is not finite there.
    """
    t = torch.tensor([1e-12, 1e-6], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(t).sum(), t)
    grid = torch.cat([torch.logspace(-12, 1, 2601, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    values = f(grid)
    if not (bool(torch.isfinite(values).all()) and bool(torch.isfinite(slope).all())):
        raise ValueError("f must be finite with a finite slope on [1e-12, 10]; write 0 log 0 forms with torch.xlogy")
    return Predicates(bool(slope[0] < slope[1] - 1.0), bool(grid[values.argmin()] >= 1.0))


def did(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """The differential information distribution, as log q (..., M): what has to be learnt to turn ref into pi.

    q_{pi/ref}(y) = (pi(y) / ref(y)) / sum_y' pi(y') / ref(y')                                                          [Won 2025; arXiv 2505.23761]
    If chosen ~ pi_w and rejected ~ pi_l, then P(y chosen over y') = s(log q_{pi_w/pi_l}(y) - log q_{pi_w/pi_l}(y')).
    """
    return torch.log_softmax(logp - logp_ref, -1)


def ideal_rejected(logp_optimal: Tensor, logp_ref: Tensor, *, beta: float) -> Tensor:
    """log pi_l (..., M), the rejected sampler for which DPO with chosen ~ ref recovers pi*.

    pi_l ~ ref (ref / pi*)^beta, so that q_{ref/pi_l} ~ (q_{pi*/ref})^beta                                               [arXiv 2505.23761]
    Raises ValueError unless beta > 0.
    """
    positive(beta=beta)
    return torch.log_softmax(logp_ref + beta * (logp_ref - logp_optimal), -1)


def did_entropy(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """H(q_{pi/ref}) (...), nats: low when pi reinforces what ref does, high when it smooths ref out.                  [arXiv 2505.23761]"""
    q = did(logp, logp_ref)
    return -(q.exp() * q).sum(-1)


def did_entropy_estimate(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """The same from n samples of pi, logp and logp_ref (n,) of the samples, by self-normalised importance weights.

    q / pi ~ 1 / ref;  H = log Z - E_q[log pi/ref],  Z = E_pi[1 / ref]
    """
    weight = torch.softmax(-logp_ref, 0)
    log_z = torch.logsumexp(-logp_ref, 0) - torch.log(torch.tensor(float(len(logp_ref)), dtype=logp_ref.dtype))
    return log_z - (weight * (logp - logp_ref)).sum()
