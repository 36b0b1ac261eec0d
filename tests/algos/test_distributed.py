"""Several processes that share a batch: records, statistics and parameters are those of one process with all rows."""

import json
import os
import pickle
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from markovia.agents.checkpoint import load_tensors
from markovia.agents.language import LanguageAgent
from markovia.algos.collect import SequenceCollector
from markovia.algos.distributed import SharedAgent, SharedTask, Workers, launched, shared_driver
from markovia.algos.on_policy.driver import OnPolicyDriver
from markovia.algos.presets import override
from markovia.algos.sharding import local
from markovia.algos.systems import find
from markovia.envs.text.tasks import TextTask
from markovia.envs.text.tokens import CharTokenizer
from markovia.loaded import load_run
from markovia.rundir import Metrics, checkpoints

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
SCORED = []  # rows that this process has scored


def vowels(prompts, completions, **columns):
    SCORED.append(len(completions))
    return [float(sum(c in "aei" for c in text)) - w for text, w in zip(completions, columns["w"], strict=True)]


def tiny(seed=0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, initializer_range=0.5, **shape))
    return LanguageAgent(model, CharTokenizer("abcdefghi"), **options)


def task(group):
    prompts = ["a", "bcd", "efghi", "ih"]
    return TextTask(prompts, CharTokenizer("abcdefghi"), vowels, 5, columns={"w": [0.0, 0.1, 0.2, 0.3]}, group_size=group)


CASES = {
    "grpo": {},
    "rloo": {},
    "grpo/dr-grpo": {},
    "kl-cov": {"solver": {"minibatch": None, "epochs": 2}},
    "ppo-rlhf": {"group_size": 1},
    "grpo/dapo": {"filter": {"low": -5.0, "high": 1.0}},
    "siren": {},
    "dph-rl": {},
}


def method(name):
    sgd = {"optimizer": "sgd", "lr": 0.05, "max_grad_norm": 1e9, "minibatch": 6, "micro": 2}
    base = {"num_envs": 12, "group_size": 4, "num_env_steps": 1000, "solver": sgd}
    return override(override(find(name).value, base), CASES[name])


def iterations(name, workers=None, steps=2):
    """Parameters and statistics after some iterations."""
    settings = method(name)
    critic = settings.advantage.needs_critic
    collector = SequenceCollector(task(settings.group_size), settings.num_envs)
    if workers is None:
        driver = OnPolicyDriver(settings, tiny(value_head=critic), collector)
    else:  # another start everywhere but on the first process: its weights count
        driver = shared_driver(settings, tiny(seed=workers.rank, value_head=critic), collector, 0, workers)
    stats = [driver.step() for _ in range(steps)]
    return torch.cat([p.detach().reshape(-1) for p in driver.agent.net.parameters()]), stats


def child(rank, size, port, work, out):
    try:
        torch.set_num_threads(1)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        dist.init_process_group("gloo")
        out.put((rank, pickle.dumps(work(Workers()))))  # by value: torch would hand over shared memory that ends with this process
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        out.put((rank, traceback.format_exc()))


