"""Official parameter names of a family: what each name is to a model, and the views into the model's tensors."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]

VISION, TEXT, FUSION, DECODER, CONTRAST, MATCHING = SHARED_MODULES = (
    "vision",
    "text",
    "fusion",
    "decoder",
    "contrast",
    "matching",
)
"""Modules that every family has."""

SCALE = "_scale"
"""Follows the name of an 8-bit weight in that of its scale."""

LAYER_NUMBER = r"(0|[1-9][0-9]{0,3})"
"""Pattern of a layer's number. Keys with larger numbers are unexpected: no model has as many layers."""


class Entry(NamedTuple):
    """One official parameter.

    Attributes:
        official: its name in a checkpoint. shape: its shape there.
        path: our parameter. It may hold several official ones, one after another along the first axis.
        part: which of them this is. parts: how many there are.
    """

    official: str
    shape: Shape
    path: str
    part: int = 0
    parts: int = 1


class KeyKind(enum.Enum):
    """What a key of a state dict is to a model."""

    NEEDED = "needed"
    TIED = "tied"
    UNUSED = "unused"
    MOMENTUM = "momentum"
    UNEXPECTED = "unexpected"


class OfficialNames:
    """The official names of one size of a family.

    Attributes:
        entries: the parameters that the model computes with.
        needed: official name -> shape of exactly these.
        tied: names that a file stores twice -> the name that the models use.
        resizable: position embeddings that are resized where the resolution differs.
        dtypes: 8-bit weights and their scales -> the dtype that they must have.
    """

    tied: Mapping[str, str] = {}
    resizable: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries: list[Entry] = []
        self.needed: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Makes a parameter one that the model computes with."""
        self.entries.append(entry)
        self.needed[entry.official] = entry.shape

    def classify(self, key: str) -> KeyKind:
        """What `key` is. Prefixes of wrappers, such as `module.`, must already be gone."""
        if key in self.needed:
            return KeyKind.NEEDED
        if key in self.tied:
            return KeyKind.TIED
        if self.dtypes and key.endswith(SCALE):
            weight = self.classify(key.removesuffix(SCALE))
            return KeyKind.UNEXPECTED if weight is KeyKind.NEEDED else weight
        return KeyKind.UNUSED if key.startswith("heads.") else KeyKind.UNEXPECTED

    def views(
        self, model: nn.Module, of: Callable[[Tensor], Tensor] = Tensor.detach, only: Container[str] | None = None
    ) -> dict[str, Tensor]:
        """Official name -> view into the model's parameters, or into what `of` makes of each: their gradients, say.

        `only` has the paths of the parameters that are wanted; None wants all.
        """
        return {
            entry.official: _part(of(_attribute(model, entry.path)), entry).view(entry.shape)
            for entry in self.entries
            if only is None or entry.path in only
        }


def _part(tensor: Tensor, entry: Entry) -> Tensor:
    return tensor if entry.parts == 1 else tensor.chunk(entry.parts)[entry.part]


def _attribute(model: nn.Module, path: str) -> Tensor:
    """By attributes, which wrappers of modules pass on, not by `named_parameters`, which has the wrappers' names."""
    return functools.reduce(getattr, path.split("."), model)


def with_heads(names: OfficialNames, heads: Mapping[str, nn.Module]) -> OfficialNames:
    """The names, and those of the heads of tasks: `heads.TASK.PARAMETER`, in checkpoints and in the model."""
    for task, head in heads.items():
        for name, parameter in head.named_parameters():
            path = f"heads.{task}.{name}"
            names.add(Entry(path, tuple(parameter.shape), path))
    return names
