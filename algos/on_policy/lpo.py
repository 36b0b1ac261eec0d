"""Learnt policy optimisation: the drift network's weights, and the evolution strategy that trains them on small exact problems.

`python -m markovia.algos.on_policy.lpo` trains the shipped network anew and writes it beside a JSON log.     [Lu 2022, arXiv 2210.05639]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from markovia.agents.checkpoint import CheckpointError, load_tensors, save_tensors
from markovia.algos.on_policy.surrogates import learnt_drift, ratio_objective
from markovia.algos.streams import stream
from markovia.algos.table import nearest

FOLDER = Path(__file__).parent / "weights"
FEATURES = 8  # of `drift_features`


@cache
def drift_weights(name: str) -> tuple[Tensor, Tensor]:
    """(w1 (h, 8), w2 (1, h)) of a shipped drift network, or of a file that `save_drift` wrote; read once, not to be written to.

    Raises ValueError for an unknown name, a damaged file, and tensors of other names, shapes or with entries that are not finite.
    """
    path = Path(name) if name.endswith(".safetensors") else FOLDER / f"{name}.safetensors"
    if not path.is_file():
        shipped = sorted(f.stem for f in FOLDER.glob("*.safetensors"))
        raise ValueError(f"no drift network {name!r}; shipped: {', '.join(shipped)}, or give the path of a .safetensors file{nearest(name, shipped)}")
    try:
        tensors, _ = load_tensors(path)
    except CheckpointError as error:
        raise ValueError(f"{path} is no drift network: {error}; write one with markovia.algos.on_policy.lpo.save_drift") from error
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    hidden = shapes.get("w1", (0,))[0]
    if shapes != {"w1": (hidden, FEATURES), "w2": (1, hidden)} or hidden < 1:
        raise ValueError(f"{path} holds {shapes}, expected w1 (h, {FEATURES}) and w2 (1, h); write it with markovia.algos.on_policy.lpo.save_drift")
    if not all(torch.isfinite(v).all() for v in tensors.values()):
        raise ValueError(f"{path} holds weights that are not finite; train the network anew")
    return tensors["w1"], tensors["w2"]


def save_drift(path: str | Path, w1: Tensor, w2: Tensor, meta: dict[str, Any] | None = None) -> Path:
    """Write a drift network where `Learnt(weights=path)` can read it; the name must end in .safetensors."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a drift network's file name must end in .safetensors, got {path}")
    return save_tensors(path, {"w1": w1, "w2": w2}, meta)


# -- the problems of the inner loop, solved exactly --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problems:
    """p tabular MDPs of one size, each with its own start distribution; a bandit has one state and gamma 0."""

    transition: Tensor  # (p, S, A, S)
    reward: Tensor  # (p, S, A), expected
    start: Tensor  # (p, S)
    gamma: float
    noise: float  # standard deviation of the error of a sampled advantage, reward units


def random_bandits(p: int, generator: torch.Generator, arms: int = 5) -> Problems:
    """Bandits with normal arm values and noisy rewards."""
    reward = torch.randn(p, 1, arms, generator=generator)
    return Problems(torch.ones(p, 1, arms, 1), reward, torch.ones(p, 1), gamma=0.0, noise=1.0)


def random_grids(p: int, generator: torch.Generator, side: int = 4, slip: float = 0.1) -> Problems:
    """side x side grids without an end: four moves that slip to a random one, reward 1 on leaving the goal cell, from where every move
    leads to a uniformly drawn cell.
    """
    size = side * side
    rows, cols = torch.arange(size) // side, torch.arange(size) % side
    moves = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
    to = (rows[:, None] + moves[:, 0]).clamp(0, side - 1) * side + (cols[:, None] + moves[:, 1]).clamp(0, side - 1)  # (S, 4)
    certain = torch.nn.functional.one_hot(to, size).float()
    moved = (1.0 - slip) * certain + slip * certain.mean(1, keepdim=True)
    goal = torch.randint(size, (p,), generator=generator)
    at_goal = torch.nn.functional.one_hot(goal, size).float()  # (p, S)
    restart = torch.full((p, size, 4, size), 1.0 / size)
    transition = torch.where(at_goal[:, :, None, None] > 0, restart, moved.expand(p, -1, -1, -1))
    return Problems(transition, at_goal[:, :, None].expand(p, size, 4), torch.full((p, size), 1.0 / size), gamma=0.9, noise=0.1)


