"""Limits for learners from a replay (cal, cal/sac-lag): values, gradients, limits, invariance, resume, bad input, and the exact optimum."""

import dataclasses
import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.agents.control import ControlAgent
from markovia.algos.off_policy.actor_critic import ActorCritic
from markovia.algos.off_policy.costs import cost_loss, priced, upper_cost
from markovia.algos.off_policy.driver import OffPolicyDriver
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.replay import Batch
from markovia.algos.off_policy.slots import Critics
from markovia.algos.off_policy.update import Update
from markovia.algos.offline.method import Offline
from markovia.algos.presets import configure, override
from markovia.algos.safe.constraint import ChanceShield
from markovia.algos.safe.dual import FixedDual, PIDDual, TrustRegionDual, log_augmented
from markovia.algos.safe.exact import primal_dual
from markovia.algos.safe.replayed import ReplayConstraint, ReplayHandler
from markovia.algos.safe.termination import SoftTermination
from markovia.algos.setup import build, make_driver
from markovia.algos.systems import find
from markovia.envs.exact.cmdps import cmdp_grid

torch.set_num_threads(1)
F64 = torch.float64
ENV = "markovia/SafePendulum-v0"
ROWS = ["cal", "cal/sac-lag"]
TINY: dict[str, Any] = {"policy": {"hidden": [8], "activation": "tanh"}, "critic": {"hidden": [8, 8], "activation": "tanh"}}
SHORT: dict[str, Any] = {
    **TINY, "learning_starts": 210, "num_steps": 220, "num_env_steps": 880, "batch_size": 8, "utd": 0.05,
    "constraint": {"critic": {"hidden": [8], "activation": "tanh"}},
}  # fmt: skip


def short(method_id: str, **changes: Any) -> OffPolicy:
    method: OffPolicy = override(override(configure(method_id, ENV), SHORT), changes)
    return method


def driver(method: OffPolicy, compile: bool = False) -> OffPolicyDriver:
    setup = build(ENV, method, 0)
    return OffPolicyDriver(method, setup.agent, setup.collector, 0, compile)


def nets(constraint: ReplayConstraint, seed: int = 0) -> ActorCritic:
    """Networks in float64, no two of them alike."""
    method = dataclasses.replace(override(find("sac").value, TINY), constraint=constraint)
    torch.manual_seed(seed)
    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    obs = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    agent = ControlAgent.from_spaces(obs, box, critic=False, normalize_obs=False, **method.policy.agent_options())
    agent.net.double()
    out = ActorCritic(method, agent, 0)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in out.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=F64))
    return out


def minibatch(m: int = 1, n: int = 6) -> tuple[Batch, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=F64)  # noqa: E731
    extra = {"cost": normal(n, m).abs(), "cost_weight": torch.arange(1.0, m + 1, dtype=F64).repeat(n, 1)}
    ends = torch.arange(n) % 3 == 0
    return Batch(normal(n, 3), normal(n, 2).tanh(), normal(n), normal(n, 3), 1.0 - ends.to(F64), ends, extra), normal(3, n, 2)


SMALL = ReplayConstraint(cost_limit=(25.0, 3.0), critic=Critics(num=3, hidden=(8,), activation="tanh", coef=1.0))


