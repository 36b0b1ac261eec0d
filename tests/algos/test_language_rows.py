"""Every row of the language table on enumerable trees: gradient, invariances, resume, the compiled step, bad input."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from language_pieces import ONE, ROWS, after_step, collect, made, small, trees
from on_policy_pieces import check_differences, shake
from torch import Tensor

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.agents.records import Rollout
from markovia.algos.advantages import GroupNormalised, MovingBaseline
from markovia.algos.on_policy.auxiliary import Ptx, Rehearsal
from markovia.algos.on_policy.divergence import FDivergence
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.entropy import EntropyAnchor
from markovia.algos.on_policy.filters import AccuracyBand
from markovia.algos.on_policy.language import LANGUAGE
from markovia.algos.on_policy.loss import policy_loss
from markovia.algos.on_policy.method import ValueLoss
from markovia.algos.on_policy.references import Fixed, HardReset
from markovia.algos.on_policy.rewards import LengthBudget, Matching, SoftOverlong
from markovia.algos.on_policy.schedules import AdaptiveKL, DownThenUp
from markovia.algos.on_policy.surrogates import Regress
from markovia.algos.on_policy.tokens import ClipCov, JointClip, Steer
from markovia.algos.presets import override
from markovia.algos.systems import find
from markovia.algos.tree_records import TreeCollector
from markovia.envs.exact.token_mdp import EnumerableTokenMDP

# -- 2: gradient ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("gradient")
def test_gradient_of_the_whole_loss_matches_finite_differences(method_id: str) -> None:
    """Of everything that carries gradient, with the columns of the whole minibatch (weights, selections) held."""
    method = dataclasses.replace(small(method_id), filter=None)
    if isinstance(method.aux, Rehearsal):  # of the two prompts one is solved three times in four
        method = override(method, {"aux": {"threshold": 0.6}})
    collector = TreeCollector(trees(2), 12, method.group_size, {"budget": [1, 3]})
    driver = made(method, collector)
    rollout, _ = driver._collect()
    driver.advantages(rollout, driver.prepare(rollout))
    shake(driver.agent, 0.2, seed=8)
    update = driver.updates["main"]
    update.begin(rollout)
    part, omega = update._prepared(rollout.rows(update.index))
    if update._surveys:
        part.columns |= update._survey(part)

    def loss() -> Tensor:
        found = policy_loss(method, driver.agent, part, omega, ONE, update.joint_value)[0]
        return found if method.aux is None else found + method.aux(driver.agent, driver.extra)  # type: ignore[arg-type]

    check_differences(loss, update.optimizer.params)


# -- 4: invariance -------------------------------------------------------------------------------------------------------------------------


def padded(rollout: Rollout, steps: int = 3) -> Rollout:
    """More steps that do not exist, filled with numbers that would be seen if anything read them."""
    fill = {"action": 1, "logp_old": -math.inf, "reward": 7.0, "continuation": 1.0, "truncated": True, "value": 9.0}

    def wider(x: Tensor, value: Any) -> Tensor:
        return torch.cat([x, torch.full((x.shape[0], steps, *x.shape[2:]), value, dtype=x.dtype)], dim=1)

    columns: dict[str, Any] = {k: wider(getattr(rollout, k), v) for k, v in fill.items() if getattr(rollout, k) is not None}
    columns |= {k: wider(getattr(rollout, k), False) for k in ("valid", "mask")}
    extra = {k: wider(v, float(v[0, 0])) for k, v in rollout.columns.items()}
    return dataclasses.replace(rollout, obs=wider(rollout.obs, 0), columns=extra, **columns)  # type: ignore[arg-type]


def reordered(rollout: Rollout, order: Tensor) -> Rollout:
    told = {"completion_text": [rollout.outcome["completion_text"][i] for i in order.tolist()]}
    told["columns"] = {k: [v[i] for i in order.tolist()] for k, v in rollout.outcome["columns"].items()}
    return dataclasses.replace(rollout.rows(order), outcome=told)


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("invariance")
def test_order_of_rows_padding_and_micro_batches_change_nothing(method_id: str) -> None:
    method = small(method_id, solver={"optimizer": "sgd"})
    method = dataclasses.replace(method, reward=tuple(override(r, {"max_length": 3}) if isinstance(r, SoftOverlong) else r for r in method.reward))
    if method_id == "clip-cov":  # its random choice belongs to places in the record
        method = override(method, {"tokens": {"rate": 1.0}})
    rollout = collect(method)
    if method_id == "remax":
        rollout.columns["greedy"] = torch.full_like(rollout.reward, 0.4)
    start = after_step(method, rollout)
    order = torch.randperm(rollout.shape[0], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(after_step(method, reordered(rollout, order)), start, rtol=0, atol=1e-10)
    torch.testing.assert_close(after_step(method, padded(rollout)), start, rtol=0, atol=1e-10)
    torch.testing.assert_close(after_step(override(method, {"solver": {"micro": 3}}), rollout), start, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method_id", [m for m in ROWS if not LANGUAGE[m].value.advantage.needs_critic and m not in ("gtpo", "copo")])
def test_a_group_of_equal_rewards_gives_no_gradient(method_id: str) -> None:
    method = dataclasses.replace(small(method_id), reward=(), divergence=None, refresh=Fixed(), tokens=None, anchor=None, aux=None)
    rollout = collect(method)
    rollout = dataclasses.replace(rollout, reward=torch.where(rollout.continuation == 0, 1.0, 0.0).double() * rollout.valid)
    if method_id == "remax":
        rollout.columns["greedy"] = torch.ones_like(rollout.reward)
    if isinstance(method.advantage, MovingBaseline) or (method.group_size == 1 and method_id != "remax"):
        pytest.skip("its baseline is not a group's")
    start = made(method, TreeCollector(trees(), 12, method.group_size)).agent
    assert torch.equal(after_step(method, rollout), torch.cat([p.detach().reshape(-1) for p in start.net.parameters()]))


# -- 5: resume, and the compiled step --------------------------------------------------------------------------------------------------------


def test_merged_runs_resume_and_begin_anew(tmp_path: Any) -> None:
    method = small("warp", num_env_steps=48)  # a batch for each of 2 x 2 runs
    collector = TreeCollector(trees(), 12, 1)
    straight = made(method, collector)
    start = [p.clone() for p in straight.merger.start]  # type: ignore[union-attr]
    with torch.no_grad():  # `made` shakes the agent after the driver was built
        for p, w in zip(straight.agent.parameters("policy"), start, strict=True):
            p.copy_(w)
    straight.step()
    own, ref = straight.agent.net["policy"].table, straight.references["ref"].net["policy"].table  # type: ignore[union-attr]
    assert torch.equal(own, start[0]) and torch.equal(own, ref) and float(straight.updates["main"].optimizer.groups[0].count) == 0.0
    save_tensors(tmp_path / "state.safetensors", *straight.state())
    resumed = made(method, collector)
    resumed.load_state(*load_tensors(tmp_path / "state.safetensors"))
    for driver in (straight, resumed):
        while not driver.finished:
            driver.step()
    (a, meta_a), (b, meta_b) = straight.state(), resumed.state()
    assert meta_a == meta_b and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert meta_a["merger"] == {"part": 4, "ends": 0, "iterations": 0} and not torch.equal(own, start[0]) and torch.equal(own, a["merger.start.0"])


def test_learning_rates_of_merged_runs_fall_and_rise_in_each_run_alike() -> None:
    # 2 x 2 runs of four batches of 12 responses, each of three tokens
    method = small("warp", num_env_steps=2 * 2 * 4 * 12 * 3, solver={"anneal": True, "warmup": 2, "lr": 0.1})
    driver = made(method, TreeCollector(trees(eos=None), 12, 1))
    rates = []
    while not driver.finished:
        driver.step()
        rates.append(driver.updates["main"].optimizer.groups[0].lr.item() / 0.1)
    assert rates == pytest.approx([0.5, 0.75, 0.5, 0.25] * 4)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("method_id", ROWS)
def test_traced_update_equals_the_eager_one(method_id: str) -> None:
    method = small(method_id, solver={"minibatch": 8})
    eager, traced = (made(method, TreeCollector(trees(), 12, method.group_size, {"budget": [1, 2, 3]}), compile=c) for c in (False, True))
    for _ in range(2):
        left, right = eager.step(), traced.step()
        for key in left.keys() | right.keys():
            assert right[key] == pytest.approx(left[key], rel=1e-7, abs=1e-9, nan_ok=True), key
    for p, q in zip(eager.agent.net.parameters(), traced.agent.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


# -- 6: bad input --------------------------------------------------------------------------------------------------------------------------


def alone(method_id: str) -> None:
    """A batch in which every response answers another prompt."""
    method = override(find(method_id).value, {"group_size": 1, "num_envs": 3, "filter": None})
    collector = TreeCollector(trees(), 3, 1)
    OnPolicyDriver(method, collector.agent(), collector).step()


class Bare:
    """A collector that makes no greedy responses."""

    episodes: tuple[float, ...] = ()

    def reset(self, seed: int) -> None:
        return


def without_policies(method_id: str) -> None:
    method = find(method_id).value
    collector = TreeCollector(trees(), method.num_envs, method.group_size)
    OnPolicyDriver(method, collector.agent(critic=True), collector)


def without_budget() -> None:
    method = small("lcpo")
    collector = TreeCollector(trees(), 12, method.group_size)
    OnPolicyDriver(method, collector.agent(), collector).step()


def one_prompt() -> None:
    method = small("copo")
    collector = TreeCollector(trees(1), 4, 4)
    OnPolicyDriver(method, collector.agent(), collector).step()


def solved_already() -> None:
    easy = trees(1)[0]
    collector = TreeCollector([EnumerableTokenMDP(easy.V, easy.H, easy.logits_ref, np.ones(easy.M), easy.eos)], 12, 4)
    OnPolicyDriver(small("dph-rl"), collector.agent(), collector)


def without_texts() -> None:
    collector = TreeCollector(trees(), 12)
    OnPolicyDriver(small("ppo-max/ptx"), collector.agent(critic=True), collector)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "ppo-max/ptx": (without_texts, "--texts FILE"), "ppo-rlhf/ptx": (lambda: Ptx(rows=0), "rows >= 1"),
    "dph-rl": (solved_already, "the start solves all 1 prompts that were tried"), "dph-rl/forward-kl": (lambda: Rehearsal(f="forward"), "unknown f"),
    "p3o/joint": (lambda: JointClip(clip=1.0), r"clip must lie in \(0, 1\)"),
    "f-dpg": (lambda: Matching(beta=0.0), "temperature of the target"),
    "f-dpg/forward-kl": (lambda: Matching(f="forward"), "unknown f-divergence"),
    "rto": (lambda: without_policies("rto"), r"policies that were not given, \['dpo'\]"),
    "dvpo": (lambda: OnPolicyDriver(find("dvpo").value, TreeCollector(trees(), 2).agent(), TreeCollector(trees(), 2)), "FrozenQ needs values"),
    "gtpo": (lambda: alone("gtpo"), "at least 2 responses per prompt"),
    "copo": (one_prompt, "at least 2 prompts in a batch"),
    "steer": (lambda: Steer(w_min=0.0), r"weight in \(0, 1\]"),
    "clip-cov": (lambda: ClipCov(low=3.0, high=2.0), "low must be < high"),
    "kl-cov": (lambda: override(find("kl-cov").value, {"divergence": None}), "give one with place='loss'"),
    "lp-reg": (lambda: override(find("lp-reg").value, {"tokens": None}), "'min-p' and the token rule Unlikely need each other"),
    "siren": (lambda: EntropyAnchor(top_p=0.0), r"top_p in \(0, 1\]"),
    "prorl": (lambda: HardReset(every=0), "every must be >= 1"),
    "difficulty-filter": (lambda: AccuracyBand(max_rounds=0), "max_rounds"),
    "lcpo": (without_budget, "column 'budget'"),
    "lcpo/max": (lambda: LengthBudget("least"), "mode must be 'exact' or 'max'"),
    "kdrl": (lambda: without_policies("kdrl"), r"policies that were not given, \['teacher'\]"),
    "f-div-reg": (lambda: FDivergence(f="jss"), "did you mean 'js'"),
    "f-div-reg/alpha": (lambda: FDivergence(f="alpha"), "needs its order"),
    "f-div-reg/forward-kl": (lambda: FDivergence(f="kl_ref_pi", beta=-1.0), "beta must be >= 0"),
    "f-div-reg/chi2": (lambda: FDivergence(f="chi2", clamp=0.0), "clamp"),
    "f-div-reg/hellinger": (lambda: FDivergence(f="hellinger", sampler="reference"), "use place='loss'"),
    "f-div-reg/tv": (lambda: FDivergence(f="tv", alpha=0.5), "has no order"),
    "kl-controller": (lambda: AdaptiveKL(horizon=0.0), "must be > 0"),
    "salsa": (lambda: without_policies("salsa"), r"policies that were not given, \['other'\]"),
    "warp": (lambda: override(find("warp").value, {"num_env_steps": 128}), "less than a batch for each of 2 x 2 runs"),
    "grpo": (lambda: alone("grpo"), "at least 2 responses per prompt.*raise group_size"),
    "grpo/dr-grpo": (lambda: GroupNormalised(scale="std"), "scale must be 'group', 'batch' or 'none'"),
    "grpo/dapo": (lambda: AccuracyBand(low=1.0, high=0.5), "low < high"),
    "grpo/gspo": (lambda: override(find("grpo/gspo").value, {"aggregation": "token-mean"}), "one term per row.*seq-mean-token-mean"),
    "remax": (lambda: OnPolicyDriver(find("remax").value, TreeCollector(trees(), 2).agent(), Bare()), "needs greedy responses.*Bare makes none"),  # type: ignore[arg-type]
    "grpo-d": (lambda: DownThenUp(low=0.2, high=0.1), "0 <= low <= high"),
    "ppo-max": (lambda: ValueLoss(pretrain=2), "give value.separate a Descent"),
    "p3o": (lambda: override(find("p3o").value, {"group_size": 4}), "group_size=2"),
    "apa": (lambda: Regress(lam=0.0), "lam divides the advantage"),
    "apa/initial": (lambda: Regress(lam=-1.0, anchor="ref"), "must be > 0"),
}


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("bad_input")
def test_bad_input_is_told(method_id: str) -> None:
    make, match = BAD[method_id]
    with pytest.raises(ValueError, match=match):
        make()
