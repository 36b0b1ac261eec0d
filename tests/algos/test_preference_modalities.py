"""One loss, two modalities: what a row reads of a text it can read of a denoising chain, whose steps come as log-ratios with an anchor of zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.method import Preference
from markovia.algos.preference.methods import PREFERENCE

BOTH = [m for m, row in PREFERENCE.items() if "denoising" in row.kinds and isinstance(row.value, Preference)]
# These read log-densities themselves: without a reference, with a likelihood term, with another weight on the reference, or sorted apart from it.
DENSITY = {"aot", "slic", "simpo", "alpha-po", "h-dpo", "mipo", "rpo", "tpo", "tpo/length", "pro"}


def as_chain(scores: Any) -> Any:
    """The same record as a chain's: log-ratio to the reference per step, and every anchor relative to the reference."""
    ref = scores.logp_ref["ref"]
    return dataclasses.replace(scores, logp=scores.logp - ref, logp_ref={name: a - ref for name, a in scores.logp_ref.items()})


def loss_of(method_id: str, scores: Any, views: Any, fitting: Any) -> torch.Tensor:
    value: torch.Tensor = PREFERENCE[method_id].value(*fitting(method_id, scores, views))
    return value


@pytest.mark.parametrize("method_id", sorted(set(BOTH) - DENSITY))
def test_log_ratios_with_an_anchor_of_zero_give_the_same_loss_and_gradient(method_id: str, random_batch: Any, fitting: Any) -> None:
    scores, views = random_batch()
    found = []
    for as_told in (lambda s: s, as_chain):
        logp = scores.logp.clone().requires_grad_()
        loss = loss_of(method_id, as_told(dataclasses.replace(scores, logp=logp)), views, fitting)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        found.append((loss.detach(), gradient))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)
    if not isinstance(PREFERENCE[method_id].value.loss, SelfPlay):  # a surrogate, whose gradient alone means something
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method_id", sorted(DENSITY))
def test_the_others_need_densities(method_id: str, random_batch: Any, fitting: Any) -> None:
    scores, views = random_batch()
    assert not torch.allclose(loss_of(method_id, scores, views, fitting), loss_of(method_id, as_chain(scores), views, fitting))


def test_odds_are_of_probabilities() -> None:
    """A density above 1 has no odds, so those rows serve text alone."""
    assert all(PREFERENCE[m].kinds == ("language",) for m in ("orpo", "orpo/beta", "asft", "asft/beta"))
