"""What a natural-gradient step is made of: densities, their KL and Fisher metric, conjugate gradients."""

from __future__ import annotations

import math

import pytest
import torch

from markovia.agents.distributions import Categorical, FixedStdGaussian, Gaussian, MultiCategorical, SquashedGaussian, kl, with_params
from markovia.algos.on_policy.natural import conjugate_gradient

F64 = torch.float64


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
