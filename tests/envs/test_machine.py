"""Memory and cores that this process may use, read from made-up files of /proc and /sys/fs/cgroup: both versions of groups, nested, or none."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from markovia.envs import machine
from markovia.envs.machine import cores, groups, memory

GB, NONE_1 = 2**30, 9223372036854771712  # what version 1 says where there is no limit


@pytest.fixture
def made(tmp_path):
    """A function that writes /proc/self/cgroup, 16 GB of which 10 are available, and files of groups; it returns (proc, root)."""

    def make(told, files):
        proc, root = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        root.mkdir()
        (proc / "self" / "cgroup").write_text(told)
        (proc / "meminfo").write_text(f"MemTotal:  {16 * GB // 1024} kB\nMemFree: 5 kB\nMemAvailable:  {10 * GB // 1024} kB\nHugePages_Total: 0\n")
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(f"{content}\n")
        return proc, root

    return make


FAULTS = """
import ctypes, mmap, resource, sys
from markovia.envs import machine
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault for 512 pages
kept = machine.keep_freed_memory() if sys.argv[1] == "keep" else None
b"x" * 2**23  # what malloc learns from its first large block is behind us
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    a, b, c = (bytearray(b"x") * 2**23 for _ in range(3))
    del a, b, c
pages = 50 * 3 * 2**23 / mmap.PAGESIZE
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages)
"""


def faults(mode, **environment):
    """(whether memory is kept, page faults per page of 150 blocks of 8 MiB) of a fresh process."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    ran = subprocess.run([sys.executable, "-c", FAULTS, mode], env={**own, **environment}, capture_output=True, text=True, check=True)
    kept, share = ran.stdout.split()
    return kept, float(share)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="glibc's malloc")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    kept, share = faults("keep")
    assert kept == "True" and share < 0.2
    assert faults("leave")[1] > 0.5
    kept, share = faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False" and share > 0.5


def test_folders_from_the_innermost_up(made):
    proc, root = made("4:memory:/a/b\n3:cpu,cpuacct:/c\n1:name=systemd:/x\n0::/u/v\n", {})
    unified = [root / "u" / "v", root / "u", root]
    assert groups("memory", proc, root)[:3] == [root / "memory" / "a" / "b", root / "memory" / "a", root / "memory"]
    assert [p for p in groups("memory", proc, root) if p in unified] == unified
    assert root / "cpu,cpuacct" / "c" in groups("cpu", proc, root) and root / "cpu" / "c" in groups("cpu", proc, root)
    assert not [p for p in groups("cpu", proc, root) if "memory" in p.parts or "x" in p.parts]


@pytest.mark.parametrize("told", ["0::/../../other\n", "garbage\n", ""])
def test_no_path_leads_out_of_the_folder_of_groups(told, made):
    proc, root = made(told, {})
    (root.parent / "other").mkdir()
    (root.parent / "other" / "memory.max").write_text("1\n")
    assert all(p.is_relative_to(root) and ".." not in p.parts for p in groups("memory", proc, root))
    assert memory(proc, root) == (10 * GB, 16 * GB)


def test_without_limits_it_is_what_is_installed(made):
    assert memory(*made("0::/user\n4:memory:/user\n", {"user/memory.max": "max", "memory/user/memory.limit_in_bytes": NONE_1})) == (10 * GB, 16 * GB)


def test_version_2_takes_the_least_of_the_hierarchy(made):
    # pod allows 4 GB and has used 1.5, of which 0.5 are a cache that can be given up: 3 GB are free; the container in it has no limit.
    files = {
        "pod/memory.max": 4 * GB, "pod/memory.current": 3 * GB // 2, "pod/memory.stat": f"anon 5\ninactive_file {GB // 2}\nactive_file {GB}",
        "pod/c/memory.max": "max", "pod/c/memory.current": GB,
    }  # fmt: skip
    assert memory(*made("0::/pod/c\n", files)) == (3 * GB, 4 * GB)


