"""The pure pieces of the on-policy loop: hand-computed values, finite differences, limit cases."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from markovia.agents.distributions import Categorical, kl
from markovia.agents.interface import Evaluation
from markovia.agents.records import Rollout
from markovia.algos.advantages import GAE, FrozenQ
from markovia.algos.on_policy.auxiliary import Ptx
from markovia.algos.on_policy.divergence import KL, FDivergence, absolute, k1, k2, k3
from markovia.algos.on_policy.entropy import EntropyAnchor
from markovia.algos.on_policy.loss import clip_fraction, policy_loss, value_error, weights
from markovia.algos.on_policy.method import Descent, DualAscent, NaturalGradient, OnPolicy
from markovia.algos.on_policy.references import EMA, HardReset
from markovia.algos.on_policy.schedules import AdaptiveKL
from markovia.algos.on_policy.surrogates import (
    Clip,
    Discovered,
    KLDrift,
    PolicyGradient,
    clip_drift,
    discovered_drift,
    drift_features,
    learnt_drift,
    tsallis_bregman,
)
from markovia.algos.on_policy.tokens import Steer, TopCov
from markovia.algos.statistics import explained_variance
from markovia.algos.systems import find

F64 = torch.float64


def tensor(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


# -- drifts ------------------------------------------------------------------------------------------------------------------------------

W1 = torch.randn(16, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
W2 = torch.randn(1, 16, generator=torch.Generator().manual_seed(2), dtype=F64)
DRIFTS = {
    "clip": lambda lr, a: clip_drift(lr, a, low=0.2, high=0.2),
    "discovered": lambda lr, a: discovered_drift(lr, a, alpha=2.0, beta=0.6),
    "learnt": lambda lr, a: learnt_drift(lr, a, w1=W1, w2=W2, clip=0.2),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_mirror_learning_conditions(name: str) -> None:
    drift = DRIFTS[name]
    lr = torch.linspace(-20, 20, 81, dtype=F64)
    for a in (-2.0, -0.3, 0.0, 0.5, 3.0):
        d = drift(lr, torch.full_like(lr, a))
        assert torch.isfinite(d).all() and (d >= 0).all()
    zero = torch.zeros(5, dtype=F64, requires_grad=True)
    at_zero = drift(zero, tensor(-2, -0.1, 0, 0.1, 2))
    at_zero.sum().backward()
    assert zero.grad is not None and torch.equal(zero.grad, torch.zeros(5, dtype=F64)) and torch.equal(at_zero, torch.zeros(5, dtype=F64))


@pytest.mark.parametrize("name", DRIFTS)
def test_drift_gradient_matches_finite_differences(name: str) -> None:
    lr = tensor(-1.0, -0.5, 0.35, 0.8, 1.3).requires_grad_()
    adv = tensor(1.0, -1.0, 2.0, -0.7, 0.4)
    assert torch.autograd.gradcheck(lambda x: DRIFTS[name](x, adv), lr, atol=1e-6)


@pytest.mark.check("value", "ppo", "ppo-rlhf")
def test_clip_is_the_pessimistic_minimum() -> None:
    lr = torch.linspace(-1, 1, 41, dtype=F64)
    for a in (-1.5, 0.7):
        adv = torch.full_like(lr, a)
        rho = lr.exp()
        expected = torch.minimum(rho * adv, rho.clamp(0.8, 1.2) * adv)
        torch.testing.assert_close(Clip(0.2)(lr, adv, None, torch.ones(())), expected)


def test_clip_gradient_is_zero_outside_on_the_improving_side_only() -> None:
    lr = tensor(math.log(1.3), math.log(0.7), math.log(1.3), math.log(0.7)).requires_grad_()
    Clip(0.2)(lr, tensor(1, -1, -1, 1), None, torch.ones(())).sum().backward()
    assert lr.grad is not None
    assert lr.grad[:2].tolist() == [0.0, 0.0] and (lr.grad[2:].abs() > 0.5).all()


@pytest.mark.check("limit", "ppo", "ddpo", "ppo-rlhf")
def test_wide_clip_is_the_policy_gradient() -> None:
    lr, adv = tensor(-1, 0.3, 1), tensor(1, -2, 0.5)
    torch.testing.assert_close(Clip(1e9)(lr, adv, None, torch.ones(())), PolicyGradient()(lr, adv, None, torch.ones(())))


@pytest.mark.check("value", "lpo-dpo-discovered")
def test_discovered_drift_by_hand() -> None:
    # A = 1, rho = 3: x = 2, 2 - 2 tanh(1); A = -1, lr = -1: x = 1, 1 - .6 tanh(1 / .6)
    value = discovered_drift(tensor(math.log(3), -1.0), tensor(1, -1), alpha=2.0, beta=0.6)
    assert value.tolist() == pytest.approx([2 - 2 * math.tanh(1), 1 - 0.6 * math.tanh(1 / 0.6)])


@pytest.mark.check("value", "lpo-dpo-discovered/lpo")
def test_drift_features_by_hand() -> None:
    x = drift_features(tensor(math.log(2)), tensor(3))
    l2 = math.log(2)
    assert x[0].tolist() == pytest.approx([l2, l2 * l2, -1, 1, 3 * l2, 3 * l2 * l2, -3, 3])


@pytest.mark.check("value", "mdpo-on/tsallis")
@pytest.mark.check("limit", "mdpo-on/tsallis")
def test_kl_drift_and_tsallis_limit() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(4, 5, generator=g, dtype=F64), torch.randn(4, 5, generator=g, dtype=F64)
    exact = kl(Categorical(p), Categorical(q))
    torch.testing.assert_close(tsallis_bregman(p, q, q=1.0), exact)
    torch.testing.assert_close(tsallis_bregman(p, q, q=1.0 + 1e-7), exact, rtol=1e-5, atol=1e-6)
    # q = 2 is the squared Euclidean distance: sum pi (pi - 1) - 2 pi (old - 1) + old (old - 1) = |pi - old|^2
    torch.testing.assert_close(tsallis_bregman(p, q, q=2.0), (p.softmax(-1) - q.softmax(-1)).square().sum(-1))
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        tsallis_bregman(p, q, q=3.0)
    assert KLDrift()(tensor(0.0), tensor(2.0), tensor(0.5), tensor(3.0)).item() == pytest.approx(2 - 1.5)
    assert Discovered()(tensor(0.0), tensor(2.0), None, tensor(1.0)).item() == 2.0


# -- divergence ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "ppo-rlhf")
def test_estimators_by_hand() -> None:
    d = tensor(math.log(2))
    assert k1(d).item() == pytest.approx(math.log(2))
    assert k2(d).item() == pytest.approx(0.5 * math.log(2) ** 2)
    assert k3(d).item() == pytest.approx(0.5 + math.log(2) - 1)


def test_expected_gradients_of_the_estimators_as_losses() -> None:
    """By enumeration: k2 gives grad KL(pi || ref), k3 gives grad KL(ref || pi), k1 gives 0."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(6, generator=g, dtype=F64, requires_grad=True)
    ref = torch.randn(6, generator=g, dtype=F64).log_softmax(-1)

    def grad(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits)[0]

    logp = logits.log_softmax(-1)
    p = logp.exp().detach()
    forward = grad((ref.exp() * (ref - logits.log_softmax(-1))).sum())
    reverse = grad((logits.softmax(-1) * (logits.log_softmax(-1) - ref)).sum())
    for estimator, expected in ((k1, torch.zeros(6, dtype=F64)), (k2, reverse), (k3, forward)):
        torch.testing.assert_close(grad((p * estimator(logits.log_softmax(-1) - ref)).sum()), expected, rtol=1e-10, atol=1e-12)


