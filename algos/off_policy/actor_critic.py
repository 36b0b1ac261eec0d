"""All networks of an off-policy method and the losses that its slots ask for, on tensors of static shapes.

Randomness comes in as `noise`, standard normal; nothing here draws, steps, logs or waits for a number.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from markovia.agents.behaviour import ConditionalVAE
from markovia.agents.control import ControlAgent
from markovia.agents.critics import QEnsemble
from markovia.agents.distributions import Distribution, Gaussian
from markovia.agents.networks import Trunk, ValueNet
from markovia.agents.records import Obs, map_obs
from markovia.algos.off_policy.actors import guided_loss, logged_loss, second_loss, supported_loss
from markovia.algos.off_policy.costs import priced
from markovia.algos.off_policy.losses import (
    Aggregate,
    aggregate,
    bootstrap,
    drawn_members,
    log_q,
    mirror_objective,
    parameter_penalty,
    quantile_error,
    smoothed_action,
    soft_value,
    td_error,
    temperature_loss,
)
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.regularised import expectile, lower_target, multiplier_loss, penalised_value, support_bound
from markovia.algos.off_policy.regularisers import conservative, diverse
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import (
    Ascent,
    Conservative,
    Deterministic,
    Expectile,
    FixedTemperature,
    Guided,
    InSampleTarget,
    JointBehaviour,
    LoggedTarget,
    LowerValue,
    QuantileCritics,
    SecondActor,
    SmoothedTarget,
    SoftTarget,
    SoftValue,
    Supported,
    TunedTemperature,
    ValueTarget,
)
from markovia.algos.streams import stream_seed

Stats = dict[str, Tensor]
Loss = tuple[Tensor, Stats]


def log_density(dist: Gaussian, action: Tensor, temperature: FixedTemperature | TunedTemperature) -> Tensor:
    """log_q pi(a|s) as the temperature slot counts it, (b,); `action` in policy coordinates."""
    if isinstance(temperature, TunedTemperature):
        return dist.log_prob(action)
    if temperature.per_dimension:
        return log_q(dist.log_probs(action), q=temperature.q).sum(-1)
    return log_q(dist.log_prob(action), q=temperature.q)


def quantile_levels(noise: Tensor) -> Tensor:
    """Levels in (0, 1), (k, b), of normal variates (k, b, d); the first entry of each serves."""
    return torch.special.ndtr(noise[..., 0])


class ActorCritic(nn.Module):
    """The agent's policy, critics, value network, the targets that follow them, and frozen policies of earlier steps.

    critic  Q_1 .. Q_N          target      follows `critic`, or `value` where targets bootstrap from it
    value   V, or absent        references  "target": policy of smoothed targets; "old": pi_k of mirror descent
    evaluation  the policy that acts after training, where that is not the one of the targets
    cost    critics of each cost, all in one ensemble, and `cost_target`; absent without a constraint
    Quantile critics belong to the agent, which acts by them. Imitation alone has neither critic nor target.
    Critics start from the stream (seed, "init-critic").
    """

    def __init__(self, method: OffPolicy, agent: ControlAgent, seed: int) -> None:
        super().__init__()
        # Where a second actor is the one that acts later, that one is the caller's agent, and the one that enters targets a copy of it.
        self.method, self.deployed = method, agent
        second = isinstance(method.evaluation, SecondActor)
        self.agent = copy.deepcopy(agent) if second else agent
        self.policy: nn.Module = self.agent.net["policy"]
        self.evaluation = agent.net["policy"] if second else None
        c, v, space = method.critic, method.value, agent.observation_space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "init-critic"))
            self.critic: nn.Module | None = None
            if isinstance(c, QuantileCritics):  # the agent acts by them
                self.critic = agent.net["q"]
            elif c is not None:
                self.critic = QEnsemble(space, agent.action_size, c.num, c.hidden, c.activation, c.layer_norm)
            b = method.behaviour
            self.behaviour = None if b is None else ConditionalVAE(space, agent.action_size, b.hidden, b.activation)
            self.value = None if v is None else ValueNet(Trunk(space, v.hidden, v.activation))
            limited = method.constraint
            if limited is not None:
                k = limited.critic
                size = limited.num_costs * k.num
                self.cost: nn.Module | None = QEnsemble(space, agent.action_size, size, k.hidden, k.activation, k.layer_norm)
            else:
                self.cost = None
        self.cost_target = None if self.cost is None else copy.deepcopy(self.cost).requires_grad_(False)
        self.followed = "value" if isinstance(method.target, ValueTarget) else "critic"
        self.target = None if c is None else copy.deepcopy(getattr(self, self.followed)).requires_grad_(False)
        wanted = {"target": isinstance(method.target, SmoothedTarget), "old": method.mirrors}
        self.references: dict[str, ControlAgent] = {name: _frozen(agent) for name, needed in wanted.items() if needed}
        self.reference_policies = nn.ModuleDict({name: ref.net["policy"] for name, ref in self.references.items()})
        temperature = method.temperature
        tuned = isinstance(temperature, TunedTemperature)
        self.log_lam = nn.Parameter(torch.tensor(temperature.lam).log()) if tuned else None
        bounded = isinstance(method.regulariser, Conservative) and method.regulariser.target_gap is not None
        self.log_multiplier = nn.Parameter(torch.zeros(())) if bounded else None
        given = temperature.target_entropy_nats if isinstance(temperature, TunedTemperature) else None
        self.target_entropy_nats = -float(agent.action_size) if given is None else given
        like = next(agent.net.parameters())
        self.to(like.device, like.dtype)

    # -- forward passes ---------------------------------------------------------------------------------------------------------------

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.agent.device.type, torch.bfloat16, enabled=self.method.precision == "bfloat16")

    def q(self, critic: nn.Module | None, obs: Obs, action: Tensor, members: int | None = None) -> Tensor:
        """Values of an ensemble, (N, b), or of its first `members` alone."""
        assert critic is not None
        with self._cast():
            values: Tensor = critic(obs, action, members)
        return values.to(action.dtype)

    def q_of_each(self, critic: nn.Module | None, obs: Obs, actions: Tensor) -> Tensor:
        """Values of several actions per state, (N, k, b), actions (k, b, d)."""
        k, b = actions.shape[:2]
        again = map_obs(obs, lambda x: x.expand(k, *x.shape).flatten(0, 1))
        return self.q(critic, again, actions.flatten(0, 1)).unflatten(1, (k, b))

    def one_q(self, critic: nn.Module | None, obs: Obs, action: Tensor, how: Aggregate) -> Tensor:
        """One value per state and action, (b,)."""
        return aggregate(self.q(critic, obs, action, 1 if how == "first" else None), how)

    def v(self, net: nn.Module | None, obs: Obs, dtype: torch.dtype) -> Tensor:
        """Values of a value network, (b,)."""
        assert net is not None
        with self._cast():
            values: Tensor = net(obs)
        return values[..., 0].to(dtype)

    def any_dist(self, agent: ControlAgent, obs: Obs, dtype: torch.dtype) -> Distribution:
        """An agent's action distribution, its parameters computed in the method's precision."""
        with self._cast():
            params = agent.net["policy"](obs)[0]
        return agent.distribution(params.to(dtype))

    def dist(self, agent: ControlAgent, obs: Obs, dtype: torch.dtype) -> Gaussian:
        """The same where it is a Gaussian, squashed or not."""
        dist = self.any_dist(agent, obs, dtype)
        assert isinstance(dist, Gaussian)
        return dist

    def choose(self, dist: Gaussian, noise: Tensor) -> Tensor:
        """The policy's action in its own coordinates, reparameterised; its mode when it is deterministic."""
        return dist.mode() if isinstance(self.method.policy, Deterministic) else dist.at(noise)

    def lam(self) -> Tensor | float:
        """Weight of the entropy, no gradient."""
        if self.log_lam is not None:
            return self.log_lam.detach().exp()
        assert isinstance(self.method.temperature, FixedTemperature)
        return self.method.temperature.lam

    # -- losses -----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sampled_value(
        self, critic: nn.Module | None, obs: Obs, noise: Tensor, lam: Tensor | float, slot: SoftTarget | SoftValue, more: Tensor | None = None
    ) -> Tensor:
        """agg_j Q_j(s, a) - lam log_q pi(a|s), a drawn from the policy, (b,). The last rows of `more` (k, b, d) are for the target alone: further
        draws, of which the best counts, then one that draws a subset of the critics.
        """
        target = slot if isinstance(slot, SoftTarget) else SoftTarget()
        dist = self.dist(self.agent, obs, noise.dtype)
        many, drawn = target.num_actions > 1, target.subset is not None
        if many:
            assert more is not None
            end = len(more) - int(drawn)
            raw = dist.at(torch.cat([noise[None], more[end - target.num_actions + 1 : end]]))
            q = self.q_of_each(critic, obs, self.agent.unit_action(raw))
        else:
            raw = self.choose(dist, noise)
            q = self.q(critic, obs, self.agent.unit_action(raw), 1 if slot.aggregate == "first" and not drawn else None)
        if target.subset is not None:
            assert more is not None
            q = drawn_members(q, more[-1].flatten()[: len(q)], subset=target.subset)
        value = aggregate(q, slot.aggregate)
        if many:
            value, best = value.max(0)
            raw = raw.gather(0, best[None, :, None].expand(1, *raw.shape[1:]))[0]
        if not (target.entropy and self.method.entropic):
            return value
        return soft_value(value, log_density(dist, raw, self.method.temperature), lam=lam)

    @torch.no_grad()
    def smoothed_value(self, critic: nn.Module | None, t: SmoothedTarget, batch: Batch, noise: Tensor) -> Tensor:
        """agg_j Q_j(s', a') of the target policy's action with clipped noise, less the distance to the next logged action where that counts, (b,)."""
        mean = self.agent.unit_action(self.dist(self.references["target"], batch.next_obs, noise.dtype).mode())
        action = smoothed_action(mean, noise, std=t.noise, clip=t.clip)
        value = self.one_q(critic, batch.next_obs, action, t.aggregate)
        return penalised_value(value, action, batch.extra["next_action"], penalty=t.penalty) if t.penalty else value

    @torch.no_grad()
    def logged_value(self, batch: Batch, levels: Tensor | None) -> Tensor:
        """Qbar_j(s', a') of the next logged action, (N, b); of quantile critics their quantiles, (N, k, b), at levels drawn by normal noise."""
        action = batch.extra["next_action"]
        if not isinstance(self.method.critic, QuantileCritics):
            return self.q(self.target, batch.next_obs, action)
        assert levels is not None
        return self.quantiles(self.target, batch.next_obs, action, quantile_levels(levels[: self.method.critic.quantiles]))

    def quantiles(self, critic: nn.Module | None, obs: Obs, action: Tensor, tau: Tensor) -> Tensor:
        """Quantiles of an ensemble, (N, k, b), at levels tau (k, b)."""
        assert critic is not None
        with self._cast():
            values: Tensor = critic(obs, action, tau=tau)
        return values.to(action.dtype)

    @torch.no_grad()
    def goal(self, batch: Batch, noise: Tensor, lam: Tensor | float, levels: Tensor | None = None) -> Tensor:
        """y of the slot `target`, (b,); each critic's own of a `LoggedTarget`, (N, b), or (N, k, b) where critics give quantiles.

        `levels` (k, b, d) draws the levels of quantiles, or a subset of the critics.
        """
        t, obs = self.method.target, batch.next_obs
        assert t is not None
        if isinstance(t, ValueTarget | InSampleTarget):
            value = self.v(self.target if isinstance(t, ValueTarget) else self.value, obs, noise.dtype)
        elif isinstance(t, SmoothedTarget):
            value = self.smoothed_value(self.target, t, batch, noise)
        elif isinstance(t, LoggedTarget):
            value = self.logged_value(batch, levels)
        else:
            value = self.sampled_value(self.target, obs, noise, lam, t, levels)
        return bootstrap(batch.reward, batch.continuation, value, gamma=self.method.gamma)

    def critic_loss(self, batch: Batch, y: Tensor, noise: Tensor | None = None) -> Loss:
        """coef mean sum_j (Q_j(s, a) - y)^2 and what the slot `regulariser` adds, or the mean `quantile_error`; `noise` (k, b, d) is for these."""
        c = self.method.critic
        assert c is not None
        if isinstance(c, QuantileCritics):
            assert noise is not None
            tau = quantile_levels(noise[c.quantiles : 2 * c.quantiles])
            z = self.quantiles(self.critic, batch.obs, batch.action, tau)
            loss = quantile_error(z, y, tau).mean()
            return loss, {"critic_loss": loss.detach(), "q": z.detach().mean()}
        q = self.q(self.critic, batch.obs, batch.action)
        loss = c.coef * td_error(q, y).mean()
        stats = {"critic_loss": loss.detach(), "q": q.detach().mean()}
        slot = self.method.regulariser
        if slot is None:
            return loss, stats
        if isinstance(slot, Conservative):
            assert noise is not None
            extra, found = conservative(self, slot, batch, q, noise)
        else:
            extra, found = diverse(self, slot, batch, q)
        return loss + extra, stats | found

    def value_loss(self, batch: Batch, noise: Tensor, lam: Tensor | float) -> tuple[Tensor, Stats, Tensor | None]:
        """0.5 mean (V(s) - (agg_j Q_j(s, a) - lam log_q pi(a|s)))^2, a drawn from the policy; or the mean expectile loss of logged actions; or
        mean (V(s) - y)^2, y the lower of two targets.

        The third entry is what the logged actions are worth beyond V, (b,), no gradient, where V is an expectile.
        """
        slot = self.method.value
        assert slot is not None
        v = self.v(self.value, batch.obs, noise.dtype)
        if isinstance(slot, Expectile):
            with torch.no_grad():
                value = self.one_q(self.target, batch.obs, batch.action, "min")
            loss = expectile(value - v, tau=slot.tau).mean()
            return loss, {"value_loss": loss.detach(), "v": v.detach().mean()}, value - v.detach()
        if isinstance(slot, LowerValue):
            assert isinstance(self.method.target, SmoothedTarget)
            gamma, t = self.method.gamma, self.method.target
            both = (self.smoothed_value(critic, t, batch, noise) for critic in (self.target, self.critic))
            y = lower_target(*(bootstrap(batch.reward, batch.continuation, value, gamma=gamma) for value in both))
            loss = (v - y).square().mean()
            return loss, {"value_loss": loss.detach(), "v": v.detach().mean()}, None
        goal = self.sampled_value(self.critic, batch.obs, noise, lam, slot)
        loss = 0.5 * (v - goal).square().mean()
        return loss, {"value_loss": loss.detach()}, None

    def actor_loss(self, batch: Batch, noise: Tensor, lam: Tensor | float, adv: Tensor | None = None, latent: Tensor | None = None) -> Loss:
        """Mean objective of the slot `actor`; the statistics of an `Ascent` hold -mean log pi as `entropy_nats` where the policy has a density.

        `adv` (b,) is what `value_loss` gave; `latent` (2, b, d) is noise for the behaviour model, where there is one.
        """
        m, slot = self.method, self.method.actor
        if isinstance(slot, Supported):
            assert latent is not None
            return supported_loss(self, slot, batch, latent)
        if isinstance(slot, Guided):
            assert latent is not None
            return guided_loss(self, slot, batch, latent)
        if not isinstance(slot, Ascent):
            return logged_loss(self, slot, batch, noise, adv)
        dist = self.dist(self.agent, batch.obs, noise.dtype)
        raw = self.choose(dist, noise)
        action = self.agent.unit_action(raw)
        value = self.one_q(self.critic, batch.obs, action, slot.aggregate)
        if self.cost is not None:
            value = value - priced(self, batch, action)
        objective = -value
        stats: Stats = {}
        if m.entropic or slot.inverse_step is not None:
            density_old: Tensor | float = 0.0
            if slot.inverse_step is not None:
                # pi_k is evaluated at the action that pi has just taken, and the gradient flows through that action.
                density_old = log_density(self.dist(self.references["old"], batch.obs, noise.dtype), raw, m.temperature)
            step = lam if slot.inverse_step is None else slot.inverse_step
            order = m.temperature.q if isinstance(m.temperature, FixedTemperature) else 1.0
            density = log_density(dist, raw, m.temperature)
            objective = mirror_objective(value, density, density_old, lam=lam, inverse_step=step, q=order)
            stats["entropy_nats"] = -dist.log_prob(raw).detach().mean()
        if m.constraint is not None and m.constraint.mix == "sum":
            objective = objective / (1.0 + batch.extra["cost_weight"].sum(-1))
        loss = objective.mean()
        stats["actor_loss"] = loss.detach()
        if slot.penalty:
            loss = loss + slot.penalty * parameter_penalty(dist.mean, dist.log_std).mean()
        return loss, stats

    def decode(self, obs: Obs, action: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The behaviour model's action (b, d) in [-1, 1] for the encoding of `action`, and mean and log std of that, (b, 2 d)."""
        assert self.behaviour is not None
        with self._cast():
            decoded, mean, log_std = self.behaviour(obs, action, torch.cat([*latent], -1))
        return decoded.to(action.dtype), mean.to(action.dtype), log_std.to(action.dtype)

    def support(self, obs: Obs, action: Tensor, latent: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """Bound on -log mu(a|s) of actions (b, d) in [-1, 1] under the behaviour model, (b,), in its own scale."""
        assert self.method.behaviour is not None
        decoded, mean, log_std = self.decode(obs, action, latent)
        return support_bound(decoded, action, mean, log_std, beta=self.method.behaviour.beta, weight=weight)

    def behaviour_loss(self, batch: Batch, latent: Tensor) -> Loss:
        """Mean of `support` at logged actions, at those alone whose Q exceeds V where the model is fitted jointly."""
        weight: Tensor | float = 1.0
        if isinstance(self.method.behaviour, JointBehaviour):
            with torch.no_grad():
                better = self.one_q(self.critic, batch.obs, batch.action, "first") > self.v(self.value, batch.obs, batch.action.dtype)
            weight = self.method.behaviour.weight * better.to(batch.action.dtype)
        loss = self.support(batch.obs, batch.action, latent, weight).mean()
        return loss, {"behaviour_loss": loss.detach()}

    def evaluation_loss(self, batch: Batch, noise: Tensor) -> Loss:
        """Mean objective of the slot `evaluation`, on the same critics; `noise` (b, d) draws its action."""
        assert isinstance(self.method.evaluation, SecondActor)
        loss, found = second_loss(self, self.method.evaluation, batch, noise, self.deployed)
        return loss, {f"evaluation_{name}": value for name, value in found.items()}

    def temperature_loss(self, entropy_nats: Tensor) -> Tensor:
        """Mean of `losses.temperature_loss`, which is linear in log pi, at the entropy of the actor's step."""
        assert self.log_lam is not None
        return temperature_loss(self.log_lam, -entropy_nats, target_entropy_nats=self.target_entropy_nats)

    def multiplier_loss(self, gap: Tensor) -> Tensor:
        """`regularised.multiplier_loss` of the gap that `critic_loss` gave, which is the sum over the critics."""
        slot, c = self.method.regulariser, self.method.critic
        assert self.log_multiplier is not None and isinstance(slot, Conservative) and slot.target_gap is not None and c is not None
        return multiplier_loss(self.log_multiplier, gap / c.num, target=slot.target_gap)

    # -- checkpoints ------------------------------------------------------------------------------------------------------------------

    def _own(self, name: str) -> bool:
        """Is this no tensor of the policy that belongs to the caller's agent?"""
        theirs = "policy." if self.evaluation is None else "evaluation."
        return not name.startswith((theirs, "critic.") if "q" in self.agent.net else theirs)

    def state(self) -> dict[str, Tensor]:
        """Every tensor but those of the policy that belongs to the agent."""
        return {k: v for k, v in self.state_dict().items() if self._own(k)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state()` back, in place."""
        others = {k: v for k, v in self.state_dict().items() if not self._own(k)}
        self.load_state_dict({**others, **state})


def _frozen(agent: ControlAgent) -> ControlAgent:
    reference = agent.reference()
    assert isinstance(reference, ControlAgent)
    return reference
