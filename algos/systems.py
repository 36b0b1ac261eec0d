"""All methods, joined from the families' tables."""

from __future__ import annotations

from markovia.algos.denoising.methods import DENOISING, ChainMethod
from markovia.algos.diffusion_policy.method import Imitation, TwoLayer
from markovia.algos.diffusion_policy.methods import DIFFUSION_POLICY
from markovia.algos.measures import MEASURES
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.methods import OFF_POLICY
from markovia.algos.offline.method import Offline
from markovia.algos.offline.methods import OFFLINE, SEQUENCES, WARM_START
from markovia.algos.offline.sequences import ReturnConditioned
from markovia.algos.offline.warm_start import WarmStart
from markovia.algos.on_policy.language import LANGUAGE
from markovia.algos.on_policy.method import OnPolicy
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.tilting import TILTING
from markovia.algos.preference.method import Preference
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.reward_model import REWARD_MODEL, RewardTraining
from markovia.algos.safe.methods import SAFE
from markovia.algos.table import Row, nearest, table

# What a driver can be built for, one settings class per family.
Method = OnPolicy | OffPolicy | Offline | WarmStart | ReturnConditioned | ChainMethod | Preference | Imitation | TwoLayer | RewardTraining


# The families' tables by what they hold, in the order in which they are listed.
TABLES: dict[str, dict[str, Row]] = {
    "Policy gradients": ON_POLICY,
    "Policy gradients for language models": LANGUAGE,
    "Tilted laws and best-of-n, solved exactly": TILTING,
    "Replay": OFF_POLICY,
    "Fixed datasets": OFFLINE | WARM_START | SEQUENCES,
    "Denoising": DENOISING,
    "Diffusion policies": DIFFUSION_POLICY,
    "Preferences": PREFERENCE | REWARD_MODEL,
    "Constraints, safety and several rewards": SAFE,
    "Measures of data": MEASURES,
}


def rows() -> dict[str, Row]:
    """Every method by id."""
    return table([row for family in TABLES.values() for row in family.values()])


def find(method_id: str) -> Row:
    """The row of one id. Raises ValueError with the nearest ids."""
    known = rows()
    if method_id not in known:
        raise ValueError(f"unknown method {method_id!r}{nearest(method_id, known)} (`markovia systems` lists all)")
    return known[method_id]
