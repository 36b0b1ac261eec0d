"""Every row of the off-policy table: values, gradients, limits, invariance, bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from gymnasium import spaces
from off_policy_pieces import (
    BOX,
    F64,
    OBS,
    everything,
    linear_layers,
    made,
    make_agent,
    minibatch,
    net_by_hand,
    order_and_repetition_change_nothing,
    policy_by_hand,
    termination_stops_the_target_and_truncation_does_not,
    tiny,
)
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from markovia.agents.control import ControlAgent
from markovia.algos.off_policy import losses
from markovia.algos.off_policy.actor_critic import ActorCritic, log_density
from markovia.algos.off_policy.driver import OffPolicyDriver
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.methods import OFF_POLICY
from markovia.algos.off_policy.slots import (
    Ascent,
    Conservative,
    Critics,
    Deterministic,
    FixedTemperature,
    LoggedTarget,
    SmoothedTarget,
    SoftTarget,
    SoftValue,
    TunedTemperature,
    ValueTarget,
    Weighted,
)
from markovia.algos.off_policy.update import Update
from markovia.algos.presets import configure
from markovia.algos.setup import build

# -- 1: values -----------------------------------------------------------------------------------------------------------------------------


def one(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def test_equations_by_hand() -> None:
    # 1 + 0.5 * 2, and 1 alone where the step terminated
    assert losses.bootstrap(one(1, 1), one(1, 0), one(2, 2), gamma=0.5).tolist() == [2.0, 1.0]
    # 3 - 0.5 * (-1)
    assert losses.soft_value(one(3), one(-1), lam=0.5).item() == 3.5
    # (4^0.5 - 1) / 0.5, 4 - 1, log 4
    assert [losses.log_q(one(4).log(), q=q).item() for q in (1.5, 2.0, 1.0)] == pytest.approx([2.0, 3.0, math.log(4.0)])
    # (1 - 2)^2 + (3 - 2)^2
    assert losses.td_error(torch.tensor([[1.0], [3.0]]), one(2)).item() == 2.0
    # 0.2 * 1 pushes 0.9 over the edge; 0.2 * 10 is cut to 0.5
    assert losses.smoothed_action(one(0.9, 0.0), one(1, 10), std=0.2, clip=0.5).tolist() == [1.0, 0.5]
    # -1 + (0.2 - 1) * (-3) - 2
    assert losses.mirror_objective(one(2), one(-1), one(-3), lam=0.2, inverse_step=1.0, q=1.0).item() == pytest.approx(-0.6)
    # 0.5 + 1.5 * (0.2 - 1) * 0.25 - 2
    assert losses.mirror_objective(one(2), one(0.5), one(0.25), lam=0.2, inverse_step=1.0, q=1.5).item() == pytest.approx(-1.8)
    # -0.5 * (-1 - 2)
    assert losses.temperature_loss(one(0.5), one(-1), target_entropy_nats=-2.0).item() == 1.5
    # (1 + 9) / 2 + (4 + 0) / 2
    assert losses.parameter_penalty(one(1, 3), one(2, 0)).item() == 7.0
    q = torch.tensor([[1.0, 5.0], [3.0, 1.0]])
    assert [losses.aggregate(q, how).tolist() for how in ("min", "mean", "first")] == [[1.0, 1.0], [2.0, 3.0], [1.0, 5.0]]
    torch.testing.assert_close(losses.aggregate(q, "mean-std"), q.amin(0))  # two critics lie one standard deviation from their mean
    many = torch.tensor([[1.0], [2.0], [6.0]], dtype=F64)  # mean 3, variance (4 + 1 + 9) / 3
    assert losses.aggregate(many, "mean-std").item() == pytest.approx(3.0 - math.sqrt(14 / 3))
    equal = torch.ones((3, 1), dtype=F64, requires_grad=True)
    assert torch.autograd.grad(losses.aggregate(equal, "mean-std").sum(), equal)[0].flatten().tolist() == pytest.approx([1 / 3] * 3)


def q_by_hand(critic: Any, obs: torch.Tensor, action: torch.Tensor) -> list[torch.Tensor]:
    """Each member by itself."""
    stacked = [*critic.hidden, critic.head]
    x = torch.cat([obs, action], 1)
    return [linear_layers(x, [(layer.weight[j], layer.bias[j, 0]) for layer in stacked])[:, 0] for j in range(critic.num)]


def v_by_hand(net: Any, obs: torch.Tensor) -> torch.Tensor:
    return net_by_hand(net, obs)[:, 0]


def density_by_hand(params: torch.Tensor, action: torch.Tensor, q: float) -> torch.Tensor:
    """log_q of the density of tanh(u) at `action` in (-1, 1), by torch.distributions."""
    mean, log_std = params[:, :2], params[:, 2:]
    base = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()])
    p = base.log_prob(action).exp()
    return p.log() if q == 1.0 else (p ** (q - 1) - 1) / (q - 1)


@pytest.mark.parametrize("method_id", OFF_POLICY)
@pytest.mark.check("value")
def test_losses_equal_the_formulas_written_out(method_id: str) -> None:
    method = tiny(method_id)
    nets, (batch, noise) = made(method).nets, minibatch()
    lam, agent = 0.2, nets.agent
    q = getattr(method.temperature, "q", 1.0)
    if method_id == "td3":
        mean = policy_by_hand(nets.references["target"], batch.next_obs).tanh()
        action = torch.clip(mean + torch.clip(0.2 * noise[0], -0.5, 0.5), -1, 1)
        value = torch.minimum(*q_by_hand(nets.target, batch.next_obs, action))
    elif method_id == "sac":
        params = policy_by_hand(agent, batch.next_obs)
        action = (params[:, :2] + params[:, 2:].exp() * noise[0]).tanh()
        value = torch.minimum(*q_by_hand(nets.target, batch.next_obs, action)) - lam * density_by_hand(params, action, 1.0)
    else:
        value = v_by_hand(nets.target, batch.next_obs)
    y = batch.reward + 0.99 * batch.continuation * value
    torch.testing.assert_close(nets.goal(batch, noise[0], lam), y)
    errors = [(one_q - y).square().mean() for one_q in q_by_hand(nets.critic, batch.obs, batch.action)]
    torch.testing.assert_close(nets.critic_loss(batch, y)[0], sum(errors) * (1.0 if method_id == "td3" else 0.5))
    params = policy_by_hand(agent, batch.obs)
    if method_id == "td3":
        expected = -q_by_hand(nets.critic, batch.obs, params.tanh())[0].mean()
    else:
        mean, log_std = params[:, :2], params[:, 2:]
        action = (mean + log_std.exp() * noise[2]).tanh()
        values = q_by_hand(nets.critic, batch.obs, action)
        density = density_by_hand(params, action, q)
        if method_id == "sac":
            expected = (lam * density - torch.minimum(*values)).mean()
        else:
            old = density_by_hand(policy_by_hand(nets.references["old"], batch.obs), action, q)
            expected = (density + q * (lam - 1.0) * old - values[0]).mean() + 1e-3 * (mean.square().mean() + log_std.square().mean())
            action = (mean + log_std.exp() * noise[1]).tanh()
            goal = torch.minimum(*q_by_hand(nets.critic, batch.obs, action)) - lam * density_by_hand(params, action, q)
            error = 0.5 * (v_by_hand(nets.value, batch.obs) - goal).square().mean()
            torch.testing.assert_close(nets.value_loss(batch, noise[1], lam)[0], error)
    torch.testing.assert_close(nets.actor_loss(batch, noise[2], lam)[0], expected)


def test_log_q_can_be_summed_over_entries() -> None:
    nets, (batch, noise) = made(tiny("mdpo-off/tsallis")).nets, minibatch()
    dist = nets.dist(nets.agent, batch.obs, F64)
    raw = dist.at(noise[0])
    slopes = 1.0 - raw.tanh().square()
    each = Normal(dist.mean, dist.log_std.exp()).log_prob(raw).exp() / slopes
    joint, summed = (log_density(dist, raw, FixedTemperature(q=1.5, per_dimension=p)) for p in (False, True))
    torch.testing.assert_close(joint, 2.0 * (each.prod(1).sqrt() - 1.0))
    torch.testing.assert_close(summed, 2.0 * (each.sqrt() - 1.0).sum(1))


def test_temperature_moves_towards_the_target_entropy() -> None:
    batch, noise = minibatch()
    for target, sign in ((-50.0, -1.0), (50.0, 1.0)):
        update = made(tiny("sac", temperature=TunedTemperature(target_entropy_nats=target)))
        stats = update(batch, noise, True)
        assert math.copysign(1.0, update.nets.log_lam.item()) == sign and float(stats["lam"]) > 0
    assert made(tiny("sac")).nets.target_entropy_nats == -2.0


# -- 2: gradients --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", OFF_POLICY)
@pytest.mark.check("gradient")
def test_gradients_match_finite_differences(method_id: str) -> None:
    nets, (batch, noise) = made(tiny(method_id)).nets, minibatch(4)
    lam = 0.3
    y = nets.goal(batch, noise[0], lam)
    checks: list[tuple[Any, Any]] = [
        (lambda: nets.critic_loss(batch, y)[0], nets.critic),
        (lambda: nets.actor_loss(batch, noise[2], lam)[0], nets.policy),
    ]
    if nets.value is not None:
        checks.append((lambda: nets.value_loss(batch, noise[1], lam)[0], nets.value))
    for loss, net in checks:
        params = list(net.parameters())
        found = torch.autograd.grad(loss(), params)
        for p, grad in zip(params, found, strict=True):
            for i in range(0, p.numel(), max(1, p.numel() // 5)):
                values = []
                with torch.no_grad():
                    for h in (1e-6, -2e-6, 1e-6):  # forward, backward, and back to the start
                        p.view(-1)[i] += h
                        values.append(float(loss()))
                assert float(grad.reshape(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_a_loss_computes_the_gradient_of_its_own_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient that is thrown away: each differentiation asks for one network, and frozen ones need none."""
    asked = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, params: (asked.append({id(p) for p in params}), grad(loss, params))[1])
    update = made(tiny("mdpo-off"))
    update(*minibatch(), True)
    nets = update.nets
    assert asked == [{id(p) for p in net.parameters()} for net in (nets.value, nets.critic, nets.policy)]
    assert not any(p.requires_grad for net in (nets.target, nets.reference_policies) for p in net.parameters())


