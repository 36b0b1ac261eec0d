"""Methods for language as settings of the on-policy loop; where a row is silent, `OnPolicy`'s default holds.

The slots are those of one generic objective: reward transform, group filter, advantage, surrogate and ratio, divergence (estimator, place, reference,
level, schedule), token rule, entropy anchor, aggregation, reference refresh. A response is a row, a group the responses to one prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from markovia.algos.advantages import ConflictAware, Consistency, FrozenQ, Greedy, GroupNormalised, LeaveOneOut, MovingBaseline
from markovia.algos.on_policy.auxiliary import Ptx, Rehearsal
from markovia.algos.on_policy.divergence import KL, FDivergence
from markovia.algos.on_policy.entropy import EntropyAnchor
from markovia.algos.on_policy.filters import AccuracyBand
from markovia.algos.on_policy.merging import Warp
from markovia.algos.on_policy.method import Descent, OnPolicy, ValueLoss
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.references import EMA, Fixed, HardReset, Soup
from markovia.algos.on_policy.rewards import ImplicitReward, LengthBudget, Matching, Scaled, SoftOverlong
from markovia.algos.on_policy.schedules import AdaptiveKL, Anneal, DownThenUp
from markovia.algos.on_policy.surrogates import Clip, LogRatio, PolicyGradient, Regress
from markovia.algos.on_policy.tokens import ClipCov, JointClip, Partner, Steer, TopCov, Unlikely
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
RLOO = ON_POLICY["rloo"].value
PPO_MAX = replace(
    RLHF, reward=(Scaled(5.0),), surrogate=Clip(0.2), divergence=KL(0.02), refresh=OnPolicy().refresh,
    value=ValueLoss(1.0, 0.2, replace(WHOLE, lr=1.5e-6, minibatch=16), pretrain=1),
)  # fmt: skip
# The official code's settings (microsoft/RLHF-APA): its adv_coeff_sq = 10 multiplies the advantage, so lam is a tenth.
APA = replace(
    RLHF, surrogate=Regress(0.1), divergence=KL(0.05, schedule=AdaptiveKL(6.0, 10_000.0)), refresh=Fixed(), value=ValueLoss(1.0),
    solver=replace(RLHF.solver, epochs=2),
)  # fmt: skip
P3O = replace(
    GRPO, group_size=2, advantage=LeaveOneOut(), ratio_level="sequence", divergence=KL(0.05), tokens=Partner(),
    solver=replace(WHOLE, epochs=4, minibatch=16),
)  # fmt: skip

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
        _row("ppo-max", PPO_MAX, "ppo-rlhf", "2307.04964",
             "rewards scaled by their running spread and clipped, values clipped, the critic fitted first",
             "rewards:Scaled loss:value_error surrogates:clip_drift"),
        *(_row(f"{id}/ptx", replace(value, aux=Ptx()), id, "2203.02155", "the likelihood of pretraining texts is kept up beside it",
               "auxiliary:text_nll") for id, value in (("ppo-max", PPO_MAX), ("ppo-rlhf", RLHF))),
        _row("p3o", P3O, "rloo", "2310.00212",
             "pairs: each response's clipped ratio is weighted by the other's", "tokens:partner_ratio loss:sequence_ratio"),
        _row("p3o/joint", replace(P3O, surrogate=LogRatio(), tokens=JointClip()), "p3o", "2310.00212",
             "one trust region for the pair: its term is dropped once both log-ratios are too far apart", "tokens:joint_weight loss:sequence_ratio"),
        _row("apa", APA, "ppo-rlhf", "2306.02231", "the log-ratio to the sampling policy is regressed on the advantage", "surrogates:regress"),
        _row("apa/initial", replace(APA, surrogate=Regress(0.1, "ref")), "apa", "2306.02231",
             "the log-ratio to the initial policy is regressed", "surrogates:regress"),
        _row("rto", replace(RLHF, reward=(ImplicitReward(0.05, 0.05),), divergence=KL(0.01), refresh=Fixed()), "ppo-rlhf", "2404.18922",
             "the log-ratio of a DPO-trained policy is paid at every token", "rewards:implicit_reward surrogates:clip_drift"),
        _row("dvpo", replace(
                RLHF, advantage=FrozenQ(), divergence=KL(0.05, "k2", "loss"), refresh=Fixed(),
                value=ValueLoss(1.0, separate=replace(WHOLE, lr=5e-6, minibatch=16), pretrain=20)),
             "ppo-rlhf", "2502.16944", "the critic is fitted first and then frozen: its Q is the advantage", "advantages:FrozenQ divergence:k2"),
        _row("gtpo", replace(GRPO, advantage=ConflictAware(), surrogate=PolicyGradient(), divergence=None), "grpo", "2508.03772",
             "tokens that right and wrong responses share are not pushed down; uncertain responses are left out",
             "advantages:ConflictAware tokens:conflict_weights"),
        _row("copo", replace(TOKENS, advantage=Consistency(), surrogate=Clip(0.2, dual=3.0)), "grpo", "2508.04138",
             "prompts are compared too, and all the more where their answers agree", "advantages:Consistency surrogates:dual_clip"),
        _row("steer", replace(TOKENS, surrogate=Clip(0.2, 0.28, dual=10.0), tokens=Steer(0.8)), "grpo", "2510.10150",
             "tokens that would change the entropy much count less", "tokens:entropy_change tokens:damped"),
        _row("clip-cov", replace(TOKENS, surrogate=Clip(1.0), tokens=ClipCov()), "grpo", "2505.22617",
             "some tokens of high covariance are left out, at random; ratios up to 2 are not clipped",
             "tokens:covariance tokens:ClipCov"),
        _row("kl-cov", replace(
                TOKENS, surrogate=PolicyGradient(), tokens=TopCov(), divergence=KL(1.0, "abs", "loss", reference="old"),
                solver=replace(WHOLE, epochs=4, minibatch=32)),
             "grpo", "2505.22617", "no clip; the tokens of highest covariance are held to the sampling policy", "tokens:covariance tokens:TopCov"),
        _row("lp-reg", replace(TOKENS, surrogate=Clip(1.0, 9.0), tokens=Unlikely(), divergence=KL(1.0, "k3", "loss", reference="min-p")), "grpo",
             "2510.03222", "unlikely tokens that are no noise are held to the filtered sampling policy", "divergence:min_p_logp tokens:Unlikely"),
        _row("siren", replace(
                GRPO, advantage=GroupNormalised("none"), surrogate=Clip(0.2, 0.28), aggregation="seq-mean-token-sum-norm", divergence=None,
                anchor=EntropyAnchor()),
             "grpo/dr-grpo", "2509.25133", "the entropy at the uncertain places is tied to its start", "entropy:nucleus_entropy entropy:anchor_pull"),
        _row("dph-rl", replace(TOKENS, aux=Rehearsal()), "grpo", "2509.07430",
             "prompts that the start solves are rehearsed by a divergence that covers its responses, the others are explored",
             "auxiliary:rehearsal divergence:f_reference_loss"),
        _row("dph-rl/forward-kl", replace(TOKENS, aux=Rehearsal(f="kl_ref_pi")), "dph-rl", "2509.07430",
             "the likelihood of the start's own right responses", "auxiliary:rehearsal divergence:f_reference_loss"),
        _row("prorl", replace(
                TOKENS, filter=AccuracyBand(), surrogate=Clip(0.2, 0.4), divergence=KL(0.001, "k3", "loss"), refresh=HardReset(200)),
             "grpo/dapo", "2505.24864", "the reference is replaced by the policy again and again, with a fresh optimiser", "references:HardReset"),
        _row("difficulty-filter", replace(GRPO, group_size=16, filter=AccuracyBand(0.25, 0.75, strict=False)), "grpo", "2504.03380",
             "only prompts that are solved about half the time", "filters:AccuracyBand"),
        _row("lcpo", replace(GRPO, reward=(LengthBudget("exact"),)), "grpo", "2503.04697", "as many tokens as the prompt asks for",
             "rewards:exact_length"),
        _row("lcpo/max", replace(GRPO, reward=(LengthBudget("max"),)), "lcpo", "2503.04697", "at most as many tokens as the prompt asks for",
             "rewards:at_most_length"),
        _row("kdrl", replace(TOKENS, divergence=KL(0.2, "k2", "loss", reference="teacher", schedule=Anneal(0.002))), "grpo", "2506.02208",
             "the reverse KL to a teacher on the student's own responses, annealed", "divergence:k2 schedules:linear"),
        _row("f-div-reg", replace(RLOO, divergence=FDivergence(0.05, "js")), "rloo", "2302.08215",
             "any f-divergence of whole responses in the reward, here Jensen-Shannon", "divergence:f_reward"),
        *(_row(f"f-div-reg/{name}", replace(RLOO, divergence=FDivergence(0.05, f, alpha)), "f-div-reg", "2302.08215", new, "divergence:f_reward")
          for name, f, alpha, new in (
              ("forward-kl", "kl_ref_pi", None, "KL(ref || pi): covers what the reference does"),
              ("chi2", "chi2", None, "Pearson's chi^2: the optimum is linear in the reward"),
              ("hellinger", "hellinger", None, "the squared Hellinger distance"),
              ("alpha", "alpha", 0.5, "the alpha divergence, between both KLs"),
              ("tv", "tv", None, "total variation: mass moves to the best only where it pays"))),
        *(_row(id, replace(RLOO, num_envs=64, group_size=16, reward=(Matching(0.1, f),), advantage=MovingBaseline(), divergence=None),
               "rloo/reinforce", "2302.08215", new, "rewards:matching_reward divergence:f_reward")
          for id, f, new in (
              ("f-dpg", "js", "fits the target ref exp(R / beta) / Z in the Jensen-Shannon divergence"),
              ("f-dpg/forward-kl", "kl_ref_pi", "fits it in the KL from the target: distributional policy gradient"))),
        _row("kl-controller", replace(RLHF, divergence=KL(0.2, schedule=AdaptiveKL()), refresh=Fixed()), "ppo-rlhf", "1909.08593",
             "the weight of the KL follows the measured KL to a target", "schedules:adaptive"),
        _row("salsa", replace(RLHF, refresh=Soup(0.5)), "ppo-rlhf", "2411.01798", "the reference is the average of two supervised models",
             "references:Soup references:lerp"),
        _row("warp", replace(ON_POLICY["rloo/reinforce"].value, num_envs=64, divergence=KL(0.1), refresh=EMA(0.01), merge=Warp()),
             "rloo/reinforce", "2406.16768", "the reference is the policy's own average; runs are merged on the sphere and pulled back to the start",
             "merging:Warp references:slerp references:lerp references:EMA"),
    ]
)  # fmt: skip
