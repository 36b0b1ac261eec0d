"""What the library holds, read from its tables: methods, environments, claims."""

from __future__ import annotations

import importlib
import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from pprint import pformat
from typing import Any

from markovia.rundir import write_text

_ROOT = Path(__file__).resolve().parent.parent


def systems() -> list[dict[str, Any]]:
    """Every method as plain JSON, in the order of the tables."""
    from markovia.algos.systems import rows

    return [
        {"id": r.id, "new": r.new, "parent": r.parent, "paper": r.paper, "kinds": list(r.kinds), "functions": list(r.functions), "claim": r.claim}
        for r in rows().values()
    ]


def environments() -> list[dict[str, Any]]:
    """Every environment of markovia: id, kind of MDP, arguments."""
    from markovia.envs.registry import ENVS, kind_of

    return sorted(({"id": e["id"], "kind": kind_of(e["id"]), "kwargs": e.get("kwargs", {})} for e in ENVS), key=lambda e: (e["kind"], e["id"]))


def resolve(reference: str) -> Any:
    """The object of "module:name" or "module:Class.name"."""
    module, _, path = reference.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def where(thing: Any) -> str:
    """file:line of a function or class, relative to the checkout where there is one."""
    file = Path(inspect.getsourcefile(thing) or "").resolve()
    line = inspect.getsourcelines(thing)[1]
    return f"{file.relative_to(_ROOT) if file.is_relative_to(_ROOT) else file}:{line}"


def card(method_id: str, env: str | None = None) -> str:
    """A method on one page; equations come from the docstrings of the functions that its row names."""
    from markovia.algos.systems import find

    row = find(method_id)
    settings = row.value
    if env is not None:
        from markovia.envs.control.vector import env_spec
        from markovia.runs import resolve as resolve_method

        env_spec(env)
        settings = resolve_method(method_id, env)[1]
    lines = [f"{row.id}: {row.new}", f"  paper   https://arxiv.org/abs/{row.paper}", f"  parent  {row.parent or '-'}"]
    lines.append(f"  kinds   {', '.join(row.kinds)}")
    found = verdict(row.claim, _finished(default_results()))
    lines.append(f"  claim   {row.claim}: {found} (markovia claims {row.claim})" if row.claim in known_claims() else "  claim   none yet")
    for reference in row.functions:
        thing = resolve(reference)
        lines += ["", f"{reference.partition(':')[2]}  ({where(thing)})", *(f"  {line}" for line in (inspect.getdoc(thing) or "").splitlines())]
    lines += ["", f"settings{f' for {env}' if env else ''}", *(f"  {line}" for line in pformat(settings, width=120).splitlines())]
    return "\n".join(lines)


def known_claims() -> dict[str, Any]:
    from markovia.claims import CLAIMS

    return CLAIMS


def list_claims(speed: str, results: Path | None = None) -> list[str]:
    """Ids with class, verdict and function."""
    finished = _finished(results or default_results())
    return [f"{i}  {c.speed}  {verdict(i, finished)}  {c.function}" for i, c in known_claims().items() if speed in ("all", c.speed)]


def verdict(claim: str, finished: dict[str, dict[str, Any]]) -> str:
    """What the last measurement of a claim found."""
    return "not measured" if claim not in finished else "holds" if finished[claim]["holds"] else "does not hold"


def default_results() -> Path:
    """Committed with the checkout; in the current folder for an installed package."""
    return _ROOT / "benchmarks" / "results" / "claims.jsonl" if (_ROOT / "benchmarks").is_dir() else Path("claims.jsonl")


def run_claims(ids: list[str], speed: str = "all", results: Path | None = None) -> Iterator[dict[str, Any]]:
    """Run claims one by one, each result appended to the file as soon as it is there.

    Without ids the claims that have a result already are left out, so an interrupted run goes on. Raises ValueError for an unknown id.
    """
    from markovia.algos.table import nearest

    claims, path = known_claims(), results or default_results()
    for i in ids:
        if i not in claims:
            raise ValueError(f"unknown claim {i!r}{nearest(i, claims)} (`markovia claims --list` lists all)")
    finished = _finished(path)
    chosen = ids or [i for i, c in claims.items() if speed in ("all", c.speed) and i not in finished]
    for i in chosen:
        began = time.monotonic()
        found = resolve(claims[i].function)(**claims[i].arguments)
        result = {"id": i, **found, "seconds": round(time.monotonic() - began, 2), "speed": claims[i].speed}
        _replace(path, result)
        yield result


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def _replace(path: Path, result: dict[str, Any]) -> None:
    """Put a result in the place of an older one of the same claim; the file is whole at every moment."""
    rows = {**_finished(path), result["id"]: result}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(r) + "\n" for r in rows.values()))
