"""Gradient checkpointing of transformers models: layers are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that can be computed again in the backward pass. Raises ValueError for a model without such layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers for gradient checkpointing; set gradient_checkpointing=False")
    return found


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Forward passes in here keep the inputs of the layers instead of what happens inside.

    transformers' own switch works in training mode only, where some models drop out. Nothing stays on the layers, so copies of the model are plain.
    """
    layers = layers_of(model)
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
