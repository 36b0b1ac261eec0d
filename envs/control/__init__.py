"""Control: any Gymnasium id as a vector environment."""

from markovia.envs.control.vector import env_spec, make_env, make_vec, quiet_mujoco

__all__ = ["env_spec", "make_env", "make_vec", "quiet_mujoco"]
