"""The error of a number that is not finite; it carries the batch that holds the number, so that a run can keep it for whoever looks."""

from __future__ import annotations

from typing import Any


class NotFinite(ValueError):
    """NaN or infinity where a finite number is expected. `batch` holds arrays, tensors and texts, nested by name, in which it was found."""

    def __init__(self, message: str, batch: Any = None) -> None:
        super().__init__(message)
        self.batch = batch
