"""What can stand in the slots of the off-policy actor-critic update: frozen settings with documented fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from markovia.algos.off_policy.losses import Aggregate


@dataclass(frozen=True)
class Squashed:
    """tanh of a Gaussian whose mean and standard deviation the network gives; it explores by being sampled."""

    hidden: tuple[int, ...] = (256, 256)  # widths of the policy network
    activation: str = "relu"

    def agent_options(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "activation": self.activation, "squash": True, "std": "state"}


@dataclass(frozen=True)
class Deterministic:
    """tanh of the network's output; it explores by Gaussian noise, clipped to the Box."""

    noise: float = 0.1  # standard deviation of the exploration, the Box reaching from -1 to 1
    hidden: tuple[int, ...] = (256, 256)  # widths of the policy network
    activation: str = "relu"

    def __post_init__(self) -> None:
        if not self.noise > 0.0:
            raise ValueError(f"policy.noise must be > 0, got {self.noise}; without noise a deterministic policy explores nothing")

    def agent_options(self) -> dict[str, Any]:
        log_std = math.log(self.noise)
        return {"hidden": self.hidden, "activation": self.activation, "tanh_mean": True, "std": "fixed", "log_std_init": log_std}


@dataclass(frozen=True)
class Bounded:
    """A Gaussian around the tanh of the network's output, one standard deviation per entry for all states; samples are clipped to the Box."""

    log_std_init: float = 0.0
    hidden: tuple[int, ...] = (256, 256)  # widths of the policy network
    activation: str = "relu"

    def agent_options(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "activation": self.activation, "tanh_mean": True, "std": "shared", "log_std_init": self.log_std_init}


@dataclass(frozen=True)
class Mixture:
    """tanh of a mixture of `num` Gaussians: a model of logged actions; what acts is found from it and the critics (slot `evaluation`)."""

    num: int = 4
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the policy network
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"policy.num must be >= 1, got {self.num}; 1 is a single Gaussian")

    def agent_options(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "activation": self.activation}


Policy = Squashed | Deterministic | Bounded | Mixture


@dataclass(frozen=True)
class SoftTarget:
    """V(s') = agg_j Qbar_j(s', a') - lam log_q pi(a'|s'), a' drawn from the policy as it is now, or the best by agg_j Qbar_j of several draws."""

    aggregate: Aggregate = "min"
    entropy: bool = True  # False leaves the entropy out of the target (it stays in the actor's objective)
    subset: int | None = None  # the aggregate is over so many critics, drawn anew for each minibatch (REDQ); None: over all
    num_actions: int = 1  # draws per state, of which the best counts (CQL and Cal-QL on AntMaze: 10)

    def __post_init__(self) -> None:
        if self.num_actions < 1:
            raise ValueError(f"target.num_actions must be >= 1, got {self.num_actions}; 1 is the policy's own value")
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"target.subset must be >= 1, got {self.subset}; None takes all critics")


@dataclass(frozen=True)
class SmoothedTarget:
    """V(s') = agg_j Qbar_j(s', a'), a' the target policy's action with clipped noise."""

    noise: float = 0.2  # standard deviation, the Box reaching from -1 to 1
    clip: float = 0.5  # largest noise
    aggregate: Aggregate = "min"
    penalty: float = 0.0  # weight of |a' - next logged action|^2, summed over entries; only data with next actions have it


@dataclass(frozen=True)
class ValueTarget:
    """V(s') of the target value network; needs the slot `value`."""


@dataclass(frozen=True)
class InSampleTarget:
    """V(s') of the value network as it is now, which never sees an action that was not logged; needs the slot `value` to be an `Expectile`."""


@dataclass(frozen=True)
class LoggedTarget:
    """V_j(s') = Qbar_j(s', a') of the next logged action, each critic by its own target: the value of the policy that wrote the data (SARSA)."""


Target = SoftTarget | SmoothedTarget | ValueTarget | InSampleTarget | LoggedTarget


