"""One mechanism to compile an update: trace it once for its shapes, drop what it does not read, and let torch.compile make one function of it.

The update is a Python function of tensors that changes some of them in place and returns others. Tracing records the tensor operations of
forward pass, gradient, clipping and optimiser together, so every method and every agent is compiled alike, and a call costs no Python. On the CPU
the code stays on disk (`algos.kept`), on a GPU a call is replayed as a CUDA graph.
"""

from __future__ import annotations

import functools
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from markovia.agents.products import worthwhile
from markovia.algos import kept
from markovia.algos.kept import Found

Pure = Callable[..., tuple[Tensor, ...]]


@functools.cache
def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs for this kind of device; says once what is missing, and that updates then run eagerly."""
    if device != "cpu":
        return True
    from torch._inductor import config

    chosen = config.cpp.cxx
    names = [n for n in ((chosen,) if isinstance(chosen, str) else chosen) if n]
    if any(shutil.which(n) for n in (*names, "g++", "clang++")):
        return True
    _eager("no C++ compiler was found; install g++ or clang++")
    return False


def _eager(why: str) -> None:
    warnings.warn(f"updates run eagerly, several times slower than compiled: {why}", RuntimeWarning, stacklevel=3)


def _is_kept(node: torch.fx.Node) -> bool:
    """Inputs, outputs and operations that change a tensor in place are not dead code."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def trace(function: Pure, args: Sequence[Tensor]) -> tuple[torch.fx.GraphModule, list[int]]:
    """The operations of `function` on tensors like `args`, and which of them it reads. `args` themselves are not changed.

    Raises what torch raises for a function whose course depends on the values in its tensors.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    graph_module = make_fx(function)(*(a.clone() for a in args))
    graph = graph_module.graph
    graph.eliminate_dead_code(is_impure_node=_is_kept)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    used = [i for i, n in enumerate(inputs) if n.users]
    for n in inputs:
        if not n.users:
            graph.erase_node(n)
    graph_module.recompile()
    return graph_module, used


def use_products(graph_module: torch.fx.GraphModule) -> None:
    """Let large products of float32 matrices on the CPU be computed by `markovia.agents.products`, where that is faster; in place."""
    aten, product = torch.ops.aten, torch.ops.markovia.product.default
    graph = graph_module.graph

    def call(target: Callable[..., Any], *args: Any) -> torch.fx.Node:
        return graph.call_function(target, args)

    for node in list(graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        left, right = a.meta["val"], b.meta["val"]
        (*members, m, k), n = left.shape, right.shape[-1]
        if left.dtype != torch.float32 or left.device.type != "cpu" or not worthwhile(m, k, n):
            continue
        with graph.inserting_before(node):
            if members:
                pairs = [[call(aten.select.int, x, 0, i) for x in (a, b)] for i in range(members[0])]
                out = call(aten.stack.default, [call(product, x, call(aten.t.default, y)) for x, y in pairs])
            else:
                out = call(product, a, call(aten.t.default, b))
            node.replace_all_uses_with(call(aten.add.Tensor, out, bias[0]) if bias else out)
        graph.erase_node(node)
    graph_module.recompile()


class Compiled:
    """`function` as one compiled function per set of shapes; the first `static` arguments are the same tensors at every call.

    `seconds` is what finding or making it has taken: half a minute for code that is made, a tenth of a second for code that was kept. Where the
    compiler fails, the traced operations run one by one, and a warning says so once.
    """

    def __init__(self, function: Pure, static: int) -> None:
        self.function, self.static = function, static
        self.seconds = 0.0
        self._made: dict[Any, Found] = {}

    @torch.no_grad()
    def __call__(self, key: Any, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run on `args`; equal keys promise equal shapes, dtypes and Python state. How the tensors lie in memory is looked at, since the code is not
        made to check it.
        """
        key = key, tuple([a.stride() for a in args[self.static :]])
        if key not in self._made:
            began = time.perf_counter()
            self._made[key], out = self._first(args)
            self.seconds += time.perf_counter() - began
            return tuple(out)
        run, used = self._made[key]
        return tuple(run([args[i] for i in used]))

    def _first(self, args: Sequence[Tensor]) -> tuple[Found, Sequence[Tensor]]:
        """What to call from now on, and the results of the first call."""
        told = kept.operations(self.function, args) if args[0].device.type == "cpu" else None
        found = None if told is None else kept.find(told)
        if found is None:
            graph_module, used = trace(self.function, args)
            use_products(graph_module)
            if told is not None:
                found = kept.make(told, graph_module, used, args)
            if found is None:
                return self._here(graph_module, used, args)
        run, used = found
        return found, run([args[i] for i in used])

    def _here(self, graph_module: torch.fx.GraphModule, used: list[int], args: Sequence[Tensor]) -> tuple[Found, Sequence[Tensor]]:
        """Compiled for this process alone."""
        from torch._dynamo.exc import BackendCompilerFailed

        # Equal keys promise what the guards would check at every call.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        if args[0].device.type == "cuda":
            options["triton.cudagraphs"] = True
            for tensor in args[: self.static]:
                torch._dynamo.mark_static_address(tensor)
        run: Callable[..., Sequence[Tensor]] = torch.compile(graph_module, fullgraph=True, dynamic=False, options=options)
        values = [args[i] for i in used]
        try:
            out = run(*values)
        except BackendCompilerFailed as error:
            _eager(str(error).strip().partition("\n")[0])
            run = graph_module
            out = run(*values)
        return (lambda values: run(*values), used), out
