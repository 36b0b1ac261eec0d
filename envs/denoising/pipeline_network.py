"""The denoiser of a diffusers pipeline, with what the pipeline tells it beside sample and time, recorded by running the pipeline itself.

A pipeline's `__call__` encodes prompts or labels, and gives its UNet or transformer a sample, a timestep and the encoded conditions. A hook on the
network stops that call at its first use, so the conditions are those of the pipeline to the bit, whatever encoders it has.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from markovia.envs.denoising.unet import chosen_row
from markovia.envs.names import nearest
from markovia.envs.untrusted import read_json

Prompts = Sequence[str] | Sequence[int]
# Arguments of a pipeline's call that the task sets or can't follow, and what to do instead.
OWN = {
    "prompt": "give prompts", "class_labels": "give prompts", "num_inference_steps": "give num_steps", "guidance_scale": "give guidance",
    **dict.fromkeys(("true_cfg_scale", "skip_guidance_layers"), "leave it out, guidance here is one call of the network for each step"),
    **dict.fromkeys(("guidance_rescale", "denoising_end"), "leave it out, the chain is the policy's from noise to image"),
    **dict.fromkeys(("batch_size", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"), "leave it out"),
}  # fmt: skip
EXAMPLE = "example"
CHUNK = 32  # prompts that are encoded together


class _Reached(Exception):
    """The pipeline's call came to its denoiser."""


def example_pipeline() -> Any:
    """A DDIM pipeline of 8x8 digits around the shipped UNet, made in memory."""
    from diffusers import DDIMPipeline

    from markovia.envs.denoising.networks import load_pretrained
    from markovia.envs.denoising.tasks import scheduler

    network: Any = load_pretrained("digits_unet")
    pipe: Any = DDIMPipeline(network.model, scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(folder: str | Path) -> Any:
    """A diffusers pipeline from a folder on disk (or a name, where a hub is reachable), without safety checker and progress bars;
    "example" is one of 8x8 digits.

    Raises ImportError without diffusers, ValueError for a folder that does not exist or holds no pipeline, one whose weights are pickled or one that
    brings code.
    """
    if folder == EXAMPLE:
        return example_pipeline()
    folder = located(folder)
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("a pipeline needs diffusers: pip install markovia[diffusion]") from error
    if Path(folder).exists() and not (Path(folder) / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no diffusers pipeline (model_index.json is missing); give the folder that pipeline.save_pretrained wrote.")
    if Path(folder).exists():
        _without_code(Path(folder))
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not Path(folder).exists():
            raise ValueError(
                f"there is no folder {folder} here, and no pipeline of that name was found on Hugging Face's hub; give the folder that "
                f"pipeline.save_pretrained wrote, or a name where the hub can be reached ({type(error).__name__})"
            ) from error
        raise ValueError(f"{folder} can't be read as a diffusers pipeline: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    without_filters(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def located(folder: str | Path) -> str:
    """The absolute path of what is on disk; a name "owner/name" of Hugging Face's hub as it is.

    Raises ValueError for a path that leads nowhere, with the folders beside it that are called alike.
    """
    path = Path(folder).expanduser()
    if path.exists():
        return str(path.resolve())
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)) and not Path(path.parts[0]).exists():
        return str(folder)
    beside = [str(f) for f in path.parent.iterdir() if f.is_dir()] if path.parent.is_dir() else []
    raise ValueError(
        f"there is no folder {folder}{nearest(str(path), beside) or '.'} Give one that pipeline.save_pretrained wrote, with its model_index.json."
    )


def without_filters(pipe: Any) -> None:
    """Take off what changes finished images, which no reward could explain: a safety checker blackens them, SDXL's watermark marks them."""
    for name in ("safety_checker", "watermark"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, None)


def _without_code(folder: Path) -> None:
    """Raises ValueError for a pipeline of other classes than diffusers' and transformers': diffusers would run files that lie in the folder."""
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{folder / 'model_index.json'} names no class of diffusers; make a pipeline with code of its own and pass it")
    import diffusers.pipelines

    for name, entry in index.items():
        if not isinstance(entry, list) or name.startswith("_"):
            continue
        library = entry[0] if len(entry) == 2 else ""
        known = library is None or library in ("diffusers", "transformers") or (isinstance(library, str) and hasattr(diffusers.pipelines, library))
        if not known or (folder / name / f"{library}.py").exists():
            raise ValueError(f"{folder} takes its {name} from {entry}, neither of diffusers nor of transformers; make the pipeline and pass it")


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """(name, network) of the pipeline's denoiser. Raises ValueError when it has none or several."""
    found = [(name, getattr(pipe, name)) for name in ("unet", "transformer") if isinstance(getattr(pipe, name, None), nn.Module)]
    if len(found) != 1:
        raise ValueError(f"{type(pipe).__name__} has {len(found)} denoisers named unet or transformer; expected exactly one.")
    return found[0]


def condition_argument(pipe: Any) -> str | None:
    """The name under which the pipeline takes its conditions: "prompt", "class_labels", or None for an unconditional one."""
    known = inspect.signature(type(pipe).__call__).parameters
    return next((name for name in ("prompt", "class_labels") if name in known), None)


def call_arguments(pipe: Any, prompts: Prompts | None, guidance: float | None = None, **call: Any) -> dict[str, Any]:
    """Arguments of the pipeline's own call for one image of each prompt; those that it does not take are left out."""
    known = inspect.signature(type(pipe).__call__).parameters
    name = condition_argument(pipe)
    conditions = {"batch_size": 1} if name is None else {name: list(prompts or ())}
    wanted = {**conditions, "guidance_scale": guidance, **call}
    if unknown := sorted(k for k in call if k not in known):
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(k for k in known if k != 'self')}.")
    return {k: v for k, v in wanted.items() if k in known and v is not None}


