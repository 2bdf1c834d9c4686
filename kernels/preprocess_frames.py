"""Converts decoded frames to normalised pixels, as whole frames or patches, in one pass.

Each pixel reads three bytes and writes three values, in the order of the result in memory. Source rows that no target
row needs are not read. Both divisions are IEEE divisions, so that all backends give the same bits; their time is hidden
by the memory accesses.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, cdiv, power_of_2
from mplug2_fast.kernels._tuning import Config


@triton.jit
def _normalised(byte, mean, std):
    whole = tl.zeros_like(byte) + 255.0
    return tl.div_rn(tl.div_rn(byte, whole) - mean, tl.zeros_like(byte) + std)


@triton.jit
def preprocess_frames_forward(
    frames, out, height, width, frame_in, row_in, column_in, channel_in,
    frame_out, band_out, patch_out, channel_out,
    mean_red, mean_green, mean_blue, std_red, std_green, std_blue,
    SIZE: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of a frame of SIZE × SIZE, patch by patch of SIDE × SIDE, row by row within a patch."""
    blocks: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    there = pixel < SIZE * SIZE
    patch, within = pixel // (SIDE * SIDE), pixel % (SIDE * SIDE)
    band, beside = patch // (SIZE // SIDE), patch % (SIZE // SIDE)
    row = (band * SIDE + within // SIDE) * height // SIZE
    column = (beside * SIDE + within % SIDE) * width // SIZE
    source = frames + frame * frame_in + row.to(tl.int64) * row_in + column.to(tl.int64) * column_in
    target = out + frame * frame_out + band.to(tl.int64) * band_out + beside.to(tl.int64) * patch_out + within
    step_in, step_out = tl.cast(channel_in, tl.int64), tl.cast(channel_out, tl.int64)
    red = tl.load(source, there, 0).to(tl.float32)
    green = tl.load(source + step_in, there, 0).to(tl.float32)
    blue = tl.load(source + 2 * step_in, there, 0).to(tl.float32)
    tl.store(target, _normalised(red, mean_red, std_red), there)
    tl.store(target + step_out, _normalised(green, mean_green, std_green), there)
    tl.store(target + 2 * step_out, _normalised(blue, mean_blue, std_blue), there)


_forward = Kernel(
    preprocess_frames_forward,
    [Config({"BLOCK": 512}), Config({"BLOCK": 256}), Config({"BLOCK": 1024}), Config({"BLOCK": 1024}, num_warps=8)],
    Config({"BLOCK": 2048}),
)


def preprocess_frames(
    frames: Tensor,
    image_size: int,
    layout: tuple[int, int, int, int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out: Tensor,
) -> None:
    """(x / 255 - mean) / std of uint8 frames `(frames, height, width, 3)`, any strides, squashed to squares by nearest
    neighbour.

    Args:
        layout: side of a patch, and the strides of `out` by frame, by row of patches, by patch and by channel.
    """
    count, height, width, _ = frames.shape
    side, *strides = layout

    _forward(
        lambda meta: (count * cdiv(image_size**2, meta["BLOCK"]),),
        frames, out, height, width, *frames.stride(), *strides, *mean, *std,
        key=(power_of_2(count),),
        SIZE=image_size,
        SIDE=side,
    )  # fmt: skip