def solve(problems: Problems, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return J (n, p), advantage (n, p, S, A) and normalised visits (n, p, S) of softmax policies, by linear solves.

    V = (I - gamma P_pi)^-1 r_pi,   A = r + gamma P V - V,   d = (1 - gamma) (I - gamma P_pi^T)^-1 start
    """
    pi = logits.softmax(-1)
    step = torch.einsum("npsa,psat->npst", pi, problems.transition)
    matrix = torch.eye(step.shape[-1]) - problems.gamma * step
    value = torch.linalg.solve(matrix, (pi * problems.reward).sum(-1))
    adv = problems.reward + problems.gamma * torch.einsum("psat,npt->npsa", problems.transition, value) - value[..., None]
    visits = (1.0 - problems.gamma) * torch.linalg.solve(matrix.mT, problems.start.expand_as(value))
    return (problems.start * value).sum(-1), adv, visits


def best_return(problems: Problems, sweeps: int = 200) -> Tensor:
    """Optimal J (p,), by value iteration."""
    value = torch.zeros_like(problems.start)
    for _ in range(sweeps):
        value = (problems.reward + problems.gamma * torch.einsum("psat,pt->psa", problems.transition, value)).amax(-1)
    return (problems.start * value).sum(-1)


# -- the inner loop: a proximal loop on many problems for many drifts at once ------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    """The proximal loop in which a drift is judged: `iterations` batches with `epochs` full-batch Adam steps each."""

    iterations: int = 10
    epochs: int = 10
    samples: int = 32  # decisions per batch and problem
    lr: float = 0.1  # of Adam on the logits
    clip: float = 0.2  # range of PPO's drift below the network


def sample_batch(problems: Problems, logits: Tensor, u: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Indices s A + a (n, p, k) of decisions drawn from visits x policy with the uniforms u (p, k), and their standardised advantages.

    The sampled advantage is the exact one plus noise x error; all policies see the same u and error (common random numbers).
    """
    _, adv, visits = solve(problems, logits)
    joint = (visits[..., None] * logits.softmax(-1)).flatten(-2)
    cdf = joint.cumsum(-1)
    index = torch.searchsorted(cdf, (u * cdf[..., -1:]).contiguous(), right=True).clamp(max=joint.shape[-1] - 1)
    sampled = adv.flatten(-2).gather(-1, index) + problems.noise * error
    return index, (sampled - sampled.mean(-1, keepdim=True)) / (sampled.std(-1, keepdim=True) + 1e-8)


def train_policies(problems: Problems, w1: Tensor, w2: Tensor, inner: Inner, generator: torch.Generator) -> Tensor:
    """Logits (n, p, S, A) after the inner loop from uniform policies, for n drift networks w1 (n, h, 8), w2 (n, 1, h)."""
    p, S, A = problems.reward.shape
    logits = torch.zeros(len(w1), p, S, A)
    m, v, step = torch.zeros_like(logits), torch.zeros_like(logits), 0
    drift = vmap(lambda lr, a, x, y: learnt_drift(lr, a, w1=x, w2=y, clip=inner.clip))
    for _ in range(inner.iterations):
        u = torch.rand(p, inner.samples, generator=generator)
        error = torch.randn(p, inner.samples, generator=generator)
        index, adv = sample_batch(problems, logits, u, error)
        logp_old = logits.log_softmax(-1).flatten(-2).gather(-1, index)
        for _ in range(inner.epochs):
            free = logits.clone().requires_grad_()
            log_ratio = free.log_softmax(-1).flatten(-2).gather(-1, index) - logp_old
            objective = ratio_objective(log_ratio, adv) - drift(log_ratio, adv, w1, w2)
            (grad,) = torch.autograd.grad(objective.mean(-1).sum(), free)
            step += 1
            m, v = m.lerp(grad, 0.1), v.lerp(grad.square(), 0.001)
            logits = logits + inner.lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-5)
    return logits


def fitness(suites: list[Problems], w1: Tensor, w2: Tensor, inner: Inner, generator: torch.Generator) -> Tensor:
    """Mean over all problems of (J - J uniform) / (J* - J uniform) after the inner loop, (n,); 1 is optimal, 0 is the start."""
    scores = []
    for problems in suites:
        p, S, A = problems.reward.shape
        low, high = solve(problems, torch.zeros(1, p, S, A))[0], best_return(problems)
        reached = solve(problems, train_policies(problems, w1, w2, inner, generator))[0]
        scores.append((reached - low) / (high - low).clamp(min=1e-6))
    return torch.cat(scores, dim=1).mean(1)


