"""The MuJoCo batch against Gymnasium's own environments, step by step, with resets."""

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from markovia.envs.control.mujoco_batch import TASKS, MujocoVectorEnv, default_threads, has_batch
from markovia.envs.control.vector import make_vec

pytest.importorskip("mujoco")
pytestmark = pytest.mark.skipif(not has_batch(), reason="needs mujoco >= 3.17")

# Away from every default, so that a constant written into a formula would show.
COST = {"forward_reward_weight": 0.7, "ctrl_cost_weight": 0.3, "reset_noise_scale": 0.02, "exclude_current_positions_from_observation": False}
CHANGED = {
    "HalfCheetah-v5": COST,
    "Hopper-v5": {**COST, "healthy_reward": 2.5, "healthy_z_range": (0.9, 3.0), "healthy_state_range": (-2.0, 2.0)},
    "Walker2d-v5": {**COST, "healthy_reward": 2.5, "healthy_z_range": (1.0, 1.5), "frame_skip": 2},
    "Swimmer-v5": COST,
    "Ant-v5": {**COST, "contact_cost_weight": 0.1, "contact_force_range": (-0.5, 2.0), "main_body": 4, "include_cfrc_ext_in_observation": False},
    "Humanoid-v5": {**COST, "contact_cost_weight": 1e-3, "contact_cost_range": (0.1, 2.0), "include_cvel_in_observation": False},
    "Reacher-v5": {"reward_dist_weight": 2.0, "reward_control_weight": 0.3},
    "Pusher-v5": {"reward_near_weight": 0.2, "reward_dist_weight": 3.0, "reward_control_weight": 0.7},
    "InvertedPendulum-v5": {"reset_noise_scale": 0.1},
    "InvertedDoublePendulum-v5": {"healthy_reward": 3.0, "reset_noise_scale": 0.02},
}
ROBOTS = ("HalfCheetah", "Hopper", "Walker2d", "Swimmer", "Ant", "Humanoid")
CHANGED |= {f"markovia/Safe{r}Velocity-v0": {**CHANGED[f"{r}-v5"], "max_speed": 0.1} for r in ROBOTS}
STEADY = ("HalfCheetah-v5", "Swimmer-v5", "Reacher-v5", "Pusher-v5", "markovia/SafeHalfCheetahVelocity-v0", "markovia/SafeSwimmerVelocity-v0")


def assert_same_info(ours, theirs):
    """The same keys, masks, dtypes and numbers, final observations and nested final infos included."""
    assert set(ours) == set(theirs)
    for key, want in theirs.items():
        got = ours[key]
        if isinstance(want, dict):
            assert_same_info(got, want)
        elif key == "final_obs":
            assert [x is None for x in got] == [x is None for x in want]
            assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True) if y is not None)
        else:
            assert got.dtype == want.dtype, key
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12, err_msg=key)


def run_beside_gymnasium(env_id, kwargs, steps, num_envs=3, threads=2):
    """Step the batch and SyncVectorEnv with the same actions from the same seed, comparing everything; how many episodes ended how."""
    ours = make_vec(env_id, num_envs, "mujoco", kwargs=kwargs, vector_kwargs={"threads": threads})
    theirs = make_vec(env_id, num_envs, "sync", kwargs=kwargs)
    (got, got_info), (want, want_info) = ours.reset(seed=7), theirs.reset(seed=7)
    assert ours.np_random_seed == theirs.np_random_seed
    assert np.array_equal(got, want)
    assert_same_info(got_info, want_info)
    rng, high = np.random.default_rng(0), ours.single_action_space.high
    ends = np.zeros(2, dtype=int)
    for _ in range(steps):
        action = (rng.uniform(-1, 1, ours.action_space.shape) * high).astype(np.float32)
        a, b = ours.step(action), theirs.step(action)
        # States are the same computation, so they are equal to the last bit: a difference would grow with the steps.
        for x, y in zip((a[0], a[2], a[3]), (b[0], b[2], b[3]), strict=True):
            assert np.array_equal(x, y) and x.dtype == y.dtype
        assert a[1].dtype == b[1].dtype
        np.testing.assert_allclose(a[1], b[1], rtol=1e-12, atol=1e-12)
        assert_same_info(a[4], b[4])
        ends += a[2].sum(), a[3].sum()
    ours.close()
    theirs.close()
    return ends