def test_version_2_in_a_container_that_sees_its_own_root(made):
    assert memory(*made("0::/\n", {"memory.max": 2 * GB, "memory.current": 5 * GB})) == (0, 2 * GB)


def test_a_limit_above_what_is_installed_changes_nothing(made):
    assert memory(*made("0::/\n", {"memory.max": 64 * GB, "memory.current": GB})) == (10 * GB, 16 * GB)


def test_version_1(made):
    # A container's path is not to be seen in its own mount, whose root holds the limit.
    files = {"limit_in_bytes": 3 * GB, "usage_in_bytes": 2 * GB, "stat": f"inactive_file 1\ntotal_inactive_file {GB}"}
    files = {f"memory/memory.{name}": content for name, content in files.items()}
    assert memory(*made("4:memory:/docker/0123\n0::/\n", files)) == (2 * GB, 3 * GB)


def test_damaged_numbers_are_no_limit(made):
    assert memory(*made("0::/\n", {"memory.max": "a lot", "cpu.max": "x y"})) == (10 * GB, 16 * GB)


def test_without_proc_the_system_is_asked(tmp_path, monkeypatch):
    free, total = memory(tmp_path, tmp_path)
    assert 0 < free <= total
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert memory(tmp_path, tmp_path)[1] == pytest.approx(total, rel=0.01)
    monkeypatch.setattr(os, "sysconf_names", {})
    assert memory(tmp_path, tmp_path) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("told", "files", "expected"),
    [
        ("0::/\n", {}, 6),
        ("0::/\n", {"cpu.max": "max 100000"}, 6),
        ("0::/a\n", {"a/cpu.max": "250000 100000"}, 3),  # two and a half
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000"}, 1),
        ("3:cpu,cpuacct:/x\n", {"cpu,cpuacct/cpu.cfs_quota_us": -1, "cpu,cpuacct/cpu.cfs_period_us": 100000}, 6),
        ("3:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": 400000, "cpu,cpuacct/x/cpu.cfs_period_us": 100000}, 4),
        ("3:cpu:/x\n", {"cpu/cpu.cfs_quota_us": 50000, "cpu/cpu.cfs_period_us": 100000}, 1),
        ("3:cpu:/x\n", {"cpu/cpu.cfs_quota_us": 50000, "cpu/cpu.cfs_period_us": 0}, 6),
        ("", {}, 6),
    ],
)
def test_cores_are_those_allowed_and_paid_for(told, files, expected, made, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert cores(*made(told, files)) == expected


def test_where_nobody_tells_which_cores_are_allowed_all_are_counted(made, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    places = made("0::/\n", {})
    assert cores(*places) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(*places) == 1


def test_estimates_and_threads_ask_here(monkeypatch):
    import torch

    from markovia.algos.on_policy.memory import available
    from markovia.envs.control.mujoco_batch import default_threads

    monkeypatch.setattr(machine, "memory", lambda: (1.0, 2.0))
    monkeypatch.setattr(machine, "cores", lambda: 3)
    assert available(torch.device("cpu")) == (1.0, 2.0)
    assert (default_threads(8), default_threads(2)) == (3, 2)


def test_a_run_computes_on_no_more_threads_than_it_has_cores(tmp_path, monkeypatch):
    import torch

    from markovia.algos.presets import configure, override
    from markovia.runs import train

    seen = []
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr("markovia.algos.setup.num_threads", lambda method, setup, available: seen.append(available) or 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    method = override(configure("ppo", "markovia/TokenTree-v0"), {"num_env_steps": 8, "num_envs": 4, "num_steps": 2})
    usual, chosen = torch.set_num_threads, []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: chosen.append(n) or usual(1))
    train(method, "markovia/TokenTree-v0", out=Path(tmp_path) / "run", num_checkpoints=1, eval_episodes=0, progress=False)
    assert seen == [2] and chosen == [1, 8]
