"""Problems whose optimum is known exactly, with their solvers: what the methods are checked against."""

from typing import TYPE_CHECKING, Any

from markovia.envs.exact.cmdp import CMDP, CMDPSolution
from markovia.envs.exact.cmdps import cmdp_grid, cmdp_two_state
from markovia.envs.exact.divergences import FDivergence, f_divergence, f_optimum
from markovia.envs.exact.preference import PreferenceBandit, PreferenceGame
from markovia.envs.exact.tabular import TabularMDP
from markovia.envs.exact.token_mdp import EnumerableTokenMDP, best_of_n_kl_bound, binary_fixed_point

if TYPE_CHECKING:
    from markovia.envs.exact.denoisers import GMMDenoiser, LinearGaussianDenoising

__all__ = [
    "CMDP",
    "CMDPSolution",
    "EnumerableTokenMDP",
    "FDivergence",
    "GMMDenoiser",
    "LinearGaussianDenoising",
    "PreferenceBandit",
    "PreferenceGame",
    "TabularMDP",
    "best_of_n_kl_bound",
    "binary_fixed_point",
    "cmdp_grid",
    "cmdp_two_state",
    "f_divergence",
    "f_optimum",
]


def __getattr__(name: str) -> Any:
    """The denoisers live on a device: they, and torch with them, are imported when they are asked for."""
    if name in ("GMMDenoiser", "LinearGaussianDenoising"):
        from markovia.envs.exact import denoisers

        return getattr(denoisers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
