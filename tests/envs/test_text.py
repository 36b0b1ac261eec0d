"""Token-MDPs: tokenizers, reward calls, tasks, and that the batched environment equals the scalar one."""

import math

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import markovia  # noqa: F401 - registers the ids
from markovia.agents.language import LanguageAgent
from markovia.envs.cached import cache_dir
from markovia.envs.text.env import TokenEnv, TokenVectorEnv
from markovia.envs.text.rewards import call_reward, exact_answer, resolve, vader_compound
from markovia.envs.text.tasks import TextTask, arithmetic, is_held_out, make_task
from markovia.envs.text.tokens import CharTokenizer, HFTokenizer, as_tokenizer, left_pad

torch.set_num_threads(1)


def length_reward(prompts, completions, bonus, **columns):
    return [len(c) + b for c, b in zip(completions, bonus, strict=True)]


def word_tokenizer(eos="</s>"):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["[UNK]", "</s>", "good", "bad", "film", "the"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token=eos)


def small_task(**changes):
    fields = {
        "prompts": ["a", "bb"],
        "columns": {"bonus": [0.0, 10.0]},
        "tokenizer": CharTokenizer("abc"),
        "rewards": [length_reward],
        "max_new_tokens": 3,
    }
    return TextTask(**(fields | changes))


# -- tokenizers ----------------------------------------------------------------------------------------------------------------------


def test_characters_round_trip_and_special_tokens_are_dropped():
    tok = CharTokenizer("0123456789+=")
    assert tok.encode("1+2=3\n") == [4, 13, 5, 14, 6, 2]
    assert tok.decode([4, 13, 5, 14, 6, 2, 0, 1]) == "1+2=3"
    assert len(tok) == tok.vocab_size == 15


def test_character_tokenizer_teaches():
    with pytest.raises(ValueError, match="lacks"):
        CharTokenizer("ab").encode("abc")
    for alphabet in ("", "aa", "a\n"):
        with pytest.raises(ValueError, match="different characters"):
            CharTokenizer(alphabet)


def test_hugging_face_tokenizer_is_viewed_not_changed():
    inner = word_tokenizer()
    before = inner.backend_tokenizer.to_str(), dict(inner.special_tokens_map)
    view = as_tokenizer(inner)
    assert isinstance(view, HFTokenizer) and view.eos_token_id == view.pad_token_id == 1
    assert view.encode("the good film") == [5, 2, 4]
    assert view.decode([2, 4, 1]) == "good film"
    TokenEnv(small_task(tokenizer=inner, prompts=["the film", "good"])).reset(seed=0)
    assert (inner.backend_tokenizer.to_str(), dict(inner.special_tokens_map)) == before and inner.pad_token is None


def test_tokenizer_without_eos_teaches():
    with pytest.raises(ValueError, match="no EOS token"):
        as_tokenizer(word_tokenizer(eos=None))


def test_left_pad_puts_rows_at_the_right_edge():
    ids, mask = left_pad([[5], [6, 7, 8]], 3, 0)
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]] and mask.tolist() == [[False, False, True], [True] * 3]
    with pytest.raises(ValueError, match="does not fit"):
        left_pad([[1, 2]], 1, 0)


# -- rewards -------------------------------------------------------------------------------------------------------------------------


def test_several_functions_are_weighted_and_get_their_columns():
    def constant(prompts, completions):
        return [1.0] * len(completions)

    got = call_reward([constant, length_reward], ["p", "q"], ["x", "yyy"], weights=[2.0, 0.5], bonus=[0.0, 4.0])
    assert got.dtype == np.float64 and got.tolist() == [2.0 + 0.5 * 1.0, 2.0 + 0.5 * 7.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [([1.0], "1 values for 2"), (None, "expected a list"), ([1.0, None], "None for completion 1"), ([math.nan, 0.0], "must be finite"),
     (3.0, "expected a list"), (["x", 1.0], "no number")],
)  # fmt: skip
def test_wrong_rewards_name_the_function(value, message):
    def broken(prompts, completions, **columns):
        return value

    with pytest.raises(ValueError, match=message) as caught:
        call_reward([broken], ["p", "q"], ["x", "y"])
    assert "broken" in str(caught.value)


