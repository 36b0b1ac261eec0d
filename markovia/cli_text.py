"""Commands for trained models: `markovia export`, and `markovia chat` for language."""

from __future__ import annotations

import argparse
from pathlib import Path


def _truth(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"takes True or False, got {text!r}") from None


def export_command(argv: list[str]) -> None:
    """`markovia export RUN --out DIR [--merge True|False]`."""
    about = "Write the model of a run's newest checkpoint: a language model as a plain Hugging Face folder, a diffusers pipeline as one of diffusers."
    parser = argparse.ArgumentParser(prog="markovia export", description=about)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, required=True, help="new folder to write")
    parser.add_argument(
        "--merge", type=_truth, default=True, metavar="True|False",
        help="add LoRA adapters into the weights (default); False: the adapters apart, as peft or diffusers reads them",
    )  # fmt: skip
    args = parser.parse_args(argv)
    from markovia.agents.denoising import DenoisingAgent
    from markovia.chat import language_agent, newest_agent

    agent = newest_agent(args.run)
    if isinstance(agent, DenoisingAgent):
        folder, how = agent.export(args.out, adapters=not args.merge), "DiffusionPipeline.from_pretrained" if args.merge else "load_lora_adapter"
    else:
        folder, how = language_agent(args.run, "export").export(args.out, args.merge), "AutoModelForCausalLM.from_pretrained"
    print(f"{folder}: {how}({str(folder)!r})")


def chat_command(argv: list[str]) -> None:
    """`markovia chat RUN`."""
    about = "Talk to a trained language agent. With a chat template in its tokenizer what was said so far is kept; otherwise it continues each line."
    parser = argparse.ArgumentParser(prog="markovia chat", description=about)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--temperature", type=float, help="of sampling; 0 takes the likeliest token (default: as trained)")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer (default 256 with a chat template, else as trained)")
    parser.add_argument("--plain", action="store_true", help="continue each line as it stands, also where there is a chat template")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    args = parser.parse_args(argv)
    from rich.console import Console

    from markovia.chat import Conversation, language_agent, talk

    console = Console(highlight=False)
    conversation = Conversation(language_agent(args.run, "chat"), args.max_new_tokens, args.temperature, args.plain, args.seed)
    talk(conversation, lambda: console.input("[bold cyan]> [/]"), lambda piece: console.print(piece, end="", markup=False, soft_wrap=True))
