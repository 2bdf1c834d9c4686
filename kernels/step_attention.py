"""Attention of one new token per sequence to itself and to the tokens before it, which may belong to other sequences.

A program processes one head of a sequence. It stores the new key and value, and reads the earlier ones, about twenty of
each, from the rows in the table of ancestors. A program that starts early reads them while the new ones are still being
computed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, power_of_2
from mplug2_fast.kernels._tuning import Config


@triton.jit
def step_attention_forward(
    query, key, value, keys, values, ancestors, out, step, heads,
    query_row, query_head, query_channel, key_row, key_head, key_channel, value_row, value_head, value_channel,
    keys_row, keys_head, keys_step, keys_channel, values_row, values_head, values_step, values_channel,
    ancestor_row, ancestor_step, scale,
    HEAD_DIM: tl.constexpr, EARLY: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    position, channel = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    there = channel < HEAD_DIM
    before = (position < step)[:, None] & there[None, :]
    origin = tl.load(ancestors + row * ancestor_row + position * ancestor_step, position < step, 0).to(tl.int64)
    keys += head * keys_head + channel * keys_channel
    values += head * values_head + channel * values_channel
    k = tl.load(keys[None, :] + (origin * keys_row + position * keys_step)[:, None], before, 0.0).to(tl.float32)
    v = tl.load(values[None, :] + (origin * values_row + position * values_step)[:, None], before, 0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    q = tl.load(query + row * query_row + head * query_head + channel * query_channel, there, 0.0).to(tl.float32)
    new_key = tl.load(key + row * key_row + head * key_head + channel * key_channel, there, 0.0)
    new_value = tl.load(value + row * value_row + head * value_head + channel * value_channel, there, 0.0)
    tl.store(keys + (row * keys_row + step * keys_step), new_key, there)
    tl.store(values + (row * values_row + step * values_step), new_value, there)
    tl.store(ancestors + row * ancestor_row + step * ancestor_step, row.to(tl.int32), head == 0)
    new = (position == step)[:, None]
    k = tl.where(new, new_key.to(tl.float32)[None, :], k)
    v = tl.where(new, new_value.to(tl.float32)[None, :], v)
    scores = tl.where(position <= step, tl.sum(k * q[None, :], axis=1) * scale, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0))
    result = tl.sum(v * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + (row * heads + head) * HEAD_DIM + channel, result, there)


_kernel = Kernel(
    step_attention_forward,
    lambda constants, _: [Config(num_warps=1 if constants["BLOCK"] * constants["BLOCK_D"] <= 2048 else 4)],
    Config(),
    early=True,
)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    step: int,
    out: Tensor,
) -> None:
    """Stores key and value at position `step` of keys and values, and their row in ancestors. Writes the attention to
    `out`.

    Args:
        query, key, value: `(rows, heads, head_dim)`. keys, values: `(rows, heads, length, head_dim)`.
        ancestors: `(rows, length)` int32. out: `(rows, heads·head_dim)`, contiguous.
    """
    rows, heads, head_dim = query.shape
    _kernel(
        lambda meta: (rows * heads,),
        query, key, value, keys, values, ancestors, out, step, heads,
        *query.stride(), *key.stride(), *value.stride(), *keys.stride(), *values.stride(), *ancestors.stride(),
        head_dim**-0.5,
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_2(head_dim),
        BLOCK=power_of_2(keys.shape[2]),
    )  # fmt: skip
