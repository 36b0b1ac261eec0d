"""How offline datasets are made: per environment which method trains, how long, and which return counts as medium."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One environment's recipe. Raises ValueError for numbers that make no sense."""

    env: str  # Gymnasium id
    method: str | None  # id of the method that trains; None: a scripted controller, no training
    num_env_steps: int = 0  # of training
    medium_return: float = 0.0  # the first evaluation that reaches it is the medium policy
    num_steps: int = 100_000  # transitions per tier
    eval_every: int = 5_000  # environment steps between two evaluations of 10 episodes with sampled actions
    replay_steps: int | None = None  # medium-replay keeps about so many transitions, whole episodes drawn evenly; None: all
    num_reference: int = 100  # episodes of the random and of the greedy best policy that count as 0 and 100
    settings: dict[str, Any] = field(default_factory=dict)  # of the method, on top of its presets
    controller: str = ""  # "module:function" of the scripted expert, called with the environment's id, noise= and seed=

    def __post_init__(self) -> None:
        for name in ("num_steps", "eval_every", "num_reference"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.method is not None and self.num_env_steps < self.eval_every:
            raise ValueError(f"num_env_steps {self.num_env_steps} leaves no evaluation; it must be at least eval_every, {self.eval_every}")


_SMALL = {"hidden": (64, 64)}
_PENDULUM = {
    "learning_starts": 500,
    "num_steps": 500,
    "policy": _SMALL,
    "critic": {**_SMALL, "lr": 1e-3},
    "actor": {"lr": 1e-3},
    "temperature": {"lr": 1e-3},
}
_INVERTED = {"num_envs": 4, "num_steps": 256}

RECIPES: dict[str, Recipe] = {
    r.env.rpartition(":")[2]: r
    for r in (
        Recipe("Pendulum-v1", "sac", 10_000, -700.0, 20_000, 500, settings=_PENDULUM),
        Recipe("InvertedPendulum-v5", "ppo", 40_000, 300.0, 20_000, 1_024, settings=_INVERTED),
        Recipe("gymnasium_robotics:PointMaze_UMaze-v3", None, num_steps=50_000, controller="markovia.envs.offline.pointmaze:maze_controller"),
        Recipe("Hopper-v5", "sac", 500_000, 1400.0, replay_steps=100_000),
        Recipe("HalfCheetah-v5", "sac", 500_000, 4700.0, replay_steps=100_000),
        Recipe("Walker2d-v5", "sac", 700_000, 2800.0, replay_steps=100_000),
    )
}


def recipe(env: str, **changes: Any) -> Recipe:
    """The environment's recipe with changes (None leaves an entry as it is).

    Raises ValueError for an environment without one that trains, unless method, num_env_steps and medium_return are given, and for changes of a
    training where a scripted controller plays.
    """
    given = {k: v for k, v in changes.items() if v is not None}
    own = RECIPES.get(env.rpartition(":")[2])
    if own is not None and own.method is None and "method" not in given:
        check_idle(f"{own.env} is recorded from a scripted controller", given, "leave it out, or train with --method")
    elif own is None or own.method is None:
        missing = [k for k in ("method", "num_env_steps", "medium_return") if k not in given]
        if missing:
            what = f"there is no recipe for {env}" if own is None else f"the recipe for {env} has a scripted controller, and none to train"
            raise ValueError(f"{what}; give {_flags(missing)} too. Recipes: {', '.join(RECIPES)}")
    if own is None:
        return Recipe(env, **given)
    settings = own.settings if given.get("method", own.method) == own.method else {}  # they are of that method
    return replace(own, **{"env": env if ":" in env else own.env, "settings": settings, **given})


def check_idle(why: str, given: dict[str, Any], mend: str) -> None:
    """Raises ValueError for entries that change a training, where nothing is trained."""
    idle = [k for k in ("method", "num_env_steps", "medium_return", "eval_every") if given.get(k) is not None]
    if idle:
        raise ValueError(f"{why}, nothing is trained, so {_flags(idle)} would do nothing; {mend}")


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
