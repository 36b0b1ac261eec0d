"""The agent for control: Gaussian, squashed Gaussian, categorical and multi-categorical policies on any Gymnasium observation."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from markovia.agents.actor import ArrayActor, array_actor
from markovia.agents.distributions import Categorical, Distribution, Gaussian, MultiCategorical, SquashedGaussian
from markovia.agents.interface import Agent, Evaluation, Kind, check_want
from markovia.agents.networks import PolicyNet, Trunk, ValueNet, check_layers, is_image, network_name
from markovia.agents.normalizer import ObsNorm
from markovia.agents.records import Obs, Rollout, map_obs
from markovia.agents.spaces import space_from_json, space_to_json

LOG_STD_RANGE = (-20.0, 2.0)  # of standard deviations that a network gives
SHARED_LOG_STD_RANGE = (-5.0, 2.0)  # around a bounded mean: an entry that is logged at its bound alone would otherwise lead the density to infinity


def check_action_space(space: gym.Space, squash: bool = False, std: str = "shared", tanh_mean: bool = False) -> None:
    """Refuse action spaces that a control agent can't serve, Boxes without finite bounds, and options that don't go together (ValueError)."""
    if std not in ("shared", "state", "fixed"):
        raise ValueError(f"std must be 'shared', 'state' or 'fixed', got {std!r}")
    if squash and tanh_mean:
        raise ValueError("squash=True already bounds the action; leave tanh_mean out")
    if isinstance(space, spaces.Box):
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise ValueError(
                f"the action space {space} has infinite bounds, so actions can be neither clipped nor squashed into it; give it finite bounds, "
                "e.g. gymnasium.wrappers.TransformAction(env, lambda a: a, gymnasium.spaces.Box(-1.0, 1.0, shape))"
            )
        if not np.issubdtype(space.dtype, np.floating):
            raise ValueError(f"the action space {space} is a Box of {space.dtype}; expected a float Box, or Discrete / MultiDiscrete for integers")
        return
    if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise ValueError(
            f"the action space {space} is of type {type(space).__name__}; a control agent serves Box, Discrete, MultiDiscrete and MultiBinary"
        )
    options = {"squash=True": squash, f"std={std!r}": std != "shared", "tanh_mean=True": tanh_mean}
    if given := [name for name, used in options.items() if used]:
        raise ValueError(f"{given[0]} needs a Box action space, got {space}; leave {given[0].split('=')[0]} out")


def batch_obs(observation: Any, space: gym.Space) -> tuple[Any, bool]:
    """The observation with a leading batch axis, and whether that axis was added. Raises ValueError for one of another shape."""
    if isinstance(space, spaces.Dict):
        if not isinstance(observation, dict) or not space.spaces.keys() <= observation.keys():
            found = sorted(observation) if isinstance(observation, dict) else f"a {type(observation).__name__}"
            raise ValueError(f"this agent observes a dictionary with the keys {sorted(space.spaces)}, got {found}")
        key = next(iter(space.spaces))
        single = np.ndim(observation[key]) == len(space.spaces[key].shape or ())
        parts = {k: np.asarray(observation[k]) for k in space.spaces}
        return ({k: v[None] for k, v in parts.items()} if single else parts), single
    array, shape = np.asarray(observation), space.shape or ()
    single = array.ndim == len(shape)
    order = sorted if is_image(space) else tuple  # Stable-Baselines3's policies move the channels of an image themselves
    if order(array.shape if single else array.shape[1:]) != order(shape):
        raise ValueError(f"this agent observes arrays of shape {shape}, or (n, ...) of them, got {array.shape}; is it for another environment?")
    return (array[None] if single else array), single


def obs_tensor(observation: Any, space: gym.Space, device: torch.device) -> Obs:
    """Batched numpy observation(s) as tensors: bytes for images, int64 from 0 for discrete spaces, float32 for the rest."""
    if isinstance(space, spaces.Dict):
        return {k: obs_tensor(observation[k], s, device) for k, s in space.spaces.items()}  # type: ignore[misc]
    array = np.asarray(observation)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        array = array.astype(np.int64) - space.start
    elif not is_image(space) and array.dtype != np.float32:
        array = array.astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # Environments may reuse their buffers, so a tensor that still shares memory with the observation is copied.
    return tensor.clone() if device.type == "cpu" else tensor.to(device)


def _param_count(space: gym.Space, std: str = "shared") -> int:
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    size = int(np.prod(space.shape or (1,)))
    return 2 * size if isinstance(space, spaces.MultiBinary) or std == "state" else size


class StepAgent(Agent):
    """An agent that is stepped in an environment: raw observations come in through `observe`, which the collector also uses."""

    observation_space: gym.Space

    @abstractmethod
    def observe(self, observation: Any, update: bool | np.ndarray = False) -> Obs:
        """A raw batch as the network sees it; only the collector passes update=True, which moves the normaliser."""

    def sample(self, obs: Obs, generator: torch.Generator | None = None) -> Tensor:
        """Actions (n, ...) as `act` draws them, without their log-probabilities, which a collector computes for a whole record at once."""
        return self.act(obs, generator=generator)[0]

    def actor(self) -> StepAgent | ArrayActor:
        """What steps for this agent until its weights are replaced: `observe`, `sample` and `env_action`, on tensors or on arrays."""
        return self

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        batch, single = batch_obs(observation, self.observation_space)
        action = self.env_action(self.act(self.observe(batch), deterministic)[0])
        return (action[0] if single else action), state


class ControlAgent(StepAgent):
    """Policy and critic with separate trunks, an observation normaliser, and the action distribution of the action space.

    Actions are kept in policy coordinates: unclipped for a Gaussian, before the tanh when squashed, unclipped but in units of the Box (which
    reaches from -1 to 1) when only the mean is a tanh, from 0 for discrete spaces.
    """

    kind: Kind = "control"

    def __init__(self, config: dict[str, Any], network: nn.Module | None = None) -> None:
        self.observation_space = space_from_json(config["observation_space"])
        self.action_space = space_from_json(config["action_space"])
        self._config = copy.deepcopy(config)
        self.num_costs: int = config["num_costs"]
        self.squash: bool = config["squash"]
        self.std: str = config.get("std", "shared")
        self.tanh_mean: bool = config.get("tanh_mean", False)
        check_action_space(self.action_space, self.squash, self.std, self.tanh_mean)
        own = config["network"]
        if own is not None and network is None:
            raise ValueError(
                f"this agent's policy network is the foreign class {own['class']}; build one and pass it: load(folder, network=that_module)"
            )
        n_params = _param_count(self.action_space, self.std)
        is_params = own is not None and own["output"] == "params"
        hidden, activation = tuple(config["hidden"]), config["activation"]
        width = own["width"] if own is not None else 0

        def trunk(module: nn.Module | None) -> Trunk:
            return Trunk(self.observation_space, hidden, activation, module, width)

        shared = isinstance(self.action_space, spaces.Box) and self.std == "shared"
        log_std = torch.full((n_params,), float(config["log_std_init"])) if shared else None
        self.net = nn.ModuleDict({"policy": PolicyNet(trunk(network), None if is_params else n_params, log_std)})
        if config["critic"]:
            # The critic has a trunk of its own; a module that gives distribution parameters is no use to it.
            body = None if network is None or is_params else copy.deepcopy(network)
            self.net["critic"] = ValueNet(trunk(body), self.num_costs)
        if config["normalize_obs"]:
            self.net["normalizer"] = ObsNorm(self.observation_space)

    @classmethod
    def from_spaces(
        cls,
        observation_space: gym.Space,
        action_space: gym.Space,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        log_std_init: float = 0.0,
        normalize_obs: bool = True,
        squash: bool = False,
        std: Literal["shared", "state", "fixed"] = "shared",
        tanh_mean: bool = False,
        num_costs: int = 0,
        network: nn.Module | None = None,
        network_output: Literal["features", "params"] = "features",
        critic: bool = True,
        device: str | torch.device = "cpu",
    ) -> ControlAgent:
        """An agent for one environment's spaces.

        Boxes: `squash` puts a tanh on the sampled action, `tanh_mean` on the mean alone; log standard deviations start at log_std_init and are
        parameters of their own (std="shared"), or stay there ("fixed"), or are given by the network beside the mean ("state").
        `network` is the user's own module, observation (n, ...) -> features (n, k) under a linear head (the critic gets a copy of it), or with
        network_output="params" -> the distribution's parameters: means, or logits one after the other.
        Raises ValueError for spaces that the agent can't serve, infinite action Boxes included, and for options out of range.
        """
        check_action_space(action_space, squash, std, tanh_mean)
        check_layers(hidden, activation)
        if num_costs < 0:
            raise ValueError(f"num_costs counts the columns of costs beside the reward, expected >= 0, got {num_costs}")
        own = None
        if network is not None:
            if network_output not in ("features", "params"):
                raise ValueError(f"network_output must be 'features' or 'params', got {network_output!r}")
            width = cls._probe(network, observation_space)
            if network_output == "params" and width != _param_count(action_space, std):
                raise ValueError(
                    f"the network gives {width} numbers, but {action_space} needs {_param_count(action_space, std)} distribution parameters; "
                    "change its last layer, or pass network_output='features' to put a head on it"
                )
            own = {**network_name(network), "output": network_output, "width": width}
        config = {
            "observation_space": space_to_json(observation_space),
            "action_space": space_to_json(action_space),
            "hidden": list(hidden),
            "activation": activation,
            "log_std_init": float(log_std_init),
            "normalize_obs": bool(normalize_obs),
            "squash": bool(squash),
            "std": std,
            "tanh_mean": bool(tanh_mean),
            "num_costs": int(num_costs),
            "critic": bool(critic),
            "network": own,
        }
        agent = cls(config, network)
        agent.to(device)
        return agent

    @staticmethod
    def _probe(network: nn.Module, space: gym.Space) -> int:
        """Width of the user's network on one zero observation; anything but a (1, k) tensor raises ValueError."""
        parameter = next(network.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        if isinstance(space, spaces.Dict):
            zero: Any = {k: np.zeros((1, *(s.shape or ())), s.dtype) for k, s in space.spaces.items()}
        else:
            zero = np.zeros((1, *(space.shape or ())), space.dtype)
        with torch.no_grad():
            out = network(map_obs(obs_tensor(zero, space, device), torch.zeros_like))
        if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[0] != 1:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"the network must turn a batch of n observations into a (n, k) tensor; for n = 1 it gave {got}")
        return int(out.shape[1])

    def config(self) -> dict[str, Any]:
        return copy.deepcopy(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> ControlAgent:
        return cls(config, network)

    def distribution(self, params: Tensor) -> Distribution:
        """The action distribution of network outputs (..., n_params)."""
        if isinstance(self.action_space, spaces.Box):
            mean, log_std = self._mean_and_log_std(params)
            return (SquashedGaussian if self.squash else Gaussian)(mean, log_std)
        if isinstance(self.action_space, spaces.Discrete):
            return Categorical(params)
        if isinstance(self.action_space, spaces.MultiDiscrete):
            return MultiCategorical(params, tuple(int(n) for n in self.action_space.nvec.reshape(-1)))
        return MultiCategorical(params, (2,) * (params.shape[-1] // 2))

    def _mean_and_log_std(self, params: Tensor) -> tuple[Tensor, Tensor]:
        if self.std == "state":
            mean, log_std = params.chunk(2, -1)
            log_std = log_std.clamp(*LOG_STD_RANGE)
        elif self.std == "fixed":
            mean, log_std = params, torch.full_like(params, self._config["log_std_init"])
        else:
            mean, log_std = params, self.shared_log_std().expand_as(params)
        return (torch.tanh(mean) if self.tanh_mean else mean), log_std

    def shared_log_std(self) -> Tensor:
        """log std of each entry of the action, the same for all observations, (d,); with std="shared"."""
        log_std: Tensor = self.net["policy"].log_std  # type: ignore[assignment,union-attr]
        return log_std.clamp(*SHARED_LOG_STD_RANGE) if self.tanh_mean else log_std

    def policy(self, obs: Obs) -> Distribution:
        """The action distribution for observations (n, ...) as the networks see them, with gradient."""
        return self.distribution(self.net["policy"](obs)[0])

    def observe(self, observation: Any, update: bool | np.ndarray = False) -> Obs:
        """Batched raw observations (n, ...) as the networks see them; `update` (all rows, or a (n,) mask of them) feeds the normaliser."""
        obs = obs_tensor(observation, self.observation_space, self.device)
        if "normalizer" not in self.net:
            return obs
        norm: ObsNorm = self.net["normalizer"]  # type: ignore[assignment]
        if isinstance(update, np.ndarray):
            if update.all():
                norm.update(obs)
            elif update.any():
                rows = torch.from_numpy(update).to(self.device)
                norm.update(map_obs(obs, lambda x: x[rows]))
        elif update:
            norm.update(obs)
        return norm(obs)

    @torch.no_grad()
    def sample(self, obs: Obs, generator: torch.Generator | None = None) -> Tensor:
        return self.policy(obs).sample(generator)

    def actor(self) -> StepAgent | ArrayActor:
        # A subclass may sample in its own way.
        return (array_actor(self) if type(self) is ControlAgent else None) or self

    @torch.no_grad()
    def act(
        self, obs: Obs, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        dist = self.policy(obs)
        action = dist.mode() if deterministic else dist.sample(generator)
        return action, dist.log_prob(action)

    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        wanted = check_want(want, self.critic is not None)
        lead = rollout.shape
        # Flat rows: (B, T) and (B T, 1) views of one record then run the very same matrix products.
        obs = map_obs(rollout.obs, lambda x: x.flatten(0, 1))
        out = Evaluation()
        if wanted - {"value"}:
            params, hidden = self.net["policy"](obs)
            dist = self.distribution(params.unflatten(0, lead))
            out.logp = dist.log_prob(rollout.action) if "logp" in wanted else None
            out.entropy = dist.entropy() if "entropy" in wanted else None
            out.dist = dist if "dist" in wanted else None
            out.hidden = hidden.unflatten(0, lead) if "hidden" in wanted else None
        if "value" in wanted:
            out.value = self.net["critic"](obs).unflatten(0, lead)
        return out

    def env_action(self, action: Tensor) -> np.ndarray:
        return self.to_env(action.detach().cpu().numpy())

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Clipped, or unsquashed and rescaled, to the Box; shifted to the discrete space's start; (n, *action shape)."""
        space = self.action_space
        raw = action.reshape(-1, *(space.shape or ()))
        if isinstance(space, spaces.Box):
            if self.squash or self.tanh_mean:
                return self.from_unit(np.tanh(raw) if self.squash else raw)
            return np.minimum(np.maximum(raw, space.low), space.high).astype(space.dtype, copy=False)
        if isinstance(space, spaces.MultiBinary):
            return raw.astype(space.dtype)
        return (raw + space.start).astype(space.dtype)  # type: ignore[attr-defined]

    @property
    def action_size(self) -> int:
        """Entries of a Box action."""
        return _param_count(self.action_space)

    def unit_action(self, action: Tensor) -> Tensor:
        """Policy coordinates (..., d) of a bounded policy (squash or tanh_mean) as actions in [-1, 1], which critics and replays hold."""
        return torch.tanh(action) if self.squash else action.clamp(-1.0, 1.0)

    def from_unit(self, unit: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1], any leading shape, stretched to the Box: (n, *action shape)."""
        space = self.action_space
        assert isinstance(space, spaces.Box)
        raw = space.low + 0.5 * (unit.reshape(-1, *space.shape) + 1.0) * (space.high - space.low)
        return np.minimum(np.maximum(raw, space.low), space.high).astype(space.dtype, copy=False)
