"""The denoising methods: ways to steer a denoiser that stays as it is, and training through the reward's gradient."""

from __future__ import annotations

from markovia.algos.denoising.adjoint import AdjointMatching
from markovia.algos.denoising.itps import ITPS
from markovia.algos.denoising.particles import FKSteering
from markovia.algos.denoising.rlg import RLGuidance
from markovia.algos.table import Row, table

_HERE = "markovia.algos.denoising."
_KIND = ("denoising",)
_DECODE = ("value", "limit", "invariance", "bad_input")
_NO_TRAINING = "nothing is trained, so there is neither a loss gradient nor a run to resume"
_PATHS = "2411.16627"

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
    ]
)
