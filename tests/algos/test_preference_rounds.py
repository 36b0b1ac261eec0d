"""The preference loop over time: resume to the bit, and rounds of samples."""

import json

import pytest
import torch
from preference_pieces import LORA, ROWS, load, make, method_of, pairs, parameters

from markovia.agents.language import LanguageAgent
from markovia.algos.preference.anchors import FromPolicy, Sync
from markovia.algos.preference.data import make_batch, prepare
from markovia.algos.preference.driver import PreferenceDriver
from markovia.algos.preference.method import Preference
from markovia.algos.preference.mixture import mixture
from markovia.algos.preference.sources import FileItems, JudgedSamples, OwnSamples, win_rates
from markovia.algos.presets import override
from markovia.envs.text.tasks import arithmetic


@pytest.mark.parametrize(
    ("row", "options"),
    [("dpo", LORA), ("tr-dpo", LORA)],
    ids=str,
)
def test_n_plus_n_steps_of_adapters_are_2n_to_the_bit(tmp_path, row, options):
    """Whole models: trust/test_resume.py."""
    changes = {"num_env_steps": 24, "num_envs": 4} | ({"reference": Sync(0.5, 1)} if row == "tr-dpo" else {})

    def fresh():
        torch.manual_seed(0)  # adapters begin at random
        return make(method_of(row, **changes), load(tmp_path, pairs()), seed=5, **options)

    whole, half = fresh(), fresh()
    stats = [whole.step() for _ in range(6)]
    for _ in range(3):
        half.step()
    tensors, meta = half.state()
    tensors, meta = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(meta))
    resumed = fresh()
    resumed.load_state(tensors, meta)
    resumed.boundary()
    assert [resumed.step() for _ in range(3)] == stats[3:]
    assert whole.finished and resumed.finished
    one, two = whole.state(), resumed.state()
    assert one[1] == two[1] and one[0].keys() == two[0].keys()
    assert [k for k in one[0] if not torch.equal(one[0][k], two[0][k])] == []


# -- rounds of samples ---------------------------------------------------------------------------------------------------------------------


def test_win_rates():
    # s(2) = 0.880797 against each of the two others; each 1 has (1 - 0.880797 + 0.5) / 2 = 0.309601.
    assert win_rates(torch.tensor([[3.0, 1.0, 1.0]])).tolist() == [pytest.approx([0.880797, 0.309601, 0.309601], abs=1e-6)]
    assert win_rates(torch.tensor([[3.0, 1.0, 1.0]]), itself=True).tolist() == [pytest.approx([0.753865, 0.373068, 0.373068], abs=1e-6)]


def noisy(prompts, completions, **columns):
    """Prefers answers that begin with a small digit, so that samples of a trained model still differ."""
    return [float(9 - int(c[0])) if c[:1].isdigit() else -5.0 for c in completions]


def sampled(row, **changes):
    method = method_of(row, **{"num_envs": 4, "num_env_steps": 12, **changes})
    task = arithmetic()
    task.rewards, task.solved = [noisy], None
    agent = LanguageAgent.from_name("arithmetic", temperature=3.0, packed=True)
    return PreferenceDriver(method, agent, JudgedSamples(task, method), seed=0)


def beside(folder, row, **changes):
    """A driver of a method that sets its samples beside the pairs of a file."""
    method, data = method_of(row, **changes), load(folder, pairs())
    prepare(method, data)
    agent = LanguageAgent.from_name("arithmetic", temperature=3.0, packed=True)
    return PreferenceDriver(method, agent, OwnSamples(data.items, "pairs"), seed=0)


SAMPLED = ["ipo/online", "rebel", "irepo", "sppo", "sppo/hard", "inpo", "nash-mp", "brain", "ipo/ipo-md", "ipo/nash-md", "vpo/online"]


@pytest.mark.parametrize("row", SAMPLED)
def test_rounds_of_judged_samples(row):
    driver = sampled(row)
    stats = driver.step()
    assert stats["num_env_steps"] == 4.0 and "return" in stats and all(v == v for v in stats.values())
    assert stats["loss"] == stats["loss"]


