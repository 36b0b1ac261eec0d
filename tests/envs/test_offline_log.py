"""What the step log writes down, against environments that say themselves what they did."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

import markovia  # noqa: F401  (registers the ids)
from markovia.envs.offline import About, check_transitions
from markovia.envs.offline.log import StepLog, Steps, as_transitions, record, single_space


class Counting(gym.Env):
    """obs = (seed, t); ends after seed % 5 + 2 steps, by termination when the seed is odd; the reward is t."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def _obs(self):
        return np.array([self.seed, self.t], dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed = seed if seed is not None else getattr(self, "seed", 0) + 100
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        over = self.t == self.seed % 5 + 2
        return self._obs(), float(self.t), over and self.seed % 2 == 1, over and self.seed % 2 == 0, {}


class Constant:
    """The same action everywhere."""

    def __init__(self, n, value):
        self.action = np.full((n, 1), value, dtype=np.float32)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return self.action, state


ABOUT = About("counting", observation_space=Counting.observation_space, action_space=Counting.action_space)


def play(log, steps):
    rng = np.random.default_rng(0)
    return [log.step(rng.uniform(-1, 1, (log.num_envs, 1)).astype(np.float32)) for _ in range(steps)]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_every_step_is_logged_with_its_true_successor(mode):
    log = StepLog(SyncVectorEnv([Counting] * 3, autoreset_mode=mode))
    log.reset(seed=[0, 1, 2])
    play(log, 12)
    data = as_transitions(log.take(), ABOUT)
    assert check_transitions(data).faults == ()
    assert data.obs.dtype == np.float32 and data.about.observation_space.dtype == np.float32
    first, end = data.bounds()
    for a, b in zip(first, end, strict=True):
        seed = int(data.obs[a, 0])
        whole = b - a == seed % 5 + 2
        np.testing.assert_array_equal(data.obs[a:b, 1], np.arange(b - a))
        np.testing.assert_array_equal(data.next_obs[a:b], np.stack([np.full(b - a, seed), np.arange(1, b - a + 1)], axis=1))
        np.testing.assert_array_equal(data.reward[a:b], np.arange(1, b - a + 1))
        assert data.terminated[b - 1] == (whole and seed % 2 == 1) and data.truncated[b - 1] == (not data.terminated[b - 1])
    # without the steps that only reset, 12 steps of an episode of length n give 12 rows; with them one row less per episode
    lost = 0 if mode == "SameStep" else sum(1 for a, b in zip(first, end, strict=True) if b - a == data.obs[a, 0] % 5 + 2)
    assert abs(len(data) + lost - 36) <= (0 if mode == "SameStep" else 3)


def test_a_reset_from_outside_truncates_and_steps_can_be_saved():
    log = StepLog(SyncVectorEnv([Counting] * 2, autoreset_mode="SameStep"))
    assert log.take() is None
    log.reset(seed=[3, 4])  # 5 and 6 steps long
    play(log, 2)
    kept = log.take()
    log.reset(seed=[8, 9])
    play(log, 3)
    steps = Steps.from_arrays(kept.arrays())
    data = as_transitions(steps, ABOUT)
    assert data.lengths().tolist() == [2, 2] and data.truncated.tolist() == [False, True] * 2
    from markovia.envs.offline.log import join

    both = as_transitions(join([steps, log.take()]), ABOUT)
    assert both.obs[both.bounds()[0], 0].tolist() == [3, 8, 4, 9] and both.lengths().tolist() == [2, 3, 2, 3]
    with pytest.raises(ValueError, match="no steps"):
        join([])


def test_recorded_episodes_are_those_of_their_seeds():
    venv = SyncVectorEnv([Counting] * 3, autoreset_mode="SameStep")
    waves = []
    act = lambda wave: waves.append(wave) or Constant(3, 0.5)  # noqa: E731
    seen = []
    data = record(venv, act, ABOUT, seed=10, num_steps=20, progress=lambda steps, mean: seen.append((steps, mean)))
    seeds = data.obs[data.bounds()[0], 0].tolist()
    assert seeds == list(range(10, 10 + len(seeds)))
    np.testing.assert_array_equal(data.lengths(), [s % 5 + 2 for s in seeds])
    assert data.lengths()[:-1].sum() < 20 <= len(data) and data.complete().all()
    assert waves == list(range(len(seen))) and seen[-1][0] >= 20
    assert record(venv, act, ABOUT, seed=10, episodes=4).num_episodes == 4


def test_dictionary_observations_and_spaces():
    class Named(Counting):
        observation_space = spaces.Dict({"x": Counting.observation_space})

        def _obs(self):
            return {"x": super()._obs()}

    about = About("named", observation_space=Named.observation_space, action_space=Named.action_space)
    venv = SyncVectorEnv([Named] * 2, autoreset_mode="SameStep")
    data = record(venv, lambda wave: Constant(2, 0.0), about, seed=0, episodes=3)
    assert data.obs["x"].dtype == np.float32 and data.about.observation_space["x"].dtype == np.float32
    np.testing.assert_array_equal(data.next_obs["x"][:2], [[0, 1], [0, 2]])
    steps = Steps({"x": np.ones((1, 1))}, {"x": np.ones((1, 1))}, *(np.ones(1) for _ in range(6)))
    assert list(Steps.from_arrays(steps.arrays()).obs) == ["x"]
    assert single_space(spaces.Discrete(3)) == spaces.Discrete(3)


def test_a_log_changes_nothing_for_a_collector():
    plain = gym.make_vec("Pendulum-v1", 2, "sync", vector_kwargs={"autoreset_mode": "SameStep"})
    log = StepLog(gym.make_vec("Pendulum-v1", 2, "sync", vector_kwargs={"autoreset_mode": "SameStep"}))
    np.testing.assert_array_equal(plain.reset(seed=1)[0], log.reset(seed=1)[0])
    action = np.ones((2, 1), dtype=np.float32)
    for _ in range(3):
        for a, b in zip(plain.step(action)[:4], log.step(action)[:4], strict=True):
            np.testing.assert_array_equal(a, b)
    assert log.take().action.shape == (6, 1)


# -- the maze controller --------------------------------------------------------------------------------------------------------------

U_MAZE = [[1, 1, 1, 1, 1], [1, "r", 0, 0, 1], [1, 1, 1, 0, 1], [1, "g", 0, 0, 1], [1, 1, 1, 1, 1]]


def test_maze_controller_takes_the_shortest_way():
    from markovia.envs.offline.pointmaze import MazeController

    controller = MazeController(U_MAZE)
    cell, goal, way = 6, 16, [6]
    while cell != goal:
        cell = int(controller.next[cell, goal])
        way.append(cell)
    assert way == [6, 7, 8, 13, 18, 17, 16]  # around the U
    assert controller.next[6, 6] == 6 and controller.next[6, 12] == 6  # there, and a wall
    middles = controller.middle(np.arange(25))
    np.testing.assert_array_equal(controller.cell(middles), np.arange(25))
    np.testing.assert_array_equal(middles[[0, 12]], [[-2.0, 2.0], [0.0, 0.0]])


def test_maze_controller_pulls_to_the_waypoint():
    from markovia.envs.offline.pointmaze import MazeController

    def obs(position, velocity, goal):
        return {"observation": np.array([[*position, *velocity]]), "desired_goal": np.array([goal])}

    noisy = MazeController(U_MAZE, noise=0.5, seed=1)
    start, goal = (-1.0, 1.0), (-1.0, -1.0)
    # in the goal's cell: 10 (0.05, 0) - (0.2, -0.1)
    np.testing.assert_allclose(noisy.predict(obs((-1.05, -1.0), (0.2, -0.1), goal), deterministic=True)[0], [[0.3, 0.1]], atol=1e-6)
    np.testing.assert_allclose(noisy.predict(obs(start, (0, 0), goal), deterministic=True)[0], [[1.0, 0.0]])  # right, not down through the wall
    noisy.reseed(3)
    a = noisy.predict(obs((-1.0, -1.0), (0, 0), goal))[0]
    noisy.reseed(3)
    np.testing.assert_array_equal(noisy.predict(obs((-1.0, -1.0), (0, 0), goal))[0], a)
    assert a.any() and (np.abs(a) <= 1).all() and a.dtype == np.float32


def test_maze_controller_solves_the_maze(monkeypatch):
    pytest.importorskip("gymnasium_robotics")
    from markovia.envs.control.vector import make_vec
    from markovia.envs.offline.pointmaze import maze_controller

    env_id = "gymnasium_robotics:PointMaze_UMaze-v3"
    venv, controller = make_vec(env_id, 8, vectorization="sync", seed=0), maze_controller(env_id)
    obs, _ = venv.reset(seed=0)
    total = np.zeros(8)
    for _ in range(299):
        obs, reward, *_ = venv.step(controller.predict(obs)[0])
        total += reward
    assert (total > 0).all()  # reached, and stayed for a while
    with pytest.raises(ValueError, match="no maze_map"):
        maze_controller("Pendulum-v1")
