"""PyTorch's scaled dot product attention, with derivatives of every order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from mplug2_fast.ops.blockwise_dropout import attend_in_blocks, is_worthwhile
from mplug2_fast.ops.runtime import formula

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool], Tensor]
"""Takes query, key and value `(batch, heads, tokens, head_dim)`, a bool mask of the keys that each query sees, the
dropout probability, and whether attention is causal."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, causal: bool) -> Tensor:
    """`F.scaled_dot_product_attention` with all derivatives; its own flash kernel for CPUs has only the first.

    With dropout on a CPU, long sequences are computed in blocks.
    """
    if dropout_p and is_worthwhile(query, key) and _is_plain_on_cpu(query, key, value):
        return attend_in_blocks(query, key, value, mask, dropout_p, causal)
    if query.numel() and _trains_on_cpu(query, key, value):  # the flash kernel divides by the number of heads
        additive = None if mask is None else _additive(mask, query.dtype)
        chosen = torch._fused_sdp_choice(query, key, value, additive, dropout_p, causal)
        if chosen == SDPBackend.FLASH_ATTENTION.value:
            return _Flash.apply(query, key, value, additive, causal)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=causal)


def attend_any_order(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, causal: bool
) -> Tensor:
    """Products and a softmax."""
    additive = None if mask is None else _additive(mask, query.dtype)
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, additive, dropout_p, causal)[0]


class _Flash(torch.autograd.Function):
    """The flash kernel for CPUs. Gradients that will be differentiated again are computed by products and a softmax."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        out, logsum = _flash(query, key, value, 0.0, causal, attn_mask=mask)
        ctx.save_for_backward(query, key, value, mask, out, logsum)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, logsum = ctx.saved_tensors
        if not (torch.is_grad_enabled() or formula.are_followed([grad])):
            return *_flash_backward(grad, query, key, value, out, logsum, 0.0, ctx.causal, attn_mask=mask), None, None
        with torch.enable_grad():
            leaves = [t.view_as(t) for t in (query, key, value)]
            again = torch.ops.aten._scaled_dot_product_attention_math(*leaves, mask, 0.0, ctx.causal)[0]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(again, wanted, grad, create_graph=torch.is_grad_enabled()))
        return *(next(found) if leaf.requires_grad else None for leaf in leaves), None, None


def _trains_on_cpu(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and _is_plain_on_cpu(*tensors)


def _is_plain_on_cpu(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or not tensors[0].is_cpu:
        return False
    return not formula.is_needed(tensors) and not formula.is_watched(tensors)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a summand of the scores: 0, or minus infinity for keys that a query does not see."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
