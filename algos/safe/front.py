"""C-MORL with learnt policies: the two stages of `pareto` on a task that pays several rewards, each run a setting of the on-policy loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.method import Descent, OnPolicy
from markovia.algos.safe.constraint import Constraint
from markovia.algos.safe.dual import BarrierDual, FixedDual
from markovia.algos.safe.pareto import crowding_distance, expected_utility, floors, hypervolume, nondominated, simplex_grid, sparsity
from markovia.algos.setup import build, evaluate_stepped
from markovia.algos.streams import stream_seed

FREE = 1e9  # a limit that never binds


@dataclass(frozen=True)
class LearntFront:
    """Mean episode returns (k, n) of policies, none dominated by another, and the weights of each."""

    points: np.ndarray
    policies: tuple[dict[str, Tensor], ...]

    def merged(self, points: np.ndarray, policies: tuple[dict[str, Tensor], ...], capacity: int) -> LearntFront:
        """With new candidates; dominated ones leave, then those in the densest places until `capacity` are left."""
        p, q = np.concatenate([self.points, points]), (*self.policies, *policies)
        keep = np.flatnonzero(nondominated(p))
        if len(keep) > capacity:
            keep = np.sort(keep[np.argsort(-crowding_distance(p[keep]), kind="stable")[:capacity]])
        return LearntFront(p[keep], tuple(q[i] for i in keep))

    def best(self, weights: np.ndarray) -> dict[str, Tensor]:
        """The policy for a preference (n,): argmax weights . G; `agent.load_state` takes it."""
        return self.policies[int(np.argmax(self.points @ np.asarray(weights)))]

    def metrics(self, reference: np.ndarray, step: float = 0.01) -> dict[str, float]:
        """Hypervolume above `reference` (n,), expected utility over a grid of preferences, sparsity."""
        grid = simplex_grid(self.points.shape[1], step)
        return {
            "hypervolume": hypervolume(self.points, reference),
            "expected_utility": expected_utility(self.points, grid),
            "sparsity": sparsity(self.points),
        }


def extension_limits(returns: np.ndarray, objective: int, *, beta: float, best: np.ndarray, length: float) -> np.ndarray:
    """(n,) limits on the shortfalls length best - G_j of an extension: G_j >= G_j - (1 - beta) |G_j| of a policy with `returns`, j != objective.

    The improved objective has none.                                                                                 [arXiv 2410.02236]
    """
    out = length * best - floors(returns, beta)
    out[objective] = FREE
    return np.maximum(out, 0.0)


@dataclass(frozen=True)
class Task:
    """What the runs of a search have in common: costs of an episode add up to length best - G."""

    env_id: str
    kwargs: dict[str, Any]
    best: np.ndarray  # (n,) what a step pays at most
    length: int  # T, steps of an episode
    charged: bool  # the environment charges the steps that an early end leaves out


@dataclass(frozen=True)
class FrontLearning:
    """Settings of C-MORL with learnt policies: `FrontLearning().search("markovia/TwoGoals-v0")`.

    The task takes `weights` and tells the shortfalls of its n objectives as costs, like `TwoGoalsEnv` and `Scalarised`. Where its episodes can
    terminate early it charges the missing steps, and says so by an attribute `length`, like `Scalarised(..., length=T)`.
    """

    policy: OnPolicy = field(
        default_factory=lambda: OnPolicy(
            num_envs=8, num_steps=125, num_env_steps=20_000, normalize_advantage="batch", solver=Descent(lr=1e-3, minibatch=250, anneal=False)
        )
    )  # one run of stage 1, for one preference
    step: float = 0.5  # of the grid of preferences
    rounds: int = 2  # of extensions
    picks: int = 2  # points extended per round, the least crowded first
    updates: int = 8  # iterations of an extension; each evaluates the policy and may enter the front
    beta: float = 0.9  # share of the other returns that an extension keeps
    t: float = 20.0  # sharpness of the barrier
    capacity: int = 200  # points kept
    episodes: int = 40  # whole ones with sampled actions, whose mean return is a policy's point

    def __post_init__(self) -> None:
        if self.policy.constraint is not None:
            raise ValueError("the stages set the constraint themselves; give a policy with constraint=None")
        if min(self.rounds, self.picks) < 0 or self.updates < 1:
            raise ValueError(f"rounds and picks must be >= 0 and updates >= 1, got {self.rounds}, {self.picks} and {self.updates}")
        if self.episodes < 1:
            raise ValueError(f"episodes must be >= 1, those that a policy is judged by, got {self.episodes}")

    def search(self, env_id: str, env_kwargs: dict[str, Any] | None = None, best: np.ndarray | None = None, seed: int = 0) -> LearntFront:
        """The front of a task; `best` (n,) is what a step pays at most, None: the environment's own attribute.

        Raises ValueError where an episode has no limit or terminates early without being charged for it.
        """
        task = self._task(env_id, dict(env_kwargs or {}), best)
        n = len(task.best)
        front = LearntFront(np.zeros((0, n)), ())
        for w in simplex_grid(n, self.step):
            run = self._run(task, w, Constraint((FREE,) * n, dual=FixedDual(0.0)), seed)
            while not run.finished:
                run.step()
            front = front.merged(*self._judged(run, task, seed), self.capacity)
        used: set[tuple[float, ...]] = set()
        for _ in range(self.rounds):
            order = np.argsort(-crowding_distance(front.points), kind="stable")
            chosen = [i for i in order if tuple(front.points[i]) not in used][: self.picks]
            used |= {tuple(front.points[i]) for i in chosen}
            for point, start in [(front.points[i], front.policies[i]) for i in chosen]:
                for objective in range(n):
                    front = front.merged(*self._extended(task, point, start, objective, seed), self.capacity)
        return front

    def _task(self, env_id: str, kwargs: dict[str, Any], best: np.ndarray | None) -> Task:
        from markovia.envs.control.vector import make_env

        env = make_env(env_id, **kwargs)
        limit = None if env.spec is None else env.spec.max_episode_steps
        charged = env.get_wrapper_attr("length") if env.has_wrapper_attr("length") else None
        best = np.asarray(env.get_wrapper_attr("best") if best is None else best, dtype=np.float64)
        env.close()
        if limit is None:
            raise ValueError(f"{env_id} has no max_episode_steps, so a floor under a return is no limit on a shortfall; register it with one")
        if charged is not None and charged != limit:
            raise ValueError(f"{env_id} has length={charged} but episodes of {limit} steps; length and max_episode_steps must be the same")
        return Task(env_id, kwargs, best, limit, charged is not None)

    def _run(self, task: Task, weights: np.ndarray, constraint: Constraint, seed: int) -> OnPolicyDriver:
        method = replace(self.policy, constraint=replace(constraint, mix="plain"))
        setup = build(task.env_id, method, seed, {**task.kwargs, "weights": weights.tolist()})
        return OnPolicyDriver(method, setup.agent, setup.collector, seed)

    def _judged(self, run: OnPolicyDriver, task: Task, seed: int) -> tuple[np.ndarray, tuple[dict[str, Tensor], ...]]:
        """Mean returns (1, n) of whole episodes with sampled actions, the same starts for every policy, and the policy's state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "front", run.iteration))
            found = evaluate_stepped(run.agent, task.env_id, self.episodes, seed, task.kwargs, deterministic=False, columns=True)
        shortest = min(found["lengths"])
        if shortest < task.length and not task.charged:
            raise ValueError(
                f"an episode of {task.env_id} ended after {shortest} of {task.length} steps, and nothing was charged for the rest: its shortfalls "
                f"would be small however little it earned; pass length={task.length} to the task (Scalarised(..., length={task.length}))"
            )
        returns = (task.length * task.best - np.array(found["costs"])).mean(0)
        return returns[None], ({k: v.detach().clone() for k, v in run.agent.state().items()},)

    def _extended(
        self, task: Task, point: np.ndarray, start: dict[str, Tensor], objective: int, seed: int
    ) -> tuple[np.ndarray, tuple[dict[str, Tensor], ...]]:
        """Every policy of one extension: max G_l by PPO, the other returns held by a barrier."""
        limits = extension_limits(point, objective, beta=self.beta, best=task.best, length=task.length)
        run = self._run(task, np.eye(len(task.best))[objective], Constraint(tuple(limits.tolist()), dual=BarrierDual(t=self.t)), seed)
        run.agent.load_state(start)
        found = []
        for _ in range(self.updates):
            run.step()
            found.append(self._judged(run, task, seed))
        return np.concatenate([f[0] for f in found]), tuple(f[1][0] for f in found)
