"""The policy over arrays against the agent's own tensors."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.actor import ArrayActor
from markovia.agents.control import ControlAgent
from markovia.algos.collect import StepCollector
from markovia.envs.control.vector import make_vec

BOX = spaces.Box(-np.inf, np.inf, (5,))
ACTIONS = spaces.Box(-1.5, 0.5, (3,))


def agent_on(action_space: Any = ACTIONS, **options: Any) -> ControlAgent:
    torch.manual_seed(0)
    agent = ControlAgent.from_spaces(BOX, action_space, **options)
    for p in agent.parameters("policy"):
        p.data += 0.1 * torch.randn_like(p)
    return agent


def test_a_bounded_mean_keeps_a_density() -> None:
    """An entry that is logged at its bound alone would lead the standard deviation to 0; the arrays follow the tensors."""
    agent = agent_on(tanh_mean=True, log_std_init=-60.0)
    assert agent.policy(torch.zeros(1, 5)).log_std.eq(-5.0).all()  # type: ignore[attr-defined]
    actor = agent.actor()
    assert isinstance(actor, ArrayActor)
    np.testing.assert_allclose(actor._std, np.exp(-5.0), rtol=1e-6)
    assert agent_on(log_std_init=-60.0).policy(torch.zeros(1, 5)).log_std.lt(-50.0).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{}, {"hidden": ()}, {"activation": "relu", "normalize_obs": False}, {"squash": True}, {"tanh_mean": True}])
def test_actions_are_the_mean_plus_scaled_noise(options: dict[str, Any]) -> None:
    agent = agent_on(**options)
    actor = agent.actor()
    assert isinstance(actor, ArrayActor)
    raw = 3.0 * np.random.default_rng(0).normal(size=(7, 5))
    obs = actor.observe(raw, update=True)
    with torch.no_grad():
        dist = agent.policy(agent.observe(raw))
        expected = dist.mean + dist.log_std.exp() * torch.randn((7, 3), generator=torch.Generator().manual_seed(1))
    action = actor.sample(obs, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(action, expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actor.env_action(action), agent.env_action(torch.from_numpy(action)))


def test_categorical_frequencies_are_the_softmax() -> None:
    agent = agent_on(spaces.Discrete(4, start=2))
    actor = agent.actor()
    assert isinstance(actor, ArrayActor)
    raw = np.tile(np.random.default_rng(0).normal(size=5), (40_000, 1))
    action = actor.sample(actor.observe(raw), torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = torch.softmax(agent.policy(agent.observe(raw[:1])).logits[0], -1).numpy()
    counts = np.bincount(action, minlength=4) / len(action)
    assert np.abs(counts - p).max() < 4.0 * np.sqrt(0.25 / len(action))  # four standard errors
    assert set(actor.env_action(action)) <= {2, 3, 4, 5}


@pytest.mark.parametrize("update", [True, False, np.array([True, False, True]), np.zeros(3, dtype=bool), np.ones(3, dtype=bool)])
def test_the_normaliser_is_the_agents_own(update: Any) -> None:
    ours, theirs = agent_on(), agent_on()
    actor = ours.actor()
    raw = np.random.default_rng(0).normal(2.0, 3.0, size=(3, 5))
    for _ in range(2):
        np.testing.assert_array_equal(actor.observe(raw, update=update), theirs.observe(raw, update=update).numpy())  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(ours.net["normalizer"].buffers(), theirs.net["normalizer"].buffers(), strict=True))


def test_the_actor_sees_updates_of_the_weights() -> None:
    agent = agent_on(log_std_init=-20.0)
    actor = agent.actor()
    obs = np.ones((2, 5), dtype=np.float32)
    before = actor.sample(obs)
    with torch.no_grad():
        agent.net["policy"].head.bias += 1.0  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(actor.sample(obs), before + 1.0, atol=1e-5)  # type: ignore[arg-type]


class Own(ControlAgent):
    """A subclass may act in its own way."""


def test_other_agents_step_for_themselves() -> None:
    image = ControlAgent.from_spaces(spaces.Box(0, 255, (36, 36, 3), np.uint8), ACTIONS)
    several = ControlAgent.from_spaces(spaces.Dict(a=BOX), ACTIONS)
    foreign = ControlAgent.from_spaces(BOX, ACTIONS, network=torch.nn.Linear(5, 4))
    others = [agent_on(std="state"), agent_on(activation="gelu"), agent_on(spaces.MultiBinary(3)), image, several, foreign, Own(agent_on().config())]
    for agent in others:
        assert agent.actor() is agent
    double = agent_on()
    double.net["policy"].double()
    assert double.actor() is double


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_record_of_the_actor_holds_the_agents_own_log_probs(env_id: str) -> None:
    venv: gym.vector.VectorEnv = make_vec(env_id, 3, "sync", seed=0)
    agent = ControlAgent.from_spaces(venv.single_observation_space, venv.single_action_space)
    r = StepCollector(venv, agent, 40).collect(agent, torch.Generator().manual_seed(0))
    dist = agent.policy(r.obs)
    torch.testing.assert_close(dist.log_prob(r.action), r.logp_old, rtol=1e-5, atol=1e-5)
    # The noise that the actions hold is standard normal only if the record's observations are those that were acted on.
    if env_id == "Pendulum-v1":
        z = ((r.action - dist.mean) / dist.log_std.exp()).detach()
        assert abs(float(z.mean())) < 0.4 and 0.75 < float(z.std()) < 1.25  # 120 draws: more than four standard errors
