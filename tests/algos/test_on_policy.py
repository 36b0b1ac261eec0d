"""Every row of the on-policy table: first step, gradients, invariances, resume, bad input; and what single methods promise."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from markovia.agents.checkpoint import load_tensors, save_tensors
from markovia.agents.control import ControlAgent
from markovia.agents.distributions import Categorical, kl, with_params
from markovia.agents.records import Rollout, masked_mean
from markovia.agents.tabular import TabularAgent
from markovia.algos.advantages import GAE
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.on_policy.loss import policy_loss, weights
from markovia.algos.on_policy.method import Constant, Descent, Doubling, DualAscent, NaturalGradient, OnPolicy, ValueLoss
from markovia.algos.on_policy.methods import ON_POLICY
from markovia.algos.on_policy.natural import fisher_product, flatten, natural_step
from markovia.algos.on_policy.references import EMA
from markovia.algos.on_policy.surrogates import Clip, KLDrift, PolicyGradient
from markovia.algos.presets import FOLDER, configure, override
from markovia.algos.setup import Setup, build
from markovia.algos.systems import find, rows
from markovia.envs.registry import KINDS, kind_of

torch.set_num_threads(1)
F64 = torch.float64
TREE = "markovia/TokenTree-v0"
SMALL = {"num_envs": 8, "num_steps": 2, "num_env_steps": 200}
FIRST_ORDER = [k for k, row in ON_POLICY.items() if isinstance(row.value.solver, Descent)]
ENV_OF_KIND = {"tabular": TREE, "control": "CartPole-v1", "denoising": "markovia/LinearGaussian-v0", "language": "markovia/Arithmetic-v0"}


def tree(method_id: str, dtype: str = "float64", **changes: Any) -> tuple[OnPolicy, Setup]:
    """A method on the tree of 3 tokens and 2 steps, whose rows are whole episodes."""
    method = override(configure(method_id, TREE), {**SMALL, **{k: v for k, v in changes.items() if isinstance(v, (int, dict, str))}})
    method = dataclasses.replace(method, **{k: v for k, v in changes.items() if dataclasses.is_dataclass(v)})
    return method, build(TREE, method, 0, {"V": 3, "H": 2}, {"dtype": dtype})


class Given:
    """A collector that always returns one record."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout, self.episodes = rollout, []

    def collect(self, agent: Any, generator: torch.Generator) -> Rollout:
        return self.rollout.map(torch.clone)

    def reset(self, seed: int) -> None:
        return

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        return


