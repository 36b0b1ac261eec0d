"""How much memory a preference run will need: the arithmetic of `markovia.algos.on_policy.memory`, with sizes read off the items or the task."""

from __future__ import annotations

from typing import Any

from markovia.agents.language import LanguageAgent
from markovia.agents.memory import activation_bytes, cache_bytes, reference_bytes, score_bytes, tensor_bytes
from markovia.agents.reward_model import RewardModel
from markovia.agents.selective import plain_head
from markovia.algos.on_policy.memory import Memory, in_pieces
from markovia.algos.optimizer import Rule
from markovia.algos.preference.anchors import Extrapolated, FromMixture, FromPolicy, Frozen
from markovia.algos.preference.data import chosen_responses, crosses, halves, select
from markovia.algos.preference.method import Preference
from markovia.algos.preference.reward_model import RewardTraining
from markovia.algos.preference.sources import FileItems, JudgedSamples, OwnSamples


def sizes(method: Preference, source: FileItems | JudgedSamples) -> tuple[int, int, int]:
    """(prompt tokens, response tokens, rows of an item), each the largest that can come."""
    if isinstance(source, FileItems):
        which, extra = select(method.needs, source.kind), int(isinstance(source, OwnSamples))
        items = halves(source.items, method.needs)
        picked = [(item, chosen_responses(item, which, source.kind)) for item in items]
        rows = max(len(pick) for _, pick in picked) * (2 if crosses(method.needs) else 1)
        longest = max(len(item.responses[k]) for item, pick in picked for k in pick)
        return max(len(item.prompt) for item in items), longest, rows + extra * ("gold" not in method.needs)
    sampler = method.sampler
    drawn = 2 if isinstance(sampler, FromMixture) else sampler.per_prompt if isinstance(sampler, FromPolicy) else 1
    rows = {"lists": drawn, "pairs": 2, "single": 1}[source.kind] + ("gold" in method.needs)
    return source.task.prompt_length, source.task.max_new_tokens, rows


def estimate(agent: LanguageAgent, method: Preference, source: FileItems | JudgedSamples) -> Memory:
    """The sizes of a run on the items of a source, or on rounds of samples. A few tokens are passed through the model to find them."""
    prompt, new, rows = sizes(method, source)
    solver, needs = method.solver, set(method.needs)
    minibatch = min(solver.minibatch or method.num_envs, method.num_envs)
    part = rows * (min(solver.micro, minibatch) if solver.micro and not method.coupled else minibatch)
    sharing = rows if agent.options.packed and not crosses(method.needs) else 1  # a pack reads the prompt of an item once
    kept = activation_bytes(agent, -(-prompt // sharing) + new - 1)
    trained = agent.parameters("policy") + (agent.parameters("value") if "value" in needs else [])
    moving = sum(p.numel() * p.element_size() for p in trained)
    return Memory(
        weights=tensor_bytes(agent), reference=_copies(agent, method, source, moving), trainable=sum(p.numel() for p in trained),
        item=trained[0].element_size(), slots=Rule(solver.optimizer).slots, rows=_sampled(method, source, part), part=part, prompt=prompt, new=new,
        vocab=agent.tokenizer.vocab_size, cache=cache_bytes(agent), kept=kept, wide=bool(needs & {"kl_ref", "collision"}),
        packed=agent.options.packed, pieces=in_pieces(agent, part, new), cpu=agent.device.type == "cpu", samples=type(source) is not FileItems,
        bf16=agent.options.bf16, plain=plain_head(agent.output_layer),
    )  # fmt: skip


def estimate_scores(model: RewardModel, method: RewardTraining, source: FileItems) -> Memory:
    """The sizes of a reward model's run: all responses of a part of the minibatch are scored at once, and a score is a vocabulary of one."""
    solver, items = method.solver, source.items
    minibatch = min(solver.minibatch or method.num_envs, method.num_envs)
    part = min(solver.micro or minibatch, minibatch) * max(len(item.responses) for item in items)
    longest = min(model.options.max_length, max(len(item.prompt) + len(r) for item in items for r in item.responses))
    kept = score_bytes(model, longest)
    trained = [p for p in model.net.parameters() if p.requires_grad]
    return Memory(
        weights=tensor_bytes(model), reference=0, trainable=sum(p.numel() for p in trained), item=trained[0].element_size(),
        slots=Rule(solver.optimizer).slots, rows=part, part=part, prompt=longest, new=1, vocab=1, cache=0, kept=kept,
        samples=False, cpu=model.device.type == "cpu", mend="smaller solver.micro, lora or frozen in the agent options, a smaller max_length there",
    )  # fmt: skip


def _copies(agent: LanguageAgent, method: Preference, source: Any, moving: int) -> int:
    """Bytes of the anchor and the target, and of what an extrapolated anchor keeps of the round before."""
    needs, more = set(method.needs), moving * (isinstance(method.reference, Extrapolated) + (method.target is not None))
    items = source.items if isinstance(source, FileItems) else []
    stored = method.stored_reference or (bool(items) and all("ref" in item.logps for item in items))
    if "ref" not in method.anchors and not needs & {"kl_ref", "mismatched"}:
        return more
    if not isinstance(method.reference, Frozen):
        return moving + more
    if stored and not needs & {"kl_ref", "mismatched"}:
        return more
    return more + reference_bytes(agent, fixed=True)


def _sampled(method: Preference, source: Any, part: int) -> int:
    """Rows that are sampled, or else scored, together."""
    if type(source) is FileItems:
        return part
    sampler = method.sampler
    return method.num_envs * (sampler.per_prompt if isinstance(sampler, FromPolicy) else 2 if isinstance(sampler, FromMixture) else 1)