# -- 3: the parent as a limit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, SoftValue(hidden=(8,), activation="tanh")])
@pytest.mark.check("limit", "mdpo-off")
def test_mdpo_with_the_step_of_the_temperature_is_sac(value: SoftValue | None) -> None:
    """1/t = lam drops the old policy: the same critic, Q reduction and no penalty give SAC's numbers after 200 updates."""
    target = SoftTarget() if value is None else ValueTarget()
    sac = tiny("sac", temperature=FixedTemperature(0.2), target=target, value=value, actor=Ascent(aggregate="first"))
    mdpo = tiny("mdpo-off", target=target, value=value, actor=Ascent(aggregate="first", inverse_step=0.2))
    ends = []
    for method in (sac, mdpo):
        update = Update(ActorCritic(method, make_agent(method), 0))
        start = everything(update)
        for i in range(200):
            update(*minibatch(seed=i), True)
        assert float((everything(update) - start).abs().max()) > 0.01
        ends.append(everything(update)[: len(ends[0]) if ends else None])  # SAC has no old policy, MDPO's comes last
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


@pytest.mark.check("limit", "mdpo-off/tsallis")
def test_tsallis_at_index_one_is_mdpo() -> None:
    batch, noise = minibatch()
    kl, tsallis = (made(tiny(m)) for m in ("mdpo-off", "mdpo-off/tsallis"))
    tsallis.nets.method = dataclasses.replace(tsallis.nets.method, temperature=FixedTemperature(0.2, q=1.0 + 1e-7))
    for update in (kl, tsallis):
        update(batch, noise, True)
    torch.testing.assert_close(everything(kl), everything(tsallis), rtol=0, atol=1e-7)


