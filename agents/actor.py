"""A control policy over numpy arrays, for stepping on the CPU: with a few rows an operation's overhead is all there is, and numpy's is a fifth of
torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from markovia.agents.networks import ObsEncoder
from markovia.agents.normalizer import RunningNorm

if TYPE_CHECKING:
    from markovia.agents.control import ControlAgent

_ACTIVATIONS: dict[type[nn.Module], Callable[[np.ndarray], np.ndarray]] = {nn.Tanh: np.tanh, nn.ReLU: lambda x: np.maximum(x, 0.0)}


class ArrayActor:
    """`observe`, `sample` and `env_action` of a `ControlAgent` on arrays, with its own weights and normaliser (views of them, not copies).

    It serves what `array_actor` lets through. Samples follow the agent's distribution; they are not the agent's own draws, number for number.
    """

    def __init__(self, agent: ControlAgent, layers: list[nn.Linear], activations: list[type[nn.Module]], norm: RunningNorm | None) -> None:
        self._agent, self._norm = agent, norm
        self._layers = [(x.weight.detach().numpy().T, x.bias.detach().numpy()) for x in layers]
        self._activations = [_ACTIVATIONS[a] for a in activations]
        fixed = agent.net["policy"].log_std is None
        self._std = np.exp(np.float32(agent.config()["log_std_init"]) if fixed else agent.shared_log_std().detach().numpy())

    def observe(self, observation: Any, update: bool | np.ndarray = False) -> np.ndarray:
        """Batched raw observations (n, k) as the network sees them; `update` as in `ControlAgent.observe`."""
        if self._norm is None:
            return np.array(observation, dtype=np.float32)
        array = np.asarray(observation, dtype=np.float32).astype(np.float64)  # the precision that the agent's own tensors have
        if isinstance(update, np.ndarray):
            if np.count_nonzero(update):
                self._norm.update_array(array if update.all() else array[update])
        elif update:
            self._norm.update_array(array)
        return self._norm.standardise(array)

    def sample(self, obs: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """Actions (n, d), or (n,) int64 of a discrete space, in policy coordinates."""
        x = obs
        for (weight, bias), activation in zip(self._layers, self._activations, strict=False):
            x = activation(x @ weight + bias)
        weight, bias = self._layers[-1]
        params = x @ weight + bias
        if isinstance(self._agent.action_space, spaces.Discrete):
            u = torch.rand(params.shape, generator=generator).numpy()
            return (params - np.log(-np.log(np.clip(u, 1e-20, 1.0 - 1e-7)))).argmax(-1)
        mean = np.tanh(params) if self._agent.tanh_mean else params
        return mean + self._std * torch.randn(params.shape, generator=generator).numpy()

    def env_action(self, action: np.ndarray) -> np.ndarray:
        return self._agent.to_env(action)


def array_actor(agent: ControlAgent) -> ArrayActor | None:
    """The agent's policy over arrays if it is a plain network on the CPU, else None.

    Plain: one Box of numbers in, tanh or relu layers in float32, and out a categorical distribution or a Gaussian whose standard deviation does
    not depend on the observation.
    """
    policy: Any = agent.net["policy"]
    body, head = policy.trunk.body, policy.head
    known = isinstance(body, nn.Sequential) and isinstance(body[0], ObsEncoder) and isinstance(head, nn.Linear)
    if not known or agent.std == "state" or not isinstance(agent.action_space, spaces.Box | spaces.Discrete):
        return None
    if not isinstance(agent.observation_space, spaces.Box) or len(agent.observation_space.shape) != 1:
        return None
    hidden: list[nn.Module] = list(body[1])
    layers = [m for m in hidden if isinstance(m, nn.Linear)]
    activations = [type(m) for m in hidden if not isinstance(m, nn.Linear)]
    if not set(activations) <= set(_ACTIVATIONS) or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in policy.parameters()):
        return None
    norm: Any = agent.net["normalizer"] if "normalizer" in agent.net else None
    return ArrayActor(agent, [*layers, head], activations, None if norm is None else norm.norms[0])
