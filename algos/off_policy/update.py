"""One minibatch update: value -> critic, its multiplier -> costs -> behaviour -> actor -> evaluation -> temperature -> targets, eagerly or compiled.

Each loss is differentiated for its own network alone: while the actor climbs Q, no gradient of the critics' weights is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from markovia.algos.compiled import Compiled
from markovia.algos.off_policy.actor_critic import ActorCritic, Stats
from markovia.algos.off_policy.costs import cost_loss
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import JointBehaviour, SecondActor
from markovia.algos.optimizer import Optimizer, Rule

# The first axis of `noise` (3 + k, b, d): target, value, actor, and k for the critics' regulariser, further actions of the target and, last, the
# behaviour model: see `num_noises`.
State = dict[str, list[Tensor]]  # tensors of each optimiser, as `Optimizer.tensors` lays them out


class _Body(nn.Module):
    """The networks around the update, so that torch can run it with other tensors in the place of their parameters."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.nets = update.nets
        self.call = update.body

    def forward(self, state: State, params: State, followers: Sequence[Tensor], batch: Batch, noise: Tensor, move_actor: bool) -> Stats:
        return self.call(state, params, followers, batch, noise, move_actor)


class Update:
    """Optimisers of an `ActorCritic` and its update; weights of each network are one vector, targets and pi_k vectors of the same layout."""

    def __init__(self, nets: ActorCritic, compile: bool = False) -> None:
        m = nets.method
        self.nets = nets
        second = m.evaluation if isinstance(m.evaluation, SecondActor) else None
        wanted = {"value": (nets.value, m.value), "critic": (nets.critic, m.critic), "actor": (nets.policy, m.actor),
                  "evaluation": (nets.evaluation, second), "behaviour": (nets.behaviour, m.behaviour),
                  "cost": (nets.cost, None if m.constraint is None else m.constraint.critic)}  # fmt: skip
        self.optimizers = {
            name: _adam(list(net.parameters()), slot.lr) for name, (net, slot) in wanted.items() if net is not None and slot is not None
        }
        if nets.log_multiplier is not None:
            self.optimizers["multiplier"] = _adam([nets.log_multiplier], m.regulariser.multiplier_lr)  # type: ignore[union-attr]
        if nets.log_lam is not None:
            self.optimizers["temperature"] = _adam([nets.log_lam], m.temperature.lr)  # type: ignore[union-attr]
        self.sources = [nets.followed] * (nets.target is not None) + ["cost"] * (nets.cost is not None) + ["actor"] * ("target" in nets.references)
        self.followers: list[Tensor] = []
        for i, (net, layout) in enumerate(self.tied_nets()):
            self.replace_vector(i, tied(net, self.optimizers[layout]))
        self.compiled: Compiled | None = None
        if compile:
            self.prepare()
            self.compiled = Compiled(self.pure, static=sum(len(o.tensors()) for o in self.optimizers.values()) + len(self._vectors))

    def tied_nets(self) -> list[tuple[nn.Module, str]]:
        """The networks that are copies of others, and the optimiser whose layout each has: targets in the order of `sources`, then pi_k."""
        nets = self.nets
        followers: list[tuple[nn.Module, str]] = [] if nets.target is None else [(nets.target, nets.followed)]
        followers += [] if nets.cost_target is None else [(nets.cost_target, "cost")]
        names = [name for name in ("target", "old") if name in nets.references]
        return followers + [(nets.reference_policies[name], "actor") for name in names]

    def replace_vector(self, i: int, vector: Tensor) -> None:
        """Hold `vector` as the weights of the i-th of `tied_nets`."""
        if i < len(self.sources):
            self.followers[i : i + 1] = [vector]
        else:
            self.old = vector

    def __call__(self, batch: Batch, noise: Tensor, move_actor: bool) -> Stats:
        """Move everything by one minibatch (b rows, noise (num_noises, b, d)); actor, temperature and targets only when `move_actor`."""
        if self.compiled is not None:
            return self._compiled_step(batch, noise, move_actor)
        state = {name: o.tensors() for name, o in self.optimizers.items()}
        params: State = {name: list(o.params) for name, o in self.optimizers.items()}
        return self.body(state, params, self.followers, batch, noise, move_actor)

    def body(self, state: State, params: State, followers: Sequence[Tensor], batch: Batch, noise: Tensor, move_actor: bool) -> Stats:
        """The update on given tensors: `state` and `followers` are changed in place, `params` are what the networks' parameters are just now."""
        nets = self.nets
        stats: Stats = {}

        def descend(name: str, loss: Tensor) -> None:
            grads = torch.autograd.grad(loss, params[name])
            stats[f"grad_norm/{name}"] = self.optimizers[name].move(state[name], self.optimizers[name].flatten(grads))

        lam, adv = nets.lam(), None
        if nets.critic is not None:
            y = nets.goal(batch, noise[0], lam, noise[3:])
            if nets.value is not None:
                loss, found, adv = nets.value_loss(batch, noise[1], lam)
                stats |= found
                descend("value", loss)
            loss, found = nets.critic_loss(batch, y, noise[3:])
            stats |= found
            descend("critic", loss)
            if nets.log_multiplier is not None:
                descend("multiplier", nets.multiplier_loss(stats["gap"]))
        if nets.cost is not None:
            loss, found = cost_loss(nets, batch, noise[0])
            stats |= found
            descend("cost", loss)
        if isinstance(nets.method.behaviour, JointBehaviour):
            loss, found = nets.behaviour_loss(batch, noise[-4:-2])
            stats |= found
            descend("behaviour", loss)
        if move_actor:
            stats |= self._actor_step(batch, noise, lam, adv, descend)
        if move_actor or nets.method.follow == "critic":
            with torch.no_grad():
                for follower, source in zip(followers, self.sources, strict=True):
                    follower.lerp_(state[source][0], nets.method.polyak)
        return stats

    def _actor_step(self, batch: Batch, noise: Tensor, lam: Tensor | float, adv: Tensor | None, descend: Callable[[str, Tensor], None]) -> Stats:
        nets = self.nets
        loss, stats = nets.actor_loss(batch, noise[2], lam, adv, noise[-2:])
        descend("actor", loss)
        if nets.evaluation is not None:
            loss, extra = nets.evaluation_loss(batch, noise[2])
            stats |= extra
            descend("evaluation", loss)
        if nets.log_lam is not None:
            descend("temperature", nets.temperature_loss(stats["entropy_nats"]))
            stats["lam"] = torch.as_tensor(lam)
        return stats

    def fit_behaviour(self, batch: Batch, noise: Tensor) -> Stats:
        """Move the behaviour model alone by one minibatch; eagerly, as it is done once before everything else."""
        optimizer = self.optimizers["behaviour"]
        loss, stats = self.nets.behaviour_loss(batch, noise[-2:])
        norm = optimizer.move(optimizer.tensors(), optimizer.flatten(torch.autograd.grad(loss, list(optimizer.params))))
        return {**stats, "grad_norm/behaviour": norm}

    @torch.no_grad()
    def refresh(self) -> None:
        """pi_k <- pi."""
        self.old.copy_(self.optimizers["actor"].flat)

    # -- the same as one compiled function ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What `arguments` and `pure` need, once the networks are where they stay."""
        self._module = _Body(self)
        names = {id(p): name for name, p in self._module.named_parameters()}
        self._names = {name: [names[id(p)] for p in o.params] for name, o in self.optimizers.items()}
        self._frozen_names = [[names[id(p)] for p in net.parameters()] for net, _ in self.tied_nets()]
        self._layouts = [layout for _, layout in self.tied_nets()]
        self._vectors = [*self.followers, *([self.old] if "old" in self.nets.references else [])]
        self._stats: dict[bool, list[str]] = {}

    def arguments(self, batch: Batch, noise: Tensor, move_actor: bool) -> list[Tensor]:
        """What `pure` takes: tensors of the optimisers, targets and pi_k, the minibatch's columns, noise."""
        self._template, self._move_actor = batch, move_actor
        return [*(t for o in self.optimizers.values() for t in o.tensors()), *self._vectors, *batch.named().values(), noise]

    def stat_names(self, move_actor: bool) -> list[str]:
        """What the numbers are that `pure` returned."""
        return self._stats[move_actor]

    def _compiled_step(self, batch: Batch, noise: Tensor, move_actor: bool) -> Stats:
        assert self.compiled is not None
        (stats,) = self.compiled((move_actor, noise.shape), self.arguments(batch, noise, move_actor))
        if stats.device.type == "cuda":
            stats = stats.clone()  # the next replay of the graph writes to the same place
        return dict(zip(self.stat_names(move_actor), stats.unbind(), strict=True))

    def pure(self, *args: Tensor) -> tuple[Tensor, ...]:
        """`body` on tensors alone: those of the optimisers, targets and pi_k (changed in place), the minibatch's columns, noise."""
        rest = list(args)

        def take(n: int) -> list[Tensor]:
            taken = rest[:n]
            del rest[:n]
            return taken

        state = {name: take(len(o.tensors())) for name, o in self.optimizers.items()}
        vectors = take(len(self._vectors))
        batch = Batch.from_named(dict(zip(self._template.named(), take(len(rest) - 1), strict=True)))
        with torch.enable_grad():
            params = {name: [v.detach().requires_grad_() for v in o.views(state[name][0])] for name, o in self.optimizers.items()}
            named = {n: p for name, names in self._names.items() for n, p in zip(names, params[name], strict=True)}
            for names, layout, vector in zip(self._frozen_names, self._layouts, vectors, strict=True):
                named |= dict(zip(names, self.optimizers[layout].views(vector), strict=True))
            followers = vectors[: len(self.followers)]
            stats = functional_call(self._module, named, (state, params, followers, batch, rest[0], self._move_actor))
        self._stats[self._move_actor] = list(stats)
        return (torch.stack([s.to(rest[0].dtype) for s in stats.values()]),)


def _adam(params: list[nn.Parameter], lr: float) -> Optimizer:
    return Optimizer([(params, lr)], Rule(eps=1e-8), math.inf)


def tied(net: nn.Module, layout: Optimizer, vector: Tensor | None = None) -> Tensor:
    """A vector (a new one, or the one that is given) laid out like an optimiser's, of which the parameters of `net`, a copy of the network it moves,

    become views.
    """
    vector = torch.zeros_like(layout.flat) if vector is None else vector
    with torch.no_grad():
        for p, view in zip(net.parameters(), layout.views(vector), strict=True):
            view.copy_(p)
            p.data = view
    return vector
