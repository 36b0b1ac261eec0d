"""Offline runs from dataset to evaluation: the source of transitions, resume, run folders and the command line."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia import cli
from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.agents.control import ControlAgent
from markovia.agents.interface import Agent
from markovia.algos.off_policy.slots import Behaviour, Deterministic, QuantileCritics
from markovia.algos.offline.method import Logged, Offline
from markovia.algos.offline.methods import OFFLINE
from markovia.algos.offline.setup import describe, reference_of
from markovia.algos.offline.source import make_source
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.envs.exact.offline import Bandit2D, pointmass_data
from markovia.envs.offline.d4rl import write_d4rl
from markovia.envs.offline.scores import reference
from markovia.envs.offline.transforms import Transform
from markovia.envs.offline.transitions import About, Transitions
from markovia.loaded import load_run
from markovia.runs import train

torch.set_num_threads(1)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
POINT = "markovia/PointMass2D-v0"
DATASET = "fixture:pointmass2d/blend"


def short(method_id: str, **changes: Any) -> Offline:
    """A row's settings for pointmass, with small networks and twenty updates; a behaviour model takes the first six of them."""
    method = override(configure(method_id, POINT), {"num_steps": 10, "num_env_steps": 20, "batch_size": 16, "policy": {"hidden": [8]}})
    if isinstance(method.critic, QuantileCritics):
        method = override(method, {"critic": {"hidden": [8, 8], "quantiles": 2, "embedding": 4}})
    if method.behaviour is not None:
        method = override(method, {"behaviour": {"hidden": [8]}})
    if isinstance(method.behaviour, Behaviour):
        method = override(method, {"behaviour": {"steps": 6}})
    return override(method, changes)


def other(**changes: Any) -> Transitions:
    return dataclasses.replace(pointmass_data("random", episodes=2), about=About("other"), **changes)


def source(data: Transitions, **settings: Any) -> Any:
    agent = ControlAgent.from_spaces(BOX, BOX, critic=False, **Deterministic(hidden=(4,)).agent_options())
    return make_source(data, Logged(**settings), agent, 0.99)


# -- resume -----------------------------------------------------------------------------------------------------------------------------


def pointmass(method_id: str, **changes: Any) -> Any:
    method = short(method_id, **changes)
    return make_driver(method, build(POINT, method, 5, dataset=DATASET), seed=5)


@pytest.mark.parametrize("method_id", OFFLINE)
@pytest.mark.check("resume")
def test_half_and_half_equals_a_whole(method_id: str, tmp_path: Any) -> None:
    straight = pointmass(method_id)
    straight.step()
    straight.boundary()
    save_tensors(tmp_path / "state.safetensors", *straight.state())
    stats = straight.step()
    resumed = pointmass(method_id)
    resumed.load_state(*load_tensors(tmp_path / "state.safetensors"))
    resumed.boundary()
    assert resumed.step() == stats and straight.num_updates == 20 and straight.finished
    a, b = straight.state()[0], resumed.state()[0]
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    assert not any(k.startswith("collector.") and k != "collector.checksum" for k in a)


def test_stopped_run_goes_on_and_its_folder_holds_the_transform(tmp_path: Any) -> None:
    method = short("td3-bc", **{"num_steps": 10, "num_env_steps": 40, "batch_size": 8, "data": {"reward": "return_range"}})
    options: dict[str, Any] = {"dataset": DATASET, "num_checkpoints": 4, "eval_episodes": 3, "progress": False}
    whole = train(method, POINT, out=tmp_path / "whole", **options)
    train(method, POINT, out=tmp_path / "parts", callbacks=[lambda info: info.iteration < 2], **options)
    resumed = train(method, POINT, out=tmp_path / "parts", resume=True, **options)
    assert resumed.done["evaluation"] == whole.done["evaluation"]
    assert all(torch.equal(v, resumed.agent.state()[k]) for k, v in whole.agent.state().items())
    loaded = load_run(tmp_path / "whole")
    data = pointmass_data("blend")
    transform = Transform.load(tmp_path / "whole" / "transform.json")
    assert transform.reward.scale == pytest.approx(data.about.horizon / (data.returns().max() - data.returns().min()))
    np.testing.assert_allclose(loaded.agent.observe(data.obs).numpy(), np.clip(transform.obs(data.obs), -10, 10), atol=1e-5)  # type: ignore[misc, attr-defined]
    found = loaded.evaluate(loaded.agent, 3, 0)
    scale = data.about.reference
    assert scale is not None and found["returns"] == whole.done["evaluation"]["returns"]
    assert found["score_pct"] == pytest.approx([100 * (r - scale.minimum) / (scale.maximum - scale.minimum) for r in found["returns"]])
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dataset"] == DATASET
    again = Agent.load(max((tmp_path / "whole" / "checkpoints").iterdir()) / "agent")
    obs = data.obs[:5]
    np.testing.assert_allclose(again.predict(obs, deterministic=True)[0], whole.agent.predict(obs, deterministic=True)[0])


