"""Collections of datasets: what is recorded, killed and resumed, refused; and the page of a dataset."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gymnasium.spaces import Discrete

from markovia.cli import run as cli
from markovia.collect import TIERS, Tier, collect, out_of_order
from markovia.envs.exact.offline import pointmass_data
from markovia.envs.offline import About, load, write_minari
from markovia.envs.offline.transitions import box_like
from markovia.recipes import RECIPES, Recipe, recipe
from markovia.rundir import RunError

pytest.importorskip("minari")
ROOT = Path(__file__).resolve().parent.parent
SMALL = Recipe(
    "Pendulum-v1", "ppo", 1_024, -3000.0, 400, 512, num_reference=10, settings={"num_envs": 2, "num_steps": 128, "solver": {"epochs": 1}}
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(folder, **options):
    """A collection whose reference returns are given, since a policy that trained for a second is no better than random."""
    folder.mkdir(parents=True, exist_ok=True)
    return collect(SMALL, out=folder, progress=False, **options)


@pytest.fixture(autouse=True)
def given_references(monkeypatch):
    """Random and best counted as -1500 and -100."""
    from markovia import collect as module

    real = module._Collection.reference

    def reference(self):
        file = self.folder / "references.json"
        if not file.exists():
            file.write_text(json.dumps({"min": -1500.0, "max": -100.0}))
        return real(self)

    monkeypatch.setattr(module._Collection, "reference", reference)


def test_five_tiers_are_recorded_and_stay(root, monkeypatch):
    tiers = make(root / "c")
    assert [t.name for t in tiers] == list(TIERS)
    data = {t.name: load(t.dataset_id) for t in tiers}
    for t in tiers:
        assert len(data[t.name]) == t.num_steps and data[t.name].returns().mean() == t.mean_return
        assert t.score_pct == pytest.approx(100 * (t.mean_return + 1500) / 1400)
        assert data[t.name].about.env_id == "Pendulum-v1" and data[t.name].complete().all()
        assert data[t.name].about.metadata["markovia"]["tier"] == t.name
    assert [t.num_steps for t in tiers] == [400, 512, 400, 800, 400]  # medium came at the first evaluation, after 512 steps
    both = np.concatenate([data["medium"].action, data["expert"].action])
    np.testing.assert_array_equal(data["medium-expert"].action, both)
    # Dynamics of the logged rows, by Pendulum's own equations: theta'' = 15 sin(theta) + 3 u, dt 0.05
    for rows in data.values():
        velocity = rows.obs[:, 2] + 0.05 * (15 * rows.obs[:, 1] + 3 * np.clip(rows.action[:, 0], -2, 2))
        np.testing.assert_allclose(rows.next_obs[:, 2], np.clip(velocity, -8, 8), atol=1e-4)
    env = load(tiers[0].dataset_id).about.env_spec.make()
    assert env.spec.max_episode_steps == 200
    from markovia import collect as module

    monkeypatch.setattr(module._Collection, "record", lambda *a, **k: pytest.fail("recorded again"))
    assert make(root / "c", resume=True) == tiers


def test_killed_and_resumed_equals_uninterrupted(root):
    """SIGKILL while training, then --resume: the same log, the same policies, the same datasets."""
    code = (
        "import sys, time, json\nfrom pathlib import Path\nfrom markovia import collect as c\nfrom tests_collect_small import SMALL\n"
        "old = c._Watch.__call__\n"
        "c._Watch.__call__ = lambda self, info: (old(self, info), time.sleep(60 * (info.iteration == 3)))\n"
        "c.collect(SMALL, out=sys.argv[1], progress=False)\n"
    )
    (root / "tests_collect_small.py").write_text(
        f"from markovia.recipes import Recipe\nSMALL = Recipe(**{ {**dataclasses.asdict(SMALL), 'settings': SMALL.settings}!r})\n"
    )
    killed = root / "killed"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{root}"}
    child = subprocess.Popen([sys.executable, "-c", code, str(killed)], env=env, cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (killed / "run" / "checkpoints" / "000002").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (killed / "milestones.json").exists() and not (killed / "run" / "done.json").exists()
    resumed = make(killed, resume=True, tiers=["medium-replay", "expert"])
    hashes = {t.name: load(t.dataset_id).about.metadata["content_sha256"] for t in resumed}
    os.environ["MINARI_DATASETS_PATH"] = str(root / "other")
    whole = make(root / "whole", tiers=["medium-replay", "expert"])
    assert {t.name: load(t.dataset_id).about.metadata["content_sha256"] for t in whole} == hashes


def test_recorded_from_runs(root):
    from markovia.algos.presets import configure, override
    from markovia.runs import train

    settings = override(configure("ppo", "CartPole-v1"), {"num_env_steps": 256, "num_envs": 2, "num_steps": 64})
    run = train(settings, "CartPole-v1", out=root / "run", eval_episodes=0, progress=False, num_checkpoints=1, method_id="ppo").run
    from_runs = Recipe("CartPole-v1", None, num_steps=60)
    tiers = collect(from_runs, out=root / "a", expert_run=run, medium_run=run, progress=False)
    assert [t.name for t in tiers] == ["random", "medium", "medium-expert", "expert"]
    assert load("markovia/cartpole/random-v0").about.action_space.n == 2
    assert [t.name for t in collect(from_runs, out=root / "b", expert_run=run, namespace="b", progress=False)] == ["random", "expert"]
    with pytest.raises(ValueError, match="give a medium run"):
        collect(from_runs, out=root / "d", expert_run=run, tiers=["expert", "medium"])
    with pytest.raises(ValueError, match="medium-replay can't be recorded this way: nothing is trained"):
        collect(from_runs, out=root / "d", expert_run=run, medium_run=run, tiers=["medium-replay", "expert"])
    with pytest.raises(ValueError, match="expert run beside it"):
        collect(from_runs, out=root / "d", medium_run=run)
    with pytest.raises(RunError, match="was trained on CartPole-v1, not on Pendulum-v1"):
        collect(Recipe("Pendulum-v1", None), out=root / "e", expert_run=run)
    with pytest.raises(RunError, match="not made by this request"):
        collect(from_runs, seed=1, out=root / "f", expert_run=run, medium_run=run, progress=False)
    assert not any((root / name).exists() for name in "def")  # all this is told before a folder is begun
    short = train(settings, "CartPole-v1", env_kwargs={"max_episode_steps": 3}, out=root / "short", eval_episodes=0, progress=False, method_id="ppo")
    with pytest.raises(RunError, match=r"was trained on CartPole-v1 with \{'max_episode_steps': 3\}"):
        collect(from_runs, out=root / "e", expert_run=short.run)
    # Another run in the same folder: its policy would stand beside the tiers and references of the first.
    shutil.rmtree(run)
    train(settings, "CartPole-v1", seed=1, out=run, eval_episodes=0, progress=False, num_checkpoints=1, method_id="ppo")
    with pytest.raises(RunError, match=r"another request .*policies\.expert"):
        collect(from_runs, out=root / "b", expert_run=run, namespace="b", resume=True, progress=False)


def test_what_is_refused(root):
    with pytest.raises(ValueError, match="there is no recipe for CartPole-v1; give --method, --num-env-steps, --medium-return"):
        recipe("CartPole-v1")
    assert recipe("CartPole-v1", method="ppo", num_env_steps=9_000, medium_return=5.0).method == "ppo"
    with pytest.raises(ValueError, match="leaves no evaluation"):
        recipe("Pendulum-v1", num_env_steps=10)
    with pytest.raises(ValueError, match="unknown tier 'best'"):
        collect(SMALL, out=root / "x", tiers=["best"])
    with pytest.raises(ValueError, match="denoising task"):
        collect(Recipe("markovia/Digits-v0", None), out=root / "x")
    make(root / "c", tiers=["random"])
    with pytest.raises(RunError, match="--resume"):
        make(root / "c")
    with pytest.raises(RunError, match="another request"):
        collect(dataclasses.replace(SMALL, num_steps=300), out=root / "c", resume=True)
    never = dataclasses.replace(SMALL, medium_return=0.0)
    with pytest.raises(RunError, match="never reached the medium return 0"):
        collect(never, out=root / "n", namespace="n", progress=False)
    (root / "full").mkdir()
    (root / "full" / "a").write_text("")
    with pytest.raises(RunError, match="not empty"):
        collect(SMALL, out=root / "full")


def test_ids_are_checked_before_training(root, monkeypatch):
    from markovia import collect as module

    make(root / "c", tiers=["random"])
    with monkeypatch.context() as patch:
        patch.setattr(module._Collection, "train", lambda self: pytest.fail("trained"))
        with pytest.raises(RunError, match="random-v0 exists and was not made by this request; choose another --namespace"):
            make(root / "d", tiers=["medium", "random"], seed=1)
        with pytest.raises(ValueError, match="'my data/pendulum/random-v0' is no Minari id"):
            make(root / "e", namespace="my data")
        assert not (root / "d" / "collect.json").exists() and not (root / "e" / "collect.json").exists()
    # What is trained already can be recorded under another namespace, beside the sets of the first.
    (here,) = make(root / "c", tiers=["random"], namespace="other", resume=True)
    first, second = (load(f"{name}/pendulum/random-v0").about.metadata for name in ("markovia", "other"))
    assert here.dataset_id == "other/pendulum/random-v0" and first["content_sha256"] == second["content_sha256"]
    assert [m["markovia"]["asked"]["namespace"] for m in (first, second)] == ["markovia", "other"]
    assert first["markovia"]["asked"].keys() == {"recipe", "seed", "namespace", "medium_run", "expert_run"}  # as sets recorded long ago have it
    assert make(root / "c", tiers=["random"], resume=True)[0].dataset_id == "markovia/pendulum/random-v0"


def test_a_recipe_keeps_the_module_and_nothing_of_another_method():
    maze = "gymnasium_robotics:PointMaze_UMaze-v3"
    assert recipe("mine:Hopper-v5").env == "mine:Hopper-v5" and recipe("Hopper-v5") == RECIPES["Hopper-v5"]
    assert recipe("PointMaze_UMaze-v3") == recipe(maze) == RECIPES["PointMaze_UMaze-v3"]
    assert recipe("Pendulum-v1", method="ppo").settings == {} != recipe("Pendulum-v1", method="sac").settings
    with pytest.raises(ValueError, match="scripted controller, and none to train; give --medium-return too"):
        recipe(maze, method="sac", num_env_steps=20_000)
    assert recipe("PointMaze_UMaze-v3", method="sac", num_env_steps=20_000, medium_return=5.0).env == maze
    with pytest.raises(ValueError, match="nothing is trained, so --num-env-steps, --eval-every would do nothing; leave it out, or"):
        recipe(maze, num_env_steps=20_000, eval_every=100, num_steps=10)


@pytest.mark.parametrize(
    ("method", "message"),
    [("scc", "did you mean 'sac'"), ("td3-bc", "learns from a dataset"), ("ddpo", "ddpo serves"), ("dpo", "dpo serves")],
)
def test_a_method_that_can_not_train_leaves_no_folder(root, method, message):
    with pytest.raises(ValueError, match=message):
        collect(dataclasses.replace(SMALL, method=method), out=root / "c", progress=False)
    assert not (root / "c").exists()


def test_order_of_the_tiers():
    tiers = [Tier(n, n, 1, 1, r, 0.0) for n, r in (("random", 1.0), ("medium-replay", 3.0), ("medium", 2.0), ("medium-expert", 0.0), ("expert", 9.0))]
    assert out_of_order(tiers) == ["medium-replay (3) is not below medium (2)"]
    assert out_of_order(tiers[2:]) == []


def test_every_recipe_names_what_exists():
    from markovia.algos.presets import configure, override
    from markovia.catalogue import resolve

    for name, r in RECIPES.items():
        assert name == r.env.rpartition(":")[2]
        if r.method is None:
            assert resolve(r.controller)
        else:
            assert override(configure(r.method, name), {**r.settings, "num_env_steps": r.num_env_steps}).num_env_steps == r.num_env_steps


# -- the page -------------------------------------------------------------------------------------------------------------------------


def test_page_of_a_dataset(root, capsys):
    write_minari(pointmass_data("medium", episodes=20), "markovia/toy/medium-v0")
    write_minari(pointmass_data("random", episodes=20), "markovia/toy/medium-replay-v0")
    assert cli(["dataset"]) == 0
    assert capsys.readouterr().out.split() == ["markovia/toy/medium-replay-v0", "markovia/toy/medium-v0"]
    assert cli(["dataset", "markovia/toy/medium-v0"]) == 0
    text = capsys.readouterr().out
    for part in ("800 transitions in 20 episodes", "20 truncated", "TQ", "SACo", "action coverage", "markovia-toy-medium-v0.png"):
        assert part in " ".join(text.split())
    assert (root / "markovia-toy-medium-v0.png").read_bytes()[:4] == b"\x89PNG"
    assert cli(["dataset", "markovia/toy/medium-v0", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["saco_reference"] == "markovia/toy/medium-replay-v0" and page["ends"] == {"terminated": 0, "truncated": 20, "cut": 0}
    assert page["tq"] == pytest.approx(page["score_pct"] / 100) and sum(page["histogram"]["counts"]) == 20
    assert cli(["dataset", "fixture:maze", "--json", "-o", "maze.png"]) == 0
    assert len(json.loads(capsys.readouterr().out)["action_share"]) == 5 and (root / "maze.png").exists()


def test_the_page_does_not_depend_on_a_neighbour_that_nobody_named(root, capsys):
    write_minari(pointmass_data("medium", episodes=2), "markovia/toy/medium-v0")
    replay = pointmass_data("random", episodes=2)
    wide = dataclasses.replace(replay, about=dataclasses.replace(replay.about, observation_space=None)).rows(np.arange(10))
    obs = {k: np.repeat(getattr(wide, k), 2, axis=1) for k in ("obs", "next_obs")}
    wide = dataclasses.replace(wide, **obs, about=dataclasses.replace(wide.about, observation_space=box_like(obs["obs"])))
    write_minari(wide, "markovia/toy/medium-replay-v0")
    file = root / "minari" / "markovia/toy/medium-replay-v0" / "data" / "main_data.hdf5"
    for what, code in (("only data of one task can be compared", 2), ("can't be read", 1)):
        assert cli(["dataset", "markovia/toy/medium-v0", "--json"]) == 0
        page = json.loads(capsys.readouterr().out)
        assert page["saco"] is None and page["saco_reference"] is None and page["transitions"] == 80
        assert page["notes"][0].startswith("SACo was not measured against markovia/toy/medium-replay-v0: ") and what in page["notes"][0]
        assert cli(["dataset", "markovia/toy/medium-v0", "--reference", "markovia/toy/medium-replay-v0"]) == code
        assert what in capsys.readouterr().err
        file.write_bytes(file.read_bytes()[:1000])


def test_page_of_files_that_do_not_say_their_time_limit(root, capsys):
    h5py = pytest.importorskip("h5py")
    for name in ("a.hdf5", "b.hdf5"):
        with h5py.File(name, "w") as file:
            for column, shape in {"observations": (4, 2), "rewards": 4, "terminals": 4}.items():
                file[column] = np.zeros(shape)
            file["actions"] = np.arange(4) % 2
    assert cli(["dataset", "a.hdf5", "--reference", "b.hdf5", "--horizon", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saco"] == 1.0


def test_page_of_returns_that_differ_by_rounding(root, capsys):
    data = pointmass_data("medium", episodes=1).rows(np.arange(6))
    flags = {"terminated": np.array([0, 0, 1, 0, 0, 1], dtype=bool), "episode": np.array([0, 0, 0, 1, 1, 1])}
    spaces_ = {"action_space": Discrete(3, start=5), "observation_space": data.about.observation_space}
    rewards = np.array([0.1, 0.2, 0.3, 0.3, 0.2, 0.1])
    data = dataclasses.replace(data, **flags, reward=rewards, action=np.array([5, 5, 5, 7, 7, 6]), about=About("near", **spaces_))
    write_minari(data, "near-v0")
    assert cli(["dataset", "near-v0", "-o", "near.png"]) == 0
    assert "5: 50.0 %, 6: 16.7 %, 7: 33.3 %" in " ".join(capsys.readouterr().out.split()) and (root / "near.png").exists()


def test_page_of_a_faulty_file_is_its_report(root, capsys):
    h5py = pytest.importorskip("h5py")
    with h5py.File("bad.hdf5", "w") as file:
        for name, shape in {"observations": (4, 2), "actions": (3, 1), "rewards": 4, "terminals": 4, "timeouts": 4}.items():
            file[name] = np.zeros(shape)
    assert cli(["dataset", "bad.hdf5"]) == 1
    assert "fault  actions, row 3: 3 rows, expected 4" in capsys.readouterr().err
    assert cli(["dataset", "no-such-v0"]) == 2
    assert "no dataset no-such-v0" in capsys.readouterr().err


def test_collect_command(root, capsys):
    assert cli(["collect", "CartPole-v1"]) == 2
    assert "there is no recipe" in capsys.readouterr().err
    assert cli(["collect", "CartPole-v1", "--expert-run", "r", "--method", "sac", "--medium-return", "5", "--num-env-steps", "3"]) == 2
    assert "with --expert-run, nothing is trained, so --method, --num-env-steps, --medium-return would do nothing" in capsys.readouterr().err
    flags = ["--method", "ppo", "--num-env-steps", "512", "--eval-every", "256", "--medium-return", "5", "--num-steps", "50", "--no-progress"]
    code = cli(["collect", "CartPole-v1", "--out", "c", "--tiers", "random", "medium-replay", *flags])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "markovia/cartpole/random-v0" in captured.out and "score" in captured.out


def test_environments_that_no_dataset_can_name_are_told_before_training(root, monkeypatch):
    """Registered by its class, which JSON can't hold."""
    from gymnasium.envs.classic_control.pendulum import PendulumEnv
    from gymnasium.envs.registration import EnvSpec, registry

    spec = EnvSpec("ClassPendulum-v0", entry_point=PendulumEnv, max_episode_steps=200)
    monkeypatch.setitem(registry, "ClassPendulum-v0", spec)
    with pytest.raises(ValueError, match=r"ClassPendulum-v0 can't be written into a dataset .* entry_point='module:Class'"):
        collect(dataclasses.replace(SMALL, env="ClassPendulum-v0"), out=root / "c", progress=False)
    assert not (root / "c" / "run").exists()
    data = pointmass_data("random", episodes=1)
    with pytest.raises(ValueError, match="register it by name"):
        write_minari(dataclasses.replace(data, about=dataclasses.replace(data.about, env_spec=spec)), "tests/y-v0")
