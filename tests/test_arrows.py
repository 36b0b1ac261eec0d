"""Arrows point one way, envs <- agents <- algos <- benchmarks, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"envs": {"envs"}, "agents": {"envs", "agents"}, "algos": {"envs", "agents", "algos"}}


def imported(file: Path) -> set[str]:
    """Every module name that a file imports, functions' own imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively; write the full name"
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("layer", ALLOWED)
def test_layers_import_only_what_lies_below(layer):
    for file in sorted((ROOT / layer).rglob("*.py")):
        for name in imported(file):
            assert name.split(".")[0] not in {"envs", "agents", "algos", "benchmarks", "claims"}, f"{file}: import markovia.{name}"
            parts = name.split(".")
            if parts[0] == "markovia" and len(parts) > 1:
                assert parts[1] in ALLOWED[layer], f"{file} imports {name}, which lies above {layer}/"


def test_import_is_light_and_brings_no_second_copy():
    code = (
        "import time; t = time.perf_counter(); import gymnasium; base = time.perf_counter() - t\n"
        "import markovia, sys\n"
        "took = time.perf_counter() - t\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'mujoco', 'sklearn', 'envs', 'agents', 'algos'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'markovia/Digits-v0' in gymnasium.registry\n"
        "print(took)"
    )
    # The best of three: other tests run beside this one.
    times = [float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(times) < 1.0
