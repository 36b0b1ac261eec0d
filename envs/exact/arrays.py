"""The few array operations that differ between numpy and torch, so that one formula serves both.

Torch is never imported here: a tensor can only come from a process that has loaded it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from scipy import special

Array = Any  # numpy.ndarray or torch.Tensor


def is_torch(x: Array) -> bool:
    """Whether x is a torch tensor; a process that has not loaded torch has none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def to_numpy(x: Array) -> np.ndarray:
    """A detached float64 numpy copy of x on the host."""
    return np.array(x.detach().cpu().numpy() if is_torch(x) else x, dtype=np.float64)


def like(values: np.ndarray, x: Array) -> Array:
    """`values` in the library, on the device of x (float64 stays float64)."""
    if not is_torch(x):
        return values
    return sys.modules["torch"].as_tensor(values, device=x.device)


def exp(x: Array) -> Array:
    """Elementwise e^x."""
    return x.exp() if is_torch(x) else np.exp(x)


def log(x: Array) -> Array:
    """Elementwise log, with log 0 = -inf silently."""
    if is_torch(x):
        return x.log()
    with np.errstate(divide="ignore"):
        return np.log(x)


def xlogy(x: Array, y: Array) -> Array:
    """x log y with 0 log 0 = 0."""
    return sys.modules["torch"].xlogy(x, y) if is_torch(x) else special.xlogy(x, y)


def where(condition: Array, a: Array, b: Array) -> Array:
    """Elementwise choice; a and b may be scalars."""
    if not is_torch(condition):
        return np.where(condition, a, b)
    torch = sys.modules["torch"]
    dtype = next((v.dtype for v in (a, b) if is_torch(v)), torch.float64)
    a, b = (v if is_torch(v) else torch.tensor(v, dtype=dtype, device=condition.device) for v in (a, b))
    return torch.where(condition, a, b)


def log_softmax(logits: Array) -> Array:
    """log softmax over the last axis."""
    return logits.log_softmax(-1) if is_torch(logits) else special.log_softmax(logits, axis=-1)


def logsumexp(x: Array) -> Array:
    """log sum e^x over the last axis."""
    return x.logsumexp(-1) if is_torch(x) else special.logsumexp(x, axis=-1)
