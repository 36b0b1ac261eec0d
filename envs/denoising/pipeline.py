"""Any diffusers pipeline on disk as a denoising task: its own network, conditions, scheduler constants and decoder, and a reward of the final images.

The chain is sampled by our loop, because the pipeline's scheduler gives neither mean nor std; `difference_from_call` measures that both give the
same images for the same noise, and a task is refused where they do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import GuidedDenoiser
from markovia.envs.denoising.pipeline_network import (
    EXAMPLE,
    OWN,
    PipelineDenoiser,
    Prompts,
    call_arguments,
    denoiser_of,
    load_pipeline,
    located,
    recorded_call,
)
from markovia.envs.denoising.rewards import image_reward
from markovia.envs.denoising.schedulers import SCHEDULERS, is_flow, kind_of
from markovia.envs.denoising.tables import SCALED, choose
from markovia.envs.untrusted import lines, read_json

TOLERANCE = 0.01  # of a pixel in [0, 1]: diffusers' constants are float32, and a network stretches their rounding


class Decoder:
    """Clean samples of a pipeline (n, *sample_shape) as images (n, c, h, w) in [0, 1]: through its VAE where it has one, differentiable.

    x = (VAE.decode(z std/scaling + shift) + 1)/2, clamped; `batch` images at a time. Samples that Flux packed, a row for each 2x2 patch of
    latents, are unpacked before, to an image of `size` (height, width).
    """

    def __init__(self, pipe: Any, batch: int = 16, size: tuple[int, int] | None = None) -> None:
        self.vae, self.batch = getattr(pipe, "vae", None), batch
        self.unpack = None if size is None else partial(pipe._unpack_latents, height=size[0], width=size[1], vae_scale_factor=pipe.vae_scale_factor)
        if self.vae is not None:
            self.vae.eval().requires_grad_(False)

    def __call__(self, x: Tensor) -> Tensor:
        """Images (n, c, h, w) in [0, 1]."""
        if self.vae is None:
            return (x / 2 + 0.5).clamp(0, 1)
        z, config = x if self.unpack is None else self.unpack(x), self.vae.config
        shift: Any = config.get("shift_factor") or 0.0
        std: Any = 1.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift, std = (torch.tensor(config[k]).to(z).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std"))
        z = z * std / config.get("scaling_factor", 1.0) + shift
        images = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in z.split(self.batch)])
        return (images / 2 + 0.5).clamp(0, 1)


class ImageReward:
    """A reward of images and prompts as one of samples and conditions: reward(images (n, c, h, w) in [0, 1], prompts [n] or None) -> n numbers."""

    def __init__(self, reward: Callable[..., Any], decode: Callable[[Tensor], Tensor], prompts: Prompts | None) -> None:
        self.reward, self.decode, self.prompts = reward, decode, prompts

    def __call__(self, x: Tensor, cond: Tensor | None = None) -> Any:
        asked = None if cond is None or self.prompts is None else [self.prompts[i] for i in cond.argmax(-1).tolist()]
        return self.reward(self.decode(x), asked)


def read_prompts(prompts: Any) -> list[Any] | None:
    """Prompts as they are given, or from a file: JSON (a list), or a prompt a line. Raises ValueError when there are none in it."""
    if prompts is None or not isinstance(prompts, (str, Path)):
        return None if prompts is None else list(prompts)
    path = Path(prompts)
    if not path.is_file():
        raise ValueError(f"prompts={str(prompts)!r} is no file; give a list of prompts, or a text file with one on each line.")
    found = read_json(path) if path.suffix == ".json" else [line.strip() for _, line in lines(path) if line.strip()]
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no prompts; write one on each line, or a JSON list.")
    return found


def with_scheduler(pipe: Any, scheduler: str) -> Any:
    """The pipeline with its own scheduler ("keep"), or with another class that keeps its noise schedule ("ddim", "ddpm")."""
    if choose("scheduler", scheduler, ("keep", *SCHEDULERS)) != "keep":
        import diffusers

        if is_flow(pipe.scheduler):
            raise ValueError(f"scheduler={scheduler!r} does not fit a flow-matching pipeline ({type(pipe.scheduler).__name__}); leave it at 'keep'.")
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    return pipe


def pipeline(
    folder: Any = EXAMPLE,
    reward: Any = "brightness",
    prompts: Any = None,
    num_steps: int = 20,
    eta: float | None = None,
    guidance: float = 1.0,
    scheduler: str = "keep",
    final: str = "drop",
    judge: Any = None,
    check: bool = True,
    **call: Any,
) -> DenoisingTask:
    """A diffusers pipeline as a task.

    folder     what pipeline.save_pretrained(folder) wrote, or a pipeline itself; "example": 8x8 digits by the shipped UNet
    reward     (images (n, c, h, w) in [0, 1], prompts) -> n numbers: a callable, "module:function", or a ready one (`rewards.READY`)
    prompts    texts or class numbers, one of which is drawn for each chain; a list, or a file with one on each line
    guidance   scale of the guidance, part of the policy that is trained: classifier-free, or told to the network where it was distilled for that
    scheduler  "ddim" or "ddpm" where the pipeline's own has no Gaussian step (PNDM, DPM-Solver, Euler): it keeps the noise schedule
    check      compare two steps with the pipeline's own call, and refuse the pipeline where the images differ
    call       further arguments of the pipeline's call, e.g. height=256
    Raises ValueError for a folder without a pipeline, a scheduler without a Gaussian step, missing prompts, and a pipeline that does more in its
    call than denoise and decode.
    """
    if own := sorted(OWN.keys() & call.keys()):
        raise ValueError(f"{own[0]} of a pipeline's call is not yours to set here: {OWN[own[0]]}.")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}; expected at least 1.")
    where = None if hasattr(folder, "scheduler") else folder if folder == EXAMPLE else located(folder)
    pipe = with_scheduler(folder if where is None else load_pipeline(where), scheduler)
    pipe.set_progress_bar_config(disable=True)
    asked = read_prompts(prompts)
    kind_of(pipe.scheduler, None)
    network, shape = PipelineDenoiser.from_pipeline(pipe, asked, where, guidance, **call)
    if guidance != 1.0 and not (network.guided or network.told):
        raise ValueError(f"guidance={guidance}: {type(pipe).__name__} gives its network no unconditional half to be guided away from; leave it at 1.")
    recorded_call(pipe, asked and asked[:1], 1.0, num_steps, **call)
    kernel = GaussianKernel.from_scheduler(pipe.scheduler, eta=eta, final=final)  # the timesteps that the call has set
    decode, told = Decoder(pipe, size=_packed_size(pipe, shape, call)), image_reward(reward)
    task = DenoisingTask(
        network=GuidedDenoiser(network, guidance) if network.guided and guidance != 1.0 else network,
        kernel=kernel,
        reward=ImageReward(told, decode, asked),
        sample_shape=shape,
        conditions=None if asked is None else torch.eye(len(asked)),
        name=f"pipeline {where or type(pipe).__name__}",
        judge=None if judge is None else ImageReward(image_reward(judge), decode, asked),
        decode=decode,
    )
    if check and (found := difference_from_call(pipe, task, eta, guidance, **call)) > TOLERANCE:
        raise ValueError(
            f"{type(pipe).__name__} does more in its call than denoise and decode: for the same noise its images differ from ours by {found:.3g} "
            f"(limit {TOLERANCE}). Train its parts with DenoisingTask(network=..., kernel=..., reward=...), or pass check=False if that is meant."
        )
    return task


def _packed_size(pipe: Any, shape: tuple[int, ...], call: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the images whose latents a pipeline packs as Flux does, None for images and plain latents (c, h, w).

    Raises ValueError for samples of other shapes (videos, sounds).
    """
    if len(shape) == 3:
        return None
    unpack = getattr(pipe, "_unpack_latents", None)
    if len(shape) == 2 and unpack is not None and list(inspect.signature(unpack).parameters) == ["latents", "height", "width", "vae_scale_factor"]:
        usual = pipe.default_sample_size * pipe.vae_scale_factor
        size = (call.get("height") or usual, call.get("width") or usual)
        if unpack(torch.zeros(1, *shape), *size, pipe.vae_scale_factor).ndim == 4:
            return size
    raise ValueError(
        f"{type(pipe).__name__} denoises samples of shape {shape}; a task takes images or their latents (c, h, w), and latents packed as Flux packs "
        "them. Train its parts with DenoisingTask(network=..., kernel=..., reward=...)."
    )


