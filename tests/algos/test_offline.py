"""Every row of the offline table: gradients, what enters which loss, invariance, traced updates, bad input."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from off_policy_pieces import (
    F64,
    OBS,
    compiled_agrees_with_eager,
    net_by_hand,
    order_and_repetition_change_nothing,
    policy_by_hand,
    termination_stops_the_target_and_truncation_does_not,
    traced_equals_eager,
)
from offline_pieces import (
    ACTIVE,
    BOX,
    DATASET,
    LAM,
    POINT,
    decoded_by_hand,
    guided_by_hand,
    loss_and_gradient,
    made,
    minibatch,
    q_by_hand,
    tiny,
)

from markovia.agents.control import ControlAgent
from markovia.algos.off_policy import regularised
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.slots import (
    Anchored,
    Behaviour,
    Clone,
    ClosedForm,
    Conservative,
    Critics,
    Deterministic,
    Diverse,
    Expectile,
    Guided,
    Held,
    InSampleTarget,
    JointBehaviour,
    Mixture,
    SmoothedTarget,
    SoftTarget,
    Squashed,
    Supported,
    Weighted,
)
from markovia.algos.off_policy.update import Update
from markovia.algos.offline.method import Logged, Offline
from markovia.algos.offline.methods import OFFLINE
from markovia.algos.offline.source import make_source
from markovia.algos.presets import configure, override
from markovia.algos.setup import build
from markovia.envs.exact.offline import pointmass_data
from markovia.envs.offline.transitions import About, Transitions


@pytest.mark.parametrize("method_id", OFFLINE)
def test_budget_of_the_row(method_id: str) -> None:
    value, updates = OFFLINE[method_id].value, {"spot": 1_100_000, "cfpi": 500_000, "cfpi/sg": 500_000, "edac": 3_000_000, "edac/sac-n": 3_000_000}
    assert value.fixed_data and value.num_optimizer_steps == updates.get(method_id, 1_000_000)
    assert configure(method_id, POINT).num_env_steps == (4000 if method_id == "spot" else 3000)  # a thousand for its model alone


# -- 2: gradients --------------------------------------------------------------------------------------------------------------------------


def check_gradient(loss: Any, net: Any) -> None:
    params = list(net.parameters())
    found = torch.autograd.grad(loss(), params)
    for p, grad in zip(params, found, strict=True):
        for i in range(0, p.numel(), max(1, p.numel() // 4)):
            values = []
            for h in (1e-6, -2e-6, 1e-6):  # forward, backward, and back to the start
                with torch.no_grad():
                    p.view(-1)[i] += h
                values.append(loss().item())
            assert float(grad.reshape(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("method_id", OFFLINE)
@pytest.mark.check("gradient")
def test_gradients_match_finite_differences(method_id: str) -> None:
    """The scale of Q is a constant in the gradient, so it is held still here: by hand, with the value that it has at the start."""
    method = tiny(method_id)
    nets, (batch, noise) = made(method).nets, minibatch(4)
    slot = method.actor
    if nets.critic is not None:
        y = nets.goal(batch, noise[0], LAM, noise[3:])
        check_gradient(lambda: nets.critic_loss(batch, y, noise[3:])[0], nets.critic)
    adv = None
    if nets.value is not None:
        check_gradient(lambda: nets.value_loss(batch, noise[1], LAM)[0], nets.value)
        adv = nets.value_loss(batch, noise[1], LAM)[2]
    if isinstance(slot, Weighted) and adv is None:  # the advantage is a constant in the gradient, though its draw moves with the policy
        adv = torch.linspace(-1.0, 1.0, 4, dtype=F64)
    if nets.behaviour is not None:
        check_gradient(lambda: nets.behaviour_loss(batch, noise[-2:])[0], nets.behaviour)
    if not isinstance(slot, Held | Supported | Guided):
        check_gradient(lambda: nets.actor_loss(batch, noise[2], LAM, adv, noise[-2:])[0], nets.policy)
        return

    def action() -> torch.Tensor:
        return policy_by_hand(nets.agent, batch.obs).tanh()

    def q() -> torch.Tensor:
        return nets.one_q(nets.critic, batch.obs, action(), slot.aggregate)

    size = q().detach().abs().mean()

    def loss() -> torch.Tensor:
        if isinstance(slot, Guided):
            return guided_by_hand(nets, batch, noise) + slot.alpha * (q() / q().abs().mean() - q() / size).mean()
        if isinstance(slot, Supported):
            distance = nets.support(batch.obs, action(), noise[-2:])
        else:
            distance = regularised.squared_distance(action(), batch.action, reduce=slot.reduce)
        return (slot.weight * distance - slot.alpha * q() / size).mean()

    check_gradient(loss, nets.policy)
    params = list(nets.policy.parameters())
    found = torch.autograd.grad(nets.actor_loss(batch, noise[2], LAM, None, noise[-2:])[0], params)
    torch.testing.assert_close(found, torch.autograd.grad(loss(), params), rtol=1e-12, atol=1e-14)


def test_a2pr_models_the_logged_actions_above_its_value() -> None:
    """Reconstruction of those rows alone, KL of all; and a detached target sends no gradient through the model."""
    nets, (batch, noise) = made(tiny("a2pr")).nets, minibatch()
    better = q_by_hand(nets.critic, batch.obs, batch.action)[0] > net_by_hand(nets.value, batch.obs)[:, 0]
    assert 0 < int(better.sum()) < 6
    decoded = decoded_by_hand(nets.behaviour, batch.obs, batch.action, noise[:2])
    mean, log_std = net_by_hand(nets.behaviour.encode, torch.cat([batch.obs, batch.action], 1)).chunk(2, 1)
    divergence = torch.distributions.kl_divergence(torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0))
    expected = (better * ((decoded - batch.action) ** 2).mean(1)).mean() + 0.5 * divergence.mean()
    torch.testing.assert_close(nets.behaviour_loss(batch, noise[:2])[0], expected)
    through, cut = (loss_and_gradient(made(override(tiny("a2pr"), {"actor": {"detach_target": d}})).nets, batch, noise) for d in (False, True))
    assert through[0] == cut[0] and not torch.allclose(through[1], cut[1])


def test_the_evaluation_policy_never_enters_a_target() -> None:
    """With the constraint of the other actor the two stay equal; with any constraint the rest learns what TD3+BC learns, to the bit."""
    ends = {}
    for name, changes in (("td3-bc", {}), ("mcep", {}), ("same", {"evaluation": {"alpha": 2.5}})):
        method = override(tiny("td3-bc" if name == "td3-bc" else "mcep"), changes)
        torch.manual_seed(0)
        agent = ControlAgent.from_spaces(OBS, BOX, critic=False, normalize_obs=False, **method.policy.agent_options())
        agent.net.double()
        ends[name] = Update(ActorCritic(method, agent, 0))
        for i in range(6):
            batch, noise = minibatch(seed=i)
            ends[name](batch, noise, i % 2 == 1)
    parts = [{k: v for k, v in u.nets.state_dict().items() if not k.startswith("evaluation.")} for u in ends.values()]
    assert all(torch.equal(v, part[k]) for part in parts[1:] for k, v in parts[0].items())
    mild, same = ends["mcep"].nets, ends["same"].nets
    assert all(torch.equal(p, q) for p, q in zip(same.evaluation.parameters(), same.policy.parameters(), strict=True))
    assert not torch.equal(mild.evaluation.head.weight, mild.policy.head.weight)


def test_what_is_anchored_never_enters_a_target() -> None:
    ends = []
    for weight in (0.6, 6.0):
        update = made(override(tiny("mcep/awac"), {"actor": {"lr": 1e-3}, "evaluation": {"weight": weight, "lr": 1e-3}}))
        for i in range(4):
            update(*minibatch(seed=i), True)
        ends.append(update.nets.state_dict())
    rest = [k for k in ends[0] if not k.startswith("evaluation.")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in rest) and any(k.startswith("policy.") for k in rest)
    assert not torch.equal(*(end["evaluation.head.weight"] for end in ends))


# -- 4: invariance -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", OFFLINE)
@pytest.mark.check("invariance")
def test_order_and_repetition_of_the_batch_change_nothing(method_id: str) -> None:
    order_and_repetition_change_nothing(lambda: made(tiny(method_id)), *minibatch())


@pytest.mark.parametrize("method_id", ACTIVE)
def test_truncation_bootstraps_and_termination_does_not(method_id: str) -> None:
    termination_stops_the_target_and_truncation_does_not(made(tiny(method_id)).nets, *minibatch(), LAM)


@pytest.mark.parametrize("method_id", ["td3-bc", "rebrac", "mcep", "spot"])  # a2pr compares Q with V, so there it does not
def test_the_scale_of_rewards_drops_out_of_the_actor(method_id: str) -> None:
    """Q multiplied by 7 gives the actor the same loss."""
    batch, noise = minibatch()
    nets = made(tiny(method_id)).nets
    before = loss_and_gradient(nets, batch, noise)
    with torch.no_grad():
        nets.critic.head.weight.mul_(7.0)
        nets.critic.head.bias.mul_(7.0)
    torch.testing.assert_close(loss_and_gradient(nets, batch, noise), before, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("method_id", OFFLINE)
def test_traced_update_equals_the_eager_one(method_id: str) -> None:
    traced_equals_eager(lambda compile: made(tiny(method_id), compile), lambda i: minibatch(seed=i))


@pytest.mark.slow
@pytest.mark.parametrize("method_id", ["edac", "cql/cal-ql", "spot"])
def test_compiled_update_agrees_with_the_eager_one(method_id: str) -> None:
    """Gradients of gradients, many actions per state, and a model that is fixed."""
    compiled_agrees_with_eager(lambda compile: made(tiny(method_id, policy_delay=1), compile), lambda i: minibatch(seed=i), steps=6)


# -- 6: bad input --------------------------------------------------------------------------------------------------------------------------


def other(**changes: Any) -> Transitions:
    return dataclasses.replace(pointmass_data("random", episodes=2), about=About("other"), **changes)


def source(data: Transitions, **settings: Any) -> Any:
    agent = ControlAgent.from_spaces(BOX, BOX, critic=False, **Deterministic(hidden=(4,)).agent_options())
    return make_source(data, Logged(**settings), agent, 0.99)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Logged(fraction=0.0), r"data.fraction must lie in \(0, 1\], got 0.0"),
        (lambda: Logged(reward="return_rang"), "did you mean 'return_range'"),
        (lambda: Offline(learning_starts=5), "learning_starts means nothing for a fixed dataset, so it must stay 0, got 5"),
        (lambda: Offline(utd=2.0), "utd means nothing"),
        (lambda: dataclasses.replace(tiny("td3-bc"), target=SmoothedTarget(penalty=0.1)), "set data.next_action=True"),
        (lambda: dataclasses.replace(tiny("td3-bc"), actor=Clone()), "imitation alone.*has no critic"),
        (lambda: dataclasses.replace(tiny("bc"), actor=Held()), "every other actor needs both"),
        (lambda: dataclasses.replace(tiny("td3-bc"), policy=Squashed()), r"needs policy=Deterministic\(\)"),
        (lambda: Held(alpha=-1.0), "actor.alpha and actor.weight must be >= 0"),
        (lambda: dataclasses.replace(tiny("awac"), evaluation=Held()), r"belongs to actor=Held\(\), got Weighted; set evaluation=None"),
        (lambda: dataclasses.replace(tiny("cql"), evaluation=Anchored()), r"belongs to actor=Weighted\(\), got Ascent; set evaluation=None"),
        (lambda: Anchored(weight=-1.0), r"evaluation.weight must be >= 0, got -1.0"),
        (lambda: Behaviour(beta=0.0), "behaviour.steps must be >= 1 and behaviour.beta > 0"),
        (lambda: Supported(weight=-1.0), "actor.alpha and actor.weight must be >= 0"),
        (lambda: dataclasses.replace(tiny("spot"), behaviour=None), r"set behaviour=Behaviour\(\)"),
        (lambda: JointBehaviour(weight=0.0), "behaviour.weight and behaviour.beta must be > 0, got 0.0 and 0.5"),
        (lambda: Guided(alpha=-1.0), "actor.alpha and actor.weight must be >= 0, got -1.0"),
        (lambda: Mixture(num=0), "policy.num must be >= 1, got 0"),
        (lambda: ClosedForm(log_tau=-1.0), "log_tau >= 0"),
        (lambda: dataclasses.replace(tiny("cfpi"), evaluation=None), r"policy=Mixture\(\) acts by evaluation=ClosedForm\(\)|imitation alone"),
        (lambda: dataclasses.replace(tiny("cfpi"), critic=Critics()), "need each other: set both or neither"),
        (lambda: dataclasses.replace(tiny("cfpi"), regulariser=Diverse()), "quantile critics take no regulariser"),
        (lambda: dataclasses.replace(tiny("cfpi"), target=SoftTarget()), r"set target=LoggedTarget\(\), got SoftTarget"),
        (lambda: dataclasses.replace(tiny("cfpi"), data=Logged()), "reads the next logged action; set data.next_action=True"),
        (lambda: dataclasses.replace(tiny("a2pr"), value=None), "need each other and serve nothing else"),
        (lambda: dataclasses.replace(tiny("a2pr"), target=SoftTarget()), r"set target=SmoothedTarget\(\)"),
        (lambda: Weighted(beta=-1.0), "actor.beta must be >= 0"),
        (lambda: Expectile(tau=1.0), r"value.tau must lie in \(0, 1\), got 1.0"),
        (lambda: dataclasses.replace(tiny("iql"), value=None), r"set target=InSampleTarget\(\) and value=Expectile\(\)"),
        (lambda: dataclasses.replace(tiny("awac"), target=InSampleTarget()), "an expectile value serves InSampleTarget alone"),
        (lambda: Conservative(num=0), "needs alpha >= 0, num >= 1 and temperature > 0, got 5.0, 0 and 1.0"),
        (lambda: Diverse(eta=-1.0), "regulariser.eta must be >= 0"),
        (lambda: dataclasses.replace(tiny("edac"), critic=Critics(num=1)), "critic.num must be >= 2, got 1"),
        (lambda: dataclasses.replace(tiny("bc"), regulariser=Diverse()), "needs critics; set regulariser=None"),
        (lambda: dataclasses.replace(tiny("td3-bc"), regulariser=Conservative()), "which a deterministic policy does not have"),
        (lambda: dataclasses.replace(tiny("cql/cal-ql"), data=Logged()), "set data.returns_to_go to 'zero' or 'repeat_last'"),
        (lambda: build(POINT, tiny("bc")), "an offline method learns control from a dataset: name one .--dataset"),
        (lambda: build(POINT, OffPolicy(), dataset=DATASET), "does not learn from a dataset; choose an offline method such as td3-bc"),
        (lambda: build("CartPole-v1", tiny("bc"), dataset=DATASET), "Discrete.*choose a task and a dataset with a Box"),
        (lambda: build("Pendulum-v1", tiny("bc"), dataset=DATASET), r"blend has observations \{'obs': \(2,\)\}, but the environment gives"),
        (lambda: build(POINT, tiny("bc"), dataset="fixture:nothing"), "unknown fixture 'nothing'"),
        (lambda: source(other(action=np.zeros((80, 3), np.float32))), r"other has actions of shape \(3,\)"),
        (lambda: source(other(action=np.full((80, 2), 1.5, np.float32))), "from 1.5 to 1.5, outside the environment's"),
    ],
)
def test_bad_input_is_answered(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