# -- values ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", *ROWS)
def test_upper_cost_and_discounted_limit_by_hand():
    q = torch.tensor([[[1.0], [3.0]], [[5.0], [5.0]]])  # two costs, two critics: mean 2, std sqrt 2; mean 5, std 0
    assert torch.allclose(upper_cost(q, k=0.5), torch.tensor([[2.0 + 0.5 * 2**0.5], [5.0]]))
    assert torch.equal(upper_cost(q, k=0.0), q.mean(1))
    handler = ReplayHandler(ReplayConstraint(cost_limit=10.0, horizon=2), gamma=0.5)
    assert handler.discounted_limits.tolist() == [7.5]  # 10 (1 - 1/4) / (1/2 * 2)
    handler = ReplayHandler(ReplayConstraint(cost_limit=100.0, cost_gamma=0.99, horizon=1000), gamma=0.99)
    assert handler.discounted_limits.tolist() == [100.0]  # it is one already
    handler = ReplayHandler(ReplayConstraint(cost_limit=10.0), gamma=0.5)
    assert handler.discounted_limits is None  # nobody knows how long an episode is
    before = handler.weight.copy()
    handler.observe([100.0])
    assert (handler.weight == before).all()
    handler.measure([[4.0]], [2], move=False)
    assert handler.discounted_limits.tolist() == [7.5] and (handler.weight == before).all() and handler.violation.tolist() == [-6.0]
    handler.observe([8.0])
    # Adam's first step is lr in l: lam = 0.6931 e^0.0003; weight lam + 10 * 0.5
    assert handler.weight[0] == pytest.approx(0.6931 * np.exp(3e-4) + 5.0)


def test_cost_critics_are_fitted_to_their_own_targets():
    net, (batch, noise) = nets(SMALL), minibatch(2)
    loss, stats = cost_loss(net, batch, noise[0])
    dist = net.dist(net.agent, batch.next_obs, F64)
    with torch.no_grad():
        following = net.cost_target(batch.next_obs, net.agent.unit_action(dist.at(noise[0])))
        q = net.cost(batch.obs, batch.action)
    assert q.shape == (6, 6)  # the first three critics are those of the first cost
    cost, gamma = batch.extra["cost"], 0.99 * batch.continuation
    expected = sum((q[3 * i + j] - (cost[:, i] + gamma * following[3 * i + j])).square().mean() for i in (0, 1) for j in range(3))
    assert loss.item() == pytest.approx(float(expected))
    spread = torch.stack([q[:3].mean(0) + 0.5 * q[:3].std(0), q[3:].mean(0) + 0.5 * q[3:].std(0)]).mean(1)
    assert [stats["cost_q/0"].item(), stats["cost_q/1"].item()] == pytest.approx(spread.tolist())
    price = priced(net, batch, batch.action)
    two = q.unflatten(0, (2, 3))
    assert torch.allclose(price, (two.mean(1) + 0.5 * two.std(1))[0] + 2.0 * (two.mean(1) + 0.5 * two.std(1))[1])


@pytest.mark.check("gradient", *ROWS)
def test_the_actor_pays_for_cost_by_finite_differences():
    for mix in ("plain", "sum"):
        net, (batch, noise) = nets(dataclasses.replace(SMALL, mix=mix)), minibatch(2)
        loss, _ = net.actor_loss(batch, noise[2], 0.1)
        params = list(net.policy.parameters())
        grads = torch.autograd.grad(loss, params)
        step = 1e-6
        for p, g in zip(params, grads, strict=True):
            flat = p.data.view(-1)
            for i in (0, len(flat) - 1):
                kept = flat[i].item()
                values = []
                for sign in (1, -1):
                    flat[i] = kept + sign * step
                    values.append(net.actor_loss(batch, noise[2], 0.1)[0].item())
                flat[i] = kept
                assert (values[0] - values[1]) / (2 * step) == pytest.approx(g.view(-1)[i].item(), rel=1e-5, abs=1e-8)
    plain, _ = nets(SMALL).actor_loss(batch, noise[2], 0.1)
    assert loss.item() == pytest.approx(plain.item() / 4.0)  # weights 1 and 2


@pytest.mark.check("limit", *ROWS)
@pytest.mark.parametrize("method_id", ROWS)
def test_weight_zero_is_sac_bit_for_bit(method_id):
    free = short(method_id, constraint={"dual": {"type": "FixedDual", "weight": 0.0}})
    plain = dataclasses.replace(free, constraint=None)
    a, b = driver(free), driver(plain)
    for _ in range(2):
        a.step(), b.step()
    assert a.num_updates == b.num_updates > 0
    for x, y in zip(a.agent.parameters("policy"), b.agent.parameters("policy"), strict=True):
        assert torch.equal(x, y)


