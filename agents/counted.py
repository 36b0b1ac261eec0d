"""Tensors counted before they are made, so that what a file describes can't fill the memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from markovia.envs import machine

# Functions that make tensors, and what makes one of the same size and no content; of some of them torch takes seconds to load that.
_MAKERS: dict[Any, Callable[..., Tensor]] = {
    f: f for f in (torch.arange, torch.empty, torch.empty_strided, torch.full, torch.linspace, torch.ones, torch.randint, torch.randperm, torch.zeros)
}
_MAKERS |= {torch.rand: torch.empty, torch.randn: torch.empty, torch.eye: lambda n, m=None, **how: torch.empty(n, n if m is None else m, **how)}
_ELSEWHERE = ("device", "generator", "pin_memory", "layout")  # arguments that have no say in a tensor's size, and that meta tensors don't take


class Counted(TorchFunctionMode):
    """While something is built, its tensors are counted before they are made: OverMemory once `what` needs more than the machine has."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.made, self.total = what, 0, machine.memory()[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS and torch.device(kwargs.get("device") or "cpu").type != "meta" and kwargs.get("out") is None:
            self.made += _size(func, args, kwargs)
            machine.fits(self.made, self.what, self.total)
        return func(*args, **kwargs)


def _size(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bytes of the tensor that a call would make; 0 for a call that can't be, which says so itself."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        made = _MAKERS[func](*args, **{k: v for k, v in kwargs.items() if k not in _ELSEWHERE}, device="meta")
        return made.numel() * made.element_size()
    return 0