# -- the outer loop ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evolution:
    """OpenES: antithetic perturbations, z-scored fitness, Adam on the centre."""

    generations: int = 150
    population: int = 32  # perturbations per generation, half of them the negatives of the others
    hidden: int = 16  # units of the drift network
    sigma: float = 0.1  # standard deviation of a perturbation
    lr: float = 0.03  # of the outer Adam
    bandits: int = 16  # problems per generation, new each time
    grids: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 2 or self.population % 2:
            raise ValueError(f"population must be even and >= 2 (perturbations come in antithetic pairs), got {self.population}")
        if min(self.generations, self.hidden) < 1 or self.bandits + self.grids < 1:
            problems = self.bandits + self.grids
            raise ValueError(f"generations, hidden and the number of problems must be >= 1, got {self.generations}, {self.hidden}, {problems}")


def problem_suites(bandits: int, grids: int, generator: torch.Generator) -> list[Problems]:
    """Fresh random problems, one suite per size."""
    suites = [random_bandits(bandits, generator)] if bandits else []
    return [*suites, random_grids(grids, generator)] if grids else suites


def split(flat: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """(n, 9 h) -> w1 (n, h, 8) and w2 (n, 1, h)."""
    w1, w2 = flat.split([FEATURES * hidden, hidden], dim=-1)
    return w1.unflatten(-1, (hidden, FEATURES)), w2.unflatten(-1, (1, hidden))


def initial(es: Evolution) -> Tensor:
    """Random first layer and zero output, (9 h,): PPO's drift up to the dead zone."""
    w1 = torch.randn(FEATURES * es.hidden, generator=stream(es.seed, "lpo-init")) / math.sqrt(FEATURES)
    return torch.cat([w1, torch.zeros(es.hidden)])


def held_out_fitness(flat: Tensor, es: Evolution, inner: Inner, problems: int = 64) -> Tensor:
    """Fitness (n,) of flat networks (n, 9 h) on fixed problems that no generation sees, half bandits and half grids."""
    generator = stream(es.seed, "lpo-held-out")
    return fitness(problem_suites(problems // 2, problems // 2, generator), *split(flat, es.hidden), inner, generator)


def meta_train(
    es: Evolution | None = None, inner: Inner | None = None, report: Callable[[dict[str, float]], None] | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Evolve a drift network from PPO's; returns w1 (h, 8), w2 (1, h) and the log.

    g = 1/(n sigma) sum_i z_i eps_i with z the z-scored fitness of theta + sigma eps_i            [Salimans 2017, arXiv 1703.03864]
    `report` gets {"generation", "mean", "best"} of each generation. The log holds the settings, the generations and the fitness of the
    initial (PPO) and the final network on held-out problems.
    """
    es, inner = es or Evolution(), inner or Inner()
    centre = start = initial(es)
    m, v = torch.zeros_like(centre), torch.zeros_like(centre)
    generations = []
    for g in range(es.generations):
        generator = stream(es.seed, "lpo-generation", g)
        half = torch.randn(es.population // 2, len(centre), generator=generator)
        eps = torch.cat([half, -half])
        found = fitness(problem_suites(es.bandits, es.grids, generator), *split(centre + es.sigma * eps, es.hidden), inner, generator)
        z = (found - found.mean()) / (found.std() + 1e-8)
        grad = (z[:, None] * eps).mean(0) / es.sigma
        m, v = m.lerp(grad, 0.1), v.lerp(grad.square(), 0.001)
        centre = centre + es.lr * (m / (1 - 0.9 ** (g + 1))) / ((v / (1 - 0.999 ** (g + 1))).sqrt() + 1e-8)
        generations.append({"generation": float(g), "mean": float(found.mean()), "best": float(found.max())})
        if report is not None:
            report(generations[-1])
    before, after = held_out_fitness(torch.stack([start, centre]), es, inner).tolist()
    w1, w2 = (w[0] for w in split(centre[None], es.hidden))
    log = {"evolution": asdict(es), "inner": asdict(inner), "held_out": {"ppo": before, "lpo": after}, "generations": generations}
    return w1, w2, log


def main(folder: Path = FOLDER) -> None:
    """Train with the default settings and write lpo.safetensors and lpo.json to `folder`."""
    w1, w2, log = meta_train(report=lambda g: print(f"generation {g['generation']:.0f}: fitness {g['mean']:.4f}, best {g['best']:.4f}", flush=True))
    save_drift(folder / "lpo.safetensors", w1, w2, {"held_out": log["held_out"]})
    (folder / "lpo.json").write_text(json.dumps(log, indent=1) + "\n")
    print(f"held-out fitness: PPO {log['held_out']['ppo']:.4f}, learnt {log['held_out']['lpo']:.4f}")


if __name__ == "__main__":
    main()