def recorded_call(pipe: Any, prompts: Prompts | None, guidance: float | None = None, num_inference_steps: int = 2, **call: Any) -> dict[str, Any]:
    """What the pipeline gives its denoiser at the first step, by the names of the network's own signature ("sample" for the first of them).

    Its scheduler then stands at the start of such a call, with the timesteps (and the shift for the image's size) that the pipeline sets.
    """
    network = denoiser_of(pipe)[1]
    seen: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        _, sample = list(bound)[:2]
        seen.update({("sample" if k == sample else k): v for k, v in bound.items() if k not in ("self", "return_dict")})
        raise _Reached

    handle = network.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipe(**call_arguments(pipe, prompts, guidance, num_inference_steps=num_inference_steps, **call))
    except _Reached:
        return seen
    finally:
        handle.remove()
    raise ValueError(f"{type(pipe).__name__} never called its {denoiser_of(pipe)[0]}.")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        at = out
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return out


class PipelineDenoiser(nn.Module):
    """network(x, timestep, cond) around a pipeline's UNet or transformer; cond (n, P) marks one of P prompts, a row of zeros none of them.

    rows    name -> (P + 1, ...): what the network is told beside sample and time, "none" first (the empty prompt or label, where there is one)
    fixed   name -> value: arguments that depend on no prompt
    A network that predicts its variance too (twice the channels) gives the first half: the std is the kernel's.

    guided      the pipeline guides by a second, unconditional half of its batch
    told        the pipeline tells its network the scale of the guidance (distilled networks): `guidance` is then among what was recorded
    """

    def __init__(
        self, model: nn.Module, rows: dict[str, Tensor], fixed: dict[str, Any], time_scale: float, source: dict[str, Any],
        guided: bool = False, told: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.fixed, self.time_scale, self.source, self.guided, self.told = model.eval(), fixed, time_scale, source, guided, told
        self.names = tuple(rows)
        for i, value in enumerate(rows.values()):
            self.register_buffer(f"row{i}", value, persistent=False)

    @property
    def folder(self) -> str | None:
        """Where the pipeline lies; None for one that was made in memory."""
        found: str | None = self.source.get("folder")
        return found

    @classmethod
    def from_pipeline(
        cls, pipe: Any, prompts: Prompts | None, folder: str | None = None, guidance: float = 1.0, **call: Any
    ) -> tuple[PipelineDenoiser, tuple[int, ...]]:
        """(the denoiser, shape of its sample); `guidance` is recorded where the network is told it, otherwise left to `GuidedDenoiser`.

        Raises ValueError where prompts are missing, or were given to an unconditional pipeline.
        """
        name = condition_argument(pipe)
        if (name is None) != (not prompts):
            raise ValueError(
                f"{type(pipe).__name__} is unconditional; leave prompts out."
                if name is None
                else f"{type(pipe).__name__} draws what it is asked for: give prompts, a list of {'texts' if name == 'prompt' else 'class numbers'}."
            )
        asked: list[Any] = list(prompts or ())

        def record(prompts: list[Any], guidance: float) -> dict[str, Any]:
            return flat(recorded_call(pipe, prompts, guidance, **call))

        names = cls._per_prompt(record, asked[:1])
        none, told = cls._guidance(record, asked[:1], names)
        scale = guidance if told else 1.0
        parts = [record(asked[i : i + CHUNK], scale) for i in range(0, max(len(asked), 1), CHUNK)]
        sample, time = (parts[0].pop(key) for key in ("sample", "timestep"))
        fixed = {k: v for k, v in parts[0].items() if k not in names and (v is not None or "." in k)}
        try:
            rows = {k: torch.cat([none[k] if none else torch.zeros_like(parts[0][k][:1]), *(p[k] for p in parts)]).detach() for k in names}
        except RuntimeError as error:
            raise ValueError(
                f"{type(pipe).__name__} pads its prompts to different lengths ({error}); give at most {CHUNK} prompts, or prompts of one length."
            ) from error
        time_scale = float(torch.as_tensor(time).flatten()[0]) / float(torch.as_tensor(pipe.scheduler.timesteps[0]))
        source = {"folder": folder, "prompts": asked or None, "call": call} | ({"guidance": scale} if told else {})
        return cls(denoiser_of(pipe)[1], rows, fixed, time_scale, source, bool(none), told), tuple(sample.shape[1:])

    @staticmethod
    def _per_prompt(record: Callable[[list[Any], float], dict[str, Any]], prompt: list[Any]) -> list[str]:
        """Names of what has a row for each prompt: twice as many where a prompt is asked for twice. Others depend on no prompt."""
        if not prompt:
            return []
        one, two = (record(prompt * n, 1.0) for n in (1, 2))
        tensors = [k for k, v in one.items() if isinstance(v, Tensor) and v.ndim > 0 and k not in ("sample", "timestep")]
        return [k for k in tensors if len(two[k]) == 2 * len(one[k])]

    @staticmethod
    def _guidance(record: Callable[[list[Any], float], dict[str, Any]], prompt: list[Any], names: list[str]) -> tuple[dict[str, Tensor], bool]:
        """The pipeline's own unconditional inputs, one row, and whether it tells its network the guidance.

        A guided call doubles its batch; which half is the unconditional one differs between pipelines: it is the one that does not hold what an
        unguided call holds. Where the batch stays, the guidance is told or has no effect at all.
        """
        if not prompt:
            return {}, False
        alone, both = (record(prompt, g) for g in (1.0, 2.0))
        alike = lambda a, b: torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-3)  # noqa: E731
        if len(both["sample"]) != 2:
            return {}, not all(alike(alone[k], both[k]) for k in names)
        halves = [{k: both[k][i : i + 1] for k in names} for i in (0, 1)]
        same = [all(alike(half[k], alone[k]) for k in names) for half in halves]
        return (halves[same.index(True) ^ 1] if any(same) else {}), False

    @classmethod
    def from_folder(cls, folder: str, prompts: Prompts | None, call: dict[str, Any], guidance: float = 1.0) -> PipelineDenoiser:
        """Rebuild from `config()`: the folder is read again."""
        if folder is None:
            raise ValueError("this network belonged to a pipeline that was made in memory; pass it: DenoisingAgent.load(folder, network=...)")
        return cls.from_pipeline(load_pipeline(folder), prompts, folder, guidance, **call)[0]

    def config(self) -> dict[str, Any]:
        """What `from_folder` takes, as JSON values."""
        return dict(self.source)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        """Model output, shaped as x (n, *sample_shape)."""
        rows: dict[str, Any] = {}
        if self.names:
            if cond is None:
                raise ValueError(f"cond is missing: the pipeline was recorded with {len(self.source['prompts'])} prompts: give (n, prompts), one-hot")
            index = chosen_row(cond)
            rows = {name: getattr(self, f"row{i}")[index] for i, name in enumerate(self.names)}
        time = timestep if self.time_scale == 1.0 else timestep * self.time_scale
        out: Tensor = self.model(x, timestep=time, **nested({**self.fixed, **rows}), return_dict=False)[0]
        return out[:, : x.shape[1]] if out.shape[1] == 2 * x.shape[1] else out
