"""First-order optimisers over one vector: parameters of a group are views of it, so a step is a handful of operations for any network.

The same in-place functions run eagerly and inside a compiled update, so both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

PIECE = 2**16  # numbers that a step handles at a time where vectors are long, so that what it computes on the way stays in a CPU's cache
LONG = 64 * PIECE
ALIGN = 16  # numbers; keeps every parameter on a 64-byte border, which small CPU products depend on to the last bit


@dataclass(frozen=True)
class Rule:
    """How a vector moves along its gradient."""

    name: Literal["adam", "rmsprop", "sgd"] = "adam"
    eps: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    @property
    def slots(self) -> int:
        """How many vectors of averages the rule keeps."""
        return {"adam": 2, "rmsprop": 1, "sgd": 0}[self.name]


def adam(x: Tensor, grad: Tensor, averages: Sequence[Tensor], count: Tensor, lr: Tensor, rule: Rule) -> None:
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, x <- x (1 - lr w) - lr m' / (sqrt(v') + eps) with bias-corrected m', v'.

    x, grad (n,); count () steps so far, this one included; in place.            [Kingma 2015, arXiv 1412.6980; decay: 1711.05101]
    """
    m, v = averages
    b1, b2 = rule.betas
    m.lerp_(grad, 1.0 - b1)
    v.mul_(b2).addcmul_(grad, grad, value=1.0 - b2)
    denominator = (v / (1.0 - b2**count)).sqrt() + rule.eps
    if rule.weight_decay:
        x.mul_(1.0 - lr * rule.weight_decay)
    x.sub_(lr / (1.0 - b1**count) * (m / denominator))


def fused_adam(x: Tensor, grad: Tensor, averages: Sequence[Tensor], count: Tensor, lr: Tensor, rule: Rule, scale: Tensor) -> None:
    """`adam` along scale x grad in torch's one pass over memory: four times as fast where no cache holds the vectors. float32; scales grad."""
    m, v = averages
    b1, b2 = rule.betas
    torch._fused_adamw_(  # type: ignore[call-overload]
        [x], [grad], [m], [v], [], [count], lr=lr, beta1=b1, beta2=b2, weight_decay=rule.weight_decay, eps=rule.eps, amsgrad=False, maximize=False,
        grad_scale=scale.reciprocal(),
    )  # fmt: skip


def rmsprop(x: Tensor, grad: Tensor, averages: Sequence[Tensor], count: Tensor, lr: Tensor, rule: Rule) -> None:
    """v <- 0.99 v + 0.01 g^2, x <- x - lr g / (sqrt(v) + eps), in place; A2C's optimiser.                  [Tieleman, Hinton 2012]"""
    (v,) = averages
    v.mul_(0.99).addcmul_(grad, grad, value=0.01)
    x.sub_(lr * grad / (v.sqrt() + rule.eps))


def sgd(x: Tensor, grad: Tensor, averages: Sequence[Tensor], count: Tensor, lr: Tensor, rule: Rule) -> None:
    """x <- x - lr g, in place."""
    x.sub_(lr * grad)


RULES: dict[str, Callable[..., None]] = {"adam": adam, "rmsprop": rmsprop, "sgd": sgd}


@dataclass
class Group:
    """Parameters that share a learning rate, at [start, stop) of the vector."""

    start: int
    stop: int
    base_lr: float
    count: Tensor  # () steps so far
    lr: Tensor  # () learning rate of the next step
    averages: list[Tensor] = field(default_factory=list)


