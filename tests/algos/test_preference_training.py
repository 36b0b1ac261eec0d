"""The preference loop on the shipped arithmetic model: every row, reference log-probs, anchors, evaluation."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from preference_pieces import LORA, ROWS, anchor, load, make, method_of, pairs, parameters

from markovia.agents.language import LanguageAgent
from markovia.algos.preference import driver as driver_module
from markovia.algos.preference.anchors import EachRound, Extrapolated, Sync
from markovia.algos.preference.data import check_needs, make_batch, with_logps
from markovia.algos.preference.driver import moving_reference
from markovia.algos.preference.evaluation import HeldOut
from markovia.algos.preference.method import Preference
from markovia.algos.presets import override
from markovia.algos.systems import Method
from markovia.settings import from_json, to_json

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


def test_micro_batches_of_ragged_lists_give_the_gradient_of_the_whole(tmp_path):
    """DRO has a loss per response, so a list of five counts more than one of two, however the minibatch is cut."""
    rows = [{"prompt": f"{n}+1=", "completions": [str(n + k) for k in range(n)], "scores": [k / 2 for k in range(n)]} for n in (2, 5, 3)]
    found = []
    for micro in (None, 2, 1):
        solver = dataclasses.replace(method_of("dro").solver, micro=micro, max_grad_norm=1e6)
        driver = make(method_of("dro", num_envs=3, num_env_steps=3, solver=solver), load(tmp_path, rows))
        driver.move = lambda batch, driver=driver: found.append(driver.optimizer.grad.clone()) or torch.zeros(())
        driver.step()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_kto_needs_another_prompt(tmp_path):
    with pytest.raises(ValueError, match="no mismatched responses"):
        make(method_of("kto", num_envs=1), load(tmp_path, pairs())).step()


# -- anchors -------------------------------------------------------------------------------------------------------------------------------


def test_a_moving_anchor_of_adapters_shares_the_base():
    agent = LanguageAgent.from_name("arithmetic", lora={"r": 2})
    anchor = moving_reference(agent)
    for p, q in zip(agent.net.parameters(), anchor.net.parameters(), strict=True):
        assert (p is q) == (not p.requires_grad) and not (q.requires_grad and p.requires_grad)


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


def test_settings_survive_json():
    for row in ROWS.values():
        assert from_json(Method, json.loads(json.dumps(to_json(row.value)))) == row.value


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
    tied = load(tmp_path, [{"prompt": "1+1=", "completions": ["2", "5"], "scores": s} for s in ([1, 1], [0, 2])])
    assert len(HeldOut(agent, tied.items, "lists")(agent)["returns"]) == 1  # of equal responses none is the better one
    assert found["lists"]["returns"] == [1.0] and found["lists"]["log_ratio_chosen"] > found["lists"]["log_ratio_rejected"]
    assert found["labels"]["returns"] == [1.0, 1.0]  # 5 rose, 2 fell
    assert found["demos"]["returns"] == [found["demos"]["log_ratio"]] and found["demos"]["log_ratio"] > 0.0
