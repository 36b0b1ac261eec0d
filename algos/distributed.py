"""The on-policy loop for text on several processes (`torchrun`): each samples, scores and differentiates its share of the rows.

The batch is that of one process: prompts and random numbers are drawn by all alike and for all rows, and what the processes found is joined into one
record that everyone holds. So baselines, filters, controllers and the weights Omega (1 / tokens, 1 / rows of the whole minibatch) are those of one
process, and the sum of the processes' gradients is its gradient:

    grad L = sum_ranks sum_{i in rows of the rank} Omega_i grad L_i

The model is on every process whole; only records (ids, log-probs, rewards, texts) and one gradient per optimiser step are exchanged.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from markovia.agents.distributions import Categorical
from markovia.agents.interface import Agent, Evaluation
from markovia.agents.records import Rollout
from markovia.algos.on_policy.filters import chosen, join, joined
from markovia.algos.on_policy.method import OnPolicy

if TYPE_CHECKING:
    from markovia.algos.on_policy.driver import OnPolicyDriver


class Workers:
    """The processes of one run; every method is called by all of them, in the same order."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of n rows: parts in a row whose lengths differ by one at most."""
        return rows.tensor_split(self.size)[self.rank]

    def gather(self, value: Any) -> list[Any]:
        """What each process brought, in the order of the ranks."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, value: Any) -> Any:
        """What the first process brought."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def add(self, tensor: Tensor) -> None:
        """The sum over the processes, in place."""
        dist.all_reduce(tensor)

    def pieces(self, own: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
        """The statistics of everybody's pieces of a minibatch."""
        found = self.gather([{k: v.detach().cpu() for k, v in piece.items()} for piece in own])
        return [{k: v.to(device) for k, v in piece.items()} for some in found for piece in some]

    def share_weights(self, agent: Agent) -> None:
        """Everyone starts with the first process's weights, whatever their own initialisation."""
        with torch.no_grad():
            for tensor in (*agent.net.parameters(), *agent.net.buffers()):
                dist.broadcast(tensor, src=0)


def launched(device: str) -> tuple[Workers | None, str]:
    """The processes that `torchrun` started, and this one's device; (None, device) in a process of its own.

    gloo carries CPU tensors, nccl those of GPUs, one GPU per process.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return None, device
    gpu = torch.device(device).type == "cuda"
    if gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    return Workers(), device


class SharedAgent:
    """A language agent whose rows are sampled and looked at by all processes together; everything else is the agent's own."""

    def __init__(self, agent: Agent, workers: Workers) -> None:
        self._agent, self._workers = agent, workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def generate(self, starts: dict[str, Any], generator: torch.Generator | None = None, deterministic: bool = False) -> Rollout:
        """The record of all rows; the random numbers are those that one process would have drawn."""
        agent: Any = self._agent
        B, T = len(starts["prompt_ids"]), int(starts.get("max_new_tokens") or agent.options.max_new_tokens)
        device = generator.device if generator else agent.device
        uniforms = torch.rand((B, T), generator=generator, device=device, dtype=torch.float64)
        rows = self._workers.own(torch.arange(B))
        part: dict[str, Any] = {k: _pick(v, rows, B) for k, v in {**starts, "uniforms": uniforms}.items()}
        parts = [agent.generate(part, deterministic=deterministic)] if len(rows) else []
        found = [p for some in self._workers.gather([p.to("cpu") for p in parts]) for p in some]
        whole = join(found).to(agent.device)
        return replace(whole, group=None if whole.group is None else starts["group"].to(agent.device))

    def evaluate(self, rollout: Rollout, want: Any) -> Evaluation:
        """With gradient the agent's own; without, every process looks at its share."""
        if torch.is_grad_enabled():
            return self._agent.evaluate(rollout, want)
        rows = self._workers.own(torch.arange(rollout.shape[0], device=rollout.valid.device))
        found = self._agent.evaluate(rollout.rows(rows), want) if len(rows) else None
        columns = {} if found is None else {f.name: getattr(found, f.name) for f in fields(found)}
        plain = {k: (v.logits if isinstance(v, Categorical) else v).cpu() for k, v in columns.items() if v is not None}
        brought = [p for p in self._workers.gather(plain) if p]
        whole = {k: torch.cat([p[k] for p in brought]).to(rollout.valid.device) for k in brought[0]}
        return Evaluation(**{k: Categorical(v) if k == "dist" else v for k, v in whole.items()})  # type: ignore[arg-type]

    def reference(self) -> SharedAgent:
        return SharedAgent(self._agent.reference(), self._workers)


def _pick(value: Any, rows: Tensor, total: int) -> Any:
    """Some of `total` rows of a tensor, a list or a dictionary of them; anything else is for all rows."""
    if isinstance(value, dict):
        return {k: _pick(v, rows, total) for k, v in value.items()}
    if isinstance(value, Tensor):
        return value[rows.to(value.device)]
    return [value[i] for i in rows.tolist()] if isinstance(value, list) and len(value) == total else value


class SharedTask:
    """A task whose rewards are computed by all processes, each for its share of the rows."""

    def __init__(self, task: Any, workers: Workers) -> None:
        self._task, self._workers = task, workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def score(self, rollout: Rollout) -> Tensor:
        """(n,) rewards; what the task writes into the outcome is there for all rows."""
        rows = self._workers.own(torch.arange(rollout.shape[0]))
        brought: tuple[Any, dict[str, Any]] | None = None
        if len(rows):
            part = chosen(rollout, rows.to(rollout.valid.device))
            score = torch.as_tensor(self._task.score(part)).cpu()
            brought = score, {k: v for k, v in part.outcome.items() if k not in rollout.outcome}
        found = [b for b in self._workers.gather(brought) if b is not None]
        rollout.outcome.update(joined([outcome for _, outcome in found]))
        return torch.cat([score for score, _ in found])


def shared_driver(
    method: Any, agent: Agent, collector: Any, seed: int, workers: Workers, references: Any = None, texts: Rollout | None = None
) -> OnPolicyDriver:
    """The driver of one process of several. Raises ValueError for what is not text made whole, and for methods that step outside of minibatches."""
    from markovia.algos.on_policy.driver import OnPolicyDriver
    from markovia.algos.on_policy.method import DualAscent

    if agent.kind != "language" or not isinstance(method, OnPolicy):
        raise ValueError(
            f"several processes share the rows of on-policy methods on text (grpo), but this is {type(method).__name__} on a {agent.kind} task; "
            "train it in one process"
        )
    if isinstance(method.controller, DualAscent):
        raise ValueError("DualAscent's fix-up phase is written for one process; choose Constant, Doubling or MirrorStep")
    workers.share_weights(agent)
    collector.task = SharedTask(collector.task, workers)
    given = {name: SharedAgent(policy, workers) for name, policy in (references or {}).items()}
    driver = OnPolicyDriver(method, SharedAgent(agent, workers), collector, seed, references=given, texts=texts)  # type: ignore[arg-type]
    for update in driver.updates.values():
        update.workers = workers
    return driver