@pytest.mark.check("invariance", *ROWS)
def test_the_order_of_a_minibatch_does_not_matter():
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    (batch, noise), found = minibatch(2), []
    for index in (torch.arange(6), order):
        update = Update(nets(SMALL))
        stats = update(batch.map(lambda x: x[index]), noise[:, index], True)  # noqa: B023
        found.append(torch.cat([torch.stack(list(stats.values())), *(p.detach().reshape(-1) for p in update.nets.parameters())]))
    assert torch.allclose(*found, atol=1e-12)


def test_the_cost_target_follows_its_critics():
    net, (batch, noise) = nets(SMALL), minibatch(2)
    update = Update(net)
    before = [p.detach().clone() for p in net.cost_target.parameters()]
    update(batch, noise, True)
    for old, new, source in zip(before, net.cost_target.parameters(), net.cost.parameters(), strict=True):
        assert torch.allclose(new, 0.995 * old + 0.005 * source, atol=1e-12)


def test_soft_termination_acts_on_replayed_steps():
    constraint = ReplayConstraint(dual=FixedDual(0.0), termination=SoftTermination(p_max=0.5))
    handler = ReplayHandler(constraint, 0.9)
    batch, _ = minibatch()
    batch.extra["cost"][:, 0] = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.0, 4.0])
    soft = handler.prepare(batch, 1.0)
    delta = torch.tensor([0.0, 0.25, 0.125, 0.0, 0.0, 0.5], dtype=F64)  # shares of the batch's largest, times 0.5
    assert torch.allclose(soft.continuation, (1 - delta) * batch.continuation)
    assert torch.allclose(soft.reward, ((1 - delta) * batch.reward).clamp(min=0.0))
    assert (soft.extra["cost_weight"] == 0).all()


@pytest.mark.check("resume", *ROWS)
@pytest.mark.parametrize("method_id", ROWS)
def test_resumed_runs_give_the_same_numbers(method_id, tmp_path):
    whole = driver(short(method_id))
    for _ in range(2):
        whole.step()
    whole.boundary()
    save_tensors(tmp_path / "state.safetensors", *whole.state())
    expected = [whole.step() for _ in range(2)]
    assert any("violation" in s for s in expected) and all(np.isfinite(s["cost_q"]) for s in expected)
    resumed = driver(short(method_id))
    resumed.load_state(*load_tensors(tmp_path / "state.safetensors"))
    resumed.boundary()
    assert json.dumps([resumed.step() for _ in range(2)]) == json.dumps(expected)
    for k, v in whole.state()[0].items():
        assert torch.equal(v, resumed.state()[0][k]), k


# -- the optimum --------------------------------------------------------------------------------------------------------------------------


def test_the_augmented_multiplier_in_log_space_reaches_optimum_and_dual():
    problem = cmdp_grid()
    oracle = problem.solve()
    trace = primal_dual(problem, dataclasses.replace(log_augmented(0.5, 0.3), optimizer="sgd"), iterations=1500)
    assert trace.value[-1] == pytest.approx(oracle.value, abs=1e-3)
    assert trace.cost[-1, 0] == pytest.approx(0.5, abs=1e-3)
    assert trace.weight[-1, 0] == pytest.approx(oracle.multipliers[0], abs=1e-3)


# -- bad input ----------------------------------------------------------------------------------------------------------------------------


class Priced(gym.Wrapper):
    """A pendulum whose cost is what the test says."""

    told: Any = None

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        info.pop("cost")
        return obs, reward, terminated, truncated, info if self.told is None else {**info, "cost": self.told}


