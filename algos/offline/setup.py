"""From a dataset and an environment id to an agent, a source of transitions and an evaluation in percent of the reference."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from markovia.agents.control import ControlAgent
from markovia.agents.improved import ImprovedAgent
from markovia.agents.return_conditioned import ReturnConditionedAgent
from markovia.algos.off_policy.collect import ReplayCollector
from markovia.algos.off_policy.driver import check_action_box
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.replay import Replay
from markovia.algos.off_policy.slots import ClosedForm, Mixture, QuantileCritics
from markovia.algos.offline.method import Logged, Offline
from markovia.algos.offline.sequences import ReturnConditioned, make_sequences
from markovia.algos.offline.source import make_source
from markovia.algos.offline.warm_start import Phases, WarmStart
from markovia.algos.setup import Evaluate, Request, Setup, evaluate_stepped
from markovia.envs.control.vector import make_env, make_vec
from markovia.envs.offline.scores import Reference, references
from markovia.envs.offline.sources import load
from markovia.envs.offline.transforms import terminate_at
from markovia.envs.offline.transitions import Transitions
from markovia.envs.untrusted import read_json

TRANSFORM = "transform.json"
REFERENCE = "reference.json"  # the returns that count as 0 and 100, or null; with it a run is evaluated without its dataset
_ROBOTS = ("hopper", "halfcheetah", "walker2d", "ant")
# arguments of a task that leave a score its meaning
_SAME_RETURNS = ("render_mode", "width", "height", "camera_name", "camera_id", "max_episode_steps", "continuing_task")


def read(dataset: str, settings: Logged) -> Transitions:
    """The dataset's rows, before what is done to rewards and observations; warns where no step pays what is to end an episode."""
    data = load(dataset, horizon=settings.horizon)
    if settings.terminate_at is None:
        return data
    largest = float(data.reward.max())
    if not largest >= settings.terminate_at:
        warnings.warn(f"data.terminate_at={settings.terminate_at} ends no episode: the largest reward of {dataset} is {largest:.6g}", stacklevel=2)
    return terminate_at(data, settings.terminate_at)


def build_offline(method: Offline, request: Request) -> Setup:
    """Everything for a run on a dataset; the environment is that of the evaluation. Raises ValueError when data and task do not fit."""
    assert request.dataset is not None
    env_id, env_kwargs = request.task, request.env_kwargs
    data = read(request.dataset, method.data)
    env = make_env(env_id, **env_kwargs)
    observation_space, action_space, spec = env.observation_space, env.action_space, env.spec
    env.close()
    check_action_box(action_space, "choose a task and a dataset with a Box of actions")
    options = {"device": request.device, "normalize_obs": method.data.normalize_obs, **request.agent_options}
    agent = make_agent(method, observation_space, action_space, **options)
    source = make_source(data, method.data, agent, method.gamma)
    scale = reference_of(data, env_id, spec.max_episode_steps if spec is not None else None, env_kwargs)
    note = describe(data, env_id, len(source.replay.store.reward), scale)  # type: ignore[union-attr]
    files = {TRANSFORM: json.dumps(source.transform.to_json()) + "\n", **reference_file(scale)}
    return Setup("control", agent, source, scored(env_id, env_kwargs, scale), note=note, files=files)


def build_sequences(method: ReturnConditioned, request: Request) -> Setup:
    """Everything for imitation given returns, on a dataset."""
    assert request.dataset is not None
    data = read(request.dataset, method.data)
    return build_from(data, request.task, method, request.env_kwargs, request.agent_options, request.device)