def test_divergence_refuses_the_useless_setting() -> None:
    with pytest.raises(ValueError, match="zero expected gradient"):
        KL(estimator="k1", place="loss")
    with pytest.raises(ValueError, match="beta"):
        KL(beta=-1.0)


# -- aggregation, values, settings --------------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert weights(mask, "token-mean")[0, 0] == 0.25
    assert weights(mask, "seq-mean-token-mean")[:, 0].tolist() == pytest.approx([1 / 6, 1 / 2])
    assert weights(mask, "seq-mean-token-sum")[:, 0].tolist() == [0.5, 0.5]
    assert (weights(mask, "seq-mean-token-mean")[~mask] == 0).all()
    with pytest.raises(ValueError, match="aggregation"):
        weights(mask, "mean")


class Scored:
    """An agent whose log-probabilities are given."""

    def __init__(self, logp: torch.Tensor) -> None:
        self.logp = logp

    def evaluate(self, part: Rollout, want: object) -> Evaluation:
        return Evaluation(logp=self.logp)


# Two rows, of two decisions and of one; what the mask leaves out is large on purpose.
SEQ_MASK = torch.tensor([[True, True, False], [True, False, False]])
SEQ_RATIO = torch.tensor([[2.0, 3.0, 1e9], [0.5, 1e9, 1e9]], dtype=F64).log()
SEQ_ADV = torch.tensor([[2.0, 2.0, 7.0], [-4.0, 7.0, 7.0]], dtype=F64)


