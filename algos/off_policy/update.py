"""One minibatch update of actor, critics, value, temperature and targets: what a row's slots say, on tensors of static shapes.

The order is that of the slots: target -> value -> critic -> actor -> temperature -> Polyak. Randomness comes in as `noise`; nothing here draws,
loops over data, logs or waits for a number. Each loss is differentiated for its own network alone: while the actor climbs Q, the gradient of
the critics' weights is not computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from markovia.agents.control import ControlAgent
from markovia.agents.critics import QEnsemble
from markovia.agents.distributions import Gaussian
from markovia.agents.networks import Trunk, ValueNet
from markovia.agents.records import Obs
from markovia.algos.off_policy.losses import (
    Aggregate,
    aggregate,
    bootstrap,
    log_q,
    mirror_objective,
    parameter_penalty,
    smoothed_action,
    soft_value,
    td_error,
    temperature_loss,
)
from markovia.algos.off_policy.method import Deterministic, FixedTemperature, OffPolicy, SmoothedTarget, TunedTemperature, ValueTarget
from markovia.algos.off_policy.replay import Batch
from markovia.algos.streams import stream_seed

NOISES = ("target", "value", "actor")  # what the first axis of `noise` (3, b, d) is for
Stats = dict[str, Tensor]


def log_density(dist: Gaussian, action: Tensor, temperature: FixedTemperature | TunedTemperature) -> Tensor:
    """log_q pi(a|s) as the temperature slot counts it, (b,); `action` in policy coordinates."""
    if isinstance(temperature, TunedTemperature):
        return dist.log_prob(action)
    if temperature.per_dimension:
        return log_q(dist.log_probs(action), q=temperature.q).sum(-1)
    return log_q(dist.log_prob(action), q=temperature.q)


class ActorCritic:
    """The agent, its critics and everything else that an update moves. Critics start from the stream (seed, "init-critic").

    `nets` holds critics and value network with their targets, `references` frozen policies: "target" (smoothed targets), "old" (mirror descent).
    """

    def __init__(self, method: OffPolicy, agent: ControlAgent, seed: int) -> None:
        self.method, self.agent = method, agent
        c, v, space = method.critic, method.value, agent.observation_space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "init-critic"))
            self.nets: dict[str, nn.Module] = {"critic": QEnsemble(space, agent.action_size, c.num, c.hidden, c.activation, c.layer_norm)}
            if v is not None:
                self.nets["value"] = ValueNet(Trunk(space, v.hidden, v.activation))
        followed = "value" if isinstance(method.target, ValueTarget) else "critic"
        like = next(agent.net.parameters())
        for net in self.nets.values():
            net.to(like.device, like.dtype)
        self.nets["target"] = _frozen_copy(self.nets[followed])
        self.references: dict[str, ControlAgent] = {}
        if isinstance(method.target, SmoothedTarget):
            self.references["target"] = _reference(agent)
        if method.actor.inverse_step is not None:
            self.references["old"] = _reference(agent)
        self.followers: list[tuple[Tensor, Tensor]] = list(zip(self.nets["target"].parameters(), self.nets[followed].parameters(), strict=True))
        if "target" in self.references:
            self.followers += _pairs(self.references["target"], agent)
        self.log_lam: Tensor | None = None
        self.target_entropy_nats = -float(agent.action_size)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if v is not None:
            self._optimizer("value", self.nets["value"].parameters(), v.lr)
        self._optimizer("critic", self.nets["critic"].parameters(), c.lr)
        self._optimizer("actor", iter(agent.parameters("policy")), method.actor.lr)
        if isinstance(method.temperature, TunedTemperature):
            if method.temperature.target_entropy_nats is not None:
                self.target_entropy_nats = method.temperature.target_entropy_nats
            self.log_lam = torch.tensor(method.temperature.lam, device=agent.device).log().requires_grad_(True)
            self._optimizer("temperature", iter([self.log_lam]), method.temperature.lr)

    def _optimizer(self, name: str, params: Iterator[Tensor], lr: float) -> None:
        self.optimizers[name] = torch.optim.Adam(list(params), lr=lr, fused=True)

    # -- forward passes ---------------------------------------------------------------------------------------------------------------

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.agent.device.type, torch.bfloat16, enabled=self.method.precision == "bfloat16")

    def q(self, name: str, obs: Obs, action: Tensor, members: int | None = None) -> Tensor:
        """Values of the ensemble `name`, (N, b), or of its first `members` alone."""
        with self._cast():
            values: Tensor = self.nets[name](obs, action, members)
        return values.to(action.dtype)

    def one_q(self, name: str, obs: Obs, action: Tensor, how: Aggregate) -> Tensor:
        """One value per state and action, (b,)."""
        return aggregate(self.q(name, obs, action, 1 if how == "first" else None), how)

    def v(self, name: str, obs: Obs, dtype: torch.dtype) -> Tensor:
        """Values of a value network, (b,)."""
        with self._cast():
            values: Tensor = self.nets[name](obs)
        return values[..., 0].to(dtype)

    def policy(self, agent: ControlAgent, obs: Obs, dtype: torch.dtype) -> Gaussian:
        """An agent's action distribution, its parameters computed in the method's precision."""
        with self._cast():
            params = agent.net["policy"](obs)[0]
        dist = agent.distribution(params.to(dtype))
        assert isinstance(dist, Gaussian)
        return dist

    def lam(self) -> Tensor | float:
        """Weight of the entropy, no gradient."""
        if self.log_lam is not None:
            return self.log_lam.detach().exp()
        assert isinstance(self.method.temperature, FixedTemperature)
        return self.method.temperature.lam

    def choose(self, dist: Gaussian, noise: Tensor) -> Tensor:
        """The policy's action in its own coordinates, reparameterised; its mode when it is deterministic."""
        return dist.mode() if isinstance(self.method.policy, Deterministic) else dist.at(noise)

    # -- losses -----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sampled_value(self, critic: str, obs: Obs, noise: Tensor, lam: Tensor | float, how: Aggregate, entropy: bool) -> Tensor:
        """agg_j Q_j(s, a) - lam log_q pi(a|s), a drawn from the policy, (b,)."""
        dist = self.policy(self.agent, obs, noise.dtype)
        raw = self.choose(dist, noise)
        value = self.one_q(critic, obs, self.agent.unit_action(raw), how)
        if not (entropy and self.method.entropic):
            return value
        return soft_value(value, log_density(dist, raw, self.method.temperature), lam=lam)

    @torch.no_grad()
    def target(self, batch: Batch, noise: Tensor, lam: Tensor | float) -> Tensor:
        """y (b,) of the slot `target`."""
        t, obs = self.method.target, batch.next_obs
        if isinstance(t, ValueTarget):
            value = self.v("target", obs, noise.dtype)
        elif isinstance(t, SmoothedTarget):
            mean = self.agent.unit_action(self.policy(self.references["target"], obs, noise.dtype).mode())
            value = self.one_q("target", obs, smoothed_action(mean, noise, std=t.noise, clip=t.clip), t.aggregate)
        else:
            value = self.sampled_value("target", obs, noise, lam, t.aggregate, t.entropy)
        return bootstrap(batch.reward, batch.continuation, value, gamma=self.method.gamma)

    def critic_loss(self, batch: Batch, y: Tensor) -> tuple[Tensor, Stats]:
        """coef mean sum_j (Q_j(s, a) - y)^2."""
        q = self.q("critic", batch.obs, batch.action)
        loss = self.method.critic.coef * td_error(q, y).mean()
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def value_loss(self, batch: Batch, noise: Tensor, lam: Tensor | float) -> tuple[Tensor, Stats]:
        """0.5 mean (V(s) - (agg_j Q_j(s, a) - lam log_q pi(a|s)))^2, a drawn from the policy."""
        assert self.method.value is not None
        goal = self.sampled_value("critic", batch.obs, noise, lam, self.method.value.aggregate, True)
        loss = 0.5 * (self.v("value", batch.obs, noise.dtype) - goal).square().mean()
        return loss, {"value_loss": loss.detach()}

    def actor_loss(self, batch: Batch, noise: Tensor, lam: Tensor | float) -> tuple[Tensor, Tensor | None, Stats]:
        """(mean objective, log pi of the sampled actions or None, statistics) of the slot `actor`."""
        m, slot = self.method, self.method.actor
        dist = self.policy(self.agent, batch.obs, noise.dtype)
        raw = self.choose(dist, noise)
        value = self.one_q("critic", batch.obs, self.agent.unit_action(raw), slot.aggregate)
        density: Tensor | float = 0.0
        density_old: Tensor | float = 0.0
        step: Tensor | float = lam if slot.inverse_step is None else slot.inverse_step
        if m.entropic or slot.inverse_step is not None:
            density = log_density(dist, raw, m.temperature)
        if slot.inverse_step is not None:
            # pi_k is evaluated at the action that pi has just taken, and the gradient flows through that action.
            density_old = log_density(self.policy(self.references["old"], batch.obs, noise.dtype), raw, m.temperature)
        order = m.temperature.q if isinstance(m.temperature, FixedTemperature) else 1.0
        objective = mirror_objective(value, density, density_old, lam=lam, inverse_step=step, q=order)
        assert isinstance(objective, Tensor)
        loss = objective.mean()
        stats = {"actor_loss": loss.detach()}
        if slot.penalty:
            loss = loss + slot.penalty * parameter_penalty(dist.mean, dist.log_std).mean()
        logp = density if isinstance(m.temperature, TunedTemperature) else None
        if isinstance(density, Tensor):
            with torch.no_grad():
                stats["entropy_nats"] = -(logp if logp is not None else dist.log_prob(raw)).mean()
        return loss, logp if isinstance(logp, Tensor) else None, stats

    # -- the update -------------------------------------------------------------------------------------------------------------------

    def __call__(self, batch: Batch, noise: Tensor, move_actor: bool) -> Stats:
        """Move everything by one minibatch (b rows, noise (3, b, d)); actor, temperature and targets only when `move_actor`."""
        lam = self.lam()
        stats: Stats = {}
        y = self.target(batch, noise[0], lam)
        if self.method.value is not None:
            loss, found = self.value_loss(batch, noise[1], lam)
            stats |= found
            self.descend("value", loss)
        loss, found = self.critic_loss(batch, y)
        stats |= found
        self.descend("critic", loss)
        if not move_actor:
            return stats
        loss, logp, found = self.actor_loss(batch, noise[2], lam)
        stats |= found
        self.descend("actor", loss)
        if self.log_lam is not None:
            assert logp is not None
            self.descend("temperature", temperature_loss(self.log_lam, logp, target_entropy_nats=self.target_entropy_nats).mean())
            stats["lam"] = self.log_lam.detach().exp()
        self.follow(self.method.polyak)
        return stats

    def descend(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        params = optimizer.param_groups[0]["params"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=params)
        optimizer.step()

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Targets <- (1 - rate) targets + rate networks."""
        for target, source in self.followers:
            target.lerp_(source, rate)

    @torch.no_grad()
    def refresh(self) -> None:
        """pi_k <- pi."""
        for old, new in _pairs(self.references["old"], self.agent):
            old.copy_(new)


def _reference(agent: ControlAgent) -> ControlAgent:
    frozen = agent.reference()
    assert isinstance(frozen, ControlAgent)
    return frozen


def _pairs(reference: ControlAgent, agent: ControlAgent) -> list[tuple[Tensor, Tensor]]:
    return list(zip(reference.net["policy"].parameters(), agent.net["policy"].parameters(), strict=True))


def _frozen_copy(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False)
