"""The preference loop on the shipped arithmetic model: data to batches, every row, anchors, resume, rounds of samples."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from markovia.agents.language import LanguageAgent
from markovia.algos.preference import driver as driver_module
from markovia.algos.preference.anchors import EachRound, Extrapolated, FromPolicy, Sync
from markovia.algos.preference.data import check_needs, make_batch, prepare, with_logps
from markovia.algos.preference.driver import PreferenceDriver, moving_reference
from markovia.algos.preference.evaluation import HeldOut
from markovia.algos.preference.method import Preference
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.mixture import mixture
from markovia.algos.preference.sources import FileItems, JudgedSamples, OwnSamples, win_rates
from markovia.algos.presets import override
from markovia.algos.systems import Method
from markovia.envs.text.preferences import DataOptions, load_preferences
from markovia.envs.text.tasks import arithmetic
from markovia.settings import from_json, to_json

torch.set_num_threads(1)
ROWS = {i: r for i, r in PREFERENCE.items() if isinstance(r.value, Preference)}
LORA = {"lora": {"r": 2}}
SUMS = [(3 * i % 10, 7 * i % 10) for i in range(12)]


def write(folder, rows):
    path = folder / "prefs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def pairs(**columns):
    return [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1 + i % 3), **columns} for i, (a, b) in enumerate(SUMS)]


def load(folder, rows, **options):
    return load_preferences(write(folder, rows), LanguageAgent.from_name("arithmetic").tokenizer, DataOptions(**options))


def make(method, data, seed=0, agent=None, **options):
    agent = agent or LanguageAgent.from_name("arithmetic", packed=True, value_head="value" in method.needs, **options)
    prepare(method, data)
    return PreferenceDriver(method, agent, FileItems(data.items, data.kind), seed)


def method_of(row, **changes):
    value = dataclasses.replace(ROWS[row].value, **{"num_env_steps": 12, "num_envs": 4, **changes})
    return dataclasses.replace(value, solver=dataclasses.replace(value.solver, lr=1e-3))


# -- batches -------------------------------------------------------------------------------------------------------------------------------


def test_rows_and_views_of_a_pair_with_gold(tmp_path):
    data = load(tmp_path, pairs(gold="1", q=0.75, margin=2, weight=3, score_chosen=1, score_rejected=0)[:2])
    needs = ("pairs", "gold", "q", "margin", "score", "label", "diff", "keep")
    batch = make_batch(data.items, "pairs", needs, 0, generator=torch.Generator().manual_seed(0))
    v = batch.views
    assert batch.record.shape[0] == 6 and v.pairs.tolist() == [[0, 1], [3, 4]] and v.gold.tolist() == [2, 5]
    assert v.q.tolist() == [0.75] * 2 and v.margin.tolist() == [2.0] * 2 and v.weight.tolist() == [3.0] * 2
    assert v.score.tolist() == [1.0, 0.0, 0.0] * 2 and v.label.tolist() == [True, False, False] * 2
    assert not (v.diff & ~batch.record.mask).any() and not (v.keep & ~batch.record.mask).any()
    # 0+0=: chosen "0", rejected "1"; EOS is the same in both.
    assert v.diff[0].tolist()[:2] == [True, False]
    assert batch.record.action[batch.record.valid].tolist().count(2) == 6  # every response ends in EOS, which is in the mask
    # Without need of gold its row is not made.
    assert make_batch(data.items, "pairs", ("pairs",), 0).record.shape[0] == 4


def test_rows_and_views_of_lists_single_responses_and_demonstrations(tmp_path):
    rows = [{"prompt": "1+1=", "completions": ["2", "3", "4"], "scores": [1, 0, 2]}, {"prompt": "2+1=", "completions": ["3", "5"], "scores": [1, 0]}]
    data = load(tmp_path, rows)
    assert make_batch(data.items, "lists", ("groups", "score"), 0).views.groups.tolist() == [[0, 1, 2], [3, 4, -1]]
    text = LanguageAgent.from_name("arithmetic").tokenizer
    best = make_batch(data.items, "lists", ("pairs",), 0)
    assert best.views.pairs.tolist() == [[0, 1], [2, 3]] and [text.decode(r[:1]) for r in best.record.action.tolist()] == ["4", "3", "3", "5"]
    demos = make_batch(data.items, "lists", ("unpaired",), 0)
    assert demos.views.unpaired.tolist() == [0, 1] and [text.decode(r[:1]) for r in demos.record.action.tolist()] == ["4", "3"]
    data = load(tmp_path, [{"prompt": "1+1=", "completion": c, "label": c == "2", "weight": 2} for c in "23"])
    batch = make_batch(data.items, "single", ("unpaired", "label"), 0)
    assert batch.views.label.tolist() == [True, False] and batch.views.weight.tolist() == [2.0, 2.0]
    data = load(tmp_path, pairs(weight=2)[:2])
    batch = make_batch(data.items, "pairs", ("unpaired", "label"), 0)  # pairs taken apart: both rows carry the weight
    v = batch.views
    assert v.unpaired.tolist() == [0, 1, 2, 3] and v.label.tolist() == [True, False] * 2 and v.weight.tolist() == [2.0] * 4
    assert make_batch(data.items, "pairs", ("unpaired",), 0).record.shape[0] == 2  # demonstrations: the chosen ones


def test_rows_and_views_of_crossed_prompts(tmp_path):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "31", "other_prompt": "30+1=", "weight": w} for w in (2.0, 3.0)]
    data = load(tmp_path, rows)
    assert "crossed" in data.columns and data.items[0].other.responses == data.items[0].responses[::-1]
    batch = make_batch(data.items, "pairs", ROWS["iopo"].value.needs, 0)
    text = LanguageAgent.from_name("arithmetic").tokenizer
    columns = zip(*batch.record.obs.values(), batch.record.action, batch.record.valid, strict=True)
    whole = [text.decode([*p[m].tolist(), *a[v].tolist()[:-1]]) for p, m, a, v in columns]
    assert whole == ["1+1=2", "1+1=31", "30+1=31", "30+1=2"] * 2
    # y1|x1, y2|x2, y2|x1, y1|x2; the pairs within each prompt are for the log
    v = batch.views
    assert v.groups.tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]] and v.weight.tolist() == [2.0, 3.0]
    assert v.pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert make_batch(data.items, "pairs", ("pairs",), 0).record.shape[0] == 4  # other methods leave the second prompt alone
    bad = load(tmp_path, [*rows, {**rows[0], "other_prompt": "1+1="}])
    assert bad.report.dropped == {"other_prompt without a prompt, or equal to it": [3]}


def test_every_pass_sees_every_item_once_whatever_the_batches(tmp_path):
    source = FileItems(load(tmp_path, pairs()).items, "pairs")
    whole = [i.line for i in source.take(0, 36, seed=3)]
    assert all(sorted(whole[k : k + 12]) == list(range(1, 13)) for k in (0, 12, 24)) and whole[:12] != whole[12:24]
    parts = [i.line for start in range(0, 35, 7) for i in source.take(start, 7, seed=3)]
    assert parts == whole[:35]


@pytest.mark.parametrize(
    ("row", "rows", "message"),
    [
        ("dpo", [{"prompt": "1+1=", "completion": "2"}], "the method reads pairs .* add the columns chosen and rejected"),
        ("mmpo", pairs(), "reads score .* add the columns score_chosen and score_rejected"),
        ("nca", pairs(), "reads groups .* add the columns score_chosen and score_rejected"),
        ("tpo", pairs(), "reads gold .* add the column gold"),
        ("ipo/online", pairs(), "reads q .* add the column q"),
        ("dro", [{"prompt": "1+1=", "completion": "2"}], "reads score .* add the column score"),
        ("kto", [{"prompt": "1+1=", "completion": "2"}], "reads label .* add the column label"),
        ("brain", [{"prompt": "1+1=", "completions": ["2", "3"], "scores": [1, 0]}], "add the column proposal_logps"),
        ("spo-seq", pairs(), "add the columns stage1_chosen_logps and stage1_rejected_logps"),
        ("iopo", pairs(), "add the column other_prompt"),
    ],
)
def test_a_missing_column_is_named(tmp_path, row, rows, message):
    with pytest.raises(ValueError, match=message):
        check_needs(ROWS[row].value, load(tmp_path, rows))


def test_lists_without_a_best_response_are_counted(tmp_path):
    ranked = [{"prompt": "1+1=", "completions": ["2", "3"], "scores": s} for s in ([1, 0], [1, 1])]
    data = load(tmp_path, ranked)
    prepare(ROWS["dpo"].value, data)
    assert len(data.items) == 1 and data.report.dropped == {"all scores are equal": [2]} and data.report.kept == 1
    with pytest.raises(ValueError, match="no list has a best and a worst"):
        prepare(ROWS["dpo"].value, load(tmp_path, ranked[1:]))


# -- the loop ------------------------------------------------------------------------------------------------------------------------------

STORED = {f"{a}_{side}_logps" for a in ("old", "proposal", "stage0", "stage1") for side in ("chosen", "rejected", "gold")}


def rich(folder):
    """Pairs with every column that a row may ask for."""
    rows = pairs(q=0.8, margin=0.5, weight=1.0, score_chosen=0.9, score_rejected=0.1, gold="1")
    for r in rows:
        r |= {name: [-0.5] * (len(r[name.split("_")[1]]) + 1) for name in STORED}
    return load(folder, rows)


@pytest.mark.parametrize("row", sorted(set(ROWS) - {"iopo", "modpo"}))
def test_every_row_trains_on_a_file_with_its_columns(tmp_path, row):
    data = rich(tmp_path)
    if row.startswith("aot"):
        for item in data.items:
            del item.values["weight"]  # sorted samples have no weights
    driver = make(method_of(row), data)
    before = [p.detach().clone() for p in driver.trained]
    stats = driver.step()
    assert all(torch.isfinite(torch.tensor(v)) for v in stats.values()) and stats["num_env_steps"] == 4.0
    assert stats["grad_norm"] > 0.0 and any(not torch.equal(p, q) for p, q in zip(driver.trained, before, strict=True))


@pytest.mark.parametrize("stored", [False, True], ids=["reference", "stored"])
def test_iopo_reads_two_prompts_from_a_file(tmp_path, stored):
    rows = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a + 3), "other_prompt": f"{a}+3="} for a in range(4)]
    driver = make(method_of("iopo", stored_reference=stored), load(tmp_path, rows))
    first, second = driver.step(), driver.step()
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and second["loss"] < first["loss"]
    # Both prompts' pairs move apart, and the loss of all four is that of the sum of the two margins.
    assert second["margin"] > 0.0 and first["length_chosen"] == 2.0


def test_modpo_reads_rewards_per_dimension(tmp_path):
    driver = make(method_of("modpo"), load(tmp_path, pairs(score_chosen=[1.0, 0.5], score_rejected=[0.0, 0.0])))
    # At the start D = 0: z = -(0.5 * 0.5) / 0.5 = -0.5, loss = log(1 + e^0.5) = 0.974077
    assert driver.step()["loss"] == pytest.approx(0.974077, abs=1e-5)


def test_the_first_loss_is_log_2_and_the_next_is_an_independent_formula(tmp_path):
    data = load(tmp_path, pairs())
    driver = make(method_of("dpo", num_envs=12, num_env_steps=24), data)
    base = copy.deepcopy(driver.agent.net["policy"])
    first = driver.step()
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["log_ratio_chosen"] == pytest.approx(0.0, abs=1e-5)

    def logp(model, item, k):  # one row at a time, no mask, no packing
        ids = torch.tensor([item.prompt + item.responses[k]])
        table = F.log_softmax(model(ids).logits[0], -1)
        return sum(table[len(item.prompt) - 1 + t, y] for t, y in enumerate(item.responses[k]))

    with torch.no_grad():
        policy, ratios = driver.agent.net["policy"], []
        for item in data.items:
            ratios.append([float(logp(policy, item, k) - logp(base, item, k)) for k in (0, 1)])
    ratio = torch.tensor(ratios)
    # Exact KL of the next token at the response positions, row by row.
    item, total = data.items[0], 0.0
    for y in item.responses[:2]:
        ids, at = torch.tensor([item.prompt + y]), slice(len(item.prompt) - 1, len(item.prompt) + len(y) - 1)
        with torch.no_grad():
            p, q = (F.log_softmax(m(ids).logits[0, at], -1) for m in (policy, base))
        total += float((p.exp() * (p - q)).sum())
    assert driver.spread(item)["kl_ref"] == pytest.approx(total / sum(map(len, item.responses)), rel=1e-3)
    second = driver.step()
    assert first["kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert second["loss"] == pytest.approx(float(F.softplus(-0.1 * (ratio[:, 0] - ratio[:, 1])).mean()), abs=1e-5)
    assert second["log_ratio_chosen"] == pytest.approx(float(ratio[:, 0].mean()), abs=1e-4)
    assert second["accuracy"] == pytest.approx(float((ratio[:, 0] > ratio[:, 1]).float().mean()))
    assert second["length_chosen"] == pytest.approx(sum(len(i.responses[0]) for i in data.items) / 12)


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_dpo_learns_wrong_sums(tmp_path, options):
    """Pairs that prefer the wrong answer turn the model's ranking."""
    wrong = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in pairs()]
    driver = make(method_of("dpo", num_envs=12, num_env_steps=12 * 30), load(tmp_path, wrong), **options)
    held = HeldOut(driver.agent, driver.source.items, "pairs")
    first = driver.step()
    while not driver.finished:
        last = driver.step()
    assert last["accuracy"] == 1.0 and last["loss"] < 0.6 * first["loss"]
    found = held(driver.agent)
    assert sum(found["returns"]) == 12 and found["ranking_accuracy_before"] < found["ranking_accuracy"]
    assert found["log_ratio_chosen"] > found["log_ratio_rejected"] and 0.0 < found["top10_mass"] <= 1.0 + 1e-5
    assert ("kl_ref" in found) == ("lora" in options) and found.get("kl_ref", 1.0) > 0.0


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_stored_log_probs_are_the_references_own(tmp_path, options):
    runs = []
    for stored in (False, True):
        torch.manual_seed(0)
        driver = make(method_of("dpo", stored_reference=stored), load(tmp_path, pairs()), **options)
        assert (driver.reference is None) == stored
        runs.append([driver.step() for _ in range(3)])
    for run in runs:
        run[0].pop("accuracy")  # where policy and reference are equal rounding orders the pairs
    assert runs[0][0].pop("kl_ref") == pytest.approx(0.0, abs=1e-6) and "kl_ref" not in runs[1][0]  # the anchor itself is not there any more
    for a, b in zip(*runs, strict=True):
        assert a == pytest.approx(b, abs=5e-4)


