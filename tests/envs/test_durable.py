"""Files put in place whole: the order in which content and names reach the disk, what a failure leaves, and where folders can't be flushed."""

import errno
import os
import stat
from pathlib import Path

import pytest

from markovia.envs import durable
from markovia.envs.durable import TEMPORARY, in_place, make_folder, write_whole


def plain(path):
    """A path's name as its final one: temporary names carry the number of the process."""
    return Path(path).name.replace(f"{TEMPORARY}{os.getpid()}-", TEMPORARY)


@pytest.fixture
def order(monkeypatch):
    """What is flushed and renamed, in the order in which it happens; descriptors are told by the path they were opened with."""
    done, opened, real_open, sync, replace = [], {}, os.open, os.fsync, os.replace

    def open_(path, *rest, **more):
        descriptor = real_open(path, *rest, **more)
        opened[descriptor] = path
        return descriptor

    def sync_(descriptor):
        done.append(("flush", plain(opened[descriptor])))
        sync(descriptor)

    def replace_(source, target):
        done.append(("rename", f"{plain(source)} -> {plain(target)}"))
        replace(source, target)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", sync_)
    monkeypatch.setattr(os, "replace", replace_)
    return done


def test_a_file_is_flushed_then_renamed_then_its_folder_is_flushed(tmp_path, order):
    write_whole(tmp_path / "x.json", b"new")
    assert order == [("flush", ".tmp-x.json"), ("rename", ".tmp-x.json -> x.json"), ("flush", tmp_path.name)]
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.json", b"new")]


def test_all_of_a_folder_is_flushed_before_it_is_renamed(tmp_path, order):
    with in_place(tmp_path / "made") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "a").write_text("1")
        (temporary / "b").write_text("2")
        (temporary / "link").symlink_to(tmp_path / "nowhere")
    assert sorted(order[:4]) == [("flush", ".tmp-made"), ("flush", "a"), ("flush", "b"), ("flush", "inner")]
    assert order[4:] == [("rename", ".tmp-made -> made"), ("flush", tmp_path.name)]
    assert (tmp_path / "made" / "inner" / "a").read_text() == "1" and (tmp_path / "made" / "link").is_symlink()


def test_what_lies_in_a_folder_that_is_put_in_place_later_is_flushed_once(tmp_path, order):
    with in_place(tmp_path / "made") as temporary:
        write_whole(temporary / "deep" / "a", b"1")
        with in_place(temporary / "b") as inner:
            inner.write_bytes(b"2")
    flushed = [name for what, name in order if what == "flush"]
    assert sorted(flushed) == sorted(["a", "deep", "b", ".tmp-made", tmp_path.name]) and order[-2][0] == "rename"
    assert order[-1] == ("flush", tmp_path.name) and (tmp_path / "made" / "deep" / "a").read_bytes() == b"1"


def test_new_folders_are_flushed_into_the_ones_that_hold_them(tmp_path, order):
    make_folder(tmp_path / "a" / "b")
    assert order == [("flush", tmp_path.name), ("flush", "a")]  # the name of a lies in tmp_path, that of b in a
    make_folder(tmp_path / "a" / "b")
    assert len(order) == 2
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        make_folder(tmp_path / "file" / "x")


@pytest.mark.parametrize("end", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_content_and_nothing_beside_it(tmp_path, end, monkeypatch):
    write_whole(tmp_path / "x", b"old")
    with pytest.raises(type(end)), in_place(tmp_path / "x") as temporary:
        temporary.write_bytes(b"ne")
        raise end
    with pytest.raises(type(end)), in_place(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("1")
        raise end

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "x", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"old")]


def test_two_files_change_in_the_order_in_which_the_blocks_end(tmp_path, order):
    with in_place(tmp_path / "second") as second, in_place(tmp_path / "first") as first:
        first.write_text("1")
        second.write_text("2")
    assert [name for what, name in order if what == "rename"] == [".tmp-first -> first", ".tmp-second -> second"]
    assert len([1 for what, _ in order if what == "flush"]) == 4


def test_folders_that_can_not_be_flushed_are_left_to_the_system(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(number):
        def act(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            sync(descriptor)

        return act

    for number in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing
        monkeypatch.setattr(os, "fsync", fsync(number))
        write_whole(tmp_path / "x", b"1")
    monkeypatch.setattr(os, "fsync", fsync(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_whole(tmp_path / "x", b"2")


def test_windows_flushes_files_alone(tmp_path, order, monkeypatch):
    monkeypatch.setattr(durable, "FOLDERS", False)
    with in_place(tmp_path / "made") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("1")
    make_folder(tmp_path / "x" / "y")
    assert order == [("flush", "a"), ("rename", ".tmp-made -> made")]  # and nothing for the new folders


def test_a_checkpoint_reaches_the_disk_before_its_name_and_after_the_lines_that_lead_to_it(tmp_path, order):
    from types import SimpleNamespace

    import torch
    from gymnasium import spaces

    from markovia.agents.tabular import TabularAgent
    from markovia.rundir import Metrics, save_checkpoint, write_json

    write_json(tmp_path / "config.json", {})
    assert [name for _, name in order] == [".tmp-config.json", ".tmp-config.json -> config.json", tmp_path.name]
    Metrics(tmp_path).append({"iteration": 1})
    order.clear()
    driver = SimpleNamespace(iteration=1, state=lambda: ({"x": torch.ones(1)}, {}))
    save_checkpoint(tmp_path, TabularAgent.from_spaces(spaces.Discrete(2), spaces.Discrete(2)), driver, {})
    flushed = [name for what, name in order if what == "flush"]
    content = [".tmp-000001", "agent", "agent.json", "agent.safetensors", "config.json", "driver.safetensors", "metrics.jsonl"]
    # checkpoints/ is new, so its name in the run's folder is flushed first of all.
    assert (flushed[0], sorted(flushed[1:8]), flushed[8]) == (tmp_path.name, content, "checkpoints")
    assert order[-2:] == [("rename", ".tmp-000001 -> 000001"), ("flush", "checkpoints")]
