"""Log-probs of chosen tokens straight from hidden states: the selective log-softmax of an output layer, whose logits exist once.

    logp_i = z_i[y_i] - logsumexp(z_i),   z_i = W h_i / temperature
    q_i = softmax(z_i) - e[y_i]                               kept for the backward pass in the memory of the logits, in their precision
    dh_i = -g_i q_i W / temperature,      dW = -sum_i q_i (g_i h_i)^T / temperature

Through autograd the same pass holds the logits, their log-softmax and the gradients of both, (N, V) each: with V of 50k to 150k these are the
largest tensors of training a language model, and on a CPU mapping their memory anew takes longer than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from markovia.agents.products import linear

PIECE = 2**19  # logits whose float32 softmax exists at once on a CPU: 2 MB, which its caches hold


def plain_head(head: Any) -> bool:
    """Whether an output layer is a product with one dense matrix and nothing else (no bias, no adapters, not cut among processes)."""
    changed = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head) if isinstance(head, nn.Linear) else True
    return not changed and head.bias is None and type(head.weight) in (nn.Parameter, Tensor)


class SelectiveLogp(torch.autograd.Function):
    """hidden (N, d), weight (V, d), token (N,) int64 -> log-probs (N,) float32, nats. Differentiable once, in hidden and weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token: Tensor, temperature: float) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
        keep = any(ctx.needs_input_grad[:2])
        out = torch.empty(len(h), dtype=torch.float32, device=h.device)
        with torch.autocast(kind, enabled=False):
            q = linear(h, w)  # logits here, and softmax - e[y] in their place below
            rows = max(1, PIECE // len(w)) if kind == "cpu" else len(h)
            for z, y, logp in zip(q.split(rows), token[:, None].split(rows), out.split(rows), strict=True):
                lp = torch.log_softmax(z if temperature == 1.0 else z.float() / temperature, -1, dtype=torch.float32)
                logp.copy_(lp.gather(1, y).squeeze(1))
                if keep:
                    p = lp.exp_()
                    z.copy_(p.scatter_add_(1, y, p.new_full(y.shape, -1.0)))
        if keep:
            ctx.save_for_backward(h, w, q)
        ctx.temperature, ctx.dtypes = temperature, (hidden.dtype, weight.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("selective log-probs can be differentiated once (no create_graph=True); ask the agent for its distributions instead")
        h, w, q = ctx.saved_tensors
        g = (grad / -ctx.temperature).unsqueeze(1)
        to_hidden = to_weight = None
        with torch.autocast(h.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                to_hidden = (g * linear(q, w.t())).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                to_weight = linear(q.t(), (g * h).to(h.dtype).t()).to(ctx.dtypes[1])
        return to_hidden, to_weight, None, None


def selective_logp(hidden: Tensor, weight: Tensor, token: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(W h / temperature)[token] in nats for hidden (N, d), W (V, d), token (N,): see the equations of this module."""
    out: Tensor = SelectiveLogp.apply(hidden, weight, token, temperature)
    return out