def test_log_probs_of_a_file_serve_as_reference(tmp_path):
    agent = LanguageAgent.from_name("arithmetic", packed=True)
    data = load(tmp_path, pairs())
    data.items = with_logps(agent, data.items, 0)
    assert all(len(x) == len(r) for i in data.items for x, r in zip(i.logps["ref"], i.responses, strict=True))
    driver = make(method_of("dpo"), data, agent=agent)
    assert driver.reference is None and driver.step()["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert make(method_of("tr-dpo"), data).reference is not None  # a moving anchor is computed anew
    for row, message in (("kto", "reads .'mismatched'. under the anchor"), ("tdpo", "reads .'kl_ref'. under the anchor")):
        with pytest.raises(ValueError, match=message):
            make(method_of(row, stored_reference=True), load(tmp_path, pairs()))


def test_token_weights_of_a_file_enter_the_score(tmp_path):
    """Weight 0 everywhere but at EOS of the chosen response: its log-ratio is all that moves the loss."""
    rows = [{**r, "chosen_weights": [0.0] * len(r["chosen"]) + [1.0], "rejected_weights": [0.0] * (len(r["rejected"]) + 1)} for r in pairs()]
    data = load(tmp_path, rows)
    with pytest.raises(ValueError, match="add the columns chosen_weights and rejected_weights"):
        check_needs(override(method_of("dpo"), {"loss": {"diff": {"score": {"tokens": "weighted"}}}}), load(tmp_path, pairs()))
    driver = make(override(method_of("dpo"), {"loss": {"diff": {"score": {"tokens": "weighted"}}}}), data)
    driver.step()
    batch = make_batch(data.items, "pairs", driver.method.needs, 0)
    scores = driver.scores(batch)
    last = [len(i.responses[0]) - 1 for i in data.items]
    ratio = (scores.logp - scores.logp_ref["ref"]).detach()[batch.views.pairs[:, 0], last]
    assert torch.allclose(driver.method(scores, batch.views), F.softplus(-0.1 * ratio), atol=1e-6)


def test_the_learning_rate_warms_up(tmp_path):
    method = method_of("dpo")
    driver = make(dataclasses.replace(method, solver=dataclasses.replace(method.solver, warmup=2)), load(tmp_path, pairs()))
    rates = []
    for _ in range(3):
        driver.step()
        rates.append(float(driver.optimizer.groups[0].lr))
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3])


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path):
    found = []
    for micro in (None, 3, 1):
        method = method_of("dpo", num_envs=8, num_env_steps=8)
        driver = make(dataclasses.replace(method, solver=dataclasses.replace(method.solver, micro=micro, optimizer="sgd")), load(tmp_path, pairs()))
        driver.step()
        found.append(driver.optimizer.flat.clone())
    assert (found[0] - found[1]).abs().max() < 1e-6 and (found[0] - found[2]).abs().max() < 1e-6


