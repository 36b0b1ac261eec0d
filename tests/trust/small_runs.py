"""A driver of every row of the table that trains, at a size for tests: `driver(id, seed, folder)`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from language_pieces import made, small, trees

from markovia.algos.denoising.adjoint import AdjointMatching
from markovia.algos.denoising.driver import AdjointDriver
from markovia.algos.denoising.preference import DenoisingPreference, DenoisingPreferenceDriver
from markovia.algos.denoising.sources import Candidates, NoisedData, SemiPolicy
from markovia.algos.diffusion_policy.method import Imitation, TwoLayer
from markovia.algos.off_policy.method import OffPolicy
from markovia.algos.off_policy.slots import Behaviour, QuantileCritics
from markovia.algos.offline.method import Offline
from markovia.algos.offline.sequences import ReturnConditioned
from markovia.algos.offline.warm_start import WarmStart
from markovia.algos.on_policy.language import LANGUAGE
from markovia.algos.on_policy.method import Descent, OnPolicy
from markovia.algos.preference.driver import PreferenceDriver
from markovia.algos.preference.method import Preference
from markovia.algos.preference.reward_model import RewardModelDriver, RewardTraining
from markovia.algos.preference.sources import FileItems
from markovia.algos.presets import configure, override
from markovia.algos.setup import build, make_driver
from markovia.algos.systems import Method, find, rows
from markovia.algos.tree_records import TreeCollector

TRAINED = [i for i, row in rows().items() if isinstance(row.value, Method)]
TREE, GRID, POINT, PENDULUM = "markovia/TokenTree-v0", "markovia/SafeGrid-v0", "markovia/PointMass2D-v0", "markovia/SafePendulum-v0"
DATASET = "fixture:pointmass2d/expert"
NETS = {"policy": {"hidden": [8]}, "critic": {"hidden": [8, 8]}}


def driver(method_id: str, seed: int, folder: Path) -> Any:
    """A fresh driver; the folder keeps what a method starts from. All of it is a function of the row and the seed."""
    make = next(BUILDERS[kind] for kind in type(find(method_id).value).__mro__ if kind in BUILDERS)
    return make(method_id, seed, folder)


def _on_policy(method_id: str, seed: int, folder: Path) -> Any:
    if method_id in LANGUAGE:
        method = small(method_id, solver={"minibatch": 4})
        return made(method, TreeCollector(trees(6), 12, method.group_size, {"budget": [1, 2, 3] * 2}), seed)
    if "tabular" not in find(method_id).kinds:
        few = {"num_envs": 1, "num_steps": 210, "num_env_steps": 2100}  # an episode ends in each batch
        return _built(PENDULUM, _few_rows(override(configure(method_id, PENDULUM), few), 105), seed, agent_options={"hidden": (8,)})
    if find(method_id).value.constraint is not None:
        method = override(configure(method_id, GRID), {"num_envs": 2, "num_steps": 70, "num_env_steps": 10_000, "constraint": {"cost_limit": [0.5]}})
        return _built(GRID, _few_rows(method, 70), seed)
    method = _few_rows(override(configure(method_id, TREE), {"num_envs": 8, "num_steps": 2, "num_env_steps": 200}), 6)
    return _built(TREE, method, seed, env_kwargs={"V": 3, "H": 2})


def on_other_kinds(name: str, seed: int) -> Any:
    """The same loop on environments that are stepped, and on sequences of noise and of tokens by networks."""
    method_id, env, changes, options = OTHER_KINDS[name]
    return _built(env, override(configure(method_id, env), changes), seed, agent_options=options)


OTHER_KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "control": ("ppo", "CartPole-v1", {"num_envs": 2, "num_steps": 16, "solver": {"epochs": 2, "minibatch": 8}}, {"hidden": (8,)}),
    "denoising": ("ddpo", "markovia/LinearGaussian-v0", {"num_envs": 8, "solver": {"epochs": 1, "minibatch": 32}}, {}),
    "language": ("ppo", "markovia/Arithmetic-v0", {"num_envs": 4, "solver": {"epochs": 1, "minibatch": 2}}, {}),
}


def _few_rows(method: Any, minibatch: int) -> Any:
    """Two passes in minibatches, for the solvers that have passes."""
    if isinstance(method.solver, Descent):
        method = override(method, {"solver": {"epochs": 2, "minibatch": minibatch, "lr": 0.02}})
    if method.value.separate is not None:
        method = override(method, {"value": {"separate": {"epochs": 2, "minibatch": minibatch}}})
    return method


def _built(env: str, method: Any, seed: int, **more: Any) -> Any:
    return make_driver(method, build(env, method, seed, **more), seed=seed)


def _off_policy(method_id: str, seed: int, folder: Path) -> Any:
    """The replay wraps around within the second iteration."""
    short = {**NETS, "learning_starts": 6, "num_steps": 15, "num_env_steps": 60, "batch_size": 8, "replay_size": 20, "num_envs": 2, "utd": 0.5}
    if find(method_id).value.constraint is None:
        return _built("Pendulum-v1", override(find(method_id).value, {**short, "actor": {"refresh_steps": 10}}), seed)
    costs = {"learning_starts": 210, "num_steps": 220, "num_env_steps": 880, "utd": 0.05, "replay_size": 1000, "num_envs": 1}
    return _built(PENDULUM, override(configure(method_id, PENDULUM), {**short, **costs, "constraint": {"critic": {"hidden": [8]}}}), seed)


def _offline(method_id: str, seed: int, folder: Path) -> Any:
    method = override(configure(method_id, POINT), {"num_steps": 5, "num_env_steps": 10, "batch_size": 16, "policy": {"hidden": [8]}})
    if isinstance(method.critic, QuantileCritics):
        method = override(method, {"critic": {"hidden": [8, 8], "quantiles": 2, "embedding": 4}})
    if method.behaviour is not None:
        method = override(method, {"behaviour": {"hidden": [8]} | ({"steps": 3} if isinstance(method.behaviour, Behaviour) else {})})
    return _built(POINT, method, seed, dataset=DATASET)


def _warm_start(method_id: str, seed: int, folder: Path) -> Any:
    """An iteration on data, then online."""
    method = configure(method_id, POINT)
    net = {"policy": {"hidden": [8]}, "critic": {"num": 3, "hidden": [8]}, "batch_size": 8, "num_steps": 10}
    net |= {"value": {"hidden": [8]}} if method.offline.value is not None else {}
    gap = {"regulariser": {"num": 2}} if method.offline.regulariser is not None else {}
    parts = {"offline": {**net, **gap, "num_env_steps": 10}, "online": {**net, "num_env_steps": 40, "learning_starts": 10}}
    return _built(POINT, override(method, parts), seed, dataset=DATASET)


def _sequences(method_id: str, seed: int, folder: Path) -> Any:
    tiny = {"num_env_steps": 12, "num_steps": 3, "window": 5, "width": 8, "layers": 2, "heads": 2, "solver": {"minibatch": 4, "warmup": 3}}
    return _built(POINT, override(configure(method_id, POINT), tiny), seed, dataset=DATASET)


CLONE = {"num_env_steps": 20, "num_steps": 10, "batch_size": 16, "horizon": 4, "act_steps": 2, "network": {"hidden": 8, "depth": 1}}


def _imitation(method_id: str, seed: int, folder: Path) -> Any:
    return _built(POINT, override(configure(method_id, POINT), {**CLONE, "noise": {"sample_steps": 4}}), seed, dataset=DATASET)


def _two_layer(method_id: str, seed: int, folder: Path) -> Any:
    """Fine-tunes an untrained clone, the same for every seed."""
    start = folder / "clone"
    if not start.exists():
        cloning = override(configure("diffusion-policy", POINT), {**CLONE, "noise": {"sample_steps": 4}})
        build(POINT, cloning, 3, dataset=DATASET).agent.save(start)
    descent = {"lr": 1e-2, "anneal": False, "epochs": 2, "minibatch": 16}
    changes: dict[str, Any] = {"num_env_steps": 40, "num_envs": 2, "num_steps": 4, "solver": descent, "value": {"separate": descent}}
    method = override(configure(method_id, POINT), changes)
    chain = dataclasses.replace(method.chain, start=str(start), tuned_steps=2, critic_hidden=(8,))
    return _built(POINT, dataclasses.replace(method, chain=chain), seed)


# -- denoising -------------------------------------------------------------------------------------------------------------------------------


def _task() -> Any:
    """Two numbers denoised in 6 steps by an untrained network, under one of three conditions; reward: their sum."""
    from diffusers import DDIMScheduler

    from markovia.envs.denoising.env import DenoisingTask
    from markovia.envs.denoising.kernel import GaussianKernel
    from markovia.envs.denoising.networks import MLPDenoiser

    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    torch.manual_seed(0)
    network = MLPDenoiser((2,), 16, 1, cond_dim=3)
    return DenoisingTask(network, GaussianKernel.from_scheduler(scheduler, 6), lambda x, c: x.sum(-1), (2,), torch.eye(3))


def _adjoint(method_id: str, seed: int, folder: Path) -> Any:
    from markovia.agents.denoising import DenoisingAgent
    from markovia.algos.collect import SequenceCollector
    from markovia.envs.denoising.tasks import make_task

    changes = {"num_env_steps": 256, "num_envs": 16, "steps_per_chain": 4, "drop_quantile": 0.9, "solver": {"lr": 0.01, "epochs": 2, "minibatch": 32}}
    method, task = override(find(method_id).value, changes), make_task("linear_gaussian")
    return AdjointDriver(method, DenoisingAgent.from_task(task, critic_hidden=None), SequenceCollector(task, method.num_envs), seed)


def _denoising_preference(method_id: str, seed: int, folder: Path) -> Any:
    from markovia.agents.denoising import DenoisingAgent
    from markovia.algos.collect import SequenceCollector

    method = override(find(method_id).value, {"num_env_steps": 64, "num_envs": 16, "solver": {"lr": 0.01, "epochs": 2, "minibatch": 16}})
    few = {Candidates: {"count": 3}, NoisedData: {"count": 32}, SemiPolicy: {"every": 1}}.get(type(method.source), {})
    known = {f.name for f in dataclasses.fields(method.source)}
    method = dataclasses.replace(method, source=override(method.source, {k: v for k, v in few.items() if k in known}))
    task = _task()
    return DenoisingPreferenceDriver(method, DenoisingAgent.from_task(task, critic_hidden=None), SequenceCollector(task, method.num_envs), seed=seed)


# -- preferences -----------------------------------------------------------------------------------------------------------------------------


@cache
def _texts(kind: str, folder: Path) -> Any:
    """Pairs of a right and a wrong sum, with every column that a row may ask for; two prompts each ("crossed"); two rewards each ("several")."""
    from markovia.envs.text.preferences import load_preferences
    from markovia.envs.text.pretrained import load_tokenizer

    sums = [(3 * i % 10, 7 * i % 10) for i in range(12)]
    found: list[dict[str, Any]] = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1 + i % 3)} for i, (a, b) in enumerate(sums)]
    for row in found:
        if kind == "crossed":
            row |= {"prompt": f"1{row['prompt']}", "other_prompt": f"2{row['prompt']}"}
        elif kind == "several":
            row |= {"score_chosen": [1.0, 0.5], "score_rejected": [0.0, 0.0]}
        else:
            row |= {"q": 0.8, "margin": 0.5, "score_chosen": 0.9, "score_rejected": 0.1, "gold": "1"} | ({} if kind == "sorted" else {"weight": 1.0})
            sides = ((a, s) for a in ("old", "proposal", "stage0", "stage1") for s in ("chosen", "rejected", "gold"))
            row |= {f"{a}_{s}_logps": [-0.5] * (len(row[s]) + 1) for a, s in sides}
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return load_preferences(path, load_tokenizer("arithmetic"))


def _preference(method_id: str, seed: int, folder: Path) -> Any:
    from markovia.agents.language import LanguageAgent
    from markovia.algos.preference.data import prepare

    method = dataclasses.replace(find(method_id).value, num_env_steps=12, num_envs=4)
    method = dataclasses.replace(method, solver=dataclasses.replace(method.solver, lr=1e-3))
    kind = {"iopo": "crossed", "modpo": "several"}.get(method_id, "sorted" if method_id.startswith("aot") else "rich")
    data = _texts(kind, folder)
    prepare(method, data)
    agent = LanguageAgent.from_name("arithmetic", packed=True, value_head="value" in method.needs)
    return PreferenceDriver(method, agent, FileItems(data.items, data.kind), seed)


def _reward_model(method_id: str, seed: int, folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from markovia.agents.reward_model import RewardModel
    from markovia.envs.text.pretrained import load_tokenizer

    torch.manual_seed(seed)
    tokenizer = load_tokenizer("arithmetic")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    body = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))
    method = override(find(method_id).value, {"num_env_steps": 16, "num_envs": 4, "solver": {"lr": 1e-2, "anneal": False}})
    return RewardModelDriver(method, RewardModel(body, tokenizer, base="tiny"), FileItems(_texts("rich", folder).items, "pairs"), seed)


BUILDERS: dict[type, Callable[[str, int, Path], Any]] = {
    OnPolicy: _on_policy,
    TwoLayer: _two_layer,
    OffPolicy: _off_policy,
    Offline: _offline,
    WarmStart: _warm_start,
    ReturnConditioned: _sequences,
    Imitation: _imitation,
    AdjointMatching: _adjoint,
    DenoisingPreference: _denoising_preference,
    Preference: _preference,
    RewardTraining: _reward_model,
}
