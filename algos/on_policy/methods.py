"""The on-policy methods: every row is a setting of the one loop (`OnPolicy`); where a row is silent, the loop's default (PPO) holds."""

from __future__ import annotations

from markovia.algos.advantages import GAE, BatchReturn, LeaveOneOut, MovingBaseline
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.method import (
    Descent,
    Doubling,
    DualAscent,
    MirrorStep,
    NaturalGradient,
    OnPolicy,
    ValueLoss,
)
from markovia.algos.on_policy.references import EMA
from markovia.algos.on_policy.surrogates import Clip, Discovered, KLDrift, Learnt, PolicyGradient
from markovia.algos.table import Row, table

STEPPED = ("control", "tabular", "denoising")
ALL = (*STEPPED, "language")
_HERE = "markovia.algos.on_policy."

A2C = OnPolicy(
    num_envs=8,
    num_steps=5,
    advantage=GAE(lam=1.0),
    normalize_advantage="none",
    surrogate=PolicyGradient(),
    solver=Descent(optimizer="rmsprop", lr=7e-4, anneal=False, epochs=1, minibatch=None),
)
PPO = OnPolicy()
CRITIC_APART = ValueLoss(coef=1.0, separate=Descent(lr=1e-3, anneal=False, epochs=10, minibatch=128))
TRPO = OnPolicy(normalize_advantage="batch", surrogate=PolicyGradient(), solver=NaturalGradient(), value=CRITIC_APART)
MDPO = OnPolicy(
    normalize_advantage="batch",
    surrogate=KLDrift(needs_kl="new_old"),
    controller=MirrorStep(),
    solver=Descent(lr=3e-4, epochs=10, minibatch=None),
    value=ValueLoss(coef=1.0, clip=0.2, separate=Descent(lr=3e-4, epochs=5, minibatch=128)),
)
RLOO = OnPolicy(
    num_envs=16,
    group_size=4,
    advantage=LeaveOneOut(),
    normalize_advantage="none",
    surrogate=PolicyGradient(),
    aggregation="seq-mean-token-sum",
    divergence=KL(beta=0.05),
    solver=Descent(lr=1e-6, anneal=False, epochs=1, minibatch=None, unit="row", max_grad_norm=1.0),
)

ON_POLICY = table(
    [
        Row(
            "a2c", A2C, None, "2205.09123", "one full-batch step with a critic's advantage", ALL,
            (_HERE + "surrogates:ratio_objective", "markovia.algos.advantages:gae"), "a2c",
        ),
        Row(
            "ppo", PPO, "a2c", "1707.06347", "several epochs on a batch, the ratio clipped", ALL,
            (_HERE + "surrogates:clip_drift", "markovia.algos.advantages:gae"), "ppo",
        ),
        Row(
            "ppo/kl", OnPolicy(surrogate=KLDrift(), controller=Doubling()), "ppo", "1707.06347",
            "an adaptive penalty on KL(old || new) in place of the clip", ALL, (_HERE + "surrogates:ratio_objective",), "ppo/kl",
        ),
        Row(
            "trpo", TRPO, "trpo/natural", "1502.05477", "the natural step with a line search that holds the KL bound", STEPPED,
            (_HERE + "natural:natural_step", _HERE + "natural:fisher_product"), "trpo",
        ),
        Row(
            "trpo/natural", OnPolicy(
                normalize_advantage="batch", surrogate=PolicyGradient(), solver=NaturalGradient(line_search=False), value=CRITIC_APART
            ), "a2c", "1502.05477", "the gradient preconditioned by the inverse Fisher matrix", STEPPED,
            (_HERE + "natural:natural_step", _HERE + "natural:conjugate_gradient"), "trpo/natural",
        ),
        Row(
            "mdpo-on", MDPO, "a2c", "2005.09814", "mirror descent: several steps against KL(new || old), its weight growing", ALL,
            (_HERE + "surrogates:ratio_objective", _HERE + "loss:drift_kl"), "mdpo-on",
        ),
        Row(
            "mdpo-on/tsallis", OnPolicy(
                normalize_advantage="batch", surrogate=KLDrift(needs_kl="tsallis", q=1.5), controller=MirrorStep(),
                solver=MDPO.solver, value=MDPO.value,
            ), "mdpo-on", "2005.09814", "the Bregman divergence of Tsallis' entropy in place of KL",
            ("control", "tabular", "language"),
            (_HERE + "surrogates:tsallis_bregman",), "mdpo-on/tsallis",
        ),
        Row(
            "fixpo", OnPolicy(
                num_steps=8192, surrogate=KLDrift(), controller=DualAscent(), normalize_advantage="none",
                value=ValueLoss(coef=0.1, clip=0.2), solver=Descent(lr=3e-4, epochs=10, minibatch=512),
            ), "ppo/kl", "2312.05405", "KL bounded in every state of the batch by a dual variable and a fix-up phase", ALL,
            (_HERE + "fixup:Price.step", _HERE + "fixup:Price.fix_up"), "fixpo",
        ),
        Row(
            "lpo-dpo-discovered", OnPolicy(surrogate=Discovered()), "ppo", "2210.05639", "a drift in closed form that was found by meta-learning",
            ALL,
            (_HERE + "surrogates:discovered_drift",), "lpo-dpo-discovered",
        ),
        Row(
            "lpo-dpo-discovered/lpo", OnPolicy(surrogate=Learnt()), "ppo", "2210.05639", "a drift network, meta-trained by evolution", ALL,
            (_HERE + "surrogates:learnt_drift", _HERE + "surrogates:drift_features"), "lpo-dpo-discovered/lpo",
        ),
        Row(
            "rloo", RLOO, "rloo/reinforce", "2402.14740", "the baseline is the mean of the other responses to the prompt",
            ("language", "tabular", "denoising"),
            ("markovia.algos.advantages:leave_one_out", _HERE + "loss:weights"), "rloo",
        ),
        Row(
            "rloo/reinforce", OnPolicy(
                num_envs=16, advantage=MovingBaseline(), normalize_advantage="none", surrogate=PolicyGradient(), aggregation="seq-mean-token-sum",
                divergence=KL(beta=0.05), solver=RLOO.solver,
            ), None, "2402.14740", "a response is one action; the baseline is the running mean of returns", ("language", "tabular", "denoising"),
            (_HERE + "surrogates:ratio_objective", _HERE + "loss:weights"), "rloo/reinforce",
        ),
        Row(
            "ppo-rlhf", OnPolicy(
                num_envs=64, advantage=GAE(gamma=1.0, lam=0.95), normalize_advantage="batch", divergence=KL(beta=0.05), refresh=EMA(rate=0.001),
                solver=Descent(lr=1e-5, value_lr=5e-6, anneal=False, epochs=1, minibatch=16, unit="row", max_grad_norm=1.0),
            ), "ppo", "2404.10719", "token KL in the reward, advantages whitened over a large batch, reference by EMA",
            ("language", "tabular", "denoising"),
            (_HERE + "surrogates:clip_drift", _HERE + "divergence:k1"), "ppo-rlhf",
        ),
        Row(
            "ddpo", OnPolicy(
                num_envs=64, advantage=BatchReturn(), normalize_advantage="none", surrogate=Clip(clip=1e-4),
                solver=Descent(lr=3e-4, anneal=False, epochs=1, minibatch=None, max_grad_norm=1.0),
            ), "ppo", "2305.13301", "the chain's standardised reward is the advantage of each denoising step", ("denoising", "tabular"),
            ("markovia.algos.advantages:BatchReturn", _HERE + "surrogates:clip_drift"), "ddpo",
        ),
    ]
)
