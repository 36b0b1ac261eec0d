"""Train the networks that the ready denoising tasks ship: `python -m markovia.envs.denoising.train_networks`.

Writes weights/*.safetensors and weights/training.json (losses and accuracies as measured) beside this file; minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from markovia.envs.denoising.average import WeightAverage
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.networks import WEIGHTS, GuidedDenoiser, MLPClassifier, MLPDenoiser, load_pretrained, save_network
from markovia.envs.denoising.tasks import digit_images, mixture, scheduler
from markovia.envs.denoising.unet import UNetDenoiser


def denoiser(
    network: nn.Module, data: Tensor, steps: int, lr: float, seed: int, conditions: Tensor | None = None, drop: float = 0.15, batch: int = 512
) -> tuple[nn.Module, dict[str, Any]]:
    """Fit eps by least squares over uniform timesteps (Ho 2020, 2006.11239, eq. 14); returns an average of the last weights.

    conditions (n, C) belong to the data; a share `drop` of them is replaced by zeros, for classifier-free guidance (2207.12598).
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    abar = scheduler().alphas_cumprod
    average = WeightAverage(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-4)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        pick = torch.randint(len(data), (batch,), generator=generator)
        x0, cond = data[pick], None
        if conditions is not None:
            cond = conditions[pick] * (torch.rand(batch, 1, generator=generator) >= drop)
        t = torch.randint(len(abar), (batch,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        a = abar[t].reshape(-1, *[1] * (x0.ndim - 1))
        loss = F.mse_loss(network(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, cond), eps)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())
        average.update(network)
    tail = float(torch.stack(losses[-500:]).mean())
    return average.network, {
        "updates": steps,
        "final_loss": round(tail, 4),
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def classifier(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], steps: int, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Cross-entropy with shifted and noisy copies, so that the probability is smooth around real digits."""
    torch.manual_seed(seed)
    network = MLPClassifier((8, 8), 10)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    images, labels = train
    for _ in range(steps):
        pick = torch.randint(len(images), (128,), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        x = torch.roll(images[pick], shift, (1, 2))
        x = x + 0.5 * torch.rand(128, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(network(x), labels[pick], label_smoothing=0.02)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        accuracy = float((network(test[0]).argmax(-1) == test[1]).float().mean())
    return network, {"updates": steps, "trained_on": len(images), "held_out_accuracy": round(accuracy, 4)}


@torch.no_grad()
def read_samples(network: nn.Module, num_steps: int, cond: Tensor | None = None, n: int = 2000) -> Tensor:
    """The digit (n,) that the judge reads in each of n samples of a denoiser."""
    kernel = GaussianKernel.from_scheduler(scheduler(), num_steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, 8, generator=generator)
    for k in range(num_steps):
        step = torch.full((n,), k)
        mean, std = kernel.mean_std(network(x, kernel.timestep(step), cond), x, step)
        x = mean + std * torch.randn(x.shape, generator=generator)
    digit: Tensor = load_pretrained("digits_judge")(x).argmax(-1)
    return digit


NAMES = ("digits_classifier", "digits_judge", "mixture2d", "digits", "digits_conditional", "digits_unet")


def train(name: str, scale: float) -> tuple[nn.Module, dict[str, Any]]:
    """Train one shipped network; `scale` multiplies the number of updates."""

    def count(n: int) -> int:
        return max(1, int(n * scale))

    torch.manual_seed(0)
    images, labels = digit_images()
    # the classifier that rewards and the judge that checks see disjoint halves
    halves = [(images[i::2], labels[i::2]) for i in (0, 1)]
    if name == "digits_classifier":
        return classifier(halves[0], halves[1], count(3000), seed=1)
    if name == "digits_judge":
        return classifier(halves[1], halves[0], count(3000), seed=2)
    if name == "mixture2d":
        points = mixture().sample(20_000, torch.Generator().manual_seed(0)).float()
        return denoiser(MLPDenoiser((2,), hidden=96, depth=3), points, count(8000), 2e-3, seed=3)
    if name == "digits_conditional":
        classes = torch.eye(10)[labels]
        network, log = denoiser(MLPDenoiser((8, 8), hidden=256, depth=4, cond_dim=10), images, count(6000), 1.5e-3, seed=5, conditions=classes)
        asked = torch.arange(2000) % 10
        for guidance in (1.0, 2.0):
            right = read_samples(GuidedDenoiser(network, guidance), 20, torch.eye(10)[asked]) == asked
            log[f"asked_digit_by_the_judge_at_guidance_{guidance:g}"] = round(float(right.float().mean()), 3)
        return network, log
    if name == "digits_unet":
        network, log = denoiser(UNetDenoiser((8, 8)), images, count(1000), 2e-3, seed=6, batch=128)
    else:
        network, log = denoiser(MLPDenoiser((8, 8), hidden=320, depth=4), images, count(12_000), 1.5e-3, seed=4)
    counts = torch.bincount(read_samples(network, num_steps=20), minlength=10)
    log["class_shares_by_the_judge"] = [round(c / 2000, 3) for c in counts.tolist()]
    return network, log


def main() -> None:
    """Train the networks in order (the digits' shares are read by the judge) and write each with its log entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="train these and keep the others")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of updates (small: a dry run)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = WEIGHTS / "training.json"
    log: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    log["torch"] = torch.__version__
    for name in arguments.only:
        network, log[name] = train(name, arguments.scale)
        save_network(WEIGHTS / f"{name}.safetensors", network)
        record.write_text(json.dumps(log, indent=1) + "\n")
        print(name, json.dumps(log[name]), flush=True)


if __name__ == "__main__":
    main()
