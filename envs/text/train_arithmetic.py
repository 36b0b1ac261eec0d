"""Make envs/text/weights/arithmetic.safetensors: a tiny Llama taught sums of up to two digits, stopped early so that RL has room.

Run `python -m markovia.envs.text.train_arithmetic` (about a minute on one core); the log goes beside the weights.
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

PROMPT, ANSWER = 6, 4  # longest prompt "99+99=", longest answer "198" and EOS


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


def encode(pairs: list[tuple[int, int]], tokenizer: CharTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """ids (n, 10), attention mask and answer mask: the prompt padded left, the answer with EOS padded right."""
    ids = torch.full((len(pairs), PROMPT + ANSWER), tokenizer.pad_token_id)
    seen, answer = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (a, b) in enumerate(pairs):
        p, r = tokenizer.encode(f"{a}+{b}="), tokenizer.encode(f"{a + b}\n")
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


def train(goal: float = 0.45, seed: int = 0, max_steps: int = 20_000) -> tuple[Any, dict[str, Any]]:
    """Supervised training until the mean success rate on held-out two-digit sums reaches `goal`; gives the model and the log."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = CharTokenizer(ARITHMETIC_ALPHABET)
    config = architecture(tokenizer)
    model = LlamaForCausalLM(LlamaConfig(**config))
    pairs = [(a, b) for a in range(100) for b in range(100)]
    ids, seen, answer = encode([p for p in pairs if not is_held_out(*p)], tokenizer)
    held = encode([p for p in pairs if is_held_out(*p)], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    begin, curve = time.time(), []
    for step in range(1, max_steps + 1):
        index = torch.randint(len(ids), (256,))
        loss = -(answer_logp(model, ids[index], seen[index], answer[index])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            with torch.no_grad():
                success = float(answer_logp(model, *held).exp().mean())
            curve.append({"step": step, "loss": float(loss.detach()), "held_out_success": success})
            if success >= goal:
                break
    log = {"seed": seed, "goal": goal, "batch": 256, "lr": 1e-3, "seconds": round(time.time() - begin, 1), "torch": torch.__version__}
    return model, {**log, "architecture": config, "curve": curve}


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--goal", type=float, default=0.45, help="mean success rate on held-out sums at which training stops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    model, log = train(args.goal, args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, args.folder / "arithmetic.safetensors", metadata={"config": json.dumps(log["architecture"])})
    (args.folder / "arithmetic_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