def test_kto_needs_another_prompt(tmp_path):
    with pytest.raises(ValueError, match="no mismatched responses"):
        make(method_of("kto", num_envs=1), load(tmp_path, pairs())).step()


# -- anchors -------------------------------------------------------------------------------------------------------------------------------


def test_a_moving_anchor_of_adapters_shares_the_base():
    agent = LanguageAgent.from_name("arithmetic", lora={"r": 2})
    anchor = moving_reference(agent)
    for p, q in zip(agent.net.parameters(), anchor.net.parameters(), strict=True):
        assert (p is q) == (not p.requires_grad) and not (q.requires_grad and p.requires_grad)


def parameters(driver):
    return torch.cat([p.detach().flatten() for p in driver.trained])


def anchor(driver):
    return torch.cat([p.flatten() for p in driver.moved])


def test_soft_hard_and_round_wise_anchors(tmp_path):
    data, options = load(tmp_path, pairs()), LORA
    soft = make(method_of("tr-dpo", reference=Sync(0.25, 2)), data, **options)
    start = parameters(soft)
    soft.step()
    assert torch.equal(anchor(soft), start)
    soft.step()
    assert torch.allclose(anchor(soft), 0.75 * start + 0.25 * parameters(soft), atol=1e-7)

    rounds = make(method_of("sdpo-stepwise", reference=EachRound(), rounds=3), data, **options)
    for _ in range(2):
        rounds.step()  # a third of the run each
        assert torch.equal(anchor(rounds), parameters(rounds))

    faster = make(method_of("apo-accelerated", reference=Extrapolated(0.5), rounds=3), data, **options)
    start = parameters(faster)
    spied = []
    original, driver_module.extrapolate = driver_module.extrapolate, lambda new, previous, momentum: spied.append(new) or original(
        new, previous, momentum=momentum
    )
    try:
        faster.step()
    finally:
        driver_module.extrapolate = original
    fitted = torch.cat([p.flatten() for p in spied])
    assert torch.allclose(parameters(faster), 1.5 * fitted - 0.5 * start, atol=1e-6) and torch.equal(anchor(faster), parameters(faster))
    assert torch.equal(torch.cat([p.flatten() for p in faster.fitted]), fitted)


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="log-probs of a Sync anchor can't be stored"):
        Preference(reference=Sync(), stored_reference=True)
    with pytest.raises(ValueError, match=r"leave solver.kl_stop_nats and solver.recompute_advantage alone"):
        method_of("dpo", solver=dataclasses.replace(Preference().solver, kl_stop_nats=0.1))
    with pytest.raises(ValueError, match="num_envs must be >= 1"):
        Preference(num_envs=0)


