"""Where a run keeps the batch that holds a number that is not finite: not_finite/<iteration>.safetensors (numbers) and .json (message, texts)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markovia.rundir import RunError, write_bytes, write_json

FOLDER = "not_finite"


def keep_batch(run: Path, iteration: int, error: Exception) -> str:
    """Write the batch that `error` carries; a sentence that says where it lies, or why not on a disk that refuses. Empty without a batch."""
    batch = getattr(error, "batch", None)
    if batch is None:
        return ""
    import safetensors.torch

    from markovia.algos.finite import flat, numbers, place

    tensors = {name: x.contiguous().clone() for name, x in numbers(batch).items()}
    texts = {name: _plain(x) for name, x in flat(batch).items() if name not in tensors}
    target = run / FOLDER / f"{iteration:06d}"
    told: dict[str, Any] = {
        "message": str(error),
        "iteration": iteration,
        "first": place(batch),
        "columns": {name: {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for name, x in tensors.items()},
        "texts": texts,
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target.with_suffix(".safetensors"), safetensors.torch.save(tensors))
        write_json(target.with_suffix(".json"), told)
    except (OSError, RunError) as e:
        return f" The batch could not be kept ({e})."
    return f" The batch lies in {target}.safetensors, with the texts and what was found in {target}.json."


def _plain(value: Any) -> Any:
    """A leaf as JSON can hold it."""
    if isinstance(value, str | int | bool) or value is None:
        return value
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else str(value)