@contextmanager
def _without_noise(pipe: Any) -> Iterator[None]:
    """A flow-matching scheduler that draws noise draws none inside the block: it takes it from torch's own stream, where no two chains agree."""
    usual = pipe.scheduler
    if usual.config.get("stochastic_sampling"):
        pipe.scheduler = type(usual).from_config(usual.config, stochastic_sampling=False)
    try:
        yield
    finally:
        pipe.scheduler = usual


@torch.no_grad()
def difference_from_call(pipe: Any, task: DenoisingTask, eta: float | None = None, guidance: float = 1.0, num_steps: int = 2, **call: Any) -> float:
    """Largest difference of a pixel in [0, 1] between the images of the pipeline's own call and of our chain, same noise, one image per prompt.

    The scheduler's own noise is used: a call that takes no eta samples ddim without any, and flow matching is compared without.
    Raises ValueError for images of another size, and for a call that uses its network more than once a step.
    """
    takes_eta = all("eta" in inspect.signature(f).parameters for f in (type(pipe).__call__, pipe.scheduler.step))
    scale = (1.0 if eta is None else eta) if takes_eta else 0.0
    prompts: Any = None if task.conditions is None else task.reward.prompts[:4]  # type: ignore[attr-defined]
    with _without_noise(pipe):
        told = call_arguments(pipe, prompts, guidance, num_inference_steps=num_steps, **call)
        eta_told = {"eta": scale} if takes_eta else {}
        calls: list[Any] = []
        handle = denoiser_of(pipe)[1].register_forward_pre_hook(lambda *_: calls.append(1))
        theirs = torch.as_tensor(pipe(**told, **eta_told, generator=torch.Generator().manual_seed(0), output_type="np").images)
        handle.remove()
        generator = torch.Generator().manual_seed(0)
        x = recorded_call(pipe, prompts, guidance, num_steps, generator=generator, **call)["sample"][: len(prompts or [0])]
        kernel = GaussianKernel.from_scheduler(pipe.scheduler, eta=scale if kind_of(pipe.scheduler, None) in SCALED else None)
    if len(calls) != kernel.num_steps:
        raise ValueError(
            f"{type(pipe).__name__} calls its {denoiser_of(pipe)[0]} {len(calls)} times in {kernel.num_steps} steps; a policy's step is one call. "
            "Switch off what needs more of them, or train its parts with DenoisingTask(network=..., kernel=..., reward=...)."
        )
    cond = None if task.conditions is None else task.conditions[: len(prompts)]
    for k in range(kernel.num_steps):
        step = torch.full((len(x),), k)
        mean, std = kernel.mean_std(task.network(x, kernel.timestep(step), cond), x, step)
        x = mean + std * torch.randn(x.shape, generator=generator) if float(std.max()) > 0 else mean
    assert task.decode is not None
    ours = task.decode(x).permute(0, 2, 3, 1)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{type(pipe).__name__} gives images of shape {tuple(theirs.shape)}, decoded latents are {tuple(ours.shape)}: its call resizes or crops; "
            "ask for a size that it leaves alone (height=, width=), or switch that off (e.g. use_resolution_binning=False)."
        )
    return float((ours - theirs).abs().max())


def write_pipeline(folder: str | Path | Any, state: dict[str, Tensor], out: str | Path) -> Path:
    """The pipeline of `folder` with other weights in its denoiser, as a folder that diffusers loads; `state` holds every weight by its own name.

    Raises ValueError when the weights are not those of this pipeline's denoiser.
    """
    pipe: Any = folder if hasattr(folder, "scheduler") else load_pipeline(folder)
    name, network = denoiser_of(pipe)
    own = network.state_dict()
    if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
        raise ValueError(f"these {len(state)} weights are not those of {folder}'s {name}, which has {len(own)}; give the pipeline that was trained.")
    network.load_state_dict(state)
    pipe.save_pretrained(str(out))
    return Path(out)
