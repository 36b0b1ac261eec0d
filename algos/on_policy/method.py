"""The slots of the on-policy proximal loop, as one nested frozen value; a method is a setting of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from markovia.algos.advantages import GAE, Advantage, FrozenQ
from markovia.algos.on_policy.auxiliary import Auxiliary
from markovia.algos.on_policy.divergence import KL, Divergence, FDivergence
from markovia.algos.on_policy.entropy import EntropyAnchor
from markovia.algos.on_policy.filters import AccuracyBand
from markovia.algos.on_policy.merging import Warp
from markovia.algos.on_policy.references import Fixed, Refresh
from markovia.algos.on_policy.rewards import RewardTransform
from markovia.algos.on_policy.schedules import AdaptiveKL
from markovia.algos.on_policy.surrogates import Clip, Regress, Surrogate
from markovia.algos.on_policy.tokens import Partner, TokenRule, TopCov, Unlikely
from markovia.algos.safe.constraint import Constraint
from markovia.algos.safe.dual import TrustRegionDual

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]  # verl's names


@dataclass(frozen=True)
class Constant:
    """The drift's coefficient stays."""

    coef: float = 1.0


@dataclass(frozen=True)
class Doubling:
    """PPO's adaptive penalty: coef x 2 when the measured KL exceeds 1.5 target, / 2 when below target / 1.5.        [arXiv 1707.06347, eq. 8]"""

    coef: float = 1.0
    kl_target_nats: float = 0.01


@dataclass(frozen=True)
class MirrorStep:
    """coef = 1 / t_k, t_k = 1 - k / K: mirror descent's step size falls linearly, so the penalty grows from 1.      [arXiv 2005.09814]"""

    coef: float = 1.0  # at the first iteration
    floor: float = 0.01  # smallest t_k, for the last iteration


@dataclass(frozen=True)
class DualAscent:
    """FixPO: Adam on coef for L = coef (limit - safety max KL), and a fix-up phase until every state obeys the limit.  [arXiv 2312.05405]"""

    coef: float = 1.0
    kl_limit_nats: float = 0.5  # bound on the largest KL(old || new) over the batch's states
    safety: float = 3.0  # C_beta > 1: aim below the limit, so that the fix-up is seldom needed
    lr: float = 0.01  # of the dual variable
    fixup: bool = True  # enforce the limit after every epoch
    chunk: int = 1024  # decisions per fix-up sweep step
    max_sweeps: int = 50  # after that the policy goes back to the old one (KL 0)


Controller = Constant | Doubling | MirrorStep | DualAscent


@dataclass(frozen=True)
class Descent:
    """First-order solver: epochs over shuffled minibatches."""

    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    lr: float = 3e-4
    value_lr: float | None = None  # learning rate of the critic, None: the same
    anneal: bool = True  # learning rate falls linearly to 0 over num_env_steps
    warmup: int = 0  # iterations over which the learning rate first rises linearly; Adam's first steps have the size of lr whatever the noise
    eps: float = 1e-5  # of Adam / RMSprop
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's averages
    weight_decay: float = 0.0
    epochs: int = 10  # passes over the batch
    minibatch: int | None = 64  # decisions or rows, None: the whole batch
    unit: Literal["decision", "row"] = "decision"  # what a minibatch counts; tokens need "row"
    micro: int | None = None  # units per forward pass; gradients are accumulated, the result equals the large batch
    max_grad_norm: float = 0.5  # global norm, policy and critic together
    kl_stop_nats: float | None = None  # stop the epochs when the mean k3 KL of a minibatch exceeds 1.5 times this
    recompute_advantage: bool = False  # values, advantages and targets anew before each epoch

    def __post_init__(self) -> None:
        if self.epochs < 1 or (self.minibatch is not None and self.minibatch < 1) or (self.micro is not None and self.micro < 1):
            raise ValueError(f"epochs, minibatch and micro must be >= 1, got {self.epochs}, {self.minibatch}, {self.micro}")
        if self.lr <= 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")


@dataclass(frozen=True)
class NaturalGradient:
    """Second-order solver: conjugate gradient on F x = g, step length from the trust region, optional line search."""

    kl_limit_nats: float = 0.01  # delta
    damping: float = 0.1  # added to the Fisher matrix
    cg_iterations: int = 15
    cg_tolerance: float = 1e-10  # squared residual at which conjugate gradient stops
    line_search: bool = True  # False: natural policy gradient
    backtrack: float = 0.8
    max_backtracks: int = 10


Solver = Descent | NaturalGradient