@dataclass(frozen=True)
class SoftValue:
    """A value network fitted to agg_j Q_j(s, a) - lam log_q pi(a|s), a drawn from the policy."""

    aggregate: Aggregate = "min"
    lr: float = 3e-4
    hidden: tuple[int, ...] = (256, 256)
    activation: str = "relu"


@dataclass(frozen=True)
class Expectile:
    """A value network fitted to the tau-expectile of min_j Qbar_j(s, a) over logged actions: towards their maximum as tau -> 1."""

    tau: float = 0.7
    lr: float = 3e-4
    hidden: tuple[int, ...] = (256, 256)
    activation: str = "relu"

    def __post_init__(self) -> None:
        if not 0.0 < self.tau < 1.0:
            raise ValueError(f"value.tau must lie in (0, 1), got {self.tau}; 0.5 is the mean over logged actions, 0.9 close to the best of them")


@dataclass(frozen=True)
class LowerValue:
    """A value network fitted to the lower of two targets r + gamma V(s'): that of the target critics and that of the critics as they are now."""

    lr: float = 3e-4
    hidden: tuple[int, ...] = (256, 256)
    activation: str = "relu"


Value = SoftValue | Expectile | LowerValue


@dataclass(frozen=True)
class Critics:
    """An ensemble Q_1 .. Q_N and its loss, coef sum_j (Q_j - y)^2."""

    num: int = 2
    hidden: tuple[int, ...] = (256, 256)  # widths of each critic
    activation: str = "relu"
    layer_norm: bool = False  # normalise each hidden layer before its activation
    lr: float = 3e-4
    coef: float = 0.5

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"critic.num must be >= 1, got {self.num}")


@dataclass(frozen=True)
class QuantileCritics:
    """An ensemble of implicit quantile networks and its loss, the quantile Huber loss summed over the members."""

    num: int = 2
    quantiles: int = 8  # levels drawn per transition, and for the target
    embedding: int = 64  # cosines of a level
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of each critic; a level enters before the last
    activation: str = "relu"
    lr: float = 3e-4


@dataclass(frozen=True)
class Conservative:
    """Pushes values down where a softmax of Q puts its weight and up at logged actions (CQL); the softmax is estimated from 3 `num` actions."""

    alpha: float = 5.0  # weight of the gap
    num: int = 10  # actions of each kind: uniform, from the policy at s, from the policy at s'
    temperature: float = 1.0  # T of T log sum exp(Q / T), reward units
    importance: bool = True  # divide each action's weight by its density; without it the logged action joins the sum
    calibrated: bool = False  # policy actions count at least the Monte Carlo return (Cal-QL); needs data.returns_to_go
    target_gap: float | None = None  # alpha is multiplied by a dual variable that holds a critic's mean gap at this many reward units; None: by 1
    multiplier_lr: float = 3e-4  # of the dual variable's logarithm, which begins at 0
    min_gap: float | None = None  # gaps below count as this, and push no further

    def __post_init__(self) -> None:
        if self.num < 1 or not self.temperature > 0.0 or self.alpha < 0.0:
            raise ValueError(
                f"a conservative regulariser needs alpha >= 0, num >= 1 and temperature > 0, got {self.alpha}, {self.num} and {self.temperature}"
            )
        if not self.multiplier_lr > 0.0:
            raise ValueError(f"regulariser.multiplier_lr must be > 0, got {self.multiplier_lr}; target_gap=None leaves the multiplier out")
        if self.target_gap is not None and self.min_gap is not None and self.min_gap >= self.target_gap:
            raise ValueError(
                f"no gap would count as less than regulariser.min_gap={self.min_gap}, so the multiplier of target_gap={self.target_gap} could only "
                "grow; lower min_gap"
            )

    @property
    def num_noises(self) -> int:
        return 3 * self.num


