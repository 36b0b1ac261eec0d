"""Pipelines of diffusers as denoising tasks: our chain gives the images that the pipeline's own call gives, whatever its conditions and latents."""

import json

import numpy as np
import pytest
import torch
from tiny_pipelines import PROMPTS, ddim_pipeline, ddpm_pipeline, dit_pipeline, stable_diffusion, unet

from markovia.envs.denoising.networks import GuidedDenoiser, build_network, network_config
from markovia.envs.denoising.pipeline import Decoder, difference_from_call, pipeline, read_prompts, write_pipeline
from markovia.envs.denoising.pipeline_network import PipelineDenoiser, example_pipeline, flat, nested
from markovia.envs.denoising.rewards import READY, brightness, compressibility, image_reward
from markovia.envs.denoising.tasks import make_env, make_task
from markovia.envs.denoising.unet import UNetDenoiser, chosen_row

diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)


def made(name, tmp_path):
    """(pipeline, prompts, guidance)."""
    return {
        "ddpm": lambda: (ddpm_pipeline(), None, 1.0),
        "ddim": lambda: (ddim_pipeline(), None, 1.0),
        "flow ddpm": lambda: (diffusers.DDPMPipeline(unet(), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)), None, 1.0),
        "dit": lambda: (dit_pipeline(), [3, 7], 1.0),
        "dit guided": lambda: (dit_pipeline(), [3, 7], 3.0),
        "stable diffusion": lambda: (stable_diffusion(tmp_path), PROMPTS, 1.0),
        "stable diffusion guided": lambda: (stable_diffusion(tmp_path), PROMPTS, 4.0),
    }[name]()


# ------------------------------------------------------------------------------------------------------- our chain is the pipeline's
@pytest.mark.parametrize("name", ["ddpm", "ddim", "flow ddpm", "dit", "dit guided", "stable diffusion", "stable diffusion guided"])
def test_our_chain_gives_the_images_of_the_pipelines_own_call(name, tmp_path):
    pipe, prompts, guidance = made(name, tmp_path)
    task = pipeline(pipe, prompts=prompts, guidance=guidance, num_steps=4)
    for steps, eta in ((2, 1.0), (4, 0.5), (5, 0.0)):
        assert difference_from_call(pipe, task, eta, guidance, steps) < 1e-5
    # and that says something: other noise, and other prompts, give other images
    images = task.decode(torch.randn(2, *task.sample_shape))
    assert images.shape[2:] == (16, 16) if "ddim" not in name and "ddpm" not in name else (8, 8)
    assert float((images[0] - images[1]).abs().max()) > 1e-4
    if prompts is not None:
        x, t = torch.randn(1, *task.sample_shape).expand(2, -1, -1, -1), torch.full((2,), 500)
        with torch.no_grad():
            out = task.network(x, t, torch.eye(2))
        assert float((out[0] - out[1]).abs().max()) > 1e-5


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_latent_of_a_chain_is_the_one_that_the_pipelines_callback_records(guidance, tmp_path):
    pipe = stable_diffusion(tmp_path)
    task = pipeline(pipe, prompts=PROMPTS, guidance=guidance, num_steps=5, eta=0.7)
    theirs = []
    pipe(
        prompt=PROMPTS, guidance_scale=guidance, num_inference_steps=5, eta=0.7, generator=torch.Generator().manual_seed(4), output_type="latent",
        callback_on_step_end=lambda pipe, k, t, found: theirs.append(found["latents"].clone()) or found,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    for k in range(5):
        mean, std = task.mean_std(x, k, torch.eye(2))
        x = mean + std * torch.randn(x.shape, generator=generator)
        torch.testing.assert_close(x, theirs[k], rtol=1e-4, atol=1e-4)


def test_conditions_are_recorded_and_none_is_the_empty_prompt(tmp_path, monkeypatch):
    pipe = stable_diffusion(tmp_path)
    network, shape = PipelineDenoiser.from_pipeline(pipe, PROMPTS)
    assert shape == (4, 8, 8) and network.guided and network.names == ("encoder_hidden_states",) and network.time_scale == 1.0
    with torch.no_grad():
        cat, none = (pipe.encode_prompt([p], "cpu", 1, False)[0] for p in ("a cat", ""))
    torch.testing.assert_close(network.row0[1:2], cat)
    torch.testing.assert_close(network.row0[:1], none)
    assert not torch.allclose(cat, none, atol=1e-3)
    # DiT has its batch the other way round, conditional half first, and label 1000 for none
    assert PipelineDenoiser.from_pipeline(dit_pipeline(), [3, 7])[0].row0.tolist() == [1000, 3, 7]
    assert chosen_row(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).tolist() == [0, 1, 2]
    # many prompts are encoded in parts
    monkeypatch.setattr("markovia.envs.denoising.pipeline_network.CHUNK", 1)
    torch.testing.assert_close(PipelineDenoiser.from_pipeline(pipe, PROMPTS)[0].row0, network.row0)
    assert nested(flat({"a": {"b": 1, "c": 2}, "d": 3})) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_a_scheduler_without_a_gaussian_step_can_be_replaced(tmp_path):
    pipe = stable_diffusion(tmp_path, diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1))
    with pytest.raises(ValueError, match=r"PNDMScheduler is not supported.*DDIMScheduler\.from_config"):
        pipeline(pipe, prompts=PROMPTS)
    assert pipeline(pipe, prompts=PROMPTS, scheduler="ddim", num_steps=3).kernel.kind == "ddim"
    with pytest.raises(ValueError, match="did you mean 'ddim'"):
        pipeline(pipe, prompts=PROMPTS, scheduler="dddim")


