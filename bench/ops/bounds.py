"""What bounds each operator: a simpler computation, measured in turns with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import ceilings
from mplug2_fast.ops import layer_norm, linear_act, pack_weight
from mplug2_fast.ops.attention import attention_torch
from mplug2_fast.ops.linear_fp8 import quantise_rows
from mplug2_fast.ops.runtime import onednn

Arguments = dict[str, Any]
Prepare = Callable[[Arguments], Callable[[], Any]]
"""From an operator's arguments to a callable without arguments."""


@dataclass(frozen=True)
class Bound:
    """A computation beside an operator. It runs on the devices that `devices` names."""

    name: str
    prepare: Prepare
    devices: tuple[str, ...] = ("cpu", "cuda")


def copy_of(*names: str) -> Prepare:
    """Copies of the named arguments: the same traffic without arithmetic."""

    def prepare(arguments: Arguments) -> Callable[[], Any]:
        sources = [arguments[name].contiguous() for name in names]
        targets = [torch.empty_like(source) for source in sources]

        def run() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        return run

    return prepare


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product alone, by the fastest that PyTorch has for the device."""
    fast = x.is_cpu and onednn.multiplies(x.dtype)  # otherwise oneDNN refuses the dtype, or PyTorch chooses it anyway
    return onednn.linear(x, weight, bias) if fast else F.linear(x, weight, bias)


def product(arguments: Arguments) -> Callable[[], Any]:
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    return lambda: linear(x, weight, bias)


def bytes_by(way: str) -> Prepare:
    """The product of bytes alone, rounded in advance, by one of PyTorch's ways."""

    def prepare(arguments: Arguments) -> Callable[[], Any]:
        rows = arguments["x"].shape[:-1].numel()
        return ceilings.int8_operators(rows, *reversed(arguments["weight"].shape))[way]

    return prepare


def wide_weight(arguments: Arguments) -> Callable[[], Any]:
    """Our linear layer with the weight in x's dtype, after its norm."""
    x, numbers, scale, bias, activation, residual, *norm = arguments.values()
    weight = (numbers.float() * scale[:, None]).to(x.dtype)
    pack_weight(weight, x.shape[:-1].numel())
    if len(norm) == 3 and norm[0] is not None:
        return lambda: linear_act(layer_norm(x, *norm[:2], eps=norm[2]), weight, bias, activation, residual=residual)
    return lambda: linear_act(x, weight, bias, activation, residual=residual)


def scaled_mm(arguments: Arguments) -> Callable[[], Any]:
    """PyTorch's product of e4m3 numbers, rounded in advance, with a scale for each row and output; bfloat16 out."""
    numbers, scale = quantise_rows(arguments["x"].flatten(0, -2))
    weight, scales = arguments["weight"].t(), arguments["scale"][None]
    return lambda: torch._scaled_mm(numbers, weight, scale, scales, out_dtype=torch.bfloat16)


def both_products(arguments: Arguments) -> Callable[[], Any]:
    """Those of an MLP."""
    x, fc_weight, fc_bias, proj_weight, proj_bias = list(arguments.values())[:5]
    hidden = linear(x, fc_weight, fc_bias)

    def run() -> None:
        linear(x, fc_weight, fc_bias)
        linear(hidden, proj_weight, proj_bias)

    return run


def attention_by(kernel: SDPBackend) -> Prepare:
    """PyTorch's attention by this kernel, or product by product where the kernel does not serve the arguments."""

    def prepare(arguments: Arguments) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel([kernel, SDPBackend.MATH], set_priority=True):
                return attention_torch(*arguments.values())

        return run

    return prepare


BOUNDS: dict[str, tuple[Bound, ...]] = {
    "add_layer_norm": (Bound("copy", copy_of("x", "update")),),  # it reads and writes two tensors
    # On a GPU PyTorch has several kernels and does not always choose the fastest.
    "attention": (
        Bound("SDPA by cuDNN", attention_by(SDPBackend.CUDNN_ATTENTION), devices=("cuda",)),
        Bound("SDPA by flash", attention_by(SDPBackend.FLASH_ATTENTION), devices=("cuda",)),
    ),
    "beam_attention": (Bound("copy of the memory", copy_of("key", "value")),),  # reading it takes half as long
    "beam_attention_int8": (Bound("copy of the memory", copy_of("key", "value")),),
    "layer_norm": (Bound("copy", copy_of("x")),),
    "linear_act": (Bound("GEMM", product),),
    "linear_fp8": (
        Bound("_scaled_mm", scaled_mm, devices=("cuda",)),
        Bound("linear_act", wide_weight),
    ),
    "linear_int8": (
        Bound("_int_mm", bytes_by("_int_mm"), devices=("cpu",)),
        Bound("qlinear", bytes_by("oneDNN qlinear, packed"), devices=("cpu",)),
        Bound("linear_act", wide_weight),
    ),
    "mlp": (Bound("two GEMMs", both_products),),
    "norm_linear_act": (Bound("GEMM", product),),
}
