"""Decoded frames to the pixels that the vision encoder was trained on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mplug2_fast._native import native_error
from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.spec import Spec

# Mean and standard deviation of CLIP's training images, by channel, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


Layout = tuple[int, int, int, int, int]
"""Side of a patch; strides of the result by frame, by row of patches, by patch, by channel. A pixel lies at these and,
within its patch, at row·side + column; without patches the image is one."""


def _normalise(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes, (3, ...), to normalised values."""
    # Tensors, not Python numbers, because on a GPU a division by a number becomes a product with its inverse; filled
    # where they are, for a copy from the host would end the capture of a CUDA graph.
    full, *parts = (
        torch.full((1,), number, dtype=torch.float32, device=values.device) for number in (255.0, *MEAN, *STD)
    )
    shape = (3,) + (1,) * (values.dim() - 1)
    mean, std = torch.cat(parts[:3]).view(shape), torch.cat(parts[3:]).view(shape)
    return values.to(torch.float32).div_(full).sub_(mean).div_(std).to(dtype)


def _in_patches(pixels: Tensor, patch_size: int | None) -> Tensor:
    """(3, frames, size, size) to (frames, patches, 3·patch_size²); as it is where patch_size is None."""
    if patch_size is None:
        return pixels
    grid = pixels.shape[2] // patch_size
    parts = pixels.view(3, -1, grid, patch_size, grid, patch_size)
    return parts.permute(1, 2, 4, 0, 3, 5).contiguous().view(-1, grid**2, 3 * patch_size**2)