@pytest.mark.parametrize(
    ("row", "near"),
    [
        ("rebel", {"margin": {"c": 1e-3}}), ("irepo", {"beta": 1e3}), ("sppo", {"point": {"eta": 1e-3}}), ("sppo/hard", {"point": {"eta": 1e-3}}),
        ("inpo", {"link": {"tau": 1e3}}),
    ],
)  # fmt: skip
def test_later_steps_of_a_round_feel_the_sampler(row, near):
    """One step of Adam has the length of its learning rate, wherever the target lies; those after it stop at a near one."""

    def moved(epochs, loss):
        value = method_of(row)
        driver = sampled(row, loss=override(value.loss, loss), solver=override(value.solver, {"epochs": epochs}))
        before = parameters(driver)
        driver.step()
        return float((parameters(driver) - before).norm())

    several = method_of(row).solver.epochs
    assert moved(several, near) < 0.95 * moved(several, {})
    assert moved(1, near) == pytest.approx(moved(1, {}), rel=0.01)


def test_a_target_follows_the_policy_at_its_rate_and_its_price_is_felt_once_it_lags():
    found = []
    for price in (0.5, 500.0):
        loss = override(method_of("nash-mp").loss, {"price": [["ref", 0.1], ["target", price]]})
        driver = sampled("nash-mp", loss=loss, target=Sync(0.25, 1))
        expected = parameters(driver)
        for _ in range(3):
            driver.step()
            found.append(parameters(driver))
            expected += 0.25 * (found[-1] - expected)
        torch.testing.assert_close(torch.cat([p.flatten() for p in driver.followers]), expected)
    assert torch.allclose(found[0], found[3], atol=1e-6) and not torch.allclose(found[1], found[4], atol=1e-4)
    with pytest.raises(ValueError, match="the loss reads an anchor 'target', and target is None"):
        method_of("nash-mp", target=None)
    with pytest.raises(ValueError, match="the loss reads no anchor 'target', and target is Sync"):
        method_of("rebel", target=Sync())


def test_pairs_of_a_round_are_best_and_worst_with_the_samplers_log_probs():
    driver = sampled("rebel")
    items, found = driver.source.draw(driver.agent, None, 0, 8, 0, torch.Generator().manual_seed(0))
    assert items and 0.0 <= found["tied"] < 1.0
    batch = make_batch(items, "pairs", driver.method.needs, 0)
    text = [driver.agent.tokenizer.decode(r) for i in items for r in i.responses]
    assert torch.tensor(noisy(None, text)).tolist() == [s for i in items for s in i.score]
    assert all(i.score[0] > i.score[1] and i.values["q"] == pytest.approx(1 / (1 + 2.718281828 ** (i.score[1] - i.score[0]))) for i in items)
    logp = driver.agent.evaluate(batch.record, ["logp"]).logp
    assert torch.allclose(logp, batch.logps["old"], atol=1e-5)


@pytest.mark.parametrize("row", ["rebel", "nash-mp"])
def test_rounds_resume_to_the_bit(row):
    whole, half, resumed = (sampled(row) for _ in range(3))
    stats = [whole.step() for _ in range(3)]
    half.step()
    tensors, meta = half.state()
    resumed.load_state({k: v.clone() for k, v in tensors.items()}, meta)
    assert [resumed.step() for _ in range(2)] == stats[1:]


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_a_mixture_samples_the_normalised_product(options):
    agent = LanguageAgent.from_name("arithmetic", temperature=2.0, **options)
    reference = agent.reference()
    with torch.no_grad():
        for i, p in enumerate(agent.parameters("policy")):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    starts = arithmetic().starts(8, torch.Generator().manual_seed(0), group_size=2)

    def generated(who):
        return who.generate(starts, torch.Generator().manual_seed(1))

    for mix, same in ((0.0, agent), (1.0, reference)):
        assert torch.equal(generated(mixture(agent, reference, mix)).action, generated(same).action)
    rollout = generated(mixture(agent, reference, 0.3))
    p, q = (who.evaluate(rollout, ["dist"]).dist.logits.detach() for who in (agent, reference))
    logp = torch.log_softmax(0.7 * p + 0.3 * q, -1).gather(-1, rollout.action[..., None])[..., 0]
    assert torch.allclose(logp * rollout.valid, rollout.logp_old, atol=1e-4)


