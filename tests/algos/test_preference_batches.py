"""From files of preferences to batches: rows, views and passes of every form of data."""

import pytest
import torch
from preference_pieces import ROWS, load, pairs

from markovia.agents.language import LanguageAgent
from markovia.algos.preference.data import check_needs, make_batch, prepare
from markovia.algos.preference.sources import FileItems
from markovia.algos.presets import override


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


def test_demonstrations_are_the_good_responses(tmp_path):
    """A method that imitates reads no label, so responses that are labelled bad are no demonstrations."""
    labelled = [{"prompt": "1+1=", "completion": c, "label": c == "2"} for c in "235"]
    data = load(tmp_path, labelled)
    prepare(ROWS["sft-bridge"].value, data)
    assert [i.line for i in data.items] == [1] and data.report.dropped == {"labelled bad, and the method imitates": [2, 3]} and data.report.kept == 1
    kept = load(tmp_path, labelled)
    prepare(ROWS["kto"].value, kept)
    assert len(kept.items) == 3
    with pytest.raises(ValueError, match="no response is labelled good"):
        prepare(ROWS["sft-bridge"].value, load(tmp_path, labelled[1:]))


def test_lists_with_several_rewards_are_ranked_by_the_labelled_one(tmp_path):
    """MODPO's label is that of the dimension whose weight is 0: the sum has another best and another worst response."""
    ranked = [{"prompt": "1+1=", "completions": ["2", "3", "4"], "scores": [[0, 9], [1, 5], [2, 0]]}]
    data, text = load(tmp_path, ranked), LanguageAgent.from_name("arithmetic").tokenizer
    modpo = ROWS["modpo"].value
    prepare(modpo, data)
    batch = make_batch(data.items, "lists", modpo.needs, 0)
    assert [text.decode(r[:1]) for r in batch.record.action.tolist()] == ["4", "2"] and batch.views.score.tolist() == [[2.0, 0.0], [0.0, 9.0]]
    tied = load(tmp_path, [*ranked, {**ranked[0], "scores": [[1, 9], [1, 5], [1, 0]]}])
    prepare(modpo, tied)
    assert tied.report.dropped == {"all scores are equal": [2]}
    for weights, temperature in (((0.1, 0.4), 0.5), ((0.0, 0.0), 1.0)):
        several = override(modpo, {"loss": {"margin": {"weights": list(weights)}, "temperature": temperature}})
        with pytest.raises(ValueError, match="the labelled dimension is the one whose weight is 0"):
            prepare(several, load(tmp_path, ranked))
        prepare(several, load(tmp_path, pairs(score_chosen=[1, 0], score_rejected=[0, 0])))  # a pair has its label
    with pytest.raises(ValueError, match=r"margin\.weights weigh 2 rewards"):
        prepare(modpo, load(tmp_path, [{**ranked[0], "scores": [0, 1, 2]}]))


@pytest.mark.parametrize("row", ["sppo", "ipo/nash-md", "nash-mp", "lipo"])
def test_win_rates_of_a_file_are_win_rates(tmp_path, row):
    def judged(*scores):
        if row in ("nash-mp", "lipo"):
            lists = [{"prompt": "1+1=", "completions": ["2", "3"], "scores": list(s)} for s in scores]
            return load(tmp_path, [{**r, "old_logps": [[-0.5] * 2] * 2} for r in lists])
        return load(tmp_path, [{**pairs()[0], "score_chosen": a, "score_rejected": b} | OLD for a, b in scores])

    prepare(ROWS[row].value, judged((1, 0), (0.3, 0.7)))
    for bad in ((7.5, 0), (-2, 1)):
        with pytest.raises(ValueError, match=r"line 2 has the score.* the method reads win rates, .* in \[0, 1\]"):
            prepare(ROWS[row].value, judged((1, 0), bad))
    prepare(ROWS["exo"].value, judged((1, 0), (7.5, -2)))  # reads rewards


OLD = {"old_chosen_logps": [-0.5] * 2, "old_rejected_logps": [-0.5] * 2}


def test_an_anchor_that_the_method_moves_is_not_a_files(tmp_path):
    ranked = [{"prompt": "1+1=", "completions": ["2", "3"], "scores": [1, 0], "old_logps": [[-0.5] * 2] * 2, "target_logps": [[-0.5] * 2] * 2}]
    with pytest.raises(ValueError, match="the method moves its own anchor 'target'"):
        check_needs(ROWS["nash-mp"].value, load(tmp_path, ranked))
