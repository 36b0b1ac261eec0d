"""Learning on data, then online: what goes over, what stays behind, how many updates, resume, the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from offline_pieces import half_and_half_equals_a_whole

from markovia import cli
from markovia.agents.control import ControlAgent
from markovia.algos.off_policy import losses
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import Critics, Expectile, FixedTemperature, InSampleTarget, SoftTarget, Weighted
from markovia.algos.off_policy.update import Update
from markovia.algos.offline.methods import WARM_START
from markovia.algos.offline.warm_start import WarmStart
from markovia.algos.presets import configure, override
from markovia.algos.safe.replayed import ReplayConstraint
from markovia.algos.setup import build, make_driver
from markovia.runs import train

torch.set_num_threads(1)
F64 = torch.float64
POINT = "markovia/PointMass2D-v0"
DATASET = "fixture:pointmass2d/medium"


def short(**changes: Any) -> WarmStart:
    """Ten updates on data, then 40 steps online of which the first 20 only fill the replay."""
    net = {"policy": {"hidden": [8]}, "critic": {"num": 3, "hidden": [8]}, "batch_size": 8, "num_steps": 10}
    small = {"offline": {**net, "num_env_steps": 10, "regulariser": {"num": 2}}, "online": {**net, "num_env_steps": 40, "learning_starts": 20}}
    return override(override(configure("wsrl", POINT), small), changes)


def driver_of(method: WarmStart, seed: int = 5) -> Any:
    return make_driver(method, build(POINT, method, seed, dataset=DATASET), seed=seed)


def everything(driver: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in driver.active.nets.state_dict().items()}


def test_budgets_of_both_phases() -> None:
    row = WARM_START["wsrl"]
    assert row.value.num_env_steps == 1_300_000 and row.value.num_optimizer_steps == 1_000_000 + 4 * 295_000


# -- value, gradient, limit: the subset of critics -------------------------------------------------------------------------------------------


@pytest.mark.check("value", "wsrl")
def test_subset_by_hand() -> None:
    q = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 0.0]])
    # the two largest numbers are those of members 2 and 0
    chosen = losses.drawn_members(q, torch.tensor([0.5, -1.0, 2.0]), subset=2)
    assert chosen.amin(0).tolist() == [1.0, 0.0]
    assert torch.equal(losses.drawn_members(q, torch.randn(3), subset=3).amin(0), q.amin(0))  # all of them: the limit to SAC's minimum


def nets_of(method: OffPolicy) -> ActorCritic:
    torch.manual_seed(0)
    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    agent = ControlAgent.from_spaces(box, box, critic=False, normalize_obs=False, **method.policy.agent_options())
    agent.net.double()
    return ActorCritic(method, agent, 0)


def minibatch(n: int = 6) -> tuple[Batch, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=F64)  # noqa: E731
    continuation = (torch.arange(n) % 3 > 0).to(F64)
    return Batch(normal(n, 2), normal(n, 2).tanh(), normal(n), normal(n, 2), continuation, torch.zeros(n, dtype=torch.bool)), normal(4, n, 2)


@pytest.mark.check("limit", "wsrl")
def test_target_is_the_minimum_over_the_drawn_critics() -> None:
    method = short().online
    nets, (batch, noise) = nets_of(method), minibatch()
    dist = nets.dist(nets.agent, batch.next_obs, F64)
    q = nets.q(nets.target, batch.next_obs, torch.tanh(dist.at(noise[0])))
    two = noise[-1].flatten()[:3].argsort(descending=True)[:2]
    expected = batch.reward + 0.99 * batch.continuation * torch.minimum(q[two[0]], q[two[1]])
    assert method.num_noises == 4
    torch.testing.assert_close(nets.goal(batch, noise[0], 0.2, noise[3:]), expected)
    whole = nets_of(dataclasses.replace(method, target=SoftTarget(entropy=False)))
    every = nets_of(dataclasses.replace(method, target=SoftTarget(entropy=False, subset=3)))
    assert torch.equal(whole.goal(batch, noise[0], 0.2), every.goal(batch, noise[0], 0.2, noise[3:]))


@pytest.mark.check("invariance", "wsrl")
def test_order_of_the_batch_changes_nothing() -> None:
    """Critics and targets in another order of the rows; the drawn critics are the first numbers of the noise, so those stay where they are."""
    method, (batch, noise) = short().online, minibatch()
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    nets, moved = nets_of(method), batch.map(lambda x: x[order])
    y = nets.goal(batch, noise[0], 0.2, noise[3:])
    again = nets.goal(moved, noise[0][order], 0.2, noise[3:])
    torch.testing.assert_close(again, y[..., order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(nets.critic_loss(moved, again)[0], nets.critic_loss(batch, y)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.check("gradient", "wsrl")
def test_gradient_of_the_critics_matches_finite_differences() -> None:
    nets, (batch, noise) = nets_of(short().online), minibatch()
    y, p = nets.goal(batch, noise[0], 0.2, noise[3:]), nets.critic.head.weight  # type: ignore[union-attr]
    (grad,) = torch.autograd.grad(nets.critic_loss(batch, y)[0], p)
    values = []
    for h in (1e-6, -2e-6):
        with torch.no_grad():
            p[0, 0, 0] += h  # type: ignore[index]
        values.append(nets.critic_loss(batch, y)[0].item())
    assert float(grad[0, 0, 0]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.usefixtures("traced_only")
def test_traced_update_equals_the_eager_one() -> None:
    ends = []
    for compiled in (False, True):
        update = Update(nets_of(short().online), compiled)
        for i in range(4):
            update(*minibatch(), i % 2 == 1)
        ends.append(torch.cat([p.detach().flatten() for p in update.nets.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_targets_follow_every_critic_step() -> None:
    """Two critic steps, no actor step: with follow="critic" targets are 0.005 closer each time, with "actor" they stay."""
    for follow in ("critic", "actor"):
        update = Update(nets_of(dataclasses.replace(short().online, follow=follow)))
        expected = update.nets.target.head.weight.clone()  # type: ignore[union-attr]
        for _ in range(2):
            update(*minibatch(), False)
            if follow == "critic":
                expected += 0.005 * (update.nets.critic.head.weight.detach() - expected)  # type: ignore[union-attr]
        torch.testing.assert_close(update.nets.target.head.weight, expected, rtol=1e-10, atol=1e-12)  # type: ignore[union-attr]


# -- the phases ------------------------------------------------------------------------------------------------------------------------------


def test_phases_hand_over_by_name() -> None:
    driver = driver_of(short())
    assert driver.step()["online"] == 0.0 and driver.offline.finished and not driver.finished
    before = everything(driver)
    driver.go_online()
    after = everything(driver)
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(float(g.count) == 0 for o in driver.online.update.optimizers.values() for g in o.groups)
    stats = driver.step()  # ten steps of the frozen policy
    assert stats["online"] == 1.0 and stats["num_env_steps"] == 20 and driver.online.num_updates == 0
    assert all(torch.equal(v, before[k]) for k, v in everything(driver).items())
    driver.step(), driver.step(), driver.step()
    assert driver.finished and driver.num_env_steps == 50 and driver.online.num_updates == 4 * 20
    actor = driver.online.update.optimizers["actor"].groups[0]
    assert float(actor.count) == 20  # one actor step for four critic steps


def test_no_offline_transition_is_sampled_online() -> None:
    driver = driver_of(short())
    driver.step()
    driver.collector.dataset.replay.store.reward.fill_(1e6)
    for _ in range(4):
        driver.step()
    rows = driver.online.collector.replay.sample(500, torch.Generator().manual_seed(0))
    assert driver.finished and float(rows.reward.max()) <= 0.0 and driver.online.collector.replay.size == 40


def test_a_share_of_the_data_can_be_retained() -> None:
    driver = driver_of(short(retain=0.5))
    driver.step()
    driver.collector.dataset.replay.store.reward.fill_(1e6)
    for _ in range(4):
        driver.step()
    rows = driver.online.collector.replay.sample(8, torch.Generator().manual_seed(0))
    assert int((rows.reward == 1e6).sum()) == 4 and len(rows.obs) == 8 and rows.extra == {}


def test_rewards_of_both_phases_are_transformed_alike() -> None:
    method = override(short(), {"offline": {"data": {"reward": "antmaze_minus1"}}})
    driver = driver_of(method)
    driver.step(), driver.step()
    stored = driver.online.collector.replay.store.reward[: driver.online.collector.replay.size]
    assert float(stored.max()) <= -1.0 and float(driver.collector.dataset.replay.store.reward.max()) <= -1.0


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.check("resume", "wsrl")
def test_half_and_half_equals_a_whole(at: int, tmp_path: Any) -> None:
    """Stopped at the end of the data, and online after the first updates."""
    half_and_half_equals_a_whole(lambda: driver_of(short()), at, tmp_path / "state.safetensors")


def test_run_folder_and_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"dataset": DATASET, "num_checkpoints": 5, "eval_episodes": 2, "progress": False}
    whole = train(short(), POINT, out=tmp_path / "whole", **options)
    train(short(), POINT, out=tmp_path / "parts", callbacks=[lambda info: info.iteration < 3], **options)
    resumed = train(short(), POINT, out=tmp_path / "parts", resume=True, **options)
    assert resumed.done["evaluation"] == whole.done["evaluation"] and whole.done["num_env_steps"] == 50
    assert cli.run(["eval", str(tmp_path / "whole"), "--episodes", "2"]) == 0
    flags = ["--offline.num-env-steps", "10", "--online.num-env-steps", "300", "--online.learning-starts", "280", "--eval-episodes", "1"]
    assert cli.run(["train", "wsrl", "--env", POINT, "--dataset", DATASET, "--out", str(tmp_path / "cli"), "--no-progress", *flags]) == 0
    assert "310 steps in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"online": {"critic": {"num": 4}}}, "offline.critic and online.critic must be the same networks"),
        ({"online": {"learning_starts": 3}}, "would draw minibatches of 8 from fewer steps"),
        ({"retain": 1.0}, r"retain must lie in \[0, 1\) or be 'append', got 1.0"),
        ({"online": {"target": {"subset": 4}}}, "target.subset=4 is more than the 3 critics"),
        ({"online": {"target": {"subset": 0}}}, "target.subset must be >= 1, got 0"),
        ({"online": {"batch_size": 2}}, "needs a minibatch of at least critic.num=3 rows, got batch_size=2"),
    ],
)
@pytest.mark.check("bad_input", "wsrl")
def test_bad_input_is_answered(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        short(**changes)


def test_phases_that_do_not_fit_are_refused() -> None:
    fixed = dataclasses.replace(short().online, temperature=FixedTemperature(0.1))
    with pytest.raises(ValueError, match="same kind of temperature"):
        dataclasses.replace(short(), online=fixed)
    slots = {"target": InSampleTarget(), "value": Expectile(), "actor": Weighted(), "temperature": FixedTemperature(0.0)}
    iql = dataclasses.replace(short().offline, regulariser=None, **slots)
    with pytest.raises(ValueError, match=r"offline\.value and online\.value must be the same networks"):
        dataclasses.replace(short(), offline=iql)
    with pytest.raises(ValueError, match="must be the same networks"):
        dataclasses.replace(short(), online=dataclasses.replace(short().online, critic=Critics(num=3, hidden=(9,))))
    with pytest.raises(ValueError, match="have no counterpart offline; leave them out"):
        dataclasses.replace(short(), online=dataclasses.replace(short().online, constraint=ReplayConstraint()))
    with pytest.raises(ValueError, match="learns control from a dataset"):
        build(POINT, short())


def test_frozen_policies_of_the_second_phase_begin_as_the_policy_is() -> None:
    """Mirror descent online after learning offline without it: pi_k is the policy that the dataset taught."""
    driver = driver_of(short(online={"actor": {"inverse_step": 1.0}}))
    while driver.online is None or driver.online.num_updates == 0:
        driver.step()
        if driver.offline.finished and driver.online is None:
            driver.go_online()
            for old, new in zip(driver.online.nets.reference_policies["old"].parameters(), driver.agent.net["policy"].parameters(), strict=True):
                assert torch.equal(old, new)
    assert driver.online.num_updates > 0
