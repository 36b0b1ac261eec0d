"""Videos of runs, and what is told when they can't be drawn."""

import sys
import warnings
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch

from markovia.agents.control import ControlAgent
from markovia.agents.tabular import TabularAgent
from markovia.pictures import histograms_png, record_video
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
