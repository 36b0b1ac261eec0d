"""The exact constrained problems as Gymnasium environments; `env.unwrapped.oracle` is the CMDP with its linear program."""

from __future__ import annotations

from typing import Any

import numpy as np

from markovia.envs.exact.cmdps import GRID_GOAL, GRID_HAZARDS, cmdp_grid, cmdp_two_state
from markovia.envs.exact.gym_envs import CMDPEnv
from markovia.envs.safe.cost import check_limit


class SafeGridEnv(CMDPEnv):
    """A slippery grid where the short way to the goal leads through hazards.

    ## Description
    5 x 5 cells; start (0, 0), goal (4, 0), hazards (2, 0) to (2, 3), so that the free way is the detour over (2, 4). The chosen move happens
    with probability 0.9, else a uniform one; moves off the grid stay. `oracle.solve()` gives the constrained optimum by linear programming:
    at the limit 0.5 the discounted return 0.678001 and the multiplier 0.300297; without a limit 0.835455 at a cost of at least 1.0364.
    The optimum randomises in one state: no deterministic policy meets the limit tightly.

    ## Action Space
    Discrete(4): up, right, down, left.

    ## Observation Space
    Discrete(25): x + 5 y.

    ## Rewards
    1.0 on entering the goal, else 0.0. `info["cost"]` is 1.0 on a step that ends in a hazard, else 0.0. Both are discounted by `gamma`, which is
    the learner's to apply; `cost_limit` bounds the discounted cost of an episode, and `cost_gamma` is its discount.

    ## Starting State
    (0, 0).

    ## Episode End
    Terminates at the goal; the registered id is truncated after 60 steps.

    ## Arguments
    `limit=0.5`: the bound on the discounted cost, the oracle's; a learner's is `Constraint.cost_limit`, which the presets set to 0.5 with
    `cost_gamma` 0.95. `markovia cost-of` reports plain sums, against neither. `gamma=0.95`. `slip=0.1`: probability of a random move.
    """

    def __init__(self, limit: float = 0.5, gamma: float = 0.95, slip: float = 0.1) -> None:
        super().__init__(oracle=cmdp_grid(limit, gamma, slip))
        self.cost_limit, self.cost_gamma = check_limit(limit), gamma

    def step(self, action: Any) -> tuple[np.int64, float, bool, bool, dict]:
        obs = super().step(action)[0]
        reached = int(obs) == GRID_GOAL
        if reached:
            self._state = None
        return obs, float(reached), reached, False, {"cost": float(int(obs) in GRID_HAZARDS)}


class SafeTwoStateEnv(CMDPEnv):
    """Two states in which return and cost are the same thing, so that the multiplier of every limit is 1.

    ## Description
    State 0 pays 1 and costs 1 for staying; state 1 is free to stay in and pays nothing. Plain gradient descent-ascent cycles here.
    `oracle.solve()`: J* = limit, multiplier 1.

    ## Action Space
    Discrete(2): stay, go to the other state.

    ## Observation Space
    Discrete(2): the state.

    ## Rewards
    1.0 for staying in state 0, else 0.0. `info["cost"]` is 1.0 for staying in state 0 and for leaving state 1, else 0.0. `cost_limit` bounds the
    discounted cost, and `cost_gamma` is its discount.

    ## Starting State
    State 0.

    ## Episode End
    Never terminates; the registered id is truncated after 100 steps.

    ## Arguments
    `limit=5.0`: the bound on the discounted cost, out of at most 1 / (1 - gamma), the oracle's; a learner's is `Constraint.cost_limit`, which
    the presets set to 5 with `cost_gamma` 0.9. `markovia cost-of` reports plain sums, against neither. `gamma=0.9`.
    """

    def __init__(self, limit: float = 5.0, gamma: float = 0.9) -> None:
        super().__init__(oracle=cmdp_two_state(limit, gamma))
        self.cost_limit, self.cost_gamma = check_limit(limit), gamma
