"""The denoising agent on the linear-Gaussian chain, whose mean and std are known numbers."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import markovia.envs  # noqa: F401  (registers the ids)
from markovia.agents.denoising import DenoisingAgent
from markovia.agents.distributions import FixedStdGaussian, kl
from markovia.agents.interface import Agent
from markovia.envs.denoising.tasks import make_env, make_task
from markovia.envs.exact.denoisers import LinearGaussianDenoising

torch.set_num_threads(1)


def made(**options):
    task = make_task("linear_gaussian", num_steps=3)
    agent = DenoisingAgent.from_task(task, **options)
    return agent, agent.generate(task.starts(5, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))


def test_log_prob_and_entropy_by_hand():
    # x' ~ N(A x, 0.3^2 I) in two dimensions
    problem = LinearGaussianDenoising(num_steps=3)
    agent, record = made(critic_hidden=None)
    found = agent.evaluate(record, ["logp", "entropy"])
    miss = record.action - record.obs["x"] @ problem.A[0].T.float()
    want = -(miss.square().sum(-1) / (2 * 0.09)) - 2 * math.log(0.3) - math.log(2 * math.pi)
    torch.testing.assert_close(found.logp, want)
    torch.testing.assert_close(record.logp_old, want)
    torch.testing.assert_close(found.entropy, torch.full((5, 3), 1 + math.log(2 * math.pi) + 2 * math.log(0.3)))
    assert record.continuation.tolist() == [[1.0, 1.0, 0.0]] * 5 and torch.equal(record.obs["x"][:, 1:], record.action[:, :-1])


def test_mean_reduction_divides_by_the_entries():
    total, record = made()
    agent, _ = made(reduce="mean")
    torch.testing.assert_close(agent.evaluate(record, ["logp"]).logp, total.evaluate(record, ["logp"]).logp / 2)


def test_predict_takes_one_observation_or_a_batch():
    agent, _ = made()
    env = make_env("linear_gaussian", num_steps=3, action_mode="next_sample")
    obs, _ = env.reset(seed=0)
    one = agent.predict(obs, deterministic=True)[0]
    np.testing.assert_allclose(one, np.array([[0.9, 0.05], [-0.05, 0.9]]) @ obs["sample"], rtol=1e-6)
    batch = {k: np.stack([v, v]) for k, v in obs.items()}
    np.testing.assert_array_equal(agent.predict(batch, deterministic=True)[0], [one, one])


def test_predict_drives_a_batch_that_resets_in_the_next_step():
    agent, _ = made()
    venv = gym.make_vec("markovia/LinearGaussian-v0", num_envs=2, num_steps=3, action_mode="next_sample", autoreset_mode="NextStep")
    obs, _ = venv.reset(seed=0)
    steps = [obs["step"].tolist()]
    for _ in range(9):
        obs, *_ = venv.step(agent.predict(obs)[0])
        steps.append(obs["step"].tolist())
    assert steps == [[k, k] for k in (0, 1, 2, 3, 0, 1, 2, 3, 0, 1)]


def test_a_saved_agent_is_the_same_agent(tmp_path):
    agent, record = made(num_costs=2)
    with torch.no_grad():
        agent.net["policy"].h.add_(0.1)
    again = Agent.load(agent.save(tmp_path / "agent"))
    before, after = (a.evaluate(record, ["logp", "value"]) for a in (agent, again))
    assert torch.equal(before.logp, after.logp) and torch.equal(before.value, after.value) and after.value.shape == (5, 3, 3)


def test_what_it_cannot_give_is_taught():
    agent, record = made(critic_hidden=None)
    with pytest.raises(ValueError, match=r"no critic.*critic_hidden"):
        agent.evaluate(record, ["value"])
    with pytest.raises(ValueError, match=r"can't give \['hidden'\]"):
        agent.evaluate(record, ["logp", "hidden"])
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        made(reduce="max")


def test_a_deterministic_step_weighs_nothing():
    # Two steps, the last with std 0 whose action was moved by rounding: only the first counts, -(1/0.5)^2/2 - log(0.5) - log(2 pi)/2 for each entry
    mean, std = torch.zeros(1, 2, 3), torch.tensor([[0.5, 0.0]])
    dist, moved = FixedStdGaussian(mean, std), FixedStdGaussian(mean + 1e-6, std)
    action = torch.stack([torch.ones(3), torch.full((3,), 1e-6)])[None].requires_grad_(True)
    logp = dist.log_prob(action)
    torch.testing.assert_close(logp, torch.tensor([[3 * (-2.0 - math.log(0.5) - 0.5 * math.log(2 * math.pi)), 0.0]]))
    assert float(kl(moved, dist)[0, 1]) == float(dist.entropy()[0, 1]) == 0.0
    assert float(dist.fisher({"mean": torch.ones(1, 2, 3), "std": std})["mean"][0, 1].sum()) == 0.0
    (gradient,) = torch.autograd.grad(logp.sum(), action)
    assert bool(gradient.isfinite().all()) and float(gradient[0, 1].abs().sum()) == 0.0
