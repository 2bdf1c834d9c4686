"""What an operator computes. Its tests, its benchmark and its documentation read this one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.runtime.schema import Argument, declared

Sizes = Mapping[str, Any]
"""The sizes and switches from which inputs are made: the arguments of `Spec.make_inputs`."""
Product = tuple[Any, ...]
"""FLOPs of a matrix product, then for each of its two sides the arguments that it depends on. The backward multiplies
once for each side that needs a gradient. A product that the backward recomputes has a third side."""

# The error that summation order and the rounding of the result may cause, relative to the result's norm.
NOISE_FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 4.9e-4, torch.float64: 1e-12}


@dataclass(frozen=True)
class Spec:
    """An operator without its backends. The functions below take one `Arguments`, the operator's NamedTuple.

    Attributes:
        name: the operator's name, and the stem of its files.
        arguments: the NamedTuple of its arguments, see `schema`.
        results: the axes of each result.
        eager: the reference, in plain eager code.
        make_inputs: `(generator, **sizes)` to Arguments, tensors in float32 and on the CPU. No element is zero.
        edge_cases: sizes that tend to break kernels.
        models: preset ("base", "large") -> the sizes that the model uses at batch size 1.
        count_flops: floating-point operations needed; one multiply-add counts 2.
        matrix_products: the products that PyTorch's FLOP counter counts in plain modules.
        differentiable: arguments that have gradients.
        kept: float arguments that stay float32 whatever the dtype of the others.
        devices: the device types on which it runs without being asked to by `use_backend`.
        exact: whether all backends must return the same bits.
        rounding: the error of numbers that are rounded to neighbouring whole numbers, for Arguments.
    """

    name: str
    arguments: type[Any]
    results: tuple[str, ...]
    eager: Callable[[Any], Any]
    make_inputs: Callable[..., Any]
    edge_cases: tuple[Sizes, ...]
    models: Mapping[str, Sizes]
    count_flops: Callable[[Any], int]
    matrix_products: Callable[[Any], Sequence[Product]] = lambda _: ()
    differentiable: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    exact: bool = False
    noise_floor: Mapping[torch.dtype, float] = field(default_factory=lambda: NOISE_FLOOR)
    rounding: Callable[[Any], float] = lambda _: 0.0

    @cached_property
    def declared(self) -> list[Argument]:
        return declared(self.arguments)

    @property
    def axes(self) -> dict[str, str]:
        """The axes of each tensor by name, and those of the results under "result"."""
        return {a.name: a.axes for a in self.declared if a.is_tensor} | {"result": ", ".join(self.results)}

    def reference(self, *values: Any, upcast: bool = False, **named: Any) -> Any:
        """The result of plain eager code, in float64 with `upcast`."""
        arguments = self.arguments(*values, **named)
        return self.eager(arguments._make(map(_in_float64, arguments)) if upcast else arguments)

    def floor(self, arguments: Mapping[str, Any], dtype: torch.dtype) -> float:
        """The error that is noise for these arguments, by name."""
        return max(self.noise_floor[dtype], self.rounding(self.arguments(**arguments)))

    def flops(self, **named: Any) -> int:
        return self.count_flops(self.arguments(**named))

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

        made = self.make_inputs(torch.Generator().manual_seed(seed), **sizes)
        return {name: placed(name, value) for name, value in made._asdict().items()}

    def bytes(self, arguments: Mapping[str, Any], result: Any) -> int:
        """The least memory traffic: each argument and each result once."""
        results = result if isinstance(result, tuple) else [result]
        return sum(value.nbytes for value in (*arguments.values(), *results) if isinstance(value, Tensor))


def _in_float64(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normally distributed float32 values."""
    return torch.randn(shape, generator=generator) * scale
