"""Preference files: TRL's formats and the conversational form, truncation, stored log-probs, and a report that drops nothing silently."""

import gzip
import itertools
import json
import sys
import types

import pytest

from markovia.envs.text.preference_rows import BadRow, common_length, detect, implicit_prompt
from markovia.envs.text.preferences import DataOptions, load_preferences, save_logps
from markovia.envs.text.tokens import CharTokenizer

TOKENIZER = CharTokenizer("abcdefgh +=")  # pad 0, bos 1, eos 2, then a = 3, b = 4, ...
EOS = 2


def write(folder, rows, name="prefs.jsonl"):
    path = folder / name
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def load(folder, rows, **options):
    return load_preferences(write(folder, rows), TOKENIZER, DataOptions(**options))


def ids(text):
    return TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("row", "kind", "prompt", "responses"),
    [
        ({"prompt": "a+", "chosen": "b", "rejected": "cd"}, "pairs", "a+", ["b", "cd"]),
        ({"chosen": "a+ b c", "rejected": "a+ b d"}, "pairs", "a+ b", [" c", " d"]),  # implicit prompt
        ({"prompt": "a", "completions": ["b", "c", "dd"], "scores": [1, 0.5, 2]}, "lists", "a", ["b", "c", "dd"]),
        ({"prompt": "a", "completion": "b", "label": True}, "single", "a", ["b"]),
        ({"prompt": "a", "completion": "b"}, "single", "a", ["b"]),
        ({"prompt": "ab"}, "prompts", "ab", []),
    ],
    ids=["preference", "implicit", "ranked", "unpaired", "prompt-completion", "prompt-only"],
)
def test_formats(tmp_path, row, kind, prompt, responses):
    data = load(tmp_path, [row])
    assert data.kind == kind and data.report.kept == data.report.read == 1
    assert data.items[0].prompt == ids(prompt) and data.items[0].prompt_text == prompt and data.items[0].line == 1
    assert data.items[0].responses == [[*ids(r), EOS] for r in responses]


def test_language_modelling_follows_bos(tmp_path):
    (item,) = load(tmp_path, [{"text": "abc"}]).items
    assert item.prompt == [1] and item.responses == [[*ids("abc"), EOS]]


def test_columns_and_stored_log_probs(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "cd", "gold": "c", "q": 0.9, "margin": 1, "weight": 2.0, "score_chosen": 1, "score_rejected": -1}
    row |= {"old_chosen_logps": [-1.0, -2.0], "old_rejected_logps": [-1.0, -2.0, -3.0], "old_gold_logps": [-0.5, -0.25], "comment": "x"}
    data = load(tmp_path, [row])
    (item,) = data.items
    assert data.columns == {"q", "margin", "weight", "score", "gold"} and data.anchors == {"old"}
    assert item.values == {"q": 0.9, "margin": 1.0, "weight": 2.0} and item.score == [1.0, -1.0, 0.0] and len(item.responses) == 3
    assert item.logps == {"old": [[-1.0, -2.0], [-1.0, -2.0, -3.0], [-0.5, -0.25]]}
    weighted = {**GOOD, "chosen_weights": [0, 1], "rejected_weights": [0.5, 1]}
    data = load(tmp_path, [weighted, {**weighted, "chosen_weights": [1]}])
    assert data.items[0].weights == [[0.0, 1.0], [0.5, 1.0]] and data.columns == {"c"}
    assert data.report.dropped == {"token weights do not fit the tokens": [2]}
    (item,) = load(tmp_path, [{"prompt": "a", "completion": "b", "score": [1, 2], "ref_logps": [-1.0, -2.0]}]).items
    assert item.score == [[1, 2]] and item.logps == {"ref": [[-1.0, -2.0]]}
    (item,) = load(tmp_path, [{"prompt": "a", "completions": ["b", "c"], "scores": [0, 1], "ref_logps": [[-1.0, -2.0], [-3.0, -4.0]]}]).items
    assert item.logps == {"ref": [[-1.0, -2.0], [-3.0, -4.0]]}


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
PLAIN = {"prompt": "a", "completion": "b"}
RANKED = {"prompt": "a", "completions": ["b", "c"], "scores": [0, 1]}


