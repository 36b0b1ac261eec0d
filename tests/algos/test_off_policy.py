"""Every row of the off-policy table: values, gradients, limits, invariance, resume, bad input; and what replay, critics and driver promise."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.agents.control import ControlAgent
from markovia.agents.interface import Agent
from markovia.algos.off_policy import losses
from markovia.algos.off_policy.actor_critic import ActorCritic, log_density
from markovia.algos.off_policy.driver import OffPolicyDriver
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.methods import OFF_POLICY
from markovia.algos.off_policy.replay import Batch, Replay
from markovia.algos.off_policy.slots import (
    Ascent,
    Critics,
    Deterministic,
    FixedTemperature,
    SmoothedTarget,
    SoftTarget,
    SoftValue,
    TunedTemperature,
    ValueTarget,
)
from markovia.algos.off_policy.update import Update
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.algos.systems import find
from markovia.runs import train

torch.set_num_threads(1)
F64 = torch.float64
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 4.0], np.float32))
TINY: dict[str, Any] = {"policy": {"hidden": [8], "activation": "tanh"}, "critic": {"hidden": [8, 8], "activation": "tanh"}}
SHORT: dict[str, Any] = {**TINY, "learning_starts": 6, "num_steps": 15, "num_env_steps": 60, "batch_size": 8}


def tiny(method_id: str, **changes: Any) -> OffPolicy:
    """A row with small smooth networks."""
    method = override(OFF_POLICY[method_id].value, TINY)
    if method.value is not None:
        method = override(method, {"value": {"hidden": [8], "activation": "tanh"}})
    return dataclasses.replace(method, **changes)


def make_agent(method: OffPolicy, seed: int = 0) -> ControlAgent:
    torch.manual_seed(seed)
    agent = ControlAgent.from_spaces(OBS, BOX, critic=False, normalize_obs=False, **method.policy.agent_options())
    agent.net.double()
    shake(agent.net)
    return agent


def shake(net: torch.nn.Module, size: float = 0.3, seed: int = 4) -> None:
    """Move every parameter by a normal of standard deviation `size`."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=F64).to(p.dtype))


def made(method: OffPolicy, compile: bool = False) -> Update:
    """Networks in float64, no two of them alike, so that a mix-up of target, old and current ones is seen."""
    nets = ActorCritic(method, make_agent(method), 0)
    for i, net in enumerate([nets.critic, nets.target, *nets.reference_policies.values(), *([] if nets.value is None else [nets.value])]):
        shake(net, 0.2, seed=10 + i)
    return Update(nets, compile)


def minibatch(n: int = 6, seed: int = 0) -> tuple[Batch, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=F64)  # noqa: E731
    ends = torch.arange(n) % 3 == 0
    batch = Batch(normal(n, 3), normal(n, 2).tanh(), normal(n), normal(n, 3), 1.0 - ends.to(F64), torch.arange(n) % 3 == 1)
    return batch, normal(3, n, 2)


def everything(update: Update) -> torch.Tensor:
    """All numbers that an update moves, targets included."""
    return torch.cat([p.detach().reshape(-1) for p in update.nets.parameters()])


# -- the table -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", OFF_POLICY)
def test_row_is_whole(method_id: str) -> None:
    row = OFF_POLICY[method_id]
    assert row.id == method_id and row.claim and row.new and re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert row.parent is None or find(row.parent)
    texts = []
    for where in row.functions:
        module, _, name = where.partition(":")
        texts.append(getattr(importlib.import_module(module), name).__doc__)
    assert all(re.search(r"\d{4}\.\d{5}", text) for text in texts)


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


