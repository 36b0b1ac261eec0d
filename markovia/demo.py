"""The demo: one agent interface on three kinds of MDP, with thresholds that it checks itself and a page that shows what changed."""

from __future__ import annotations

import base64
import html
import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from markovia.config_check import check_config
from markovia.rundir import CONFIG, RunError, read_json

PAGE = "index.html"
HALF_CHEETAH_SECONDS = 90.0
CONTROL_STEPS = 250_000
DIGITS_SECONDS = 60.0
TEXT_UPDATES = 15
WANTED = 3


@dataclass(frozen=True)
class Check:
    """One number before and after, and the bound that it has to meet."""

    what: str
    before: float
    after: float
    bound: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        return self.after >= self.bound if self.at_least else self.after <= self.bound


@dataclass
class Part:
    """What one of the three trainings gives to the table and the page."""

    title: str
    command: str
    seconds: float
    checks: list[Check]
    curve: bytes  # PNG
    pictures: list[tuple[str, bytes]] = field(default_factory=list)  # caption, PNG
    texts: list[tuple[str, list[tuple[float, str, str]]]] = field(default_factory=list)  # caption, (reward, prompt, completion)


def demo(out: Path, parts: tuple[str, ...] = ("control", "text", "digits")) -> bool:
    """Run the parts, print the table, write `out`/index.html; True when every check holds."""
    makers: dict[str, Callable[[Path], Part]] = {"control": control, "text": text, "digits": digits}
    for name in parts:
        _check_replaceable(out / name)
    done = []
    for name in parts:
        folder = out / name
        if folder.exists():
            shutil.rmtree(folder)
        done.append(makers[name](folder))
    _table(done)
    page = out / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(done))
    print(f"page: {page.resolve().as_uri()}")
    return all(c.holds for p in done for c in p.checks)


