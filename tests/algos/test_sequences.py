"""Imitation given returns: the transformer and its loss by hand, causality, windows of data, histories, resume, the command line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia import cli
from markovia.agents.interface import Agent
from markovia.agents.return_conditioned import ReturnConditionedAgent, SequencePolicy
from markovia.algos.offline.methods import SEQUENCES
from markovia.algos.offline.sequences import ReturnConditioned, masked_error
from markovia.algos.offline.setup import evaluate_asked
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.envs.exact.offline import pointmass_data
from markovia.runs import train

torch.set_num_threads(1)
F64 = torch.float64
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
POINT = "markovia/PointMass2D-v0"
DATASET = "fixture:pointmass2d/medium"


def short(**changes: Any) -> ReturnConditioned:
    small = {"num_env_steps": 12, "num_steps": 4, "window": 5, "width": 8, "layers": 2, "heads": 2, "solver": {"minibatch": 4, "warmup": 3}}
    return override(override(configure("decision-transformer", POINT), small), changes)


def network(window: int = 4, dropout: float = 0.0) -> SequencePolicy:
    torch.manual_seed(0)
    net = SequencePolicy(BOX, 2, horizon=10, width=6, layers=2, heads=2, dropout=dropout).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=F64))
    return net


def tokens(n: int = 3, K: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=F64)  # noqa: E731
    return normal(n, K), normal(n, K, 2), normal(n, K, 2).tanh(), torch.arange(K).expand(n, K)


def test_budget_of_the_row() -> None:
    assert SEQUENCES["decision-transformer"].value.num_optimizer_steps == 100_000


# -- values, gradients, limit ------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "decision-transformer")
def test_error_by_hand() -> None:
    # squares: (1 + 4) / 2 and, in the second row, 0 / 2; the third step is not valid: (2.5 + 0) / 2
    predicted = torch.tensor([[[1.0, 0.0], [3.0, 3.0], [9.0, 9.0]]])
    action = torch.tensor([[[0.0, 2.0], [3.0, 3.0], [0.0, 0.0]]])
    assert masked_error(predicted, action, torch.tensor([[True, True, False]])).item() == 1.25


def norm(x: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * layer.weight + layer.bias


def dense(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return layer.weight @ x + layer.bias


def by_hand(net: SequencePolicy, to_go: torch.Tensor, obs: torch.Tensor, action: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """One sequence, token by token and head by head, with plain loops; (K, d)."""
    x = []
    for t in range(len(to_go)):
        when = net.embed_step.weight[step[t]]
        for part in (dense(to_go[t : t + 1], net.embed_return), dense(obs[t], net.embed_obs), dense(action[t], net.embed_action)):
            x.append(norm(part + when, net.norm_in))
    for block in net.blocks:
        qkv = [dense(norm(v, block.norm1), block.qkv) for v in x]  # type: ignore[arg-type]
        seen = []
        for i in range(len(x)):
            heads = []
            for h in range(2):
                q, ks, vs = ([y[j + 3 * h : j + 3 * h + 3] for y in qkv[: i + 1]] for j in (0, 6, 12))
                weight = torch.softmax(torch.stack([q[i] @ k / math.sqrt(3) for k in ks]), 0)
                heads.append(sum(w * v for w, v in zip(weight, vs, strict=True)))
            seen.append(x[i] + dense(torch.cat(heads), block.out))  # type: ignore[arg-type]
        x = [v + dense(torch.nn.functional.gelu(dense(norm(v, block.norm2), block.up)), block.down) for v in seen]  # type: ignore[arg-type]
    return torch.stack([torch.tanh(dense(norm(v, net.norm_out), net.head)) for v in x[1::3]])


def test_network_equals_its_formula() -> None:
    net, (to_go, obs, action, step) = network(), tokens()
    found = net(to_go, obs, action, step)
    torch.testing.assert_close(found[1], by_hand(net, to_go[1], obs[1], action[1], step[1]))


@pytest.mark.check("gradient", "decision-transformer")
def test_gradient_matches_finite_differences() -> None:
    net, (to_go, obs, action, step) = network(), tokens()
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 4])
    loss = lambda: masked_error(net(to_go, obs, action, step), action, valid)  # noqa: E731
    params = list(net.parameters())
    for p, grad in zip(params, torch.autograd.grad(loss(), params), strict=True):
        values = []
        for h in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                p.view(-1)[0] += h
            values.append(loss().item())
        assert float(grad.reshape(-1)[0]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.check("limit", "decision-transformer")
def test_one_step_that_reads_no_return_is_a_clone() -> None:
    """A window of one step whose return is not read gives an action of the observation alone; its loss is behavioural cloning's."""
    net, (to_go, obs, action, step) = network(), tokens(n=5, K=1)
    with torch.no_grad():
        net.embed_return.weight.zero_()
    first, second = (net(r, obs, torch.zeros_like(action), step) for r in (to_go, 100.0 * to_go))
    assert torch.equal(first, second)
    loss = masked_error(first, action, torch.ones(5, 1, dtype=torch.bool))
    torch.testing.assert_close(loss, (first - action).square().mean())


