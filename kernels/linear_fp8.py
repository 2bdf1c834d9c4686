"""residual + activation(norm(x) @ weight.T + bias) of e4m3 numbers, on compute capability 8.9 and later.

A first kernel rounds rows to e4m3, after a layer norm if there is one: a row's scale needs its largest element, so the
product cannot round its own inputs while it reads them. The second kernel multiplies. Its loop is that of `linear_act`
with elements of 8 bits. Tensor cores of compute capability 9.0 add e4m3 products with fewer bits than float32 has, so
that their sums move to float32 every `STEP` inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, Tiles, capability, cdiv, given, multiprocessors, power_of_2
from mplug2_fast.kernels._product import approximate, halves
from mplug2_fast.kernels._tuning import Config
from mplug2_fast.kernels.layer_norm import Rows, _normed, _offsets
from mplug2_fast.kernels.linear_act import GROUP, SOME_ROWS, _describable, _finish

MIN_CAPABILITY = 89
"""The first with e4m3 products, as `capability` writes it."""
STEP = 128
"""Inputs whose products tensor cores may add before the sum moves to float32."""

LARGEST = tl.constexpr(448.0)
"""The largest e4m3 number."""
_SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def fp8_rows(
    x, weight, bias, numbers, scale, rows, inner, channels, x_outer, x_inner, eps,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rounds rows of x, or of their layer norm. A row that is not finite gets zeros and the scale NaN."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    there = channel < channels
    mask = (row < rows) & there
    value = tl.load(x + _offsets(row, inner, x_outer, x_inner) + channel, mask, 0.0).to(tl.float32)
    if HAS_NORM:
        value, _ = _normed(value, mask, channels, eps)
        value *= tl.load(weight + channel, there, 0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + channel, there, 0.0).to(tl.float32)
    size = tl.where(value == value, tl.abs(value), float("inf"))
    most = tl.max(size, axis=1, keep_dims=True)
    is_finite = most < float("inf")
    found = tl.div_rn(most, LARGEST)
    is_usable = is_finite & (found >= _SMALLEST_SCALE)
    factor = tl.div_rn(LARGEST, tl.where(is_usable, most, 1.0))
    rounded = tl.where(is_usable, value * factor, 0.0).to(tl.float8e4nv)
    tl.store(numbers + row.to(tl.int64) * channels + channel, rounded, mask)
    found = tl.where(is_usable, found, tl.where(is_finite, 0.0, float("nan")))
    tl.store(scale + row, found, row < rows)


@triton.jit
def linear_fp8_forward(
    x, weight, bias, residual, out, x_scale, weight_scale,
    rows, residual_inner, residual_outer, residual_row,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, DESCRIBED: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(OUTPUTS, BLOCK_N)
    # The flattened loop loads the next tile's inputs during this tile's epilogue.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=DESCRIBED):
        group, inside = tile // (GROUP * tiles_n), tile % (GROUP * tiles_n)
        height = min(tiles_m - group * GROUP, GROUP)
        first_row = (group * GROUP + inside % height) * BLOCK_M
        first_column = (inside // height) * BLOCK_N
        row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, INPUTS, BLOCK_K):
            if DESCRIBED:
                x_block = x.load([first_row, first])
                weight_block = weight.load([first_column, first])
            else:
                step = first + tl.arange(0, BLOCK_K)[None, :]
                # Past the last row and column, the first one is read and its result not stored.
                x_rows = x + tl.where(row < rows, row, 0).to(tl.int64)[:, None] * INPUTS
                weight_rows = weight + tl.where(column < OUTPUTS, column, 0).to(tl.int64)[:, None] * INPUTS
                x_block = tl.load(x_rows + step, step < INPUTS, 0.0)
                weight_block = tl.load(weight_rows + step, step < INPUTS, 0.0)
            product = tl.dot(x_block, weight_block.T, product, max_num_imprecise_acc=STEP)
        if BLOCK_N == SLICE:
            slices = (product,)
        elif BLOCK_N == 2 * SLICE:
            slices = halves(product)
        else:
            left, right = halves(product)
            slices = halves(left) + halves(right)
        row_scale = tl.load(x_scale + row, row < rows, 0.0)[:, None]
        for index in tl.static_range(BLOCK_N // SLICE):
            column = first_column + index * SLICE + tl.arange(0, SLICE)
            scales = tl.load(weight_scale + column, column < OUTPUTS, 0.0)[None, :] * row_scale
            _finish(
                slices[index] * scales, bias, residual, out, out, first_row, first_column + index * SLICE, rows,
                residual_inner, residual_outer, residual_row,
                OUTPUTS, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, False, DESCRIBED,
            )  # fmt: skip


def _rows_configs(constants, capability) -> list[Config]:
    """Rows per program such that a thread holds about 16 to 32 values."""
    block = constants["BLOCK"]
    warps = [w for w in (1, 2, 4, 8, 16) if 8 <= block // (32 * w) <= 64] or [16 if block > 1024 else 1]
    few = [Config({"ROWS": 1}, num_warps=w) for w in warps[:3]]
    several = [Config({"ROWS": rows}, num_warps=4) for rows in (2, 4) if 512 <= block * rows <= 4096]
    return [*few, *several]


def _config(block_m: int, block_n: int, warps: int, stages: int) -> Config:
    """A configuration with four slices per tile, or fewer, of at least 32 columns."""
    slice = min(block_n, max(32, block_n // 4))
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": STEP, "SLICE": slice}, warps, stages)


def _some(constants, capability) -> list[Config]:
    return [_config(64, 64, 4, 4), _config(64, 32, 4, 4), _config(64, 128, 4, 4)]


def _many(constants, capability) -> list[Config]:
    """Registers hold the sums of a step and those so far, which leaves no room for tiles of 128×256 on 9.0."""
    return [_config(128, 128, 8, 3), _config(128, 128, 8, 4), _config(128, 64, 4, 4)]


_rows = Kernel(fp8_rows, _rows_configs, Config({"ROWS": 16}))
_interpreted = Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": STEP, "SLICE": 32})
_forward_some = Kernel(linear_fp8_forward, _some, _interpreted)
_forward_many = Kernel(linear_fp8_forward, _many, _interpreted)


def quantise(x: Rows, norm: tuple[Tensor, Tensor | None, float] | None, numbers: Tensor, scale: Tensor) -> None:
    """Writes the rows of x, or of their layer norm, as e4m3 to `numbers` and the factor of each row to `scale`.

    Args:
        x: `(rows, channels)`. norm: weight and bias `(channels,)`, dense, and eps. numbers: `(rows, channels)`, e4m3,
            scale: `(rows,)`, float32, both contiguous.
    """
    tensor, sizes, strides = x
    rows, channels = sizes[0] * sizes[1], tensor.shape[-1]
    weight, bias, eps = norm or (None, None, 0.0)
    _rows(
        lambda meta: (cdiv(rows, meta["ROWS"]),),
        tensor, given(weight, tensor), given(bias, tensor), numbers, scale,
        rows, sizes[1], channels, *strides, eps,
        key=(power_of_2(rows), channels),
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        BLOCK=power_of_2(channels, 16),
    )  # fmt: skip


def forward(
    numbers: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Rows | None,
    out: Tensor,
) -> None:
    """Writes residual + activation(the product times both scales + bias) to `out`.

    Args:
        numbers: `(rows, inputs)`, weight: `(outputs, inputs)`, e4m3. scale: `(rows,)`, weight_scale: `(outputs,)`,
            float32. bias: `(outputs,)`. out: `(rows, outputs)`. All are contiguous. residual: `(rows, outputs)`.
    """
    rows, (outputs, inputs) = numbers.shape[0], weight.shape
    added, added_sizes, added_strides = (out, (1, rows), (0, outputs)) if residual is None else residual
    operands, described = (numbers, weight, out), False
    if not 0 < capability(numbers.device) < 90:
        tiles = (
            Tiles(numbers, (rows, inputs), inputs, ("BLOCK_M", "BLOCK_K")),
            Tiles(weight, (outputs, inputs), inputs, ("BLOCK_N", "BLOCK_K")),
            Tiles(out, (rows, outputs), outputs, ("BLOCK_M", "SLICE")),
        )
        if all(map(_describable, tiles)):
            operands, described = tiles, True
    kernel = _forward_some if rows <= SOME_ROWS else _forward_many

    def grid(meta):
        tiles = cdiv(rows, meta["BLOCK_M"]) * cdiv(outputs, meta["BLOCK_N"])
        # As many programs per multiprocessor as have room for both sums in 128 KiB of registers.
        resident = max(1, (1 << 14) // (meta["BLOCK_M"] * meta["BLOCK_N"]))
        return (min(tiles, resident * multiprocessors(numbers.device)),)

    kernel(
        grid,
        operands[0], operands[1], given(bias, weight_scale), added, operands[2], scale, weight_scale,
        rows, added_sizes[1], *added_strides,
        key=(power_of_2(rows),),
        INPUTS=inputs,
        OUTPUTS=outputs,
        ACTIVATION=approximate(activation, out.dtype),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        DESCRIBED=described,
        STEP=STEP,
        GROUP=GROUP,
    )  # fmt: skip