class Watched:
    """A collector that keeps its last record."""

    def __init__(self, collector: Any) -> None:
        self.inner, self.episodes = collector, collector.episodes

    def collect(self, agent: Any, generator: torch.Generator) -> Rollout:
        self.last = self.inner.collect(agent, generator)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def shake(agent: Any, size: float = 0.3, seed: int = 4) -> None:
    """Move every parameter by a normal of standard deviation `size`."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=F64).to(p.dtype))


def all_params(agent: Any) -> list[torch.Tensor]:
    return [*agent.parameters("policy"), *agent.parameters("value")]


def after_step(method: OnPolicy, rollout: Rollout) -> torch.Tensor:
    """All parameters after one iteration on a given record, from one and the same shaken start."""
    _, setup = tree("a2c")
    agent = setup.agent if method.advantage.needs_critic else tree("rloo")[1].agent
    shake(agent)
    OnPolicyDriver(method, agent, Given(rollout)).step()
    return flatten([p.detach() for p in all_params(agent)])


def record(method: OnPolicy, setup: Setup) -> Rollout:
    """A record of the shaken policy, so that the record and the agents of `after_step` agree."""
    shake(setup.agent)
    return setup.collector.collect(setup.agent, torch.Generator().manual_seed(1))


# -- the table -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ON_POLICY)
def test_row_is_whole(method_id: str) -> None:
    row = ON_POLICY[method_id]
    assert row.id == method_id and row.claim and row.new and re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert row.parent is None or find(row.parent)
    assert row.kinds and set(row.kinds) <= set(ENV_OF_KIND)
    assert row.functions
    texts = []
    for where in row.functions:
        module, _, path = where.partition(":")
        target: Any = importlib.import_module(module)
        for name in path.split("."):
            target = getattr(target, name)
        assert target.__doc__, where
        texts.append(target.__doc__)
    assert any(re.search(r"\d{4}\.\d{5}|eq\. \d|=|rho A|coef \(", text) for text in texts)


@pytest.mark.parametrize("method_id", ON_POLICY)
@pytest.mark.parametrize("kind", ENV_OF_KIND)
def test_configure_serves_the_kinds_of_the_row_and_refuses_the_others(method_id: str, kind: str) -> None:
    if kind in ON_POLICY[method_id].kinds:
        method = configure(method_id, ENV_OF_KIND[kind])
        assert type(method.surrogate) is type(ON_POLICY[method_id].value.surrogate)
        if kind == "language":
            assert method.solver.unit == "row"  # type: ignore[union-attr]
    else:
        with pytest.raises(ValueError, match=f"{kind} task.*markovia systems"):
            configure(method_id, ENV_OF_KIND[kind])


def test_preset_files_name_known_kinds_methods_and_fields() -> None:
    kinds, environments = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("kinds", "environments"))
    assert set(kinds) <= set(ENV_OF_KIND)
    for key, entries in [*kinds.items(), *environments.items()]:
        env_id = ENV_OF_KIND.get(key, key)
        assert entries.get("like", env_id) in environments | dict.fromkeys(ENV_OF_KIND.values())
        for name in entries.keys() - {"like"}:
            members = [m for m, row in rows().items() if type(row.value).__name__ == name and kind_of(env_id) in row.kinds]
            for method_id in members or [name]:
                configure(method_id, env_id)
    assert set(KINDS.values()) <= set(ENV_OF_KIND)


def test_an_environment_takes_the_presets_of_the_one_that_it_is_like_and_changes_them() -> None:
    cheetah, swimmer = configure("ppo", "HalfCheetah-v5"), configure("ppo", "Swimmer-v5")
    assert configure("ppo", "Walker2d-v5") == cheetah != configure("ppo", "Acrobot-v1")
    assert isinstance(swimmer.advantage, GAE) and (swimmer.advantage.gamma, swimmer.advantage.lam) == (0.9999, 0.98)
    assert swimmer.value == cheetah.value and swimmer.solver == replace(cheetah.solver, lr=6e-4)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'trpo'"):
        configure("tropo", TREE)
    with pytest.raises(ValueError, match="no field 'num_step'; did you mean 'num_steps'"):
        override(OnPolicy(), {"num_step": 3})
    with pytest.raises(ValueError, match='name the class to put there with "type"'):
        override(OnPolicy(), {"divergence": {"beta": 0.1}})


# -- 1: one full-batch step of any drift is the A2C step ------------------------------------------------------------------------------------

A2C_SOLVER = ON_POLICY["a2c"].value.solver


def written_out_a2c(agent: Any, rollout: Rollout, gamma: float) -> list[torch.Tensor]:
    """mean(-A log pi) + 0.5 mean(0.5 (V - R)^2), clipped to norm 0.5, one RMSprop step from zero averages; returns by a loop over time."""
    value = rollout.value[..., 0]
    B, T = rollout.shape
    ret = torch.zeros_like(value)
    for b in range(B):
        follow = 0.0
        for t in reversed(range(T)):
            if rollout.truncated[b, t]:
                follow = rollout.boot_value[b, t, 0]
            follow = rollout.reward[b, t] + gamma * rollout.continuation[b, t] * follow
            ret[b, t] = follow
    out = agent.evaluate(rollout, ("dist", "value"))
    logp = out.dist.log_prob(rollout.action)
    loss = -((ret - value) * logp).mean() + 0.5 * (0.5 * (out.value[..., 0] - ret) ** 2).mean()
    params = all_params(agent)
    grads = torch.autograd.grad(loss, params)
    scale = min(1.0, 0.5 / (math.sqrt(sum(float((g**2).sum()) for g in grads)) + 1e-6))
    return [p.detach() - 7e-4 * g * scale / (torch.sqrt(0.01 * (g * scale) ** 2) + 1e-5) for p, g in zip(params, grads, strict=True)]


@pytest.mark.parametrize("method_id", FIRST_ORDER)
@pytest.mark.check("limit")
def test_first_step_is_a2c(method_id: str) -> None:
    row = ON_POLICY[method_id].value
    method = dataclasses.replace(
        ON_POLICY["a2c"].value, num_steps=4, surrogate=row.surrogate, controller=row.controller, ratio_level=row.ratio_level, num_env_steps=200
    )
    setup = build(TREE, method, 0, {"V": 3, "H": 3}, {"dtype": "float64"})
    shake(setup.agent)
    rollout = setup.collector.collect(setup.agent, torch.Generator().manual_seed(1))
    expected = written_out_a2c(setup.agent, rollout, gamma=0.99)
    OnPolicyDriver(method, setup.agent, Given(rollout)).step()
    for p, q in zip(all_params(setup.agent), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method_id", ["a2c", "ppo"])
@pytest.mark.check("limit")
@pytest.mark.check("value")
def test_a2c_and_ppo_with_one_full_batch_epoch_are_the_same_update_of_networks(method_id: str) -> None:
    a2c = ON_POLICY["a2c"].value
    method = dataclasses.replace(configure(method_id, "CartPole-v1"), num_envs=4, num_steps=5, normalize_obs=False, scale_reward=False)
    if method_id == "ppo":
        method = dataclasses.replace(method, solver=a2c.solver, advantage=a2c.advantage, normalize_advantage="none")
    setup = build("CartPole-v1", method, 0, agent_options={"hidden": (16,)})
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    rollout = setup.collector.collect(setup.agent, driver.generator("action"))
    expected = written_out_a2c(setup.agent, rollout, gamma=0.99)
    driver.collector = Given(rollout)
    driver.step()
    for p, q in zip(all_params(setup.agent), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-6)


# -- 2: gradient ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ON_POLICY)
@pytest.mark.check("gradient")
def test_gradient_of_the_whole_loss_matches_finite_differences(method_id: str) -> None:
    divergence = None if ON_POLICY[method_id].value.divergence is None else KL(beta=0.3, estimator="k2", place="loss")
    method, setup = tree(method_id, entropy_coef=1)
    method = dataclasses.replace(method, divergence=divergence)
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    rollout = setup.collector.collect(setup.agent, driver.generator("action"))
    reward = driver.prepare(rollout)
    driver.advantages(rollout, reward)
    shake(setup.agent)
    omega, coef = weights(rollout.mask, method.aggregation).to(F64), torch.tensor(0.7, dtype=F64)
    joint = method.advantage.needs_critic

    def loss() -> torch.Tensor:
        return policy_loss(method, setup.agent, rollout, omega, coef, joint)[0]

    params = all_params(setup.agent) if joint else setup.agent.parameters("policy")
    grads = flatten(list(torch.autograd.grad(loss(), params)))
    found = []
    with torch.no_grad():
        for p in params:
            for i in range(p.numel()):
                values = []
                for h in (1e-6, -2e-6, 1e-6):  # forward, backward, and back to the start
                    p.view(-1)[i] += h
                    values.append(loss())
                found.append((values[0] - values[1]) / 2e-6)
    assert float(grads.abs().max()) > 1e-3
    torch.testing.assert_close(grads, torch.stack(found), rtol=1e-5, atol=1e-7)


# -- 3: invariance -------------------------------------------------------------------------------------------------------------------------


def by_rows(method: OnPolicy, micro: int | None = None, optimizer: str = "sgd") -> OnPolicy:
    """The method with full-batch passes over rows, so that no random order or split enters."""

    def whole(solver: Any) -> Any:
        if not isinstance(solver, Descent):
            return solver
        return dataclasses.replace(solver, unit="row", minibatch=None, micro=micro, optimizer=optimizer, lr=0.05, value_lr=None, epochs=2)

    value = dataclasses.replace(method.value, separate=None if method.value.separate is None else whole(method.value.separate))
    return dataclasses.replace(method, solver=whole(method.solver), value=value)


def padded(rollout: Rollout, steps: int = 3) -> Rollout:
    """More steps that do not exist, filled with numbers that would be seen if anything read them."""
    fill = {"action": 1, "logp_old": -math.inf, "reward": 7.0, "continuation": 1.0, "truncated": True, "value": 9.0, "boot_value": 5.0}

    def wider(x: torch.Tensor, value: Any) -> torch.Tensor:
        return torch.cat([x, torch.full((x.shape[0], steps, *x.shape[2:]), value, dtype=x.dtype)], dim=1)

    columns = {k: wider(getattr(rollout, k), v) for k, v in fill.items() if getattr(rollout, k) is not None}
    false = {k: wider(getattr(rollout, k), False) for k in ("valid", "mask")}
    return dataclasses.replace(rollout, obs=wider(rollout.obs, 0), **columns, **false)  # type: ignore[arg-type]


@pytest.mark.parametrize("method_id", ON_POLICY)
@pytest.mark.check("invariance")
def test_order_of_rows_padding_and_micro_batches_change_nothing(method_id: str) -> None:
    method, setup = tree(method_id)
    method = by_rows(method)
    rollout = record(method, setup)
    start = after_step(method, rollout)
    order = torch.randperm(rollout.shape[0], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(after_step(method, rollout.rows(order)), start, rtol=0, atol=1e-10)
    torch.testing.assert_close(after_step(method, padded(rollout)), start, rtol=0, atol=1e-10)
    if isinstance(method.solver, Descent):
        torch.testing.assert_close(after_step(by_rows(method, micro=3), rollout), start, rtol=0, atol=1e-10)


# -- 4: resume -----------------------------------------------------------------------------------------------------------------------------


def check_resume(method: OnPolicy, env_id: str, folder: Any, half: int = 2, **options: Any) -> None:
    """half + half iterations through files on disk give the same bits as 2 half iterations."""

    def fresh() -> OnPolicyDriver:
        setup = build(env_id, method, 0, **options)
        return OnPolicyDriver(method, setup.agent, setup.collector, seed=5)

    straight = fresh()
    for _ in range(half):
        straight.step()
    straight.boundary()
    save_tensors(folder / "state.safetensors", *straight.state())
    logs = [straight.step() for _ in range(half)]
    resumed = fresh()
    resumed.load_state(*load_tensors(folder / "state.safetensors"))
    resumed.boundary()
    again = [resumed.step() for _ in range(half)]
    a, meta_a = straight.state()
    b, meta_b = resumed.state()
    assert meta_a == meta_b and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]
    for x, y in zip(logs, again, strict=True):
        assert x.keys() == y.keys() and all(x[k] == y[k] or (math.isnan(x[k]) and math.isnan(y[k])) for k in x)


@pytest.mark.parametrize("method_id", ON_POLICY)
@pytest.mark.check("resume")
def test_resume_on_the_tree(method_id: str, tmp_path: Any) -> None:
    method = override(configure(method_id, TREE), SMALL)
    if isinstance(method.solver, Descent):
        method = override(method, {"solver": {"epochs": 2, "minibatch": 6, "lr": 0.02}})
    if method.value.separate is not None:
        method = override(method, {"value": {"separate": {"epochs": 2, "minibatch": 6}}})
    check_resume(method, TREE, tmp_path, env_kwargs={"V": 3, "H": 2})


@pytest.mark.parametrize(
    ("method_id", "env_id", "changes", "options"),
    [
        ("ppo", "CartPole-v1", {"num_envs": 2, "num_steps": 16, "solver": {"epochs": 2, "minibatch": 8}}, {"agent_options": {"hidden": (8,)}}),
        ("ddpo", "markovia/LinearGaussian-v0", {"num_envs": 8, "solver": {"epochs": 1, "minibatch": 32}}, {}),
        ("ppo", "markovia/Arithmetic-v0", {"num_envs": 4, "solver": {"epochs": 1, "minibatch": 2}}, {}),
    ],
)
@pytest.mark.check("resume")
def test_resume_on_the_other_kinds(method_id: str, env_id: str, changes: dict, options: dict, tmp_path: Any) -> None:
    check_resume(override(configure(method_id, env_id), changes), env_id, tmp_path, half=1, **options)


# -- 5: bad input --------------------------------------------------------------------------------------------------------------------------


class Stub:
    """The least that a driver's checks look at."""

    critic, net = True, None  # its reference shares its weights, as that of a LoRA agent does

    def reference(self) -> Stub:
        return self

    def __init__(self, kind: str, **more: Any) -> None:
        self.kind = kind
        self.__dict__.update(more)


