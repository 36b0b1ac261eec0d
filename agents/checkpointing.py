"""Gradient checkpointing of transformers models: layers are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that can be computed again in the backward pass. Raises ValueError for a model without such layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers for gradient checkpointing; set gradient_checkpointing=False")
    return found


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward` now, and once more in the backward pass under the same function modes (packed attention is one), which torch does not do itself."""
    modes = _get_current_function_mode_stack()

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _within(modes)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextlib.contextmanager
def _within(modes: list[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Forward passes in here keep the inputs of the layers instead of what happens inside.

    transformers' own switch works in training mode only, where some models drop out. Nothing stays on the layers, so copies of the model are plain.
    """
    layers = layers_of(model)
    for layer in layers:
        layer.forward = functools.partial(_again, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
