"""Compiled code that stays on disk: what tells two updates apart, that a kept one gives the same numbers, and what happens to damaged files."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from markovia.agents.products import Product
from markovia.algos import compiled, kept
from markovia.algos.compiled import Compiled
from markovia.envs.cached import cache_dir

torch.set_num_threads(1)


def adam_like(scale: float, decay: float = 0.5) -> Callable[..., tuple[Tensor, ...]]:
    """A step that differentiates, changes two of its arguments in place, reads one and ignores one."""

    def update(weight: Tensor, average: Tensor, ignored: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        w = weight.detach().requires_grad_()
        with torch.enable_grad():
            loss = (scale * torch.tanh(x @ w)).square().mean()
        (grad,) = torch.autograd.grad(loss, w)
        average.mul_(decay).add_(grad, alpha=1 - decay)
        weight.sub_(0.1 * average)
        return loss.detach(), grad.norm()

    return update


def arguments(n: int = 5) -> list[Tensor]:
    """Of `adam_like`; the last does not fill its memory, as copies of it would."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, generator=g), torch.zeros(3, 2), torch.ones(4), torch.randn(n, 6, generator=g)[:, ::2]]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MARKOVIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "updates"


def test_the_text_of_an_update_is_its_operations() -> None:
    before = arguments()
    text = kept.operations(adam_like(2.0), before)
    assert text is not None and text == kept.operations(adam_like(2.0), arguments())
    assert all(torch.equal(a, b) for a, b in zip(before, arguments(), strict=True))  # nothing was changed
    for part in ("aten.tanh.default", "aten.tanh_backward.default", "aten.sub_.Tensor", "torch.float32 (3, 2) (2, 1) cpu", "return [%"):
        assert part in text


def other_arguments() -> dict[str, list[Tensor]]:
    a, b, c, d = arguments()
    return {
        "shape": arguments(6),
        "dtype": [t.double() for t in (a, b, c, d)],
        "stride": [a.t().contiguous().t(), b, c, d],
        "gaps": [a, b, c, d.contiguous()],
    }


@pytest.mark.parametrize("what", ["constant", "order", *other_arguments()])
def test_whatever_makes_other_code_makes_another_text(what: str) -> None:
    text = kept.operations(adam_like(2.0), arguments())
    if what == "constant":
        assert kept.operations(adam_like(2.0, 0.25), arguments()) != text
    elif what == "order":  # the same operations on other tensors
        assert kept.operations(lambda x, y: (x - y,), [torch.ones(2)] * 2) != kept.operations(lambda x, y: (y - x,), [torch.ones(2)] * 2)
    else:
        assert kept.operations(adam_like(2.0), other_arguments()[what]) != text


def test_the_place_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = kept.name_of("text")
    assert name == kept.name_of("text") != kept.name_of("another")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert kept.name_of("text") != name
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    kept.place.cache_clear()
    assert kept.name_of("text") != name
    monkeypatch.undo()
    kept.place.cache_clear()


OUTSIDE = torch.ones(2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + torch.rand(2),),
        lambda x: (torch.dropout(x, 0.5, True),),
        lambda x: (x + OUTSIDE,),
        lambda x: (x + torch.tensor([1.0, 2.0]),),
    ],
    ids=["random numbers", "dropout", "a tensor of its own", "a constant tensor"],
)
def test_what_a_text_can_not_tell_is_not_kept(function: Callable[..., tuple[Tensor, ...]]) -> None:
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    assert kept.operations(function, [torch.ones(2)]) is None
    assert torch.equal(torch.rand(1), first)  # and no random number was used up


def test_transformed_functions_have_a_text() -> None:
    def update(x: Tensor) -> tuple[Tensor, ...]:
        return (vmap(lambda row: row.sum() * row)(x),)

    assert "aten.sum" in str(kept.operations(update, [torch.ones(2, 3)]))


