"""Denoising runs: pictures and statistics at every checkpoint, GIFs, reward over KL, pipelines from the command line and back to disk."""

import io
import json
import math

import numpy as np
import pytest
import torch

from markovia.agents.denoising import DenoisingAgent
from markovia.algos.denoising.measure import chain_kl, describe, diversity, nearest, real_samples
from markovia.algos.presets import configure, override
from markovia.chains import chain_gif, gif, png, sheet, training_gif
from markovia.cli import run as command
from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import LinearDenoiser
from markovia.envs.denoising.tasks import make_task
from markovia.loaded import load_run
from markovia.rundir import Metrics, RunError
from markovia.runs import train
from markovia.settings import pipeline_arguments

pytest.importorskip("diffusers")
torch.set_num_threads(1)
Image = pytest.importorskip("PIL.Image")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------------------------------- measures
def test_chain_kl_by_hand():
    # Two steps x' = x + s z with s = 0.5, 2; the agent adds 1 and 3 to both entries: 2 (1/0.5)^2/2 + 2 (3/2)^2/2 = 4 + 2.25
    identity = torch.eye(2).expand(2, 2, 2)
    task = DenoisingTask(LinearDenoiser(identity, torch.zeros(2, 2)), GaussianKernel.direct([0.5, 2.0]), lambda x, c: x.sum(-1), (2,))
    agent = DenoisingAgent(LinearDenoiser(identity, torch.tensor([[1.0, 1.0], [3.0, 3.0]])), task.kernel, (2,), critic_hidden=None)
    record = agent.generate(task.starts(5, generator()), generator())
    torch.testing.assert_close(chain_kl(agent, task, record), torch.full((5,), 6.25))
    # and as the mean log-ratio of many chains, up to its sampling error
    record = agent.generate(task.starts(20_000, generator()), generator())
    with torch.no_grad():
        start = DenoisingAgent.from_task(task, critic_hidden=None).evaluate(record, ("logp",)).logp
    assert float((record.logp_old - start).sum(1).mean()) == pytest.approx(6.25, abs=0.1)


def test_diversity_and_distance_by_hand():
    data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    spread = (1 + 1 + math.sqrt(2)) / 3
    assert float(diversity(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), data)) == pytest.approx(2 / spread)
    assert float(diversity(torch.ones(4, 2), data)) == 0.0
    assert float(nearest(data + 100.0, data)) > 50 and float(nearest(data, data)) == 0.0
    assert float(nearest(torch.tensor([[3.0, 0.0]]), data)) == pytest.approx(2.0)  # two away from (1, 0), where real points are one apart


def test_a_task_without_data_is_compared_with_its_start():
    task = make_task("pipeline", num_steps=8)
    agent = DenoisingAgent.from_task(task, critic_hidden=None, batch=8)
    data = real_samples(agent, task, 0)
    assert data.shape == (32, 1, 8, 8) and torch.equal(data, real_samples(agent, task, 0))
    found = describe(agent, task, agent.generate(task.starts(16, generator(1)), generator(2)), data)
    assert found.keys() == {"sample_return", "kl_nats", "diversity", "nearest_data"} and found["kl_nats"] == pytest.approx(0.0, abs=1e-4)
    assert 0.7 < found["diversity"] < 1.3 and 0.7 < found["nearest_data"] < 1.3
    assert len(real_samples(agent, make_task("digits"), 0)) == 1797 and len(real_samples(agent, make_task("mixture2d"), 0)) == 1000


# -------------------------------------------------------------------------------------------------------------------------- pictures
def test_sheets_show_images_points_and_decoded_latents():
    digits, points = make_task("digits"), make_task("mixture2d")
    one = sheet(digits, torch.stack([torch.ones(8, 8), -torch.ones(8, 8)]), "two")
    assert (one[-60:, 2:60] == 255).all() and (one[-60:-4, 68:128] == 0).all() and (one[:19] < 128).any()  # white, black, and a title above
    plane = sheet(points, torch.tensor([[0.0, 0.0]]), "", points.data().numpy())
    red = (plane == [200, 30, 30]).all(-1)
    assert red.sum() == 9 and abs(np.argwhere(red).mean(0) - [plane.shape[0] - 192, 192]).max() < 1.5 and (plane == 205).any()
    latents = sheet(make_task("pipeline", num_steps=2), torch.randn(3, 1, 8, 8), "a\nb")
    assert latents.dtype == np.uint8 and latents.shape[2] == 3
    assert Image.open(io.BytesIO(png(latents))).size == latents.shape[1::-1]