@pytest.mark.parametrize(
    ("method", "agent", "match"),
    [
        (OnPolicy(), Stub("tabular", critic=None), "GAE needs values.*no critic.*LeaveOneOut"),
        (OnPolicy(), Stub("language"), "solver.unit='row'"),
        (OnPolicy(solver=Descent(unit="row"), value=ValueLoss(separate=Descent())), Stub("language"), "value.separate.unit"),
        (ON_POLICY["trpo"].value, Stub("language"), "natural-gradient steps are not offered"),
        (OnPolicy(solver=Descent(unit="row"), divergence=KL(), refresh=EMA()), Stub("language"), "EMA reference needs weights of its own"),
    ],
)
def test_driver_refuses_what_does_not_fit(method: OnPolicy, agent: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        OnPolicyDriver(method, agent, Given(None))  # type: ignore[arg-type]


def test_rows_that_are_not_whole_responses_are_refused() -> None:
    method, setup = tree("rloo", num_steps=3)
    with pytest.raises(ValueError, match=r"set num_steps to the episode's length"):
        OnPolicyDriver(method, setup.agent, setup.collector).step()


def test_tsallis_divergence_of_a_gaussian_is_refused() -> None:
    space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    agent = ControlAgent.from_spaces(space, space, hidden=(4,), normalize_obs=False)
    method = dataclasses.replace(ON_POLICY["mdpo-on/tsallis"].value, num_envs=1)
    zeros = torch.zeros(3, 2)
    rollout = Rollout(
        obs=torch.zeros(3, 2, 2), action=torch.zeros(3, 2, 2), logp_old=zeros, reward=zeros, valid=zeros == 0, mask=zeros == 0,
        continuation=1 + zeros, truncated=zeros > 0, value=zeros[..., None], boot_value=zeros[..., None],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"categorical policies, this one is Gaussian"):
        OnPolicyDriver(method, agent, Given(rollout)).step()


# -- 6: what single methods promise ----------------------------------------------------------------------------------------------------------


def old_new(agent: Any, rollout: Rollout, old: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        dist = agent.evaluate(rollout, ("dist",)).dist
        return torch.where(rollout.mask, kl(with_params(dist, old), dist), 0.0)


@pytest.mark.parametrize("method_id", ["trpo", "fixpo", "fixpo without fix-up"])
def test_trust_regions_hold_after_every_iteration(method_id: str) -> None:
    """TRPO bounds the mean KL, FixPO the largest of the batch's states; without the fix-up phase some iterations break the bound."""
    limit = 0.02
    if method_id == "trpo":
        method, setup = tree("trpo", solver=NaturalGradient(kl_limit_nats=limit, damping=1e-3))
    else:
        controller = DualAscent(kl_limit_nats=limit, fixup=method_id == "fixpo")
        method, setup = tree("fixpo", solver=Descent(lr=0.1, epochs=3, minibatch=None), controller=controller)
    watched = Watched(setup.collector)
    driver = OnPolicyDriver(method, setup.agent, watched)
    found = []
    for _ in range(6):
        before = setup.agent.net["policy"].table.detach().clone()
        driver.step()
        value = old_new(setup.agent, watched.last, {"logits": before[watched.last.obs]})
        found.append(float(masked_mean(value, watched.last.mask) if method_id == "trpo" else value.max()))
    assert max(found) > 0.0
    assert (max(found) <= limit) == (method_id != "fixpo without fix-up")


@pytest.mark.check("value", "trpo", "trpo/natural")
def test_natural_step_equals_a_direct_solve_with_the_hessian_of_the_mean_kl() -> None:
    delta, damping = 0.01, 0.05
    solver = NaturalGradient(kl_limit_nats=delta, damping=damping, cg_iterations=60, cg_tolerance=1e-26, line_search=False)
    method, setup = tree("trpo/natural", solver=solver)
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    rollout = record(method, setup)
    driver.advantages(rollout, rollout.reward)
    table = setup.agent.net["policy"].table
    start, shape = table.detach().clone().reshape(-1), table.shape

    def mean_kl(flat: torch.Tensor) -> torch.Tensor:
        return kl(Categorical(start.view(shape)[rollout.obs]), Categorical(flat.view(shape)[rollout.obs])).mean()

    def objective(flat: torch.Tensor) -> torch.Tensor:
        logp = flat.view(shape).log_softmax(-1)[rollout.obs, rollout.action]
        return (rollout.columns["adv"] * logp).mean()

    hessian = torch.autograd.functional.hessian(mean_kl, start)
    g = torch.autograd.functional.jacobian(objective, start)
    matrix = hessian + damping * torch.eye(len(start), dtype=F64)
    product = fisher_product(setup.agent, rollout, damping=damping)
    v = torch.randn(len(start), generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(product(v).detach(), matrix @ v, rtol=1e-9, atol=1e-12)
    x = torch.linalg.solve(matrix, g)
    step = torch.sqrt(2 * delta / (x @ matrix @ x)) * x
    natural_step(method, solver, setup.agent, rollout)
    torch.testing.assert_close(table.detach().reshape(-1) - start, step, rtol=1e-7, atol=1e-10)


def test_natural_step_stays_without_a_gradient() -> None:
    method, setup = tree("trpo")
    rollout = record(method, setup)
    rollout.columns["adv"] = torch.zeros_like(rollout.reward)
    before = flatten(setup.agent.parameters("policy")).clone()
    stats = natural_step(method, method.solver, setup.agent, rollout)  # type: ignore[arg-type]
    assert stats["accepted"] == 0.0 and torch.equal(flatten(setup.agent.parameters("policy")), before)


def bandit() -> tuple[TabularAgent, Rollout, torch.Tensor, torch.Tensor]:
    """A bandit of 5 arms with every arm once in the record; weights pi_old make sums over it exact expectations."""
    old = torch.tensor([0.3, -0.5, 0.1, 0.8, -0.2], dtype=F64).log_softmax(-1)
    value = torch.tensor([1.0, 0.2, -0.4, 0.5, 2.0], dtype=F64)
    agent = TabularAgent.from_spaces(spaces.Discrete(1), spaces.Discrete(5), logits=old[None], dtype="float64", critic=False)
    ones = torch.ones(5, 1, dtype=F64)
    rollout = Rollout(
        obs=torch.zeros(5, 1, dtype=torch.long), action=torch.arange(5)[:, None], logp_old=old[:, None], reward=value[:, None], valid=ones > 0,
        mask=ones > 0, continuation=0 * ones, truncated=ones < 0, dist_old={"logits": old.expand(5, 1, 5).clone()},
    )  # fmt: skip
    adv = value - old.exp() @ value
    rollout.columns["adv"] = adv[:, None]
    return agent, rollout, old, adv


@pytest.mark.check("value", "mdpo-on")
def test_mirror_descent_on_a_bandit_reaches_its_closed_form() -> None:
    """With exact advantages the inner problem's optimum is pi_old exp(t A) / Z, for t = 1 / coef."""
    agent, rollout, old, adv = bandit()
    t, steps = 0.5, 250
    method = dataclasses.replace(ON_POLICY["mdpo-on"].value, controller=Constant())
    params = agent.parameters("policy")
    optimizer = torch.optim.Adam(params, lr=0.1)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / steps)
        optimizer.zero_grad()
        policy_loss(method, agent, rollout, old.exp()[:, None], torch.tensor(1 / t), False)[0].backward()
        optimizer.step()
    target = (old + t * adv).softmax(-1)
    assert float((params[0][0].detach().softmax(-1) - target).abs().sum() / 2) < 1e-3


def test_mirror_steps_raise_the_penalty_as_the_budget_is_spent() -> None:
    method, setup = tree("mdpo-on", num_env_steps=64)
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    coefs = [driver.step()["coef"] for _ in range(4)]  # 16 of 64 steps each
    assert coefs == pytest.approx([1.0, 4 / 3, 2.0, 4.0])


@pytest.mark.parametrize(("target", "factor"), [(1e-6, 2.0), (10.0, 0.5)])
@pytest.mark.check("value", "ppo/kl")
def test_adaptive_penalty_doubles_and_halves(target: float, factor: float) -> None:
    method, setup = tree("ppo/kl", solver=Descent(lr=0.05, epochs=4), controller=Doubling(coef=3.0, kl_target_nats=target))
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    driver.step()
    assert driver.coef == 3.0 * factor


def test_adaptive_penalty_measures_the_policy_after_its_last_step() -> None:
    """One full-batch step starts at KL 0; only the KL after it can say whether the step was too large."""
    method, setup = tree("ppo/kl", solver=Descent(lr=0.5, epochs=1, minibatch=None), controller=Doubling(coef=1.0, kl_target_nats=1e-4))
    watched = Watched(setup.collector)
    before = setup.agent.net["policy"].table.detach().clone()
    driver = OnPolicyDriver(method, setup.agent, watched)
    stats = driver.step()
    measured = masked_mean(old_new(setup.agent, watched.last, {"logits": before[watched.last.obs]}), watched.last.mask)
    assert stats["kl_mean"] == pytest.approx(float(measured)) and driver.coef == 2.0


def test_reference_follows_by_an_exponential_average() -> None:
    method, setup = tree("ppo-rlhf", solver=Descent(lr=0.1, epochs=1), refresh=EMA(rate=0.25))
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    start = setup.agent.net["policy"].table.detach().clone()
    driver.step()
    now = setup.agent.net["policy"].table.detach()
    assert not torch.equal(now, start)
    torch.testing.assert_close(driver.references["ref"].net["policy"].table, 0.75 * start + 0.25 * now)


def test_epochs_stop_at_the_kl_limit() -> None:
    steps = {}
    for limit in (None, 1e-6):
        method, setup = tree("ppo", solver=Descent(lr=0.1, epochs=5, minibatch=None, kl_stop_nats=limit))
        driver = OnPolicyDriver(method, setup.agent, setup.collector)
        driver.step()
        steps[limit] = float(driver.updates["main"].optimizer.groups[0].count)
    assert steps[None] == 5 and steps[1e-6] == 2  # the first gradient is taken at ratio 1, the second one sees the change


def test_advantages_are_recomputed_before_each_later_epoch() -> None:
    found = {}
    for again in (False, True):
        method, setup = tree("ppo", advantage=GAE(gamma=0.9), solver=Descent(lr=0.1, epochs=3, minibatch=None, recompute_advantage=again))
        watched = Watched(setup.collector)
        OnPolicyDriver(method, setup.agent, watched).step()
        found[again] = watched.last.columns["adv"]
    assert not torch.allclose(found[False], found[True])


def test_learning_rates_fall_linearly_and_roles_keep_their_own() -> None:
    method, setup = tree("ppo", num_env_steps=64, solver=Descent(lr=0.1, value_lr=0.4))
    driver = OnPolicyDriver(method, setup.agent, setup.collector)
    rates = []
    for _ in range(4):
        driver.step()
        rates.append([float(g.lr) for g in driver.updates["main"].optimizer.groups])
    assert rates == [pytest.approx([0.1 * x, 0.4 * x]) for x in (1.0, 0.75, 0.5, 0.25)]
    assert driver.finished


@pytest.mark.check("limit", "ppo")
def test_wide_clip_and_policy_gradient_agree_over_several_epochs() -> None:
    _, setup = tree("ppo")
    rollout = record(ON_POLICY["ppo"].value, setup)
    method = by_rows(override(configure("ppo", TREE), SMALL))
    a, b = (after_step(dataclasses.replace(method, surrogate=s), rollout) for s in (Clip(clip=1e6), PolicyGradient()))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    drifted = after_step(dataclasses.replace(method, surrogate=KLDrift()), rollout)
    assert float((a - drifted).abs().max()) > 1e-8
