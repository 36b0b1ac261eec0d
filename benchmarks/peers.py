"""The other sides of benchmarks/throughput.py: Stable-Baselines3, sb3-contrib, and a PPO loop in one function as single-file projects write it.

Each takes (env_id, num_envs, num_steps, batches, device) or, off-policy, (env_id, updates, device), and returns the speed of its second phase:
the first one warms it up.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn


def _sb3_envs(env_id: str, num_envs: int) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv

    from markovia.envs.control import make_env

    return DummyVecEnv([lambda: make_env(env_id) for _ in range(num_envs)])


def sb3_ppo(env_id: str, num_envs: int, num_steps: int, batches: int, device: str) -> float:
    """Environment steps per second of SB3's PPO with its defaults: 10 epochs of minibatches of 64, Adam 3e-4, two 64-unit tanh networks."""
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", _sb3_envs(env_id, num_envs), n_steps=num_steps, batch_size=64, n_epochs=10, device=device, seed=0)
    return _learn(model, num_envs * num_steps, batches)


def sb3_trpo(env_id: str, num_envs: int, num_steps: int, batches: int, device: str) -> float:
    """Environment steps per second of sb3-contrib's TRPO: 15 iterations of conjugate gradient, 10 critic epochs of minibatches of 128."""
    from sb3_contrib import TRPO

    model = TRPO("MlpPolicy", _sb3_envs(env_id, num_envs), n_steps=num_steps, batch_size=128, n_critic_updates=10, device=device, seed=0)
    return _learn(model, num_envs * num_steps, batches)


def _learn(model: Any, size: int, batches: int) -> float:
    model.learn(size)
    began = time.perf_counter()
    model.learn(size * batches)
    return size * batches / (time.perf_counter() - began)


def _sb3_updates(kind: str, env_id: str, updates: int, device: str) -> float:
    import stable_baselines3 as sb3

    options = {"policy_kwargs": {"net_arch": [256, 256]}, "batch_size": 256, "learning_starts": 500, "train_freq": 1, "gradient_steps": 1}
    model = getattr(sb3, kind)("MlpPolicy", _sb3_envs(env_id, 1), device=device, seed=0, **options)
    model.learn(600)
    began = time.perf_counter()
    model.learn(updates, reset_num_timesteps=False)
    return updates / (time.perf_counter() - began)


def sb3_sac(env_id: str, updates: int, device: str) -> float:
    """Steps (each with one update, batch 256, 256-256) per second of SB3's SAC."""
    return _sb3_updates("SAC", env_id, updates, device)


def sb3_td3(env_id: str, updates: int, device: str) -> float:
    """Steps (each with one update, batch 256, 256-256) per second of SB3's TD3."""
    return _sb3_updates("TD3", env_id, updates, device)


def single_file_ppo(env_id: str, num_envs: int, num_steps: int, batches: int, device: str) -> float:
    """Environment steps per second of a plain PPO loop: torch modules, torch.optim.Adam, Gymnasium's SyncVectorEnv, nothing compiled."""
    import gymnasium as gym

    from markovia.envs.control import make_env

    venv = gym.vector.SyncVectorEnv([lambda: make_env(env_id) for _ in range(num_envs)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    n_obs, n_act = venv.single_observation_space.shape[0], venv.single_action_space.shape[0]  # type: ignore[index]

    def tower(out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(n_obs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out))

    actor, critic = tower(n_act).to(device), tower(1).to(device)
    log_std = nn.Parameter(torch.zeros(n_act, device=device))
    params = [*actor.parameters(), *critic.parameters(), log_std]
    optimizer = torch.optim.Adam(params, lr=3e-4, eps=1e-5)
    size = num_envs * num_steps
    obs = torch.zeros(num_steps, num_envs, n_obs, device=device)
    action = torch.zeros(num_steps, num_envs, n_act, device=device)
    logp, reward, done, value = (torch.zeros(num_steps, num_envs, device=device) for _ in range(4))
    now = torch.as_tensor(venv.reset(seed=0)[0], dtype=torch.float32, device=device)

    def policy(x: Tensor) -> torch.distributions.Normal:
        mean = actor(x)
        return torch.distributions.Normal(mean, log_std.exp().expand_as(mean))

    def batch(now: Tensor) -> Tensor:
        for t in range(num_steps):
            with torch.no_grad():
                dist = policy(now)
                obs[t], action[t] = now, dist.sample()
                logp[t], value[t] = dist.log_prob(action[t]).sum(-1), critic(now).squeeze(-1)
            raw, r, term, trunc, _ = venv.step(action[t].clamp(-1, 1).cpu().numpy())
            reward[t], done[t] = torch.as_tensor(r), torch.as_tensor(term | trunc)
            now = torch.as_tensor(raw, dtype=torch.float32, device=device)
        with torch.no_grad():
            following, last, adv = critic(now).squeeze(-1), torch.zeros(num_envs, device=device), torch.zeros_like(reward)
            for t in range(num_steps - 1, -1, -1):
                delta = reward[t] + 0.99 * (1 - done[t]) * following - value[t]
                adv[t] = last = delta + 0.99 * 0.95 * (1 - done[t]) * last
                following = value[t]
        flat = [x.flatten(0, 1) for x in (obs, action, logp, adv, adv + value)]
        for _ in range(10):
            for index in torch.randperm(size, device=device).split(64):
                o, a, old, A, ret = (x[index] for x in flat)
                dist = policy(o)
                ratio = (dist.log_prob(a).sum(-1) - old).exp()
                A = (A - A.mean()) / (A.std() + 1e-8)
                loss = torch.max(-A * ratio, -A * ratio.clamp(0.8, 1.2)).mean() + 0.25 * (critic(o).squeeze(-1) - ret).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(params, 0.5)
                optimizer.step()
        return now

    now = batch(now)
    began = time.perf_counter()
    for _ in range(batches):
        now = batch(now)
    speed = size * batches / (time.perf_counter() - began)
    venv.close()
    return speed
