"""Vector environments for any id: quiet, seeded, with teaching errors."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from markovia.envs.control.vector import each_seed, env_spec, make_env, make_vec


@pytest.mark.parametrize(("how", "kind"), [("sync", SyncVectorEnv), ("async", AsyncVectorEnv), ("auto", SyncVectorEnv)])
def test_vectorisations_agree_and_reset_in_the_same_step(how, kind):
    venv = make_vec("Acrobot-v1", 2, how, seed=3)
    assert type(venv) is kind and venv.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    obs, _ = venv.reset(seed=3)
    first = make_env("Acrobot-v1").reset(seed=4)[0]
    assert np.array_equal(obs[1], first)
    venv.close()


def test_the_own_batched_form_is_preferred_only_by_auto():
    with_own = make_vec("CartPole-v1", 3)
    assert not isinstance(with_own, SyncVectorEnv) and with_own.num_envs == 3
    assert isinstance(make_vec("CartPole-v1", 3, "sync"), SyncVectorEnv)


def test_kwargs_reach_the_environment_and_module_ids_work():
    venv = make_vec("gymnasium:FrozenLake-v1", 2, "sync", kwargs={"map_name": "8x8"})
    assert venv.single_observation_space.n == 64


def test_next_step_on_request_and_disabled_refused():
    venv = make_vec("Acrobot-v1", 1, vector_kwargs={"autoreset_mode": "NextStep"})
    assert venv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    with pytest.raises(ValueError, match="no final observation is lost"):
        make_vec("Acrobot-v1", 1, vector_kwargs={"autoreset_mode": "Disabled"})
    with pytest.raises(ValueError, match="unknown autoreset_mode"):
        make_vec("Acrobot-v1", 1, vector_kwargs={"autoreset_mode": "sometimes"})


@pytest.mark.parametrize(
    ("env_id", "message"),
    [("CartPol-v1", "CartPole-v1"), ("HalfCheeta-v5", "HalfCheetah-v5"), ("zzzzqq", "pprint_registry"), ("no_such_module:X-v0", "can't be imported")],
)
def test_wrong_id_names_the_nearest(env_id, message):
    with pytest.raises(ValueError, match=message):
        make_vec(env_id, 1)


def test_the_package_of_a_recipes_environment_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install markovia\[robotics\] \(gymnasium-robotics\)"):
        env_spec("gymnasium_robotics:PointMaze_UMaze-v3")


def test_seeds_of_the_environments():
    assert each_seed(3, 2) == each_seed(np.int64(3), 2) == [3, 4]
    assert each_seed(None, 2) == [None, None] and each_seed((5, None), 2) == [5, None]
    with pytest.raises(ValueError, match="1 seeds for 2 environments"):
        each_seed([1], 2)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_envs"):
        make_vec("CartPole-v1", 0)
    with pytest.raises(ValueError, match="choose 'auto'"):
        make_vec("CartPole-v1", 1, "threads")


def test_envpool_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"markovia\[fast\]"):
        make_vec("HalfCheetah-v5", 1, "envpool")


def test_spec_is_found_with_a_module_prefix():
    assert env_spec("gymnasium:CartPole-v1") is gym.registry["CartPole-v1"]


def test_mujoco_is_quiet_and_leaves_no_log(tmp_path):
    pytest.importorskip("mujoco")
    code = """
import os
from markovia.envs.control.vector import make_vec
os.chdir(FOLDER)
for how in ("sync", "async", "mujoco"):
    venv = make_vec("HalfCheetah-v5", 2, how, seed=0)
    venv.step(venv.action_space.sample())
    venv.close()
""".replace("FOLDER", repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "settotalmass" not in done.stdout + done.stderr and not list(tmp_path.iterdir())