def test_a_pipeline_that_does_more_than_denoise_is_refused():
    class Vignette(diffusers.DDIMPipeline):
        def __call__(self, batch_size=1, generator=None, eta=0.0, num_inference_steps=50, output_type="pil"):
            found = super().__call__(batch_size, generator, eta, num_inference_steps, output_type=output_type)
            found.images *= 0.5
            return found

    pipe = Vignette(unet(), diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="Vignette does more in its call"):
        pipeline(pipe, num_steps=3)
    assert pipeline(pipe, num_steps=3, check=False).num_steps == 3


# ------------------------------------------------------------------------------------------------------------ tasks, rewards, folders
def test_a_folder_on_disk_is_a_task_and_a_gymnasium_environment(tmp_path):
    ddim_pipeline().save_pretrained(str(tmp_path / "pipe"))
    env = make_env("pipeline", folder=str(tmp_path / "pipe"), num_steps=3, render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    assert obs["sample"].shape == (64,) and env.render().shape == (128, 128, 3)
    for _ in range(3):
        obs, reward, terminated, *_ = env.step(np.zeros(64, np.float32))
    image = (torch.as_tensor(obs["sample"]).reshape(8, 8) / 2 + 0.5).clamp(0, 1)
    assert terminated and reward == pytest.approx(float(image.mean()), rel=1e-5)


def test_rewards_see_images_and_prompts(tmp_path):
    seen = []

    def reward(images, prompts):
        seen.append((images.shape, float(images.min()), float(images.max()), prompts))
        return [len(p) for p in prompts]

    task = pipeline(stable_diffusion(tmp_path), reward=reward, prompts=PROMPTS, num_steps=2)
    starts = task.starts(6, torch.Generator().manual_seed(0))
    found = task.rewards(starts["x"], starts["cond"])
    shape, low, high, prompts = seen[0]
    assert shape == (6, 3, 16, 16) and 0 <= low < high <= 1
    assert prompts == [PROMPTS[i] for i in starts["cond"].argmax(-1)] and found.tolist() == [len(p) for p in prompts]


def test_ready_rewards_by_hand():
    black, noise = torch.zeros(1, 1, 32, 32), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert brightness(0.25 + black).tolist() == [0.25]
    assert compressibility(black) > compressibility(noise)
    assert image_reward("incompressibility") is READY["incompressibility"] and image_reward(brightness) is brightness
    assert image_reward("markovia.envs.denoising.rewards:brightness") is brightness
    with pytest.raises(ValueError, match="did you mean 'brightness'"):
        image_reward("britness")


def test_the_decoder_is_differentiable_and_works_in_parts():
    vae_pipe = dit_pipeline()
    x = torch.randn(5, 4, 8, 8, requires_grad=True)
    whole, parts = Decoder(vae_pipe)(x), Decoder(vae_pipe, batch=2)(x)
    torch.testing.assert_close(whole, parts)
    (gradient,) = torch.autograd.grad(whole.sum(), x)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


def test_prompts_come_from_lists_and_files(tmp_path):
    (tmp_path / "lines.txt").write_text("a cat\n\n two dogs \n")
    (tmp_path / "list.json").write_text("[1, 2]")
    assert read_prompts(tmp_path / "lines.txt") == PROMPTS and read_prompts(str(tmp_path / "list.json")) == [1, 2] and read_prompts(None) is None
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="no file"):
        read_prompts("a cat")


def test_networks_of_pipelines_are_rebuilt_from_their_folder(tmp_path):
    dit_pipeline().save_pretrained(str(tmp_path / "dit"))
    task = pipeline(str(tmp_path / "dit"), prompts=[3, 7], guidance=2.0, num_steps=3)
    again = build_network(json.loads(json.dumps(network_config(task.network))))
    assert isinstance(again, GuidedDenoiser)
    x, t = torch.randn(2, *task.sample_shape), torch.tensor([10, 500])
    with torch.no_grad():
        assert torch.equal(task.network(x, t, torch.eye(2)), again(x, t, torch.eye(2)))


