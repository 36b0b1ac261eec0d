"""The command line: help, names, errors in one line, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from markovia.cli import COMMANDS, run

ROOT = Path(__file__).resolve().parent.parent


def finish(argv, capsys):
    """(exit code, stdout, stderr); argparse and tyro leave by SystemExit."""
    try:
        code = run(argv)
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    code, out, _ = finish([command, "--help"], capsys)
    assert code == 0
    assert "usage: markovia " + command in out


def test_help_needs_no_torch():
    code = "import sys\nfrom markovia.cli import run\nassert run(['--help']) == 0\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "markovia", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "did you mean 'train'" in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "ppoo", "--env", "CartPole-v1"], "did you mean 'ppo'"),
        (["train", "ppo", "--env", "CartPol-v1"], "did you mean 'CartPole-v1'"),
        (["train", "ppo"], "needs an environment"),
        (["train", "--env", "CartPole-v1"], "the method comes first"),
        (["train", "ddpo", "--env", "CartPole-v1"], "ddpo serves"),
        (["train", "rl-kl-bayes", "--env", "CartPole-v1"], "trains nothing in an environment"),
        (["train", "ppo", "--env", "CartPole-v1", "--env-kwargs", "[1]"], "JSON object"),
        (["train", "ppo", "--env", "CartPole-v1", "--num-envs", "0"], "num_envs must be >= 1"),
        (["show", "rlo"], "did you mean 'rloo'"),
        (["eval", "nowhere"], "not the folder of a markovia run"),
        (["eval", __file__], "not the folder of a markovia run"),
        (["eval", "nowhere", "--episodes", "0"], "--episodes must be >= 1"),
        (["video", "nowhere", "--episodes", "0"], "--episodes must be >= 1"),
        (["plot", "nowhere", "--smooth", "0"], "--smooth must be >= 1"),
        (["eval", "nowhere", "--seed", "-1"], "--seed must be >= 0, got -1"),
        (["cost-of", "nowhere", "--seed", "-1"], "--seed must be >= 0, got -1"),
        (["video", "nowhere", "--seed", "-1"], "--seed must be >= 0, got -1"),
        (["collect", "Pendulum-v1", "--seed", "-1"], "--seed must be >= 0, got -1"),
        (["train", "ppo", "--env", "CartPole-v1", "--max-seconds", "nan"], "max_seconds must be >= 0, got nan"),
        (["train", "ppo", "--env", "CartPole-v1", "--max-seconds", "-1"], "max_seconds must be >= 0, got -1"),
        (["train", "ppo", "--env", "CartPole-v1", "--solver.lr", "inf"], "solver.lr is inf; give a finite number"),
        (["train", "ppo", "--env", "CartPole-v1", "--judge", "a:b"], "judge and data_options go with a file of preferences"),
        (["train", "ppo", "--env", "CartPole-v1", "--data-options", '{"held_out": 3}'], "judge and data_options go with a file of preferences"),
        (["claims", "no-such-claim"], "unknown claim"),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    code, _, err = finish(argv, capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_missing_package_is_one_line_without_a_class(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    out = str(tmp_path / "run")
    code, _, err = finish(["train", "ppo", "--env", "HalfCheetah-v5", "--vectorization", "envpool", "--out", out, "--no-progress"], capsys)
    assert code == 2 and err == "markovia: vectorization='envpool' needs envpool: pip install markovia[fast]\n"


def test_of_a_repeated_flag_the_last_counts(capsys):
    code, out, _ = finish(["train", "ppo", "--env", "CartPole-v1", "--env=Acrobot-v1", "--help"], capsys)
    assert code == 0 and "Values shown are those for Acrobot-v1." in " ".join(out.replace("\u2502", " ").split())


def test_an_interrupt_promises_resume_only_where_there_is_something_to_resume(tmp_path, capsys, monkeypatch):
    from markovia.loop import Loop

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "envs", interrupted)
    assert finish(["envs"], capsys)[::2] == (130, "\ninterrupted\n")
    flags = ["--num-env-steps", "64", "--num-envs", "1", "--num-steps", "16", "--eval-episodes", "0", "--num-checkpoints", "4", "--no-progress"]
    argv = ["train", "ppo", "--env", "Tests/Short-v0", *flags, "--out", str(tmp_path / "run")]
    spec = gym.envs.registration.EnvSpec("Tests/Short-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=8)
    monkeypatch.setitem(gym.registry, "Tests/Short-v0", spec)
    ask = Loop._ask
    for last, message in ((1, ""), (3, "; the same command with --resume goes on from what was saved")):
        monkeypatch.setattr(Loop, "_ask", lambda loop, stats, last=last: interrupted() if stats["iteration"] >= last else ask(loop, stats))
        assert finish([*argv, *(["--resume"] if last > 1 else [])], capsys)[::2] == (130, f"\ninterrupted{message}\n")


def test_names_of_the_current_folder_are_found_behind_those_of_libraries(tmp_path):
    """By the console script too, whose own folder Python puts on its path in the place of this one (-P leaves it out likewise)."""
    (tmp_path / "mine.py").write_text("import gymnasium as gym\ngym.register('Mine-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n")
    (tmp_path / "gymnasium.py").write_text("raise SystemExit('the file of the folder was run')\n")
    code = "from markovia.cli import main\nmain(['train', 'ppo', '--env', 'mine:Mine-v0', '--help'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine:Mine-v0" in done.stdout
    for command in ("eval", "video", "plot", "cost-of", "chat", "export"):  # a run of someone else's, perhaps in this very folder
        code = f"import os, sys, markovia.cli as c\ntry: c.main([{command!r}, '-h'])\nexcept SystemExit: assert os.getcwd() not in sys.path\n"
        subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("MARKOVIA_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown method"):
        run(["show", "nothing-like-it"])


def test_flags_are_those_of_the_method(capsys):
    _, ppo, _ = finish(["train", "ppo", "--env", "CartPole-v1", "--help"], capsys)
    _, trpo, _ = finish(["train", "trpo", "--env", "CartPole-v1", "--help"], capsys)
    assert "--surrogate.clip" in ppo and "--surrogate.clip" not in trpo
    assert "--solver.cg-iterations" in trpo and "--solver.cg-iterations" not in ppo
    assert "discount per decision" in ppo  # the field's own comment


def test_train_eval_plot(tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["train", "ppo", "--env", "CartPole-v1", "--out", str(out), "--num-env-steps", "512", "--num-envs", "2", "--num-steps", "64"]
    code, text, err = finish([*argv, "--surrogate.clip", "0.1", "--eval-episodes", "2"], capsys)
    assert code == 0, err
    assert "/ 512  return" in text and "evaluation return" in text
    assert json.loads((out / "config.json").read_text())["settings"]["surrogate"]["clip"] == 0.1
    code, text, err = finish(["eval", str(out), "--episodes", "2", "--json"], capsys)
    assert code == 0, err
    assert len(json.loads(text)["runs"][str(out)]["returns"]) == 2
    code, _, err = finish(["plot", str(out), "-o", str(tmp_path / "c.png")], capsys)
    assert code == 0, err
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    code, _, err = finish(["plot", str(out), "--y", "retrun"], capsys)
    assert code == 2 and "it has" in err


def test_show_reads_the_equation(capsys):
    code, out, _ = finish(["show", "ppo"], capsys)
    assert code == 0
    for part in ("https://arxiv.org/abs/1707.06347", "D = ReLU((rho - clip(rho, 1 - low, 1 + high)) A)", "surrogates.py:", "parent", "claim"):
        assert part in out


def test_every_method_can_be_shown(capsys):
    code, out, _ = finish(["systems", "--json"], capsys)
    assert code == 0
    for system in json.loads(out):
        assert finish(["show", system["id"]], capsys)[0] == 0


def test_claims_are_kept_and_resumed(tmp_path, capsys, monkeypatch):
    from markovia import catalogue, claims

    memory = []
    monkeypatch.setattr(catalogue, "keep_freed_memory", lambda: memory.append("kept"))
    monkeypatch.setattr(claims, "CLAIMS", {"a": claims.Claim(f"{__name__}:holding"), "b": claims.Claim(f"{__name__}:failing")})
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or type(sys)(__name__))
    monkeypatch.setattr(sys.modules[__name__], "holding", lambda: {"measured": 1.0, "bound": 0.5, "holds": True}, raising=False)
    monkeypatch.setattr(sys.modules[__name__], "failing", lambda: {"measured": 0.1, "bound": 0.5, "holds": False}, raising=False)
    results = str(tmp_path / "claims.jsonl")
    code, out, _ = finish(["claims", "a", "--results", results, "--json"], capsys)
    assert code == 0 and json.loads(out)["holds"] is True and memory == ["kept"]
    assert [line.split("  ")[2] for line in finish(["claims", "--list", "--results", results], capsys)[1].splitlines()] == ["holds", "not run"]
    code, out, err = finish(["claims", "--results", results, "--json"], capsys)  # only b is left
    assert code == 1 and json.loads(out)["id"] == "b" and "do not hold: b" in err
    code, out, _ = finish(["claims", "--results", results, "--json"], capsys)
    assert code == 0 and out == ""
    assert [line.split("  ")[2] for line in finish(["claims", "--list", "--results", results], capsys)[1].splitlines()] == ["holds", "does not hold"]


def test_own_results_lie_over_those_that_came_with_the_package(tmp_path, capsys, monkeypatch):
    from markovia import catalogue

    shipped, own = tmp_path / "shipped.jsonl", tmp_path / "claims.jsonl"
    shipped.write_text("".join(json.dumps({"id": i, "holds": True}) + "\n" for i in ("ppo", "rloo")))
    own.write_text(json.dumps({"id": "ppo", "holds": False}) + "\n")
    monkeypatch.setattr(catalogue, "SHIPPED", shipped)
    monkeypatch.setattr(catalogue, "default_results", lambda: own)
    listed = {line.split("  ")[0]: line.split("  ")[2] for line in finish(["claims", "--list"], capsys)[1].splitlines()}
    assert (listed["ppo"], listed["rloo"]) == ("does not hold", "holds")
    assert {s["id"]: s["result"] for s in json.loads(finish(["systems", "--json"], capsys)[1])}["rloo"] == "holds"
    for bad in ("not json\n", '{"id": "ppo"}\n', "[1]\n"):
        own.write_text(bad)
        for argv in (["claims", "--list", "--results", str(own)], ["claims", "--list"], ["claims", "--results", str(own)]):
            code, _, err = finish(argv, capsys)
            assert code == 2 and f"{own} holds no results of claims" in err and err.count("\n") == 1


def test_envs_lists_every_kind(capsys):
    _, out, _ = finish(["envs", "--json"], capsys)
    assert {e["kind"] for e in json.loads(out)} >= {"tabular", "language", "denoising"}


def test_the_demo_replaces_runs_and_nothing_else(tmp_path, capsys, monkeypatch):
    from markovia import demo

    begun = []

    def part(folder):
        begun.append(folder.name)
        folder.mkdir()
        config = {"method": "ppo", "settings": {}, "env": "CartPole-v1", "env_kwargs": {}, "agent_options": {}, "seed": 0}
        (folder / "config.json").write_text(json.dumps(config))
        return demo.Part("t", "c", 0.0, [demo.Check("w", 0.0, 1.0, 0.5)], b"")

    for name in ("control", "text", "digits"):
        monkeypatch.setattr(demo, name, part)
    (tmp_path / "text").mkdir()
    assert finish(["demo", "-o", str(tmp_path)], capsys)[0] == 0  # an empty folder is free
    (tmp_path / "text" / "old.txt").write_text("of the run before")
    assert finish(["demo", "-o", str(tmp_path)], capsys)[0] == 0 and not (tmp_path / "text" / "old.txt").exists()
    begun.clear()
    for content in (None, "{}"):  # a config.json of something else is no run either
        (tmp_path / "text" / "config.json").unlink() if content is None else (tmp_path / "text" / "config.json").write_text(content)
        (tmp_path / "text" / "thesis.txt").write_text("mine")
        code, _, err = finish(["demo", "-o", str(tmp_path)], capsys)
        assert code == 2 and err.count("\n") == 1 and "text, which is no run of markovia" in err and "another --out" in err
        assert (tmp_path / "text" / "thesis.txt").exists() and begun == []
