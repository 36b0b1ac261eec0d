"""The pure pieces of the on-policy loop: hand-computed values, finite differences, limit cases."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from markovia.agents.distributions import Categorical, FixedStdGaussian, Gaussian, MultiCategorical, SquashedGaussian, kl, with_params
from markovia.agents.interface import Evaluation
from markovia.agents.records import Rollout
from markovia.algos.advantages import GAE, FrozenQ, gae, leave_one_out, normalise
from markovia.algos.on_policy.auxiliary import Ptx
from markovia.algos.on_policy.divergence import KL, FDivergence, absolute, k1, k2, k3
from markovia.algos.on_policy.entropy import EntropyAnchor
from markovia.algos.on_policy.loss import clip_fraction, policy_loss, value_error, weights
from markovia.algos.on_policy.method import Descent, DualAscent, NaturalGradient, OnPolicy
from markovia.algos.on_policy.natural import conjugate_gradient
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


# -- advantages ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "a2c", "ppo")
def test_gae_by_hand() -> None:
    # gamma .5, lam .5, V = 1, 2; delta_1 = 3 - 2 = 1 (terminal), delta_0 = 1 + .5 * 2 - 1 = 1; A_0 = 1 + .25 * 1
    adv, ret = gae(tensor(1, 3)[None], tensor(1, 2)[None], tensor(1, 0)[None], torch.zeros(1, 2, dtype=torch.bool), None, gamma=0.5, lam=0.5)
    assert adv.tolist() == [[1.25, 1.0]]
    assert ret.tolist() == [[2.25, 3.0]]


def test_truncation_bootstraps_and_cuts_the_recursion() -> None:
    # step 0 is truncated: V(final) = 10 enters its target, step 1 (another episode) does not reach back
    trunc = torch.tensor([[True, True]])
    boot = tensor(10, 4)[None]
    adv, _ = gae(tensor(1, 1)[None], tensor(2, 3)[None], tensor(1, 1)[None], trunc, boot, gamma=0.5, lam=0.9)
    assert adv[0].tolist() == pytest.approx([1 + 5 - 2, 1 + 2 - 3])


def test_soft_termination_is_the_mean_over_coin_flips() -> None:
    rng = np.random.default_rng(0)
    T, gamma, lam = 4, 0.9, 0.8
    r, v, boot = (torch.tensor(rng.normal(size=(1, T))) for _ in range(3))
    keep = torch.tensor(rng.uniform(size=(1, T)))
    trunc = torch.zeros(1, T, dtype=torch.bool)
    trunc[0, -1] = True
    soft, _ = gae(r, v, keep, trunc, boot, gamma=gamma, lam=lam)
    mean = torch.zeros_like(soft)
    for flips in itertools.product([0.0, 1.0], repeat=T):
        c = torch.tensor(flips)[None].double()
        p = torch.where(c == 1, keep, 1 - keep).prod()
        hard, _ = gae(r, v, c, trunc, boot, gamma=gamma, lam=lam)
        mean += p * hard
    torch.testing.assert_close(soft, mean, rtol=1e-12, atol=1e-12)


def chain(value: list[float], mask: list[bool], reward: list[float], *, truncated: bool = False, boot: float = 0.0) -> Rollout:
    """One row whose steps all exist; it ends with the last one, or is cut there."""
    v, m = tensor(*value)[None], torch.tensor([mask])
    last = torch.arange(len(value))[None] == len(value) - 1
    ends, flat = (last & truncated), torch.zeros_like(v)
    return Rollout(
        flat, flat, flat, tensor(*reward)[None], torch.ones_like(m), m, (~last | truncated).double(), ends, value=v[..., None],
        boot_value=torch.where(ends, boot, 0.0).double()[..., None],
    )  # fmt: skip


@pytest.mark.check("value", "a2c", "ppo")
def test_gae_goes_over_steps_that_do_not_count_by_hand() -> None:
    # the last step of a chain, its noise 0, pays 2: d_1 = 2 - .5, d_0 = .5 - 1, whatever the critic says there
    chained = chain([1, 0.5, 99], [True, True, False], [0, 0, 2])
    for lam, expected in ((0.0, [-0.5, 1.5]), (0.5, [-0.5 + 0.5 * 1.5, 1.5]), (1.0, [1.0, 1.5])):
        adv, ret = GAE(1.0, lam)(chained.reward, chained, {})
        assert adv[0, :2].tolist() == expected and ret[0, :2].tolist() == [1 + expected[0], 2.0]
    # in the middle, gamma .5 and lam .5: V_1 = .5 + .5 * 3 = 2, d_0 = .5 * 2 - 1 = 0, A_1 = .5 A_2 (lam is not applied twice)
    adv, _ = GAE(0.5, 0.5)((middle := chain([1, 99, 3], [True, False, True], [0, 0.5, 2])).reward, middle, {})
    assert adv[0, [0, 2]].tolist() == [0.5 * 0.5 * 0.5 * (2 - 3), -1.0]
    # cut behind it: the value of the final observation is what it leads to, 1 + .5 (2 + .5 * 4) - 1
    cut = chain([1, 99], [True, False], [1, 2], truncated=True, boot=4.0)
    assert GAE(0.5, 0.5)(cut.reward, cut, {})[0][0, 0] == 2.0
    q, _ = FrozenQ(lam=0.0)(chained.reward, chained, {})
    assert q[0, :2].tolist() == [0.5, 2.0]


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_values_of_steps_that_do_not_count_are_not_read(lam: float) -> None:
    rng = np.random.default_rng(1)
    mask = [True, False, True, True, False, False, True, False]
    value, reward = rng.normal(size=8), rng.normal(size=8).tolist()
    shifted = np.where(mask, value, value + 7.0)
    counted = [chain(v.tolist(), mask, reward, truncated=True, boot=0.3) for v in (value, shifted)]
    (adv, ret), (again, ret_again) = (GAE(0.9, lam)(r.reward, r, {}) for r in counted)
    assert torch.equal(adv[counted[0].mask], again[counted[0].mask]) and torch.equal(ret[counted[0].mask], ret_again[counted[0].mask])
    # where every step counts the old numbers come out to the last bit
    whole = chain(value.tolist(), [True] * 8, reward, truncated=True, boot=0.3)
    plain = gae(
        whole.reward, whole.value[..., 0], whole.continuation, whole.truncated, whole.boot_value[..., 0], gamma=0.9, lam=lam  # type: ignore[index]
    )
    assert all(torch.equal(a, b) for a, b in zip(GAE(0.9, lam)(whole.reward, whole, {}), plain, strict=True))


@pytest.mark.check("value", "rloo")
def test_leave_one_out_by_hand_and_against_the_group_mean() -> None:
    returns, group = tensor(1, 2, 6, 0, 4), torch.tensor([0, 0, 0, 7, 7])
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2, 0 - 4, 4 - 0
    assert leave_one_out(returns, group).tolist() == [-3.0, -1.5, 4.5, -4.0, 4.0]
    centred = returns[:3] - returns[:3].mean()
    torch.testing.assert_close(leave_one_out(returns, group)[:3], centred * 3 / 2)
    with pytest.raises(ValueError, match="at least 2 responses"):
        leave_one_out(returns, torch.arange(5))


def test_normalise_uses_the_mask_and_leaves_single_decisions() -> None:
    adv, mask = tensor(1, 3, 100)[None], torch.tensor([[True, True, False]])
    assert normalise(adv, mask)[0, :2].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    one = torch.tensor([[True, False, False]])
    assert normalise(adv, one)[0, 0] == 1.0


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


# -- distributions and natural gradient ----------------------------------------------------------------------------------------------------


def dists() -> dict[str, tuple]:
    g = torch.Generator().manual_seed(5)

    def r(*s: int) -> torch.Tensor:
        return torch.randn(*s, generator=g, dtype=F64)

    return {
        "gaussian": (Gaussian(r(7, 3), 0.3 * r(7, 3)), Gaussian(r(7, 3), 0.3 * r(7, 3))),
        "squashed": (SquashedGaussian(r(7, 3), 0.3 * r(7, 3)), SquashedGaussian(r(7, 3), 0.3 * r(7, 3))),
        "categorical": (Categorical(r(7, 4)), Categorical(r(7, 4))),
        "multi": (MultiCategorical(r(7, 5), (2, 3)), MultiCategorical(r(7, 5), (2, 3))),
        "fixed": (FixedStdGaussian(r(7, 2), torch.full((7,), 0.4, dtype=F64)), FixedStdGaussian(r(7, 2), torch.full((7,), 0.4, dtype=F64))),
    }


@pytest.mark.parametrize("name", dists())
def test_kl_and_entropy_against_sampling(name: str) -> None:
    p, q = dists()[name]
    g = torch.Generator().manual_seed(0)
    n = 20_000
    big = with_params(p, {k: v[:1].expand(n, *v.shape[1:]) for k, v in p.params().items()})
    other = with_params(q, {k: v[:1].expand(n, *v.shape[1:]) for k, v in q.params().items()})
    a = big.sample(g)
    logp = big.log_prob(a)
    estimates = [(logp - other.log_prob(a), kl(p, q)[0])]
    if name != "squashed":  # whose entropy has no closed form; `entropy` is that before the squash
        estimates.append((-logp, p.entropy()[0]))
    for sample, exact in estimates:
        assert float(sample.mean() - exact) == pytest.approx(0.0, abs=5 * float(sample.std()) / math.sqrt(n))


def test_squashed_density_integrates_to_one() -> None:
    u = torch.linspace(-6, 6, 20001, dtype=F64)[:, None]
    dist = SquashedGaussian(torch.full_like(u, 0.3), torch.full_like(u, -0.5))
    a = torch.tanh(u).squeeze(1)
    assert float(torch.trapezoid(dist.log_prob(u).exp(), a)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", dists())
def test_fisher_metric_is_the_hessian_of_the_kl(name: str) -> None:
    p, _ = dists()[name]
    params = {k: v[0].clone() for k, v in p.params().items() if k != "std"}
    fixed = {k: v[0] for k, v in p.params().items() if k == "std"}
    names = sorted(params)
    sizes = [params[k].numel() for k in names]

    def value(flat: torch.Tensor) -> torch.Tensor:
        new = dict(zip(names, flat.split(sizes), strict=True)) | fixed
        return kl(with_params(p, {k: v[0] for k, v in p.params().items()}), with_params(p, new))

    start = torch.cat([params[k] for k in names])
    hessian = torch.autograd.functional.hessian(value, start)
    g = torch.Generator().manual_seed(9)
    v = torch.randn(len(start), generator=g, dtype=F64)
    one = with_params(p, {k: t[0] for k, t in p.params().items()})
    tangent = dict(zip(names, v.split(sizes), strict=True)) | {k: torch.zeros_like(t) for k, t in fixed.items()}
    out = one.fisher(tangent)
    torch.testing.assert_close(torch.cat([out[k] for k in names]), hessian @ v, rtol=1e-8, atol=1e-10)


def test_kl_refuses_two_kinds() -> None:
    with pytest.raises(ValueError, match="one kind"):
        kl(dists()["gaussian"][0], dists()["categorical"][0])


def test_conjugate_gradient_solves_well_conditioned_systems_and_needs_more_for_others() -> None:
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(50, 50, generator=g, dtype=F64))
    b = torch.randn(50, generator=g, dtype=F64)
    easy = basis @ torch.diag(torch.linspace(1, 4, 50, dtype=F64)) @ basis.T
    x = conjugate_gradient(lambda v: easy @ v, b, iterations=15, tolerance=0.0)
    exact = torch.linalg.solve(easy, b)
    assert float((x - exact).norm() / exact.norm()) < 1e-6
    hard = basis @ torch.diag(torch.logspace(0, math.log10(180), 50, dtype=F64)) @ basis.T
    x = conjugate_gradient(lambda v: hard @ v, b, iterations=15, tolerance=0.0)
    exact = torch.linalg.solve(hard, b)
    assert float((x - exact).norm() / exact.norm()) > 1e-4


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