@dataclass(frozen=True)
class Diverse:
    """Turns the ensemble's gradients in the action away from each other at logged actions (EDAC)."""

    eta: float = 1.0  # weight of the mean cosine

    def __post_init__(self) -> None:
        if self.eta < 0.0:
            raise ValueError(f"regulariser.eta must be >= 0, got {self.eta}; None leaves the regulariser out")

    @property
    def num_noises(self) -> int:
        return 0


Regulariser = Conservative | Diverse


@dataclass(frozen=True)
class Ascent:
    """The actor climbs Q through its action, held by the entropy and, with `inverse_step`, by the policy pi_k of up to `refresh_steps` ago."""

    aggregate: Aggregate = "min"  # which Q
    inverse_step: float | None = None  # 1/t, weight of the divergence from pi_k; None: 1/t = lam, which drops pi_k
    refresh_steps: int = 1000  # environment steps between pi_k <- pi
    penalty: float = 0.0  # weight of mean mu^2 + mean log^2 std
    lr: float = 3e-4

    def __post_init__(self) -> None:
        if self.refresh_steps < 1:
            raise ValueError(f"actor.refresh_steps must be >= 1, got {self.refresh_steps}")
        if self.inverse_step is not None and self.inverse_step <= 0.0:
            raise ValueError(f"actor.inverse_step (1/t) must be > 0, got {self.inverse_step}; None leaves the old policy out")


@dataclass(frozen=True)
class Clone:
    """The actor imitates logged actions: the squared error of a deterministic policy, -log pi(a|s) of a stochastic one. Needs no critic."""

    lr: float = 3e-4


class _ClimbsQ:
    """A deterministic actor that climbs Q, divided by its mean size, and is held by something."""

    alpha: float  # weight of Q / mean |Q|
    weight: float  # of what holds it

    def __post_init__(self) -> None:
        if self.alpha < 0.0 or self.weight < 0.0:
            raise ValueError(f"actor.alpha and actor.weight must be >= 0, got {self.alpha} and {self.weight}")


@dataclass(frozen=True)
class Held(_ClimbsQ):
    """A deterministic actor climbs Q, divided by its mean size, and is held by the squared distance to logged actions."""

    alpha: float = 2.5  # weight of Q / mean |Q|
    weight: float = 1.0  # weight of the squared distance
    reduce: Literal["mean", "sum"] = "mean"  # over the action's entries
    aggregate: Aggregate = "first"  # which Q
    lr: float = 3e-4


@dataclass(frozen=True)
class Supported(_ClimbsQ):
    """A deterministic actor climbs Q, divided by its mean size, and is held where the slot `behaviour` bounds the density of logged actions."""

    alpha: float = 1.0  # weight of Q / mean |Q|
    weight: float = 0.1  # weight of the bound on -log mu(a|s), in its own scale
    aggregate: Aggregate = "first"  # which Q
    lr: float = 3e-4


@dataclass(frozen=True)
class Behaviour:
    """A conditional variational autoencoder of logged actions, fitted by the first `steps` updates and fixed from then on."""

    steps: int = 100_000  # of the budget
    beta: float = 0.5  # weight of the KL; the decoder's standard deviation is sqrt(beta / 4), the Box reaching from -1 to 1
    lr: float = 1e-3
    hidden: tuple[int, ...] = (750, 750)
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.beta > 0.0:
            raise ValueError(f"behaviour.steps must be >= 1 and behaviour.beta > 0, got {self.steps} and {self.beta}")


@dataclass(frozen=True)
class JointBehaviour:
    """A conditional variational autoencoder of the logged actions that are worth more than V(s), fitted along with everything else."""

    weight: float = 1.0  # of the reconstruction
    beta: float = 0.5  # weight of the KL
    lr: float = 1e-3
    hidden: tuple[int, ...] = (750, 750)
    activation: str = "relu"

    def __post_init__(self) -> None:
        if not self.weight > 0.0 or not self.beta > 0.0:
            raise ValueError(f"behaviour.weight and behaviour.beta must be > 0, got {self.weight} and {self.beta}")


