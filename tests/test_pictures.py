"""Videos of runs, and what is told when they can't be drawn."""

import json
import sys
import warnings
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch

from markovia import pictures
from markovia.agents.control import ControlAgent
from markovia.agents.tabular import TabularAgent
from markovia.pictures import histograms_png, plot_runs, record_video
from markovia.rundir import RunError

torch.set_num_threads(1)
CARTPOLE = "CartPole-v1"


@pytest.fixture
def agent():
    env = gym.make(CARTPOLE)
    torch.manual_seed(0)
    return ControlAgent.from_spaces(env.observation_space, env.action_space, hidden=(8,))


@pytest.mark.parametrize("values", [np.array([0.6, np.nextafter(0.6, 1)]), np.float32([1, 1 + 1e-7]), np.full(3, 1e20), np.arange(3)])
def test_values_that_differ_by_rounding_have_a_histogram(values):
    assert histograms_png({"return": {"": values}}, "t")[:4] == b"\x89PNG"


@pytest.fixture
def legends(monkeypatch):
    """The texts of each panel's legend, of plots to come."""
    made, real = [], pictures._axes
    monkeypatch.setattr(pictures, "_axes", lambda *size: made.append(real(*size)) or made[-1])
    return lambda: [[text.get_text() for text in ax.get_legend().get_texts()] for ax in made[-1][1]]


def finished(folder, seed=0, lr=0.1, **more):
    """The folder of a run of two iterations."""
    folder.mkdir()
    settings = {"type": "OnPolicy", "gamma": 0.99, "solver": {"type": "Adam", "lr": lr}}
    config = {"env": CARTPOLE, "method": "ppo", "settings": settings, "env_kwargs": {}, "agent_options": {}, "seed": seed, **more}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"iteration": k, "num_env_steps": 10 * k, "return": float(k)} for k in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_only_runs_that_differ_in_their_seed_are_one_line(tmp_path, legends):
    out, first = tmp_path / "c.png", finished(tmp_path / "a")
    plot_runs([first, finished(tmp_path / "b", 1), first, tmp_path / "b" / ".." / "a"], out)
    assert legends() == [["ppo (2 seeds)"]]
    plot_runs([first, finished(tmp_path / "again", commit="another")], out)
    assert legends() == [["ppo (1 seed)"]]
    unlike = [finished(tmp_path / "c", 1, lr=0.2), finished(tmp_path / "d", agent_options={"hidden": [8]})]
    plot_runs([first, tmp_path / "b", *unlike, finished(tmp_path / "e", method="a2c")], out)
    a, c, d, e = legends()[0]
    assert a == "ppo, solver.lr=0.1 (2 seeds)" and c == "ppo, solver.lr=0.2 (1 seed)" and e == "a2c (1 seed)"
    assert d == "ppo, solver.lr=0.1, agent_options.hidden=[8] (1 seed)"
    plot_runs([first, finished(tmp_path / "f", env_kwargs={"gravity": 1.0})], out)
    assert legends() == [["ppo (1 seed)", "ppo, env_kwargs.gravity=1.0 (1 seed)"]]


def test_the_file_that_is_told_is_the_one_that_was_written(tmp_path):
    run = finished(tmp_path / "a")
    assert plot_runs([run], tmp_path / "noext") == tmp_path / "noext.png"
    assert plot_runs([run], tmp_path / "v1.2.svg") == tmp_path / "v1.2.svg"
    assert (tmp_path / "noext.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "v1.2.svg").exists()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"is a folder; name a file in it, e.g. .*curves.png"):
        plot_runs([run], tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_episodes_are_recorded_and_replaced(agent, tmp_path):
    pytest.importorskip("moviepy")
    folder = tmp_path / "video"
    for seed in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            made = record_video(agent, CARTPOLE, {"max_episode_steps": 12}, folder, 2, seed)
        assert [p.name for p in made] == ["rl-video-episode-0.mp4", "rl-video-episode-1.mp4"] and sorted(folder.iterdir()) == made
        assert all(p.read_bytes()[4:8] == b"ftyp" for p in made)  # how an MP4 file begins


class Endless(gym.Env):
    """An episode that nothing ends, in small pictures."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(4, np.float32), {}

    def step(self, action):
        return np.zeros(4, np.float32), 0.0, False, False, {}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


def test_an_endless_episode_is_cut(agent, tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    monkeypatch.setattr("markovia.pictures.LONGEST", 10)
    monkeypatch.setitem(gym.registry, "Endless-v0", gym.envs.registration.EnvSpec("Endless-v0", entry_point=Endless))
    with pytest.warns(UserWarning, match="Endless-v0 has no time limit.*10 steps"):
        made = record_video(agent, "Endless-v0", {}, tmp_path / "video", 2, 0)
    assert all(p.is_file() for p in made) and len(made) == 2


@pytest.mark.parametrize("package", ["moviepy", "pygame"])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(package, agent, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RunError, match=rf"(?i){package} is not installed.*pip install 'markovia\[control\]'"):
        record_video(agent, CARTPOLE, {}, tmp_path / "video", 1, 0)
    assert not list(tmp_path.glob("video/*"))


def test_an_environment_without_pictures_is_told(tmp_path):
    env = gym.make("markovia:markovia/Tabular-v0")
    agent = TabularAgent.from_spaces(env.observation_space, env.action_space)
    with pytest.raises(RunError, match=r"draws no pictures \(its render modes: none\); `markovia eval`"):
        record_video(agent, "markovia/Tabular-v0", {}, tmp_path / "video", 1, 0)
    assert not (tmp_path / "video").exists()
