"""The slots of the off-policy actor-critic update, as one nested frozen value; a method is a setting of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from markovia.algos.off_policy.slots import (
    Actor,
    Anchored,
    Ascent,
    Behaviour,
    Clone,
    ClosedForm,
    Conservative,
    Critics,
    Deterministic,
    Diverse,
    Expectile,
    FixedTemperature,
    Guided,
    Held,
    InSampleTarget,
    JointBehaviour,
    LoggedTarget,
    LowerValue,
    Mixture,
    Policy,
    QuantileCritics,
    Regulariser,
    SecondActor,
    SmoothedTarget,
    SoftTarget,
    SoftValue,
    Squashed,
    Supported,
    Target,
    Temperature,
    TunedTemperature,
    Value,
    ValueTarget,
    Weighted,
)
from markovia.algos.safe.replayed import ReplayConstraint


@dataclass(frozen=True)
class OffPolicy:
    """Settings of the off-policy actor-critic; see docs/interface.md for the order in which data flows through the slots."""

    num_env_steps: int = 1_000_000  # environment steps in total
    num_envs: int = 1  # stepped side by side
    num_steps: int = 1000  # steps per environment between two reports
    learning_starts: int = 10_000  # environment steps before the first update
    start: Literal["uniform", "policy"] = "uniform"  # actions of these steps: uniform ones, or the policy's own
    replay_size: int = 1_000_000  # transitions kept
    batch_size: int = 256
    gamma: float = 0.99  # discount per step
    utd: float = 1.0  # updates per environment step, fractions allowed
    policy_delay: int = 1  # critic steps per step of actor, temperature and targets
    follow: Literal["actor", "critic"] = "actor"  # targets follow in updates that move the actor, or in every one
    polyak: float = 0.005  # targets <- (1 - polyak) targets + polyak networks
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks' products; losses and weights stay float32
    policy: Policy = field(default_factory=Squashed)
    target: Target | None = field(default_factory=SoftTarget)
    value: Value | None = None
    critic: Critics | QuantileCritics | None = field(default_factory=Critics)
    regulariser: Regulariser | None = None  # of the critics
    actor: Actor = field(default_factory=Ascent)
    behaviour: Behaviour | JointBehaviour | None = None  # model of the policy that wrote the data, for actor=Supported() and actor=Guided()
    evaluation: SecondActor | ClosedForm | None = None  # what acts after training, of no effect on targets: an actor of its own, or a formula
    temperature: Temperature = field(default_factory=TunedTemperature)
    constraint: ReplayConstraint | None = None  # limits on what an episode may cost

    def __post_init__(self) -> None:
        for name in ("num_env_steps", "num_envs", "num_steps", "replay_size", "batch_size", "policy_delay"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.learning_starts < 0:
            raise ValueError(f"learning_starts must be >= 0, got {self.learning_starts}")
        if not self.utd > 0.0:
            raise ValueError(f"utd (updates per environment step) must be > 0, got {self.utd}")
        if not 0.0 < self.polyak <= 1.0:
            raise ValueError(f"polyak must lie in (0, 1], got {self.polyak}; it is the share of the new weights (tau), often 0.005")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}")
        if isinstance(self.target, ValueTarget) != isinstance(self.value, SoftValue):
            raise ValueError("a value network serves ValueTarget alone, and ValueTarget needs one: set target=ValueTarget() and value=SoftValue()")
        if isinstance(self.target, InSampleTarget) != isinstance(self.value, Expectile):
            raise ValueError("an expectile value serves InSampleTarget alone, which needs one: set target=InSampleTarget() and value=Expectile()")
        if len({self.critic is None, self.target is None, isinstance(self.actor, Clone) and not isinstance(self.evaluation, ClosedForm)}) > 1:
            raise ValueError("imitation alone (actor=Clone()) has no critic: set critic=None and target=None; every other actor needs both")
        if isinstance(self.target, SoftTarget) and self.critic is not None and (self.target.subset or 0) > self.critic.num:
            raise ValueError(f"target.subset={self.target.subset} is more than the {self.critic.num} critics; lower it or raise critic.num")
        if isinstance(self.target, SoftTarget) and self.target.subset and self.critic is not None and self.batch_size < self.critic.num:
            raise ValueError(f"target.subset needs a minibatch of at least critic.num={self.critic.num} rows, got batch_size={self.batch_size}")
        if isinstance(self.target, SoftTarget) and self.target.num_actions > 1 and isinstance(self.policy, Deterministic):
            raise ValueError(f"target.num_actions={self.target.num_actions} draws of a deterministic policy are one and the same; set it to 1")
        if self.regulariser is not None and self.critic is None:
            raise ValueError("a regulariser of critics needs critics; set regulariser=None")
        if isinstance(self.regulariser, Diverse) and self.critic is not None and self.critic.num < 2:
            raise ValueError("regulariser=Diverse() compares critics with each other, so critic.num must be >= 2, got 1")
        if isinstance(self.regulariser, Conservative) and isinstance(self.policy, Deterministic):
            raise ValueError("regulariser=Conservative() weighs sampled actions by their density, which a deterministic policy does not have")
        if isinstance(self.policy, Mixture) != isinstance(self.evaluation, ClosedForm):
            raise ValueError("policy=Mixture() acts by evaluation=ClosedForm(), which improves nothing else: set both or neither")
        if isinstance(self.evaluation, ClosedForm) and not isinstance(self.actor, Clone):
            raise ValueError(f"policy=Mixture() models logged actions: it needs actor=Clone(), got {type(self.actor).__name__}")
        if isinstance(self.critic, QuantileCritics) != isinstance(self.evaluation, ClosedForm):
            raise ValueError("critic=QuantileCritics() and evaluation=ClosedForm() need each other: set both or neither")
        if isinstance(self.critic, QuantileCritics) and not isinstance(self.target, LoggedTarget):
            raise ValueError(f"critic=QuantileCritics() follows logged actions: set target=LoggedTarget(), got {type(self.target).__name__}")
        if isinstance(self.critic, QuantileCritics) and self.regulariser is not None:
            raise ValueError("quantile critics take no regulariser; set regulariser=None")
        if isinstance(self.evaluation, Held) and not isinstance(self.actor, Held):
            raise ValueError(f"evaluation=Held() belongs to actor=Held(), got {type(self.actor).__name__}; set evaluation=None")
        if isinstance(self.evaluation, Anchored) and not isinstance(self.actor, Weighted):
            raise ValueError(f"evaluation=Anchored() belongs to actor=Weighted(), got {type(self.actor).__name__}; set evaluation=None")
        if isinstance(self.actor, Held | Supported | Guided) and not isinstance(self.policy, Deterministic):
            raise ValueError(f"actor={type(self.actor).__name__}() judges the one action of a state, so it needs policy=Deterministic()")
        if isinstance(self.actor, Supported) != isinstance(self.behaviour, Behaviour):
            raise ValueError("a behaviour model serves actor=Supported() alone, which needs one: set behaviour=Behaviour()")
        if len({isinstance(self.actor, Guided), isinstance(self.behaviour, JointBehaviour), isinstance(self.value, LowerValue)}) > 1:
            raise ValueError("actor=Guided(), behaviour=JointBehaviour() and value=LowerValue() need each other and serve nothing else: set all 3")
        if isinstance(self.value, LowerValue) and not isinstance(self.target, SmoothedTarget):
            raise ValueError("value=LowerValue() is fitted to the targets of smoothed actions: set target=SmoothedTarget()")
        if self.constraint is not None and not isinstance(self.actor, Ascent):
            raise ValueError(f"a constraint prices the cost of the action that climbs Q: it needs actor=Ascent(), got {type(self.actor).__name__}")
        if isinstance(self.temperature, TunedTemperature) and not isinstance(self.actor, Ascent):
            raise ValueError(
                f"a tuned temperature follows the entropy of the action that climbs Q, which actor={type(self.actor).__name__}() has not: "
                "set temperature=FixedTemperature(0.0)"
            )
        if not self.fixed_data:
            self._check_replayed()
        if isinstance(self.policy, Deterministic) and (self.entropic or self.mirrors):
            raise ValueError(
                "a deterministic policy has no density, so no entropy and no divergence: use temperature=FixedTemperature(0.0) and "
                "actor.inverse_step=None, or policy=Squashed()"
            )

    def _check_replayed(self) -> None:
        """Raises ValueError for what reads columns that datasets have and a replay has not."""
        reads = {
            "target.penalty": isinstance(self.target, SmoothedTarget) and self.target.penalty != 0.0,
            "target=LoggedTarget()": isinstance(self.target, LoggedTarget),
            "regulariser.calibrated": isinstance(self.regulariser, Conservative) and self.regulariser.calibrated,
        }
        if found := [name for name, is_read in reads.items() if is_read]:
            raise ValueError(f"{found[0]} reads next logged actions or returns, which a dataset has and a replay has not; leave it out")

    @property
    def num_optimizer_steps(self) -> int:
        """Updates over the whole budget."""
        return int(self.utd * max(0, self.num_env_steps - self.learning_starts))

    @property
    def num_noises(self) -> int:
        """Normal variates per transition and action entry that an update takes: target, value, actor, regulariser or quantile levels
        (those of the target and of the prediction), the target's further actions and its subset of critics (1), the behaviour's latents.

        These are 2 of the actor's action and, where the model is fitted along with the rest, 2 of the logged one before them.
        """
        latents = {Behaviour: 2, JointBehaviour: 4}.get(type(self.behaviour), 0)
        levels = 2 * self.critic.quantiles if isinstance(self.critic, QuantileCritics) else 0
        chosen = self.target.num_actions - 1 + int(self.target.subset is not None) if isinstance(self.target, SoftTarget) else 0
        return 3 + (0 if self.regulariser is None else self.regulariser.num_noises) + levels + chosen + latents

    @property
    def mirrors(self) -> bool:
        """Is the actor held by its own policy of earlier steps?"""
        return isinstance(self.actor, Ascent) and self.actor.inverse_step is not None

    @property
    def fixed_data(self) -> bool:
        """Does a dataset take the place of the replay?"""
        return False

    @property
    def entropic(self) -> bool:
        """Does the policy's entropy enter?"""
        return not (isinstance(self.temperature, FixedTemperature) and self.temperature.lam == 0.0)
