"""Any diffusers pipeline on disk as a denoising task: its own network, conditions, scheduler constants and decoder, and a reward of the final images.

The chain is sampled by our loop, because the pipeline's scheduler gives neither mean nor std; `difference_from_call` measures that both give the
same images for the same noise, and a task is refused where they do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from markovia.envs.denoising.env import DenoisingTask
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import GuidedDenoiser
from markovia.envs.denoising.pipeline_network import EXAMPLE, PipelineDenoiser, Prompts, call_arguments, denoiser_of, load_pipeline
from markovia.envs.denoising.rewards import image_reward
from markovia.envs.denoising.schedulers import SCHEDULERS, is_flow
from markovia.envs.denoising.tables import choose
from markovia.envs.untrusted import lines, read_json

TOLERANCE = 0.01  # of a pixel in [0, 1]: diffusers' constants are float32, and a network stretches their rounding


class Decoder:
    """Clean samples of a pipeline (n, *sample_shape) as images (n, c, h, w) in [0, 1]: through its VAE where it has one, differentiable.

    x = (VAE.decode(z/scaling + shift) + 1)/2, clamped; `batch` images at a time.
    """

    def __init__(self, pipe: Any, batch: int = 16) -> None:
        self.vae, self.batch = getattr(pipe, "vae", None), batch
        if self.vae is not None:
            self.vae.eval().requires_grad_(False)

    def __call__(self, x: Tensor) -> Tensor:
        """Images (n, c, h, w) in [0, 1]."""
        if self.vae is None:
            return (x / 2 + 0.5).clamp(0, 1)
        config = self.vae.config
        z = x / config.get("scaling_factor", 1.0) + (config.get("shift_factor") or 0.0)
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
    guidance   scale of classifier-free guidance, part of the policy that is trained
    scheduler  "ddim" or "ddpm" where the pipeline's own has no Gaussian step (PNDM, DPM-Solver, Euler): it keeps the noise schedule
    check      compare two steps with the pipeline's own call, and refuse the pipeline where the images differ
    call       further arguments of the pipeline's call, e.g. height=256
    Raises ValueError for a folder without a pipeline, a scheduler without a Gaussian step, missing prompts, and a pipeline that does more in its
    call than denoise and decode.
    """
    where = None if hasattr(folder, "scheduler") else folder if folder == EXAMPLE else str(Path(folder).resolve())
    pipe = with_scheduler(folder if where is None else load_pipeline(where), scheduler)
    pipe.set_progress_bar_config(disable=True)
    asked = read_prompts(prompts)
    kernel = GaussianKernel.from_scheduler(pipe.scheduler, num_steps, eta=eta, final=final)
    network, shape = PipelineDenoiser.from_pipeline(pipe, asked, where, **call)
    if guidance != 1.0 and not network.guided:
        raise ValueError(f"guidance={guidance}: {type(pipe).__name__} gives its network no unconditional half to be guided away from; leave it at 1.")
    decode, told = Decoder(pipe), image_reward(reward)
    task = DenoisingTask(
        network=GuidedDenoiser(network, guidance) if guidance != 1.0 else network,
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


@torch.no_grad()
def difference_from_call(pipe: Any, task: DenoisingTask, eta: float | None = None, guidance: float = 1.0, num_steps: int = 2, **call: Any) -> float:
    """Largest difference of a pixel in [0, 1] between the images of the pipeline's own call and of our chain, same noise, one image per prompt.

    The scheduler's own noise is used: a call that takes no eta samples ddim and flow matching without any.
    """
    takes_eta = "eta" in inspect.signature(type(pipe).__call__).parameters
    scale = (1.0 if eta is None else eta) if takes_eta else 0.0
    kernel = GaussianKernel.from_scheduler(pipe.scheduler, num_steps, eta=scale)
    prompts: Any = None if task.conditions is None else task.reward.prompts[:4]  # type: ignore[attr-defined]
    told = call_arguments(pipe, prompts, guidance, **call)
    eta_told = {"eta": scale} if takes_eta else {}
    theirs = pipe(**told, **eta_told, num_inference_steps=num_steps, generator=torch.Generator().manual_seed(0), output_type="np").images
    generator = torch.Generator().manual_seed(0)
    cond = None if task.conditions is None else task.conditions[: len(prompts)]
    x = torch.randn(1 if cond is None else len(cond), *task.sample_shape, generator=generator)
    for k in range(num_steps):
        step = torch.full((len(x),), k)
        mean, std = kernel.mean_std(task.network(x, kernel.timestep(step), cond), x, step)
        x = mean + std * torch.randn(x.shape, generator=generator) if float(std.max()) > 0 else mean
    assert task.decode is not None
    return float((task.decode(x).permute(0, 2, 3, 1) - torch.as_tensor(theirs)).abs().max())


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
