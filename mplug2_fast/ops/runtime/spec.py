"""What an operator computes: one object that its tests, its benchmark and its documentation read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, Any]
"""The numbers and switches from which inputs are made; the same names as the arguments of `Spec.make`."""
Product = tuple[Any, ...]
"""FLOPs of a product, then the arguments that each of its sides depends on. A backward multiplies once for each side
that leads to a gradient; a product that it computes again has one side more."""

# What summation order and rounding of the result alone may cost, relative to the result's norm.
NOISE_FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 4.9e-4, torch.float64: 1e-12}


@dataclass(frozen=True)
class Spec:
    """An operator, apart from how it is computed.

    Attributes:
        name: the operator's, and the stem of its files.
        axes: argument or result -> its axes.
        reference: plain eager code with the operator's arguments; `upcast=True` computes in float64.
        make: `(generator, **sizes)` to the operator's arguments, tensors in float32 and on the CPU. Nothing is zero.
        awkward: sizes that kernels get wrong.
        models: preset ("base", "large") -> the sizes at which the model calls it, batch 1.
        flops: needed floating-point operations, from the arguments; one multiply-add is 2.
        products: from the arguments, the products that PyTorch's FLOP counter counts of plain modules: FLOPs and the
            differentiable arguments behind them.
        differentiable: arguments that gradients are asked for.
        kept: float arguments that are float32 whatever the dtype of the others.
        exact: whether all backends must give the same values.
    """

    name: str
    axes: Mapping[str, str]
    reference: Callable[..., Any]
    make: Callable[..., dict[str, Any]]
    awkward: tuple[Sizes, ...]
    models: Mapping[str, Sizes]
    flops: Callable[..., int]
    products: Callable[..., Sequence[Product]] = lambda **_: ()
    differentiable: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    exact: bool = False
    noise_floor: Mapping[torch.dtype, float] = field(default_factory=lambda: NOISE_FLOOR)

    def inputs(
        self, sizes: Sizes, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments of these sizes: floating-point tensors in dtype, everything on the device."""

        def placed(name: str, value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return dtype
            if not isinstance(value, Tensor):
                return value
            cast = value.is_floating_point() and name not in self.kept
            return value.to(device=device, dtype=dtype if cast else None)

        made = self.make(torch.Generator().manual_seed(seed), **sizes)
        return {name: placed(name, value) for name, value in made.items()}

    def bytes(self, arguments: Mapping[str, Any], result: Any) -> int:
        """What has to be read and written at least: every argument and every result once."""
        return sum(
            _size(value) for value in (*arguments.values(), *(result if isinstance(result, tuple) else [result]))
        )


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def upcast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in float64; None stays None."""
    return tuple(None if t is None else t.double() for t in tensors)


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normally distributed float32 values."""
    return torch.randn(shape, generator=generator) * scale
