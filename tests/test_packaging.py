"""The wheel holds every module and data file of the tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"markovia": "markovia", "benchmarks/claims": "markovia/claims"} | {name: f"markovia/{name}" for name in ("envs", "agents", "algos")}


def test_wheel_holds_every_file(tmp_path):
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    source = tmp_path / "source"  # a copy: building in the tree would leave build/ there, and pick up what is not committed
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{target}{name[len(folder) :]}"
        for name in filter(None, tracked)
        for folder, target in MAPPED.items()
        if name.startswith(f"{folder}/") and (ROOT / name).is_file()
    }
    assert len(expected) > 20
    assert sorted(expected - held) == []
    assert {name for name in held if name.startswith("markovia/results/")} == {"markovia/results/claims.jsonl"}
