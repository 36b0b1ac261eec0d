"""The command line: help, names, errors in one line, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

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
        (["claims", "no-such-claim"], "unknown claim"),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    code, _, err = finish(argv, capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


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
    from markovia import claims

    monkeypatch.setattr(claims, "CLAIMS", {"a": claims.Claim(f"{__name__}:holding"), "b": claims.Claim(f"{__name__}:failing")})
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or type(sys)(__name__))
    monkeypatch.setattr(sys.modules[__name__], "holding", lambda: {"measured": 1.0, "bound": 0.5, "holds": True}, raising=False)
    monkeypatch.setattr(sys.modules[__name__], "failing", lambda: {"measured": 0.1, "bound": 0.5, "holds": False}, raising=False)
    results = str(tmp_path / "claims.jsonl")
    code, out, _ = finish(["claims", "a", "--results", results, "--json"], capsys)
    assert code == 0 and json.loads(out)["holds"] is True
    assert [line.split("  ")[2] for line in finish(["claims", "--list", "--results", results], capsys)[1].splitlines()] == ["holds", "not run"]
    code, out, err = finish(["claims", "--results", results, "--json"], capsys)  # only b is left
    assert code == 1 and json.loads(out)["id"] == "b" and "do not hold: b" in err
    code, out, _ = finish(["claims", "--results", results, "--json"], capsys)
    assert code == 0 and out == ""
    assert [line.split("  ")[2] for line in finish(["claims", "--list", "--results", results], capsys)[1].splitlines()] == ["holds", "does not hold"]


def test_envs_lists_every_kind(capsys):
    _, out, _ = finish(["envs", "--json"], capsys)
    assert {e["kind"] for e in json.loads(out)} >= {"tabular", "language", "denoising"}
