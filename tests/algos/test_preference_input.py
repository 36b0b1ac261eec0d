"""What must not change a preference loss (padding, order, micro-batches, weights, precision), and what is refused with which message."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from markovia.agents.records import Views
from markovia.algos.preference.listwise import EXO, Listwise
from markovia.algos.preference.methods import PREFERENCE, Tool
from markovia.algos.preference.pairwise import Difference, Pairwise, Squared
from markovia.algos.preference.pieces import NLL, OtherRewards
from markovia.algos.preference.scores import Score, TokenScores
from markovia.algos.preference.unpaired import KTO, Imitate, Pointwise, Transport

torch.set_num_threads(1)
F64 = torch.float64
LOSSES = {k: row for k, row in PREFERENCE.items() if not isinstance(row.value, Tool)}
DPO = LOSSES["dpo"].value.loss
B = 12


def of(method_id: str, **changes: Any) -> Any:
    """A row's loss with other settings."""
    return dataclasses.replace(LOSSES[method_id].value.loss, **changes)


def value_and_gradient(loss: Any, scores: TokenScores, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    logp = scores.logp.clone().requires_grad_()
    value = loss(dataclasses.replace(scores, logp=logp), views)
    return value.detach(), torch.autograd.grad(value.sum(), logp)[0]


def padded(scores: TokenScores, views: Views) -> tuple[TokenScores, Views]:
    """Two more tokens of junk that the mask leaves out."""

    def wider(x: torch.Tensor | None, value: Any) -> torch.Tensor | None:
        return None if x is None else torch.cat([torch.full((len(x), 2), value, dtype=x.dtype), x], 1)

    token = {"logp": -math.inf, "mask": False, "kl_ref": math.nan, "collision": math.inf}
    anchors = {k: wider(v, -math.inf) for k, v in scores.logp_ref.items()}
    columns = {k: wider(getattr(scores, k), v) for k, v in token.items()}
    return (
        dataclasses.replace(scores, logp_ref=anchors, **columns),
        dataclasses.replace(views, keep=wider(views.keep, True), diff=wider(views.diff, True)),
    )


def permuted(scores: TokenScores, views: Views, order: torch.Tensor) -> tuple[TokenScores, Views]:
    """Rows in another order, and index views that point at where they went."""
    to = torch.empty_like(order)
    to[order] = torch.arange(len(order))
    index = {k: torch.where(getattr(views, k) >= 0, to[getattr(views, k).clamp(min=0)], -1) for k in ("pairs", "groups", "gold", "unpaired")}
    rows = {k: getattr(views, k)[order] for k in ("score", "label", "keep", "diff")}
    columns = {k: getattr(scores, k)[order] for k in ("logp", "mask", "kl_ref", "collision", "value")}
    anchors = {k: v[order] for k, v in scores.logp_ref.items()}
    return dataclasses.replace(scores, logp_ref=anchors, **columns), dataclasses.replace(views, **index, **rows)


def items(views: Views, keep: slice) -> Views:
    """Part of the items, all rows."""
    part = {k: None if (x := getattr(views, k)) is None else x[keep] for k in ("pairs", "gold", "q", "weight")}
    part |= {"groups": views.groups[keep], "unpaired": views.unpaired[keep]}
    return dataclasses.replace(views, **part)


@pytest.mark.parametrize("method_id", LOSSES)
@pytest.mark.check("invariance")
def test_padding_order_and_micro_batches_change_nothing(method_id: str, random_batch: Any, fitting: Any) -> None:
    method = LOSSES[method_id].value
    scores, views = fitting(method_id, *random_batch(11))
    value, grad = value_and_gradient(method, scores, views)
    wide, wide_grad = value_and_gradient(method, *padded(scores, views))
    torch.testing.assert_close(wide, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wide_grad[:, 2:], grad, rtol=1e-10, atol=1e-12)
    assert not wide_grad[:, :2].any()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(method(*permuted(scores, views, order)), value, rtol=1e-12, atol=1e-12)
    assert method.coupled == (method_id in ("kto", "aot", "aot/unpaired"))
    if not method.coupled:
        parts = [method(scores, items(views, part)) for part in (slice(0, 1), slice(1, None))]
        torch.testing.assert_close(torch.cat(parts), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method_id", [k for k in LOSSES if not k.startswith("aot")])
def test_weights_multiply_items(method_id: str, random_batch: Any, fitting: Any) -> None:
    scores, views = fitting(method_id, *random_batch(12))
    value = LOSSES[method_id].value(scores, views)
    weight = torch.linspace(0.0, 2.0, len(value), dtype=F64)
    torch.testing.assert_close(LOSSES[method_id].value(scores, dataclasses.replace(views, weight=weight)), weight * value)


def test_weights_of_tokens(random_batch: Any) -> None:
    """Zeros and ones leave tokens out (a segment loss); anything else scales their log-ratios."""
    scores, views = random_batch(15)
    weighted = Pairwise(diff=Difference(Score(tokens="weighted")))
    first = scores.mask & (torch.arange(4) < 2)
    torch.testing.assert_close(weighted(scores, dataclasses.replace(views, c=first.double())), DPO(dataclasses.replace(scores, mask=first), views))
    doubled = weighted(scores, dataclasses.replace(views, c=torch.full((B, 4), 2.0, dtype=F64)))
    torch.testing.assert_close(doubled, Pairwise(beta=0.2)(scores, views))
    with pytest.raises(ValueError, match=r"views\.c"):
        weighted(scores, views)


def test_rows_of_sums_give_the_same_scores(random_batch: Any) -> None:
    """A row of which only the sum is known has one token and a length."""
    scores, views = random_batch(13)
    sums_ = TokenScores(
        scores.sums()[:, None], torch.ones(B, 1, dtype=torch.bool), {k: scores.sums(v)[:, None] for k, v in scores.logp_ref.items()},
        length=scores.mask.sum(1),
    )  # fmt: skip
    for method_id in ("dpo", "ln-dpo", "simpo", "orpo", "mipo", "ipo"):
        torch.testing.assert_close(LOSSES[method_id].value(sums_, views), LOSSES[method_id].value(scores, views))


@pytest.mark.parametrize("method_id", LOSSES)
def test_hundreds_of_nats_in_float32(method_id: str, random_batch: Any, fitting: Any) -> None:
    """Losses and gradients stay finite."""
    scores, views = fitting(method_id, *random_batch(14))
    big = {"logp": scores.logp.float() * 150, "logp_ref": {k: v.float() * 150 for k, v in scores.logp_ref.items()}}
    columns = {k: getattr(scores, k).float() for k in ("kl_ref", "collision", "value", "mismatched")}
    data = {k: getattr(views, k).float() for k in ("q", "score")}
    value, grad = value_and_gradient(LOSSES[method_id].value, dataclasses.replace(scores, **big, **columns), dataclasses.replace(views, **data))
    assert value.dtype == torch.float32 and torch.isfinite(value).all() and torch.isfinite(grad).all()


# -- bad input -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", LOSSES)
@pytest.mark.check("bad_input")
def test_missing_and_misshapen_columns_are_named(method_id: str, random_batch: Any, fitting: Any) -> None:
    method = LOSSES[method_id].value
    scores, views = fitting(method_id, *random_batch())
    for name in method.needs:
        anchor = name.partition(".")[2]
        if anchor:
            rest = {k: v for k, v in scores.logp_ref.items() if k != anchor}
            with pytest.raises(ValueError, match=f"anchor '{anchor}'"):
                method(dataclasses.replace(scores, logp_ref=rest), views)
        elif hasattr(scores, name):
            with pytest.raises(ValueError, match=rf"scores\.{name}"):
                method(dataclasses.replace(scores, **{name: None}), views)
        else:
            with pytest.raises(ValueError, match=rf"views\.{name}"):
                method(scores, dataclasses.replace(views, **{name: None}))
    with pytest.raises(ValueError, match="the mask bool"):
        method(dataclasses.replace(scores, mask=scores.mask.float()), views)


def test_columns_of_a_wrong_shape(random_batch: Any) -> None:
    scores, views = random_batch()
    with pytest.raises(ValueError, match=r"pairs must be \(P, 2\)"):
        DPO(scores, dataclasses.replace(views, pairs=torch.arange(6).view(2, 3)))
    with pytest.raises(ValueError, match=r"one entry per row and token, shape \(12, 4\), got \(12, 3\)"):
        DPO(dataclasses.replace(scores, logp_ref={"ref": scores.logp[:, 1:]}), views)
    with pytest.raises(ValueError, match=r"views.q must have one entry per pair \(4\), got 3"):
        LOSSES["ipo/online"].value(scores, dataclasses.replace(views, q=views.q[:3]))
    with pytest.raises(ValueError, match=r"one entry per row \(12\), got 5"):
        LOSSES["exo"].value(scores, dataclasses.replace(views, score=views.score[:5]))
    with pytest.raises(ValueError, match="did you mean 'ref'"):
        Pairwise(diff=Difference(Score(anchors=(("reff", 1.0),))))(scores, views)
    with pytest.raises(ValueError, match="one reward per row"):
        LOSSES["exo"].value(scores, dataclasses.replace(views, score=torch.ones(B, 2)))
    with pytest.raises(ValueError, match="MODPO reads 2 rewards"):
        LOSSES["modpo"].value(scores, views)
    with pytest.raises(ValueError, match="a crossed pair is 4 rows"):
        LOSSES["iopo"].value(scores, dataclasses.replace(views, groups=torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="sorting breaks the pairs up"):
        LOSSES["aot"].value(scores, dataclasses.replace(views, weight=torch.ones(4)))
    with pytest.raises(ValueError, match="both kinds are compared"):
        LOSSES["aot/unpaired"].value(scores, dataclasses.replace(views, label=torch.ones(B, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Pairwise(beta=0.0), "beta must be > 0, got 0"),
        (lambda: of("dpo/cdpo", label=type(of("dpo/cdpo").label)(0.6)), "swap chosen and rejected"),
        (lambda: Score(psi="foward_kl"), "did you mean 'forward_kl'"),
        (lambda: Score(psi="odds"), "reduce='mean' and anchors"),
        (lambda: Squared(-1.0), "tau must be > 0"),
        (lambda: Pairwise(margin=OtherRewards((0.0, 0.5)), temperature=0.4), "sum to 0.9"),
        (lambda: of("iopo", terms=(NLL(),)), "a crossed pair has no label"),
        (lambda: of("wrpo", diff=type(of("wrpo").diff)(1.5)), r"in \[0, 1\], got 1.5"),
        (lambda: EXO(eps=0.0), "infinite"),
        (lambda: Listwise(loss=EXO(), view="pairs"), "EXO on pairs needs eps"),
        (lambda: of("pro", view="pairs"), "needs groups with scores"),
        (lambda: Listwise(view="lists"), "'groups' or 'pairs'"),
        (lambda: Pointwise(chosen_nll=1.0), "view='pairs'"),
        (lambda: Imitate(generator="chi"), "did you mean 'chi2'"),
        (lambda: KTO(desirable=0.0), "desirable must be > 0"),
        (lambda: Transport(eps=0.5), "wrong labels"),
        (lambda: dataclasses.replace(LOSSES["ipo/nash-md"].value.loss, price=(("ref", -1.0),)), "must be >= 0"),
        (lambda: dataclasses.replace(LOSSES["nash-mp"].value.loss, max_ratio=0.5), "max_ratio must be >= 1"),
        (lambda: type(LOSSES["tr-dpo"].value.reference)(0.0, 1), r"rate must lie in \(0, 1\]"),
        (lambda: type(LOSSES["apo-accelerated"].value.reference)(1.0), "diverges"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pairs": torch.tensor([[0, 12]])}, "rows 0 to 12, but there are rows 0 to 11"),
        ({"pairs": torch.tensor([[3, 3]])}, "a row with itself"),
        ({"groups": torch.tensor([[1, -1, -1]])}, "fewer than 2 rows"),
        ({"label": torch.ones(B)}, "label > 0"),
        ({"q": torch.tensor([1.2])}, r"\[0, 1\]"),
        ({"gold": torch.tensor([-1])}, "views.gold"),
    ],
)
def test_views_check(changes: dict[str, torch.Tensor], match: str, random_batch: Any) -> None:
    views = random_batch()[1]
    views.check(B)
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(views, **changes).check(B)


def test_environments_are_no_preference_data() -> None:
    from markovia.algos.presets import configure

    with pytest.raises(ValueError, match="dpo learns from preferences, not from the rewards of markovia/Sentiment-v0"):
        configure("dpo", "markovia/Sentiment-v0")