def test_a_duel_is_won_by_the_policys_own_response():
    driver = sampled("ipo/nash-md")
    items, found = driver.source.draw(driver.agent, driver.reference, 0, 6, 0, torch.Generator().manual_seed(0))
    assert len(items) == 6 and all(len(i.responses) == len(i.score) == 1 and 0.0 < i.score[0] < 1.0 for i in items)
    assert found["win_rate"] == pytest.approx(sum(i.score[0] for i in items) / 6)


def test_own_samples_stand_beside_the_pairs_of_a_file(tmp_path):
    driver = beside(tmp_path, "spac", solver=override(method_of("spac").solver, {"epochs": 1}))
    items, _ = driver.source.draw(driver.agent, None, 0, 4, 0, torch.Generator().manual_seed(0))
    assert all(len(i.responses) == 3 and len(i.logps["old"]) == 3 for i in items) and all(len(i.responses) == 2 for i in driver.source.items)
    batch = make_batch(items, "pairs", driver.method.needs, 0)
    assert batch.views.gold.tolist() == [2, 5, 8, 11]
    assert torch.allclose(driver.agent.evaluate(batch.record, ["logp"]).logp, batch.logps["old"], atol=1e-5)
    # All log-ratios are 0 at a round's first step: coef log 2 = 10 log 2, the terms vanish. Those after it fall.
    assert driver.step()["loss"] == pytest.approx(6.93147, abs=1e-3) == driver.step()["loss"]
    assert beside(tmp_path, "spac").step()["loss"] < 6.9


@pytest.mark.parametrize("row", ["rebel", "spac"])
def test_samples_of_another_law_than_the_policys_are_refused(tmp_path, row):
    """Log-probs over a nucleus or the tokens that a task allows are not those of the whole vocabulary, which the ratio would be taken to."""
    agent, task = LanguageAgent.from_name("arithmetic", top_p=0.9), arithmetic()
    source = OwnSamples(load(tmp_path, pairs()).items, "pairs") if row == "spac" else JudgedSamples(task, method_of(row))
    with pytest.raises(ValueError, match=r"top_p is 0\.9"):
        PreferenceDriver(method_of(row), agent, source)
    PreferenceDriver(method_of("dpo"), agent, FileItems(load(tmp_path, pairs()).items, "pairs"))  # nothing is sampled
    task.allowed = lambda prompt, response: response
    with pytest.raises(ValueError, match="task allows some tokens only"):
        PreferenceDriver(method_of("rebel"), LanguageAgent.from_name("arithmetic"), JudgedSamples(task, method_of("rebel")))


@pytest.mark.parametrize(
    ("row", "loss", "kind"),
    [
        ("nash-mp", {}, "lists"), ("nash-mp", {"baseline": "half"}, "lists"), ("ipo/nash-md", {}, "single"), ("sppo", {}, "pairs"),
        ("sppo", {"view": "unpaired"}, "lists"), ("sppo/hard", {"view": "unpaired"}, "pairs"), ("sppo/hard", {}, "pairs"), ("brain", {}, "lists"),
    ],
)  # fmt: skip
def test_what_a_round_makes_of_its_samples(row, loss, kind):
    """All responses where each is scored by itself, best and worst where the loss is about pairs or labels."""
    driver = sampled(row, loss=override(method_of(row).loss, loss))
    assert driver.source.kind == kind
    items, _ = driver.source.draw(driver.agent, driver.reference, 0, 4, 0, torch.Generator().manual_seed(0))
    drawn = {"pairs": 2, "single": 1}.get(kind) or driver.method.sampler.per_prompt
    assert items and all(len(i.responses) == len(i.score) == drawn for i in items)
    stats = driver.step()
    assert stats["loss"] == stats["loss"]


def test_rounds_alone_have_no_pairs_of_a_file():
    for row in ("dpo", "spac"):
        with pytest.raises(ValueError, match="learns from pairs of a file"):
            JudgedSamples(arithmetic(), ROWS[row].value)
    with pytest.raises(ValueError, match="say how many items"):
        method = Preference(sampler=FromPolicy(2))
        PreferenceDriver(method, LanguageAgent.from_name("arithmetic"), JudgedSamples(arithmetic(), method))
