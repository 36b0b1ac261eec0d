"""Low-rank adapters inside a network, by peft: on, it is the policy; off, the policy's reference, from one and the same weights.

W x + (alpha/r) B A x,   A (r, in) random, B (out, r) zero at the start, so that training begins at the reference      [Hu 2021, arXiv 2106.09685]
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from markovia.envs.names import nearest


def lora_config(lora: dict[str, Any], **fixed: Any) -> Any:
    """peft's LoraConfig from its own settings, where "alpha" may be said for lora_alpha; `fixed` is not the user's to choose.

    Raises ValueError for a setting that LoraConfig lacks, ImportError without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as e:
        raise ImportError("LoRA needs peft: pip install peft (it comes with markovia[text])") from e
    settings = {"r": 16, "lora_alpha": 32, **lora}
    if "alpha" in settings:
        settings["lora_alpha"] = settings.pop("alpha")
    known = inspect.signature(LoraConfig).parameters
    if unknown := sorted(settings.keys() - known.keys()):
        hint = nearest(unknown[0], known) or "; e.g. {'r': 16, 'alpha': 32, 'target_modules': 'all-linear'}"
        raise ValueError(f"lora has no setting {unknown[0]!r}{hint}")
    return LoraConfig(**settings, **fixed)


def linear_names(network: nn.Module) -> list[str]:
    """Names of all linear layers: what is adapted unless `target_modules` says otherwise."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def host_of(network: nn.Module) -> nn.Module:
    """The module inside that brings diffusers' own adapter methods, else the network itself."""
    return next((m for m in network.modules() if hasattr(m, "add_adapter")), network)


def inject(network: nn.Module, lora: dict[str, Any]) -> None:
    """Put trainable adapters into the network, in place, and freeze everything else.

    Through diffusers' `add_adapter` where the network has it, so that its own `save_lora_adapter` finds them.
    Raises ValueError for unknown settings, and for target modules that the network has not.
    """
    host = host_of(network)
    config = lora_config({"target_modules": linear_names(host), **lora})
    for p in network.parameters():
        p.requires_grad_(False)
    try:
        if host is not network or hasattr(host, "add_adapter"):
            host.add_adapter(config)  # type: ignore[operator]
        else:
            from peft import inject_adapter_in_model

            inject_adapter_in_model(config, host)
    except ValueError as e:
        some = ", ".join(linear_names(host)[:6]) or "no linear layers"
        raise ValueError(f"{type(host).__name__} can't take these adapters: {e}; its linear layers: {some}, ...") from e


def _layers(network: nn.Module) -> dict[str, Any]:
    """The adapted layers by name: peft wraps a layer, which is then its `base_layer`."""
    return {name: m for name, m in network.named_modules() if hasattr(m, "base_layer") and hasattr(m, "enable_adapters")}


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The network without its adapters, inside the block."""
    layers = _layers(network).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights of the same function without adapters, W + (alpha/r) B A, under the names that the network had before `inject`."""
    adapted = _layers(network)
    prefixes = tuple(f"{name}." for name in adapted)
    base = {k: v for k, v in network.state_dict().items() if ".base_layer." in k or not k.startswith(prefixes)}
    merged = {k.replace(".base_layer.", "."): v for k, v in base.items()}
    for name, layer in adapted.items():
        for adapter in layer.active_adapters:
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + layer.get_delta_weight(adapter)
    return merged
