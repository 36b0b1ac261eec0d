"""Tasks from files, answers that are numbers, lengths that were asked for, and rewards that fail on a sample."""

import gzip
import json
import time
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch

from markovia.algos.preference.evaluation import prompt_task
from markovia.envs.text.files import apart, final_number, gsm8k, marked, prompt_text, prompts, read_rows, same_number
from markovia.envs.text.lengths import off_budget, with_budgets
from markovia.envs.text.preferences import load_preferences
from markovia.envs.text.rewards import RewardError, call_reward, call_rewards, names_of
from markovia.envs.text.tasks import TextTask, arithmetic, count_carries, make_task, takes
from markovia.envs.text.tokens import CharTokenizer, added_bos, as_tokenizer
from markovia.envs.text.word_problems import word_problems

torch.set_num_threads(1)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


# -- final numbers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 6 * 7 = 42\n#### 42", "42"), ("#### 1,234,567", "1234567"), ("#### $1,234.50 in all", "1234.50"), ("#### -3", "-3"),
        ("#### \u22123", "-3"), ("####42.0", "42.0"), ("the answer is 42.", "42"), ("10-5", "5"), ("10 - 5", "5"), ("it is -5", "-5"), ("$-5", "-5"),
        ("-$5", "-5"), ("f(2)-3", "3"), ("GPT-4", "4"), (".5", "0.5"), ("1 and 2, 3", "3"), ("#### none, but 7 before", "7"),
        ("first 9 #### no number", "9"), ("#### 3\n#### 4 (not 5)", "4"), ("70%", "70"), ("no number", None), ("", None), ("####", None),
    ],
)  # fmt: skip
def test_final_numbers(text, number):
    found = final_number(text)
    assert found is None if number is None else found == Decimal(number)


def test_answers_are_compared_as_numbers():
    answer = ["6 * 7 = <<6*7=42>>42\n#### 42", "1,000", "-0.5", "3"]
    assert same_number([""] * 4, ["42.00", "#### 1000", "it is -.5", "none"], answer) == [1.0, 1.0, 1.0, 0.0]
    assert same_number([""], ["41"], ["42"]) == [0.0]
    assert marked([""] * 3, ["so\n#### 42", "#### 42 apples", "42"]) == [1.0, 0.0, 0.0]


# -- files ---------------------------------------------------------------------------------------------------------------------------


def last_digit(prompts, completions, want, **columns):
    return [float(c[-1:] == w) for c, w in zip(completions, want, strict=True)]


def short(prompts, completions):
    return [-float(len(c)) for c in completions]


