"""Multipliers: how much a unit of cost weighs against a unit of reward, from how much the limit was missed.

    cost    (m,)  J_c of each constraint in the unit of its limit        limit  (m,)
    weight  (m,)  >= 0, what the improvement step puts on the cost advantages

One object is a controller of the violation cost - limit; gradient ascent, PID, augmented Lagrangian and optimistic ascent are gains of it.
State is a dictionary of lists (plain JSON), so that a checkpoint holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

State = dict[str, Any]


def checked(cost: Sequence[float] | np.ndarray, limit: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as (m,) float64. Raises ValueError for lengths that differ and for a cost that is not finite."""
    c, d = np.atleast_1d(np.asarray(cost, dtype=np.float64)), np.atleast_1d(np.asarray(limit, dtype=np.float64))
    if c.shape != d.shape:
        raise ValueError(f"{len(c)} cost(s) meet {len(d)} limit(s); give one limit per cost column, in the order of info['cost']")
    if not np.isfinite(c).all():
        raise ValueError(f"the measured cost is {c.tolist()}; it must be finite, so look for a NaN in info['cost'] or in the cost critic")
    return c, d


@dataclass(frozen=True)
class PIDDual:
    """A controller of the violation e = cost - limit; with K_P = K_D = 0 it is gradient ascent on the multiplier.

    I <- [I + K_I e]_+,  P <- a_p P + (1 - a_p) e,  E <- a_d E + (1 - a_d) cost,  D = [E - E of `delay` updates ago]_+
    weight = min([K_P P + I + K_D D]_+, weight_max)                                              [Stooke 2020, alg. 2; arXiv 2007.03964]
    P and E start at 0 and the queue of E holds one 0, so that the first D is E; weight_max bounds I too, so that it does not wind up.
    optimizer "adam": the step of I is K_I m / (sqrt v + 1e-8), about K_I whatever the size of e. space "log": I = exp(l) with l <- l + K_I I e
    (or Adam on I e), which stays positive.                                                                       [arXiv 2401.14758]
    """

    kp: float = 0.0  # K_P; the augmented Lagrangian's penalty
    ki: float = 0.035  # K_I, the step of the multiplier itself
    kd: float = 0.0  # K_D, reacts to a rising cost only
    ema_p: float = 0.0  # a_p, smoothing of the violation
    ema_d: float = 0.0  # a_d, smoothing of the cost whose rise is measured
    delay: int = 1  # updates between the two costs whose difference is D
    init: float = 0.001  # I at the start
    weight_max: float | None = 100.0  # None: no bound
    optimizer: Literal["sgd", "adam"] = "sgd"
    space: Literal["linear", "log"] = "linear"

    def __post_init__(self) -> None:
        if min(self.kp, self.ki, self.kd, self.init) < 0 or self.delay < 1:
            raise ValueError(f"gains and init must be >= 0 and delay >= 1, got {self}")
        if not (0 <= self.ema_p < 1 and 0 <= self.ema_d < 1):
            raise ValueError(f"ema_p and ema_d must lie in [0, 1), got {self.ema_p} and {self.ema_d}")
        if self.space == "log" and self.init == 0:
            raise ValueError("in log space the multiplier can't start at 0; set init to a small positive number")
        if self.weight_max is not None and self.weight_max <= 0:
            raise ValueError(f"weight_max must be > 0 or None, got {self.weight_max}")

    def start(self, num_costs: int) -> State:
        """The state before the first update."""
        zero = [0.0] * num_costs
        return {"I": [self.init] * num_costs, "P": zero, "E": zero, "queue": [zero], "m": zero, "v": zero, "updates": 0}

    def initial(self, num_costs: int) -> np.ndarray:
        """The weight (m,) before anything was measured."""
        return np.full(num_costs, self.init)

    def update(self, state: State, cost: Any, limit: Any) -> tuple[State, np.ndarray]:
        """The next state and the weight (m,) to use now."""
        c, d = checked(cost, limit)
        old = {k: np.asarray(state[k]) for k in ("I", "P", "E", "m", "v")}
        error, updates = c - d, state["updates"] + 1
        slope = error if self.space == "linear" else old["I"] * error
        m, v = 0.9 * old["m"] + 0.1 * slope, 0.999 * old["v"] + 0.001 * slope**2
        if self.optimizer == "adam":
            slope = m / (1 - 0.9**updates) / (np.sqrt(v / (1 - 0.999**updates)) + 1e-8)
        integral = np.maximum(old["I"] + self.ki * slope, 0.0) if self.space == "linear" else old["I"] * np.exp(self.ki * slope)
        integral = np.minimum(integral, np.inf if self.weight_max is None else self.weight_max)
        p = self.ema_p * old["P"] + (1 - self.ema_p) * error
        e = self.ema_d * old["E"] + (1 - self.ema_d) * c
        rise = np.maximum(e - np.asarray(state["queue"][0]), 0.0)
        new = {k: x.tolist() for k, x in (("I", integral), ("P", p), ("E", e), ("m", m), ("v", v))}
        queue = [*state["queue"], e.tolist()][-self.delay :]
        weight = np.maximum(self.kp * p + integral + self.kd * rise, 0.0)
        return {**new, "queue": queue, "updates": updates}, np.minimum(weight, np.inf if self.weight_max is None else self.weight_max)


