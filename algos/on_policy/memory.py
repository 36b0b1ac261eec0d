"""How much memory a run of a language agent will need, told before it starts: bytes of what lasts, and of the phase that needs most.

    lasting   weights + reference + gradients + the optimiser's averages + distributions in the record
    sampling  key-value cache of all rows, and one step's logits, probabilities and sums
    scoring   log-probs without gradient, in chunks
    update    what one backward pass keeps, and its logits
    step      the optimiser's temporaries
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol

import torch

from markovia.agents.checkpointing import layers_of
from markovia.agents.language import CHUNK_LOGITS, MOST_LOGITS, LanguageAgent
from markovia.agents.memory import Kept, activation_bytes, cache_bytes, reference_bytes, tensor_bytes
from markovia.agents.selective import plain_head
from markovia.algos.on_policy.divergence import KL
from markovia.algos.on_policy.method import Descent, OnPolicy
from markovia.algos.on_policy.references import Fixed
from markovia.algos.optimizer import LONG, PIECE, Rule
from markovia.envs import machine

GB = 1e9
SAMPLED = 4 + 4 + 4 + 8 + 8  # bytes per logit of a sampling step: logits of prompts and of rows, probabilities, these in float64 and their sums
COPIES = 4  # of the logits in an update: they, their log-softmax, and the gradients of both
SELECTIVE = 1  # where log-probs come straight from hidden states (`markovia.agents.selective`)


@dataclass(frozen=True)
class Memory:
    """The sizes that the arithmetic needs; every property is in bytes."""

    weights: int  # bytes of the agent, already there
    reference: int  # bytes of a frozen copy
    trainable: int  # numbers that are trained
    item: int  # bytes of such a number
    slots: int  # averages that the optimiser keeps of each
    rows: int  # responses that are sampled together
    part: int  # responses of one backward pass
    prompt: int  # tokens of the longest prompt
    new: int  # tokens of the longest response
    vocab: int
    cache: int  # bytes of the key-value cache per token and row
    kept: Kept  # by a backward pass
    distributions: int = 0  # whole distributions that the record holds for each decision
    wide: bool = False  # whether the loss reads entropies or distributions, not log-probs alone
    packed: bool = False
    pieces: bool = False  # whether logits beyond a limit are made in pieces though nothing is packed
    samples: bool = True  # whether responses are sampled, not read from a file
    cpu: bool = True
    bf16: bool = False  # whether autocast holds the trained weights once more while it samples, in two bytes each
    chunk: int = CHUNK_LOGITS  # logits held at once without gradient, and packed
    plain: bool = False  # whether the output layer is one matrix, from which log-probs come without the logits' gradients where they are packed
    copies: int = 0  # bytes of further copies of what is trained
    mend: str = "smaller solver.micro, gradient_checkpointing or packed in the agent options, LoRA in place of all weights, fewer num_envs"

    @property
    def gradients(self) -> int:
        return self.trainable * self.item

    @property
    def averages(self) -> int:
        return self.slots * self.trainable * self.item

    @property
    def record(self) -> int:
        return 4 * self.distributions * self.rows * self.new * self.vocab

    @property
    def sampling(self) -> int:
        held = 2 * self.trainable * self.bf16
        return held + self.rows * ((self.prompt + self.new) * self.cache + SAMPLED * self.vocab) if self.samples else 0

    @property
    def scoring(self) -> int:
        """Logits and log-softmax of as many whole rows as fit into a chunk, one at least, or a piece of one."""
        row = self.new * self.vocab
        if (self.packed or self.pieces) and row > self.chunk:
            return 2 * 4 * max(self.chunk, self.vocab)
        return 2 * 4 * row * min(self.rows, max(1, self.chunk // row))

    @property
    def update(self) -> int:
        logits = self.part * self.new * self.vocab
        packed = self.packed or (self.pieces and logits > MOST_LOGITS and not self.wide)
        if packed:
            logits = min(logits, max(self.chunk, self.vocab))
        copies = SELECTIVE if packed and self.plain and not self.wide else COPIES + 3 * self.wide
        return self.part * self.kept.row + self.kept.once + max(self.part * self.kept.inside, 4 * copies * logits)

    @property
    def step(self) -> int:
        """The clipped gradient, and three vectors of Adam's division; on a CPU of a long vector only a piece at a time."""
        at_once = PIECE if self.cpu and self.trainable > LONG else self.trainable
        return (4 if self.slots else 2) * at_once * self.item

    @property
    def lasting(self) -> int:
        return self.weights + self.reference + self.gradients + self.averages + self.copies + self.record

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return self.lasting + max(self.sampling, self.scoring, self.update, self.step)

    def __str__(self) -> str:
        lasting = [("weights", self.weights), ("reference", self.reference), ("gradients", self.gradients), ("optimiser", self.averages)]
        lasting += [("copies", self.copies), ("distributions", self.record)]
        phases = [("sampling", self.sampling), ("scoring", self.scoring), ("update", self.update), ("step", self.step)]
        told = [", ".join(f"{name} {size / GB:.3g}" for name, size in parts if size) for parts in (lasting, phases)]
        return f"about {self.total / GB:.3g} GB: {told[0]}; then the largest of {told[1]}"