# -- resume --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "options"),
    [("dpo", {}), ("dpo", LORA), ("tr-dpo", LORA), ("sdpo-stepwise", {}), ("apo-accelerated", {}), ("kto", {}), ("sam-po", {}), ("dro", {})],
    ids=str,
)
@pytest.mark.check("resume")
def test_n_plus_n_steps_are_2n_to_the_bit(tmp_path, row, options):
    changes = {"num_env_steps": 24, "num_envs": 4} | ({"reference": Sync(0.5, 1)} if row == "tr-dpo" else {})
    columns = {"score_chosen": 1, "score_rejected": 0} if row == "dro" else {}

    def fresh():
        torch.manual_seed(0)  # adapters begin at random
        return make(method_of(row, **changes), load(tmp_path, pairs(**columns)), seed=5, **options)

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


def test_settings_survive_json():
    for row in ROWS.values():
        assert from_json(Method, json.loads(json.dumps(to_json(row.value)))) == row.value


# -- rounds of samples ---------------------------------------------------------------------------------------------------------------------


def test_win_rates():
    # s(2) = 0.880797 against each of the two others; each 1 has (1 - 0.880797 + 0.5) / 2 = 0.309601.
    assert win_rates(torch.tensor([[3.0, 1.0, 1.0]])).tolist() == [pytest.approx([0.880797, 0.309601, 0.309601], abs=1e-6)]


