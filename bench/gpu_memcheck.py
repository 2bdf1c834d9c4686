"""A small run for compute-sanitizer: each operator on a GPU, forward and backward, at edge cases.

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
MAX_SIZES = 3
"""Per operator, because checking each access makes kernels many times slower."""


def chosen(op: Op) -> list[Sizes]:
    """Some of the operator's edge cases, spread over the list."""
    return list(op.spec.edge_cases[:: -(-len(op.spec.edge_cases) // MAX_SIZES)])


def run(op: Op, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
    """One forward pass, and a backward pass if the operator has one."""
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
        if device not in function.op.spec.devices:
            continue
        for sizes in chosen(function.op):
            for dtype in DTYPES:
                run(function.op, sizes, dtype, device)
                print(f"{name} {sizes} {dtype}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
