"""The losses that TRL has too, on the same log-probs: TRL's own `_compute_loss` runs on a stub model, ours after the documented conversions.

TRL's beta is tau for ipo and lam for orpo; its ipo divides by length; sppo_hard is the sum of two squares (ours the mean); its alpha coefficient is
1 - alpha; its label_smoothing is a flip rate; WPO's weight is not clamped.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from markovia.agents.records import Views
from markovia.algos.preference.listwise import EXO
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.pairwise import Difference, Pairwise, Squared
from markovia.algos.preference.pieces import NLL, Debiased, OnPolicyWeight, Smoothed
from markovia.algos.preference.scores import Score, TokenScores
from markovia.algos.preference.token_level import log_collision
from markovia.algos.preference.unpaired import KTO, Pointwise, Transport, WinRate

pytest.importorskip("trl")
torch.set_num_threads(1)

P, T, V = 5, 6, 7  # pairs, tokens of the longest response, vocabulary; row order [chosen; rejected] and one prompt token, as TRL has it
ROWS = 2 * P


def data(seed: int = 0, rows: int = ROWS) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, T + 1, (rows, 1), generator=g)
    mask = torch.arange(T) < length
    logits, logits_ref = (torch.randn(rows, T, V, generator=g) for _ in range(2))
    tokens = torch.randint(V, (rows, T), generator=g)

    def taken(x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(x, -1).gather(2, tokens[..., None]).squeeze(2) * mask

    return {"mask": mask, "logits": logits, "tokens": tokens, "logp": taken(logits), "ref": taken(logits_ref), "collision": log_collision(logits)}


def ours(d: dict[str, torch.Tensor], logp: torch.Tensor) -> TokenScores:
    return TokenScores(logp, d["mask"], {"ref": d["ref"]}, collision=d["collision"])


VIEWS = Views(pairs=torch.stack([torch.arange(P), torch.arange(P) + P], 1))


class Anything:
    """What a trainer asks of its accelerator: everything stays as it is."""

    device = torch.device("cpu")

    def gather_for_metrics(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather = gather_for_metrics


def trainer(**attributes: Any) -> SimpleNamespace:
    """The attributes that TRL's losses read, without a model, a tokenizer or a data set."""
    common = {
        "model": SimpleNamespace(training=True), "accelerator": Anything(), "aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": True,
        "_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1, "args": SimpleNamespace(discopop_tau=0.05),
    }  # fmt: skip
    return SimpleNamespace(**common, **attributes)


