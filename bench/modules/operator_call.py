"""The overhead of calling an operator: a tiny layer norm called many times, beside the native kernel called directly
and PyTorch's operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import OURS, Agreement, Call, Case, agreement
from bench.row import Key
from mplug2_fast.ops import layer_norm
from mplug2_fast.ops.runtime import cpu
from mplug2_fast.ops.runtime.spec import NOISE_FLOOR

CALLS = 1000
"""Calls in one timed run."""
KERNEL = "kernel"
SIZES = {"rows": (4,), "channels": 64}


def build(key: Key, *, compile: bool) -> Case:
    spec = layer_norm.op.spec
    given = spec.inputs(SIZES, getattr(torch, key.dtype), key.device)
    x, weight, bias, eps = given.values()
    ours = partial(layer_norm, x, weight, bias, eps=eps)
    ways = {OURS: ours, "torch": partial(F.layer_norm, x, x.shape[-1:], weight, bias, eps)}
    if cpu.available():
        ways[KERNEL], _ = kernel(x, weight, bias, eps)

    def agree() -> Agreement:
        return agreement(
            ours(), spec.reference(*given.values(), upcast=True), spec.reference(*given.values()), NOISE_FLOOR[x.dtype]
        )

    return Case(
        key=key,
        ways={way: partial(_calls, run) for way, run in ways.items()},
        flop=CALLS * spec.flops(**given),
        bytes=CALLS * spec.bytes(given, ours()),
        agreement=agree,
        backend=layer_norm.op.explain(*given.values()).chosen or "",
    )


def kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Callable[[], None], Tensor]:
    """Calls the native kernel with arguments prepared beforehand. Also returns the tensor that it writes."""
    out, (rows, channels) = torch.empty_like(x), x.shape
    run = cpu.module().layer_norm
    arguments = (
        cpu.isa(), x.dtype == torch.bfloat16, 1, (1, rows, channels), x.data_ptr(), (0, channels), 0, (0, 0), 1.0,
        weight.data_ptr(), bias.data_ptr(), eps, out.data_ptr(), 0,
    )  # fmt: skip

    def call(_: Any = (x, weight, bias, out)) -> None:  # keeps the tensors alive, whose addresses the kernel gets
        run(*arguments)

    return call, out


def _calls(run: Callable[[], Any]) -> list[Call]:
    @torch.no_grad()
    def many() -> None:
        for _ in range(CALLS):
            run()

    return [Call(many)]
