"""Models with 8-bit weights: formats, layers, and the official names of weights and scales."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from mplug2_fast.devices import FP8, INT8
from mplug2_fast.errors import ConfigError
from mplug2_fast.models.names import SCALE, Entry, OfficialNames
from mplug2_fast.nn.eight_bit import EightBitLinear, EightBitWeight
from mplug2_fast.nn.fp8 import Fp8Linear
from mplug2_fast.nn.int8 import Int8Linear
from mplug2_fast.nn.quantise import matches, quantise, quantise_memory_projections

MEMORY = 0
"""In place of bits: of this part, only the projections of a memory get 8-bit weights."""


class Format(NamedTuple):
    """A format of 8-bit weights.

    Attributes:
        dtype: of weights. kind: of linear layers.
        bits: part of a model -> bits to which the inputs of its layers are rounded, or `MEMORY`.
    """

    dtype: torch.dtype
    kind: type[EightBitLinear]
    bits: Mapping[str, int]


FORMATS = {
    INT8: Format(torch.int8, Int8Linear, {"visual": 8, "universal": 8, "text": 16, "fusion": 16, "decoder": 16}),
    FP8: Format(torch.float8_e4m3fn, Fp8Linear, {"visual": 8, "universal": 8, "fusion": 8, "decoder": MEMORY}),
}
"""By name. Texts have few tokens and cost little: int8 rounds them finely, and fp8 leaves their encoder wide. On a GPU,
steps of the decoder have fused kernels for wide weights."""


class Quantisation(NamedTuple):
    """That a model has 8-bit weights.

    Attributes:
        weights: their format, in `FORMATS`. keep: patterns of layers that are not rounded: see `Model.quantise`.
    """

    weights: str
    keep: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.weights} but {', '.join(self.keep)}" if self.keep else self.weights


class Unit(NamedTuple):
    """A part of a model that is rounded as a whole.

    Attributes:
        name: of the module. kind: of its layers. bits: to which their inputs are rounded, or `MEMORY`.
    """

    name: str
    module: nn.Module
    kind: type[EightBitLinear]
    bits: int

    def quantise(self, keep: Sequence[str]) -> list[str]:
        """Gives it 8-bit weights, except for the layers that `keep` matches. Returns the names of the others."""
        return self.quantise_unless(lambda name: any(matches(pattern, name) for pattern in keep))

    def quantise_unless(self, keep: Callable[[str], bool]) -> list[str]:
        """As `quantise`, except for the layers whose names in the model `keep` accepts."""

        def kept(name: str) -> bool:
            return keep(f"{self.name}.{name}")

        if self.bits == MEMORY:
            names = quantise_memory_projections(self.module, kept, self.kind)
        else:
            names = quantise(self.module, self.bits, kept, self.kind)
        return [f"{self.name}.{name}" for name in names]


def blocks_of(model: nn.Module, weights: str = INT8) -> Iterator[Unit]:
    """The transformer blocks of the parts that can have 8-bit weights of this format."""
    for part in _parts(model, weights):
        for inside, blocks in part.module.named_children():
            if isinstance(blocks, nn.ModuleList):
                for number, block in enumerate(blocks):
                    yield part._replace(name=f"{part.name}.{inside}.{number}", module=block)


def units_of(model: nn.Module, weights: str) -> Iterator[Unit]:
    """All that can have 8-bit weights of this format: the blocks, then the parts that they are in."""
    yield from blocks_of(model, weights)
    yield from _parts(model, weights)


def _parts(model: nn.Module, weights: str) -> Iterator[Unit]:
    _, kind, bits = FORMATS[weights]
    for part in bits:
        if part in model._modules:
            yield Unit(part, getattr(model, part), kind, bits[part])


def require_matches(model: nn.Module, keep: Sequence[str], weights: str) -> None:
    """Raises `ConfigError` for a pattern that matches no layer that could have 8-bit weights of this format."""
    if isinstance(keep, str):
        raise ConfigError(f"keep is a list of patterns: pass [{keep!r}]")
    names: list[str] = []

    def seen(name: str) -> bool:
        names.append(name)
        return True

    for part in _parts(model, weights):
        part.quantise_unless(seen)
    for pattern in keep:
        if not any(matches(pattern, name) for name in names):
            some = ", ".join(dict.fromkeys(name.partition(".")[0] + ".*" for name in names))
            example = names[len(names) // 2] if names else "none"
            raise ConfigError(f"keep {pattern!r} matches no layer: layers are in {some}; one is {example}")


def eight_bit_names(names: OfficialNames, model: nn.Module) -> OfficialNames:
    """The names of a model whose layers partly have 8-bit weights: these layers have scales too."""
    found = copy.copy(names)
    found.entries, found.needed, found.dtypes = [], {}, {}
    for entry in names.entries:
        moved, layer = _moved(model, entry)
        found.add(moved)
        module, _, kind = moved.path.rpartition(".")
        if isinstance(layer, EightBitWeight) and kind == "weight":
            scale = moved._replace(official=f"{entry.official}{SCALE}", shape=entry.shape[:1], path=f"{module}.scale")
            found.add(scale)
            found.dtypes |= {entry.official: layer.weight.dtype, scale.official: torch.float32}
    return found


def _moved(model: nn.Module, entry: Entry) -> tuple[Entry, nn.Module]:
    """The entry of a parameter in the layer with 8-bit weights that replaces its module, if one does. And its layer."""
    name, _, parameter = entry.path.rpartition(".")
    parent = functools.reduce(getattr, name.split("."), model) if name else model
    layer, _, kind = parameter.rpartition("_")
    modules = parent._modules
    if layer == "in_proj" and "in_proj" in modules:  # in_proj_weight is the weight of in_proj now
        return entry._replace(path=f"{name}.in_proj.{kind}"), modules["in_proj"]
    if layer == "in_proj" and "memory_proj" in modules:
        if entry.part == 0:  # in_proj_weight has the rows of queries
            return entry._replace(parts=1), parent
        path = f"{name}.memory_proj.{kind}"
        return entry._replace(path=path, part=entry.part - 1, parts=entry.parts - 1), modules["memory_proj"]
    return entry, parent
