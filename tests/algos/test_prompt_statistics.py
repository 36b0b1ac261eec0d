"""ddpo with statistics of each prompt: by hand, in a run, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from markovia.algos.advantages import BatchReturn, _condition_names, prompt_statistics
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver

pytest.importorskip("diffusers")
torch.set_num_threads(1)


def test_statistics_of_each_prompt_by_hand() -> None:
    # Prompt a has three rewards in the second batch: 1, 2, then 3 and 6; the last three are 2, 3, 6: mean 11/3. b has one and takes the batch's.
    state: dict = {}
    mean, std = prompt_statistics(torch.tensor([1.0, 2.0]), ["a", "a"], state, keep=3)
    assert mean.tolist() == [1.5, 1.5] and std.tolist() == [0.5, 0.5]  # too few yet: those of the batch
    mean, std = prompt_statistics(torch.tensor([3.0, 6.0, 0.0]), ["a", "a", "b"], state, keep=3)
    variance = ((2 - 11 / 3) ** 2 + (3 - 11 / 3) ** 2 + (6 - 11 / 3) ** 2) / 3
    assert mean.tolist() == pytest.approx([11 / 3, 11 / 3, 3.0]) and std.tolist() == pytest.approx([variance**0.5] * 2 + [6**0.5])
    assert state == {"prompts": {"a": [2.0, 3.0, 6.0], "b": [0.0]}}
    assert json.loads(json.dumps(state)) == state


def test_prompts_are_compared_with_themselves_in_a_run() -> None:
    env, changes = "markovia/DigitsConditional-v0", {"num_envs": 32, "num_env_steps": 96, "solver": {"epochs": 1}, "advantage": {"per_prompt": 4}}
    method = override(configure("ddpo", env), changes)
    setup = build(env, method, 0, env_kwargs={"num_steps": 3})
    driver = make_driver(method, setup, 0)
    driver.step()
    rollout = setup.collector.collect(setup.agent, torch.Generator().manual_seed(0))
    adv, ret = method.advantage(rollout.reward, rollout, driver.advantage_state)
    kept = driver.advantage_state["prompts"]
    assert len(kept) == 10 and all(len(v) <= 4 for v in kept.values())
    classes = rollout.obs["cond"][:, 0].argmax(-1)
    own = {c: kept[n] for c, n in zip(classes.tolist(), _condition_names(rollout), strict=True) if len(kept[n]) == 4}
    row = next(i for i, c in enumerate(classes.tolist()) if c in own)
    values = torch.tensor(own[int(classes[row])])
    want = ((ret[row, 0] - values.mean()) / (values.std(correction=0) + 1e-8)).clamp(-5, 5)
    torch.testing.assert_close(adv[row, 0], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs chains with a condition"):
        method.advantage(rollout.reward, replace(rollout, obs={"x": rollout.obs["x"]}), {})
    with pytest.raises(ValueError, match="reward_to_go at False"):
        BatchReturn(per_prompt=4, reward_to_go=True)
