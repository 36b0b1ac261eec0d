"""Files of every format that is read, changed in ways that hypothesis chooses: only errors that teach may come, no crash, and no code may run.

    python tests/trust/fuzz.py --minutes 10 --format checkpoint config jsonl hdf5 minari
    python tests/trust/fuzz.py --examples jsonl=100
    python tests/trust/fuzz.py --replay tests/trust/corpus/<name>

Inputs that failed are kept in tests/trust/corpus (test_fuzz.py reads them all again); each batch runs in a process of its own with 3 GB of memory to
spare, so that a crash of a library is found too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from formats import FORMATS, Files, files_of, write
from hypothesis import HealthCheck, Phase, given, seed, settings

CORPUS = Path(__file__).parent / "corpus"
SPARE = 3 * 2**30
BATCH = 200
# What a reader of files has no reason to do; a module that only a file names is imported by nobody else.
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect", "ctypes.dlopen", "os.remove",
)  # fmt: skip
_watched: list[str] = []  # the folder that may be written, while an input is read


class Forbidden(BaseException):
    """Something that reading a file must not do; no handler of errors can swallow it."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in _FORBIDDEN and not (event == "os.remove" and str(arguments[0]).startswith(_watched[0])):
        raise Forbidden(f"{event} {arguments!r:.200}")
    if event == "import" and str(arguments[0]).partition(".")[0] == "fuzz_bait":
        raise Forbidden("a module that a file named was imported")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR) and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith(_watched[0]) and not path.startswith("/dev/") and "__pycache__" not in path:
            raise Forbidden(f"{path} was opened for writing")


def watch() -> None:
    """From here on this process tells what it does while an input is read."""
    sys.addaudithook(_hook)


def checked(name: str, files: Files, folder: Path) -> None:
    """One input, watched. Raises whatever is not an error that teaches."""
    write(files, folder)
    _watched.append(os.path.realpath(folder))
    try:
        FORMATS[name].read(folder)
    finally:
        _watched.clear()


def batch(name: str, number: int, folder: Path, examples: int = BATCH) -> int:
    """`examples` inputs of the stream `number`; how many were tried. Raises the first failure, shrunk."""
    tried = 0

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(FORMATS[name].bad())
    def one(files: Files) -> None:
        nonlocal tried
        tried += 1
        checked(name, files, folder / "input")

    one()
    return tried


def keep(name: str, folder: Path, why: str) -> Path:
    """Put a failing input into the corpus."""
    files = files_of(folder)
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]
    place = CORPUS / f"{name}-{digest}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("events.out*"))
    print(f"{place}: {why}", flush=True)
    return place


def brief(error: BaseException) -> str:
    """An exception and the last places it came through, without hypothesis' notes, which repeat the input."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return "".join([f"{type(error).__name__}: {error!s:.400}", *(f"\n    {Path(f.filename).name}:{f.lineno} {f.line}" for f in frames)])


def apart(name: str, number: int, folder: Path, examples: int = BATCH) -> tuple[int, str | None]:
    """(inputs tried, what went wrong) of a batch in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 0
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
        watch()
        try:
            told: tuple[int, str | None] = batch(name, number, folder, examples), None
        except BaseException as error:
            told = 0, brief(error)
        with os.fdopen(write, "w") as out:
            json.dump(told, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return 0, f"the process ended with status {status}"
    tried, why = json.loads(text)
    return tried, why


def long_run(name: str, minutes: float, first: int) -> dict[str, Any]:
    """Batches until the time is over; every failure goes into the corpus."""
    number, tried, failures = first, 0, []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checked(name, FORMATS[name].good(), folder / "input")  # imports what the batches need
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            count, why = apart(name, number, folder)
            tried, number = tried + (count or BATCH), number + 1
            if why is not None:
                failures.append(str(keep(name, folder / "input", why).name))
        minutes = (time.monotonic() - began) / 60
    return {"format": name, "minutes": round(minutes, 2), "inputs": tried, "failures": sorted(set(failures))}


def table(results: dict[str, Any]) -> str:
    """The results of long runs in Markdown, as docs/trust.md shows them."""
    rows = ["| format | minutes | inputs | failures |", "|---|---|---|---|"]
    rows += [f"| {name} | {found['minutes']:g} | {found['inputs']} | {len(found['failures'])} |" for name, found in results.items()]
    return "\n".join(rows) + "\n"


def few(counts: dict[str, str], number: int) -> int:
    """So many inputs of each format; 1 when one of them failed."""
    with tempfile.TemporaryDirectory() as place:
        for name in counts:
            checked(name, FORMATS[name].good(), Path(place) / "input")
        wrong = {name: apart(name, number, Path(place), int(count))[1] for name, count in counts.items()}
    print(*(f"{name}: {why}" for name, why in wrong.items() if why is not None), sep="\n")
    return int(any(why is not None for why in wrong.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="per format")
    parser.add_argument("--format", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, help="JSON file for what was tried and found; one entry per format")
    parser.add_argument("--examples", nargs="+", help="FORMAT=COUNT: so many inputs of each instead of minutes; nothing is kept")
    parser.add_argument("--replay", type=Path, help="read one input of the corpus again")
    args = parser.parse_args()
    if args.replay is not None:
        with tempfile.TemporaryDirectory() as place:
            checked(args.replay.name.partition("-")[0], files_of(args.replay), Path(place) / "input")
        print("an error that teaches, or none")
        return 0
    if args.examples is not None:
        return few(dict(e.split("=") for e in args.examples), args.seed)
    found = json.loads(args.out.read_text()) if args.out is not None and args.out.is_file() else {}
    for name in args.format:
        found[name] = long_run(name, args.minutes, args.seed)
        print(found[name], flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(found[name]["failures"] for name in args.format))


if __name__ == "__main__":
    sys.exit(main())
