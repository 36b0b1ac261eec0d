"""The offline rows: their parents as limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from off_policy_pieces import F64, policy_by_hand
from offline_pieces import (
    LAM,
    as_sac,
    critic_losses,
    loss_and_gradient,
    made,
    minibatch,
    one,
    q_by_hand,
    squashed_by_hand,
    tiny,
)

from markovia.algos.off_policy import regularised
from markovia.algos.off_policy.slots import Deterministic, Held
from markovia.algos.offline.method import Logged
from markovia.algos.presets import override


@pytest.mark.check("limit", "td3-bc")
def test_td3_bc_without_q_is_bc() -> None:
    batch, noise = minibatch()
    ends = [loss_and_gradient(made(m).nets, batch, noise) for m in (tiny("td3-bc", actor=Held(alpha=0.0)), tiny("bc"))]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.check("limit", "spot")
def test_spot_with_a_gaussian_at_the_logged_action_is_td3_bc(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, noise = minibatch()
    nets = made(override(tiny("spot"), {"actor": {"alpha": 2.5, "weight": 1.0}})).nets
    monkeypatch.setattr(nets, "support", lambda obs, action, latent: (action - batch.action).square().mean(1))
    torch.testing.assert_close(
        loss_and_gradient(nets, batch, noise), loss_and_gradient(made(tiny("td3-bc")).nets, batch, noise), rtol=1e-12, atol=1e-14
    )


@pytest.mark.check("limit", "a2pr")
def test_a2pr_held_by_the_logged_action_alone_is_td3_bc(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decoded action is better, and every state lies below its logged action: candidates {a}, gate 1, weight 1."""
    from markovia.algos.off_policy import actors

    batch, noise = minibatch()
    nets = made(override(tiny("a2pr"), {"actor": {"weight": 1.0}})).nets
    real = actors.better_action
    low = torch.full((6,), -torch.inf, dtype=F64)
    monkeypatch.setattr(actors, "better_action", lambda logged, decoded, q_logged, q_decoded, v: real(logged, decoded, q_logged, low, low))
    torch.testing.assert_close(
        loss_and_gradient(nets, batch, noise), loss_and_gradient(made(tiny("td3-bc")).nets, batch, noise), rtol=1e-12, atol=1e-14
    )


@pytest.mark.check("limit", "rebrac")
def test_rebrac_without_its_penalty_is_td3_bc() -> None:
    """Its loss is TD3+BC's divided by alpha, where its weight is 1 / (alpha |A|) and both read the same Q; no layer norm, no penalty."""
    batch, noise = minibatch()
    plain = override(tiny("rebrac"), {"target": {"penalty": 0.0}, "critic": {"layer_norm": False}})
    rebrac = made(override(plain, {"actor": {"weight": 1 / (2.5 * 2), "aggregate": "first"}})).nets
    td3_bc = made(tiny("td3-bc")).nets
    assert torch.equal(rebrac.goal(batch, noise[0], LAM), td3_bc.goal(batch, noise[0], LAM))
    ours, theirs = (loss_and_gradient(nets, batch, noise) for nets in (rebrac, td3_bc))
    torch.testing.assert_close(ours, [x / 2.5 for x in theirs], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method_id", ["awac", "iql"])
@pytest.mark.check("limit")
def test_regression_without_advantage_is_a_clone(method_id: str) -> None:
    batch, noise = minibatch()
    clone = made(tiny("bc", policy=tiny(method_id).policy)).nets
    weighted = made(override(tiny(method_id), {"actor": {"beta": 0.0}})).nets
    torch.testing.assert_close(*(loss_and_gradient(nets, batch, noise) for nets in (weighted, clone)), rtol=1e-12, atol=1e-14)


@pytest.mark.check("limit", "iql")
def test_a_middle_expectile_is_half_the_squared_error() -> None:
    u = one(-2, 0.5, 3)
    torch.testing.assert_close(regularised.expectile(u, tau=0.5), 0.5 * u**2)


def test_the_deterministic_regression_is_a_weighted_square() -> None:
    nets, (batch, noise) = made(tiny("awac", policy=Deterministic(hidden=(8,), activation="tanh"))).nets, minibatch()
    adv = batch.reward
    error = (policy_by_hand(nets.agent, batch.obs).tanh() - batch.action).square().sum(1)
    torch.testing.assert_close(nets.actor_loss(batch, noise[2], LAM, adv, noise[-2:])[0], ((3 * adv).exp().clamp(max=100) * error).mean())


@pytest.mark.check("limit", "cql", "edac", "edac/sac-n")
def test_regularisers_of_weight_0_leave_sac() -> None:
    batch, noise = minibatch()
    cql = override(tiny("cql"), {"regulariser": {"alpha": 0.0}})
    sac = as_sac(cql, target={"entropy": False})
    torch.testing.assert_close(critic_losses(cql, batch, noise), critic_losses(sac, batch, noise), rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]
    edac = override(tiny("edac"), {"regulariser": {"eta": 0.0}})
    left, right = (critic_losses(m, batch, noise) for m in (edac, tiny("edac/sac-n")))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)
    twins = override(tiny("edac/sac-n"), {"critic": {"num": 2}})
    torch.testing.assert_close(critic_losses(twins, batch, noise), critic_losses(as_sac(twins), batch, noise), rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]


