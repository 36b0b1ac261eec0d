"""CQL's settings for mazes: the best of several actions in the target, a multiplier that holds the gap, a floor under it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from off_policy_pieces import F64
from offline_pieces import DATASET, LAM, POINT, made, minibatch, q_by_hand, squashed_by_hand, tiny

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.algos.off_policy import regularised
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.slots import Conservative, Deterministic, SoftTarget
from markovia.algos.offline.method import Offline
from markovia.algos.optimizer import Optimizer, Rule
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.runs import train


def cql(**changes: Any) -> Offline:
    method = override(tiny("cql"), changes)
    assert isinstance(method, Offline)
    return method


# -- the target ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("subset", [None, 2])
def test_target_takes_the_best_of_several_actions(entropy: bool, subset: int | None) -> None:
    """Each state by itself: the draw whose pessimistic value is largest, and the entropy of that draw."""
    target = {"num_actions": 3, "entropy": entropy, "subset": subset}
    method = cql(critic={"num": 3}, target=target)
    batch, noise = minibatch(16, seed=1, noises=method.num_noises)
    nets = made(method).nets
    members = [0, 1, 2] if subset is None else noise[-1].flatten()[:3].argsort(descending=True)[:2].tolist()
    rows = [noise[0], *(noise[9:11])]  # after those of the actor and of the regulariser
    values, densities = [], []
    for row in rows:
        action, logp = squashed_by_hand(nets.agent, batch.next_obs, row)
        values.append(torch.stack([q_by_hand(nets.target, batch.next_obs, action)[j] for j in members]).amin(0))
        densities.append(logp)
    best = torch.stack(values).argmax(0)
    assert len(set(best.tolist())) > 1
    v = torch.stack([values[k][i] - (LAM * densities[k][i] if entropy else 0.0) for i, k in enumerate(best.tolist())])
    assert method.num_noises == 3 + 6 + 2 + (subset is not None)
    torch.testing.assert_close(nets.goal(batch, noise[0], LAM, noise[3:]), batch.reward + 0.99 * batch.continuation * v)


def test_one_action_is_the_ordinary_target_and_more_are_never_worth_less() -> None:
    goals = []
    for k in (1, 2, 6):
        method = cql(target={"num_actions": k})
        nets, (batch, noise) = made(method).nets, minibatch(noises=14)
        goals.append(nets.goal(batch, noise[0], LAM, noise[3 : method.num_noises]))
    plain = made(cql()).nets.goal(batch, noise[0], LAM)
    assert torch.equal(goals[0], plain)
    assert (goals[1] >= goals[0]).all() and (goals[2] >= goals[1] - 1e-12).all() and (goals[2] > goals[0]).any()


# -- the gap ---------------------------------------------------------------------------------------------------------------------------------


def critic_gradient(nets: ActorCritic, batch: Any, noise: torch.Tensor) -> torch.Tensor:
    assert nets.critic is not None
    loss = nets.critic_loss(batch, batch.reward, noise[3:])[0]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(nets.critic.parameters()))])


def test_multiplier_by_hand() -> None:
    """-m (gap - target): at m = 2 a gap of 3 against 0.5 gives -5, with the slope -5 in log m."""
    log_m = torch.tensor(math.log(2.0), dtype=F64, requires_grad=True)
    loss = regularised.multiplier_loss(log_m, torch.tensor(3.0, dtype=F64), target=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(-5.0) and log_m.grad is not None and log_m.grad.item() == pytest.approx(-5.0)


def test_gap_below_the_floor_counts_as_the_floor_and_pushes_nothing() -> None:
    values = torch.tensor([[[0.0, -4.0]], [[1.0, 2.0]]], requires_grad=True)  # two critics, one action, two states: log sum exp is the value
    logged = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    gaps = regularised.conservative_gap(values, 0.0, logged, temperature=1.0, min_gap=-1.5)
    assert gaps.tolist() == [-1.0 - 1.5, -1.5 + 1.0]
    gaps.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[[1.0, 0.0]], [[0.0, 1.0]]]


def test_multiplier_weighs_the_gap_and_begins_at_one() -> None:
    nets, (batch, noise) = made(cql(regulariser={"target_gap": 0.5})).nets, minibatch()
    torch.testing.assert_close(critic_gradient(nets, batch, noise), critic_gradient(made(cql()).nets, batch, noise), rtol=1e-12, atol=1e-14)
    assert nets.log_multiplier is not None
    nets.log_multiplier.data.fill_(math.log(3.0))
    thrice = made(cql(regulariser={"alpha": 30.0})).nets
    torch.testing.assert_close(critic_gradient(nets, batch, noise), critic_gradient(thrice, batch, noise), rtol=1e-12, atol=1e-14)


def test_no_gap_below_the_floor_moves_the_critics() -> None:
    batch, noise = minibatch()
    floored = made(cql(regulariser={"min_gap": 1e6})).nets
    torch.testing.assert_close(critic_gradient(floored, batch, noise), critic_gradient(made(cql(regulariser={"alpha": 0.0})).nets, batch, noise))
    deep = made(cql(regulariser={"min_gap": -1e6})).nets
    assert torch.equal(critic_gradient(deep, batch, noise), critic_gradient(made(cql()).nets, batch, noise))


@pytest.mark.parametrize(("target", "sign"), [(-1e3, 1.0), (1e3, -1.0)])
def test_multiplier_rises_while_the_gap_is_above_its_target(target: float, sign: float) -> None:
    update = made(cql(regulariser={"target_gap": target, "multiplier_lr": 0.1}))
    stats = update(*minibatch(), True)
    assert update.nets.log_multiplier is not None
    assert float(stats["multiplier"]) == 1.0 and update.nets.log_multiplier.item() == pytest.approx(0.1 * sign, rel=1e-6)


def test_dual_ascent_finds_the_multiplier_of_the_constrained_optimum() -> None:
    """One state, two actions, the first logged: min 0.5 |Q - y|^2 subject to log sum exp Q - Q_0 = target.

    The gap is log(1 + exp(-d)), d = Q_0 - Q_1, so d = -log(exp(target) - 1), and stationarity gives y_0 - Q_0 = -m (1 - p_0) for the multiplier m.
    """
    y, target = torch.tensor([0.0, 1.0], dtype=F64), 0.3
    d = -math.log(math.expm1(target))
    other = 1.0 / (1.0 + math.exp(d))  # softmax weight of the action that was not logged
    mean = y.mean().item()  # both moves cancel, so the mean stays
    wanted = (mean + d / 2, mean - d / 2)
    multiplier = (wanted[0] - y[0].item()) / other
    q, log_m = y.clone().requires_grad_(True), torch.zeros((), dtype=F64, requires_grad=True)
    dual = Optimizer([([log_m], 3e-3)], Rule(eps=1e-8), math.inf)
    for _ in range(4000):
        gap = regularised.conservative_gap(q[None, :, None], 0.0, q[:1, None], temperature=1.0).mean()
        (slope,) = torch.autograd.grad(0.5 * (q - y).square().sum() + log_m.detach().exp() * gap, q)
        with torch.no_grad():
            q -= 0.1 * slope
        (rise,) = torch.autograd.grad(regularised.multiplier_loss(log_m, gap, target=target), log_m)
        dual.move(dual.tensors(), dual.flatten([rise]))
    assert q.tolist() == pytest.approx(wanted, abs=1e-3) and log_m.exp().item() == pytest.approx(multiplier, rel=2e-3)


# -- as a run --------------------------------------------------------------------------------------------------------------------------------

MAZE: dict[str, Any] = {"target": {"num_actions": 3}, "regulariser": {"target_gap": 0.8, "min_gap": -200.0}}


@pytest.mark.usefixtures("traced_only")
def test_traced_update_equals_the_eager_one() -> None:
    ends = []
    for compiled in (False, True):
        method = cql(**MAZE)
        update = made(method, compiled)
        for seed in range(3):
            update(*minibatch(seed=seed, noises=method.num_noises), True)
        ends.append(torch.cat([p.detach().flatten() for p in update.nets.parameters()]))
        assert update.nets.log_multiplier is not None and update.nets.log_multiplier.item() != 0.0
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_half_and_half_equals_a_whole(tmp_path: Any) -> None:
    """The multiplier and its moments are in the checkpoint."""
    method = override(cql(**MAZE), {"num_env_steps": 8, "num_steps": 4, "batch_size": 8})
    whole, first, second = (make_driver(method, build(POINT, method, 3, dataset=DATASET), seed=3) for _ in range(3))
    for _ in range(2):
        whole.step()
        whole.boundary()
    first.step()
    first.boundary()
    save_tensors(tmp_path / "state.safetensors", *first.state())
    second.load_state(*load_tensors(tmp_path / "state.safetensors"))
    second.boundary()
    second.step()
    left, right = whole.nets.state(), second.nets.state()
    assert float(left["log_multiplier"]) != 0.0 and [k for k in left if not torch.equal(left[k], right[k])] == []


def test_run_with_the_settings_of_mazes(tmp_path: Any) -> None:
    small = {"num_env_steps": 20, "num_steps": 10, "batch_size": 16, "policy": {"hidden": [8]}, "critic": {"hidden": [8]}, "regulariser": {"num": 2}}
    method = override(override(configure("cql/cal-ql", POINT), small), MAZE)
    done = train(method, POINT, dataset=DATASET, out=tmp_path / "run", progress=False, eval_episodes=1).done
    assert done["num_env_steps"] == 20 and math.isfinite(done["evaluation"]["mean"])


def test_several_seeds_in_one_process(tmp_path: Any) -> None:
    """The multiplier has a row of its own for each seed."""
    small = {"num_env_steps": 6, "num_steps": 3, "batch_size": 8, "policy": {"hidden": [8]}, "critic": {"hidden": [8]}, "regulariser": {"num": 2}}
    method = override(override(configure("cql", POINT), small), MAZE)
    apart = [make_driver(method, build(POINT, method, seed, dataset=DATASET), seed=seed) for seed in (0, 1)]
    from markovia.algos.off_policy.seeds import SeedGroup

    group = SeedGroup([make_driver(method, build(POINT, method, seed, dataset=DATASET), seed=seed) for seed in (0, 1)])
    for _ in range(2):
        group.step()
        for driver in apart:
            driver.step()
    for one, other in zip(group.drivers, apart, strict=True):
        assert one.nets.log_multiplier is not None and other.nets.log_multiplier is not None
        torch.testing.assert_close(one.nets.log_multiplier, other.nets.log_multiplier, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftTarget(num_actions=0), "target.num_actions must be >= 1, got 0"),
        (lambda: Conservative(target_gap=0.8, min_gap=0.8), "so the multiplier of target_gap=0.8 could only grow; lower min_gap"),
        (lambda: override(tiny("cql/cal-ql"), {"regulariser": {"multiplier_lr": 0.0}}), "regulariser.multiplier_lr must be > 0, got 0.0"),
        (lambda: cql(target={"num_actions": 2}, policy=Deterministic()), "draws of a deterministic policy are one and the same; set it to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()