def _shape(frames: Tensor, image_size: int, patch_size: int | None) -> tuple[int, ...]:
    if patch_size is None:
        return 3, frames.shape[0], image_size, image_size
    return frames.shape[0], (image_size // patch_size) ** 2, 3 * patch_size**2


def _layout(frames: Tensor, image_size: int, patch_size: int | None) -> Layout:
    if patch_size is None:
        return image_size, image_size**2, 0, 0, frames.shape[0] * image_size**2
    return patch_size, 3 * image_size**2, 3 * patch_size * image_size, 3 * patch_size**2, patch_size**2


def reference(
    frames: Tensor, image_size: int, dtype: torch.dtype, patch_size: int | None, *, upcast: bool = False
) -> Tensor:
    """One pixel after another; what comes out is the same with and without `upcast`, for all is done in float32."""
    count, height, width, _ = frames.shape
    pixels = torch.empty(3, count, image_size, image_size, dtype=torch.uint8, device=frames.device)
    for y in range(image_size):
        for x in range(image_size):
            pixels[:, :, y, x] = frames[:, y * height // image_size, x * width // image_size].t()
    return _in_patches(_normalise(pixels, torch.float64 if upcast else dtype), patch_size)


def make(
    generator: torch.Generator,
    *,
    frames: int,
    height: int,
    width: int,
    size: int,
    patch_size: int | None = None,
    strided: bool = False,
) -> dict[str, Any]:
    shape = (frames, height + strided, width * (1 + strided), 3 + strided)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    pixels = pixels[:, :height, ::2, :3] if strided else pixels
    return {"frames": pixels, "image_size": size, "dtype": torch.float32, "patch_size": patch_size}


def run_torch(frames: Tensor, image_size: int, dtype: torch.dtype, patch_size: int | None) -> Tensor:
    target = torch.arange(image_size, device=frames.device)
    rows, columns = (target * size // image_size for size in frames.shape[1:3])
    squashed = frames.index_select(1, rows).index_select(2, columns)
    return _in_patches(_normalise(squashed.permute(3, 0, 1, 2).contiguous(), dtype), patch_size)


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """What becomes of each byte of each channel, (3, 256)."""
    return _normalise(torch.arange(256, device="cpu").expand(3, 256), dtype).contiguous()


def run_native(frames: Tensor, image_size: int, dtype: torch.dtype, patch_size: int | None) -> Tensor:
    table = _table(dtype)
    output = torch.empty(_shape(frames, image_size, patch_size), dtype=dtype, device="cpu")
    cpu.module().preprocess_frames(
        frames.data_ptr(),
        frames.shape[:3],
        frames.stride(),
        image_size,
        _layout(frames, image_size, patch_size),
        table.data_ptr(),
        table.element_size(),
        output.data_ptr(),
        cpu.threads(output.numel()),
    )
    return output


def run_triton(frames: Tensor, image_size: int, dtype: torch.dtype, patch_size: int | None) -> Tensor:
    output = frames.new_empty(_shape(frames, image_size, patch_size), dtype=dtype)
    layout = _layout(frames, image_size, patch_size)
    triton.kernels("preprocess_frames").preprocess_frames(frames, image_size, layout, MEAN, STD, output)
    return output


def triton_reasons(frames: Tensor, image_size: int, dtype: torch.dtype, _: int | None) -> list[str]:
    reasons = triton.dtype_reasons(dtype)
    if (largest := image_size * max(image_size, *frames.shape[1:3])) >= 2**31:
        reasons.append(f"the Triton kernel counts in 32 bits, and image_size times the larger side is {largest}")
    return reasons


def check(frames: Tensor, image_size: int, dtype: torch.dtype, patch_size: int | None) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8 values from 0 to 255, not {frames.dtype}")
    if frames.dim() != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must have shape (frames, height, width, 3), not {tuple(frames.shape)}")
    if 0 in frames.shape:
        raise ValueError(f"frames of shape {tuple(frames.shape)} have no pixels")
    _check_size("image_size", image_size)
    if patch_size is not None:
        _check_size("patch_size", patch_size)
        if image_size % patch_size:
            raise ValueError(f"patches of {patch_size} pixels do not fill an image_size of {image_size}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16 or float64, not {dtype}")


SPEC = Spec(
    name="preprocess_frames",
    axes={
        "frames": "(frames, height, width, 3), uint8",
        "result": "(3, frames, image_size, image_size); with patch_size (frames, patches, 3·patch_size²)",
    },
    reference=reference,
    make=make,
    awkward=(
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
    flops=lambda frames, image_size, **_: 3 * 3 * frames.shape[0] * image_size**2,
    exact=True,
)

OP = Op(
    SPEC,
    "(Tensor frames, int image_size, ScalarType dtype, int? patch_size) -> Tensor",
    [
        Backend("cpu", run_native, lambda *_: [str(error)] if (error := native_error()) else [], devices=("cpu",)),
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch),
    ],
    fake=lambda frames, image_size, dtype, patch_size: frames.new_empty(
        _shape(frames, image_size, patch_size), dtype=dtype
    ),
    check=check,
)


@OP.public
def preprocess_frames(
    frames: Tensor, image_size: int, dtype: torch.dtype = torch.float32, *, patch_size: int | None = None
) -> Tensor:
    """Squashes frames to a square by nearest neighbour and normalises them as the released pipeline does at test time.

    A target pixel takes the source pixel at index `target * source_size // image_size`; its value is
    `(x / 255 - MEAN) / STD`, in float32, rounded to `dtype`. All backends give the same bits.

    Args:
        frames: (frames, height, width, 3), uint8, RGB, any strides, any device.
        image_size: height and width of the result, in pixels.
        dtype: any floating-point type of 16 bits or more.
        patch_size: side of the square patches, in pixels, that the result is cut into: the rows by which a model whose
            patch embedding is one product multiplies.

    Returns:
        (3, frames, image_size, image_size), contiguous, on the device of `frames`; with `patch_size` (frames, patches,
        3·patch_size²), patches row by row, within a patch channel by channel and row by row.

    Raises:
        TypeError: frames that are not uint8, or a dtype that is not floating point.
        ValueError: frames of another shape or without pixels, an image size below 1, or patches that do not fill it.
    """
    return frames, image_size, dtype, patch_size  # type: ignore[return-value]


def _check_size(name: str, size: int | None) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 1:
        raise ValueError(f"{name} must be a whole number of pixels, at least 1, not {size!r}")
