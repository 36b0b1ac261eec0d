"""Ready rewards of images, and where a reward that is given by name is found.

    images (n, c, h, w) in [0, 1], prompts list of n or None -> (n,)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.envs.denoising.tables import choose
from markovia.envs.text.rewards import resolve


def brightness(images: Tensor, prompts: Any = None) -> Tensor:
    """Mean pixel, in [0, 1]; differentiable."""
    return images.mean((1, 2, 3))


def compressibility(images: Tensor, prompts: Any = None) -> Tensor:
    """Minus the size of the image as a JPEG of quality 95, in kB: rewards plain images.              [Black 2023, arXiv 2305.13301, section 6.1]"""
    from PIL import Image

    sizes = []
    for image in (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.squeeze(-1) if image.shape[-1] == 1 else image)).save(buffer, "JPEG", quality=95)
        sizes.append(-buffer.tell() / 1000)
    return torch.tensor(sizes)


def incompressibility(images: Tensor, prompts: Any = None) -> Tensor:
    """The size of the image as a JPEG of quality 95, in kB: rewards detail.                          [Black 2023, arXiv 2305.13301, section 6.1]"""
    return -compressibility(images, prompts)


READY: dict[str, Callable[..., Any]] = {f.__name__: f for f in (brightness, compressibility, incompressibility)}


def image_reward(reward: Any) -> Callable[..., Any]:
    """A callable itself, a ready one by name, or that of "module:function". Raises ValueError with the nearest name."""
    if callable(reward) or ":" in str(reward):
        return resolve(reward)
    return READY[choose("reward", str(reward), tuple(READY))]
