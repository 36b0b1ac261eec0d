"""The denoising methods: ways to steer a denoiser that stays as it is, training through the reward's gradient, and training on pairs."""

from __future__ import annotations

from typing import Any

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

_PATHS = "2411.16627"
_PAIRWISE = "markovia.algos.preference.pairwise:"
_REBEL = Pairwise(1.0, Difference(Score(anchors=(("old", 1.0),))), Residual(), margin=ScoreGap(1.0))


def _where(functions: str) -> tuple[str, ...]:
    """"module:function ..." of this package, or with a full path, as references."""
    return tuple(f if f.startswith("markovia.") else "markovia.algos.denoising." + f for f in functions.split())


def _steer(id: str, value: Any, parent: str | None, paper: str, new: str, functions: str, claim: str = "") -> Row:
    checks, why = ("value", "limit", "invariance", "bad_input"), "nothing is trained, so there is neither a loss gradient nor a run to resume"
    return Row(id, value, parent, paper, new, ("denoising",), _where(functions), claim or id, checks, why)


def _train(id: str, value: ChainMethod, parent: str | None, paper: str, new: str, functions: str) -> Row:
    return Row(id, value, parent, paper, new, ("denoising",), _where(functions), id)


DENOISING = table(
    [
        # -- steering: a finished denoiser is sampled in another way
        _steer("rlg", RLGuidance(), None, "2508.21016", "the output goes beyond the tuned model's, seen from the reference: strength beta/w",
               "rlg:tuned_beyond_reference markovia.envs.denoising.networks:extrapolate rlg:RLGuidance.sample"),
        _steer("fk-steering", FKSteering(), None, "2501.06848", "particles are weighted and copied by what their clean estimates promise",
               "particles:log_potential particles:last_log_potential particles:resample particles:FKSteering.sample"),
        _steer("itps", ITPS(), "itps/gd", _PATHS, "a pull towards a sketch, every noise level visited several times (stochastic sampling)",
               "itps:pulled itps:alignment sampling:denoise itps:ITPS.sample"),
        _steer("itps/gd", ITPS(strategy="gd", rho=20.0), "itps/rs", _PATHS, "a pull towards a sketch at every step but the last (guided diffusion)",
               "itps:pulled itps:alignment", "itps"),
        _steer("itps/bi", ITPS(strategy="bi"), "itps/rs", _PATHS, "the chain starts half-way, at the noised sketch (biased initialisation)",
               "itps:ITPS itps:resample_path", "itps"),
        _steer("itps/pr", ITPS(strategy="pr"), "itps/rs", _PATHS, "many samples are ranked by their distance to the sketch (post-hoc ranking)",
               "itps:ranking itps:alignment", "itps"),
        _steer("itps/op", ITPS(strategy="op"), "itps/rs", _PATHS, "the policy starts anew from the sketch's first point (output perturbation)",
               "itps:ITPS", "itps"),
        _steer("itps/rs", ITPS(strategy="rs"), None, _PATHS, "plain samples, the sketch is not used (random sampling)", "sampling:denoise", "itps"),
        # -- the reward's gradient
        _train("adjoint-matching", AdjointMatching(), None, "2409.08861", "the control is regressed on the reward's gradient at each step",
               "adjoint:matching_loss adjoint:lean_adjoint adjoint:check_memoryless"),
        # -- pairs
        _train("d3po", DenoisingPreference(source=SameStart(), loss=Pairwise(0.1), clip=0.1), "dpo", "2311.13231",
               "every step of two chains inherits the chains' label", f"pairs:control_ratio pairs:clipped {_PAIRWISE}logistic"),
        _train("spo-step", DenoisingPreference(source=Candidates(), loss=Pairwise(10.0), clip=0.1), "d3po", "2406.04314",
               "pairs are made anew at every step, from one sample, by a step-aware score",
               f"sources:Candidates pairs:best_and_worst pairs:control_ratio {_PAIRWISE}logistic"),
        _train("diffusion-dpo", DenoisingPreference(source=NoisedData(), loss=Pairwise(2500.0)), "dpo", "2311.12908",
               "pairs of clean samples, noised alike: the log-ratio integrated over the forward process",
               f"pairs:noise_error sources:noised_pairs {_PAIRWISE}logistic"),
        _train("se-ppo", DenoisingPreference(source=SemiPolicy(), loss=Pairwise(2500.0)), "diffusion-dpo", "2410.05255",
               "only winners are data; the other sample is an earlier checkpoint's, pushed down or learnt from",
               f"pairs:anchor_rule sources:SemiPolicy {_PAIRWISE}logistic"),
        _train("rebel-diffusion", DenoisingPreference(source=SameStart(steps=False), loss=_REBEL, reference=EachRound()), "rebel", "2404.16767",
               "differences of reward regressed on the log-ratios of whole chains from one start",
               f"pairs:control_ratio sources:SameStart {_PAIRWISE}squared"),
    ]
)  # fmt: skip
