"""Pipelines of the kinds that the documentation names: Stable Diffusion XL and 3, PixArt, Flux; guided, distilled, with shifted schedules."""

import functools
import json

import pytest
import torch
from tiny_pipelines import LENGTH, PROMPTS, diffusers, flux, pixart, sd3, sdxl, stable_diffusion, tiny_vae

from markovia.agents import Agent
from markovia.agents.denoising import DenoisingAgent
from markovia.envs.denoising.networks import GuidedDenoiser, build_network, network_config
from markovia.envs.denoising.pipeline import Decoder, difference_from_call, pipeline
from markovia.envs.denoising.pipeline_network import PipelineDenoiser, load_pipeline, located, without_filters
from markovia.envs.denoising.tasks import make_env

torch.set_num_threads(1)
SHORT = {"max_sequence_length": LENGTH}
SMALL = {**SHORT, "height": 16, "width": 16}  # Flux's usual size is fixed in its code
PLAIN = {**SHORT, "use_resolution_binning": False, "clean_caption": False}  # PixArt knows sizes of its own, and none so small
LCM = {"beta_schedule": "scaled_linear", "clip_sample": False}
MOMENTS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 0.7]}

# name -> (pipeline in a folder for its tokenizer, guidance, arguments of its call)
KINDS = {
    "sdxl": (sdxl, 1.0, {}),
    "sdxl guided": (sdxl, 4.0, {}),
    "sdxl ddpm": (lambda f: sdxl(f, diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing")), 3.0, {}),
    "sdxl latents of another scale": (lambda f: sdxl(f, vae=tiny_vae(4, **MOMENTS)), 4.0, {}),
    "sdxl consistency": (lambda f: sdxl(f, diffusers.LCMScheduler(**LCM), told_guidance=True), 8.0, {}),
    "sd3": (sd3, 1.0, SHORT),
    "sd3 guided": (sd3, 5.0, SHORT),
    "sd3 without t5": (lambda f: sd3(f, t5=False), 5.0, SHORT),
    "sd3 shifted by size": (lambda f: sd3(f, use_dynamic_shifting=True), 5.0, {**SHORT, "height": 16, "width": 12}),
    "sd3 stochastic": (lambda f: sd3(f, stochastic_sampling=True), 5.0, SHORT),
    "pixart alpha": (lambda f: pixart(), 1.0, PLAIN),
    "pixart sigma guided": (lambda f: pixart(sigma=True), 4.5, PLAIN),
    "flux": (flux, 3.5, SMALL),
    "flux without guidance": (lambda f: flux(f, told_guidance=False), 1.0, {**SMALL, "width": 32}),
}


@pytest.fixture
def kind(request, tmp_path):
    """(pipeline, task, guidance, arguments of the call)."""
    make, guidance, call = KINDS[request.param]
    pipe = make(tmp_path)
    return pipe, pipeline(pipe, prompts=PROMPTS, guidance=guidance, num_steps=4, **call), guidance, call


# ------------------------------------------------------------------------------------------------------- our chain is the pipeline's
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_our_chain_gives_the_images_of_the_pipelines_own_call(kind):
    pipe, task, guidance, call = kind
    for steps, eta in ((2, 1.0), (4, 0.5), (5, 0.0)):
        assert difference_from_call(pipe, task, eta, guidance, steps, **call) < 1e-5
    # and that says something: noise and prompts change what is drawn
    x, t = torch.randn(2, *task.sample_shape), task.kernel.timestep(torch.tensor([1, 1]))
    images = task.decode(x)
    assert images.shape == (2, 3, call.get("height", 16), call.get("width", 16)) and float((images[0] - images[1]).abs().max()) > 0.1
    with torch.no_grad():
        one = task.network(x[:1].expand_as(x), t, torch.eye(2))
    assert float((one[0] - one[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_the_first_pass_over_a_chain_has_ratio_one(kind):
    _, task, _, _ = kind
    agent = DenoisingAgent.from_task(task, critic_hidden=None)
    rollout = agent.generate(task.starts(4, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_ratio = agent.evaluate(rollout, ("logp",)).logp - rollout.logp_old
    assert float((log_ratio.exp() - 1.0).abs()[rollout.mask].max()) < 1e-3 and bool(rollout.mask.any())


@pytest.mark.parametrize("kind", ["sdxl guided", "sd3 guided", "sd3 shifted by size", "flux"], indirect=True)
def test_every_latent_of_a_chain_is_the_one_that_the_pipelines_callback_records(kind):
    pipe, _, guidance, call = kind
    eta = {"eta": 0.7} if isinstance(pipe, diffusers.StableDiffusionXLPipeline) else {}
    task = pipeline(pipe, prompts=PROMPTS, guidance=guidance, num_steps=4, eta=eta.get("eta", 0.0), **call)
    theirs = []
    pipe(
        prompt=PROMPTS, guidance_scale=guidance, num_inference_steps=4, generator=torch.Generator().manual_seed(4), output_type="latent",
        **eta, **call, callback_on_step_end=lambda pipe, k, t, found: theirs.append(found["latents"].clone()) or found,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 4, call.get("height", 16) // 2, call.get("width", 16) // 2, generator=generator)
    x = x if len(task.sample_shape) == 3 else pipe._pack_latents(x, *x.shape)
    for k in range(4):
        mean, std = task.mean_std(x, k, torch.eye(2))
        x = mean + std * torch.randn(x.shape, generator=generator)
        torch.testing.assert_close(x, theirs[k], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- what the networks are told
def test_added_conditions_of_sdxl_are_rows_and_none_is_the_pipelines_own(tmp_path):
    pipe = sdxl(tmp_path)
    network, shape = PipelineDenoiser.from_pipeline(pipe, PROMPTS)
    assert shape == (4, 8, 8) and network.guided and not network.told
    rows = {name: getattr(network, f"row{i}") for i, name in enumerate(network.names)}
    assert set(rows) == {"encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"}
    embeds, none, pooled, none_pooled = pipe.encode_prompt(PROMPTS, device="cpu")
    torch.testing.assert_close(rows["encoder_hidden_states"], torch.cat([none[:1], embeds]))
    torch.testing.assert_close(rows["added_cond_kwargs.text_embeds"], torch.cat([none_pooled[:1], pooled]))
    assert rows["added_cond_kwargs.time_ids"].tolist() == 3 * [[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]  # original size, crop, target size


def test_what_has_as_many_rows_as_there_are_prompts_by_chance_is_no_condition(tmp_path):
    prompts = [a + b for a in "abcd" for b in "efgh"]  # 16, as many as Flux has positions in a 16x16 image here
    network, shape = PipelineDenoiser.from_pipeline(flux(tmp_path), prompts, **SMALL)
    assert shape == (16, 16) and network.fixed["img_ids"].shape == (16, 3) and network.fixed["txt_ids"].shape == (LENGTH, 3)
    assert set(network.names) == {"encoder_hidden_states", "pooled_projections", "guidance"} and len(network.row0) == 17


def test_a_guidance_that_the_network_is_told_is_part_of_what_was_recorded(tmp_path):
    pipe = flux(tmp_path)
    low, high = (pipeline(pipe, prompts=PROMPTS, guidance=g, num_steps=2, **SMALL).network for g in (1.0, 6.0))
    assert isinstance(high, PipelineDenoiser) and high.told and not high.guided  # nothing is extrapolated
    assert high.source["guidance"] == 6.0
    x, t = torch.randn(2, 16, 16), torch.tensor([900.0, 300.0])
    with torch.no_grad():
        assert float((low(x, t, torch.eye(2)) - high(x, t, torch.eye(2))).abs().max()) > 1e-4


def test_the_schedule_is_the_one_of_the_pipelines_call(tmp_path):
    pipe = sd3(tmp_path, use_dynamic_shifting=True, base_image_seq_len=1, max_image_seq_len=16)  # 1 to 16 patches: shift 0.5 to 1.15
    small, large = (pipeline(pipe, prompts=PROMPTS, num_steps=3, height=side, width=side, **SHORT).kernel for side in (4, 16))
    for kernel, shift in ((small, 0.5), (large, 1.15)):
        # sigma = e^mu / (e^mu + 1/s - 1) of s = 1, 1/2 (999 + 1/1000 to 1) ..., diffusers' exponential shift
        s = torch.linspace(1000.0, 1.0, 3, dtype=torch.float64) / 1000.0
        e = torch.tensor(shift, dtype=torch.float64).exp()
        torch.testing.assert_close(kernel.timestep(torch.arange(3)).double(), 1000.0 * e / (e + 1.0 / s - 1.0), rtol=1e-3, atol=0.5)


def test_a_stochastic_flow_is_sampled_as_such_and_compared_without_its_noise(tmp_path):
    pipe = sd3(tmp_path, stochastic_sampling=True)
    task = pipeline(pipe, prompts=PROMPTS, num_steps=3, **SHORT)
    assert task.kernel.kind == "flow_resample" and pipe.scheduler.config.stochastic_sampling


def test_filters_of_finished_images_are_taken_off(tmp_path):
    pipe = sdxl(tmp_path)
    pipe.watermark = object()
    without_filters(pipe)
    assert pipe.watermark is None


# --------------------------------------------------------------------------------------------------------------- folders and training
@pytest.mark.parametrize("name", ["sdxl guided", "sd3 guided", "pixart sigma guided", "flux"])
def test_a_folder_is_trained_saved_and_written_back(name, tmp_path):
    make, guidance, call = KINDS[name]
    make(tmp_path / "tokens").save_pretrained(str(tmp_path / "pipe"))
    task = pipeline(str(tmp_path / "pipe"), prompts=PROMPTS, guidance=guidance, num_steps=3, **call)
    agent = DenoisingAgent.from_task(task, critic_hidden=None, lora={"r": 2, "target_modules": ["to_q", "to_v"]})
    x, t, cond = torch.randn(2, *task.sample_shape), task.kernel.timestep(torch.tensor([0, 2])), torch.eye(2)
    agent.network(x, t, cond).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in agent.parameters("policy")) and any(p.grad.any() for p in agent.parameters("policy"))
    with torch.no_grad():
        for p in agent.parameters("policy"):
            p.add_(0.1)
        out = agent.network(x, t, cond)
        assert float((out - task.network(x, t, cond)).abs().max()) > 1e-3
        agent.save(tmp_path / "agent")
        torch.testing.assert_close(Agent.load(tmp_path / "agent").network(x, t, cond), out)
        again = pipeline(str(agent.export(tmp_path / "out")), prompts=PROMPTS, guidance=guidance, num_steps=3, **call)
        torch.testing.assert_close(again.network(x, t, cond), out, rtol=1e-4, atol=1e-5)


def test_packed_latents_are_a_gymnasium_environment(tmp_path):
    flux(tmp_path / "tokens").save_pretrained(str(tmp_path / "pipe"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    env = make_env("pipeline", folder=str(tmp_path / "pipe"), prompts=str(tmp_path / "prompts.txt"), num_steps=2, render_mode="rgb_array", **SMALL)
    obs, _ = env.reset(seed=0)
    assert obs["sample"].shape == (256,) and env.render().ndim == 3
    for _ in range(2):
        obs, reward, terminated, *_ = env.step(torch.zeros(256).numpy())
    assert terminated and 0.0 < reward < 1.0


def test_networks_are_rebuilt_with_what_they_were_told(tmp_path):
    flux(tmp_path / "tokens").save_pretrained(str(tmp_path / "pipe"))
    task = pipeline(str(tmp_path / "pipe"), prompts=PROMPTS, guidance=6.0, num_steps=2, **SMALL)
    again = build_network(json.loads(json.dumps(network_config(task.network))))
    x, t = torch.randn(2, 16, 16), torch.tensor([900.0, 300.0])
    with torch.no_grad():
        assert torch.equal(task.network(x, t, torch.eye(2)), again(x, t, torch.eye(2)))
    guided = pipeline(sd3(tmp_path / "more"), prompts=PROMPTS, guidance=2.0, num_steps=2, **SHORT).network
    assert isinstance(guided, GuidedDenoiser) and "guidance" not in guided.inner.source


# ------------------------------------------------------------------------------------------------------------------------ refusals
class Cropped(diffusers.StableDiffusionPipeline):
    """Gives smaller images than its latents decode to."""

    def __call__(self, prompt, num_inference_steps=50, guidance_scale=1.0, generator=None, output_type="pil"):
        found = super().__call__(
            prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generator, output_type=output_type
        )
        found.images = found.images[:, :8]
        return found


class Twice(diffusers.StableDiffusion3Pipeline):
    """Asks its network twice at every step."""

    @functools.wraps(diffusers.StableDiffusion3Pipeline.__call__)
    def __call__(self, *args, **kwargs):
        def again(pipe, k, t, found):
            pipe.transformer(found["latents"], found["prompt_embeds"], found["pooled_prompt_embeds"], t.expand(len(found["latents"])))
            return found

        names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
        return super().__call__(*args, **kwargs, callback_on_step_end=again, callback_on_step_end_tensor_inputs=names)


class Films(diffusers.StableDiffusion3Pipeline):
    """Denoises (c, frames, h, w)."""

    def prepare_latents(self, *args, **kwargs):
        return super().prepare_latents(*args, **kwargs)[:, :, None]


def other_scheduler(pipe, name):
    pipe.scheduler = getattr(diffusers, name)()
    return pipe


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: pipeline(flux(p, told_guidance=False), prompts=PROMPTS, guidance=3.5, **SMALL), "gives its network no unconditional half"),
        (lambda p: pipeline(flux(p), prompts=PROMPTS, true_cfg_scale=3.0, negative_prompt=["", ""], **SMALL), "true_cfg_scale .*: leave it out"),
        (lambda p: pipeline(sd3(p), prompts=PROMPTS, guidance=5.0, skip_guidance_layers=[0], **SHORT), "one call of the network for each step"),
        (lambda p: pipeline(Twice(**sd3(p).components), prompts=PROMPTS, **SHORT), "Twice calls its transformer 4 times in 2 steps"),
        (lambda p: pipeline(sdxl(p), prompts=PROMPTS, guidance=4.0, guidance_rescale=0.7), "guidance_rescale .*: leave it out, the chain"),
        (lambda p: pipeline(sdxl(p), prompts=PROMPTS, guidance_scale=4.0), "guidance_scale .* not yours to set here: give guidance"),
        (lambda p: pipeline(sdxl(p), prompts=PROMPTS, num_inference_steps=9), "give num_steps"),
        (lambda p: pipeline(sdxl(p), prompts=PROMPTS, latents=0), "leave it out"),
        (lambda p: pipeline(sdxl(p), prompts=PROMPTS, num_steps=0), "num_steps=0; expected at least 1"),
        (lambda p: pipeline(sdxl(p)), "StableDiffusionXLPipeline draws what it is asked for: give prompts, a list of texts"),
        (lambda p: pipeline(sd3(p), prompts=PROMPTS, scheduler="ddim", **SHORT), "does not fit a flow-matching pipeline"),
        (lambda p: pipeline(other_scheduler(sd3(p), "FlowMatchHeunDiscreteScheduler"), prompts=PROMPTS, **SHORT), "is not supported"),
        (lambda p: pipeline(other_scheduler(sdxl(p), "EulerDiscreteScheduler"), prompts=PROMPTS), r"DDIMScheduler\.from_config"),
        (lambda p: pipeline(pixart(), prompts=PROMPTS, **SHORT), "Invalid sample size"),
        (lambda p: pipeline(Cropped(**stable_diffusion(p).components, requires_safety_checker=False), prompts=PROMPTS), "its call resizes or crops"),
        (lambda p: pipeline(Films(**sd3(p).components), prompts=PROMPTS, **SHORT), r"denoises samples of shape \(4, 1, 8, 8\)"),
    ],
)
def test_what_cannot_be_served_is_explained(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


@pytest.mark.parametrize("read", [load_pipeline, located, lambda folder: pipeline(folder)], ids=["load", "locate", "task"])
def test_a_path_that_leads_nowhere_is_told_in_our_words(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "my-pipeline").mkdir(parents=True)
    for asked in (tmp_path / "runs" / "my-pipelin", "runs/my-pipelin", "./runs/my-pipelin"):
        with pytest.raises(ValueError, match=rf"there is no folder {asked}; did you mean '.*runs/my-pipeline'\?.*save_pretrained"):
            read(asked)
    for asked in ("/nowhere/at/all", "nowhere", "~/nowhere/at"):
        with pytest.raises(ValueError, match=rf"there is no folder {asked}\. Give one that"):
            read(asked)


def test_a_name_of_the_hub_that_is_not_found_is_told_as_such(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Cannot load model: outgoing traffic has been disabled")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", unreachable)
    assert located("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="there is no folder owner/name here, and no pipeline of that name was found on Hugging Face's hub"):
        pipeline("owner/name", prompts=PROMPTS)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDIMPipeline"}')
    with pytest.raises(ValueError, match="can't be read as a diffusers pipeline"):
        load_pipeline(tmp_path)


def test_a_decoder_of_packed_latents_is_differentiable(tmp_path):
    x = torch.randn(2, 32, 16, requires_grad=True)
    images = Decoder(flux(tmp_path), size=(16, 32))(x)
    assert images.shape == (2, 3, 16, 32)
    (gradient,) = torch.autograd.grad(images.sum(), x)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0
