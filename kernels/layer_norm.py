"""Layer norm over the last axis, of a tensor or of a sum of two, forward and backward.

A program holds whole rows in registers. Each row is read once and written once; its mean and variance are computed in
float32 in two passes over the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, cdiv, given, multiprocessors, power_of_2
from mplug2_fast.kernels._tuning import Config

Rows = tuple[Tensor, tuple[int, int], tuple[int, int]]
"""A tensor, the sizes of its rows as (outer, inner), and their strides. The channels are contiguous."""


@triton.jit
def _offsets(row, inner, outer_stride, inner_stride):
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _normed(x, mask, channels, eps):
    """(x - mean)·rstd of rows in float32, 0 where the mask is off, and rstd `(rows, 1)`."""
    centred = tl.where(mask, x - tl.sum(x, axis=1, keep_dims=True) / channels, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / channels + eps)
    return centred * rstd, rstd


@triton.jit
def layer_norm_forward(
    x, update, weight, bias, out, total,
    rows, inner, channels, x_outer, x_inner, update_outer, update_inner, scale, eps,
    HAS_UPDATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    there = channel < channels
    mask = (row < rows) & there
    value = tl.load(x + _offsets(row, inner, x_outer, x_inner) + channel, mask, 0.0).to(tl.float32)
    dense = row.to(tl.int64) * channels + channel
    if HAS_UPDATE:
        offsets = _offsets(row, inner, update_outer, update_inner) + channel
        value += scale * tl.load(update + offsets, mask, 0.0).to(tl.float32)
    if HAS_TOTAL:
        tl.store(total + dense, value, mask)
    value, _ = _normed(value, mask, channels, eps)
    if HAS_WEIGHT:
        value *= tl.load(weight + channel, there, 0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + channel, there, 0.0).to(tl.float32)
    tl.store(out + dense, value, mask)


@triton.jit
def layer_norm_backward(
    grad, grad_total, x, update, weight, dx, dupdate, dweight, dbias,
    rows, inner, channels, x_outer, x_inner, update_outer, update_inner, scale, eps,
    HAS_TOTAL: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, WANTS_X: tl.constexpr,
    WANTS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program processes every `programs`-th block of rows and sums its share of dweight and dbias
    `(programs, channels)`. A second stage adds up the shares. The order depends only on the number of programs."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, BLOCK)[None, :]
    there = channel < channels
    gamma = tl.full((1, BLOCK), 1.0, tl.float32)
    if HAS_WEIGHT:
        gamma = tl.load(weight + channel, there, 0.0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & there
        value = tl.load(x + _offsets(row, inner, x_outer, x_inner) + channel, mask, 0.0).to(tl.float32)
        if HAS_UPDATE:
            offsets = _offsets(row, inner, update_outer, update_inner) + channel
            value += scale * tl.load(update + offsets, mask, 0.0).to(tl.float32)
        normed, rstd = _normed(value, mask, channels, eps)
        dense = row.to(tl.int64) * channels + channel
        dy = tl.load(grad + dense, mask, 0.0).to(tl.float32)
        weight_sum += dy * normed
        bias_sum += dy
        if WANTS_X or WANTS_UPDATE:
            dy *= gamma
            along = tl.sum(dy * normed, axis=1, keep_dims=True) / channels
            result = (dy - tl.sum(dy, axis=1, keep_dims=True) / channels - normed * along) * rstd
            if HAS_TOTAL:
                result += tl.load(grad_total + dense, mask, 0.0).to(tl.float32)
            if WANTS_X:
                tl.store(dx + dense, result, mask)
            if WANTS_UPDATE:
                tl.store(dupdate + dense, result * scale, mask)
    partial = program * channels + channel
    tl.store(dweight + partial, tl.sum(weight_sum, axis=0, keep_dims=True), there)
    tl.store(dbias + partial, tl.sum(bias_sum, axis=0, keep_dims=True), there)


def _configs(constants, capability) -> list[Config]:
    """Rows per program such that a thread holds about 16 to 32 values."""
    block = constants["BLOCK"]
    warps = [w for w in (1, 2, 4, 8, 16) if 8 <= block // (32 * w) <= 64] or [16 if block > 1024 else 1]
    few = [Config({"ROWS": 1}, num_warps=w) for w in warps[:3]]
    several = [Config({"ROWS": rows}, num_warps=4) for rows in (2, 4) if 512 <= block * rows <= 4096]
    return [*few, *several]


_forward = Kernel(layer_norm_forward, _configs, Config({"ROWS": 16}))
_backward = Kernel(layer_norm_backward, _configs, Config({"ROWS": 16}))


def forward(
    x: Rows,
    update: Rows | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    scale: float = 1.0,
    total: Tensor | None = None,
) -> None:
    """Writes the layer norm of x + scale·update to `out` and the sum to `total`, contiguous, of any floating dtype."""
    tensor, sizes, strides = x
    rows, channels = sizes[0] * sizes[1], tensor.shape[-1]
    other, _, other_strides = (tensor, sizes, (0, 0)) if update is None else update
    _forward(
        lambda meta: (cdiv(rows, meta["ROWS"]),),
        tensor, other, given(weight, tensor), given(bias, tensor), out, given(total, out),
        rows, sizes[1], channels, *strides, *other_strides, scale, eps,
        key=(power_of_2(rows), channels),
        HAS_UPDATE=update is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_TOTAL=total is not None,
        BLOCK=power_of_2(channels, 16),
    )  # fmt: skip


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Rows,
    update: Rows | None,
    weight: Tensor | None,
    eps: float,
    dx: Tensor | None,
    dupdate: Tensor | None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward`, from contiguous gradients of out and total.

    Writes to dx and dupdate, if given. Returns the gradients of weight and bias, `(channels,)` in float32.
    """
    tensor, sizes, strides = x
    rows, channels = sizes[0] * sizes[1], tensor.shape[-1]
    other, _, other_strides = (tensor, sizes, (0, 0)) if update is None else update
    programs = min(rows, 4 * multiprocessors(tensor.device))
    dweight, dbias = grad.new_empty((2, programs, channels), dtype=torch.float32).unbind()
    _backward(
        lambda meta: (programs,),
        grad, given(grad_total, grad), tensor, other, given(weight, tensor), given(dx, grad), given(dupdate, grad),
        dweight, dbias, rows, sizes[1], channels, *strides, *other_strides, scale, eps,
        key=(power_of_2(rows), channels),
        HAS_TOTAL=grad_total is not None,
        HAS_UPDATE=update is not None,
        HAS_WEIGHT=weight is not None,
        WANTS_X=dx is not None,
        WANTS_UPDATE=dupdate is not None,
        BLOCK=power_of_2(channels, 16),
    )  # fmt: skip
    return dweight.sum(dim=0), dbias.sum(dim=0)
