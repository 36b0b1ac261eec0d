"""What is said to a name that is not known."""

import pytest

from markovia.envs.names import nearest


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("ppoo", ["ppo", "trpo"], "; did you mean 'ppo' or 'trpo'?"),
        ("dapo", ["grpo", "grpo/dapo", "rloo"], "; did you mean 'grpo/dapo'?"),  # the namespace was forgotten
        ("Digit-v0", ["markovia/Digits-v0"], "; did you mean 'markovia/Digits-v0'?"),
        ("xyz", ["ppo"], ""),
        ("ppo", [], ""),
    ],
)
def test_nearest(name, known, hint):
    found = nearest(name, known)
    assert found.startswith(hint.rstrip("?")) and bool(found) == bool(hint)