def linear_layers(x: torch.Tensor, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        x = x.tanh() if i < len(layers) - 1 else x
    return x


def q_by_hand(critic: Any, obs: torch.Tensor, action: torch.Tensor) -> list[torch.Tensor]:
    """Each member by itself."""
    stacked = [*critic.hidden, critic.head]
    x = torch.cat([obs, action], 1)
    return [linear_layers(x, [(layer.weight[j], layer.bias[j, 0]) for layer in stacked])[:, 0] for j in range(critic.num)]


def policy_by_hand(agent: Any, obs: torch.Tensor) -> torch.Tensor:
    net = agent.net["policy"]
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    return linear_layers(obs, [(m.weight.T, m.bias) for m in layers])


def v_by_hand(net: Any, obs: torch.Tensor) -> torch.Tensor:
    return linear_layers(obs, [(m.weight.T, m.bias) for m in net.modules() if isinstance(m, torch.nn.Linear)])[:, 0]


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
    batch, noise = minibatch()
    ends = []
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for index in (torch.arange(6), order, torch.cat([order, order])):
        update = made(tiny(method_id))
        update(batch.map(lambda x, index=index: x[index]), noise[:, index], True)
        ends.append(everything(update))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method_id", OFF_POLICY)
def test_truncation_bootstraps_and_termination_does_not(method_id: str) -> None:
    nets, (batch, noise) = made(tiny(method_id)).nets, minibatch()
    y = nets.goal(batch, noise[0], 0.2)
    ended = batch.continuation == 0
    torch.testing.assert_close(y[ended], batch.reward[ended])
    assert bool((y[~ended] != batch.reward[~ended]).all())
    batch.truncated = ~batch.truncated
    assert torch.equal(nets.goal(batch, noise[0], 0.2), y)


# -- 5: resume -----------------------------------------------------------------------------------------------------------------------------


def pendulum(method_id: str, **changes: Any) -> OffPolicyDriver:
    method = override(OFF_POLICY[method_id].value, {**SHORT, **changes})
    driver: OffPolicyDriver = make_driver(method, build("Pendulum-v1", method, 5), seed=5)
    return driver


@pytest.mark.parametrize("method_id", OFF_POLICY)
@pytest.mark.check("resume")
def test_half_and_half_equals_a_whole(method_id: str, tmp_path: Any) -> None:
    """Through a file on disk, the replay having wrapped around, bit for bit."""
    changes: dict[str, Any] = {"replay_size": 20, "num_envs": 2, "utd": 0.5, "actor": {"refresh_steps": 10}}
    straight = pendulum(method_id, **changes)
    straight.step()
    straight.boundary()
    save_tensors(tmp_path / "state.safetensors", *straight.state())
    stats = straight.step()
    resumed = pendulum(method_id, **changes)
    resumed.load_state(*load_tensors(tmp_path / "state.safetensors"))
    resumed.boundary()
    assert resumed.step() == stats
    a, meta_a = straight.state()
    b, meta_b = resumed.state()
    assert meta_a == meta_b and a.keys() == b.keys() and straight.num_updates > 20
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_stopped_run_goes_on_to_the_same_numbers(tmp_path: Any) -> None:
    method = override(configure("sac", "Pendulum-v1"), {**SHORT, "num_steps": 200, "num_env_steps": 800, "utd": 0.1})
    options: dict[str, Any] = {"num_checkpoints": 4, "eval_episodes": 1, "progress": False}
    whole = train(method, "Pendulum-v1", out=tmp_path / "whole", **options)
    stopped = train(method, "Pendulum-v1", out=tmp_path / "parts", callbacks=[lambda info: info.iteration < 2], **options)
    assert stopped.done["num_env_steps"] == 400
    resumed = train(method, "Pendulum-v1", out=tmp_path / "parts", resume=True, **options)
    assert resumed.done["evaluation"] == whole.done["evaluation"] and resumed.done["num_env_steps"] == 800
    assert all(torch.equal(v, resumed.agent.state()[k]) for k, v in whole.agent.state().items())
    again = Agent.load(max((tmp_path / "parts" / "checkpoints").iterdir()) / "agent")
    assert all(torch.equal(v, again.state()[k]) for k, v in whole.agent.state().items())


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


# -- policies, driver -----------------------------------------------------------------------------------------------------------------------


def test_policies_are_bounded_and_their_mode_is_what_is_evaluated() -> None:
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for method in (tiny("sac"), tiny("td3")):
        agent = make_agent(method)
        agent.net.float()
        action, logp = agent.act(agent.observe(obs), generator=torch.Generator().manual_seed(0))
        unit = agent.unit_action(action)
        assert bool((unit.abs() <= 1).all()) and torch.isfinite(logp).all()
        low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
        np.testing.assert_allclose(agent.env_action(action), (low + 0.5 * (unit + 1) * (high - low)).numpy(), rtol=1e-6, atol=1e-6)
        params = policy_by_hand(agent, torch.from_numpy(obs))
        mode = low + 0.5 * (params[:, :2].tanh() + 1) * (high - low)
        np.testing.assert_allclose(agent.predict(obs, deterministic=True)[0], mode.detach().numpy(), rtol=1e-5, atol=1e-6)
    noise = agent.policy(agent.observe(obs)).log_std
    assert torch.allclose(noise, torch.full_like(noise, math.log(0.1)))


def test_updates_follow_steps_delay_and_refresh() -> None:
    driver = pendulum("td3", num_steps=10, learning_starts=4, utd=2.0)
    start = {k: v.clone() for k, v in driver.nets.target.state_dict().items()}
    actors = []
    inner = driver.nets.actor_loss
    driver.nets.actor_loss = lambda *a: (actors.append(1), inner(*a))[1]  # type: ignore[method-assign]
    driver.step()
    assert driver.num_env_steps == 10 and driver.num_updates == 12 and len(actors) == 6
    assert any(not torch.equal(v, start[k]) for k, v in driver.nets.target.state_dict().items())
    for refresh, same in ((8, True), (20, False)):
        half = pendulum("mdpo-off", num_steps=9, learning_starts=4, utd=0.5, actor={"refresh_steps": refresh})
        half.step()
        assert half.num_updates == 2 and half.num_env_steps == 9  # int(0.5 * 5), the last of them at step 8
        old, new = (a.net["policy"].head.weight for a in (half.nets.references["old"], half.agent))
        assert torch.equal(old, new) == same


class Logged:
    """A dataset as a source: nothing is added to its replay, and a step of the budget is one update."""

    def __init__(self, rows: Batch) -> None:
        self.replay, self.episodes = Replay(len(rows.reward)), []
        self.replay.add(rows)

    def step(self, agent: Any, generator: torch.Generator, uniform: bool = False) -> int:
        return 1

    def reset(self, seed: int) -> None:
        return

    def state(self) -> dict[str, torch.Tensor]:
        return {}


def test_a_fixed_dataset_is_a_source_like_any_other() -> None:
    method = tiny("td3", learning_starts=0, num_env_steps=12, num_steps=8, batch_size=4)
    source = Logged(minibatch(30)[0])
    driver = OffPolicyDriver(method, make_agent(method), source)  # type: ignore[arg-type]
    before = everything(driver.update)
    while not driver.finished:
        driver.step()
    assert driver.num_updates == 12 and source.replay.size == 30
    assert not torch.equal(everything(driver.update), before)
    assert not any(k.startswith("collector.") for k in driver.state()[0])


def test_targets_follow_by_polyak() -> None:
    update, (batch, noise) = made(tiny("td3", polyak=0.25)), minibatch()
    nets = update.nets
    pairs = [(nets.target, nets.critic), (nets.references["target"].net["policy"], nets.policy)]
    before = [[p.clone() for p in t.parameters()] for t, _ in pairs]
    update(batch, noise, False)
    assert all(torch.equal(p, q) for (t, _), old in zip(pairs, before, strict=True) for p, q in zip(t.parameters(), old, strict=True))
    update(batch, noise, True)
    for (target, source), old in zip(pairs, before, strict=True):
        for p, q, s in zip(target.parameters(), old, source.parameters(), strict=True):
            torch.testing.assert_close(p, 0.75 * q + 0.25 * s)


def test_bfloat16_stays_close_and_keeps_float32_weights() -> None:
    ends = []
    for precision in ("float32", "bfloat16"):
        update = pendulum("sac", precision=precision).update
        batch, noise = minibatch()
        batch = Batch(batch.obs, batch.action[:, :1], batch.reward, batch.next_obs, batch.continuation, batch.truncated)
        stats = update(batch.map(lambda x: x.float() if x.is_floating_point() else x), noise[..., :1].float(), True)
        assert all(p.dtype == torch.float32 for p in update.nets.critic.parameters())
        ends.append(torch.stack([stats[k] for k in ("critic_loss", "actor_loss", "q")]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0.03, atol=0.03)
    assert not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("method_id", OFF_POLICY)
def test_traced_update_equals_the_eager_one(method_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the compiled update but the compiler, which takes half a minute: the traced operations one by one."""
    monkeypatch.setattr(torch, "compile", lambda graph_module, **_: graph_module)
    eager, traced = made(tiny(method_id)), made(tiny(method_id), compile=True)
    for i in range(6):
        batch, noise = minibatch(seed=i)
        left, right = (u(batch, noise, i % 2 == 1) for u in (eager, traced))
        assert left.keys() == right.keys()
        torch.testing.assert_close([*left.values()], [*right.values()], rtol=1e-9, atol=1e-12, check_dtype=False)
        if "old" in eager.nets.references and i == 2:
            eager.refresh()
            traced.refresh()
    torch.testing.assert_close(everything(eager), everything(traced), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method_id", ["td3", "mdpo-off/tsallis"])
def test_compiled_update_agrees_with_the_eager_one(method_id: str) -> None:
    """Both functions of a delayed actor; float64, so that only the order of sums differs."""
    method = tiny(method_id, policy_delay=2)
    eager, compiled = made(method), made(method, compile=True)
    for i in range(20):
        batch, noise = minibatch(seed=i)
        for update in (eager, compiled):
            update(batch, noise, i % 2 == 1)
    assert compiled.compiled is not None and compiled.compiled.seconds > 0
    torch.testing.assert_close(everything(eager), everything(compiled), rtol=1e-7, atol=1e-9)
