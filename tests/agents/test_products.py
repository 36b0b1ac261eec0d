"""Products by oneDNN: the values and derivatives of torch's own, whatever the processor; where they are used and where not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from markovia.agents import products
from markovia.agents.products import Linear, Product, laid_out, linear, multiplies_bfloat16, use_products
from markovia.algos import compiled
from markovia.algos.compiled import Compiled, trace


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of float32 matrices goes to oneDNN."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "WORTHWHILE", 1)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_value_first_and_second_derivatives_are_those_of_a_product(everywhere: None) -> None:
    a, b = numbers(7, 5).requires_grad_(), numbers(3, 5).requires_grad_()
    found, wanted = [], []
    for product, out in ((Product.apply, found), (lambda a, b: a @ b.T, wanted)):
        y = product(a, b)
        grads = torch.autograd.grad(y.sin().sum(), (a, b), create_graph=True)
        out += [y, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (a, b))]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(9,), (2, 4), (1, 2, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_what_torchs_layer_does(everywhere: None, monkeypatch: pytest.MonkeyPatch, lead: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 3, bias=bias)
    x = numbers(*lead, 5).requires_grad_()
    wanted = plain(x)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), (x, *plain.parameters()))
    names = list(plain.state_dict())
    use_products(plain)
    assert type(plain) is Linear and list(plain.state_dict()) == names
    calls: list[int] = []
    apply = Product.apply
    monkeypatch.setattr(Product, "apply", lambda *args: calls.append(1) or apply(*args))
    found = plain(x)
    assert calls == [1]
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found.square().sum(), (x, *plain.parameters())), wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_other_precisions_and_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(products.Product, "apply", lambda *args: calls.append(1))
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    w = numbers(256, 256)
    linear(numbers(8, 256), w)  # 2^19 multiplications
    linear(numbers(1, 64 * 256), numbers(256, 64 * 256))  # a vector
    linear(numbers(64, 256).double(), w.double())
    with torch.autocast("cpu", torch.bfloat16):
        linear(numbers(64, 256), w)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    linear(numbers(64, 256), w)
    assert not calls


def test_a_compiled_update_uses_them_and_gives_the_same(everywhere: None) -> None:
    @torch.enable_grad()
    def update(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stack: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w, s = weight.detach().requires_grad_(), stack.detach().requires_grad_()
        hidden = F.linear(x, w, bias).relu()
        out = torch.baddbmm(bias[None, None], hidden.expand(2, -1, -1), s).tanh()
        return torch.autograd.grad(out.square().sum(), (w, s))

    args = [numbers(6, 4), numbers(5, 4), numbers(5), numbers(2, 5, 5)]
    graph, used = trace(update, args)
    compiled.use_products(graph)
    targets = [n.target for n in graph.graph.nodes]
    # forward 1 + 2; the gradients of w 1, of the stack 2 and of the hidden layer 2
    assert targets.count(torch.ops.markovia.product.default) == 8
    assert not {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default} & set(targets)
    wanted = update(*args)
    for found in (graph(*[args[i] for i in used]), Compiled(update, static=0)("one", args)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_laid_out_beforehand_give_the_same_numbers(bias: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Linear(40, 8, bias=bias))
    use_products(network)
    x = torch.randn(2, 3, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = network(x)
        with laid_out(network, 6):
            held = [m.packed is not None for m in network]
            found = network(x)
    assert held == [multiplies_bfloat16()] * 2 and torch.equal(found, wanted) and found.dtype == torch.bfloat16
    assert all(m.packed is None for m in network)
    with laid_out(network, 6):  # gradients and float32 need the weights themselves
        assert all(m.packed is None for m in network)
