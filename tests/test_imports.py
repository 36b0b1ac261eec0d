"""What `import markovia` brings along: the environments' names, and next to nothing else."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "diffusers", "peft", "mujoco", "minari", "h5py", "sklearn", "scipy", "matplotlib", "tensorboard", "tyro", "rich")
PROBE = "import sys, time; t = time.process_time(); import {0}; print(time.process_time() - t); print(*sys.modules)"


def imported(name):
    """(CPU seconds, names of the modules that are loaded then) of an import in a fresh process; the quickest of three."""
    runs = [subprocess.run([sys.executable, "-c", PROBE.format(name)], capture_output=True, text=True, check=True).stdout for _ in range(3)]
    return min(float(out.splitlines()[0]) for out in runs), set(runs[0].splitlines()[1].split())


def test_markovia_is_imported_in_a_second_without_anything_heavy():
    seconds, modules = imported("markovia")
    assert seconds < 1.0, seconds
    assert not modules & set(HEAVY), modules & set(HEAVY)


@pytest.mark.parametrize("name", ["markovia.envs", "markovia.cli"])
def test_so_are_its_environments_names_and_its_command_line(name):
    assert not imported(name)[1] & set(HEAVY)


def test_agents_and_methods_bring_torch_but_neither_its_compiler_nor_language_models():
    _, modules = imported("markovia.agents, markovia.algos.systems")
    assert "torch" in modules
    assert not modules & ({"torch._dynamo", "torch._inductor"} | set(HEAVY) - {"torch"} - {"scipy"})


def test_runs_are_made_and_read_by_names_of_the_package_that_load_when_they_are_used():
    import markovia
    from markovia import loaded, runs

    assert markovia.load_run is loaded.load_run and markovia.train is runs.train
    assert {"load_run", "train"} <= set(dir(markovia))
    _, modules = imported("markovia; from markovia import load_run, train")
    assert not modules & ({"torch._dynamo", "torch._inductor"} | set(HEAVY) - {"torch", "scipy"})