def estimate(agent: LanguageAgent, method: OnPolicy, prompt: int, new: int, processes: int = 1, shard: bool = False) -> Memory:
    """The sizes of a run with prompts and responses of at most so many tokens, for each of the processes that share its rows.

    With `shard` a process holds its part of the model, and the layer that it computes.

    A few tokens are passed through the model to find them.
    """
    solver, descents = method.solver, [s for s in (method.solver, method.value.separate) if isinstance(s, Descent)]
    trained = agent.parameters("policy") + (agent.parameters("value") if agent.critic is not None else [])
    share = [-(-min(s.minibatch or method.num_envs, method.num_envs) // processes) for s in descents]
    part = max(min(s.micro or n, n) for s, n in zip(descents, share, strict=True))
    # A minibatch that is the whole batch keeps the responses to a prompt together, so that a pack reads it once for all of them.
    sharing = method.group_size if agent.options.packed and isinstance(solver, Descent) and solver.minibatch is None else 1
    weights, kept = tensor_bytes(agent), activation_bytes(agent, -(-prompt // sharing) + new - 1)
    layer = weights // len(layers_of(agent.net["policy"])) if shard else 0
    cut = processes if shard else 1
    exact = isinstance(method.divergence, KL) and method.divergence.estimator == "exact"
    return Memory(
        weights=weights // cut + layer, reference=reference_bytes(agent, isinstance(method.refresh, Fixed)) if "ref" in method.references else 0,
        trainable=sum(p.numel() for p in trained) // cut, item=trained[0].element_size(),
        slots=Rule(solver.optimizer).slots if isinstance(solver, Descent) else 0,
        rows=-(-method.num_envs // processes), part=part, prompt=prompt, new=new, vocab=agent.tokenizer.vocab_size,
        cache=cache_bytes(agent), kept=kept,
        distributions=(method.surrogate.needs_kl != "none") + exact,
        wide=method.surrogate.needs_kl != "none" or exact or bool(method.entropy_coef) or method.anchor is not None or method.tokens is not None,
        packed=agent.options.packed, pieces=in_pieces(agent, part, new), cpu=agent.device.type == "cpu", bf16=agent.options.bf16,
        plain=plain_head(agent.output_layer),
        # The start of a round whose runs are merged, and their ends.
        copies=0 if method.merge is None else (1 + method.merge.runs) * sum(p.numel() * p.element_size() for p in agent.parameters("policy")) // cut,
    )  # fmt: skip


def in_pieces(agent: LanguageAgent, part: int, new: int) -> bool:
    """Whether a pass over `part` responses of `new` tokens has so many logits that the agent makes them in pieces, and can."""
    row = new * agent.tokenizer.vocab_size
    return (part * row > MOST_LOGITS or row > CHUNK_LOGITS) and agent.packable()


def available(device: torch.device) -> tuple[float, float]:
    """(free, all) bytes where the agent lives, within the limits of a container; infinite where nobody knows."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return float(free), float(total)
    return machine.memory()


class Sizes(Protocol):
    """What `check` reads of an estimate, which says what it needs as a text."""

    @property
    def weights(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def mend(self) -> str: ...


def check(memory: Sizes, free: float, total: float, anyway: bool = False) -> None:
    """Warn when the run may need more than is free; raise ValueError when it needs more than the machine has, unless it is to go on `anyway`. The
    weights are already there.

    Allocators hold back what was freed: of SmolLM2 on a CPU the process grew by up to a fifth and 0.4 GB more than the tensors, so that is added.
    """
    more = memory.total - memory.weights
    if 1.2 * more + 0.4 * GB <= free:
        return
    text = f"this run needs {memory}. Beyond the weights that is {more / GB:.3g} GB and what the allocator holds back, "
    text += f"but {free / GB:.3g} GB are free of {total / GB:.3g}; try {memory.mend}"
    if memory.total > total and not anyway:
        raise ValueError(f"{text}; --over-memory begins it all the same")
    warnings.warn(text, stacklevel=2)
