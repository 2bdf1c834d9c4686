"""FLOP counts for `torch.utils.flop_counter`: those of the modules that the operators replace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mplug2_fast.ops.runtime.op import Op

_FORMULAS: dict[Any, Callable[..., int]] = {}
"""`torch.ops.mplug2_fast.NAME` -> its FLOPs, from all of its arguments."""


def add(op: Op[Any]) -> None:
    """Adds the formulas of an operator, of NAME_train and of NAME_backward."""
    spec, count = op.spec, len(op.names)

    def forward(*values: Any, **_: Any) -> int:
        return sum(flops for flops, *_ in spec.matrix_products(spec.arguments(*values)))

    def backward(_: Any, *given: Any, **__: Any) -> int:
        needed = {name for name, need in zip(spec.differentiable, given[count], strict=True) if need}
        products = spec.matrix_products(spec.arguments(*given[:count]))
        return sum(flops * sum(not needed.isdisjoint(side) for side in sides) for flops, *sides in products)

    packets = torch.ops.mplug2_fast
    _FORMULAS[getattr(packets, op.name)] = forward
    if spec.differentiable:
        _FORMULAS[getattr(packets, f"{op.name}_backward")] = backward
    if op.training_op is not op.torch_op:
        _FORMULAS[getattr(packets, f"{op.name}_train")] = forward


def register() -> None:
    """Gives the formulas to the counter and to those that are counting, if the counter is imported: importing it also
    imports Triton."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    for packet, formula in _FORMULAS.items():
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet, get_raw=True)(formula)
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            for packet, formula in _FORMULAS.items():
                registry.setdefault(packet, formula)
