"""The chunk-denoising methods: two that clone data, and their fine-tuning in the two-layer MDP."""

from __future__ import annotations

from dataclasses import replace

from markovia.algos.advantages import ChainGAE
from markovia.algos.diffusion_policy.method import FlowNoise, Imitation, TwoLayer
from markovia.algos.on_policy.method import Descent, ValueLoss
from markovia.algos.on_policy.surrogates import ChainClip
from markovia.algos.table import Row, table

_LOSS = "markovia.algos.diffusion_policy.loss:"

DIFFUSION = Imitation()
FLOW = replace(DIFFUSION, noise=FlowNoise())
DPPO = TwoLayer(
    num_envs=40,
    num_steps=50,
    scale_reward=True,
    advantage=ChainGAE(),
    surrogate=ChainClip(),
    value=ValueLoss(coef=1.0, separate=Descent(lr=1e-3, anneal=False, epochs=5, minibatch=5000), pretrain=2),
    solver=Descent(lr=1e-4, anneal=False, epochs=5, minibatch=5000, max_grad_norm=1.0, kl_stop_nats=0.66),
)
_CONTROL = ("control",)

DIFFUSION_POLICY = table(
    [
        Row(
            "diffusion-policy", DIFFUSION, "bc", "2303.04137", "chunks of actions are denoised given the last observations; several modes stay apart",
            _CONTROL, (_LOSS + "denoising_error", _LOSS + "diffused"), "diffusion-policy",
        ),
        Row(
            "flow-policy", FLOW, "diffusion-policy", "2210.02747", "the chunk moves along a learnt velocity, from noise to data on straight lines",
            _CONTROL, (_LOSS + "flowed", _LOSS + "denoising_error", _LOSS + "noise_level"), "flow-policy",
        ),
        Row(
            "dppo", DPPO, "ppo", "2409.00588", "the last denoising steps of a cloned policy are decisions of their own, fine-tuned by PPO",
            _CONTROL,
            (
                "markovia.algos.advantages:ChainGAE", "markovia.algos.on_policy.surrogates:chain_clip",
                "markovia.algos.on_policy.surrogates:clip_drift", "markovia.agents.diffusion_policy:chunk_log_prob",
                "markovia.agents.diffusion_policy:floored", "markovia.algos.diffusion_policy.collect:ChainCollector",
            ),
            "dppo",
        ),
    ]
)  # fmt: skip
