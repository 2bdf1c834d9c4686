"""Attention by flash_attn and xformers, if installed."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import packages

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
CAPABILITY = (8, 0)
ALIGNMENT = 8
"""Elements per load."""


def flash_attn(query: Tensor, key: Tensor, value: Tensor, _: None, causal: bool) -> Tensor:
    package = importlib.import_module("flash_attn")
    out = package.flash_attn_func(*map(_aligned, (query, key, value)), causal=causal)
    return out.flatten(2).contiguous()


def flash_attn_reasons(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, _: bool
) -> list[str]:
    if error := packages.error("flash_attn", "pip install flash-attn --no-build-isolation"):
        return [error]
    reasons = _reasons("flash_attn", query, key, value)
    if key_padding_mask is not None:
        reasons.append("flash_attn has no key_padding_mask for padded batches")
    return reasons


def xformers(query: Tensor, key: Tensor, value: Tensor, _: None, causal: bool) -> Tensor:
    package = importlib.import_module("xformers.ops")
    bias = package.LowerTriangularMask() if causal else None
    out = package.memory_efficient_attention(*map(_aligned, (query, key, value)), attn_bias=bias)
    return out.flatten(2).contiguous()


def xformers_reasons(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, _: bool) -> list[str]:
    if error := packages.error("xformers.ops", "pip install xformers"):
        return [error]
    reasons = _reasons("xformers", query, key, value)
    if key_padding_mask is not None:
        reasons.append("xformers supports a key_padding_mask only as a bias for all scores")
    if query.shape[-1] % ALIGNMENT:
        reasons.append(f"xformers supports heads of a multiple of {ALIGNMENT} channels, got {query.shape[-1]}")
    return reasons


def _reasons(package: str, query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Requirements of both packages' tensor core kernels."""
    reasons = []
    if query.dtype not in DTYPES:
        reasons.append(f"{package} supports float16 and bfloat16, got {query.dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            reasons.append(f"{name} is {tensor.dtype}, the first argument {query.dtype}")
    if query.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"{package} supports heads of up to {MAX_HEAD_DIM} channels, got {query.shape[-1]}")
    if query.numel() == 0 or key.numel() == 0:
        reasons.append(f"{package} does not support empty batches or sequences")
    if query.device.type == "cuda" and (found := torch.cuda.get_device_capability(query.device)) < CAPABILITY:
        reasons.append(f"{package} supports compute capability 8.0 and higher, got {found[0]}.{found[1]}")
    return reasons


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its rows are not aligned for vector loads."""
    *strides, last = tensor.stride()
    fits = last == 1 and all(stride % ALIGNMENT == 0 for stride in strides)
    if fits and tensor.data_ptr() % (ALIGNMENT * tensor.element_size()) == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
