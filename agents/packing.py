"""Packed evaluation: a prompt once with all its responses behind it in one row, no padding, the output layer only where a response is predicted.

    row        | prompt x, p tokens | y1 without its last token | y2 without its last token | next prompt ...
    position   | 0 ... p - 1        | p, p + 1, ...             | p, p + 1, ...             | 0 ...
    attention  a token sees its own prompt and what stands before it in its own response: a block mask, one block per prompt

Whether a model computes this rightly is not read off its class but tried out, once: `unfit`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# Tokens of one row. Longer rows cost more attention to masked blocks, shorter ones make smaller matrix products.
PACK_TOKENS = 1024
SHORT = 256  # tokens of a block whose attention weights are small enough to be kept for the backward pass
LONG = 1024  # tokens from which a block's weights are too many to exist at all
TOLERANCE = 1e-3  # of the probe, relative to the spread of the log-probs; a wrong mask or position is off by about 1


@dataclass(frozen=True)
class Pack:
    """One row of L tokens whose N positions `at` predict the tokens at (row, column) of the record."""

    ids: Tensor  # (1, L) int64
    position: Tensor  # (1, L) int64
    allowed: Tensor  # (L, L) bool: query sees key
    at: Tensor  # (N,) places in the row
    row: Tensor  # (N,) int64
    column: Tensor  # (N,) int64
    sizes: tuple[int, ...]  # tokens of each prompt with its responses; they sum to L

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The additive mask (1, 1, L, L): 0 where allowed. A boolean one is silently misread by some attention implementations."""
        zero, least = torch.zeros((), dtype=dtype), torch.tensor(torch.finfo(dtype).min, dtype=dtype)
        return torch.where(self.allowed, zero.to(self.allowed.device), least.to(self.allowed.device))[None, None]


def make_packs(prompt: Tensor, prompt_mask: Tensor, action: Tensor, valid: Tensor, limit: int = PACK_TOKENS) -> list[Pack]:
    """Packs of at most `limit` tokens, or of one prompt with its responses where that is longer.

    prompt, prompt_mask (B, P), action, valid (B, T); rows in succession with the same prompt share it. Rows without a token are left out.
    """
    prompts = [ids[mask].tolist() for ids, mask in zip(prompt, prompt_mask, strict=True)]
    groups: list[list[int]] = []
    for i in range(len(prompts)):
        if i and prompts[i] == prompts[i - 1]:
            groups[-1].append(i)
        else:
            groups.append([i])
    responses, columns = [a[v].tolist() for a, v in zip(action, valid, strict=True)], [v.nonzero().squeeze(1).tolist() for v in valid]
    sizes = [len(prompts[g[0]]) + sum(max(len(responses[i]) - 1, 0) for i in g) for g in groups]
    bins: list[list[list[int]]] = []
    room = 0
    for group, size in zip(groups, sizes, strict=True):
        if size > room:
            bins.append([])
            room = limit
        bins[-1].append(group)
        room -= size
    packs = [_pack(groups, prompts, responses, columns, prompt.device) for groups in bins]
    return [p for p in packs if len(p.at)]


def _pack(
    groups: Sequence[Sequence[int]], prompts: Sequence[list[int]], responses: Sequence[list[int]], columns: Sequence[list[int]], device: torch.device
) -> Pack:
    ids: list[int] = []
    sizes: list[int] = []
    position: list[int] = []
    owner: list[int] = []  # which group a token belongs to
    part: list[int] = []  # which row, -1 for a prompt
    at: list[int] = []
    row: list[int] = []
    column: list[int] = []
    for number, group in enumerate(groups):
        x = prompts[group[0]]
        end = len(ids) + len(x) - 1
        ids, position, owner, part = ids + x, position + list(range(len(x))), owner + [number] * len(x), part + [-1] * len(x)
        for i in group:
            y = responses[i]
            if not y:
                continue
            # The first token is predicted at the prompt's end, each other one at the token before it.
            at += [end, *range(len(ids), len(ids) + len(y) - 1)]
            row, column = row + [i] * len(y), column + columns[i]
            ids, position = ids + y[:-1], position + list(range(len(x), len(x) + len(y) - 1))
            owner, part = owner + [number] * (len(y) - 1), part + [i] * (len(y) - 1)
        sizes.append(len(ids) - sum(sizes))
    group_of, part_of = torch.tensor(owner, device=device), torch.tensor(part, device=device)
    same = (group_of[:, None] == group_of) & ((part_of == -1) | (part_of[:, None] == part_of))
    index = [torch.tensor(x, dtype=torch.int64, device=device) for x in (ids, position, at, row, column)]
    return Pack(index[0][None], index[1][None], same.tril(), index[2], index[3], index[4], tuple(sizes))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None, **more: Any) -> Tensor:
    """Softmax attention (..., L, d) of one block. Under bfloat16 autocast by plain products, the fused kernel being slow there: the weights of a
    short block are kept for the backward pass, those of a longer one made again; a block too long to hold them is computed in float32."""
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if not bf16 or any(more.values()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, **more)
    if query.shape[-2] > LONG:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask.float(), scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    again = query.shape[-2] > SHORT and torch.is_grad_enabled()
    out: Tensor = checkpoint(_products, query, key, value, mask, scale, use_reentrant=False) if again else _products(query, key, value, mask, scale)
    return out


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.softmax((query * scale) @ key.transpose(-1, -2) + mask, dim=-1) @ value  # softmax in float32, products in bfloat16


