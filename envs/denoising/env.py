"""Denoising as a Markov decision process: the task, a scalar Gymnasium environment and a batched one.

State (c, k, x): condition, step and current sample. The action gives the next sample x', the transition is then certain, and the
reward is 0 until step K - 1 gives the clean sample, which is scored. The horizon is K steps and terminates; nothing truncates.
[Black 2023, 2305.13301, section 4]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from markovia.envs.checks import check_horizon
from markovia.envs.control.vector import served_autoreset
from markovia.envs.denoising.kernel import GaussianKernel
from markovia.envs.denoising.tables import choose
from markovia.envs.finite import NotFinite
from markovia.envs.seeded import SeededVectorEnv

ACTION_MODES = ("residual", "next_sample", "model_output")


class DenoisingTask:
    """What is denoised and how it is scored: a reference network, a kernel and a reward, without any learning.

    network      (x (B, *sample_shape), timestep (B,), cond (B, C) or None) -> model output shaped as x
    kernel       GaussianKernel, e.g. read from a diffusers scheduler
    reward       (x_clean (B, *sample_shape), cond) -> (B,) finite numbers (tensor, array or list)
    conditions   (N, C) floats, one of which is drawn for each sample; None for an unconditional task
    judge        optional second reward that training never sees, to tell improvement from fooling the first
    decode       optional: clean samples to images (B, c, h, w) in [0, 1], for latents and images with channels
    data         optional: () -> real samples (N, *sample_shape), which tell whether samples still lie near the data
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        kernel: GaussianKernel,
        reward: Callable[..., Any],
        sample_shape: Sequence[int],
        conditions: Any = None,
        name: str = "denoising",
        judge: Callable[..., Any] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        data: Callable[[], Tensor] | None = None,
    ) -> None:
        self.network, self.kernel, self.reward, self.judge, self.decode, self.data = network, kernel, reward, judge, decode, data
        self.sample_shape = tuple(int(n) for n in sample_shape)
        self.name = name
        self.conditions = None if conditions is None else torch.as_tensor(conditions, dtype=torch.float32)
        if self.conditions is not None and (self.conditions.ndim != 2 or len(self.conditions) == 0):
            raise ValueError(
                f"conditions has shape {tuple(self.conditions.shape)}; expected (N, C) with N >= 1: one row per condition."
            )

    @property
    def num_steps(self) -> int:
        """K, the horizon."""
        return self.kernel.num_steps

    def starts(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor | None]:
        """n initial states for agents that denoise whole batches: {"x": (n, *sample_shape), "cond": (n, C) or None}."""
        device = None if generator is None else generator.device
        cond = None
        if self.conditions is not None:
            pick = torch.randint(len(self.conditions), (n,), generator=generator, device=device)
            cond = self.conditions.to(pick.device)[pick]
        x = torch.randn(n, *self.sample_shape, generator=generator, device=device) * self.kernel.init_noise_sigma
        return {"x": x, "cond": cond}

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """One initial state from a numpy generator: the stream that environments seed."""
        cond = None if self.conditions is None else self.conditions[int(rng.integers(len(self.conditions)))].numpy()
        return rng.standard_normal(self.sample_shape, dtype=np.float32) * self.kernel.init_noise_sigma, cond

    def score(self, rollout: Any) -> Tensor:
        """Rewards (n,) of whole chains, from the record's `outcome` ("x" the clean samples, "cond")."""
        return self.rewards(rollout.outcome["x"], rollout.outcome.get("cond"))

    def rewards(self, x_clean: Tensor, cond: Tensor | None = None) -> Tensor:
        """Rewards (n,) float32 of clean samples (n, *sample_shape); ValueError for a wrong length or a number that is not finite."""
        return self._scored(self.reward, "reward", x_clean, cond)

    def judged(self, x_clean: Tensor, cond: Tensor | None = None) -> Tensor:
        """The judge's scores (n,), checked as `rewards` are; ValueError when the task has no judge."""
        if self.judge is None:
            raise ValueError(f"task {self.name!r} has no judge; pass judge= when building it, or use rewards().")
        return self._scored(self.judge, "judge", x_clean, cond)

    def _scored(self, function: Callable[..., Any], role: str, x: Tensor, cond: Tensor | None) -> Tensor:
        with torch.no_grad():
            scores = torch.as_tensor(function(x, cond), device=x.device)
        n = x.shape[0]
        if scores.shape != (n,):
            raise ValueError(
                f"the {role} function of task {self.name!r} returned shape {tuple(scores.shape)} for {n} samples; "
                f"expected ({n},): one number per sample. Reduce over the sample's axes and keep the batch axis."
            )
        scores = scores.to(torch.float32)
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise NotFinite(
                f"the {role} function of task {self.name!r} returned {float(scores[bad[0]])} for sample {bad[0]} "
                f"({len(bad)} of {n} are not finite). Check its input range (this sample lies in "
                f"[{float(x[bad[0]].min()):.3g}, {float(x[bad[0]].max()):.3g}]) or clamp its output.",
                {role: scores, "x": x, "cond": cond},
            )
        return scores

    def mean_std(self, x: Tensor, step: int | Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The reference policy's mean and std at (x, step, cond), without gradient; `step` is an int or (B,)."""
        with torch.no_grad():
            index = torch.as_tensor(step, device=x.device).expand(x.shape[0])
            return self.kernel.mean_std(self.network(x, self.kernel.timestep(index), cond), x, index)


class _Chains:
    """What the scalar and the batched environment share: spaces, and N chains that step together."""

    def __init__(self, task: DenoisingTask, action_mode: str, bound: float, flatten: bool) -> None:
        self.task = task
        self.action_mode = choose("action_mode", action_mode, ACTION_MODES)
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"bound={bound}; expected a positive finite number of standard deviations, e.g. 4.")
        self.shape = (math.prod(task.sample_shape),) if flatten else task.sample_shape
        # Unbounded in effect, as in Gymnasium's CartPole: its check_env warns about infinite bounds of observations.
        wide = float(np.finfo(np.float32).max)
        spaces: dict[str, gym.Space] = {
            "sample": gym.spaces.Box(-wide, wide, self.shape, np.float32),
            # K + 1 values: the last observation of an episode, at step K, holds the clean sample
            "step": gym.spaces.Discrete(task.num_steps + 1),
        }
        if task.conditions is not None:
            spaces["cond"] = gym.spaces.Box(-wide, wide, tuple(task.conditions.shape[1:]), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)
        limit = bound if action_mode == "residual" else np.inf
        self.action_space = gym.spaces.Box(-limit, limit, self.shape, np.float32)
        self.k = task.num_steps
        self.x = torch.empty(0)
        self.cond: Tensor | None = None

    def start(self, rngs: Sequence[np.random.Generator]) -> None:
        drawn = [self.task.draw(rng) for rng in rngs]
        self.x = torch.from_numpy(np.stack([x for x, _ in drawn]))
        conds = [c for _, c in drawn if c is not None]
        self.cond = torch.from_numpy(np.stack(conds)) if conds else None
        self.k = 0

    def advance(self, action: np.ndarray, rngs: Sequence[np.random.Generator]) -> Tensor | None:
        """Take one step in every chain; rewards (N,) at the last one, else None."""
        if self.k >= self.task.num_steps:
            raise RuntimeError("step() was called after the episode ended (or before reset()); call reset() first.")
        action = np.asarray(action, np.float32)
        if action.shape != (len(rngs), *self.shape):
            raise ValueError(
                f"action has shape {action.shape[1:]}; expected {self.shape}, one entry per entry of the sample."
            )
        given = torch.from_numpy(action).reshape(self.x.shape)
        if self.action_mode == "next_sample":
            self.x = given.clone()
        elif self.action_mode == "residual":
            mean, std = self.task.mean_std(self.x, self.k, self.cond)
            self.x = mean + std * given
        else:
            mean, std = self.task.kernel.mean_std(given, self.x, self.k)
            noise = np.stack([rng.standard_normal(self.task.sample_shape, dtype=np.float32) for rng in rngs])
            self.x = mean + std * torch.from_numpy(noise)
        self.k += 1
        return self.task.rewards(self.x, self.cond) if self.k == self.task.num_steps else None

    def observation(self) -> dict[str, Any]:
        """Fresh arrays with a batch axis: sample (N, *shape), step (N,), cond (N, C)."""
        n = self.x.shape[0]
        obs: dict[str, Any] = {
            "sample": self.x.reshape(n, *self.shape).numpy().copy(),
            "step": np.full(n, self.k, np.int64),
        }
        if self.cond is not None:
            obs["cond"] = self.cond.numpy().copy()
        return obs

    def single(self, obs: dict[str, Any], i: int) -> dict[str, Any]:
        """The observation of chain i."""
        return {name: value[i] if name == "step" else value[i].copy() for name, value in obs.items()}

    @torch.no_grad()
    def frames(self) -> tuple[np.ndarray, ...]:
        """Every chain's current sample as a picture; none before the first reset."""
        if not len(self.x) or self.task.decode is None:
            return tuple(picture(x) for x in self.x.numpy())
        return tuple(picture(2 * image - 1) for image in self.task.decode(self.x).numpy())


