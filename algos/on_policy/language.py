"""Methods for language as settings of the on-policy loop; where a row is silent, `OnPolicy`'s default holds.

The slots are those of one generic objective: reward transform, group filter, advantage, surrogate and ratio, divergence (estimator, place, reference,
level, schedule), token rule, entropy anchor, aggregation, reference refresh. A response is a row, a group the responses to one prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from markovia.algos.advantages import Greedy, GroupNormalised, LeaveOneOut
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.filters import AccuracyBand
from markovia.algos.on_policy.method import Descent, OnPolicy, ValueLoss
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.rewards import Scaled, SoftOverlong
from markovia.algos.on_policy.schedules import DownThenUp
from markovia.algos.on_policy.surrogates import Clip, Regress
from markovia.algos.on_policy.tokens import Partner
from markovia.algos.table import Row, table

TEXT = ("language",)
_ALGOS, _HERE = "markovia.algos.", "markovia.algos.on_policy."


def _row(id: str, value: Any, parent: str | None, paper: str, new: str, functions: str) -> Row:
    where = tuple(_ALGOS + f if f.startswith("advantages") else _HERE + f for f in functions.split())
    return Row(id, value, parent, paper, new, TEXT, where, id)


WHOLE = Descent(lr=1e-6, anneal=False, epochs=1, minibatch=None, unit="row", max_grad_norm=1.0)
GRPO = OnPolicy(
    num_envs=64, group_size=8, advantage=GroupNormalised(), normalize_advantage="none", surrogate=Clip(0.2), aggregation="seq-mean-token-mean",
    divergence=KL(0.04, "k3", "loss"), solver=WHOLE,
)  # fmt: skip
DAPO = replace(
    GRPO, reward=(SoftOverlong(),), filter=AccuracyBand(), surrogate=Clip(0.2, 0.28), aggregation="token-mean", divergence=None,
)  # fmt: skip
TOKENS = replace(GRPO, aggregation="token-mean", divergence=None)
RLHF = ON_POLICY["ppo-rlhf"].value

LANGUAGE = table(
    [
        _row("grpo", GRPO, "ppo", "2402.03300", "a group's standardised rewards for a critic; the forward KL as a loss",
             "advantages:group_normalised surrogates:clip_drift divergence:k3 loss:weights"),
        _row("grpo/dr-grpo", replace(GRPO, advantage=GroupNormalised("none"), aggregation="seq-mean-token-sum-norm", divergence=None), "grpo",
             "2503.20783", "neither divided by the spread of the group nor by the response's length", "advantages:group_normalised loss:weights"),
        _row("grpo/dapo", DAPO, "grpo", "2503.14476", "clip higher, tokens alike, prompts without signal drawn again, soft length penalty",
             "surrogates:clip_drift filters:AccuracyBand rewards:overlong loss:weights"),
        _row("grpo/gspo", replace(GRPO, surrogate=Clip(3e-4, 4e-4), ratio_level="sequence-mean", divergence=None), "grpo", "2507.18071",
             "one ratio per response, the geometric mean of its tokens'", "loss:sequence_ratio surrogates:clip_drift"),
        _row("remax", replace(
                ON_POLICY["rloo"].value, num_envs=64, group_size=1, advantage=Greedy(), aggregation="seq-mean-token-sum", divergence=KL(0.05)),
             "rloo/reinforce", "2310.10505", "the baseline is the reward of the policy's greedy response", "advantages:Greedy loss:weights"),
        _row("grpo-d", replace(GRPO, divergence=KL(0.07, "k3", "loss", schedule=DownThenUp(0.04, 0.1, 0.3))), "grpo", "2503.16081",
             "the weight of the KL falls first, then rises", "schedules:down_then_up"),
        _row("ppo-max", replace(
                RLHF, reward=(Scaled(5.0),), surrogate=Clip(0.2), divergence=KL(0.02), refresh=OnPolicy().refresh,
                value=ValueLoss(1.0, 0.2, replace(WHOLE, lr=1.5e-6, minibatch=16), pretrain=1)),
             "ppo-rlhf", "2307.04964", "rewards scaled by their running spread and clipped, values clipped, the critic fitted first",
             "rewards:Scaled loss:value_error surrogates:clip_drift"),
        _row("p3o", replace(
                GRPO, group_size=2, advantage=LeaveOneOut(), ratio_level="sequence", divergence=KL(0.05), tokens=Partner(),
                solver=replace(WHOLE, epochs=4, minibatch=16)),
             "rloo", "2310.00212", "pairs: each response's clipped ratio is weighted by the other's", "tokens:partner_ratio loss:sequence_ratio"),
        _row("apa", replace(RLHF, surrogate=Regress(1.0), refresh=OnPolicy().refresh, solver=replace(RLHF.solver, epochs=2)), "ppo-rlhf",
             "2306.02231", "the log-ratio to the sampling policy is regressed on the advantage", "surrogates:regress"),
        _row("apa/initial", replace(RLHF, surrogate=Regress(1.0, "ref"), refresh=OnPolicy().refresh, solver=replace(RLHF.solver, epochs=2)), "apa",
             "2306.02231", "the log-ratio to the initial policy is regressed", "surrogates:regress"),
    ]
)  # fmt: skip
