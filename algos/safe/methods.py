"""The constrained methods: settings of the on-policy and the off-policy loop with the constraint slot filled (where a row is silent, PPO's or SAC's
default holds), and the methods that are solved on tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.slots import Critics
from markovia.algos.on_policy.method import Descent, NaturalGradient, OnPolicy, ValueLoss
from markovia.algos.on_policy.surrogates import PolicyGradient
from markovia.algos.safe.conservative import History, Rule, explore
from markovia.algos.safe.constraint import ChanceShield, Constraint
from markovia.algos.safe.dual import FixedDual, TrustRegionDual, gradient, optimistic, pid
from markovia.algos.safe.exact import Trace, reload
from markovia.algos.safe.front import FrontLearning
from markovia.algos.safe.pareto import Front, c_morl
from markovia.algos.safe.replayed import ReplayConstraint
from markovia.algos.safe.shield import Shielded, correct, least_advantage, shielded_policy
from markovia.algos.safe.termination import SoftTermination
from markovia.algos.table import Row, table
from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.tabular import TabularMDP

STEPPED = ("control", "tabular", "denoising")
ALL = (*STEPPED, "language")
_HERE = "markovia.algos.safe."

# Four environments for the length of the usual episode: every iteration ends on finished episodes, on which the cost is measured.
PPO_LAG = OnPolicy(num_envs=4, num_steps=1000, normalize_advantage="batch", constraint=Constraint())
TRPO_LAG = replace(
    PPO_LAG,
    surrogate=PolicyGradient(),
    solver=NaturalGradient(max_backtracks=15),
    value=ValueLoss(coef=1.0, separate=Descent(lr=1e-3, anneal=False, epochs=10, minibatch=128)),
)

# Ten updates an environment step on small minibatches, as published; targets move by 0.0025 every update in place of 0.005 every second one.
CAL = OffPolicy(utd=10.0, batch_size=12, learning_starts=5000, start="policy", polyak=0.0025, constraint=ReplayConstraint())
SAC_LAG = OffPolicy(
    constraint=ReplayConstraint(dual=gradient(), mix="sum", critic=Critics(num=1), conservatism=0.0, estimator="episodes"),
)

SAFE = table(
    [
        Row(
            "ppo-lag", PPO_LAG, "ppo", "2007.03964",
            "a multiplier, raised by gradient ascent, weighs the advantage of cost against that of reward", ALL,
            (_HERE + "dual:PIDDual", _HERE + "constraint:mix_advantages"), "ppo-lag@exact",
        ),
        Row(
            "ppo-lag/pid", replace(PPO_LAG, constraint=Constraint(dual=pid())), "ppo-lag", "2007.03964",
            "the multiplier is a PID controller of the violation, which damps its swing", ALL, (_HERE + "dual:PIDDual",), "ppo-lag@exact",
        ),
        Row(
            "trpo-lag", TRPO_LAG, "trpo", "2007.03964", "the multiplier's mixed advantage in a trust-region step", STEPPED,
            (_HERE + "constraint:mix_advantages", "markovia.algos.on_policy.natural:natural_step"), "trpo-lag",
        ),
        Row(
            "cpo", replace(TRPO_LAG, constraint=Constraint(dual=TrustRegionDual())), "trpo", "1705.10528",
            "the trust-region step meets the linearised cost limit in closed form, or recovers from missing it", STEPPED,
            (_HERE + "trust_region:trust_region_dual", _HERE + "trust_region:acceptable"), "cpo@exact",
        ),
        Row(
            "cat", replace(PPO_LAG, constraint=Constraint(dual=FixedDual(), termination=SoftTermination())), "ppo", "2403.18765",
            "a violation ends the episode for the learner with a probability, and nothing is weighed", STEPPED,
            (_HERE + "termination:termination_probability", _HERE + "termination:soften"), "cat@exact",
        ),
        Row(
            "reload/ppo", replace(PPO_LAG, constraint=Constraint(dual=optimistic(0.01), optimistic=True)), "reload", "2302.01275",
            "ReLOAD on sampled advantages: those of the last critic and multiplier, on the same batch, are subtracted from twice the present ones",
            STEPPED, (_HERE + "constraint:optimistic_advantage", _HERE + "dual:optimistic"), "reload/ppo",
        ),
        Row(
            "acs/ppo", replace(PPO_LAG, constraint=Constraint(dual=FixedDual(0.1), mix="plain", shield=ChanceShield())), "acs", "2310.03379",
            "the shield from learnt safety values while PPO learns on reward less 0.1 cost", ("control",),
            (_HERE + "guard:safe_labels", _HERE + "shield:correct", _HERE + "shield:least_advantage"), "acs/ppo",
        ),
        Row(
            "cal", CAL, "sac", "2401.14758", "cost critics of replayed actions, read pessimistically, against an augmented Lagrangian", ("control",),
            (
                "markovia.algos.off_policy.costs:upper_cost", "markovia.algos.off_policy.costs:cost_loss", _HERE + "dual:log_augmented",
                _HERE + "constraint:discounted_limit",
            ),
            "cal",
        ),
        Row(
            "cal/sac-lag", SAC_LAG, "cal", "2401.14758", "one cost critic, and a multiplier by gradient ascent on the cost of finished episodes",
            ("control",), ("markovia.algos.off_policy.costs:cost_loss", _HERE + "dual:gradient"), "cal",
        ),
    ]
)


@dataclass(frozen=True)
class Reload:
    """Settings of ReLOAD on a tabular CMDP: `Reload().solve(cmdp_grid())`."""

    step: float = 1.0  # of the policy's mirror step
    dual_step: float = 0.1  # of the multiplier
    iterations: int = 4000

    def solve(self, problem: CMDP) -> Trace:
        """Values, costs and multipliers of all iterates, and the last policy."""
        return reload(problem, step=self.step, dual_step=self.dual_step, iterations=self.iterations)


@dataclass(frozen=True)
class Exploration:
    """Settings of exploration above a floor: `Exploration().run(P, reward, start, baseline, floor, episodes=4000)`."""

    rule: Rule = "step-mixture"
    bonus_scale: float = 0.03  # 1 is the theory's, at which nothing but the baseline is played for very long
    confidence: float = 0.1  # chance that any bound fails

    def run(self, *problem: np.ndarray, **options: Any) -> History:
        """`explore` with these settings; `counts=` begins from a data set."""
        return explore(*problem, rule=self.rule, bonus_scale=self.bonus_scale, confidence=self.confidence, **options)


@dataclass(frozen=True)
class FrontSearch:
    """Settings of C-MORL on a tabular problem: `FrontSearch().search(mdp, rewards, weights)`."""

    rounds: int = 4  # of extensions
    picks: int = 5  # points extended per round, the least crowded first
    beta: float = 0.9  # share of the other returns that an extension keeps
    capacity: int = 200  # points kept

    def search(self, mdp: TabularMDP, rewards: np.ndarray, weights: np.ndarray) -> Front:
        """The front of the returns (n, S, A) from the optima of the preferences (w, n)."""
        return c_morl(mdp, rewards, weights, rounds=self.rounds, picks=self.picks, beta=self.beta, capacity=self.capacity)


@dataclass(frozen=True)
class Safeguard:
    """Settings of adaptive chance-constrained safeguards, with the released code's defaults."""

    alpha: float = 0.8  # share of the safety margin that one step may spend
    epsilon: float = 0.3  # tolerated chance of an unsafe episode
    step: float = 0.05  # of a correction, in the unit of the action
    iterations: int = 20  # corrections at most

    def policy(self, P: np.ndarray, policy: np.ndarray, unsafe: np.ndarray, horizon: int) -> np.ndarray:
        """The shielded policy (T, S, A) of a tabular problem."""
        return shielded_policy(P, policy, unsafe, horizon, alpha=self.alpha, epsilon=self.epsilon)

    def act(self, action: Tensor, advantage: Callable[[Tensor], Tensor], psi: Tensor) -> Shielded:
        """Proposed actions (B, n), moved until their safety advantage affords what psi (B,) allows."""
        return correct(action, advantage, least_advantage(psi, alpha=self.alpha, epsilon=self.epsilon), step=self.step, iterations=self.iterations)