def _check_replaceable(folder: Path) -> None:
    """Raises RunError for a folder of the user's that the demo would remove: one that is neither empty nor a run."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        check_config(read_json(folder / CONFIG), folder / CONFIG)
    except RunError as e:
        raise RunError(f"the demo replaces {folder}, which is no run of markovia ({e}); choose another --out") from e


def _curve(folder: Path, title: str, ylabel: str) -> bytes:
    from markovia.pictures import curve, curve_png

    return curve_png(*curve(folder, "return"), title, ylabel)


def _override(method: str, env: str, changes: dict[str, Any]) -> Any:
    from markovia.algos.presets import configure, override

    return override(configure(method, env), changes)


def control(folder: Path) -> Part:
    """PPO on HalfCheetah-v5, as long as the clock allows; before: the untrained policy."""
    from markovia.algos.presets import agent_options
    from markovia.algos.setup import build
    from markovia.runs import train

    env = "HalfCheetah-v5"
    # The learning rate falls over what 90 s can reach on 2 cores, not over the preset's million steps.
    method = _override("ppo", env, {"num_env_steps": CONTROL_STEPS})
    fresh = build(env, method, 0, agent_options=agent_options("ppo", env))
    before = float(np.mean(fresh.evaluate(fresh.agent, 5, 1)["returns"]))
    fresh.collector.close()
    result = train(method, env, out=folder, max_seconds=HALF_CHEETAH_SECONDS, eval_episodes=5, method_id="ppo")
    after = result.done["evaluation"]["mean"]
    return Part(
        "Control: PPO on HalfCheetah-v5",
        f"markovia train ppo --env {env} --num-env-steps {CONTROL_STEPS} --max-seconds {HALF_CHEETAH_SECONDS:g}",
        result.done["seconds"],
        [Check("return of greedy episodes", before, after, 1500.0)],
        _curve(folder, "HalfCheetah-v5, ppo", "return"),
    )


def distinct_2(texts: list[str]) -> float:
    """Share of different word pairs among all word pairs of the texts; falls when they repeat themselves."""
    pairs = [pair for t in texts for pair in itertools.pairwise(t.lower().split())]
    return len(set(pairs)) / max(len(pairs), 1)


def text(folder: Path) -> Part:
    """RLOO with LoRA on SmolLM2: praise in film reviews; before and after on held-out openings."""
    from markovia.algos.presets import agent_options
    from markovia.algos.setup import build
    from markovia.runs import train
    from markovia.samples import draw

    env, num_envs = "markovia/Sentiment-v0", 32
    method = _override("rloo", env, {"num_envs": num_envs, "num_env_steps": num_envs * TEXT_UPDATES})
    options = {"lora": {"r": 16}, **agent_options("rloo", env)}
    fresh = build(env, method, 0, agent_options=options)
    old, old_reward = draw(fresh.agent, fresh.task, 32, 1)
    result = train(method, env, out=folder, agent_options=options, eval_episodes=0, method_id="rloo")
    new, new_reward = draw(result.agent, fresh.task, 32, 1)

    def shown(outcome: dict[str, Any], reward: np.ndarray) -> list[tuple[float, str, str]]:
        rows = zip(reward.tolist(), outcome["prompt_text"], outcome["completion_text"], strict=True)
        return list(rows)[:8]  # the first eight as drawn, not the best

    variety = distinct_2(old["completion_text"]), distinct_2(new["completion_text"])
    return Part(
        "Text: RLOO with LoRA on SmolLM2-135M",
        f"markovia train rloo --env {env} --num-envs {num_envs} --num-env-steps {num_envs * TEXT_UPDATES} --agent-options '{json.dumps(options)}'",
        result.done["seconds"],
        [
            Check("VADER score of held-out continuations", float(old_reward.mean()), float(new_reward.mean()), float(old_reward.mean()) + 0.25),
            Check("distinct word pairs (no word spam)", variety[0], variety[1], 0.6 * variety[0]),
        ],
        _curve(folder, "Sentiment, rloo", "VADER compound score"),
        texts=[("before", shown(old, old_reward)), ("after", shown(new, new_reward))],
    )


def nearest_real(samples: Any, real: Any) -> float:
    """Mean Euclidean distance of samples (n, 8, 8) to the nearest of the real images (m, 8, 8), pixels in [-1, 1]."""
    import torch

    return float(torch.cdist(samples.flatten(1), real.flatten(1)).min(dim=1).values.mean())


def digits(folder: Path) -> Part:
    """PPO on the digit denoiser.

    Classifiers call noise with large pixels a digit with certainty, and such noise is diverse too: probability, judge and pairwise distance are
    all met by it. So samples must also lie as near to real digits as real digits lie to each other.
    """
    import torch

    from markovia.algos.presets import agent_options
    from markovia.algos.setup import build
    from markovia.envs.denoising.tasks import digit_images
    from markovia.pictures import grid_png
    from markovia.runs import train
    from markovia.samples import draw

    env = "markovia/Digits-v0"
    method = _override("ppo", env, {})
    fresh = build(env, method, 0, env_kwargs={"wanted": WANTED}, agent_options=agent_options("ppo", env))
    old, old_reward = draw(fresh.agent, fresh.task, 64, 1)
    result = train(
        method, env, out=folder, env_kwargs={"wanted": WANTED}, max_seconds=DIGITS_SECONDS, eval_episodes=0, method_id="ppo"
    )
    new, new_reward = draw(result.agent, fresh.task, 64, 1)
    images, labels = digit_images()
    wanted = images[labels == WANTED]
    # How far a real image of the class is from the others: one half of them against the other half.
    real = nearest_real(wanted[::2], wanted[1::2])
    spread = [float(torch.pdist(x.flatten(1)).mean()) for x in (old["x"], new["x"], wanted)]
    judge = [float(fresh.task.judged(x["x"]).mean()) for x in (old, new)]
    return Part(
        f"Denoising: PPO on 8x8 digits, wanted: {WANTED}",
        f"markovia train ppo --env {env} --env-kwargs '{json.dumps({'wanted': WANTED})}' --max-seconds {DIGITS_SECONDS:g}",
        result.done["seconds"],
        [
            Check("classifier's probability of the wanted digit", float(old_reward.mean()), float(new_reward.mean()), 0.6),
            Check("the same by a second classifier", judge[0], judge[1], 0.6),
            Check("mean distance between samples", spread[0], spread[1], 0.5 * spread[2]),
            Check("distance to the nearest real image", nearest_real(old["x"], images), nearest_real(new["x"], images), 1.25 * real, at_least=False),
        ],
        _curve(folder, "Digits, ppo", "probability of the wanted digit"),
        pictures=[("before", grid_png(old["x"].numpy())), ("after", grid_png(new["x"].numpy()))],
    )


# -- table and page -------------------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(parts: list[Part]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="markovia demo")
    for name in ("part", "measure", "before", "after", "wanted", "", "seconds"):
        table.add_column(name, justify="right" if name in ("before", "after", "seconds") else "left")
    for part in parts:
        for i, c in enumerate(part.checks):
            sign = "≥" if c.at_least else "≤"
            row = (part.title if i == 0 else "", c.what, _number(c.before), _number(c.after), f"{sign} {_number(c.bound)}")
            table.add_row(*row, "[green]ok[/]" if c.holds else "[red]missed[/]", f"{part.seconds:.0f}" if i == 0 else "")
    Console().print(table)


_CSS = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#5b6776;--line:#dfe4ea;--page:#fff;--card:#f7f9fb;--ok:#17794a;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf1;--soft:#9aa7b5;--line:#323c48;--page:#14191f;--card:#1b222a;--ok:#56c98f;--bad:#ff8a80}}
body{margin:0 auto;max-width:64rem;padding:2rem 1.25rem 4rem;font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page)}
h1{margin:0 0 .25rem;font-size:1.9rem}h2{margin:2.75rem 0 .5rem;font-size:1.3rem}p{margin:.25rem 0 1rem;color:var(--soft)}
code{font:.92em ui-monospace,monospace;background:var(--card);border:1px solid var(--line);border-radius:5px;padding:.1rem .4rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:.85rem}
td.n{text-align:right;white-space:nowrap}.ok{color:var(--ok);font-weight:600}.bad{color:var(--bad);font-weight:600}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1rem;margin:1rem 0}
figure{margin:0;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
figure img{width:100%;display:block;background:#fff;border-radius:4px}figcaption{font-weight:600;margin-bottom:.5rem}
.curve{max-width:36rem}ul{list-style:none;margin:0;padding:0}li{padding:.45rem 0;border-top:1px solid var(--line);font-size:.93rem}
li:first-child{border-top:0}li b{font-variant-numeric:tabular-nums;margin-right:.4rem}li i{font-style:normal;color:var(--soft)}
"""


