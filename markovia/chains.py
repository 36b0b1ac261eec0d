"""Pictures and statistics of denoising runs: samples from the same noise at every checkpoint, the chain as a GIF, and signs of a fooled reward."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from markovia.rundir import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from markovia.envs.denoising.env import DenoisingTask

NUM_SAMPLES = 64
CELL = 64  # pixels of a sample in a sheet
LINE = 15  # pixels of a line of text above it


def sheet(task: DenoisingTask, x: Tensor, title: str, data: np.ndarray | None = None) -> np.ndarray:
    """Samples (n, *sample_shape) as one picture (h, w, 3) uint8: images side by side, everything else by its first two coordinates over `data`."""
    from markovia.envs.denoising.env import picture

    if task.decode is not None:
        body = _tiled([picture(2 * image - 1, CELL) for image in task.decode(x).detach().cpu().numpy()])
    elif x.ndim == 3:
        body = _tiled([picture(image, CELL) for image in x.cpu().numpy()])
    else:
        body = _scatter(x.flatten(1).cpu().numpy(), data)
    return _titled(body, title)


def _tiled(cells: list[np.ndarray]) -> np.ndarray:
    """Pictures of one size in a square, left to right and top to bottom, a white line between them."""
    height, width = cells[0].shape[:2]
    columns = int(np.ceil(len(cells) ** 0.5))
    rows = -(-len(cells) // columns)
    out = np.full((rows * (height + 2), columns * (width + 2), 3), 255, np.uint8)
    for i, cell in enumerate(cells):
        top, left = (i // columns) * (height + 2), (i % columns) * (width + 2)
        out[top : top + height, left : left + width] = cell
    return out


def _scatter(x: np.ndarray, data: np.ndarray | None, size: int = 384) -> np.ndarray:
    """Points by their first two coordinates, in red, over those of the data in grey; the square reaches 1.6 times as far as the data."""
    out = np.full((size, size, 3), 255, np.uint8)
    reach = 1.6 * float(np.abs(data.reshape(len(data), -1)[:, :2]).max()) if data is not None else 3.0
    for points, colour in ((data, (205, 205, 205)), (x, (200, 30, 30))):
        if points is None:
            continue
        plane = points.reshape(len(points), -1)
        plane = plane[:, :2] if plane.shape[1] > 1 else np.concatenate([plane, 0 * plane], 1)
        places = np.clip(((plane * [1, -1] / reach + 1) * size / 2).astype(int), 2, size - 3)
        for column, row in places:
            out[row - 1 : row + 2, column - 1 : column + 2] = colour
    return out


def _titled(body: np.ndarray, title: str) -> np.ndarray:
    from PIL import Image, ImageDraw  # comes with matplotlib

    lines, draw = title.split("\n"), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(body.shape[1], 8 + max(int(draw.textlength(line)) for line in lines))
    head = Image.new("RGB", (width, LINE * len(lines) + 4), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(head).text((4, 2 + LINE * i), line, fill="black")
    out = np.full((body.shape[0] + head.height, width, 3), 255, np.uint8)
    out[: head.height], out[head.height :, : body.shape[1]] = np.asarray(head), body
    return out


def png(frame: np.ndarray) -> bytes:
    """A picture (h, w, 3) uint8 as PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def gif(frames: list[np.ndarray], frame_ms: int = 160, last_ms: int = 1800) -> bytes:
    """Pictures of one size as an endless GIF; the last stays longer."""
    from PIL import Image

    images = [Image.fromarray(f) for f in frames]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=[frame_ms] * (len(images) - 1) + [last_ms], loop=0)
    return buffer.getvalue()


def chain_gif(agent: Any, task: DenoisingTask, n: int, seed: int) -> bytes:
    """n chains of the agent from noise to clean samples."""
    from markovia.algos.setup import sample_sequences

    record = sample_sequences(agent, task, n, seed)
    data = None if task.data is None else task.data().numpy()
    steps = [*record.obs["x"].unbind(1), record.outcome["x"]]  # type: ignore[union-attr, index]
    return gif([sheet(task, x, f"step {k} of {len(steps) - 1}", data) for k, x in enumerate(steps)])


def training_gif(run: Path) -> bytes | None:
    """The sheets of a run's checkpoints one after the other; None where it has none."""
    from PIL import Image

    found = [np.asarray(Image.open(path, formats=["PNG"]).convert("RGB")) for path in sorted((run / "samples").glob("*.png"))]
    if not found:
        return None
    width = max(f.shape[1] for f in found)
    return gif([np.pad(f, ((0, 0), (0, width - f.shape[1]), (0, 0)), constant_values=255) for f in found], frame_ms=600)


class Watch:
    """Looks at a run's samples at each checkpoint: always the same noise, so that one sees what training changes.

    Writes samples/<iteration>.png and returns statistics for the log (`algos.denoising.measure.describe`).
    """

    def __init__(self, run: Path, setup: Any, seed: int) -> None:
        from markovia.algos.denoising.measure import real_samples

        self.run, self.agent, self.task, self.seed = run, setup.agent, setup.task, seed
        self.data = real_samples(setup.agent, setup.task, seed)
        self.num = min(NUM_SAMPLES, setup.collector.num_rows)

    def look(self, iteration: int) -> dict[str, float]:
        """The statistics; the picture lies in the run's folder then."""
        from markovia.algos.denoising.measure import describe
        from markovia.algos.setup import sample_sequences

        record = sample_sequences(self.agent, self.task, self.num, self.seed)
        found = describe(self.agent, self.task, record, self.data)
        title = f"iteration {iteration}\n" + "   ".join(f"{name} {value:.3g}" for name, value in found.items())
        shown = sheet(self.task, record.outcome["x"], title, None if self.task.data is None else self.data.cpu().numpy())
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        write_bytes(folder / f"{iteration:06d}.png", png(shown))
        return found


def watch(run: Path, setup: Any, driver: Any) -> Watch | None:
    """A `Watch` for a run that trains a denoising agent, with its first look when the run begins; None for other runs."""
    from markovia.agents.denoising import DenoisingAgent

    if not isinstance(setup.agent, DenoisingAgent):
        return None
    made = Watch(run, setup, driver.seed)
    if driver.iteration == 0:
        made.look(0)
    return made
