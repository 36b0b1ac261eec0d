"""The flat optimiser against torch's, and the compiled update against the eager one."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from markovia.algos import compiled
from markovia.algos import optimizer as optimizer_module
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.method import Descent
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.optimizer import Optimizer, Rule
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, num_threads

F64 = torch.float64
TREE = "markovia/TokenTree-v0"
FIRST_ORDER = [k for k, row in ON_POLICY.items() if isinstance(row.value.solver, Descent)]
PEERS = {
    "adam": lambda g: torch.optim.AdamW(g, eps=1e-5, weight_decay=0.01),
    "rmsprop": lambda g: torch.optim.RMSprop(g, alpha=0.99, eps=1e-5),
    "sgd": torch.optim.SGD,
}


def networks(dtype: torch.dtype = F64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first = nn.ModuleList([nn.Linear(5, 3), nn.Linear(3, 2)]).to(dtype)
    second = nn.ModuleList([nn.Linear(5, 3), nn.Linear(3, 2)]).to(dtype)
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize(("piece", "dtype"), [(None, F64), (32, F64), (32, torch.float32)], ids=["whole", "pieces", "float32"])
@pytest.mark.parametrize("name", PEERS)
def test_the_flat_optimiser_takes_the_steps_of_torchs(
    name: str, piece: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    mine, theirs = networks(dtype)
    exact = dtype == F64
    if piece is not None:  # as vectors of millions are handled
        monkeypatch.setattr(optimizer_module, "PIECE", piece)
        monkeypatch.setattr(optimizer_module, "LONG", 1)
    decay = 0.01 if name == "adam" else 0.0
    optimizer = Optimizer([(list(m.parameters()), lr) for m, lr in zip(mine, (0.1, 0.02), strict=True)], Rule(name, weight_decay=decay), 0.5)  # type: ignore[arg-type]
    peer = PEERS[name]([{"params": m.parameters(), "lr": lr} for m, lr in zip(theirs, (0.1, 0.02), strict=True)])  # type: ignore[no-untyped-call]
    x = torch.randn(7, 5, dtype=dtype)
    for k in range(5):
        factor = 1.0 - 0.1 * k
        optimizer.scale_lr(factor)
        for group, lr in zip(peer.param_groups, (0.1, 0.02), strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        peer.zero_grad()
        for net in (mine, theirs):
            (3.0 * net[1](torch.tanh(net[0](x))).square().sum()).backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        peer.step()
        torch.testing.assert_close(optimizer.step(), expected, rtol=1e-12 if exact else 1e-6, atol=0)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9 if exact else 1e-6, atol=1e-12 if exact else 1e-7)


def test_parameters_stay_views_and_gaps_stay_zero() -> None:
    net, _ = networks()
    optimizer = Optimizer([(list(net.parameters()), 0.1)], Rule(), math.inf)
    net.load_state_dict({k: v + 1.0 for k, v in net.state_dict().items()})
    for p, view in zip(net.parameters(), optimizer.views(optimizer.flat), strict=True):
        assert torch.equal(p, view) and p.data_ptr() % 64 == 0
    joined = optimizer.flatten([p.detach() for p in net.parameters()])
    assert torch.equal(joined, optimizer.flat) and len(joined) > sum(p.numel() for p in net.parameters())
    assert float(joined.sum()) == pytest.approx(float(sum(p.detach().sum() for p in net.parameters())))


def test_a_step_can_leave_the_later_groups_alone() -> None:
    net, _ = networks()
    optimizer = Optimizer([(list(net[0].parameters()), 0.1), (list(net[1].parameters()), 0.1)], Rule(), math.inf)  # type: ignore[index]
    optimizer.grad.fill_(1.0)
    before = optimizer.flat.clone()
    optimizer.step(groups=1)
    moved = optimizer.flat != before
    first = optimizer.groups[0]
    assert moved[first.start : first.stop].all() and not moved[first.stop :].any() and float(optimizer.groups[1].count) == 0.0


def test_an_optimiser_refuses_mixed_dtypes() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=F64))]
    with pytest.raises(ValueError, match=r"one dtype on one device.*float32.*float64"):
        Optimizer([(params, 0.1)], Rule(), 1.0)


# -- compiled updates ------------------------------------------------------------------------------------------------------------------------


def driver(method_id: str, env: str, compile: bool, agent_options: dict[str, Any] | None = None, **changes: Any) -> OnPolicyDriver:
    """22 decisions in minibatches of 8: the last one has to be filled up."""
    small = {"num_envs": 11, "num_steps": 2, "num_env_steps": 220, "group_size": 1, "solver": {"minibatch": 8, "epochs": 2}, **changes}
    method = override(configure(method_id, env), small)
    setup = build(env, method, 0, {"V": 3, "H": 2} if env == TREE else {}, agent_options)
    return OnPolicyDriver(method, setup.agent, setup.collector, compile=compile)


def same(a: OnPolicyDriver, b: OnPolicyDriver, rtol: float, atol: float) -> None:
    for p, q in zip(a.agent.net.parameters(), b.agent.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("method_id", FIRST_ORDER)
def test_traced_update_equals_the_eager_one(method_id: str) -> None:
    rows = {"num_envs": 12} if "rloo" in method_id or "rlhf" in method_id else {}
    eager, traced = (driver(method_id, TREE, c, {"dtype": "float64"}, **rows) for c in (False, True))
    for _ in range(3):
        left, right = eager.step(), traced.step()
        for key in left.keys() | right.keys():
            assert right[key] == pytest.approx(left[key], rel=1e-7, abs=1e-9, nan_ok=True), key
    same(eager, traced, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "markovia/LinearGaussian-v0"])
def test_traced_update_equals_the_eager_one_for_networks(env: str) -> None:
    method_id = "ddpo" if env.startswith("markovia") else "ppo"
    eager, traced = (driver(method_id, env, c) for c in (False, True))
    for _ in range(2):
        eager.step(), traced.step()
    same(eager, traced, rtol=1e-5, atol=1e-6)


def test_tracing_reads_only_what_is_used_and_changes_nothing() -> None:
    def update(x: Tensor, unused: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        unused.index_select(0, torch.zeros(1, dtype=torch.long))
        x.add_(y)
        return (x.sum(),)

    args = [torch.ones(3), torch.ones(5), torch.full((3,), 2.0)]
    graph, used = compiled.trace(update, args)
    assert used == [0, 2] and torch.equal(args[0], torch.ones(3))
    (total,) = graph(args[0], args[2])
    assert float(total) == 9.0 and torch.equal(args[0], torch.full((3,), 3.0))


def test_a_course_that_depends_on_values_is_refused() -> None:
    with pytest.raises(RuntimeError):
        compiled.trace(lambda x: (x * 2 if float(x.sum()) > 0 else x,), [torch.ones(2)])


def test_without_a_compiler_the_update_runs_eagerly_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    compiled.can_compile.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler was found; install"):
        assert not compiled.can_compile("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not compiled.can_compile("cpu")
    compiled.can_compile.cache_clear()


def test_a_failing_compiler_leaves_the_traced_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph_module: Any, **_: Any) -> Any:
        def run(*args: Tensor) -> Any:
            raise BackendCompilerFailed(lambda: None, RuntimeError("g++ says no"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_aot", lambda *given, **_: broken(given[0])())
    double = compiled.Compiled(lambda x: (x * 2.0,), static=0)
    with pytest.warns(RuntimeWarning, match="run eagerly"):
        assert torch.equal(double("key", [torch.ones(2)])[0], torch.full((2,), 2.0))
    assert torch.equal(double("key", [torch.ones(2)])[0], torch.full((2,), 2.0)) and double.seconds > 0.0


@pytest.mark.slow
def test_compiled_and_eager_agree_after_a_hundred_steps() -> None:
    changes = {"num_envs": 8, "num_steps": 80, "num_env_steps": 10**6, "solver": {"minibatch": 64, "epochs": 10}}
    eager, fast = (driver("ppo", "Pendulum-v1", c, **changes) for c in (False, True))
    eager.step(), fast.step()  # 640 decisions in minibatches of 64, 10 epochs: 100 optimiser steps
    assert float(fast.updates["main"].optimizer.groups[0].count) == 100.0
    moved = torch.cat([p.detach().flatten() for p in eager.agent.net.parameters()])
    other = torch.cat([p.detach().flatten() for p in fast.agent.net.parameters()])
    assert float((moved - other).norm() / moved.norm()) < 1e-5


@pytest.mark.parametrize(("method_id", "env_id", "threads"), [("ppo", "Pendulum-v1", 1), ("sac", "Pendulum-v1", 1), ("sac", "HalfCheetah-v5", 2)])
def test_several_threads_where_an_optimiser_step_is_large(method_id: str, env_id: str, threads: int) -> None:
    method = configure(method_id, env_id)
    setup = build(env_id, method)
    assert num_threads(method, setup, 2) == threads and num_threads(method, setup, 1) == 1
    setup.collector.close()
