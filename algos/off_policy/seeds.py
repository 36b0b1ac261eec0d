"""Several seeds of one method as one batched update: every tensor of an update gets a leading axis, and one function moves all seeds at once.

What is compiled for one seed is traced and mapped over that axis, so each row serves. It pays where a device has room for more than one small update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from markovia.algos.compiled import Compiled, trace
from markovia.algos.off_policy.driver import OffPolicyDriver
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.update import tied
from markovia.algos.statistics import Statistics

Stats = dict[str, Tensor]


class SeedGroup:
    """Drivers of one method that learn from fixed data, stepped together; each keeps its own seed, random streams, agent and checkpoints.

    Their numbers are those of separate runs to rounding. Raises ValueError for methods that step environments, and for drivers that differ.
    """

    def __init__(self, drivers: Sequence[OffPolicyDriver], compile: bool = False) -> None:
        first = drivers[0]
        if not first.method.fixed_data:
            raise ValueError(f"several seeds at once serve methods that learn from a dataset, got {type(first.method).__name__}; run them one by one")
        if any(d.method != first.method for d in drivers) or len({d.num_updates for d in drivers}) > 1:
            raise ValueError("seeds that are stepped together need one method and equally many updates; run them one by one")
        self.drivers, self.compile = list(drivers), compile
        self._stacked = self._share()
        for update in (d.update for d in self.drivers):
            update.prepare()
        self._made: dict[bool, Callable[..., tuple[Tensor, ...]]] = {}
        self.compiled: list[Compiled] = []

    @torch.no_grad()
    def _share(self) -> list[Tensor]:
        """Put every tensor that updates change beside those of the other seeds, (S, ...); the drivers hold views of it from now on."""
        updates = [d.update for d in self.drivers]
        out: list[Tensor] = []
        for name in updates[0].optimizers:
            stacks = [torch.stack(each) for each in zip(*(u.optimizers[name].tensors() for u in updates), strict=True)]
            out += stacks
            for s, update in enumerate(updates):
                update.optimizers[name].live_in([stack[s] for stack in stacks])
        for i, (net, layout) in enumerate(updates[0].tied_nets()):
            stack = torch.stack([torch.zeros_like(u.optimizers[layout].flat) for u in updates])
            out.append(stack)
            for s, update in enumerate(updates):
                vector = tied(update.tied_nets()[i][0], update.optimizers[layout], stack[s])
                update.replace_vector(i, vector)
            assert net is updates[0].tied_nets()[i][0]
        return out

    def step(self) -> list[dict[str, float]]:
        """One iteration of every driver; the statistics of each."""
        first = self.drivers[0]
        stats = [Statistics() for _ in self.drivers]
        for d in self.drivers:
            d.watch.begin(d.iteration)
        minibatch = [d.generator("minibatch") for d in self.drivers]
        for _ in range(first.method.num_steps):
            for d in self.drivers:
                d.num_env_steps += 1
            while first.num_updates < first.updates_due():
                for held, found in zip(stats, self.improve(minibatch), strict=True):
                    held.add(found)
            for d in self.drivers:
                d.refresh_if_due(d.num_env_steps - 1)
            if first.finished:
                break
        return [d.report(held) for d, held in zip(self.drivers, stats, strict=True)]

    def improve(self, generators: Sequence[torch.Generator]) -> list[Stats]:
        """One update of every driver on a minibatch of its own."""
        drawn = [d.draw(g) for d, g in zip(self.drivers, generators, strict=True)]
        for d in self.drivers:
            d.num_updates += 1
        found = self._update(drawn)
        for d, stats, (batch, _) in zip(self.drivers, found, drawn, strict=True):
            d.watch.add(stats, batch)
        return found

    def _update(self, drawn: Sequence[tuple[Batch, Tensor]]) -> list[Stats]:
        """The same on given minibatches and noise."""
        first = self.drivers[0]
        if first.models_behaviour:
            return [d.update.fit_behaviour(*each) for d, each in zip(self.drivers, drawn, strict=True)]
        for d in self.drivers:
            d.set_lr()
        columns = [torch.stack(each) for each in zip(*((*batch.named().values(), noise) for batch, noise in drawn), strict=True)]
        if first.moves_actor not in self._made:
            self._made[first.moves_actor] = self._make(*drawn[0], columns)
        (stats,) = self._made[first.moves_actor](*self._stacked, *columns)
        names = first.update.stat_names(first.moves_actor)
        return [dict(zip(names, row.unbind(), strict=True)) for row in stats]

    def _make(self, batch: object, noise: Tensor, columns: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """One seed's traced update, mapped over the seeds; compiled as a whole where that was asked for."""
        first = self.drivers[0]
        for optimizer in first.update.optimizers.values():
            optimizer.fused = False
        one, used = trace(first.update.pure, first.update.arguments(batch, noise, first.moves_actor))  # type: ignore[arg-type]
        plain(one)
        every = torch.vmap(one)

        def mapped(*stacked: Tensor) -> tuple[Tensor, ...]:
            out: tuple[Tensor, ...] = every(*[stacked[i] for i in used])
            return out

        if not self.compile:
            return torch.no_grad()(mapped)
        compiled = Compiled(mapped, static=len(self._stacked))
        self.compiled.append(compiled)
        return lambda *stacked: compiled(tuple(c.shape for c in columns), stacked)

    @property
    def compile_seconds(self) -> float:
        return sum(c.seconds for c in self.compiled)


def plain(module: torch.fx.GraphModule) -> None:
    """Write two operations in place that torch can't map over an axis, x.lerp_(y, w) and x.addcmul_(y, z, value=v), by sums and products."""
    graph, aten = module.graph, torch.ops.aten
    for node in list(graph.nodes):
        if node.target not in (aten.lerp_.Scalar, aten.addcmul_.default):
            continue
        x, y, w = node.args
        with graph.inserting_before(node):
            if node.target is aten.lerp_.Scalar:
                change = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.sub.Tensor, (y, x)), w))
            else:
                change = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.mul.Tensor, (y, w)), node.kwargs.get("value", 1)))
            node.replace_all_uses_with(graph.call_function(aten.add_.Tensor, (x, change)))
        graph.erase_node(node)
    module.recompile()
