"""Talk to a trained language agent: prompts from turns, text as it is drawn, the commands of the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from markovia.rundir import CONFIG, RunError, checkpoints, read_json

if TYPE_CHECKING:
    from markovia.agents.interface import Agent
    from markovia.agents.language import LanguageAgent

Show = Callable[[str], object]
HELP = "/quit ends, /reset forgets what was said, /temperature X changes the temperature (0: the likeliest token), /help shows this"


def newest_agent(run: Path) -> Agent:
    """The agent of a run's newest checkpoint. Raises RunError for a folder that is no run or has no checkpoint yet."""
    from markovia.agents.interface import Agent

    read_json(run / CONFIG)
    found = checkpoints(run)
    if not found:
        raise RunError(f"{run} has no checkpoint yet; train on with --resume")
    return Agent.load(found[-1] / "agent")


def language_agent(run: Path, what: str) -> LanguageAgent:
    """The agent of a run's newest checkpoint; `what` names the command that wants it.

    Raises what `newest_agent` raises, and ValueError for an agent that is no language agent.
    """
    from markovia.agents.language import LanguageAgent

    agent, config = newest_agent(run), read_json(run / CONFIG)
    if not isinstance(agent, LanguageAgent):
        taken = "language agents and on diffusers pipelines" if what == "export" else "language agents"
        raise ValueError(
            f"{what} works on {taken}, but {run} trained a {agent.kind} agent on {config['env']}; "
            f"`markovia video {run}` shows what it does, `markovia eval {run}` how well"
        )
    return agent


@dataclass
class Conversation:
    """Turns with one agent. With the tokenizer's chat template the turns so far are the prompt; without one every line is continued by itself.

    temperature None is the agent's own, 0 takes the likeliest token. Raises ValueError for a negative one.
    """

    agent: LanguageAgent
    max_new_tokens: int | None = None  # of one answer; None: 256 with a chat template, else what the agent was trained with
    temperature: float | None = None
    plain: bool = False  # leave the chat template out
    seed: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.set_temperature(self.temperature)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.inner: Any = getattr(self.agent.tokenizer, "inner", None)
        self.templated = not self.plain and bool(getattr(self.inner, "chat_template", None))
        if self.max_new_tokens is None:
            self.max_new_tokens = 256 if self.templated else self.agent.options.max_new_tokens
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")

    def set_temperature(self, temperature: float | None) -> None:
        """Sample at this temperature from now on."""
        if temperature is not None and not temperature >= 0.0:
            raise ValueError(f"temperature must be >= 0 (0: the likeliest token), got {temperature}")
        self.greedy = temperature == 0.0
        if temperature:
            self.agent.options.temperature = temperature

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        if not self.templated:
            return self.agent.tokenizer.encode(turns[-1]["content"])
        return list(self.inner.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])

    def _prompt(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The turns, the oldest dropped until there is room for an answer, and their ids. Raises ValueError when the last one alone is too long."""
        room = getattr(self.agent.net["policy"].config, "max_position_embeddings", None)
        assert self.max_new_tokens is not None
        while True:
            ids = self._ids(turns)
            if not ids:
                raise ValueError("the agent needs something to continue; write at least one character")
            if room is None or len(ids) + self.max_new_tokens <= room:
                return turns, ids
            if len(turns) < 3:
                raise ValueError(
                    f"this turn has {len(ids)} tokens and an answer may have {self.max_new_tokens}, but the model reads {room}; "
                    "shorten it, or ask for a shorter answer (--max-new-tokens)"
                )
            turns = turns[2:]

    def reply(self, text: str, show: Show = lambda piece: None) -> str:
        """The agent's answer; `show` gets it piece by piece as it is drawn. Raises ValueError for an empty or overlong turn, which is forgotten."""
        turns, ids = self._prompt([*self.messages, {"role": "user", "content": text}])
        prompt = torch.tensor([ids])
        starts = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt, dtype=torch.bool), "max_new_tokens": self.max_new_tokens}
        drawn: list[int] = []
        shown = ""

        def watch(token: torch.Tensor) -> None:
            nonlocal shown
            drawn.append(int(token[0]))
            so_far = self.agent.tokenizer.decode(drawn)
            if not so_far.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character that needs several tokens
                show(so_far[len(shown) :])
                shown = so_far

        rollout = self.agent.generate(starts, self.generator, deterministic=self.greedy, watch=watch)
        answer: str = rollout.outcome["completion_text"][0]
        show(answer[len(shown) :])
        self.messages = [*turns, {"role": "assistant", "content": answer}]
        return answer


def talk(conversation: Conversation, read: Callable[[], str], show: Show) -> None:
    """Read lines and answer them until /quit or the end of the input. A turn that can't be answered is told, and the next one read."""
    show(HELP + "\n")
    while True:
        try:
            line = read()
        except (EOFError, KeyboardInterrupt):
            break
        command, _, argument = line.strip().partition(" ")
        if not command:
            continue
        if command in ("/quit", "/exit"):
            return
        try:
            if command == "/reset":
                conversation.messages.clear()
            elif command == "/temperature":
                conversation.set_temperature(_number(argument))
            elif command.startswith("/"):
                show(HELP + "\n")
            else:
                conversation.reply(line, show)
                show("\n")
        except ValueError as e:
            show(f"{e}\n")
        except KeyboardInterrupt:  # ends the answer, not the conversation
            show("\n")
    show("\n")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"/temperature takes a number, e.g. /temperature 0.7, got {text!r}") from None
