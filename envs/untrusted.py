"""Reading what others wrote: JSON of bounded size and depth, pickles told by their content, sizes before memory is taken, code only where allowed.

What is promised with it stands in SECURITY.md; `tests/trust/fuzz.py` tries to break it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

MAX_JSON = 2**28  # bytes of one JSON file
MAX_LINE = 2**26  # characters of one line of a .jsonl file
MAX_GZIP = 200  # times a .gz file's own size that it may unpack to; texts reach about 20
SMALL = 2**26  # bytes that are always granted
PICKLE_HEAD = 2**16  # bytes of a file that are looked at for the operations of a pickle
TRUST = "MARKOVIA_TRUST_CODE"


def magic_of_pickle(path: str | Path) -> str | None:
    """What kind of pickle a file is, told by its first bytes and, of an archive, by its members; None for anything else. Nothing is unpickled."""
    path = Path(path)
    with path.open("rb") as f:
        head = f.read(9)
        size = os.fstat(f.fileno()).st_size
    # A safetensors file begins with the length of its header, whose first bytes may be any; no pickle has a brace behind a length that fits.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return None
    if head[:1] == b"\x80" and head[1:2] in (b"\x00", b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a pickle of protocol {head[1]}"
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
            return None
        found = next((n for n in names if n.endswith(".pkl")), None)
        return None if found is None else f"a PyTorch archive with the pickle {found!r}"
    if head[:6] == b"\x93NUMPY":
        with path.open("rb") as f:
            return "a NumPy file of pickled objects" if b"'|O'" in f.read(256) else None
    protocol = unmarked_pickle(path)
    return None if protocol is None else f"a pickle of protocol {protocol}"


class _Longer(Exception):
    """What is looked at has ended, the file has not."""


class _Head(io.BytesIO):
    """The first bytes of a file of `size` bytes; raises _Longer where an operation begins or goes on behind them."""

    def __init__(self, head: bytes, size: int) -> None:
        super().__init__(head)
        self.length, self.size = len(head), size

    def read(self, n: int | None = -1) -> bytes:
        if self.length < self.tell() + (n or 0) <= self.size:
            raise _Longer
        return super().read(n)

    def readline(self, n: int | None = -1) -> bytes:
        first, line = self.tell() == 1, super().readline(n)
        # A text that begins with a letter of an operation may be one long line.
        if not line.endswith(b"\n") and self.length < self.size and not first:
            raise _Longer
        return line


def _operations(head: bytes, size: int) -> tuple[int, int] | None:
    """(protocol, bytes up to the stop) of the pickle that a file of `size` bytes begins with, its operations fitting the stack; None for none."""
    stack: list[Any] = []
    protocol, end, mark = 0, 0, pickletools.markobject
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strings with odd escapes
            reader = _Head(head, size)
            for op, _, _ in pickletools.genops(reader):
                protocol, end, before = max(protocol, op.proto), reader.tell(), list(op.stack_before)
                if mark in before:
                    while stack and stack[-1] is not mark:
                        stack.pop()
                    if not stack:
                        return None
                    stack.pop()
                    before = before[: before.index(mark)]
                kept = len(stack) - len(before)
                if kept < 0 or (mark in stack[kept:] and op.name != "POP"):
                    return None
                stack[kept:] = op.stack_after
    except _Longer:
        return protocol, size
    except ValueError:
        return None
    return protocol, end


def unmarked_pickle(path: Path) -> int | None:
    """The protocol of a pickle that does not begin with its number, as those of protocols 0 and 1: operations from the first byte to a stop.

    Nothing, or another pickle, may follow the stop, since a text may begin with a few letters that are operations. At most PICKLE_HEAD bytes are
    read, and nothing is unpickled: operations that go on behind them are a pickle too.
    """
    with path.open("rb") as f:
        head, size = f.read(PICKLE_HEAD), os.fstat(f.fileno()).st_size
    found = _operations(head, size)
    if found is None:
        return None
    protocol, end = found
    rest = head[end:].lstrip()
    another = rest[:1] == b"\x80" or _operations(rest, size - len(head) + len(rest)) is not None
    return protocol if not rest or another else None


def refuse_pickle(path: str | Path) -> None:
    """Raises ValueError for a pickle, whatever its name: loading one runs the code in it, so it is never opened as one."""
    found = magic_of_pickle(path)
    if found is not None:
        raise ValueError(
            f"{path} is {found}, and loading a pickle runs the code in it; nothing in it was run. Only safetensors and JSON are read: where "
            "you trust the file, load it with its own library and write the tensors with safetensors.torch.save_file"
        )


def parse_json(text: str | bytes, name: str | Path) -> Any:
    """The value of a JSON text. Raises ValueError for what is no JSON, holds too long a number or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be one of ours; nothing in it was run") from None
    except ValueError as error:
        raise ValueError(f"{name} is damaged or not JSON ({error}); nothing in it was run") from error


