"""Every row of the on-policy table: presets, first step, gradients, invariances, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from on_policy_pieces import (
    FIRST_ORDER,
    TREE,
    Given,
    after_step,
    all_params,
    by_rows,
    check_gradient,
    padded,
    record,
    shake,
    tree,
)

from markovia.agents.control import ControlAgent
from markovia.agents.records import Rollout
from markovia.algos import presets
from markovia.algos.advantages import GAE
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.entropy import EntropyAnchor
from markovia.algos.on_policy.method import Descent, OnPolicy, ValueLoss
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.references import EMA
from markovia.algos.on_policy.surrogates import KLDrift
from markovia.algos.on_policy.tokens import Unlikely
from markovia.algos.presets import FOLDER, configure, override
from markovia.algos.setup import build
from markovia.algos.systems import rows
from markovia.envs.registry import KINDS, kind_of

ENV_OF_KIND = {"tabular": TREE, "control": "CartPole-v1", "denoising": "markovia/LinearGaussian-v0", "language": "markovia/Arithmetic-v0"}


@pytest.mark.parametrize("method_id", ON_POLICY)
@pytest.mark.parametrize("kind", ENV_OF_KIND)
def test_configure_serves_the_kinds_of_the_row_and_refuses_the_others(method_id: str, kind: str) -> None:
    if kind in ON_POLICY[method_id].kinds:
        method = configure(method_id, ENV_OF_KIND[kind])
        assert type(method.surrogate) is type(ON_POLICY[method_id].value.surrogate)
        if kind == "language":
            assert method.solver.unit == "row"  # type: ignore[union-attr]
    else:
        with pytest.raises(ValueError, match=f"{kind} task.*markovia systems"):
            configure(method_id, ENV_OF_KIND[kind])


def test_preset_files_name_known_kinds_methods_and_fields() -> None:
    kinds, environments = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("kinds", "environments"))
    assert set(kinds) <= set(ENV_OF_KIND)
    for key, entries in [*kinds.items(), *environments.items()]:
        env_id = ENV_OF_KIND.get(key, key)
        assert entries.get("like", env_id) in environments | dict.fromkeys(ENV_OF_KIND.values())
        for name in entries.keys() - {"like"}:
            members = [m for m, row in rows().items() if type(row.value).__name__ == name and kind_of(env_id) in row.kinds]
            for method_id in members or [name]:
                configure(method_id, env_id)
    assert set(KINDS.values()) <= set(ENV_OF_KIND)


def test_an_environment_takes_the_presets_of_the_one_that_it_is_like_and_changes_them() -> None:
    cheetah, swimmer = configure("ppo", "HalfCheetah-v5"), configure("ppo", "Swimmer-v5")
    assert configure("ppo", "Walker2d-v5") == cheetah != configure("ppo", "Acrobot-v1")
    assert isinstance(swimmer.advantage, GAE) and (swimmer.advantage.gamma, swimmer.advantage.lam) == (0.9999, 0.98)
    assert swimmer.value == cheetah.value and swimmer.solver == replace(cheetah.solver, lr=6e-4)


def test_a_circle_of_likes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    circle = {"A-v0": {"like": "B-v0"}, "B-v0": {"like": "C-v0"}, "C-v0": {"like": "B-v0"}}
    monkeypatch.setattr(presets, "_data", lambda: {"kinds": {}, "environments": circle})
    with pytest.raises(ValueError, match="A-v0 -> B-v0 -> C-v0 -> B-v0; take one of these out"):
        configure("ppo", "A-v0")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'trpo'"):
        configure("tropo", TREE)
    with pytest.raises(ValueError, match="no field 'num_step'; did you mean 'num_steps'"):
        override(OnPolicy(), {"num_step": 3})
    with pytest.raises(ValueError, match='name the class to put there with "type"'):
        override(OnPolicy(), {"divergence": {"beta": 0.1}})


# -- 1: one full-batch step of any drift is the A2C step ------------------------------------------------------------------------------------

A2C_SOLVER = ON_POLICY["a2c"].value.solver


def written_out_a2c(agent: Any, rollout: Rollout, gamma: float) -> list[torch.Tensor]:
    """mean(-A log pi) + 0.5 mean(0.5 (V - R)^2), clipped to norm 0.5, one RMSprop step from zero averages; returns by a loop over time."""
    value = rollout.value[..., 0]
    B, T = rollout.shape
    ret = torch.zeros_like(value)
    for b in range(B):
        follow = 0.0
        for t in reversed(range(T)):
            if rollout.truncated[b, t]:
                follow = rollout.boot_value[b, t, 0]
            follow = rollout.reward[b, t] + gamma * rollout.continuation[b, t] * follow
            ret[b, t] = follow
    out = agent.evaluate(rollout, ("dist", "value"))
    logp = out.dist.log_prob(rollout.action)
    loss = -((ret - value) * logp).mean() + 0.5 * (0.5 * (out.value[..., 0] - ret) ** 2).mean()
    params = all_params(agent)
    grads = torch.autograd.grad(loss, params)
    scale = min(1.0, 0.5 / (math.sqrt(sum(float((g**2).sum()) for g in grads)) + 1e-6))
    return [p.detach() - 7e-4 * g * scale / (torch.sqrt(0.01 * (g * scale) ** 2) + 1e-5) for p, g in zip(params, grads, strict=True)]


@pytest.mark.parametrize("method_id", FIRST_ORDER)
@pytest.mark.check("limit")
def test_first_step_is_a2c(method_id: str) -> None:
    row = ON_POLICY[method_id].value
    method = dataclasses.replace(
        ON_POLICY["a2c"].value, num_steps=4, surrogate=row.surrogate, controller=row.controller, ratio_level=row.ratio_level, num_env_steps=200
    )
    setup = build(TREE, method, 0, {"V": 3, "H": 3}, {"dtype": "float64"})
    shake(setup.agent)
    rollout = setup.collector.collect(setup.agent, torch.Generator().manual_seed(1))
    expected = written_out_a2c(setup.agent, rollout, gamma=0.99)
    OnPolicyDriver(method, setup.agent, Given(rollout)).step()
    for p, q in zip(all_params(setup.agent), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method_id", ["a2c", "ppo"])
@pytest.mark.check("limit")
@pytest.mark.check("value")
def test_a2c_and_ppo_with_one_full_batch_epoch_are_the_same_update_of_networks(method_id: str) -> None:
    a2c = ON_POLICY["a2c"].value
    method = dataclasses.replace(configure(method_id, "CartPole-v1"), num_envs=4, num_steps=5, normalize_obs=False, scale_reward=False)
    if method_id == "ppo":
        method = dataclasses.replace(method, solver=a2c.solver, advantage=a2c.advantage, normalize_advantage="none")
    setup = build("CartPole-v1", method, 0, agent_options={"hidden": (16,)})
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    rollout = setup.collector.collect(setup.agent, driver.generator("action"))
    expected = written_out_a2c(setup.agent, rollout, gamma=0.99)
    driver.collector = Given(rollout)
    driver.step()
    for p, q in zip(all_params(setup.agent), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-6)


# -- 2: gradient ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ON_POLICY)
@pytest.mark.check("gradient")
def test_gradient_of_the_whole_loss_matches_finite_differences(method_id: str) -> None:
    divergence = None if ON_POLICY[method_id].value.divergence is None else KL(beta=0.3, estimator="k2", place="loss")
    method, setup = tree(method_id)
    if isinstance(method.solver, Descent):  # a natural-gradient step has neither in its objective
        method = dataclasses.replace(method, divergence=divergence, entropy_coef=1)
    check_gradient(OnPolicyDriver(method, setup.agent, setup.collector))


# -- 3: invariance -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ON_POLICY)
@pytest.mark.check("invariance")
def test_order_of_rows_padding_and_micro_batches_change_nothing(method_id: str) -> None:
    method, setup = tree(method_id)
    method = by_rows(method)
    rollout = record(method, setup)
    start = after_step(method, rollout)
    order = torch.randperm(rollout.shape[0], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(after_step(method, rollout.rows(order)), start, rtol=0, atol=1e-10)
    torch.testing.assert_close(after_step(method, padded(rollout)), start, rtol=0, atol=1e-10)
    if isinstance(method.solver, Descent):
        torch.testing.assert_close(after_step(by_rows(method, micro=3), rollout), start, rtol=0, atol=1e-10)


# -- 5: bad input --------------------------------------------------------------------------------------------------------------------------


class Stub:
    """The least that a driver's checks look at."""

    critic, net = True, None  # its reference shares its weights, as that of a LoRA agent does

    def reference(self, fixed: bool = False) -> Stub:
        return self

    def __init__(self, kind: str, **more: Any) -> None:
        self.kind = kind
        self.__dict__.update(more)