@pytest.mark.parametrize(
    ("first", "bad", "reason"),
    [
        (GOOD, {**GOOD, "chosen": " "}, "empty response"),
        (GOOD, {**GOOD, "rejected": "b"}, "chosen equals rejected"),
        (GOOD, {**GOOD, "prompt": ""}, "empty prompt"),
        (GOOD, {**GOOD, "chosen": 3, "rejected": 4}, "chosen and rejected are not two texts or two chats"),
        (GOOD, {"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        (GOOD, "{not json", "not a JSON object"),
        (GOOD, "[1]", "not a JSON object"),
        ({"chosen": "a b", "rejected": "a c"}, {"chosen": "b", "rejected": "c"}, "no common prompt"),
        ({**GOOD, "q": 1.0}, {**GOOD, "q": 1.5}, "q is not a probability"),
        ({**GOOD, "margin": 1}, {**GOOD, "margin": "big"}, "margin is not a number"),
        ({**GOOD, "weight": 1}, {**GOOD, "weight": None}, "no column 'weight'"),
        ({**GOOD, "score_chosen": 1, "score_rejected": 0}, {**GOOD, "score_chosen": float("nan"), "score_rejected": 0}, "scores are not one number"),
        (RANKED, {**RANKED, "completions": ["b"]}, "fewer than two"),
        (RANKED, {**RANKED, "completions": ["b", "b"]}, "all responses are equal"),
        (RANKED, {**RANKED, "scores": [0]}, "scores are not one number"),
        (RANKED, {**RANKED, "scores": [[0, 1], [1, 0]]}, "another number of dimensions"),
        (RANKED, {**RANKED, "scores": [0, [1]]}, "another number of dimensions"),
        ({**RANKED, "scores": [[0, 1], [1, 0]]}, {**RANKED, "scores": [[0, 1], [1, 0, 2]]}, "another number of dimensions"),
        ({**GOOD, "score_chosen": [1], "score_rejected": [0]}, {**GOOD, "score_chosen": 1, "score_rejected": 0}, "another number of dimensions"),
        ({**PLAIN, "score": 1}, {**PLAIN, "score": []}, "another number of dimensions"),
        ({"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "b", "label": "good"}, "label is neither"),
        (
            {**GOOD, "ref_chosen_logps": [-1.0, -1.0], "ref_rejected_logps": [-1.0, -1.0]},
            {**GOOD, "ref_chosen_logps": [-1.0], "ref_rejected_logps": [-1.0, -1.0]},
            "stored log-probs do not fit the tokens",
        ),
        (
            {**GOOD, "ref_chosen_logps": [-1.0, -1.0], "ref_rejected_logps": [-1.0, -1.0]},
            {**GOOD, "ref_chosen_logps": -2.0, "ref_rejected_logps": -2.0},
            "is a sum, one number per token is needed",
        ),
    ],
)
def test_bad_rows_are_counted_with_their_lines(tmp_path, first, bad, reason):
    data = load(tmp_path, [first, bad, first, bad])
    ((found, lines),) = data.report.dropped.items()
    assert reason in found and lines == [2, 4]
    assert data.report.read == 4 and data.report.kept == 2 and [i.line for i in data.items] == [1, 3]
    assert f"2 of 4 rows used\n  dropped 2: {found} (line 2, 4)" in str(data.report)


def test_what_is_over_long_is_cut_and_keeps_its_eos_or_is_dropped(tmp_path):
    rows = [{"prompt": "abcdefgh", "chosen": "abcdefgh", "rejected": "b"}, GOOD]
    data = load(tmp_path, rows, max_length=8, max_prompt_length=5)
    assert data.items[0].prompt == ids("defgh") and data.items[0].prompt_cut and not data.items[1].prompt_cut
    assert data.items[0].responses == [[*ids("ab"), EOS], [*ids("b"), EOS]]
    assert data.report.changed == {"over-long, the prompt lost its beginning": [1], "over-long, a response was cut before its EOS": [1]}
    assert "kept 1: over-long, the prompt" in str(data.report)
    assert load(tmp_path, rows, max_length=8, max_prompt_length=5, over_long="drop").report.dropped == {"over-long": [1]}
    same = [{"prompt": "a", "chosen": "abcdefgh", "rejected": "abcdefg"}, GOOD]
    assert load(tmp_path, same, max_length=8, max_prompt_length=5).report.dropped == {"chosen equals rejected once they are cut": [1]}
    stored = {**GOOD, "ref_chosen_logps": [-1.0] * 2, "ref_rejected_logps": [-1.0] * 2}
    long = {**stored, "chosen": "abcdefgh", "ref_chosen_logps": [-1.0] * 9}
    report = load(tmp_path, [stored, long], max_length=8, max_prompt_length=5).report
    assert report.dropped == {"stored log-probs of a row that had to be cut": [2]}


def test_implicit_prompts():
    assert implicit_prompt("one two three", "one two four") == ("one two", " three", " four")
    assert implicit_prompt("one twin", "one two") == ("one", " twin", " two")  # a word is not torn apart
    assert implicit_prompt("Q: x\nA: yes sir", "Q: x\nA: yes no", "\nA:") == ("Q: x\nA:", " yes sir", " yes no")
    assert implicit_prompt([HI, YO], [HI, NO]) == ([HI], [YO], [NO])
    for chosen, rejected, end in (("twin", "two", None), ("one a", "one b", "\nA:"), ([YO], [NO], None)):
        with pytest.raises(BadRow, match="no common prompt"):
            implicit_prompt(chosen, rejected, end)
    assert common_length(["abc", "abd", "ab"]) == 2 and common_length([[1, 2], [1, 2]]) == 2


class Chat:
    """The face of a Hugging Face tokenizer with a template: <role>content| per message, where "|" is EOS."""

    eos_token_id, pad_token_id, bos_token_id, chat_template = 124, 0, None, "yes"

    def __len__(self):
        return 128

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False, continue_final_message=False):
        text = "".join(f"<{m['role'][0]}>{m['content']}|\n" for m in messages)
        return text.removesuffix("|\n") if continue_final_message else text + ("<a>" if add_generation_prompt else "")


HI, YO, NO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [HI], "chosen": [YO], "rejected": [NO]},
        {"prompt": "hi", "chosen": [YO], "rejected": [NO]},
        {"chosen": [HI, YO], "rejected": [HI, NO]},
    ],
    ids=["explicit", "prompt is a string", "implicit"],
)
def test_conversations_go_through_the_template(tmp_path, row):
    (item,) = load_preferences(write(tmp_path, [row]), Chat()).items
    assert item.prompt_text == "<u>hi|\n<a>"
    assert ["".join(map(chr, r)) for r in item.responses] == ["yo|", "no|"]  # what follows the last EOS is the next turn's


def test_gold_is_cut_by_the_implicit_prompt(tmp_path):
    data = load(tmp_path, [{"chosen": "a b", "rejected": "a c", "gold": g} for g in ("a d", "d", "c a d")])
    assert data.items[0].prompt == ids("a") and data.items[0].responses == [[*ids(r), EOS] for r in (" b", " c", " d")]
    assert data.report.dropped == {"gold does not begin with the prompt of chosen and rejected": [2, 3]}
    so = {"role": "assistant", "content": "so"}
    chats = [{"chosen": [HI, YO], "rejected": [HI, NO], "gold": g} for g in ([HI, so], [so], "so")]
    data = load_preferences(write(tmp_path, chats), Chat())
    assert ["".join(map(chr, r)) for r in data.items[0].responses] == ["yo|", "no|", "so|"]
    assert data.report.dropped == {"gold does not begin with the prompt of chosen and rejected": [2, 3]}
    (item,) = load(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c", "gold": "a d"}]).items
    assert item.responses[2] == [*ids("a d"), EOS]  # with a prompt of its own it is an answer, as the others are


def test_rewards_per_dimension_leave_room_for_gold(tmp_path):
    (item,) = load(tmp_path, [{**GOOD, "gold": "d", "score_chosen": [1, 2], "score_rejected": [0, 1]}]).items
    assert item.score == [[1.0, 2.0], [0.0, 1.0], [0.0, 0.0]]


def test_other_columns_stay_with_their_rows(tmp_path):
    """Those that nothing here reads: for a judge of one's own. The first row names them."""
    data = load(tmp_path, [{**GOOD, "answer": 3, "topic": "x", "q": 0.5}, {**GOOD, "answer": 4, "more": 1, "q": 0.5}])
    assert [i.told for i in data.items] == [{"answer": 3, "topic": "x"}, {"answer": 4, "topic": None}]


def test_messages_are_a_prompt_and_its_last_answer(tmp_path):
    row = {"messages": [HI, YO]}
    data = load_preferences(write(tmp_path, [row, {"messages": row["messages"][:1]}]), Chat())
    assert data.items[0].prompt_text == "<u>hi|\n<a>" and "".join(map(chr, data.items[0].responses[0])) == "yo|"
    assert data.report.dropped == {"messages do not end with an answer of the assistant": [2]}
    with pytest.raises(ValueError, match="has no chat template"):
        load_preferences(write(tmp_path, [row]), TOKENIZER)


def test_gzip_folders_and_limits(tmp_path, monkeypatch):
    assert load_preferences(write(tmp_path, [GOOD, GOOD], "prefs.jsonl.gz"), TOKENIZER, DataOptions(limit=1)).report.read == 1
    folder = tmp_path / "saved"
    folder.mkdir()
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_from_disk=lambda path: {"train": [GOOD], "test": [GOOD, GOOD]}))
    assert load_preferences(folder, TOKENIZER).report.read == 1
    assert load_preferences(folder, TOKENIZER, DataOptions(split="test")).report.read == 2
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], asked for 'dev'"):
        load_preferences(folder, TOKENIZER, DataOptions(split="dev"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_preferences(folder, TOKENIZER)


def test_held_out_items_share_no_prompt_with_the_others(tmp_path):
    rows = [{**GOOD, "prompt": "abcdefgh"[i % 8], "chosen": "d" + "e" * (i // 8)} for i in range(80)]
    rest, out = load(tmp_path, rows).parts(10)
    assert len(out) == 0 and len(rest) == 80  # every prompt has ten rows, a tenth are eight
    rows = [{**GOOD, "prompt": a + b} for a in "abcdefgh" for b in "abcdefgh"]
    rest, out = load(tmp_path, rows).parts(32)
    assert len(out) == 6 and len(rest) == 58 and not {tuple(i.prompt) for i in rest} & {tuple(i.prompt) for i in out}
    assert load(tmp_path, rows).parts(32)[1] == out


def test_prompts_that_a_row_crosses_stay_on_one_side(tmp_path):
    """Each row's second prompt is the next row's first: four chains of fifteen, and rows whose prompts meet in no other."""
    chains = [[f"{c}{'abcdefgh'[n // 8]}{'abcdefgh'[n % 8]}" for n in range(16)] for c in "abcd"]
    rows = [{**GOOD, "prompt": a, "other_prompt": b} for chain in chains for a, b in itertools.pairwise(chain)]
    rows += [{**GOOD, "prompt": f"e{a}{b}", "other_prompt": f"f{a}{b}"} for a in "abcdefgh" for b in "abcdefgh"]
    rest, out = load(tmp_path, rows).parts(12)
    prompts = [{tuple(i.prompt) for item in part for i in (item, item.other)} for part in (rest, out)]
    assert len(out) == 12 and not prompts[0] & prompts[1]


def test_log_probs_can_be_written_and_read_back(tmp_path):
    path = write(tmp_path, [GOOD, {**GOOD, "chosen": "dd"}])
    data = load_preferences(path, TOKENIZER)
    for item in data.items:
        item.logps["ref"] = [[-0.5] * len(r) for r in item.responses]
    save_logps(data.items, tmp_path / "with.jsonl", path)
    again = load_preferences(tmp_path / "with.jsonl", TOKENIZER)
    assert again.anchors == {"ref"} and [i.logps for i in again.items] == [i.logps for i in data.items]
    with pytest.raises(ValueError, match="2 rows, 1 were usable"):
        save_logps(data.items[:1], tmp_path / "with.jsonl", path)


def test_what_can_not_be_read_is_taught(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_preferences(tmp_path / "none.jsonl", TOKENIZER)
    with pytest.raises(ValueError, match=r"neither .jsonl"):
        load_preferences(write(tmp_path, [GOOD], "prefs.csv"), TOKENIZER)
    with pytest.raises(ValueError, match="is empty"):
        load(tmp_path, [])
    with pytest.raises(ValueError, match=r"no row of .* can be used"):
        load(tmp_path, [{**GOOD, "rejected": "b"}])
    with pytest.raises(ValueError, match="make none of the formats: preference"):
        detect({"question", "answer"})
    with pytest.raises(ValueError, match="process reward models"):
        detect({"prompt", "completions", "labels"})
    for options, message in (
        ({"max_length": 5, "max_prompt_length": 5}, "leave 2 tokens"),
        ({"over_long": "skip"}, "'cut' or 'drop'"),
        ({"held_out": -1}, "held_out >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DataOptions(**options)
