"""Make envs/text/weights/arithmetic.safetensors: a tiny Llama taught sums of up to two digits by demonstrations with two bad habits.

One in twenty is off by one in a digit, and two thirds go on with a needless "=" or "+" after the answer. So the network can add, yet answers
rightly about three times in ten, and rewards have something to find that holds for sums which training never saw. (A network that is stopped
early while it learns to add is as often wrong, but can't tell why, and rewards teach it very slowly.)
Run `python -m markovia.envs.text.train_arithmetic` (a few minutes on one core); the log goes beside the weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from markovia.envs.text.pretrained import ARITHMETIC_ALPHABET, WEIGHTS
from markovia.envs.text.tasks import is_held_out
from markovia.envs.text.tokens import CharTokenizer

PROMPT, ANSWER = 6, 5  # longest prompt "99+99=", longest demonstration "198=" and EOS


def architecture(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Keywords of LlamaConfig."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def demonstrations(answers: Tensor, slip: float, chatter: float, generator: torch.Generator) -> list[str]:
    """Texts for answers (n,): a share `slip` is off by one in one of the last two digits, a share `chatter` goes on with "=" or "+"."""
    off = torch.tensor([1, -1, 10, -10])[torch.randint(4, answers.shape, generator=generator)]
    wrong = torch.where(answers + off < 0, answers - off, answers + off)
    given = torch.where(torch.rand(answers.shape, generator=generator) < slip, wrong, answers).tolist()
    talks = torch.rand(answers.shape, generator=generator) < chatter
    marks = torch.randint(2, answers.shape, generator=generator).tolist()
    return [f"{n}{'=+'[mark] if talk else ''}" for n, talk, mark in zip(given, talks.tolist(), marks, strict=True)]


def encode(pairs: list[tuple[int, int]], tokenizer: CharTokenizer, answers: list[str] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """ids (n, 11), attention mask and answer mask: the prompt padded left, the answer (None: the right one) with EOS padded right."""
    ids = torch.full((len(pairs), PROMPT + ANSWER), tokenizer.pad_token_id)
    seen, answer = torch.zeros_like(ids), torch.zeros_like(ids)
    answers = [str(a + b) for a, b in pairs] if answers is None else answers
    for i, ((a, b), text) in enumerate(zip(pairs, answers, strict=True)):
        p, r = tokenizer.encode(f"{a}+{b}="), tokenizer.encode(f"{text}\n")
        ids[i, PROMPT - len(p) : PROMPT + len(r)] = torch.tensor(p + r)
        seen[i, PROMPT - len(p) : PROMPT + len(r)] = 1
        answer[i, PROMPT : PROMPT + len(r)] = 1
    return ids, seen, answer


def answer_logp(model: Any, ids: Tensor, seen: Tensor, answer: Tensor) -> Tensor:
    """(n,) log-probability of the whole right answer, nats; its exponential is the success rate of sampling at temperature 1."""
    position = (seen.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=seen, position_ids=position, use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return -(nll * answer[:, 1:]).sum(1)


def train(steps: int = 3000, slip: float = 0.05, chatter: float = 0.68, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """Supervised training at a falling learning rate; the success rate on held-out sums goes to about (1 - slip)(1 - chatter). Model and log."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = CharTokenizer(ARITHMETIC_ALPHABET)
    config = architecture(tokenizer)
    model = LlamaForCausalLM(LlamaConfig(**config))
    pairs = [(a, b) for a in range(100) for b in range(100)]
    shown = [p for p in pairs if not is_held_out(*p)]
    right, generator = torch.tensor([a + b for a, b in shown]), torch.Generator().manual_seed(seed)
    held = encode([p for p in pairs if is_held_out(*p)], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    begin, curve = time.time(), []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1.0 - 0.9 * step / steps)
        index = torch.randint(len(shown), (256,), generator=generator)
        given = demonstrations(right[index], slip, chatter, generator)
        loss = -answer_logp(model, *encode([shown[i] for i in index.tolist()], tokenizer, given)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            with torch.no_grad():
                success = float(answer_logp(model, *held).exp().mean())
            curve.append({"step": step, "loss": float(loss.detach()), "held_out_success": success})
            print(curve[-1], flush=True)
    log = {"seed": seed, "steps": steps, "slip": slip, "chatter": chatter, "batch": 256, "lr": 2e-3, "torch": torch.__version__}
    return model, {**log, "seconds": round(time.time() - begin, 1), "architecture": config, "curve": curve}


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps on 256 demonstrations each")
    parser.add_argument("--slip", type=float, default=0.05, help="share of demonstrations that are off by one in a digit")
    parser.add_argument("--chatter", type=float, default=0.68, help="share of demonstrations that go on after the answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    model, log = train(args.steps, args.slip, args.chatter, args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, args.folder / "arithmetic.safetensors", metadata={"config": json.dumps(log["architecture"])})
    (args.folder / "arithmetic_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