@pytest.mark.parametrize(
    ("method", "agent", "match"),
    [
        (OnPolicy(), Stub("tabular", critic=None), "GAE needs values.*no critic.*LeaveOneOut"),
        (OnPolicy(), Stub("language"), "solver.unit='row'"),
        (OnPolicy(solver=Descent(unit="row"), value=ValueLoss(separate=Descent())), Stub("language"), "value.separate.unit"),
        (ON_POLICY["trpo"].value, Stub("language"), "natural-gradient steps are not offered"),
        (OnPolicy(solver=Descent(unit="row"), divergence=KL(), refresh=EMA()), Stub("language"), "EMA reference needs weights of its own"),
    ],
)
def test_driver_refuses_what_does_not_fit(method: OnPolicy, agent: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        OnPolicyDriver(method, agent, Given(None))  # type: ignore[arg-type]


def test_rows_that_are_not_whole_responses_are_refused() -> None:
    method, setup = tree("rloo", num_steps=3)
    with pytest.raises(ValueError, match=r"set num_steps to the episode's length"):
        OnPolicyDriver(method, setup.agent, setup.collector).step()


@pytest.mark.parametrize("space", [spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.MultiDiscrete([2, 3])])
@pytest.mark.parametrize(
    ("changes", "slot"),
    [
        ({"anchor": EntropyAnchor(), "solver": Descent(unit="row")}, "EntropyAnchor"),
        ({"tokens": Unlikely(), "divergence": KL(1.0, "k3", "loss", reference="min-p")}, "Unlikely"),
        ({"surrogate": KLDrift(needs_kl="tsallis", q=1.5)}, "tsallis"),
    ],
)
def test_what_reads_logits_of_one_softmax_is_refused_for_other_policies(changes: dict[str, Any], slot: str, space: spaces.Space) -> None:
    obs = spaces.Box(-1.0, 1.0, (2,), np.float32)
    other, categorical = (ControlAgent.from_spaces(obs, s, hidden=(4,), normalize_obs=False) for s in (space, spaces.Discrete(3)))
    with pytest.raises(ValueError, match=rf"{slot}.*categorical policies.*action space is {type(space).__name__}"):
        OnPolicyDriver(OnPolicy(**changes), other, Given(None))  # type: ignore[arg-type]
    OnPolicyDriver(OnPolicy(**changes), categorical, Given(None))  # type: ignore[arg-type]
