"""What a language agent or a reward model needs of memory, found by looking at it: a small forward pass tells what a long one will keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from markovia.agents.checkpointing import layers_of
from markovia.agents.pretrained import matrices, plain_model
from markovia.agents.records import Rollout

if TYPE_CHECKING:
    from markovia.agents.language import LanguageAgent
    from markovia.agents.reward_model import RewardModel

PROBES = (8, 16, 24)  # tokens per row of the passes that are looked at; masks are padded to multiples of 8
PASSING = 1 / 3  # gradients that pass through a layer beside what it keeps: of a gated block's three tensors, about a third of all


def tensor_bytes(agent: LanguageAgent | RewardModel) -> int:
    """Bytes of all weights and buffers, tied ones once."""
    storages = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in (*agent.net.parameters(), *agent.net.buffers())}
    return sum(storages.values())


def reference_bytes(agent: LanguageAgent, fixed: bool) -> int:
    """Bytes of `agent.reference(fixed)`: a copy, its matrices in bfloat16 where it is compact, and nothing where adapters are switched off."""
    if agent.options.lora is not None:
        return 0
    halved = matrices(agent.net["policy"]) if fixed and agent.options.bf16 else []
    return tensor_bytes(agent) - sum(p.numel() * (p.element_size() - 2) for p in halved)


def cache_bytes(agent: LanguageAgent) -> int:
    """Bytes of the key-value cache per token of a row: 2 layers x key-value heads x head size numbers, found by reading two tokens."""
    with torch.no_grad():
        ids = torch.zeros((1, 2), dtype=torch.long, device=agent.device)
        cache = agent.forward(input_ids=ids, use_cache=True).past_key_values
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)) // 2


class Kept(NamedTuple):
    """Bytes that a pass keeps for the backward pass, logits apart."""

    row: int  # of each row
    once: int = 0  # however many rows there are
    inside: int = 0  # of each row too, in the layer that is computed again; the logits are gone by then


def activation_bytes(agent: LanguageAgent, length: int) -> Kept:
    """What a pass over rows of `length` tokens keeps.

    kept(n) = rows (a n + b n^2) + c through passes of a few tokens: b are masks, and attention that keeps its weights, c are copies of weights under
    autocast. With gradient checkpointing a row keeps each layer's input, and one layer is computed again at a time.
    """
    plain = copy.copy(agent)
    plain.options = replace(agent.options, gradient_checkpointing=False)
    row, once = _rows([(n, _kept(plain, n)) for n in PROBES], length)
    if not agent.options.gradient_checkpointing:
        return Kept(round(row), round(once))
    layers, width = len(layers_of(agent.net["policy"])), plain_model(agent.net["policy"]).get_output_embeddings().in_features
    inputs = layers * length * width * next(agent.net["policy"].parameters()).element_size()
    return Kept(inputs, round(once / layers), round((1 + PASSING) * row / layers))


def score_bytes(model: RewardModel, length: int) -> Kept:
    """The same of a text of `length` tokens that a reward model scores.

    A frozen body keeps nothing, but what is inside a layer is there while it is computed: at most what the layer would keep if it were trained.
    """
    plain, body = copy.copy(model), model.net["body"]
    plain.options = replace(model.options, max_length=max(PROBES))
    trained = {name: p.requires_grad for name, p in body.named_parameters()}
    try:
        if model.options.frozen:
            body.requires_grad_(True)
        row, once = _rows([(n, _saved(model.net, partial(plain.scores, [[0] * n, [0] * (n - 1)]))) for n in PROBES], length)
    finally:
        for name, p in body.named_parameters():
            p.requires_grad_(trained[name])
    layers = len(layers_of(plain_model(body))) if model.options.frozen else 1
    return Kept(round(row / layers), round(once / layers))


def _rows(points: list[tuple[int, float]], length: int) -> tuple[float, float]:
    """(bytes of each row of `length` tokens, bytes however many there are) of passes over two rows, (tokens, bytes) each."""
    once = max(0.0, _through(points, 0))
    return (_through(points, length) - once) / 2, once


def _through(points: list[tuple[int, float]], x: int) -> float:
    """Lagrange's polynomial through the points, at x."""
    total = 0.0
    for i, (xi, yi) in enumerate(points):
        term = yi
        for j, (xj, _) in enumerate(points):
            if j != i:
                term *= (x - xj) / (xi - xj)
        total += term
    return total


def _kept(agent: LanguageAgent, length: int) -> float:
    """Bytes that a pass over two rows keeps, one of them padded so that there is a mask; weights and logits are not counted."""
    prompt, new = length // 2, length - length // 2 + 1
    valid = torch.ones((2, new), dtype=torch.bool, device=agent.device)
    zero = torch.zeros((2, new), device=agent.device)
    seen = torch.ones((2, prompt), dtype=torch.bool, device=agent.device)
    seen[1, 0] = False
    ids = torch.zeros((2, max(prompt, new)), dtype=torch.long, device=agent.device)
    record = Rollout(
        obs={"prompt_ids": ids[:, :prompt], "prompt_mask": seen}, action=ids[:, :new], logp_old=zero, reward=zero, valid=valid, mask=valid,
        continuation=zero, truncated=~valid, per_row=True,
    )  # fmt: skip
    widths = {agent.tokenizer.vocab_size, plain_model(agent.net["policy"]).get_output_embeddings().out_features}
    return _saved(agent.net, lambda: agent.evaluate_padded(record, {"logp"}), widths)


def _saved(net: nn.Module, run: Callable[[], object], widths: Iterable[int] = ()) -> float:
    """Bytes that a pass keeps for the backward pass, weights and tensors of one of these widths (logits) apart."""
    skip, logits = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}, set(widths)
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in skip and not (x.ndim and x.shape[-1] in logits):
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return float(sum(x.untyped_storage().nbytes() for x in kept.values()))
