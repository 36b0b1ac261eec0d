"""What the test files of the preference loop share: files of sums for the shipped arithmetic model, and drivers on them."""

import dataclasses
import json

import torch

from markovia.agents.language import LanguageAgent
from markovia.algos.preference.data import prepare
from markovia.algos.preference.driver import PreferenceDriver
from markovia.algos.preference.method import Preference
from markovia.algos.preference.methods import PREFERENCE
from markovia.algos.preference.sources import FileItems
from markovia.envs.text.preferences import DataOptions, load_preferences

torch.set_num_threads(1)
ROWS = {i: r for i, r in PREFERENCE.items() if isinstance(r.value, Preference)}
LORA = {"lora": {"r": 2}}
SUMS = [(3 * i % 10, 7 * i % 10) for i in range(12)]


def write(folder, rows):
    path = folder / "prefs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def pairs(**columns):
    return [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1 + i % 3), **columns} for i, (a, b) in enumerate(SUMS)]


def load(folder, rows, **options):
    return load_preferences(write(folder, rows), LanguageAgent.from_name("arithmetic").tokenizer, DataOptions(**options))


def make(method, data, seed=0, agent=None, **options):
    agent = agent or LanguageAgent.from_name("arithmetic", packed=True, value_head="value" in method.needs, **options)
    prepare(method, data)
    return PreferenceDriver(method, agent, FileItems(data.items, data.kind), seed)


def method_of(row, **changes):
    value = dataclasses.replace(ROWS[row].value, **{"num_env_steps": 12, "num_envs": 4, **changes})
    return dataclasses.replace(value, solver=dataclasses.replace(value.solver, lr=1e-3))


def parameters(driver):
    return torch.cat([p.detach().flatten() for p in driver.trained])


def anchor(driver):
    return torch.cat([p.flatten() for p in driver.moved])