def read_json(path: str | Path, most: int = MAX_JSON) -> Any:
    """The value in a JSON file of at most `most` bytes. Raises FileNotFoundError, and ValueError for anything that is not such a file."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a JSON file")
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > most:
            raise ValueError(f"{path} has {size} bytes, at most {most} are read as JSON; it is not a file of ours")
        data = f.read(most + 1)
    refuse_pickle(path)
    return parse_json(data, path)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file or .gz file in UTF-8, one line in memory at a time.

    Raises ValueError for a line of more than MAX_LINE characters, for what is not UTF-8, a damaged archive, and one that unpacks to more than
    MAX_GZIP times its size.
    """
    refuse_pickle(path)
    packed = path.suffix == ".gz"
    most = max(SMALL, MAX_GZIP * path.stat().st_size) if packed else None
    read = number = 0
    with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as f:
        while True:
            number += 1
            try:
                line = f.readline(MAX_LINE + 1)
            except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {number} can't be read ({error}); it is damaged or not text in UTF-8, fetch it again") from error
            if not line:
                return
            read += len(line)
            if len(line) > MAX_LINE:
                raise ValueError(f"{path}, line {number} has more than {MAX_LINE} characters; write one JSON object per line")
            if most is not None and read > most:
                raise ValueError(f"{path} unpacks to more than {MAX_GZIP} times its size, as if made to fill memory; unpack it first")
            yield number, line


# -- code that a file names ----------------------------------------------------------------------------------------------------------------

_OWN = (
    "markovia.envs.text.rewards", "markovia.envs.text.tasks", "markovia.envs.text.files", "markovia.envs.text.lengths",
    "markovia.envs.text.openings", "markovia.envs.denoising.rewards", "markovia.envs.denoising.tasks", "markovia.envs.denoising.pipeline",
    "markovia.agents.reward_model",
)  # fmt: skip
_allowed: ContextVar[tuple[str, ...] | None] = ContextVar("code that may be named", default=None)


@contextlib.contextmanager
def code_from_file(trust: Sequence[str] = ()) -> Iterator[None]:
    """While a file is read: names of code in it are followed only into markovia's own tasks and rewards, the modules in `trust`, and those in the
    environment variable MARKOVIA_TRUST_CODE (names with commas between them, "*" for all)."""
    given = [name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip()]
    token = _allowed.set((*trust, *given))
    try:
        yield
    finally:
        _allowed.reset(token)


def check_code(module: str, name: str) -> None:
    """Raises ValueError when a file that is being read names a module that it may not run; a name that the user gave is always followed."""
    allowed = _allowed.get()
    if allowed is None or "*" in allowed or any(module == a or module.startswith(f"{a}.") for a in (*_OWN, *allowed)):
        return
    raise ValueError(
        f"the file names code of the module {module!r} ({name!r}), which is not run because a file says so; where you trust it, set {TRUST}={module} "
        f"(or pass trust=[{module!r}])"
    )


def check_found(found: Any, module: str, name: str) -> None:
    """The same of what a module gave: of markovia's own modules only what they define themselves, not what they have imported."""
    if _allowed.get() is not None and module in _OWN and getattr(found, "__module__", None) != module:
        raise ValueError(f"the file names {name!r}, which {module} has only imported; name the module that defines it")
