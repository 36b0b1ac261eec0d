"""The off-policy methods: every row is a setting of the one update (`OffPolicy`); where a row is silent, the update's default (SAC) holds."""

from __future__ import annotations

from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.slots import (
    Ascent,
    Critics,
    Deterministic,
    FixedTemperature,
    SmoothedTarget,
    SoftValue,
    ValueTarget,
)
from markovia.algos.table import Row, table

_LOSSES = "markovia.algos.off_policy.losses:"

SAC = OffPolicy()
TD3 = OffPolicy(
    learning_starts=25_000,
    policy_delay=2,
    policy=Deterministic(),
    target=SmoothedTarget(),
    critic=Critics(coef=1.0),
    actor=Ascent(aggregate="first"),
    temperature=FixedTemperature(0.0),
)
MIRROR = Ascent(aggregate="first", inverse_step=1.0, penalty=1e-3)
MDPO = OffPolicy(target=ValueTarget(), value=SoftValue(), actor=MIRROR, temperature=FixedTemperature(0.2))
TSALLIS = OffPolicy(target=ValueTarget(), value=SoftValue(), actor=MIRROR, temperature=FixedTemperature(0.2, q=1.5))

OFF_POLICY = table(
    [
        Row(
            "sac", SAC, None, "1812.05905", "replay, twin critics and an entropy bonus whose weight holds the entropy at a target", ("control",),
            (_LOSSES + "mirror_objective", _LOSSES + "bootstrap", _LOSSES + "soft_value", _LOSSES + "td_error", _LOSSES + "temperature_loss"), "sac",
        ),
        Row(
            "td3", TD3, "sac", "1802.09477", "a deterministic actor, smoothed target actions, actor and targets moved every second step",
            ("control",), (_LOSSES + "smoothed_action", _LOSSES + "mirror_objective", _LOSSES + "aggregate"), "td3",
        ),
        Row(
            "mdpo-off", MDPO, "sac", "2005.09814", "mirror descent on replayed states: a divergence from the policy of 1000 steps ago", ("control",),
            (_LOSSES + "mirror_objective", _LOSSES + "soft_value", _LOSSES + "parameter_penalty"), "mdpo-off",
        ),
        Row(
            "mdpo-off/tsallis", TSALLIS, "mdpo-off", "2005.09814", "Tsallis' entropy and its Bregman divergence in place of Shannon's and KL",
            ("control",), (_LOSSES + "log_q", _LOSSES + "mirror_objective"), "mdpo-off/tsallis",
        ),
    ]
)