def render(parts: list[Part]) -> str:
    """One HTML page that needs nothing else: pictures are inside."""
    rows = "".join(_rows(p) for p in parts)
    head = "<tr><th>part</th><th>measure</th><th>before</th><th>after</th><th>wanted</th><th></th><th>seconds</th></tr>"
    made = time.strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>markovia demo</title><style>{_CSS}</style></head><body><h1>markovia demo</h1>"
        f"<p>A robot, a language model and an image denoiser, trained through one agent interface by one on-policy loop. {made}</p>"
        f'<div class="scroll"><table>{head}{rows}</table></div>{"".join(_section(p) for p in parts)}</body></html>'
    )


def _rows(part: Part) -> str:
    out = ""
    for i, c in enumerate(part.checks):
        verdict = '<td class="ok">ok</td>' if c.holds else '<td class="bad">missed</td>'
        out += f"<tr><td>{html.escape(part.title) if i == 0 else ''}</td><td>{html.escape(c.what)}</td>"
        out += "".join(f'<td class="n">{_number(v)}</td>' for v in (c.before, c.after))
        seconds = f"{part.seconds:.0f}" if i == 0 else ""
        out += f'<td class="n">{"≥" if c.at_least else "≤"} {_number(c.bound)}</td>{verdict}<td class="n">{seconds}</td></tr>'
    return out


def _section(part: Part) -> str:
    pictures = "".join(f"<figure><figcaption>{html.escape(t)}</figcaption>{_image(png, f'samples {t}')}</figure>" for t, png in part.pictures)
    texts = "".join(f"<figure><figcaption>{html.escape(t)}</figcaption><ul>{_lines(rows)}</ul></figure>" for t, rows in part.texts)
    inside = f'<div class="row">{pictures}{texts}</div>' if pictures or texts else ""
    curve = f'<figure class="curve">{_image(part.curve, "learning curve")}</figure>'
    return f"<h2>{html.escape(part.title)}</h2><p><code>{html.escape(part.command)}</code></p>{curve}{inside}"


def _lines(rows: list[tuple[float, str, str]]) -> str:
    return "".join(f"<li><b>{r:+.2f}</b><i>{html.escape(p)}</i> {html.escape(c)}</li>" for r, p, c in rows)


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
