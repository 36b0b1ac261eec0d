"""`awac/online` and `iql/online`: the parents' update, first on data, then on one pool of data and the environment's steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from off_policy_pieces import everything, order_and_repetition_change_nothing
from offline_pieces import DATASET, POINT, half_and_half_equals_a_whole, made, minibatch

from markovia import cli
from markovia.algos.offline.methods import OFFLINE, WARM_START
from markovia.algos.offline.warm_start import WarmStart, continued
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.runs import train

ROWS = [m for m in WARM_START if m.endswith("/online")]
TINY: dict[str, Any] = {"policy": {"hidden": [8]}, "critic": {"hidden": [8]}}


def smaller(method_id: str) -> dict[str, Any]:
    return {**TINY, "value": {"hidden": [8]}} if method_id.startswith("iql") else TINY


def short(method_id: str, **changes: Any) -> WarmStart:
    """Ten updates on data, then 40 steps online of which the first 8 only fill the replay."""
    net = {**smaller(method_id), "batch_size": 8, "num_steps": 10}
    small = {"offline": {**net, "num_env_steps": 10}, "online": {**net, "num_env_steps": 40, "learning_starts": 8}}
    method = override(override(configure(method_id, POINT), small), changes)
    assert isinstance(method, WarmStart)
    return method


def driver_of(method: WarmStart, seed: int = 5) -> Any:
    return make_driver(method, build(POINT, method, seed, dataset=DATASET), seed=seed)


def online(driver: Any, steps: int) -> Any:
    """The driver with so many online iterations behind it."""
    while driver.online is None or driver.online.iteration < steps:
        driver.step()
    return driver


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("limit")
def test_online_update_is_the_parents_to_the_bit(method_id: str) -> None:
    """The same minibatches through the offline parent and through what goes on online: every number that moves."""
    row = WARM_START[method_id]
    assert row.value.offline == OFFLINE[row.parent].value and row.value.online.num_env_steps == row.value.offline.num_env_steps
    ends = []
    for method in (row.value.offline, row.value.online):
        tiny = override(method, {name: {**part, "activation": "tanh"} for name, part in smaller(method_id).items()})
        update = made(tiny)
        for seed in range(3):
            update(*minibatch(seed=seed), True)
        ends.append(everything(update))
    assert torch.equal(*ends)


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("invariance")
def test_order_and_repetition_of_rows_change_nothing(method_id: str) -> None:
    tiny = override(WARM_START[method_id].value.online, {name: {**part, "activation": "tanh"} for name, part in smaller(method_id).items()})
    order_and_repetition_change_nothing(lambda: made(tiny), *minibatch())


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("value")
def test_every_row_of_the_pool_is_as_likely(method_id: str) -> None:
    """10,000 logged rows and 20 of the environment: one minibatch in 501 rows is new, within five standard deviations of a binomial count."""
    driver = online(driver_of(short(method_id)), 2)
    pool, old = driver.collector.online.replay, len(driver.collector.dataset.replay.store.reward)
    driver.collector.dataset.replay.store.reward.fill_(1e6)
    n = 200_000
    rows = pool.sample(n, torch.Generator().manual_seed(0))
    new, p = int((rows.reward != 1e6).sum()), pool.size / (pool.size + old)
    assert pool.size == 20 and abs(new - n * p) < 5.0 * np.sqrt(n * p * (1.0 - p)) and new > 0
    assert len(rows.obs) == n and rows.extra == {}


def test_observations_of_both_phases_are_normalised_alike() -> None:
    """What the environment shows is stored as the data's moments make it, and these stay as they are."""
    method = short("iql/online")
    assert method.offline.data.normalize_obs
    driver = driver_of(method)
    norm = driver.agent.net["normalizer"].norms[0]
    before = [x.clone() for x in (norm.mean, norm.var, norm.count)]
    online(driver, 2)
    assert float(norm.count) > 0 and all(torch.equal(a, b) for a, b in zip(before, (norm.mean, norm.var, norm.count), strict=True))
    store, env = driver.collector.online.replay.store, build(POINT, method, 5, dataset=DATASET).collector.online.venv
    low, high = env.single_observation_space.low, env.single_observation_space.high
    raw = store.obs[:20].double() * (norm.var + 1e-8).sqrt() + norm.mean
    assert ((raw >= torch.as_tensor(low) - 1e-5) & (raw <= torch.as_tensor(high) + 1e-5)).all()
    following = store.obs[1:20][~store.truncated[:19]]
    torch.testing.assert_close(store.next_obs[:19][~store.truncated[:19]], following)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.check("resume")
def test_half_and_half_equals_a_whole(method_id: str, at: int, tmp_path: Any) -> None:
    """Stopped at the end of the data, and online after the first updates."""
    half_and_half_equals_a_whole(lambda: driver_of(short(method_id)), at, tmp_path / "state.safetensors")


@pytest.mark.parametrize("method_id", ROWS)
def test_run_folder_and_command_line(method_id: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = train(short(method_id), POINT, dataset=DATASET, out=tmp_path / "run", eval_episodes=1, progress=False).done
    assert done["num_env_steps"] == 50 and len(done["evaluation"]["score_pct"]) == 1
    flags = ["--offline.num-env-steps", "10", "--online.num-env-steps", "300", "--retain", "0.5", "--eval-episodes", "1", "--no-progress"]
    assert cli.run(["train", method_id, "--env", POINT, "--dataset", DATASET, "--out", str(tmp_path / "cli"), *flags]) == 0
    assert "310 steps in" in capsys.readouterr().out


@pytest.mark.parametrize("method_id", ROWS)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"retain": "apend"}, r"retain must lie in \[0, 1\) or be 'append', got 'apend'"),
        ({"retain": -0.1}, r"retain must lie in \[0, 1\) or be 'append', got -0.1"),
        ({"online": {"critic": {"num": 3}}}, "offline.critic and online.critic must be the same networks"),
    ],
)
@pytest.mark.check("bad_input")
def test_bad_input_is_answered(method_id: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        short(method_id, **changes)


def test_imitation_and_other_values_do_not_go_online() -> None:
    with pytest.raises(ValueError, match="imitation has no critics that could go online"):
        WarmStart(offline=OFFLINE["bc"].value, online=WARM_START["iql/online"].value.online)
    with pytest.raises(ValueError, match=r"offline\.value and online\.value must be the same networks"):
        short("iql/online", online={"value": {"tau": 0.9}})


def test_any_row_can_go_on_by_its_own_update() -> None:
    """TD3+BC, which has no row of its own for it."""
    td3_bc = override(configure("td3-bc", POINT), {**TINY, "num_env_steps": 10, "num_steps": 10, "batch_size": 8})
    driver = driver_of(WarmStart(td3_bc, continued(td3_bc, num_env_steps=20), retain=0.5))
    while not driver.finished:
        driver.step()
    assert driver.online.num_updates == 12 and driver.num_env_steps == 30


def test_a_replay_alone_takes_no_normaliser_without_moments() -> None:
    method = short("iql/online").online
    setup = build(POINT, override(method, {"num_env_steps": 20}), 0)
    assert "normalizer" not in setup.agent.net
    with pytest.raises(ValueError, match="a normaliser has to be fixed before, as those of datasets are"):
        make_driver(method, build(POINT, method, 0, agent_options={"normalize_obs": True}), seed=0)
