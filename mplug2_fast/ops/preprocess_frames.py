"""Decoded frames to the pixels that the vision encoder was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplug2_fast._native import native_error
from mplug2_fast.ops import native
from mplug2_fast.ops.dispatch import Backend, Op
from mplug2_fast.ops.spec import Spec

# Mean and standard deviation of CLIP's training images, by channel, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _normalise(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes, (3, ...), to normalised values."""
    # Tensors, not Python numbers, because on a GPU a division by a number becomes a product with its inverse.
    shape = (3,) + (1,) * (values.dim() - 1)
    mean, std = (torch.tensor(numbers, device=values.device).view(shape) for numbers in (MEAN, STD))
    full = torch.tensor(255.0, device=values.device)
    full = full.view((1,) * values.dim())
    return values.to(torch.float32).div_(full).sub_(mean).div_(std).to(dtype)


def reference(frames: Tensor, image_size: int, dtype: torch.dtype, *, upcast: bool = False) -> Tensor:
    """One pixel after another; what comes out is the same with and without `upcast`, for all is done in float32."""
    count, height, width, _ = frames.shape
    pixels = torch.empty(3, count, image_size, image_size, dtype=torch.uint8, device=frames.device)
    for y in range(image_size):
        for x in range(image_size):
            pixels[:, :, y, x] = frames[:, y * height // image_size, x * width // image_size].t()
    return _normalise(pixels, torch.float64 if upcast else dtype)


def make(
    generator: torch.Generator, *, frames: int, height: int, width: int, size: int, strided: bool = False
) -> dict[str, Any]:
    shape = (frames, height + strided, width * (1 + strided), 3 + strided)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return {"frames": pixels[:, :height, ::2, :3] if strided else pixels, "image_size": size, "dtype": torch.float32}


def run_torch(frames: Tensor, image_size: int, dtype: torch.dtype) -> Tensor:
    target = torch.arange(image_size, device=frames.device)
    rows, columns = (target * size // image_size for size in frames.shape[1:3])
    squashed = frames.index_select(1, rows).index_select(2, columns)
    return _normalise(squashed.permute(3, 0, 1, 2).contiguous(), dtype)


def run_native(frames: Tensor, image_size: int, dtype: torch.dtype) -> Tensor:
    count, height, width, _ = frames.shape
    table = _normalise(torch.arange(256, device="cpu").expand(3, 256), dtype).contiguous()
    output = torch.empty((3, count, image_size, image_size), dtype=dtype, device="cpu")
    native.module().preprocess_frames(
        frames.data_ptr(),
        (count, height, width),
        frames.stride(),
        image_size,
        table.data_ptr(),
        table.element_size(),
        output.data_ptr(),
        native.threads(output.numel()),
    )
    return output


SPEC = Spec(
    name="preprocess_frames",
    axes={"frames": "(frames, height, width, 3), uint8", "result": "(3, frames, image_size, image_size)"},
    reference=reference,
    make=make,
    awkward=(
        {"frames": 1, "height": 1, "width": 1, "size": 1},
        {"frames": 2, "height": 5, "width": 7, "size": 3},
        {"frames": 3, "height": 4, "width": 2, "size": 9},
        {"frames": 1, "height": 31, "width": 17, "size": 14},
        {"frames": 2, "height": 33, "width": 20, "size": 16, "strided": True},
    ),
    models={
        "base": {"frames": 16, "height": 720, "width": 1280, "size": 224},
        "large": {"frames": 16, "height": 720, "width": 1280, "size": 224},
    },
    flops=lambda frames, image_size, **_: 3 * 3 * frames.shape[0] * image_size**2,
    exact=True,
)

OP = Op(
    SPEC,
    "(Tensor frames, int image_size, ScalarType dtype) -> Tensor",
    [
        Backend("cpu", run_native, lambda *_: [str(error)] if (error := native_error()) else [], devices=("cpu",)),
        Backend("torch", run_torch),
    ],
    fake=lambda frames, image_size, dtype: frames.new_empty((3, frames.shape[0], image_size, image_size), dtype=dtype),
)


@OP.public
def preprocess_frames(frames: Tensor, image_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Squashes frames to a square by nearest neighbour and normalises them as the released pipeline does at test time.

    A target pixel takes the source pixel at index `target * source_size // image_size`; its value is
    `(x / 255 - MEAN) / STD`, in float32, rounded to `dtype`. All backends give the same bits.

    Args:
        frames: (frames, height, width, 3), uint8, RGB, any strides, any device.
        image_size: height and width of the result, in pixels.
        dtype: any floating-point type of 16 bits or more.

    Returns:
        (3, frames, image_size, image_size), contiguous, on the device of `frames`.

    Raises:
        TypeError: frames that are not uint8, or a dtype that is not floating point.
        ValueError: frames of another shape or without pixels, or an image size below 1.
    """
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8 values from 0 to 255, not {frames.dtype}")
    if frames.dim() != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must have shape (frames, height, width, 3), not {tuple(frames.shape)}")
    if 0 in frames.shape:
        raise ValueError(f"frames of shape {tuple(frames.shape)} have no pixels")
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size must be a whole number of pixels, at least 1, not {image_size!r}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16 or float64, not {dtype}")
    return frames, image_size, dtype  # type: ignore[return-value]
