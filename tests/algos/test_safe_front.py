"""c-morl/ppo: tasks that pay several rewards, and a front of learnt policies."""

import json
import sys
import types
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from markovia.algos.safe.constraint import Constraint
from markovia.algos.safe.dual import FixedDual
from markovia.algos.safe.front import FREE, FrontLearning, LearntFront, extension_limits
from markovia.algos.safe.methods import SAFE
from markovia.algos.setup import build
from markovia.envs.control.multi_objective import Scalarised, TwoGoalsEnv, from_mo_gymnasium

torch.set_num_threads(1)
ENV = "markovia/TwoGoals-v0"
UNEVEN = "test/Uneven-v0"


class Vector(gym.Env):
    """mo-gymnasium's interface: a reward of two numbers, and what it can be."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    reward_space = spaces.Box(np.array([-5.0, 0.0], np.float32), np.array([0.0, 2.0], np.float32))

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), np.array([-1.0, float(action[0])]), False, False, {}


class Uneven(Vector):
    """Pays (0.5, 1) a step; an episode ends after 5 steps or at its limit of 20, with equal chance: 12.5 in the mean."""

    reward_space = spaces.Box(np.zeros(2, np.float32), np.array([1.0, 2.0], np.float32))

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        out = super().reset(seed=seed)
        self.ends, self.steps = self.np_random.random() < 0.5, 0
        return out

    def step(self, action: Any) -> Any:
        self.steps += 1
        return np.zeros(1, np.float32), np.array([0.5, 1.0]), bool(self.ends and self.steps == 5), False, {}


def uneven(weights: Any = (1.0, 1.0), length: int | None = None) -> Scalarised:
    return Scalarised(Uneven(), weights, length=length)


gym.register("test/Vector-v0", Vector)
gym.register(UNEVEN, uneven, max_episode_steps=20)
gym.register("test/EndlessGoals-v0", uneven)


@pytest.mark.check("value", "c-morl/ppo")
def test_one_reward_of_several_by_hand(monkeypatch):
    env = Scalarised(Vector(), [0.5, 2.0])
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array([1.5]))
    assert reward == 0.5 * -1.0 + 2.0 * 1.5 and info["rewards"].tolist() == [-1.0, 1.5] and info["cost"].tolist() == [1.0, 0.5]
    with pytest.raises(ImportError, match="pip install mo-gymnasium"):
        monkeypatch.setitem(sys.modules, "mo_gymnasium", None)
        from_mo_gymnasium("deep-sea-treasure-v0", [1.0, 0.0])
    monkeypatch.setitem(sys.modules, "mo_gymnasium", types.SimpleNamespace(make=lambda task, **kwargs: Vector()))
    assert from_mo_gymnasium("any", [1.0, 1.0]).best.tolist() == [0.0, 2.0]
    # T = 10, best (1, 2), returns (6, -4), beta 0.5: floor -6 of the second, so its shortfall is at most 26; the first is free
    limits = extension_limits(np.array([6.0, -4.0]), 0, beta=0.5, best=np.array([1.0, 2.0]), length=10)
    assert limits.tolist() == [FREE, 26.0]


def test_a_preference_is_in_the_spec():
    env = Scalarised(gym.make("test/Vector-v0", disable_env_checker=True), np.array([0.5, 2.0]), best=np.array([1.0, 3.0]), length=7)
    again = gym.make(env.spec, disable_env_checker=True)
    assert isinstance(again, Scalarised) and again.length == 7
    assert again.weights.tolist() == [0.5, 2.0] and again.best.tolist() == [1.0, 3.0]
    json.dumps(env.spec.additional_wrappers[-1].kwargs)  # plain data, so that Minari can store it


def test_a_charged_end_makes_the_costs_what_the_return_lacks():
    env = uneven(length=20)
    for seed in range(6):  # an end after 5 steps, and none
        env.reset(seed=seed)
        costs, returns, ended = np.zeros(2), np.zeros(2), False
        for _ in range(20):
            _, _, ended, _, info = env.step(np.zeros(1))
            costs, returns = costs + info["cost"], returns + info["rewards"]
            if ended:
                break
        assert ended == env.unwrapped.ends and returns.tolist() == ([2.5, 5.0] if ended else [10.0, 20.0])
        assert costs.tolist() == (20 * env.best - returns).tolist()
        assert info["cost"].tolist() == ([15.5, 31.0] if ended else [0.5, 1.0])  # of the end: 15 steps of (1, 2) are missing
    last = uneven(length=5)
    last.reset(seed=next(s for s in range(9) if np.random.default_rng(s).random() < 0.5))
    for _ in range(5):
        _, _, ended, _, info = last.step(np.zeros(1))
    assert ended and info["cost"].tolist() == [0.5, 1.0]  # nothing is missing


class Cut(Vector):
    """Cuts its episodes off at once."""

    def step(self, action: Any) -> Any:
        return *super().step(np.zeros(1))[:3], True, {}


def cut_early() -> None:
    env = Scalarised(Cut(), [1.0, 1.0], length=5)
    env.reset()
    env.step(np.zeros(1))


def search(**env_kwargs: Any) -> LearntFront:
    policy = replace(override().policy, num_envs=4, num_steps=10, num_env_steps=40)
    return FrontLearning(policy=policy, step=1.0, rounds=0, episodes=200).search(UNEVEN, env_kwargs)


def test_a_policy_is_judged_by_whole_episodes():
    front = search(length=20)  # the batches of 10 steps hold no long episode
    steps = front.points[:, 0] / 0.5
    assert np.abs(steps - 12.5).max() < 3 * 7.5 / 200**0.5 and (front.points[:, 1] == 2 * front.points[:, 0]).all()
    with pytest.raises(ValueError, match="length=20"):
        search()


def test_judging_leaves_the_training_alone():
    learning, seen = override(), []
    task = learning._task(ENV, {}, None)
    for judged in (False, True):
        torch.manual_seed(0)
        run = learning._run(task, np.full(2, 0.5), Constraint((FREE, FREE), dual=FixedDual(0.0)), 0)
        run.step()
        before = torch.get_rng_state()
        found = [learning._judged(run, task, 0)[0] for _ in range(2 * judged)]
        assert torch.equal(torch.get_rng_state(), before) and all((f == found[0]).all() for f in found)
        seen.append(run.step())
    assert json.dumps(seen[0]) == json.dumps(seen[1])


def test_two_goals_pay_what_the_docs_say():
    env = TwoGoalsEnv(weights=(1.0, 0.0))
    check_env(gym.make(ENV).unwrapped, skip_render_check=True)
    env.reset(seed=0)
    for _ in range(20):
        _, reward, _, _, info = env.step(np.clip((TwoGoalsEnv.GOALS[0] - env.position) / 0.2, -1.0, 1.0))
    assert reward == pytest.approx(1.0, abs=1e-6) and info["rewards"] == pytest.approx([1.0, 0.0], abs=1e-6)
    assert (info["cost"] == 1.0 - info["rewards"]).all()
    before = env.position
    assert env.step([5.0, 0.0])[0][0] == pytest.approx(before[0] + 0.2)  # clipped to the Box


@pytest.mark.check("limit", "c-morl/ppo")
@pytest.mark.check("invariance", "c-morl/ppo")
def test_a_front_keeps_what_nothing_dominates():
    policies = tuple({"w": np.array(i)} for i in range(4))
    points = np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.4], [0.6, 0.6]])
    front = LearntFront(np.zeros((0, 2)), ()).merged(points, policies, 10)
    assert front.points.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.6, 0.6]] and front.policies == (policies[0], policies[1], policies[3])
    assert front.best(np.array([0.5, 0.5])) is policies[3] and front.best(np.array([0.9, 0.1])) is policies[0]
    order = [3, 0, 2, 1]
    again = LearntFront(np.zeros((0, 2)), ()).merged(points[order], tuple(policies[i] for i in order), 10)
    found = front.metrics(np.zeros(2))
    assert again.metrics(np.zeros(2)) == pytest.approx(found) and found["hypervolume"] == pytest.approx(0.36)
    assert len(front.merged(points, policies, 2).points) == 2  # the ends stay
    # beta 0: an extension of positive returns asks only that they stay above 0, beta 1 that nothing is lost
    assert extension_limits(np.array([2.0, 3.0]), 0, beta=0.0, best=np.ones(2), length=5)[1] == 5.0
    assert extension_limits(np.array([2.0, 3.0]), 0, beta=1.0, best=np.ones(2), length=5)[1] == 2.0


def test_a_small_search_finds_both_ends():
    small = override(rounds=1, picks=1, updates=2)
    front = small.search(ENV)
    assert front.points.shape[1] == 2 and len(front.points) == len(front.policies) >= 2
    assert front.points[:, 0].max() > front.points[:, 0].min() + 1.0
    agent = build(ENV, small.policy, 0).agent
    named = front.best(np.array([1.0, 0.0]))
    assert named.keys() >= {k for k in agent.state() if k.startswith("policy")}


def override(**changes: Any) -> FrontLearning:
    row = SAFE["c-morl/ppo"].value
    return replace(row, policy=replace(row.policy, num_env_steps=3000, num_steps=75, num_envs=4), **changes)


@pytest.mark.check("bad_input", "c-morl/ppo")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TwoGoalsEnv(weights=(1.0,)), "2 numbers >= 0"),
        (lambda: TwoGoalsEnv(weights=(-1.0, 1.0)), "2 numbers >= 0"),
        (lambda: Scalarised(TwoGoalsEnv(), [1.0, 1.0]), "no Box as reward_space"),
        (lambda: Scalarised(Vector(), [1.0, 1.0], best=[np.inf, 1.0]), "finite numbers"),
        (lambda: Scalarised(Vector(), [1.0, 1.0], best=[-2.0, 2.0]).step(np.zeros(1)), "raise best"),
        (lambda: FrontLearning(updates=0), "updates >= 1"),
        (lambda: FrontLearning(policy=replace(FrontLearning().policy, constraint=Constraint())), "stages set the constraint"),
        (lambda: override(rounds=0).search(ENV, best=np.ones(3)), r"column\(s\)|weights must be"),
        (lambda: FrontLearning(episodes=0), "episodes must be"),
        (lambda: override(rounds=0).search("test/EndlessGoals-v0"), "no max_episode_steps"),
        (cut_early, "cut an episode off after 1 steps"),
        (lambda: search(length=30), "length=30 but episodes of 20 steps"),
        (lambda: Scalarised(Vector(), [1.0, 1.0], length=0), "length must be"),
        (lambda: Scalarised(Vector(), [1.0, 1.0], best=[-1.0, 2.0], length=5), "best >= 0"),
    ],
)
def test_bad_input_is_taught(call, message):
    with pytest.raises(ValueError, match=message):
        call()
