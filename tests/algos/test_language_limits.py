"""Every row of the language table becomes its parent in a limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from language_pieces import ROWS, after_step, collect, made, policy_of, record, same_update, small, t, trees

from markovia.algos.advantages import GAE, GroupNormalised, LeaveOneOut, MovingBaseline
from markovia.algos.on_policy.divergence import KL, FDivergence
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.references import Fixed
from markovia.algos.on_policy.rewards import ImplicitReward, LengthBudget, Matching, Scaled, SoftOverlong
from markovia.algos.on_policy.schedules import Steady
from markovia.algos.on_policy.surrogates import Clip, PolicyGradient, Regress
from markovia.algos.on_policy.tokens import Partner
from markovia.algos.presets import override
from markovia.algos.tree_records import TreeCollector

# -- 3: limits -----------------------------------------------------------------------------------------------------------------------------


def limit_grpo() -> None:
    # One epoch, no penalty, no scale: G / (G - 1) times it is the leave-one-out gradient (summed, so G - 1 more by length).
    method = small("grpo", divergence=None, advantage={"scale": "none"}, aggregation="seq-mean-token-sum", solver={"epochs": 1})
    rloo = dataclasses.replace(method, advantage=LeaveOneOut(), surrogate=PolicyGradient())
    rollout, G = collect(method), method.group_size
    scaled = dataclasses.replace(rollout, reward=rollout.reward * G / (G - 1))
    start = after_step(override(method, {"solver": {"optimizer": "sgd", "max_grad_norm": 1e9}}), scaled)
    torch.testing.assert_close(start, after_step(override(rloo, {"solver": {"optimizer": "sgd", "max_grad_norm": 1e9}}), rollout), rtol=0, atol=1e-12)


def limit_dr_grpo() -> None:
    # Without the constant it is the plain sum: L_max times the gradient.
    method = small("grpo/dr-grpo", max_length=1)
    same_update(method, dataclasses.replace(method, aggregation="seq-mean-token-sum"))


def limit_dapo() -> None:
    method = dataclasses.replace(small("grpo/dapo"), reward=(SoftOverlong(penalty=0.0),), surrogate=Clip(0.2, 0.2))
    same_update(method, dataclasses.replace(small("grpo", divergence=None), aggregation="token-mean"))


def limit_gspo() -> None:
    # One-token responses: the mean over tokens is the token's own ratio.
    method = small("grpo/gspo")
    short = record([[0.0]] * 12, [[0.0]] * 12)
    short = dataclasses.replace(short, reward=t(*range(12))[:, None] % 5, group=torch.arange(12) // 4, columns={})
    same_update(method, dataclasses.replace(method, ratio_level="token"), short)


def limit_remax() -> None:
    # Where the greedy response earns nothing, no penalty and a reward at the end only: REINFORCE before its first baseline.
    method = small("remax", divergence=None, solver={"epochs": 1})
    rollout = collect(method)
    rollout.columns["greedy"] = torch.zeros_like(rollout.reward)
    same_update(method, dataclasses.replace(method, advantage=MovingBaseline()), rollout, steps=1)


def limit_grpo_d() -> None:
    method = small("grpo-d")
    flat = override(method, {"divergence": {"schedule": {"type": "DownThenUp", "low": 0.07, "high": 0.07}}})
    steady = dataclasses.replace(flat, divergence=KL(0.07, "k3", "loss", schedule=Steady()))
    same_update(flat, steady)


def limit_ppo_max() -> None:
    # Rewards of spread 1 that are not clipped stay as they are.
    method = small("ppo-max", value={"pretrain": 0})
    rollout = collect(method)
    returns = rollout.returns()
    unit = dataclasses.replace(rollout, reward=rollout.reward / returns.std())
    same_update(dataclasses.replace(method, reward=(Scaled(1e9),)), dataclasses.replace(method, reward=()), unit, steps=1)


def limit_p3o() -> None:
    # On-policy the partner's ratio is 1: one step is RLOO's with G = 2.
    method = small("p3o", solver={"epochs": 1, "minibatch": None})
    plain = {"tokens": None, "ratio_level": "token", "surrogate": PolicyGradient(), "aggregation": "seq-mean-token-sum"}
    rloo = dataclasses.replace(method, **plain)  # type: ignore[type-var]
    same_update(method, rloo, steps=1)


def limit_apa() -> None:
    # At the sampling policy the gradient is 2 A / lam: with lam = 2 the policy gradient.
    method = small("apa", surrogate={"lam": 2.0}, solver={"epochs": 1})
    same_update(method, dataclasses.replace(method, surrogate=PolicyGradient()), steps=1)


def limit_apa_initial() -> None:
    # A reference that is the sampling policy: the anchor "old".
    method = small("apa/initial", divergence=None, solver={"epochs": 1})
    collector = TreeCollector(trees(), 12, 1)
    found = []
    for surrogate in (Regress(1.0, "ref"), Regress(1.0, "old")):
        driver = OnPolicyDriver(dataclasses.replace(method, surrogate=surrogate), collector.agent(critic=True), collector, 3)
        driver.step()
        found.append(driver.agent.net["policy"].table.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def limit_rto() -> None:
    method = small("rto")
    same_update(dataclasses.replace(method, reward=(ImplicitReward(0.0),)), dataclasses.replace(method, reward=()))


def limit_dvpo() -> None:
    # A critic that says 0 everywhere: Q is the reward, as is PPO's TD error.
    method = small("dvpo", value={"pretrain": 0}, divergence=None)
    ppo = dataclasses.replace(method, advantage=GAE(1.0, 0.0))
    rollout = collect(method)
    rollout.value = torch.zeros_like(rollout.value)  # type: ignore[arg-type]
    torch.testing.assert_close(policy_of(method, rollout), policy_of(ppo, rollout), rtol=0, atol=1e-12)


def limit_gtpo() -> None:
    # Certain, of one token, right and wrong never share it: Dr.GRPO's advantage and the policy gradient.
    method = small("gtpo", advantage={"penalty": 0.0, "entropy_limit": 1e9}, solver={"epochs": 1})
    short = record([[0.0]] * 12, [[0.0]] * 12)
    action = torch.tensor([0, 0, 1, 1] * 3)[:, None]
    short = dataclasses.replace(short, action=action, reward=1.0 - action.double(), group=torch.arange(12) // 4, columns={})
    same_update(method, dataclasses.replace(method, advantage=GroupNormalised("none")), short)


def limit_copo() -> None:
    # Where the answers must never agree for the local term to count alone, it is GRPO by tokens.
    method = small("copo", advantage={"centre": -1e9, "eps": 1e-4})
    rollout = collect(method)
    last = (rollout.continuation == 0) & rollout.valid
    rollout = dataclasses.replace(rollout, reward=torch.where(last, torch.arange(12).double()[:, None] % 4, 0.0))  # every group differs
    same_update(method, dataclasses.replace(method, advantage=GroupNormalised()), rollout)


def limit_without(method_id: str, changes: dict[str, Any], **parent: Any) -> Callable[[], None]:
    """The row with `changes` equals itself with slots left empty."""

    def check() -> None:
        method = small(method_id, **changes)
        same_update(method, dataclasses.replace(method, **parent))

    return check


def limit_kl_cov() -> None:
    limit_without("kl-cov", {"divergence": {"beta": 0.0}}, tokens=None, divergence=None)()
    # One step per batch: |l - l_b| has no gradient at 0, the method does nothing.
    method = small("kl-cov", solver={"epochs": 1})
    same_update(method, dataclasses.replace(method, tokens=None, divergence=None), steps=1)


def limit_lp_reg() -> None:
    limit_without("lp-reg", {"divergence": {"beta": 0.0}}, tokens=None, divergence=None)()


def limit_difficulty_filter() -> None:
    # A band that holds every mean changes nothing.
    method = small("difficulty-filter", filter={"low": -1.0, "high": 2.0})
    tables = []
    for m in (method, dataclasses.replace(method, filter=None)):
        driver = made(m, TreeCollector(trees(), 12, method.group_size))
        driver.step()
        tables.append(driver.agent.net["policy"].table.detach())
    assert torch.equal(tables[0], tables[1])


def limit_lcpo() -> None:
    for name in ("lcpo", "lcpo/max"):
        method = small(name)
        free = (LengthBudget("exact", 0.0),) if name == "lcpo" else (LengthBudget("max", 0.0, 1.0),)
        same_update(dataclasses.replace(method, reward=free), dataclasses.replace(method, reward=()))


def limit_kdrl() -> None:
    limit_without("kdrl", {"divergence": {"beta": 0.0, "schedule": {"end": 0.0}}}, divergence=None)()


def limit_f_div() -> None:
    # The generator u log u: f' = 1 + log u, and the 1 is a baseline; so it is rloo with k1 in the reward.
    method = small("f-div-reg")
    same_update(dataclasses.replace(method, divergence=FDivergence(0.3, "kl_pi_ref")), dataclasses.replace(method, divergence=KL(0.3)))


def limit_alpha() -> None:
    method = small("f-div-reg/alpha")
    near, limit = (dataclasses.replace(method, divergence=FDivergence(0.3, *f)) for f in (("alpha", 1.0 - 1e-9), ("kl_ref_pi", None)))
    rollout = collect(method)
    torch.testing.assert_close(after_step(near, rollout), after_step(limit, rollout), rtol=0, atol=1e-6)


def limit_f_dpg() -> None:
    # The generator u log u, Z = 1 / e: it is paid R / beta - d, which is REINFORCE with k1 in the reward, in units of beta.
    method = small("f-dpg")
    rollout = collect(method)
    matched = dataclasses.replace(method, reward=(Matching(0.5, "kl_pi_ref", log_z=-1.0),))
    in_units = dataclasses.replace(rollout, reward=rollout.reward / 0.5)
    sgd = {"solver": {"optimizer": "sgd", "lr": 0.05, "max_grad_norm": 1e9}}
    plain = dataclasses.replace(method, reward=(), divergence=KL(1.0))
    torch.testing.assert_close(after_step(override(matched, sgd), rollout), after_step(override(plain, sgd), in_units), rtol=0, atol=1e-12)


def limit_p3o_joint() -> None:
    # On-policy both ratios are 1: one step is P3O's with separate clips, and RLOO's.
    method = small("p3o/joint", solver={"epochs": 1, "minibatch": None})
    same_update(method, dataclasses.replace(method, tokens=Partner(), surrogate=Clip(0.2)), steps=1)


def limit_warp() -> None:
    limit_without("warp", {"refresh": {"rate": 0.0}}, refresh=Fixed())()
    # One run whose end counts in full: nothing is merged; the optimiser and the reference begin anew after it alone.
    method = small("warp", merge={"runs": 1, "rounds": 1, "eta": 1.0}, num_env_steps=24)
    same_update(method, dataclasses.replace(method, merge=None))


LIMITS: dict[str, Callable[[], None]] = {
    "f-dpg": limit_f_dpg, "f-dpg/forward-kl": limit_f_dpg,
    "rto": limit_rto, "dvpo": limit_dvpo, "gtpo": limit_gtpo, "copo": limit_copo, "kl-cov": limit_kl_cov, "lp-reg": limit_lp_reg,
    "steer": limit_without("steer", {"tokens": {"w_min": 1.0}}, tokens=None),
    "clip-cov": limit_without("clip-cov", {"tokens": {"low": 1e9, "high": 1e10}}, tokens=None),
    "siren": limit_without("siren", {"anchor": {"coef": 0.0}}, anchor=None),
    "prorl": limit_without("prorl", {"refresh": {"every": 1000}}, refresh=Fixed()),
    "difficulty-filter": limit_difficulty_filter, "lcpo": limit_lcpo, "lcpo/max": limit_lcpo, "kdrl": limit_kdrl,
    "f-div-reg": limit_f_div, "f-div-reg/alpha": limit_alpha,
    **{m: limit_without(m, {"divergence": {"beta": 0.0}}, divergence=None) for m in ROWS if m.startswith("f-div-reg/") and not m.endswith("alpha")},
    "kl-controller": limit_without("kl-controller", {"divergence": {"schedule": {"horizon": 1e300}}}, divergence=KL(0.2)),
    "salsa": limit_without("salsa", {"refresh": {"share": 1.0}}, refresh=Fixed()),
    "warp": limit_warp, "p3o/joint": limit_p3o_joint,
    **{m: limit_without(m, {"aux": {"coef": 0.0}}, aux=None) for m in ("ppo-max/ptx", "ppo-rlhf/ptx", "dph-rl", "dph-rl/forward-kl")},
    "grpo": limit_grpo, "grpo/dr-grpo": limit_dr_grpo, "grpo/dapo": limit_dapo, "grpo/gspo": limit_gspo, "remax": limit_remax,
    "grpo-d": limit_grpo_d, "ppo-max": limit_ppo_max, "p3o": limit_p3o, "apa": limit_apa, "apa/initial": limit_apa_initial,
}  # fmt: skip


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("limit")
def test_limit_to_its_parent(method_id: str) -> None:
    LIMITS[method_id]()
