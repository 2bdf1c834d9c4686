"""residual + activation(x @ weight.T + bias) as one product, and the gradient of its activation.

The kernel is persistent: a program computes several tiles of the result, in groups of rows that share their reads in
the L2 cache. On compute capability 9.0 and later the tensor memory accelerator moves tiles if the stride of the rows is
a multiple of 16 bytes; otherwise tiles are read through pointers. The epilogue processes a tile in slices of columns,
so that only one slice needs registers besides the sums. Tiles of 128×128 leave room for a second program per
multiprocessor, which multiplies while the first one computes its activation: with 1024 inputs, two special functions
per element take a quarter of the cycles of the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels import few_rows
from mplug2_fast.kernels._launch import Kernel, Tiles, capability, cdiv, given, interpreted, multiprocessors, power_of_2
from mplug2_fast.kernels._product import activate, approximate, halves, precision_of, slope
from mplug2_fast.kernels._tuning import Config, Race
from mplug2_fast.kernels.layer_norm import Rows, _offsets

SOME_ROWS = 1024
"""Up to this many rows, tiles of 128 rows would be too few to occupy every multiprocessor."""

GROUP = 8
"""Rows of tiles in a group, which is processed column by column."""


@triton.jit
def _finish(
    product, bias, residual, out, z, first_row, first_column, rows, residual_inner, residual_outer, residual_row,
    OUTPUTS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SAVES_Z: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Computes the epilogue of a slice. Stores the result, and z if wanted."""
    row = first_row + tl.arange(0, product.shape[0])
    column = first_column + tl.arange(0, product.shape[1])
    if HAS_BIAS:
        product += tl.load(bias + column, column < OUTPUTS, 0.0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (column < OUTPUTS)[None, :]
    dense = row.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
    if SAVES_Z:
        if DESCRIBED:
            z.store([first_row, first_column], product.to(z.dtype))
        else:
            tl.store(z + dense, product, mask)
    product = activate(product, ACTIVATION)
    if HAS_RESIDUAL:
        offsets = _offsets(row, residual_inner, residual_outer, residual_row)[:, None] + column[None, :]
        product += tl.load(residual + offsets, mask, 0.0).to(tl.float32)
    if DESCRIBED:
        out.store([first_row, first_column], product.to(out.dtype))
    else:
        tl.store(out + dense, product, mask)


@triton.jit
def linear_act_forward(
    x, weight, bias, residual, out, z,
    rows, x_inner, x_outer, x_row, weight_row, residual_inner, residual_outer, residual_row,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, SAVES_Z: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(OUTPUTS, BLOCK_N)
    # The flattened loop loads the next tile's inputs during this tile's epilogue.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=DESCRIBED):
        group, inside = tile // (GROUP * tiles_n), tile % (GROUP * tiles_n)
        height = min(tiles_m - group * GROUP, GROUP)
        first_row = (group * GROUP + inside % height) * BLOCK_M
        first_column = (inside // height) * BLOCK_N
        if not DESCRIBED:
            row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
            there = (row < rows)[:, None]
            x_rows = x + _offsets(row, x_inner, x_outer, x_row)[:, None]
            # Past the last column, the first one is read and its result not stored.
            weight_rows = weight + tl.where(column < OUTPUTS, column, 0).to(tl.int64)[:, None] * weight_row
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, INPUTS, BLOCK_K):
            if DESCRIBED:
                x_block = x.load([first_row, first])
                weight_block = weight.load([first_column, first])
            else:
                step = first + tl.arange(0, BLOCK_K)[None, :]
                if INPUTS % BLOCK_K == 0:
                    x_block, weight_block = tl.load(x_rows + step, there, 0.0), tl.load(weight_rows + step)
                else:
                    x_block = tl.load(x_rows + step, there & (step < INPUTS), 0.0)
                    weight_block = tl.load(weight_rows + step, step < INPUTS, 0.0)
            product = tl.dot(x_block, weight_block.T, product, input_precision=PRECISION)
        if BLOCK_N == SLICE:
            slices = (product,)
        elif BLOCK_N == 2 * SLICE:
            slices = halves(product)
        else:
            left, right = halves(product)
            slices = halves(left) + halves(right)
        for index in tl.static_range(BLOCK_N // SLICE):
            _finish(
                slices[index], bias, residual, out, z, first_row, first_column + index * SLICE, rows,
                residual_inner, residual_outer, residual_row,
                OUTPUTS, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES_Z, DESCRIBED,
            )  # fmt: skip


@triton.jit
def activation_backward(
    grad, z, dz, activated, dbias, rows, columns,
    ACTIVATION: tl.constexpr, WANTS_ACTIVATED: tl.constexpr, WANTS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = grad · activation'(z), which may overwrite grad, and activation(z).

    Each program processes some columns of every `programs`-th block of rows and sums its share of dbias
    `(programs, columns)`. A second stage adds up the shares. The order depends only on the number of programs.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    program, programs = tl.program_id(1), tl.num_programs(1)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (column < columns)
        offsets = row.to(tl.int64) * columns + column
        value = tl.load(z + offsets, mask, 0.0).to(tl.float32)
        result = tl.load(grad + offsets, mask, 0.0).to(tl.float32) * slope(value, ACTIVATION)
        tl.store(dz + offsets, result, mask)
        if WANTS_ACTIVATED:
            tl.store(activated + offsets, activate(value, ACTIVATION), mask)
        sums += result
    if WANTS_BIAS:
        tl.store(dbias + program * columns + column, tl.sum(sums, axis=0, keep_dims=True), column < columns)


def _config(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Config:
    """A configuration with four slices per tile, or fewer, of at least 32 columns."""
    slice = min(block_n, max(32, block_n // 4))
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SLICE": slice}, warps, stages)


def _some(constants, capability) -> list[Config]:
    if constants["PRECISION"] == "ieee":
        return [_config(32, 64, 16, 4, 3), _config(64, 64, 16, 4, 3)]
    wide, warps = _wide(constants), _warps(capability)
    return [
        _config(64, 64, 128 // wide, warps, 3),
        _config(64, 32, 128 // wide, warps, 4),
        _config(64, 128, 64 // wide, warps, 4),
    ]


def _many(constants, capability) -> list[Config]:
    if constants["PRECISION"] == "ieee":
        return [_config(128, 64, 16, 8, 3), _config(64, 64, 16, 4, 3)]
    wide = _wide(constants)
    if not constants["DESCRIBED"]:
        return [
            _config(128, 128, 64 // wide, 8, 4),
            _config(128, 128, 32 // wide, 8, 5),
            _config(128, 256, 32 // wide, 8, 4),
        ]
    return [
        _config(128, 128, 64 // wide, _warps(capability), 3),
        *(_config(128, 256, 64 // wide, 8, stages) for stages in range(3, 6 - wide)),
    ]


def _wide(constants) -> int:
    """The size of an element in units of 16 bits."""
    return 1 if constants["PRECISION"] is None else 2


def _warps(capability) -> int:
    """Warps of a program with few sums. On 10.0, which keeps sums outside the registers, Triton spills with four."""
    return 4 if capability < 100 else 8


_interpreted = _config(32, 32, 64, 4, 2)
_forward_some = Kernel(linear_act_forward, _some, _interpreted)
_forward_many = Kernel(linear_act_forward, _many, _interpreted)
_backward = Kernel(
    activation_backward,
    [Config({"ROWS": rows, "BLOCK": block}, num_warps=4) for rows, block in ((8, 256), (4, 512), (16, 128))],
    Config({"ROWS": 64, "BLOCK": 64}),
)

AGAINST_TORCH = Race("linear_act", linear_act_forward)


def is_few(x: Rows, weight: Tensor) -> bool:
    """Whether reading the weight takes most of the time, so that `few_rows` is faster.

    A weight byte takes one FLOP per row; a GPU can compute about 200 in that time. Not in float32, which has no tensor
    cores and could not keep up with the memory.
    """
    tensor, sizes, _ = x
    if tensor.dtype == torch.float32 and not interpreted():
        return False
    return sizes[0] * sizes[1] <= few_rows.MAX_ROWS and weight.shape[1] <= few_rows.MAX_INPUTS


def slower(dtype: torch.dtype, activation: str, residual: bool) -> str | None:
    """Why cuBLAS is faster for such products of any size. None if that has to be measured."""
    if interpreted():
        return None
    if activation == "none" and not residual:
        return "there is nothing to fuse with the product: cuBLAS adds the bias itself"
    if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return (
            "float32 without TF32 keeps tensor cores idle: the product takes far longer than the pass over its result "
            "that would be saved, and cuBLAS is faster at it"
        )
    return None


def forward(
    x: Rows,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Rows | None,
    out: Tensor,
    z: Tensor | None = None,
) -> None:
    """Writes residual + activation(x @ weight.T + bias) to `out` and x @ weight.T + bias to `z`.

    Args:
        x: `(rows, inputs)`. weight: `(outputs, inputs)`, dense along its last axis. bias: `(outputs,)`, dense.
        residual: `(rows, outputs)`. out, z: `(rows, outputs)`, contiguous. All but the bias have the dtype of x.
    """
    if z is None and is_few(x, weight):
        few_rows.forward(x, weight, bias, activation, residual, out)
        return
    tensor, sizes, strides = x
    rows, (outputs, inputs) = sizes[0] * sizes[1], weight.shape
    added, added_sizes, added_strides = (out, (1, rows), (0, outputs)) if residual is None else residual
    saves_z, z = z is not None, given(z, out)
    precision = precision_of(tensor.dtype)
    operands, described = (tensor, weight, out, z), False
    if precision != "ieee" and not 0 < capability(tensor.device) < 90:
        tiles = (
            _tiles(x),
            Tiles(weight, (outputs, inputs), weight.stride(0), ("BLOCK_N", "BLOCK_K")),
            *(Tiles(matrix, (rows, outputs), outputs, ("BLOCK_M", "SLICE")) for matrix in (out, z)),
        )
        if all(map(_describable, tiles)):
            operands, described = tiles, True
    kernel = _forward_some if rows <= SOME_ROWS else _forward_many

    def grid(meta):
        tiles = cdiv(rows, meta["BLOCK_M"]) * cdiv(outputs, meta["BLOCK_N"])
        # As many programs per multiprocessor as have room for their sums in 128 KiB of registers.
        resident = max(1, (1 << 15) // (meta["BLOCK_M"] * meta["BLOCK_N"]))
        return (min(tiles, resident * multiprocessors(tensor.device)),)

    kernel(
        grid,
        operands[0], operands[1], given(bias, weight), added, operands[2], operands[3],
        rows, sizes[1], *strides, weight.stride(0), added_sizes[1], *added_strides,
        key=(power_of_2(rows),),
        INPUTS=inputs,
        OUTPUTS=outputs,
        ACTIVATION=approximate(activation, tensor.dtype),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        SAVES_Z=saves_z,
        DESCRIBED=described,
        PRECISION=precision,
        GROUP=GROUP,
    )  # fmt: skip


def apply(
    x: Rows,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Rows | None,
    out: Tensor,
    z: Tensor | None = None,
) -> None:
    """The same as `forward`, by cuBLAS and separate passes if `slower` gives a reason."""
    if not slower(out.dtype, activation, residual is not None):
        forward(x, weight, bias, activation, residual, out, z)
        return
    outputs, inputs = weight.shape
    rows, product, out = _strided(x).reshape(-1, inputs), given(z, out).view(-1, outputs), out.view(-1, outputs)
    if bias is None:
        torch.mm(rows, weight.t(), out=product)
    else:
        torch.addmm(bias, rows, weight.t(), out=product)
    if activation == "gelu":
        torch.ops.aten.gelu.out(product, out=out)
    elif activation == "quick_gelu":
        torch.mul(product, torch.sigmoid(1.702 * product), out=out)
    if residual is not None:
        out.add_(_strided(residual).reshape(-1, outputs))


def backward(
    grad: Tensor, z: Tensor, activation: str, dz: Tensor, activated: Tensor | None, *, wants_bias: bool
) -> Tensor | None:
    """Writes the gradient through an activation other than "none" to `dz`, and activation(z) to `activated`.

    All are `(rows, outputs)`, contiguous; `dz` may be `grad`. With `wants_bias`, returns the gradient of the bias
    `(outputs,)` in float32.
    """
    rows, outputs = z.shape
    programs = max(1, min(rows, 1024 * multiprocessors(z.device) // power_of_2(outputs, 256)))
    dbias = grad.new_empty((programs if wants_bias else 1, outputs), dtype=torch.float32)
    _backward(
        lambda meta: (cdiv(outputs, meta["BLOCK"]), programs),
        grad, z, dz, given(activated, dz), dbias, rows, outputs,
        key=(power_of_2(rows), outputs),
        ACTIVATION=activation,
        WANTS_ACTIVATED=activated is not None,
        WANTS_BIAS=wants_bias,
    )  # fmt: skip
    return dbias.sum(dim=0) if wants_bias else None


def _tiles(x: Rows) -> Tiles | None:
    """The rows as one matrix. None if they do not have a single stride."""
    tensor, (outer, inner), (outer_stride, row_stride) = x
    channels = tensor.shape[-1]
    if outer * inner == 1:
        row_stride = channels
    elif inner == 1:
        row_stride = outer_stride
    elif outer > 1 and outer_stride != inner * row_stride:
        return None
    return Tiles(tensor, (outer * inner, channels), row_stride, ("BLOCK_M", "BLOCK_K"))


def _strided(x: Rows) -> Tensor:
    """The rows as a tensor `(outer, inner, channels)`."""
    tensor, sizes, strides = x
    return tensor.as_strided((*sizes, tensor.shape[-1]), (*strides, 1))


def _describable(tiles: Tiles | None) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte aligned rows that do not overlap."""
    if tiles is None:
        return False
    tensor, (_, columns), row_stride, _ = tiles
    return row_stride >= columns and row_stride * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