def together(work, size=2):
    """What `work(workers)` gives on each of some forked processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")  # a fresh interpreter would import for seconds
    out = context.SimpleQueue()
    processes = [context.Process(target=child, args=(rank, size, port, work, out)) for rank in range(size)]
    for p in processes:
        p.start()
    found = dict(out.get() for _ in processes)
    for p in processes:
        p.join(60)
    assert not [text for text in found.values() if isinstance(text, str)], found
    return [pickle.loads(found[rank]) for rank in range(size)]


def all_cases(workers):
    return {name: iterations(name, workers) for name in CASES}


@pytest.fixture(scope="module")
def shared():
    return together(all_cases)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_all_rows(name, shared):
    want, stats = iterations(name)
    start = torch.cat([p.detach().reshape(-1) for p in tiny(value_head=method(name).advantage.needs_critic).net.parameters()])
    way = float((want - start).abs().max())
    assert way > 1e-3
    for rank in (0, 1):
        got, found = shared[rank][name]
        assert float((got - want).abs().max()) < 1e-4 * way + 2e-6
        for one, other in zip(stats, found, strict=True):
            assert one.keys() == other.keys()
            assert other == pytest.approx(one, rel=1e-3, abs=1e-4, nan_ok=True)
    assert torch.equal(shared[0][name][0], shared[1][name][0])


def one_record(workers):
    SCORED.clear()
    agent, problem = SharedAgent(tiny(top_p=0.9), workers), SharedTask(task(3), workers)
    rollout = agent.generate(problem.starts(9, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    score = problem.score(rollout)
    with torch.no_grad():
        seen = agent.evaluate(rollout, ("logp", "dist"))
    return rollout.action, rollout.logp_old, rollout.group, rollout.outcome, score, seen.logp, seen.dist.logits, list(SCORED)


def test_the_record_is_that_of_one_process_and_the_work_is_shared():
    problem, alone = task(3), tiny(top_p=0.9)
    want = alone.generate(problem.starts(9, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    score = problem.score(want)
    seen = alone.evaluate(want, ("logp", "dist"))
    for (action, logp, group, outcome, got, evaluated, logits, scored), mine in zip(together(one_record), (5, 4), strict=True):
        assert torch.equal(action, want.action) and torch.equal(group, want.group) and torch.equal(got, score) and scored == [mine]
        torch.testing.assert_close(logp, want.logp_old, rtol=0, atol=1e-6)
        torch.testing.assert_close(evaluated, seen.logp, rtol=0, atol=1e-6)
        torch.testing.assert_close(logits, seen.dist.logits, rtol=0, atol=1e-5)
        assert outcome["completion_text"] == want.outcome["completion_text"] and outcome["columns"] == want.outcome["columns"]
        assert outcome["rewards"].keys() == want.outcome["rewards"].keys()


# -- a model that is cut over the processes ----------------------------------------------------------------------------------------------

CUT: dict[str, tuple] = {  # row, agent options, settings
    "grpo with LoRA": ("grpo", {"lora": {"r": 2}}, {}),
    "dr-grpo": ("grpo/dr-grpo", {"gradient_checkpointing": True}, {"solver": {"max_grad_norm": 0.1}}),
    "ppo with Adam": (
        "ppo-rlhf", {"lora": {"r": 2}, "value_head": True}, {"group_size": 1, "solver": {"optimizer": "adam", "eps": 1e-3, "lr": 1e-2}},
    ),
}


def cut_run(case, workers=None, steps=2):
    """Weights, the optimiser's state and statistics after some iterations, and what a new driver makes of the first two."""
    name, options, changes = CUT[case]
    settings = override(override(method(name), {"refresh": {"type": "Fixed"}, "solver": {"micro": 2}}), changes)

    def driver():
        collector = SequenceCollector(task(settings.group_size), settings.num_envs)
        agent = tiny(**options)
        return OnPolicyDriver(settings, agent, collector) if workers is None else shared_driver(settings, agent, collector, 0, workers)

    first = driver()
    stats = [first.step() for _ in range(steps)]
    state, averages = first.agent.state(), first.updates["main"].optimizer.state()
    second = driver()
    second.load_state(*first.state())
    again = second.agent.state(), second.updates["main"].optimizer.state()
    clone = [{k: v.clone() for k, v in x.items()} for x in (state, averages, *again)]
    parts = {n: tuple(local(p).shape) for n, p in first.agent.net.named_parameters()}
    return (*clone, stats, parts)


def cut_cases(workers):
    workers.sharded = True
    return {case: cut_run(case, workers) for case in CUT}


@pytest.fixture(scope="module")
def cut():
    return together(cut_cases)