def picture(x: np.ndarray, size: int = 128) -> np.ndarray:
    """A sample as (H, W, 3) uint8: an image (h, w), (1, h, w) or (3, h, w) in [-1, 1], small ones enlarged to `size` or more, or a point (2,) in
    the square [-2, 2]^2."""
    if x.ndim >= 2:
        planes = (np.clip((x.reshape(-1, *x.shape[-2:]) + 1) / 2, 0, 1) * 255).astype(np.uint8)
        block = np.ones((1, *[max(1, -(-size // max(x.shape[-2:])))] * 2), np.uint8)
        return np.repeat(np.kron(planes, block).transpose(1, 2, 0), 3 // len(planes), -1)
    frame = np.full((128, 128, 3), 255, np.uint8)
    col, row = np.clip(((x * [1, -1] + 2) * 32).astype(int), 2, 125)
    frame[row - 2 : row + 3, col - 2 : col + 3] = (200, 30, 30)
    return frame


def _check_render(task: DenoisingTask, render_mode: str | None) -> None:
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode={render_mode!r}; expected None or 'rgb_array'.")
    if render_mode and task.decode is None and not (len(task.sample_shape) == 2 or task.sample_shape == (2,)):
        raise ValueError(f"samples of shape {task.sample_shape} can't be drawn; expected (height, width) or (2,).")


class DenoisingEnv(gym.Env):
    """One sample is denoised; the reward comes with the clean sample.

    ## Action Space
    `action_mode="residual"` (default): Box(-bound, bound, shape), the noise in units of the reference's std; the environment applies
    x' = mean_ref + std a, so that a ~ N(0, I) is the reference policy and KL to it is |E a|^2/2 per step. Values outside the Box are
    applied as they are. `"next_sample"`: the action is x' itself. `"model_output"`: the action is the network's output and the
    environment draws the noise (a stochastic environment).

    ## Observation Space
    Dict(sample: Box of the sample, flat unless `flatten=False`; step: Discrete(K + 1), K only in the last observation;
    cond: Box, only for conditional tasks).

    ## Rewards
    0 at each step but the last; there the task's reward of the clean sample.

    ## Starting State
    Gaussian noise times the scheduler's init_noise_sigma, and a condition drawn uniformly.

    ## Episode End
    Terminates after exactly K steps; never truncates. Where the scheduler's last std is 0 (final="drop") the last action changes
    nothing in residual mode.

    ## Arguments
    `task`, `action_mode`, `bound` (of the residual), `flatten`, `render_mode` (None or "rgb_array": images, and points of a plane).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012

    def __init__(
        self,
        task: DenoisingTask,
        action_mode: str = "residual",
        bound: float = 4.0,
        flatten: bool = True,
        render_mode: str | None = None,
    ) -> None:
        _check_render(task, render_mode)
        self._chains = _Chains(task, action_mode, bound, flatten)
        self.task = task
        self.render_mode = render_mode
        self.observation_space = self._chains.observation_space
        self.action_space = self._chains.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw new noise (and a condition)."""
        super().reset(seed=seed)
        self._chains.start([self.np_random])
        return self._chains.single(self._chains.observation(), 0), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One denoising step."""
        reward = self._chains.advance(np.asarray(action)[None], [self.np_random])
        obs = self._chains.single(self._chains.observation(), 0)
        return obs, 0.0 if reward is None else float(reward[0]), reward is not None, False, {}

    def render(self) -> np.ndarray | None:
        """The current sample as a picture (H, W, 3) uint8; None without a render mode or before the first reset."""
        return next(iter(self._chains.frames()), None) if self.render_mode else None


class DenoisingVectorEnv(SeededVectorEnv):
    """`num_envs` samples are denoised in lockstep: one network call per step and one reward call per episode for all of them.

    Equal to SyncVectorEnv over DenoisingEnv with the same seeds. `autoreset_mode` SAME_STEP (default; the last observation comes
    in `infos["final_obs"]`) or NEXT_STEP (the step after the end resets and ignores its action), as enum or as its string.
    A `max_episode_steps` below K is refused.
    """

    def __init__(
        self,
        task: DenoisingTask,
        num_envs: int = 1,
        action_mode: str = "residual",
        bound: float = 4.0,
        flatten: bool = True,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}; expected at least 1.")
        check_horizon(max_episode_steps, task.num_steps)
        _check_render(task, render_mode)
        self._chains = _Chains(task, action_mode, bound, flatten)
        self.task = task
        super().__init__(num_envs)
        self.autoreset_mode = served_autoreset(autoreset_mode, "DenoisingVectorEnv")
        self.render_mode = render_mode
        self.metadata = {**DenoisingEnv.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = self._chains.observation_space
        self.single_action_space = self._chains.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._ended = False

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw new noise in each chain; an int seeds chain i with seed + i, as SyncVectorEnv does."""
        self._seed(seed)
        self._chains.start(self.np_random)
        self._ended = False
        return self._chains.observation(), {}

    def step(self, actions: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One denoising step in every chain; rewards (N,) float64."""
        n = self.num_envs
        if self._ended:
            obs, infos = self.reset()
            return obs, np.zeros(n), np.zeros(n, bool), np.zeros(n, bool), infos
        scores = self._chains.advance(actions, self.np_random)
        obs, infos = self._chains.observation(), {}
        rewards = np.zeros(n) if scores is None else scores.double().numpy()
        ended = scores is not None
        if ended and self.autoreset_mode is AutoresetMode.SAME_STEP:
            final = np.empty(n, dtype=object)
            for i in range(n):
                final[i] = self._chains.single(obs, i)
            everyone = np.ones(n, bool)
            infos = {"final_obs": final, "_final_obs": everyone, "final_info": {}, "_final_info": everyone.copy()}
            self._chains.start(self.np_random)
            obs = self._chains.observation()
        else:
            self._ended = ended
        return obs, rewards, np.full(n, ended), np.zeros(n, bool), infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """One picture per chain; None without a render mode or before the first reset."""
        return (self._chains.frames() or None) if self.render_mode else None
