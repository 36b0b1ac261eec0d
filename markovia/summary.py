"""What an evaluation's raw scores say: mean, interquartile mean and a bootstrap interval."""

from __future__ import annotations

from typing import Any


def summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Raw returns with mean, interquartile mean and a 95 % bootstrap interval of the mean; other entries of the evaluation stay if they are JSON."""
    import numpy as np
    from scipy import stats

    returns = np.asarray(evaluation["returns"], dtype=float)
    draws = np.random.default_rng(0).choice(returns, size=(2000, len(returns))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    rest = {k: v for k, v in evaluation.items() if k != "returns" and _is_json(v)}
    return {
        "mean": float(returns.mean()),
        "iqm": float(stats.trim_mean(returns, 0.25)),
        "ci95": [float(low), float(high)],
        "std": float(returns.std()),
        "returns": [float(r) for r in returns],
        **rest,
    }


def _is_json(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) or (isinstance(value, list) and all(isinstance(v, (str, int, float, bool)) for v in value))
