"""`markovia train`: the method is resolved first, and its settings become the flags."""

from __future__ import annotations

import itertools
import json
from dataclasses import make_dataclass
from typing import Any

_TRAIN_HELP = """usage: markovia train METHOD --env ID [flags]
       markovia train METHOD --env ID --dataset ID_OR_FILE [flags]
       markovia train METHOD --data FILE --model NAME [flags]

Train a method on an environment. The flags are those of the method: `markovia train METHOD --env ID --help` shows them with the values
that its presets give it there, `markovia systems` lists the methods and `markovia envs` the environments.

  markovia train ppo --env HalfCheetah-v5
  markovia train ppo --env markovia/Sentiment-v0
  markovia train td3-bc --env Pendulum-v1 --dataset markovia/pendulum/medium-v0
  markovia train dpo --data prefs.jsonl --model smollm2 --agent-options '{"lora": {"r": 16}}' --solver.lr 1e-4
  markovia train ppo --env markovia/Digits-v0 --surrogate.clip 0.1 --seed 3
  markovia train ddpo --env markovia/Pipeline-v0 --model FOLDER --data prompts.txt --reward my.rewards:pretty --agent-options '{"lora": {"r": 8}}'
  markovia train rloo --env markovia/Prompts-v0 --data prompts.jsonl --reward my.rewards:polite --reward my.rewards:short --reward-weights 1 0.5"""


def train_command(argv: list[str]) -> None:
    """The method is resolved first; tyro then builds the parser from its settings for this environment."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_TRAIN_HELP)
        if not argv:
            raise ValueError("train needs a method, e.g. `markovia train ppo --env HalfCheetah-v5`")
        return
    from markovia.algos.systems import find

    method_id, flags = argv[0], argv[1:]
    if method_id.startswith("-"):
        raise ValueError(f"the method comes first: markovia train METHOD --env ID ..., got {method_id!r}")
    row = find(method_id)
    env = _flag(flags, "--env")
    wants_help = "-h" in flags or "--help" in flags
    if env is None and _flag(flags, "--data") is None and not wants_help:
        from markovia.algos.preference.method import FromPreferences

        if isinstance(row.value, FromPreferences):
            raise ValueError(f"{method_id} learns from preferences: `markovia train {method_id} --data prefs.jsonl --model smollm2`")
        raise ValueError(f"train needs an environment, e.g. `markovia train {method_id} --env HalfCheetah-v5`")
    given = _parse_train(method_id, env, flags, row)
    from markovia.runs import train

    options = dict(vars(given.run))
    for name in ("env_kwargs", "agent_options", "data_options"):
        options[name] = json_object(options[name], f"--{name.replace('_', '-')}")
    options["references"] = dict(named_folder(word) for word in options.pop("reference"))
    if options.pop("num_seeds") != 1:
        from markovia.seeds import train_seeds

        for result in train_seeds(given.settings, method_id=method_id, num_seeds=given.run.num_seeds, **options):
            _tell(result)
        return
    _tell(train(given.settings, method_id=method_id, **options))


def _tell(result: Any) -> None:
    """One line on a run that has ended."""
    if not result.done:  # another process of several tells
        return
    evaluation = result.done["evaluation"]
    score = f", evaluation return {evaluation['mean']:.4g} ± {evaluation['std']:.3g} over {len(evaluation['returns'])}" if evaluation else ""
    if evaluation and "score_pct" in evaluation:
        score += f", score {sum(evaluation['score_pct']) / len(evaluation['score_pct']):.1f} (0 random, 100 reference)"
    print(f"{result.run}: {result.done['num_env_steps']:,} steps in {result.done['seconds']:.1f} s{score}")


def _parse_train(method_id: str, env: str | None, flags: list[str], row: Any) -> Any:
    from typing import Annotated

    import tyro

    from markovia.envs.control.vector import env_spec
    from markovia.runs import resolve
    from markovia.train_flags import TrainFlags

    settings = row.value
    if env is not None:
        env_spec(env)
        _, settings, _ = resolve(method_id, env)

    unprefixed = tyro.conf.arg(name="")
    fields: list[Any] = [("run", Annotated[TrainFlags, unprefixed]), ("settings", Annotated[type(settings), unprefixed])]
    Train = make_dataclass("Train", fields, frozen=True)
    about = f"{method_id}: {row.new} (arXiv {row.paper}). Values shown are those for {env or 'no environment in particular'}."
    default = Train(TrainFlags(env), settings)
    return tyro.cli(
        Train, prog=f"markovia train {method_id}", description=about, args=flags, default=default, config=(tyro.conf.AvoidSubcommands,)
    )


def _flag(argv: list[str], name: str) -> str | None:
    """The value of one flag, before there is a parser; of a repeated one the last, as the parser takes it."""
    found = None
    for word, following in itertools.pairwise([*argv, None]):
        if word == name:
            found = following
        elif word is not None and word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def named_folder(word: str) -> tuple[str, str]:
    """(name, folder) of NAME=FOLDER. Raises ValueError for another form."""
    name, equals, folder = word.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"--reference takes NAME=FOLDER, e.g. teacher=runs/Arithmetic-v0/grpo-seed0, got {word!r}")
    return name, folder


def json_object(text: str, flag: str) -> dict[str, Any]:
    """The object that a flag gives as JSON. Raises ValueError that names the flag."""
    try:
        value = json.loads(text)
    except ValueError as e:
        raise ValueError(f"{flag} takes a JSON object such as '{{\"name\": 1}}', got {text!r} ({e})") from e
    if not isinstance(value, dict):
        raise ValueError(f"{flag} takes a JSON object such as '{{\"name\": 1}}', got {text!r}")
    return value
