"""Small offline problems whose optimum or behaviour density is known: what the offline methods are checked against.

F1 bandit2d   eight-mode behaviour in the plane, one step       F2 maze      grid with slips, few successes, empirical MDP
F3 pointmass2d/<tier>   a point pushed to a goal                F4 pendulum/<tier>   recorded by `markovia collect Pendulum-v1`
F5 obstacle  a goal behind an obstacle, both ways around it, half of the episodes succeed
"""

from __future__ import annotations

from markovia.envs.exact.offline.bandit import Bandit2D
from markovia.envs.exact.offline.maze import EmpiricalMDP, maze, maze_data, success
from markovia.envs.exact.offline.obstacle import PointObstacle, obstacle_data
from markovia.envs.exact.offline.pointmass import TIERS, PointMass2D, pointmass_data, pointmass_reference
from markovia.envs.offline.sources import tier_id
from markovia.envs.offline.transitions import Transitions

__all__ = [
    "Bandit2D", "EmpiricalMDP", "PointMass2D", "PointObstacle", "fixture", "maze", "maze_data", "obstacle_data", "pointmass_data",
    "pointmass_reference", "success",
]  # fmt: skip


def fixture(name: str, seed: int = 0) -> Transitions:
    """The data of a fixture: bandit2d, maze, obstacle, obstacle/steady, pointmass2d/<tier> or pendulum/<tier>.

    The Pendulum sets are those that `markovia collect Pendulum-v1` recorded on this machine; `seed` does not change them.
    Raises ValueError for another name, and for Pendulum sets that are not there.
    """
    kind, _, tier = name.partition("/")
    if name == "bandit2d":
        return Bandit2D().data(seed=seed)
    if name == "maze":
        return maze_data(seed)
    if kind == "obstacle" and tier in ("", "steady"):
        return obstacle_data(seed, noise=0.03 if tier else 0.3)
    if kind == "pointmass2d" and tier:
        return pointmass_data(tier, seed)
    if kind == "pendulum" and tier:
        from markovia.envs.offline.minari_io import load_minari

        return load_minari(tier_id("Pendulum-v1", tier))
    known = ["bandit2d", "maze", "obstacle", "obstacle/steady", *(f"pointmass2d/{t}" for t in TIERS), "pendulum/<tier>"]
    raise ValueError(f"unknown fixture {name!r}; choose one of {', '.join(known)}")
