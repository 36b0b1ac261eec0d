"""Make offline datasets: train to a return, then record random, medium, medium-replay, medium-expert and expert as Minari datasets.

A folder holds what a collection needs to go on:
    collect.json     what was asked for          milestones.json  evaluations so far, the medium and the best policy
    run/             the training run            log/N.npz        every environment step of iteration N, up to the medium policy
    agents/          the two policies            references.json  mean returns that count as 0 and 100
"""

from __future__ import annotations

import importlib
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from markovia.envs.durable import write_whole
from markovia.loop import told_to_resume
from markovia.provenance import versions
from markovia.recipes import Recipe
from markovia.rundir import RunError, checkpoints, read_json, write_json
from markovia.settings import content_hash, differences

TIERS = ("random", "medium-replay", "medium", "medium-expert", "expert")  # by rising return
EPISODES_PER_EVALUATION = 10
NUM_ENVS = 10  # environments that play side by side while a tier is recorded


@dataclass(frozen=True)
class Tier:
    """One recorded dataset."""

    name: str
    dataset_id: str
    num_episodes: int
    num_steps: int
    mean_return: float
    score_pct: float


def default_folder(env: str, seed: int) -> Path:
    """runs/<env>/collect-seed<seed>."""
    from markovia.runs import default_folder as of_run

    return of_run("collect", env, seed)


def collect(
    recipe: Recipe,
    *,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    tiers: Sequence[str] | None = None,
    namespace: str = "markovia",
    medium_run: str | Path | None = None,
    expert_run: str | Path | None = None,
    progress: bool = True,
) -> list[Tier]:
    """Carry out a recipe; a tier that is there already is left as it is, so an interrupted collection goes on with resume=True.

    tiers                   which to record; None: all that can be recorded this way
    medium_run, expert_run  folders of runs whose newest checkpoint is the medium and the best policy; nothing is trained then, and there is no
                            medium-replay. With expert_run alone only random and expert can be recorded.
    Raises ValueError for what was asked wrongly, RunError when the folder can't be used or training did not reach the medium return.
    """
    from markovia.envs.control.vector import env_spec
    from markovia.envs.registry import kind_of

    if kind_of(recipe.env) not in ("control", "tabular"):
        raise ValueError(f"{recipe.env} is a {kind_of(recipe.env)} task; offline datasets are recorded from stepped environments (control, tabular)")
    env_spec(recipe.env)
    chosen = _check_tiers(tiers, medium_run, expert_run, recipe)
    folder = Path(out) if out is not None else default_folder(recipe.env, seed)
    asked = {
        "recipe": {**asdict(recipe), "settings": _plain(recipe.settings)},
        "seed": seed,
        "namespace": namespace,
        "medium_run": str(medium_run) if medium_run else None,
        "expert_run": str(expert_run) if expert_run else None,
    }
    work = _Collection(recipe, seed, folder, namespace, asked, progress)
    if expert_run is not None:
        asked["policies"] = work.use_runs(medium_run, expert_run)
    _check_folder(folder, asked, resume)
    work.check_ids(chosen)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "collect.json", asked)
    with told_to_resume(lambda: True):
        if expert_run is None and recipe.method is None:
            work.use_controller()
        elif expert_run is None:
            work.train()
        return [work.tier(name) for name in chosen]


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON gives back."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _check_tiers(tiers: Sequence[str] | None, medium_run: Any, expert_run: Any, recipe: Recipe) -> list[str]:
    """The tiers to record, by rising return. Raises ValueError for one that is asked for by name and can't be recorded this way."""
    unknown = [t for t in tiers or () if t not in TIERS]
    if unknown:
        raise ValueError(f"unknown tier {unknown[0]!r}; choose from {', '.join(TIERS)}")
    if medium_run is not None and expert_run is None:
        raise ValueError("a medium run needs an expert run beside it, whose return counts as 100; pass both")
    without: set[str] = set()
    if expert_run is not None or recipe.method is None:
        without = {"medium-replay"}
    if expert_run is not None and medium_run is None:
        without |= {"medium", "medium-expert"}
    impossible = [t for t in TIERS if t in (tiers or ()) and t in without]
    if impossible:
        why = "nothing is trained, so there is no replay" if impossible == ["medium-replay"] else "give a medium run (--medium-run)"
        raise ValueError(f"{', '.join(impossible)} can't be recorded this way: {why}")
    return [t for t in TIERS if t in (tiers or TIERS) and t not in without]


