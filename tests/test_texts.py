"""What a text run shows: texts and rewards at checkpoints, the spread of rewards, entropy, length."""

import json
import math

import numpy as np
import pytest
import torch

from markovia.algos.presets import configure, override
from markovia.rundir import Metrics
from markovia.runs import train
from markovia.texts import TextBatch, text_batch

torch.set_num_threads(1)
ENV = "markovia/Arithmetic-v0"


def batch(rewards, apart=None):
    n = len(rewards)
    return TextBatch([f"p{i}" for i in range(n)], [f"c{i}" for i in range(n)], np.array(rewards, dtype=float), apart or {})


def test_histogram_by_hand():
    assert batch([0.0, 0.05, 0.15, 1.0, 1.0]).histogram() == {"low": 0.0, "high": 1.0, "counts": [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]}
    assert sum(batch([3.0, 3.0]).histogram()["counts"]) == 2


def test_shown_texts_are_spread_over_the_batch():
    rows = batch(range(50)).shown()
    assert [r["prompt"] for r in rows] == ["p0", "p7", "p14", "p21", "p28", "p35", "p42", "p49"] and rows[-1]["reward"] == 49.0
    assert len(batch([1.0, 2.0]).shown()) == 2 and "reward/a" not in rows[0]
    two = batch([1.0, 2.0], {"a": np.array([0.5, 1.0]), "b": np.array([0.5, 1.0])}).shown()
    assert two[1] == {"prompt": "p1", "completion": "c1", "reward": 2.0, "reward/a": 1.0, "reward/b": 1.0}


def test_drivers_without_texts_show_none():
    assert text_batch(object()) is None


def test_a_run_keeps_texts_rewards_and_statistics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    method = override(configure("grpo", ENV), {"num_env_steps": 64, "num_envs": 16, "solver": {"minibatch": 8, "epochs": 2}})
    train(method, ENV, out=tmp_path / "run", num_checkpoints=2, eval_episodes=0, progress=False)
    rows = Metrics(tmp_path / "run").read()
    assert len(rows) == 4
    for row in rows:
        told = row["reward_histogram"]
        assert sum(told["counts"]) == 16 and 0.0 <= told["low"] <= row["return"] <= told["high"] <= 1.0
        assert {"kl_ref", "clip_fraction", "length", "entropy", "approx_kl"} <= row.keys()
        assert 0.0 < row["entropy"] < math.log(15) and 1.0 <= row["length"] <= 4.0
    files = sorted(p.name for p in (tmp_path / "run" / "samples").iterdir())
    assert files == ["000002.jsonl", "000004.jsonl"]
    texts = [json.loads(line) for line in (tmp_path / "run" / "samples" / files[0]).read_text().splitlines()]
    assert len(texts) == 8
    for text in texts:
        a, b = text["prompt"].rstrip("=").split("+")
        assert text["reward"] == float(text["completion"] == str(int(a) + int(b)))
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    assert [e.step for e in events.Histograms("reward")] == [16, 32, 48, 64]
    assert "samples/text_summary" in events.Tags()["tensors"] and "entropy" in events.Tags()["scalars"]


def test_entropy_of_samples_is_that_of_the_distributions():
    """The mean of -log pi over many drawn tokens against the entropies of the distributions that they were drawn from."""
    from markovia.agents.language import LanguageAgent
    from markovia.algos.collect import SequenceCollector
    from markovia.algos.on_policy.driver import OnPolicyDriver
    from markovia.envs.text.tasks import arithmetic

    driver = OnPolicyDriver(
        override(configure("rloo", ENV), {"num_envs": 512}), LanguageAgent.from_name("arithmetic"), SequenceCollector(arithmetic(group_size=4), 512)
    )
    rollout = driver.collector.collect(driver.agent, driver.generator("action"))
    with torch.no_grad():
        exact = driver.agent.evaluate(rollout, ("entropy",)).entropy[rollout.mask].mean()
    driver.advantages(rollout, driver.prepare(rollout))
    assert driver.describe(rollout)["entropy"] == pytest.approx(float(exact), rel=0.15)
