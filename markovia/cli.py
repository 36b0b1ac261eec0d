"""The command line. Each command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markovia.cli_text import chat_command, export_command
from markovia.cli_train import json_object, train_command

USAGE = """usage: markovia COMMAND ...

commands
  train METHOD --env ID   train a method on an environment     markovia train ppo --env HalfCheetah-v5
  train METHOD --env ID --dataset D   learn from logged data     markovia train td3-bc --env Pendulum-v1 --dataset markovia/pendulum/medium-v0
  train METHOD --data F   train a language model on a file of preferences     markovia train dpo --data prefs.jsonl --model smollm2
  eval RUN ...            evaluate trained runs                markovia eval runs/HalfCheetah-v5/ppo-seed0
  cost-of RUN             what a trained policy costs per episode, against its limit
  plot RUN ...            learning curves as a PNG
  profile METHOD --env ID how training time splits
  video RUN               rendered episodes, or samples of a text or denoising run
  chat RUN                talk to a trained language agent
  export RUN --out DIR    its model as a plain Hugging Face folder, LoRA adapters merged or apart
  show METHOD             sentence, equation, paper, parent, source and settings of a method
  systems                 all methods
  envs                    all environments of markovia (any Gymnasium id can be trained on as well)
  dataset [ID]            what an offline dataset holds, as a page and a PNG; without ID: those on this machine
  collect ENV             train, then record random, medium, medium-replay, medium-expert and expert datasets
  claims [ID ...]         measure what the methods promise
  demo                    train on control, text and digits, check the results, write a page

`markovia COMMAND --help` tells more; MARKOVIA_DEBUG=1 shows the traceback of an error."""


# Where "module:name" is typed and found in the current folder. Not where files of others are read, for that folder may be theirs (SECURITY.md).
CODE_IS_NAMED = ("train", "profile", "collect", "show")


class Failed(Exception):
    """A command that ran and found something wrong: exit code 1."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Exit code 0: done, 1: a check failed, 2: it was asked wrongly or could not be done, 130: interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in CODE_IS_NAMED:
        sys.path.append(os.getcwd())  # behind the rest, so that no file there takes the place of a library
    sys.exit(run(words))


