"""What a configuration can make the program allocate: networks, tables, replays and records are counted before they are made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from markovia.agents.checkpoint import load_agent, save_agent
from markovia.agents.counted import Counted
from markovia.algos.memory import before_run
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.config_check import largest
from markovia.envs import machine
from markovia.envs.exact.cmdp import CMDP
from markovia.envs.exact.tabular import TabularMDP
from markovia.envs.machine import OverMemory, fits, over_memory
from markovia.loaded import load_run
from markovia.rundir import RunError
from markovia.runs import train

torch.set_num_threads(1)
GB = 10**9
SMALL: dict[str, Any] = {"num_checkpoints": 1, "eval_episodes": 0, "progress": False}


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that makes this a machine of so many bytes."""

    def make(total: float) -> None:
        monkeypatch.setattr(machine, "memory", lambda: (total, total))

    return make


def test_what_fits_is_let_through(of: Any) -> None:
    of(2 * GB)
    fits(2 * GB, "a table")
    with pytest.raises(OverMemory, match=r"^a table needs 3 GB, and this machine has 2; make it smaller"):
        fits(3 * GB, "a table")
    with over_memory():
        fits(3 * GB, "a table")
    with pytest.raises(ValueError, match="needs 3 GB"):
        fits(3 * GB, "a table")


# -- tensors ---------------------------------------------------------------------------------------------------------------------------------


def test_tensors_are_counted_before_they_are_made(of: Any) -> None:
    of(GB)
    with Counted("the networks"):
        nn.Linear(1000, 1000)
        with pytest.raises(OverMemory, match=r"the networks needs? 4e\+03 GB"):
            nn.Linear(10**6, 10**6)  # 4 TB, which no machine gives
    # 4 bytes of 10 x 6e6 numbers fit, 4 bytes of 50 x 6e6 do not, though each layer does.
    with Counted("the networks"):
        for _ in range(10):
            nn.Linear(3000, 2000)
    with pytest.raises(OverMemory), Counted("the networks") as counted:
        for _ in range(50):
            nn.Linear(3000, 2000)
    assert 0.9 * GB < counted.made < 1.1 * GB


def test_tensors_of_the_data_come_and_go_uncounted(of: Any, tmp_path: Path) -> None:
    of(GB)
    seen = []

    def prepare(setup: Any) -> None:
        seen.extend(float(torch.zeros(10**6)[0]) for _ in range(300))  # 1.2 GB in all, 4 MB at a time

    method = override(configure("ppo", "CartPole-v1"), {"num_env_steps": 512})
    train(method, "CartPole-v1", out=tmp_path / "run", prepare=prepare, **SMALL)
    assert len(seen) == 300


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.zeros(3, 5), 60), (lambda: torch.ones((4,), dtype=torch.float64), 32), (lambda: torch.full((2, 2), 1.0), 16),
        (lambda: torch.rand(7, generator=torch.Generator()), 28), (lambda: torch.eye(6), 144), (lambda: torch.arange(10), 80),
        (lambda: torch.empty(5, device="meta"), 0), (lambda: torch.randn(2, out=torch.empty(2)), 8), (lambda: torch.ones(3) + 1, 12),
    ],
)  # fmt: skip
def test_bytes_by_hand(make: Callable[[], Any], expected: int) -> None:
    with Counted("it") as counted:
        made = make()
    assert counted.made == expected and isinstance(made, torch.Tensor)
    with torch.device("meta"), Counted("it") as counted:
        torch.zeros(10)
    assert counted.made in (0, 40)  # which of the two modes comes first is torch's business; nothing is made


def test_counting_changes_no_number_and_wrong_arguments_are_told_as_ever() -> None:
    made = []
    for within in (False, True):
        torch.manual_seed(0)
        if within:
            with Counted("it"):
                made.append(nn.GRU(3, 4).state_dict())
        else:
            made.append(nn.GRU(3, 4).state_dict())
    assert all(torch.equal(v, made[1][k]) for k, v in made[0].items())
    with Counted("it"), pytest.raises((TypeError, RuntimeError)):
        torch.zeros("x")


# -- configurations --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    method = override(configure("ppo", "CartPole-v1"), {"num_env_steps": 8, "num_envs": 2, "num_steps": 4})
    train(method, "CartPole-v1", out=folder, method_id="ppo", **SMALL)
    return folder


def edited(run: Path, to: Path, **changes: Any) -> Path:
    """A copy of a run whose configuration, and that of its checkpoint, say something else."""
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "config.json":
                content = json.dumps(json.loads(content) | changes).encode()
            (to / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(run)).write_bytes(content)
    return to


def test_networks_of_a_foreign_run_are_refused_with_field_and_figure(run: Path, tmp_path: Path, of: Any) -> None:
    of(GB)
    load_run(edited(run, tmp_path / "good"))
    # Each layer is one that is allowed (64e6 entries), seven together are 7 x 64e6 x 4 bytes.
    bad = edited(run, tmp_path / "bad", agent_options={"hidden": [8000] * 8})
    with pytest.raises(ValueError, match=r"config.json describes \(agent_options\.hidden=\[8000, 8000.* needs 1\.79 GB, and this machine has 1"):
        load_run(bad)
    with pytest.raises(RunError, match=r"agent_options describes 100000 layers, at most"):
        load_run(edited(run, tmp_path / "deep", agent_options={"hidden": [4] * 10**5}))
    with pytest.raises(RunError, match=r"settings describes 1000000 layers, at most"):
        settings = json.loads((run / "config.json").read_text())["settings"]
        load_run(edited(run, tmp_path / "deep2", settings=settings | {"layers": 10**6}))


