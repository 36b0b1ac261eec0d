"""Two constrained problems whose optimum and multiplier are known; the linear program of `CMDP.solve` is the oracle."""

from __future__ import annotations

import numpy as np

from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.tabular import TabularMDP

GRID_SIDE = 5
GRID_GOAL = 4  # cell (x, y) has the number x + 5 y
GRID_HAZARDS = (2, 7, 12, 17)  # (2, 0) to (2, 3): the way round leads through (2, 4)
_MOVES = ((0, 1), (1, 0), (0, -1), (-1, 0))  # up, right, down, left


def _moved(cell: int, move: tuple[int, int]) -> int:
    x, y = cell % GRID_SIDE + move[0], cell // GRID_SIDE + move[1]
    return x + GRID_SIDE * y if 0 <= x < GRID_SIDE and 0 <= y < GRID_SIDE else cell


def cmdp_grid(limit: float = 0.5, gamma: float = 0.95, slip: float = 0.1) -> CMDP:
    """5 x 5 grid from (0, 0) to (4, 0) with a wall of hazards at x = 2, y < 4; 25 states, 4 actions (up, right, down, left).

    With probability `slip` the move is uniform over the four; a move off the grid stays. Reward 1 on entering the goal, which absorbs;
    cost 1 on every step that ends in a hazard. At limit 0.5: J* = 0.678001, multiplier 0.300297; unconstrained J* = 0.835455.
    """
    cells = GRID_SIDE**2
    P = np.zeros((cells, 4, cells))
    for s in range(cells):
        for a in range(4):
            for b, move in enumerate(_MOVES):
                P[s, a, _moved(s, move)] += (1 - slip) * (a == b) + slip / 4
    P[GRID_GOAL] = np.eye(cells)[GRID_GOAL]
    R = P[:, :, GRID_GOAL].copy()
    R[GRID_GOAL] = 0.0
    return CMDP(TabularMDP(P, R, gamma, np.eye(cells)[0]), P[:, :, list(GRID_HAZARDS)].sum(-1), np.array([limit]))


def cmdp_two_state(limit: float = 5.0, gamma: float = 0.9) -> CMDP:
    """Staying in state 0 pays and costs, leaving it does neither; staying in state 1 is free, leaving it costs.   [example of arXiv 2302.01275]

    (s, a): reward, cost, next = (0, 0): 1, 1, 0;  (0, 1): 0, 0, 1;  (1, 0): 0, 0, 1;  (1, 1): 0, 1, 0.
    In state 1 nothing is ever gained, so J = J_c there at best: J* = limit and the multiplier is 1 for 0 < limit < 1 / (1 - gamma).
    The paper asks sum gamma^t u >= 5 with u = 1 - cost, the same constraint for gamma = 0.9.
    """
    P = np.zeros((2, 2, 2))
    P[0, 0, 0] = P[0, 1, 1] = P[1, 0, 1] = P[1, 1, 0] = 1.0
    R = np.array([[1.0, 0.0], [0.0, 0.0]])
    return CMDP(TabularMDP(P, R, gamma, np.array([1.0, 0.0])), np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([limit]))
