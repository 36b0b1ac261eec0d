"""What the test files of the denoising table share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)
F64 = torch.float64


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2", **options})
