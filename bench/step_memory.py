"""Peak memory of a captioning step with recomputed activations under bfloat16 autocast: counted, and measured on a CPU.

python -m bench.step_memory --preset large                # computes a Large step
python -m bench.step_memory --preset large --no-products  # much faster: matrix products only write zeros
"""

from __future__ import annotations

import argparse
import ctypes

import torch
from torch import Tensor

from bench import inputs, memory
from bench.implementations import Fast
from bench.process import run
from mplug2_fast import MPlug2Config
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning

WIDE, NARROW = 4, 2
"""Bytes of a number in weights and residual streams, and in other tensors under autocast."""
CAPTION_TOKENS = 20


def count(config: MPlug2Config, frames: int) -> dict[str, int]:
    """Bytes of each part at the peak, for one video and without libraries.

    The peak is at the end of the backward pass. Every parameter has a gradient, and the first layer of the vision
    encoder, which has more rows than any other, is computed again. By then the inputs that other
    layers kept are freed. Each took less memory than the gradients that its layer got.
    """
    vision = config.vision
    model = MPlug2ForCaptioning(config, device="meta")
    parameters, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.visual.blocks[0]))
    values = vision.output_frames(frames) * (1 + vision.num_patches) * vision.width
    streams = 5 * WIDE  # the input, the result of each of the four parts
    saved = 9 * NARROW  # the inputs of two temporal modules, the norm, queries, keys, values, heads, the MLP's input
    hidden = 3 * vision.mlp_ratio * NARROW  # in the MLP's backward pass: before and after the activation, gradient
    return {
        "weights": WIDE * parameters,
        "gradients": WIDE * parameters,
        "moments of the optimizer": 2 * WIDE * parameters,
        "input and gradient of the layer": 2 * WIDE * values,
        "the layer, computed again": (streams + saved + hidden) * values + NARROW * block,
    }


def measured(preset: str, frames: int, *, products: bool = True) -> int:
    """The bytes that a step needs at its peak, without those of the libraries. It runs in a new process.

    Args:
        products: False writes zeros instead of computing matrix products and attention. Tensors have the same sizes,
            and the step is much faster.
    """
    return run("the step", _peak, preset, frames, products)


def _peak(preset: str, frames: int, products: bool) -> int:
    libc = ctypes.CDLL(None)
    for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: freed memory goes back at once
        libc.mallopt(setting, 1 << 16)
    library = None if products else _without_products()
    config = MPlug2Config.preset(preset)
    video = torch.randn(1, 3, frames, config.vision.image_size, config.vision.image_size)
    caption = inputs.text(config.text.vocab_size, [CAPTION_TOKENS], 0)
    memory.give_back()
    before = memory.held("cpu")
    fast = Fast(config, torch.bfloat16, "cpu", 1, 1, "captioning step")
    for parameter in fast.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fast.optimizer.step()  # makes the moments
    fast.optimizer.zero_grad()
    memory.give_back()
    memory.reset_peak("cpu")
    fast.step((video, *caption), checkpointed=True)
    del library
    return memory.peak("cpu") - before


def _without_products() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return a.new_zeros(a.shape[0], b.shape[1])

    def addmm(_: Tensor, a: Tensor, b: Tensor, **options: float) -> Tensor:
        return mm(a, b)

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        return a.new_zeros(a.shape[0], a.shape[1], b.shape[2])

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **options: object) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32).transpose(1, 2)

    def attention_backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **options: object
    ) -> tuple[Tensor, ...]:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

    for name, function in {
        "mm": mm,
        "addmm": addmm,
        "bmm": bmm,
        "_scaled_dot_product_flash_attention_for_cpu": attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
    }.items():
        library.impl(name, function, "CPU")
    return library


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.step_memory", description=__doc__)
    parser.add_argument("--preset", choices=("tiny", "base", "large"), default="large")
    parser.add_argument("--frames", type=int, help="of the video (default: the preset's)")
    parser.add_argument("--no-products", action="store_true", help="write zeros instead of computing products")
    options = parser.parse_args()
    config = MPlug2Config.preset(options.preset)
    frames = options.frames or config.vision.num_frames
    parts = count(config, frames)
    for name, size in parts.items():
        print(f"{name}: {size / 1e9:.2f} GB")
    total = sum(parts.values())
    peak = measured(options.preset, frames, products=not options.no_products)
    print(f"counted {total / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB: {100 * (peak / total - 1):+.1f}%")


if __name__ == "__main__":
    main()
