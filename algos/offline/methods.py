"""The offline methods: every row is a setting of the off-policy update on a fixed dataset (`Offline`)."""

from __future__ import annotations

from dataclasses import replace

from markovia.algos.off_policy.slots import (
    Anchored,
    Ascent,
    Behaviour,
    Bounded,
    Clone,
    ClosedForm,
    Conservative,
    Critics,
    Deterministic,
    Diverse,
    Expectile,
    FixedTemperature,
    Guided,
    Held,
    InSampleTarget,
    JointBehaviour,
    LoggedTarget,
    LowerValue,
    Mixture,
    QuantileCritics,
    SmoothedTarget,
    SoftTarget,
    Squashed,
    Supported,
    TunedTemperature,
    Weighted,
)
from markovia.algos.offline.method import Logged, Offline
from markovia.algos.offline.sequences import ReturnConditioned
from markovia.algos.offline.warm_start import WarmStart, continued
from markovia.algos.table import Row, table

_HELD = "markovia.algos.off_policy.regularised:"
_LOSSES = "markovia.algos.off_policy.losses:"

BC = Offline(policy=Deterministic(), target=None, critic=None, actor=Clone(), temperature=FixedTemperature(0.0))
FILTERED_BC = Offline(policy=Deterministic(), target=None, critic=None, actor=Clone(), temperature=FixedTemperature(0.0), data=Logged(fraction=0.1))
TD3_BC = Offline(
    policy_delay=2,
    policy=Deterministic(),
    target=SmoothedTarget(),
    critic=Critics(coef=1.0),
    actor=Held(),
    temperature=FixedTemperature(0.0),
)
_DEEP = (256, 256, 256)
REBRAC = Offline(
    batch_size=1024,
    policy_delay=2,
    policy=Deterministic(hidden=_DEEP),
    target=SmoothedTarget(penalty=0.01),
    critic=Critics(hidden=_DEEP, layer_norm=True, lr=1e-3, coef=1.0),
    actor=Held(alpha=1.0, weight=0.01, reduce="sum", aggregate="min", lr=1e-3),
    temperature=FixedTemperature(0.0),
    data=Logged(normalize_obs=False, next_action=True),
)
MCEP = replace(TD3_BC, evaluation=Held(alpha=10.0))
SPOT = replace(TD3_BC, num_env_steps=1_100_000, actor=Supported(), behaviour=Behaviour())
_DEEPER = (256, 256, 256, 256)
A2PR = replace(
    TD3_BC, policy=Deterministic(hidden=_DEEP), critic=Critics(hidden=_DEEPER, coef=1.0), value=LowerValue(hidden=_DEEPER),
    actor=Guided(), behaviour=JointBehaviour(),
)  # fmt: skip
AWAC = Offline(
    policy=Bounded(hidden=_DEEP),
    target=SoftTarget(entropy=False),
    critic=Critics(hidden=_DEEP, coef=1.0),
    actor=Weighted(),
    temperature=FixedTemperature(0.0),
)
MCEP_AWAC = replace(
    AWAC, policy=Squashed(), critic=Critics(coef=1.0), actor=Weighted(beta=1.0, max_weight=1000.0, lr=3e-5), evaluation=Anchored(),
    data=Logged(normalize_obs=False),
)  # fmt: skip
IQL = Offline(
    policy=Bounded(),
    target=InSampleTarget(),
    value=Expectile(),
    actor=Weighted(cosine=True),
    temperature=FixedTemperature(0.0),
)
CQL = Offline(
    policy=Squashed(hidden=_DEEP),
    target=SoftTarget(entropy=False),
    critic=Critics(hidden=_DEEP, coef=1.0),
    regulariser=Conservative(alpha=10.0),
    actor=Ascent(lr=3e-5),
    temperature=TunedTemperature(lr=3e-5),
)
CAL_QL = replace(CQL, regulariser=Conservative(calibrated=True), data=Logged(returns_to_go="zero"))
SAC_N = Offline(
    num_env_steps=3_000_000, policy=Squashed(hidden=_DEEP), critic=Critics(num=10, hidden=_DEEP, coef=1.0), data=Logged(normalize_obs=False)
)
EDAC = replace(SAC_N, regulariser=Diverse())
CFPI = Offline(
    num_env_steps=500_000,
    policy=Mixture(),
    target=LoggedTarget(),
    critic=QuantileCritics(),
    actor=Clone(lr=1e-4),
    evaluation=ClosedForm(),
    temperature=FixedTemperature(0.0),
    data=Logged(next_action=True),
)
_CONTROL = ("control",)
_IMPROVED = "markovia.agents.improved:"