def run(argv: list[str]) -> int:
    """Run a command and turn its errors into one line and an exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] in ("--version", "-V"):
        from markovia import __version__

        print(f"markovia {__version__}")
        return 0
    try:
        command = COMMANDS.get(argv[0])
        if command is None:
            from markovia.algos.table import nearest

            raise ValueError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)} (`markovia --help` lists all)")
        command(argv[1:])
    except KeyboardInterrupt as e:
        print("\n" + "; ".join(["interrupted", *map(str, e.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # `markovia systems | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Failed as e:
        print(e, file=sys.stderr)
        return 1
    except Exception as e:
        if os.environ.get("MARKOVIA_DEBUG") == "1":
            raise
        print(f"markovia: {one_line(e)}", file=sys.stderr)
        return 2
    return 0


def one_line(error: Exception) -> str:
    """The message alone where the error is one of ours, with its class where it is not (a fault worth its traceback)."""
    text = " ".join(str(error).split()) or "no message"
    ours = isinstance(error, ImportError) and error.name is None  # Python's own names the module
    if ours or isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("markovia."):
        return text
    return f"{type(error).__name__}: {text} (MARKOVIA_DEBUG=1 shows where)"


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"markovia {command}", description=about)


def _at_least(least: int, flag: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{flag} must be >= {least}, got {value}")


# -- after training -------------------------------------------------------------------------------------------------------------------


def eval_command(argv: list[str]) -> None:
    parser = _parser("eval", "Evaluate the newest checkpoint of each run and summarise over runs: mean, interquartile mean, 95 % interval.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--episodes", type=int, default=10, help="episodes or samples per run (default 10)")
    parser.add_argument("--seed", type=int, default=1000, help="of the evaluation (default 1000, apart from training seeds)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from markovia.loaded import load_run
    from markovia.summary import summary

    _at_least(1, "--episodes", args.episodes)
    _at_least(0, "--seed", args.seed)
    results = {}
    for path in args.runs:
        loaded = load_run(path)
        results[str(path)] = summary(loaded.evaluate(loaded.agent, args.episodes, args.seed))
    over = summary({"returns": [r["mean"] for r in results.values()]})
    if args.json:
        print(json.dumps({"runs": results, "over_runs": over}, indent=1))
        return
    for path, r in results.items():
        passed = "".join(f", {k} {r[k]:.4g}" for k in ("pass@1", "pass@8") if k in r)
        interval = f"95 % [{r['ci95'][0]:.4g}, {r['ci95'][1]:.4g}]"
        print(f"{path}: mean {r['mean']:.4g}, IQM {r['iqm']:.4g}, {interval}, {len(r['returns'])} episodes{passed}")
    if len(results) > 1:
        print(f"over {len(results)} runs: mean {over['mean']:.4g}, IQM {over['iqm']:.4g}, 95 % [{over['ci95'][0]:.4g}, {over['ci95'][1]:.4g}]")


def cost_of_command(argv: list[str]) -> None:
    parser = _parser("cost-of", "What the policy of a run costs per episode: sampled actions as in training, greedy ones, behind its shield.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--episodes", type=int, default=10, help="episodes of each kind (default 10)")
    parser.add_argument("--seed", type=int, default=1000, help="of the evaluation (default 1000, apart from training seeds)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from markovia.costs import cost_of

    _at_least(1, "--episodes", args.episodes)
    _at_least(0, "--seed", args.seed)
    found = cost_of(args.run, args.episodes, args.seed)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    limit = "no limit known" if found["limit"] is None else f"limit {found['limit']:.4g}"
    for name in ("sampled", "greedy", "shielded"):
        if name not in found:
            continue
        r = found[name]
        over = "" if r["over"] is None else f", {100 * r['over']:.0f} % of episodes over it"
        print(f"{name}: cost {r['cost']:.4g} ± {r['cost_std']:.3g} an episode ({limit}{over}), return {r['return']:.4g}")


def plot_command(argv: list[str]) -> None:
    parser = _parser("plot", "Learning curves: a panel per environment, a line per method and settings with the range over seeds.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, default=Path("curves.png"), help="PNG to write (default curves.png)")
    parser.add_argument("--y", default="return", help="statistic of metrics.jsonl (default return), or pass@k of the evaluation")
    parser.add_argument("--x", default="num_env_steps", help="what it is plotted against (default num_env_steps), e.g. kl_nats for --y sample_return")
    parser.add_argument("--smooth", type=int, default=1, help="running mean over so many iterations (default 1)")
    args = parser.parse_args(argv)
    from markovia.pictures import plot_runs

    _at_least(1, "--smooth", args.smooth)
    print(plot_runs(args.runs, args.out, args.y, args.smooth, args.x))


def video_command(argv: list[str]) -> None:
    parser = _parser("video", "Episodes of a run as MP4 through Gymnasium's recorder; texts of text runs; samples and GIFs of denoising runs.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, help="folder to write to (default RUN/video)")
    parser.add_argument("--episodes", type=int, default=1, help="episodes, or samples (default 1; 32 samples)")
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args(argv)
    from markovia.loaded import load_run
    from markovia.pictures import record_video
    from markovia.samples import write_samples
    from markovia.settings import from_json

    _at_least(1, "--episodes", args.episodes)
    _at_least(0, "--seed", args.seed)
    loaded = load_run(args.run)
    folder = args.out or args.run / "video"
    if loaded.task is not None:
        for path in write_samples(loaded.agent, loaded.task, folder, max(args.episodes, 32), args.seed, args.run):
            print(path)
        return
    env_kwargs = from_json(dict[str, Any], loaded.config["env_kwargs"])
    for path in record_video(loaded.agent, loaded.config["env"], env_kwargs, folder, args.episodes, args.seed):
        print(path)


def profile_command(argv: list[str]) -> None:
    parser = _parser("profile", "How training time splits into environment, policy, update and the rest, with the presets of the environment.")
    parser.add_argument("method", metavar="METHOD")
    parser.add_argument("--env", required=True, metavar="ID", help="Gymnasium id")
    parser.add_argument("--iterations", type=int, default=5, help="iterations that are timed, after one that is not (default 5)")
    parser.add_argument("--vectorization", default="auto", help="as in train (default auto)")
    parser.add_argument("--settings", default="{}", help="JSON object of settings, e.g. '{\"num_envs\": 8}'")
    parser.add_argument("--eager", action="store_true", help="do not compile the updates")
    args = parser.parse_args(argv)
    from markovia.profile import profile, show

    _at_least(1, "--iterations", args.iterations)
    settings = json_object(args.settings, "--settings")
    found = profile(args.method, args.env, args.iterations, args.vectorization, not args.eager, settings)
    show(found, f"{args.method} on {args.env}")


# -- what there is --------------------------------------------------------------------------------------------------------------------


def show_command(argv: list[str]) -> None:
    parser = _parser("show", "What a method is: sentence, equation, paper, parent, file and line, claim, settings.")
    parser.add_argument("method", metavar="METHOD")
    parser.add_argument("--env", help="show the settings that presets give it for this environment")
    args = parser.parse_args(argv)
    from markovia.catalogue import card

    print(card(args.method, args.env))


def _list(argv: list[str], parser: argparse.ArgumentParser, rows: Callable[[], list[dict[str, Any]]], rest: Callable[[dict[str, Any]], str]) -> None:
    """Print rows as JSON, or a line each: the ids in a column, and the `rest` of the row."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json, found = parser.parse_args(argv).json, rows()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    width = max((len(row["id"]) for row in found), default=0)
    for row in found:
        print(f"{row['id']:<{width}}  {rest(row)}")


