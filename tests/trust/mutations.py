"""How good files are made bad: hypothesis strategies over bytes, over JSON values, over safetensors files and over HDF5 files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

BAIT = "fuzz_bait:run"
WORDS = st.sampled_from(
    ["", "a", BAIT, "fuzz_bait:Some-v0", "os:system", "markovia.runs:train", "../../escape", "/etc/passwd", "nan", "inf", "1" * 5000, "\ud800",
     "\x00", "Box", "Dict", "O", "float32", "(1000000000,)f8", "markovia/TokenTree-v0", "CartPole-v1", "file:///etc", "run:../..", "type"]
)  # fmt: skip
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**6, 10**9])
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS | st.integers() | st.floats() | st.text(max_size=8)
JUNK = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=4), max_leaves=8)

HEADS = [b"\x80\x04", b"PK\x03\x04", b"\x1f\x8b", b"\x93NUMPY", b"\x89HDF\r\n\x1a\n", b"[" * 5000]


@st.composite
def changed_bytes(draw: Any, good: bytes) -> bytes:
    """The file with up to four spots changed, cut, doubled or filled with something else; now and then something else altogether."""
    out = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(out), 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "drop", "double", "fill", "head"]))
        if how == "flip" and at < len(out):
            out[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del out[at:]
        elif how == "insert":
            out[at:at] = draw(st.binary(max_size=16))
        elif how == "drop":
            del out[at : at + draw(st.integers(1, 64))]
        elif how == "double":
            out[at:at] = out[at : at + draw(st.integers(1, 64))]
        elif how == "fill":
            out[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f", b"\x80\x04\x95....", b"PK\x03\x04...."]))
        else:
            out[: draw(st.integers(0, 8))] = draw(st.sampled_from(HEADS))
    return bytes(out)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something can be changed."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in items for p in places(v, (*path, k)))]


def put(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """The value with the entry at a path changed; DROP takes it away."""
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    new = put(copy[path[0]], path[1:], change)
    if new is DROP:
        del copy[path[0]]
    else:
        copy[path[0]] = new
    return copy


DROP = object()


@st.composite
def changed_json(draw: Any, good: Any) -> Any:
    """The JSON value with up to three entries replaced, dropped, renamed or wrapped."""
    value = good
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        how = draw(st.sampled_from(["junk", "junk", "number", "drop", "wrap", "key"]))
        if how == "drop" and path:
            value = put(value, path, lambda old: DROP)
        elif how == "key":
            key, new = draw(WORDS | st.text(max_size=6)), draw(JUNK)
            value = put(value, path, lambda old, key=key, new=new: {**old, key: new} if isinstance(old, dict) else new)
        elif how == "wrap":
            value = put(value, path, lambda old: [old])
        else:
            new = draw(NUMBERS if how == "number" else JUNK)
            value = put(value, path, lambda old, new=new: new)
    return value


def dump(value: Any) -> bytes:
    """JSON as others write it: NaN, lone surrogates and all."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def changed_text(draw: Any, good: bytes) -> bytes:
    """A JSON file: mostly another value, sometimes other bytes, sometimes nested beyond reason."""
    how = draw(st.sampled_from(["value"] * 6 + ["bytes", "deep"]))
    if how == "deep":
        return b"[" * draw(st.sampled_from([100, 20_000, 200_000]))
    return draw(changed_bytes(good)) if how == "bytes" else dump(draw(changed_json(json.loads(good))))


@st.composite
def changed_safetensors(draw: Any, good: bytes) -> bytes:
    """A safetensors file: other bytes, or a header that says something else about the same tensors."""
    if draw(st.booleans()):
        return draw(changed_bytes(good))
    size = int.from_bytes(good[:8], "little")
    header = dump(draw(changed_json(json.loads(good[8 : 8 + size]))))
    told = draw(st.sampled_from([len(header)] * 5 + [0, 2**63, len(header) + 1, len(header) - 1, 2**27]))
    return told.to_bytes(8, "little") + header + good[8 + size :]


DTYPES = ["f4", "f8", "i8", "u1", "?", "S3", "f2", "c8", "i4"]


@st.composite
def arrays_of(draw: Any, names: tuple[str, ...]) -> list[tuple[str, str, Any]]:
    """What `write_hdf5` writes: (name, kind, details) of each column."""
    out = []
    rows = draw(st.integers(0, 4))
    for name in names:
        kind = draw(st.sampled_from(["plain"] * 6 + ["lazy", "external", "virtual", "link", "soft", "group", "text", "scalar", "none", "missing"]))
        shape = (rows if draw(st.integers(0, 5)) else draw(st.integers(0, 4)), *draw(st.lists(st.integers(0, 3), max_size=2)))
        out.append((name, kind, (shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0, 1, float("nan"), 2])))))
    return out


def write_hdf5(path: Path, columns: list[tuple[str, str, Any]]) -> None:
    """An HDF5 file of columns that hold what they say, lie elsewhere, are not there, or claim to be larger than any disk."""
    import h5py
    import numpy as np

    with h5py.File(path, "w") as file:
        for name, kind, (shape, dtype, value) in columns:
            if kind == "plain":
                with np.errstate(invalid="ignore"):
                    file[name] = np.full(shape, value, "f8").astype(dtype)
            elif kind == "lazy":
                file.create_dataset(name, shape=(2**40, 3), dtype="f8", chunks=(1024, 3))
            elif kind == "external":
                file.create_dataset(name, shape=(4,), dtype="u1", external=[("/etc/passwd", 0, 4)])
            elif kind == "virtual":
                layout = h5py.VirtualLayout((4,), "f8")
                layout[:] = h5py.VirtualSource("elsewhere.h5", "x", shape=(4,))
                file.create_virtual_dataset(name, layout)
            elif kind in ("link", "soft"):
                file[name] = h5py.ExternalLink("elsewhere.h5", "/x") if kind == "link" else h5py.SoftLink(f"/{name}")
            elif kind == "group":
                file.create_group(name).create_group("inner")
            elif kind == "text":
                file[name] = ["words"] * max(shape[0], 1)
            elif kind == "scalar":
                file[name] = 1.0
            elif kind == "none":
                file[name] = h5py.Empty("f4")
