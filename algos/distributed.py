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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from markovia.agents.distributions import Categorical
from markovia.agents.interface import Agent, Evaluation
from markovia.agents.records import Rollout, joined
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.filters import chosen, join
from markovia.algos.on_policy.method import Descent, DualAscent, OnPolicy
from markovia.algos.optimizer import Optimizer, Rule


class Workers:
    """The processes of one run; every method is called by all of them, in the same order.

    `sharded` says that the model is cut over them (algos.sharding), so that all must pass through it equally often.
    """

    def __init__(self, sharded: bool = False) -> None:
        self.rank, self.size, self.sharded = dist.get_rank(), dist.get_world_size(), sharded

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of n rows: parts in a row whose lengths differ by one at most, of a sharded model by none.

        Raises ValueError for rows that can't be shared out equally then.
        """
        if self.sharded and len(rows) % self.size:
            raise ValueError(f"with a sharded model {self.size} processes take equally many rows, got {len(rows)}; use multiples of {self.size}")
        return rows.tensor_split(self.size)[self.rank]

    def filled_up(self, n: int) -> Tensor:
        """This process's share of 0 .. n-1, the last one repeated where a sharded model needs it; what is too much stands at the end."""
        extra = -n % self.size if self.sharded else 0
        return self.own(torch.arange(n + extra).clamp(max=n - 1))

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

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def sum_gradients(self, optimizer: Optimizer) -> None:
        """Make the optimiser's gradient the sum over the processes."""
        if self.sharded:
            optimizer.take()  # type: ignore[attr-defined]  # of algos.sharding
        else:
            self.add(optimizer.grad)

    def pieces(self, own: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
        """The statistics of everybody's pieces of a minibatch."""
        found = self.gather([{k: v.detach().cpu() for k, v in piece.items()} for piece in own])
        return [{k: v.to(device) for k, v in piece.items()} for some in found for piece in some]

    def share_weights(self, agent: Agent) -> None:
        """Everyone starts with the first process's weights, whatever their own initialisation."""
        with torch.no_grad():
            for tensor in (*agent.net.parameters(), *agent.net.buffers()):
                dist.broadcast(tensor, src=0)


def launched(device: str, shard: bool = False) -> tuple[Workers | None, str]:
    """The processes that `torchrun` started, and this one's device; (None, device) in a process of its own.

    gloo carries CPU tensors, nccl those of GPUs, one GPU per process. Raises ValueError for a model that is to be cut in a process of its own.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        if shard:
            raise ValueError("a model is cut over several processes: start them with `torchrun --nproc-per-node N -m markovia train ...`")
        return None, device
    gpu = torch.device(device).type == "cuda"
    if gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return Workers(shard), device


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
        rows = self._workers.filled_up(B)
        part: dict[str, Any] = {k: _pick(v, rows, B) for k, v in {**starts, "uniforms": uniforms}.items()}
        if self._workers.sharded:
            part["goes_on"] = self._workers.any
        parts = [agent.generate(part, deterministic=deterministic)] if len(rows) else []
        found = [p for some in self._workers.gather([p.to("cpu") for p in parts]) for p in some]
        whole = chosen(join(found), torch.arange(B)).to(agent.device)
        return replace(whole, group=None if whole.group is None else starts["group"].to(agent.device))

    def evaluate(self, rollout: Rollout, want: Any) -> Evaluation:
        """With gradient the agent's own; without, every process looks at its share."""
        if torch.is_grad_enabled():
            return self._agent.evaluate(rollout, want)
        rows = self._workers.filled_up(rollout.shape[0]).to(rollout.valid.device)
        found = self._agent.evaluate(rollout.rows(rows), want) if len(rows) else None
        columns = {} if found is None else {f.name: getattr(found, f.name) for f in fields(found)}
        plain = {k: (v.logits if isinstance(v, Categorical) else v).cpu() for k, v in columns.items() if v is not None}
        brought = [p for p in self._workers.gather(plain) if p]
        whole = {k: torch.cat([p[k] for p in brought])[: rollout.shape[0]].to(rollout.valid.device) for k in brought[0]}
        return Evaluation(**{k: Categorical(v) if k == "dist" else v for k, v in whole.items()})  # type: ignore[arg-type]

    def reference(self, fixed: bool = False) -> SharedAgent:
        return SharedAgent(self._agent.reference(fixed), self._workers)


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
        rows = torch.arange(rollout.shape[0]).tensor_split(self._workers.size)[self._workers.rank]
        brought: tuple[Any, dict[str, Any]] | None = None
        if len(rows):
            part = chosen(rollout, rows.to(rollout.valid.device))
            score = torch.as_tensor(self._task.score(part)).cpu()
            brought = score, {k: v for k, v in part.outcome.items() if k not in rollout.outcome}
        found = [b for b in self._workers.gather(brought) if b is not None]
        rollout.outcome.update(joined([outcome for _, outcome in found]))
        return torch.cat([score for score, _ in found])


class SharedDriver(OnPolicyDriver):
    """The loop of one process of several; a sharded model has an optimiser of its parts."""

    def __init__(self, method: OnPolicy, agent: Agent, collector: Any, seed: int, workers: Workers, references: Any, texts: Rollout | None) -> None:
        self.workers = workers
        shared: Any = SharedAgent(agent, workers)
        super().__init__(method, shared, collector, seed, references=references, texts=texts)
        for update in self.updates.values():
            update.workers = workers

    def _make_optimizer(self, solver: Descent, groups: Any) -> Optimizer:
        if not self.workers.sharded:
            return super()._make_optimizer(solver, groups)
        from markovia.algos.sharding import ShardedOptimizer  # FSDP takes two seconds to import

        rule = Rule(solver.optimizer, solver.eps, solver.betas, solver.weight_decay)
        return ShardedOptimizer([(params, lr) for params, lr in groups if params], rule, solver.max_grad_norm)


def shared_driver(
    method: Any, agent: Agent, collector: Any, seed: int, workers: Workers, references: Any = None, texts: Rollout | None = None, device: str = "cpu"
) -> SharedDriver:
    """The driver of one process of several; with `workers.sharded` the agent's model and its reference are cut over them first.

    Raises ValueError for what is not text made whole, for methods that step outside of minibatches, and for what a sharded model can't do.
    """
    if agent.kind != "language" or not isinstance(method, OnPolicy):
        raise ValueError(
            f"several processes share the rows of on-policy methods on text (grpo), but this is {type(method).__name__} on a {agent.kind} task; "
            "train it in one process"
        )
    if isinstance(method.controller, DualAscent):
        raise ValueError("DualAscent's fix-up phase is written for one process; choose Constant, Doubling or MirrorStep")
    workers.share_weights(agent)
    if workers.sharded:
        from markovia.algos.sharding import shard

        _check_sharded(method, agent, workers.size)
        shard(agent, torch.device(device))  # type: ignore[arg-type]
    collector.task = SharedTask(collector.task, workers)
    given = {name: SharedAgent(policy, workers) for name, policy in (references or {}).items()}
    return SharedDriver(method, agent, collector, seed, workers, given, texts)


def _check_sharded(method: OnPolicy, agent: Any, size: int) -> None:
    solvers = [s for s in (method.solver, method.value.separate) if isinstance(s, Descent)]
    uneven = [n for n in (min(s.minibatch or method.num_envs, method.num_envs) for s in solvers) if n % size or method.num_envs % n]
    if uneven or method.filter is not None:
        raise ValueError(
            f"with a sharded model {size} processes take equally many rows of every minibatch: num_envs={method.num_envs} must be a multiple of the "
            f"minibatch, the minibatch of {size} (got {uneven or 'no such'}), and there can't be a filter"
        )
    if method.aux is not None or method.merge is not None or ("ref" in method.references and agent.options.lora is None):
        raise ValueError("a sharded model has no auxiliary loss and no merging, and its reference is its base without adapters: train LoRA")