@pytest.mark.check("limit", "cql/cal-ql")
def test_returns_that_no_value_falls_below_change_nothing() -> None:
    batch, noise = minibatch()
    batch.extra["ret"] = batch.extra["ret"] - 1e6
    weight = tiny("cql/cal-ql").regulariser.alpha
    left, right = (critic_losses(m, batch, noise) for m in (override(tiny("cql"), {"regulariser": {"alpha": weight}}), tiny("cql/cal-ql")))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_conservative_critics_send_no_gradient_into_the_policy() -> None:
    nets, (batch, noise) = made(tiny("cql")).nets, minibatch()
    nets.critic_loss(batch, batch.reward, noise[3:])[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in nets.policy.parameters())


def test_without_importance_weights_the_logged_action_joins_the_sum() -> None:
    nets, (batch, noise) = made(override(tiny("cql"), {"regulariser": {"importance": False}})).nets, minibatch()
    candidates = [2 * torch.distributions.Normal(0, 1).cdf(noise[k]) - 1 for k in (3, 4)]
    candidates += [squashed_by_hand(nets.agent, batch.obs if k < 7 else batch.next_obs, noise[k])[0] for k in (5, 6, 7, 8)]
    q = torch.stack([torch.stack(q_by_hand(nets.critic, batch.obs, a)) for a in (*candidates, batch.action)])
    expected = (q.exp().sum(0).log() - q[-1]).sum(0).mean()
    torch.testing.assert_close(nets.critic_loss(batch, batch.reward, noise[3:])[1]["gap"], expected.detach())


@pytest.mark.check("limit", "mcep")
def test_mcep_without_its_evaluation_policy_is_td3_bc() -> None:
    assert dataclasses.replace(tiny("mcep"), evaluation=None) == tiny("td3-bc")
    nets, (batch, noise) = made(override(tiny("mcep"), {"evaluation": {"alpha": 2.5}})).nets, minibatch()
    nets.deployed.net["policy"].load_state_dict(nets.policy.state_dict())  # type: ignore[union-attr]
    torch.testing.assert_close(nets.evaluation_loss(batch, noise[2])[0], nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0])


@pytest.mark.check("limit", "mcep/awac")
def test_mcep_awac_without_its_evaluation_policy_is_awac() -> None:
    awac = tiny("awac")
    same = {k: getattr(awac, k) for k in ("policy", "critic", "actor", "data")}
    assert dataclasses.replace(tiny("mcep/awac"), evaluation=None, **same) == awac
    # and anchored by the likelihood alone it imitates
    nets, (batch, noise) = made(override(tiny("mcep/awac"), {"evaluation": {"weight": 1e9}})).nets, minibatch()
    clone = made(tiny("bc", policy=tiny("mcep/awac").policy)).nets
    clone.policy.load_state_dict(nets.deployed.net["policy"].state_dict())
    expected = clone.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0]
    torch.testing.assert_close(nets.evaluation_loss(batch, noise[2])[0] / 1e9, expected, rtol=1e-6, atol=0)


@pytest.mark.check("limit", "filtered-bc")
def test_filtered_bc_of_all_episodes_is_bc() -> None:
    assert dataclasses.replace(tiny("filtered-bc"), data=Logged(fraction=1.0)) == tiny("bc")