def systems_command(argv: list[str]) -> None:
    from markovia.catalogue import systems

    about = "All methods, with what the last measurement of their claims found."
    _list(argv, _parser("systems", about), systems, lambda s: f"{s['new']}  [{', '.join(s['kinds'])}; arXiv {s['paper']}; claim: {s['result']}]")


def envs_command(argv: list[str]) -> None:
    from markovia.catalogue import environments

    about = "The environments of markovia. Every other Gymnasium id, e.g. HalfCheetah-v5, can be trained on as well."
    _list(argv, _parser("envs", about), environments, lambda e: f"{e['kind']:<10} {e['kwargs'] or ''}")


# -- offline data ---------------------------------------------------------------------------------------------------------------------


def dataset_command(argv: list[str]) -> None:
    parser = _parser("dataset", "What an offline dataset holds: episodes, returns, ends, coverage. A Minari id, a D4RL file or fixture:NAME.")
    parser.add_argument("id", nargs="?", metavar="ID", help="without it: list the Minari datasets on this machine")
    parser.add_argument("--reference", metavar="ID", help="what coverage (SACo) is measured against (default: the medium-replay tier beside it)")
    parser.add_argument("--env-id", help="D4RL id of a file whose name does not tell, for its time limit and reference returns")
    parser.add_argument("--horizon", type=int, help="time limit of a file without timeouts")
    parser.add_argument("--download", action="store_true", help="fetch a Minari dataset that is not on this machine")
    parser.add_argument("-o", "--out", type=Path, help="PNG to write (default <ID>.png)")
    parser.add_argument("--json", action="store_true", help="print JSON, write no PNG unless --out is given")
    args = parser.parse_args(argv)
    from markovia.envs.offline.minari_io import local_ids
    from markovia.envs.offline.validate import DatasetError

    if args.id is None:
        print("\n".join(local_ids()))
        return
    from markovia.dataset import default_png, describe, show, write_png

    try:
        page, data = describe(args.id, args.reference, env_id=args.env_id, horizon=args.horizon, download=args.download)
    except DatasetError as e:
        raise Failed(str(e)) from e
    if args.json:
        print(json.dumps(page, indent=1))
    else:
        show(page)
    if args.out is not None or not args.json:
        path = write_png(data, args.out or default_png(args.id))
        print(path, file=sys.stderr if args.json else sys.stdout)