def test_environments_of_a_foreign_run_are_counted(run: Path, tmp_path: Path, of: Any) -> None:
    settings = json.loads((run / "config.json").read_text())["settings"]
    of(GB)
    with pytest.raises(OverMemory, match=r"settings\.num_envs=1000 of .*config.json needs 1\.2 GB, and this machine has 1"):
        load_run(edited(run, tmp_path / "many", settings=settings | {"num_envs": 1000}))
    with over_memory(), pytest.raises(RunError, match="at most 16384"):
        load_run(edited(run, tmp_path / "more", settings=settings | {"num_envs": 10**6}))


def test_rows_of_tables_are_no_simulations(tmp_path: Path, of: Any) -> None:
    of(10**8)
    method = override(configure("ppo", "markovia/Tabular-v0"), {"num_env_steps": 200, "num_envs": 200, "num_steps": 1})
    train(method, "markovia/Tabular-v0", out=tmp_path / "run", **SMALL)
    load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        ({}, {"seed": 2**64}, r"this run has the seed 18446744073709551616, expected 0 to 2\^63 - 1"),
        ({"num_envs": 20_000}, {}, r"this run asks for 20000 environments, at most 16384"),
        ({}, {"env_kwargs": {"max_episode_steps": 2_000_000}}, r"this run, env_kwargs\.max_episode_steps is 2000000, more than 1048576"),
    ],
    ids=["seed", "num_envs", "env_kwargs"],
)
def test_a_run_that_could_not_be_read_back_is_not_begun(
    settings: dict[str, Any], options: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("markovia.asked.Asked.build", lambda asked: pytest.fail("it was built"))
    method = override(configure("ppo", "CartPole-v1"), {"num_env_steps": 8, "num_envs": 2, "num_steps": 4, **settings})
    with pytest.raises(RunError, match=told):
        train(method, "CartPole-v1", out=tmp_path / "run", over_memory=True, **SMALL, **options)
    assert not (tmp_path / "run").exists()


def test_environments_of_a_new_run_are_counted_unless_the_user_insists(tmp_path: Path, of: Any) -> None:
    of(3 * 10**6)
    method = override(configure("ppo", "CartPole-v1"), {"num_env_steps": 8, "num_envs": 4, "num_steps": 2})
    options = {"agent_options": {"hidden": [8]}, "out": tmp_path / "run", **SMALL}
    with pytest.raises(OverMemory, match=r"settings\.num_envs=4 of this run needs 0\.0048 GB.*--over-memory begins it all the same"):
        train(method, "CartPole-v1", **options)
    assert train(method, "CartPole-v1", over_memory=True, **options).done["ended"] == "budget"


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_seeds_may_be_large(seed: int, tmp_path: Path) -> None:
    method = override(configure("ppo", "markovia/Tabular-v0"), {"num_env_steps": 8, "num_envs": 2, "num_steps": 4})
    options: dict[str, Any] = {**SMALL, "env_kwargs": {"seed": 20240131}, "seed": seed, "out": tmp_path / "run", "eval_episodes": 1}
    done = train(method, "markovia/Tabular-v0", **options).done
    assert load_run(tmp_path / "run").config["env_kwargs"]["seed"] == 20240131
    assert train(method, "markovia/Tabular-v0", resume=True, **options).done["evaluation"] == done["evaluation"]


def test_nothing_is_allocated_for_what_is_refused(run: Path, tmp_path: Path) -> None:
    """Without a made-up machine: a thousand layers of a gigabyte each, twice, are in no machine."""
    before = _resident()
    with pytest.raises(ValueError, match="this machine has"):
        load_run(edited(run, tmp_path / "bad", agent_options={"hidden": [2**14] * 1001}))
    assert _resident() - before < 0.1 * GB


def _resident() -> int:
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells what a process holds")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_tables_are_refused_with_their_sizes(run: Path, tmp_path: Path, of: Any) -> None:
    of(GB)
    TabularMDP.random(20, 3), CMDP.random(6, 3)
    with pytest.raises(OverMemory, match=r"S=10000 states and A=3 actions needs 4\.8 GB"):  # 2 x 8 bytes x 3e8
        TabularMDP.random(10000, 3)
    with pytest.raises(OverMemory, match=r"S=6 states and A=100000 actions needs 80\.\d GB"):  # 8 x 1e10
        CMDP.random(6, 100000)
    bad = edited(run, tmp_path / "bad", env="markovia/Tabular-v0", env_kwargs={"S": 10000}, agent_options={})
    with pytest.raises(ValueError, match=r"S=10000 states and A=3 actions needs 4\.8 GB, and this machine has 1"):
        load_run(bad)


@pytest.mark.parametrize("change", [{"lora": {"r": 10**7}}, {"hidden": 10**8}], ids=str)
def test_an_agent_on_a_named_model_is_no_larger_than_the_machine(change: dict[str, Any], tmp_path: Path, of: Any) -> None:
    """Such a file does not hold the network, so that its size says nothing of what is described."""
    pytest.importorskip("transformers")
    from markovia.agents.reward_model import RewardModel

    save_agent(RewardModel.from_name("arithmetic", lora={"r": 2}), tmp_path / "agent")
    header = json.loads((tmp_path / "agent" / "agent.json").read_text())
    of(GB)
    load_agent(tmp_path / "agent")
    header["config"]["options"] |= change
    (tmp_path / "agent" / "agent.json").write_text(json.dumps(header))
    with pytest.raises(OverMemory, match=r"what .*agent\.json describes needs \d.* GB, and this machine has 1"):
        load_agent(tmp_path / "agent")


def test_the_largest_sizes_are_named() -> None:
    config = {
        "agent_options": {"hidden": [10, 4000, 4000], "activation": "tanh", "normalize_obs": True},
        "env_kwargs": {"S": 5, "names": ["a"]},
        "settings": {"num_env_steps": 10**9, "replay_size": 10**6, "network": {"hidden": 300, "depth": 3}, "lr": 1e-3},
    }
    assert largest(config) == "agent_options.hidden=[10, 4000, 4000], settings.network.hidden=300"
    assert largest({"agent_options": {}, "env_kwargs": {}, "settings": {}}) == "none of its own"


# -- runs ------------------------------------------------------------------------------------------------------------------------------------


def stepped(name: str, env: str, **changes: Any) -> tuple[Any, Any]:
    method = override(configure(name, env), changes)
    return method, build(env, method, 0)


def test_bytes_of_a_replay_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from markovia.algos.memory import estimate

    method, setup = stepped("sac", "Pendulum-v1", num_env_steps=10**6, replay_size=10**5)
    told = estimate(method, setup)
    # two observations of 3 numbers, an action of 1, reward and continuation, a flag
    assert told is not None and told.total - told.weights == 10**5 * (2 * 12 + 4 + 4 + 4 + 1)
    assert before_run(method, setup) is None  # nothing is said where it fits
    monkeypatch.setattr("markovia.algos.memory.available", lambda device: (1e6, 2e6))
    with pytest.raises(ValueError, match=r"this run needs about 0\.0037\d* GB: .*replay of 100,?000 rows.*replay_size.*--over-memory"):
        before_run(method, setup)
    # What was really made is what was told.
    driver = make_driver(method, setup)
    driver.step()
    store = setup.collector.replay.store
    assert sum(x.numel() * x.element_size() for x in store.named().values()) == told.total - told.weights


def test_a_record_of_steps_is_refused_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from markovia.algos.memory import estimate

    method, setup = stepped("ppo", "CartPole-v1", num_env_steps=10**9, num_envs=4, num_steps=10**6)
    told = estimate(method, setup)
    # at least its observations (4 numbers), actions, rewards and flags
    assert told is not None and 4 * 10**6 * (16 + 8 + 8) < told.total < 4 * 10**6 * 200
    monkeypatch.setattr("markovia.algos.memory.available", lambda device: (1e8, 2e8))
    with pytest.raises(ValueError, match=r"num_envs=4 x num_steps=1000000"):
        train(method, "CartPole-v1", out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_the_memory_of_a_shield_is_counted() -> None:
    from markovia.algos.memory import estimate

    sizes = {"num_env_steps": 10_000, "num_envs": 2, "num_steps": 100}
    rows = []
    for changes in ({"memory": 3000}, {"memory": 10**9}, None):
        told = estimate(*stepped("acs/ppo", "markovia/SafePendulum-v0", **sizes, constraint={"shield": changes}))
        rows.append(told.rows)  # type: ignore[union-attr]
    assert rows == [3200, 10_200, 200]  # never more than the run has steps


def test_networks_that_are_asked_for_are_refused_and_made_where_the_user_insists(tmp_path: Path, of: Any) -> None:
    of(3 * 10**6)  # a machine of 3 MB
    method = override(configure("ppo", "CartPole-v1"), {"num_env_steps": 8, "num_envs": 2, "num_steps": 4})
    options = {"agent_options": {"hidden": [800, 800]}, "out": tmp_path / "run", **SMALL}
    with pytest.raises(ValueError, match=r"needs 0\.00\d* GB.*the largest sizes are agent_options\.hidden=\[800, 800\].*--over-memory"):
        train(method, "CartPole-v1", **options)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="this run needs"):
        assert train(method, "CartPole-v1", over_memory=True, **options).done["ended"] == "budget"


def test_chains_of_images_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from markovia.algos.memory import estimate

    method, setup = stepped("ppo", "markovia/Digits-v0")
    told = estimate(method, setup)
    # num_envs chains of 20 steps: what they were and what they became, 64 numbers each
    assert told is not None and told.total - told.weights >= method.num_envs * 20 * 2 * 64 * 4