# -- invariance --------------------------------------------------------------------------------------------------------------------------------


def test_no_step_sees_what_comes_later() -> None:
    """Its own action is later too; what fills a window behind an episode's end changes nothing."""
    net, (to_go, obs, action, step) = network(), tokens()
    before = net(to_go, obs, action, step)
    to_go[:, 3], obs[:, 3], action[:, 2:] = 9.0, -9.0, 9.0
    after = net(to_go, obs, action, step)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3], before[:, 3])


@pytest.mark.check("invariance", "decision-transformer")
def test_order_of_the_batch_changes_nothing() -> None:
    net, parts = network(), tokens()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(*(x[order] for x in parts)), net(*parts)[order])


# -- data --------------------------------------------------------------------------------------------------------------------------------------


def driver_of(method: ReturnConditioned, seed: int = 3) -> Any:
    return make_driver(method, build(POINT, method, seed, dataset=DATASET), seed=seed)


def test_windows_hold_what_followed() -> None:
    driver = driver_of(short())
    data = pointmass_data("medium")
    w = driver.source.windows(400, torch.Generator().manual_seed(0))
    raw = w.obs * torch.as_tensor(data.obs.std(0) + 1e-3) + torch.as_tensor(data.obs.mean(0))
    assert bool(w.valid[:, 0].all()) and not bool(w.valid.all())
    for i in range(0, 400, 40):
        k = int(np.abs(data.obs - raw[i, 0].numpy()).sum(1).argmin())
        n = int(w.valid[i].sum())
        assert n == min(5, 40 - k % 40) and w.step[i, :n].tolist() == [k % 40 + j for j in range(n)]
        np.testing.assert_allclose(w.action[i, :n].numpy(), data.action[k : k + n], atol=1e-6)
        ends = k - k % 40 + 40
        expected = [0.05 * float(data.reward[k + j : ends].sum()) for j in range(n)]
        np.testing.assert_allclose(w.to_go[i, :n].numpy(), expected, rtol=1e-4)


# -- acting ------------------------------------------------------------------------------------------------------------------------------------


