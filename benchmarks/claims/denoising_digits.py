"""Claims on the 8x8 digits: a wanted digit by adjoint matching and by preferences, with what it costs: KL, diversity, distance to the data."""

from __future__ import annotations

from typing import Any

import torch

from markovia.algos.denoising.pairs import control_ratio
from markovia.algos.presets import configure
from markovia.algos.setup import build, make_driver
from markovia.claims.on_policy import _describe_digits

_ENV = "markovia/Digits-v0"


@torch.no_grad()
def _kl(setup: Any, reference: Any, n: int = 400) -> float:
    """KL(chain || reference chain) in nats, by the mean log-ratio of sampled chains."""
    generator = torch.Generator().manual_seed(2)
    record = setup.agent.generate(setup.task.starts(n, generator), generator)
    ratio = control_ratio(setup.agent, reference, record)
    return float((ratio * record.mask).sum(1).mean())


def _trained(method: Any, wanted: int, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    setup = build(_ENV, method, 0, env_kwargs={"wanted": wanted, **env_kwargs})
    before = _describe_digits(setup, wanted)
    driver = make_driver(method, setup, 0)
    while not driver.finished:
        driver.step()
    return {"before": before, "after": _describe_digits(setup, wanted), "kl_nats": _kl(setup, driver.reference)}


def adjoint_digits(wanted: int = 3) -> dict[str, Any]:
    """Adjoint matching on the classifier's probability, lam 30: the judge, whom training never saw, reads the wanted digit with probability >= 0.9;
    samples no further from the data than 1.25 times the distance between real images, pairwise distances >= 0.5 of those of real digits.
    """
    method = configure("adjoint-matching", _ENV)
    found = _trained(method, wanted, {"final": "mid"})
    after = found["after"]
    holds = after["judge"] >= 0.9 and after["nearest_real_ratio"] <= 1.25 and after["diversity_ratio"] >= 0.5
    return {"measured": after["judge"], "bound": 0.9, "holds": holds, **found}


def dpo_digits(wanted: int = 3) -> dict[str, Any]:
    """Diffusion-DPO on 4,096 pairs of the reference, labelled by the classifier: the judge's probability of the wanted digit grows to >= 0.5."""
    method = configure("diffusion-dpo", _ENV)
    found = _trained(method, wanted, {})
    return {"measured": found["after"]["judge"], "bound": 0.5, "holds": found["after"]["judge"] >= 0.5, **found}
