"""Log-probs from hidden states: values, gradients and memory against the plain log-softmax."""

import pytest
import torch
from torch import nn

from markovia.agents import selective
from markovia.agents.selective import plain_head, selective_logp

N, D, V = 7, 5, 11


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g, dtype=dtype), torch.randn(V, D, generator=g, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,), generator=g), torch.randn(N, generator=g)


def plain(hidden, weight, token, temperature):
    return ((hidden @ weight.T).float() / temperature).log_softmax(-1)[torch.arange(N), token]


def test_by_hand():
    # Two tokens with logits 0 and ln 3 / 0.5 at temperature 2: p = (1/4, 3/4) after halving ln 9.
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [torch.log(torch.tensor(9.0))]])
    assert float(selective_logp(hidden, weight, torch.tensor([1]), 2.0).exp()) == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("piece", [1, 3 * V, 2**19])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_log_softmax(monkeypatch, temperature, piece):
    monkeypatch.setattr(selective, "PIECE", piece)
    hidden, weight, token, g = inputs()
    out, wanted = selective_logp(hidden, weight, token, temperature), plain(hidden, weight, token, temperature)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    for a, b in zip(torch.autograd.grad(out, (hidden, weight), g), torch.autograd.grad(wanted, (hidden, weight), g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_only_what_is_asked_for_is_computed():
    hidden, weight, token, g = inputs(torch.float32)
    wanted = torch.autograd.grad(plain(hidden, weight, token, 1.0), (hidden, weight), g)
    for i, frozen in enumerate(((hidden, weight.detach()), (hidden.detach(), weight))):
        (found,) = torch.autograd.grad(selective_logp(*frozen, token), frozen[i], g)
        torch.testing.assert_close(found, wanted[i], rtol=0, atol=1e-5)
    silent = selective_logp(hidden.detach(), weight.detach(), token)
    assert not silent.requires_grad and torch.allclose(silent, plain(hidden, weight, token, 1.0), atol=1e-6)


def test_bfloat16_autocast_rounds_the_product_and_nothing_else():
    hidden, weight, token, g = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = selective_logp(hidden, weight, token), plain(hidden, weight, token, 1.0)
    assert out.dtype == torch.float32 and torch.equal(out, wanted)
    found, other = (torch.autograd.grad(x, (hidden, weight), g) for x in (out, wanted))
    for a, b in zip(found, other, strict=True):
        assert a.dtype == torch.float32 and float((a - b).norm() / b.norm()) < 0.01


def test_a_sure_token_keeps_its_small_gradient_in_bfloat16():
    """softmax - 1 is taken before rounding: at p = 1 - 1e-4 the gradient is 1e-4, below what bfloat16 tells from 1."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = selective_logp(hidden, torch.tensor([[9.25], [0.0]]), torch.tensor([0]))
    (grad,) = torch.autograd.grad(out.sum(), hidden)
    p_other = 1.0 / (1.0 + torch.tensor(9.25).exp())
    assert float(grad) == pytest.approx(9.25 * float(p_other), rel=0.01)


def test_twice_is_refused():
    hidden, weight, token, _ = inputs()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(selective_logp(hidden, weight, token).sum(), hidden, create_graph=True)


def test_which_heads_are_a_plain_product():
    assert plain_head(nn.Linear(3, 4, bias=False)) and not plain_head(nn.Linear(3, 4)) and not plain_head(nn.Identity())
    hooked = nn.Linear(3, 4, bias=False)
    hooked.register_forward_hook(lambda *_: None)
    assert not plain_head(hooked)
    replaced = nn.Linear(3, 4, bias=False)
    replaced.forward = lambda x: 2.0 * nn.Linear.forward(replaced, x)
    assert not plain_head(replaced)