def test_histories_of_two_environments_equal_whole_windows() -> None:
    """Step by step through `predict`, one environment restarting in between: the same actions as one forward pass over the last K steps."""
    torch.manual_seed(0)
    sizes = {"window": 3, "width": 8, "layers": 1, "heads": 1, "dropout": 0.1, "return_scale": 0.5}
    agent = ReturnConditionedAgent.from_spaces(BOX, BOX, horizon=10, target_return=8.0, normalize_obs=False, **sizes)
    rng = np.random.default_rng(0)
    seen: list[list[Any]] = [[], []]
    history = None
    for t in range(6):
        obs, reward = rng.uniform(-1, 1, (2, 2)).astype(np.float32), rng.uniform(0, 1, 2)
        starts = np.array([t == 0, t in (0, 4)])
        action, history = agent.predict(obs, history, starts)
        for i in range(2):
            if starts[i]:
                seen[i] = []
            left = 8.0 - sum(r for _, _, r in seen[i])
            steps = [*seen[i], (obs[i], np.zeros(2), 0.0)][-3:]
            first = len(seen[i]) + 1 - len(steps)
            to_go = [left + sum(r for _, _, r in seen[i][first + j :]) for j in range(len(steps))]
            parts = (0.5 * torch.tensor([to_go]), torch.tensor(np.stack([o for o, _, _ in steps]))[None],
                     torch.tensor(np.stack([a for _, a, _ in steps]))[None], first + torch.arange(len(steps))[None])  # fmt: skip
            with torch.no_grad():
                expected = agent.net["policy"](*(x.float() if x.is_floating_point() else x for x in parts))[0, -1]
            np.testing.assert_allclose(action[i], expected.numpy(), atol=1e-5)
            seen[i].append((obs[i], action[i], float(reward[i])))
        agent.rewarded(history, reward)


def test_agent_acts_and_survives_saving(tmp_path: Any) -> None:
    setup = build(POINT, short(), 3, dataset=DATASET)
    agent = setup.agent
    agent.save(tmp_path / "a")
    again = Agent.load(tmp_path / "a")
    obs = np.zeros((2, 2), np.float32)
    np.testing.assert_array_equal(again.predict(obs)[0], agent.predict(obs)[0])
    assert again.predict(obs[0])[0].shape == (2,) and isinstance(again, ReturnConditionedAgent)
    assert agent.target_return == pytest.approx(pointmass_data("medium").returns().max())
    found = setup.evaluate(agent, 3, 0)
    assert found["target_return"] == agent.target_return and len(found["score_pct"]) == 3 and found["lengths"] == [40] * 3
    assert evaluate_asked(agent, POINT, 3, 0, {}, target=-30.0)["target_return"] == -30.0
    action, logp = agent.act(agent.observe(obs))
    assert action.shape == (2, 2) and not logp.any()
    with pytest.raises(ValueError, match="can't give"):
        agent.evaluate(None, ["logp"])  # type: ignore[arg-type]


# -- resume, the command line ------------------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"dataset": DATASET, "num_checkpoints": 3, "eval_episodes": 2, "progress": False}
    whole = train(short(), POINT, out=tmp_path / "whole", **options)
    train(short(), POINT, out=tmp_path / "parts", callbacks=[lambda info: False], **options)
    resumed = train(short(), POINT, out=tmp_path / "parts", resume=True, **options)
    assert resumed.done["evaluation"] == whole.done["evaluation"] and "target_return" in whole.done["evaluation"]
    assert cli.run(["eval", str(tmp_path / "whole"), "--episodes", "2"]) == 0
    flags = ["--num-env-steps", "2", "--target-return", "-5", "--eval-episodes", "1", "--no-progress", "--out", str(tmp_path / "cli")]
    assert cli.run(["train", "decision-transformer", "--env", POINT, "--dataset", DATASET, *flags]) == 0
    assert "asked for a return of -5" in (tmp_path / "cli" / "data.txt").read_text()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: short(window=0), "window must be >= 1, got 0"),
        (lambda: short(return_scale=0.0), "return_scale must be > 0"),
        (lambda: short(data={"reward": "return_range"}), "leave data.reward"),
        (lambda: short(data={"compat": "d4rl"}), "and data.compat alone"),
        (lambda: short(solver={"epochs": 2}), "solver.epochs=1"),
        (lambda: build(POINT, short(heads=3), dataset=DATASET), "heads divide width"),
        (lambda: build(POINT, short()), "learns control from a dataset"),
        (lambda: build("Pendulum-v1", short(), dataset=DATASET), "but the environment gives"),
        (lambda: build("CartPole-v1", short(), dataset=DATASET), "this agent predicts continuous actions"),
    ],
)
@pytest.mark.check("bad_input", "decision-transformer")
def test_bad_input_is_answered(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