def inputs(d: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One prompt token in front of every response."""
    completion = torch.nn.functional.pad(d["mask"].long(), (1, 0))
    return {
        "input_ids": torch.nn.functional.pad(d["tokens"], (1, 0)), "attention_mask": torch.nn.functional.pad(d["mask"].long(), (1, 0), value=1),
        "completion_mask": completion,
    }  # fmt: skip


def outputs(d: dict[str, torch.Tensor], logp: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros(d["mask"].shape)
    return SimpleNamespace(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0, log_sum_sq_probs=d["collision"])


def trl_dpo(d: dict[str, torch.Tensor], logp: torch.Tensor, loss_type: str, **settings: Any) -> torch.Tensor:
    from trl import DPOTrainer

    options = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False}
    me = trainer(loss_types=[loss_type], loss_weights=[1.0], **{**options, **settings})
    ref_w, ref_l = d["ref"].sum(1).chunk(2)
    batch = {**inputs(d), "ref_chosen_logps": ref_w, "ref_rejected_logps": ref_l}
    return DPOTrainer._compute_loss(me, lambda **_: outputs(d, logp), batch, False)


def same(ours_: Any, d: dict[str, torch.Tensor], theirs: Any, views: Views = VIEWS, factor: float = 1.0) -> None:
    """Loss and gradient in the log-probs."""
    leaf = d["logp"].clone().requires_grad_()
    a, b = factor * ours_(ours(d, leaf), views).mean(), theirs(d, leaf)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    ga, gb = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (a, b))
    torch.testing.assert_close(ga, gb * d["mask"], rtol=1e-5, atol=1e-6)


def row(method_id: str, **changes: Any) -> Any:
    return dataclasses.replace(PREFERENCE[method_id].value.loss, **changes)


MEAN = Difference(Score("mean"))
DPO_CASES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "sigmoid": (row("dpo"), {}, 1.0),
    "sigmoid_norm": (row("ln-dpo", beta=0.1), {}, 1.0),
    "hinge": (row("slic/hinge-norm", beta=0.1), {}, 1.0),
    "ipo": (Pairwise(1.0, MEAN, Squared(0.1)), {}, 1.0),
    "exo_pair": (row("exo/pair", loss=EXO(eps=0.02)), {"label_smoothing": 0.02}, 1.0),
    "nca_pair": (row("nca/pair", beta=0.1), {}, 1.0),
    "robust": (Pairwise(0.1, label=Debiased(0.1)), {"label_smoothing": 0.1}, 1.0),
    "sppo_hard": (row("sppo/hard", point=WinRate(10.0, hard=True), score=Score()), {}, 2.0),
    "aot": (Transport(0.1, eps=0.05), {"label_smoothing": 0.05}, 1.0),
}


@pytest.mark.parametrize("loss_type", DPO_CASES)
def test_dpo_trainer(loss_type: str) -> None:
    loss, settings, factor = DPO_CASES[loss_type]
    same(loss, data(), lambda d, logp: trl_dpo(d, logp, loss_type, **settings), factor=factor)


def test_aot_unpaired() -> None:
    views = Views(unpaired=torch.arange(ROWS), label=torch.arange(ROWS) < P)
    same(Transport(0.1, view="unpaired"), data(1), lambda d, logp: trl_dpo(d, logp, "aot_unpaired"), views)


@pytest.mark.parametrize(
    ("method_id", "name", "alpha"),
    [("f-dpo", "js_divergence", 0.5), ("f-dpo/forward-kl", "forward_kl", 0.5), ("f-dpo/alpha", "alpha_divergence", 0.3), ("dpo", "reverse_kl", 0.5)],
)
def test_divergences(method_id: str, name: str, alpha: float) -> None:
    changes = {"diff": Difference(Score(psi="alpha", alpha=alpha))} if name == "alpha_divergence" else {}
    settings = {"f_divergence_type": name, "f_alpha_divergence_coef": 1.0 - alpha}
    same(row(method_id, **changes), data(2), lambda d, logp: trl_dpo(d, logp, "sigmoid", **settings))


def test_wpo_without_clamp() -> None:
    """TRL's weight holds the policy fixed too, but the collision is its own."""
    same(row("wpo", beta=0.1, weight=OnPolicyWeight(float("inf"))), data(3), lambda d, logp: trl_dpo(d, logp, "sigmoid", use_weighting=True))


def test_sft_is_a_mean_over_all_chosen_tokens() -> None:
    """Ours is a mean over rows: weighted by their lengths the two agree."""
    d = data(4)
    length = d["mask"][:P].sum(1)
    nll = NLL(1.0)(ours(d, d["logp"]), VIEWS)
    torch.testing.assert_close((nll * length).sum() / length.sum(), trl_dpo(d, d["logp"], "sft"), rtol=1e-6, atol=1e-6)


def test_kto() -> None:
    from trl import KTOTrainer

    d, other = data(5), data(6)
    label = torch.arange(ROWS) % 3 > 0
    me = trainer(beta=0.1, loss_type="kto", calculate_KL=True, desirable_weight=1.2, undesirable_weight=0.9)
    me._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(me, model, batch)
    batch = {
        **inputs(d), **{f"KL_{k}": v for k, v in inputs(other).items()}, "label": label,
        "ref_logps": d["ref"].sum(1), "ref_KL_logps": other["ref"].sum(1),
    }  # fmt: skip

    def theirs(d: dict[str, torch.Tensor], logp: torch.Tensor) -> torch.Tensor:
        def model(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            return outputs(other, other["logp"]) if torch.equal(input_ids, batch["KL_input_ids"]) else outputs(d, logp)

        return KTOTrainer._compute_loss(me, model, batch, False)

    def loss(scores: TokenScores, views: Views) -> torch.Tensor:
        scores.mismatched = (other["logp"] - other["ref"]).sum(1)
        return Pointwise(KTO(0.1, 1.2, 0.9))(scores, views)

    same(loss, d, theirs, Views(unpaired=torch.arange(ROWS), label=label))


@pytest.mark.parametrize(
    ("method_id", "settings"),
    [
        ("simpo", {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.375, "alpha": 0.0}),
        ("alpha-po", {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25}),
    ],
)
def test_cpo_trainer_on_mean_log_probs(method_id: str, settings: dict[str, Any]) -> None:
    from trl.experimental.cpo import CPOTrainer

    def theirs(d: dict[str, torch.Tensor], logp: torch.Tensor) -> torch.Tensor:
        mean = logp.sum(1) / d["mask"].sum(1)
        return CPOTrainer.cpo_loss(trainer(label_smoothing=0.0, **settings), *mean.chunk(2))[0].mean()

    same(row(method_id), data(7), theirs)


def test_cpo() -> None:
    """Sums without reference and with label smoothing; its likelihood term is apart in TRL."""
    from trl.experimental.cpo import CPOTrainer

    def theirs(d: dict[str, torch.Tensor], logp: torch.Tensor) -> torch.Tensor:
        me = trainer(label_smoothing=0.1, loss_type="sigmoid", beta=0.1, alpha=0.0)
        return CPOTrainer.cpo_loss(me, *logp.sum(1).chunk(2))[0].mean()

    same(Pairwise(0.1, Difference(Score(anchors=())), label=Smoothed(0.1)), data(8), theirs)


def test_orpo_odds_term() -> None:
    """TRL's beta is the coefficient; its likelihood term is a mean over the batch's prompt and response tokens, so the odds are compared alone."""
    from trl.experimental.orpo import ORPOTrainer

    def theirs(d: dict[str, torch.Tensor], logp: torch.Tensor) -> torch.Tensor:
        mean = logp.sum(1) / d["mask"].sum(1)
        return -ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), *mean.chunk(2))[0].mean()

    same(row("orpo", terms=()), data(9), theirs)


