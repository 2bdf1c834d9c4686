"""Converts decoded frames to the pixels that the vision encoder was trained on."""

from __future__ import annotations

import functools
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from mplug2_fast._native import native_error
from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Spec

# Mean and standard deviation of CLIP's training images, per channel, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Layout = tuple[int, int, int, int, int]
"""The side of a patch, then the result's strides by frame, row of patches, patch and channel. Inside its patch, a pixel
is at row·side + column. Without patches, the image is one patch."""


class Arguments(NamedTuple):
    frames: Annotated[Tensor, "(frames, height, width, 3), uint8"]
    image_size: int
    dtype: torch.dtype
    patch_size: int | None

    @property
    def result_shape(self) -> tuple[int, ...]:
        count, size, patch = self.frames.shape[0], self.image_size, self.patch_size
        return (3, count, size, size) if patch is None else (count, (size // patch) ** 2, 3 * patch**2)

    @property
    def layout(self) -> Layout:
        size, patch = self.image_size, self.patch_size
        if patch is None:
            return size, size**2, 0, 0, self.frames.shape[0] * size**2
        return patch, 3 * size**2, 3 * patch * size, 3 * patch**2, patch**2


def make_inputs(
    generator: torch.Generator,
    *,
    frames: int,
    height: int,
    width: int,
    size: int,
    patch_size: int | None = None,
    strided: bool = False,
) -> Arguments:
    shape = (frames, height + strided, width * (1 + strided), 3 + strided)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    pixels = pixels[:, :height, ::2, :3] if strided else pixels
    return Arguments(pixels, size, torch.float32, patch_size)


def check(a: Arguments) -> None:
    if a.frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8 values from 0 to 255, got {a.frames.dtype}")
    if a.frames.dim() != 4 or a.frames.shape[3] != 3:
        raise ValueError(f"frames must have shape (frames, height, width, 3), got {tuple(a.frames.shape)}")
    if 0 in a.frames.shape:
        raise ValueError(f"frames of shape {tuple(a.frames.shape)} have no pixels")
    _check_size("image_size", a.image_size)
    if a.patch_size is not None:
        _check_size("patch_size", a.patch_size)
        if a.image_size % a.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size, got {a.image_size} and {a.patch_size}")
    if a.dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16 or float64, got {a.dtype}")


def _check_size(name: str, size: int | None) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 1:
        raise ValueError(f"{name} must be a whole number of pixels, at least 1, got {size!r}")


def _normalise(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes `(3, ...)` to normalised values."""
    # Tensors, because a GPU turns a division by a Python number into a product with its inverse. Filled on the device,
    # because a copy from the host would end the capture of a CUDA graph.
    full, *parts = (
        torch.full((1,), number, dtype=torch.float32, device=values.device) for number in (255.0, *MEAN, *STD)
    )
    shape = (3,) + (1,) * (values.dim() - 1)
    mean, std = torch.cat(parts[:3]).view(shape), torch.cat(parts[3:]).view(shape)
    return values.to(torch.float32).div_(full).sub_(mean).div_(std).to(dtype)


def _in_patches(pixels: Tensor, patch_size: int | None) -> Tensor:
    """(3, frames, size, size) to (frames, patches, 3·patch_size²). Unchanged if patch_size is None."""
    if patch_size is None:
        return pixels
    grid = pixels.shape[2] // patch_size
    parts = pixels.view(3, -1, grid, patch_size, grid, patch_size)
    return parts.permute(1, 2, 4, 0, 3, 5).contiguous().view(-1, grid**2, 3 * patch_size**2)


def reference(a: Arguments) -> Tensor:
    """One pixel at a time. Computes in float32 whatever the dtype of the result."""
    count, height, width, _ = a.frames.shape
    size = a.image_size
    pixels = torch.empty(3, count, size, size, dtype=torch.uint8, device=a.frames.device)
    for y in range(size):
        for x in range(size):
            pixels[:, :, y, x] = a.frames[:, y * height // size, x * width // size].t()
    return _in_patches(_normalise(pixels, a.dtype), a.patch_size)


def run_torch(a: Arguments) -> Tensor:
    # A result that cannot be allocated fails here, before its indices take gigabytes.
    a.frames.new_empty(3, len(a.frames), a.image_size, a.image_size)
    target = torch.arange(a.image_size, device=a.frames.device)
    rows, columns = (target * size // a.image_size for size in a.frames.shape[1:3])
    squashed = a.frames.index_select(1, rows).index_select(2, columns)
    return _in_patches(_normalise(squashed.permute(3, 0, 1, 2).contiguous(), a.dtype), a.patch_size)


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """The value of each byte in each channel, `(3, 256)`."""
    return _normalise(torch.arange(256, device="cpu").expand(3, 256), dtype).contiguous()


def run_cpu(a: Arguments) -> Tensor:
    table = _table(a.dtype)
    out = torch.empty(a.result_shape, dtype=a.dtype, device="cpu")
    cpu.module().preprocess_frames(
        a.frames.data_ptr(),
        a.frames.shape[:3],
        a.frames.stride(),
        a.image_size,
        a.layout,
        table.data_ptr(),
        table.element_size(),
        out.data_ptr(),
        cpu.threads(out.numel()),
    )
    return out


def run_triton(a: Arguments) -> Tensor:
    out = a.frames.new_empty(a.result_shape, dtype=a.dtype)
    triton.kernels("preprocess_frames").preprocess_frames(a.frames, a.image_size, a.layout, MEAN, STD, out)
    return out


def triton_reasons(a: Arguments) -> list[str]:
    reasons = triton.dtype_reasons(a.dtype)
    if (largest := a.image_size * max(a.image_size, *a.frames.shape[1:3])) >= 2**31:
        reasons.append(
            f"the Triton kernel uses 32-bit indices: image_size times the larger side must be below 2^31, got {largest}"
        )
    return reasons


SPEC = Spec(
    name="preprocess_frames",
    arguments=Arguments,
    results=("(3, frames, image_size, image_size); with patch_size (frames, patches, 3·patch_size²)",),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
        {"frames": 1, "height": 1, "width": 1, "size": 1},
        {"frames": 2, "height": 5, "width": 7, "size": 3},
        {"frames": 3, "height": 4, "width": 2, "size": 9},
        {"frames": 1, "height": 31, "width": 17, "size": 14},
        {"frames": 2, "height": 33, "width": 20, "size": 16, "strided": True},
        {"frames": 2, "height": 19, "width": 40, "size": 12, "patch_size": 4, "strided": True},
        {"frames": 3, "height": 9, "width": 11, "size": 15, "patch_size": 5},
        {"frames": 2, "height": 6, "width": 5, "size": 7, "patch_size": 7},
        {"frames": 1, "height": 70, "width": 50, "size": 42, "patch_size": 1},
    ),
    models={
        "base": {"frames": 16, "height": 720, "width": 1280, "size": 224},
        "large": {"frames": 16, "height": 720, "width": 1280, "size": 224},
        "large, patches": {"frames": 16, "height": 720, "width": 1280, "size": 224, "patch_size": 14},
    },
    count_flops=lambda a: 3 * 3 * a.frames.shape[0] * a.image_size**2,
    exact=True,
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, lambda a: [str(error)] if (error := native_error()) else [], devices=("cpu",)),
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch),
    ],
    fake=lambda a: a.frames.new_empty(a.result_shape, dtype=a.dtype),
    check=check,
)


@OP.public
def preprocess_frames(
    frames: Tensor, image_size: int, dtype: torch.dtype = torch.float32, *, patch_size: int | None = None
) -> Tensor:
    """Resizes frames to a square by nearest neighbour and normalises them, as the official pipeline does at test time.

    A target pixel takes the source pixel at index `target * source_size // image_size`. Its value is
    `(x / 255 - MEAN) / STD` in float32, rounded to `dtype`. All backends return the same bits.

    Args:
        frames: `(frames, height, width, 3)`, uint8, RGB, any strides, any device.
        image_size: height and width of the result, in pixels.
        dtype: any floating-point type of 16 bits or more.
        patch_size: side of the square patches, in pixels. The result then has one row per patch, for models whose patch
            embedding is a linear layer.

    Returns:
        `(3, frames, image_size, image_size)`, contiguous, on the device of `frames`. With `patch_size`:
        `(frames, patches, 3·patch_size²)`; patches in row-major order, each one channel by channel.

    Raises:
        TypeError: frames that are not uint8, or an unsupported dtype.
        ValueError: frames of another shape or without pixels, an image_size below 1 or not a multiple of patch_size.
    """
    return OP(frames, image_size, dtype, patch_size)
