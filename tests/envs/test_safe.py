"""Tasks with a cost: published limits, costs recomputed from the state, exact optima, adapters; checkers and SB3 are in test_every_id.py."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env

import markovia.envs
from markovia.envs.exact.cmdps import cmdp_grid, cmdp_two_state
from markovia.envs.registry import kind_of
from markovia.envs.safe import FromSafetyGymnasium, ToSafetyGymnasium
from markovia.envs.safe.cost import checked_cost
from markovia.envs.safe.point_model import pseudo_lidar, scatter

ROOT = Path(__file__).resolve().parents[2]
ROBOTS = {  # speed limit, observation size, action size
    "Hopper": (0.7402, 11, 3),
    "Walker2d": (2.3415, 17, 6),
    "HalfCheetah": (3.2096, 17, 6),
    "Swimmer": (0.2282, 8, 2),
    "Ant": (2.6222, 27, 8),
    "Humanoid": (1.4149, 348, 17),
}
VELOCITY = [f"markovia/Safe{robot}Velocity-v0" for robot in ROBOTS]
POINT = ["markovia/SafePointGoal-v0", "markovia/SafePointCircle-v0", "markovia/SafePointRun-v0"]
LIGHT = ["markovia/SafePendulum-v0", "markovia/SafeGrid-v0", "markovia/SafeTwoState-v0"]
IDS = [*VELOCITY, *POINT, *LIGHT]


def make(env_id, **kwargs):
    if env_id not in LIGHT:
        pytest.importorskip("mujoco")
    return gym.make(env_id, **kwargs)


@pytest.mark.parametrize("env_id", IDS)
def test_cost_and_flags_are_plain_and_episodes_repeat(env_id):
    env, found = make(env_id), []
    assert (kind_of(env_id) == "tabular") == (env_id in LIGHT[1:])
    for _ in range(2):
        obs, info = env.reset(seed=3)
        env.action_space.seed(3)
        rows = [obs]
        assert "cost" not in info
        for _ in range(5):
            obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert type(info["cost"]) is float and type(reward) is float and type(terminated) is bool and type(truncated) is bool
            rows.append(np.append(obs, [reward, info["cost"]]))
        found.append(np.concatenate([np.ravel(r) for r in rows]))
    np.testing.assert_array_equal(*found)
    assert env.unwrapped.cost_limit == {"markovia/SafeGrid-v0": 0.5, "markovia/SafeTwoState-v0": 5.0}.get(env_id, 25.0)
    env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_docs_have_gymnasiums_headings_and_the_spec_is_plain_data(env_id):
    env = make(env_id)
    doc = type(env.unwrapped).__doc__
    for heading in ("Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End", "Arguments"):
        assert f"## {heading}" in doc
    assert 'info["cost"]' in doc and "cost_limit" in doc and not any("{" in line for line in doc.splitlines())
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert type(again.unwrapped) is type(env.unwrapped)


@pytest.mark.parametrize("robot", ROBOTS)
def test_velocity_cost_is_the_indicator_of_the_published_speed(robot):
    limit, num_obs, num_actions = ROBOTS[robot]
    env = make(f"markovia/Safe{robot}Velocity-v0")
    assert env.unwrapped.max_speed == limit and env.observation_space.shape == (num_obs,) and env.action_space.shape == (num_actions,)
    plain = gym.make(f"{robot}-v5", **env.unwrapped.settings)
    plain.action_space.seed(0)
    expected, speeds = [plain.reset(seed=0)[0]], []
    for _ in range(30):
        obs, reward, terminated, _, info = plain.step(plain.action_space.sample())
        speeds.append(np.sqrt(info["x_velocity"] ** 2 + info["y_velocity"] ** 2) if robot in ("Ant", "Humanoid") else info["x_velocity"])
        expected.append((obs, reward, terminated))
        if terminated:
            break
    between = float(np.median(speeds))  # random actions lie on both sides of it
    env = make(f"markovia/Safe{robot}Velocity-v0", max_speed=between)
    env.action_space.seed(0)
    np.testing.assert_array_equal(env.reset(seed=0)[0], expected[0])
    for (obs, reward, terminated), speed in zip(expected[1:], speeds, strict=True):
        found = env.step(env.action_space.sample())
        np.testing.assert_array_equal(found[0], obs)
        assert found[1:3] == (reward, terminated) and found[4]["cost"] == float(speed > between)


def test_velocity_env_pickles_with_its_limit_and_builds_quietly(tmp_path):
    pytest.importorskip("mujoco")
    env = make("markovia/SafeHopperVelocity-v0", max_speed=0.1, cost_limit=5.0).unwrapped
    again = pickle.loads(pickle.dumps(env))
    assert again.max_speed == 0.1 and again.cost_limit == 5.0
    code = f"import os; os.chdir({str(tmp_path)!r}); import gymnasium, markovia; gymnasium.make('markovia/SafeHalfCheetahVelocity-v0').reset()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert "settotalmass" not in out.stdout + out.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("env_id", POINT)
def test_point_robots_are_copied_within_an_episode(env_id):
    env = make(env_id).unwrapped
    env.reset(seed=0)
    env.step(np.ones(2))
    again = copy.deepcopy(env)
    for _ in range(3):
        for a, b in zip(env.step(np.array([1.0, 0.3])), again.step(np.array([1.0, 0.3])), strict=True):
            np.testing.assert_equal(a, b)


def test_pendulum_costs_above_two_radians_a_second_and_the_limit_binds():
    env, totals = make("markovia/SafePendulum-v0"), []
    env.action_space.seed(0)
    for seed in range(10):
        env.reset(seed=seed)
        done, total = False, 0.0
        while not done:
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
            assert info["cost"] == float(abs(env.unwrapped.state[1]) > 2.0)
            done, total = terminated or truncated, total + info["cost"]
        totals.append(total)
    assert np.mean(totals) > 25.0


# -- the point robot -------------------------------------------------------------------------------------------------------------------


def test_pseudo_lidar_by_hand():
    # 8 sectors of 45 degrees, reach 2; a target at distance 0.5 and 54 degrees: sector 1.2, closeness 0.75.
    angle = np.deg2rad(54.0)
    out = pseudo_lidar(np.array([1.0, 1.0]), 0.0, np.array([1.0, 1.0]) + 0.5 * np.array([np.cos(angle), np.sin(angle)]), 2.0, bins=8)
    np.testing.assert_allclose(out, [0.75 * 0.8, 0.75, 0.75 * 0.2, 0, 0, 0, 0, 0], atol=1e-12)
    # Turning the robot by 90 degrees moves every reading two sectors back; out of reach reads 0; the nearest target of a sector counts.
    turned = pseudo_lidar(np.array([1.0, 1.0]), np.pi / 2, np.array([1.0, 1.0]) + 0.5 * np.array([np.cos(angle), np.sin(angle)]), 2.0, bins=8)
    np.testing.assert_allclose(turned, np.roll(out, -2), atol=1e-12)
    many = pseudo_lidar(np.zeros(2), 0.0, np.array([[3.0, 0.1], [1.0, 0.4], [0.5, 0.2]]), 2.0)
    np.testing.assert_allclose(many, pseudo_lidar(np.zeros(2), 0.0, np.array([[0.5, 0.2]]), 2.0))


def test_layouts_keep_apart_and_an_impossible_one_is_taught():
    rng = np.random.default_rng(0)
    for _ in range(20):
        keep = [0.4, 0.305, *[0.18] * 8]
        at = scatter(rng, keep, 1.5)
        for i in range(10):
            assert (np.abs(at[i]) <= 1.5 - keep[i]).all()
            for j in range(i):
                assert np.hypot(*(at[i] - at[j])) >= keep[i] + keep[j]
    with pytest.raises(ValueError, match="don't fit"):
        scatter(rng, [0.9, 0.9], 1.0)


def steer(env, wanted):
    """Force and turn that bring the velocity towards `wanted` (m/s), pushing backwards where that is nearer."""
    error = wanted - env.velocity
    angle = (np.arctan2(error[1], error[0]) - env.heading + np.pi) % (2 * np.pi) - np.pi
    turn = angle - np.sign(angle) * np.pi if abs(angle) > np.pi / 2 else angle
    return np.array([np.clip(3 * np.hypot(*error), 0, 1) * np.cos(angle), np.clip(3 * turn, -1, 1)], dtype=np.float32)


def towards_goal(env):
    way = env.goal - env.position
    return 2.0 * way / np.hypot(*way)


def around_hazards(env):
    """0.8 m/s to the goal, without the part of the velocity that leads into a hazard nearer than 0.75 m."""
    wanted = 0.4 * towards_goal(env)
    for hazard in env.hazards:
        away = env.position - hazard
        distance = np.hypot(*away)
        if distance < 0.75:
            out = away / distance
            side = np.array([-out[1], out[0]])
            strength = max(0.0, -wanted @ out) * np.clip((0.75 - distance) / 0.3, 0, 1)
            wanted = wanted + strength * (out + 0.9 * (np.sign(side @ wanted) or 1.0) * side) + 4 * max(0.0, 0.45 - distance) * out
    return wanted


def drive(policy, seed):
    env, done, total, cost = make("markovia/SafePointGoal-v0"), False, 0.0, 0.0
    env.reset(seed=seed)
    point = env.unwrapped
    assert point._cost() == 0.0  # no layout starts in a hazard
    while not done:
        goal = point.goal.copy()
        before = np.hypot(*(goal - point.position))
        _, reward, terminated, truncated, info = env.step(steer(point, policy(point)))
        after = np.hypot(*(goal - point.position))
        assert reward == pytest.approx(before - after + (after <= 0.3)) and info["goal_met"] == (after <= 0.3)
        assert info["cost"] == any(np.hypot(*(h - point.position)) <= 0.2 for h in point.hazards)
        done, total, cost = terminated or truncated, total + reward, cost + info["cost"]
    return total, cost


def test_goal_pays_a_seeker_and_costs_it_unless_it_drives_around():
    seeker = np.mean([drive(towards_goal, s) for s in range(3)], axis=0)
    careful = np.mean([drive(around_hazards, s) for s in range(3)], axis=0)
    assert seeker[0] > 10 and seeker[1] > 30
    assert careful[0] > 5 and careful[1] < 10


def test_circle_reward_and_strip_by_hand():
    env = make("markovia/SafePointCircle-v0").unwrapped
    env.reset(seed=0)
    for at, velocity, reward, cost in [
        ((1.5, 0.0), (0.0, 2.0), 0.1 * 2.0, 1.0),  # on the circle, counter-clockwise, outside of |x| <= 1.125
        ((0.0, -1.0), (1.0, 0.0), 0.1 * 1.0 / 1.5, 0.0),
        ((0.0, 1.0), (1.0, 0.0), -0.1 * 1.0 / 1.5, 0.0),  # clockwise
        ((0.0, 1.2), (1.0, 1.0), -0.1 * 1.0 / 1.3, 0.0),  # the radial part pays nothing
    ]:
        env.data.qpos[:2], env.data.qvel[:2] = at, velocity
        assert env._reward()[0] == pytest.approx(reward) and env._cost() == cost
    two = make("markovia/SafePointCircle-v0", level=2).unwrapped
    two.reset(seed=0)
    two.data.qpos[:2] = (0.0, 1.2)
    assert two._cost() == 1.0


def test_run_pays_sixty_per_metre_and_costs_outside_the_lane():
    env = make("markovia/SafePointRun-v0").unwrapped
    env.reset(seed=0)
    x, total, costs = 0.0, 0.0, []
    for _ in range(150):
        obs, reward, _, _, info = env.step(steer(env, np.array([1.0, 0.4])))
        assert info["cost"] == (abs(env.position[1]) > 0.5) and obs[12] == env.position[1]
        total, x = total + reward, env.position[0]
        costs.append(info["cost"])
    assert total == pytest.approx(60 * x, rel=1e-3) and 0 < sum(costs) < 150


@pytest.mark.parametrize("env_id", [*POINT, VELOCITY[0]])
def test_renders_without_a_window(env_id):
    pytest.importorskip("mujoco")
    code = (
        "import gymnasium, markovia\n"
        f"env = gymnasium.make({env_id!r}, render_mode='rgb_array')\n"
        "env.reset(seed=0)\n"
        "try:\n    frame = env.render()\n"
        "except Exception as error:\n    print('no renderer', error)\n"
        "else:\n    print(frame.shape, frame.std() > 5)\n"
    )
    variables = {"PYTHONPATH": str(ROOT), "PATH": "", "MUJOCO_GL": "egl"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    if "no renderer" in run.stdout or "egl" in run.stderr.lower():
        pytest.skip(f"this machine has no EGL: {run.stdout[-200:]}{run.stderr[-200:]}")
    assert run.stdout.strip() == "(480, 480, 3) True", run.stderr


# -- exact problems --------------------------------------------------------------------------------------------------------------------

GRID = {0.8: (0.768090, 0.300297), 0.5: (0.678001, 0.300297), 0.3: (0.617942, 0.300297), 0.1: (0.557882, 0.300297), 0.05: (0.542841, 0.3112)}


@pytest.mark.parametrize("limit", GRID)
def test_grid_optimum_is_the_reference_value_and_strong_duality_holds(limit):
    problem = cmdp_grid(limit)
    solution = problem.solve()
    value, multiplier = GRID[limit]
    assert solution.value == pytest.approx(value, abs=1e-6) and solution.multipliers[0] == pytest.approx(multiplier, abs=5e-5)
    assert solution.costs[0] == pytest.approx(limit, abs=1e-9)
    dual = problem.lagrangian(solution.multipliers).policy_iteration()[1] @ problem.mdp.rho + solution.multipliers[0] * limit
    assert dual == pytest.approx(solution.value, abs=1e-8)
    visited = solution.occupancy.sum(-1) > 1e-9
    assert ((solution.policy[visited] > 1e-6).sum(-1) > 1).sum() == 1  # randomises in one state


def test_grid_env_realises_rewards_and_costs_of_its_cmdp():
    env = make("markovia/SafeGrid-v0")
    problem, rng = env.unwrapped.oracle, np.random.default_rng(0)
    policy = problem.mdp.uniform_policy()
    returns, costs = [], []
    for seed in range(400):
        env.reset(seed=seed)
        done, t, g, c = False, 0, 0.0, 0.0
        while not done:
            _, reward, terminated, truncated, info = env.step(rng.integers(4))
            g, c, t, done = g + 0.95**t * reward, c + 0.95**t * info["cost"], t + 1, terminated or truncated
        returns.append(g)
        costs.append(c)
    tail = 0.95**60 / 0.05  # what the cut leaves out, at most
    for sample, exact in ((returns, problem.mdp.J(policy)), (costs, problem.costs(policy)[0])):
        assert abs(np.mean(sample) - exact) < 4 * np.std(sample) / 20 + tail * 0.1
    unconstrained = cmdp_grid(9.0).solve()
    assert unconstrained.value == pytest.approx(0.835455, abs=1e-6) and unconstrained.costs[0] > 1.0363
    with pytest.raises(ValueError, match="reset"):
        while True:
            env.unwrapped.step(1)


def test_two_state_multiplier_is_one_for_every_limit():
    for limit in (1.0, 5.0, 9.0):
        solution = cmdp_two_state(limit).solve()
        assert solution.value == pytest.approx(limit) and solution.multipliers[0] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no policy meets"):
        cmdp_two_state(-1.0).solve()


# -- adapters and bad input -------------------------------------------------------------------------------------------------------------


def test_adapters_round_trip():
    plain, there_and_back = make(LIGHT[0]), FromSafetyGymnasium(ToSafetyGymnasium(make(LIGHT[0])), cost_limit=10.0)
    assert there_and_back.cost_limit == 10.0
    np.testing.assert_array_equal(plain.reset(seed=1)[0], there_and_back.reset(seed=1)[0])
    for _ in range(5):
        a, b = plain.step(np.array([1.0], np.float32)), there_and_back.step(np.array([1.0], np.float32))
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:] == b[1:]
    gymnasium_check_env(there_and_back, skip_render_check=True)
    assert ToSafetyGymnasium(plain).step(np.array([1.0], np.float32))[2] == plain.unwrapped.step(np.array([1.0], np.float32))[4]["cost"]


class SixValues:
    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
    cost: object = 1.0

    def reset(self, seed=None, options=None):
        return 0, {}

    def step(self, action):
        return 0, 1, self.cost, False, False, {"cost_sum": 2.0}

    def render(self):
        return None

    def close(self):
        return None


def test_bad_costs_and_limits_are_taught():
    six = SixValues()
    adapted = FromSafetyGymnasium(six)
    adapted.reset()
    assert adapted.step(0)[1:] == (1.0, False, False, {"cost_sum": 2.0, "cost": 1.0})
    for bad, message in ((float("nan"), "finite"), (-1.0, ">= 0"), (None, "one number")):
        six.cost = bad
        with pytest.raises(ValueError, match=message):
            adapted.step(0)
    five = FromSafetyGymnasium(gym.make("CartPole-v1"))
    five.reset()
    with pytest.raises(ValueError, match="five-value"):
        five.step(0)
    with pytest.raises(ValueError, match="no 'cost'"):
        env = ToSafetyGymnasium(gym.make("CartPole-v1"))
        env.reset()
        env.step(0)
    with pytest.raises(ValueError, match="cost_limit must be >= 0"):
        make(LIGHT[0], cost_limit=-1.0)
    with pytest.raises(ValueError, match="cost_limit must be >= 0"):
        make("markovia/SafeGrid-v0", limit=-0.1)
    with pytest.raises(ValueError, match="level must be 1 or 2"):
        make(POINT[0], level=3)
    assert checked_cost(np.float32(2.0)) == 2.0


def test_importing_the_folder_loads_neither_torch_nor_mujoco():
    code = "import sys, markovia.envs.safe, markovia.envs.safe.tabular; assert not {'torch', 'mujoco'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert "markovia/SafePointGoal-v0" in gym.registry and markovia.envs is not None
