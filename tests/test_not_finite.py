"""NaN and infinity are found where they appear, in every loop, named, and kept; the mended run goes on to the numbers of an unbroken one."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file

from markovia.agents.checkpoint import load_tensors
from markovia.algos.finite import Watch, check_step, flat, numbers, place
from markovia.algos.optimizer import Optimizer
from markovia.algos.presets import configure, override
from markovia.algos.statistics import Stats
from markovia.algos.systems import find
from markovia.envs.finite import NotFinite
from markovia.rundir import checkpoints
from markovia.runs import train

torch.set_num_threads(1)
CPU = torch.device("cpu")
FRAGILE = "FragileLine-v0"
POINT, DATASET = "markovia/PointMass2D-v0", "fixture:pointmass2d/medium"
QUIET = {"eval_episodes": 0, "progress": False}
NAN, INF = float("nan"), float("inf")


class Fragile(gym.Env):
    """Walks on a line, each episode 8 steps; `broken` = (field, value, step) shows up at that step of an environment's third episode."""

    observation_space = spaces.Dict(x=spaces.Box(-100.0, 100.0, (2,), np.float32))
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    broken = ("nothing", 0.0, 0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.n, self.x = 1 if seed is not None else self.episode + 1, 0, 0.0
        return self._obs(), {}

    def _obs(self):
        return {"x": np.array([self.x, self.n], np.float32)}

    def step(self, action):
        self.n, self.x = self.n + 1, self.x + float(np.asarray(action).reshape(-1)[0])
        told = {"observation": self.n, "reward": -abs(self.x), "cost": 0.5}
        field, value, step = self.broken
        if (self.episode, self.n) == (3, step):
            told[field] = value
        obs = {"x": np.array([self.x, told["observation"]], np.float32)}
        return obs, float(told["reward"]), False, self.n == 8, {"cost": told["cost"]}


@pytest.fixture(autouse=True)
def registered():
    gym.register(FRAGILE, Fragile)
    yield
    del gym.registry[FRAGILE]


def on_line(method_id):
    """A short run of a row on `Fragile`: two rows of eight steps in an iteration."""
    if method_id == "sac":
        small = {"num_envs": 2, "num_steps": 16, "num_env_steps": 96, "learning_starts": 8, "utd": 0.25, "batch_size": 8, "policy": {"hidden": [8]}}
        return override(configure("sac", FRAGILE), {**small, "critic": {"hidden": [8]}})
    descent = {"value": {"separate": {"epochs": 2, "minibatch": 8}}} if method_id == "trpo" else {"solver": {"epochs": 2, "minibatch": 8}}
    return override(configure(method_id, FRAGILE), {"num_envs": 2, "num_steps": 8, "num_env_steps": 96, **descent})


def tensors_of(run):
    return load_tensors(checkpoints(run)[-1] / "driver.safetensors")[0]


def assert_same(a, b):
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys() and [k for k in left if not torch.equal(left[k], right[k])] == []


def kept(run):
    """(tensors, what is told) of the one batch that a run has kept."""
    (path,) = (run / "not_finite").glob("*.safetensors")
    return load_file(path), json.loads(path.with_suffix(".json").read_text())


# -- what environments say -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_id", ["ppo", "sac"])
@pytest.mark.parametrize(
    ("broken", "message", "column"),
    [
        (("observation", NAN, 5), r"environment 0 returned the observation nan \(entry 'x' \[1\]\) at step 20", "observation.x"),
        (("observation", INF, 8), r"environment 0 returned the final observation inf \(entry 'x' \[1\]\) at step 23", "final_observation.x"),
        (("reward", INF, 5), "environment 0 returned the reward inf at step 20; rewards must be finite", "reward"),
        (("cost", NAN, 5), r"environment 0 returned the cost nan \(entry \[0\]\) at step 20; costs must be finite", "cost"),
    ],
    ids=["observation", "final observation", "reward", "cost"],
)
def test_what_an_environment_breaks_is_named_kept_and_mended(method_id, broken, message, column, tmp_path, monkeypatch):
    if method_id == "sac" and column == "cost":
        pytest.skip("methods without limits read no costs")
    method, options = on_line(method_id), {"num_checkpoints": 1, **QUIET}
    train(method, FRAGILE, out=tmp_path / "whole", **options)
    monkeypatch.setattr(Fragile, "broken", broken)
    with pytest.raises(NotFinite, match=rf"(?s){message}.*not_finite/0+\d\.safetensors.*goes on from its last checkpoint with --resume"):
        train(method, FRAGILE, out=tmp_path / "run", **options)
    tensors, told = kept(tmp_path / "run")
    assert not tensors[column].isfinite().all() and told["first"].startswith(f"{column}[0") and message[:12] in told["message"]
    monkeypatch.undo()
    train(method, FRAGILE, out=tmp_path / "run", resume=True, **options)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_steps_that_only_reset_and_whole_numbers_are_looked_at_too():
    check_step("observation", np.array([1, 2]), 0, dict)  # no NaN there
    with pytest.raises(NotFinite, match="environment 7 returned the reward nan at step 3") as error:
        check_step("reward", np.array([0.0, NAN]), 3, lambda: {"action": np.zeros(2)}, rows=np.array([4, 7]))
    assert set(numbers(error.value.batch)) == {"action", "reward"}


# -- gradients, in every loop --------------------------------------------------------------------------------------------------------------


def preferences(folder):
    path = folder / "sums.jsonl"
    if not path.exists():
        rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "9"} for a in range(4) for b in range(4)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def solver(**more):
    return {"solver": {"epochs": 1, "minibatch": 4, **more}}