def noisy(prompts, completions, **columns):
    """Prefers answers that begin with a small digit, so that samples of a trained model still differ."""
    return [float(9 - int(c[0])) if c[:1].isdigit() else -5.0 for c in completions]


def sampled(row, **changes):
    method = method_of(row, **{"num_envs": 4, "num_env_steps": 12, **changes})
    task = arithmetic()
    task.rewards, task.solved = [noisy], None
    agent = LanguageAgent.from_name("arithmetic", temperature=3.0, packed=True)
    return PreferenceDriver(method, agent, JudgedSamples(task, method), seed=0)


SAMPLED = ["ipo/online", "rebel", "irepo", "sppo", "sppo/hard", "inpo", "nash-mp", "brain", "ipo/ipo-md", "ipo/nash-md", "vpo/online"]


@pytest.mark.parametrize("row", SAMPLED)
def test_rounds_of_judged_samples(row):
    driver = sampled(row)
    stats = driver.step()
    assert stats["num_env_steps"] == 4.0 and "return" in stats and all(v == v for v in stats.values())
    assert stats["loss"] == stats["loss"]


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


def test_rounds_resume_to_the_bit():
    whole, half, resumed = (sampled("rebel") for _ in range(3))
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
    data, method = load(tmp_path, pairs()), method_of("spac")
    prepare(method, data)
    agent = LanguageAgent.from_name("arithmetic", temperature=3.0, packed=True)
    driver = PreferenceDriver(method, agent, OwnSamples(data.items, "pairs"), 0)
    items, _ = driver.source.draw(agent, None, 0, 4, 0, torch.Generator().manual_seed(0))
    assert all(len(i.responses) == 3 and len(i.logps["old"]) == 3 for i in items) and all(len(i.responses) == 2 for i in data.items)
    batch = make_batch(items, "pairs", method.needs, 0)
    assert batch.views.gold.tolist() == [2, 5, 8, 11]
    assert torch.allclose(agent.evaluate(batch.record, ["logp"]).logp, batch.logps["old"], atol=1e-5)
    # All log-ratios are 0 at the start: coef log 2 = 10 log 2, the terms vanish.
    assert driver.step()["loss"] == pytest.approx(6.93147, abs=1e-3)


