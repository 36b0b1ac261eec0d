"""The pictures of benchmarks/preference.py, from its cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

Cell = dict[str, Any]
NATS = {"bandit": "0.5", "tree": "1", "game": "0.1", "sequences": "3"}


def _means(rows: list[Cell], bed: str, method: str, key: str) -> float:
    found = [r[key] for r in rows if r["bed"] == bed and r["method"] == method and r["reached"]]
    return float(np.mean(found)) if found else float("nan")


def equal_kl(rows: list[Cell], out: Path) -> None:
    """A column per bed, a line per method that gets to that KL: KL to the optimum, coloured by how far chosen responses moved."""
    names = list(dict.fromkeys(r["method"] for r in rows if r["reached"]))
    beds = [b for b in NATS if any(r["bed"] == b and r["reached"] for r in rows)]
    table = np.array([[_means(rows, b, m, "kl_optimum") for b in beds] for m in names])
    rank = np.where(np.isnan(table), np.nan, table.argsort(0).argsort(0))
    names = [names[i] for i in np.argsort(np.nanmean(rank, 1))]  # by the mean rank over beds, best first
    figure = Figure(figsize=(3.1 * len(beds) + 2.2, 0.2 * len(names) + 1.8), layout="constrained")
    axes = figure.subplots(1, len(beds), sharey=True, squeeze=False)[0]
    y = np.arange(len(names))
    for ax, bed in zip(axes, beds, strict=True):
        x, colour = (np.array([_means(rows, bed, m, k) for m in names]) for k in ("kl_optimum", "chosen"))
        limit = float(np.nanquantile(np.abs(colour), 0.9)) + 1e-6
        norm = TwoSlopeNorm(0.0, -limit, limit)
        ax.hlines(y, 0, x, color="0.85", linewidth=1.0, zorder=1)
        dots = ax.scatter(x, y, c=colour, cmap="RdBu", norm=norm, s=26, edgecolors="0.3", linewidths=0.5, zorder=2)
        figure.colorbar(dots, ax=ax, location="bottom", label="chosen log-ratio, nats", extend="both", shrink=0.9, pad=0.01)
        ax.set(title=f"{bed}, {NATS[bed]} nats", xlabel="KL to the optimum, nats")
        ax.set_xlim(left=min(0.0, float(np.nanmin(x))) - 0.01)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(y, names, fontsize=8)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.savefig(out, dpi=130)


def displacement(rows: list[Cell], out: Path) -> None:
    """Chosen and rejected log-ratios and win rate along training; mean over seeds."""
    names = list(dict.fromkeys(r["method"] for r in rows))
    figure = Figure(figsize=(14.0, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    colours = {m: f"C{i}" for i, m in enumerate(names)}
    for method in names:
        cells = [r for r in rows if r["method"] == method]
        x = np.arange(len(cells[0]["curve"]["chosen"])) * cells[0]["every"]
        for ax, key in zip(axes, ("chosen", "rejected", "win_rate"), strict=True):
            curve = np.mean([c["curve"][key] for c in cells], 0)
            bold = method in ("dpo", "squared-po")
            ax.plot(x, curve, color=colours[method], label=method, linewidth=2.4 if bold else 1.2, zorder=3 if bold else 2)
    for ax, title in zip(axes, ("log-ratio of chosen, nats", "log-ratio of rejected, nats", "win rate against the reference"), strict=True):
        ax.set(title=title, xlabel="steps")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:2]:
        ax.set_yscale("symlog", linthresh=1.0)
        ax.axhline(0.0, color="0.6", linewidth=0.8)
    axes[2].axhline(0.5, color="0.6", linewidth=0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(out, dpi=120)


def sentiment(rows: list[Cell], out: Path) -> None:
    """Win rate and log-ratios of held-out pairs along training, and the one against the other."""
    figure = Figure(figsize=(13.0, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for i, r in enumerate(rows):
        points, name = r["curve"], f"{r['method']}, seed {r['seed']}"
        step, win, chosen, rejected = ([p[k] for p in points] for k in ("step", "win_rate", "chosen", "rejected"))
        axes[0].plot(step, win, color=f"C{i}", marker="o", label=name)
        axes[1].plot(step, chosen, color=f"C{i}", marker="o", label=f"{name}: chosen")
        axes[1].plot(step, rejected, color=f"C{i}", linestyle="--", label="rejected")
        axes[2].plot(chosen, win, color=f"C{i}", marker="o", label=name)
    axes[0].set(title="win rate on held-out openings", xlabel="steps")
    axes[1].set(title="log-ratio of held-out pairs, nats", xlabel="steps")
    axes[2].set(title="win rate against displacement", xlabel="log-ratio of chosen, nats")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)


PICTURES: dict[str, Callable[[list[Cell], Path], None]] = {"equal-kl": equal_kl, "displacement": displacement, "sentiment": sentiment}