def test_weights_and_names_are_checked():
    with pytest.raises(ValueError, match="weights"):
        call_reward([vader_compound], ["p"], ["x"], weights=[1.0, 2.0])
    assert resolve("markovia.envs.text.rewards:exact_answer") is exact_answer
    for name in ("nowhere", "json:nothing", "no_such_module:f", "markovia.envs.text.rewards:np"):
        with pytest.raises(ValueError, match=r"module:function|expected a function"):
            resolve(name)


def test_vader_scores_the_completion_alone():
    good, bad = vader_compound(["awful", "great"], ["a wonderful film", "a terrible film"])
    assert good > 0.5 and bad < -0.4


# -- tasks ---------------------------------------------------------------------------------------------------------------------------


def test_starts_repeat_prompts_in_groups_and_are_reproducible():
    task = arithmetic(digits=1)
    a, b = (task.starts(12, torch.Generator().manual_seed(3), group_size=4) for _ in range(2))
    assert a["prompt_text"] == b["prompt_text"] and torch.equal(a["prompt_ids"], b["prompt_ids"])
    assert a["group"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert all(len(set(a["prompt_text"][i : i + 4])) == 1 for i in (0, 4, 8)) and len(set(a["prompt_text"])) == 3
    assert a["prompt_ids"].shape == a["prompt_mask"].shape == (12, task.prompt_length) and a["prompt_mask"].dtype == torch.bool
    assert all(sum(map(int, p[:-1].split("+"))) == int(x) for p, x in zip(a["prompt_text"], a["columns"]["answer"], strict=True))
    with pytest.raises(ValueError, match="multiple"):
        task.starts(10, group_size=4)


def test_a_batch_holds_no_prompt_twice_before_all_were_drawn():
    task = small_task()
    assert sorted(task.starts(2, torch.Generator().manual_seed(0))["prompt_text"]) == ["a", "bb"]
    assert sorted(task.starts(4, torch.Generator().manual_seed(0))["prompt_text"]) == ["a", "a", "bb", "bb"]


def test_held_out_sums_are_apart_from_training():
    task = arithmetic()
    assert len(task.prompts) == 9000 and len(task.held_out) == 1000 and not set(task.prompts) & set(task.held_out)
    assert is_held_out(3, 0) and "3+0=" in task.held_out
    assert task.all_starts()["prompt_text"] == list(task.held_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompts": []}, "needs prompts"), ({"columns": {"bonus": [1.0]}}, "one per prompt"), ({"max_new_tokens": 0}, ">= 1"),
     ({"held_out": ["c"]}, "held_out_columns"), ({"group_size": 0}, ">= 1"), ({"rewards": ["nowhere"]}, "module:function")],
)  # fmt: skip
def test_bad_tasks_teach(changes, message):
    with pytest.raises(ValueError, match=message):
        small_task(**changes)


def test_other_bad_task_input_teaches():
    with pytest.raises(ValueError, match="no tokens"):
        small_task(prompts=["", "a"]).starts(1)
    with pytest.raises(ValueError, match="did you mean 'arithmetic'"):
        make_task("aritmetic")
    with pytest.raises(ValueError, match="finished TextTask"):
        make_task(small_task(), digits=2)
    with pytest.raises(ValueError, match="1 or 2 digits"):
        arithmetic(digits=9)
    with pytest.raises(ValueError, match="empty or unknown"):
        small_task().starts(1, split="held_out")
    with pytest.raises(ValueError, match="outside of split 'train'"):
        small_task().prompt(-1)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MARKOVIA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


# -- environments --------------------------------------------------------------------------------------------------------------------


