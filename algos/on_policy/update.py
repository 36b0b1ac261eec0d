"""One minibatch step of the on-policy loop: pick the decisions, loss, gradient, clip, optimiser; eagerly, or compiled as one function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from markovia.agents.interface import Agent
from markovia.agents.records import Rollout
from markovia.algos.advantages import normalise
from markovia.algos.compiled import Compiled
from markovia.algos.on_policy.loss import policy_loss, weights
from markovia.algos.on_policy.method import Descent, OnPolicy
from markovia.algos.on_policy.tokens import Partner
from markovia.algos.optimizer import Optimizer
from markovia.algos.statistics import Stats

if TYPE_CHECKING:
    from markovia.algos.distributed import Workers

LossFn = Callable[..., tuple[Tensor, dict[str, Tensor]]]
# Statistics that are means over a piece, and what they are means over; others are sums of weighted terms.
MEANS = {"approx_kl": "omega", "clip_fraction": "tokens", "entropy": "tokens", "kl_mean": "tokens"}


class _Around(nn.Module):
    """The agent's networks around functions that use them, so that torch can run these with other tensors in the place of the parameters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)


class Update:
    """Minibatch steps of one loss with one optimiser over a record (`begin`), the same numbers eagerly and compiled to rounding.

    Compiled, a short last minibatch is filled up with decisions that are masked out, so that all have one shape.
    With `workers` (algos.distributed) each process differentiates its share of a minibatch, and all step along the sum of their gradients.
    """

    workers: Workers | None = None

    def __init__(
        self,
        name: str,
        method: OnPolicy,
        agent: Agent,
        solver: Descent,
        loss: LossFn,
        joint_value: bool,
        optimizer: Optimizer,
        compile: bool,
        extra: Rollout | None = None,
    ) -> None:
        self.extra = None if extra is None else replace(extra, boot_value=None, cost=None, discount=None, group=None)  # of the auxiliary loss
        self.name, self.method, self.agent, self.solver, self.loss, self.joint_value = name, method, agent, solver, loss, joint_value
        self.optimizer = optimizer
        self.compiled = Compiled(self._pure, static=len(optimizer.tensors())) if compile else None
        self._names: tuple[str, ...] = ()
        self._module = _Around(agent.net)
        self._paired = isinstance(method.tokens, Partner) and loss is policy_loss

    def _param_names(self) -> list[str]:
        names = {id(p): name for name, p in self.agent.net.named_parameters()}
        return [f"net.{names[id(p)]}" for p in self.optimizer.params]

    def begin(self, rollout: Rollout, chance: torch.Generator | None = None) -> None:
        """Take the record whose minibatches follow; `chance` draws the rows of the auxiliary loss."""
        self._chance = chance
        self.base = rollout.decisions() if self.solver.unit == "decision" else rollout
        self.index = torch.nonzero(self.base.mask.any(dim=1)).squeeze(1)
        if self._paired and self.base.group is not None:
            self.index = self.index[torch.argsort(self.base.group[self.index], stable=True)]
        if self.compiled is not None:
            self._static = len(self.base.mask) if self.solver.minibatch is None else self.solver.minibatch
            # What the loss can read; anything else would only be carried along.
            self._template = replace(self.base, boot_value=None, cost=None, discount=None, group=None)
            self._columns = self._template.tensors()
            self._key = (self._static, *(t.shape for t in self._columns))

    def minibatches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """One pass over the record as index tensors, shuffled unless a minibatch is the whole."""
        index, size = self.index, 2 if self._paired else 1
        if self.solver.minibatch is not None:
            order = torch.randperm(len(index) // size, generator=generator).to(index.device)
            index = index.view(-1, size)[order].reshape(-1)
        yield from index.split(self.solver.minibatch or max(len(index), 1))

    def minibatch(self, index: Tensor) -> Rollout:
        """The units `index` of the record that was taken, with the texts of its rows where it has some."""
        chosen = index.tolist()
        texts = {k: [v[i] for i in chosen] for k, v in self.base.outcome.items() if isinstance(v, list) and len(v) == self.base.shape[0]}
        return replace(self.base.rows(index), outcome=texts)

    def step(self, index: Tensor, coef: Tensor) -> Stats:
        """One optimiser step on the units `index`, and what it tells about itself."""
        extra = None if self.extra is None else self._draw(self.extra)
        if self.compiled is None:
            return self._eager(index, coef, extra)
        n = len(index)
        if n < self._static:
            index = torch.cat([index, index.new_zeros(self._static - n)])
        args = [*self.optimizer.tensors(), coef, torch.tensor(n, device=index.device), index, *self._columns]
        args += [] if self.extra is None or extra is None else [extra, *self.extra.tensors()]
        (values,) = self.compiled(self._key, args)
        # On a GPU the next replay of the graph writes to the same place.
        return Stats(self._names, values.clone() if values.is_cuda else values)

    def _draw(self, extra: Rollout) -> Tensor:
        """Rows of the auxiliary loss's record for one step, with replacement."""
        rows = self.method.aux.rows  # type: ignore[union-attr]
        return torch.randint(extra.shape[0], (rows,), generator=self._chance).to(extra.mask.device)

    def _terms(self, part: Rollout, omega: Tensor, coef: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.method, self.agent, part, omega, coef, self.joint_value)

    def _prepared(self, part: Rollout) -> tuple[Rollout, Tensor]:
        """The minibatch with its advantages standardised if the method says so, and its weights Omega."""
        m = self.method
        if m.normalize_advantage == "minibatch":
            part.columns["adv"] = normalise(part.columns["adv"], part.mask)
        return part, weights(part.mask, m.aggregation, m.max_length, part.columns["adv"].dtype)

    @property
    def _surveys(self) -> bool:
        """Whether something must be known of the whole minibatch before its loss is taken."""
        return self.loss is policy_loss and (self.method.tokens is not None or self.method.anchor is not None)

    @torch.no_grad()
    def _survey(self, part: Rollout) -> dict[str, Tensor]:
        """Columns that depend on the whole minibatch under the current policy: token weights, selections, the pull of the entropy anchor."""
        m = self.method
        out: dict[str, Tensor] = {}
        ev = self.agent.evaluate(part, {w for rule in (m.tokens, m.anchor) if rule is not None for w in rule.want})
        if m.tokens is not None:
            out |= m.tokens(part, ev, m.surrogate)
        if m.anchor is not None:
            out |= m.anchor(part, ev)
        return out

    def _eager(self, index: Tensor, coef: Tensor, extra: Tensor | None = None) -> Stats:
        """Gradients of micro-batches add up to the minibatch's exactly."""
        batch, omega = self._prepared(self.base.rows(index))
        if self._surveys:
            batch.columns |= self._survey(batch)
        self.optimizer.zero_grad()
        n = batch.shape[0]
        micro = min(self.solver.micro or n, n)
        pieces: list[dict[str, Tensor]] = []
        rows = torch.arange(n, device=index.device)
        rows = rows if self.workers is None else self.workers.own(rows)
        for piece in rows.split(micro) if len(rows) else ():
            part = batch if len(piece) == n else batch.rows(piece)
            loss, stats = self._terms(part, omega[piece], coef)
            loss.backward()
            pieces.append({**stats, "tokens": part.mask.sum(), "omega": omega[piece].sum()})
        if self.workers is not None:
            self.workers.sum_gradients(self.optimizer)
            pieces = self.workers.pieces(pieces, index.device)
        out = {k: _joined(k, pieces) for k in pieces[0] if k not in ("tokens", "omega")}
        if self.extra is not None and extra is not None:  # everyone takes it whole, so it comes after the sum
            aux = self.method.aux(self.agent, self.extra.rows(extra))  # type: ignore[misc]
            aux.backward()
            out["aux_loss"] = aux.detach()
        norm = self.optimizer.step()
        return Stats.of({**out, f"grad_norm/{self.name}": norm})

    def _pure(self, *args: Tensor) -> tuple[Tensor, ...]:
        """The whole step on tensors alone: optimiser tensors (changed in place), coef, count of real units, index, columns of the record."""
        state, rest = args[: self.compiled.static], args[self.compiled.static :]  # type: ignore[union-attr]
        coef, count, index, columns = rest[0], rest[1], rest[2], iter(rest[3:])
        part = self._template.map(lambda _: next(columns).index_select(0, index))
        drawn = None
        if self.extra is not None:
            rows = next(columns)
            drawn = self.extra.map(lambda _: next(columns).index_select(0, rows))
        real = torch.arange(len(index), device=index.device) < count
        part, omega = self._prepared(replace(part, mask=part.mask & real[:, None]))
        with torch.enable_grad():
            params = [v.detach().requires_grad_() for v in self.optimizer.views(state[0])]
            named = dict(zip(self._param_names(), params, strict=True))
            if self._surveys:
                part.columns |= functional_call(self._module, named, (self._survey, part))
            loss, stats = functional_call(self._module, named, (self._terms, part, omega, coef))
            if drawn is not None:
                aux = functional_call(self._module, named, (self.method.aux, self.agent, drawn))
                loss, stats = loss + aux, {**stats, "aux_loss": aux.detach()}
            grads = torch.autograd.grad(loss, params, allow_unused=True)
        grad = self.optimizer.flatten([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])
        norm = self.optimizer.move(state, grad)
        stats = {**stats, f"grad_norm/{self.name}": norm}
        told = Stats.of(stats)
        self._names = told.names
        return (told.values,)


def _joined(name: str, pieces: list[dict[str, Tensor]]) -> Tensor:
    """A statistic of a minibatch from those of its pieces."""
    if len(pieces) == 1:
        return pieces[0][name]
    values = torch.stack([p[name] for p in pieces])
    if name.endswith("_max"):
        return values.max()
    if name not in MEANS:
        return values.sum()
    size = torch.stack([p[MEANS[name]] for p in pieces]).to(values)
    return (values * size).sum() / size.sum().clamp(min=1e-12)