@pytest.mark.parametrize("case", CUT)
def test_a_model_cut_over_two_processes_learns_as_a_whole_one(case, cut):
    state, averages, _, _, stats, whole_shapes = cut_run(case)
    for rank in (0, 1):
        got, got_averages, again, again_averages, found, shapes = cut[rank][case]
        assert got.keys() == state.keys() and got_averages.keys() == averages.keys()
        for k in state:
            torch.testing.assert_close(got[k], state[k], rtol=1e-4, atol=1e-5)
        for k in averages:
            torch.testing.assert_close(got_averages[k], averages[k], rtol=1e-3, atol=1e-5)
        assert all(torch.equal(again[k], got[k]) for k in got) and all(torch.equal(again_averages[k], got_averages[k]) for k in averages)
        for one, other in zip(stats, found, strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-4, nan_ok=True)
        table = next(n for n in shapes if "embed_tokens" in n)
        assert shapes[table] == (6, 16) and whole_shapes[table] == (12, 16)  # half of the rows each


def test_what_a_cut_model_cannot_do_is_told():
    from markovia.algos.distributed import _check_sharded

    grpo = override(find("grpo").value, {"num_envs": 12, "group_size": 4})
    with pytest.raises(ValueError, match="train LoRA"):
        _check_sharded(grpo, tiny(), 2)
    with pytest.raises(ValueError, match=r"2 processes take equally many rows .* \(got \[3\]\)"):
        _check_sharded(override(grpo, {"solver": {"minibatch": 3}}), tiny(lora={"r": 2}), 2)
    with pytest.raises(ValueError, match="can't be a filter"):
        _check_sharded(override(find("grpo/dapo").value, {"num_envs": 12, "group_size": 4}), tiny(lora={"r": 2}), 2)


def fewer_rows_than_processes(workers):
    settings = override(find("rloo").value, {"num_envs": 2, "group_size": 2, "solver": {"optimizer": "sgd", "lr": 0.1, "minibatch": None}})
    driver = shared_driver(settings, tiny(), SequenceCollector(task(2), 2), 0, workers)
    driver.step()
    return torch.cat([p.detach().reshape(-1) for p in driver.agent.net.parameters()])


def test_a_process_without_rows_keeps_up():
    a, b, c = together(fewer_rows_than_processes, 3)
    assert torch.equal(a, b) and torch.equal(a, c) and torch.isfinite(a).all()


def test_a_process_of_its_own_is_left_alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched("cpu") == (None, "cpu")


def test_what_is_not_text_is_refused():
    class Chain:
        kind = "denoising"

    with pytest.raises(ValueError, match="this is OnPolicy on a denoising task; train it in one process"):
        shared_driver(find("rloo").value, Chain(), None, 0, None)


def torchrun(*flags, size=2):
    """A command on several processes; its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    command = [sys.executable, *launcher, "-m", "markovia", *flags]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


FLAGS = ["train", "grpo", "--env", "markovia/Arithmetic-v0", "--num-envs", "16", "--num-env-steps", "64", "--solver.optimizer", "sgd"]
FLAGS += ["--solver.lr", "0.1", "--eval-episodes", "3", "--num-checkpoints", "2", "--agent-options", '{"lora": {"r": 4}}']


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--shard"]], ids=["whole", "cut"])
def test_torchrun_writes_the_run_of_one_process(more, tmp_path):
    """The command line: one run folder, the numbers and the evaluation of one process, and two processes go on with the folder of one."""
    torchrun(*FLAGS, "--out", str(tmp_path / "one"), size=1)
    assert torchrun(*FLAGS, *more, "--out", str(tmp_path / "two")).count("64 steps in") == 1
    one, two = (Metrics(tmp_path / name).read() for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        told = {k for k in a if k not in ("seconds", "steps_per_second", "reward_histogram")}
        assert {k: b[k] for k in told} == pytest.approx({k: a[k] for k in told}, rel=1e-3, abs=1e-4)
    weights = [load_tensors(checkpoints(tmp_path / name)[-1] / "driver.safetensors")[0] for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-5
    done = [json.loads((tmp_path / name / "done.json").read_text())["evaluation"] for name in ("one", "two")]
    assert done[0]["completions"] == done[1]["completions"]
    assert load_run(tmp_path / "two").agent.state().keys() == load_run(tmp_path / "one").agent.state().keys()
    torchrun(*FLAGS, *more, "--out", str(tmp_path / "one"), "--resume")


def test_cutting_a_model_needs_several_processes():
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        launched("cpu", shard=True)
