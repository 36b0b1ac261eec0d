"""The preference methods: every row is a setting of one loop (`Preference`); where a row is silent, DPO's setting holds.

Anchors: ref is the reference that `reference` moves, old the policy that sampled the round, proposal another sampler, stage0, stage1, ... the
policies of earlier rounds, whose log-probs a file has to hold: the loop keeps none of them. gold is a third row of each pair; which response that
is says the row's comment.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from markovia.algos.preference.anchors import EachRound, Extrapolated, FromMixture, FromPolicy, Sync
from markovia.algos.preference.game import SelfPlay
from markovia.algos.preference.listwise import EXO, NCA, InfoNCA, LambdaRank, Listwise, PlackettLuce
from markovia.algos.preference.method import Preference
from markovia.algos.preference.pairwise import Blend, Crossed, Difference, Hinge, Logistic, Pairwise, Residual, Squared, TokenKL
from markovia.algos.preference.pieces import (
    NLL,
    Debiased,
    EarlierRounds,
    Fixed,
    FromScores,
    Given,
    LogitOfVotes,
    LogRatio,
    OnPolicyWeight,
    OtherRewards,
    ReferenceGap,
    ScoreGap,
    Smoothed,
)
from markovia.algos.preference.scores import Score
from markovia.algos.preference.unpaired import DRO, KTO, Classify, Imitate, Pointwise, Transport, WinRate
from markovia.algos.table import Row, table

BOTH, TEXT = ("language", "denoising"), ("language",)
_HERE = "markovia.algos.preference."


@dataclass(frozen=True)
class Tool:
    """A row that is no loss: a metric or a tool of theory, by the name of its function."""

    function: str  # "module:function"


# Variants that another row's claim measures.
_CLAIM = {
    "slic/hinge-norm": "slic", "ipo/online": "ipo", "rdpo-refined/soft": "rdpo-refined", "orpo/beta": "orpo", "asft": "orpo", "asft/beta": "orpo",
    "tpo/length": "tpo", "tdpo/tdpo1": "tdpo", "exo/pair": "exo", "nca/pair": "nca", "nca/info-nca": "exo", "aot/unpaired": "aot",
    "sppo/hard": "sppo@displacement", "tr-dpo/hard": "tr-dpo", **{f"sft-bridge/{v}": "sft-bridge" for v in ("sft", "kl", "js", "hellinger")},
}  # fmt: skip


def _row(id: str, value: Any, parent: str | None, paper: str, new: str, functions: str, kinds: tuple[str, ...] = BOTH) -> Row:
    where = tuple(_HERE + f for f in functions.split())
    return Row(id, value, parent, paper, new, kinds, where, _CLAIM.get(id, id))


def _tool(id: str, paper: str, new: str, functions: str, kinds: tuple[str, ...] = BOTH) -> Row:
    where = tuple(_HERE + f for f in functions.split())
    return Row(id, Tool(where[0]), None, paper, new, kinds, where, id, ("value", "bad_input"), "a statistic is not descended on and holds no state")


BARE = Score(anchors=())
MEAN = Score(reduce="mean")
BARE_MEAN = Score(reduce="mean", anchors=())
ODDS = Score(reduce="mean", anchors=(), psi="odds")
OLD = Score(anchors=(("old", 1.0),))
PHI = "pairwise:logistic"


def _psi(psi: Any, alpha: float = 0.5) -> Preference:
    return Preference(Pairwise(diff=Difference(Score(psi=psi, alpha=alpha))))


def _imitate(generator: Any) -> Preference:
    return Preference(Pointwise(Imitate(generator=generator)))


def _several_steps(loss: Any, per_prompt: int) -> Preference:
    """A loss of log-ratios to the sampler. They are 0 at a round's first step, which does not know how far it is to go: several follow."""
    return Preference(loss, sampler=FromPolicy(per_prompt), solver=dataclasses.replace(Preference().solver, epochs=4))


