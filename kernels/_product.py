"""Shared by kernels with matrix products: activations, halves of a tile, precision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

QUICK_GELU_SCALE = tl.constexpr(1.702)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        z = z / (1.0 + tl.exp(z * -QUICK_GELU_SCALE))
    elif ACTIVATION == "quick_gelu_tanh":
        half = 0.5 * z
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half * QUICK_GELU_SCALE], dtype=tl.float32, is_pure=True, pack=1
        )
        z = half + half * tanh
    return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative of the activation."""
    if ACTIVATION == "none":
        return tl.full(z.shape, 1.0, tl.float32)
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    sigmoid = 1.0 / (1.0 + tl.exp(z * -QUICK_GELU_SCALE))
    return sigmoid * (1.0 + z * QUICK_GELU_SCALE * (1.0 - sigmoid))


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns. Epilogues process one after the other to save registers."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tile.reshape(rows, 2, half).permute(0, 2, 1).split()


def approximate(activation: str, dtype: torch.dtype) -> str:
    """The formula of an activation for results of that type.

    QuickGELU equals z/2·(1 + tanh(0.851·z)), with one special function instead of two. Its error of up to 2⁻¹¹ is a
    quarter of bfloat16's rounding error.
    """
    return "quick_gelu_tanh" if activation == "quick_gelu" and dtype == torch.bfloat16 else activation


def precision_of(dtype: torch.dtype) -> str | None:
    """The precision of products of that type: float32 uses TF32 only if PyTorch is set to."""
    if dtype != torch.float32:
        return None
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
