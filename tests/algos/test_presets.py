"""Presets that a row takes of its ancestors: whose, and which part of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from markovia.algos import presets, systems
from markovia.algos.advantages import GAE
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.method import Descent, OnPolicy
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.rewards import LengthBudget, SoftOverlong
from markovia.algos.presets import agent_options, configure, preset_sources
from markovia.algos.setup import build
from markovia.algos.systems import rows

TREE, POLE, CHAIN = "markovia/TokenTree-v0", "CartPole-v1", "markovia/LinearGaussian-v0"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts presets in the place of those of the files."""

    def write(environments: dict[str, Any], kinds: dict[str, Any] | None = None) -> None:
        monkeypatch.setattr(presets, "_data", lambda: {"kinds": kinds or {}, "environments": environments})

    return write


def test_a_row_without_an_entry_takes_its_parents_and_one_without_a_parents_the_next_ancestors(written: Any) -> None:
    written({POLE: {"ppo": {"num_envs": 3, "agent": {"hidden": (8,)}}}})
    ppo_kl, fixpo = ON_POLICY["ppo/kl"], ON_POLICY["fixpo"]  # ppo <- ppo/kl <- fixpo
    assert (ppo_kl.parent, fixpo.parent) == ("ppo", "ppo/kl")
    for row in (ppo_kl, fixpo):
        assert configure(row.id, POLE) == replace(row.value, num_envs=3)
        assert agent_options(row.id, POLE) == {"hidden": (8,)}
    assert configure("a2c", POLE) == ON_POLICY["a2c"].value  # parents take nothing of their children


@pytest.mark.parametrize("own", [{"num_steps": 5}, {}])
def test_an_entry_of_its_own_keeps_the_ancestors_away_an_empty_one_too(written: Any, own: dict[str, Any]) -> None:
    written({POLE: {"ppo": {"num_envs": 3}, "ppo/kl": own}})
    assert configure("ppo/kl", POLE) == replace(ON_POLICY["ppo/kl"].value, **own)
    assert configure("fixpo", POLE).num_envs == 1  # whose nearest ancestor with an entry is ppo/kl


def test_an_entry_for_what_the_environment_is_like_is_one_for_the_environment(written: Any) -> None:
    written({POLE: {"ppo/kl": {"num_envs": 4}, "ppo": {"num_envs": 3}}, "Acrobot-v1": {"like": POLE, "ppo": {"num_steps": 7}}})
    assert preset_sources("ppo/kl", "Acrobot-v1") == [("ppo/kl", {"num_envs": 4})]
    assert preset_sources("cat", "Acrobot-v1") == [("ppo", {"num_envs": 3}), ("ppo", {"num_steps": 7})]


def test_kind_and_environment_are_taken_each_from_its_own_ancestor_over_the_familys(written: Any) -> None:
    kinds = {"control": {"OnPolicy": {"num_steps": 9}, "a2c": {"entropy_coef": 0.5}}}
    written({POLE: {"ppo": {"num_envs": 3}, "OnPolicy": {"num_envs": 2, "num_steps": 8}}}, kinds)
    assert [who for who, _ in preset_sources("ppo/kl", POLE)] == ["OnPolicy", "a2c", "OnPolicy", "ppo"]
    method = configure("ppo/kl", POLE)
    assert (method.num_envs, method.num_steps) == (3, 8)


def test_settings_of_another_class_end_the_line(written: Any) -> None:
    written({POLE: {"ppo": {"num_envs": 3}, "sac": {"batch_size": 7}}})
    assert rows()["dppo"].parent == "ppo" and rows()["cql"].parent == "sac"
    assert preset_sources("dppo", POLE) == preset_sources("cql", POLE) == []


def test_what_a_row_has_otherwise_than_its_ancestor_stays(written: Any) -> None:
    """fixpo sets steps, the weight of the value and the minibatch; ddpo's advantage is of another class, trpo/natural's solver too."""
    changes = {"num_steps": 77, "value": {"coef": 0.3}, "advantage": {"lam": 0.5}, "solver": {"lr": 0.1, "minibatch": 11}, "surrogate": {"clip": 0.4}}
    written({POLE: {"ppo": changes}, CHAIN: {"ppo": changes}})
    row = ON_POLICY["fixpo"].value
    assert configure("fixpo", POLE) == replace(row, advantage=GAE(lam=0.5), solver=replace(row.solver, lr=0.1))
    row = ON_POLICY["ddpo"].value
    assert configure("ddpo", CHAIN) == replace(row, num_steps=77, value=replace(row.value, coef=0.3), solver=replace(row.solver, lr=0.1))
    written({POLE: {"a2c": {"solver": {"lr": 0.1}, "num_steps": 77}}})
    row = ON_POLICY["trpo/natural"].value
    assert configure("trpo/natural", POLE).solver == row.solver


