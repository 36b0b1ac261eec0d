"""Random streams derived from (seed, name, iteration), so that a resumed run draws what an uninterrupted one would have drawn."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def stream_seed(seed: int, name: str, iteration: int = 0) -> int:
    """A 63-bit seed for one named stream of one iteration. Raises ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    sequence = np.random.SeedSequence([seed, zlib.crc32(name.encode()), iteration])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream(seed: int, name: str, iteration: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one named stream of one iteration."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, name, iteration))