@dataclass(frozen=True)
class ValueLoss:
    """0.5 (V - ret)^2 on the reward column, optionally clipped around the old value; jointly with the policy or in passes of its own."""

    coef: float = 0.5
    clip: float | None = None  # V may move by this much per batch
    separate: Descent | None = None  # fit the critic apart, after the policy's step
    pretrain: int = 0  # first iterations in which only the critic learns; needs `separate`

    def __post_init__(self) -> None:
        if self.pretrain < 0 or (self.pretrain and self.separate is None):
            raise ValueError(f"pretrain={self.pretrain} fits the critic alone for so many iterations; give value.separate a Descent for it")


@dataclass(frozen=True)
class OnPolicy:
    """Settings of the on-policy proximal loop; see docs/interface.md for the order in which data flows through the slots."""

    num_env_steps: int = 1_000_000  # decisions in total (control: environment steps; text: tokens are not counted, rows are)
    num_envs: int = 1  # rows collected side by side; for sequences the rows (responses, chains) of one batch
    num_steps: int = 2048  # decisions per row and batch; ignored where a row is a whole sequence
    group_size: int = 1  # responses per prompt (sequences)
    scale_reward: bool = False  # divide rewards by the running standard deviation of the discounted return
    reward: tuple[RewardTransform, ...] = ()  # what becomes of the task's reward, in this order, before penalties
    filter: AccuracyBand | None = None  # which groups enter the batch; it is filled up again
    normalize_obs: bool = False  # running mean and variance of observations (control), saved with the agent
    advantage: Advantage = field(default_factory=GAE)
    normalize_advantage: Literal["none", "minibatch", "batch"] = "minibatch"
    surrogate: Surrogate = field(default_factory=Clip)
    controller: Controller = field(default_factory=Constant)
    ratio_level: Literal["token", "sequence", "sequence-mean"] = "token"  # of each decision, of the response, or its L-th root (GSPO)
    aggregation: Aggregation = "token-mean"
    max_length: int | None = None  # L_max of seq-mean-token-sum-norm, None: the width of the record
    divergence: Divergence | None = None
    tokens: TokenRule | None = None  # token weights, and where the divergence applies
    anchor: EntropyAnchor | None = None  # auxiliary loss on the entropy
    aux: Auxiliary | None = None  # auxiliary loss on a record of its own: texts, or responses of the start
    refresh: Refresh = field(default_factory=Fixed)
    merge: Warp | None = None  # the budget in several runs whose weights are merged
    entropy_coef: float = 0.0
    value: ValueLoss = field(default_factory=ValueLoss)
    solver: Solver = field(default_factory=Descent)
    constraint: Constraint | None = None  # limits on what an episode may cost

    def __post_init__(self) -> None:
        for name in ("num_env_steps", "num_envs", "num_steps", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_envs % self.group_size:
            raise ValueError(f"num_envs={self.num_envs} must be a multiple of group_size={self.group_size}")
        if isinstance(self.solver, NaturalGradient):
            self._check_natural_gradient()
        if self.merge is not None and self.num_env_steps < self.num_envs * self.merge.runs * self.merge.rounds:
            raise ValueError(f"num_env_steps={self.num_env_steps} is less than a batch for each of {self.merge.rounds} x {self.merge.runs} runs")
        self._check_sequences()
        self._check_references()
        if isinstance(self.controller, DualAscent) and self.surrogate.needs_kl != "old_new":
            raise ValueError("DualAscent bounds KL(old || new); use KLDrift(needs_kl='old_new')")
        if isinstance(self.controller, Doubling) and self.surrogate.needs_kl == "none":
            raise ValueError(
                f"Doubling adapts the weight of a KL penalty, but {type(self.surrogate).__name__} has none; "
                "use surrogate=KLDrift(), or controller=Constant()"
            )
        if self.constraint is not None:
            self._check_constraint(self.constraint)

    def _check_natural_gradient(self) -> None:
        """The step reads the surrogate, the advantage and the mask of the whole batch, and would pass over whatever else a loss can hold."""
        if self.surrogate.needs_kl != "none":
            raise ValueError("a natural-gradient step already bounds the KL; use a surrogate without a KL penalty (PolicyGradient)")
        if self.advantage.needs_critic and self.value.separate is None:
            raise ValueError("a natural-gradient step moves the policy only; give value.separate a Descent to fit the critic")
        if self.normalize_advantage == "minibatch":
            raise ValueError("a natural-gradient step uses the whole batch; set normalize_advantage='batch' or 'none'")
        names = ("entropy_coef", "tokens", "anchor", "ratio_level", "aggregation", "aux", "merge")
        unread = [f"{name}={value!r}" for name in names if (value := getattr(self, name)) != getattr(OnPolicy, name)]
        unread += [] if self.loss_divergence is None else ["a divergence with place='loss'"]
        if unread:
            raise ValueError(f"a natural-gradient step would not read {', '.join(unread)}: leave that out, or take solver=Descent()")

    def _check_constraint(self, constraint: Constraint) -> None:
        if self.normalize_advantage == "minibatch":
            raise ValueError(
                "with a constraint the reward's advantage is standardised before it is mixed with the cost's, else the weight of a cost would "
                "depend on the minibatch; set normalize_advantage='batch' or 'none'"
            )
        if isinstance(constraint.dual, TrustRegionDual) and not (isinstance(self.solver, NaturalGradient) and self.solver.line_search):
            raise ValueError("TrustRegionDual solves for a natural-gradient step with a line search; set solver=NaturalGradient()")

    def _check_sequences(self) -> None:
        """Terms that count once per response, and rules that need whole groups or the right place."""
        whole = [("a sequence ratio", self.ratio_level != "token")]
        whole += [("a sequence-level divergence", self.loss_divergence is not None and self.loss_divergence.level == "sequence")]
        by_row = [*whole, (f"aggregation={self.aggregation!r}", self.aggregation != "token-mean"), ("EntropyAnchor", self.anchor is not None)]
        for what, present in whole:
            if present and self.aggregation != "seq-mean-token-mean":
                raise ValueError(
                    f"{what} is one term per row; aggregation={self.aggregation!r} would count it per decision, use 'seq-mean-token-mean'"
                )
        for what, present in by_row:
            if present and isinstance(self.solver, Descent) and self.solver.unit != "row":
                raise ValueError(f"{what} is about whole rows, and minibatches of single decisions have none: set solver.unit='row'")
        if isinstance(self.tokens, Partner):
            if self.group_size != 2 or not isinstance(self.solver, Descent) or self.solver.unit != "row":
                raise ValueError(f"pairs of responses need group_size=2 and a solver with unit='row', got group_size={self.group_size}")
            if (self.solver.minibatch or 2) % 2:
                raise ValueError(f"both responses of a pair are in one minibatch, so its size must be even, got {self.solver.minibatch}")
        if isinstance(self.tokens, TopCov | Unlikely) and self.loss_divergence is None:
            raise ValueError(f"{type(self.tokens).__name__} says which tokens a divergence applies to; give one with place='loss'")
        if isinstance(self.tokens, Unlikely) != (self.divergence is not None and self.divergence.reference == "min-p"):
            raise ValueError("the reference 'min-p' and the token rule Unlikely need each other")

    def _check_references(self) -> None:
        """References, and what is fitted beforehand, that the loop would not use or does not have."""
        divergence, refresh = self.divergence, type(self.refresh).__name__
        if not isinstance(self.refresh, Fixed) and "ref" not in self.references:
            raise ValueError(f"{refresh} moves the reference 'ref', which nothing here reads; give a divergence to it, or use refresh=Fixed()")
        if divergence is not None and isinstance(divergence.schedule, AdaptiveKL) and divergence.reference not in ("ref", "teacher"):
            raise ValueError(f"AdaptiveKL follows the KL to 'ref' or 'teacher'; to {divergence.reference!r} none is measured, use another schedule")
        if isinstance(divergence, FDivergence) and divergence.sampler == "reference":
            raise ValueError("this loop's samples are the policy's own; sampler='reference' needs those of the reference, use sampler='policy'")
        if isinstance(divergence, KL) and divergence.estimator == "exact" and isinstance(self.tokens, TopCov | Unlikely):
            raise ValueError(f"{type(self.tokens).__name__} selects terms of sampled tokens; the exact KL has none, use estimator='k2'")
        if isinstance(self.advantage, FrozenQ) and self.value.separate is None:
            raise ValueError("FrozenQ's critic is fitted before the policy moves; give value.separate a Descent, and value.pretrain its iterations")

    @property
    def loss_divergence(self) -> Divergence | None:
        """The divergence that is a term of the loss."""
        return self.divergence if self.divergence is not None and self.divergence.place == "loss" else None

    @property
    def trains_critic(self) -> bool:
        """Whether the critic learns beyond its pretraining."""
        return self.advantage.needs_critic and getattr(self.advantage, "trains_critic", True)

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the policies whose log-probabilities the method reads."""
        names: list[str] = [self.divergence.reference] if self.divergence is not None else []
        names += ["ref"] if isinstance(self.surrogate, Regress) and self.surrogate.anchor == "ref" else []
        names += [name for transform in self.reward for name in transform.needs]
        return tuple(dict.fromkeys(n for n in names if n not in ("old", "min-p")))

    @property
    def num_optimizer_steps(self) -> int:
        """Minibatch steps that the first-order solvers will take over num_env_steps."""
        batch = self.num_envs * self.num_steps
        descents = [s for s in (self.solver, self.value.separate if self.advantage.needs_critic else None) if isinstance(s, Descent)]
        return sum(-(-batch // (s.minibatch or batch)) * s.epochs for s in descents) * (self.num_env_steps // batch)