def test_rounds_alone_have_no_pairs_of_a_file():
    for row in ("dpo", "spac"):
        with pytest.raises(ValueError, match="learns from pairs of a file"):
            JudgedSamples(arithmetic(), ROWS[row].value)
    with pytest.raises(ValueError, match="say how many items"):
        method = Preference(sampler=FromPolicy(2))
        PreferenceDriver(method, LanguageAgent.from_name("arithmetic"), JudgedSamples(arithmetic(), method))


# -- evaluation ----------------------------------------------------------------------------------------------------------------------------


def test_verdicts_on_held_out_lists_and_single_responses(tmp_path):
    agent = LanguageAgent.from_name("arithmetic")
    ranked = load(tmp_path, [{"prompt": "1+1=", "completions": ["2", "5", "3"], "scores": [0, 2, 1]}])
    labelled = load(tmp_path, [{"prompt": "1+1=", "completion": c, "label": c == "5"} for c in "52"])
    demos = load(tmp_path, [{"prompt": "1+1=", "completion": "5"}])
    parts = {kind: HeldOut(agent, d.items, d.kind) for kind, d in {"lists": ranked, "labels": labelled, "demos": demos}.items()}
    start = agent.net["policy"].get_output_embeddings().weight
    with torch.no_grad():  # make the character 5 likelier, which the model holds for wrong and so can rise whatever its weights
        hidden = agent.evaluate(make_batch(demos.items, "single", ("unpaired",), 0).record, ["hidden"]).hidden[0, 0]
        start[agent.tokenizer.encode("5")[0]] += hidden / hidden.norm()
    found = {kind: held(agent) for kind, held in parts.items()}
    assert found["lists"]["returns"] == [1.0] and found["lists"]["log_ratio_chosen"] > found["lists"]["log_ratio_rejected"]
    assert found["labels"]["returns"] == [1.0, 1.0]  # 5 rose, 2 fell
    assert found["demos"]["returns"] == [found["demos"]["log_ratio"]] and found["demos"]["log_ratio"] > 0.0
