"""The off-policy loop: resume, updates by steps, targets, precision, traced and compiled updates, a dataset as source."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from off_policy_pieces import (
    BOX,
    SHORT,
    compiled_agrees_with_eager,
    everything,
    made,
    make_agent,
    minibatch,
    policy_by_hand,
    tiny,
    traced_equals_eager,
)

from markovia.agents.interface import Agent
from markovia.algos.off_policy.driver import OffPolicyDriver
from markovia.algos.off_policy.methods import OFF_POLICY
from markovia.algos.off_policy.replay import Batch, Replay
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.runs import train


def pendulum(method_id: str, **changes: Any) -> OffPolicyDriver:
    method = override(OFF_POLICY[method_id].value, {**SHORT, **changes})
    driver: OffPolicyDriver = make_driver(method, build("Pendulum-v1", method, 5), seed=5)
    return driver


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


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("method_id", OFF_POLICY)
def test_traced_update_equals_the_eager_one(method_id: str) -> None:
    traced_equals_eager(lambda compile: made(tiny(method_id), compile), lambda i: minibatch(seed=i))


@pytest.mark.slow
@pytest.mark.parametrize("method_id", ["td3", "mdpo-off/tsallis"])
def test_compiled_update_agrees_with_the_eager_one(method_id: str) -> None:
    """Both functions of a delayed actor."""
    compiled_agrees_with_eager(lambda compile: made(tiny(method_id, policy_delay=2), compile), lambda i: minibatch(seed=i), steps=20)


def test_a_budget_that_only_fills_the_replay_is_told() -> None:
    with pytest.warns(UserWarning, match="nothing is learnt: num_env_steps=40 ends before learning_starts=1000; raise the one or lower the other"):
        pendulum("sac", num_env_steps=40, learning_starts=1000)