@pytest.mark.check("limit", "sac", "td3")
def test_td3_is_sac_without_entropy_and_noise() -> None:
    batch, noise = minibatch()
    td3 = tiny("td3", target=SmoothedTarget(noise=0.0), critic=Critics(hidden=(8,)), policy_delay=1)
    sac = tiny("sac", temperature=FixedTemperature(0.0), critic=Critics(hidden=(8,)), actor=Ascent(aggregate="first"))
    a, b = (ActorCritic(m, make_agent(m), 0) for m in (td3, sac))
    with torch.no_grad():
        b.agent.net.load_state_dict({k: v if v.shape == x.shape else torch.cat([v, torch.zeros_like(v)]) for (k, v), x in zip(
            a.agent.net.state_dict().items(), b.agent.net.state_dict().values(), strict=True)})  # fmt: skip
        b.agent.net["policy"].head.bias[2:] = -20.0  # the least standard deviation, 2e-9
    y = a.goal(batch, noise[0], 0.0)
    torch.testing.assert_close(b.goal(batch, noise[0], 0.0), y, rtol=0, atol=1e-7)
    torch.testing.assert_close(a.actor_loss(batch, noise[2], 0.0)[0], b.actor_loss(batch, noise[2], 0.0)[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(a.critic_loss(batch, y)[0], b.critic_loss(batch, y)[0])


# -- 4: invariance -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", OFF_POLICY)
@pytest.mark.check("invariance")
def test_order_and_repetition_of_the_batch_change_nothing(method_id: str) -> None:
    order_and_repetition_change_nothing(lambda: made(tiny(method_id)), *minibatch())


@pytest.mark.parametrize("method_id", OFF_POLICY)
def test_truncation_bootstraps_and_termination_does_not(method_id: str) -> None:
    termination_stops_the_target_and_truncation_does_not(made(tiny(method_id)).nets, *minibatch(), lam=0.2)


# -- 6: bad input --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: OffPolicy(batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: OffPolicy(utd=0.0), r"utd \(updates per environment step\) must be > 0"),
        (lambda: OffPolicy(polyak=0.0), r"share of the new weights"),
        (lambda: OffPolicy(gamma=1.5), r"gamma must lie in \[0, 1\]"),
        (lambda: OffPolicy(learning_starts=-1), "learning_starts must be >= 0"),
        (lambda: OffPolicy(target=ValueTarget()), r"set target=ValueTarget\(\) and value=SoftValue\(\)"),
        (lambda: OffPolicy(value=SoftValue()), "a value network serves ValueTarget alone"),
        (lambda: OffPolicy(policy=Deterministic()), "a deterministic policy has no density"),
        (lambda: dataclasses.replace(tiny("td3"), target=SmoothedTarget(penalty=0.1)), "target.penalty reads next logged actions or returns"),
        (lambda: OffPolicy(target=LoggedTarget()), r"target=LoggedTarget\(\) reads .* which a dataset has and a replay has not"),
        (lambda: OffPolicy(regulariser=Conservative(calibrated=True)), "regulariser.calibrated reads next logged actions or returns"),
        (lambda: OffPolicy(actor=Weighted()), r"actor=Weighted\(\) has not: set temperature=FixedTemperature\(0.0\)"),
        (lambda: Deterministic(noise=0.0), "explores nothing"),
        (lambda: Ascent(inverse_step=0.0), "None leaves the old policy out"),
        (lambda: Ascent(refresh_steps=0), "refresh_steps must be >= 1"),
        (lambda: FixedTemperature(q=3.0), r"must lie in \[1, 2\], got 3.0"),
        (lambda: FixedTemperature(lam=-1.0), "must be >= 0"),
        (lambda: TunedTemperature(lam=0.0), r"FixedTemperature\(0.0\) leaves the entropy out"),
        (lambda: Critics(num=0), "critic.num must be >= 1"),
        (lambda: build("CartPole-v1", OffPolicy()), r"continuous actions.*Discrete\(2\); use ppo"),
        (lambda: build("Pendulum-v1", OffPolicy(), agent_options={"squash": False}), None),
        (lambda: configure("sac", "markovia/Tabular-v0"), "sac serves control"),
        (lambda: ControlAgent.from_spaces(OBS, BOX, std="own"), "std must be 'shared', 'state' or 'fixed', got 'own'"),  # type: ignore[arg-type]
        (lambda: ControlAgent.from_spaces(OBS, BOX, squash=True, tanh_mean=True), "leave tanh_mean out"),
        (lambda: ControlAgent.from_spaces(OBS, spaces.Discrete(2), std="state"), "std='state' needs a Box action space.*leave std out"),
    ],
)
@pytest.mark.check("bad_input", "sac", "td3", "mdpo-off", "mdpo-off/tsallis")
def test_bad_input_is_answered(make: Any, match: str | None) -> None:
    if match is None:
        setup = make()
        with pytest.raises(ValueError, match="needs bounded actions"):
            OffPolicyDriver(OffPolicy(), setup.agent, setup.collector)
        return
    with pytest.raises(ValueError, match=match):
        make()
