"""What is in an offline dataset: numbers, a page for the terminal, and a picture."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
BARS = 12  # intervals of the histogram on the terminal


def describe(dataset: str, reference: str | None = None, **source: Any) -> tuple[dict[str, Any], Any]:
    """(plain JSON of everything the page shows, the rows) of a Minari id, a D4RL file or `fixture:<name>`.

    reference  a dataset of the same task whose coverage SACo is measured against, by default the medium-replay tier beside this one, if it can be
    source     env_id, horizon, download: see `markovia.envs.offline.load`; the horizon holds for a D4RL file as reference, too
    TQ counts as 0 and 1 the returns that the references count as 0 and 100. Raises what loading raises: DatasetError for faulty data.
    """
    from gymnasium import spaces

    from markovia.envs.offline import action_coverage, load, returns_histogram, state_action_coverage, trajectory_quality
    from markovia.envs.offline.sources import D4RL

    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        data = load(dataset, **source)
    about, returns, lengths, complete = data.about, data.returns(), data.lengths(), data.complete()
    notes = [str(w.message) for w in noted if issubclass(w.category, UserWarning)]
    scale, against, saco = about.reference, reference or _replay_beside(dataset), None
    try:
        if against is not None:
            saco = state_action_coverage(data, load(against, horizon=source.get("horizon") if against.endswith(D4RL) else None))
    except ValueError as error:  # DatasetError, or data of another task
        if reference is not None:
            raise
        notes.append(f"SACo was not measured against {against}: {' '.join(str(error).split())}")
        against = None
    counts, edges = returns_histogram(data, BARS)
    counted = isinstance(about.action_space, spaces.Box | spaces.Discrete | None)  # what coverage is defined for
    coverage = action_coverage(data) if counted else None
    last = data.bounds()[1] - 1
    page = {
        "dataset": about.name,
        "env_id": about.env_id,
        "horizon": about.horizon,
        "observations": str(about.observation_space),
        "actions": str(about.action_space),
        "made_by": about.metadata.get("algorithm_name"),
        "description": about.metadata.get("description"),
        "transitions": len(data),
        "episodes": len(returns),
        "ends": {"terminated": int(data.terminated[last].sum()), "truncated": int(data.truncated[last].sum()), "cut": int((~complete).sum())},
        "returns": {"mean": float(returns.mean()), "std": float(returns.std()), "quantiles": np.quantile(returns, QUANTILES).tolist()},
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "lengths": {"mean": float(lengths.mean()), "quantiles": np.quantile(lengths, QUANTILES).tolist()},
        "rewards": {"min": float(data.reward.min()), "mean": float(data.reward.mean()), "max": float(data.reward.max())},
        "score_pct": None if scale is None else float(scale.score_pct(returns.mean())),
        "tq": None if scale is None or not complete.any() else trajectory_quality(data, scale.minimum, scale.maximum),
        "score_source": None if scale is None else f"{scale.minimum:.5g} counts as 0 and {scale.maximum:.5g} as 100: {scale.source}",
        "saco": saco,
        "saco_reference": against,
        "action_coverage": None if coverage is None else {"covered": coverage.covered.tolist(), "at_bound": coverage.at_bound.tolist()},
        "action_share": None if coverage is None or coverage.share is None else coverage.share.tolist(),
        "first_action": int(about.action_space.start) if isinstance(about.action_space, spaces.Discrete) else None,
        "notes": notes,
    }
    return page, data


def _replay_beside(dataset: str) -> str | None:
    """namespace/env/medium-replay-v0 for namespace/env/<tier>-v0, where it is on this machine."""
    from markovia.envs.offline.minari_io import dataset_root
    from markovia.envs.offline.sources import TIERS

    match = re.fullmatch(rf"(.+/)(?:{'|'.join(TIERS)})(-v\d+)", dataset)
    beside = f"{match[1]}medium-replay{match[2]}" if match else None
    return beside if beside is not None and (dataset_root() / beside).is_dir() else None


def show(page: dict[str, Any], console: Any = None) -> None:
    """Print the page with rich."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if console is None else console
    table = Table(title=page["dataset"], show_header=False, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _lines(page):
        table.add_row(name, text)
    console.print(table)
    console.print("\n[bold]returns[/bold]")
    counts, edges = page["histogram"]["counts"], page["histogram"]["edges"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        console.print(f"  {low:>10.4g} .. {high:<10.4g} {'█' * round(40 * count / max(counts))} {count}", highlight=False)
    for note in page["notes"]:
        console.print(f"[yellow]note[/yellow] {note}", highlight=False)


def _lines(page: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of every known entry."""
    ends, returns, lengths, rewards = page["ends"], page["returns"], page["lengths"], page["rewards"]
    steps = f", at most {page['horizon']} steps" if page["horizon"] else ""
    out = [
        ("environment", f"{page['env_id'] or 'unknown'}{steps}"),
        ("observations", page["observations"]),
        ("actions", page["actions"]),
        ("made by", " · ".join(t for t in (page["made_by"], page["description"]) if t) or "unknown"),
        ("size", f"{page['transitions']:,} transitions in {page['episodes']:,} episodes"),
        ("ends", f"{ends['terminated']:,} terminated, {ends['truncated']:,} truncated, {ends['cut']:,} cut by the file's end"),
        ("length", f"mean {lengths['mean']:.4g}, quartiles {_quartiles(lengths)}"),
        ("return", f"mean {returns['mean']:.5g} ± {returns['std']:.4g}, quartiles {_quartiles(returns)}"),
        ("reward", f"{rewards['min']:.4g} .. {rewards['max']:.4g}, mean {rewards['mean']:.4g}"),
    ]
    if page["score_pct"] is not None:
        out.append(("score", f"{page['score_pct']:.1f} % ({page['score_source']})"))
    if page["tq"] is not None:
        out.append(("TQ", f"{page['tq']:.3f}  trajectory quality of the complete episodes"))
    if page["saco"] is not None:
        out.append(("SACo", f"{page['saco']:.3f}  different state-actions, against {page['saco_reference']}"))
    if page["action_share"] is not None:
        shares = enumerate(page["action_share"][:20], page["first_action"])
        out.append(("action share", ", ".join(f"{i}: {100 * s:.1f} %" for i, s in shares)))
    elif page["action_coverage"] is not None:
        covered, bound = (np.mean(page["action_coverage"][k]) for k in ("covered", "at_bound"))
        out.append(("action coverage", f"{100 * covered:.0f} % of the cells per dimension, {100 * bound:.1f} % of the actions at a bound"))
    return out


def _quartiles(entry: dict[str, Any]) -> str:
    return " / ".join(f"{q:.4g}" for q in entry["quantiles"])


def default_png(dataset: str) -> Path:
    """markovia-pendulum-medium-v0.png in the current folder."""
    return Path(re.sub(r"[^\w.-]+", "-", Path(dataset).name if dataset.endswith((".hdf5", ".h5")) else dataset).strip("-") + ".png")


def write_png(data: Any, out: str | Path) -> Path:
    """Returns, episode lengths, rewards and actions as histograms, one PNG."""
    from markovia.pictures import histograms_png

    action = data.action.reshape(len(data), -1)
    panels = {
        "return of an episode": {"": data.returns()},
        "length of an episode": {"": data.lengths()},
        "reward of a step": {"": data.reward},
        "action": {f"{i}" if action.shape[1] > 1 else "": action[:, i] for i in range(min(action.shape[1], 8))},
    }
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(histograms_png(panels, data.about.name))
    return path
