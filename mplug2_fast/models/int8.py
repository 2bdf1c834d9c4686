"""Models with 8-bit weights: their layers, and the official names of weights and scales."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from mplug2_fast.errors import ConfigError
from mplug2_fast.models.names import SCALE, Entry, OfficialNames
from mplug2_fast.nn.quantise import matches, quantise

BITS = {"visual": 8, "universal": 8, "text": 16, "fusion": 16, "decoder": 16}
"""Part of a model -> bits to which the inputs of its layers are rounded. Texts have few tokens, and cost little."""


class Unit(NamedTuple):
    """A part of a model that is rounded as a whole.

    Attributes:
        name: of the module. bits: to which the inputs of its layers are rounded.
    """

    name: str
    module: nn.Module
    bits: int

    def quantise(self, keep: Sequence[str]) -> list[str]:
        """Gives it 8-bit weights, except for the layers that `keep` matches. Returns the names of the others."""

        def kept(name: str) -> bool:
            return any(matches(pattern, f"{self.name}.{name}") for pattern in keep)

        return [f"{self.name}.{name}" for name in quantise(self.module, self.bits, kept)]


def blocks_of(model: nn.Module) -> Iterator[Unit]:
    """The transformer blocks of the parts that can have 8-bit weights."""
    for part in _parts(model):
        for inside, blocks in part.module.named_children():
            if isinstance(blocks, nn.ModuleList):
                for number, block in enumerate(blocks):
                    yield Unit(f"{part.name}.{inside}.{number}", block, part.bits)


def units_of(model: nn.Module) -> Iterator[Unit]:
    """All that can have 8-bit weights: the blocks, then the parts that they are in."""
    yield from blocks_of(model)
    yield from _parts(model)


def _parts(model: nn.Module) -> Iterator[Unit]:
    for part, bits in BITS.items():
        if part in model._modules:
            yield Unit(part, getattr(model, part), bits)


def require_matches(model: nn.Module, keep: Sequence[str]) -> None:
    """Raises `ConfigError` for a pattern that matches no layer that could have 8-bit weights."""
    if isinstance(keep, str):
        raise ConfigError(f"keep is a list of patterns: pass [{keep!r}]")
    names: list[str] = []
    for part in _parts(model):

        def seen(name: str, part: str = part.name) -> bool:
            names.append(f"{part}.{name}")
            return True

        quantise(part.module, keep=seen)
    for pattern in keep:
        if not any(matches(pattern, name) for name in names):
            some = ", ".join(dict.fromkeys(name.partition(".")[0] + ".*" for name in names))
            example = names[len(names) // 2] if names else "none"
            raise ConfigError(f"keep {pattern!r} matches no layer: layers are in {some}; one is {example}")


def int8_names(names: OfficialNames, model: nn.Module) -> OfficialNames:
    """The names of a model whose layers partly have 8-bit weights: these layers have scales too."""
    found = copy.copy(names)
    found.entries, found.needed, found.dtypes = [], {}, {}
    for entry in names.entries:
        layer = _int8_path(model, entry.path)
        if layer is None:
            found.add(entry)
            continue
        module, _, kind = layer.rpartition(".")
        found.add(entry._replace(path=layer))
        if kind == "weight":
            scale = Entry(f"{entry.official}{SCALE}", entry.shape[:1], f"{module}.scale", entry.part, entry.parts)
            found.add(scale)
            found.dtypes |= {entry.official: torch.int8, scale.official: torch.float32}
    return found


def _int8_path(model: nn.Module, path: str) -> str | None:
    """The path of a parameter in the layer with 8-bit weights that replaces its module, or None if none does."""
    name, _, parameter = path.rpartition(".")
    parent = functools.reduce(getattr, name.split("."), model) if name else model
    layer, _, kind = parameter.rpartition("_")
    if layer and getattr(parent, parameter, None) is None and isinstance(getattr(parent, layer, None), nn.Module):
        return f"{name}.{layer}.{kind}"  # in_proj_weight is the weight of in_proj now
    return path if getattr(getattr(parent, "weight", None), "dtype", None) == torch.int8 else None