def priced_run(told: Any = None) -> tuple[Priced, OffPolicyDriver]:
    from markovia.algos.off_policy.collect import ReplayCollector
    from markovia.algos.off_policy.replay import Replay
    from markovia.envs.safe.pendulum import SafePendulumEnv

    method = short("cal")
    env = Priced(SafePendulumEnv())
    env.told = told
    venv = gym.vector.SyncVectorEnv([lambda: gym.wrappers.TimeLimit(env, 20)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    agent = build(ENV, method, 0).agent
    return env, OffPolicyDriver(method, agent, ReplayCollector(venv, agent, Replay(1000), 0, num_costs=1))


def stepped(told: Any) -> None:
    _, run = priced_run(told)
    for _ in range(2):  # the first update is in the second iteration
        run.step()


def test_costs_that_are_told_now_and_then_are_zero_in_between(tmp_path):
    env, run = priced_run()
    generator = torch.Generator().manual_seed(0)

    def step(told: float | None) -> None:
        env.told = told
        run.collector.step(run.agent, generator)

    for told in (None, None, 2.0, None):
        step(told)
    save_tensors(tmp_path / "early.safetensors", *run.state())
    for _ in range(36):  # to the end of the second episode
        step(None)
    found = run.collector.replay.store.extra["cost"][:40, 0]
    assert found[2] == 2.0 and found.sum() == 2.0 and list(run.collector.episode_costs) == [[2.0], [0.0]]
    _, resumed = priced_run()
    resumed.load_state(*load_tensors(tmp_path / "early.safetensors"))
    resumed.boundary()
    for _ in range(2):  # silent, but once a cost was told it can be trained on
        stats = resumed.step()
    replay = resumed.collector.replay
    assert resumed.num_updates > 0 and np.isfinite(stats["cost_q"]) and replay.store.extra["cost"][: replay.size].sum() == 2.0


@pytest.mark.check("bad_input", *ROWS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReplayConstraint(cost_limit=-1.0), "no policy meets"),
        (lambda: ReplayConstraint(dual=TrustRegionDual()), "takes a PIDDual"),
        (lambda: ReplayConstraint(mix="difference"), "'plain' or 'sum'"),
        (lambda: ReplayConstraint(conservatism=0.5, critic=Critics(num=1)), "a spread needs 2 critics"),
        (lambda: ReplayConstraint(horizon=0), "horizon must be"),
        (lambda: ReplayConstraint(shield=ChanceShield()), "on-policy loop"),
        (lambda: ReplayConstraint(optimistic=True), "on-policy loop"),
        (lambda: build(ENV, short("cal"), 0, {"cost_limit": 7.0}), r"cost_limit=7.*25.*--constraint.cost-limit 7"),
        (lambda: override(find("cql").value, {"constraint": {"type": "ReplayConstraint"}}), "datasets hold no costs"),
        (lambda: dataclasses.replace(OffPolicy(), constraint=ReplayConstraint(), actor=find("awac").value.actor), r"needs actor=Ascent\(\)"),
        (lambda: stepped(None), "puts no 'cost' into info"),
        (lambda: stepped(float("nan")), "NaN or infinity"),
        (lambda: stepped(np.ones(2)), r"2 column\(s\) but 1 limit"),
    ],
)
def test_bad_input_is_taught(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_dataset_method_keeps_the_slot_empty():
    assert Offline().constraint is None


def test_sac_logs_costs_of_a_task_that_has_some():
    run = make_driver(method := override(configure("sac", ENV), {**TINY, "num_steps": 220, "learning_starts": 1000}), build(ENV, method, 0), 0)
    assert "cost" in run.step() and "cost" not in run.collector.replay.store.extra


def test_compiled_and_eager_updates_agree():
    method = short("cal", num_env_steps=230, num_steps=230)
    a, b = driver(method), driver(method, compile=True)
    if b.update.compiled is None:
        pytest.skip("no compiler")
    x, y = a.step(), b.step()
    assert a.num_updates == b.num_updates > 0
    assert all(x[k] == pytest.approx(y[k], rel=1e-3, abs=1e-4) for k in x)


def test_plain_gains_serve_too():
    assert ReplayConstraint(dual=PIDDual(kp=0.1, ki=0.01)).dual.kp == 0.1