PREFERENCE = table(
    [
        # -- DPO, its links, labels, margins and weights
        _row("dpo", Preference(), None, "2305.18290", "RLHF's optimum by classifying pairs", f"{PHI} scores:response_score"),
        _row("dpo/cdpo", Preference(Pairwise(label=Smoothed(0.1))), "dpo", "2305.18290", "labels are wrong at a known rate; the margin stays finite",
             f"{PHI} pieces:Smoothed"),
        _row("f-dpo", _psi("js"), "dpo", "2309.16240", "the optimum under the Jensen-Shannon divergence", f"shapes:js {PHI}"),
        _row("f-dpo/forward-kl", _psi("forward_kl"), "f-dpo", "2309.16240", "the optimum under KL(ref || pi)", f"shapes:forward_kl {PHI}"),
        _row("f-dpo/alpha", _psi("alpha", 0.5), "f-dpo", "2309.16240", "the optimum under the alpha divergence", f"shapes:alpha_power {PHI}"),
        _row("squared-po", _psi("squared_log"), "f-dpo", "2602.06788", "a divergence whose minimum is at 1, so that chosen mass is not displaced",
             f"shapes:squared_log theory:predicates {PHI}"),
        _row("slic", Preference(Pairwise(1.0, Difference(BARE), Hinge(1.0), terms=(NLL(0.1, of="gold", reduce="sum"),))), None, "2305.10425",
             "separate by a margin, stay near the SFT target (gold)", "pairwise:hinge pieces:NLL"),
        _row("slic/hinge-norm", Preference(Pairwise(0.05, link=Hinge(1.0))), "slic", "2309.06657", "hinge on the log-ratio, no target",
             "pairwise:hinge"),
        _row("ipo", Preference(Pairwise(1.0, link=Squared(0.1))), "dpo", "2310.12036", "a finite target margin", "pairwise:squared"),
        _row("ipo/online", Preference(Pairwise(1.0, link=Squared(0.1), label=Given()), sampler=FromPolicy(2)), "ipo", "2403.08635",
             "responses of the policy, soft labels of a preference model", "pairwise:squared pieces:Given"),
        _row("ipo/ipo-md", Preference(Pairwise(1.0, link=Squared(0.1), label=Given()), sampler=FromMixture(0.5)), "ipo/online", "2403.08635",
             "responses of a mixture of policy and reference", "pairwise:squared anchors:mixture_logits"),
        _row("ipo/nash-md", Preference(SelfPlay((("ref", 0.1),)), sampler=FromMixture(0.5, both=False)), "ipo/ipo-md", "2312.00886",
             "policy gradient on the win rate against the mixture", "game:self_play anchors:mixture_logits"),
        _row("simpo", Preference(Pairwise(2.5, Difference(BARE_MEAN), margin=Fixed(1.375))), "ln-dpo", "2405.14734",
             "mean log-prob without a reference, and a margin", f"scores:response_score {PHI}"),
        _row("alpha-po", Preference(Pairwise(2.5, Difference(Score("mean", (), psi="alpha", alpha=0.25)), margin=Fixed(0.1))), "simpo", "2501.03884",
             "the mean log-prob bent by a power", f"shapes:alpha_power {PHI}"),
        _row("ln-dpo", Preference(Pairwise(5.0, Difference(MEAN))), "dpo", "2407.15229", "the score is the mean over tokens",
             f"scores:response_score {PHI}"),
        _row("h-dpo", Preference(Pairwise(0.01, Difference(Score(policy=0.9)))), "dpo", "2411.07595",
             "the entropy term of the reverse KL is scaled: below 1 sharper", f"scores:response_score {PHI}"),
        _row("mmpo", Preference(Pairwise(0.01, label=FromScores(2.2))), "dpo", "2410.03145", "the label is as sure as the scores are apart",
             f"pieces:FromScores {PHI}"),
        _row("robust-dpo", Preference(Pairwise(link=Logistic(limit=10.0), label=Debiased(0.1))), "dpo", "2403.00409",
             "unbiased under random flips of the labels", f"pieces:Debiased {PHI}"),
        _row("rdpo-refined", Preference(Pairwise(margin=ScoreGap(1.0))), "dpo", "2402.08005", "outside scores enter the logit of teacher-made pairs",
             f"pieces:ScoreGap {PHI}"),
        _row("rdpo-refined/soft", Preference(Pairwise(label=FromScores(1.0))), "rdpo-refined", "2402.08005", "outside scores make the label soft",
             f"pieces:FromScores {PHI}"),
        _row("wpo", Preference(Pairwise(0.01, weight=OnPolicyWeight())), "dpo", "2406.11827", "pairs that the policy would write count more",
             f"pieces:OnPolicyWeight {PHI}", TEXT),
        _row("mipo", Preference(Pairwise(10.0, Difference(BARE_MEAN), margin=ReferenceGap())), "ln-dpo", "2409.17545",
             "as much reference as it orders the pair rightly", f"pieces:ReferenceGap {PHI}"),
        _row("modpo", Preference(Pairwise(margin=OtherRewards((0.0, 0.5)), temperature=0.5)), "dpo", "2310.03708",
             "other rewards enter as a margin; any weighting of them", f"pieces:OtherRewards {PHI}"),
        _row("spo-seq", Preference(Pairwise(0.1, Difference(Score(anchors=(("stage1", 1.0),))), margin=EarlierRounds((1.0,)))),
             "modpo", "2405.12739", "dimension after dimension, keeping what earlier rounds learnt", f"pieces:EarlierRounds {PHI}"),
        _row("iopo", Preference(Pairwise(diff=Crossed())), "dpo", "2411.06208", "answers of two prompts against the answers swapped",
             f"pairwise:Crossed {PHI}", TEXT),
        # -- with a likelihood term
        _row("orpo", Preference(Pairwise(1.0, Difference(ODDS), coef=0.1, terms=(NLL(1.0),))), None, "2403.07691",
             "odds ratio beside the SFT loss, in one stage", f"shapes:log_odds {PHI} pieces:NLL", TEXT),
        _row("orpo/beta", Preference(Pairwise(1.0, Difference(ODDS))), "orpo", "2502.01237", "after SFT: odds with a temperature, no likelihood term",
             f"shapes:log_odds {PHI}", TEXT),
        _row("asft", Preference(Pointwise(Classify(1.0), ODDS, "pairs", chosen_nll=1.0)), "orpo", "2409.10571", "each response's odds against zero",
             "unpaired:classify shapes:log_odds", TEXT),
        _row("asft/beta", Preference(Pointwise(Classify(1.0), ODDS, "pairs")), "asft", "2502.01237", "after SFT, with a temperature",
             "unpaired:classify shapes:log_odds", TEXT),
        # its weight is eta beta of the authors' code, on summed log-probs
        _row("rpo", Preference(Pairwise(0.01, terms=(NLL(0.005 * 0.01, reduce="sum"),))), "dpo", "2405.16436",
             "the chosen likelihood as a pessimist's term", f"pieces:NLL {PHI}"),
        _row("tpo", Preference(Pairwise(0.01, Difference(BARE), terms=(NLL(1.0, of="gold"),))), "dpo", "2405.16681",
             "no reference; the likelihood of a gold response", f"pieces:NLL {PHI}"),
        _row("tpo/length", Preference(Pairwise(0.01, Difference(BARE_MEAN), margin=Fixed(0.5), terms=(NLL(1.0, of="gold"),))), "tpo", "2405.16681",
             "mean log-probs and a margin", f"pieces:NLL {PHI}"),
        _row("wrpo", Preference(Pairwise(0.01, Blend(0.1))), "dpo", "2412.03187", "the chosen score moves to a stronger model's response (gold)",
             f"pairwise:Blend {PHI}"),
        _row("vpo", Preference(Pairwise(terms=(LogRatio(-0.01, of="chosen"),))), "rpo", "2405.19320", "pessimism: lift responses to calibrate on",
             f"pieces:LogRatio {PHI}"),
        _row("vpo/online", Preference(Pairwise(terms=(LogRatio(0.01, of="gold"),)), sampler=FromPolicy(2)), "vpo", "2405.19320",
             "optimism: push down samples to calibrate on (gold: a response of the reference)", f"pieces:LogRatio {PHI}"),
        # -- per token
        _row("sam-po", Preference(Pairwise(diff=Difference(Score(tokens="kept")))), "dpo", "2406.10957", "as many tokens of both responses",
             f"token_level:shared_subset {PHI}"),
        _row("tdpo", Preference(Pairwise(diff=TokenKL())), "dpo", "2404.11999", "the sequential KL of both responses in the logit",
             f"pairwise:token_kl_offset {PHI} token_level:kl_ref_policy", TEXT),
        _row("tdpo/tdpo1", Preference(Pairwise(diff=TokenKL(1.0, detach_chosen=False))), "tdpo", "2404.11999", "both KLs with gradient, in full",
             f"pairwise:token_kl_offset {PHI} token_level:kl_ref_policy", TEXT),
        _row("bmc", Preference(Pairwise(0.01, Difference(Score(tokens="boosted", boost_limit=1.5)))), "dpo", "2408.07471",
             "unlikely tokens in which the responses differ count more", f"scores:boost token_level:differing {PHI}", TEXT),
        # -- lists
        _row("exo", Preference(Listwise(loss=EXO())), "nca/info-nca", "2402.00856", "the reverse KL over the list: seeks the mode",
             "listwise:reverse_kl listwise:reward_target"),
        _row("exo/pair", Preference(Listwise(loss=EXO(eps=1e-3), view="pairs")), "exo", "2402.00856", "pairs with a flip rate",
             "listwise:reverse_kl"),
        _row("nca", Preference(Listwise(beta=0.01, loss=NCA(0.1))), "nca/info-nca", "2402.05369", "each response against noise, so likelihoods stay",
             "listwise:noise_contrastive listwise:reward_target"),
        _row("nca/pair", Preference(Listwise(beta=0.01, loss=NCA(), view="pairs")), "nca", "2402.05369", "pairs", "listwise:noise_contrastive"),
        _row("nca/info-nca", Preference(Listwise(beta=0.01, loss=InfoNCA(0.1))), "dpo", "2402.05369", "rewards as soft labels over a list",
             "listwise:cross_entropy listwise:reward_target"),
        _row("brain", Preference(Listwise(Score(anchors=(("proposal", 1.0),)), 1.0, InfoNCA(1.0), (("ref", 1.0), ("proposal", -1.0))),
                                 sampler=FromPolicy(32)), "nca/info-nca", "2402.02479", "a posterior given a good reward, by importance weights",
             "listwise:cross_entropy listwise:reward_target"),
        _row("lipo", Preference(Listwise(beta=0.05, loss=LambdaRank())), "dpo", "2402.01878", "ordered pairs weighted by their place in the ranking",
             "listwise:lambda_rank listwise:lambda_weights"),
        _row("pro", Preference(Listwise(BARE_MEAN, 1.0, PlackettLuce(), best_nll=0.05)), None, "2306.17492",
             "Plackett-Luce sharpened by the gaps in reward, and the best one's likelihood", "listwise:gapped_plackett_luce"),
        # -- single responses and sorted samples
        _row("kto", Preference(Pointwise(KTO())), "dpo", "2402.01306", "labels of single responses, judged against a reference point",
             "unpaired:kto"),
        _row("aot", Preference(Transport()), "dpo", "2406.05882", "sorted differences: dominance in distribution", "unpaired:Transport"),
        _row("aot/unpaired", Preference(Transport(view="unpaired")), "aot", "2406.05882", "sorted scores of good and bad responses",
             "unpaired:Transport unpaired:quantiles"),
        _row("dro", Preference(Pointwise(DRO(1.0))), None, "2405.19107", "single rewards and a value network", "unpaired:dro"),
        _row("sft-bridge", _imitate("chi2"), None, "2507.00018", "demonstrations with the reference felt: chi-square", "unpaired:imitation"),
        _row("sft-bridge/sft", _imitate("tv"), "sft-bridge", "2507.00018", "total variation: ordinary SFT", "unpaired:imitation"),
        _row("sft-bridge/kl", _imitate("kl"), "sft-bridge", "2507.00018", "the KL-type generator", "unpaired:imitation"),
        _row("sft-bridge/js", _imitate("js"), "sft-bridge", "2507.00018", "Jensen-Shannon", "unpaired:imitation"),
        _row("sft-bridge/hellinger", _imitate("hellinger"), "sft-bridge", "2507.00018", "squared Hellinger", "unpaired:imitation"),
        # -- regression and games
        _row("copg", Preference(Pairwise(0.5, link=Residual(), margin=ScoreGap(1.0), coef=1.0)), "rebel", "2406.19185",
             "policy gradient from any data, the other response as baseline (coef = 1 / (2 beta))", "pairwise:squared pieces:ScoreGap"),
        _row("rebel", _several_steps(Pairwise(1.0, Difference(OLD), Residual(), margin=ScoreGap(1.0, kl_coef=0.05)), 2), "ipo",
             "2404.16767", "regress log-ratios to the sampler on differences of reward", "pairwise:squared pieces:ScoreGap"),
        _row("irepo", _several_steps(Pairwise(0.1, Difference(OLD), Residual(), margin=LogitOfVotes(5)), 2), "rebel", "2405.15230",
             "the logit of the share of votes is the target", "pairwise:squared pieces:LogitOfVotes"),
        _row("sppo", _several_steps(Pointwise(WinRate(1e3), OLD, "pairs", coef=0.5), 5), "rebel", "2405.00675",
             "regress each log-ratio on its win rate: self-play", "unpaired:win_rate_regression"),
        _row("sppo/hard", _several_steps(Pointwise(WinRate(1e3, hard=True), OLD, "pairs", coef=0.5), 5), "sppo", "2405.00675",
             "labels for win rates", "unpaired:win_rate_regression"),
        _row("inpo", _several_steps(Pairwise(1.0, Difference(Score(anchors=(("ref", 1 / 3), ("old", 2 / 3)))), Squared(7.5e-3)), 8),
             "ipo", "2407.00617", "a mixed anchor (tau / eta of ref): the last iterate goes to the regularised equilibrium",
             "pairwise:squared scores:response_score"),
        _row("nash-mp", Preference(SelfPlay((("ref", 0.1), ("target", 0.5)), "others", max_ratio=10.0), target=Sync(0.05, 1), sampler=FromPolicy(4)),
             "ipo/nash-md", "2505.19731", "self-play near a policy that lags: prices beta on the reference, beta / eta on the target",
             "game:self_play anchors:soft_sync"),
        _row("spac", _several_steps(Pairwise(0.5, Difference(OLD), coef=10.0, terms=(
            LogRatio(0.5, "gold", "old", 20.0), LogRatio(-0.25, "chosen", "old", 20.0), LogRatio(-0.25, "rejected", "old", 20.0))), 1),
             "dpo", "2406.04274", "an adversarial critic lowers own samples (gold) against the data: pessimism", f"pieces:LogRatio {PHI}"),
        # -- anchors over time
        _row("tr-dpo", Preference(Pairwise(0.05), Sync(0.6, 512)), "dpo", "2404.09656", "the reference follows in weight space",
             f"anchors:soft_sync {PHI}"),
        _row("tr-dpo/hard", Preference(Pairwise(0.05), Sync(1.0, 512)), "tr-dpo", "2404.09656", "the reference is replaced",
             f"anchors:soft_sync {PHI}"),
        _row("sdpo-stepwise", Preference(reference=EachRound()), "dpo", "2403.19270", "the data in parts, the reference replaced after each", PHI),
        _row("apo-accelerated", Preference(reference=Extrapolated(0.3)), "sdpo-stepwise", "2410.06293", "Nesterov's extrapolation between rounds",
             f"anchors:extrapolate {PHI}"),
        # -- tools and metrics
        _tool("did", "2505.23761", "which distribution of information a pair of samplers carries",
             "theory:did theory:ideal_rejected theory:did_entropy"),
        _tool("ranking-accuracy", "2405.19534", "does the policy rank the pair rightly, and could it",
             "metrics:ranking_accuracy metrics:idealized_accuracy"),
        _tool("implicit-rm-generalisation", "2409.03650", "implicit against explicit rewards under shift", "metrics:generalisation"),
        _tool("likelihood-overopt", "2410.11677", "entropy and mass of the k likeliest tokens", "metrics:top_k", TEXT),
        _tool("adc", "2405.11647", "how much training on one dimension of preference harms the others",
             "metrics:dimension_conflict metrics:hybrid_weights"),
    ]
)
