"""Every format through the fuzzer for a moment, every input that it ever failed on, and by hand what its mutations can't be counted on to reach."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats import FORMATS, files_of, write

from markovia.agents.checkpoint import CheckpointError, load_agent, load_tensors, save_agent, save_tensors
from markovia.agents.control import ControlAgent
from markovia.agents.tabular import TabularAgent
from markovia.envs import untrusted
from markovia.envs.text.preference_rows import records
from markovia.envs.text.rewards import resolve
from markovia.envs.untrusted import code_from_file, magic_of_pickle, read_json
from markovia.loaded import load_run
from markovia.rundir import RunError
from markovia.runs import train

torch.set_num_threads(1)
HERE = Path(__file__).parent
CORPUS = sorted(p for p in (HERE / "corpus").iterdir() if p.is_dir())
EXAMPLES = {"checkpoint": 15, "config": 10, "jsonl": 40, "hdf5": 40, "minari": 20}


def fuzzer(*arguments: str) -> subprocess.CompletedProcess[str]:
    """tests/trust/fuzz.py in a process of its own: its hook that watches what is done can't be taken away again."""
    return subprocess.run([sys.executable, "-W", "ignore", str(HERE / "fuzz.py"), *arguments], capture_output=True, text=True, cwd=HERE.parents[1])


def test_a_moment_of_every_format(tmp_path: Path) -> None:
    found = fuzzer("--examples", *(f"{name}={n}" for name, n in EXAMPLES.items()), "--seed", "0")
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_page_shows_the_long_runs() -> None:
    from fuzz import table

    results = json.loads((HERE.parents[1] / "benchmarks" / "results" / "fuzz.json").read_text())
    assert table(results) in (HERE.parents[1] / "docs" / "trust.md").read_text()
    assert results.keys() == FORMATS.keys() and all(found["minutes"] >= 10 and not found["failures"] for found in results.values())


@pytest.mark.parametrize("place", CORPUS, ids=lambda p: p.name)
def test_inputs_that_failed_once(place: Path, tmp_path: Path) -> None:
    write(files_of(place), tmp_path / "input")
    FORMATS[place.name.partition("-")[0]].read(tmp_path / "input")


@pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer forks and limits memory")
def test_the_fuzzer_finds_what_is_there(tmp_path: Path) -> None:
    """An uncaught error, a file opened for writing elsewhere, a module that the file named: each in a reader of its own."""
    readers = {
        "error": "{}['x']",
        "write": f"open({str(tmp_path / 'escape')!r}, 'a').close()",
        "import": "__import__('fuzz_bait')",
        "unpickle": "__import__('pickle').loads(__import__('pickle').dumps(print))",
        "swallowed": "taught(lambda: __import__('os').system('true'))",
    }
    for name, code in readers.items():
        program = (
            f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport fuzz, formats\nfrom pathlib import Path\nfrom formats import taught\n"
            "from hypothesis import strategies as st\n"
            f"formats.FORMATS['x'] = formats.Format(dict, lambda: st.just({{'a': b''}}), lambda folder: {code})\n"
            f"tried, why = fuzz.apart('x', 0, Path({str(tmp_path)!r}))\nprint(why)"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=HERE.parents[1])
        assert ("KeyError" if name == "error" else "Forbidden") in found.stdout, (name, found.stdout, found.stderr)
    assert not (tmp_path / "escape").exists()


# -- pickles -----------------------------------------------------------------------------------------------------------------------------------


def test_a_pickle_is_told_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "agent.safetensors"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps([1], protocol=protocol))
        assert magic_of_pickle(file) == f"a pickle of protocol {protocol}"
        with pytest.raises(CheckpointError, match=rf"pickle of protocol {protocol}.*nothing in it was run.*safetensors"):
            load_tensors(file)
    torch.save({"w": torch.ones(1)}, file)
    assert "PyTorch archive" in str(magic_of_pickle(file))
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert magic_of_pickle(tmp_path / "x.npy") == "a NumPy file of pickled objects"
    np.save(tmp_path / "x.npy", np.zeros(2))
    assert magic_of_pickle(tmp_path / "x.npy") is None
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    assert magic_of_pickle(tmp_path / "x.zip") is None
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 no archive")
    assert magic_of_pickle(tmp_path / "x.zip") is None
    for reader in (read_json, lambda path: list(records(path))):
        named = tmp_path / "x.jsonl"
        named.write_bytes(pickle.dumps([1]))
        with pytest.raises(ValueError, match="pickle of protocol"):
            reader(named)


