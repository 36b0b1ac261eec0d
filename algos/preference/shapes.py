"""psi: the function put over a response's log-ratio before two of them are compared; elementwise, any shape, nats in.

Where pi* solves max E r - beta D_f(pi || ref) in the interior, r = beta f'(u) + const with u = pi / ref = e^l; so psi(l) = f'(e^l), up to constants,
turns DPO into the classifier of that divergence's optimum                                            [Wang 2023; arXiv 2309.16240].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Psi = Literal["identity", "forward_kl", "js", "alpha", "squared_log", "odds"]


def forward_kl(l: Tensor) -> Tensor:
    """KL(ref || pi): psi = -e^(-l), f = -log u. Grows without bound as pi leaves a response.                       [arXiv 2309.16240]

    l is held at -80 or above, where e^80 still fits float32.
    """
    return -torch.exp(-l.clamp(min=-80.0))


def js(l: Tensor) -> Tensor:
    """Jensen-Shannon: psi = log s(l), s the logistic function; log(2u/(1+u)) without its constant log 2.         [arXiv 2309.16240]"""
    return F.logsigmoid(l)


def alpha_power(l: Tensor, alpha: float) -> Tensor:
    """Alpha divergence, and AlphaPO's reward where l is a mean log-prob: psi = (1 - e^(-alpha l)) / alpha.         [arXiv 2309.16240; 2501.03884]

    alpha -> 0 is the identity, alpha = 1 the forward KL up to a constant. alpha is the paper's; TRL's coefficient is 1 - alpha.
    """
    if alpha == 0.0:
        return l
    return -torch.expm1((-alpha * l).clamp(max=80.0)) / alpha


def squared_log(l: Tensor) -> Tensor:
    """SquaredPO: psi = log(u) / u = l e^(-l), f = (log u)^2 / 2.                                                            [arXiv 2602.06788]

    Not monotone: it has its peak 1/e at l = 1, and beyond it the gradient of a chosen response changes sign; that is what stops displacement.
    Never report it as a reward. The exponent is held at l = -60.
    """
    return l * torch.exp(-l.clamp(min=-60.0))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without cancellation on either side of x = -log 2."""
    near = x > -0.6931471805599453
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -0.5))), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def log_odds(s: Tensor) -> Tensor:
    """ORPO's log odds of the mean log-prob s: psi = s - log(1 - e^s).                                                   [arXiv 2403.07691]

    e^s is held at 1 - 1e-7, so that a certain answer of one token stays finite. On a sum the odds vanish (e^s ~ 0): use reduce="mean".
    """
    held = s.clamp(max=-1e-7)
    return held - log1mexp(held)


def shape(psi: Psi, l: Tensor, alpha: float) -> Tensor:
    """psi(l) by name; `alpha` is read by "alpha" only."""
    if psi == "identity":
        return l
    if psi == "alpha":
        return alpha_power(l, alpha)
    return {"forward_kl": forward_kl, "js": js, "squared_log": squared_log, "odds": log_odds}[psi](l)
