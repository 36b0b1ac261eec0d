"""What the library holds, read from its tables: methods, environments, claims."""

from __future__ import annotations

import importlib
import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from pprint import pformat
from typing import TYPE_CHECKING, Any

from markovia.envs.machine import keep_freed_memory
from markovia.rundir import write_text

if TYPE_CHECKING:
    from markovia.algos.table import Row

_ROOT = Path(__file__).resolve().parent.parent
_COMMITTED = _ROOT / "benchmarks" / "results" / "claims.jsonl"
SHIPPED = Path(__file__).with_name("results") / "claims.jsonl"  # of an installed package; a checkout has none there


def systems() -> list[dict[str, Any]]:
    """Every method as plain JSON, in the order of the tables, with what the last measurement of its claim found."""
    from markovia.algos.systems import rows

    finished = kept_results()
    return [
        {
            "id": r.id, "new": r.new, "parent": r.parent, "paper": r.paper, "kinds": list(r.kinds), "functions": list(r.functions),
            "run": command(r), "claim": r.claim, "result": verdict(r.claim, finished),
        }
        for r in rows().values()
    ]  # fmt: skip


def command(row: Row) -> str:
    """How a method is run: trained, or, where it trains nothing, by the command that measures it."""
    from markovia.algos.families import family_of
    from markovia.algos.measures import Measure
    from markovia.algos.systems import Method

    if isinstance(row.value, Method):
        sources = {"environment": "--env ID", "dataset": "--env ID --dataset ID_OR_FILE", "preferences": "--data FILE --model NAME"}
        return f"markovia train {row.id} {sources[family_of(row.value).reads]}"
    return "markovia dataset ID" if isinstance(row.value, Measure) else f"markovia claims {row.claim}"


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
    """file:line of a function or class, relative to the checkout where there is one; of a decorated function its own, not the decorator's."""
    thing = inspect.unwrap(thing)
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
    lines.append(f"  run     {command(row)}")
    lines.append(f"  claim   {row.claim}: {verdict(row.claim, kept_results())} (markovia claims {row.claim})")
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
    finished = _finished(results) if results else kept_results()
    return [f"{i}  {c.speed}  {verdict(i, finished)}  {c.function}" for i, c in known_claims().items() if speed in ("all", c.speed)]


def verdict(claim: str, finished: dict[str, dict[str, Any]]) -> str:
    """What the last measurement of a claim found."""
    return "not run" if claim not in finished else "holds" if finished[claim]["holds"] else "does not hold"


def default_results() -> Path:
    """Where results are written: those committed with the checkout; in the current folder for an installed package."""
    return _COMMITTED if _COMMITTED.parent.is_dir() else Path("claims.jsonl")


def kept_results() -> dict[str, dict[str, Any]]:
    """By claim what was measured here, and for the others what came with the installed package."""
    return {**_finished(SHIPPED), **_finished(default_results())}


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
    keep_freed_memory()  # claims step their drivers themselves, outside the loop of a run, which does it too
    chosen = ids or [i for i, c in claims.items() if speed in ("all", c.speed) and i not in finished]
    for i in chosen:
        began = time.monotonic()
        found = resolve(claims[i].function)(**claims[i].arguments)
        result = {"id": i, **found, "seconds": round(time.monotonic() - began, 2), "speed": claims[i].speed}
        _replace(path, result)
        yield result


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    """The results in a file by claim, none where there is no file. Raises ValueError for a file of something else."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError:
        rows = [None]
    if not all(isinstance(r, dict) and {"id", "holds"} <= r.keys() for r in rows):
        raise ValueError(f"{path} holds no results of claims (a JSON object with id and holds per line); restore it, or name another (--results)")
    return {r["id"]: r for r in rows}


def _replace(path: Path, result: dict[str, Any]) -> None:
    """Put a result in the place of an older one of the same claim; the file is whole at every moment."""
    rows = {**_finished(path), result["id"]: result}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(r) + "\n" for r in rows.values()))