def gradient(lr: float = 0.035, init: float = 0.001, optimizer: Literal["sgd", "adam"] = "adam") -> PIDDual:
    """Plain Lagrangian: ascent on lam (cost - limit).                                                                     [Ray 2019]"""
    return PIDDual(kp=0.0, ki=lr, init=init, optimizer=optimizer)


def pid(kp: float = 0.1, ki: float = 0.01, kd: float = 0.01) -> PIDDual:
    """PID-Lagrangian with OmniSafe's smoothing and delay.                                                    [arXiv 2007.03964]"""
    return PIDDual(kp=kp, ki=ki, kd=kd, ema_p=0.95, ema_d=0.95, delay=10)


def augmented(penalty: float, lr: float, init: float = 0.0) -> PIDDual:
    """Augmented Lagrangian: weight [lam + penalty (cost - limit)]_+, lam by ascent with step lr."""
    return PIDDual(kp=penalty, ki=lr, init=init, weight_max=None)


def log_augmented(penalty: float = 10.0, lr: float = 3e-4, init: float = 0.6931) -> PIDDual:
    """CAL's: [lam + penalty (cost - limit)]_+ with lam = exp(l), l by Adam on lam (cost - limit).                             [arXiv 2401.14758]"""
    return PIDDual(kp=penalty, ki=lr, init=init, weight_max=None, optimizer="adam", space="log")


def optimistic(lr: float, init: float = 0.0) -> PIDDual:
    """Optimistic ascent lam + lr (2 e_k - e_{k-1}), e_{-1} = 0: its sum telescopes to lr e_k + lr sum e, so K_P = K_I = lr. [arXiv 2302.01275]

    At the bound it is y <- [y + lr e_k]_+, lam = [y + lr e_k]_+, whose steps are those above wherever neither is cut.
    """
    return PIDDual(kp=lr, ki=lr, init=init, weight_max=None)


@dataclass(frozen=True)
class BarrierDual:
    """Interior point: the slope of -(1/t) log(limit - cost), so a limit weighs more the closer it comes.       [arXiv 2410.02236]

    weight = 1 / (t max(limit - cost, floor))
    """

    t: float = 20.0  # sharpness; larger comes closer to the limit
    floor: float = 1e-3  # least slack, which bounds the weight by 1 / (t floor)

    def __post_init__(self) -> None:
        if self.t <= 0 or self.floor <= 0:
            raise ValueError(f"t and floor must be > 0, got t={self.t}, floor={self.floor}")

    def start(self, num_costs: int) -> State:
        """A barrier remembers nothing."""
        return {}

    def initial(self, num_costs: int) -> np.ndarray:
        """0: nothing is near a limit yet."""
        return np.zeros(num_costs)

    def update(self, state: State, cost: Any, limit: Any) -> tuple[State, np.ndarray]:
        """The weight (m,) at the measured cost."""
        c, d = checked(cost, limit)
        return state, 1.0 / (self.t * np.maximum(d - c, self.floor))


@dataclass(frozen=True)
class FixedDual:
    """A penalty that nobody tunes: the weight stays. With weight 0 the constraint is only measured."""

    weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight must be >= 0, got {self.weight}; a negative one would reward cost")

    def start(self, num_costs: int) -> State:
        return {}

    def initial(self, num_costs: int) -> np.ndarray:
        return np.full(num_costs, self.weight)

    def update(self, state: State, cost: Any, limit: Any) -> tuple[State, np.ndarray]:
        """`weight` for every constraint."""
        return state, np.full(len(checked(cost, limit)[0]), self.weight)


@dataclass(frozen=True)
class TrustRegionDual:
    """CPO finds the multiplier of each step in closed form (`trust_region_dual`); needs the natural-gradient solver.

    The linearised cost falls short of what a step really costs, so the limit may be missed by the same amount for ever. A margin makes up for it:
    margin <- [margin + margin_lr (cost - limit)]_+, added to the violation that the step must make up for.  [learn_margin of the code of Ray 2019]
    """

    tolerance: float = 0.0  # rise of the cost surrogate that the line search lets pass, cost per step; 1e-3 suits exact advantages
    margin_lr: float = 0.0  # 0: no margin, CPO as in the paper

    def __post_init__(self) -> None:
        if not (self.tolerance >= 0 and self.margin_lr >= 0):
            raise ValueError(f"tolerance and margin_lr must be >= 0, got {self.tolerance} and {self.margin_lr}")

    def start(self, num_costs: int) -> State:
        return {"margin": [0.0] * num_costs}

    def initial(self, num_costs: int) -> np.ndarray:
        return np.zeros(num_costs)

    def update(self, state: State, cost: Any, limit: Any) -> tuple[State, np.ndarray]:
        """The next margin; weight 0: the advantages are not mixed."""
        c, d = checked(cost, limit)
        margin = np.maximum(np.asarray(state["margin"]) + self.margin_lr * (c - d), 0.0)
        return {"margin": margin.tolist()}, np.zeros(len(c))


Dual = PIDDual | BarrierDual | FixedDual | TrustRegionDual
