"""Which code builds and trains the settings of each family: the one place where a new kind of settings is announced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_ALGOS = "markovia.algos."


@dataclass(frozen=True)
class Family:
    """Entry points "module:name" of the methods whose settings are of one class; modules are loaded when a method of theirs is used.

    build   (method, request) -> Setup
    driver  class, made from (method, agent, collector, seed), with `compile` where the family compiles
    """

    build: str
    driver: str
    reads: Literal["environment", "dataset", "preferences"] = "environment"  # what it learns from
    kinds: tuple[str, ...] | None = None  # kinds of MDP that it trains, where the class allows some only
    compiles: bool = False


def _family(build: str, driver: str, **more: Any) -> Family:
    return Family(_ALGOS + build, _ALGOS + driver, **more)


# By the settings' class; a subclass that is not listed is built as its parent.
FAMILIES = {
    "OnPolicy": _family("on_policy.setup:build", "on_policy.driver:OnPolicyDriver", compiles=True),
    "OffPolicy": _family("off_policy.setup:build", "off_policy.driver:OffPolicyDriver", compiles=True),
    "Offline": _family("offline.setup:build_offline", "off_policy.driver:OffPolicyDriver", reads="dataset", compiles=True),
    "WarmStart": _family("offline.setup:build_warm_start", "offline.warm_start:WarmStartDriver", reads="dataset", compiles=True),
    "ReturnConditioned": _family("offline.setup:build_sequences", "offline.sequences:SequenceDriver", reads="dataset"),
    "Imitation": _family("diffusion_policy.setup:build_imitation", "diffusion_policy.driver:ImitationDriver", reads="dataset"),
    "TwoLayer": _family("diffusion_policy.setup:build_two_layer", "on_policy.driver:OnPolicyDriver", compiles=True),
    "AdjointMatching": _family("denoising.setup:build", "denoising.driver:AdjointDriver", kinds=("denoising",)),
    "DenoisingPreference": _family("denoising.setup:build", "denoising.preference:DenoisingPreferenceDriver", kinds=("denoising",)),
    "Preference": _family("preference.setup:build_preference", "preference.driver:PreferenceDriver", reads="preferences"),
    "RewardTraining": _family("preference.reward_model:build_reward_model", "preference.reward_model:RewardModelDriver", reads="preferences"),
}


def family_of(method: Any) -> Family:
    """The family of a method's settings. Raises TypeError for a value that no family trains."""
    for cls in type(method).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise TypeError(f"{type(method).__name__} is not the settings of a method that trains; expected one of {', '.join(FAMILIES)}")