def _check_folder(folder: Path, asked: dict[str, Any], resume: bool) -> None:
    """A new collection wants an empty folder, a resumed one the same request; the namespace may change. Raises RunError otherwise."""
    file = folder / "collect.json"
    if file.exists():
        changed = differences({**read_json(file), "namespace": None}, {**asked, "namespace": None})
        if changed:
            raise RunError(f"{folder} was started with another request ({'; '.join(changed[:3])}); use another folder, or delete this one")
        if not resume:
            raise RunError(f"{folder} already holds this collection; go on with it (--resume), or choose another folder (--out)")
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no collection; use another folder")


def _settings(recipe: Recipe) -> Any:
    """Those of the method that trains. Raises ValueError for one that does not exist or does not learn from an environment."""
    from markovia.algos.families import family_of
    from markovia.algos.presets import configure, override

    assert recipe.method is not None
    settings = configure(recipe.method, recipe.env)
    if (reads := family_of(settings).reads) != "environment":
        raise ValueError(f"{recipe.method} learns from a {reads}, not from {recipe.env}; collect with a method that does (--method), e.g. sac")
    return override(settings, {**recipe.settings, "num_env_steps": recipe.num_env_steps})


class _Uniform:
    """Uniform actions of a space, as a policy."""

    def __init__(self, space: Any) -> None:
        self.space = space

    def reseed(self, seed: int) -> None:
        """Start the draws anew."""
        self.space.seed(seed % 2**31)

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        """An action for each of the environments that play side by side."""
        return np.stack([self.space.sample() for _ in range(NUM_ENVS)]), state


def play(
    env: str, policy: Any, seed: int, stream: str, *, deterministic: bool = False, progress: Callable[[int, float], None] | None = None, **amount: int
) -> Any:
    """Episodes of a policy with `predict`, or of uniform actions (None); seeds of environments and actions come from (seed, stream) alone.

    amount  num_steps, episodes: see `markovia.envs.offline.log.record`
    """
    import torch

    from markovia.algos.streams import stream_seed
    from markovia.envs.control.vector import make_vec
    from markovia.envs.offline.log import record

    venv = make_vec(env, NUM_ENVS, vectorization="sync")
    actor = _Uniform(venv.single_action_space) if policy is None else policy

    def of_wave(wave: int) -> Any:
        drawn = stream_seed(seed, f"{stream}-actions", wave)
        getattr(actor, "reseed", torch.manual_seed)(drawn)  # a scripted controller has a generator of its own
        return actor

    first = stream_seed(seed, stream) % 2**30
    try:
        with torch.random.fork_rng(devices=[]):
            return record(venv, of_wave, _about(env), seed=first, deterministic=deterministic, progress=progress, **amount)
    finally:
        venv.close()


def _about(env: str) -> Any:
    """What the recorded rows belong to."""
    from markovia.envs.control.vector import env_spec, make_env
    from markovia.envs.offline import About

    spec, made = env_spec(env), make_env(env)
    spaces = made.observation_space, made.action_space
    made.close()
    return About(spec.id, spec.id, spec.max_episode_steps, *spaces, spec)


