"""8-bit copies of the weights of swapped modules, for products with many rows.

The wide weights stay. Each product compares the checksum of the wide weight with that of its copy, and rounds the
weight again if they differ. So results always belong to the present weights.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.acceleration import gain
from mplug2_fast.acceleration.report import Calls
from mplug2_fast.nn.quantise import smoothing
from mplug2_fast.ops import linear_int8
from mplug2_fast.ops.checksum import checksum, is_readable
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.linear_int8 import MOST_INPUTS, quantise_weight
from mplug2_fast.ops.runtime import cpu

_ROUNDED, FEEDS, _MARK = "_mplug2_fast_int8", "_mplug2_fast_feeds_int8", "_mplug2_fast_norm"


@dataclass(frozen=True)
class Product:
    """The linear layer of an 8-bit weight: `residual + activation(product)`.

    Attributes:
        weight, scale: as for `ops.linear_int8`. inverse: `(in_features,)`, multiplied with x first; None for ones.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    inverse: Tensor | None

    def __call__(self, x: Tensor, activation: Activation = "none", *, residual: Tensor | None = None) -> Tensor:
        x = x if self.inverse is None else x * self.inverse
        if residual is not None and (residual.dtype != x.dtype or _needs_grad(residual)):
            return residual + linear_int8(x, self.weight, self.scale, self.bias, activation)
        return linear_int8(x, self.weight, self.scale, self.bias, activation, residual=residual)


@dataclass(frozen=True)
class _Copy:
    """`made_of` identifies the values that it was made from."""

    made_of: tuple[Any, ...]
    weight: Tensor
    scale: Tensor
    inverse: Tensor | None


class Rounded:
    """The 8-bit copies of the rows of one weight. Copies and pickles of a module start without them.

    Args:
        calls: where products are counted.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self._copies: dict[Any, _Copy] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"calls": self.calls, "_copies": {}}

    def product(self, layer: Any, name: str, x: Tensor, norm: nn.Module | None, rows: slice | None) -> Product | None:
        """The product of the present weight with x, or None if it must be wide. Counts it."""
        weight, bias = (getattr(layer, f"{name}{kind}") for kind in ("weight", "bias"))
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        weight = weight.flatten(1)
        reason = _why_wide(layer, x, weight, bias)
        if reason:
            self.calls.wide[reason] += 1
            return None
        self.calls.int8 += 1
        copy = self._copy(weight, None if rows is None else (rows.start, rows.stop), norm)
        return Product(copy.weight, copy.scale, bias, copy.inverse)

    def _copy(self, weight: Tensor, place: Any, norm: Any) -> _Copy:
        vectors = [] if norm is None else [each for each in (norm.weight, norm.bias) if each is not None]
        if not all(map(is_readable, vectors)):
            norm, vectors = None, []
        made_of = (weight.dtype, weight.shape, len(vectors), checksum((weight, *vectors)))
        copy = self._copies.get(place)
        if copy is None or copy.made_of != made_of:
            copy = self._copies[place] = _rounded(made_of, weight, norm)
        return copy


@torch.no_grad()
def _rounded(made_of: tuple[Any, ...], weight: Tensor, norm: nn.Module | None) -> _Copy:
    if norm is None:
        return _Copy(made_of, *quantise_weight(weight), None)
    factor = smoothing(norm, weight)
    return _Copy(made_of, *quantise_weight(weight.float() * factor), factor.reciprocal().to(weight.dtype))


def _why_wide(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why a layer with an 8-bit weight computes with the wide one. Empty if it need not."""
    if x.numel() // max(1, x.shape[-1]) < gain.rows_for_int8(gain.Size.of(weight)):
        return "too few rows"
    if layer.training:
        return "in training mode"
    if not x.is_cpu or not weight.is_cpu:
        return f"on the device {x.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if any(map(_needs_grad, (x, weight) if bias is None else (x, weight, bias))):
        return "gradients"
    if x.dtype not in cpu.DTYPES or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"a weight of {weight.dtype} and an input of {x.dtype}"
    return "" if is_readable(weight) else "a weight with gaps in memory"


def _needs_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def find(
    layer: nn.Module, x: Tensor, norm: nn.Module | None, *, name: str = "", rows: slice | None = None
) -> Product | None:
    """The product of a layer with an 8-bit weight, for an input that has x's rows and dtype. None if it has none, or if
    the wide weight must compute this call.

    Args:
        norm: the layer norm whose result the input is, if it is known.
        name: the beginning of the names of weight and bias. rows: of the weight.
    """
    rounded = vars(layer).get(_ROUNDED)
    return None if rounded is None else rounded.product(layer, name, x, norm, rows)


# --- which layers have 8-bit weights


def unfit(weight: Tensor) -> str:
    """Why a weight cannot become 8-bit. Empty if it can."""
    if not (weight.is_cpu or weight.is_meta):
        return f"its weight is on {weight.device.type}, and 8-bit weights are for CPUs"
    if weight.dtype not in cpu.DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32 or bfloat16"
    inputs = weight[0].numel() if len(weight) else 0
    return f"it has more than {MOST_INPUTS} inputs" if inputs > MOST_INPUTS else ""


def add(layer: nn.Module, calls: Calls) -> None:
    """Gives a layer an 8-bit weight, which its first product with many rows makes."""
    vars(layer)[_ROUNDED] = Rounded(calls)


def is_rounded(layer: nn.Module) -> bool:
    """Whether a layer has an 8-bit weight."""
    return _ROUNDED in vars(layer)


def feeds(norm: nn.Module) -> None:
    """Makes a norm mark its results, so that products of them are smoothed."""
    vars(norm)[FEEDS] = True


def remove(module: nn.Module) -> None:
    """Undoes `add` and `feeds`."""
    for name in (_ROUNDED, FEEDS):
        vars(module).pop(name, None)


# --- norms


class _Mark:
    """Copies and pickles of a marked tensor have no mark."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = weakref.ref(norm)

    def __reduce__(self) -> Any:
        return type(None), ()


def mark(out: Tensor, norm: nn.Module) -> Tensor:
    """Remembers the norm of a result. A product uses it to choose the factors of smoothing: they do not change what is
    computed, only how finely it is rounded. So the mark may be lost, and out may be written to."""
    if FEEDS in vars(norm):
        setattr(out, _MARK, _Mark(norm))
    return out


def mark_like(out: Tensor, given: Tensor) -> Tensor:
    """Copies the mark to a view with other axes."""
    if out is not given and (found := getattr(given, _MARK, None)) is not None:
        setattr(out, _MARK, found)
    return out


def norm_of(x: Tensor) -> nn.Module | None:
    """The norm that x is the result of, if it is marked."""
    found = getattr(x, _MARK, None)
    return None if found is None else found.norm()
