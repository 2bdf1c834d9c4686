"""The local temporal module in two implementations.

`forward`, for few rows, has two launches: norm, down-projection, convolution over time and activation; then the
up-projection with the residual. A tile of the first launch has all frames of a few positions, so the convolution finds
its frames in the tile's registers. Only the inner activations, half as wide as x, go through memory. A tile's rows are
read twice: for the statistics, and again for the product, when they are in the L2 cache.

`convolve`, for many rows, computes convolution and activation in a separate pass between two products. If the first
product applied the norm, its rows would pass through registers. With many rows, that costs more than the separate
passes over the result of the norm and over the inner activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, cdiv, given, interpreted, power_of_2
from mplug2_fast.kernels._product import activate, halves, precision_of, slope
from mplug2_fast.kernels._tuning import Config


@triton.jit
def _statistics(
    x, channels, eps, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Mean and 1 / standard deviation `(ROWS, 1)` of the rows at the pointers x `(ROWS, 1)`, in one pass.

    Each column of a block accumulates its mean and squared deviations (Welford); at the end, the columns are combined.
    """
    column = tl.arange(0, BLOCK_K)[None, :]
    mean = tl.zeros((ROWS, BLOCK_K), tl.float32)
    spread = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for first in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            value = tl.load(x + first + column).to(tl.float32)
            delta = value - mean
        else:
            there = first + column < channels
            value = tl.load(x + first + column, there, 0.0).to(tl.float32)
            delta = tl.where(there, value - mean, 0.0)
        mean += delta * (1.0 / (first // BLOCK_K + 1))
        spread += delta * (value - mean)
    count = tl.cdiv(channels - column, BLOCK_K)
    joined = tl.sum(mean * count, axis=1, keep_dims=True) / channels
    apart = mean - joined
    variance = tl.sum(spread + count * apart * apart, axis=1, keep_dims=True) / channels
    return joined, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _convolve(
    tile, there, first_column, weight, bias, out, frames, inner,
    FRAMES: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Writes act(conv(tile)) to the pointers out `(rows, 1)` of rows that are `there`. The frames of a position are
    neighbouring rows of the tile."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < inner
    tile = tile.reshape(ROWS // FRAMES, FRAMES, COLUMNS)
    time = tl.arange(0, FRAMES)[None, :, None]
    z = tl.zeros(tile.shape, tl.float32)
    for tap in tl.static_range(KERNEL):
        if tap - KERNEL // 2 < FRAMES and KERNEL // 2 - tap < FRAMES:
            seen = tile
            if tap != KERNEL // 2:
                other = time + (tap - KERNEL // 2)
                index = tl.minimum(tl.maximum(other, 0), FRAMES - 1).broadcast_to(tile.shape)
                seen = tl.where((other >= 0) & (other < frames), tl.gather(tile, index, axis=1), 0.0)
            taps = tl.load(weight + column * KERNEL + tap, inside, 0.0).to(tl.float32)
            z += seen.to(tl.float32) * taps[None, None, :]
    if HAS_BIAS:
        z += tl.load(bias + column, inside, 0.0).to(tl.float32)[None, None, :]
    z = activate(z, ACTIVATION).reshape(ROWS, COLUMNS)
    tl.store(out + column[None, :], z, there[:, None] & inside[None, :])


@triton.jit
def local_temporal_down(
    x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, h, out,
    positions, frames, patches, channels, inner, x_batch, x_frame, x_token, tokens, eps,
    FRAMES: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, SAVES_H: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Writes act(conv(down(norm(x)))) of x's patches to out, and down(norm(x)) to h, whose frames have `tokens` tokens.

    The rows of a tile are the frames of its first position, then those of the next one. Rows outside of x read its last
    frame or position, and are not written.
    """
    POSITIONS: tl.constexpr = ROWS // FRAMES
    blocks = tl.cdiv(inner, BLOCK_N)
    row = tl.arange(0, ROWS)
    position = tl.program_id(0) // blocks * POSITIONS + row // FRAMES
    frame = row % FRAMES
    there = (position < positions) & (frame < frames)
    position = tl.minimum(position, positions - 1)
    video, patch = (position // patches).to(tl.int64), (position % patches).to(tl.int64)
    x_frames = tl.minimum(frame, frames - 1).to(tl.int64)
    x += (video * x_batch + x_frames * x_frame + patch * x_token)[:, None]
    first_column = tl.program_id(0) % blocks * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    inside = column < inner
    column_inside = tl.minimum(column, inner - 1)
    down_weight += column_inside.to(tl.int64)[None, :] * channels
    channel = tl.arange(0, BLOCK_K)

    if HAS_NORM:
        mean, rstd = _statistics(x, channels, eps, ROWS, BLOCK_K, EVEN_K, STAGES)
    product = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for first in range(0, channels, BLOCK_K):
        at = first + channel
        if EVEN_K:
            value = tl.load(x + at[None, :])
            weight = tl.load(down_weight + at[:, None])
        else:
            value = tl.load(x + at[None, :], at[None, :] < channels, 0.0)
            weight = tl.load(down_weight + at[:, None], at[:, None] < channels, 0.0)
        if HAS_NORM:
            gamma = tl.load(norm_weight + at, at < channels, 0.0).to(tl.float32)
            normed = (value.to(tl.float32) - mean) * rstd * gamma[None, :]
            if HAS_NORM_BIAS:
                normed += tl.load(norm_bias + at, at < channels, 0.0).to(tl.float32)[None, :]
            value = normed.to(x.dtype.element_ty)
        product = tl.dot(value, weight, product, input_precision=PRECISION)
    if HAS_DOWN_BIAS:
        product += tl.load(down_bias + column, inside, 0.0).to(tl.float32)[None, :]
    product = product.to(x.dtype.element_ty)

    at = (((video * frames + frame) * tokens + patch) * inner)[:, None]
    if SAVES_H:
        tl.store(h + at + column[None, :], product, there[:, None] & inside[None, :])
    out += at
    left, right = halves(product)
    _convolve(
        left, there, first_column, conv_weight, conv_bias, out, frames, inner,
        FRAMES, KERNEL, ACTIVATION, HAS_CONV_BIAS,
    )  # fmt: skip
    _convolve(
        right, there, first_column + BLOCK_N // 2, conv_weight, conv_bias, out, frames, inner,
        FRAMES, KERNEL, ACTIVATION, HAS_CONV_BIAS,
    )  # fmt: skip


@triton.jit
def _add(
    product, bias, x, out, row, first_column, rows, tokens, channels,
    CLASS_TOKEN: tl.constexpr, RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Writes x + product + bias; for class tokens, x alone. x: pointers to rows."""
    column = first_column + tl.arange(0, product.shape[1])
    inside = column < channels
    if HAS_BIAS:
        product += tl.load(bias + column, inside, 0.0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    is_class = (row % tokens == 0)[:, None]
    if RESIDUAL or CLASS_TOKEN:
        wanted = mask if RESIDUAL else mask & is_class
        before = tl.load(x + column[None, :], wanted, 0.0).to(tl.float32)
        if RESIDUAL:
            product += before
        if CLASS_TOKEN:
            product = tl.where(is_class, before, product)
    tl.store(out + row.to(tl.int64)[:, None] * channels + column[None, :], product, mask)


@triton.jit
def local_temporal_up(
    a, weight, bias, x, out, rows, frames, tokens, channels, inner, x_batch, x_frame, x_token,
    CLASS_TOKEN: tl.constexpr, RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x + a @ weight.T + bias; for class tokens, x alone, whatever their rows of a contain."""
    blocks = tl.cdiv(channels, BLOCK_N)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(0) % blocks * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_K)
    a += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * inner + at[None, :]
    weight += tl.minimum(column, channels - 1).to(tl.int64)[None, :] * inner + at[:, None]
    product = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for first in range(0, inner, BLOCK_K):
        if EVEN_K:
            product = tl.dot(tl.load(a + first), tl.load(weight + first), product, input_precision=PRECISION)
        else:
            there = first + at < inner
            left = tl.load(a + first, there[None, :], 0.0)
            right = tl.load(weight + first, there[:, None], 0.0)
            product = tl.dot(left, right, product, input_precision=PRECISION)
    frame = row // tokens
    video, token = (frame // frames).to(tl.int64), (row % tokens).to(tl.int64)
    x += (video * x_batch + (frame % frames).to(tl.int64) * x_frame + token * x_token)[:, None]
    left, right = halves(product)
    _add(left, bias, x, out, row, first_column, rows, tokens, channels, CLASS_TOKEN, RESIDUAL, HAS_BIAS)
    first_column += BLOCK_N // 2
    _add(right, bias, x, out, row, first_column, rows, tokens, channels, CLASS_TOKEN, RESIDUAL, HAS_BIAS)


@triton.jit
def local_temporal_convolve(
    h, weight, bias, out, frames, patches, inner, tokens,
    KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, FRAMES: tl.constexpr,
    PATCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """act(conv(h)) of patches.

    A program computes FRAMES frames of some positions and columns. It holds them in registers, with the frames before
    and after that the convolution needs. All loads are issued before the first value is used.
    """
    HALF: tl.constexpr = KERNEL // 2
    blocks = tl.cdiv(inner, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    patch = tl.program_id(0) // blocks * PATCHES + tl.arange(0, PATCHES)[:, None]
    spans = tl.cdiv(frames, FRAMES)
    video = (tl.program_id(1) // spans).to(tl.int64) * frames
    first = tl.program_id(1) % spans * FRAMES + tl.zeros((1, 1), tl.int32)
    inside = column < inner
    there = (patch < patches) & inside
    at = patch * inner + column
    seen = ()
    for step in tl.static_range(FRAMES + 2 * HALF):
        frame = first + step - HALF
        in_clip = there & (frame >= 0) & (frame < frames)
        seen += (tl.load(h + (video + frame) * tokens * inner + at, in_clip, 0.0),)
    taps = ()
    for tap in tl.static_range(KERNEL):
        taps += (tl.load(weight + column * KERNEL + tap, inside, 0.0).to(tl.float32),)
    start = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        start = tl.load(bias + column, inside, 0.0).to(tl.float32)
    for step in tl.static_range(FRAMES):
        z = tl.zeros((PATCHES, BLOCK), tl.float32) + start
        for tap in tl.static_range(KERNEL):
            z += seen[step + tap].to(tl.float32) * taps[tap]
        frame = first + step
        place = out + (video + frame) * tokens * inner + at
        tl.store(place, activate(z, ACTIVATION), there & (frame < frames))


@triton.jit
def _frame(x, video, frame, frames, token, tokens, column, inner, patch):
    """The patches' rows of another frame in float32, zero outside of the clip. `video` counts frames."""
    rows = (video + frame) * tokens + token
    seen = (patch & (frame >= 0) & (frame < frames))[:, None] & (column < inner)[None, :]
    return tl.load(x + rows[:, None] * inner + column[None, :], seen, 0.0).to(tl.float32)


@triton.jit
def local_temporal_backward(
    h, da, conv_weight, conv_bias, a, dh, sums, positions, frames, tokens, inner,
    FRAMES: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    CLASS_TOKEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes a, dh, and this tile's share of the gradients of conv_weight, conv_bias and down_bias.

    h is the result of the down-projection, and da the gradient of a = act(z), z = conv(h). The shares are
    `(KERNEL + 2, inner)`. Rows of class tokens are not read, and are zeros in a and dh. Neighbouring frames are in the
    same tile, so repeated reads hit the L1 cache.
    """
    HALF: tl.constexpr = KERNEL // 2
    tile = tl.program_id(0)
    row = tl.arange(0, ROWS)
    position = tile * (ROWS // FRAMES) + row // FRAMES
    frame = row % FRAMES
    there = (position < positions) & (frame < frames)
    video, token = (position // tokens).to(tl.int64) * frames, position % tokens
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < inner)[None, :]
    patch = there
    if CLASS_TOKEN:
        patch = there & (token > 0)
    bias = tl.zeros((1, BLOCK), tl.float32)
    if HAS_CONV_BIAS:
        bias = tl.load(conv_bias + column[None, :], inside, 0.0).to(tl.float32)
    taps = conv_weight + column[None, :] * KERNEL
    sums += tile.to(tl.int64) * (KERNEL + 2) * inner + column[None, :]
    at = ((video + frame) * tokens + token)[:, None] * inner + column[None, :]

    gradient = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.static_range(KERNEL):
        now = frame + (step - HALF)
        z = tl.zeros((ROWS, BLOCK), tl.float32) + bias
        for tap in tl.static_range(KERNEL):
            seen = _frame(h, video, now + (tap - HALF), frames, token, tokens, column, inner, patch)
            z += seen * tl.load(taps + tap, inside, 0.0).to(tl.float32)
        dz = _frame(da, video, now, frames, token, tokens, column, inner, patch) * slope(z, ACTIVATION)
        # z of `now` multiplies h of `frame` by the mirrored tap.
        gradient += dz * tl.load(taps + (KERNEL - 1 - step), inside, 0.0).to(tl.float32)
        if step == HALF:
            tl.store(a + at, tl.where(patch[:, None], activate(z, ACTIVATION), 0.0), there[:, None] & inside)
            for tap in tl.static_range(KERNEL):
                seen = _frame(h, video, now + (tap - HALF), frames, token, tokens, column, inner, patch)
                tl.store(sums + tap * inner, tl.sum(dz * seen, axis=0, keep_dims=True), inside)
            tl.store(sums + KERNEL * inner, tl.sum(dz, axis=0, keep_dims=True), inside)
    tl.store(dh + at, gradient, there[:, None] & inside)
    tl.store(sums + (KERNEL + 1) * inner, tl.sum(gradient, axis=0, keep_dims=True), inside)


def _down_configs(constants, capability) -> list[Config]:
    """With tiles of 64 rows, a Large video has 128 programs, one per multiprocessor. Larger tiles read the weight less
    often from the L2 cache. Many rows in 16 bits use `convolve`: see `ops.local_temporal`."""
    if constants["PRECISION"] == "ieee":
        tiles = [(64, 64, 32, 4, 2), (128, 32, 32, 8, 2)]
    elif constants["PRECISION"] == "tf32":
        tiles = [(64, 64, 32, 4, 3), (128, 64, 32, 8, 3)]
    else:
        tiles = [
            (64, 256, 64, 8, 3),
            (64, 128, 64, 4, 3),
            (128, 128, 64, 8, 3),
            (128, 64, 64, 8, 3),
        ]
    return [
        Config({"ROWS": rows, "BLOCK_N": columns, "BLOCK_K": depth, "STAGES": stages}, warps, stages)
        for rows, columns, depth, warps, stages in tiles
        if rows >= constants["FRAMES"]
    ]


def _up_configs(constants, capability) -> list[Config]:
    if constants["PRECISION"] == "ieee":
        tiles = [(64, 64, 32, 4, 2)]
    elif constants["PRECISION"] == "tf32":
        tiles = [(64, 64, 32, 4, 3), (128, 128, 32, 8, 3)]
    else:
        tiles = [
            (128, 128, 64, 8, 3),
            (128, 128, 64, 4, 3),
            (128, 256, 64, 8, 3),
            (64, 128, 64, 4, 4),
            (64, 64, 64, 4, 4),
        ]
    return [
        Config({"ROWS": rows, "BLOCK_N": columns, "BLOCK_K": depth}, warps, stages)
        for rows, columns, depth, warps, stages in tiles
    ]


def _convolve_configs(constants, capability) -> list[Config]:
    """Eight frames per program, which reads two more. Sixteen were no faster, and Triton took up to ten seconds to
    compile them. A thread has 8 columns, so that its frames fit into registers."""
    return [
        Config({"FRAMES": frames, "PATCHES": patches, "BLOCK": block}, warps)
        for frames, patches, block, warps in (
            (8, 4, 256, 4),
            (8, 2, 512, 4),
        )
    ]


def _backward_configs(constants, capability) -> list[Config]:
    return [Config({"BLOCK": block}, warps) for block, warps in ((64, 4), (128, 8), (32, 4))]


_down = Kernel(local_temporal_down, _down_configs, Config({"ROWS": 128, "BLOCK_N": 64, "BLOCK_K": 32, "STAGES": 1}))
_up = Kernel(local_temporal_up, _up_configs, Config({"ROWS": 128, "BLOCK_N": 64, "BLOCK_K": 64}))
_convolution = Kernel(local_temporal_convolve, _convolve_configs, Config({"FRAMES": 4, "PATCHES": 64, "BLOCK": 32}))
_backward = Kernel(local_temporal_backward, _backward_configs, Config({"BLOCK": 64}))


def forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    eps: float,
    activation: str,
    class_token: bool,
    residual: bool,
    out: Tensor,
    h: Tensor | None = None,
) -> None:
    """Writes the operator's result to `out` and that of the down-projection to `h`.

    Args:
        x: `(batch, frames, tokens, channels)`, any strides but those of channels, which are dense.
        out: of x's shape. h: `(batch, frames, tokens, inner)`, with zeros for class tokens. Both, and all parameters,
            are contiguous.
    """
    batch, frames, tokens, channels = x.shape
    inner, kernel = conv_weight.shape
    first, rows = int(class_token), batch * frames * tokens
    positions = batch * (tokens - first)
    precision = precision_of(x.dtype)
    # With rows for class tokens, so that the second product can process all rows of x.
    a = x.new_empty(batch, frames, tokens, inner)
    if h is not None:
        h[:, :, :first] = 0
    if positions:
        _down(
            lambda meta: (
                cdiv(positions, meta["ROWS"] // meta["FRAMES"]) * cdiv(inner, meta["BLOCK_N"]),
            ),
            x[:, :, first:], given(norm_weight, x), given(norm_bias, x), down_weight, given(down_bias, x), conv_weight,
            given(conv_bias, x), given(h, a)[:, :, first:], a[:, :, first:],
            positions, frames, tokens - first, channels, inner, *x.stride()[:3], tokens, eps,
            key=(power_of_2(positions), frames, channels, inner),
            FRAMES=power_of_2(frames),
            KERNEL=kernel,
            ACTIVATION=activation,
            HAS_NORM=norm_weight is not None,
            HAS_NORM_BIAS=norm_bias is not None,
            HAS_DOWN_BIAS=down_bias is not None,
            HAS_CONV_BIAS=conv_bias is not None,
            SAVES_H=h is not None,
            PRECISION=precision,
            EVEN_K=channels % 64 == 0,
        )  # fmt: skip
    _up(
        lambda meta: (cdiv(rows, meta["ROWS"]) * cdiv(channels, meta["BLOCK_N"]),),
        a, up_weight, given(up_bias, x), x, out, rows, frames, tokens, channels, inner, *x.stride()[:3],
        key=(power_of_2(rows), channels, inner),
        CLASS_TOKEN=class_token,
        RESIDUAL=residual,
        HAS_BIAS=up_bias is not None,
        PRECISION=precision,
        EVEN_K=inner % 64 == 0,
    )  # fmt: skip


def convolve(h: Tensor, weight: Tensor, bias: Tensor | None, activation: str, class_token: bool, out: Tensor) -> None:
    """Writes activation(conv(h)) of patches to `out`. Rows of class tokens are not written.

    Args:
        h, out: `(batch, frames, tokens, inner)`. weight: `(inner, kernel)`. bias: `(inner,)`. All contiguous.
    """
    batch, frames, tokens, inner = h.shape
    first = int(class_token)
    if batch * frames * (tokens - first) == 0:
        return
    _convolution(
        lambda meta: (
            cdiv(tokens - first, meta["PATCHES"]) * cdiv(inner, meta["BLOCK"]),
            batch * cdiv(frames, meta["FRAMES"]),
        ),
        h[:, :, first:], weight, given(bias, h), out[:, :, first:], frames, tokens - first, inner, tokens,
        key=(power_of_2(batch * tokens), frames, inner),
        KERNEL=weight.shape[1],
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
    )  # fmt: skip


def backward(
    h: Tensor,
    da: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    activation: str,
    class_token: bool,
    a: Tensor,
    dh: Tensor,
) -> Tensor:
    """Gradients of the convolution and the activation.

    Args:
        h: the result of the down-projection. Its rows of class tokens are not read.
        da: the gradient of the up-projection's input.
        a, dh: outputs: the up-projection's input, and the gradient of h. Rows of class tokens become zeros. All four
            are `(batch, frames, tokens, inner)`, contiguous.

    Returns the gradients of conv_weight, one row per tap, of conv_bias and of down_bias, `(kernel + 2, inner)` in
    float32.
    """
    batch, frames, tokens, inner = da.shape
    kernel, positions = conv_weight.shape[1], batch * tokens
    rows = max(128 if interpreted() else 32, power_of_2(frames))
    tiles = cdiv(positions, rows // power_of_2(frames))
    sums = h.new_empty((tiles, kernel + 2, inner), dtype=torch.float32)
    _backward(
        lambda meta: (tiles, cdiv(inner, meta["BLOCK"])),
        h, da, conv_weight, given(conv_bias, h), a, dh, sums, positions, frames, tokens, inner,
        key=(power_of_2(positions), frames, inner),
        FRAMES=power_of_2(frames),
        ROWS=rows,
        KERNEL=kernel,
        ACTIVATION=activation,
        HAS_CONV_BIAS=conv_bias is not None,
        CLASS_TOKEN=class_token,
    )  # fmt: skip
    return sums.sum(dim=0)
