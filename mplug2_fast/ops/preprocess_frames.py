"""Decoded frames to the pixels that the vision encoder was trained on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mplug2_fast._native import native, native_error, warn_without_native

# Mean and standard deviation of CLIP's training images, by channel, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Backend = Literal["auto", "native", "torch"]


def preprocess_frames(
    frames: Tensor,
    image_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Squashes frames to a square by nearest neighbour and normalises them as the released pipeline does at test time.

    A target pixel takes the source pixel at index `target * source_size // image_size`; its value is
    `(x / 255 - MEAN) / STD`, in float32, rounded to `dtype`. All backends give the same bits.

    Args:
        frames: (frames, height, width, 3), uint8, RGB, any strides, any device.
        image_size: height and width of the result, in pixels.
        dtype: any floating-point type of 16 bits or more.
        backend: "native" is the C++ operator, for frames on the CPU, with as many threads as `torch.get_num_threads()`;
            "torch" runs everywhere; "auto" is the first that can serve.

    Returns:
        (3, frames, image_size, image_size), contiguous, on the device of `frames`.

    Raises:
        TypeError: frames that are not uint8, or a dtype that is not floating point.
        ValueError: frames of another shape or without pixels, an image size below 1, an unknown backend.
        RuntimeError: backend "native" where it cannot serve.
    """
    _check(frames, image_size, dtype)
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f'backend is {backend!r}: it must be "auto", "native" or "torch"')
    reasons = native_not_supported_reasons(frames) if backend != "torch" else []
    if backend == "native" and reasons:
        raise RuntimeError(
            f"preprocess_frames cannot run natively on frames of shape {tuple(frames.shape)} on {frames.device}: "
            + "; ".join(reasons)
        )
    if backend == "torch" or reasons:
        if backend == "auto" and frames.device.type == "cpu":
            warn_without_native()
        return _preprocess_torch(frames, image_size, dtype)
    return _preprocess_native(frames, image_size, dtype)


def native_not_supported_reasons(frames: Tensor) -> list[str]:
    """Why the native operator cannot serve these frames; empty when it can, and then "auto" takes it."""
    reasons = []
    if frames.device.type != "cpu":
        reasons.append(f"the native operator is for frames on the CPU, these are on {frames.device}")
    if error := native_error():
        reasons.append(str(error))
    return reasons


def _check(frames: Tensor, image_size: int, dtype: torch.dtype) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8 values from 0 to 255, not {frames.dtype}")
    if frames.dim() != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must have shape (frames, height, width, 3), not {tuple(frames.shape)}")
    if 0 in frames.shape:
        raise ValueError(f"frames of shape {tuple(frames.shape)} have no pixels")
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size must be a whole number of pixels, at least 1, not {image_size!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16 or float64, not {dtype}")


def _normalise(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes, (3, ...), to normalised values."""
    # Tensors, not Python numbers, because on a GPU a division by a number becomes a product with its inverse.
    shape = (3,) + (1,) * (values.dim() - 1)
    mean, std = (torch.tensor(numbers, device=values.device).view(shape) for numbers in (MEAN, STD))
    full = torch.tensor(255.0, device=values.device)
    full = full.view((1,) * values.dim())
    return values.to(torch.float32).div_(full).sub_(mean).div_(std).to(dtype)


def _preprocess_torch(frames: Tensor, image_size: int, dtype: torch.dtype) -> Tensor:
    target = torch.arange(image_size, device=frames.device)
    rows, columns = (target * size // image_size for size in frames.shape[1:3])
    squashed = frames.index_select(1, rows).index_select(2, columns)
    return _normalise(squashed.permute(3, 0, 1, 2).contiguous(), dtype)


def _preprocess_native(frames: Tensor, image_size: int, dtype: torch.dtype) -> Tensor:
    module = native()
    assert module is not None
    count, height, width, _ = frames.shape
    table = _normalise(torch.arange(256, device="cpu").expand(3, 256), dtype).contiguous()
    output = torch.empty((3, count, image_size, image_size), dtype=dtype, device="cpu")
    module.preprocess_frames(
        frames.data_ptr(),
        (count, height, width),
        frames.stride(),
        image_size,
        table.data_ptr(),
        table.element_size(),
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output