@dataclass(frozen=True)
class Guided(_ClimbsQ):
    """A deterministic actor climbs Q, divided by its mean size; the better of logged and modelled action holds it where one is worth more than V."""

    alpha: float = 2.5  # weight of Q / mean |Q|
    weight: float = 0.5  # weight of the squared distance, averaged over the action's entries
    detach_target: bool = False  # True: no gradient through the behaviour model, whose action follows from the actor's own
    aggregate: Aggregate = "first"  # which Q
    lr: float = 3e-4


@dataclass(frozen=True)
class Weighted:
    """Regression on logged actions, each weighted by exp(beta A), at most `max_weight`."""

    beta: float = 3.0  # per reward unit of the advantage
    max_weight: float = 100.0
    normalize: bool = False  # weights are their softmax over the minibatch, 1 on average; max_weight means nothing then
    lr: float = 3e-4
    cosine: bool = False  # the learning rate falls to 0 along half a cosine

    def __post_init__(self) -> None:
        if self.beta < 0.0 or not self.max_weight > 0.0:
            raise ValueError(f"actor.beta must be >= 0 and actor.max_weight > 0, got {self.beta} and {self.max_weight}")


@dataclass(frozen=True)
class Anchored:
    """A stochastic actor climbs Q through its action and is held by the likelihood of logged actions: -Q(s, a~) - weight log pi(a|s)."""

    weight: float = 0.6  # of -log pi(a|s), reward units per nat
    aggregate: Aggregate = "mean"  # which Q
    lr: float = 3e-5

    def __post_init__(self) -> None:
        if self.weight < 0.0:
            raise ValueError(f"evaluation.weight must be >= 0, got {self.weight}")


@dataclass(frozen=True)
class ClosedForm:
    """Acts by the best of the closed-form improvements of a mixture's modes; nothing is learnt for it."""

    log_tau: float = 0.5  # nats by which an action's bounded log density may fall below the best mode's
    pessimism: float = 1.0  # standard deviations of the ensemble below its mean
    min_weight: float = 0.05  # of modes that count

    def __post_init__(self) -> None:
        if self.log_tau < 0.0 or self.pessimism < 0.0 or not 0.0 <= self.min_weight <= 1.0:
            given = f"{self.log_tau}, {self.pessimism} and {self.min_weight}"
            raise ValueError(f"evaluation needs log_tau >= 0, pessimism >= 0 and min_weight in [0, 1], got {given}")


Actor = Ascent | Clone | Held | Supported | Guided | Weighted
SecondActor = Held | Anchored  # learns beside the actor, from the same critics


@dataclass(frozen=True)
class FixedTemperature:
    """The weight of the entropy stays; 0 leaves the entropy out."""

    lam: float = 0.2  # reward units per nat
    q: float = 1.0  # index of Tsallis' entropy, 1 is Shannon's
    per_dimension: bool = False  # sum log_q over the action's entries, as published code does, in place of log_q of the joint density

    def __post_init__(self) -> None:
        if self.lam < 0.0:
            raise ValueError(f"temperature.lam must be >= 0, got {self.lam}")
        if not 1.0 <= self.q <= 2.0:
            raise ValueError(f"Tsallis index temperature.q must lie in [1, 2], got {self.q}")


@dataclass(frozen=True)
class TunedTemperature:
    """The weight of the entropy follows a dual variable that holds the entropy at a target."""

    lam: float = 1.0  # at the start
    target_entropy_nats: float | None = None  # of actions in [-1, 1]; None: -dim(A)
    lr: float = 3e-4

    def __post_init__(self) -> None:
        if self.lam <= 0.0:
            raise ValueError(f"temperature.lam must start > 0, got {self.lam}; FixedTemperature(0.0) leaves the entropy out")


Temperature = FixedTemperature | TunedTemperature
