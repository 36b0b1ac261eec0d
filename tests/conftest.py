"""Fixtures that several test files share."""

import pytest


@pytest.fixture
def trap(tmp_path):
    """(an object whose unpickling makes a file, the path of that file)."""
    proof = tmp_path / "owned"

    class Trap:
        def __reduce__(self):
            return (open, (str(proof), "w"))

    return Trap(), proof
