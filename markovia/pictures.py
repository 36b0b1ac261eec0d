"""Learning curves, grids of samples and videos."""

from __future__ import annotations

import io
import os
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from markovia.rundir import Metrics, RunError, read_json

_LIKE = ("settings", "env_kwargs", "agent_options", "data", "dataset", "read", "references", "texts")  # what makes runs seeds of one experiment
LONGEST = 1000  # frames of a video of an episode that no time limit ends


def curve(run: Path, key: str, against: str = "num_env_steps") -> tuple[np.ndarray, np.ndarray]:
    """(num_env_steps, or what it is plotted `against`; value) of one statistic of a run. Raises RunError when the run never wrote both together."""
    rows = Metrics(run).read()
    points = [(row[against], row[key]) for row in rows if row.get(key) is not None and row.get(against) is not None]
    if not points:
        known = sorted({k for row in rows for k in row})
        missing = key if all(row.get(key) is None for row in rows) else against
        raise RunError(f"{run} has no values of {missing!r}; it has {', '.join(known) or 'no metrics yet'}")
    x, y = np.asarray(points, dtype=float).T
    return x, y


def pass_curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """(k, pass@k) of a run's last evaluation. Raises RunError when it has none."""
    found = (read_json(run / "done.json").get("evaluation") or {}).get("pass_curve")
    if found is None:
        raise RunError(f"{run} has no pass@k: its task can't tell what is right, or it was not evaluated (eval_episodes)")
    return np.arange(1.0, len(found) + 1.0), np.asarray(found)


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` points (fewer at the start)."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    end = np.arange(1, len(y) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state is wanted

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _count_steps(ax: Any) -> None:
    """Step counts as 50k, 1M."""
    from matplotlib.ticker import EngFormatter

    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def plot_runs(runs: list[Path], out: Path, key: str = "return", window: int = 1, against: str = "num_env_steps") -> Path:
    """Learning curves as a PNG: one panel per environment, one line per configuration of a method, mean and range over its seeds.

    `against` another statistic than the steps (reward over KL) every run is a line of its own with a mark per point, in the order of training.

    `key` is a statistic of the log, or "pass@k": the share of prompts that one of k responses solves, over k, at the end of each run.
    The file that was written, with .png where `out` has no suffix. Raises ValueError for a folder.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file in it, e.g. {out / 'curves.png'}")
    out = out if out.suffix else out.with_suffix(".png")
    read, xlabel = (pass_curve, "k") if key == "pass@k" else (lambda run: curve(run, key, against), against)
    configs = {run: read_json(run / "config.json") for run in {run.resolve(): run for run in runs}.values()}
    labels = _labels(configs)
    groups: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for run, config in configs.items():
        groups[config["env"]][labels[run]].append(run)
    figure, axes = _axes(6.0, 4.0, len(groups))
    for ax, (env, lines) in zip(axes, groups.items(), strict=True):
        for label, members in lines.items():
            curves = [read(run) for run in members]
            if xlabel == against != "num_env_steps":
                for x, y in curves:
                    ax.plot(x, smooth(y, window), marker="o", markersize=3, label=label if (x is curves[0][0]) else None)
                continue
            end = min(x[-1] for x, _ in curves)
            grid = np.linspace(max(x[0] for x, _ in curves), end, 200) if len(curves) > 1 else curves[0][0]
            values = np.stack([np.interp(grid, x, smooth(y, window)) for x, y in curves])
            seeds = len({configs[run].get("seed") for run in members})
            (line,) = ax.plot(grid, values.mean(0), label=f"{label} ({seeds} seed{'s' * (seeds > 1)})")
            if len(curves) > 1:
                ax.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        ax.set(title=env, xlabel=xlabel, ylabel=key)
        _count_steps(ax)
        ax.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def _labels(configs: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """What each run is called: its method, and the entries of its configuration in which runs of that method on that environment differ."""
    entries = {run: _leaves({k: config[k] for k in _LIKE if k in config}) for run, config in configs.items()}
    out: dict[Path, str] = {}
    for run, config in configs.items():
        peers = [entries[r] for r, c in configs.items() if (c["env"], c["method"]) == (config["env"], config["method"])]
        told = [f"{k.removeprefix('settings.')}={v}" for k, v in entries[run].items() if any(p.get(k) != v for p in peers)]
        out[run] = ", ".join([config["method"], *told])
    return out


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The entries of nested objects by their path, "settings.solver.lr"."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in _leaves(inner, f"{path}.{key}" if path else key).items()}


def curve_png(x: np.ndarray, y: np.ndarray, title: str, ylabel: str, xlabel: str = "num_env_steps") -> bytes:
    """One learning curve as PNG bytes, raw points under their running mean."""
    figure, (ax,) = _axes(5.0, 3.0)
    ax.plot(x, y, color="#9db4d0", linewidth=1.0)
    ax.plot(x, smooth(y, max(1, len(y) // 12)), color="#1f4e8c", linewidth=2.0)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    _count_steps(ax)
    return _png(figure)


def grid_png(images: np.ndarray, columns: int = 8, scale: float = 0.6) -> bytes:
    """Grey images (n, h, w) as one grid, PNG bytes; each image uses the common range."""
    from matplotlib.figure import Figure

    n = len(images)
    rows = -(-n // columns)
    figure = Figure(figsize=(columns * scale, rows * scale))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.subplots_adjust(0, 0, 1, 1, 0.08, 0.08)
    for i, ax in enumerate(axes):
        ax.axis("off")
        if i < n:
            ax.imshow(images[i], cmap="gray_r", vmin=images.min(), vmax=images.max(), interpolation="nearest")
    return _png(figure)


def histograms_png(panels: dict[str, dict[str, np.ndarray]], title: str) -> bytes:
    """One histogram per panel, {label of the axis: {name of the line: values}}, side by side, PNG bytes."""
    from markovia.envs.offline.measures import histogram_range

    figure, axes = _axes(3.4, 2.8, len(panels))
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
        style: dict[str, Any] = {"histtype": "stepfilled", "color": "#1f4e8c"} if len(lines) == 1 else {"histtype": "step"}
        for name, values in lines.items():
            wide = values.astype(np.float64)  # edges between neighbours in float32 would not fit into it
            ax.hist(wide, bins=30, range=histogram_range(wide), label=name, **style)
        ax.set(xlabel=label, ylabel="count")
        if len(lines) > 1:
            ax.legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def record_video(agent: Any, env: str, env_kwargs: dict[str, Any], folder: Path, episodes: int, seed: int) -> list[Path]:
    """Greedy episodes through Gymnasium's recorder, one MP4 file each; those of an earlier call are replaced.

    Where no time limit ends an episode, it is cut after LONGEST frames, because the recorder holds them in memory.
    Raises RunError for environments that draw nothing, and with what to install or set when drawing fails.
    """
    import gymnasium as gym

    from markovia.envs.control.stepping import first_episodes
    from markovia.envs.control.vector import make_env

    if not os.environ.get("DISPLAY"):
        # MuJoCo's and SDL's defaults need a window.
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    modes = make_env(env, **env_kwargs).metadata.get("render_modes", [])
    if "rgb_array" not in modes:
        raise RunError(f"{env} draws no pictures (its render modes: {', '.join(modes) or 'none'}); `markovia eval` gives its returns")
    try:
        scene = make_env(env, render_mode="rgb_array", **env_kwargs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Overwriting existing videos")
            recorder = gym.wrappers.RecordVideo(scene, str(folder), episode_trigger=lambda _: True, disable_logger=True)
        for episode in range(episodes):
            for _ in first_episodes(recorder, agent, seed + episode, deterministic=True, longest=LONGEST):
                pass
        recorder.close()
    except gym.error.DependencyNotInstalled as e:
        raise RunError(f"rendering {env} needs a package that is missing: {e}; pip install 'markovia[control]'") from e
    except Exception as e:
        if not _is_rendering(e):
            raise
        raise RunError(
            f"rendering {env} failed ({type(e).__name__}: {e}); without a display MuJoCo needs MUJOCO_GL=egl (GPU or Mesa's libEGL: "
            "apt install libegl1) or MUJOCO_GL=osmesa (apt install libosmesa6)"
        ) from e
    return [folder / f"{recorder.name_prefix}-episode-{episode}.mp4" for episode in range(episodes)]


def _is_rendering(error: Exception) -> bool:
    """OpenGL's loaders raise bare ImportError, AttributeError or their own classes; their text names the library."""
    text = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    return any(word in text for word in ("opengl", "egl", "osmesa", "glfw", "glcontext", "fatalerror"))
