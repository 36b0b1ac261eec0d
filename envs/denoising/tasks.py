"""Ready denoising tasks and the entry points of their Gymnasium ids.

mixture2d            a ring of eight Gaussian blobs in the plane; reward: closeness to a wanted blob
digits               the 8x8 digits of scikit-learn; reward: a classifier's probability of a wanted class
digits_conditional   the same, a class is asked for in every chain and guides the network; reward: the probability of that class
linear_gaussian      the fixture of LinearGaussianDenoising, whose optimum is known
pipeline             any diffusers pipeline on disk, with a reward of its images
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from markovia.envs.denoising.env import DenoisingEnv, DenoisingTask, DenoisingVectorEnv
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import GuidedDenoiser, LinearDenoiser, load_pretrained
from markovia.envs.denoising.tables import choose
from markovia.envs.exact.denoisers import GMMDenoiser, LinearGaussianDenoising

NUM_BLOBS, BLOB_STD = 8, 0.1


def scheduler() -> Any:
    """The DDIM scheduler that the shipped networks were trained with (1,000 linear betas, no clipping, trailing spacing)."""
    try:
        from diffusers import DDIMScheduler
    except ImportError as error:
        raise ImportError("Digits and Mixture2D need diffusers: pip install markovia[diffusion]") from error
    return DDIMScheduler(clip_sample=False, timestep_spacing="trailing")


def digit_images() -> tuple[Tensor, Tensor]:
    """The 1,797 real digits: images (1797, 8, 8) in [-1, 1] and labels (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digit images need scikit-learn: pip install markovia[diffusion]") from error
    data = load_digits()
    return torch.tensor(data.images / 8.0 - 1.0, dtype=torch.float32), torch.tensor(data.target, dtype=torch.int64)


def real_digits() -> Tensor:
    """The images of `digit_images`."""
    return digit_images()[0]


def mixture() -> GMMDenoiser:
    """The data of Mixture2D: eight equal blobs on the unit circle."""
    angle = 2 * math.pi * torch.arange(NUM_BLOBS, dtype=torch.float64) / NUM_BLOBS
    return GMMDenoiser(torch.stack([angle.cos(), angle.sin()], -1), BLOB_STD)


def mixture_points() -> Tensor:
    """(1000, 2) draws of the data of Mixture2D."""
    return mixture().sample(1000, torch.Generator().manual_seed(0)).float()


class ClosenessReward:
    """exp(-|x - centre|^2/(2 width^2)) in (0, 1]."""

    def __init__(self, centre: Tensor, width: float) -> None:
        self.centre, self.width = centre, width

    def __call__(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.exp(-(x - self.centre.to(x)).square().sum(-1) / (2 * self.width**2))


class ClassProbabilityReward:
    """Probability that a shipped classifier gives to the wanted class, in [0, 1]; None: to the class that `cond` (n, 10) marks with a one."""

    def __init__(self, wanted: int | None, classifier: str = "digits_classifier") -> None:
        self.wanted = wanted
        self.classifier = load_pretrained(classifier)

    def __call__(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        probability = self.classifier.to(x.device)(x).softmax(-1)
        if self.wanted is not None:
            return probability[..., self.wanted]
        if cond is None:
            raise ValueError("the reward asks for the class of the condition; pass cond (n, 10), one-hot.")
        return (probability * cond).sum(-1)


def mixture2d(
    wanted: int = 0, num_steps: int = 20, eta: float = 1.0, final: str = "drop", width: float = 0.5
) -> DenoisingTask:
    """Denoise points of a ring of eight blobs; reward exp(-|x - blob_wanted|^2/(2 width^2)), 0.2 on average over the data."""
    if not 0 <= wanted < NUM_BLOBS:
        raise ValueError(f"wanted={wanted}; expected the number of a blob, 0 to {NUM_BLOBS - 1}.")
    return DenoisingTask(
        network=load_pretrained("mixture2d"),
        kernel=GaussianKernel.from_scheduler(scheduler(), num_steps, eta=eta, final=final),
        reward=ClosenessReward(mixture().means[wanted], width),
        sample_shape=(2,),
        name="mixture2d",
        data=mixture_points,
    )


def digits(wanted: int = 3, num_steps: int = 20, eta: float = 1.0, final: str = "drop", network: str = "mlp") -> DenoisingTask:
    """Denoise 8x8 digits; reward = probability of the wanted class by a classifier that saw one half of the data.

    `task.judged(x)`, the same by a classifier trained on the other half, tells digits from images that only fool the reward.
    network: "mlp", or "unet" (diffusers' UNet2DModel, half as many parameters and several times slower).
    """
    if not 0 <= wanted <= 9:
        raise ValueError(f"wanted={wanted}; expected a digit, 0 to 9.")
    return DenoisingTask(
        network=load_pretrained({"mlp": "digits", "unet": "digits_unet"}[choose("network", network, ("mlp", "unet"))]),
        kernel=GaussianKernel.from_scheduler(scheduler(), num_steps, eta=eta, final=final),
        reward=ClassProbabilityReward(wanted),
        sample_shape=(8, 8),
        name="digits",
        judge=ClassProbabilityReward(wanted, "digits_judge"),
        data=real_digits,
    )


def digits_conditional(guidance: float = 1.0, num_steps: int = 20, eta: float = 1.0, final: str = "drop") -> DenoisingTask:
    """Denoise a digit of a class that is drawn for each chain (cond, one-hot); reward = probability of that class, judge as in `digits`.

    guidance: scale of classifier-free guidance, part of the network and so of the policy that is trained; 1 is none.
    """
    return DenoisingTask(
        network=GuidedDenoiser(load_pretrained("digits_conditional"), guidance),
        kernel=GaussianKernel.from_scheduler(scheduler(), num_steps, eta=eta, final=final),
        reward=ClassProbabilityReward(None),
        sample_shape=(8, 8),
        conditions=torch.eye(10),
        name="digits_conditional",
        judge=ClassProbabilityReward(None, "digits_judge"),
        data=real_digits,
    )


def pipeline(**kwargs: Any) -> DenoisingTask:
    """A diffusers pipeline on disk; see `pipeline.pipeline` for the arguments."""
    from markovia.envs.denoising.pipeline import pipeline as made

    return made(**kwargs)


def linear_gaussian(**kwargs: Any) -> DenoisingTask:
    """The chain of LinearGaussianDenoising (keyword arguments are its own); the network predicts the mean itself."""
    problem = LinearGaussianDenoising(**kwargs)
    return DenoisingTask(
        network=LinearDenoiser(problem.A.tolist(), problem.b.tolist()),
        kernel=GaussianKernel.direct(problem.s.tolist()),
        reward=problem.reward,
        sample_shape=(problem.dim,),
        name="linear_gaussian",
    )


TASKS: dict[str, Callable[..., DenoisingTask]] = {
    "mixture2d": mixture2d,
    "digits": digits,
    "digits_conditional": digits_conditional,
    "linear_gaussian": linear_gaussian,
    "pipeline": pipeline,
}

_ENV_ARGUMENTS = ("action_mode", "bound", "flatten", "render_mode")


def make_task(task: str, **kwargs: Any) -> DenoisingTask:
    """A ready task by name; ValueError with the nearest name when it is unknown."""
    return TASKS[choose("task", task, tuple(TASKS))](**kwargs)


def make_env(task: str, **kwargs: Any) -> DenoisingEnv:
    """Gymnasium entry point: environment arguments go to DenoisingEnv, the others to the task."""
    env = {name: kwargs.pop(name) for name in _ENV_ARGUMENTS if name in kwargs}
    return DenoisingEnv(make_task(task, **kwargs), **env)


def make_vector_env(num_envs: int, task: str, **kwargs: Any) -> DenoisingVectorEnv:
    """Gymnasium vector entry point; takes `autoreset_mode` and `max_episode_steps` besides the arguments of `make_env`."""
    env = {name: kwargs.pop(name) for name in (*_ENV_ARGUMENTS, "autoreset_mode", "max_episode_steps") if name in kwargs}
    return DenoisingVectorEnv(make_task(task, **kwargs), num_envs, **env)