class Reduced:
    """Its pickle names a function to be called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


@pytest.mark.parametrize("protocol", [0, 1])
@pytest.mark.parametrize("thing", [[1], {"w": np.zeros(3)}, "text\nand more", 1.5, None, {"a": [1, (2, "b")]}, Reduced()], ids=type)
def test_pickles_without_a_mark_are_told_too(protocol: int, thing: Any, tmp_path: Path) -> None:
    """Protocols 0 and 1 begin like any text; their operations end in a stop."""
    file = tmp_path / "agent.safetensors"
    for content in (pickle.dumps(thing, protocol), pickle.dumps(thing, protocol) + b"\n", pickle.dumps(1, protocol) + pickle.dumps(thing, 4)):
        file.write_bytes(content)
        assert str(magic_of_pickle(file)).startswith("a pickle of protocol")
        with pytest.raises(CheckpointError, match=r"is a pickle of protocol \d.*nothing in it was run.*safetensors"):
            load_tensors(file)
        with pytest.raises(ValueError, match="is a pickle of protocol"):
            read_json(file)


def test_other_unmarked_pickles(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    marked = pickle.dumps([1, "a"], 4)
    for content, told in (
        (b"cos\nsystem\n(S'true'\ntR.", "a pickle of protocol 0"),
        (b"\x80\x01" + pickle.dumps([1], 1), "a pickle of protocol 1"),  # a mark that nobody writes
        (marked[2:], "a pickle of protocol 4"),  # without the mark that belongs to it
        (pickle.dumps({"w": b"0" * 10**6}, 1), "a pickle of protocol 1"),  # longer than what is looked at
        (pickle.dumps([1.5] * 10**5, 1), "a pickle of protocol 1"),
        (pickle.dumps([1.5] * 10**5, 0), "a pickle of protocol 0"),
    ):
        file.write_bytes(content)
        assert magic_of_pickle(file) == told, content[:20]
    torch.save({"w": torch.ones(1)}, file, _use_new_zipfile_serialization=False, pickle_protocol=0)
    assert str(magic_of_pickle(file)).startswith("a pickle of protocol")


@pytest.mark.parametrize(
    "text",
    ["", ".", "0.", "1.\n2.\n", "2.", "N. Korea", "...", "Is it?", "I am.\n", "I1 and more", "cat\nand\ndog", "The film was", "V for\n. more",
     "(t. x", '{"a": 1}', "[1, 2]", "[[1.5]]", '"text"', "null", "true", "12", " [1]", "\n{}", "}. b", "Lots of text. " * 9000, "I1\n" * 5 + "x"],
    ids=lambda t: repr(t[:12]),
)  # fmt: skip
def test_texts_and_json_are_no_pickles(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text)
    assert magic_of_pickle(tmp_path / "x.txt") is None


def test_numbers_are_no_pickles(tmp_path: Path) -> None:
    """Half a million bytes of weights each, as they lie in a file without a header."""
    generator = np.random.default_rng(0)
    for k in range(300):
        content = (generator.integers(0, 256, 2000, np.uint8), generator.normal(size=500).astype("f4"))[k % 2].tobytes()
        (tmp_path / "x").write_bytes(content)
        found = magic_of_pickle(tmp_path / "x")
        assert found is None or content[:1] == b"\x80", content[:10]


def test_lengths_of_headers_that_look_like_pickles_are_none(tmp_path: Path) -> None:
    """A safetensors file begins with its header's length: 0x0280 to 0x0580 and more begin like pickles of protocol 2 to 5."""
    seen = set()
    for n in range(0, 1400, 8):
        file = save_tensors(tmp_path / "x.safetensors", {"w": torch.ones(1)}, {"a": "x" * n})
        seen.add(file.read_bytes()[:2])
        assert load_tensors(file)[1] == {"a": "x" * n}
    assert seen & {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}


# -- sizes -------------------------------------------------------------------------------------------------------------------------------------


def claims(agent: Any, folder: Path, change: Any) -> Path:
    """A saved agent whose configuration says something else, its hash being right."""
    save_agent(agent, folder)
    header = json.loads((folder / "agent.json").read_text())
    change(header["config"])
    (folder / "agent.json").write_text(json.dumps(header))
    return folder


def test_networks_larger_than_their_file_are_not_built(tmp_path: Path) -> None:
    from gymnasium import spaces

    box = spaces.Box(-1.0, 1.0, (2,))
    control = ControlAgent.from_spaces(box, box, hidden=(4,))
    for k, (change, message) in enumerate([
        (lambda c: c.update(hidden=[10**7, 10**7]), "describes .* numbers, its file holds"),
        (lambda c: c.update(hidden=[4] * 10**5), "100000 layers, at most"),
        (lambda c: c["observation_space"].update(shape=[10**6, 10**6]), "at most .* entries are read"),
        (lambda c: c["observation_space"].update(dtype="O"), "expected numbers"),
        (lambda c: c.update(layers=10**9), "layers, at most"),
    ]):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_agent(claims(control, tmp_path / str(k), change))
    table = TabularAgent.from_spaces(spaces.Discrete(2), spaces.Discrete(2))
    with pytest.raises(ValueError, match=r"describes .* numbers, its file holds"):
        load_agent(claims(table, tmp_path / "table", lambda c: c["observation_space"].update(n=10**12)))


