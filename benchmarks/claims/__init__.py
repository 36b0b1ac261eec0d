"""Executable claims: what each method is supposed to do, as a function that measures it and says whether it holds.

A claim function returns {"measured": ..., "bound": ..., "holds": bool, ...} (plain JSON); `markovia claims` runs it with `arguments`.
Class "fast" takes under 60 s on two cores, "slow" at most 10 minutes. An id is a method's, or a method's with the task behind an @.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Claim(NamedTuple):
    """Where a claim's function is, with what it is called, and how long it may take."""

    function: str  # "module:function"
    speed: Literal["fast", "slow"] = "fast"
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never changed)


_HERE = "markovia.claims.on_policy:"
_DENOISING = "markovia.claims.denoising:"
_CHAIN_PAIRS = ("d3po", "spo-step", "diffusion-dpo", "se-ppo", "rebel-diffusion")
_CHUNKS = "markovia.claims.diffusion_policy:"
_OFF_POLICY = "markovia.claims.off_policy:"
_OFFLINE = "markovia.claims.offline:"
_OFFLINE_EXACT = "markovia.claims.offline_exact:"
_SAFE = "markovia.claims.safe:"
_SAFE_LEARNING = "markovia.claims.safe_learning:"
_LANGUAGE = "markovia.claims.language:"
_TARGETS = "markovia.claims.language_targets:"
_ENTROPY = "markovia.claims.language_entropy:"
_AUXILIARY = "markovia.claims.language_auxiliary:"
_TILTING = "markovia.claims.tilting:"
_PREFERENCE = "markovia.claims.preference:"
_PREFERENCE_SAMPLES = "markovia.claims.preference_samples:"
_PREFERENCE_GAMES = "markovia.claims.preference_games:"
_PREFERENCE_POLICIES = "markovia.claims.preference_policies:"
_PREFERENCE_LISTS = "markovia.claims.preference_lists:"
_PREFERENCE_METRICS = "markovia.claims.preference_metrics:"
_TREE = (
    "a2c", "ppo", "ppo/kl", "trpo", "trpo/natural", "mdpo-on", "mdpo-on/tsallis", "fixpo", "lpo-dpo-discovered", "lpo-dpo-discovered/lpo",
    "rloo", "rloo/reinforce", "ppo-rlhf",
)  # fmt: skip

