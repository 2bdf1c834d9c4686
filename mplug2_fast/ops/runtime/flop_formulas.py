"""What `torch.utils.flop_counter` counts for operators: the products of the modules that they replace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mplug2_fast.ops.runtime.dispatch import Op

_FORMULAS: dict[Any, Callable[..., int]] = {}
"""`torch.ops.mplug2_fast.NAME` -> its FLOPs, from all of its arguments."""


def add(op: Op) -> None:
    """Makes the formulas of an operator, of NAME_train and of NAME_backward."""
    names, products = op._names, op.spec.products

    def forward(*arguments: Any, **_: Any) -> int:
        return sum(flops for flops, *_ in products(**dict(zip(names, arguments, strict=True))))

    def backward(_: Any, *given: Any, **__: Any) -> int:
        needs = given[len(names)]
        needed = {name for name, need in zip(op.spec.differentiable, needs, strict=True) if need}
        made = products(**dict(zip(names, given[: len(names)], strict=True)))
        return sum(flops * len([sides for sides in every if needed.intersection(sides)]) for flops, *every in made)

    packets = torch.ops.mplug2_fast
    _FORMULAS[getattr(packets, op.name)] = forward
    if op.spec.differentiable:
        _FORMULAS[getattr(packets, f"{op.name}_backward")] = backward
    if op._training_op is not op._torch_op:
        _FORMULAS[getattr(packets, f"{op.name}_train")] = forward


def register() -> None:
    """Tells the counter, and those that are counting, once somebody has imported it: importing it imports Triton."""
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