OFFLINE = table(
    [
        Row(
            "bc", BC, None, "2106.06860", "imitation of logged actions, a baseline; squared error, or -log pi of a stochastic policy", _CONTROL,
            (_HELD + "squared_distance",), "bc", ("value", "gradient", "invariance", "resume", "bad_input"), "a root has no parent to be a limit of",
        ),
        Row(
            "filtered-bc", FILTERED_BC, "bc", "2106.01345", "imitation of the tenth of the episodes with the largest returns", _CONTROL,
            (_HELD + "squared_distance",), "filtered-bc",
        ),
        Row(
            "td3-bc", TD3_BC, "bc", "2106.06860", "TD3 on a dataset: the actor climbs Q, scaled by its size, and stays at logged actions", _CONTROL,
            (_HELD + "held_objective", _HELD + "squared_distance", _LOSSES + "smoothed_action", _LOSSES + "td_error"), "td3-bc",
        ),
        Row(
            "rebrac", REBRAC, "td3-bc", "2305.09836", "TD3+BC with the distance in the target too, layer norm, deeper networks", _CONTROL,
            (_HELD + "held_objective", _HELD + "penalised_value", _HELD + "squared_distance"), "rebrac",
        ),
        Row(
            "mcep", MCEP, "td3-bc", "2306.03680", "a second, more mildly held actor acts after training and never enters a target", _CONTROL,
            (_HELD + "held_objective", _HELD + "squared_distance", _LOSSES + "smoothed_action"), "mcep",
        ),
        Row(
            "spot", SPOT, "td3-bc", "2202.06239", "held where a model of the behaviour puts density, in place of near each logged action", _CONTROL,
            (_HELD + "support_bound", _HELD + "held_objective", _LOSSES + "smoothed_action"), "spot",
        ),
        Row(
            "a2pr", A2PR, "td3-bc", "2405.19909", "held by the better of the logged action and that of a model of the data's good actions", _CONTROL,
            (_HELD + "better_action", _HELD + "lower_target", _HELD + "support_bound", _HELD + "held_objective"), "a2pr",
        ),
        Row(
            "awac", AWAC, "bc", "2006.09359", "regression on logged actions, weighted by their advantage over the policy's own", _CONTROL,
            (_HELD + "advantage_weight", _LOSSES + "bootstrap", _LOSSES + "td_error"), "awac",
        ),
        Row(
            "mcep/awac", MCEP_AWAC, "awac", "2306.03680", "a second actor, which climbs Q and is held by likelihood, acts and enters no target",
            _CONTROL, (_HELD + "anchored_objective", _HELD + "advantage_weight", _LOSSES + "bootstrap"), "mcep/awac",
        ),
        Row(
            "iql", IQL, "awac", "2110.06169", "an expectile over logged actions is the value, so that no other action is ever asked about", _CONTROL,
            (_HELD + "expectile", _HELD + "advantage_weight", _LOSSES + "bootstrap"), "iql",
        ),
        Row(
            "cql", CQL, "sac", "2006.04779", "SAC on a dataset, whose critics are pushed down where a softmax of Q has its weight", _CONTROL,
            (_HELD + "conservative_gap", _LOSSES + "bootstrap", _LOSSES + "mirror_objective"), "cql",
        ),
        Row(
            "cql/cal-ql", CAL_QL, "cql", "2303.05479", "values are not pushed below the logged Monte Carlo return", _CONTROL,
            (_HELD + "calibrated", _HELD + "conservative_gap"), "cql/cal-ql",
        ),
        Row(
            "cfpi", CFPI, "bc", "2211.15956", "acts by what a mixture of logged actions and the critics of its policy allow in closed form", _CONTROL,
            (_IMPROVED + "improve", _IMPROVED + "mode_budgets", _IMPROVED + "jensen_ellipsoid", _IMPROVED + "ellipsoid_step",
             _LOSSES + "quantile_error"), "cfpi",
        ),
        Row(
            "cfpi/sg", replace(CFPI, policy=Mixture(num=1)), "cfpi", "2211.15956", "the same with a single Gaussian, whose step is exact", _CONTROL,
            (_IMPROVED + "ellipsoid_step", _IMPROVED + "lower_bound", _LOSSES + "quantile_error"), "cfpi/sg",
        ),
        Row(
            "edac", EDAC, "edac/sac-n", "2110.01548", "critics whose gradients in the action are turned away from each other", _CONTROL,
            (_HELD + "gradient_cosine", _LOSSES + "aggregate", _LOSSES + "soft_value"), "edac",
        ),
        Row(
            "edac/sac-n", SAC_N, "sac", "2110.01548", "SAC on a dataset with the minimum over ten critics", _CONTROL,
            (_LOSSES + "aggregate", _LOSSES + "soft_value", _LOSSES + "mirror_objective"), "edac/sac-n",
        ),
    ]
)

# Methods of two phases, whose settings are those of both.
AWAC_ONLINE = WarmStart(offline=AWAC, online=continued(AWAC), retain="append")
IQL_ONLINE = WarmStart(offline=IQL, online=continued(IQL, actor=Weighted()), retain="append")
_PARENTS, _WHY = ("value", "limit", "invariance", "resume", "bad_input"), "its update is its parent's to the bit, whose gradient is checked"
WARM_START = table(
    [
        Row(
            "awac/online", AWAC_ONLINE, "awac", "2006.09359",
            "goes on in the environment by the same update, its steps beside the data in one pool",
            _CONTROL, (_HELD + "advantage_weight", _LOSSES + "bootstrap", _LOSSES + "td_error"), "awac/online",
            _PARENTS, _WHY,
        ),
        Row(
            "iql/online", IQL_ONLINE, "iql", "2110.06169",
            "goes on in the environment by the same update, its steps beside the data in one pool",
            _CONTROL, (_HELD + "expectile", _HELD + "advantage_weight", _LOSSES + "bootstrap"), "iql/online",
            _PARENTS, _WHY,
        ),
        Row(
            "wsrl", WarmStart(), "cql/cal-ql", "2412.07762",
            "conservative learning on data, then SAC that forgets them after steps of a frozen policy",
            _CONTROL, (_LOSSES + "drawn_members", _LOSSES + "bootstrap", _HELD + "calibrated", _HELD + "conservative_gap"), "wsrl",
        ),
    ]
)

# Imitation of sequences, with a loop of its own.
SEQUENCES = table(
    [
        Row(
            "decision-transformer", ReturnConditioned(), "bc", "2106.01345",
            "imitates given the return that followed, and acts on one that it is asked for",
            _CONTROL, ("markovia.algos.offline.sequences:masked_error", "markovia.agents.return_conditioned:SequencePolicy"), "decision-transformer",
        ),
    ]
)
