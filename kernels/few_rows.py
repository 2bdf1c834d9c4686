"""residual + activation(weight·norm(x) + bias) for few rows, where reading the weight takes most of the time.

A program computes a few outputs. It first loads all of their weights: with two or three programs per multiprocessor,
about 64 KiB are in flight. While they arrive, it reads all rows from the L2 cache and normalises them. A program that
starts early loads its weights while the previous kernel still runs, so that a chain of such products, of two
microseconds each, reads weights without a break.

Weights are the rows of the product: 16 or 32 of them with 8 rows of x as columns. Each warp multiplies its own part of
the inputs. The product has three axes, of which the first is summed at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, cdiv, given, multiprocessors, power_of_2
from mplug2_fast.kernels._product import activate, precision_of
from mplug2_fast.kernels._tuning import Config
from mplug2_fast.kernels.layer_norm import Rows, _offsets

MAX_ROWS = 32
"""With more, reading the rows in every program takes longer than reading the weight."""
MAX_INPUTS = 4096
"""Inputs of sixteen outputs whose weights a program can hold."""
_ROWS = 8
"""Rows per step: one tensor-core instruction multiplies them with 16 weights."""
_MANY_OUTPUTS = 8192
_PART = 256
"""Most inputs per warp and step without a norm; a norm needs whole rows."""


@triton.jit
def few_rows_forward(
    x, norm_weight, norm_bias, weight, bias, residual, out, normed,
    rows, x_inner, x_outer, x_row, weight_row, residual_inner, residual_outer, residual_row, eps,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """With a norm, PARTS·PART covers all inputs, and program i writes the rows i, i + programs, ... of `normed`."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (INPUTS + PARTS * PART - 1) // (PARTS * PART)
    program = tl.program_id(0)
    column = program * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    # Past the last column, the first one is read and its result not stored.
    weight_rows = weight + tl.where(column < OUTPUTS, column, 0).to(tl.int64)[None, :, None] * weight_row
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        place = chunk * (PARTS * PART) + step
        if INPUTS % (PARTS * PART) == 0:
            block = tl.load(weight_rows + place, eviction_policy="evict_first")
        else:
            block = tl.load(weight_rows + place, place < INPUTS, 0.0, eviction_policy="evict_first")
        weights = weights + (block,)  # noqa: RUF005, which Triton does not compile
    if HAS_BIAS:
        added = tl.load(bias + column, column < OUTPUTS, 0.0).to(tl.float32)[:, None]
    if HAS_NORM:
        gamma = tl.load(norm_weight + step, step < INPUTS, 0.0).to(tl.float32)
        beta = tl.load(norm_bias + step, step < INPUTS, 0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for first in range(0, TILES * ROWS, ROWS):
        row = first + tl.arange(0, ROWS)
        x_rows = x + _offsets(row, x_inner, x_outer, x_row)[None, :, None]
        mask = (column < OUTPUTS)[:, None] & (row < rows)[None, :]
        if HAS_RESIDUAL:
            offsets = _offsets(row, residual_inner, residual_outer, residual_row)[None, :] + column[:, None]
            others = tl.load(residual + offsets, mask, 0.0).to(tl.float32)
        product = tl.zeros((PARTS, BLOCK, ROWS), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            place = chunk * (PARTS * PART) + step
            there = (row < rows)[None, :, None]
            if INPUTS % (PARTS * PART) != 0:
                there = there & (place < INPUTS)
            value = tl.load(x_rows + place, there, 0.0)
            if HAS_NORM:
                centred = value.to(tl.float32)
                mean = tl.sum(tl.sum(centred, axis=2, keep_dims=True), axis=0, keep_dims=True) / INPUTS
                centred = tl.where(there, centred - mean, 0.0)
                variance = tl.sum(tl.sum(centred * centred, axis=2, keep_dims=True), axis=0, keep_dims=True) / INPUTS
                value = (centred * (1.0 / tl.sqrt(variance + eps)) * gamma + beta).to(value.dtype)
                mine = there & ((row % tl.num_programs(0)) == program)[None, :, None]
                tl.store(normed + row.to(tl.int64)[None, :, None] * INPUTS + place, value, mine)
            product = tl.dot(weights[chunk], value.permute(0, 2, 1), product, input_precision=PRECISION)
        result = tl.sum(product, axis=0)
        if HAS_BIAS:
            result += added
        result = activate(result, ACTIVATION)
        if HAS_RESIDUAL:
            result += others
        tl.store(out + row.to(tl.int64)[None, :] * OUTPUTS + column[:, None], result, mask)


# One configuration: timing a kernel alone does not show what an early start saves.
_kernel = Kernel(
    few_rows_forward,
    lambda constants, _: [Config(num_warps=constants["PARTS"], num_stages=1)],
    Config(),
    early=True,
)


def forward(
    x: Rows,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Rows | None,
    out: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
    normed: Tensor | None = None,
) -> None:
    """Writes residual + activation(weight·x + bias) to `out`, with x normalised first if there is a norm.

    Args:
        x: `(rows, inputs)`, up to MAX_ROWS and MAX_INPUTS. weight: `(outputs, inputs)`, dense along its last axis.
        bias: `(outputs,)`, dense. residual: `(rows, outputs)`. out: `(rows, outputs)`, contiguous.
        norm: a layer norm's weight and bias `(inputs,)`, dense, and eps. normed: output for norm(x), contiguous.
    """
    tensor, sizes, strides = x
    rows, (outputs, inputs) = sizes[0] * sizes[1], weight.shape
    added, added_sizes, added_strides = (out, (1, rows), (0, outputs)) if residual is None else residual
    gamma, beta, eps = (weight, weight, 0.0) if norm is None else norm
    parts = 4 if inputs <= 1024 else 8
    part = power_of_2(cdiv(inputs, parts), 16)
    # Narrow blocks read faster, but every program normalises all rows again. With as many outputs as a vocabulary has,
    # narrow blocks win in spite of that.
    block = 32 if 16 * multiprocessors(tensor.device) <= outputs <= _MANY_OUTPUTS else 16
    _kernel(
        lambda meta: (cdiv(outputs, block),),
        tensor, gamma, beta, weight, given(bias, weight), added, out, given(normed, out),
        rows, sizes[1], *strides, weight.stride(0), added_sizes[1], *added_strides, eps,
        INPUTS=inputs,
        OUTPUTS=outputs,
        ACTIVATION=activation,
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        PRECISION=precision_of(tensor.dtype),
        TILES=cdiv(rows, _ROWS),
        ROWS=_ROWS,
        BLOCK=block,
        PARTS=parts,
        PART=part if norm is not None else min(part, _PART),
    )  # fmt: skip