def collect_command(argv: list[str]) -> None:
    parser = _parser("collect", "Train to a return, then record five tiers as Minari datasets. Recipes: see markovia/recipes.py; flags change them.")
    parser.add_argument("env", metavar="ENV", help="Gymnasium id, e.g. Pendulum-v1")
    parser.add_argument("--method", help="id of the method that trains")
    parser.add_argument("--num-env-steps", type=int, help="steps of training")
    parser.add_argument("--medium-return", type=float, help="the first evaluation that reaches it is the medium policy")
    parser.add_argument("--num-steps", type=int, help="transitions per tier")
    parser.add_argument("--eval-every", type=int, help="environment steps between two evaluations")
    parser.add_argument("--tiers", nargs="+", metavar="TIER", help="which tiers (default all that can be recorded this way)")
    parser.add_argument("--expert-run", type=Path, metavar="RUN", help="run whose newest checkpoint is the best policy; nothing is trained")
    parser.add_argument("--medium-run", type=Path, metavar="RUN", help="run whose newest checkpoint is the medium policy")
    parser.add_argument("--namespace", default="markovia", help="first part of the dataset ids (default markovia)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--out", type=Path, help="working folder (default runs/<env>/collect-seed<seed>)")
    parser.add_argument("--resume", action="store_true", help="go on with that folder")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress")
    args = parser.parse_args(argv)
    from markovia.collect import collect, out_of_order
    from markovia.recipes import Recipe, check_idle, recipe

    _at_least(0, "--seed", args.seed)
    changes = {k: getattr(args, k) for k in ("method", "num_env_steps", "medium_return", "num_steps", "eval_every")}
    if args.expert_run is not None:
        check_idle("with --expert-run", changes, "leave it out")
        chosen = Recipe(args.env, None) if args.num_steps is None else Recipe(args.env, None, num_steps=args.num_steps)
    else:
        chosen = recipe(args.env, **changes)
    options = {k: getattr(args, k) for k in ("seed", "out", "resume", "namespace", "medium_run", "expert_run", "progress")}
    tiers = collect(chosen, tiers=args.tiers, **options)
    width = max(len(t.dataset_id) for t in tiers)
    for t in tiers:
        size = f"{t.num_steps:>9,} steps  {t.num_episodes:>7,} episodes"
        print(f"{t.dataset_id:<{width}}  {size}  return {t.mean_return:>10.5g}  score {t.score_pct:>6.1f} %")
    for wrong in out_of_order(tiers):  # a learner can begin worse than random, and its replay tier with it
        print(f"note: {wrong}", file=sys.stderr)


def claims_command(argv: list[str]) -> None:
    parser = _parser("claims", "Measure what the methods promise. Without ids: all that have no result in the file yet.")
    parser.add_argument("ids", nargs="*", metavar="ID")
    parser.add_argument("--json", action="store_true", help="print one JSON object per claim")
    parser.add_argument("--speed", choices=("fast", "slow", "all"), default="all", help="class of claims (default all)")
    parser.add_argument("--results", type=Path, help="JSON lines file that keeps the results (default benchmarks/results/claims.jsonl)")
    parser.add_argument("--list", action="store_true", help="list the claims with what was found last, run nothing")
    args = parser.parse_args(argv)
    from markovia.catalogue import list_claims, run_claims

    if args.list:
        for line in list_claims(args.speed, args.results):
            print(line)
        return
    failed = []
    for result in run_claims(args.ids, args.speed, args.results):
        print(json.dumps(result) if args.json else _short(result), flush=True)
        if not result["holds"]:
            failed.append(result["id"])
    if failed:
        raise Failed(f"{len(failed)} claim(s) do not hold: {', '.join(failed)}")


def _short(result: dict[str, Any]) -> str:
    verdict = "holds" if result["holds"] else "FAILS"
    return f"{verdict}  {result['id']}  {result['seconds']:.1f} s  measured {json.dumps(result['measured'])}, bound {json.dumps(result['bound'])}"


def demo_command(argv: list[str]) -> None:
    parser = _parser("demo", "Train on control, text and digits (about 6 minutes on 2 cores), check the results, write one HTML page.")
    parser.add_argument("-o", "--out", type=Path, default=Path("demo"), help="folder for page and runs (default demo); its runs are replaced")
    parser.add_argument("--only", nargs="*", choices=("control", "text", "digits"), help="parts to run (default all)")
    args = parser.parse_args(argv)
    from markovia.demo import demo

    if not demo(args.out, tuple(args.only or ("control", "text", "digits"))):
        raise Failed("the demo missed a threshold; see the table above")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train_command,
    "eval": eval_command,
    "cost-of": cost_of_command,
    "plot": plot_command,
    "profile": profile_command,
    "video": video_command,
    "chat": chat_command,
    "export": export_command,
    "show": show_command,
    "systems": systems_command,
    "envs": envs_command,
    "dataset": dataset_command,
    "collect": collect_command,
    "claims": claims_command,
    "demo": demo_command,
}
