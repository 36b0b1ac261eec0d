"""The denoising methods: ways to steer a denoiser that stays as it is, and training through the reward's gradient."""

from __future__ import annotations

from markovia.algos.denoising.adjoint import AdjointMatching
from markovia.algos.denoising.itps import ITPS
from markovia.algos.denoising.particles import FKSteering
from markovia.algos.denoising.preference import DenoisingPreference
from markovia.algos.denoising.rlg import RLGuidance
from markovia.algos.denoising.sources import Candidates, NoisedData, SameStart, SemiPolicy
from markovia.algos.preference.anchors import EachRound
from markovia.algos.preference.pairwise import Difference, Pairwise, Residual, Score
from markovia.algos.preference.pieces import ScoreGap
from markovia.algos.table import Row, table

ChainMethod = AdjointMatching | DenoisingPreference  # settings that a driver of denoising agents can be built for

_HERE = "markovia.algos.denoising."
_KIND = ("denoising",)
_DECODE = ("value", "limit", "invariance", "bad_input")
_NO_TRAINING = "nothing is trained, so there is neither a loss gradient nor a run to resume"
_PATHS = "2411.16627"
_LOSS = "markovia.algos.preference.pairwise:logistic"
_REBEL = Pairwise(1.0, Difference(Score(anchors=(("old", 1.0),))), Residual(), margin=ScoreGap(1.0))

DENOISING = table(
    [
        Row(
            "rlg", RLGuidance(), None, "2508.21016", "the output is moved beyond the tuned model's, seen from the reference: a KL strength of beta/w",
            _KIND, (_HERE + "rlg:tuned_beyond_reference", "markovia.envs.denoising.networks:extrapolate"), "rlg", _DECODE, _NO_TRAINING,
        ),
        Row(
            "fk-steering", FKSteering(), None, "2501.06848", "particles are weighted and copied by what their clean estimates promise",
            _KIND, (_HERE + "particles:log_potential", _HERE + "particles:last_log_potential", _HERE + "particles:resample"), "fk-steering",
            _DECODE, _NO_TRAINING,
        ),
        Row(
            "itps", ITPS(), "itps/gd", _PATHS, "a pull towards a sketch, every noise level visited several times (stochastic sampling)",
            _KIND, (_HERE + "itps:pulled", _HERE + "itps:alignment", _HERE + "sampling:denoise"), "itps", _DECODE, _NO_TRAINING,
        ),
        Row(
            "itps/gd", ITPS(strategy="gd", rho=20.0), "itps/rs", _PATHS, "a pull towards a sketch at every step (guided diffusion)",
            _KIND, (_HERE + "itps:pulled", _HERE + "itps:alignment"), "itps", _DECODE, _NO_TRAINING,
        ),
        Row(
            "itps/bi", ITPS(strategy="bi"), "itps/rs", _PATHS, "the chain starts half-way, at the noised sketch (biased initialisation)",
            _KIND, (_HERE + "itps:ITPS", _HERE + "itps:resample_path"), "itps", _DECODE, _NO_TRAINING,
        ),
        Row(
            "itps/pr", ITPS(strategy="pr"), "itps/rs", _PATHS, "many samples are ranked by their distance to the sketch (post-hoc ranking)",
            _KIND, (_HERE + "itps:ranking", _HERE + "itps:alignment"), "itps", _DECODE, _NO_TRAINING,
        ),
        Row(
            "itps/op", ITPS(strategy="op"), "itps/rs", _PATHS, "the policy starts anew from the sketch's first point (output perturbation)",
            _KIND, (_HERE + "itps:ITPS",), "itps", _DECODE, _NO_TRAINING,
        ),
        Row(
            "itps/rs", ITPS(strategy="rs"), None, _PATHS, "plain samples, the sketch is not used (random sampling)",
            _KIND, (_HERE + "sampling:denoise",), "itps", _DECODE, _NO_TRAINING,
        ),
        Row(
            "adjoint-matching", AdjointMatching(), None, "2409.08861", "the control is regressed on the reward's gradient carried back to each step",
            _KIND, (_HERE + "adjoint:matching_loss", _HERE + "adjoint:lean_adjoint", _HERE + "adjoint:check_memoryless"), "adjoint-matching",
        ),
        Row(
            "d3po", DenoisingPreference(source=SameStart(), loss=Pairwise(0.1), clip=0.1), "dpo", "2311.13231",
            "every step of two chains inherits the chains' label", _KIND,
            (_HERE + "pairs:control_ratio", _HERE + "pairs:clipped", _LOSS), "d3po",
        ),
        Row(
            "spo-step", DenoisingPreference(source=Candidates(), loss=Pairwise(10.0), clip=0.1), "d3po", "2406.04314",
            "pairs are made anew at every step, from one sample, by a step-aware score", _KIND,
            (_HERE + "sources:Candidates", _HERE + "pairs:best_and_worst", _HERE + "pairs:control_ratio", _LOSS), "spo-step",
        ),
        Row(
            "diffusion-dpo", DenoisingPreference(source=NoisedData(), loss=Pairwise(2500.0)), "dpo", "2311.12908",
            "pairs of clean samples, noised alike: the log-ratio integrated over the forward process", _KIND,
            (_HERE + "pairs:noise_error", _HERE + "sources:noised_pairs", _LOSS), "diffusion-dpo",
        ),
        Row(
            "se-ppo", DenoisingPreference(source=SemiPolicy(), loss=Pairwise(2500.0)), "diffusion-dpo", "2410.05255",
            "only winners are data; the other sample is an earlier checkpoint's, pushed down or learnt from", _KIND,
            (_HERE + "pairs:anchor_rule", _HERE + "sources:SemiPolicy", _LOSS), "se-ppo",
        ),
        Row(
            "rebel-diffusion", DenoisingPreference(source=SameStart(steps=False), loss=_REBEL, reference=EachRound()), "rebel", "2404.16767",
            "differences of reward regressed on the log-ratios of whole chains from one start", _KIND,
            (_HERE + "pairs:control_ratio", _HERE + "sources:SameStart", "markovia.algos.preference.pairwise:squared"), "rebel-diffusion",
        ),
    ]
)