TREE, SUMS, CHAIN = "markovia/TokenTree-v0", "markovia/Arithmetic-v0", "markovia/LinearGaussian-v0"


def small(method_id, env, **changes):
    return override(configure(method_id, env), changes), env, {}


def from_file(method_id, folder):
    return override(find(method_id).value, {"num_envs": 4, "num_env_steps": 12}), None, {"data": preferences(folder), "model": "arithmetic"}


# id -> folder -> (method, env, options); each takes three updates or more in an iteration, or several iterations.
LOOPS = {
    "on-policy, control": lambda f: (on_line("ppo"), FRAGILE, {}),
    "on-policy, critic apart": lambda f: (on_line("trpo"), FRAGILE, {}),
    "on-policy, table": lambda f: small("ppo", TREE, num_env_steps=96, num_envs=8, num_steps=4, **solver()),
    "on-policy, text": lambda f: small("grpo", SUMS, num_env_steps=24, num_envs=8, group_size=4, **solver()),
    "on-policy, denoising": lambda f: small("ddpo", CHAIN, num_env_steps=24, num_envs=8, **solver()),
    "off-policy": lambda f: (on_line("sac"), FRAGILE, {}),
    "offline": lambda f: (*small("td3-bc", POINT, num_steps=10, num_env_steps=30, batch_size=8, policy={"hidden": [8]})[:2], {"dataset": DATASET}),
    "sequences": lambda f: (
        *small(
            "decision-transformer", POINT, num_env_steps=12, num_steps=4, window=5, width=8, layers=1, heads=2, solver={"minibatch": 4, "warmup": 3}
        )[:2],
        {"dataset": DATASET},
    ),
    "cloning": lambda f: (*small("flow-policy", POINT, num_env_steps=12, num_steps=4, batch_size=8)[:2], {"dataset": DATASET}),
    "adjoint": lambda f: small("adjoint-matching", CHAIN, num_env_steps=24, num_envs=8, **solver()),
    "denoising preferences": lambda f: small("d3po", CHAIN, num_env_steps=24, num_envs=8, **solver()),
    "preferences": lambda f: from_file("dpo", f),
    "reward model": lambda f: from_file("reward-model", f),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_broken_gradient_is_found_at_its_update_in_every_loop(loop, tmp_path, monkeypatch):
    """The third step of any optimiser meets a NaN; everything of its minibatch is finite, and is kept."""
    method, env, options = LOOPS[loop](tmp_path)
    options |= {"num_checkpoints": 1, "compile": False, **QUIET}
    train(method, env, out=tmp_path / "whole", **options)
    move, calls = Optimizer.move, []

    def broken(self, tensors, grad, groups=None):
        calls.append(0)
        if len(calls) == 3:
            grad = grad.clone()
            grad[0] = NAN
        return move(self, tensors, grad, groups)

    monkeypatch.setattr(Optimizer, "move", broken)
    with pytest.raises(NotFinite, match=r"(?s)the gradient.* has norm nan in update \d+ of iteration \d.*minibatch is finite.*--resume"):
        train(method, env, out=tmp_path / "run", **options)
    tensors, told = kept(tmp_path / "run")
    assert tensors and told["first"] is None and told["columns"].keys() == tensors.keys()
    monkeypatch.undo()
    train(method, env, out=tmp_path / "run", resume=True, **options)
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_broken_gradient_of_a_compiled_update_is_found():
    from markovia.algos.setup import build, make_driver

    method = on_line("ppo")
    driver = make_driver(method, build(FRAGILE, method), compile=True)
    driver.step()
    with torch.no_grad():
        driver.updates["main"].optimizer.groups[0].averages[1].fill_(NAN)  # Adam's second moments: weights are NaN from the first update on
    with pytest.raises(NotFinite, match="the gradient of main has norm nan in update 1 of iteration 1; every number of its minibatch is finite"):
        driver.step()


# -- what is said, and what it costs -------------------------------------------------------------------------------------------------------


def test_the_first_broken_update_since_the_last_look_is_named():
    watch = Watch(CPU, every=0)
    watch.begin(7)
    for norm in (1.0, 2.0, INF, NAN):
        watch.add(Stats(("loss", "grad_norm/main"), torch.tensor([NAN, norm])), lambda norm=norm: {"reward": torch.tensor([norm])})
    with pytest.raises(NotFinite, match=r"main has norm inf in update 2 of iteration 7; its minibatch holds the cause: reward\[0\] is inf") as error:
        watch.look()
    assert error.value.batch["reward"].isinf() and watch.broken
    watch.look()  # nothing is left
    watch = Watch(torch.device("meta"))  # an accelerator is waited for now and then
    watch.add({"grad_norm": torch.tensor(NAN)}, None)
    with pytest.raises(NotFinite, match="update 0 of iteration 0"):
        watch.look()


def test_what_a_mask_leaves_out_may_hold_anything():
    batch = {"mask": torch.tensor([[True, False]]), "logp": torch.tensor([[0.0, -INF]]), "obs": torch.zeros(1, 2, 3)}
    assert place(batch) is None
    batch["obs"][0, 0, 2] = NAN
    assert place({"rows": batch}) == "rows.obs[0, 0, 2] is nan"
    assert list(flat({"a": [1, 2], "b": None, "c": {"d": "x"}})) == ["a", "c.d"]


def test_a_full_disk_does_not_hide_what_was_found(tmp_path):
    from markovia.not_finite import keep_batch

    (tmp_path / "not_finite").write_text("a file in the way")
    assert "could not be kept" in keep_batch(tmp_path, 3, NotFinite("broken", {"x": torch.ones(2)}))
    assert keep_batch(tmp_path, 3, NotFinite("broken")) == ""
