"""Checkpoints: bit-equal round trips, nothing half-written, nothing run from a foreign file."""

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from markovia.agents.checkpoint import CheckpointError, load_agent, load_tensors, save_agent, save_tensors
from markovia.agents.control import ControlAgent
from markovia.agents.interface import Agent
from markovia.agents.tabular import TabularAgent

torch.set_num_threads(1)

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def control(**kwargs):
    torch.manual_seed(1)
    agent = ControlAgent.from_spaces(VECTOR, spaces.Box(-1.0, 1.0, (2,)), **kwargs)
    agent.observe(np.random.default_rng(0).normal(2.0, 3.0, (50, 3)), update=True)
    return agent


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def entries(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("kwargs", [{}, {"squash": True, "num_costs": 2, "hidden": (8,), "activation": "relu"}, {"normalize_obs": False}])
def test_control_round_trip_is_bit_equal_with_its_normaliser(tmp_path, kwargs):
    agent = control(**kwargs)
    back = Agent.load(agent.save(tmp_path / "a"))
    assert type(back) is ControlAgent and same(agent.state(), back.state()) and back.config() == agent.config()
    obs = np.random.default_rng(1).normal(size=(7, 3))
    assert np.array_equal(agent.predict(obs, deterministic=True)[0], back.predict(obs, deterministic=True)[0])
    assert entries(tmp_path) == ["a"] and entries(tmp_path / "a") == ["agent.json", "agent.safetensors"]


def test_tabular_round_trip(tmp_path):
    agent = TabularAgent.from_spaces(spaces.Discrete(3), spaces.Discrete(2), logits=torch.randn(3, 2), dtype="float64")
    back = Agent.load(agent.save(tmp_path / "a"))
    assert same(agent.state(), back.state()) and back.kind == "tabular"


def test_saving_twice_keeps_other_files_of_the_folder(tmp_path):
    agent = control()
    agent.save(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with torch.no_grad():
        agent.net["policy"].log_std.fill_(0.3)
    agent.save(tmp_path / "a")
    assert same(Agent.load(tmp_path / "a").state(), agent.state()) and (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_own_network_must_be_given_again(tmp_path):
    torch.manual_seed(0)
    agent = ControlAgent.from_spaces(VECTOR, spaces.Discrete(2), network=nn.Sequential(nn.Linear(3, 5), nn.Tanh()))
    agent.save(tmp_path / "a")
    with pytest.raises(ValueError, match="network="):
        Agent.load(tmp_path / "a")
    back = Agent.load(tmp_path / "a", network=nn.Sequential(nn.Linear(3, 5), nn.Tanh()))
    assert same(agent.state(), back.state())
    with pytest.raises(ValueError, match="does not fit"):
        Agent.load(tmp_path / "a", network=nn.Sequential(nn.Linear(3, 6), nn.Tanh()))


def test_tensors_round_trip_shared_strided_and_typed(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": base, "shared": base, "t": base.T, "i": torch.tensor(3), "b": torch.tensor([True]), "d": torch.rand(2).double()}
    meta = {"step": 3, "big": 2**80, "nested": [1, {"x": None}]}
    got, got_meta = load_tensors(save_tensors(tmp_path / "sub" / "t.safetensors", tensors, meta))
    assert same(got, tensors) and got_meta == meta


def test_one_changed_bit_is_noticed(tmp_path):
    path = save_tensors(tmp_path / "t.safetensors", {"w": torch.ones(4), "n": torch.tensor([True, False])}, {"step": 3})
    good = path.read_bytes()
    for place in (len(good) - 1, len(good) - 9, good.index(b"step") + len('step\\": ')):  # either tensor, and the number 3
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="does not match the hash"):
            load_tensors(path)
    path.write_bytes(good)
    assert load_tensors(path)[1] == {"step": 3}


def full_disk(monkeypatch):
    def write(path, data):
        with path.open("wb") as f:
            f.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("before", [False, True])
def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, before):
    agent = control()
    if before:
        agent.save(tmp_path / "a")
        save_tensors(tmp_path / "t.safetensors", {"x": torch.ones(2)})
    names = entries(tmp_path)
    full_disk(monkeypatch)
    with pytest.raises(OSError, match=r"could not save to .*No space left") as caught:
        agent.save(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        save_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(2)})
    assert entries(tmp_path) == names
    if before:
        assert same(Agent.load(tmp_path / "a").state(), agent.state())
        assert load_tensors(tmp_path / "t.safetensors")[0]["x"].eq(1).all()


@pytest.mark.parametrize("name", ["agent.safetensors", "agent.json"])
def test_pickle_posing_as_a_checkpoint_runs_nothing(tmp_path, name, trap):
    folder, (thing, proof) = save_agent(control(), tmp_path / "a"), trap
    for data in (pickle.dumps(thing), pickle.dumps({"w": thing}, protocol=0)):
        (folder / name).write_bytes(data)
        with pytest.raises(CheckpointError, match="nothing in it was run"):
            load_agent(folder)
    torch.save({"w": torch.ones(2)}, folder / name)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        load_agent(folder)
    assert not proof.exists()


def test_every_damage_is_a_checkpoint_error(tmp_path):
    folder = save_agent(control(), tmp_path / "a")
    weights, header = folder / "agent.safetensors", folder / "agent.json"
    good, text = weights.read_bytes(), header.read_text()
    for damaged in (good[: len(good) // 2], b"", good[:-1] + bytes([good[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_agent(folder)
    weights.write_bytes(good)
    for change in ({"schema": 99}, {"class": "os:system"}, {"config": {}}, {"config": []}, {"sha256": "0"}):
        header.write_text(json.dumps({**json.loads(text), **change}))
        with pytest.raises(CheckpointError):
            load_agent(folder)
    for junk in ("[]", "{", ""):
        header.write_text(junk)
        with pytest.raises(CheckpointError):
            load_agent(folder)
    header.write_text(text)
    assert isinstance(load_agent(folder), ControlAgent)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_agent(folder)
    with pytest.raises(CheckpointError, match="no agent in"):
        load_agent(tmp_path / "nowhere")


def test_foreign_safetensors_and_foreign_classes_are_refused(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not written by markovia"):
        load_tensors(tmp_path / "other.safetensors")

    class Mine(TabularAgent):
        pass

    with pytest.raises(ValueError, match="can't be rebuilt"):
        save_agent(Mine.from_spaces(spaces.Discrete(2), spaces.Discrete(2)), tmp_path / "a")
    assert entries(tmp_path) == ["other.safetensors"]
