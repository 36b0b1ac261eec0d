"""`markovia export` and `markovia chat` on runs of the shipped adder, and conversations with a tiny model that has a chat template."""

import pytest
import torch

from markovia.agents.export import hf_tokenizer
from markovia.agents.language import LanguageAgent
from markovia.algos.presets import configure, override
from markovia.chat import Conversation, talk
from markovia.cli import run
from markovia.envs.text.tokens import CharTokenizer
from markovia.loaded import load_run
from markovia.runs import train

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
ENV = "markovia/Arithmetic-v0"


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    """A run of one iteration with LoRA."""
    out = tmp_path_factory.mktemp("runs") / "adder"
    method = override(configure("grpo", ENV), {"num_env_steps": 8, "num_envs": 8, "solver": {"lr": 0.01}})
    train(method, ENV, out=out, agent_options={"lora": {"r": 2}}, eval_episodes=0, progress=False)
    return out


def failure(argv, capsys):
    return run(argv), capsys.readouterr().err


# -- export ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["True", "false"])
def test_export_gives_the_logits_of_the_checkpoint(adder, merge, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert run(["export", str(adder), "--out", str(out), "--merge", merge]) == 0
    assert f"from_pretrained('{out}')" in capsys.readouterr().out
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("12+7=")["input_ids"]])
    ours = load_run(adder).agent
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
        torch.testing.assert_close(got, ours.net["policy"](input_ids=ids).logits, rtol=0, atol=1e-5)
        with ours.net["policy"].disable_adapter():
            assert (ours.net["policy"](input_ids=ids).logits - got).abs().max() > 1e-4


def test_export_tells_what_is_wrong(adder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert failure(["export", str(adder), "--out", str(tmp_path / "full")], capsys) == (
        2, f"markovia: {tmp_path / 'full'} already exists and is not empty; export to a new folder\n",
    )  # fmt: skip
    code, err = failure(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")], capsys)
    assert code == 2 and "not the folder of a markovia run" in err
    with pytest.raises(SystemExit):
        run(["export", str(adder), "--out", "x", "--merge", "maybe"])
    assert "takes True or False" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["export", "--out", "x"], ["chat"]])
def test_a_run_without_language_is_told_what_to_do_instead(command, tmp_path, capsys):
    out = tmp_path / "pole"
    method = override(configure("ppo", "CartPole-v1"), {"num_env_steps": 16, "num_envs": 1, "num_steps": 16, "solver": {"epochs": 1}})
    train(method, "CartPole-v1", out=out, eval_episodes=0, progress=False)
    code, err = failure([command[0], str(out), *command[1:]], capsys)
    taken = "language agents" + " and on diffusers pipelines" * (command[0] == "export")
    assert code == 2 and f"{command[0]} works on {taken}, but {out} trained a control agent on CartPole-v1" in err and "markovia video" in err


# -- chat ------------------------------------------------------------------------------------------------------------------------------


def test_chat_in_the_terminal(adder, monkeypatch, capsys):
    lines = iter(["12+7=", "", "/temperature warm", "/nonsense", "/temperature 0.5", "12+7=x", "3+4=", "/quit", "5+5="])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    assert run(["chat", str(adder), "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    greedy = Conversation(load_run(adder).agent, temperature=0.0).reply("12+7=")
    assert f"{greedy}\n" in out and "takes a number" in out and out.count("/quit ends") == 2 and "the alphabet" in out
    assert next(lines) == "5+5="


def test_the_end_of_the_input_ends_the_conversation(adder, monkeypatch, capsys):
    def end(*_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert run(["chat", str(adder)]) == 0 and "/quit ends" in capsys.readouterr().out


def speaker(room=64):
    """A random model over letters whose chat template marks turns: u says, a answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, max_position_embeddings=room, initializer_range=0.5, **shape))
    tokenizer = hf_tokenizer(CharTokenizer("abcdefghi"))
    turns = "{% for m in messages %}{{ 'a' if m.role == 'user' else 'b' }}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}b{% endif %}"
    return LanguageAgent(model, tokenizer, max_new_tokens=3)


def test_turns_pass_through_the_chat_template():
    talk_to = Conversation(speaker(), max_new_tokens=4)
    seen, real = [], talk_to.agent.generate
    talk_to.agent.generate = lambda starts, *a, **k: seen.append(starts["prompt_ids"][0].tolist()) or real(starts, *a, **k)
    first = talk_to.reply("cd")
    second = talk_to.reply("e")
    ids = talk_to.agent.tokenizer.encode
    assert seen == [ids("acdb"), ids(f"acdb{first}aeb")]
    assert [m["content"] for m in talk_to.messages] == ["cd", first, "e", second]


def test_pieces_make_up_the_answer_and_the_seed_decides():
    answers = []
    for seed in (4, 4, 5, 6):
        pieces = []
        answers.append(Conversation(speaker(), max_new_tokens=12, seed=seed).reply("abc", pieces.append))
        assert "".join(pieces) == answers[-1] and len([p for p in pieces if p]) == len(answers[-1])
    assert answers[0] == answers[1] and len(set(answers)) > 1 and max(map(len, answers)) > 3


def test_old_turns_make_room_and_an_overlong_one_is_refused():
    talk_to = Conversation(speaker(room=16), max_new_tokens=4)
    for _ in range(4):
        talk_to.reply("cdef")
    assert 2 <= len(talk_to.messages) < 8 and talk_to.messages[0]["role"] == "user"
    before = list(talk_to.messages)
    with pytest.raises(ValueError, match="the model reads 16"):
        talk_to.reply("c" * 20)
    assert talk_to.messages == before


def test_without_a_template_each_line_stands_alone():
    talk_to = Conversation(speaker(), plain=True)
    assert talk_to.max_new_tokens == 3 and not talk_to.templated
    assert talk_to._prompt([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}])[1] == [6]


def test_an_interrupted_answer_does_not_end_the_conversation():
    talk_to, lines, shown = Conversation(speaker()), iter(["ab", "/quit"]), []

    def generate(*_, **__):
        raise KeyboardInterrupt

    talk_to.agent.generate = generate
    talk(talk_to, lambda: next(lines), shown.append)
    assert talk_to.messages == [] and next(lines, None) is None


def test_settings_out_of_range_are_told():
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        Conversation(speaker(), temperature=-1.0)
    with pytest.raises(ValueError, match="max_new_tokens must be >= 1"):
        Conversation(speaker(), max_new_tokens=0)
    with pytest.raises(ValueError, match="at least one character"):
        Conversation(speaker(), plain=True).reply("")
