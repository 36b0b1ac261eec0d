"""Products of float32 matrices on the CPU by the library that is fastest there.

torch hands them to its BLAS. MKL keeps to AVX2 on processors that are not Intel's, while oneDNN, which torch carries as well, uses AVX-512
wherever it is found: 100 against 220 GFLOP/s a core on an EPYC of 2024, the same float32 arithmetic in another order. Small products stay with
BLAS, whose calls cost less.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTHWHILE = 2**21  # multiplications from which oneDNN repays its call


@functools.cache
def onednn_is_faster() -> bool:
    """Whether torch's BLAS is MKL, on a processor with AVX-512 that is not Intel's."""
    cpu = Path("/proc/cpuinfo")
    maker = cpu.read_text() if cpu.exists() else platform.processor()
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in maker


def worthwhile(m: int, k: int, n: int) -> bool:
    """Whether a product (m, k) x (k, n) of float32 on the CPU is one for oneDNN here."""
    return m * k * n >= WORTHWHILE and min(m, k, n) > 1 and onednn_is_faster()


_library = torch.library.Library("markovia", "DEF")
_library.define("product(Tensor a, Tensor b) -> Tensor")


@functools.partial(_library.impl, "product", dispatch_key="CPU")
def _on_cpu(a: Tensor, b: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
    return out


@functools.partial(_library.impl, "product", dispatch_key="Meta")
def _on_meta(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


class Product(torch.autograd.Function):
    """a (m, k), b (n, k) -> a b^T (m, n), by oneDNN; every derivative of it is such a product again."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = torch.ops.markovia.product.default(a, b)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), (grad,) = ctx.saved_tensors, grads
        to_a = Product.apply(grad, b.t()) if ctx.needs_input_grad[0] else None
        to_b = Product.apply(grad.t(), a.t()) if ctx.needs_input_grad[1] else None
        return to_a, to_b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k), weight (n, k), bias (n,) -> x weight^T + bias (..., n), as torch.nn.functional.linear."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if not plain or not worthwhile(x[..., 0].numel(), *weight.shape):
        return F.linear(x, weight, bias)
    out: Tensor = Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def multiplies_bfloat16() -> bool:
    """Whether oneDNN is there and this processor multiplies in bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`, or with a weight that was laid out beforehand for many products: see `laid_out`."""

    packed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is None:
            return linear(input, self.weight, self.bias)
        x = input.flatten(0, -2).to(self.packed.dtype)
        bias = None if self.bias is None else self.bias.to(self.packed.dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, bias, "none", [], "")
        return out.unflatten(0, input.shape[:-1])


@contextlib.contextmanager
def laid_out(network: nn.Module, rows: int) -> Iterator[None]:
    """Within, linear layers multiply by bfloat16 copies of their weights in oneDNN's own layout for batches of about so many rows: the same numbers.

    For a loop of products with the same weights under bfloat16 autocast and without gradient: autocast would convert the weights once as well,
    but every product would bring them into that layout anew, which for a few rows takes as long as the product. Elsewhere nothing is changed.
    """
    wanted = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16 and not torch.is_grad_enabled()
    found = [m for m in network.modules() if type(m) is Linear and m.weight.device.type == "cpu" and type(m.weight) is nn.Parameter]
    if not wanted or not multiplies_bfloat16():
        found = []
    try:
        for module in found:
            module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().bfloat16(), rows)
        yield
    finally:
        for module in found:
            module.packed = None


def use_products(network: nn.Module) -> None:
    """Let the linear layers of a network compute by `linear`, in place; names, parameters and hooks stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
