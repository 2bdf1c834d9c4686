"""A small run of every operator on a GPU, forward and backward, at sizes that kernels get wrong: what `bench.gpu_check`
gives to compute-sanitizer.

    compute-sanitizer --tool memcheck python -m bench.gpu_memcheck
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplug2_fast import ops
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Sizes

DTYPES = (torch.bfloat16, torch.float32)
MOST = 3
"""Sizes of an operator, for a kernel takes many times as long when every access is checked."""


def chosen(op: Op) -> list[Sizes]:
    """Some of the operator's awkward sizes, from all over the list."""
    return list(op.spec.edge_cases[:: -(-len(op.spec.edge_cases) // MOST)])


def run(op: Op, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
    """One forward, and one backward where the operator has one."""
    given: dict[str, Any] = op.spec.inputs(sizes, dtype, device)
    for name in op.spec.differentiable:
        if isinstance(given[name], Tensor):
            given[name].requires_grad_()
    results = op(*given.values())
    outs = [out for out in (results if isinstance(results, tuple) else (results,)) if out.requires_grad]
    if outs:
        torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def main(device: str = "cuda") -> None:
    for name, function in ops.OPERATORS.items():
        for sizes in chosen(function.op):
            for dtype in DTYPES:
                run(function.op, sizes, dtype, device)
                print(f"{name} {sizes} {dtype}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
