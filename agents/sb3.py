"""Stable-Baselines3's trained policies as agents. The other way needs no adapter: every agent has SB3's `predict`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from markovia.agents.control import StepAgent, check_action_space
from markovia.agents.distributions import Categorical, Distribution, Gaussian, MultiCategorical
from markovia.agents.interface import Evaluation, Kind, check_want
from markovia.agents.records import Obs, Rollout, map_obs


class _Values(nn.Module):
    """The value half of an actor-critic policy: obs (n, ...) -> (n, 1)."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: Obs) -> Tensor:
        return self.policy.predict_values(obs)  # type: ignore[operator]


class SB3Agent(StepAgent):
    """A PPO or A2C model of Stable-Baselines3 as an agent: its policy acts, is evaluated with gradient, and can be trained on.

    VecNormalize statistics of the model's environment are used, and stay as they are unless `observe(..., update=True)` feeds them.
    Save it with SB3's own `model.save`.
    """

    kind: Kind = "control"

    def __init__(self, model: Any) -> None:
        try:
            from stable_baselines3.common.policies import ActorCriticPolicy
        except ImportError as error:
            raise ImportError("SB3Agent needs Stable-Baselines3: pip install markovia[sb3]") from error
        if not isinstance(getattr(model, "policy", None), ActorCriticPolicy):
            found = type(getattr(model, "policy", model)).__name__
            raise ValueError(f"SB3Agent takes a model with an actor-critic policy (PPO, A2C), got one with {found}, which has no action density")
        if hasattr(model.policy, "lstm_actor"):
            raise ValueError("SB3Agent can't take a recurrent policy: its action depends on more than the observation; use the model's own predict")
        if model.use_sde:
            raise ValueError("SB3Agent can't take a model with use_sde=True: its noise depends on the state; train it with use_sde=False")
        check_action_space(model.action_space)
        self.observation_space, self.action_space = model.observation_space, model.action_space
        self.num_costs = 0
        self.normalizer = model.get_vec_normalize_env()
        self.net = nn.ModuleDict({"policy": model.policy})
        model.policy.set_training_mode(False)

    @property
    def critic(self) -> nn.Module:
        return _Values(self.net["policy"])

    def parameters(self, which: Literal["policy", "value"]) -> list[nn.Parameter]:
        """The value head and the value branch of the extractor are the critic; what both branches share belongs to the policy."""
        if which not in ("policy", "value"):
            raise ValueError(f"parameters() takes 'policy' or 'value', got {which!r}")
        policy: Any = self.net["policy"]
        modules = [policy.value_net, policy.mlp_extractor.value_net]
        if not policy.share_features_extractor:
            modules.append(policy.vf_features_extractor)
        value = {id(p) for m in modules for p in m.parameters()}
        return [p for p in policy.parameters() if p.requires_grad and (id(p) in value) == (which == "value")]

    def observe(self, observation: Any, update: bool | np.ndarray = False) -> Obs:
        """Batched raw observations (n, ...) as the policy sees them: normalised when the model's environment was, images channel first."""
        if self.normalizer is not None:
            feed = np.asarray(update, dtype=bool)
            if feed.any():
                self._feed(observation, feed)
            observation = self.normalizer.normalize_obs(observation)
        return self.net["policy"].obs_to_tensor(observation)[0]  # type: ignore[operator]

    def _feed(self, observation: Any, feed: np.ndarray) -> None:
        rms = self.normalizer.obs_rms
        pick = (lambda x: x) if feed.all() else (lambda x: x[feed])
        for key, one in rms.items() if isinstance(rms, dict) else [(None, rms)]:
            one.update(pick(observation if key is None else observation[key]))

    def _distribution(self, obs: Obs) -> Distribution:
        """SB3's distribution object as one of ours."""
        dist: Any = self.net["policy"].get_distribution(obs).distribution  # type: ignore[operator]
        if isinstance(dist, list):
            return MultiCategorical(torch.cat([d.logits for d in dist], -1), tuple(d.logits.shape[-1] for d in dist))
        if isinstance(dist, torch.distributions.Normal):
            return Gaussian(dist.mean, dist.stddev.log())
        if isinstance(dist, torch.distributions.Bernoulli):
            # Bernoulli(l) is the softmax over (0, l), so MultiBinary needs no distribution of its own.
            pairs = torch.stack([torch.zeros_like(dist.logits), dist.logits], -1)
            return MultiCategorical(pairs.flatten(-2), (2,) * dist.logits.shape[-1])
        return Categorical(dist.logits)

    @torch.no_grad()
    def act(
        self, obs: Obs, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        dist = self._distribution(obs)
        action = dist.mode() if deterministic else dist.sample(generator)
        return action, dist.log_prob(action)

    def evaluate(self, rollout: Rollout, want: Iterable[str]) -> Evaluation:
        wanted = check_want(want, True, known=("logp", "entropy", "dist", "value"))
        lead = rollout.shape
        obs = map_obs(rollout.obs, lambda x: x.flatten(0, 1))
        out = Evaluation()
        if wanted - {"value"}:
            flat = self._distribution(obs)
            parts = {k: v.unflatten(0, lead) for k, v in flat.params().items()}
            dist = MultiCategorical(parts["logits"], flat.sizes) if isinstance(flat, MultiCategorical) else type(flat)(**parts)
            out.logp = dist.log_prob(rollout.action) if "logp" in wanted else None
            out.entropy = dist.entropy() if "entropy" in wanted else None
            out.dist = dist if "dist" in wanted else None
        if "value" in wanted:
            out.value = self.critic(obs).unflatten(0, lead)
        return out

    def env_action(self, action: Tensor) -> np.ndarray:
        """Clipped to a Box, as SB3 does; (n, *action shape)."""
        raw = action.detach().cpu().numpy().reshape(-1, *self.action_space.shape)
        if hasattr(self.action_space, "low"):
            return np.clip(raw, self.action_space.low, self.action_space.high)
        return raw + getattr(self.action_space, "start", 0)

    def config(self) -> dict[str, Any]:
        raise ValueError("an SB3 policy is not rebuilt from JSON; keep it with SB3's model.save and wrap the loaded model again")

    @classmethod
    def from_config(cls, config: dict[str, Any], network: nn.Module | None = None) -> SB3Agent:
        raise ValueError("an SB3 policy is not rebuilt from JSON; load it with SB3 and wrap it: SB3Agent(PPO.load(path))")