@pytest.mark.parametrize("env_id", TASKS)
def test_equals_gymnasium_over_hundreds_of_steps_and_resets(env_id):
    terminated, truncated = run_beside_gymnasium(env_id, {"max_episode_steps": 40}, 200)
    # Random actions topple some tasks before the limit and never others; either way episodes ended within the comparison.
    assert terminated + truncated >= 12
    assert (terminated > 0) == (env_id not in STEADY)


@pytest.mark.parametrize("env_id", TASKS)
def test_keywords_of_the_task_count(env_id):
    run_beside_gymnasium(env_id, {**CHANGED[env_id], "max_episode_steps": 25}, 60, num_envs=2)


def test_no_termination_and_no_time_limit_on_request():
    ends = run_beside_gymnasium("Hopper-v5", {"terminate_when_unhealthy": False, "max_episode_steps": -1}, 60)
    assert ends.tolist() == [0, 0]


def test_one_environment_and_one_thread_give_the_same():
    run_beside_gymnasium("Walker2d-v5", {}, 80, num_envs=1, threads=1)


def test_environment_i_is_the_scalar_environment_with_seed_plus_i():
    venv = MujocoVectorEnv("Reacher-v5", 3)
    rows = venv.reset(seed=11)[0]
    for i, row in enumerate(rows):
        assert np.array_equal(row, gym.make("Reacher-v5").reset(seed=11 + i)[0])
    listed = venv.reset(seed=[13, 11, None])[0]
    assert np.array_equal(listed[:2], rows[[2, 0]])
    assert not np.array_equal(venv.reset()[0], venv.reset()[0])


def test_what_was_returned_is_not_changed_by_later_steps():
    venv = MujocoVectorEnv("Hopper-v5", 2, kwargs={"max_episode_steps": 3})
    start, _ = venv.reset(seed=0)
    copies, kept = [start.copy()], [start]
    for _ in range(6):
        obs, reward, terminated, truncated, info = venv.step(np.ones((2, 3), np.float32))
        arrays = [obs, reward, terminated, truncated, *(v for v in info.values() if isinstance(v, np.ndarray) and v.dtype != object)]
        kept += arrays
        copies += [a.copy() for a in arrays]
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_make_vec_takes_it_where_it_serves_and_falls_back_where_not():
    assert isinstance(make_vec("HalfCheetah-v5", 2), MujocoVectorEnv)
    assert isinstance(make_vec("gymnasium:HalfCheetah-v5", 2), MujocoVectorEnv)
    assert make_vec("HalfCheetah-v5", 2).metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    for env_id, kwargs, vector_kwargs in (
        ("Hopper-v5", {"render_mode": "rgb_array"}, {}),
        ("Hopper-v5", {"xml_file": "hopper.xml"}, {}),
        ("Hopper-v5", {}, {"autoreset_mode": "NextStep"}),
        ("HumanoidStandup-v5", {}, {}),
    ):
        assert isinstance(make_vec(env_id, 1, kwargs=kwargs, vector_kwargs=vector_kwargs), SyncVectorEnv)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "vector_kwargs", "message"),
    [
        ("Hopper-v4", {}, {}, "did you mean 'Hopper-v5'"),
        ("CartPole-v1", {}, {}, "'sync' takes any"),
        ("Hopper-v5", {"render_mode": "rgb_array"}, {}, "does not render"),
        ("Hopper-v5", {}, {"autoreset_mode": "NextStep"}, "takes the vector_kwargs 'threads'"),
    ],
)
def test_what_it_does_not_serve_is_refused(env_id, kwargs, vector_kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_vec(env_id, 2, "mujoco", kwargs=kwargs, vector_kwargs=vector_kwargs)


def test_wrong_calls_are_refused():
    venv = MujocoVectorEnv("Hopper-v5", 2)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        venv.step(np.zeros((2, 3)))
    venv.reset(seed=0)
    for actions in (np.zeros(3), np.zeros((1, 3)), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError, match=r"expected an action of \(2, 3\) finite numbers"):
            venv.step(actions)
    with pytest.raises(ValueError, match="3 seeds for 2"):
        venv.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="reset_mask"):
        venv.reset(options={"reset_mask": np.array([True, False])})


def test_mujoco_without_batches_names_the_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco.batch", None)
    assert not has_batch()
    assert isinstance(make_vec("Hopper-v5", 1), SyncVectorEnv)
    with pytest.raises(ImportError, match=r"mujoco >= 3\.17"):
        make_vec("Hopper-v5", 1, "mujoco")


def test_threads_never_exceed_the_cores_or_the_work(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert [default_threads(n) for n in (1, 2, 3, 4, 8, 64)] == [1, 2, 3, 4, 4, 4]
