"""Compiled updates that stay on disk, found again by the operations that they do: the next process neither traces nor imports a compiler.

    operations   what a function does with its tensors, as text: the same text, the same compiled code
    find         the code that was kept for them
    make         trace -> torch's ahead-of-time compiler -> a shared library that keeps its operations, inputs and outputs in the order of the trace

A call of such a library costs no Python, where torch.compile's own wrapper is Python: a PPO minibatch of 64 takes half the time. Its arithmetic is
torch.compile's, bit by bit. Loading needs neither Dynamo nor Inductor, whose import alone takes seconds and 120 MB.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from markovia.agents import products
from markovia.envs.cached import cache_dir, cached
from markovia.envs.durable import TEMPORARY

KEEP = 200  # libraries; the ones that were used longest ago go first
DAY = 86_400.0  # seconds
Found = tuple[Callable[[Sequence[Tensor]], Sequence[Tensor]], list[int]]  # code, and the arguments that it is called with


class Untold(Exception):
    """A function does something that its text would not tell: it draws random numbers, or reads a tensor that is not among its arguments."""


class Operations(TorchDispatchMode):
    """Writes down every operation within, its tensors numbered in the order in which they appear."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._next = itertools.count()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import it

    def number(self, tensor: Tensor) -> int:
        found: int = self._numbers.setdefault(tensor, next(self._next))
        return found

    def told(self, x: Any) -> str:
        """An argument or a result as text. Raises Untold for a tensor that no operation within has made, and for what has no text."""
        if isinstance(x, Tensor):
            if x not in self._numbers:
                raise Untold
            return f"%{self._numbers[x]}"
        if isinstance(x, list | tuple):
            return f"[{', '.join(map(self.told, x))}]"
        if x is None or isinstance(x, bool | int | float | complex | str | torch.dtype | torch.device | torch.layout | torch.memory_format):
            return repr(x)
        raise Untold

    def new(self, x: Any) -> None:
        """Number the results of an operation, unless they are tensors that it was given."""
        if isinstance(x, Tensor):
            self.number(x)
        elif isinstance(x, list | tuple):
            for member in x:
                self.new(member)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Untold
        given = f"{self.told(args)} {', '.join(f'{k}={self.told(v)}' for k, v in kwargs.items())}"
        out = func(*args, **kwargs)
        self.new(out)
        self.lines.append(f"{func} {given} -> {self.told(out)}")
        return out


def operations(function: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor]) -> str | None:
    """What `function` does with tensors like `args`, from running it once on copies of them; None where a text can't tell."""
    copies = [a.clone() for a in args]
    with torch.random.fork_rng(devices=[]), Operations() as seen:
        for a, copy in zip(args, copies, strict=True):
            seen.lines.append(f"%{seen.number(copy)}: {a.dtype} {tuple(a.shape)} {a.stride()} {a.device}")  # a copy may lie otherwise
        try:
            out = function(*copies)
            seen.lines.append(f"return {seen.told(out)}")
        except Untold:
            return None
    return "\n".join(seen.lines)


@functools.cache
def place() -> str:
    """What the code depends on beside its operations: torch, the processor that it is compiled for, and how this package compiles."""
    from markovia.algos import compiled

    cpu = Path("/proc/cpuinfo")
    first_core = cpu.read_text().partition("\n\n")[0].splitlines() if cpu.exists() else []
    about = [line for line in first_core if line.startswith(("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features"))]
    modules: list[Any] = [sys.modules[__name__], compiled, products]
    sources = [hashlib.sha256(m.__loader__.get_data(m.__file__)).hexdigest() for m in modules]
    given = [torch.__version__, platform.platform(), platform.processor(), torch.backends.cpu.get_cpu_capability(), os.environ.get("CXX", "")]
    return "\n".join([*given, *about, *sources])


def name_of(told: str) -> str:
    """The cache folder of the code for these operations."""
    key = "\n".join([place(), str(torch.get_num_threads()), told])
    return f"updates/{hashlib.sha256(key.encode()).hexdigest()[:40]}"


def find(told: str) -> Found | None:
    """The code that was kept for these operations; None if there is none that loads."""
    kept = cache_dir() / name_of(told)
    try:
        if hasattr(os, "getuid") and kept.stat().st_uid != os.getuid():
            return None  # native code of somebody else
        used: list[int] = json.loads((kept / "used.json").read_text())
        library: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(str(kept / "update.so"), 1)
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(kept)
    except (FileNotFoundError, AttributeError):  # not made yet, or a torch that can't load it
        return None
    except (OSError, RuntimeError, ValueError):
        shutil.rmtree(kept, ignore_errors=True)  # damaged
        return None
    return library.run, used


def make(told: str, graph_module: torch.fx.GraphModule, used: list[int], args: Sequence[Tensor]) -> Found | None:
    """Compile a traced function, keep its code and load it; None where that does not work."""
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)  # each from a mode of its own, which the compiler refuses

    def build(to: Path) -> None:
        from torch._inductor.compile_fx import compile_fx_aot

        work = to / "work"
        options = {"aot_inductor.output_path": str(work / "update.so"), "aot_inductor.enable_line_tables": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one part of torch about another
            compile_fx_aot(graph_module, [args[i] for i in used], config_patches=options)  # looked at, not changed
        (work / "update.so").rename(to / "update.so")
        for calls in work.glob("*.wrapper.json"):  # of operations outside of torch; looked for beside the library
            calls.rename(to / "update.json")
        shutil.rmtree(work)
        (to / "used.json").write_text(json.dumps(used))

    try:
        kept = cached(name_of(told), build)
    except Exception:  # whatever this way of compiling can't do here: torch.compile is asked next, and tells what is wrong
        return None
    prune(kept.parent)
    return find(told)


def prune(parent: Path) -> None:
    """Remove what was used longest ago, so that KEEP libraries stay, and what killed processes left half made a day ago."""

    def used(kept: Path) -> float:
        try:
            return kept.stat().st_mtime
        except OSError:  # another process removed it
            return 0.0

    found = sorted(parent.iterdir(), key=used)
    begun = [p for p in found if p.name.startswith(TEMPORARY)]
    for old in [p for p in found if p not in begun][:-KEEP] + [p for p in begun if used(p) < time.time() - DAY]:
        shutil.rmtree(old, ignore_errors=True)
