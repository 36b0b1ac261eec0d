"""From a request to what the loops of denoising agents need; the same as the on-policy loop has, without a critic."""

from __future__ import annotations

from markovia.algos.on_policy.setup import denoising_setup as build

__all__ = ["build"]