def sequence_loss(log_ratio: torch.Tensor, surrogate: object, level: str = "sequence", aggregation: str = "seq-mean-token-mean") -> torch.Tensor:
    zeros = torch.zeros_like(SEQ_ADV)
    part = Rollout(zeros, zeros.long(), zeros, zeros, SEQ_MASK, SEQ_MASK, zeros, zeros > 0, columns={"adv": SEQ_ADV})
    method = OnPolicy(surrogate=surrogate, ratio_level=level, aggregation=aggregation, solver=Descent(unit="row"))  # type: ignore[arg-type]
    omega = weights(SEQ_MASK, aggregation).to(F64)
    return policy_loss(method, Scored(log_ratio), part, omega, torch.ones((), dtype=F64), False)[0]  # type: ignore[arg-type]


def test_sequence_ratio_by_hand() -> None:
    # rho = 2 * 3 = 6 and 0.5; rho A = 12 and -2; loss -(12 - 2) / 2. Clipped: min(12, 1.2 * 2) = 2.4, min(-2, 0.8 * -4) = -3.2.
    assert sequence_loss(SEQ_RATIO, PolicyGradient()).item() == pytest.approx(-5.0)
    assert sequence_loss(SEQ_RATIO, Clip(0.2)).item() == pytest.approx(-(2.4 - 3.2) / 2)
    # By token: (2 * 2 + 3 * 2) / 2 = 5 and -2.
    assert sequence_loss(SEQ_RATIO, PolicyGradient(), "token").item() == pytest.approx(-1.5)


def test_clip_fraction_is_that_of_the_surrogates_own_range() -> None:
    log_ratio, mask = torch.tensor([[0.95, 1.25], [1.35, 9.0]]).log(), torch.tensor([[True, True], [True, False]])
    # [0.8, 1.28] leaves out 1.35 of three; [0.9, 1.1] also 1.25; a row's ratio: 1.1875 in row 1, 1.35 in row 2, so one decision of three beyond 1.2.
    assert float(clip_fraction(OnPolicy(surrogate=Clip(0.2, 0.28)), log_ratio, mask)) == pytest.approx(1 / 3)
    assert float(clip_fraction(OnPolicy(surrogate=Clip(0.1)), log_ratio, mask)) == pytest.approx(2 / 3)
    by_row = OnPolicy(surrogate=Clip(0.2), ratio_level="sequence", aggregation="seq-mean-token-mean", solver=Descent(unit="row"))
    assert float(clip_fraction(by_row, log_ratio, mask)) == pytest.approx(1 / 3)


def test_gradient_of_the_sequence_ratio() -> None:
    # d loss / d logp_it = -rho_i A_i / B at every decision that counts: -12 / 2 and 2 / 2
    lr = SEQ_RATIO.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sequence_loss(lr, PolicyGradient()), lr)
    torch.testing.assert_close(grad, torch.tensor([[-6.0, -6.0, 0.0], [1.0, 0.0, 0.0]], dtype=F64))
    for surrogate in (PolicyGradient(), Clip(0.2), Clip(8.0), Discovered()):
        assert torch.autograd.gradcheck(lambda x, s=surrogate: sequence_loss(torch.where(SEQ_MASK, x, 0.0), s), lr, atol=1e-6)


def test_sequence_ratio_starts_with_the_gradient_of_summed_log_probs() -> None:
    lr = torch.zeros_like(SEQ_RATIO, requires_grad=True)
    (grad,) = torch.autograd.grad(sequence_loss(lr, Clip(0.2)), lr)
    (summed,) = torch.autograd.grad(sequence_loss(lr, PolicyGradient(), "token", "seq-mean-token-sum"), lr)
    torch.testing.assert_close(grad, summed, rtol=0, atol=0)