_EXACT = ("value", "limit", "invariance", "bad_input")
_WHY = "solved on tables: there is no sampled gradient and no training state to resume"
SAFE |= table(
    [
        Row(
            "reload", Reload(), "ppo-lag", "2302.01275", "policy and multiplier both take optimistic steps, so that the last iterate converges",
            ("tabular",), (_HERE + "exact:reload", _HERE + "exact:primal_dual"), "reload", _EXACT, _WHY,
        ),
        Row(
            "stepmix", Exploration(), None, "2306.06265", "no episode below a floor: the baseline for the first steps, mixed in one of them",
            ("tabular",), (_HERE + "conservative:step_mixture", _HERE + "conservative:optimal", _HERE + "conservative:evaluate"), "stepmix",
            _EXACT, _WHY,
        ),
        Row(
            "epsmix", Exploration("episode-mixture"), "stepmix", "2306.06265", "the mixture is tossed once an episode", ("tabular",),
            (_HERE + "conservative:episode_mixture",), "epsmix", _EXACT, _WHY,
        ),
        Row(
            "c-morl", FrontSearch(), None, "2410.02236",
            "a front of returns: optima of a few preferences, extended under constraints on the other returns", ("tabular",),
            (_HERE + "pareto:extend", _HERE + "pareto:hypervolume", _HERE + "pareto:crowding_distance"), "c-morl", _EXACT, _WHY,
        ),
        Row(
            "c-morl/ppo", FrontLearning(), "c-morl", "2410.02236",
            "both stages learnt by PPO: fixed preferences, then extensions with a barrier on the other returns", ("control",),
            (_HERE + "front:extension_limits", _HERE + "dual:BarrierDual", _HERE + "pareto:crowding_distance"), "c-morl/ppo", _EXACT,
            "a search over runs of the on-policy loop: gradient and resume are those of ppo-lag",
        ),
        Row(
            "acs", Safeguard(), None, "2310.03379", "a step may spend only a share of the chance to stay safe: actions that spend more are moved",
            ("tabular",), (_HERE + "shield:least_advantage", _HERE + "shield:correct", _HERE + "shield:shielded_policy"), "acs@exact", _EXACT, _WHY,
        ),
    ]
)