def test_json_and_lines_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(file)
    with pytest.raises(ValueError, match=r"100000 bytes, at most 1000 are read"):
        read_json(file, most=1000)
    monkeypatch.setattr(untrusted, "MAX_LINE", 1000)
    (tmp_path / "long.jsonl").write_text('{"text": "' + "a" * 2000 + '"}\n')
    with pytest.raises(ValueError, match="line 1 has more than 1000 characters"):
        list(records(tmp_path / "long.jsonl"))
    monkeypatch.setattr(untrusted, "SMALL", 1000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 10**5))
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        list(records(tmp_path / "bomb.jsonl.gz"))
    for name, content in (("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 50)[:-9]), ("latin.jsonl", b'{"text": "\xe9"}\n')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"can't be read.*not text in UTF-8, fetch it again"):
            list(records(tmp_path / name))


# -- code --------------------------------------------------------------------------------------------------------------------------------------

TREE = "markovia/TokenTree-v0"


def edited(folder: Path, **changes: Any) -> Path:
    """A run whose configuration, and that of its checkpoint, say something else."""
    for path in folder.rglob("config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_configuration_names_no_code_that_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from markovia.algos.presets import configure, override

    method = override(configure("ppo", TREE), {"num_env_steps": 8, "num_envs": 4, "num_steps": 2})
    train(method, TREE, out=tmp_path / "run", num_checkpoints=1, eval_episodes=0, progress=False)
    (tmp_path / "evil_module.py").write_text("raise SystemExit('run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"names code of the module 'evil_module'.*MARKOVIA_TRUST_CODE=evil_module"):
        load_run(edited(tmp_path / "run", env="evil_module:Some-v0"))
    with pytest.raises(ValueError, match="names code of the module 'os'"):
        load_run(edited(tmp_path / "run", env="markovia/Arithmetic-v0", env_kwargs={"task": "os:system", "command": "false"}))
    with pytest.raises(RunError, match="environments, at most"):
        settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
        load_run(edited(tmp_path / "run", env=TREE, env_kwargs={}, settings=settings | {"num_envs": 10**6}))
    with pytest.raises(RunError, match="layers of that size"):
        load_run(edited(tmp_path / "run", settings=settings, agent_options={"hidden": [10**6, 10**6]}))
    assert "evil_module" not in sys.modules


def test_names_in_files_are_followed_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    own = "markovia.envs.text.rewards:exact_answer"
    with code_from_file():
        assert callable(resolve(own))
        for name in ("os:system", "markovia.runs:train", "markovia.envs.text.rewards:lru_cache", "builtins:exec"):
            with pytest.raises(ValueError, match="the file names"):
                resolve(name)
    with code_from_file(["operator"]):
        assert resolve("operator:add")(1, 2) == 3
    monkeypatch.setenv(untrusted.TRUST, "math, operator")
    with code_from_file():
        assert resolve("operator:add")(1, 2) == 3
    assert resolve("os:getcwd")() == os.getcwd()  # what the user names is the user's


def test_a_pipeline_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from markovia.envs.denoising.networks import load_pretrained
    from markovia.envs.denoising.pipeline_network import example_pipeline, load_pipeline

    example_pipeline().save_pretrained(tmp_path / "pipe")
    load_pipeline(tmp_path / "pipe")
    index = tmp_path / "pipe" / "model_index.json"
    good = json.loads(index.read_text())
    (tmp_path / "pipe" / "mine.py").write_text("raise SystemExit('run')\n")
    for change in ({"_class_name": ["mine", "Pipe"]}, {"unet": ["mine", "Net"]}, {"unet": ["os", "PathLike"]}):
        index.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=r"names no class of diffusers|neither of diffusers nor of transformers"):
            load_pipeline(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no shipped weights"):
        load_pretrained("../../text/weights/arithmetic")


def test_pickled_weights_of_a_model_are_not_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from markovia.envs.text.pretrained import load_model

    model = load_model("arithmetic")
    model.save_pretrained(tmp_path / "model")
    load_model(str(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path / "model"))


def test_a_dataset_does_not_build_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    from markovia.envs.offline import DatasetError, load_minari

    write(FORMATS["minari"].good(), tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert len(load_minari("fuzz/x-v0")) == 4
    file = tmp_path / "fuzz" / "x-v0" / "data" / "metadata.json"
    told = json.loads(file.read_text())
    spec = json.loads(told["env_spec"]) | {"entry_point": "fuzz_bait:run"}
    del told["observation_space"]
    file.write_text(json.dumps(told | {"env_spec": json.dumps(spec)}))
    with pytest.raises(DatasetError, match=r"'fuzz_bait:run' would have to be run.*not the registered environment"):
        load_minari("fuzz/x-v0")
    assert "fuzz_bait" not in sys.modules
