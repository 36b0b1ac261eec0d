"""From a request to what the off-policy loop needs: an environment that is stepped into a replay."""

from __future__ import annotations

from markovia.agents.control import ControlAgent
from markovia.algos.off_policy.collect import ReplayCollector
from markovia.algos.off_policy.driver import check_action_box
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.replay import Replay
from markovia.algos.safe.constraint import check_task_limit
from markovia.algos.setup import Request, Setup, stepped_setup
from markovia.envs.control.vector import make_vec


def build(method: OffPolicy, request: Request) -> Setup:
    """Everything for one run of an off-policy method. Raises ValueError for action spaces that are no bounded Box, and where the task is given
    another limit than the method."""
    check_task_limit(method.constraint, request.task, request.env_kwargs)
    venv = make_vec(request.task, method.num_envs, vectorization=request.vectorization, seed=request.seed, kwargs=request.env_kwargs)
    check_action_box(venv.single_action_space)
    options = {**method.policy.agent_options(), "normalize_obs": False, **request.agent_options}
    agent = ControlAgent.from_spaces(venv.single_observation_space, venv.single_action_space, critic=False, device=request.device, **options)
    # A step of all environments may pass the budget by all but one of them.
    replay = Replay(min(method.replay_size, method.num_env_steps + method.num_envs))
    limited = method.constraint
    costs = (0, 1.0) if limited is None else (limited.num_costs, limited.cost_gamma)
    return stepped_setup("control", agent, ReplayCollector(venv, agent, replay, request.seed, *costs), venv, request)