def test_an_episode_by_hand():
    env = TokenEnv(small_task(), render_mode="ansi")
    obs, info = env.reset(seed=0, options={"prompt": 1})
    assert obs["ids"].tolist() == [4, 4, 0, 0, 0] and obs["mask"].tolist() == [1, 1, 0, 0, 0] and info["action_mask"].all()
    obs, reward, terminated, truncated, _ = env.step(np.int64(3))
    assert (reward, terminated, truncated) == (0.0, False, False) and obs["ids"].tolist() == [4, 4, 3, 0, 0] and env.render() == "bba"
    _, reward, terminated, truncated, _ = env.step(2)  # EOS: completion "a", column bonus 10
    assert (reward, terminated, truncated) == (11.0, True, False)
    assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
    with pytest.raises(ValueError, match="reset"):
        env.step(3)


def test_the_length_terminates():
    env = TokenEnv(small_task())
    env.reset(options={"prompt": 0})
    flags = [env.step(4)[1:4] for _ in range(3)]
    assert flags == [(0.0, False, False), (0.0, False, False), (3.0, True, False)]


def only_a_or_eos(prompt_ids, response_ids):
    allowed = np.zeros(6, dtype=bool)
    allowed[[2, 3]] = True
    return allowed


def test_forbidden_tokens_are_told_and_refused():
    env = TokenEnv(small_task(allowed=only_a_or_eos))
    assert env.reset()[1]["action_mask"].tolist() == [0, 0, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="not allowed"):
        env.step(4)
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        env.step(99)


def same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            same(a[k], b[k])
    elif isinstance(a, tuple) or (isinstance(a, np.ndarray) and a.dtype == object):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif a is None:
        assert b is None
    else:
        np.testing.assert_array_equal(a, b)
        assert np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.parametrize("allowed", [None, only_a_or_eos], ids=["free", "masked"])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_batched_equals_scalar(mode, allowed):
    sync = SyncVectorEnv([lambda: TokenEnv(small_task(allowed=allowed))] * 3, autoreset_mode=mode)
    ours = TokenVectorEnv(3, small_task(allowed=allowed), autoreset_mode=mode)
    assert ours.single_observation_space == sync.single_observation_space and ours.action_space == sync.action_space
    assert ours.metadata["autoreset_mode"] == mode
    same(sync.reset(seed=5), ours.reset(seed=5))
    rng = np.random.default_rng(0)
    for _ in range(40):
        actions = rng.integers(2, 4 if allowed else 6, size=3)
        same(sync.step(actions), ours.step(actions))


def test_vector_environment_teaches():
    for mode in (AutoresetMode.DISABLED, "sometimes"):
        with pytest.raises(ValueError, match="'SameStep' or 'NextStep'"):
            TokenVectorEnv(2, small_task(), autoreset_mode=mode)
    env = TokenVectorEnv(2, small_task())
    with pytest.raises(ValueError, match="reset"):
        env.step(np.array([3, 3]))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected \(2,\)"):
        env.step(np.array([3]))
    with pytest.raises(ValueError, match="seeds"):
        env.reset(seed=[1])
    with pytest.raises(ValueError, match="would cut"):
        TokenVectorEnv(2, small_task(), max_episode_steps=1)


@pytest.mark.parametrize("split", ["held_out", "test"])
def test_a_split_that_a_task_lacks_is_told(split):
    with pytest.raises(ValueError, match=f"split '{split}' is empty or unknown"):
        TokenEnv(small_task()).reset(options={"split": split})


def test_stepping_generated_actions_gives_the_same_reward_and_flags():
    task = arithmetic(digits=2)
    agent = LanguageAgent.from_name("arithmetic")
    rollout = agent.generate(task.starts(16, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    score = task.score(rollout)
    assert 0.0 < score.mean() < 1.0
    env = TokenEnv(task)
    for i, text in enumerate(rollout.outcome["prompt_text"]):
        env.reset(options={"prompt": list(task.prompts).index(text)})
        steps = int(rollout.valid[i].sum())
        for t in range(steps):
            obs, reward, terminated, truncated, _ = env.step(rollout.action[i, t].item())
            assert terminated == (rollout.continuation[i, t] == 0.0) and not truncated
            assert reward == (score[i] if terminated else 0.0)
        assert terminated
        got = torch.from_numpy(obs["ids"][task.prompt_length :])[:steps]
        assert torch.equal(got, rollout.action[i, :steps])
