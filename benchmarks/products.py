"""Float32 products of the sizes that training has, by torch's BLAS and by oneDNN, on one thread: `python benchmarks/products.py`.

From these figures comes the rule of `markovia.agents.products`: which products go where. Writes benchmarks/results/products.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import markovia.agents.products  # noqa: F401  # registers the operation

RESULTS = Path(__file__).parent / "results" / "products.json"
# (m, k, n): an update of actor and critics, a minibatch of PPO, SmolLM2's layers in an update and in a step of sampling, its output layer
SIZES = [(256, 256, 256), (256, 23, 256), (64, 64, 64), (512, 64, 64), (640, 576, 1536), (640, 1536, 576), (16, 576, 1536), (512, 576, 49152)]


def rate(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, seconds: float = 0.4) -> float:
    """10^9 floating-point operations per second of the process's own time."""
    product(a, b)
    began, calls = time.thread_time(), 0
    while time.thread_time() - began < seconds:
        product(a, b)
        calls += 1
    return 2e-9 * a.shape[0] * a.shape[1] * b.shape[0] * calls / (time.thread_time() - began)


def main() -> None:
    torch.set_num_threads(1)
    found = []
    for m, k, n in SIZES:
        a, b = torch.randn(m, k), torch.randn(n, k)
        blas, onednn = rate(torch.nn.functional.linear, a, b), rate(torch.ops.markovia.product.default, a, b)
        found.append({"m": m, "k": k, "n": n, "blas": round(blas, 1), "onednn": round(onednn, 1), "ratio": round(onednn / blas, 2)})
        print(f"({m}, {k}) x ({k}, {n}): BLAS {blas:.0f}, oneDNN {onednn:.0f} GFLOP/s, {onednn / blas:.2f} times")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