def test_prompts_of_a_file_with_weighted_rewards(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": f"{i}+{k}=", "want": str(i), "extra": None} for i in range(4) for k in range(10)])
    task = prompts(path, [last_digit, short], [1.0, 0.5], model="arithmetic", held_out=3, solved="last_digit")
    assert len(task.prompts) == 37 and len(task.held_out) == 3 and not set(task.prompts) & set(task.held_out)
    assert task.reward_names == ["last_digit", "short"] and set(task.columns) == {"want", "extra"} and task.model == "arithmetic"
    told = task.rewards_apart(["0+1="] * 2, ["12", "1"], {"want": ["2", "2"], "extra": [None] * 2}, [[5, 6], [5]])
    assert told.tolist() == [[1.0, -2.0], [0.0, -1.0]] and task.weighted(told).tolist() == [0.0, -0.5]
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as f:
        f.write('{"prompt": "1+1="}\n')
    assert prompts(str(tmp_path / "p.jsonl.gz"), short, model="arithmetic").prompts == ["1+1="]
    assert len(prompts(path, short, model="arithmetic", limit=5).prompts) == 5


def test_rows_of_one_prompt_stay_on_one_side_and_the_cut_is_always_the_same():
    rows = [{"prompt": str(i // 2)} for i in range(100)]
    train, held = apart(rows, 8)
    assert len(held) == 8 and not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    assert apart(rows, 8) == (train, held) and apart(rows, 100)[1] and len(apart(rows, 100)[1]) == 10


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[1]"], "line 1 is not a JSON object"), (["{"], "line 1 is not a JSON object"), (['{"question": "x"}'], "no column 'prompt'"),
        (['{"prompt": "1"}', '{"prompt": ""}'], "line 2: 'prompt' is empty"),
        (['{"prompt": "1", "a": 1}', '{"prompt": "2"}'], "line 2 has no column 'a'"),
        ([""], "has no rows"), (['{"prompt": 3}'], "neither a text nor a list"),
        (['{"prompt": [{"role": "user", "content": "hi"}]}'], "no chat template"),
    ],
)  # fmt: skip
def test_bad_files_name_the_line(tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        prompts(str(path), short, model="arithmetic")


def test_a_file_wants_rewards_and_must_exist(tmp_path):
    with pytest.raises(ValueError, match=r"without a reward function: --reward module:function"):
        prompts(write(tmp_path / "p.jsonl", [{"prompt": "1"}]), model="arithmetic")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        prompts(str(tmp_path / "none.jsonl"), short, model="arithmetic")
    with pytest.raises(ValueError, match=r"neither \.jsonl"):
        read_rows(__file__, ["prompt"])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a word tokenizer that has a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["[UNK]", "</s>", "[USER]", "[END]", "Ann", "has", "apples", "####"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>", bos_token="[USER]")
    made.chat_template = "{% for m in messages %}[USER] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[END]{% endif %}"
    folder = tmp_path_factory.mktemp("words")
    made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adds", [True, False])
def test_a_chat_prompt_has_the_ids_of_its_template(adds, tmp_path):
    """Whether the tokenizer opens every text with BOS by itself or leaves it to the template, as SmolLM2's does; in preference data too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<s>", "</s>", "[U]", "[A]", "hi", "there", "yes", "no", "<unk>"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} [U] {{ m.content }}{% else %} [A] {{ m.content }} {{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %} [A] {% endif %}"
    )
    tokenizer, asked = as_tokenizer(made), [{"role": "user", "content": "hi there"}]
    ids = made.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert added_bos(tokenizer) == ("<s>" if adds else "") and ids == [0, 2, 4, 5, 3]
    for prompt in ("hi there", asked):
        assert tokenizer.encode(prompt_text(tokenizer, prompt, True, "row 1")) == ids
    row = {"prompt": asked, **{k: [{"role": "assistant", "content": v}] for k, v in (("chosen", "yes"), ("rejected", "no"))}}
    data = load_preferences(write(tmp_path / "pairs.jsonl", [row]), tokenizer)
    task = prompt_task(data, tokenizer, short, [])
    assert data.items[0].prompt == ids and [tokenizer.encode(p) for p in task.prompts] == [ids]


def test_gsm8k_format(tmp_path, words):
    rows = [{"question": f"Ann has {i} apples", "answer": f"{i} it is\n#### {i}"} for i in range(20)]
    path = write(tmp_path / "train.jsonl", rows)
    task = gsm8k(path, model=words, held_out=2, format_weight=0.1)
    assert len(task.prompts) == 18 and len(task.held_out) == 2 and task.solved == "same_number"
    assert task.prompts[0].startswith("[USER] Ann has") and task.prompts[0].endswith("[END]")  # a BOS token that the template alone puts there
    told = task.rewards_apart(["p"] * 2, ["so\n#### 7", "8"], {"answer": ["7 it is\n#### 7", "#### 7"]}, [[], []])
    assert task.weighted(told).tolist() == pytest.approx([1.1, 0.0])
    plain = gsm8k(path, str(write(tmp_path / "test.jsonl", rows[:3])), model=words, chat=False)
    assert len(plain.prompts) == 20 and len(plain.held_out) == 3 and plain.prompts[0].startswith("Question: Ann has 0 apples\n")
    bad = write(tmp_path / "bad.jsonl", [{"question": "Ann?", "answer": "none"}])
    with pytest.raises(ValueError, match=r"row 1 of .*holds no number"):
        gsm8k(bad, model=words)


def test_generated_problems_are_right():
    rows = word_problems()
    assert len(rows) == 96 and len({r["question"] for r in rows}) == 96
    for row in rows:
        working, number = row["answer"].split("\n#### ")
        assert eval(working.split(" = ")[0]) == int(number)


# -- difficulties --------------------------------------------------------------------------------------------------------------------


def test_carries_are_counted():
    assert [count_carries(*x) for x in ((12, 7), (15, 7), (95, 7), (99, 1), (0, 0), (50, 60))] == [0, 1, 2, 2, 0, 1]
    sizes = [len(t.prompts) + len(t.held_out) for t in (arithmetic(2, carries=c) for c in range(3))]
    # 55 of 100 digit pairs do not carry; with a carry from below 45 of them do not, and 55 do
    assert sizes == [55 * 55, 45 * 45 + 55 * 45, 45 * 55] and sum(sizes) == 10_000
    with pytest.raises(ValueError, match="0 to 1 carries"):
        arithmetic(1, carries=2)


# -- lengths -------------------------------------------------------------------------------------------------------------------------


def test_length_budgets_by_hand():
    base = TextTask(["a", "b"], CharTokenizer("abc"), [last_digit], 4, columns={"want": ["a", "b"]})
    task = with_budgets(base, [2, 4], "exact", 0.1, "{prompt}")
    assert list(task.prompts) == ["a", "a", "b", "b"] and task.columns == {"want": ["a", "a", "b", "b"], "budget": [2, 4, 2, 4]}
    told = task.rewards_apart(["a"] * 3, ["ca", "ca", "cb"], {"want": ["a"] * 3, "budget": [2, 4, 2]}, [[3, 4], [3, 4, 5], [3, 4]])
    assert told.tolist() == [[1.0, 0.0], [1.0, -1.0], [0.0, 0.0]] and task.weighted(told).tolist() == [1.0, 0.9, 0.0]
    most = with_budgets(base, [2, 4], "max", 0.1, "{prompt}")
    told = most.rewards_apart(["a"] * 3, ["ca", "ca", "cb"], {"want": ["a"] * 3, "budget": [2, 4, 2]}, [[3, 4], [3, 4, 5], [3, 4]])
    assert most.weighted(told).tolist() == pytest.approx([0.5, 0.6, 0.0]) and most.reward_names == ["correct", "within_budget"]
    assert off_budget([""], [""], [[1, 2, 3]], [5]) == [-2.0]
    for changes, message in (({"mode": "least"}, "'exact' or 'max'"), ({"budgets": []}, "at least 1 token"), ({"rate": -1.0}, "rate >= 0")):
        with pytest.raises(ValueError, match=message):
            with_budgets(base, **{"budgets": [2], **changes})


def test_lengths_are_asked_for_within_the_chat_template(words, tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": "Ann has 3 apples", "answer": "#### 3"}])
    task = make_task("length_control", base="gsm8k", data=path, model=words, budgets=(4, 8))
    assert len(task.prompts) == 2 and task.prompts[1].startswith("[USER] Answer with 8 tokens. Question: Ann has")
    assert task.prompts[1].endswith("[END]")
    assert task.columns["budget"] == [4, 8] and task.columns["answer"] == ["#### 3"] * 2 and task.solved == "correct"
    told = task.rewards_apart(["p"] * 2, ["3", "4"], {"answer": ["#### 3"] * 2, "budget": [4, 8]}, [[1, 2], [1]])
    assert told.tolist() == [[1.0, -2.0], [0.0, -7.0]]
    plain = make_task("length_control", base="arithmetic", digits=1, budgets=(2,), instruction="{prompt}")
    assert plain.model == "arithmetic" and plain.prompts[0] == "0+0="


def test_the_length_method_reads_what_the_task_calls_right():
    from markovia.agents.language import LanguageAgent
    from markovia.algos.on_policy.rewards import LengthBudget

    base = arithmetic(1)
    task = with_budgets(base, [2, 3], "exact", 0.2, "{prompt}", group_size=2)
    agent = LanguageAgent.from_name("arithmetic", max_new_tokens=task.max_new_tokens)
    rollout = agent.generate(task.starts(8, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    score = task.score(rollout)
    reward = torch.zeros_like(rollout.reward)
    reward[:, 0] = score
    paid = LengthBudget("exact", 0.2)(reward, rollout, {}).sum(1)
    # the environment's own reward is the method's, so running the method on it pays the length once
    torch.testing.assert_close(paid, score, rtol=0, atol=1e-6)
    assert rollout.outcome["solved"].tolist() == [
        c.strip() == a for c, a in zip(rollout.outcome["completion_text"], rollout.outcome["columns"]["answer"], strict=True)
    ]


def test_stepping_gives_the_reward_of_the_generated_length():
    from markovia.envs.text.env import TokenEnv

    base = TextTask(["a"], CharTokenizer("abc"), lambda prompts, completions: [1.0] * len(completions), 4)
    env = TokenEnv(with_budgets(base, [3], "exact", 0.5, "{prompt}"))
    env.reset(seed=0)
    assert env.step(3)[1] == 0.0 and env.step(2)[1] == 0.5  # two tokens of three


# -- names, and rewards that fail ----------------------------------------------------------------------------------------------------


def test_names_are_told_apart():
    assert names_of([short, last_digit, short]) == ["short-1", "last_digit", "short-2"]
    assert takes("prompts", "model") and not takes("arithmetic", "model")
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        make_task("gsm8")
    with pytest.raises(ValueError, match=r"solved names the reward function 'right', the task has short"):
        prompts(rewards=short, model="smollm2", solved="right")
    assert replace(arithmetic(1), rewards=[short]).solved is None  # another reward can't tell what is right
    with pytest.raises(ValueError, match="2 weights"):
        TextTask(["a"], CharTokenizer("abc"), [short], 2, weights=[1.0, 2.0])


def fails_on_b(prompts, completions, **columns):
    if any("b" in c for c in completions):
        raise KeyError("no such answer")
    return [0.0] * len(completions)


def slow_on_b(prompts, completions):
    time.sleep(0.5 if any("b" in c for c in completions) else 0.0)
    return [0.0] * len(completions)


def only_alone(prompts, completions):
    if len(completions) > 1:
        raise MemoryError("too many")
    return [0.0]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (fails_on_b, r"'fails_on_b' failed on completion 1 \(prompt 'q', text 'xb'\): KeyError: 'no such answer'"),
        (slow_on_b, r"'slow_on_b' took too long on completion 1 \(prompt 'q', text 'xb'\)"),
        (only_alone, "'only_alone' failed on 3 completions together, on none of them alone: MemoryError: too many"),
        (lambda prompts, completions: [0.0, None, 0.0], r"None for completion 1; return 0.0 .* \(prompt 'q', text 'xb'\)"),
        (lambda prompts, completions: [0.0, float("nan"), 0.0], r"nan for completion 1; rewards must be finite \(prompt 'q', text 'xb'\)"),
        (lambda prompts, completions: [0.0, "x", 0.0], r"'x', which is no number, for completion 1 \(prompt 'q'"),
        (lambda prompts, completions: [0.0], r"1 values for 3.*first without one is completion 1 \(prompt 'q'"),
        (lambda prompts, completions: [0.0] * 4, "4 values for 3"),
        (lambda prompts, completions: None, "returned None, expected a list of 3"),
    ],
)  # fmt: skip
def test_failing_rewards_name_function_and_sample(fn, message):
    with pytest.raises(RewardError, match=message):
        call_rewards([short, fn], ["p", "q", "r"], ["x", "xb", "y"], timeout=0.2 if fn is slow_on_b else None)


def test_long_texts_are_shortened_in_messages():
    with pytest.raises(RewardError) as caught:
        call_reward([lambda prompts, completions: [None]], ["p" * 10_000], ["c" * 10_000])
    assert len(str(caught.value)) < 600 and " ... " in str(caught.value)


def test_a_function_in_time_is_heard_and_its_error_passed_on():
    assert call_reward([short], ["p"], ["xy"], timeout=5.0).tolist() == [-2.0]
    with pytest.raises(RewardError, match="KeyError"):
        call_reward([fails_on_b], ["p"], ["b"], timeout=5.0)


def test_numbers_of_other_kinds_are_taken():
    assert call_reward([lambda prompts, completions: np.array([1, 2])], ["p", "q"], ["x", "y"]).tolist() == [1.0, 2.0]
    assert call_reward([lambda prompts, completions: torch.tensor([1.0, 2.0])], ["p", "q"], ["x", "y"]).tolist() == [1.0, 2.0]
    assert call_reward([lambda prompts, completions: [True, False]], ["p", "q"], ["x", "y"]).tolist() == [1.0, 0.0]