def test_weights_are_written_back(tmp_path):
    pipe = ddim_pipeline()
    pipe.save_pretrained(str(tmp_path / "before"))
    state = {k: v + 0.01 for k, v in pipe.unet.state_dict().items()}
    write_pipeline(str(tmp_path / "before"), state, tmp_path / "after")
    again = diffusers.DDIMPipeline.from_pretrained(str(tmp_path / "after"))
    assert all(torch.equal(v, state[k]) for k, v in again.unet.state_dict().items())
    with pytest.raises(ValueError, match="not those of"):
        write_pipeline(str(tmp_path / "before"), {"a": torch.zeros(1)}, tmp_path / "other")


def test_the_example_draws_digits():
    task = make_task("pipeline", num_steps=10)
    assert difference_from_call(example_pipeline(), task, 1.0) < 1e-4 and task.sample_shape == (1, 8, 8)


# -------------------------------------------------------------------------------------------------------------------- a UNet of our own
@pytest.mark.parametrize("shape, cond_dim", [((8, 8), 0), ((3, 8, 8), 0), ((8, 8), 4)])
def test_unets_take_images_with_and_without_channels_and_conditions(shape, cond_dim):
    torch.manual_seed(0)
    network = UNetDenoiser(shape, (8, 16), cond_dim=cond_dim)
    again = build_network(json.loads(json.dumps(network_config(network))))
    again.load_state_dict(network.state_dict())
    x, t = torch.randn(5, *shape), torch.tensor([0, 10, 100, 500, 999])
    cond = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])] if cond_dim else None
    with torch.no_grad():
        out = network(x, t, cond)
        assert out.shape == x.shape and torch.equal(out, again(x, t, cond))
        if cond is not None:
            assert not torch.allclose(out, network(x, t, torch.zeros_like(cond)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: pipeline(ddim_pipeline(), prompts=["a"]), "DDIMPipeline is unconditional"),
        (lambda p: pipeline(dit_pipeline()), "give prompts, a list of class numbers"),
        (lambda p: pipeline(ddim_pipeline(), guidance=2.0), "no unconditional half"),
        (lambda p: pipeline(ddpm_pipeline(), eta=0.5), "a ddpm kernel's noise follows from its levels"),
        (lambda p: pipeline(ddim_pipeline(), height=64), "DDIMPipeline takes no height"),
        (lambda p: pipeline(str(p)), "model_index.json is missing"),
        (lambda p: pipeline(ddim_pipeline(), reward="no_such"), "is unknown; expected one of brightness"),
        (lambda p: UNetDenoiser((8,)), "takes images"),
        (lambda p: UNetDenoiser((8, 8), (12,)), "multiple of 8"),
        (lambda p: UNetDenoiser((8, 8), (8, 16))(torch.zeros(1, 8, 8), torch.zeros(1), torch.zeros(1, 3)), "cond_dim=0"),
        (lambda p: pipeline(dit_pipeline(), prompts=[1]).network(torch.zeros(1, 4, 8, 8), torch.zeros(1)), "cond is missing"),
        (lambda p: build_network({"network": "PipelineDenoiser", "folder": None, "prompts": None, "call": {}}), "made in memory"),
    ],
)
def test_bad_pipelines_are_explained(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_a_conditional_unet_learns_to_denoise_what_it_is_asked_for():
    from markovia.envs.denoising.tasks import scheduler
    from markovia.envs.denoising.train_networks import denoiser

    data = torch.stack([torch.ones(8, 8), -torch.ones(8, 8)]).repeat(16, 1, 1)
    torch.manual_seed(0)
    network = UNetDenoiser((8, 8), (8, 16), cond_dim=2)
    average, log = denoiser(network, data, 60, 1e-2, seed=0, conditions=torch.eye(2).repeat(16, 1), batch=16)
    assert log["updates"] == 60 and not any(p.requires_grad for p in average.parameters())
    generator, t = torch.Generator().manual_seed(1), torch.full((16,), 600)
    abar, eps = scheduler().alphas_cumprod[600], torch.randn(16, 8, 8, generator=generator)
    x = abar.sqrt() * data[:1] + (1 - abar).sqrt() * eps  # of the white image
    with torch.no_grad():
        white, black = (average(x, t, torch.eye(2)[[k] * 16]) for k in (0, 1))
    assert float((white - eps).square().mean()) < 0.7 < 1.0  # 1 for a network that says nothing
    assert float(white.mean()) < float(black.mean())  # white: more of x is signal, so the noise is darker