def test_the_code_of_one_update_is_found_by_the_next(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, with a product outside of torch among its operations; the second needs no tracing, and both give what the eager update gives."""

    def update(weight: Tensor, average: Tensor, ignored: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return *adam_like(2.0)(weight, average, ignored, x), Product.apply(x, x)

    eager = arguments()
    expected = [update(*eager) for _ in range(3)]

    def check(fast: Compiled) -> None:
        args = arguments()
        assert not args[3].is_contiguous()
        for want in expected:
            found = fast("key", args)
            assert type(found) is tuple
            torch.testing.assert_close(found, want)
        torch.testing.assert_close(args, eager)
        assert fast.seconds > 0.0

    check(Compiled(update, static=2))
    (folder,) = cache.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["update.json", "update.so", "used.json"]
    monkeypatch.setattr(compiled, "trace", None)
    check(Compiled(update, static=2))


@pytest.mark.parametrize("damage", ["half a library", "no list of arguments"])
def test_a_damaged_folder_is_cleared(cache: Path, damage: str) -> None:
    told = kept.operations(lambda x: (x + 1.0,), [torch.ones(2)])
    assert told is not None and kept.find(told) is None
    folder = cache.parent / kept.name_of(told)
    folder.mkdir(parents=True)
    (folder / "update.so").write_bytes(b"\x7fELF")
    (folder / "used.json").write_text("[0]" if damage == "half a library" else "[0")
    assert kept.find(told) is None and not folder.exists()


def test_a_cache_that_may_only_be_read_is_not_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache.parent / kept.name_of("told")
    folder.mkdir(parents=True)
    (folder / "used.json").write_text("[0]")

    def refused(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", lambda *_: types.SimpleNamespace(run=len))
    assert kept.find("told") == (len, [0]) and folder.exists()


def test_code_of_another_user_is_not_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache.parent / kept.name_of("told")
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1, raising=False)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", None)
    (folder / "used.json").write_text("[0]")
    assert kept.find("told") is None and (folder / "used.json").exists()


@pytest.mark.usefixtures("traced_only")
def test_the_same_key_with_tensors_that_lie_otherwise_is_other_code() -> None:
    fast = Compiled(adam_like(2.0), static=2)
    dense = [*arguments()[:3], arguments()[3].contiguous()]
    first, second = fast("key", arguments()), fast("key", dense)
    torch.testing.assert_close(first, second)
    fast("key", dense)
    assert len(fast._made) == 2


def test_where_nothing_can_be_kept_the_compiler_is_asked_every_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda graph_module, **_: asked.append(graph_module) or graph_module)
    cache.parent.write_text("a file where the folder should be")
    args = arguments()
    loss, _ = Compiled(adam_like(2.0), static=2)("key", args)
    assert len(asked) == 1 and float(loss) > 0.0 and not torch.equal(args[0], arguments()[0])


def test_what_was_used_longest_ago_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        (cache / f"old{i}").mkdir(parents=True)
        os.utime(cache / f"old{i}", (i, i))
    (cache / f"{kept.TEMPORARY}busy").mkdir()
    (cache / f"{kept.TEMPORARY}killed").mkdir()
    os.utime(cache / f"{kept.TEMPORARY}killed", (1, 1))
    monkeypatch.setattr(kept, "KEEP", 2)
    kept.prune(cache)
    assert sorted(p.name for p in cache.iterdir()) == sorted([f"{kept.TEMPORARY}busy", "old3", "old4"])


def test_a_run_with_kept_code_imports_no_compiler(cache: Path) -> None:
    program = """
import sys, torch
torch.set_num_threads(1)
from markovia.algos.compiled import Compiled
def update(w, x):
    w.mul_(0.5)
    return (w * x,)
print(float(Compiled(update, static=1)("key", [torch.ones(1), torch.ones(1)])[0]), "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    told = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert told == [["0.5", "True", "True"], ["0.5", "False", "False"]]
    assert cache_dir() == cache.parent


@pytest.mark.parametrize("method_id", ["trpo", "ppo"])
def test_an_eager_iteration_imports_no_compiler(method_id: str, tmp_path: Path) -> None:
    program = f"""
import sys, torch
from markovia.algos.presets import configure, override
from markovia.runs import train
method = override(configure("{method_id}", "CartPole-v1"), {{"num_env_steps": 1}})
train(method, "CartPole-v1", out={str(tmp_path / "run")!r}, eval_episodes=0, progress=False, num_checkpoints=1)
print("torch._dynamo" in sys.modules, "torch.distributed.fsdp" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]
