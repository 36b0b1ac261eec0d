"""Models that do not fit on one device: parameters, gradients and averages cut over the processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

A process holds 1 / size of every parameter and gathers a layer when it computes it. All processes therefore pass through the model equally often:
sampling goes on until the last response has ended everywhere, and every process has equally many rows of a minibatch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from markovia.agents.checkpointing import layers_of
from markovia.algos.optimizer import ALIGN, Optimizer, Rule

if TYPE_CHECKING:
    from markovia.agents.language import LanguageAgent


def shard(agent: LanguageAgent, device: torch.device) -> None:
    """Cut the agent's model over all processes, layer by layer, in place, each part on `device`; what it saves and loads stays whole.

    The value head is small and stays whole. Raises ValueError for packed evaluation, which applies the output layer outside of the model.
    """
    if agent.options.packed:
        raise ValueError("packed evaluation applies the output layer apart from the model, where its weights are cut; set packed=False")
    policy, mesh = agent.net["policy"], init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers_of(policy):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    for name, module in agent.net.items():
        if name != "policy":
            module.to(device)
    agent.state = functools.partial(_whole_state, agent, agent.state)  # type: ignore[method-assign]
    agent.load_state = functools.partial(_load_whole, agent)  # type: ignore[method-assign]


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor; of one that is not cut, all of it."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(part: Tensor, like: Tensor) -> Tensor:
    """All of a tensor that is cut as `like`, from everyone's part. All processes call it."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `like`."""
    return distribute_tensor(full, like.device_mesh, like.placements).to_local() if isinstance(like, DTensor) else full


def _whole_state(agent: LanguageAgent, state: Any) -> dict[str, Tensor]:
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state().items()}


@torch.no_grad()
def _load_whole(agent: LanguageAgent, state: dict[str, Tensor]) -> None:
    own = agent.net.state_dict()
    wrong = sorted(k for k in state if k not in own or own[k].shape != state[k].shape)
    if wrong or agent.state().keys() != state.keys():
        raise ValueError(f"the checkpoint does not fit this agent, e.g. {wrong[:3]}; rebuild it with the configuration saved beside the weights")
    for name, tensor in state.items():
        local(own[name]).copy_(part_of(tensor.to(own[name].device), own[name]))


class ShardedOptimizer(Optimizer):
    """An optimiser of each process's parts: a vector of its own, filled from the gradients before a step and written back after it.

    The norm is that of the whole gradient. FSDP2 gives the mean of the processes' gradients; they are to be summed, hence the factor `size`.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]], rule: Rule, max_grad_norm: float) -> None:
        self.real = [p for params, _ in groups for p in params]
        self.size, self.counts = dist.get_world_size(), [len(params) for params, _ in groups]
        super().__init__([([nn.Parameter(local(p).detach().clone()) for p in params], lr) for params, lr in groups], rule, max_grad_norm)

    def zero_grad(self) -> None:
        super().zero_grad()
        for p in self.real:
            p.grad = None

    @torch.no_grad()
    def take(self) -> None:
        """Bring the gradients of the backward passes into the vector."""
        for p, mine in zip(self.real, self.views(self.grad), strict=True):
            if p.grad is None:
                continue
            if isinstance(p, DTensor):
                mine.copy_(local(p.grad) * self.size)
            else:
                dist.all_reduce(p.grad)
                mine.copy_(p.grad)

    def norm(self, grad: Tensor) -> Tensor:
        """Of all parts together; a parameter that everybody holds whole counts once."""
        squares = torch.zeros(2, dtype=grad.dtype, device=grad.device)
        for p, mine in zip(self.real, self.views(grad), strict=True):
            squares[0 if isinstance(p, DTensor) else 1] += mine.square().sum()
        cut = squares[:1].clone()
        dist.all_reduce(cut)
        return (cut[0] + squares[1]).sqrt()

    @torch.no_grad()
    def step(self, groups: int | None = None) -> Tensor:
        norm = super().step(groups)
        for p, mine in zip(self.real, self.views(self.flat), strict=True):
            local(p).copy_(mine)
        return norm

    def _pieces(self, group: int) -> list[tuple[nn.Parameter, slice]]:
        """The parameters of a group, and where this process's part of each lies in the group's vectors."""
        first, start = sum(self.counts[:group]), self.groups[group].start
        places = zip(self.real[first:], self.params[first:], self.offsets[first:], range(self.counts[group]), strict=False)
        return [(p, slice(offset - start, offset - start + mine.numel())) for p, mine, offset, _ in places]

    def state(self) -> dict[str, Tensor]:
        """Laid out as `Optimizer` lays out whole parameters, so that a run goes on with any number of processes. All processes call it."""
        out: dict[str, Tensor] = {}
        for i, group in enumerate(self.groups):
            out[f"{i}.count"] = group.count
            for k, average in enumerate(group.averages):
                full = [whole(average[at].view(local(p).shape), p).reshape(-1) for p, at in self._pieces(i)]
                out[f"{i}.average{k}"] = torch.cat([nn.functional.pad(x, (0, -len(x) % ALIGN)) for x in full])
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back, of this class or of `Optimizer`."""
        for i, group in enumerate(self.groups):
            group.count.copy_(state[f"{i}.count"])
            for k, average in enumerate(group.averages):
                full, at = state[f"{i}.average{k}"].to(average.device), 0
                for p, place in self._pieces(i):
                    average[place].copy_(part_of(full[at : at + p.numel()].view(p.shape), p).reshape(-1))
                    at += p.numel() + -p.numel() % ALIGN