def test_value_error_by_hand() -> None:
    v, ret, old = tensor(3.0), tensor(0.0), tensor(1.0)
    assert value_error(v, ret, old, clip=None).item() == 4.5
    assert value_error(v, ret, old, clip=0.5).item() == 4.5  # the clipped error (1.5^2) is smaller: the larger one counts
    assert value_error(tensor(0.0), ret, old, clip=0.5).item() == pytest.approx(0.125)


def natural(**changes: Any) -> OnPolicy:
    return replace(find("trpo").value, **changes)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GAE(gamma=1.5), "gamma"),
        (lambda: Clip(clip=0.0), "clip"),
        (lambda: Descent(lr=0.0), "lr"),
        (lambda: Descent(epochs=0), "epochs"),
        (lambda: OnPolicy(num_envs=3, group_size=2), "multiple"),
        (lambda: OnPolicy(num_steps=0), "num_steps"),
        (lambda: OnPolicy(solver=NaturalGradient(), surrogate=KLDrift()), "natural-gradient"),
        (lambda: OnPolicy(solver=NaturalGradient(), surrogate=PolicyGradient()), "fit the critic"),
        (lambda: OnPolicy(controller=DualAscent()), "old_new"),
        (lambda: OnPolicy(ratio_level="sequence"), "one term per row"),
        (lambda: OnPolicy(ratio_level="sequence", aggregation="seq-mean-token-mean"), "sequence ratio is about whole rows.*solver.unit='row'"),
        (lambda: OnPolicy(aggregation="seq-mean-token-sum"), "aggregation='seq-mean-token-sum' is about whole rows"),
        (lambda: OnPolicy(anchor=EntropyAnchor()), "EntropyAnchor is about whole rows"),
        (lambda: natural(entropy_coef=0.01), "would not read entropy_coef=0.01"),
        (lambda: natural(divergence=KL(0.1, "k2", "loss")), "would not read a divergence with place='loss'"),
        (lambda: natural(anchor=EntropyAnchor()), "would not read anchor=EntropyAnchor"),
        (lambda: natural(tokens=Steer()), "would not read tokens=Steer"),
        (lambda: natural(aggregation="seq-mean-token-sum"), "would not read aggregation='seq-mean-token-sum'"),
        (lambda: natural(ratio_level="sequence", aggregation="seq-mean-token-mean"), "ratio_level='sequence', aggregation"),
        (lambda: natural(aux=Ptx()), "would not read aux=Ptx"),
        (lambda: OnPolicy(refresh=HardReset()), "HardReset moves the reference 'ref', which nothing here reads"),
        (lambda: OnPolicy(refresh=EMA(), divergence=KL(reference="teacher")), "EMA moves the reference 'ref'"),
        (lambda: OnPolicy(divergence=KL(0.1, "k2", "loss", reference="old", schedule=AdaptiveKL())), "to 'old' none is measured"),
        (lambda: KL(0.1, "exact", "loss", reference="teacher"), "to the reference 'ref', got reference='teacher'"),
        (lambda: KL(0.1, "exact", "loss", level="sequence"), "level='sequence'"),
        (lambda: OnPolicy(divergence=KL(0.1, "exact", "loss"), tokens=TopCov()), "TopCov selects terms of sampled tokens"),
        (lambda: OnPolicy(divergence=FDivergence(place="loss", level="token", sampler="reference")), "use sampler='policy'"),
        (lambda: OnPolicy(advantage=FrozenQ()), "give value.separate a Descent"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_explained_variance_by_hand():
    target, value = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[2.0, 3.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    # targets 1 and 3 have variance 1; errors 1 and 0 have mean square 1/2
    assert explained_variance(target, value, mask) == pytest.approx(0.5)
    assert explained_variance(target, target, mask) == 1.0
    assert math.isnan(explained_variance(torch.ones(1, 3), value, mask))


@pytest.mark.check("gradient", "kl-cov")
def test_absolute_difference_ignores_rounding() -> None:
    d = torch.tensor([-2.0, -1e-7, 0.0, 1e-7, 0.5], requires_grad=True)
    out = absolute(d)
    out.sum().backward()
    assert out.tolist() == [2.0, 0.0, 0.0, 0.0, 0.5] and d.grad is not None and d.grad.tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0]