def build_from(
    data: Transitions,
    env_id: str,
    method: ReturnConditioned,
    env_kwargs: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Setup:
    """The same on rows in memory; the evaluation asks for the target return."""
    env_kwargs, options = env_kwargs or {}, options or {}
    env = make_env(env_id, **env_kwargs)
    horizon = env.spec.max_episode_steps if env.spec is not None else None
    target = method.target_return if method.target_return is not None else float(data.whole().returns().max())
    sizes = {k: getattr(method, k) for k in ("window", "layers", "heads", "width", "dropout", "return_scale")}
    sizes |= {"horizon": horizon or int(data.lengths().max()), "target_return": target, "normalize_obs": method.data.normalize_obs}
    agent = ReturnConditionedAgent.from_spaces(env.observation_space, env.action_space, device=device, **{**sizes, **options})
    env.close()
    source = make_sequences(data, method, agent)
    scale = reference_of(data, env_id, horizon, env_kwargs)
    note = f"{describe(data, env_id, source.replay.size, scale)}; asked for a return of {target:.4g}"
    files = {TRANSFORM: json.dumps(source.transform.to_json()) + "\n", **reference_file(scale)}
    return Setup("control", agent, source, scored(env_id, env_kwargs, scale), note=note, files=files)


def scored(env_id: str, env_kwargs: dict[str, Any], scale: Reference | None) -> Evaluate:
    """The evaluation of an agent that learnt from a dataset: episodes of the environment, in percent of the reference where there is one."""

    def evaluate(agent: Any, episodes: int, seed: int) -> dict[str, Any]:
        play = evaluate_asked if isinstance(agent, ReturnConditionedAgent) else evaluate_stepped
        found = play(agent, env_id, episodes, seed, env_kwargs)
        return found if scale is None else {**found, "score_pct": scale.score_pct(found["returns"]).tolist()}

    return evaluate


def reference_file(scale: Reference | None) -> dict[str, str]:
    """What the run folder holds of it."""
    return {REFERENCE: json.dumps(None if scale is None else asdict(scale)) + "\n"}


def read_reference(path: Path) -> Reference | None:
    """What `reference_file` wrote. Raises ValueError for a file that is something else."""
    told = read_json(path)
    try:
        return None if told is None else Reference(**{**told, "minimum": float(told["minimum"]), "maximum": float(told["maximum"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no reference returns ({error!r}); delete it to read them from the dataset again") from None


def evaluate_asked(
    agent: ReturnConditionedAgent, env_id: str, episodes: int, seed: int, env_kwargs: dict[str, Any], target: float | None = None
) -> dict[str, Any]:
    """`evaluate_stepped` of the agent asked for a return of `target` (None: its own)."""
    asked = agent if target is None else agent.asked_for(target)
    return {**evaluate_stepped(asked, env_id, episodes, seed, env_kwargs), "target_return": asked.target_return}


def build_warm_start(method: WarmStart, request: Request) -> Setup:
    """As `build_offline`, with the environment itself behind the dataset; the reward transform of the data holds for both."""
    setup, seed = build_offline(method.offline, request), request.seed
    venv = make_vec(request.task, method.online.num_envs, vectorization=request.vectorization, seed=seed, kwargs=request.env_kwargs)
    capacity = min(method.online.replay_size, method.online.num_env_steps + method.online.num_envs)
    collector = ReplayCollector(venv, setup.agent, Replay(capacity), seed)  # type: ignore[arg-type]
    collector.reward, collector.terminate_at = setup.collector.transform.reward, method.offline.data.terminate_at
    return replace(setup, collector=Phases(setup.collector, collector, method.retain))


def make_agent(method: OffPolicy, observation_space: Any, action_space: Any, **options: Any) -> ControlAgent:
    """The agent of a method's policy, with critics to act by where its evaluation wants them."""
    options = {**method.policy.agent_options(), **options}
    if not isinstance(method.evaluation, ClosedForm):
        return ControlAgent.from_spaces(observation_space, action_space, critic=False, **options)
    assert isinstance(method.policy, Mixture) and isinstance(method.critic, QuantileCritics)
    q = {k: v for k, v in asdict(method.critic).items() if k not in ("lr", "quantiles")}
    return ImprovedAgent.improved(observation_space, action_space, {"modes": method.policy.num, **asdict(method.evaluation)}, q, **options)


def reference_of(data: Transitions, env_id: str, horizon: int | None, env_kwargs: dict[str, Any] | None = None) -> Reference | None:
    """The returns that count as 0 and 100 in this task: the dataset's own where they belong to it, else D4RL's; None where nobody measured them.

    Those of a D4RL file (hopper-medium-v2) belong to its robot's tasks before Gymnasium's v5, which pays otherwise. A task with arguments that the
    data were not recorded with is another one, whose returns nobody measured.
    """
    own, name = data.about.reference, env_id.rpartition(":")[2]
    recorded = {} if data.about.env_spec is None else data.about.env_spec.kwargs
    other = [k for k, v in (env_kwargs or {}).items() if k not in _SAME_RETURNS and (k not in recorded or recorded[k] != v)]
    if other:
        warnings.warn(f"no score: nobody measured the references of {env_id} with {other[0]}={(env_kwargs or {})[other[0]]!r}", stacklevel=2)
        return None
    if own is not None and own.horizon in (None, horizon):
        robot = _robot(own.env_id)
        if own.env_id.rpartition(":")[2] == name or (robot is not None and re.fullmatch(rf"(?i:{robot})-v[234]", name)):
            return own
    return None if horizon is None else references().get((env_id, horizon))


def describe(data: Transitions, env_id: str, used: int, scale: Reference | None) -> str:
    """One line on what is learnt from; data of a task with another name say so, since their shapes may fit all the same."""
    returns, name, spec = data.returns(), data.about.name, data.about.env_spec
    robot = _robot(data.about.env_id or "")
    if spec is not None and _task(spec.id) != _task(env_id):
        name += f" (recorded in {spec.id}, not in {env_id})"
    elif spec is None and robot in _ROBOTS and robot != _task(env_id).lower():
        name += f" (recorded with D4RL's {robot}, not in {env_id})"
    elif spec is None and robot in _ROBOTS and scale is None:
        name += f" (no score: D4RL's references belong to the robot's tasks before v5, not to {env_id})"
    score = "" if scale is None else f" (score {float(scale.score_pct(returns).mean()):.1f})"
    return f"{name}: {len(data):,} steps of {data.num_episodes:,} episodes, mean return {returns.mean():.4g}{score}; {used:,} rows used"


def _robot(env_id: str) -> str | None:
    """hopper of D4RL's hopper-medium-v2; None of other ids."""
    found = re.fullmatch(r"([a-z0-9]+)-[a-z-]+-v\d+", env_id)
    return found[1] if found else None


def _task(env_id: str) -> str:
    """An environment's id without module and version."""
    return re.sub(r"-v\d+$", "", env_id.rpartition(":")[2])