class _Watch:
    """During training: log every step up to the medium policy, evaluate, and keep the medium and the best policy.

    Evaluations sample actions, as the recording will: a tier is then what its name says. Of equal returns the later policy is kept.
    Everything is written under names that a resumed run writes again with the same content.
    """

    def __init__(self, folder: Path, recipe: Recipe, seed: int) -> None:
        self.folder, self.recipe, self.seed = folder, recipe, seed
        self.file = folder / "milestones.json"
        self.found: dict[str, Any] = read_json(self.file) if self.file.exists() else {"evaluations": {}}
        self.log: Any = None

    def prepare(self, setup: Any) -> None:
        """Put the log around the run's environments."""
        from markovia.envs.offline.log import StepLog

        self.log = setup.collector.venv = StepLog(setup.collector.venv)

    def __call__(self, info: Any) -> None:
        steps, medium = self.log.take(), self.found.get("medium")
        if steps is not None and (medium is None or info.iteration <= medium["iteration"]):
            _save_steps(self.folder / "log" / f"{info.iteration:06d}.npz", steps)
        number = str(info.num_env_steps // self.recipe.eval_every)
        if number == "0" or number in self.found["evaluations"]:
            return
        score = float(play(self.recipe.env, info.agent, self.seed, "evaluation", episodes=EPISODES_PER_EVALUATION).returns().mean())
        self.found["evaluations"][number] = {"num_env_steps": info.num_env_steps, "return": score}
        here = {"iteration": info.iteration, "num_env_steps": info.num_env_steps, "return": score}
        if medium is None and score >= self.recipe.medium_return:
            info.agent.save(self.folder / "agents" / "medium")
            self.found["medium"] = here
        if "best" not in self.found or score >= self.found["best"]["return"]:
            info.agent.save(self.folder / "agents" / "best")
            self.found["best"] = here
        write_json(self.file, self.found)


def _save_steps(path: Path, steps: Any) -> None:
    """One compressed file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **steps.arrays())
    write_whole(path, buffer.getvalue())


class _Collection:
    """The state of one collection: its policies, its reference returns, its tiers."""

    def __init__(self, recipe: Recipe, seed: int, folder: Path, namespace: str, asked: dict[str, Any], progress: bool) -> None:
        self.recipe, self.seed, self.folder, self.namespace, self.asked, self.progress = recipe, seed, folder, namespace, asked, progress
        self.settings: Any = None if recipe.method is None else _settings(recipe)
        self.policies: dict[str, Any] = {}  # "medium" and "expert": anything with predict
        self.milestones: dict[str, Any] = {}

    # -- policies ---------------------------------------------------------------------------------------------------------------------

    def use_runs(self, medium_run: str | Path | None, expert_run: str | Path) -> dict[str, str]:
        """Take the newest checkpoints of two runs; their hashes. Raises RunError when one was trained on another environment."""
        from markovia.loaded import load_run

        hashes = {}
        for name, run in (("medium", medium_run), ("expert", expert_run)):
            if run is None:
                continue
            loaded = load_run(run)
            if loaded.config["env"] != self.recipe.env:
                raise RunError(f"{run} was trained on {loaded.config['env']}, not on {self.recipe.env}")
            if loaded.config["env_kwargs"]:
                raise RunError(
                    f"{run} was trained on {self.recipe.env} with {loaded.config['env_kwargs']}, but datasets are recorded without arguments; "
                    "register the environment with them under an id of its own and train on that"
                )
            self.policies[name] = loaded.agent
            self.milestones[name] = {"method": loaded.config["method"], "run": str(run)}
            hashes[name] = content_hash(checkpoints(Path(run))[-1] / "agent")
        return hashes

    def use_controller(self) -> None:
        """A scripted expert, and the same with noise 0.5 as the medium policy."""
        module, _, name = self.recipe.controller.partition(":")
        make = getattr(importlib.import_module(module), name)
        self.policies = {name: make(self.recipe.env, noise=noise, seed=self.seed) for name, noise in (("expert", 0.0), ("medium", 0.5))}

    def train(self) -> None:
        """Train, or go on training, until the budget is spent. Raises RunError when no evaluation reached the medium return."""
        from markovia.agents import Agent
        from markovia.runs import train

        recipe, run = self.recipe, self.folder / "run"
        watch = _Watch(self.folder, recipe, self.seed)
        if not (run / "done.json").exists():
            options: dict[str, Any] = {"callbacks": [watch], "prepare": watch.prepare, "method_id": recipe.method, "eval_episodes": 0}
            train(self.settings, recipe.env, seed=self.seed, out=run, resume=run.exists(), progress=self.progress, **options)
        self.milestones = watch.found
        if "medium" not in watch.found:
            best = watch.found.get("best", {"return": float("nan")})["return"]
            raise RunError(
                f"training never reached the medium return {recipe.medium_return:g} (best {best:.4g} in {recipe.num_env_steps:,} steps); "
                "train longer (--num-env-steps) or lower --medium-return, into another --out"
            )
        self.policies = {"medium": Agent.load(self.folder / "agents" / "medium"), "expert": Agent.load(self.folder / "agents" / "best")}

    # -- recording --------------------------------------------------------------------------------------------------------------------

    def record(self, policy: str, stream: str, deterministic: bool = False, **amount: int) -> Any:
        """Episodes of "random" or of one of the policies, with progress where whole tiers are recorded."""
        sink = _sink(f"{stream} on {self.recipe.env}", amount.get("num_steps", 0), self.progress)
        shown = (lambda steps, mean: sink.write({"num_env_steps": steps, "return": mean})) if sink is not None else None
        try:
            return play(self.recipe.env, self.policies.get(policy), self.seed, stream, deterministic=deterministic, progress=shown, **amount)
        finally:
            if sink is not None:
                sink.close()

    def reference(self) -> Any:
        """Mean return of the random policy as 0 and of the greedy best one as 100; measured once."""
        from markovia.envs.offline import Reference

        file, n = self.folder / "references.json", self.recipe.num_reference
        if not file.exists():
            low = float(self.record("random", "reference-random", episodes=n).returns().mean())
            high = float(self.record("expert", "reference-best", deterministic=True, episodes=n).returns().mean())
            write_json(file, {"min": low, "max": high})
        found, about = read_json(file), _about(self.recipe.env)
        if not found["min"] < found["max"]:
            raise RunError(f"the best policy returns {found['max']:.4g}, no more than random actions ({found['min']:.4g}); train longer")
        source = f"means over {n} random and {n} greedy episodes of the best policy on this environment"
        return Reference(about.env_id, about.horizon, found["min"], found["max"], source)

    def tier(self, name: str) -> Tier:
        """Record one tier, or read it where it was recorded before. Raises RunError when its id belongs to another collection."""
        from markovia.envs.offline import check_transitions, load_minari, write_minari
        from markovia.envs.offline.minari_io import content_sha256, dataset_root
        from markovia.envs.offline.sources import tier_id

        dataset_id = tier_id(self.recipe.env, name, self.namespace)
        reference = self.reference()
        if not (dataset_root() / dataset_id).exists():
            data = self._rows(name)
            data = replace(data, about=replace(data.about, name=dataset_id, reference=reference))
            check_transitions(data).check()
            write_minari(data, dataset_id, metadata=self._metadata(name, data))
        data = load_minari(dataset_id)
        self._own(dataset_id, data.about.metadata)
        if content_sha256(data) != data.about.metadata["content_sha256"]:
            raise RunError(f"the dataset {dataset_id} does not read back as it was written; delete it (minari delete {dataset_id}) and go on")
        mean = float(data.returns().mean())
        return Tier(name, dataset_id, data.num_episodes, len(data), mean, float(reference.score_pct(mean)))

    def check_ids(self, tiers: Sequence[str]) -> None:
        """What `tier` would find after hours of training. Raises ValueError for ids and environments that Minari can't store, RunError for ids of
        other sets.
        """
        from markovia.envs.control.vector import env_spec
        from markovia.envs.offline.minari_io import check_id, check_spec, dataset_root, open_minari
        from markovia.envs.offline.sources import tier_id

        check_spec(env_spec(self.recipe.env))
        for dataset_id in (check_id(tier_id(self.recipe.env, name, self.namespace)) for name in tiers):
            if (dataset_root() / dataset_id).exists():
                self._own(dataset_id, read_json(Path(open_minari(dataset_id).storage.data_path) / "metadata.json"))

    def _own(self, dataset_id: str, metadata: dict[str, Any]) -> None:
        theirs = metadata.get("markovia", {}).get("asked")
        if theirs != self.asked:
            raise RunError(
                f"the dataset {dataset_id} exists and was not made by this request; choose another --namespace (with --resume where "
                f"--out was begun), or delete it (minari delete {dataset_id})"
            )

    def _rows(self, name: str) -> Any:
        from markovia.envs.offline import concatenate

        n = self.recipe.num_steps
        if name == "medium-replay":
            return self._replay()
        if name == "medium-expert":  # the same episodes as in the two tiers: they depend on seed and tier alone
            return concatenate([self.record(t, t, num_steps=n) for t in ("medium", "expert")])
        return self.record(name, name, num_steps=n)

    def _replay(self) -> Any:
        """What training did up to the medium policy, warm-up included: everything, or about `replay_steps` of it in whole episodes drawn evenly."""
        from markovia.envs.offline.log import Steps, as_transitions, join

        last = self.milestones["medium"]["iteration"]
        parts = []
        for iteration in range(1, last + 1):
            file = self.folder / "log" / f"{iteration:06d}.npz"
            if not file.exists():
                raise RunError(f"{file} is missing, so medium-replay can't be put together; collect again into another --out")
            with np.load(file) as arrays:
                parts.append(Steps.from_arrays(dict(arrays)))
        data, limit = as_transitions(join(parts), _about(self.recipe.env)), self.recipe.replay_steps
        if limit is None or len(data) <= limit:
            return data
        order = np.random.default_rng(self.seed).permutation(data.num_episodes)
        enough = int(np.searchsorted(np.cumsum(data.lengths()[order]), limit)) + 1
        return data.episodes(order[:enough])

    def _metadata(self, name: str, data: Any) -> dict[str, Any]:
        how = {
            "random": "uniform actions",
            "medium": "sampled actions of the medium policy",
            "expert": "sampled actions of the best policy",
            "medium-replay": "training up to the medium policy" + (", whole episodes drawn evenly" if self.recipe.replay_steps else ""),
            "medium-expert": "the medium and the expert tier",
        }[name]
        return {
            "algorithm_name": self.recipe.method or "controller",
            "description": f"{self.recipe.env}, {name}: {how}",
            "markovia": {
                "tier": name,
                "asked": self.asked,
                "medium": self.milestones.get("medium"),
                "best": self.milestones.get("best"),
                "mean_return": float(data.returns().mean()),
                "versions": versions(),
            },
        }


def _sink(label: str, total: int, progress: bool) -> Any:
    """A progress bar, or lines where nobody looks at a terminal; None for what is short or not to be shown."""
    import sys

    from markovia.report import Bar, Lines

    if not progress or not total:
        return None
    return Bar(label, total, 0) if sys.stdout.isatty() else Lines(label, total, 0)


def out_of_order(tiers: Sequence[Tier]) -> list[str]:
    """Where the mean returns do not rise from random over medium-replay and medium to expert."""
    ranked = [t for name in TIERS for t in tiers if t.name == name and name != "medium-expert"]
    pairs = itertools.pairwise(ranked)
    return [f"{a.name} ({a.mean_return:.4g}) is not below {b.name} ({b.mean_return:.4g})" for a, b in pairs if not a.mean_return < b.mean_return]
