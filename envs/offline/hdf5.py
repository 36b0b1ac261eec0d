"""What an HDF5 file may hold that someone else made: arrays of numbers that lie in the file itself and are not larger than it can mean."""

from __future__ import annotations

from typing import Any

from markovia.envs.untrusted import SMALL

MAX_RATIO = 1100  # of an array to its bytes in the file: what HDF5's strongest compression reaches
MAX_DEPTH = 16  # groups in groups


def refused(dataset: Any, numbers: bool = True) -> str | None:
    """Why an array is not read, None where it can be. Nothing of it is read, and no memory taken, to find out."""
    if dataset.is_virtual or dataset.external:
        return "lies in other files, which an HDF5 file of ours never does; copy the values into this one"
    if numbers and dataset.dtype.kind not in "biuf":
        return f"holds {str(dataset.dtype)[:80]}, expected numbers"
    if dataset.shape is None:
        return "has no values at all"
    size, stored = int(dataset.size) * int(dataset.dtype.itemsize), int(dataset.id.get_storage_size())
    if size > SMALL and size > MAX_RATIO * stored:
        return f"has the shape {dataset.shape}, {size} bytes, but the file holds {stored} bytes of it; it is refused before memory is taken"
    return None


def links_outside(group: Any, depth: int = 0) -> str | None:
    """The name of a link to another file, or of a group nested too deeply; None where the file holds everything itself."""
    import h5py

    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            return str(name)
        if isinstance(link, h5py.HardLink) and isinstance(group[name], h5py.Group):
            found = str(name) if depth >= MAX_DEPTH else links_outside(group[name], depth + 1)
            if found is not None:
                return found
    return None


def too_large(group: Any) -> str | None:
    """The first array below a group that is not read, and why; strings and pictures are allowed."""
    import h5py

    for name in group:
        thing = group[name]
        if isinstance(thing, h5py.Dataset):
            why = refused(thing, numbers=False)
            found = None if why is None else f"{name} {why}"
        else:
            found = too_large(thing) if isinstance(thing, h5py.Group) else f"{name} is neither array nor group"
        if found is not None:
            return found
    return None