CLAIMS: dict[str, Claim] = {
    **{m: Claim(_HERE + "token_tree", "fast", {"method": m}) for m in _TREE},
    "grpo": Claim(_LANGUAGE + "grpo_fixed_point"),
    "grpo/dr-grpo": Claim(_LANGUAGE + "grpo_lengths"),
    "grpo/dapo": Claim(_LANGUAGE + "dapo_prompts"),
    "grpo/gspo": Claim(_LANGUAGE + "expected_gradients", "fast", {"method": "grpo/gspo"}),
    "remax": Claim(_LANGUAGE + "remax_variance"),
    "grpo-d": Claim(_LANGUAGE + "grpo_d_speed", "slow"),
    "ppo-max": Claim(_LANGUAGE + "ppo_max_entropy", "slow"),
    "p3o": Claim(_LANGUAGE + "p3o_frontier"),
    "p3o@gradient": Claim(_LANGUAGE + "expected_gradients", "fast", {"method": "p3o"}),
    "p3o/joint": Claim(_LANGUAGE + "p3o_frontier", "fast", {"method": "p3o/joint"}),
    "p3o/joint@gradient": Claim(_LANGUAGE + "expected_gradients", "fast", {"method": "p3o/joint"}),
    **{m: Claim(_AUXILIARY + "ptx_fixed_point", "fast", {"method": m}) for m in ("ppo-max/ptx", "ppo-rlhf/ptx")},
    "dph-rl": Claim(_AUXILIARY + "dph_rl_support", "slow"),
    "dph-rl/forward-kl": Claim(_AUXILIARY + "dph_rl_support", "slow", {"method": "dph-rl/forward-kl", "bound": 0.75}),
    "apa": Claim(_LANGUAGE + "apa_fixed_point"),
    "apa/initial": Claim(_LANGUAGE + "apa_fixed_point", "fast", {"anchor": "ref"}),
    **{f"{m}@arithmetic": Claim("markovia.claims.arithmetic:arithmetic", "slow", {"method": m}) for m in ("grpo", "rloo", "ppo")},
    "rto": Claim(_TARGETS + "rto_fixed_point"),
    "dvpo": Claim(_TARGETS + "dvpo_one_step", "slow"),
    "gtpo": Claim(_ENTROPY + "gtpo_shared_prefix"),
    "copo": Claim(_ENTROPY + "copo_silent_prompts"),
    "steer": Claim(_ENTROPY + "steer_ranks"),
    "clip-cov": Claim(_ENTROPY + "clip_cov_entropy", "slow"),
    "kl-cov": Claim(_ENTROPY + "kl_cov_entropy", "slow"),
    "lp-reg": Claim(_ENTROPY + "lp_reg_rescue"),
    "siren": Claim(_ENTROPY + "siren_anchor"),
    "prorl": Claim(_TARGETS + "prorl_resets", "slow"),
    "difficulty-filter": Claim(_TARGETS + "difficulty_kl"),
    "lcpo": Claim(_TARGETS + "lcpo_lengths", "slow"),
    "lcpo/max": Claim(_TARGETS + "lcpo_lengths", "slow", {"mode": "max"}),
    "kdrl": Claim(_TARGETS + "kdrl_fixed_point"),
    "f-div-reg": Claim(_TARGETS + "f_optimum", "fast", {"f": "js"}),
    "f-div-reg/forward-kl": Claim(_TARGETS + "f_optimum", "fast", {"f": "kl_ref_pi"}),
    "f-div-reg/chi2": Claim(_TARGETS + "f_optimum", "fast", {"f": "chi2"}),
    "f-div-reg/hellinger": Claim(_TARGETS + "f_optimum", "fast", {"f": "hellinger"}),
    "f-div-reg/alpha": Claim(_TARGETS + "f_optimum", "fast", {"f": "alpha", "alpha": 0.5}),
    "f-div-reg/tv": Claim(_TARGETS + "f_optimum", "fast", {"f": "tv", "bound": 0.03}),
    "rl-kl-bayes": Claim(_TILTING + "rl_kl_bayes"),
    "bon-asymptotics": Claim(_TILTING + "bon_asymptotics"),
    "inf-align": Claim(_TILTING + "inf_align"),
    "rm-ensemble": Claim(_TILTING + "rm_ensemble"),
    "f-dpg": Claim(_TARGETS + "matched_target", "fast", {"f": "js"}),
    "f-dpg/forward-kl": Claim(_TARGETS + "matched_target", "fast", {"f": "kl_ref_pi"}),
    "kl-controller": Claim(_TARGETS + "kl_controller"),
    "salsa": Claim(_TARGETS + "salsa_optimum"),
    "warp": Claim(_TARGETS + "warp_merging"),
    "ddpo": Claim(_HERE + "linear_gaussian", "fast", {"method": "ddpo"}),
    "ppo@linear-gaussian": Claim(_HERE + "linear_gaussian", "fast", {"method": "ppo"}),
    "ppo@cartpole": Claim(_HERE + "cartpole", "slow", {"method": "ppo"}),
    "trpo@cartpole": Claim(_HERE + "cartpole", "slow", {"method": "trpo", "bound": 300.0}),
    "ppo@digits": Claim(_HERE + "digits", "slow", {"method": "ppo"}),
    "rloo@sentiment": Claim("markovia.claims.sentiment:sentiment_rloo", "slow"),
    "ddpo@digits": Claim(_HERE + "digits", "slow", {"method": "ddpo"}),
    "ddpo@gradient": Claim("markovia.claims.denoising_ddpo:gradient"),
    "ddpo@local-kl": Claim("markovia.claims.denoising_ddpo:local_kl", "slow"),
    "ddpo@inner-epochs": Claim("markovia.claims.denoising_ddpo:inner_epochs"),
    "sac": Claim(_OFF_POLICY + "pendulum", "slow", {"method": "sac", "bound": -220.0}),
    "td3": Claim(_OFF_POLICY + "pendulum", "slow", {"method": "td3", "bound": -220.0}),
    "td3@twin-minimum": Claim(_OFF_POLICY + "twin_minimum", "slow"),
    "mdpo-off": Claim(_OFF_POLICY + "regularised_optimum", "fast", {"q": 1.0}),
    "mdpo-off@pendulum": Claim(_OFF_POLICY + "pendulum", "slow", {"method": "mdpo-off", "bound": -250.0}),
    "mdpo-off/tsallis": Claim(_OFF_POLICY + "regularised_optimum", "fast", {"q": 1.5}),
    "mdpo-off/tsallis@pendulum": Claim(_OFF_POLICY + "pendulum", "slow", {"method": "mdpo-off/tsallis", "bound": -250.0}),
    "rlg": Claim(_DENOISING + "rlg"),
    "fk-steering": Claim(_DENOISING + "fk_mixture_law"),
    "fk-steering@expected-reward": Claim(_DENOISING + "fk_expected_reward"),
    "fk-steering@masked-text": Claim(_DENOISING + "fk_masked_text"),
    "itps": Claim(_DENOISING + "itps"),
    "adjoint-matching": Claim(_DENOISING + "adjoint_matching"),
    "adjoint-matching@memoryless": Claim(_DENOISING + "adjoint_memoryless"),
    **{m: Claim("markovia.claims.denoising_preference:" + m.replace("-", "_")) for m in _CHAIN_PAIRS},
    "adjoint-matching@digits": Claim("markovia.claims.denoising_digits:adjoint_digits"),
    "diffusion-dpo@digits": Claim("markovia.claims.denoising_digits:dpo_digits"),
    "diffusion-policy": Claim(_CHUNKS + "diffusion_modes"),
    "flow-policy": Claim(_CHUNKS + "flow_modes"),
    "flow-policy@marginals": Claim(_CHUNKS + "flow_marginals"),
    "dppo": Claim(_CHUNKS + "dppo_linear"),
    "dppo@obstacle": Claim(_CHUNKS + "dppo_obstacle"),
    "dppo@exploration": Claim(_CHUNKS + "structured_exploration"),
    "ppo-lag@exact": Claim(_SAFE + "lagrangian_grid"),
    "cpo@exact": Claim(_SAFE + "cpo_grid"),
    "cat@exact": Claim(_SAFE + "cat_grid"),
    "ppo-lag/pid@pendulum": Claim(_SAFE + "pendulum_limit", "slow", {"method": "ppo-lag/pid"}),
    "cpo@pendulum": Claim(_SAFE + "pendulum_limit", "slow", {"method": "cpo"}),
    "trpo-lag": Claim(_SAFE + "trpo_lag_grid", "slow"),
    "reload": Claim(_SAFE + "reload_cycles"),
    "stepmix": Claim(_SAFE + "stepmix_floor"),
    "reload/ppo": Claim(_SAFE_LEARNING + "reload_grid", "slow"),
    "c-morl/ppo": Claim(_SAFE_LEARNING + "learnt_front"),
    "acs/ppo": Claim(_SAFE_LEARNING + "acs_ledge"),
    "cal": Claim(_SAFE_LEARNING + "cal_exact"),
    "cal@pendulum": Claim(_SAFE_LEARNING + "cal_pendulum", "slow"),
    "stepmix@baseline": Claim(_SAFE_LEARNING + "stepmix_baseline"),
    "stepmix@offline": Claim(_SAFE + "stepmix_offline"),
    "epsmix": Claim(_SAFE + "epsmix_floor"),
    "c-morl": Claim(_SAFE + "c_morl_front"),
    "acs@exact": Claim(_SAFE + "acs_shield"),
    "bc": Claim(_OFFLINE + "imitation"),
    "filtered-bc": Claim(_OFFLINE + "best_episodes"),
    "td3-bc": Claim(_OFFLINE + "better_than_imitation", "fast", {"method": "td3-bc"}),
    "td3-bc@bfloat16": Claim(_OFFLINE + "precision_kept", "slow"),
    "iql@bfloat16": Claim(_OFFLINE + "precision_kept", "slow", {"method": "iql"}),
    "rebrac": Claim(_OFFLINE + "at_least", "slow", {"method": "rebrac", "other": "td3-bc", "tier": "medium", "slack": 3.0}),
    "spot": Claim(_OFFLINE_EXACT + "support", "slow"),
    "cfpi": Claim(_OFFLINE_EXACT + "improved_actions"),
    "cfpi/sg": Claim("markovia.claims.improvement:operators"),
    "a2pr": Claim(_OFFLINE + "guided", "slow"),
    "mcep": Claim(_OFFLINE_EXACT + "mild_evaluation"),
    "mcep@pointmass": Claim(_OFFLINE + "evaluation_policy", "slow"),
    "decision-transformer": Claim(_OFFLINE + "asked_returns", "slow"),
    "decision-transformer@best-return": Claim(_OFFLINE + "asked_for_the_best", "slow"),
    "wsrl": Claim("markovia.claims.warm_start:pendulum", "slow"),
    "awac": Claim(_OFFLINE_EXACT + "weighted_regression"),
    "iql": Claim(_OFFLINE_EXACT + "in_sample_value"),
    "cql": Claim(_OFFLINE_EXACT + "conservative_values"),
    "cql@pointmass": Claim(_OFFLINE + "better_than_imitation", "slow", {"method": "cql"}),
    "cql/cal-ql": Claim(_OFFLINE_EXACT + "calibrated_values"),
    "cql@true-values": Claim(_OFFLINE_EXACT + "conservative_true_values"),
    "edac": Claim(_OFFLINE + "ensemble", "slow", {"method": "edac", "highest": 0.0}),
    "edac/sac-n": Claim(_OFFLINE + "ensemble", "slow", {"method": "edac/sac-n", "lowest": 0.5}),
    "saco-tq": Claim("markovia.claims.offline_data:saco_tq"),
    "saco-tq@scores": Claim("markovia.claims.offline_data:saco_tq_scores"),
    "reward-model": Claim("markovia.claims.reward_model:shift_invariance"),
    "dpo": Claim(_PREFERENCE + "dpo"),
    "dpo/cdpo": Claim(_PREFERENCE_POLICIES + "identities", "fast", {"method": "dpo/cdpo"}),
    **{m: Claim(_PREFERENCE + "f_dpo", "fast", {"method": m}) for m in ("f-dpo", "f-dpo/forward-kl", "f-dpo/alpha")},
    "f-dpo@least-mass": Claim(_PREFERENCE + "least_mass"),
    "squared-po": Claim(_PREFERENCE_POLICIES + "squared_po"),
    "h-dpo": Claim(_PREFERENCE + "h_dpo"),
    "modpo": Claim(_PREFERENCE + "modpo"),
    "spo-seq": Claim(_PREFERENCE + "spo_seq"),
    "rebel": Claim(_PREFERENCE + "regression", "fast", {"method": "rebel", "bound": 2e-3}),
    "irepo": Claim(_PREFERENCE + "regression", "fast", {"method": "irepo", "bound": 1e-3}),
    "copg": Claim(_PREFERENCE + "regression", "fast", {"method": "copg", "bound": 5e-3}),
    "dro": Claim(_PREFERENCE + "dro"),
    "kto": Claim(_PREFERENCE + "kto"),
    "tr-dpo": Claim(_PREFERENCE + "hard_syncs"),
    "mmpo": Claim(_PREFERENCE_SAMPLES + "mmpo"),
    "robust-dpo": Claim(_PREFERENCE_SAMPLES + "robust_dpo", "slow"),
    "rdpo-refined": Claim(_PREFERENCE_SAMPLES + "rdpo_refined"),
    "slic": Claim(_PREFERENCE_SAMPLES + "slic"),
    "rpo": Claim(_PREFERENCE_SAMPLES + "partial_coverage", "fast", {"method": "rpo"}),
    "vpo": Claim(_PREFERENCE_SAMPLES + "partial_coverage", "fast", {"method": "vpo"}),
    "vpo/online": Claim(_PREFERENCE_SAMPLES + "vpo_online"),
    "spac": Claim(_PREFERENCE_SAMPLES + "spac"),
    "wrpo": Claim(_PREFERENCE_SAMPLES + "wrpo"),
    "lipo": Claim(_PREFERENCE_LISTS + "lipo"),
    "aot": Claim(_PREFERENCE_SAMPLES + "aot"),
    "sft-bridge": Claim(_PREFERENCE_SAMPLES + "sft_bridge"),
    "sdpo-stepwise": Claim(_PREFERENCE_SAMPLES + "sdpo"),
    **{m: Claim("markovia.claims.preference_sequences:best_reward", "slow", {"method": m}) for m in ("simpo", "ln-dpo", "sam-po")},
    "implicit-rm-generalisation": Claim("markovia.claims.preference_sequences:reward_models", "slow"),
    "likelihood-overopt": Claim(_PREFERENCE_METRICS + "over_optimisation"),
    "exo": Claim(_PREFERENCE_LISTS + "exo"),
    "brain": Claim(_PREFERENCE_LISTS + "brain"),
    "ipo": Claim(_PREFERENCE_GAMES + "online_ipo"),
    "ipo/ipo-md": Claim(_PREFERENCE_GAMES + "ipo_md"),
    "ipo/nash-md": Claim(_PREFERENCE_GAMES + "nash_md"),
    "sppo": Claim(_PREFERENCE_GAMES + "sppo"),
    "sppo@displacement": Claim(_PREFERENCE_POLICIES + "sppo_displacement"),
    "inpo": Claim(_PREFERENCE_GAMES + "inpo"),
    "nash-mp": Claim(_PREFERENCE_GAMES + "mirror_prox"),
    "apo-accelerated": Claim(_PREFERENCE_GAMES + "accelerated"),
    "alpha-po": Claim(_PREFERENCE_POLICIES + "alpha_po"),
    "rpo@displacement": Claim(_PREFERENCE_POLICIES + "rpo_displacement"),
    "nca": Claim(_PREFERENCE_POLICIES + "nca"),
    "tdpo": Claim(_PREFERENCE_POLICIES + "tdpo"),
    "bmc": Claim(_PREFERENCE_POLICIES + "bmc"),
    "wpo": Claim(_PREFERENCE_POLICIES + "wpo"),
    "orpo": Claim(_PREFERENCE_POLICIES + "odds"),
    "mipo": Claim(_PREFERENCE_POLICIES + "mipo"),
    "tpo": Claim(_PREFERENCE_POLICIES + "identities", "fast", {"method": "tpo"}),
    "pro": Claim(_PREFERENCE_POLICIES + "identities", "fast", {"method": "pro"}),
    "iopo": Claim(_PREFERENCE_POLICIES + "iopo"),
    "did": Claim(_PREFERENCE_METRICS + "information"),
    "ranking-accuracy": Claim(_PREFERENCE_METRICS + "ranking"),
    "adc": Claim(_PREFERENCE_METRICS + "conflict"),
}