@pytest.mark.parametrize(("method_id", "loss_type"), [("tpo", "sigmoid"), ("tpo/length", "tpo-l")])
def test_tpo(method_id: str, loss_type: str) -> None:
    """The gold term is a mean over the gold rows' tokens in TRL; with gold rows of one length a mean of row means is the same."""
    from trl.experimental.tpo import TPOTrainer

    d = data(10, 3 * P)
    d["mask"][2 * P :] = torch.arange(T) < 4
    d["logp"] = torch.log_softmax(d["logits"], -1).gather(2, d["tokens"][..., None]).squeeze(2) * d["mask"]
    d["ref"] = d["logp"]
    views = dataclasses.replace(VIEWS, gold=torch.arange(P) + 2 * P)
    me = trainer(beta=0.01, loss_type=loss_type, tpo_alpha=1.0, label_smoothing=0.0, tpo_l_gamma=0.5)
    logits = torch.nn.functional.pad(d["logits"], (0, 0, 0, 1))  # the last position predicts nothing
    theirs = TPOTrainer._compute_loss(me, lambda **_: SimpleNamespace(logits=logits), inputs(d), False)
    torch.testing.assert_close(row(method_id)(ours(d, d["logp"]), views).mean(), theirs, rtol=1e-6, atol=1e-6)