def test_a_slot_that_both_rows_leave_empty_is_filled_and_changed(written: Any) -> None:
    ancestor = {TREE: {"ppo": {"divergence": {"beta": 0.25}}}}
    kind = {"tabular": {"ppo": {"divergence": {"type": "KL", "beta": 0.5}}}}
    written(ancestor, kind)
    assert configure("ppo/kl", TREE).divergence == KL(0.25)
    kind["tabular"]["ppo/kl"] = {}  # then nothing fills it, and there is nothing to change
    assert configure("ppo/kl", TREE).divergence is None
    kind["tabular"]["ppo/kl"] = {"solver": {"lr": 0.1}}
    method = configure("ppo/kl", TREE)
    assert isinstance(method, OnPolicy) and method.divergence is None and isinstance(method.solver, Descent) and method.solver.lr == 0.1


def test_a_new_row_trains_with_the_presets_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    lcpo = rows()["lcpo"]
    new = replace(lcpo, id="lcpo/new", parent="lcpo", value=replace(lcpo.value, group_size=4))
    known = rows() | {new.id: new}
    for module in (presets, systems):
        monkeypatch.setattr(module, "rows", lambda: known)
    for env in ("markovia/LengthControl-v0", "markovia/Arithmetic-v0"):  # one has an entry for lcpo, the other for its parent
        assert configure(new.id, env) == replace(configure("lcpo", env), group_size=4)
        assert agent_options(new.id, env) == agent_options("lcpo", env)
    assert configure(new.id, "markovia/LengthControl-v0").reward == (LengthBudget("exact", 0.05),)


def test_presets_of_the_files_reach_the_rows_behind_those_that_have_them() -> None:
    ppo, drift = configure("ppo", TREE), configure("ppo/kl", TREE)
    assert drift == replace(ppo, surrogate=drift.surrogate, controller=drift.controller)
    assert configure("grpo/gspo", "markovia/Arithmetic-v0").divergence is None  # which ppo has in language tasks, and no row without it
    assert configure("trpo", POLE).normalize_obs  # which a2c has not


@pytest.mark.parametrize("method_id", ["ppo-max", "ppo-max/ptx", "dvpo"])
@pytest.mark.parametrize("env", ["markovia/Sentiment-v0", "markovia/Arithmetic-v0", "markovia/GSM8K-v0"])
def test_critics_of_text_tasks_learn_no_slower_than_their_policies(method_id: str, env: str) -> None:
    """They begin at zero here, not as reward models, whose rates the rows have."""
    method = configure(method_id, env)
    assert method.value.separate.lr >= method.solver.lr and method.value.separate.unit == "row"
    assert method.value.pretrain * method.num_envs <= method.num_env_steps / 2


@pytest.mark.parametrize("env", ["markovia/Sentiment-v0", "markovia/Arithmetic-v0", "markovia/LengthControl-v0", "markovia/GSM8K-v0"])
def test_prorl_resets_its_reference_several_times_in_every_ready_text_task(env: str) -> None:
    method = configure("prorl", env)
    assert 4 <= method.num_env_steps / method.num_envs / method.refresh.every <= 12
    assert agent_options("prorl", env).get("lora") is None  # whose reference could not move


@pytest.mark.parametrize("env", [TREE, CHAIN, "markovia/Digits-v0", "markovia/Tabular-v0"])
def test_groups_are_asked_for_only_where_there_are_prompts(env: str) -> None:
    method = configure("rloo", env)
    assert method.group_size == 1 and method.solver == configure("rloo/reinforce", env).solver
    with pytest.raises(ValueError, match=r"group_size=4 asks for several responses.*all rows are one group: set group_size=1"):
        build(env, replace(method, group_size=4))


def test_dapo_does_not_punish_the_short_responses_of_arithmetic() -> None:
    """They have four tokens, no more than the penalty's buffer; otherwise its settings there are grpo's."""
    dapo, grpo = configure("grpo/dapo", "markovia/Arithmetic-v0"), configure("grpo", "markovia/Arithmetic-v0")
    assert dapo.reward == (SoftOverlong(penalty=0.0),) and (dapo.num_env_steps, dapo.solver) == (grpo.num_env_steps, grpo.solver)


@pytest.mark.parametrize("env", ["markovia/Digits-v0", "markovia/Mixture2D-v0", "markovia/LinearGaussian-v0"])
def test_the_reward_at_the_end_of_a_chain_is_not_discounted(env: str) -> None:
    for row in ON_POLICY.values():
        if "denoising" in row.kinds and isinstance(row.value.advantage, GAE):
            assert configure(row.id, env).advantage.gamma == 1.0, row.id


@pytest.mark.parametrize(("method_id", "beta"), [("d3po", 0.1), ("spo-step", 10.0), ("diffusion-dpo", 2500.0), ("se-ppo", 2500.0)])
def test_published_strengths_go_with_log_probs_averaged_over_entries(method_id: str, beta: float) -> None:
    assert configure(method_id, "markovia/Pipeline-v0").loss.beta == beta
    assert agent_options(method_id, "markovia/Pipeline-v0") == {"reduce": "mean"} and not agent_options(method_id, "markovia/Digits-v0")