def test_the_behaviour_model_is_fitted_first_and_fixed_then() -> None:
    driver = pointmass("spot", num_steps=6)
    start, policy = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (driver.nets.behaviour, driver.nets.policy))
    driver.step()
    fitted, same = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (driver.nets.behaviour, driver.nets.policy))
    assert driver.num_updates == 6 and not torch.equal(fitted, start) and torch.equal(same, policy)
    driver.step()
    later, moved = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (driver.nets.behaviour, driver.nets.policy))
    assert torch.equal(later, fitted) and not torch.equal(moved, policy)


def test_a_budget_that_the_behaviour_model_takes_whole_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes behaviour\.steps=6 of num_env_steps=6 updates, so the policy would learn nothing"):
        pointmass("spot", num_env_steps=6)
    for task in ("Pendulum-v1", POINT, "markovia/PointObstacle-v0", "Hopper-v5"):
        presets = configure("spot", task)
        assert presets.behaviour.steps < presets.num_env_steps


def test_rewards_are_scaled_by_the_presets_of_those_methods_whose_papers_do() -> None:
    methods = ("bc", "td3-bc", "rebrac", "awac", "iql", "cql", "edac", "spot", "mcep")
    assert {m for m in methods if configure(m, "Hopper-v5").data.reward == "return_range"} == {"iql", "mcep"}
    assert configure("wsrl", "Hopper-v5").offline.regulariser.calibrated is False and configure("wsrl", "Pendulum-v1").offline.regulariser.calibrated


@pytest.mark.parametrize("method_id", ["iql", "mcep", "wsrl", "iql/online", "td3-bc", "cql"])
@pytest.mark.parametrize("robot", ["Hopper", "HalfCheetah", "Walker2d"])
def test_presets_of_the_tasks_that_d4rl_files_belong_to(robot: str, method_id: str) -> None:
    assert configure(method_id, f"{robot}-v4") == configure(method_id, f"{robot}-v5")


