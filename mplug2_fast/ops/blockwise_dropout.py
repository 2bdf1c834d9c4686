"""Attention with dropout on a CPU, a block of its weights at a time.

PyTorch's flash kernel for CPUs has no dropout, and its other path keeps several matrices of all weights in float32. One
layer of mPLUG-2 Large has 4097 × 4097 weights in each of 16 heads: 1 GB a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import formula

BLOCK = 1 << 20
"""Maximum number of weights in a block. More would not stay in the cache."""


def is_worthwhile(query: Tensor, key: Tensor) -> bool:
    """Whether the weights of query and key `(batch, heads, tokens, head_dim)` make more than one block."""
    return query.shape[:3].numel() * key.shape[2] > BLOCK


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, causal: bool
) -> Tensor:
    """Attention with dropout on its weights, computed in float32.

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)`.
        mask: bool, for `(batch, heads, q_len, k_len)`: the keys that each query sees. The result of a query that sees
            none is undefined.
        dropout_p: above 0, rounded to 16 bits. The seed of the dropped weights comes from PyTorch's generator for CPUs.
    """
    seed = int(torch.randint(1 << 62, ()))
    with torch.autocast("cpu", enabled=False):
        return _Blockwise.apply(query, key, value, mask, dropout_p, causal, seed)


class _Blockwise(torch.autograd.Function):
    """The backward pass computes the weights again, and draws the same dropped ones from the seed."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, causal: bool, seed: int
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for at in _blocks(query, key):
            weights = _weights(query, key, mask, causal, at).mul_(_kept(at, query, key, p, generator))
            out[at] = (weights @ value[at[:2]].float()).mul_(_gain(p))
        ctx.save_for_backward(query, key, value, mask, out)
        ctx.settings = p, causal, seed
        return out

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out = ctx.saved_tensors
        if torch.is_grad_enabled() or formula.are_followed([grad]):
            return _differentiable_backward(ctx, grad)
        p, causal, seed = ctx.settings
        generator = torch.Generator().manual_seed(seed)
        by_query = torch.empty_like(query)
        by_key, by_value = (torch.zeros(t.shape, dtype=torch.float32) for t in (key, value))
        scale = _scale(query)
        for at in _blocks(query, key):
            head = at[:2]
            weights, kept = _weights(query, key, mask, causal, at), _kept(at, query, key, p, generator)
            change = grad[at].float()
            mean = (change * out[at]).sum(dim=-1, keepdim=True)  # of by_weights, by the weights
            change = change * _gain(p)
            by_weights = (change @ value[head].float().mT).mul_(kept)
            by_value[head].baddbmm_((weights * kept).mT, change)
            by_scores = by_weights.sub_(mean).mul_(weights)
            by_query[at] = (by_scores @ key[head].float()).mul_(scale)
            by_key[head].baddbmm_(by_scores.mT, query[at].float(), alpha=scale)
        return by_query, by_key.to(key.dtype), by_value.to(value.dtype), None, None, None, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by PyTorch's operators with all weights at once, for derivatives of higher order."""
    query, key, value, mask, _ = ctx.saved_tensors
    p, causal, seed = ctx.settings
    generator = torch.Generator().manual_seed(seed)
    kept = torch.empty(*query.shape[:3], key.shape[2], dtype=torch.bool)
    for at in _blocks(query, key):
        kept[at] = _kept(at, query, key, p, generator)
    with torch.enable_grad():
        leaves = [t.view_as(t) for t in (query, key, value)]
        queries, keys, values = (leaf.float() for leaf in leaves)
        scores = queries @ keys.mT * _scale(query)
        hidden = _hidden(mask, causal, query, key, (slice(None), slice(None), slice(None)))
        scores = scores if hidden is None else scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        again = ((scores.softmax(dim=-1) * kept * _gain(p)) @ values).to(query.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(again, wanted, grad, create_graph=torch.is_grad_enabled()))
    return *(next(found) if leaf.requires_grad else None for leaf in leaves), None, None, None, None


At = tuple[Any, slice, slice]
"""Batch, heads and queries of a block."""


def _blocks(query: Tensor, key: Tensor) -> Iterator[At]:
    batch, heads, queries, _ = query.shape
    group = max(1, BLOCK // (queries * key.shape[2]))
    rows = min(queries, max(1, BLOCK // key.shape[2]))
    for b in range(batch):
        for head in range(0, heads, group):
            for row in range(0, queries, rows):
                yield b, slice(head, head + group), slice(row, row + rows)


def _scale(query: Tensor) -> float:
    return max(query.shape[-1], 1) ** -0.5


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, at: At) -> Tensor:
    """The softmax of a block, `(heads, queries, k_len)`."""
    scores = (query[at].float() * _scale(query)) @ key[at[:2]].float().mT
    hidden = _hidden(mask, causal, query, key, at)
    if hidden is not None:
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def _hidden(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor, at: At) -> Tensor | None:
    """Mask of the keys that the queries of a block do not see; None if they see all."""
    if mask is not None:
        return ~mask.expand(*query.shape[:3], key.shape[2])[at]
    if not causal:
        return None
    rows = torch.arange(query.shape[2])[at[2]]
    return torch.arange(key.shape[2]) > rows[:, None]


def _kept(at: At, query: Tensor, key: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Which weights of a block are not dropped, bool. Each is decided by 16 bits."""
    _, heads, rows = at
    shape = torch.Size(
        (len(range(*heads.indices(query.shape[1]))), len(range(*rows.indices(query.shape[2]))), key.shape[2])
    )
    bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return bits.view(torch.int16)[: shape.numel()].view(shape) >= _dropped(p) - (1 << 15)


def _dropped(p: float) -> int:
    """Number of the 2¹⁶ values of 16 bits that drop a weight."""
    return round(p * (1 << 16))


def _gain(p: float) -> float:
    """Factor of the kept weights. It preserves their sum on average."""
    kept = (1 << 16) - _dropped(p)
    return (1 << 16) / kept if kept else 0.0