class Optimizer:
    """Moves one or more groups of parameters, each with its learning rate; the gradient's norm is clipped over all of them together.

    The parameters become views of `self.flat`, their `.grad` views of `self.grad`. So the module must not be moved to another device or
    dtype afterwards, and its weights are loaded in place (`load_state_dict` does that).
    Raises ValueError for parameters of several dtypes or devices.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]], rule: Rule, max_grad_norm: float) -> None:
        self.params = [p for params, _ in groups for p in params]
        self.rule, self.max_grad_norm = rule, max_grad_norm
        self.fused = True  # long vectors on the CPU by torch's fused Adam, which can't be mapped over seeds
        kinds = {(p.dtype, p.device) for p in self.params}
        if len(kinds) != 1:
            raise ValueError(f"an optimiser needs parameters of one dtype on one device, got {sorted(map(str, kinds))}; convert the module first")
        self.offsets: list[int] = []
        end, spans = 0, []
        for params, _ in groups:
            start = end
            for p in params:
                self.offsets.append(end)
                end += -(-p.numel() // ALIGN) * ALIGN
            spans.append((start, end))
        self.flat = self.params[0].detach().new_zeros(end)
        self.grad = torch.zeros_like(self.flat)
        with torch.no_grad():
            for p, data, grad in zip(self.params, self.views(self.flat), self.views(self.grad), strict=True):
                data.copy_(p)
                p.data, p.grad = data, grad
        self.groups = [
            Group(start, stop, lr, self.flat.new_zeros(()), self.flat.new_tensor(lr), [self.flat.new_zeros(stop - start) for _ in range(rule.slots)])
            for (start, stop), (_, lr) in zip(spans, groups, strict=True)
        ]

    def views(self, vector: Tensor) -> list[Tensor]:
        """The vector's parts in the parameters' shapes, without copying."""
        return [vector[o : o + p.numel()].view(p.shape) for o, p in zip(self.offsets, self.params, strict=True)]

    def flatten(self, parts: Sequence[Tensor]) -> Tensor:
        """One vector of tensors in the parameters' shapes; gaps are zero."""
        ends = [*self.offsets[1:], len(self.flat)]
        gaps = (end - start - p.numel() for start, end, p in zip(self.offsets, ends, self.params, strict=True))
        return torch.cat([nn.functional.pad(x.reshape(-1), (0, gap)) for x, gap in zip(parts, gaps, strict=True)])

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes or reads, in a fixed order: what a compiled update takes as its first arguments."""
        return [self.flat, *(t for g in self.groups for t in (g.count, g.lr, *g.averages))]

    def norm(self, grad: Tensor) -> Tensor:
        """The length of the gradient (n,), ()."""
        return torch.linalg.vector_norm(grad)

    def move(self, tensors: Sequence[Tensor], grad: Tensor, groups: int | None = None) -> Tensor:
        """One step in place on `tensors` (laid out as `tensors()`) along grad (n,); returns the gradient's norm before clipping, ().

        grad is scaled by min(1, max_grad_norm / (norm + 1e-6)). `groups` moves the first so many groups only.
        """
        norm = self.norm(grad)
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        rest = iter(tensors[1:])
        for group in self.groups[:groups]:
            count, lr, averages = next(rest), next(rest), [next(rest) for _ in group.averages]
            count.add_(1.0)
            whole = group.stop - group.start <= LONG or not grad.is_cpu
            if not whole and self.fused and self.rule.name == "adam" and grad.dtype == torch.float32:
                fused_adam(tensors[0][group.start : group.stop], grad[group.start : group.stop], averages, count, lr, self.rule, scale)
                continue
            for start in range(group.start, group.stop, max(group.stop - group.start, 1) if whole else PIECE):
                stop = group.stop if whole else min(start + PIECE, group.stop)
                own = [a[start - group.start : stop - group.start] for a in averages]
                RULES[self.rule.name](tensors[0][start:stop], grad[start:stop] * scale, own, count, lr, self.rule)
        return norm

    @torch.no_grad()
    def step(self, groups: int | None = None) -> Tensor:
        """`move` along the gradients that backward passes have added up; returns their norm, ()."""
        return self.move(self.tensors(), self.grad, groups)

    @torch.no_grad()
    def live_in(self, tensors: Sequence[Tensor]) -> None:
        """Hold `tensors`, laid out as `tensors()`, from now on in the place of the own ones, with the values of these."""
        for own, new in zip(self.tensors(), tensors, strict=True):
            new.copy_(own)
        rest = iter(tensors)
        self.flat = next(rest)
        for p, view in zip(self.params, self.views(self.flat), strict=True):
            p.data = view
        for group in self.groups:
            group.count, group.lr, group.averages = next(rest), next(rest), [next(rest) for _ in group.averages]

    def zero_grad(self) -> None:
        self.grad.zero_()

    @torch.no_grad()
    def forget(self) -> None:
        """Start anew: step counts and averages to zero."""
        for group in self.groups:
            for tensor in (group.count, *group.averages):
                tensor.zero_()

    def scale_lr(self, factor: float) -> None:
        """Learning rate of the next steps: base x factor."""
        for group in self.groups:
            group.lr.fill_(group.base_lr * factor)

    def state(self) -> dict[str, Tensor]:
        """Step counts and averages; the parameters belong to the agent."""
        out: dict[str, Tensor] = {}
        for i, group in enumerate(self.groups):
            out |= {f"{i}.count": group.count, **{f"{i}.average{k}": a for k, a in enumerate(group.averages)}}
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def make_optimizer(solver: Any, roles: Sequence[tuple[Sequence[nn.Parameter], float]]) -> Optimizer:
    """The optimiser of a solver's settings (optimizer, eps, betas, weight_decay, max_grad_norm) for parameters and learning rates per role."""
    rule = Rule(solver.optimizer, solver.eps, solver.betas, solver.weight_decay)
    return Optimizer([(params, lr) for params, lr in roles if params], rule, solver.max_grad_norm)
