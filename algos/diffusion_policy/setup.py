"""From a dataset, or from a cloned policy and an environment, to an agent, a source and an evaluation."""

from __future__ import annotations

import gymnasium as gym
from gymnasium import spaces
from torch import nn

from markovia.agents.checkpoint import find_agent
from markovia.agents.chunk_networks import UNet1DChunk
from markovia.agents.diffusion_policy import DiffusionPolicyAgent, floored
from markovia.agents.interface import Agent
from markovia.algos.diffusion_policy.collect import ChainCollector
from markovia.algos.diffusion_policy.data import chunk_data
from markovia.algos.diffusion_policy.driver import Logs
from markovia.algos.diffusion_policy.method import Imitation, TwoLayer, UNet1DNet
from markovia.algos.offline.setup import describe, read, reference_file, reference_of, scored
from markovia.algos.setup import Request, Setup, stepped_setup
from markovia.envs.control.chunks import make_chunk_vec
from markovia.envs.control.vector import make_env
from markovia.envs.denoising.networks import MLPDenoiser


def make_network(method: Imitation, observation_space: gym.Space, action_space: gym.Space) -> nn.Module:
    """The network of a cloned policy. Raises ValueError for spaces that are no Boxes."""
    if not isinstance(action_space, spaces.Box) or not isinstance(observation_space, spaces.Box):
        raise ValueError(f"a diffusion policy needs Boxes of observations and actions, got {observation_space} and {action_space}")
    size, cond = int(spaces.flatdim(action_space)), method.obs_steps * int(spaces.flatdim(observation_space))
    if isinstance(method.network, UNet1DNet):
        return UNet1DChunk(method.horizon, size, cond, method.network.channels, method.noise.time_scale)
    shape = (method.horizon, size)
    return MLPDenoiser(shape, method.network.hidden, method.network.depth, time_scale=method.noise.time_scale, cond_dim=cond)


def build_imitation(method: Imitation, request: Request) -> Setup:
    """Everything for cloning a dataset; the environment is that of the evaluation. Raises ValueError when data and task do not fit."""
    assert request.dataset is not None
    env_id, env_kwargs, device = request.task, request.env_kwargs, request.device
    data = read(request.dataset, method.data)
    env = make_env(env_id, **env_kwargs)
    observation_space, action_space, spec = env.observation_space, env.action_space, env.spec
    env.close()
    kernel, greedy = method.noise.kernels()
    options = {"normalize_obs": method.data.normalize_obs, **request.agent_options}
    agent = DiffusionPolicyAgent.from_spaces(
        observation_space, action_space, make_network(method, observation_space, action_space), kernel, greedy,
        horizon=method.horizon, act_steps=method.act_steps, obs_steps=method.obs_steps, device=device, **options,
    )  # fmt: skip
    source = Logs(chunk_data(data, method.data, agent))
    scale = reference_of(data, env_id, spec.max_episode_steps if spec is not None else None, env_kwargs)
    note = describe(data, env_id, len(source.data), scale)
    return Setup("control", agent, source, scored(env_id, env_kwargs, scale), note=note, files=reference_file(scale))


def load_start(folder: str | None) -> DiffusionPolicyAgent:
    """The cloned policy in an agent's folder, or in the newest checkpoint of a run's. Raises ValueError where there is none of this kind."""
    if folder is None:
        raise ValueError(
            "dppo fine-tunes a cloned policy: name its run (--chain.start runs/...), which `markovia train diffusion-policy --env ID "
            "--dataset ID_OR_FILE` makes"
        )
    agent = Agent.load(find_agent(folder) or folder)
    if not isinstance(agent, DiffusionPolicyAgent):
        raise ValueError(f"{folder} holds a {type(agent).__name__}; dppo fine-tunes what diffusion-policy or flow-policy has cloned")
    return agent


def build_two_layer(method: TwoLayer, request: Request) -> Setup:
    """Everything for fine-tuning `method.chain.start` in `env_id`. Raises ValueError when they do not fit."""
    chain, start, env_id = method.chain, load_start(method.chain.start), request.task
    options = {
        "tuned_steps": chain.tuned_steps, "noise_clip": chain.noise_clip, "reduce": chain.reduce,
        "entry_range": None if chain.entry_range is None else list(chain.entry_range), "critic_hidden": list(chain.critic_hidden),
        **request.agent_options,
    }  # fmt: skip
    agent = start.tuned(kernel=floored(start.kernel, chain.min_std), **options)
    agent.to(request.device)
    venv = make_chunk_vec(env_id, method.num_envs, agent.act_steps, agent.obs_steps, request.seed, request.env_kwargs)
    inner = venv.envs[0].env
    if inner.observation_space.shape != agent.observation_space.shape or inner.action_space != agent.action_space:
        venv.close()
        raise ValueError(
            f"the policy in {chain.start} was cloned for observations {agent.observation_space} and actions {agent.action_space}, but {env_id} has "
            f"{inner.observation_space} and {inner.action_space}; name the environment of its data"
        )
    collector = ChainCollector(venv, agent, method.num_steps, request.seed, method.advantage.gamma, method.scale_reward)  # type: ignore[union-attr]
    return stepped_setup("control", agent, collector, venv, request)