class ByPrompt(TorchFunctionMode):
    """Attention over a pack, block by block: no token sees another prompt's, so most of the L x L products would be masked. The same numbers."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes, self.length = sizes, sum(sizes)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        call = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        mask = call.get("attn_mask")
        if func is not F.scaled_dot_product_attention or len(args) > 4 or mask is None or mask.shape[-2:] != (self.length, self.length):
            return func(*args, **(kwargs or {}))
        q, k, v = (call.pop(name).split(self.sizes, dim=-2) for name in ("query", "key", "value"))
        masks = [rows.split(self.sizes, dim=-1)[i] for i, rows in enumerate(mask.split(self.sizes, dim=-2))]
        del call["attn_mask"]
        return torch.cat([attend(*part, **call) for part in zip(q, k, v, masks, strict=True)], dim=-2)


def hidden_states(lm: Any, pack: Pack) -> Tensor:
    """(N, d) what enters the output layer at `pack.at`. The layer itself is not computed, since logits are made in chunks later."""
    caught: list[Tensor] = []

    def catch(hidden: Tensor) -> Tensor:
        caught.append(hidden)
        return hidden[..., :0]

    head = lm.get_output_embeddings()
    before = vars(head).get("forward")  # accelerate puts one there
    head.forward = catch
    try:
        # On an accelerator many small products take longer than one large one.
        blocks = ByPrompt(pack.sizes) if pack.ids.device.type == "cpu" else contextlib.nullcontext()
        dtype = next(lm.parameters()).dtype
        with blocks:
            lm(input_ids=pack.ids, attention_mask=pack.bias(dtype), position_ids=pack.position, use_cache=False, logits_to_keep=pack.at)
    finally:
        del head.forward
        if before is not None:
            head.forward = before
    return caught[0][0]


def probe(vocab: int, device: torch.device) -> dict[str, Tensor]:
    """Two prompts with two responses each, in the columns of a record: what packing is tried out on."""
    tokens = (torch.arange(64, device=device) * 7 + 3) % vocab
    prompt = torch.stack([tokens[:5], tokens[:5], tokens[5:10], tokens[5:10]])
    mask = torch.ones_like(prompt, dtype=torch.bool)
    mask[2:, :2] = False
    valid = torch.arange(6, device=device) < torch.tensor([6, 3, 2, 5], device=device)[:, None]
    return {"prompt": prompt, "mask": mask, "action": tokens[20:44].view(4, 6), "valid": valid}


def unfit(lm: Any, packed: Callable[[], Tensor], padded: Callable[[], Tensor]) -> str | None:
    """Why this model can't be evaluated packed, None when it can: both ways give the same log-probs of the probe, to a thousandth of their spread."""
    config = lm.config
    local = {"sliding_attention", "chunked_attention"} & set(getattr(config, "layer_types", None) or ())
    if local or getattr(config, "sliding_window", None) is not None:
        return "its attention is restricted to a window"
    try:
        found, wanted = packed(), padded()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError) as error:
        return f"it does not take a block mask and positions ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    off = float((found - wanted).abs().max() / wanted[wanted != 0.0].std())
    return None if off < TOLERANCE else f"its packed log-probs are off by {off:.2g} of their spread"