def test_gifs_hold_every_frame():
    frames = [np.full((10, 12, 3), 20 * k, np.uint8) for k in range(5)]
    movie = Image.open(io.BytesIO(gif(frames)))
    assert movie.n_frames == 5 and movie.size == (12, 10)
    task = make_task("digits", num_steps=6)
    movie = Image.open(io.BytesIO(chain_gif(DenoisingAgent.from_task(task, critic_hidden=None), task, 4, 0)))
    assert movie.n_frames == 7
    movie.seek(6)
    assert movie.info["duration"] == 1800


# -------------------------------------------------------------------------------------------------------------------- runs and pipelines
def small(env, **changes):
    return override(configure("ddpo", env), {"num_env_steps": 32, "num_envs": 8, "solver": {"epochs": 1}, **changes})


def test_a_run_shows_its_samples_and_its_front(tmp_path, capsys):
    run, env = tmp_path / "run", "markovia/Digits-v0"
    train(small(env), env, out=run, env_kwargs={"num_steps": 4}, eval_episodes=0, num_checkpoints=2, progress=False)
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["000000.png", "000002.png", "000004.png"]
    rows = [row for row in Metrics(run).read() if "kl_nats" in row]
    assert [row["iteration"] for row in rows] == [2, 4]
    assert all(row.keys() >= {"sample_return", "sample_judge", "diversity", "nearest_data"} for row in rows) and rows[1]["kl_nats"] > 0
    assert Image.open(io.BytesIO(training_gif(run))).n_frames == 3 and training_gif(tmp_path) is None
    assert command(["video", str(run)]) == 0
    assert sorted(p.name for p in (run / "video").iterdir()) == ["chain.gif", "samples.png", "training.gif"]
    assert command(["plot", str(run), "--x", "kl_nats", "--y", "sample_return", "-o", str(tmp_path / "front.png")]) == 0
    assert Image.open(tmp_path / "front.png").size[0] > 100
    capsys.readouterr()
    assert command(["plot", str(run), "--x", "kl_natts"]) == 2
    assert "has no values of 'kl_natts'" in capsys.readouterr().err


def test_a_pipeline_is_trained_from_the_command_line_and_written_back(tmp_path, capsys):
    pytest.importorskip("peft")
    from markovia.envs.denoising.pipeline_network import example_pipeline, load_pipeline

    folder, run, out = tmp_path / "pipe", tmp_path / "run", tmp_path / "out"
    example_pipeline().save_pretrained(str(folder))
    argv = ["train", "ddpo", "--env", "markovia/Pipeline-v0", "--model", str(folder), "--reward", "markovia.envs.denoising.rewards:brightness"]
    argv += ["--agent-options", '{"lora": {"r": 2}}', "--env-kwargs", '{"num_steps": 3}', "--num-envs", "8", "--num-env-steps", "16"]
    argv += ["--solver.lr", "0.01", "--eval-episodes", "4", "--out", str(run), "--no-progress"]
    assert command(argv) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["env_kwargs"]["folder"] == str(folder) and "model" not in config["agent_options"]
    loaded = load_run(run)
    assert command(["export", str(run), "-o", str(out)]) == 0 and "DiffusionPipeline" in capsys.readouterr().out
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 700])
    with torch.no_grad():
        torch.testing.assert_close(load_pipeline(out).unet(x, t).sample, loaded.agent.network(x, t), rtol=1e-4, atol=1e-4)
    assert command(["export", str(run), "-o", str(out)]) == 2 and "not empty" in capsys.readouterr().err


def test_arguments_of_pipelines(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given, read = pipeline_arguments({"num_steps": 3}, tmp_path / "prompts.txt", ["a:b"], None)
    assert given == {"num_steps": 3, "prompts": str(tmp_path / "prompts.txt"), "reward": "a:b"} and list(read) == [given["prompts"]]
    with pytest.raises(ValueError, match="given twice"):
        pipeline_arguments({"reward": "brightness"}, None, ["a:b"], None)
    with pytest.raises(ValueError, match="one reward, got 2"):
        pipeline_arguments({}, None, ["a:b", "a:c"], None)
    with pytest.raises(RunError, match="no metrics yet"):
        from markovia.pictures import curve

        curve(tmp_path, "kl_nats")