@pytest.mark.parametrize("method_id", ["bc", "decision-transformer"])
def test_a_run_is_evaluated_without_its_dataset(method_id: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is gone, or holds other rows: the policy, what it is asked for and its score are those of the run."""
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    data = pointmass_data("medium", episodes=10)
    own = dataclasses.replace(data.about, env_spec=None)
    write_d4rl(dataclasses.replace(data, about=own), tmp_path / "rows.hdf5")
    small = {"num_env_steps": 20, "num_steps": 10} | ({"width": 16} if method_id == "decision-transformer" else {"policy": {"hidden": [8]}})
    method = override(configure(method_id, POINT), small)
    options: dict[str, Any] = {"dataset": "rows.hdf5", "eval_episodes": 2, "progress": False}
    run = train(method, POINT, out=tmp_path / "run", **options)
    assert json.loads((tmp_path / "run" / "reference.json").read_text()) is None
    first = load_run(tmp_path / "run")
    returns = first.evaluate(first.agent, 2, 0)["returns"]
    with h5py.File(tmp_path / "rows.hdf5", "r+") as file:
        file["rewards"][:] = -9.0
    monkeypatch.chdir("/")
    for there in (True, False):
        if not there:
            (tmp_path / "rows.hdf5").unlink()
        again = load_run(tmp_path / "run")
        assert again.evaluate(again.agent, 2, 0)["returns"] == returns
        assert getattr(again.agent, "target_return", None) == getattr(run.agent, "target_return", None)
    (tmp_path / "run" / "reference.json").write_text('{"minimum": 3.0}')
    with pytest.raises(ValueError, match="holds no reference returns"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "reference.json").unlink()
    with pytest.raises(ValueError, match=r"rows\.hdf5"):  # a run from before the references were kept
        load_run(tmp_path / "run")


def test_the_score_of_a_run_is_that_of_its_own_references(tmp_path: Any) -> None:
    done = train(short("bc"), POINT, dataset=DATASET, out=tmp_path / "run", eval_episodes=2, progress=False).done["evaluation"]
    loaded, scale = load_run(tmp_path / "run"), pointmass_data("blend").about.reference
    assert scale is not None and json.loads((tmp_path / "run" / "reference.json").read_text())["maximum"] == scale.maximum
    found = loaded.evaluate(loaded.agent, 2, 3)
    assert found["score_pct"] == scale.score_pct(found["returns"]).tolist() and len(done["score_pct"]) == 2


def test_no_score_where_the_arguments_of_the_task_change_what_it_pays() -> None:
    data = pointmass_data("random")
    with pytest.warns(UserWarning, match="nobody measured the references of markovia/PointMass2D-v0 with reward_scale=2"):
        assert reference_of(data, POINT, 40, {"reward_scale": 2}) is None
    assert reference_of(data, POINT, 40, {"render_mode": "rgb_array", "max_episode_steps": 40}) is data.about.reference
    spec = copy.deepcopy(gym.spec("Pendulum-v1"))  # the registry's own otherwise
    spec.kwargs = {"g": 9.0}
    told = dataclasses.replace(data, about=dataclasses.replace(data.about, env_spec=spec))
    assert reference_of(told, POINT, 40, {"g": 9.0}) is data.about.reference


def test_steps_that_pay_enough_end_their_episode_online_too() -> None:
    enough = float(np.quantile(pointmass_data("blend").reward, 0.2))
    method = override(configure("awac/online", POINT), {
        "offline": {"num_env_steps": 5, "num_steps": 5, "batch_size": 8, "data": {"terminate_at": enough}},
        "online": {"num_env_steps": 60, "num_steps": 60, "batch_size": 8, "learning_starts": 50},
    })  # fmt: skip
    driver = make_driver(method, build(POINT, method, dataset=DATASET), seed=0)
    driver.step(), driver.step()
    store = driver.collector.online.replay.store
    paid, over = store.reward[:60] >= enough, store.continuation[:60] == 0.0
    assert 0 < int(paid.sum()) < 60 and torch.equal(paid, over)


def test_command_line_trains_and_evaluates_on_a_dataset(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--num-env-steps", "20", "--num-steps", "10", "--eval-episodes", "2", "--policy.hidden", "8", "--no-progress", "--data.fraction", "0.5"]
    assert cli.run(["train", "bc", "--env", POINT, "--dataset", DATASET, "--out", str(tmp_path / "run"), *short]) == 0
    assert re.search(r"20 steps in .* score -?[\d.]+ \(0 random, 100 reference\)", capsys.readouterr().out)
    assert "5,000 rows used" in (tmp_path / "run" / "data.txt").read_text()
    assert cli.run(["eval", str(tmp_path / "run"), "--episodes", "2", "--json"]) == 0
    assert len(next(iter(json.loads(capsys.readouterr().out)["runs"].values()))["score_pct"]) == 2


def test_the_learning_rate_of_iqls_actor_falls_along_half_a_cosine() -> None:
    driver = pointmass("iql")
    rates = []
    move = driver.update.optimizers["actor"].scale_lr
    driver.update.optimizers["actor"].scale_lr = lambda factor: (rates.append(factor), move(factor))
    driver.step(), driver.step()
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 20)) for k in range(1, 21)])


def test_a_changed_dataset_stops_a_resumed_run() -> None:
    first, second = source(other()), source(other(reward=np.ones(80, np.float32)))
    first.load_state(first.state())
    with pytest.raises(ValueError, match="dataset has changed since this run began"):
        second.load_state(first.state())


# -- the source ----------------------------------------------------------------------------------------------------------------------------


def test_rows_are_transformed_once_and_stay() -> None:
    data = other()
    made_source = source(data, reward="return_range", next_action=True, returns_to_go="zero")
    rows, scale = made_source.replay.store, made_source.transform.reward.scale
    assert made_source.step(None, None) == 1 and made_source.replay.size == len(rows.reward) == 78  # the last of each episode has no next action
    keep = ~data.truncated
    std = data.obs.std(0) + 1e-3
    np.testing.assert_allclose(rows.obs.numpy(), ((data.obs - data.obs.mean(0)) / std)[keep], atol=1e-5)
    np.testing.assert_allclose(rows.next_obs.numpy(), ((data.next_obs - data.obs.mean(0)) / std)[keep], atol=1e-5)
    np.testing.assert_allclose(rows.reward.numpy(), scale * data.reward[keep], rtol=1e-6)
    np.testing.assert_array_equal(rows.extra["next_action"][:38].numpy(), data.action[1:39])
    # G of the second step: the first episode's rewards from there on, discounted, times the scale
    ret = scale * sum(0.99**k * float(r) for k, r in enumerate(data.reward[1:40]))
    assert float(rows.extra["ret"][1]) == pytest.approx(ret, rel=1e-5)
    assert bool((rows.continuation == 1).all())


def test_actions_are_scaled_to_the_box_and_best_episodes_kept() -> None:
    data = other(action=np.tile(np.array([[-2.0, 4.0]], np.float32), (80, 1)))
    box = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 4.0], np.float32))
    agent = ControlAgent.from_spaces(BOX, box, critic=False, normalize_obs=False, **Deterministic(hidden=(4,)).agent_options())
    found = make_source(data, Logged(fraction=0.5), agent, 0.99)
    assert found.replay.size == 40 and found.replay.store.action.unique(dim=0).tolist() == [[-1.0, 1.0]]
    best = int(data.returns().argmax())
    np.testing.assert_array_equal(found.replay.store.reward.numpy(), data.reward[40 * best : 40 * best + 40])
    assert found.transform.obs is None
    np.testing.assert_allclose(agent.from_unit(found.replay.store.action[:1].numpy()), [[-2.0, 4.0]])


def test_data_of_another_task_with_fitting_shapes() -> None:
    """The note tells another name; a Minari set that declares other bounds of its actions is refused, because the same number is another action."""
    data = pointmass_data("random", episodes=2)
    there = gym.spec("Walker2d-v5")
    told = dataclasses.replace(data, about=dataclasses.replace(data.about, env_spec=there))
    assert describe(told, "HalfCheetah-v5", 80, None).startswith("pointmass2d/random (recorded in Walker2d-v5, not in HalfCheetah-v5): 80 steps")
    file = dataclasses.replace(data, about=dataclasses.replace(data.about, env_id="halfcheetah-medium-v2", env_spec=None))
    assert "(recorded with D4RL's halfcheetah, not in Walker2d-v4)" in describe(file, "Walker2d-v4", 80, None)
    assert "(no score: D4RL's references belong to the robot's tasks before v5" in describe(file, "HalfCheetah-v5", 80, None)
    assert "(" not in describe(file, "HalfCheetah-v4", 80, data.about.reference).partition(":")[0]
    assert "recorded" not in describe(told, "gymnasium:Walker2d-v4", 80, None) and "recorded" not in describe(data, POINT, 80, None)
    agent = ControlAgent.from_spaces(BOX, spaces.Box(-2.0, 2.0, (2,), np.float32), critic=False)
    make_source(dataclasses.replace(data, about=dataclasses.replace(data.about, env_spec=None)), Logged(), agent, 0.99)
    with pytest.raises(ValueError, match=r"was recorded with actions in .* the same number is another action there"):
        make_source(data, Logged(), agent, 0.99)


@pytest.mark.parametrize("own", [spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Box(-2.0, 2.0, (1,), np.float32), spaces.MultiDiscrete([2, 2])])
def test_a_declared_action_space_is_compared_without_its_environment(own: Any) -> None:
    data, box = other(action=np.zeros((80, 2), np.int64)), spaces.Box(-2.0, 2.0, (2,), np.float32)
    agent = ControlAgent.from_spaces(BOX, box, critic=False)
    make_source(data, Logged(), agent, 0.99)
    with pytest.raises(ValueError, match=r"other was recorded with actions in (Box|MultiDiscrete).*, and the environment takes Box"):
        make_source(dataclasses.replace(data, about=About("other", action_space=own, declared=True)), Logged(), agent, 0.99)
    declared = dataclasses.replace(data, about=About("other", action_space=box, declared=True))
    assert make_source(declared, Logged(), agent, 0.99).replay.size == 80


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize(("there", "here"), [(np.float32, np.uint8), (np.uint8, np.float32)])
def test_images_of_another_scale_are_refused(there: Any, here: Any, keys: bool) -> None:
    """The network divides bytes by 255 and takes other numbers as they are."""

    def images(dtype: Any) -> Any:
        rows = np.zeros((80, 8, 8, 3), dtype)
        return {"eye": rows, "x": np.zeros((80, 1), np.float64)} if keys else rows

    image = spaces.Box(0, 255 if here == np.uint8 else 1, (8, 8, 3), here)
    space = spaces.Dict({"eye": image, "x": spaces.Box(-1.0, 1.0, (1,), np.float32)}) if keys else image
    agent = ControlAgent.from_spaces(space, BOX, critic=False)
    message = rf"other has obs(/eye)? of {np.dtype(there)}, but the environment gives {np.dtype(here)}: .* convert the images"
    with pytest.raises(ValueError, match=message):
        make_source(other(obs=images(there), next_obs=images(there)), Logged(), agent, 0.99)
    make_source(other(obs=images(here), next_obs=images(here)), Logged(), agent, 0.99)


@pytest.mark.parametrize("method_id", ["td3-bc", "decision-transformer"])
def test_an_episode_ends_with_the_step_that_pays_enough(method_id: str) -> None:
    data = pointmass_data("blend")
    enough = float(np.quantile(data.reward, 0.9))
    method = override(configure(method_id, POINT), {"data": {"terminate_at": enough}})
    source: Any = build(POINT, method, dataset=DATASET).collector
    done = data.terminated | (data.reward >= enough)
    assert 0 < (done & ~data.terminated).sum() < len(data)
    assert source.replay.store.continuation.tolist() == [float(not d) for d in done]
    if method_id == "decision-transformer":  # windows end there too
        first = int(np.flatnonzero(done)[0])
        assert source.end_of[first] == first + 1 and source.step_of[first + 1] == 0


def test_a_reward_that_ends_no_episode_is_told() -> None:
    method = override(configure("td3-bc", POINT), {"data": {"terminate_at": 1.0}})
    with pytest.warns(UserWarning, match=r"data.terminate_at=1.0 ends no episode: the largest reward of fixture:pointmass2d/blend is -1.76"):
        build(POINT, method, dataset=DATASET)


def test_the_best_episodes_by_a_discounted_return() -> None:
    early, late = np.eye(40)[0] * 2.0, np.eye(40)[39] * 9.0  # 2, and 9 gamma^39
    data = other(reward=np.concatenate([early, late]))
    for gamma, paid in ((1.0, 9.0), (0.9, 2.0)):
        assert source(data, fraction=0.5, fraction_gamma=gamma).replay.store.reward.sum() == paid
    with pytest.raises(ValueError, match=r"data.fraction_gamma must lie in \[0, 1\], got 2"):
        Logged(fraction_gamma=2.0)


def test_references_belong_to_one_task_and_time_limit() -> None:
    data = pointmass_data("random")
    assert reference_of(data, POINT, 40) is data.about.reference
    assert reference_of(data, POINT, 50) is None and reference_of(data, "Pendulum-v1", 200) is None
    file = dataclasses.replace(data, about=dataclasses.replace(data.about, reference=reference("hopper-medium-v2", 1000)))
    for task, horizon, known in (("Hopper-v4", 1000, True), ("Hopper-v2", 1000, True), ("Hopper-v5", 1000, False), ("Hopper-v4", 500, False),
                                 ("Walker2d-v4", 1000, False)):  # fmt: skip
        assert (reference_of(file, task, horizon) is file.about.reference) == known, task
    newer = dataclasses.replace(file.about, reference=dataclasses.replace(file.about.reference, env_id="Hopper-v5"))  # type: ignore[type-var]
    assert reference_of(dataclasses.replace(file, about=newer), "Hopper-v4", 1000) is None
    maze = dataclasses.replace(data.about, reference=dataclasses.replace(data.about.reference, env_id="PointMaze_UMaze-v3", horizon=None))
    assert reference_of(dataclasses.replace(data, about=maze), "gymnasium_robotics:PointMaze_UMaze-v3", 300) is maze.reference
    assert Bandit2D().data(4).about.env_id is None
